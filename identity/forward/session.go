package forward

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/issuer"
)

const (
	issueTimeout = 15 * time.Second // for one SVID, and for a request to wait for the first
	dialTimeout  = 10 * time.Second // for all gateways of an endpoint, and
	// leastDialTimeout is for one of them: room for a packet that is lost.
	leastDialTimeout = 3 * time.Second
	// overlap is for how long a gateway is asked again whose authority is not known. When one is distrusted, the bundle
	// without it and the gateway's next SVID are under way at the same time.
	overlap      = 3 * time.Second
	overlapPause = 100 * time.Millisecond
	firstRetry   = time.Second
	lastRetry    = 30 * time.Second
)

// errIdle ends a session that nobody uses.
var errIdle = errors.New("not in use")

// session is the identity of one process, from its first request until it ends, loses the identity, or does not use it
// any more. All connections to gateways belong to one session.
type session struct {
	server  *server
	key     key
	process *attest.Held // its own hold

	users    int       // requests that are under way; server.mu guards it and idle
	idle     time.Time // when the last one ended
	identity atomic.Pointer[identity]
	ready    chan struct{} // closed when there is an identity
	done     chan struct{} // closed when there is none any more, or has never been one
	err      error         // why, when done is closed
}

// session returns that of the process, for one request: release it.
func (s *server) session(ctx context.Context, p *attest.Held) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := keyOf(p)
	found := s.sessions[k]
	// Two processes that are alive at one moment and have one PID are one process.
	known := found != nil && found.process.Alive() == nil
	if err := p.Alive(); err != nil {
		return nil, err
	}
	if !known {
		own, err := p.Again()
		if err != nil {
			return nil, err
		}
		found = &session{server: s, key: k, process: own, ready: make(chan struct{}), done: make(chan struct{})}
		s.sessions[k] = found
		s.running.Go(func() { found.run(ctx) })
	}
	found.users++
	return found, nil
}

func (s *session) release() {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.users--
	s.idle = time.Now()
}

// current returns the identity in force, and waits for the first one.
func (s *session) current(ctx context.Context) (*identity, error) {
	ctx, cancel := context.WithTimeout(ctx, issueTimeout)
	defer cancel()
	select {
	case <-s.ready:
	case <-s.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for an identity: %w", context.Cause(ctx))
	}
	select {
	case <-s.done:
		return nil, s.err
	default:
	}
	i := s.identity.Load()
	if until := i.svid.Certificates[0].NotAfter; !time.Now().Before(until) {
		return nil, fmt.Errorf("the identity has expired at %s and no other is issued", until.Format(time.RFC3339))
	}
	return i, nil
}

func (s *session) run(ctx context.Context) {
	ctx, end := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { end(s.process.Wait()) })
	s.err = s.keep(context.WithValue(ctx, processKey{}, s.process))
	s.server.mu.Lock()
	if s.server.sessions[s.key] == s {
		delete(s.server.sessions, s.key)
	}
	s.server.mu.Unlock()
	close(s.done)
	if i := s.identity.Load(); i != nil {
		i.conns.close()
		i.retire()
		s.server.Log.Info("identity let go", "caller", i.svid.ID.String(), "pid", s.process.PID, "error", s.err)
	}
	end(nil)
	s.process.Close() // wakes who watches
	watching.Wait()
}

// keep keeps an identity in force, and returns why there is none any more. While it cannot be renewed for other reasons
// than that it was taken back, the one before is kept.
func (s *session) keep(ctx context.Context) error {
	var wallet issuer.Wallet
	var bundles issuer.Bundles
	retry := firstRetry
	for {
		view, err := s.renew(ctx, &wallet, &bundles)
		again := wallet.Due()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			retry = firstRetry
		case s.identity.Load() == nil || refused(err):
			return err
		default:
			s.server.warn("renew", "identity not renewed", "caller", s.identity.Load().svid.ID.String(), "error", err)
			again = time.After(retry)
			retry = min(2*retry, lastRetry)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-view.Changed:
		case <-again:
		case <-time.After(s.server.linger):
		}
		if s.unused() {
			return errIdle
		}
	}
}

// unused reports whether nobody uses the session, and then nobody will.
func (s *session) unused() bool {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if s.users > 0 || time.Since(s.idle) < s.server.linger {
		return false
	}
	if s.server.sessions[s.key] == s {
		delete(s.server.sessions, s.key)
	}
	return true
}

// renew brings the identity up to date: the caller's default one (Workload API, 5.3).
func (s *session) renew(ctx context.Context, wallet *issuer.Wallet, bundles *issuer.Bundles) (issuer.View, error) {
	ctx, cancel := context.WithTimeout(ctx, issueTimeout)
	defer cancel()
	view, err := s.server.Source.Entitled(ctx)
	if err != nil {
		return issuer.View{}, err
	}
	changed, err := wallet.Renew(ctx, s.server.Source, view.Entries[:1], view.Bundles.Own)
	if err != nil {
		return issuer.View{Changed: view.Changed}, err
	}
	before := s.identity.Load()
	if before != nil && !changed && same(*bundles, view.Bundles) {
		return view, nil
	}
	*bundles = view.Bundles
	next := &identity{
		svid:       wallet.SVIDs()[0],
		bundles:    setOf(view.Bundles),
		transports: map[string]*http.Transport{},
	}
	renamed := before != nil && before.svid.ID != next.svid.ID
	if before == nil || renamed {
		next.conns = newConns()
	} else { // what is under way ends by itself
		next.conns = before.conns
	}
	s.identity.Store(next)
	if before == nil {
		close(s.ready)
	} else {
		before.retire()
	}
	if renamed { // nothing goes on in the old name
		before.conns.close()
	}
	s.server.Log.Info("identity in use", "caller", next.svid.ID.String(), "pid", s.process.PID,
		"until", next.svid.Certificates[0].NotAfter)
	return view, nil
}

