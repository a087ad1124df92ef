package segment

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		pattern Pattern
		yes, no string // names, apart by blanks; "." is the empty one
	}{
		{"", ".", "a *"},
		{"a", "a", ". aa A a* *"},
		{"*", ". a * a*", ""},
		{"a*", "a ab a* a/b", ". b ba A"},
		{"a/*", "a/ a/b", "a ab ."},
	} {
		for want, names := range map[bool]string{true: c.yes, false: c.no} {
			for _, name := range strings.Fields(names) {
				if name == "." {
					name = ""
				}
				if c.pattern.Matches(name) != want {
					t.Errorf("%q matches %q: %t", c.pattern, name, !want)
				}
			}
		}
	}
}

// One pattern covers another if and only if it matches all that the other one matches.
func TestCovers(t *testing.T) {
	text := rapid.StringOfN(rapid.SampledFrom([]rune("ab")), 0, 3, -1)
	pattern := rapid.Custom(func(t *rapid.T) Pattern {
		return Pattern(text.Draw(t, "stem") + rapid.SampledFrom([]string{"", "*"}).Draw(t, "star"))
	})
	var names []string // all of up to five letters
	for next := []string{""}; len(next[0]) <= 5; {
		names = append(names, next...)
		var longer []string
		for _, n := range next {
			longer = append(longer, n+"a", n+"b")
		}
		next = longer
	}
	rapid.Check(t, func(t *rapid.T) {
		p, q := pattern.Draw(t, "p"), pattern.Draw(t, "q")
		all := !slices.ContainsFunc(names, func(n string) bool { return q.Matches(n) && !p.Matches(n) })
		if p.Covers(q) != all {
			t.Fatalf("%q covers %q: %t", p, q, !all)
		}
		if p.IsPrefix() != strings.HasSuffix(string(p), "*") || !p.Covers(p) || p.Stem()+map[bool]string{true: "*"}[p.IsPrefix()] != string(p) {
			t.Fatalf("%q is made of %q", p, p.Stem())
		}
	})
}

