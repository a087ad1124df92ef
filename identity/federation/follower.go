package federation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

const (
	// How often a bundle is fetched at most and at least, whatever it says.
	minRefresh, maxRefresh = time.Minute, 24 * time.Hour
	// How soon a failed fetch is tried again: at first, and after many failures.
	minRetry, maxRetry = 5 * time.Second, 10 * time.Minute
	// maxFetches are on their way at one time.
	maxFetches = 8
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
	config  Config
	folder  folder
	fetcher fetcher

	setting sync.Mutex
	wanted  chan []segment.TrustDomain // of size 1; newest wins
	status  atomic.Pointer[[]Status]
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
	if err := openFolder(c.Dir); err != nil {
		return nil, err
	}
	f := &Follower{config: c, folder: folder(c.Dir), wanted: make(chan []segment.TrustDomain, 1)}
	f.status.Store(&[]Status{})
	return f, nil
}

// Set says which trust domains are followed from now on. The bundles of all others are dropped at once, here and on
// the disk.
func (f *Follower) Set(all []segment.TrustDomain) {
	f.setting.Lock()
	defer f.setting.Unlock()
	select {
	case <-f.wanted:
	default:
	}
	f.wanted <- all
}

// Status returns what is known, by trust domain.
func (f *Follower) Status() []Status { return slices.Clone(*f.status.Load()) }

// relation is what is known of one trust domain. It belongs to Run.
type relation struct {
	doc       segment.TrustDomain
	bundle    *spiffebundle.Bundle // the latest; nil: none yet; empty: all keys are revoked
	floor     *uint64              // no sequence number below this is believed; nil: any is
	initial   string               // digest of the initial bundle that was taken over; "": none
	fetched   time.Time
	next      time.Time
	failures  int
	err       error
	initially error              // what is wrong with the initial bundle
	attempt   int                // counts, so that the result of one that was given up is not taken for another's
	cancel    context.CancelFunc // of the fetch on its way; nil: none
}

// result is what has come of an attempt.
type result struct {
	relation *relation
	attempt  int
	bundle   *spiffebundle.Bundle
	err      error
}

// run is one Run.
type run struct {
	*Follower
	relations map[spiffeid.TrustDomain]*relation
	published Bundles
	results   chan result
	fetching  int
	fetches   sync.WaitGroup
}

// Run follows until the context ends. It must run once only.
func (f *Follower) Run(ctx context.Context) error {
	r := &run{Follower: f, relations: make(map[spiffeid.TrustDomain]*relation), results: make(chan result)}
	ctx, cancel := context.WithCancel(ctx)
	defer r.fetches.Wait()
	defer cancel()
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		select {
		case all := <-f.wanted: // 1. the documents have changed
			r.set(all)
		case got := <-r.results: // 2. an endpoint has answered, or has not
			r.take(got)
		case <-wake.C: // 3. it is time
		case <-ctx.Done():
			return nil
		}
		r.begin(ctx)
		r.publish()
		if next := r.next(); !next.IsZero() {
			wake.Reset(time.Until(next))
		}
	}
}

// set makes the relations those of the documents.
func (r *run) set(all []segment.TrustDomain) {
	now := time.Now()
	wanted := make(map[spiffeid.TrustDomain]bool)
	for _, doc := range all {
		td := doc.Domain
		if td.IsZero() || td == r.config.TrustDomain {
			r.config.Log.Error("trust domain not followed: nobody else can speak for it", "trust_domain", td.Name())
			continue
		}
		wanted[td] = true
		old := r.relations[td]
		switch {
		case old == nil:
			r.relations[td] = r.restore(doc)
		case old.doc != doc:
			old.stop()
			if old.doc.Endpoint != doc.Endpoint {
				old.floor = nil // another endpoint may count in another way
			}
			old.doc, old.next, old.failures, old.err = doc, now, 0, nil
		}
		r.relations[td].adopt()
	}
	for td, old := range r.relations {
		if !wanted[td] {
			old.stop()
			delete(r.relations, td)
			r.config.Log.Info("trust domain no longer followed", "trust_domain", td.Name())
		}
	}
	if err := r.folder.retain(wanted); err != nil {
		r.config.Log.Warn("bundles of others not removed", "error", err)
	}
}

