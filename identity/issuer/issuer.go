// Package issuer decides who may hold which identity, and has them certified.
//
// It is for the servers that hand identities out (the Workload API, SDS): they ask what their caller is entitled to,
// make its keys, and have them certified. The issuer holds the entries in force and the bundles. It does no IO and
// starts no goroutine; it asks the process at the other end by way of Config.Attest, and whoever signs by way of
// Config.Certifier: Local, which holds the authorities, or a control plane on another machine. It never sees a
// private key, and never says to a caller what others are entitled to.
package issuer

import (
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/segment"
)

// Entry entitles a process to an identity.
type Entry struct {
	ID spiffeid.ID
	// Selectors must all hold of the process. An entry without any entitles nobody.
	Selectors []segment.Selector
	DNSNames  []string      // further names in the certificate, for gateways
	TTL       time.Duration // lifetime of its X.509-SVIDs; at least identity.MinTTL
	// FederatesWith are the other trust domains whose bundles the holder gets; with All, every one that there is.
	FederatesWith []spiffeid.TrustDomain
	FederatesAll  bool
}

// equal reports whether two entries lead to the same certificates for the same processes.
func (e Entry) equal(o Entry) bool {
	return e.ID == o.ID && e.TTL == o.TTL && e.FederatesAll == o.FederatesAll && slices.Equal(e.FederatesWith, o.FederatesWith) &&
		slices.Equal(e.Selectors, o.Selectors) && slices.Equal(e.DNSNames, o.DNSNames)
}

// Match returns the entries whose selectors all are among those given, in their order; of several with one ID, the
// first.
func Match(entries []Entry, have []segment.Selector) []Entry {
	has := make(map[segment.Selector]bool, len(have))
	for _, s := range have {
		has[s] = true
	}
	var matched []Entry
	for _, e := range entries {
		holds := len(e.Selectors) > 0
		for _, s := range e.Selectors {
			holds = holds && has[s]
		}
		if holds && !slices.ContainsFunc(matched, func(m Entry) bool { return m.ID == e.ID }) {
			matched = append(matched, e)
		}
	}
	return matched
}

// Certifier signs for the issuer, who has seen to it that the entry is in force.
type Certifier interface {
	// CertifyX509 certifies that the holder of the key is whom the entry says. It returns the leaf and the authorities
	// below the root.
	CertifyX509(ctx context.Context, e Entry, k Key) ([]*x509.Certificate, error)
	// CertifyJWT returns a JWT-SVID in its compact form.
	CertifyJWT(ctx context.Context, e Entry, audience []string) (string, error)
}

// Config is what an issuer is made of. Both are needed.
type Config struct {
	Certifier Certifier
	// Attest returns what is true of the process that the context's call comes from. It is asked at every change,
	// and fails once that process is gone. The kinds ("unix:sha256") are those that entries in force ask for, in order;
	// what no entry asks for need not be found out. They are not to be changed.
	Attest func(ctx context.Context, kinds []string) ([]segment.Selector, error)
}

// Bundles are those of the own trust domain and of those that it trusts in parts. They are not to be changed.
type Bundles struct {
	Own       *spiffebundle.Bundle // nil: not known yet, and nobody is entitled to anything
	Federated map[spiffeid.TrustDomain]*spiffebundle.Bundle
}

func (b Bundles) equal(o Bundles) bool {
	return b.Own.Equal(o.Own) && maps.EqualFunc(b.Federated, o.Federated, (*spiffebundle.Bundle).Equal)
}

// Issuer entitles nobody until Set and SetBundles. It is safe for concurrent use.
type Issuer struct {
	config Config
	mu     sync.Mutex // for writers
	state  atomic.Pointer[state]
}

// state is what is in force. It is immutable, but for changed, which is closed when it no longer is.
type state struct {
	entries []Entry
	ids     map[spiffeid.ID]bool
	kinds   []string // of selectors that some entry asks for
	bundles Bundles
	changed chan struct{}
}

// New returns an issuer without entries.
func New(c Config) *Issuer {
	i := &Issuer{config: c}
	i.state.Store(&state{changed: make(chan struct{})})
	return i
}

