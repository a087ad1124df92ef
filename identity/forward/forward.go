// Package forward lets applications that know nothing of TLS speak to gateways under their own SPIFFE identity.
//
// It is for an agent on the application's machine. It listens on loopback or on a Unix socket, finds out of every
// connection which process made it, and passes its requests on to a gateway, over mutual TLS, as that process: with an
// X.509-SVID that is issued to that process and to no other. An application is pointed at
// http://127.0.0.1:PORT/ENDPOINT/v1 and not changed. The package listens on no network, never lets two processes share
// a connection to a gateway, and never decides who may do what: gateways do. It never writes or logs a key, and does
// not keep or read what passes.
//
// Who is at the other end, only the kernel is asked. On a Unix socket it says so itself. On loopback, it is the one
// process that holds the client's socket, under the user that made it. A socket that two processes hold belongs to
// none: a connection that is inherited or handed over before it is attested is refused. As with package attest, a
// process that has ended, or that runs another program than when it was attested, is nobody.
//
// What it cannot do: tell apart processes that may debug each other, as package attest says. Over loopback, it cannot
// see the descriptors of other users' processes unless it is root (or has CAP_SYS_PTRACE): without, it serves its own
// user there, and cannot see whether a process that hides its descriptors shares a socket. A Unix socket has neither
// limit, and no browser reaches it.
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/issuer"
)

const (
	maxConnections     = 4096 // of all callers; each takes two descriptors
	maxUserConnections = 1024 // of one user's processes
	maxHeader          = 64 << 10
	headerTimeout      = 10 * time.Second
	idleTimeout        = 2 * time.Minute // of a caller's connection
	linger             = 5 * time.Minute // an identity that nobody uses is let go
)

// Source says what callers are entitled to and signs for them: an *issuer.Issuer whose Config.Attest is Selectors.
type Source interface {
	issuer.Signer
	Entitled(context.Context) (issuer.View, error)
}

// Target is where an endpoint is served: by gateways of which one is as good as another.
type Target struct {
	Addresses  []string      // of the gateways: host:port; the next is tried where one cannot be connected to
	IDs        []spiffeid.ID // the gateways'; nobody else is spoken to
	ServerName string        // of the endpoint: what SNI and Host say
}

// Why there is no Target.
var (
	// ErrNoEndpoint says that none has this name, as far as is known here.
	ErrNoEndpoint = errors.New("no endpoint has this name")
	// ErrNotTold says that it is not known yet.
	ErrNotTold = errors.New("it is not known yet which endpoints there are")
	// ErrNoAddress says that there is one, and nobody has said where its gateways can be reached.
	ErrNoAddress = errors.New("no gateway says where it can be reached")
)

// Forwarder is what Run needs: all of it.
type Forwarder struct {
	Listener net.Listener // of Listen, or on a Unix socket
	Source   Source
	// Gateway returns where an endpoint is served, or one of the errors above. It is asked at each request.
	Gateway func(endpoint string) (Target, error)
	Log     *slog.Logger
}

// Listen listens on a loopback address, as in 127.0.0.1:8080, [::1]:8080 or localhost:8080, and refuses others.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen for applications: %w", err)
	}
	if host == "localhost" {
		host = "127.0.0.1" // whatever a resolver says
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.Unmap().IsLoopback() {
		return nil, fmt.Errorf("listen for applications: %s is not a loopback address", address)
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false) // the kernel does not say whose the subflows are
	l, err := config.Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("listen for applications: %w", err)
	}
	return l, nil
}

// Run serves until the context ends, and then returns nil. It closes the listener and every connection.
func (f *Forwarder) Run(ctx context.Context) error {
	defer f.Listener.Close()
	switch a := f.Listener.Addr().(type) {
	case *net.UnixAddr:
	case *net.TCPAddr:
		if !a.IP.IsLoopback() {
			return fmt.Errorf("forward: %s is not a loopback address", a)
		}
	default:
		return fmt.Errorf("forward: a listener on %s says nothing of its callers", a.Network())
	}
	return newServer(f).run(ctx)
}

// server is what one Run has.
type server struct {
	*Forwarder
	slots   slots
	sockets sockets
	linger  time.Duration

	mu       sync.Mutex
	sessions map[key]*session
	warned   map[string]time.Time // by code
	ended    bool                 // no request is begun any more
	running  sync.WaitGroup       // requests, and sessions, which begin in them
}

