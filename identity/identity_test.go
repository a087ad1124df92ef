package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/identity"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	start = time.Date(2026, 3, 1, 12, 0, 0, 500e6, time.UTC)
)

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

func newKey(t fataler) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return key
}

func newAuthority(t fataler, life time.Duration) *identity.Authority {
	t.Helper()
	return authorityOf(t, newKey(t), life)
}

func authorityOf(t fataler, key *ecdsa.PrivateKey, life time.Duration) *identity.Authority {
	t.Helper()
	template, err := identity.CATemplate(td, life, start, rand.Reader)
	if err != nil {
		t.Fatalf("%v", err)
	}
	a, err := identity.SelfSign(template, key)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return a
}

func issue(t fataler, a *identity.Authority, r identity.Request, now time.Time) []*x509.Certificate {
	t.Helper()
	template, err := a.SVIDTemplate(r, now, rand.Reader)
	if err != nil {
		t.Fatalf("%v", err)
	}
	chain, err := a.Sign(template, newKey(t).Public(), now)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return chain
}

// fields is what the specification speaks of, as text.
func fields(c *x509.Certificate) string {
	var b strings.Builder
	fmt.Fprintf(&b, "subject %q\n", c.Subject.Organization)
	fmt.Fprintf(&b, "uri %s\ndns %q\n", c.URIs, c.DNSNames)
	fmt.Fprintf(&b, "ca %t keyUsage %b extKeyUsage %d\n", c.IsCA, c.KeyUsage, c.ExtKeyUsage)
	fmt.Fprintf(&b, "from %s to %s\n", c.NotBefore.Format(time.DateTime), c.NotAfter.Format(time.DateTime))
	fmt.Fprintf(&b, "%s\n", c.SignatureAlgorithm)
	for _, e := range c.Extensions {
		if e.Critical {
			fmt.Fprintf(&b, "critical %s\n", e.Id)
		}
	}
	return b.String()
}

func TestFieldsOfAuthority(t *testing.T) {
	a := newAuthority(t, 10*365*24*time.Hour)
	want := `subject ["Sallyport"]
uri [spiffe://example.org]
dns []
ca true keyUsage 1100000 extKeyUsage []
from 2026-03-01 11:59:50 to 2036-02-27 12:00:00
ECDSA-SHA256
critical 2.5.29.15
critical 2.5.29.19
`
	if diff := cmp.Diff(want, fields(a.Certificate())); diff != "" {
		t.Error(diff)
	}
	if s := fmt.Sprintf("%v %+v", a, a); s != "authority of spiffe://example.org authority of spiffe://example.org" {
		t.Errorf("prints as %s", s)
	}
}

func TestFieldsOfSVID(t *testing.T) {
	a := newAuthority(t, 24*time.Hour)
	chain := issue(t, a, identity.Request{
		ID: spiffeid.RequireFromString("spiffe://example.org/gateway"), DNSNames: []string{"chat.internal", "*.db.internal"}, TTL: time.Hour,
	}, start.Add(time.Minute))
	want := `subject []
uri [spiffe://example.org/gateway]
dns ["chat.internal" "*.db.internal"]
ca false keyUsage 1 extKeyUsage [1 2]
from 2026-03-01 12:00:50 to 2026-03-01 13:01:00
ECDSA-SHA256
critical 2.5.29.15
critical 2.5.29.19
critical 2.5.29.17
`
	if diff := cmp.Diff(want, fields(chain[0])); diff != "" {
		t.Error(diff)
	}
	if len(chain) != 1 {
		t.Errorf("the chain has %d certificates: the root is not presented", len(chain))
	}
	if !bytes.Equal(chain[0].AuthorityKeyId, a.Certificate().SubjectKeyId) || len(chain[0].AuthorityKeyId) == 0 {
		t.Error("the authority's key identifier is missing")
	}
	if n := chain[0].SerialNumber.BitLen(); n < 64 || n > 159 {
		t.Errorf("serial number has %d bits", n)
	}
}