func TestParseCaller(t *testing.T) {
	for _, c := range []struct{ text, domain, yes, no string }{
		{"spiffe://x.org/a", "x.org", "spiffe://x.org/a", "spiffe://x.org/a/b spiffe://x.org/A spiffe://x.org spiffe://x.or/a"},
		{"spiffe://x.org/a/*", "x.org", "spiffe://x.org/a/b spiffe://x.org/a/b/c", "spiffe://x.org/a spiffe://x.org/ab spiffe://y.org/a/b"},
		{"spiffe://x.org/*", "x.org", "spiffe://x.org/a spiffe://x.org/a/b", "spiffe://x.org spiffe://x.org.y/a spiffe://x.orgs/a"},
		{"spiffe://x.org", "x.org", "spiffe://x.org", "spiffe://x.org/a"},
	} {
		caller, err := ParseCaller(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if caller.String() != c.text || caller.TrustDomain().Name() != c.domain {
			t.Errorf("%s is %s of %s", c.text, caller, caller.TrustDomain())
		}
		for _, id := range strings.Fields(c.yes) {
			if !caller.Matches(id) {
				t.Errorf("%s does not match %s", caller, id)
			}
		}
		for _, id := range append(strings.Fields(c.no), "", "*") {
			if caller.Matches(id) {
				t.Errorf("%s matches %s", caller, id)
			}
		}
	}
	for _, bad := range []string{"", "*", "/*", "x.org/a", "spiffe://", "spiffe:///*", "spiffe://x.org/", "spiffe://x.org/a*", "spiffe://x.org/*/b",
		"spiffe://x.org/a/*/*", "spiffe://x.org/**", "spiffe://*/*", "spiffe://X.org/a", "spiffe://x.org/a//b", "spiffe://x.org/../a", "spiffe://x.org/a|b", "spiffe://x.org/a b"} {
		if caller, err := ParseCaller(bad); err == nil || caller != (Caller{}) {
			t.Errorf("%q is %q, %v", bad, caller, err)
		}
	}
}

func TestCaller(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("x.org")
	if c := CallersIn(td); c.String() != "spiffe://x.org/*" || c.TrustDomain() != td || c.Pattern().Stem() != "spiffe://x.org/" {
		t.Errorf("all of x.org are %s", c)
	}
	id := spiffeid.RequireFromPath(td, "/a")
	if c := CallerID(id); !c.Matches(id.String()) || c.Pattern().IsPrefix() || c.TrustDomain() != td {
		t.Errorf("%s is %s", id, c)
	}
	var nobody Caller
	for _, id := range []string{"", "*", "spiffe://x.org/a"} {
		if nobody.Matches(id) {
			t.Errorf("the zero caller matches %q", id)
		}
	}
	if !nobody.TrustDomain().IsZero() || nobody.String() != "" {
		t.Errorf("the zero caller is %q of %s", nobody, nobody.TrustDomain())
	}
}

func TestProblem(t *testing.T) {
	for want, p := range map[string]Problem{
		"is wrong":                     {Msg: "is wrong"},
		"f: is wrong":                  {Pos: Pos{File: "f"}, Msg: "is wrong"},
		"f:3: spec.to: is wrong":       {Pos: Pos{File: "f", Line: 3}, Field: "spec.to", Msg: "is wrong"},
		"f:3:4: no\n    hint: do this": {Code: "x", Pos: Pos{File: "f", Line: 3, Column: 4}, Msg: "no", Hint: "do this"},
	} {
		if got := p.String(); got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
	ps := Problems{
		{Pos: Pos{"b", 1, 1}, Msg: "6"}, {Pos: Pos{"a", 10, 1}, Msg: "5"}, {Pos: Pos{"a", 2, 2}, Msg: "4"},
		{Pos: Pos{"a", 2, 1}, Field: "y", Msg: "3"}, {Pos: Pos{"a", 2, 1}, Field: "x", Msg: "2"}, {Pos: Pos{"a", 2, 1}, Field: "x", Msg: "1"},
	}
	ps.Sort()
	var order []string
	for _, p := range ps {
		order = append(order, p.Msg)
	}
	if got := strings.Join(order, ""); got != "123456" {
		t.Errorf("sorted as %s", got)
	}
	if lines := strings.Split(ps.Error(), "\n"); len(lines) != 6 || lines[0] != "a:2:1: x: 1" {
		t.Errorf("%q", lines)
	}
}

func TestTokenCaller(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("x.org")
	for subject, want := range map[string]string{
		"alice":                         "alice",
		"alice@example.org":             "alice_40example.org",
		"system:serviceaccount:ns:name": "system_3Aserviceaccount_3Ans_3Aname",
		"a_b/c d%":                      "a_5Fb_2Fc_20d_25",
		".":                             "_2E",
		"..":                            "_2E_2E",
		"...":                           "...",
		"a..":                           "a..",
		"ä\n":                           "_C3_A4_0A",
		"*":                             "_2A",
		strings.Repeat("/", 255):        strings.Repeat("_2F", 255),
	} {
		id, err := TokenCaller(td, "corp", subject)
		if err != nil || id.String() != "spiffe://oidc.x.org/corp/"+want {
			t.Errorf("%q is %s, %v", subject, id, err)
		}
	}
	for _, subject := range []string{"", strings.Repeat("a", 256)} {
		if id, err := TokenCaller(td, "corp", subject); err == nil || !id.IsZero() {
			t.Errorf("%q is %s", subject, id)
		}
	}
	for _, id := range []string{"x.org/corp/a", "oidc.y.org/corp/a", "oidc.x.org/corp", "oidc.x.org/corp/a/b", "oidc.x.org/corp/_", "oidc.x.org/corp/_4",
		"oidc.x.org/corp/_zz", "oidc.x.org/corp/a_2fb", "oidc.x.org/corp/_61", "oidc.x.org", "oidc.x.org/corp/_2E"} {
		issuer, subject, ok := TokenSubject(td, spiffeid.RequireFromString("spiffe://"+id))
		if known := id == "oidc.x.org/corp/_2E"; ok != known || known && subject != "." || !known && issuer+IssuerName(subject) != "" {
			t.Errorf("%s is %q of %q", id, subject, issuer)
		}
	}
	if _, _, ok := TokenSubject(td, spiffeid.ID{}); ok {
		t.Error("nobody comes with a token")
	}
}

// Every subject is a caller that has a SPIFFE ID, and no other subject is the same.
func TestTokenCallerIsOneSubject(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("x.org")
	name := rapid.SampledFrom([]IssuerName{"a", "b", "a-b", "oidc"})
	text := rapid.OneOf(rapid.StringN(1, 60, MaxSubject), rapid.StringOfN(rapid.SampledFrom([]rune("a._%2E/5F")), 1, 8, -1),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 1, MaxSubject), func(b []byte) string { return string(b) }))
	rapid.Check(t, func(t *rapid.T) {
		issuer, subject := name.Draw(t, "issuer"), text.Draw(t, "subject")
		id, err := TokenCaller(td, issuer, subject)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := spiffeid.FromString(id.String()); err != nil || again != id || id.TrustDomain() != TokenDomain(td) || CallersIn(td).Matches(id.String()) {
			t.Fatalf("%s: %v", id, err)
		}
		if by, of, ok := TokenSubject(td, id); !ok || by != issuer || of != subject {
			t.Fatalf("%s is %q of %q", id, of, by)
		}
		otherIssuer, otherSubject := name.Draw(t, "other issuer"), text.Draw(t, "other subject")
		other, err := TokenCaller(td, otherIssuer, otherSubject)
		if err != nil || (other == id) != (issuer == otherIssuer && subject == otherSubject) {
			t.Fatalf("%q of %q and %q of %q are both %s", subject, issuer, otherSubject, otherIssuer, id)
		}
		if TokenCallers(td, otherIssuer).Matches(id.String()) != (issuer == otherIssuer) {
			t.Fatalf("%s is among all of %q", id, otherIssuer)
		}
	})
}

