package federation

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

// Bundles are those of other trust domains. They are not to be changed.
type Bundles = map[spiffeid.TrustDomain]*spiffebundle.Bundle

// Config is what a follower needs. All of it is needed.
type Config struct {
	// TrustDomain is the own one, which nobody else's endpoint can give a bundle for, and Own its bundle, for endpoints
	// with an X.509-SVID of ours; Own returns nil while there is none.
	TrustDomain spiffeid.TrustDomain
	Own         func() *spiffebundle.Bundle
	// Dir keeps the last good bundles. It is made with mode 0700 where there is none, and is the follower's alone.
	Dir string
	// Publish is told all bundles whenever one has changed. It must not block.
	Publish func(Bundles)
	Log     *slog.Logger
}

// Follower keeps the bundles of other trust domains fresh (SPIFFE Federation, 4.2 and 5). Set and Status are safe for
// concurrent use.
type Follower struct {
	config    Config
	fetcher   fetcher
	engine    engine[segment.TrustDomain, *domain]
	published Bundles
	status    atomic.Pointer[[]Status]
}

// Status is what is known of one trust domain.
type Status struct {
	TrustDomain string                  `json:"trust_domain"`
	URL         string                  `json:"url"`
	Profile     segment.EndpointProfile `json:"profile"`
	LastSuccess time.Time               `json:"last_success,omitzero"` // also before a restart; zero: never
	Next        time.Time               `json:"next"`                  // when it is fetched next
	Error       string                  `json:"error,omitempty"`       // why the last fetch failed; "": it did not
	Sequence    uint64                  `json:"sequence,omitempty"`
	Roots       int                     `json:"roots"`    // for X.509-SVIDs; with JWTKeys 0: nobody can be authenticated
	JWTKeys     int                     `json:"jwt_keys"` // for JWT-SVIDs
}

// New returns a follower of nobody. It opens its folder, which nobody else may get into.
func New(c Config) (*Follower, error) {
	f := &Follower{config: c}
	f.engine = engine[segment.TrustDomain, *domain]{
		log: c.Log, name: "trust_domain", id: whose, who: whose,
		restore: f.restore, publish: f.publish,
	}
	f.status.Store(&[]Status{})
	if err := f.engine.open(c.Dir); err != nil {
		return nil, err
	}
	return f, nil
}

func whose(doc segment.TrustDomain) string { return doc.Domain.Name() }

// Set says which trust domains are followed from now on. The bundles of all others are dropped at once, here and on
// the disk.
func (f *Follower) Set(all []segment.TrustDomain) {
	f.engine.set(slices.DeleteFunc(slices.Clone(all), func(doc segment.TrustDomain) bool {
		own := doc.Domain.IsZero() || doc.Domain == f.config.TrustDomain
		if own {
			f.config.Log.Error("trust domain not followed: nobody else can speak for it", "trust_domain", doc.Domain.Name())
		}
		return own
	}))
}

// Status returns what is known, by trust domain.
func (f *Follower) Status() []Status { return slices.Clone(*f.status.Load()) }

// Run follows until the context ends. It must run once only.
func (f *Follower) Run(ctx context.Context) error {
	f.engine.run(ctx)
	return nil
}

// domain is a trust domain that is followed.
type domain struct {
	*Follower
	begun
	bundle *spiffebundle.Bundle // the latest; nil: none yet; empty: all keys are revoked
	floor  *uint64              // no sequence number below this is believed; nil: any is
	from   string               // digest of the endpoint that counts them
}

// domainRecord is what is on the disk of a trust domain.
type domainRecord struct {
	TrustDomain string          `json:"trustDomain"`
	Endpoint    string          `json:"endpoint"`          // digest of where it came from
	Initial     string          `json:"initial,omitempty"` // digest of the initial bundle
	Floor       *uint64         `json:"floor,omitempty"`   // the highest sequence number so far
	Fetched     time.Time       `json:"fetched"`
	Bundle      json.RawMessage `json:"bundle"` // SPIFFE bundle
}

// restore returns a trust domain with what is on the disk of it.
func (f *Follower) restore(doc segment.TrustDomain) *domain {
	d := &domain{Follower: f}
	if err := d.load(doc.Domain); err != nil {
		f.config.Log.Warn("bundle not restored", "trust_domain", doc.Domain.Name(), "error", err)
	}
	return d
}

func (d *domain) load(td spiffeid.TrustDomain) error {
	var r domainRecord
	found, err := d.engine.folder.load(td.Name(), &r)
	if err != nil || !found {
		return err
	}
	if r.TrustDomain != td.Name() {
		return fmt.Errorf("the file is of trust domain %q", r.TrustDomain)
	}
	b, err := decodeBundle(td, r.Bundle)
	if err != nil {
		return err
	}
	d.bundle, d.floor, d.from, d.begun = b, r.Floor, r.Endpoint, begun{r.Initial, r.Fetched}
	return nil
}

func (d *domain) keep(doc segment.TrustDomain, now time.Time) error {
	d.fetched = now
	document, err := encodeBundle(d.bundle)
	if err != nil {
		return fmt.Errorf("keep bundle: %w", err)
	}
	if err := d.engine.folder.save(whose(doc), domainRecord{
		TrustDomain: whose(doc), Endpoint: d.from, Initial: d.initial, Floor: d.floor, Fetched: d.fetched, Bundle: document,
	}); err != nil {
		return fmt.Errorf("keep bundle: %w", err)
	}
	return nil
}

