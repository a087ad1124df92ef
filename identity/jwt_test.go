package identity_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"pgregory.net/rapid"

	"sallyport.dev/identity"
)

var app = spiffeid.RequireFromString("spiffe://example.org/app")

func newJWTAuthority(t fataler, life time.Duration) *identity.JWTAuthority {
	t.Helper()
	return jwtAuthorityOf(t, newKey(t), start.Add(life))
}

func jwtAuthorityOf(t fataler, key crypto.Signer, notAfter time.Time) *identity.JWTAuthority {
	t.Helper()
	a, err := identity.NewJWTAuthority(td, "first", key, notAfter)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return a
}

func sign(t fataler, a *identity.JWTAuthority, r identity.JWTRequest, now time.Time) string {
	t.Helper()
	token, err := a.Sign(r, now)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return token
}

// part returns what a token says, in its header (0) or its claims (1).
func part(t *testing.T, token string, n int) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%d parts", len(parts))
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[n])
	if err != nil {
		t.Fatal(err)
	}
	var said map[string]any
	if err := json.Unmarshal(text, &said); err != nil {
		t.Fatal(err)
	}
	return said
}

func TestJWTIssuer(t *testing.T) {
	a := newJWTAuthority(t, time.Hour)
	for _, issuer := range []string{"", "https://identity.example.org/", "https://identity.example.org/a"} {
		r := identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute, Issuer: issuer}
		claims := part(t, sign(t, a, r, start), 1)
		if got, there := claims["iss"]; there != (issuer != "") || there && got != issuer {
			t.Errorf("issuer %q: %v", issuer, claims)
		}
	}
	r := identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute, Issuer: strings.Repeat("x", 20<<10)}
	if token, err := a.Sign(r, start); err == nil || token != "" {
		t.Error("signed what nobody accepts")
	}
}

func TestJWTAlgorithms(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for want, key := range map[string]crypto.Signer{"ES256": newKey(t), "ES384": p384, "RS256": rsaKey} {
		a := jwtAuthorityOf(t, key, start.Add(time.Hour))
		token := sign(t, a, identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute}, start)
		if got := part(t, token, 0)["alg"]; got != want {
			t.Errorf("%T signs with %s, want %s", key, got, want)
		}
		if id, _, err := identity.ValidateJWT(token, a.Bundle(), []string{"db"}, start); err != nil || id != app {
			t.Errorf("%s is valid for %s, %v", want, id, err)
		}
		bundle, err := identity.MarshalJWTBundle(a.Bundle())
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := jwtbundle.Parse(td, bundle)
		if err != nil || !parsed.Equal(a.Bundle()) {
			t.Errorf("%s: the bundle reads as %v, %v", want, parsed, err)
		}
		for _, form := range []string{"%v", "%+v", "%s"} {
			if s := fmt.Sprintf(form, a); s != "JWT authority first of spiffe://example.org" {
				t.Errorf("prints as %s", s)
			}
		}
	}
}

