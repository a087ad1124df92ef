// Package identity issues and verifies X.509-SVIDs: what a certificate must say, signing it, checking it, and when
// to replace it.
//
// It is for the issuer and the edges around it, which bring keys, state and sockets. It is pure: the time and the
// source of serial numbers are parameters, it reads and writes no file and starts no goroutine. It never makes or
// keeps a workload's private key, and never signs what it would not itself accept.
//
// The specification is SPIFFE's X509-SVID; sections are named where they are implemented.
package identity

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Authority signs the X.509-SVIDs of one trust domain. It is immutable and safe for concurrent use.
type Authority struct {
	td     spiffeid.TrustDomain
	chain  []*x509.Certificate // the signing certificate first, the root last
	signer crypto.Signer
	// constrained says whether a certificate of the chain limits the names or the uses of those below it.
	constrained bool
}

// NewAuthority checks that chain[0] is a signing certificate with the SPIFFE ID of a trust domain (X509-SVID 3.2),
// that each certificate is signed by the next and may stand above it, and that the signer holds the key of the first,
// of ECDSA P-256. It does not look at the time.
func NewAuthority(chain []*x509.Certificate, signer crypto.Signer) (*Authority, error) {
	if len(chain) == 0 {
		return nil, errors.New("use authority: no certificate")
	}
	td, err := trustDomainOf(chain[0])
	if err != nil {
		return nil, fmt.Errorf("use authority: %w", err)
	}
	if err := checkChain(chain, 0); err != nil {
		return nil, fmt.Errorf("use authority: %w", err)
	}
	if !holdsKey(signer, chain[0]) {
		return nil, errors.New("use authority: the key is not the certificate's")
	}
	if err := canWrite(signer); err != nil {
		return nil, fmt.Errorf("use authority: %w", err)
	}
	return &Authority{td: td, chain: chain, signer: signer, constrained: slices.ContainsFunc(chain, constrains)}, nil
}

// Parent certifies authorities and nothing else. It may belong to no trust domain: an organisation's own CA is one. It
// is immutable and safe for concurrent use.
type Parent struct {
	chain  []*x509.Certificate // the signing certificate first, the root last
	signer crypto.Signer
}

// NewParent checks that each certificate of a chain is signed by the next, that all of them may stand above another
// authority, that the last is a root, and that the signer holds the key of the first. It does not look at the time.
func NewParent(chain []*x509.Certificate, signer crypto.Signer) (*Parent, error) {
	if len(chain) == 0 {
		return nil, errors.New("use parent authority: no certificate")
	}
	if err := checkChain(chain, 1); err != nil {
		return nil, fmt.Errorf("use parent authority: %w", err)
	}
	if !holdsKey(signer, chain[0]) {
		return nil, errors.New("use parent authority: the key is not the certificate's")
	}
	return &Parent{chain: chain, signer: signer}, nil
}

// String never tells the key.
func (p *Parent) String() string { return "parent authority " + p.chain[0].Subject.String() }

// trustDomainOf returns the trust domain whose signing certificate it is (X509-SVID 3.2).
func trustDomainOf(ca *x509.Certificate) (spiffeid.TrustDomain, error) {
	if len(ca.URIs) != 1 {
		return spiffeid.TrustDomain{}, fmt.Errorf("certificate has %d URI names, not one", len(ca.URIs))
	}
	id, err := spiffeid.FromURI(ca.URIs[0])
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	if id.Path() != "" {
		return spiffeid.TrustDomain{}, fmt.Errorf("%s is a workload, not a trust domain", id)
	}
	return id.TrustDomain(), nil
}

// checkChain checks that each certificate may sign the one before it, with as many authorities as given below the
// first, and that the last signed itself.
func checkChain(chain []*x509.Certificate, below int) error {
	for i, c := range chain {
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return fmt.Errorf("certificate %d may not sign certificates", i)
		}
		if c.MaxPathLen >= 0 && (c.MaxPathLen > 0 || c.MaxPathLenZero) && c.MaxPathLen < i+below {
			return fmt.Errorf("certificate %d may have no more than %d authorities below it (pathLenConstraint)", i, c.MaxPathLen)
		}
		if err := c.CheckSignatureFrom(chain[min(i+1, len(chain)-1)]); err != nil {
			return fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
	}
	return nil
}

// constrains reports whether a certificate limits the names (RFC 5280, 4.2.1.10) or the uses (4.2.1.12) of those below it.
func constrains(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 ||
		slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 30}) })
}

func holdsKey(signer crypto.Signer, c *x509.Certificate) bool {
	pub, ok := c.PublicKey.(publicKey)
	return ok && signer != nil && pub.Equal(signer.Public())
}

// TrustDomain returns the trust domain whose members the authority may name.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.td }

// Certificate returns the signing certificate. It must not be changed.
func (a *Authority) Certificate() *x509.Certificate { return a.chain[0] }

// Root returns the certificate that stands above all. It must not be changed.
func (a *Authority) Root() *x509.Certificate { return a.chain[len(a.chain)-1] }

// Bundle returns what others must trust to verify what the authority signed: its root.
func (a *Authority) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.td, a.chain[len(a.chain)-1:])
}

// Check checks that whoever trusts the root accepts now what the authority signs: that all of the chain is valid, that it
// may be used for clients and servers, and that name constraints admit the trust domain (X509-SVID 4.2). A root alone
// has nobody above it whom one could ask, but for its time.
func (a *Authority) Check(now time.Time) error {
	if len(a.chain) > 1 {
		return checkIntermediate(a.chain, now)
	}
	if from, to := validity(a.chain); now.Before(from) || now.After(to) {
		return fmt.Errorf("the authority is valid from %s to %s", from.Format(time.RFC3339), to.Format(time.RFC3339))
	}
	return nil
}

// Authorities is what a trust domain signs with and what it is trusted by, at one moment. It is immutable.
type Authorities struct {
	X509 *Authority
	JWT  *JWTAuthority // nil: no JWT-SVIDs are issued
	// Bundle is whom members trust: the roots and the JWT keys that are in use, that are about to be, and that have been
	// as long as something they signed may be valid.
	Bundle *spiffebundle.Bundle
}

// String names the authority, never its key.
func (a *Authority) String() string { return "authority of " + a.td.IDString() }

// validity is the time in which every certificate of a chain is valid.
func validity(chain []*x509.Certificate) (notBefore, notAfter time.Time) {
	notBefore, notAfter = chain[0].NotBefore, chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}

// publicKey is what every public key of the standard library is.
type publicKey interface {
	Equal(crypto.PublicKey) bool
}
