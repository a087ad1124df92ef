package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/identity"
)

// What is written is, to the byte, what crypto/x509 would have written, and the signature is one that it accepts.
func TestWrittenAsByX509(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys := []crypto.PublicKey{newKey(t).Public(), rsaKey.Public(), p384.Public(), edKey}
	rapid.Check(t, func(t *rapid.T) {
		caKey := newKey(t)
		a := authorityOf(t, caKey, 40*365*24*time.Hour) // beyond 2049, where times are written in another way
		id, err := spiffeid.FromPath(td, "/"+rapid.StringMatching(`[a-zA-Z0-9_-]{1,1000}`).Draw(t, "path"))
		if err != nil {
			t.Fatal(err)
		}
		names := rapid.SliceOfN(rapid.StringMatching(`(\*\.)?[a-z]{1,63}(\.[a-z]{1,63}){0,3}`), 0, 4).Draw(t, "names")
		now := start.Add(time.Duration(rapid.Int64Range(0, int64(39*365*24*time.Hour)).Draw(t, "age of authority")))
		r := identity.Request{ID: id, DNSNames: names, TTL: time.Duration(rapid.Int64Range(int64(identity.MinTTL), int64(100*24*time.Hour)).Draw(t, "ttl"))}
		template, err := a.SVIDTemplate(r, now, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if rapid.Bool().Draw(t, "a high bit") { // a serial number whose first byte would make it negative
			template.SerialNumber.SetBit(template.SerialNumber, 127, 1).SetBit(template.SerialNumber, 128, 0)
		}
		pub := rapid.SampledFrom(keys).Draw(t, "key")
		chain, err := a.Sign(template, pub, now)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: template.SerialNumber, NotBefore: template.NotBefore, NotAfter: template.NotAfter,
			URIs: []*url.URL{id.URL()}, DNSNames: names, BasicConstraintsValid: true,
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, a.Certificate(), pub, caKey)
		if err != nil {
			t.Fatal(err)
		}
		want, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(chain[0].RawTBSCertificate, want.RawTBSCertificate) {
			t.Fatalf("written\n%x, by crypto/x509\n%x", chain[0].RawTBSCertificate, want.RawTBSCertificate)
		}
		if err := chain[0].CheckSignatureFrom(a.Certificate()); err != nil || chain[0].SignatureAlgorithm != want.SignatureAlgorithm {
			t.Fatalf("signed by %s: %v", chain[0].SignatureAlgorithm, err)
		}
	})
}

// Lengths are written in another way from 128 and from 256 on. Sign reads what it has written.
func TestLengths(t *testing.T) {
	a := newAuthority(t, time.Hour)
	for n := 1; n < 600; n++ {
		issue(t, a, identity.Request{ID: spiffeid.RequireFromPath(td, "/"+strings.Repeat("a", n)), TTL: time.Minute}, start)
	}
}

// OpenSSL writes what it has read as it was, if that was DER.
func TestOpenSSLReadsIt(t *testing.T) {
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("no openssl")
	}
	a := newAuthority(t, time.Hour)
	leaf := issue(t, a, identity.Request{ID: app, DNSNames: []string{"app.internal"}, TTL: time.Minute}, start)[0]
	command := exec.CommandContext(t.Context(), path, "x509", "-outform", "DER")
	command.Stdin = strings.NewReader(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})))
	if out, err := command.Output(); err != nil || !bytes.Equal(out, leaf.Raw) {
		t.Errorf("%v\n%x became\n%x", err, leaf.Raw, out)
	}
}

func TestNewAuthorityRefusesOtherKeys(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template, err := identity.CATemplate(td, time.Hour, start, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.SelfSign(template, p384); err == nil || !strings.Contains(err.Error(), "not of ECDSA P-256") {
		t.Errorf("a key of P-384: %v", err)
	}
}