func TestNewJWTAuthorityRefuses(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	end := start.Add(time.Hour)
	for name, use := range map[string]func() (*identity.JWTAuthority, error){
		"no trust domain": func() (*identity.JWTAuthority, error) {
			return identity.NewJWTAuthority(spiffeid.TrustDomain{}, "a", key, end)
		},
		"no key ID": func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "", key, end) },
		"long key ID": func() (*identity.JWTAuthority, error) {
			return identity.NewJWTAuthority(td, strings.Repeat("a", 257), key, end)
		},
		"no text":   func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "\xff", key, end) },
		"no key":    func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "a", nil, end) },
		"no end":    func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "a", key, time.Time{}) },
		"Ed25519":   func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "a", ed, end) },
		"P-224":     func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "a", p224, end) },
		"short RSA": func() (*identity.JWTAuthority, error) { return identity.NewJWTAuthority(td, "a", short, end) },
	} {
		if a, err := use(); err == nil || a != nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSignedJWTIsValid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(int64(10*time.Second), int64(20*365*24*time.Hour)).Draw(t, "authority's life"))
		a := newJWTAuthority(t, life)
		now := start.Add(time.Duration(rapid.Int64Range(0, int64(life-4*time.Second)).Draw(t, "age")))
		id, err := spiffeid.FromPath(td, rapid.StringMatching(`(/[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}){1,4}`).Draw(t, "path"))
		if err != nil {
			t.Skip(err)
		}
		r := identity.JWTRequest{
			ID:       id,
			Audience: rapid.SliceOfN(rapid.StringN(1, 20, 60), 1, 16).Draw(t, "audience"),
			TTL:      time.Duration(rapid.Int64Range(int64(identity.MinTTL), int64(identity.MaxJWTLifetime)).Draw(t, "ttl")),
		}
		token := sign(t, a, r, now)
		for _, one := range r.Audience {
			got, claims, err := identity.ValidateJWT(token, a.Bundle(), []string{one}, now)
			if err != nil || got != id {
				t.Fatalf("for %q: %s, %v", one, got, err)
			}
			end := time.Unix(int64(claims["exp"].(float64)), 0)
			if end.After(now.Add(r.TTL)) || end.After(a.NotAfter()) || !end.After(now) {
				t.Fatalf("made at %s for %s, ends at %s, the authority at %s", now, r.TTL, end, a.NotAfter())
			}
			if _, _, err := identity.ValidateJWT(token, a.Bundle(), []string{one}, end); err == nil {
				t.Fatal("valid at its end")
			}
		}
		if _, _, err := identity.ValidateJWT(token, a.Bundle(), []string{strings.Join(r.Audience, "") + "x"}, now); err == nil {
			t.Fatal("valid for another audience")
		}
	})
}

func TestJWTSignRefuses(t *testing.T) {
	a := newJWTAuthority(t, time.Hour)
	good := identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute}
	many := strings.Split(strings.Repeat("a", 17), "")
	for _, c := range []struct {
		name   string
		change func(*identity.JWTRequest)
		now    time.Time
		want   string
	}{
		{"no ID", func(r *identity.JWTRequest) { r.ID = spiffeid.ID{} }, start, "not in trust domain"},
		{"trust domain", func(r *identity.JWTRequest) { r.ID = td.ID() }, start, "not a workload"},
		{"another trust domain", func(r *identity.JWTRequest) { r.ID = spiffeid.RequireFromString("spiffe://other.org/app") }, start, "not in trust domain"},
		{"no audience", func(r *identity.JWTRequest) { r.Audience = nil }, start, "no audience"},
		{"empty audience", func(r *identity.JWTRequest) { r.Audience = []string{"db", ""} }, start, "not a text"},
		{"no text", func(r *identity.JWTRequest) { r.Audience = []string{"\xff"} }, start, "not a text"},
		{"long audience", func(r *identity.JWTRequest) { r.Audience = []string{strings.Repeat("a", 2049)} }, start, "not a text"},
		{"many audiences", func(r *identity.JWTRequest) { r.Audience = many }, start, "17 audiences"},
		{"many long audiences", func(r *identity.JWTRequest) {
			r.Audience = []string{strings.Repeat("a", 2048), strings.Repeat("b", 2048), "c"}
		}, start, "4097 bytes"},
		{"no lifetime", func(r *identity.JWTRequest) { r.TTL = 0 }, start, "lifetime"},
		{"short lifetime", func(r *identity.JWTRequest) { r.TTL = identity.MinTTL - 1 }, start, "lifetime"},
		{"long lifetime", func(r *identity.JWTRequest) { r.TTL = identity.MaxJWTLifetime + 1 }, start, "lifetime"},
		{"after the authority", func(*identity.JWTRequest) {}, start.Add(time.Hour), "ends at"},
		{"just before its end", func(*identity.JWTRequest) {}, start.Add(time.Hour - time.Second), "ends at"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := good
			c.change(&r)
			if token, err := a.Sign(r, c.now); err == nil || token != "" || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %q, %v; want %q", token, err, c.want)
			}
		})
	}
	largest := identity.JWTRequest{ID: app, Audience: []string{strings.Repeat("\x00", 2048), strings.Repeat("\x00", 2048)}, TTL: time.Minute}
	if token, err := a.Sign(largest, start); err == nil || token != "" {
		t.Error("signed what would not be accepted")
	}
}

// liar signs with another key than it says.
type liar struct{ pub, key crypto.Signer }