// Set puts entries in force in place of those before, and wakes everybody who waits for a change; if they are equal to
// those before, it does nothing. The entries are the issuer's from then on.
func (i *Issuer) Set(entries []Entry) {
	ids := make(map[spiffeid.ID]bool, len(entries))
	kinds := map[string]bool{}
	for _, e := range entries {
		ids[e.ID] = true
		for _, s := range e.Selectors {
			fact, _, _ := strings.Cut(s.Value, ":")
			kinds[s.Type+":"+fact] = true
		}
	}
	i.change(func(s *state) bool {
		if slices.EqualFunc(s.entries, entries, Entry.equal) {
			return false
		}
		s.entries, s.ids, s.kinds = entries, ids, slices.Sorted(maps.Keys(kinds))
		return true
	})
}

// SetBundles does the same for the bundles.
func (i *Issuer) SetBundles(b Bundles) {
	i.change(func(s *state) bool {
		if s.bundles.equal(b) {
			return false
		}
		s.bundles = b
		return true
	})
}

// change replaces the state by one that is different, if it is.
func (i *Issuer) change(edit func(*state) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	before := i.state.Load()
	next := *before
	if !edit(&next) {
		return
	}
	next.changed = make(chan struct{})
	i.state.Store(&next)
	close(before.changed)
}

// View is what a caller is entitled to at one moment.
type View struct {
	Entries []Entry         // at least one
	Bundles Bundles         // of the own trust domain, and of those that some entry federates with
	Changed <-chan struct{} // closed when the view may no longer be true
}

// Entitled attests the caller whose call the context belongs to, and returns what it is entitled to; a
// *NoIdentityError if that is nothing, the gRPC status Unavailable while the own bundle is not known.
func (i *Issuer) Entitled(ctx context.Context) (View, error) {
	s := i.state.Load() // before the caller is looked at: whatever changes from here on closes s.changed
	have, err := i.config.Attest(ctx, s.kinds)
	if err != nil {
		return View{}, &NoIdentityError{Err: err}
	}
	entries := Match(s.entries, have)
	if len(entries) == 0 {
		return View{}, &NoIdentityError{Seen: have}
	}
	if s.bundles.Own == nil {
		return View{}, status.Error(codes.Unavailable, "no bundle yet")
	}
	return View{Entries: entries, Bundles: s.bundles.of(entries), Changed: s.changed}, nil
}

// of returns the bundles that the entries' holder gets.
func (b Bundles) of(entries []Entry) Bundles {
	if slices.ContainsFunc(entries, func(e Entry) bool { return e.FederatesAll }) {
		return b
	}
	some := Bundles{Own: b.Own, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{}}
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			if known := b.Federated[td]; known != nil {
				some.Federated[td] = known
			}
		}
	}
	return some
}

// CertifyX509 has a key certified; see Certifier. It refuses IDs that no entry in force has, with a *NoIdentityError.
func (i *Issuer) CertifyX509(ctx context.Context, e Entry, k Key) ([]*x509.Certificate, error) {
	if !i.state.Load().ids[e.ID] {
		return nil, &NoIdentityError{Err: fmt.Errorf("nobody may be %s", e.ID)}
	}
	return i.config.Certifier.CertifyX509(ctx, e, k)
}

// CertifyJWT has a JWT-SVID made; see Certifier. It refuses as CertifyX509 does.
func (i *Issuer) CertifyJWT(ctx context.Context, e Entry, audience []string) (string, error) {
	if !i.state.Load().ids[e.ID] {
		return "", &NoIdentityError{Err: fmt.Errorf("nobody may be %s", e.ID)}
	}
	return i.config.Certifier.CertifyJWT(ctx, e, audience)
}

// NoIdentityError says that a caller is entitled to nothing, and what was seen of it. It is the gRPC status
// PermissionDenied (SPIFFE Workload Endpoint, 6).
type NoIdentityError struct {
	Seen []segment.Selector // of the caller itself, never of an entry
	Err  error              // why, if it is not what was seen
}

func (e *NoIdentityError) Error() string {
	if e.Err != nil {
		return "no identity: " + e.Err.Error()
	}
	seen := make([]string, len(e.Seen))
	for i, s := range e.Seen {
		seen[i] = s.String()
	}
	return "no identity: no workload is recognised by " + strings.Join(seen, ", ")
}

// Unwrap returns Err.
func (e *NoIdentityError) Unwrap() error { return e.Err }

// GRPCStatus makes gRPC servers answer PermissionDenied.
func (e *NoIdentityError) GRPCStatus() *status.Status {
	return status.New(codes.PermissionDenied, e.Error())
}