// endpointDigest tells one way to get a bundle from another.
func endpointDigest(e segment.BundleEndpoint) string {
	return digest(fmt.Appendf(nil, "%q %q %q %q", e.URL, e.Profile, e.CAFile, e.ID))
}

// begin takes over the initial bundle of the document (SPIFFE Federation, 4.2).
func (d *domain) begin(doc segment.TrustDomain) error {
	if from := endpointDigest(doc.Endpoint); from != d.from {
		d.from, d.floor = from, nil // another endpoint may count in another way
	}
	err := d.with(doc.Bundle, doc.BundleFile, func(document []byte) error {
		if document == nil {
			d.bundle, d.floor = nil, nil
			return nil
		}
		b, err := segment.ParseBundle(doc.Domain, document)
		if err == nil {
			d.bundle, d.floor = b, floorOf(b)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("read initial bundle: %w", err)
	}
	return nil
}

func floorOf(b *spiffebundle.Bundle) *uint64 {
	if sequence, ok := b.SequenceNumber(); ok {
		return &sequence
	}
	return nil
}

func (d *domain) ask(doc segment.TrustDomain) fetch {
	verifier := d.verifier(doc.Endpoint.ID.TrustDomain())
	return func(ctx context.Context) (accept, error) {
		b, err := d.fetcher.bundle(ctx, doc, verifier)
		return func() (time.Duration, error) { return d.accept(doc, b) }, err
	}
}

// verifier is the latest bundle of the trust domain that an endpoint is in; nil: none.
func (f *Follower) verifier(by spiffeid.TrustDomain) x509bundle.Source {
	var b *spiffebundle.Bundle
	if by == f.config.TrustDomain {
		b = f.config.Own()
	} else if n := f.engine.relations[by.Name()]; n != nil {
		b = n.party.bundle
	}
	if b == nil {
		return nil
	}
	return b.X509Bundle()
}

// accept takes a bundle over, or refuses it because it is older than the last (SPIFFE Trust Domain and Bundle, 4.1.1).
func (d *domain) accept(doc segment.TrustDomain, b *spiffebundle.Bundle) (time.Duration, error) {
	if b.TrustDomain() != doc.Domain {
		return 0, fmt.Errorf("accept bundle: it is of trust domain %s", b.TrustDomain())
	}
	sequence, numbered := b.SequenceNumber()
	switch {
	case numbered && d.floor != nil && sequence < *d.floor:
		if !sameKeys(b, d.bundle) {
			return 0, fmt.Errorf("accept bundle: its sequence number goes back from %d to %d; if that is right, write the present bundle into the document",
				*d.floor, sequence)
		}
		b = d.bundle // it is of another replica, which counts for itself
	case numbered:
		d.floor = &sequence
	}
	if !b.Equal(d.bundle) {
		d.bundle = b
		d.changed(doc.Domain)
	}
	hint, _ := b.RefreshHint()
	return refreshAfter(doc.Refresh, hint), nil
}

// changed tells of another bundle. Whoever waited for it, to be verified by it, need not wait any longer.
func (d *domain) changed(td spiffeid.TrustDomain) {
	log := d.config.Log.With("trust_domain", td.Name())
	if d.bundle.Empty() {
		log.Warn("trust domain has revoked all its keys, and nobody there is trusted")
	} else {
		log.Info("bundle changed", "roots", len(d.bundle.X509Authorities()), "jwt_keys", len(d.bundle.JWTAuthorities()))
	}
	for _, other := range d.engine.relations {
		if other.doc.Endpoint.ID.MemberOf(td) {
			other.hurry()
		}
	}
}

// sameKeys reports whether two bundles authenticate the same SVIDs.
func sameKeys(a, b *spiffebundle.Bundle) bool {
	return b != nil && a.X509Bundle().Equal(b.X509Bundle()) && a.JWTBundle().Equal(b.JWTBundle())
}

// publish tells of the bundles, if they are not those that were told of last, and of the status.
func (f *Follower) publish() {
	bundles := make(Bundles)
	status := make([]Status, 0, len(f.engine.relations))
	for _, n := range f.engine.sorted() {
		d, endpoint := n.party, n.doc.Endpoint
		s := Status{TrustDomain: n.doc.Domain.Name(), URL: endpoint.URL, Profile: endpoint.Profile, LastSuccess: d.fetched, Next: n.next, Error: n.problem()}
		if d.bundle != nil {
			if !d.bundle.Empty() { // else nobody there is to be trusted
				bundles[n.doc.Domain] = d.bundle
			}
			s.Sequence, _ = d.bundle.SequenceNumber()
			s.Roots, s.JWTKeys = len(d.bundle.X509Authorities()), len(d.bundle.JWTAuthorities())
		}
		status = append(status, s)
	}
	if !maps.EqualFunc(bundles, f.published, (*spiffebundle.Bundle).Equal) {
		f.published = bundles
		f.config.Publish(maps.Clone(bundles))
	}
	f.status.Store(&status)
}