func newServer(f *Forwarder) *server {
	return &server{
		Forwarder: f,
		slots:     slots{all: maxConnections, user: maxUserConnections, used: map[int]int{}},
		sockets:   sockets{hashes: attest.NewHashes()},
		linger:    linger,
		sessions:  map[key]*session{},
		warned:    map[string]time.Time{},
	}
}

func (s *server) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	web := &http.Server{
		Handler:                      http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(ctx, w, r) }),
		Protocols:                    &protocols,
		ReadHeaderTimeout:            headerTimeout,
		IdleTimeout:                  idleTimeout, // a request may take as long as it likes
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug), // what clients send wrong
	}
	attested := queue{make(chan *conn), ctx, s.Listener.Addr()}
	group.Go(func() error { return s.accept(ctx, attested.conns) })
	group.Go(func() error {
		if err := web.Serve(attested); err != nil && ctx.Err() == nil {
			return fmt.Errorf("forward: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return errors.Join(s.Listener.Close(), web.Close())
	})
	err := group.Wait()
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.running.Wait()
	return err
}

// begin lets Run wait for a request, unless it has waited already.
func (s *server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.running.Add(1)
	return true
}

// accept attests connections, each in its own time, so that none holds up another.
func (s *server) accept(ctx context.Context, attested chan<- *conn) error {
	var attesting sync.WaitGroup
	defer attesting.Wait()
	for {
		raw, err := s.Listener.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				raw.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("forward: %w", err)
		case err != nil: // such as too many open files
			s.warn("accept", "connections not accepted", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		if !s.slots.take() {
			s.warn("connections", "connection refused: there are too many", "limit", maxConnections)
			raw.Close()
			continue
		}
		attesting.Go(func() {
			c := s.attest(ctx, raw)
			select {
			case attested <- c:
			case <-ctx.Done():
				c.Close()
			}
		})
	}
}

// attest returns a connection whose slot has been taken. One that cannot be attested is a connection too: its requests
// are answered with why.
func (s *server) attest(ctx context.Context, raw net.Conn) *conn {
	c := &conn{Conn: raw, release: func() { s.slots.release(nil) }}
	p, err := s.sockets.hold(ctx, raw)
	if err != nil {
		c.refused = err
		return c
	}
	if !s.slots.takeFor(p.UID) {
		p.Close()
		c.refused = fmt.Errorf("user %d has %d connections already", p.UID, maxUserConnections)
		return c
	}
	c.process = p
	c.release = func() { s.slots.release(&p.UID) }
	return c
}

// warn logs once a minute what callers could make happen again and again.
func (s *server) warn(code, msg string, args ...any) {
	s.mu.Lock()
	before, ok := s.warned[code]
	now := time.Now()
	if quiet := ok && now.Sub(before) < time.Minute; quiet {
		s.mu.Unlock()
		return
	}
	s.warned[code] = now
	s.mu.Unlock()
	s.Log.Warn(msg, args...)
}

// conn is a caller's connection. It holds its process until it is closed.
type conn struct {
	net.Conn
	process *attest.Held // nil: refused
	refused error        // why it is nobody's
	once    sync.Once
	release func()
}

type connKey struct{}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		if c.process != nil {
			c.process.Close()
		}
		c.release()
	})
	return err
}

// CloseWrite lets net/http end a connection such that the client can still read the last answer.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// queue is the listener that hands net/http the connections that are attested.
type queue struct {
	conns chan *conn
	ctx   context.Context
	addr  net.Addr
}

func (q queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (q queue) Close() error   { return nil }
func (q queue) Addr() net.Addr { return q.addr }

// slots counts connections, so that neither all callers together nor one user can take all descriptors.
type slots struct {
	mu        sync.Mutex
	all, user int // at most
	total     int
	used      map[int]int // by user
}

func (s *slots) take() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= s.all {
		return false
	}
	s.total++
	return true
}

// takeFor says whose a slot is that was taken.
func (s *slots) takeFor(uid int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used[uid] >= s.user {
		return false
	}
	s.used[uid]++
	return true
}

// release gives a slot back; the user is nil where nobody's was taken.
func (s *slots) release(uid *int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if uid == nil {
		return
	}
	if s.used[*uid]--; s.used[*uid] == 0 {
		delete(s.used, *uid)
	}
}
