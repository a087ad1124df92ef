package disk

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

const (
	// refreshHint is how often others should ask for the bundle: well within every sensible overlap.
	refreshHint = 5 * time.Minute
	// lookEvery is how soon a clock that jumps is noticed, a file of somebody else's that changes, and a disk that has
	// room again.
	lookEvery = time.Minute
	// upstreamWait is how long an upstream authority may take to answer.
	upstreamWait = 20 * time.Second
	// backdate is how far this clock may go back without doing harm to a key that was just made.
	backdate = 10 * time.Second
	// maxSlots bounds the roots, and the JWT keys, that are kept at once.
	maxSlots = 16
)

// Config is what a keeper is made of. Durations of zero are defaults.
type Config struct {
	Dir         string
	TrustDomain spiffeid.TrustDomain
	Key         Key               // what the file is encrypted with; zero: it is not
	Upstream    UpstreamAuthority // who stands above; nil: a root of its own, kept in the folder

	SVIDTTL         time.Duration // the longest life of an X.509-SVID; an hour
	RootTTL         time.Duration // of a root of its own; ten years
	IntermediateTTL time.Duration // a week, or three times SVIDTTL; never more than a quarter of RootTTL
	JWTKeyTTL       time.Duration // 30 days
	// Overlap is for how long an authority stands in the bundle at least before it signs: a day, or a sixth of the lives
	// of roots and JWT keys, which is also the most that it may be.
	Overlap time.Duration

	// Publish is told what signs and whom to trust, at first and whenever that changes. Whoever it tells must know the
	// bundle before anything is signed. It is called from Run; nil: nobody is told.
	Publish func(identity.Authorities)
	Log     *slog.Logger // nil: none
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, otherwise time.Duration) {
		if *d == 0 {
			*d = otherwise
		}
	}
	const day = 24 * time.Hour
	set(&c.SVIDTTL, time.Hour)
	set(&c.RootTTL, 3650*day)
	set(&c.IntermediateTTL, min(max(7*day, 3*c.SVIDTTL), c.RootTTL/4))
	set(&c.JWTKeyTTL, 30*day)
	set(&c.Overlap, min(day, c.RootTTL/6, c.JWTKeyTTL/6))
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) check() error {
	switch {
	case c.TrustDomain.IsZero():
		return errors.New("no trust domain")
	case c.SVIDTTL < identity.MinTTL:
		return fmt.Errorf("SVIDs of %s are too short-lived", c.SVIDTTL)
	case c.RootTTL < time.Minute || c.JWTKeyTTL < time.Minute:
		return fmt.Errorf("roots of %s and JWT keys of %s: at least one minute is needed", c.RootTTL, c.JWTKeyTTL)
	case c.IntermediateTTL < 10*time.Second || c.IntermediateTTL > c.RootTTL/4:
		return fmt.Errorf("intermediates of %s: more than ten seconds and at most a quarter of a root's life are needed", c.IntermediateTTL)
	case c.Overlap < time.Second || c.Overlap > c.RootTTL/6 || c.Overlap > c.JWTKeyTTL/6:
		return fmt.Errorf("an overlap of %s: more than a second and at most a sixth of the life of roots (%s) and JWT keys (%s) is needed",
			c.Overlap, c.RootTTL, c.JWTKeyTTL)
	}
	return nil
}

// Keeper has a folder for itself and keeps what is in it going. Make it with OpenKeeper, and Close it.
type Keeper struct {
	config   Config
	folder   folder
	requests chan request
	shown    atomic.Pointer[shown]

	// These are Run's, and OpenKeeper's before it.
	state     state
	dirty     bool          // what is in force is not what the file says, or not how it should say it
	exists    bool          // there is a file
	candidate *intermediate // of the upstream authority, with a root that not everybody knows yet
	jwtUntil  time.Time     // when the last JWT-SVID has ended that can have been signed by now
	idle      [2]time.Time  // from when until when there is nothing to do
}

// shown is what others see. It is immutable.
type shown struct {
	authorities identity.Authorities
	description Description
	again       time.Time // when there is something to do
}

// What of the authorities.
type What string

// What there is to rotate.
const (
	X509 What = "x509" // the root or, below an upstream authority, what stands below it
	JWT  What = "jwt"  // the key of JWT-SVIDs
	All  What = "all"
)

// request is for one rotation.
type request struct {
	what What
	now  bool
	done chan error // with room for the answer
}