func (l liar) Public() crypto.PublicKey { return l.pub.Public() }
func (l liar) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return l.key.Sign(r, digest, o)
}

type broken struct{ crypto.Signer }

func (broken) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("HSM is gone")
}

func TestJWTSignerFails(t *testing.T) {
	r := identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute}
	for want, signer := range map[string]crypto.Signer{"HSM is gone": broken{newKey(t)}, "signature": liar{newKey(t), newKey(t)}} {
		token, err := jwtAuthorityOf(t, signer, start.Add(time.Hour)).Sign(r, start)
		if err == nil || token != "" || !strings.Contains(err.Error(), want) {
			t.Errorf("got %q, %v; want %q", token, err, want)
		}
	}
}

// forge signs whatever header and claims are given, with ES256 whatever the header says.
func forge(t *testing.T, key *ecdsa.PrivateKey, header, claims string) string {
	t.Helper()
	text := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	digest := crypto.SHA256.New()
	digest.Write([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func TestValidateJWTRefuses(t *testing.T) {
	key := newKey(t)
	a := jwtAuthorityOf(t, key, start.Add(time.Hour))
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys := a.Bundle().JWTAuthorities()
	keys["rsa"] = rsaKey.Public()
	keys["secret"] = []byte("0123456789abcdef0123456789abcdef")
	keys["private"] = key
	bundle := jwtbundle.FromJWTAuthorities(td, keys)
	exp := start.Add(time.Minute).Unix()
	header := `{"alg":"ES256","kid":"first","typ":"JWT"}`
	claims := fmt.Sprintf(`{"sub":"spiffe://example.org/app","aud":["db"],"exp":%d}`, exp)
	with := func(more string) string { return strings.TrimSuffix(claims, "}") + more + "}" }
	for _, c := range []struct{ name, header, claims, want string }{
		{"", header, claims, ""},
		{"no type", `{"alg":"ES256","kid":"first"}`, claims, ""},
		{"JOSE", `{"alg":"ES256","kid":"first","typ":"JOSE"}`, claims, ""},
		{"one audience as a string", header, strings.Replace(claims, `["db"]`, `"db"`, 1), ""},
		{"further claims", header, with(`,"jti":"a","groups":[1]`), ""},
		{"a clock that is a little ahead", header, with(fmt.Sprintf(`,"iat":%d,"nbf":%[1]d`, start.Unix()+50)), ""},

		{"alg none", `{"alg":"none","kid":"first"}`, claims, "algorithm"},
		{"alg nOnE", `{"alg":"nOnE","kid":"first"}`, claims, "algorithm"},
		{"no alg", `{"kid":"first"}`, claims, "algorithm"},
		{"HS256", `{"alg":"HS256","kid":"secret"}`, claims, "algorithm"},
		{"EdDSA", `{"alg":"EdDSA","kid":"first"}`, claims, "algorithm"},
		{"an algorithm of another curve", `{"alg":"ES384","kid":"first"}`, claims, "does not sign with ES384"},
		{"an algorithm of another kind", `{"alg":"RS256","kid":"first"}`, claims, "does not sign with RS256"},
		{"a key of another kind", `{"alg":"ES256","kid":"rsa"}`, claims, "does not sign with ES256"},
		{"a shared secret", `{"alg":"ES256","kid":"secret"}`, claims, "does not sign with ES256"},
		{"a private key", `{"alg":"ES256","kid":"private"}`, claims, "does not sign with ES256"},
		{"another type", `{"alg":"ES256","kid":"first","typ":"at+jwt"}`, claims, "neither JWT nor JOSE"},
		{"lower case type", `{"alg":"ES256","kid":"first","typ":"jwt"}`, claims, "neither JWT nor JOSE"},
		{"type of nothing", `{"alg":"ES256","kid":"first","typ":null}`, claims, "neither JWT nor JOSE"},
		{"no key ID", `{"alg":"ES256"}`, claims, "does not name its key"},
		{"another key ID", `{"alg":"ES256","kid":"second"}`, claims, `no key "second"`},
		{"a long key ID", `{"alg":"ES256","kid":"` + strings.Repeat("a", 257) + `"}`, claims, "does not name its key"},
		{"a key in the header", `{"alg":"ES256","kid":"first","jwk":{"kty":"oct","k":"AA"}}`, claims, "more than alg"},
		{"a place of keys", `{"alg":"ES256","kid":"first","jku":"https://evil.example/"}`, claims, "more than alg"},
		{"certificates", `{"alg":"ES256","kid":"first","x5c":[]}`, claims, "more than alg"},
		{"critical extensions", `{"alg":"ES256","kid":"first","crit":["exp"]}`, claims, "more than alg"},
		{"cty", `{"alg":"ES256","kid":"first","cty":"JWT"}`, claims, "more than alg"},
		{"a name twice", `{"alg":"none","alg":"ES256","kid":"first"}`, claims, "cannot be read"},
		{"no header", ``, claims, "cannot be read"},
		{"a list as header", `[]`, claims, "cannot be read"},

		{"no subject", header, fmt.Sprintf(`{"aud":["db"],"exp":%d}`, exp), "no SPIFFE ID"},
		{"another subject", header, fmt.Sprintf(`{"sub":"app","aud":["db"],"exp":%d}`, exp), "no SPIFFE ID"},
		{"a trust domain", header, fmt.Sprintf(`{"sub":"spiffe://example.org","aud":["db"],"exp":%d}`, exp), "not a workload"},
		{"another trust domain", header, fmt.Sprintf(`{"sub":"spiffe://other.org/app","aud":["db"],"exp":%d}`, exp), "other.org is not trusted"},
		{"two subjects", header, with(`,"sub":"spiffe://example.org/db"`), "cannot be read"},
		{"no audience", header, fmt.Sprintf(`{"sub":"spiffe://example.org/app","exp":%d}`, exp), "not for audience"},
		{"empty audience", header, fmt.Sprintf(`{"sub":"spiffe://example.org/app","aud":[],"exp":%d}`, exp), "not for audience"},
		{"another audience", header, fmt.Sprintf(`{"sub":"spiffe://example.org/app","aud":["DB","d"],"exp":%d}`, exp), "not for audience"},
		{"numbers for an audience", header, fmt.Sprintf(`{"sub":"spiffe://example.org/app","aud":[1],"exp":%d}`, exp), "cannot be read"},
		{"no end", header, `{"sub":"spiffe://example.org/app","aud":["db"]}`, "when it expires"},
		{"end of nothing", header, `{"sub":"spiffe://example.org/app","aud":["db"],"exp":null}`, "when it expires"},
		{"end as text", header, `{"sub":"spiffe://example.org/app","aud":["db"],"exp":"1893456000"}`, "cannot be read"},
		{"end of time", header, `{"sub":"spiffe://example.org/app","aud":["db"],"exp":1e300}`, "cannot be read"},
		{"expired now", header, fmt.Sprintf(`{"sub":"spiffe://example.org/app","aud":["db"],"exp":%d}`, start.Unix()), "expired at"},
		{"expired in 1970", header, `{"sub":"spiffe://example.org/app","aud":["db"],"exp":0}`, "expired at"},
		{"not yet", header, with(fmt.Sprintf(`,"nbf":%d`, start.Unix()+70)), "valid only from"},
		{"issued later", header, with(fmt.Sprintf(`,"iat":%d`, start.Unix()+70)), "in the future"},
		{"no claims", header, ``, "cannot be read"},
		{"a list as claims", header, `[]`, "cannot be read"},
		{"nothing as claims", header, `null`, "no SPIFFE ID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, got, err := identity.ValidateJWT(forge(t, key, c.header, c.claims), bundle, []string{"db"}, start)
			if c.want == "" {
				if err != nil || id != app || got["sub"] != app.String() {
					t.Errorf("got %s, %v, %v", id, got, err)
				}
			} else if err == nil || !id.IsZero() || got != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %s, %v, %v; want %q", id, got, err, c.want)
			}
		})
	}
	good := forge(t, key, header, claims)
	parts := strings.Split(good, ".")
	for name, token := range map[string]string{
		"nothing":           "",
		"one part":          parts[0],
		"two parts":         parts[0] + "." + parts[1],
		"no signature":      parts[0] + "." + parts[1] + ".",
		"four parts":        good + ".",
		"five parts":        good + "..",
		"a line break":      good + "\n",
		"padding":           good + "==",
		"JSON":              fmt.Sprintf(`{"payload":%q,"protected":%q,"signature":%q}`, parts[1], parts[0], parts[2]),
		"another signature": forge(t, newKey(t), header, claims),
		"another's":         parts[0] + "." + parts[1] + "." + strings.Split(forge(t, key, header, with(`,"a":1`)), ".")[2],
		"too large":         forge(t, key, header, with(`,"a":"`+strings.Repeat("a", 16<<10)+`"`)),
		"deep":              forge(t, key, header, with(`,"a":`+strings.Repeat("[", 11000))),
	} {
		if id, got, err := identity.ValidateJWT(token, bundle, []string{"db"}, start); err == nil || !id.IsZero() || got != nil {
			t.Errorf("%s: %s, %v", name, id, got)
		}
	}
	for name, audience := range map[string][]string{"none": nil, "empty": {""}, "other": {"DB"}} {
		if _, _, err := identity.ValidateJWT(good, bundle, audience, start); err == nil {
			t.Errorf("valid for audience %s", name)
		}
	}
	if _, _, err := identity.ValidateJWT(good, bundle, []string{"db"}, time.Time{}); err == nil {
		t.Error("valid at no time")
	}
	if _, _, err := identity.ValidateJWT(forge(t, key, header, strings.Replace(claims, `["db"]`, `[""]`, 1)), bundle, []string{""}, start); err == nil {
		t.Error("valid for an empty audience")
	}
}

func TestMarshalJWTBundle(t *testing.T) {
	key := newKey(t)
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	useless := map[string]crypto.PublicKey{"private": key, "secret": []byte("secret"), "short": short.Public(), "ed": ed, "nothing": nil}
	got, err := identity.MarshalJWTBundle(jwtbundle.FromJWTAuthorities(td, useless))
	if err != nil || string(got) != `{"keys":[]}` {
		t.Errorf("got %s, %v", got, err)
	}
	useful := maps.Clone(useless)
	for _, id := range []string{"c", "a", "b"} {
		useful[id] = newKey(t).Public()
	}
	bundle := jwtbundle.FromJWTAuthorities(td, useful)
	first, err := identity.MarshalJWTBundle(bundle)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if again, err := identity.MarshalJWTBundle(bundle); err != nil || string(again) != string(first) {
			t.Fatalf("got %s, then %s, %v", first, again, err)
		}
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(first, &set); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, k := range set.Keys {
		ids = append(ids, k.KeyID)
	}
	if diff := cmp.Diff([]string{"a", "b", "c"}, ids); diff != "" {
		t.Error(diff)
	}
}

// go-spiffe, which knows no time but the present, thinks the same of our tokens.
func TestOthersReadOurJWT(t *testing.T) {
	now := time.Now()
	a := jwtAuthorityOf(t, newKey(t), now.Add(time.Hour))
	token := sign(t, a, identity.JWTRequest{ID: app, Audience: []string{"db", "cache"}, TTL: time.Minute}, now)
	got, err := jwtsvid.ParseAndValidate(token, a.Bundle(), []string{"cache"})
	if err != nil || got.ID != app || !cmp.Equal(got.Audience, []string{"db", "cache"}) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := jwtsvid.ParseAndValidate(token, newJWTAuthority(t, time.Hour).Bundle(), []string{"cache"}); err == nil {
		t.Error("valid with another key")
	}
}

// Whatever is accepted is a JWT-SVID for go-jose too, of the one key, and is not expired.
func FuzzValidateJWT(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	a, err := identity.NewJWTAuthority(td, "first", key, start.Add(time.Hour))
	if err != nil {
		f.Fatal(err)
	}
	token, err := a.Sign(identity.JWTRequest{ID: app, Audience: []string{"db"}, TTL: time.Minute}, start)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("...")
	f.Fuzz(func(t *testing.T, token string) {
		id, claims, err := identity.ValidateJWT(token, a.Bundle(), []string{"db"}, start)
		if err != nil {
			if !id.IsZero() || claims != nil {
				t.Fatalf("%v, but %s, %v", err, id, claims)
			}
			return
		}
		parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		var said jwt.Claims
		if err := parsed.Claims(key.Public(), &said); err != nil || said.Subject != id.String() || !start.Before(said.Expiry.Time()) {
			t.Fatalf("%+v, %v", said, err)
		}
	})
}
