package disk

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

// state is all that a folder keeps. Its parts are not changed once they are in it; a changed state is another one.
type state struct {
	td       spiffeid.TrustDomain
	sequence uint64 // of the bundle (Trust Domain and Bundle 4.1.1)
	roots    []root
	below    *intermediate // nil: none yet
	jwt      []jwtKey
}

// root is whom members trust. One without a key is an upstream authority's.
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

// bundle is whom members trust.
func (s state) bundle() *spiffebundle.Bundle {
	b := spiffebundle.New(s.td)
	for _, r := range s.roots {
		b.AddX509Authority(r.cert)
	}
	for _, k := range s.jwt {
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

// The file is PEM (RFC 7468, with the headers of RFC 1421). A block typeHead comes first, whose content is the SHA-256
// of all that follows it. After that come records, of a block with the header Slot and those without that follow it:
//
//	Slot: jwt            PRIVATE KEY
//	Slot: intermediate   PRIVATE KEY, then CERTIFICATEs, the root last
//	Slot: root           PRIVATE KEY, CERTIFICATE; an upstream authority's is without the key
//
// Before there were slots, the file was one PRIVATE KEY and one CERTIFICATE, which signed SVIDs itself. It is taken over.
const (
	typeHead    = "SALLYPORT AUTHORITY"
	typeKey     = "PRIVATE KEY"
	typeCert    = "CERTIFICATE"
	fileVersion = "1"
	preamble    = "Sallyport keeps the authority of a trust domain here. Keep it secret, and have a backup.\n\n"
)

// maxBefore is the longest life of what an authority of the former kind may have signed.
const maxBefore = 30 * 24 * time.Hour

func (s state) encode() ([]byte, error) {
	var body bytes.Buffer
	put := func(headers map[string]string, key crypto.Signer, certs ...*x509.Certificate) error {
		var blocks []*pem.Block
		if key != nil {
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				return err
			}
			blocks = append(blocks, &pem.Block{Type: typeKey, Bytes: der})
		}
		for _, c := range certs {
			blocks = append(blocks, &pem.Block{Type: typeCert, Bytes: c.Raw})
		}
		blocks[0].Headers = headers
		for _, b := range blocks {
			if err := pem.Encode(&body, b); err != nil {
				return err
			}
		}
		return nil
	}
	for _, k := range s.jwt {
		headers := slotHeaders("jwt", k.Slot)
		headers["Not-Before"], headers["Not-After"] = k.NotBefore.UTC().Format(time.RFC3339Nano), k.NotAfter.UTC().Format(time.RFC3339Nano)
		if err := put(headers, k.key); err != nil {
			return nil, err
		}
	}
	if s.below != nil {
		if err := put(map[string]string{"Slot": "intermediate"}, s.below.key, s.below.chain...); err != nil {
			return nil, err
		}
	}
	for _, r := range s.roots {
		if err := put(slotHeaders("root", r.Slot), r.key, r.cert); err != nil {
			return nil, err
		}
	}
	sum := sha256.Sum256(body.Bytes())
	head := pem.EncodeToMemory(&pem.Block{Type: typeHead, Bytes: sum[:], Headers: map[string]string{
		"Version": fileVersion, "Trust-Domain": s.td.Name(), "Sequence": strconv.FormatUint(s.sequence, 10)}})
	return slices.Concat([]byte(preamble), head, body.Bytes()), nil
}

func slotHeaders(kind string, s identity.Slot) map[string]string {
	h := map[string]string{"Slot": kind}
	for name, at := range map[string]time.Time{"Prepared": s.Prepared, "Activated": s.Activated, "Signed-Until": s.SignedUntil} {
		if !at.IsZero() {
			h[name] = at.UTC().Format(time.RFC3339Nano)
		}
	}
	if s.Leaving {
		h["Leaving"] = "true"
	}
	return h
}

// tornError says that a file is not whole.
type tornError string

func (e tornError) Error() string { return string(e) }

// decode reads a state. Its errors never contain what was read.
func decode(data []byte, now time.Time) (state, error) {
	head, body := pem.Decode(data)
	if head == nil || head.Type != typeHead {
		return takeOver(data, now)
	}
	if v := head.Headers["Version"]; v != fileVersion {
		return state{}, fmt.Errorf("it has the format %q, this program knows %s: a newer one has written it", v, fileVersion)
	}
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], head.Bytes) {
		return state{}, tornError("it is not whole: its content does not have the checksum that it names")
	}
	var s state
	var err error
	if s.td, err = spiffeid.TrustDomainFromString(head.Headers["Trust-Domain"]); err != nil {
		return state{}, tornError("it names no trust domain")
	}
	if s.sequence, err = strconv.ParseUint(head.Headers["Sequence"], 10, 64); err != nil {
		return state{}, tornError("it has no sequence number")
	}
	records, err := parse(body)
	if err != nil {
		return state{}, err
	}
	for i, r := range records {
		if err := s.add(r); err != nil {
			return state{}, fmt.Errorf("record %d: %w", i+1, err)
		}
	}
	if len(s.roots) == 0 || len(s.roots) > maxSlots || len(s.jwt) > maxSlots {
		return state{}, errors.New("it has no root, or too many")
	}
	if s.below != nil && s.rootOf(s.below.authority.Root()) < 0 {
		return state{}, errors.New("the authority that signs is below none of the roots")
	}
	return s, nil
}