// OpenKeeper takes a folder over, makes what is missing in it, and does what time has made necessary. Below an upstream
// authority that does not answer, it goes on with what it has. What the user must put right is returned as
// segment.Problems, which say how.
func OpenKeeper(ctx context.Context, c Config) (*Keeper, error) {
	c = c.withDefaults()
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("keep authority: %w", err)
	}
	k := &Keeper{config: c, folder: folder{dir: c.Dir, key: c.Key}, requests: make(chan request)}
	if err := k.folder.open(); err != nil {
		return nil, err
	}
	if err := k.folder.hold(); err != nil {
		return nil, err
	}
	if err := k.open(ctx, clock()); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

func (k *Keeper) open(ctx context.Context, now time.Time) error {
	s, err := k.folder.load(k.config.TrustDomain, now)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s = state{td: k.config.TrustDomain}
	case err != nil:
		return err
	default:
		k.exists = true
		k.dirty = !k.folder.sealed && !k.config.Key.IsZero()
		if err := s.begun(k.folder.path(), now); err != nil {
			return err
		}
	}
	k.state = s
	if err := k.look(ctx, now, nil); err != nil {
		if !k.state.below.usable(now) || k.dirty {
			return err
		}
		k.config.Log.Error("authority not kept up", "error", err)
	}
	return nil
}

// begun tells the user of a clock that is behind: nothing can be signed then, and nothing new should be made.
func (s state) begun(path string, now time.Time) error {
	var first time.Time
	for _, r := range s.roots {
		if !now.Before(r.NotBefore) {
			return nil
		}
		if first.IsZero() || r.NotBefore.Before(first) {
			first = r.NotBefore
		}
	}
	return problem("authority-not-begun", path, "the authority begins only at "+first.Format(time.RFC3339), "set this machine's clock")
}

// Close gives the folder back. Run must have ended.
func (k *Keeper) Close() error { return k.folder.close() }

// Authorities returns what signs now and whom to trust.
func (k *Keeper) Authorities() identity.Authorities { return k.shown.Load().authorities }

// Run does what is to be done when its time comes, until the context ends. What fails, it tells the log and tries
// again: what is in force stays in force until it ends by itself.
func (k *Keeper) Run(ctx context.Context) error {
	k.publish()
	for {
		wait := lookEvery
		if again := k.shown.Load().again; !again.IsZero() {
			wait = max(min(wait, again.Sub(clock())), time.Second)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case r := <-k.requests:
			r.done <- k.look(ctx, clock(), &r)
		case <-timer.C:
			if err := k.look(ctx, clock(), nil); err != nil && ctx.Err() == nil {
				k.config.Log.Error("authority not kept up", "error", err)
			}
		}
		timer.Stop()
	}
}

