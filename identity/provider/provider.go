// Package provider gets this program's own identity from somebody else's SPIFFE Workload API: a SPIRE agent's, or any.
//
// It is for control planes and agents that are workloads of a SPIFFE deployment which exists already: their TLS takes
// a Source for its certificate and for whom it trusts. A Source follows each rotation at once, keeps what it has while
// the provider is away, and never gives out what was taken back or has expired. It also has the keys that verify
// JWT-SVIDs, for who takes them from callers, but gets none itself. It never makes, writes or logs a key, and cannot sign:
// whoever is to hand out identities to others needs package issuer instead.
//
// Gateways don't need it. SPIRE's agent serves SDS on the socket of its Workload API, by the names that package sds
// uses too, so an Envoy's identity cluster is pointed at that socket and Envoy itself is the workload.
//
// The specifications are SPIFFE's Workload API and Workload Endpoint; sections are named where they are implemented.
package provider

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
)

const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 10 * time.Second
)

// Config says whose workload we are. Both are needed.
type Config struct {
	Addr string // of the Workload API: unix:///path
	Log  *slog.Logger
}

// Source is this program's identities and whom it trusts. It has nothing until Run has got it. It is an
// x509svid.Source and an x509bundle.Source, and safe for concurrent use.
type Source struct {
	config Config
	state  atomic.Pointer[state]
	jwt    atomic.Pointer[jwtState]
}

// state is what was last got. It is immutable, but for changed, which is closed when there are other SVIDs or bundles.
type state struct {
	svids   []*x509svid.SVID
	bundles *x509bundle.Set // nil: none
	err     error           // of the last attempt; nil if that gave the SVIDs
	changed chan struct{}
}

// New returns a source that has nothing.
func New(c Config) *Source {
	s := &Source{config: c}
	s.state.Store(&state{err: errors.New("no answer yet"), changed: make(chan struct{})})
	s.jwt.Store(&jwtState{changed: make(chan struct{})})
	return s
}

// X509 returns the SVIDs that are valid, the default one first (Workload API, 5.3), and the bundles of the own and of
// federated trust domains: nil and nil where there are none. Neither may be changed. The channel is closed when either
// is another, also when an SVID has expired.
func (s *Source) X509() (svids []*x509svid.SVID, bundles *x509bundle.Set, changed <-chan struct{}) {
	st := s.state.Load()
	return st.valid(time.Now()), st.bundles, st.changed
}

// valid returns the SVIDs that have not expired.
func (st *state) valid(now time.Time) []*x509svid.SVID {
	expired := func(svid *x509svid.SVID) bool { return !now.Before(svid.Certificates[0].NotAfter) }
	if !slices.ContainsFunc(st.svids, expired) {
		return st.svids
	}
	return slices.DeleteFunc(slices.Clone(st.svids), expired)
}

// GetX509SVID returns the default SVID. Without one, the error says why, with the provider's gRPC status.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	st := s.state.Load()
	if svids := st.valid(time.Now()); len(svids) > 0 {
		return svids[0], nil
	}
	if st.err == nil {
		return nil, errors.New("get SVID: the last one has expired")
	}
	return nil, s.failed(st.err)
}

// GetX509BundleForTrustDomain returns whom to trust in a trust domain.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	st := s.state.Load()
	if st.bundles == nil {
		return nil, fmt.Errorf("get bundle of %s: %w", td, st.err)
	}
	return st.bundles.GetX509BundleForTrustDomain(td)
}

// Wait returns when there is an SVID, or when the context ends: then with why there is none yet.
func (s *Source) Wait(ctx context.Context) error {
	for {
		svids, _, changed := s.X509()
		if len(svids) > 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			_, err := s.GetX509SVID()
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

func (s *Source) failed(err error) error {
	switch status.Code(err) {
	case codes.PermissionDenied:
		return fmt.Errorf("get SVID: %s recognises no workload in this process: %w", s.config.Addr, err)
	case codes.Unavailable:
		return fmt.Errorf("get SVID: nobody answers at %s: %w", s.config.Addr, err)
	}
	return fmt.Errorf("get SVID from %s: %w", s.config.Addr, err)
}

// answer is what the provider said: what it was asked for, or an error.
type answer[T any] struct {
	got T
	err error
}

// Run follows the provider until the context ends, and then returns nil. It fails if the address is none, and where the
// provider calls us wrong (InvalidArgument), which no repetition would mend (Workload Endpoint, 6). What becomes of JWT
// bundles never ends it.
func (s *Source) Run(ctx context.Context) error {
	client, err := workloadapi.New(ctx,
		workloadapi.WithAddr(s.config.Addr),
		workloadapi.WithBackoffStrategy(backoffs{}),
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstBackoff, Multiplier: 2, Jitter: 0.2, MaxDelay: lastBackoff},
			MinConnectTimeout: lastBackoff,
		})))
	if err != nil {
		return fmt.Errorf("use Workload API: %w", err)
	}
	defer client.Close()
	var following sync.WaitGroup
	defer following.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer[*workloadapi.X509Context])
	jwtAnswers := make(chan answer[*jwtbundle.Set])
	ended := make(chan error, 1)
	following.Go(func() {
		w := x509Watcher{watcher[*workloadapi.X509Context]{ctx, answers}}
		ended <- follow(ctx, func() error { return client.WatchX509Context(ctx, w) })
	})
	following.Go(func() {
		w := jwtWatcher{watcher[*jwtbundle.Set]{ctx, jwtAnswers}}
		_ = follow(ctx, func() error { return client.WatchJWTBundles(ctx, w) }) // it was logged
	})
	for {
		select {
		case a := <-answers:
			s.take(a, time.Now())
		case a := <-jwtAnswers:
			s.takeJWT(a)
		case <-s.expiry(time.Now()):
			s.expire(time.Now())
		case err := <-ended: // also when the context ends
			return err
		}
	}
}

