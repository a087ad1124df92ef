// Package issuer decides who may hold which identity, and signs for them.
//
// It is for the servers that hand identities out (the Workload API, SDS): they ask what their caller is entitled to,
// make its keys, and have them certified. The issuer holds the entries in force and the authority. It does no IO and
// starts no goroutine; it asks the clock, and the process at the other end by way of Config.Attest. It never sees a
// private key other than the authority's, and never says to a caller what others are entitled to.
package issuer

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/segment"
)

// Entry entitles a process to an identity.
type Entry struct {
	ID spiffeid.ID
	// Selectors must all hold of the process. An entry without any entitles nobody.
	Selectors []segment.Selector
	DNSNames  []string      // further names in the certificate, for gateways
	TTL       time.Duration // lifetime of its X.509-SVIDs; at least identity.MinTTL
}

// equal reports whether two entries lead to the same certificates for the same processes.
func (e Entry) equal(o Entry) bool {
	return e.ID == o.ID && e.TTL == o.TTL &&
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

// Config is what an issuer is made of. Both are needed.
type Config struct {
	Authority *identity.Authority
	// Attest returns what is true of the process that the context's call comes from. It is asked at every change,
	// and fails once that process is gone. The hash of its program is wanted only with hash.
	Attest func(ctx context.Context, hash bool) ([]segment.Selector, error)
}

// Issuer entitles nobody until Set. It is safe for concurrent use.
type Issuer struct {
	config Config
	bundle *x509bundle.Bundle
	state  atomic.Pointer[state]
}

// state is the entries in force. It is immutable, but for changed, which is closed when they no longer are.
type state struct {
	entries []Entry
	ids     map[spiffeid.ID]bool
	hash    bool // some entry asks for the hash of a program
	changed chan struct{}
}

// New returns an issuer without entries.
func New(c Config) *Issuer {
	i := &Issuer{config: c, bundle: c.Authority.Bundle()}
	i.state.Store(&state{changed: make(chan struct{})})
	return i
}

// Set puts entries in force in place of those before, and wakes everybody who waits for a change; if they are equal to
// those before, it does nothing. The entries are the issuer's from then on.
func (i *Issuer) Set(entries []Entry) {
	if slices.EqualFunc(i.state.Load().entries, entries, Entry.equal) {
		return
	}
	s := &state{entries: entries, ids: make(map[spiffeid.ID]bool, len(entries)), changed: make(chan struct{})}
	for _, e := range entries {
		s.ids[e.ID] = true
		s.hash = s.hash || slices.ContainsFunc(e.Selectors, func(s segment.Selector) bool {
			return s.Type == "unix" && strings.HasPrefix(s.Value, "sha256:")
		})
	}
	close(i.state.Swap(s).changed)
}

// View is what a caller is entitled to at one moment.
type View struct {
	Entries []Entry            // at least one
	Bundle  *x509bundle.Bundle // whom to trust in the own trust domain; not to be changed
	Changed <-chan struct{}    // closed when the view may no longer be true
}

// Entitled attests the caller whose call the context belongs to, and returns what it is entitled to; a
// *NoIdentityError if that is nothing.
func (i *Issuer) Entitled(ctx context.Context) (View, error) {
	s := i.state.Load() // before the caller is looked at: whatever changes from here on closes s.changed
	have, err := i.config.Attest(ctx, s.hash)
	if err != nil {
		return View{}, &NoIdentityError{Err: err}
	}
	entries := Match(s.entries, have)
	if len(entries) == 0 {
		return View{}, &NoIdentityError{Seen: have}
	}
	return View{Entries: entries, Bundle: i.bundle, Changed: s.changed}, nil
}

// Issue certifies that the holder of a key is whom the entry says. It refuses IDs that no entry in force has, with a
// *NoIdentityError; that the authority cannot sign is the gRPC status Unavailable.
func (i *Issuer) Issue(_ context.Context, e Entry, pub crypto.PublicKey) ([]*x509.Certificate, error) {
	if !i.state.Load().ids[e.ID] {
		return nil, &NoIdentityError{Err: fmt.Errorf("nobody may be %s", e.ID)}
	}
	now := time.Now()
	template, err := i.config.Authority.SVIDTemplate(identity.Request{ID: e.ID, DNSNames: e.DNSNames, TTL: e.TTL}, now, rand.Reader)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "issue SVID: %v", err)
	}
	chain, err := i.config.Authority.Sign(template, pub, now)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "issue SVID: %v", err)
	}
	return chain, nil
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
