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
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

const (
	// upstreamWait is how long an upstream authority may take to answer.
	upstreamWait = 20 * time.Second
	// backdate is how far this clock may go back without doing harm to a key that was just made.
	backdate = 10 * time.Second
	// maxChain bounds what every SVID carries along.
	maxChain = 8
)

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
		if signs < 0 && len(all) > 0 && !l.asked.now { // the clock is behind or, as somebody must know, has been ahead
			return nil, identity.Plan{}, errors.New("rotate authority: none is valid now; set this machine's clock or, if it is right, rotate with --now")
		}
		if signs >= 0 {
			l.slot(&all[signs]).Leaving = true
		}
		if l.asked.now {
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
		case r.Distrusted || now.Before(r.SignedUntil):
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
	names := func(c *x509.Certificate) bool { return slices.ContainsFunc(listed, c.Equal) && !s.distrusts(c) }
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
		case r.Distrusted:
			return r.key != nil // one of our own: nobody else names it
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
