package real

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"sallyport.dev/telemetry"
)

// login is an OpenID provider, as far as those who verify its tokens see one.
type login struct {
	server *httptest.Server
	mu     sync.Mutex
	keys   []jose.JSONWebKey // private; the last signs
}

func newLogin(t *testing.T) *login {
	t.Helper()
	l := &login{}
	l.rotate(t)
	l.server = httptest.NewTLSServer(l)
	t.Cleanup(l.server.Close)
	return l
}

// rotate signs with another key from now on, of the type that the last was not of.
func (l *login) rotate(t *testing.T) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	key := jose.JSONWebKey{KeyID: fmt.Sprint("k", len(l.keys)), Use: "sig", Algorithm: "ES256"}
	var err error
	if key.Key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); len(l.keys)%2 == 0 {
		key.Algorithm = "RS256"
		key.Key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.keys = append(l.keys, key)
}

func (l *login) key() jose.JSONWebKey {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.keys[len(l.keys)-1]
}

func (l *login) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		_ = json.NewEncoder(w).Encode(map[string]string{"issuer": l.server.URL, "jwks_uri": l.server.URL + "/keys"})
	case "/keys":
		key := l.key()
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{key.Public()}})
	default:
		http.NotFound(w, r)
	}
}

// document makes the provider known as "corp".
func (l *login) document(t *testing.T, folder, more string) string {
	t.Helper()
	ca := filepath.Join(folder, "login.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: l.server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: corp}
spec: {issuer: '%s', caFile: '%s'%s}
`, l.server.URL, ca, more)
}

// claims are those of a good token, changed.
type claims map[string]any

func (l *login) claims(subject string, change claims) claims {
	now := time.Now().Unix()
	c := claims{"iss": l.server.URL, "sub": subject, "aud": hostOf("chat"), "iat": now, "exp": now + 600}
	for name, v := range change {
		if c[name] = v; v == nil {
			delete(c, name)
		}
	}
	return c
}

func signed(t *testing.T, key jose.JSONWebKey, c claims) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(key.Algorithm), Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	object, err := signer.Sign(text)
	if err != nil {
		t.Fatal(err)
	}
	token, err := object.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func (l *login) token(t *testing.T, subject string) string {
	t.Helper()
	return signed(t, l.key(), l.claims(subject, nil))
}

// bearing asks a model with a token.
func (c *caller) bearing(t testing.TB, token, model string) answer {
	t.Helper()
	header := http.Header{"Content-Type": {"application/json"}}
	if token != "" {
		header.Set("Authorization", "Bearer "+token)
	}
	return c.send(t, request{host: hostOf("chat"), path: chatPath, header: header, body: strings.NewReader(fmt.Sprintf(`{"model":%q}`, model))})
}

func tokenDocuments(b *backend) string {
	return strings.Replace(openAI("chat", b), "  protocol:", "  tokens: {issuers: [corp], trustDomains: [example.org]}\n  protocol:", 1) +
		openAI("strict", b) + grant("app", "/app", "chat", "Infer", "m") + grant("app-strict", "/app", "strict", "Infer", "m") + `---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: alice}
spec:
  from: [{tokenIssuer: corp, subject: alice@corp.test}, {spiffeID: "spiffe://oidc.example.org/corp/a_00b"}]
  to: [{endpoint: chat, operations: [Infer], resources: [m]}]
` + workload("example.org", "app", "")
}

// TestTokens has callers without certificates ask with an OpenID provider's tokens and with JWT-SVIDs.
func TestTokens(t *testing.T) {
	t.Parallel()
	b, l := ownBackend(t), newLogin(t)
	folder := t.TempDir()
	u := startUp(t, map[string]string{"all.yaml": tokenDocuments(b) + l.document(t, folder, "")})
	for _, v := range []version{http1, http2} {
		t.Run(string(v), func(t *testing.T) {
			nobody := u.with(t, v)
			var a answer
			eventually(t, "answer", func() bool { // when the keys have been fetched
				a = nobody.bearing(t, l.token(t, "alice@corp.test"), "m")
				return a.status == http.StatusOK
			})
			if f := u.flow(t, a); f.Caller.String() != "spiffe://oidc.example.org/corp/alice_40corp.test" || f.Verdict != telemetry.Allowed || f.Rule != "grant/alice" {
				t.Errorf("recorded as %+v", f)
			}
			for _, r := range b.taken() {
				if r.header.Get("Authorization") != "" {
					t.Error("the backend was given the token")
				}
			}
			for subject, path := range map[string]string{
				"bob": "bob", "alice_40corp.test": "alice_5F40corp.test", "..": "_2E_2E", domain + "/app": "spiffe_3A_2F_2Fexample.org_2Fapp", "a\x00c": "a_00c",
			} {
				a := nobody.bearing(t, l.token(t, subject), "m")
				if p := wantProblem(t, a, http.StatusForbidden, "no_grant"); p.Error.Message != "spiffe://oidc.example.org/corp/"+path+" has no grant for Infer m" {
					t.Errorf("%q: %v", subject, p)
				}
				if f := u.flow(t, a); f.Caller.Path() != "/corp/"+path || f.Verdict != telemetry.Denied {
					t.Errorf("recorded as %+v", f)
				}
			}
			if a := nobody.bearing(t, l.token(t, "a\x00b"), "m"); a.status != http.StatusOK {
				t.Errorf("a subject with a zero in it: %v", a)
			}
			if a := nobody.bearing(t, l.token(t, "alice@corp.test"), "other"); a.status != http.StatusForbidden {
				t.Errorf("another model: %v", a)
			}

			svid, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: hostOf("chat")}, workloadapi.WithAddr("unix://"+u.socket))
			if err != nil {
				t.Fatal(err)
			}
			a = nobody.bearing(t, svid.Marshal(), "m")
			if f := u.flow(t, a); a.status != http.StatusOK || f.Caller.String() != domain+"/app" || f.Rule != "grant/app" {
				t.Errorf("%v, recorded as %+v", a, f)
			}

			// A caller with a certificate is who that says, whatever token comes along.
			for _, token := range []string{"sk-anything", l.token(t, "bob"), l.token(t, "alice@corp.test")} {
				if a := u.as(t, "/app", v).bearing(t, token, "m"); a.status != http.StatusOK {
					t.Errorf("with a certificate: %v", a)
				}
				a := u.as(t, "/stranger", v).bearing(t, token, "m")
				if p := wantProblem(t, a, http.StatusForbidden, "no_grant"); !strings.HasPrefix(p.Error.Message, domain+"/stranger ") {
					t.Errorf("got %v", p)
				}
			}
			// A list is answered by the catalogue, and filtered for the one who asks.
			a = nobody.send(t, request{method: "GET", host: hostOf("chat"), path: "/v1/models", header: http.Header{"Authorization": {"Bearer " + l.token(t, "alice@corp.test")}}})
			if f := u.flow(t, a); a.status != http.StatusOK || f.Caller.Path() != "/corp/alice_40corp.test" {
				t.Errorf("list: %v, %+v", a, f)
			}
			// Elsewhere nobody gets in with a token.
			if a := nobody.post(t, "strict", chatPath, `{"model":"m"}`); a.err == nil {
				t.Errorf("without a certificate where no tokens are taken: %v", a)
			}
		})
	}
}

// TestBadTokens shows tokens that stand for nobody, and certificates of nobody.
func TestBadTokens(t *testing.T) {
	t.Parallel()
	b, l := ownBackend(t), newLogin(t)
	u := startUp(t, map[string]string{"all.yaml": tokenDocuments(b) + l.document(t, t.TempDir(), "")})
	nobody := u.with(t, http2)
	eventually(t, "answer", func() bool { return nobody.bearing(t, l.token(t, "alice@corp.test"), "m").status == http.StatusOK })
	now, alice := time.Now().Unix(), "alice@corp.test"
	other := newLogin(t).key()
	other.KeyID = l.key().KeyID
	key := l.key()
	public, err := key.Public().MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	good := l.token(t, alice)
	parts := strings.Split(good, ".")
	change := func(c claims) string { return signed(t, l.key(), l.claims(alice, c)) }
	b.taken()
	for name, token := range map[string]string{
		"none":                        "",
		"no token":                    "sk-123",
		"expired":                     change(claims{"exp": now - 5}),
		"without an end":              change(claims{"exp": nil}),
		"an end that is text":         change(claims{"exp": "tomorrow"}),
		"not yet":                     change(claims{"nbf": now + 60}),
		"another audience":            change(claims{"aud": hostOf("strict")}),
		"no audience":                 change(claims{"aud": nil}),
		"another issuer":              change(claims{"iss": "https://evil.test"}),
		"no issuer":                   change(claims{"iss": nil}),
		"no subject":                  change(claims{"sub": nil}),
		"an empty subject":            change(claims{"sub": ""}),
		"a long subject":              change(claims{"sub": strings.Repeat("a", 256)}),
		"a subject that is a list":    change(claims{"sub": []string{alice}}),
		"another key":                 signed(t, other, l.claims(alice, nil)),
		"the public key as secret":    signed(t, jose.JSONWebKey{Key: public, KeyID: l.key().KeyID, Algorithm: "HS256"}, l.claims(alice, nil)),
		"unsigned":                    "eyJhbGciOiJub25lIn0." + parts[1] + ".",
		"another signature":           parts[0] + "." + parts[1] + "." + strings.Repeat("A", len(parts[2])),
		"cut off":                     good[:len(good)-10],
		"its own idea of a SPIFFE ID": signed(t, l.key(), claims{"sub": domain + "/app", "aud": hostOf("chat"), "exp": now + 600}),
		"huge":                        strings.Repeat("a", 50000),
	} {
		t.Run(name, func(t *testing.T) {
			a := nobody.bearing(t, token, "m")
			if name == "huge" {
				if a.status == http.StatusOK {
					t.Error(a)
				}
				return
			}
			p := wantProblem(t, a, http.StatusUnauthorized, "unauthenticated")
			if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer") || strings.Contains(a.body, "corp") {
				t.Errorf("%v, %v", a.header, a)
			}
			f := u.flow(t, a)
			if f.Verdict != telemetry.Refused || !f.Caller.IsZero() || f.Status != http.StatusUnauthorized || f.Detail == "" {
				t.Errorf("recorded as %+v", f)
			}
			t.Log(f.Detail, "|", p.Error.Message)
		})
	}
	query := nobody.send(t, request{host: hostOf("chat"), path: chatPath + "?access_token=" + good, body: strings.NewReader(`{"model":"m"}`)})
	wantProblem(t, query, http.StatusUnauthorized, "unauthenticated")
	cookie := nobody.send(t, request{host: hostOf("chat"), path: chatPath, header: http.Header{"Cookie": {"access_token=" + good}}, body: strings.NewReader(`{"model":"m"}`)})
	wantProblem(t, cookie, http.StatusUnauthorized, "unauthenticated")
	// A stranger's body is not read before he is refused, and other paths are no way around.
	large := nobody.send(t, request{host: hostOf("chat"), path: "/elsewhere", body: bytes.NewReader(make([]byte, 1<<20))})
	wantProblem(t, large, http.StatusUnauthorized, "unauthenticated")
	if got := b.taken(); len(got) > 0 {
		t.Errorf("the backend was asked %d times", len(got))
	}
	// Certificates are no less verified than elsewhere.
	stranger := svid("/app", time.Hour)
	stranger.signer = u.keys.key // nobody's: it signs itself
	if a := u.with(t, http2, u.keys.sign(t, stranger)).bearing(t, good, "m"); a.err == nil {
		t.Errorf("with a certificate that nobody signed: %v", a)
	}
	for name, uris := range map[string][]string{"two names": {domain + "/app", domain + "/b"}, "another trust domain": {"spiffe://other.org/app"}, "no name": nil,
		"a caller's with a token": {"spiffe://oidc.example.org/corp/alice_40corp.test"}} {
		p := svid("/app", time.Hour)
		p.uris = uris
		if a := u.with(t, http2, u.keys.sign(t, p)).bearing(t, good, "m"); a.status == http.StatusOK {
			t.Errorf("with a certificate of %s: %v", name, a)
		}
	}
}

// TestTokenEnds cuts a stream with the token that it began on.
func TestTokenEnds(t *testing.T) {
	t.Parallel()
	b, l := ownBackend(t), newLogin(t)
	u := startUp(t, map[string]string{"all.yaml": tokenDocuments(b) + l.document(t, t.TempDir(), "")})
	nobody := u.with(t, http2)
	eventually(t, "answer", func() bool { return nobody.bearing(t, l.token(t, "alice@corp.test"), "m").status == http.StatusOK })
	end := time.Now().Add(4 * time.Second).Truncate(time.Second)
	token := signed(t, l.key(), l.claims("alice@corp.test", claims{"exp": end.Unix()}))
	req, err := request{host: hostOf("chat"), path: chatPath, header: http.Header{"Authorization": {"Bearer " + token}},
		body: strings.NewReader(`{"model":"m","stream":true}`)}.build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	resp, err := nobody.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	s := b.begun(t)
	s.write(t, "data: 1\n\n")
	<-s.gone
	if late := time.Since(end); late < -500*time.Millisecond || late > time.Second {
		t.Errorf("the stream was cut %s behind the end of its token", late)
	}
	time.Sleep(time.Until(end)) // it may be cut a little sooner, and until then the token is good
	wantProblem(t, nobody.bearing(t, token, "m"), http.StatusUnauthorized, "unauthenticated")
}

// TestTokenKeys rotates a provider's keys, takes it away, and takes its document away.
func TestTokenKeys(t *testing.T) {
	t.Parallel()
	b, l := ownBackend(t), newLogin(t)
	folder := t.TempDir()
	u := startUp(t, map[string]string{"all.yaml": tokenDocuments(b), "login.yaml": l.document(t, folder, "")})
	nobody := u.with(t, http2)
	comes := func(token string) bool { return nobody.bearing(t, token, "m").status == http.StatusOK }
	before := l.token(t, "alice@corp.test")
	eventually(t, "first keys", func() bool { return comes(before) })
	l.rotate(t)
	after := l.token(t, "alice@corp.test")
	if comes(after) {
		t.Error("signed with a key that nobody has fetched yet")
	}
	u.write(t, "login.yaml", l.document(t, folder, ", refresh: 10m")) // which has it asked at once
	eventually(t, "keys after the rotation", func() bool { return comes(after) })
	if comes(before) {
		t.Error("signed with a key that is gone")
	}
	l.server.CloseClientConnections()
	l.server.Listener.Close()
	u.kill()
	u.mustLaunch(t)
	eventually(t, "last good keys", func() bool { return comes(after) })
	u.write(t, "all.yaml", strings.NewReplacer("issuers: [corp], ", "").Replace(strings.Split(tokenDocuments(b), "metadata: {name: alice}")[0])+`metadata: {name: alice}
spec: {from: [{spiffeID: 'spiffe://example.org/alice'}], to: [{endpoint: chat, operations: [Infer], resources: [m]}]}
`)
	eventually(t, "the issuer is out", func() bool { return !comes(after) })
}

// TestTokenOfOpenAI has the official client ask as callers do that know of no certificates.
func TestTokenOfOpenAI(t *testing.T) {
	t.Parallel()
	python, _ := filepath.Abs("../../.parts/venv/bin/python")
	if _, err := exec.LookPath(python); err != nil {
		t.Fatal("this test needs Python with the official client: run `make parts`")
	}
	b, l := ownBackend(t), newLogin(t)
	u := startUp(t, map[string]string{"all.yaml": tokenDocuments(b) + l.document(t, t.TempDir(), "")})
	eventually(t, "answer", func() bool {
		return u.with(t, http2).bearing(t, l.token(t, "alice@corp.test"), "m").status == http.StatusOK
	})
	folder := t.TempDir()
	u.writePEM(t, folder, "/app")
	for who, want := range map[string]string{"alice@corp.test": "200", "bob": "PermissionDeniedError 403 no_grant", "": "AuthenticationError 401 unauthenticated"} {
		token := "sk-none"
		if who != "" {
			token = l.token(t, who)
		}
		cmd := exec.CommandContext(t.Context(), python, "testdata/bearing.py", hostOf("chat"), u.listen, "m")
		cmd.Env = append(os.Environ(), "OPENAI_API_KEY="+token, "SSL_CERT_FILE="+folder+"/ca.pem")
		out, err := cmd.CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("%q: %v, %s", who, err, out)
		}
	}
}