// record is some blocks that belong together.
type record struct {
	headers map[string]string
	key     crypto.Signer
	certs   []*x509.Certificate
}

func parse(data []byte) ([]record, error) {
	var all []record
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if len(all) == 0 || len(block.Headers) > 0 {
			all = append(all, record{headers: block.Headers})
		}
		r := &all[len(all)-1]
		switch block.Type {
		case typeKey:
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, tornError("the private key cannot be read")
			}
			signer, ok := k.(crypto.Signer)
			if !ok || r.key != nil {
				return nil, errors.New("there is not one private key for signing")
			}
			r.key = signer
		case typeCert:
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("a certificate cannot be read: %w", err)
			}
			r.certs = append(r.certs, c)
		default:
			return nil, fmt.Errorf("there is a block %q", block.Type)
		}
	}
	return all, nil
}

// add takes a record in, if it is right in itself.
func (s *state) add(r record) error {
	headers := maps.Clone(r.headers)
	take := func(name string) string {
		v := headers[name]
		delete(headers, name)
		return v
	}
	times := func(name string) (at time.Time, err error) {
		if v := take(name); v != "" {
			if at, err = time.Parse(time.RFC3339Nano, v); err != nil {
				return at, fmt.Errorf("%s is not a time", name)
			}
		}
		return at, nil
	}
	kind := take("Slot")
	slot := identity.Slot{Leaving: take("Leaving") == "true"}
	for name, at := range map[string]*time.Time{"Prepared": &slot.Prepared, "Activated": &slot.Activated, "Signed-Until": &slot.SignedUntil,
		"Not-Before": &slot.NotBefore, "Not-After": &slot.NotAfter} {
		var err error
		if *at, err = times(name); err != nil {
			return err
		}
	}
	if len(headers) > 0 {
		return fmt.Errorf("it says more than is known: %q", slices.Sorted(maps.Keys(headers)))
	}
	switch {
	case kind == "root" && len(r.certs) == 1:
		one, err := newRoot(r.certs[0], r.key)
		if err != nil {
			return err
		}
		slot.NotBefore, slot.NotAfter = one.NotBefore, one.NotAfter
		one.Slot = slot
		if s.rootOf(one.cert) >= 0 {
			return errors.New("it is there twice")
		}
		if one.key != nil { // an upstream authority's root may belong to no trust domain
			if a, err := one.authority(); err != nil || a.TrustDomain() != s.td {
				return errors.New("it is another trust domain's")
			}
		}
		s.roots = append(s.roots, one)
		return nil
	case kind == "intermediate" && s.below == nil:
		below, err := newIntermediate(r.certs, r.key)
		if err != nil {
			return err
		}
		if below.authority.TrustDomain() != s.td {
			return errors.New("it is another trust domain's")
		}
		s.below = below
		return nil
	case kind == "jwt" && r.key != nil && len(r.certs) == 0 && slot.NotAfter.After(slot.NotBefore):
		k, err := newJWTKey(s.td, slot, r.key)
		if err != nil {
			return err
		}
		s.jwt = append(s.jwt, k)
		return nil
	}
	return errors.New("it is none of root, intermediate and jwt, or not as such are")
}

// newRoot checks that a certificate is a root that may have authorities below it, and the key its own, if there is one.
func newRoot(cert *x509.Certificate, key crypto.Signer) (root, error) {
	r := root{Slot: identity.Slot{NotBefore: cert.NotBefore, NotAfter: cert.NotAfter}, cert: cert, key: key}
	if key == nil {
		return r, checkRoot(cert)
	}
	_, err := identity.NewParent([]*x509.Certificate{cert}, key)
	return r, err
}

// checkRoot checks that others can trust a certificate as a root.
func checkRoot(cert *x509.Certificate) error {
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return errors.New("it may not sign certificates")
	}
	if err := cert.CheckSignatureFrom(cert); err != nil {
		return fmt.Errorf("it is not a root: %w", err)
	}
	return nil
}

// takeOver makes a state of a file of the former kind: the same root, which has signed SVIDs itself.
func takeOver(data []byte, now time.Time) (state, error) {
	records, err := parse(data)
	if err != nil {
		return state{}, err
	}
	switch {
	case len(records) == 0:
		return state{}, tornError("there is neither a key nor a certificate")
	case len(records) > 1:
		return state{}, tornError("its beginning is missing")
	case records[0].key == nil:
		return state{}, tornError("there is a certificate without its key")
	case len(records[0].certs) != 1:
		return state{}, tornError("there is a key without its one certificate")
	}
	r, err := newRoot(records[0].certs[0], records[0].key)
	if err != nil {
		return state{}, err
	}
	a, err := r.authority()
	if err != nil {
		return state{}, err
	}
	r.Prepared, r.Activated = r.NotBefore, r.NotBefore
	r.SignedUntil = earlier(now.Add(maxBefore), r.NotAfter)
	return state{td: a.TrustDomain(), sequence: 1, roots: []root{r}}, nil
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