func TestSignedIsVerified(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		caLife := time.Duration(rapid.Int64Range(int64(10*time.Second), int64(20*365*24*time.Hour)).Draw(t, "authority's life"))
		a := newAuthority(t, caLife)
		now := start.Add(time.Duration(rapid.Int64Range(0, int64(caLife-4*time.Second)).Draw(t, "age of authority")))
		path := rapid.StringMatching(`(/[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}){1,4}`).Draw(t, "path")
		id, err := spiffeid.FromPath(td, path)
		if err != nil {
			t.Skip(err)
		}
		r := identity.Request{ID: id, TTL: time.Duration(rapid.Int64Range(int64(identity.MinTTL), int64(100*24*time.Hour)).Draw(t, "ttl"))}
		chain := issue(t, a, r, now)
		got, err := identity.Verify(chain, a.Bundle(), now)
		if err != nil || got != id {
			t.Fatalf("verified as %s, %v", got, err)
		}
		leaf, ca := chain[0], a.Certificate()
		if leaf.NotAfter.After(ca.NotAfter) || leaf.NotBefore.Before(ca.NotBefore) {
			t.Fatalf("valid %s..%s, the authority %s..%s", leaf.NotBefore, leaf.NotAfter, ca.NotBefore, ca.NotAfter)
		}
		if leaf.NotAfter.Sub(now) > r.TTL {
			t.Fatalf("lives %s, longer than %s", leaf.NotAfter.Sub(now), r.TTL)
		}
		at := identity.RenewAt(leaf)
		if !at.After(now) || !at.Before(leaf.NotAfter) {
			t.Fatalf("rotates at %s, made at %s, ends %s", at, now, leaf.NotAfter)
		}
		for _, when := range []time.Time{leaf.NotBefore.Add(-time.Second), leaf.NotAfter.Add(time.Second), {}} {
			if id, err := identity.Verify(chain, a.Bundle(), when); err == nil || !id.IsZero() {
				t.Fatalf("valid at %s: %s", when, id)
			}
		}
	})
}

