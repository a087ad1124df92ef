package disk

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

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
	if s.Distrusted {
		h["Distrusted"] = "true"
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
	if len(trusted(s.roots, (*root).slot)) == 0 {
		return state{}, errors.New("it has no root that is trusted")
	}
	if s.below != nil {
		if i := s.rootOf(s.below.authority.Root()); i < 0 || s.roots[i].Distrusted {
			return state{}, errors.New("the authority that signs is below none of the roots")
		}
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
	slot := identity.Slot{Leaving: take("Leaving") == "true", Distrusted: take("Distrusted") != ""}
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