// restore returns a relation with what is on the disk of it.
func (r *run) restore(doc segment.TrustDomain) *relation {
	n := &relation{doc: doc, next: time.Now()}
	kept, err := r.folder.load(doc.Domain)
	switch {
	case err != nil:
		r.config.Log.Warn("bundle not restored", "trust_domain", doc.Domain.Name(), "error", err)
	case kept != nil:
		n.bundle, n.initial, n.fetched = kept.bundle, kept.Initial, kept.Fetched
		if kept.Endpoint == endpointDigest(doc.Endpoint) {
			n.floor = kept.Floor
		}
	}
	return n
}

// adopt takes over the initial bundle of the document, if it is another than before: then somebody has written it
// because it is the latest (SPIFFE Federation, 4.2).
func (n *relation) adopt() {
	text := []byte(n.doc.Bundle)
	if n.initially = nil; n.doc.BundleFile != "" {
		if text, n.initially = readFile(n.doc.BundleFile, segment.MaxBundle); n.initially != nil {
			n.initially = fmt.Errorf("read initial bundle: %w", n.initially)
			return
		}
	} else if n.doc.Bundle == "" {
		return
	}
	sum := digest(text)
	if sum == n.initial {
		return
	}
	b, err := segment.ParseBundle(n.doc.Domain, text)
	if err != nil {
		n.initially = fmt.Errorf("read initial bundle: %w", err)
		return
	}
	n.bundle, n.floor, n.initial = b, floorOf(b), sum
}

func floorOf(b *spiffebundle.Bundle) *uint64 {
	if sequence, ok := b.SequenceNumber(); ok {
		return &sequence
	}
	return nil
}

func (n *relation) stop() {
	if n.cancel != nil {
		n.cancel()
		n.cancel = nil
	}
	n.attempt++
}

// next is when a fetch is to be begun; zero: not before something else happens.
func (r *run) next() time.Time {
	var first time.Time
	if r.fetching < maxFetches {
		for _, n := range r.relations {
			if n.cancel == nil && (first.IsZero() || n.next.Before(first)) {
				first = n.next
			}
		}
	}
	return first
}

// begin begins the fetches that are due, those first that have waited longest.
func (r *run) begin(ctx context.Context) {
	now := time.Now()
	waiting := slices.SortedFunc(maps.Values(r.relations), func(a, b *relation) int {
		return cmp.Or(a.next.Compare(b.next), a.doc.Domain.Compare(b.doc.Domain))
	})
	for _, n := range waiting {
		if n.cancel != nil || n.next.After(now) || r.fetching >= maxFetches {
			continue
		}
		n.adopt()
		fetching, cancel := context.WithCancel(ctx)
		n.attempt++
		n.cancel = cancel
		r.fetching++
		attempt, doc, verifier := n.attempt, n.doc, r.verifier(n)
		r.fetches.Go(func() {
			b, err := r.fetcher.fetch(fetching, doc, verifier)
			select {
			case r.results <- result{n, attempt, b, err}:
			case <-ctx.Done():
			}
		})
	}
}

// verifier is the latest bundle of the trust domain that the endpoint is in; nil: none.
func (r *run) verifier(n *relation) x509bundle.Source {
	var b *spiffebundle.Bundle
	switch by := n.doc.Endpoint.ID.TrustDomain(); {
	case by.IsZero():
	case by == r.config.TrustDomain:
		b = r.config.Own()
	case r.relations[by] != nil:
		b = r.relations[by].bundle
	}
	if b == nil {
		return nil
	}
	return b.X509Bundle()
}

