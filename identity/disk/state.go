package disk

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

// maxSlots bounds the roots, and the JWT keys, that are kept at once.
const maxSlots = 16

// state is all that a folder keeps. Its parts are not changed once they are in it; a changed state is another one.
type state struct {
	td       spiffeid.TrustDomain
	sequence uint64 // of the bundle (Trust Domain and Bundle 4.1.1)
	roots    []root
	below    *intermediate // nil: none yet
	jwt      []jwtKey
}

// root is whom members trust, or must not: one without a key is an upstream authority's, and stays here when it is
// distrusted, so that it is not trusted anew.
type root struct {
	identity.Slot
	cert *x509.Certificate
	key  crypto.Signer
}

// authority is the root as one that signs SVIDs itself.
func (r root) authority() (*identity.Authority, error) {
	return identity.NewAuthority([]*x509.Certificate{r.cert}, r.key)
}

// intermediate is what signs X.509-SVIDs, below one of the roots.
type intermediate struct {
	authority *identity.Authority
	chain     []*x509.Certificate // the intermediate first, the root last
	key       crypto.Signer
}

// usable reports whether it signs now. All but the time was checked when it was made.
func (i *intermediate) usable(now time.Time) bool {
	return i != nil && !slices.ContainsFunc(i.chain, func(c *x509.Certificate) bool {
		return now.Before(c.NotBefore) || !now.Before(c.NotAfter)
	})
}

type jwtKey struct {
	identity.Slot
	authority *identity.JWTAuthority
	key       crypto.Signer
}

func newIntermediate(chain []*x509.Certificate, key crypto.Signer) (*intermediate, error) {
	a, err := identity.NewAuthority(chain, key)
	if err != nil {
		return nil, err
	}
	return &intermediate{a, chain, key}, nil
}

func newJWTKey(td spiffeid.TrustDomain, slot identity.Slot, key crypto.Signer) (jwtKey, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return jwtKey{}, err
	}
	sum := sha256.Sum256(der)
	a, err := identity.NewJWTAuthority(td, hex.EncodeToString(sum[:16]), key, slot.NotAfter)
	if err != nil {
		return jwtKey{}, err
	}
	return jwtKey{slot, a, key}, nil
}

// clone returns a state of which roots and keys can be added, replaced and deleted.
func (s state) clone() state {
	s.roots, s.jwt = slices.Clone(s.roots), slices.Clone(s.jwt)
	return s
}

// rootOf returns the index of a root; -1: it is not there.
func (s state) rootOf(c *x509.Certificate) int {
	return slices.IndexFunc(s.roots, func(r root) bool { return r.cert.Equal(c) })
}

// signs returns the index of the root that signs: the one above the intermediate or, where there is none, the one
// whose turn it is; -1: none.
func (s state) signs(now time.Time) int {
	if s.below != nil {
		return s.rootOf(s.below.authority.Root())
	}
	return identity.Signing(slots(s.roots, (*root).slot), now)
}

func (r *root) slot() *identity.Slot   { return &r.Slot }
func (k *jwtKey) slot() *identity.Slot { return &k.Slot }

func slots[T any](all []T, slot func(*T) *identity.Slot) []identity.Slot {
	out := make([]identity.Slot, len(all))
	for i := range all {
		out[i] = *slot(&all[i])
	}
	return out
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

// equal reports whether two states are the same, one of which was made of the other.
func (s state) equal(o state) bool {
	return s.sequence == o.sequence && s.below == o.below && slices.Equal(s.roots, o.roots) && slices.Equal(s.jwt, o.jwt)
}

// trustsAs reports whether two states have the same bundle.
func (s state) trustsAs(o state) bool {
	return slices.EqualFunc(trusted(s.roots, (*root).slot), trusted(o.roots, (*root).slot), func(a, b root) bool { return a.cert.Equal(b.cert) }) &&
		slices.EqualFunc(trusted(s.jwt, (*jwtKey).slot), trusted(o.jwt, (*jwtKey).slot), func(a, b jwtKey) bool { return a.authority.KeyID() == b.authority.KeyID() })
}

// trusted returns those that stand in the bundle.
func trusted[T any](all []T, slot func(*T) *identity.Slot) []T {
	return slices.DeleteFunc(slices.Clone(all), func(one T) bool { return slot(&one).Distrusted })
}

// trust adds a root of an upstream authority, if it is new and its key is not distrusted.
func (s *state) trust(c *x509.Certificate, now time.Time) error {
	if s.rootOf(c) >= 0 || s.distrusts(c) {
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

// distrusts reports whether a certificate has the key of a root that is distrusted. Whoever has that key signs in the
// name of each certificate that it has, so it is the key that nobody may trust.
func (s state) distrusts(c *x509.Certificate) bool {
	return slices.ContainsFunc(s.roots, func(r root) bool { return r.Distrusted && sameKey(r.cert, c) })
}

func sameKey(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

// ready says what cannot be signed now, and why. Only a clock makes it so, one that is behind or one that was ahead, or an
// upstream authority that does not answer.
func (s state) ready(now time.Time) error {
	if s.below == nil {
		return errors.New("there is no authority")
	}
	if err := s.below.authority.Check(now); err != nil {
		return fmt.Errorf("no X.509-SVID can be signed: %w", err)
	}
	if identity.Signing(slots(s.jwt, (*jwtKey).slot), now) < 0 {
		return errors.New("no JWT-SVID can be signed: no key is valid now; set this machine's clock or, if it is right, rotate jwt with --now")
	}
	return nil
}

// bundle is whom members trust.
func (s state) bundle() *spiffebundle.Bundle {
	b := spiffebundle.New(s.td)
	for _, r := range trusted(s.roots, (*root).slot) {
		b.AddX509Authority(r.cert)
	}
	for _, k := range trusted(s.jwt, (*jwtKey).slot) {
		_ = b.AddJWTAuthority(k.authority.KeyID(), k.authority.PublicKey()) // fails without an ID, which it has
	}
	b.SetSequenceNumber(s.sequence)
	b.SetRefreshHint(refreshHint)
	return b
}

// authorities is what is published. It fails while nothing can sign yet.
func (s state) authorities(now time.Time) (identity.Authorities, error) {
	if s.below == nil {
		return identity.Authorities{}, errors.New("there is no authority")
	}
	a := identity.Authorities{X509: s.below.authority, Bundle: s.bundle()}
	if i := identity.Signing(slots(s.jwt, (*jwtKey).slot), now); i >= 0 {
		a.JWT = s.jwt[i].authority
	}
	return a, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
