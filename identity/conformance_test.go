package identity_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"sallyport.dev/identity"
)

// TestConformance goes through what SPIFFE's specifications say of documents, field by field. A row is named by the
// section that asks for it.
func TestConformance(t *testing.T) {
	a := newAuthority(t, 24*time.Hour)
	r := identity.Request{ID: app, DNSNames: []string{"app.internal"}, TTL: time.Hour}
	leaf, other, ca := issue(t, a, r, start)[0], issue(t, a, r, start)[0], a.Certificate()
	j := newJWTAuthority(t, 24*time.Hour)
	token := sign(t, j, identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute}, start)
	header, claims := part(t, token, 0), part(t, token, 1)

	full := spiffebundle.FromX509Bundle(a.Bundle())
	full.SetJWTAuthorities(j.Bundle().JWTAuthorities())
	full.SetSequenceNumber(7)
	full.SetRefreshHint(5 * time.Minute)
	document := decode(t, full.Marshal)
	x509Key, jwtKey := keyOf(t, document, "x509-svid"), keyOf(t, document, "jwt-svid")
	set := decode(t, func() ([]byte, error) { return identity.MarshalJWTBundle(j.Bundle()) })
	setKey := keyOf(t, set, nil)

	for _, row := range []struct {
		section   string
		got, want any
	}{
		{"X509-SVID 2: exactly one URI name, which is the SPIFFE ID", uris(leaf), []string{"spiffe://example.org/app"}},
		{"X509-SVID 2: beside it DNS names only (RFC 5280 4.2.1.6: 2 is dNSName, 6 a URI)", sans(t, leaf), []int{2, 6}},
		{"X509-SVID 2: exactly one URI name of the authority", uris(ca), []string{"spiffe://example.org"}},
		{"X509-SVID 2: no other name of the authority", sans(t, ca), []int{6}},
		{"X509-SVID 3.1: a leaf has a path", leaf.URIs[0].Path, "/app"},
		{"X509-SVID 3.1: names are critical without a subject", []bool{leaf.Subject.String() == "", critical(leaf, 17)}, []bool{true, true}},
		{"X509-SVID 3.2: an authority has no path", ca.URIs[0].Path, ""},
		{"X509-SVID 3.2: it is in the trust domain of those it certifies", ca.URIs[0].Host, leaf.URIs[0].Host},
		{"X509-SVID 4.1: a leaf's cA is false", []bool{leaf.BasicConstraintsValid, leaf.IsCA}, []bool{true, false}},
		{"X509-SVID 4.1: an authority's cA is true", []bool{ca.BasicConstraintsValid, ca.IsCA}, []bool{true, true}},
		{"RFC 5280 4.2.1.9: it is critical", critical(ca, 19), true},
		{"X509-SVID 4.2: no name constraints that libraries refuse", append(ids(leaf, 30), ids(ca, 30)...), []string(nil)},
		{"X509-SVID 4.3: a leaf's key usage is critical", critical(leaf, 15), true},
		{"X509-SVID 4.3: it is digitalSignature, not keyCertSign, not cRLSign", leaf.KeyUsage, x509.KeyUsageDigitalSignature},
		{"X509-SVID 4.3: an authority's is critical", critical(ca, 15), true},
		{"X509-SVID 4.3: it is keyCertSign and cRLSign", ca.KeyUsage, x509.KeyUsageCertSign | x509.KeyUsageCRLSign},
		{"X509-SVID 4.4: a leaf's extended usage is serverAuth and clientAuth", leaf.ExtKeyUsage,
			[]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}},
		{"X509-SVID 4.4: and nothing else", leaf.UnknownExtKeyUsage, []asn1.ObjectIdentifier(nil)},
		{"X509-SVID 4.4: an authority restricts nobody", ids(ca, 37), []string(nil)},
		{"X509-SVID 6.1: the authority is signed by itself", ca.CheckSignatureFrom(ca), error(nil)},
		{"RFC 5280 4.1.2.1: version 3", []int{leaf.Version, ca.Version}, []int{3, 3}},
		{"RFC 5280 4.1.2.2: serial numbers are positive", []int{leaf.SerialNumber.Sign(), ca.SerialNumber.Sign()}, []int{1, 1}},
		{"RFC 5280 4.1.2.2: and of 20 octets at most", leaf.SerialNumber.BitLen() < 160 && ca.SerialNumber.BitLen() < 160, true},
		{"RFC 5280 4.1.2.2: and unlike each other", leaf.SerialNumber.Cmp(other.SerialNumber) != 0, true},
		{"CA/B 7.1: and of 64 random bits at least", leaf.SerialNumber.BitLen() > 64, true},
		{"RFC 5280 4.1.2.4: the issuer is the authority's subject", bytes.Equal(leaf.RawIssuer, ca.RawSubject) && len(ca.Subject.Names) > 0, true},
		{"RFC 5280 4.1.2.5: a leaf does not outlive its authority", !leaf.NotAfter.After(ca.NotAfter) && !leaf.NotBefore.Before(ca.NotBefore), true},
		{"RFC 5280 4.2.1.1: it names its authority's key", len(ca.SubjectKeyId) > 0 && bytes.Equal(leaf.AuthorityKeyId, ca.SubjectKeyId), true},

		{"JWT-SVID 2: the header has nothing but alg, kid and typ", names(header), "alg kid typ"},
		{"JWT-SVID 2.1: alg is one of the table", header["alg"], "ES256"},
		{"JWT-SVID 2.2: kid is of a key in the bundle", j.Bundle().HasJWTAuthority(header["kid"].(string)), true},
		{"JWT-SVID 2.3: typ is JWT", header["typ"], "JWT"},
		{"JWT-SVID 3: there are no claims but these", names(claims), "aud exp iat sub"},
		{"JWT-SVID 3.1: sub is the SPIFFE ID", claims["sub"], "spiffe://example.org/app"},
		{"JWT-SVID 3.2: aud is the audience", claims["aud"], []any{"db"}},
		{"JWT-SVID 3.3: exp is set, in whole seconds", claims["exp"], float64(start.Add(time.Minute).Unix())},
		{"RFC 7519 4.1.6: iat is when it was made", claims["iat"], float64(start.Unix())},
		{"JWT-SVID 4: the signature is that of RFC 7518 3.4", verifies(t, token, j), true},
		{"JWT-SVID 5.1: compact serialization, without padding", strings.Count(token, ".") == 2 && !strings.ContainsAny(token, "=+/{ \n"), true},

		{"Bundle 4.1: the set has these parameters", names(document), "keys spiffe_refresh_hint spiffe_sequence"},
		{"Bundle 4.1.1: spiffe_sequence", document["spiffe_sequence"], float64(7)},
		{"Bundle 4.1.2: spiffe_refresh_hint, in seconds", document["spiffe_refresh_hint"], float64(300)},
		{"Bundle 4.1.3: keys is a list", len(document["keys"].([]any)), 2},
		{"Bundle 4.2, X509-SVID 6.1: an authority's parameters, without kid", names(x509Key), "crv kty use x x5c y"},
		{"Bundle 4.2.1: kty is set", []any{x509Key["kty"], jwtKey["kty"]}, []any{"EC", "EC"}},
		{"RFC 7518 6.2.1.1: crv is set", []any{x509Key["crv"], jwtKey["crv"]}, []any{"P-256", "P-256"}},
		{"X509-SVID 6.1: x5c is the authority's certificate, and no other", x509Key["x5c"], []any{base64.StdEncoding.EncodeToString(ca.Raw)}},
		{"Bundle 4.2, JWT-SVID 6.1: a JWT key's parameters, with kid", names(jwtKey), "crv kid kty use x y"},
		{"JWT-SVID 6.1: kid is what tokens say", jwtKey["kid"], header["kid"]},

		{"Workload API 6.2.2: a JWT bundle is a plain JWK Set", names(set), "keys"},
		{"Workload API 6.2.2: of keys for JWT-SVIDs only", len(set["keys"].([]any)), 1},
		{"RFC 7517 4: the key's parameters, none of them private", names(setKey), "crv kid kty x y"},
		{"RFC 7517 4.1: kty", setKey["kty"], "EC"},
		{"RFC 7518 6.2.1.1: crv", setKey["crv"], "P-256"},
		{"RFC 7517 4.5: kid is what tokens say", setKey["kid"], header["kid"]},
		{"RFC 7518 6.2.1.2: x and y are the key's", point(t, setKey), j.PublicKey().(*ecdsa.PublicKey)},
	} {
		if diff := cmp.Diff(row.want, row.got); diff != "" {
			t.Errorf("%s:\n%s", row.section, diff)
		}
	}
}