func TestTemplateRefuses(t *testing.T) {
	a := newAuthority(t, time.Hour)
	id := spiffeid.RequireFromString("spiffe://example.org/app")
	cases := []struct {
		name string
		req  identity.Request
		now  time.Time
		want string
	}{
		{"another trust domain", identity.Request{ID: spiffeid.RequireFromString("spiffe://other.org/app"), TTL: time.Minute}, start, "not in trust domain"},
		{"no ID", identity.Request{TTL: time.Minute}, start, "not in trust domain"},
		{"no path", identity.Request{ID: td.ID(), TTL: time.Minute}, start, "not a workload"},
		{"no lifetime", identity.Request{ID: id}, start, "is below"},
		{"empty name", identity.Request{ID: id, TTL: time.Minute, DNSNames: []string{""}}, start, "empty DNS name"},
		{"before the authority", identity.Request{ID: id, TTL: time.Minute}, start.Add(-time.Minute), "begins only at"},
		{"after the authority", identity.Request{ID: id, TTL: time.Minute}, start.Add(time.Hour), "ends at"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := a.SVIDTemplate(c.req, c.now, rand.Reader); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	if _, err := a.SVIDTemplate(identity.Request{ID: id, TTL: time.Minute}, start, bytes.NewReader(nil)); err == nil {
		t.Error("made a serial number from nothing")
	}
}

// Whatever a template says, what is not an X.509-SVID of the trust domain is not handed out.
func TestSignRefuses(t *testing.T) {
	a := newAuthority(t, time.Hour)
	cases := map[string]func(*identity.Template){
		"no identity":              func(c *identity.Template) { c.ID = spiffeid.ID{} },
		"trust domain":             func(c *identity.Template) { c.ID = td.ID() },
		"another trust domain":     func(c *identity.Template) { c.ID = spiffeid.RequireFromString("spiffe://other.org/a") },
		"a name that is no DNS":    func(c *identity.Template) { c.DNSNames = []string{"bücher.internal"} },
		"outlives the authority":   func(c *identity.Template) { c.NotAfter = a.Certificate().NotAfter.Add(time.Second) },
		"is older than it":         func(c *identity.Template) { c.NotBefore = a.Certificate().NotBefore.Add(-time.Second) },
		"expired":                  func(c *identity.Template) { c.NotAfter = start.Add(-time.Second) },
		"not yet valid":            func(c *identity.Template) { c.NotBefore = start.Add(time.Second) },
		"no times":                 func(c *identity.Template) { c.NotBefore, c.NotAfter = time.Time{}, time.Time{} },
		"for ever":                 func(c *identity.Template) { c.NotAfter = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		"parts of a second":        func(c *identity.Template) { c.NotAfter = c.NotAfter.Add(-time.Millisecond) },
		"a negative serial number": func(c *identity.Template) { c.SerialNumber = big.NewInt(-1) },
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			template, err := a.SVIDTemplate(identity.Request{ID: app, TTL: time.Minute}, start, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			key := newKey(t).Public()
			if _, err := a.Sign(template, key, start); err != nil {
				t.Fatalf("unspoiled: %v", err)
			}
			spoil(template)
			if _, err := a.Sign(template, key, start); err == nil {
				t.Error("signed")
			}
		})
	}
	template, err := a.SVIDTemplate(identity.Request{ID: app, TTL: time.Minute}, start, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.PublicKey{nil, "a key", &ecdsa.PublicKey{}, ecdsa.PublicKey{}} {
		if _, err := a.Sign(template, key, start); err == nil {
			t.Errorf("signed for the key %v", key)
		}
	}
}

// faulty signs with another key than it says.
type faulty struct {
	crypto.Signer
	real *ecdsa.PrivateKey
}

func (f faulty) Public() crypto.PublicKey { return f.real.Public() }

// A signer that is not a key of this process is not believed.
func TestSignVerifiesOtherSigners(t *testing.T) {
	key := newKey(t)
	root := authorityOf(t, key, time.Hour).Certificate()
	for _, c := range []struct {
		signer crypto.Signer
		good   bool
	}{{key, true}, {faulty{key, key}, true}, {faulty{newKey(t), key}, false}} {
		a, err := identity.NewAuthority([]*x509.Certificate{root}, c.signer)
		if err != nil {
			t.Fatal(err)
		}
		template, err := a.SVIDTemplate(identity.Request{ID: app, TTL: time.Minute}, start, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Sign(template, newKey(t).Public(), start); (err == nil) != c.good {
			t.Errorf("%T: %v", c.signer, err)
		}
	}
}

// Whatever an authority signs, what is not an X.509-SVID is not accepted.
func TestVerifyRefuses(t *testing.T) {
	key := newKey(t)
	a := authorityOf(t, key, time.Hour)
	uri := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	cases := map[string]func(*x509.Certificate){
		"":                     func(*x509.Certificate) {},
		"an authority":         func(c *x509.Certificate) { c.IsCA = true },
		"certificate signing":  func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"no digital signature": func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment },
		"no key usage":         func(c *x509.Certificate) { c.KeyUsage = 0 },
		"key usage not critical": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 7, 128}}}
		},
		"server only":          func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] },
		"two identities":       func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"no identity":          func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"a"} },
		"trust domain":         func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org") },
		"another trust domain": func(c *x509.Certificate) { c.URIs = uri("spiffe://other.org/a") },
		"not SPIFFE":           func(c *x509.Certificate) { c.URIs = uri("https://example.org/a") },
		"expired":              func(c *x509.Certificate) { c.NotAfter = start.Add(-time.Second) },
		"a critical extension": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		},
	}
	for name, spoil := range cases {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: start.Add(-time.Minute), NotAfter: start.Add(time.Minute), URIs: uri(app.String()),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true,
		}
		spoil(template)
		der, err := x509.CreateCertificate(rand.Reader, template, a.Certificate(), newKey(t).Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		id, err := identity.Verify([]*x509.Certificate{leaf}, a.Bundle(), start)
		if good := name == ""; (err == nil) != good || (id == app) != good {
			t.Errorf("%s: accepted as %s, %v", name, id, err)
		}
	}
}