// follow watches until the context ends. go-spiffe's watch ends as well when it is the provider that cancels.
func follow(ctx context.Context, watch func() error) error {
	for wait := (backoffs{}).NewBackoff(); ; {
		err := watch()
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was told to end
		}
		if status.Code(err) == codes.InvalidArgument {
			return fmt.Errorf("watch Workload API: %w", err)
		}
		select {
		case <-time.After(wait.Next()):
		case <-ctx.Done():
			return nil
		}
	}
}

// take puts an answer in the place of what was before. All of an answer counts, or nothing.
func (s *Source) take(a answer[*workloadapi.X509Context], now time.Time) {
	before := s.state.Load()
	next := *before
	next.err = a.err
	if a.err == nil {
		next.err = check(a.got, now)
	}
	switch {
	case next.err == nil:
		next.svids, next.bundles, next.changed = a.got.SVIDs, a.got.Bundles, make(chan struct{})
		first := next.svids[0]
		s.config.Log.Info("identity received", "provider", s.config.Addr, "caller", first.ID.String(),
			"until", first.Certificates[0].NotAfter)
	case status.Code(next.err) == codes.PermissionDenied && next.bundles != nil:
		next.svids, next.bundles, next.changed = nil, nil, make(chan struct{}) // they were taken back (Workload API, 5.2.1)
	}
	// What fails the same way again is no news.
	if next.err != nil && (before.err == nil || before.err.Error() != next.err.Error()) {
		s.config.Log.Warn("identity not renewed", "provider", s.config.Addr, "held", len(next.valid(now)), "error", next.err)
	}
	s.replace(before, &next)
}

// replace is called by Run's goroutine only.
func (s *Source) replace(before, next *state) {
	s.state.Store(next)
	if next.changed != before.changed {
		close(before.changed)
	}
}

// check refuses an answer that we could not use: SVIDs that our own peers would not accept, or the bundles of which
// don't fit.
func check(got *workloadapi.X509Context, now time.Time) error {
	if len(got.SVIDs) == 0 {
		return errors.New("the answer has no SVID")
	}
	for _, svid := range got.SVIDs {
		if _, err := identity.Verify(svid.Certificates, got.Bundles, now); err != nil {
			return fmt.Errorf("the answer has an SVID for %s that is none: %w", svid.ID, err)
		}
	}
	return nil
}

// expiry fires when the first SVID expires.
func (s *Source) expiry(now time.Time) <-chan time.Time {
	st := s.state.Load()
	if len(st.svids) == 0 {
		return nil
	}
	first := st.svids[0].Certificates[0].NotAfter
	for _, svid := range st.svids[1:] {
		if at := svid.Certificates[0].NotAfter; at.Before(first) {
			first = at
		}
	}
	return time.After(first.Sub(now))
}

// expire lets go of the SVIDs that have expired. Whom we trust stays.
func (s *Source) expire(now time.Time) {
	before := s.state.Load()
	next := *before
	next.svids, next.changed = before.valid(now), make(chan struct{})
	if len(next.svids) == len(before.svids) {
		return // the clock was set back
	}
	s.config.Log.Warn("identity expired", "provider", s.config.Addr, "held", len(next.svids), "error", next.err)
	s.replace(before, &next)
}

// watcher hands go-spiffe's answers to the goroutine that owns the state.
type watcher[T any] struct {
	ctx     context.Context
	answers chan<- answer[T]
}

func (w watcher[T]) got(got T) { w.send(answer[T]{got: got}) }

func (w watcher[T]) failed(err error) {
	if w.ctx.Err() == nil { // else it only says that we end
		w.send(answer[T]{err: err})
	}
}

func (w watcher[T]) send(a answer[T]) {
	select {
	case w.answers <- a:
	case <-w.ctx.Done():
	}
}

// x509Watcher is a watcher as go-spiffe wants it.
type x509Watcher struct {
	watcher[*workloadapi.X509Context]
}

func (w x509Watcher) OnX509ContextUpdate(got *workloadapi.X509Context) { w.got(got) }
func (w x509Watcher) OnX509ContextWatchError(err error)                { w.failed(err) }

// backoffs is go-spiffe's BackoffStrategy: twice as long each time, and never the same on two machines.
type backoffs struct{}

func (backoffs) NewBackoff() workloadapi.Backoff { return &wait{firstBackoff} }

type wait struct{ next time.Duration }

func (w *wait) Next() time.Duration {
	d := w.next
	w.next = min(2*d, lastBackoff)
	return d - rand.N(d/5) //nolint:gosec // spreads load, hides nothing
}

func (w *wait) Reset() { w.next = firstBackoff }
