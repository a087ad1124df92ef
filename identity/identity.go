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
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Authority signs the X.509-SVIDs of one trust domain. It is immutable and safe for concurrent use.
type Authority struct {
	td     spiffeid.TrustDomain
	chain  []*x509.Certificate // the signing certificate first, the root last
	signer crypto.Signer
}

// NewAuthority checks that chain[0] is a signing certificate with the SPIFFE ID of a trust domain (X509-SVID 3.2),
// that each certificate is signed by the next, and that the signer holds the key of the first. It does not look at
// the time.
func NewAuthority(chain []*x509.Certificate, signer crypto.Signer) (*Authority, error) {
	if len(chain) == 0 {
		return nil, errors.New("use authority: no certificate")
	}
	ca := chain[0]
	if len(ca.URIs) != 1 {
		return nil, fmt.Errorf("use authority: certificate has %d URI names, not one", len(ca.URIs))
	}
	id, err := spiffeid.FromURI(ca.URIs[0])
	if err != nil {
		return nil, fmt.Errorf("use authority: %w", err)
	}
	if id.Path() != "" {
		return nil, fmt.Errorf("use authority: %s is a workload, not a trust domain", id)
	}
	for i, c := range chain {
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, fmt.Errorf("use authority: certificate %d may not sign certificates", i)
		}
		if err := c.CheckSignatureFrom(chain[min(i+1, len(chain)-1)]); err != nil {
			return nil, fmt.Errorf("use authority: certificate %d of the chain: %w", i, err)
		}
	}
	if pub, ok := ca.PublicKey.(publicKey); !ok || signer == nil || !pub.Equal(signer.Public()) {
		return nil, errors.New("use authority: the key is not the certificate's")
	}
	return &Authority{td: id.TrustDomain(), chain: chain, signer: signer}, nil
}

// TrustDomain returns the trust domain whose members the authority may name.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.td }

// Certificate returns the signing certificate. It must not be changed.
func (a *Authority) Certificate() *x509.Certificate { return a.chain[0] }

// Bundle returns what others must trust to verify what the authority signed: its root.
func (a *Authority) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.td, a.chain[len(a.chain)-1:])
}

// String names the authority, never its key.
func (a *Authority) String() string { return "authority of " + a.td.IDString() }

// validity is the time in which every certificate of the chain is valid.
func (a *Authority) validity() (notBefore, notAfter time.Time) {
	notBefore, notAfter = a.chain[0].NotBefore, a.chain[0].NotAfter
	for _, c := range a.chain[1:] {
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