// someKeys are public keys of all types, and their private ones.
func someKeys(t testing.TB) (public, private []jose.JSONWebKey) {
	t.Helper()
	for i, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public = append(public, jose.JSONWebKey{Key: key.Public(), KeyID: fmt.Sprintf("ec-%d", i), Use: "sig"})
		private = append(private, jose.JSONWebKey{Key: key, KeyID: fmt.Sprintf("ec-%d", i), Use: "sig"})
	}
	ed, edPrivate, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public = append(public, jose.JSONWebKey{Key: ed, KeyID: "ed", Algorithm: "EdDSA", Use: "sig"}, jose.JSONWebKey{Key: rs.Public(), KeyID: "rsa", Algorithm: "PS256", Use: "sig"})
	private = append(private, jose.JSONWebKey{Key: edPrivate, KeyID: "ed"}, jose.JSONWebKey{Key: rs, KeyID: "rsa"})
	return public, private
}

func textOf(t testing.TB, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// rsaKey is an RSA key of a length, without the members' closing bracket.
func rsaKey(bits uint, e int64) string {
	n := new(big.Int).Lsh(big.NewInt(1), bits-1)
	n.SetBit(n, 0, 1)
	base := base64.RawURLEncoding
	return fmt.Sprintf(`{"kty": "RSA", "n": %q, "e": %q`, base.EncodeToString(n.Bytes()), base.EncodeToString(big.NewInt(e).Bytes()))
}

func TestParseKeys(t *testing.T) {
	public, private := someKeys(t)
	ec, other := textOf(t, public[0]), textOf(t, public[1])
	with := func(key, members string) string { return strings.TrimSuffix(key, "}") + ", " + members + "}" }
	set := func(keys ...string) string { return `{"keys": [` + strings.Join(keys, ", ") + `]}` }
	good := rsaKey(2048, 65537)
	for name, c := range map[string]struct{ text, want string }{ // kids, or the beginning of the error
		"all":               {textOf(t, jose.JSONWebKeySet{Keys: public}), "ec-0 ec-1 ec-2 ed rsa"},
		"other members":     {`{"kid": "no", "keys": [` + with(ec, `"x5c": ["no certificate"], "x5t": "?", "ext": true, "key_ops": ["verify"]`) + `]}`, "ec-0"},
		"written twice":     {`{"keys": 1, "keys": [` + with(ec, `"kid": "b"`) + `]}`, "b"},
		"for another use":   {set(with(ec, `"use": "enc"`), other), "ec-1"},
		"for signing":       {set(with(ec, `"key_ops": ["sign"]`), other), "ec-1"},
		"shared secret":     {set(`{"kty": "oct", "k": "c2VjcmV0", "kid": "ec-1"}`, other), "ec-1"},
		"unknown":           {set(`{"kty": "AKP", "pub": "AA", "priv": "AA"}`, `{"kty": "OKP", "crv": "X25519", "x": "AA"}`, `{}`, `1`, `null`, `[]`, other), "ec-1"},
		"other curve":       {set(`{"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"}`, other), "ec-1"},
		"not on the curve":  {set(`{"kty": "EC", "crv": "P-256", "x": "`+strings.Repeat("A", 43)+`", "y": "`+strings.Repeat("A", 43)+`"}`, other), "ec-1"},
		"short key":         {set(`{"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}`, other), "ec-1"},
		"half a key":        {set(`{"kty": "EC", "crv": "P-256", "x": "AA"}`, other), "ec-1"},
		"RSA":               {set(good+`, "kid": "a"}`, rsaKey(8192, 3)+`, "kid": "b"}`), "a b"},
		"weak RSA":          {set(rsaKey(2047, 65537)+`}`, rsaKey(2048, 1)+`}`, rsaKey(2048, 65536)+`}`, rsaKey(8193, 65537)+`}`, other), "ec-1"},
		"even RSA":          {set(`{"kty": "RSA", "e": "AQAB", "n": "`+base64.RawURLEncoding.EncodeToString(new(big.Int).Lsh(big.NewInt(1), 2047).Bytes())+`"}`, other), "ec-1"},
		"other algorithm":   {set(with(ec, `"alg": "ES384"`), good+`, "alg": "HS256"}`, good+`, "alg": "none"}`, good+`, "alg": "RSA-OAEP"}`, other), "ec-1"},
		"not text":          {set(with(ec, `"kid": 1`), with(ec, `"alg": {}`), with(ec, `"use": []`), with(ec, `"key_ops": "verify"`), other), "ec-1"},
		"no names":          {set(good+`}`, strings.Replace(ec, `"kid":"ec-0",`, "", 1)), " "},
		"one name, types":   {set(good+`, "kid": "ec-0"}`, ec), "ec-0 ec-0"},
		"one name, algs":    {set(good+`, "kid": "a", "alg": "RS256"}`, good+`, "kid": "a", "alg": "PS256"}`), "a a"},
		"one name":          {set(ec, with(other, `"kid": "ec-0"`), ec), `parse keys: key 2: there is another one with its kid "ec-0"`},
		"one name, any alg": {set(good+`, "kid": "a", "alg": "RS256"}`, good+`, "kid": "a"}`), `parse keys: key 1: there is another one with its kid "a"`},
		"private":           {set(other, textOf(t, private[0])), "parse keys: key 1: it is a private key"},
		"private Ed25519":   {set(other, textOf(t, private[3])), "parse keys: key 1: it is a private key"},
		"private RSA":       {set(other, with(textOf(t, private[4]), `"use": "enc"`)), "parse keys: key 1: it is a private key"},
		"a part of one":     {set(other, with(ec, `"d": ""`)), "parse keys: key 1: it is a private key"},
		"nothing left":      {set(`{"kty": "oct", "k": "AA"}`), `parse keys: there is no key in it that verifies tokens: key 0: its type is "oct"`},
		"no keys":           {set(), "parse keys: there is no key in it"},
		"null":              {`{"keys": null}`, "parse keys: there is no key in it"},
		"another letter":    {`{"Keys": [` + ec + `]}`, `parse keys: it is not a JWK set: "keys" is not a list`},
		"one key":           {ec, `parse keys: it is not a JWK set: "keys" is not a list`},
		"list":              {`[` + ec + `]`, "parse keys: it is not a JWK set: "},
		"not JSON":          {"-----BEGIN PUBLIC KEY-----", "parse keys: it is not a JWK set: "},
		"two texts":         {set(ec) + set(ec), "parse keys: it is not a JWK set: "},
		"empty":             {"", "parse keys: it is not a JWK set: "},
		"many":              {set(slices.Repeat([]string{ec}, 257)...), "parse keys: it has more than 256 keys"},
		"large":             {set(ec) + strings.Repeat(" ", MaxBundle), "parse keys: they are larger than 1 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := ParseKeys([]byte(c.text))
			if err != nil {
				if keys != nil || !strings.HasPrefix(err.Error(), c.want) || c.want == "" || len(err.Error()) > 300 {
					t.Errorf("%v, not %s", err, c.want)
				}
				return
			}
			var kids []string
			for _, key := range keys {
				kids = append(kids, key.KeyID)
			}
			if got := strings.Join(kids, " "); got != c.want {
				t.Errorf("%q, not %q", got, c.want)
			}
		})
	}
}

