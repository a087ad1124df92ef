package identity

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// SelfSign makes a root authority from a template of CATemplate and its key.
func SelfSign(template *x509.Certificate, key crypto.Signer) (*Authority, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	return NewAuthority([]*x509.Certificate{cert}, key)
}

// Sign certifies that the holder of the public key's private key is who the template says. It returns the chain that
// the holder presents: the leaf first, then the authorities below the root. What was written is read again before it is
// returned, as one who verifies it will: a leaf of this trust domain that says what the template does and is valid as long
// as it lives. Signatures are not computed again, which would take most of the time: NewAuthority has looked at those
// above, and the leaf's is checked only if it does not come from a key in this process. Where authorities constrain
// names, all is verified.
func (a *Authority) Sign(t *Template, pub crypto.PublicKey, now time.Time) ([]*x509.Certificate, error) {
	der, err := a.write(t, pub)
	if err != nil {
		return nil, fmt.Errorf("sign SVID: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign SVID: %w", err)
	}
	chain := slices.Concat([]*x509.Certificate{leaf}, a.chain[:len(a.chain)-1])
	if err := a.conforms(leaf, now); err != nil {
		return nil, fmt.Errorf("sign SVID: %w", err)
	}
	if !t.isSaidBy(leaf, pub) {
		return nil, errors.New("sign SVID: it says something else than it should")
	}
	if a.constrained {
		if _, err := Verify(chain, a.Bundle(), now); err != nil {
			return nil, fmt.Errorf("sign SVID: %w", err)
		}
	}
	if from, to := validity(a.chain); leaf.NotBefore.Before(from) || leaf.NotAfter.After(to) {
		return nil, errors.New("sign SVID: it is valid when the authority is not")
	}
	return chain, nil
}

// SignIntermediate certifies that the holder of the public key's private key is an authority that stands below p. It
// returns the chain to make an Authority of: the new certificate first, the root last. Whatever the template says, the
// result is verified before it is returned, name constraints of those above it included (X509-SVID 4.2).
func (p *Parent) SignIntermediate(template *x509.Certificate, pub crypto.PublicKey, now time.Time) ([]*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, p.chain[0], pub, p.signer)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	chain := slices.Concat([]*x509.Certificate{cert}, p.chain)
	if err := checkIntermediate(chain, now); err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	return chain, nil
}

// checkIntermediate checks that what the first of a chain signs will be accepted now by whoever trusts the last.
func checkIntermediate(chain []*x509.Certificate, now time.Time) error {
	if now.IsZero() { // crypto/x509 would take its own clock
		return errors.New("no time given")
	}
	if _, err := trustDomainOf(chain[0]); err != nil {
		return err
	}
	if err := checkChain(chain, 0); err != nil {
		return err
	}
	if from, to := validity(chain[1:]); chain[0].NotBefore.Before(from) || chain[0].NotAfter.After(to) {
		return errors.New("it is valid when those above it are not")
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(chain[len(chain)-1])
	for _, c := range chain[1 : len(chain)-1] {
		between.AddCert(c)
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} { // an SVID is both
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now,
			KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
			return err
		}
	}
	return nil
}

// Verify returns the SPIFFE ID of an X.509-SVID that is valid now under one of the bundles (X509-SVID 5). Beyond
// what a verifier must check, it refuses leaves that do not say what they must: critical key usage with
// digitalSignature, and both extended key usages or none (4.3, 4.4).
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	if now.IsZero() { // crypto/x509 would take its own clock
		return spiffeid.ID{}, errors.New("verify SVID: no time given")
	}
	id, _, err := x509svid.Verify(chain, bundles, x509svid.WithTime(now))
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("verify SVID: %w", err)
	}
	if err := isLeaf(id, chain[0]); err != nil {
		return spiffeid.ID{}, fmt.Errorf("verify SVID: %w", err)
	}
	return id, nil
}

// isLeaf refuses what no leaf may say, or does not say what each must (X509-SVID 4.3, 4.4).
func isLeaf(id spiffeid.ID, leaf *x509.Certificate) error {
	switch {
	case id.Path() == "":
		return fmt.Errorf("%s is a trust domain, not a workload", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("key usage lacks digitalSignature")
	case !slices.ContainsFunc(leaf.Extensions, isCriticalKeyUsage):
		return errors.New("key usage is not critical")
	case len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 &&
		(!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) ||
			!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth)):
		return errors.New("extended key usage lacks serverAuth or clientAuth")
	}
	return nil
}

// isSaidBy reports whether a certificate says what it was written from: the time is another question.
func (t *Template) isSaidBy(leaf *x509.Certificate, pub crypto.PublicKey) bool {
	key, ok := pub.(publicKey)
	return ok && key.Equal(leaf.PublicKey) && leaf.URIs[0].String() == t.ID.String() && slices.Equal(leaf.DNSNames, t.DNSNames) &&
		leaf.NotBefore.Equal(t.NotBefore) && leaf.NotAfter.Equal(t.NotAfter) && leaf.SerialNumber.Cmp(t.SerialNumber) == 0
}

// conforms is Verify of what was just signed, but for the signatures.
func (a *Authority) conforms(leaf *x509.Certificate, now time.Time) error {
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return err
	}
	switch {
	case now.IsZero(): // as Verify
		return errors.New("no time given")
	case !id.MemberOf(a.td):
		return fmt.Errorf("%s is not in trust domain %s", id, a.td)
	case leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("it could sign others")
	case now.Before(leaf.NotBefore) || now.After(leaf.NotAfter):
		return errors.New("it is not valid now")
	case len(leaf.UnhandledCriticalExtensions) > 0:
		return errors.New("it has a critical extension that nobody knows")
	}
	if from, to := validity(a.chain); now.Before(from) || now.After(to) {
		return fmt.Errorf("the authority is valid from %s to %s", from.Format(time.RFC3339), to.Format(time.RFC3339))
	}
	return isLeaf(id, leaf)
}

// isCriticalKeyUsage recognises the key usage extension (RFC 5280 4.2.1.3) where it is marked critical.
func isCriticalKeyUsage(e pkix.Extension) bool {
	return e.Critical && e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 15})
}