func TestVerifyRefusesForged(t *testing.T) {
	a, forger := newAuthority(t, time.Hour), newAuthority(t, time.Hour)
	chain := issue(t, forger, identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: time.Minute}, start)
	if id, err := identity.Verify(chain, a.Bundle(), start); err == nil || !id.IsZero() {
		t.Errorf("accepted as %s", id)
	}
}

func TestIntermediate(t *testing.T) {
	key, rootKey := newKey(t), newKey(t)
	root := authorityOf(t, rootKey, 24*time.Hour)
	parent, err := identity.NewParent([]*x509.Certificate{root.Certificate()}, rootKey)
	if err != nil {
		t.Fatal(err)
	}
	template, err := parent.IntermediateTemplate(td, time.Hour, start, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := parent.SignIntermediate(template, key.Public(), start)
	if err != nil {
		t.Fatal(err)
	}
	want := `subject ["Sallyport"]
uri [spiffe://example.org]
dns []
ca true keyUsage 1100000 extKeyUsage []
from 2026-03-01 11:59:50 to 2026-03-01 13:00:00
ECDSA-SHA256
critical 2.5.29.15
critical 2.5.29.19
`
	if diff := cmp.Diff(want, fields(certs[0])); diff != "" {
		t.Error(diff)
	}
	if certs[0].MaxPathLen != 0 || !certs[0].MaxPathLenZero {
		t.Error("it may have others below it")
	}
	a, err := identity.NewAuthority(certs, key)
	if err != nil {
		t.Fatal(err)
	}
	chain := issue(t, a, identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: 2 * time.Hour}, start)
	if len(chain) != 2 || chain[0].NotBefore.Before(certs[0].NotBefore) || chain[0].NotAfter.After(certs[0].NotAfter) {
		t.Errorf("chain of %d, %s to %s", len(chain), chain[0].NotBefore, chain[0].NotAfter)
	}
	if _, err := identity.Verify(chain, root.Bundle(), start); err != nil {
		t.Error(err)
	}
	if !a.Root().Equal(root.Certificate()) {
		t.Error("another root")
	}
	for _, when := range []time.Time{start.Add(-time.Minute), start.Add(2 * time.Hour), {}} {
		if a.Check(start) != nil || a.Check(when) == nil {
			t.Errorf("good at %s: %v, at %s: %v", start, a.Check(start), when, a.Check(when))
		}
	}
	if root.Check(start) != nil || root.Check(start.Add(25*time.Hour)) == nil {
		t.Error("a root that has ended is good")
	}
	if _, err := identity.NewParent(certs, key); err == nil || !strings.Contains(err.Error(), "pathLenConstraint") {
		t.Errorf("an authority of path length 0 as a parent: %v", err)
	}
	below, err := x509.CreateCertificate(rand.Reader, template, certs[0], key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(below)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.NewAuthority(append([]*x509.Certificate{cert}, certs...), key); err == nil {
		t.Error("an authority below one of path length 0: accepted")
	}
}

// Whatever a template says, what would not be accepted below its parent is not handed out.
func TestSignIntermediateRefuses(t *testing.T) {
	rootKey, key := newKey(t), newKey(t)
	root := authorityOf(t, rootKey, 24*time.Hour)
	parent, err := identity.NewParent([]*x509.Certificate{root.Certificate()}, rootKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*x509.Certificate){
		"a leaf":             func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false },
		"no signing":         func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature },
		"a workload":         func(c *x509.Certificate) { c.URIs[0].Path = "/app" },
		"no trust domain":    func(c *x509.Certificate) { c.URIs = nil },
		"outlives its root":  func(c *x509.Certificate) { c.NotAfter = root.Certificate().NotAfter.Add(time.Second) },
		"is older than it":   func(c *x509.Certificate) { c.NotBefore = root.Certificate().NotBefore.Add(-time.Second) },
		"has ended":          func(c *x509.Certificate) { c.NotAfter = start.Add(-time.Second) },
		"for clients only":   func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} },
		"not for its domain": func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} },
	} {
		template, err := parent.IntermediateTemplate(td, time.Hour, start, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		spoil(template)
		certs, err := parent.SignIntermediate(template, key.Public(), start)
		if err == nil && name == "not for its domain" { // it is the SVIDs below it that are not accepted then
			a, err := identity.NewAuthority(certs, key)
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := a.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: time.Minute}, start, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.Sign(leaf, newKey(t).Public(), start); err == nil {
				t.Errorf("%s: signs SVIDs", name)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	for _, when := range []time.Time{start.Add(-time.Hour), start.Add(24 * time.Hour)} {
		if _, err := parent.IntermediateTemplate(td, time.Hour, when, rand.Reader); err == nil {
			t.Errorf("made a template at %s", when)
		}
	}
	if _, err := parent.SignIntermediate(&x509.Certificate{}, key.Public(), time.Time{}); err == nil {
		t.Error("signed nothing at no time")
	}
	if s := fmt.Sprintf("%v %+v", parent, parent); strings.Contains(s, "signer") {
		t.Errorf("prints as %s", s)
	}
}

// renewAt is when what is made of a template is renewed.
func renewAt(c *identity.Template) time.Time {
	return identity.RenewAt(&x509.Certificate{SerialNumber: c.SerialNumber, NotBefore: c.NotBefore, NotAfter: c.NotAfter})
}

// Renewal is at half life, spread over a fifth of it, the same whenever one asks, and never past.
func TestRenewAt(t *testing.T) {
	a := newAuthority(t, 1000*time.Hour)
	early, late := 1.0, 0.0
	for range 200 {
		template, err := a.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: time.Hour}, start, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		at := renewAt(template)
		if at != renewAt(template) {
			t.Fatal("another time when asked again")
		}
		part := float64(at.Sub(template.NotBefore)) / float64(template.NotAfter.Sub(template.NotBefore))
		early, late = min(early, part), max(late, part)
	}
	if early < 0.4 || early > 0.43 || late > 0.6 || late < 0.57 {
		t.Errorf("between %f and %f of a life", early, late)
	}
	rapid.Check(t, func(t *rapid.T) {
		ttl := time.Duration(rapid.Int64Range(int64(identity.MinTTL), int64(time.Hour)).Draw(t, "ttl"))
		now := start.Add(time.Duration(rapid.Int64Range(0, int64(time.Second)).Draw(t, "age")))
		template, err := a.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: ttl}, now, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if at := renewAt(template); !at.After(now) || !at.Before(template.NotAfter) {
			t.Fatalf("renewed at %s, made at %s, ends %s", at, now, template.NotAfter)
		}
	})
	if at := identity.RenewAt(&x509.Certificate{}); !at.IsZero() {
		t.Errorf("of nothing: %s", at)
	}
}

func TestNewAuthorityRefuses(t *testing.T) {
	a := newAuthority(t, time.Hour)
	key := newKey(t)
	leafTemplate, err := a.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: time.Minute}, start, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.Sign(leafTemplate, key.Public(), start)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		key   *ecdsa.PrivateKey
	}{
		"no certificate":  {nil, key},
		"another's key":   {[]*x509.Certificate{a.Certificate()}, key},
		"a leaf":          {leaf, key},
		"a broken chain":  {[]*x509.Certificate{a.Certificate(), newAuthority(t, time.Hour).Certificate()}, key},
		"a leaf's issuer": {[]*x509.Certificate{leaf[0], a.Certificate()}, key},
	} {
		if _, err := identity.NewAuthority(c.chain, c.key); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := identity.CATemplate(spiffeid.TrustDomain{}, time.Hour, start, rand.Reader); err == nil {
		t.Error("no trust domain: accepted")
	}
}
