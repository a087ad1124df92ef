// Package agent is the end of the control plane on another machine: it brings the identities of that machine's
// workloads there, and says where these may go.
//
// It is for the servers of the Workload API and SDS on that machine: they ask an issuer.Issuer, which the agent feeds
// with entries and bundles and for which it has keys certified; and for who leads applications to endpoints.
// identity/node is the other end. It talks to nobody but the control plane of its trust domain, which it knows by a
// bundle and by its SPIFFE ID, and sends private keys to nobody: its own is in its state folder, the workloads' are with
// whoever made them.
//
// While the control plane is away, what is known stays in force, on the disk as well, and nothing new is signed. It
// comes back late rather than never: only what trying again cannot mend ends Run.
package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

// ErrRevoked is what Run ends with when the control plane has revoked the agent.
var ErrRevoked = errors.New("the control plane has revoked this agent")

// errEnded says that the agent's SVID is no longer one.
var errEnded = errors.New("the agent's SVID has ended")

// errDistrusted says that nobody believes the agent's SVID any longer.
var errDistrusted = errors.New("the authority of the agent's SVID is trusted no more: " +
	"without a machine's certificate the agent must be started with a new join token")

// maxCalls is how many keys are being certified at a time; further ones wait.
const maxCalls = 16

// Config is what an agent is made of.
type Config struct {
	Addr        string // of the control plane: host:port
	TrustDomain spiffeid.TrustDomain
	// TrustBundle is whom to believe that it is the control plane, until the folder has a bundle from it. It must come
	// by a way that the user trusts.
	TrustBundle *spiffebundle.Bundle
	// Dir keeps the agent's key and SVID, and what it knows. It is made with mode 0700 where there is none, and must be
	// one process's at a time.
	Dir string
	// JoinToken is used where the folder has no SVID that is valid, once.
	JoinToken nodepb.Token
	// X509POP returns the machine's certificate and its key, a crypto.Signer; nil: there is none. It is asked whenever
	// the machine must be attested, so the files may change. It comes before the join token.
	X509POP func() (*tls.Certificate, error)
	// Endpoints takes over those at which this machine's workloads may do something, at first and whenever they change, one
	// call after the other. Nil: the agent does not ask for them.
	Endpoints func([]Endpoint)
	// Dial connects to an address; TCP if it is nil.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// Endpoint is one that workloads of this machine may reach.
type Endpoint struct {
	Name     segment.EndpointName
	Hostname string    // what SNI and Host say
	Gateways []Gateway // in the order in which to try them; none: nobody has said where those that there are can be reached
}

// Gateway is one that serves an endpoint.
type Gateway struct {
	ID      spiffeid.ID // whom it must prove to be
	Address string      // host:port
}

// Issuer is fed by the agent: an *issuer.Issuer, whose Certifier is the agent.
type Issuer interface {
	Set([]issuer.Entry)
	SetBundles(issuer.Bundles)
}

// Agent is safe for concurrent use.
type Agent struct {
	config Config
	token  nodepb.Token
	svid   *x509svid.SVID // Run's own
	known  known          // Run's own: what it does not hand on by names and own
	own    atomic.Pointer[spiffebundle.Bundle]
	names  atomic.Pointer[map[string]string] // of entries, by what they say
	calls  chan struct{}

	mu     sync.Mutex
	link   *link
	status Status
}

// Status is how an agent is getting on.
type Status struct {
	ID        spiffeid.ID // zero: it has none yet
	Expires   time.Time   // the end of its SVID
	Connected bool        // it is told of every change
	Problem   string      // what went wrong last, until something goes right
}

// New returns an agent that knows nothing yet. It certifies nothing until Run.
func New(c Config) *Agent {
	if c.Dial == nil {
		c.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{Timeout: callTime}).DialContext(ctx, "tcp", addr)
		}
	}
	return &Agent{config: c, token: c.JoinToken, calls: make(chan struct{}, maxCalls)}
}

// Status returns how the agent is getting on.
func (a *Agent) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status
}

// Run attests the machine if it must, keeps its SVID renewed and feeds the issuer, until the context ends. Other than
// that it ends with an error only if trying again cannot help: ErrRevoked, a refused attestation, an SVID that ended
// where nothing can attest the machine again, or a folder that cannot be used. It runs once.
func (a *Agent) Run(ctx context.Context, i Issuer) error {
	if err := a.open(i); err != nil {
		return err
	}
	var retiring sync.WaitGroup
	defer retiring.Wait()
	defer a.use(nil, &retiring)
	wait := newBackoff()
	why := errors.New("it was not attested yet")
	for {
		if a.svid != nil && !time.Now().Before(end(a.svid)) {
			why = fmt.Errorf("%w: %s, at %s", errEnded, a.svid.ID, end(a.svid).Format(time.DateTime))
			a.svid = nil
		}
		if a.svid == nil {
			switch err := a.attest(ctx, why); {
			case ctx.Err() != nil:
				return nil
			case errors.Is(err, ErrRevoked):
				return errors.Join(err, a.forget(i))
			case err != nil:
				return err
			}
		}
		begun := time.Now()
		err := a.session(ctx, i, &retiring)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil: // renewed
			continue
		case nodepb.Reason(err) == nodepb.AgentRevoked:
			a.config.Log.Error("agent revoked", "agent", a.svid.ID.String())
			return errors.Join(ErrRevoked, a.forget(i))
		case !errors.Is(err, errEnded):
			a.svid, why = nil, errors.New(status.Convert(err).Message()) // it is no good, whatever it says
		}
		a.failed("agent must be attested again", err)
		a.use(nil, &retiring)
		if time.Since(begun) > time.Minute {
			wait = newBackoff()
		}
		if sleep(ctx, wait.next()) != nil {
			return nil
		}
	}
}

