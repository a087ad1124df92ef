package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MinTTL is the shortest lifetime of an X.509-SVID that can be asked for. Certificates count whole seconds, so a
// shorter one could be due for replacement when it is made.
const MinTTL = 3 * time.Second

const (
	// minLife is what must be left of the authority's own life for it to sign: MinTTL after rounding.
	minLife = 2 * time.Second
	// maxBackdate is how far a verifier's clock may lag behind ours.
	maxBackdate = 10 * time.Second
	// serialBits are random; RFC 5280 4.1.2.2 allows 159.
	serialBits = 128
)

// Request is what an X.509-SVID shall say.
type Request struct {
	ID       spiffeid.ID   // a workload of the authority's trust domain
	DNSNames []string      // further names, for servers whose clients check host names
	TTL      time.Duration // at least MinTTL; cut short where the authority ends earlier
}

// CATemplate is the certificate of a trust domain's root authority: the trust domain's SPIFFE ID as its one URI
// name, critical key usage with keyCertSign, cA true (X509-SVID 3.2, 4.1 and 4.3).
func CATemplate(td spiffeid.TrustDomain, life time.Duration, now time.Time, random io.Reader) (*x509.Certificate, error) {
	if td.IsZero() {
		return nil, errors.New("make authority template: no trust domain")
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, fmt.Errorf("make authority template: %w", err)
	}
	notBefore, notAfter, err := lifetime(now, life, time.Time{}, now.Add(life))
	if err != nil {
		return nil, fmt.Errorf("make authority template: %w", err)
	}
	return &x509.Certificate{
		SerialNumber: serial,
		// RFC 5280 4.1.2.6 wants a subject; the serial number keeps two authorities of one trust domain apart.
		Subject:               pkix.Name{Organization: []string{"Sallyport"}, SerialNumber: serial.Text(16)},
		URIs:                  []*url.URL{td.ID().URL()},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}, nil
}

// Template is what an X.509-SVID says that others of its authority don't. The rest is the same for all: see SVIDTemplate.
type Template struct {
	ID                  spiffeid.ID
	DNSNames            []string
	SerialNumber        *big.Int
	NotBefore, NotAfter time.Time
}

// SVIDTemplate is of a leaf certificate (X509-SVID 2, 3.1 and 4): the SPIFFE ID as its one URI name, critical key usage
// digitalSignature, both extended key usages, critical cA false. It has no subject, so that nothing in it but the
// SPIFFE ID can be taken for an identity, and its name extension is critical therefore. It begins a little before
// now, for clocks that lag, but never before the authority, and never outlives it.
func (a *Authority) SVIDTemplate(r Request, now time.Time, random io.Reader) (*Template, error) {
	switch {
	case !r.ID.MemberOf(a.td):
		return nil, fmt.Errorf("make SVID template: %q is not in trust domain %s", r.ID, a.td)
	case r.ID.Path() == "":
		return nil, fmt.Errorf("make SVID template: %s is a trust domain, not a workload", r.ID)
	case r.TTL < MinTTL:
		return nil, fmt.Errorf("make SVID template: lifetime %s is below %s", r.TTL, MinTTL)
	case slices.Contains(r.DNSNames, ""):
		return nil, errors.New("make SVID template: empty DNS name")
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, fmt.Errorf("make SVID template: %w", err)
	}
	from, to := validity(a.chain)
	notBefore, notAfter, err := lifetime(now, r.TTL, from, to)
	if err != nil {
		return nil, fmt.Errorf("make SVID template: %w", err)
	}
	return &Template{ID: r.ID, DNSNames: r.DNSNames, SerialNumber: serial, NotBefore: notBefore, NotAfter: notAfter}, nil
}

// IntermediateTemplate is the certificate of an authority of a trust domain that stands below p: as CATemplate's, with a
// path length of zero, so that it signs SVIDs and no further authority (X509-SVID 4.1). It begins and ends within the
// lives of those above it.
func (p *Parent) IntermediateTemplate(td spiffeid.TrustDomain, life time.Duration, now time.Time, random io.Reader) (*x509.Certificate, error) {
	t, err := CATemplate(td, life, now, random)
	if err != nil {
		return nil, err
	}
	from, to := validity(p.chain)
	if t.NotBefore, t.NotAfter, err = lifetime(now, life, from, to); err != nil {
		return nil, fmt.Errorf("make authority template: %w", err)
	}
	t.MaxPathLenZero = true
	return t, nil
}

// RenewAt is when a certificate should be replaced: at half its life, more or less a tenth of it, by its serial number.
// Many that were issued at once are so not replaced at once; and whoever asks again gets the same answer.
func RenewAt(c *x509.Certificate) time.Time {
	var serial []byte
	if c.SerialNumber != nil {
		serial = c.SerialNumber.Bytes()
	}
	sum := sha256.Sum256(serial) // serial numbers of others may be a sequence
	jitter := float64(binary.BigEndian.Uint32(sum[:])) / (1 << 32)
	return c.NotBefore.Add(time.Duration(float64(c.NotAfter.Sub(c.NotBefore)) * (0.4 + 0.2*jitter)))
}

// lifetime fits a lifetime into the issuer's own. The backdating is at most a tenth of what lies ahead, so half life
// is always in the future.
func lifetime(now time.Time, ttl time.Duration, from, to time.Time) (notBefore, notAfter time.Time, err error) {
	now = now.UTC().Round(0)
	if now.Before(from) {
		return from, to, fmt.Errorf("the authority begins only at %s", from.Format(time.RFC3339))
	}
	notAfter = now.Add(ttl)
	if notAfter.After(to) {
		notAfter = to
	}
	notAfter = notAfter.UTC().Truncate(time.Second)
	life := notAfter.Sub(now)
	if life < minLife {
		return from, to, fmt.Errorf("the authority ends at %s", to.Format(time.RFC3339))
	}
	notBefore = now.Add(-min(life/10, maxBackdate)).Truncate(time.Second)
	if notBefore.Before(from) {
		notBefore = from
	}
	return notBefore, notAfter, nil
}

// newSerial returns a positive random number (RFC 5280 4.1.2.2).
func newSerial(random io.Reader) (*big.Int, error) {
	b := make([]byte, serialBits/8)
	if _, err := io.ReadFull(random, b); err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	n := new(big.Int).SetBytes(b)
	return n.SetBit(n, serialBits, 1), nil // never zero, always of the same length
}