// refused reports whether an error says that the caller may have no identity, and not that there is none at the moment.
func refused(err error) bool {
	var none *issuer.NoIdentityError
	return errors.As(err, &none) || status.Code(err) == codes.PermissionDenied
}

func same(a, b issuer.Bundles) bool {
	if len(a.Federated) != len(b.Federated) || !a.Own.Equal(b.Own) {
		return false
	}
	for td, bundle := range a.Federated {
		if !bundle.Equal(b.Federated[td]) {
			return false
		}
	}
	return true
}

// setOf returns whom to trust as a server: gateways of the own trust domain and of those that the caller federates with.
func setOf(b issuer.Bundles) *x509bundle.Set {
	set := x509bundle.NewSet(b.Own.X509Bundle())
	for _, other := range b.Federated {
		set.Add(other.X509Bundle())
	}
	return set
}

// identity is one SVID with the connections that were opened with it.
type identity struct {
	svid    *x509svid.SVID
	bundles *x509bundle.Set
	conns   *conns

	mu         sync.Mutex
	transports map[string]*http.Transport // by what the target says
}

// transport returns the way to a target's gateways. Where the target changes there is another way; what is under way on
// the one before ends by itself.
func (i *identity) transport(t Target) *http.Transport {
	says := fmt.Sprintf("%q %q %q", t.Addresses, t.IDs, t.ServerName)
	i.mu.Lock()
	defer i.mu.Unlock()
	if way := i.transports[says]; way != nil {
		return way
	}
	way := &http.Transport{
		DialTLSContext:         i.dialer(t).dial,
		DisableCompression:     true, // what passes, passes as it is
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        30 * time.Second, // before the gateway's own
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 256 << 10,
	}
	i.transports[says] = way
	return way
}

// dialer connects to whichever of an endpoint's gateways can be connected to.
type dialer struct {
	conns     *conns
	addresses []string
	timeout   time.Duration // for each
	config    *tls.Config
	last      atomic.Int32 // which one it was: with that it begins
}

func (i *identity) dialer(t Target) *dialer {
	config := tlsconfig.MTLSClientConfig(i.svid, i.bundles, tlsconfig.AuthorizeOneOf(t.IDs...))
	config.MinVersion = tls.VersionTLS13
	config.ServerName = t.ServerName // for SNI; the gateway is known by its SPIFFE ID
	config.VerifyPeerCertificate = nil
	config.VerifyConnection = func(c tls.ConnectionState) error { // in its place, with an error of ours
		id, _, err := x509svid.Verify(c.PeerCertificates, i.bundles)
		if err == nil && !slices.Contains(t.IDs, id) {
			err = fmt.Errorf("it is %s, not one of %s", id, t.IDs)
		}
		if err != nil {
			return &strangerError{err}
		}
		return nil
	}
	share := dialTimeout / time.Duration(max(len(t.Addresses), 1))
	return &dialer{conns: i.conns, addresses: t.Addresses, timeout: max(share, leastDialTimeout), config: config}
}

// unreachedError says why there is no connection; nothing was sent.
type unreachedError []error

func (e unreachedError) Error() string {
	var text []string
	for _, err := range e {
		text = append(text, err.Error())
	}
	return strings.Join(text, "; ")
}

func (e unreachedError) Unwrap() []error { return e }

func (d *dialer) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	for until := time.Now().Add(overlap); ; {
		c, err := d.dialAny(ctx, network)
		if unknown := (x509.UnknownAuthorityError{}); err == nil || !errors.As(err, &unknown) || time.Now().After(until) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(overlapPause):
		}
	}
}

// dialAny tries each gateway once, beginning with the one that was there last.
func (d *dialer) dialAny(ctx context.Context, network string) (net.Conn, error) {
	begin, n := int(d.last.Load()), len(d.addresses)
	var why unreachedError
	for i := range n {
		at := (begin + i) % n
		c, err := d.dialOne(ctx, network, d.addresses[at])
		if err == nil {
			d.last.Store(int32(at))
			return c, nil
		}
		why = append(why, err)
		if ctx.Err() != nil || errors.Is(err, errLost) {
			break
		}
	}
	return nil, why
}

func (d *dialer) dialOne(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	raw, err := d.conns.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, d.config)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// strangerError says that the other end is not the gateway that was meant.
type strangerError struct{ err error }

func (e *strangerError) Error() string { return e.err.Error() }
func (e *strangerError) Unwrap() error { return e.err }

// retire closes what is not in use, and lets nothing be used again.
func (i *identity) retire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, way := range i.transports {
		way.CloseIdleConnections()
	}
}

// conns are the connections that are open in one name.
type conns struct {
	mu     sync.Mutex
	open   map[*upstream]struct{}
	closed bool
}

func newConns() *conns { return &conns{open: map[*upstream]struct{}{}} }

// errLost ends what is under way when its identity is lost.
var errLost = errors.New("the identity is no longer in force")

func (c *conns) dial(ctx context.Context, network, address string) (net.Conn, error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	u := &upstream{raw, c}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		raw.Close()
		return nil, errLost
	}
	c.open[u] = struct{}{}
	return u, nil
}

// close closes all, whatever is under way on them, and lets none be opened any more.
func (c *conns) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for u := range c.open {
		u.Conn.Close()
	}
	clear(c.open)
}

func (c *conns) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// upstream is a connection to a gateway.
type upstream struct {
	net.Conn
	of *conns
}

func (u *upstream) Close() error {
	u.of.mu.Lock()
	delete(u.of.open, u)
	u.of.mu.Unlock()
	return u.Conn.Close()
}