// session works with one SVID until it is renewed (nil), ends (errEnded) or is refused.
func (a *Agent) session(ctx context.Context, i Issuer, retiring *sync.WaitGroup) error {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	svid := a.svid
	l, err := a.connect(svid)
	if err != nil {
		return err
	}
	a.use(l, retiring)
	a.note(func(s *Status) { s.ID, s.Expires = svid.ID, end(svid) })
	early, hurry := context.WithCancel(ctx)
	defer hurry()
	l.hurry = hurry
	watched := make(chan error, 1)
	group.Go(func() { watched <- a.watch(ctx, l, i) })
	type renewal struct {
		svid *x509svid.SVID
		err  error
	}
	renewed := make(chan renewal, 1)
	group.Go(func() {
		next, err := a.renew(ctx, early, l)
		renewed <- renewal{next, err}
	})
	select {
	case err := <-watched:
		return err
	case r := <-renewed:
		if r.err == nil {
			a.svid = r.svid
			a.config.Log.Info("agent renewed", "agent", svid.ID.String(), "until", end(r.svid))
		}
		return r.err
	}
}

// renew returns the SVID after the link's, which is on the disk then. It does so when it is time or early has ended.
func (a *Agent) renew(ctx, early context.Context, l *link) (*x509svid.SVID, error) {
	svid := l.svid
	leaf := svid.Certificates[0]
	at := identity.RenewAt(leaf)
	if sleep(early, time.Until(at)-chance(leaf.NotAfter.Sub(at)/10)) != nil {
		// Not all agents in one moment, and none of them again and again.
		if err := sleep(ctx, firstWait+chance(firstWait)); err != nil {
			return nil, err
		}
	}
	wait := newBackoff()
	for {
		next, err := a.renewOnce(ctx, l, svid.ID)
		left := time.Until(end(svid))
		switch {
		case err == nil:
			return next, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case left <= 0:
			return nil, errEnded
		case a.refused(l, err):
			return nil, err
		}
		a.failed("agent not renewed", err)
		if err := sleep(ctx, min(wait.next(), max(left/4, time.Second))); err != nil {
			return nil, err
		}
	}
}

// watch feeds the issuer until the SVID is refused.
func (a *Agent) watch(ctx context.Context, l *link, i Issuer) error {
	defer a.note(func(s *Status) { s.Connected = false })
	wait := newBackoff()
	for {
		err := a.follow(ctx, l, i, func() { wait = newBackoff() })
		a.note(func(s *Status) { s.Connected = false })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.heed(err, i)
		if a.refused(l, err) {
			return err
		}
		if status.Code(err) == codes.Unauthenticated && !a.believes(l.svid) {
			err = fmt.Errorf("%w: %w", errDistrusted, err)
		}
		a.failed("control plane not reached", err)
		if err := sleep(ctx, wait.next()); err != nil {
			return err
		}
	}
}

// follow feeds the issuer from one stream until that ends.
func (a *Agent) follow(ctx context.Context, l *link, i Issuer, alive func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the stream, whatever ends this
	stream, err := l.client.Watch(ctx, a.known.request(a.config.Endpoints != nil))
	if err != nil {
		return err
	}
	if _, err := stream.Header(); err != nil { // sent as soon as the agent is accepted
		return err
	}
	alive()
	a.config.Log.Info("control plane reached", "addr", a.config.Addr)
	a.note(func(s *Status) { s.Connected, s.Problem = true, "" })
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := a.learn(resp, i); err != nil {
			return fmt.Errorf("read what the control plane sent: %w", err)
		}
		if resp.Renew {
			l.hurry()
		}
	}
}

// heed takes over whom to trust from a control plane that does not believe the agent: its workloads must know, whether or
// not it can be attested again.
func (a *Agent) heed(refusal error, i Issuer) {
	own, before := nodepb.Trusted(refusal), a.known.message.GetBundles()
	if own == nil || bytes.Equal(own, before.GetOwn()) {
		return
	}
	// Without a digest: who is believed again is sent all of them.
	news := &nodepb.WatchResponse{Bundles: &nodepb.Bundles{Own: own, Federated: before.GetFederated()}}
	if err := a.learn(news, i); err != nil {
		a.failed("what the control plane sent cannot be read", err)
	}
}

// refused reports whether the control plane does not take the link's SVID, so that another one is needed.
func (a *Agent) refused(l *link, err error) bool {
	switch {
	case nodepb.Reason(err) != "":
		return true
	case status.Code(err) != codes.Unauthenticated:
		return false
	case a.config.X509POP != nil: // whatever is wrong
		return true
	}
	// A token may have been used: it is tried only where nothing else can help. Without one, the agent waits until its SVID
	// ends, and says whom to trust.
	return a.token != "" && !a.believes(l.svid)
}

// believes reports whether an SVID stands below an authority that is trusted.
func (a *Agent) believes(svid *x509svid.SVID) bool {
	_, err := identity.Verify(svid.Certificates, a.own.Load().X509Bundle(), time.Now())
	return err == nil
}

func (a *Agent) failed(what string, err error) {
	a.config.Log.Warn(what, "error", err)
	a.note(func(s *Status) { s.Problem = err.Error() })
}

func (a *Agent) note(edit func(*Status)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	edit(&a.status)
}

func end(svid *x509svid.SVID) time.Time { return svid.Certificates[0].NotAfter }