// checkKeys says what a set that is accepted must be: good for verifying and for nothing else, and its text all that
// there is to it.
func checkKeys(t interface{ Fatalf(string, ...any) }, document []byte) bool {
	keys, err := ParseKeys(document)
	if err != nil {
		return false
	}
	text := KeySet(keys)
	again, err := ParseKeys([]byte(text))
	if err != nil || len(keys) == 0 || KeySet(again) != text {
		t.Fatalf("%d keys of %q are %q: %v", len(keys), document, text, err)
	}
	for _, key := range again {
		if !key.IsPublic() || !key.Valid() || key.Use != "sig" || key.Certificates != nil || unusable(key) != nil {
			t.Fatalf("%+v is a key of %q", key, document)
		}
	}
	return true
}

// Nothing that is nearly a set of keys does harm.
func TestParseKeysOfMutations(t *testing.T) {
	public, private := someKeys(t)
	documents := []string{textOf(t, jose.JSONWebKeySet{Keys: public}), textOf(t, jose.JSONWebKeySet{Keys: private}), `{"keys": [` + rsaKey(2048, 3) + `, "use": "sig", "key_ops": ["verify"]}]}`}
	parts := []string{`"use"`, `"kty"`, `"d"`, `"sig"`, `"RSA"`, `"EC"`, `"oct"`, `"P-384"`, `null`, `{`, `}`, `[`, `,`, `"`, `:`, `0`, `A`, `_`, ``}
	accepted := 0
	rapid.Check(t, func(t *rapid.T) {
		document := []byte(rapid.SampledFrom(documents).Draw(t, "document"))
		for range rapid.IntRange(0, 4).Draw(t, "mutations") {
			at := rapid.IntRange(0, len(document)-1).Draw(t, "at")
			end := min(len(document), at+rapid.IntRange(0, 6).Draw(t, "length"))
			document = slices.Concat(document[:at], []byte(rapid.SampledFrom(parts).Draw(t, "part")), document[end:])
		}
		if checkKeys(t, document) {
			accepted++
		}
	})
	if accepted == 0 {
		t.Error("no case was accepted: the test shows nothing")
	}
}

