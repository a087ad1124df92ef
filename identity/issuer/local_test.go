package issuer_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
)

// csr asks for everything: to be another workload and an authority, under another name.
func csr(t *testing.T, key *ecdsa.PrivateKey, names ...string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		URIs:     []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/admin"}},
		DNSNames: append(names, "admin.internal"),
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestLocalCertifiesNothingUntilSet(t *testing.T) {
	a := identitytest.Authorities(t, "example.org")
	key := issuer.HeldKey(newKey(t))
	for name, set := range map[string]*identity.Authorities{
		"never set": nil, "nothing": {}, "others": {X509: nil, JWT: nil, Bundle: a.Bundle},
	} {
		var l issuer.Local
		if set != nil {
			l.Set(*set)
		}
		if chain, err := l.CertifyX509(t.Context(), entry("app"), key); status.Code(err) != codes.Unavailable || chain != nil {
			t.Errorf("%s: certificate: %v", name, err)
		}
		if token, err := l.CertifyJWT(t.Context(), entry("app"), []string{"db"}); status.Code(err) != codes.Unavailable || token != "" {
			t.Errorf("%s: token: %v", name, err)
		}
	}
}

// Whoever waits for another authority is told of it, also if there was none.
func TestLocalSaysWhatSigns(t *testing.T) {
	var l issuer.Local
	for range 3 {
		_, changed := l.X509Authority()
		next := identitytest.Authorities(t, "example.org")
		l.Set(next)
		<-changed
		now, changed := l.X509Authority()
		if now != next.X509 {
			t.Errorf("another one signs: %v", now)
		}
		select {
		case <-changed:
			t.Error("changed before it did")
		default:
		}
	}
}

// Of a request it believes the key, and nothing else.
func TestLocalCertifiesX509(t *testing.T) {
	a := identitytest.Authorities(t, "example.org")
	var l issuer.Local
	l.Set(a)
	key := newKey(t)
	asked, err := issuer.RequestedKey(csr(t, key))
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]issuer.Key{"held": issuer.HeldKey(key), "requested": asked} {
		chain, err := l.CertifyX509(t.Context(), entry("app"), k)
		if err != nil {
			t.Fatal(err)
		}
		id, err := identity.Verify(chain, a.Bundle, time.Now())
		if err != nil || id != entry("app").ID || len(chain[0].DNSNames) > 0 || !key.PublicKey.Equal(chain[0].PublicKey) {
			t.Errorf("%s: certified %s %q, %v", name, id, chain[0].DNSNames, err)
		}
	}
	if chain, err := l.CertifyX509(t.Context(), entry("app"), issuer.Key{}); status.Code(err) != codes.InvalidArgument || chain != nil {
		t.Errorf("no key: %v", err)
	}
	foreign := entry("app")
	foreign.ID = spiffeid.RequireFromString("spiffe://other.org/app")
	if chain, err := l.CertifyX509(t.Context(), foreign, issuer.HeldKey(key)); status.Code(err) != codes.Unavailable || chain != nil {
		t.Errorf("of another trust domain: %v", err)
	}
}

func TestLocalCertifiesJWT(t *testing.T) {
	a := identitytest.Authorities(t, "example.org")
	var l issuer.Local
	l.Set(a)
	for ttl, want := range map[time.Duration]time.Duration{time.Hour: 5 * time.Minute, time.Minute: time.Minute} {
		e := entry("app")
		e.TTL = ttl
		token, err := l.CertifyJWT(t.Context(), e, []string{"db"})
		if err != nil {
			t.Fatal(err)
		}
		id, claims, err := identity.ValidateJWT(token, a.Bundle, []string{"db"}, time.Now())
		if err != nil || id != e.ID {
			t.Fatalf("valid for %s, %v", id, err)
		}
		life := time.Duration(claims["exp"].(float64)-claims["iat"].(float64)) * time.Second
		if life != want {
			t.Errorf("with certificates of %s, a token lives %s, not %s", ttl, life, want)
		}
	}
	for name, audience := range map[string][]string{"none": nil, "empty": {""}, "long": {strings.Repeat("a", 3000)}} {
		if token, err := l.CertifyJWT(t.Context(), entry("app"), audience); status.Code(err) != codes.InvalidArgument || token != "" {
			t.Errorf("audience %s: %v", name, err)
		}
	}

	next := a
	next.JWT = identitytest.JWTAuthority(t, "example.org", "second")
	l.Set(next)
	token, err := l.CertifyJWT(t.Context(), entry("app"), []string{"db"})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := identity.ValidateJWT(token, next.JWT.Bundle(), []string{"db"}, time.Now()); err != nil {
		t.Errorf("not signed with the key last set: %v", err)
	}
}