// take judges what has come of an attempt.
func (r *run) take(got result) {
	r.fetching--
	n := got.relation
	if n.attempt != got.attempt {
		return // it was given up
	}
	n.stop()
	log := r.config.Log.With("trust_domain", n.doc.Domain.Name())
	changed := false
	if got.err == nil {
		changed, got.err = n.accept(got.bundle)
	}
	now := time.Now()
	if n.err = got.err; n.err != nil {
		n.failures++
		n.next = now.Add(retryAfter(n.failures, rand.Float64())) //nolint:gosec // it keeps clients apart, and hides nothing
		log.Warn("bundle not fetched, the last good one stays", "error", clip(n.err.Error()), "next", n.next)
		return
	}
	n.failures, n.fetched, n.next = 0, now, now.Add(refreshAfter(n.doc, n.bundle))
	switch {
	case changed && n.bundle.Empty():
		log.Warn("trust domain has revoked all its keys, and nobody there is trusted")
	case changed:
		log.Info("bundle changed", "roots", len(n.bundle.X509Authorities()), "jwt_keys", len(n.bundle.JWTAuthorities()))
	}
	kept := record{Endpoint: endpointDigest(n.doc.Endpoint), Initial: n.initial, Floor: n.floor, Fetched: n.fetched, bundle: n.bundle}
	if err := r.folder.save(n.doc.Domain, kept); err != nil {
		n.err = err
		log.Warn("bundle not kept for a restart", "error", err)
	}
	// Whoever waited for this bundle need not wait any longer.
	for _, other := range r.relations {
		if other.failures > 0 && other.cancel == nil && other.doc.Endpoint.ID.MemberOf(n.doc.Domain) && changed {
			other.next = now
		}
	}
}

// accept takes a bundle over, or refuses it because it is older than the last (SPIFFE Trust Domain and Bundle, 4.1.1).
func (n *relation) accept(b *spiffebundle.Bundle) (changed bool, err error) {
	if b.TrustDomain() != n.doc.Domain {
		return false, fmt.Errorf("accept bundle: it is of trust domain %s", b.TrustDomain())
	}
	sequence, numbered := b.SequenceNumber()
	if numbered && n.floor != nil && sequence < *n.floor {
		if sameKeys(b, n.bundle) { // of another replica, which counts for itself
			return false, nil
		}
		return false, fmt.Errorf("accept bundle: its sequence number goes back from %d to %d; if that is right, write the present bundle into the document",
			*n.floor, sequence)
	}
	if numbered {
		n.floor = &sequence
	}
	changed = !b.Equal(n.bundle)
	if changed {
		n.bundle = b
	}
	return changed, nil
}

// sameKeys reports whether two bundles authenticate the same SVIDs.
func sameKeys(a, b *spiffebundle.Bundle) bool {
	return b != nil && a.X509Bundle().Equal(b.X509Bundle()) && a.JWTBundle().Equal(b.JWTBundle())
}

// refreshAfter is how long a bundle is not asked for again.
func refreshAfter(doc segment.TrustDomain, b *spiffebundle.Bundle) time.Duration {
	wait := doc.Refresh
	if hint, ok := b.RefreshHint(); wait == 0 && ok {
		wait = hint
	}
	if wait == 0 {
		wait = defaultHint
	}
	return min(max(wait, minRefresh), maxRefresh)
}

// retryAfter is how long it takes to the next attempt after so many failures; chance, from 0 to 1, keeps those apart
// who failed together.
func retryAfter(failures int, chance float64) time.Duration {
	wait := maxRetry
	if failures < 16 {
		wait = min(minRetry<<(failures-1), maxRetry)
	}
	return wait/2 + time.Duration(chance*float64(wait/2))
}

// publish tells of the bundles, if they are not those that were told of last, and of the status.
func (r *run) publish() {
	bundles := make(Bundles)
	status := make([]Status, 0, len(r.relations))
	for _, td := range slices.SortedFunc(maps.Keys(r.relations), spiffeid.TrustDomain.Compare) {
		n := r.relations[td]
		s := Status{TrustDomain: td.Name(), URL: n.doc.Endpoint.URL, Profile: n.doc.Endpoint.Profile, LastSuccess: n.fetched, Next: n.next}
		if err := errors.Join(n.err, n.initially); err != nil {
			s.Error = clip(err.Error())
		}
		if n.bundle != nil {
			if !n.bundle.Empty() { // else nobody there is to be trusted
				bundles[td] = n.bundle
			}
			s.Sequence, _ = n.bundle.SequenceNumber()
			s.Roots, s.JWTKeys = len(n.bundle.X509Authorities()), len(n.bundle.JWTAuthorities())
		}
		status = append(status, s)
	}
	if !maps.EqualFunc(bundles, r.published, (*spiffebundle.Bundle).Equal) {
		r.published = bundles
		r.config.Publish(maps.Clone(bundles))
	}
	r.status.Store(&status)
}

// clip shortens what a stranger may have had a hand in.
func clip(s string) string {
	const most = 400
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
