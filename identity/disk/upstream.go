package disk

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

// UpstreamAuthority is somebody else's authority, whose root members trust and below which ours signs.
type UpstreamAuthority interface {
	// MintIntermediate certifies that the holder of the key that signed a request (PKCS #10, DER) is an authority of the
	// trust domain that the request names, for at most ttl. The chain begins with the new certificate and ends with the
	// root.
	MintIntermediate(ctx context.Context, csr []byte, ttl time.Duration) ([]*x509.Certificate, error)
	// Roots returns whom to trust: all roots of chains that may have been minted and still be valid.
	Roots(ctx context.Context) ([]*x509.Certificate, error)
}

// UpstreamCA is an authority whose certificate and key lie in files (PEM). They are read anew each time, so that they can
// be replaced while the program runs. The private key signs in this process and is not kept.
type UpstreamCA struct {
	TrustDomain spiffeid.TrustDomain
	Cert        string // path of the certificate that signs, and of those above it, in any order after it
	Key         string // path of its key, which only owner and group may read
	Bundle      string // path of the roots to trust; empty: the root at the end of Cert
}

// MintIntermediate is an UpstreamAuthority's. What is wrong with the files is returned as segment.Problems.
func (u UpstreamCA) MintIntermediate(_ context.Context, csr []byte, ttl time.Duration) ([]*x509.Certificate, error) {
	now := time.Now()
	parent, err := u.parent(now)
	if err != nil {
		return nil, err
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("read request: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("read request: it is not signed by its key: %w", err)
	}
	template, err := parent.IntermediateTemplate(u.TrustDomain, ttl, now, rand.Reader)
	if err != nil {
		return nil, problem("upstream-invalid", u.Cert, err.Error(), "renew this authority")
	}
	chain, err := parent.SignIntermediate(template, request.PublicKey, now)
	if err != nil {
		return nil, problem("upstream-invalid", u.Cert, err.Error(), "use an authority that may have one of "+u.TrustDomain.IDString()+
			" below it: see its name constraints, path length and key usages")
	}
	return chain, nil
}

// Roots is an UpstreamAuthority's.
func (u UpstreamCA) Roots(context.Context) ([]*x509.Certificate, error) {
	if u.Bundle != "" {
		return u.roots(u.Bundle, true)
	}
	return u.roots(u.Cert, false)
}

// roots returns the roots of a file. With all, there is nothing else in it.
func (u UpstreamCA) roots(path string, all bool) ([]*x509.Certificate, error) {
	certs, err := readCertificates(path)
	if err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for i, c := range certs {
		err := checkRoot(c)
		if err == nil {
			roots = append(roots, c)
		} else if all {
			return nil, problem("upstream-bundle", path, fmt.Sprintf("certificate %d: %v", i+1, err), "put only roots into the bundle")
		}
	}
	if len(roots) == 0 {
		return nil, problem("upstream-incomplete", path, "there is no root", "append the root to the file, or name a file with it by --upstream-bundle")
	}
	return roots, nil
}

// parent reads the files and checks all that can be checked without signing anything.
func (u UpstreamCA) parent(now time.Time) (*identity.Parent, error) {
	certs, err := readCertificates(u.Cert)
	if err != nil {
		return nil, err
	}
	trusted, err := u.Roots(context.Background())
	if err != nil {
		return nil, err
	}
	key, err := readPrivateKey(u.Key)
	if err != nil {
		return nil, err
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range trusted {
		roots.AddCert(c)
	}
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	if now.Before(certs[0].NotBefore) || now.After(certs[0].NotAfter) {
		return nil, problem("upstream-expired", u.Cert, fmt.Sprintf("the authority is valid from %s to %s",
			certs[0].NotBefore.Format(time.RFC3339), certs[0].NotAfter.Format(time.RFC3339)), "renew it, or set this machine's clock")
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, problem("upstream-incomplete", u.Cert, fmt.Sprintf("the first certificate does not lead to a root: %v", err),
			"the authority's own certificate comes first, then those above it; the root may be in the file of --upstream-bundle")
	}
	parent, err := identity.NewParent(chains[0], key)
	if err != nil {
		return nil, problem("upstream-invalid", u.Cert, err.Error(), "use the certificate of an authority that may have others below it, and its key")
	}
	return parent, nil
}

// maxCertificates bounds a file of somebody else's certificates.
const maxCertificates = 16

func readCertificates(path string) ([]*x509.Certificate, error) {
	data, err := readGiven(path, 0, "name a file with certificates in PEM by --upstream-ca-cert or --upstream-bundle")
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != typeCert {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, problem("upstream-unreadable", path, fmt.Sprintf("certificate %d cannot be read: %v", len(certs)+1, err), "use PEM")
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 || len(certs) > maxCertificates {
		return nil, problem("upstream-unreadable", path, fmt.Sprintf("there are %d certificates, not 1 to %d", len(certs), maxCertificates), "use PEM")
	}
	return certs, nil
}

// readPrivateKey reads a key in one of the usual forms: PKCS #8, SEC 1 or PKCS #1. Its errors never contain what was read.
func readPrivateKey(path string) (crypto.Signer, error) {
	data, err := readGiven(path, 0o007, "name the file with the authority's key in PEM by --upstream-ca-key")
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		var key any
		var err error
		switch block.Type {
		case typeKey:
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			err = errors.New("encrypted")
		default:
			continue
		}
		if s, ok := key.(crypto.Signer); ok && err == nil {
			return s, nil
		}
		break
	}
	return nil, problem("upstream-unreadable", path, "there is no private key that can be read",
		"use PEM that is not encrypted: openssl pkcs8 -topk8 -nodes -in KEY")
}