func uris(c *x509.Certificate) []string {
	var s []string
	for _, u := range c.URIs {
		s = append(s, u.String())
	}
	return s
}

// extension is one of those that RFC 5280 4.2.1 numbers.
func extension(c *x509.Certificate, number int) (pkix.Extension, bool) {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, number}) })
	if i < 0 {
		return pkix.Extension{}, false
	}
	return c.Extensions[i], true
}

func critical(c *x509.Certificate, number int) bool {
	e, ok := extension(c, number)
	return ok && e.Critical
}

func ids(c *x509.Certificate, number int) []string {
	if e, ok := extension(c, number); ok {
		return []string{e.Id.String()}
	}
	return nil
}

// sans are the kinds of alternative names, whatever the library makes of them.
func sans(t *testing.T, c *x509.Certificate) []int {
	t.Helper()
	e, _ := extension(c, 17)
	var general []asn1.RawValue
	if rest, err := asn1.Unmarshal(e.Value, &general); err != nil || len(rest) > 0 {
		t.Fatalf("alternative names: %v", err)
	}
	var kinds []int
	for _, name := range general {
		kinds = append(kinds, name.Tag)
	}
	return kinds
}

func decode(t *testing.T, marshal func() ([]byte, error)) map[string]any {
	t.Helper()
	text, err := marshal()
	if err != nil {
		t.Fatal(err)
	}
	var said map[string]any
	if err := json.Unmarshal(text, &said); err != nil {
		t.Fatal(err)
	}
	return said
}