func FuzzParseKeys(f *testing.F) {
	public, private := someKeys(f)
	f.Add([]byte(textOf(f, jose.JSONWebKeySet{Keys: public})))
	f.Add([]byte(textOf(f, jose.JSONWebKeySet{Keys: private})))
	f.Add([]byte(`{"keys": [` + rsaKey(2048, 3) + `, "alg": "RS512", "kid": "\u0000\ud800"}]}`))
	f.Fuzz(func(t *testing.T, document []byte) { checkKeys(t, document) })
}

func TestKeySet(t *testing.T) {
	public, private := someKeys(t)
	want := KeySet(public)
	for _, keys := range [][]jose.JSONWebKey{slices.Concat(public[2:], public[:3]), slices.Concat(private, public, []jose.JSONWebKey{{Key: []byte("secret"), KeyID: "oct"}, {}})} {
		if got := KeySet(keys); got != want {
			t.Errorf("%s, not %s", got, want)
		}
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(want), &set); err != nil || !slices.IsSortedFunc(set.Keys, func(a, b jose.JSONWebKey) int { return strings.Compare(a.KeyID, b.KeyID) }) || len(set.Keys) != len(public) {
		t.Errorf("%v of %s", err, want)
	}
	var members struct{ Keys []map[string]any }
	if err := json.Unmarshal([]byte(want), &members); err != nil || len(members.Keys[0]) != 6 || members.Keys[0]["use"] != "sig" {
		t.Errorf("%v: %v", members.Keys[0], err)
	}
	if got := KeySet(private) + KeySet(nil); got != "" {
		t.Errorf("private keys are %s", got)
	}
}

func TestJWTKeys(t *testing.T) {
	public, _ := someKeys(t)
	b := spiffebundle.New(spiffeid.RequireTrustDomainFromString("x.org"))
	if got := JWTKeys(b) + JWTKeys(nil); got != "" {
		t.Errorf("no keys are %s", got)
	}
	for _, key := range public {
		if err := b.AddJWTAuthority(key.KeyID, key.Key); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.AddJWTAuthority("short", &rsa.PublicKey{N: big.NewInt(7), E: 3}); err != nil {
		t.Fatal(err)
	}
	text := JWTKeys(b)
	keys, err := ParseKeys([]byte(text))
	var got []string
	for _, key := range keys {
		got = append(got, key.KeyID+" "+key.Algorithm)
	}
	if want := []string{"ec-0 ES256", "ec-1 ES384", "ec-2 ES512", "rsa "}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v of %s", got, err, text)
	}
	if !bytes.Equal([]byte(text), []byte(KeySet(keys))) {
		t.Errorf("%s, not %s", text, KeySet(keys))
	}
}