// Rotate has an authority replaced although its time has not come: the next is made at once, and signs when everybody
// has had the overlap to learn of it or, with now, at once too. Then whoever has not fetched the bundle yet refuses what
// it signs. Run must be running.
func (k *Keeper) Rotate(ctx context.Context, what What, now bool) error {
	r := request{what, now, make(chan error, 1)}
	if what != X509 && what != JWT && what != All {
		return fmt.Errorf("rotate authority: %q is none of %s, %s and %s", what, X509, JWT, All)
	}
	select {
	case k.requests <- r:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// clock is the time as certificates know it, which jumps when somebody sets it.
func clock() time.Time { return time.Now().UTC().Round(0) }

// look does what is to be done now, and what somebody asks for. On an error, what could be done has been, unless
// somebody asked: then nothing has.
func (k *Keeper) look(ctx context.Context, now time.Time, asked *request) error {
	k.jwtUntil = later(k.jwtUntil, now.Add(identity.MaxJWTLifetime+lookEvery))
	if asked == nil && k.config.Upstream == nil && !now.Before(k.idle[0]) && now.Before(k.idle[1]) {
		return nil
	}
	next := k.state.clone()
	jwtAgain, jwtErr := k.rotateJWT(&next, now, asked)
	if jwtErr != nil {
		next.jwt = slices.Clone(k.state.jwt)
	}
	before := next.clone()
	var again time.Time
	var err error
	if k.config.Upstream == nil {
		again, err = k.rotateOwn(&next, now, asked)
	} else {
		again, err = k.rotateUpstream(ctx, &next, now, asked)
	}
	if err != nil {
		next = before
	}
	err = errors.Join(jwtErr, err)
	if err == nil || asked == nil && next.below != nil {
		err = errors.Join(err, k.keep(next, now))
	}
	if err != nil && asked != nil {
		return err
	}
	again = soonest(now, again, jwtAgain)
	k.idle = [2]time.Time{now, again}
	if err != nil {
		k.idle[1] = now
	}
	k.show(now, again, err)
	return err
}

// keep writes a state down, and puts it in force if that succeeded.
func (k *Keeper) keep(next state, now time.Time) error {
	if !k.state.trustsAs(next) {
		next.sequence = k.state.sequence + 1
	}
	if !k.exists || k.dirty || !k.state.equal(next) {
		put := os.Rename
		if !k.exists {
			put = os.Link
		}
		if err := k.folder.write(next, put); err != nil {
			return err
		}
		k.tell(next, now)
		k.exists, k.dirty = true, false
	}
	k.state = next
	return nil
}

// equal reports whether two states are the same, one of which was made of the other.
func (s state) equal(o state) bool {
	return s.sequence == o.sequence && s.below == o.below && slices.Equal(s.roots, o.roots) && slices.Equal(s.jwt, o.jwt)
}

// trustsAs reports whether two states have the same bundle.
func (s state) trustsAs(o state) bool {
	return slices.EqualFunc(s.roots, o.roots, func(a, b root) bool { return a.cert.Equal(b.cert) }) &&
		slices.EqualFunc(s.jwt, o.jwt, func(a, b jwtKey) bool { return a.authority.KeyID() == b.authority.KeyID() })
}

// show puts what is in force before others, and publishes it if it is new.
func (k *Keeper) show(now, again time.Time, err error) {
	was := k.shown.Load()
	s := &shown{description: describe(k.state, now), again: again}
	s.description.Encrypted, s.description.Upstream, s.description.Next = k.folder.sealed, k.config.Upstream != nil, again
	if err != nil {
		s.description.Problem = err.Error()
	}
	a, err := k.state.authorities(now)
	if err != nil && was == nil {
		return // nothing has ever been in force
	}
	s.authorities = a
	same := was != nil && was.authorities.X509 == a.X509 && was.authorities.JWT == a.JWT && was.authorities.Bundle.Equal(a.Bundle)
	if same {
		s.authorities = was.authorities
	}
	k.shown.Store(s)
	if was != nil && !same {
		k.publish()
	}
}

func (k *Keeper) publish() {
	if k.config.Publish != nil {
		k.config.Publish(k.shown.Load().authorities)
	}
}

// line is authorities of one kind, which follow each other.
type line[T any] struct {
	overlap time.Duration
	view    func(T) identity.Slot // as it is planned with
	slot    func(*T) *identity.Slot
	prepare func() (T, error)
	asked   *request // nil: nobody has asked for the next
}

// follow does what is planned. It returns all that there are then, and the last plan.
func (l line[T]) follow(all []T, now time.Time) ([]T, identity.Plan, error) {
	views := func() []identity.Slot {
		out := make([]identity.Slot, len(all))
		for i, one := range all {
			out[i] = l.view(one)
		}
		return out
	}
	prepare := func() error {
		if len(all) >= maxSlots {
			signs := identity.Signing(views(), now)
			for i := len(all) - 1; i >= 0; i-- { // only a clock that jumps about fills all places with what has ended
				if i != signs && !now.Before(l.view(all[i]).NotAfter) {
					all = slices.Delete(all, i, i+1)
				}
			}
		}
		if len(all) >= maxSlots {
			return fmt.Errorf("prepare authority: there are %d already; wait until the first of them is not needed any more", len(all))
		}
		one, err := l.prepare()
		if err != nil {
			return err
		}
		all = append(all, one)
		return nil
	}
	if l.asked != nil {
		signs := identity.Signing(views(), now)
		if signs < 0 && len(all) > 0 {
			return nil, identity.Plan{}, errors.New("rotate authority: none is valid now")
		}
		if signs >= 0 {
			l.slot(&all[signs]).Leaving = true
		}
		if l.asked.now && signs >= 0 {
			next := slices.IndexFunc(all, func(one T) bool { v := l.view(one); return v.Activated.IsZero() && v.Valid(now) })
			if next < 0 {
				if err := prepare(); err != nil {
					return nil, identity.Plan{}, err
				}
				next = len(all) - 1
			}
			l.slot(&all[next]).Activated = now
		}
	}
	for range 6 { // two rounds do it, and things are done one after the other here; see identity.Rotation
		p := identity.Rotation{Overlap: l.overlap}.Plan(views(), now)
		switch {
		case p.Prepare:
			first := p.Signs == len(all)
			if err := prepare(); err != nil {
				return nil, p, err
			}
			if first {
				l.slot(&all[len(all)-1]).Activated = now
			}
		case p.Signs >= 0 && l.slot(&all[p.Signs]).Activated.IsZero():
			l.slot(&all[p.Signs]).Activated = now
		case len(p.Retire) > 0:
			for _, i := range slices.Backward(p.Retire) {
				all = slices.Delete(all, i, i+1)
			}
		default:
			return all, p, nil
		}
	}
	return nil, identity.Plan{}, errors.New("plan authority: it comes to no end")
}

// asks returns the request if it is for this.
func (r *request) asks(what What) *request {
	if r == nil || r.what != what && r.what != All {
		return nil
	}
	return r
}

// rotateJWT keeps the keys of JWT-SVIDs going.
func (k *Keeper) rotateJWT(s *state, now time.Time, asked *request) (again time.Time, err error) {
	all, p, err := line[jwtKey]{
		overlap: k.config.Overlap,
		view:    func(j jwtKey) identity.Slot { return j.Slot },
		slot:    (*jwtKey).slot,
		asked:   asked.asks(JWT),
		prepare: func() (jwtKey, error) {
			key, err := newKey()
			if err != nil {
				return jwtKey{}, err
			}
			return newJWTKey(s.td, identity.Slot{NotBefore: now.Add(-backdate), NotAfter: now.Add(k.config.JWTKeyTTL).Truncate(time.Second), Prepared: now}, key)
		},
	}.follow(s.jwt, now)
	if err != nil {
		return time.Time{}, err
	}
	for i := range all {
		if i != p.Signs && !all[i].Activated.IsZero() && all[i].SignedUntil.IsZero() && all[i].Valid(now) {
			all[i].SignedUntil = earlier(k.jwtUntil, all[i].NotAfter)
		}
	}
	s.jwt = all
	return p.Again, nil
}

// rotateOwn keeps roots of our own going, and an intermediate below the one whose turn it is. A root of an upstream
// authority that was there before is succeeded like any other, but that nothing more can be signed below it.
func (k *Keeper) rotateOwn(s *state, now time.Time, asked *request) (again time.Time, err error) {
	above := -1
	if s.below != nil {
		above = s.rootOf(s.below.authority.Root())
	}
	var mine, others []root
	for i, r := range s.roots {
		switch {
		case r.key == nil && i == above:
			r.Leaving = true
			mine = append(mine, r)
		case r.key != nil:
			mine = append(mine, r)
		case now.Before(r.SignedUntil):
			others = append(others, r)
		}
	}
	mine, p, err := line[root]{
		overlap: k.config.Overlap,
		view: func(r root) identity.Slot {
			if r.key == nil {
				r.NotAfter = s.below.chain[0].NotAfter
			}
			return r.Slot
		},
		slot:  (*root).slot,
		asked: asked.asks(X509),
		prepare: func() (root, error) {
			key, err := newKey()
			if err != nil {
				return root{}, err
			}
			template, err := identity.CATemplate(s.td, k.config.RootTTL, now, rand.Reader)
			if err != nil {
				return root{}, err
			}
			a, err := identity.SelfSign(template, key)
			if err != nil {
				return root{}, err
			}
			r, err := newRoot(a.Certificate(), key)
			r.Prepared = now
			return r, err
		},
	}.follow(mine, now)
	if err != nil {
		return time.Time{}, err
	}
	again = p.Again
	if p.Signs >= 0 && mine[p.Signs].key != nil {
		r := &mine[p.Signs]
		if !s.below.usable(now) || !s.below.authority.Root().Equal(r.cert) || !now.Before(identity.RenewAt(s.below.chain[0])) {
			parent, err := identity.NewParent([]*x509.Certificate{r.cert}, r.key)
			if err != nil {
				return time.Time{}, err
			}
			if s.below, err = k.mint(s.td, now, func(csr *x509.CertificateRequest) ([]*x509.Certificate, error) {
				template, err := parent.IntermediateTemplate(s.td, k.config.IntermediateTTL, now, rand.Reader)
				if err != nil {
					return nil, err
				}
				return parent.SignIntermediate(template, csr.PublicKey, now)
			}); err != nil {
				return time.Time{}, err
			}
			r.SignedUntil = later(r.SignedUntil, s.below.chain[0].NotAfter)
		}
		again = soonest(now, again, identity.RenewAt(s.below.chain[0]))
	}
	s.roots = append(others, mine...)
	return again, nil
}

// rotateUpstream keeps an intermediate going below an upstream authority, whose roots are trusted as soon as they are
// known. What a root has signed that others have not had the overlap to learn of is put in force only then, or when
// what was in force has ended. Roots that the upstream authority no longer names, and those of our own from before,
// are trusted until all that they signed has ended.
func (k *Keeper) rotateUpstream(ctx context.Context, s *state, now time.Time, asked *request) (again time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamWait)
	defer cancel()
	listed, err := k.config.Upstream.Roots(ctx)
	if err != nil {
		return time.Time{}, fmt.Errorf("ask upstream authority for its roots: %w", err)
	}
	for _, c := range listed {
		if err := s.trust(c, now); err != nil {
			return time.Time{}, err
		}
	}
	names := func(c *x509.Certificate) bool { return slices.ContainsFunc(listed, c.Equal) }
	asked = asked.asks(X509)

	usable := s.below.usable(now)
	due := !usable || asked != nil || !now.Before(identity.RenewAt(s.below.chain[0])) || !names(s.below.authority.Root())
	if usable && s.roots[s.rootOf(s.below.authority.Root())].Leaving {
		due = true
	}
	c := k.candidate
	if due && (asked != nil || !c.usable(now) || !names(c.authority.Root()) || !now.Before(identity.RenewAt(c.chain[0]))) {
		c, err = k.mint(s.td, now, func(csr *x509.CertificateRequest) ([]*x509.Certificate, error) {
			return k.config.Upstream.MintIntermediate(ctx, csr.Raw, k.config.IntermediateTTL)
		})
		if err != nil {
			return time.Time{}, fmt.Errorf("ask upstream authority for a certificate: %w", err)
		}
		if !names(c.authority.Root()) {
			return time.Time{}, errors.New("ask upstream authority for a certificate: its root is none of those to trust")
		}
	}
	if due {
		r := &s.roots[s.rootOf(c.authority.Root())]
		known := r.Prepared.Add(k.config.Overlap)
		if !r.Activated.IsZero() || !usable || !now.Before(known) || asked != nil && asked.now {
			if r.Activated.IsZero() {
				r.Activated = now
			}
			r.SignedUntil = later(r.SignedUntil, c.chain[0].NotAfter)
			for i := range s.roots {
				s.roots[i].Leaving = false
			}
			s.below, c = c, nil
		} else {
			again = soonest(now, known, s.below.chain[0].NotAfter)
			if asked != nil {
				s.roots[s.rootOf(s.below.authority.Root())].Leaving = true
			}
		}
	}
	k.candidate = c
	above := s.roots[s.rootOf(s.below.authority.Root())]
	s.roots = slices.DeleteFunc(s.roots, func(r root) bool {
		switch {
		case r.key == nil && names(r.cert), r.cert.Equal(above.cert):
			return false
		case now.Before(r.SignedUntil), now.Before(above.Activated.Add(k.config.Overlap)):
			again = soonest(now, again, later(r.SignedUntil, above.Activated.Add(k.config.Overlap)))
			return false
		}
		return true
	})
	return soonest(now, again, identity.RenewAt(s.below.chain[0])), nil
}

// trust adds a root of an upstream authority, if it is new.
func (s *state) trust(c *x509.Certificate, now time.Time) error {
	if s.rootOf(c) >= 0 {
		return nil
	}
	if len(s.roots) >= maxSlots {
		return fmt.Errorf("trust upstream authority: there are %d roots already", len(s.roots))
	}
	r, err := newRoot(c, nil)
	if err != nil {
		return fmt.Errorf("trust upstream authority: %w", err)
	}
	r.Prepared = now
	s.roots = append(s.roots, r)
	return nil
}

// mint makes a key, has it certified as an authority's, and checks what comes of it.
func (k *Keeper) mint(td spiffeid.TrustDomain, now time.Time, certify func(*x509.CertificateRequest) ([]*x509.Certificate, error)) (*intermediate, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{td.ID().URL()}}, key)
	if err != nil {
		return nil, fmt.Errorf("request certificate: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("request certificate: %w", err)
	}
	chain, err := certify(csr)
	if err != nil {
		return nil, err
	}
	if len(chain) < 2 || len(chain) > maxChain {
		return nil, fmt.Errorf("take certificate: the chain has %d certificates, not 2 to %d", len(chain), maxChain)
	}
	i, err := newIntermediate(chain, key)
	if err != nil {
		return nil, err
	}
	if got := i.authority.TrustDomain(); got != td {
		return nil, fmt.Errorf("take certificate: it is %s's, not %s's", got, td)
	}
	if err := i.authority.Check(now); err != nil {
		return nil, fmt.Errorf("take certificate: %w", err)
	}
	return i, nil
}

// maxChain bounds what every SVID carries along.
const maxChain = 8

func newKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return key, nil
}

// soonest returns the first of the times that lie in the future; zero: none does.
func soonest(now time.Time, times ...time.Time) (first time.Time) {
	for _, at := range times {
		if at.After(now) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}