func names(m map[string]any) string { return strings.Join(slices.Sorted(maps.Keys(m)), " ") }

// keyOf returns the one key of a set that has a use.
func keyOf(t *testing.T, set map[string]any, use any) map[string]any {
	t.Helper()
	var found map[string]any
	for _, k := range set["keys"].([]any) {
		if key := k.(map[string]any); key["use"] == use {
			if found != nil {
				t.Fatalf("two keys are for %v", use)
			}
			found = key
		}
	}
	return found
}

func point(t *testing.T, key map[string]any) *ecdsa.PublicKey {
	t.Helper()
	encoded := []byte{4}
	for _, name := range []string{"x", "y"} {
		b, err := base64.RawURLEncoding.DecodeString(fmt.Sprint(key[name]))
		if err != nil || len(b) != 32 {
			t.Fatalf("%s has %d bytes, %v", name, len(b), err)
		}
		encoded = append(encoded, b...)
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(newKey(t).Curve, encoded)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// verifies checks an ES256 signature with nothing but the standard library.
func verifies(t *testing.T, token string, a *identity.JWTAuthority) bool {
	t.Helper()
	i := strings.LastIndexByte(token, '.')
	signature, err := base64.RawURLEncoding.DecodeString(token[i+1:])
	if err != nil || len(signature) != 64 {
		t.Fatalf("signature of %d bytes, %v", len(signature), err)
	}
	digest := sha256.Sum256([]byte(token[:i]))
	return ecdsa.Verify(a.PublicKey().(*ecdsa.PublicKey), digest[:],
		new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
}
