package federation

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/segment"
)

// followingIssuers is Issuers that run.
type followingIssuers struct {
	*Issuers
	news chan map[segment.IssuerName]string
	end  func()
}

func followIssuers(t testing.TB, dir string, dial func(context.Context, string, string) (net.Conn, error)) *followingIssuers {
	t.Helper()
	f := &followingIssuers{news: make(chan map[segment.IssuerName]string, 100)}
	var err error
	f.Issuers, err = NewIssuers(IssuersConfig{Dir: dir, Log: slog.New(slog.DiscardHandler),
		Publish: func(keys map[segment.IssuerName]string) { f.news <- keys }})
	if err != nil {
		t.Fatal(err)
	}
	f.fetcher.dial = dial
	f.end = runs(t, f.Run)
	return f
}

// publishes checks what was published since it was last asked: once, or, with nil, never.
func (f *followingIssuers) publishes(t testing.TB, step string, want map[segment.IssuerName]string) {
	t.Helper()
	synctest.Wait()
	var got []map[segment.IssuerName]string
	for len(f.news) > 0 {
		got = append(got, <-f.news)
	}
	if want == nil && len(got) == 0 {
		return
	}
	if want == nil || len(got) != 1 || !maps.Equal(got[0], want) {
		t.Fatalf("%s: published %q, want %q once: %+v", step, got, want, f.Status())
	}
}

// only is the status of the only issuer.
func (f *followingIssuers) only(t testing.TB) IssuerStatus {
	t.Helper()
	all := f.Status()
	if len(all) != 1 {
		t.Fatalf("%+v", all)
	}
	return all[0]
}

// keyNamed is a new public key, and keysOf a JWK set of such as issuers write it: not as we do.
func keyNamed(t testing.TB, kid string) jose.JSONWebKey {
	t.Helper()
	return jose.JSONWebKey{Key: newKey(t).Public(), KeyID: kid, Use: "sig", Algorithm: "ES256"}
}

func keysOf(t testing.TB, keys ...jose.JSONWebKey) string {
	t.Helper()
	keys = slices.Clone(keys)
	slices.Reverse(keys)
	text, err := json.MarshalIndent(jose.JSONWebKeySet{Keys: keys}, "", "   ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// openID is an OpenID provider.
type openID struct {
	*host
	discovery, keys atomic.Pointer[string]
	doc             segment.TokenIssuer
}

// serveOpenID serves https://HOST/tenant, with a certificate that is valid for four hours.
func (n *network) serveOpenID(t testing.TB, name string, keys string) *openID {
	t.Helper()
	cert := webCert(t, 4*time.Hour, name)
	o := &openID{doc: segment.TokenIssuer{Name: "corp", Issuer: "https://" + name + "/tenant",
		CAFile: writeFile(t, filepath.Join(t.TempDir(), "ca"), certPEM(cert))}}
	o.describe(fmt.Sprintf(`{"issuer": %q, "jwks_uri": "https://%s/jwks", "response_types_supported": ["code"]}`, o.doc.Issuer, name))
	o.publish(keys)
	mux := http.NewServeMux()
	mux.HandleFunc("/tenant/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, *o.discovery.Load()) })
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, *o.keys.Load()) })
	o.host = n.serve(t, name+":443", &tls.Config{Certificates: []tls.Certificate{cert}}, mux)
	return o
}

func (o *openID) describe(text string) { o.discovery.Store(&text) }
func (o *openID) publish(keys string)  { o.keys.Store(&keys) }

// Over real sockets: our own discovery documents are those of an issuer like any other, and what we publish verifies
// what we sign.
func TestFollowsOurOwnIssuer(t *testing.T) {
	a := identitytest.JWTAuthority(t, ours.Name(), "first")
	own := bundleOf(1, authority(t, ours))
	own.SetJWTAuthorities(a.Bundle().JWTAuthorities())
	cert := webCert(t, time.Hour)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	doc := segment.TokenIssuer{Name: "ours", Issuer: "https://" + l.Addr().String() + "/identity/",
		CAFile: writeFile(t, filepath.Join(t.TempDir(), "ca"), certPEM(cert))}
	s := httptest.NewUnstartedServer(handler(t, HandlerConfig{Bundle: boxed(own).Load, Issuer: doc.Issuer}))
	s.Listener.Close()
	s.Listener = l
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	defer s.Close()
	token, err := a.Sign(identity.JWTRequest{ID: spiffeid.RequireFromPath(ours, "/app"), Audience: []string{"chat"}, TTL: time.Hour, Issuer: doc.Issuer}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	direct := doc
	direct.JWKSURI = doc.Issuer + "keys"
	for name, doc := range map[string]segment.TokenIssuer{"by discovery": doc, "by its own URI": direct} {
		t.Run(name, func(t *testing.T) {
			f := followIssuers(t, stateDir(t), nil)
			f.Set([]segment.TokenIssuer{doc})
			var keys string
			select {
			case got := <-f.news:
				keys = got["ours"]
			case <-time.After(20 * time.Second):
				t.Fatalf("%+v", f.Status())
			}
			f.end()
			if s := f.only(t); s.Keys != 1 || s.Error != "" || s.Name != "ours" || s.Issuer != doc.Issuer || time.Until(s.Next) < 4*time.Minute {
				t.Errorf("%+v", s)
			}
			var set jose.JSONWebKeySet
			if err := json.Unmarshal([]byte(keys), &set); err != nil {
				t.Fatal(err)
			}
			parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
			if err != nil {
				t.Fatal(err)
			}
			var claims jwt.Claims
			if err := parsed.Claims(set, &claims); err != nil || claims.Subject != "spiffe://example.org/app" {
				t.Errorf("%+v, %v", claims, err)
			}
		})
	}
}

func TestIssuerRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		a, b := keyNamed(t, "a"), keyNamed(t, "b")
		o := net.serveOpenID(t, "issuer.org", keysOf(t, a))
		f := followIssuers(t, stateDir(t), net.dial)
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "at first", map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{a})})

		o.publish(keysOf(t, a, b))
		time.Sleep(5*time.Minute - time.Second)
		f.publishes(t, "too soon", nil)
		time.Sleep(2 * time.Second)
		f.publishes(t, "the next is announced", map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{a, b})})

		// The same keys, written in another way, are no news, and neither are keys that verify nothing.
		o.publish(strings.Replace(keysOf(t, b, a), `"keys": [`, `"keys": [{"kty":"oct","k":"AAAA","alg":"HS256","kid":"a"}, {"kty":"new","kid":"c"},`, 1))
		time.Sleep(time.Hour)
		f.publishes(t, "nothing new", nil)
		if s := f.only(t); s.Error != "" || s.Keys != 2 || time.Since(s.LastSuccess) > 6*time.Minute {
			t.Errorf("%+v", s)
		}

		o.publish(keysOf(t, b))
		time.Sleep(5 * time.Minute)
		f.publishes(t, "the last one is gone", map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{b})})

		asked := o.asked.Load()
		o.doc.Refresh = time.Hour
		f.Set([]segment.TokenIssuer{o.doc})
		time.Sleep(59 * time.Minute)
		f.publishes(t, "as the document says", nil)
		if n := o.asked.Load() - asked; n != 2 { // discovery and keys, once for the document
			t.Errorf("asked %d times", n)
		}
	})
}

// Providers have their keys on another host.
func TestKeysOnAnotherHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		a := keyNamed(t, "a")
		o, keys := net.serveOpenID(t, "issuer.org", ""), net.serveOpenID(t, "keys.org", keysOf(t, a))
		o.describe(`{"issuer": "https://issuer.org/tenant", "jwks_uri": "https://keys.org/jwks"}`)
		both, err := os.ReadFile(o.doc.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		more, err := os.ReadFile(keys.doc.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		// Whom the document does not trust is not believed there either.
		f := followIssuers(t, stateDir(t), net.dial)
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "not trusted", nil)
		if s := f.only(t); !strings.Contains(s.Error, "unknown authority") {
			t.Errorf("%+v", s)
		}
		writeFile(t, o.doc.CAFile, append(both, more...))
		time.Sleep(maxRetry)
		f.publishes(t, "trusted", map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{a})})
	})
}

// What an issuer does wrong takes nothing away and adds nothing.
func TestIssuerAttacks(t *testing.T) {
	redirect := func(path, to string) func(*testing.T, *openID) {
		return func(_ *testing.T, o *openID) {
			good := *o.handler.Load()
			o.handle(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == path {
					http.Redirect(w, r, to, http.StatusFound)
				} else {
					good.ServeHTTP(w, r)
				}
			}))
		}
	}
	describe := func(text string) func(*testing.T, *openID) {
		return func(_ *testing.T, o *openID) { o.describe(text) }
	}
	publish := func(text string) func(*testing.T, *openID) {
		return func(_ *testing.T, o *openID) { o.publish(text) }
	}
	const wellKnown = "/tenant/.well-known/openid-configuration"
	for name, c := range map[string]struct {
		attack func(*testing.T, *openID)
		want   string
	}{
		"another issuer":                   {describe(`{"issuer": "https://issuer.org/other", "jwks_uri": "https://issuer.org/jwks"}`), `another issuer, "https://issuer.org/other"`},
		"issuer with a slash":              {describe(`{"issuer": "https://issuer.org/tenant/", "jwks_uri": "https://issuer.org/jwks"}`), "another issuer"},
		"issuer in capitals":               {describe(`{"issuer": "https://ISSUER.org/tenant", "jwks_uri": "https://issuer.org/jwks"}`), "another issuer"},
		"Issuer":                           {describe(`{"Issuer": "https://issuer.org/tenant", "jwks_uri": "https://issuer.org/jwks"}`), "another issuer"},
		"no issuer":                        {describe(`{"jwks_uri": "https://issuer.org/jwks"}`), "another issuer"},
		"null":                             {describe(`null`), "another issuer"},
		"no keys named":                    {describe(`{"issuer": "https://issuer.org/tenant"}`), "does not say where"},
		"keys over HTTP":                   {describe(`{"issuer": "https://issuer.org/tenant", "jwks_uri": "http://issuer.org/jwks"}`), "not over https"},
		"keys in a file":                   {describe(`{"issuer": "https://issuer.org/tenant", "jwks_uri": "file:///etc/passwd"}`), "not over https"},
		"keys with a user":                 {describe(`{"issuer": "https://issuer.org/tenant", "jwks_uri": "https://a:b@issuer.org/jwks"}`), "user in the URL"},
		"keys at nobody's":                 {describe(`{"issuer": "https://issuer.org/tenant", "jwks_uri": "https:///jwks"}`), "no Host"},
		"page":                             {describe("<html>"), "not a discovery document"},
		"huge discovery":                   {describe(strings.Repeat(" ", 2*segment.MaxBundle)), "larger than 1 MiB"},
		"huge keys":                        {publish(strings.Repeat(" ", 2*segment.MaxBundle)), "larger than 1 MiB"},
		"page of keys":                     {publish("<html>"), "not a JWK set"},
		"no keys":                          {publish(`{"keys": []}`), "there is no key in it"},
		"not a word of keys":               {publish(`{}`), "not a JWK set"},
		"shared secret":                    {publish(`{"keys": [{"kty":"oct","k":"AAAA","alg":"HS256","kid":"a"}]}`), "there is no key in it that verifies tokens"},
		"private key":                      {publish(`{"keys": [{"kty":"EC","crv":"P-256","kid":"a","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","d":"870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE"}]}`), "it is a private key"},
		"redirect to another host":         {redirect(wellKnown, "https://elsewhere.org"+wellKnown), "redirects to another host"},
		"keys redirect to another host":    {redirect("/jwks", "https://elsewhere.org/jwks"), "redirects to another host"},
		"keys redirect to HTTP":            {redirect("/jwks", "http://issuer.org/jwks"), "not over https"},
		"redirect for ever":                {redirect("/jwks", "/jwks"), "more than 3 times"},
		"silence":                          {func(_ *testing.T, o *openID) { o.handle(silent) }, "deadline exceeded"},
		"a slow discovery, and then keys":  {func(_ *testing.T, o *openID) { o.handle(slow(*o.handler.Load())) }, "deadline exceeded"},
		"status":                           {func(_ *testing.T, o *openID) { o.handle(http.NotFoundHandler()) }, "answers 404"},
		"plain HTTP":                       {func(_ *testing.T, o *openID) { o.tls.Store(nil) }, "HTTP response to HTTPS client"},
		"expired web certificate":          {func(*testing.T, *openID) { time.Sleep(4 * time.Hour) }, "expired"},
		"another's web certificate":        {func(t *testing.T, o *openID) { o.show(webCert(t, time.Hour, "issuer.org")) }, "unknown authority"},
		"an SVID in the place of a server": {func(t *testing.T, o *openID) { o.tls.Store(SPIFFETLS(svid(t, authority(t, other), "/x"))) }, "x509"},
		"away":                             {func(_ *testing.T, o *openID) { o.away.Store(true) }, "no route"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var net network
				a, b := keyNamed(t, "a"), keyNamed(t, "b")
				o, elsewhere := net.serveOpenID(t, "issuer.org", keysOf(t, a)), net.serveOpenID(t, "elsewhere.org", keysOf(t, keyNamed(t, "evil")))
				certificate, handler, discovery := o.tls.Load(), *o.handler.Load(), *o.discovery.Load()
				f := followIssuers(t, stateDir(t), net.dial)
				f.Set([]segment.TokenIssuer{o.doc})
				f.publishes(t, "at first", map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{a})})
				c.attack(t, o)
				time.Sleep(6 * time.Minute)
				f.publishes(t, "attacked", nil)
				if s := f.only(t); s.Keys != 1 || !strings.Contains(s.Error, c.want) || len(s.Error) > 500 {
					t.Errorf("%+v, want %s", s, c.want)
				}
				if elsewhere.asked.Load() > 0 {
					t.Error("it was led away")
				}

				// And when all is well again, so are we.
				if name == "expired web certificate" {
					return
				}
				o.away.Store(false)
				o.tls.Store(certificate)
				o.handle(handler)
				o.describe(discovery)
				o.publish(keysOf(t, b))
				time.Sleep(11 * time.Minute)
				f.publishes(t, "afterwards", map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{b})})
				if s := f.only(t); s.Error != "" {
					t.Errorf("afterwards: %+v", s)
				}
			})
		})
	}
}

var silent = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })

// slow takes its time for each answer, but not so much that one alone would be too late.
func slow(good http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(2 * fetchTime / 3)
		good.ServeHTTP(w, r)
	})
}

func (o *openID) show(c tls.Certificate) {
	o.tls.Store(&tls.Config{Certificates: []tls.Certificate{c}})
}

func TestIssuersRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		dir := stateDir(t)
		a, b := keyNamed(t, "a"), keyNamed(t, "b")
		o := net.serveOpenID(t, "issuer.org", keysOf(t, b))
		o.doc.Keys = keysOf(t, a)
		known := map[segment.IssuerName]string{"corp": segment.KeySet([]jose.JSONWebKey{b})}
		f := followIssuers(t, dir, net.dial)
		f.Set([]segment.TokenIssuer{o.doc})
		synctest.Wait()
		<-f.news // what the document began with
		f.publishes(t, "fetched", known)
		since := f.only(t).LastSuccess
		f.end()

		// The issuer is away. What is known is what was fetched, not what the document began with.
		o.away.Store(true)
		time.Sleep(time.Hour)
		f = followIssuers(t, dir, net.dial)
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "after a restart", known)
		if s := f.only(t); s.Error == "" || !s.LastSuccess.Equal(since) || s.Keys != 1 {
			t.Errorf("%+v", s)
		}
		f.end()
		for path, want := range map[string]os.FileMode{dir: 0o700, f.engine.folder.path(whichIssuer(o.doc)): 0o600} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v, %v", path, info, err)
			}
		}

		// Under the same name, another issuer or other keys than those of this one inherit nothing.
		for name, change := range map[string]func(*segment.TokenIssuer){
			"issuer":  func(d *segment.TokenIssuer) { d.Issuer += "2" },
			"JWKSURI": func(d *segment.TokenIssuer) { d.JWKSURI = "https://issuer.org/jwks" },
			"name":    func(d *segment.TokenIssuer) { d.Name = "other" },
		} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			f = followIssuers(t, dir, net.dial)
			if err := (&issuer{Issuers: f.Issuers, keys: jwks{known["corp"], 1}}).keep(o.doc, time.Now()); err != nil {
				t.Fatal(err)
			}
			f.Set([]segment.TokenIssuer{o.doc})
			synctest.Wait()
			<-f.news
			changed := o.doc
			change(&changed)
			changed.Keys = ""
			f.Set([]segment.TokenIssuer{changed})
			f.publishes(t, name, map[segment.IssuerName]string{})
			if s := f.only(t); s.Keys != 0 || !s.LastSuccess.IsZero() {
				t.Errorf("%s: %+v", name, s)
			}
			f.end()
			if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
				t.Errorf("%s: left behind: %v, %v", name, files, err)
			}
		}
	})
}

// What somebody has put in the place of an issuer's file is not taken for its own.
func TestDoubtfulIssuerFile(t *testing.T) {
	f, err := NewIssuers(IssuersConfig{Dir: stateDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs := segment.TokenIssuer{Name: "corp", Issuer: "https://a.org"}, segment.TokenIssuer{Name: "corp", Issuer: "https://b.org"}
	good, err := parseKeys([]byte(keysOf(t, keyNamed(t, "a"))))
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func() error{
		"good": func() error { return (&issuer{Issuers: f, keys: good}).keep(mine, time.Now()) },
		"theirs": func() error {
			return os.Rename(f.engine.folder.path(whichIssuer(theirs)), f.engine.folder.path(whichIssuer(mine)))
		},
		"empty": func() error {
			return f.engine.folder.save(whichIssuer(mine), issuerRecord{Name: mine.Name, Issuer: mine.Issuer, Keys: json.RawMessage(`{"keys":[]}`)})
		},
	} {
		if err := (&issuer{Issuers: f, keys: good}).keep(theirs, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		n := &issuer{Issuers: f}
		if err := n.load(mine); (err == nil) != (name == "good") || (n.keys == good) != (name == "good") {
			t.Errorf("%s: %+v, %v", name, n.keys, err)
		}
	}
	if _, err := NewIssuers(IssuersConfig{Dir: string(f.engine.folder)}); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(string(f.engine.folder), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := NewIssuers(IssuersConfig{Dir: string(f.engine.folder)}); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that is open to others: %v", err)
	}
}

// The keys in a document are for the time before the first fetch, and whenever somebody has written others.
func TestInitialKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		a, b, c := keyNamed(t, "a"), keyNamed(t, "b"), keyNamed(t, "c")
		o := net.serveOpenID(t, "issuer.org", keysOf(t, c))
		o.away.Store(true)
		is := func(keys ...jose.JSONWebKey) map[segment.IssuerName]string {
			return map[segment.IssuerName]string{"corp": segment.KeySet(keys)}
		}
		f := followIssuers(t, stateDir(t), net.dial)
		o.doc.Keys = keysOf(t, a)
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "at first", is(a))
		if s := f.only(t); s.Keys != 1 || !s.LastSuccess.IsZero() || !strings.Contains(s.Error, "no route") {
			t.Errorf("%+v", s)
		}
		o.doc.Keys = keysOf(t, b)
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "edited", is(b))
		o.doc.Keys = ""
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "taken away, and never fetched", map[segment.IssuerName]string{})

		// A file is read again before each fetch.
		o.doc.KeysFile = writeFile(t, filepath.Join(t.TempDir(), "keys"), []byte(keysOf(t, a)))
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "a file", is(a))
		writeFile(t, o.doc.KeysFile, []byte(keysOf(t, b)))
		time.Sleep(maxRetry)
		f.publishes(t, "another file", is(b))
		for name, spoil := range map[string]func(){
			"half a file":   func() { writeFile(t, o.doc.KeysFile, []byte("{")) },
			"no keys":       func() { writeFile(t, o.doc.KeysFile, []byte(`{"keys":[]}`)) },
			"shared secret": func() { writeFile(t, o.doc.KeysFile, []byte(`{"keys":[{"kty":"oct","k":"AAAA"}]}`)) },
			"no file":       func() { os.Remove(o.doc.KeysFile) },
		} {
			spoil()
			time.Sleep(maxRetry)
			f.publishes(t, name, nil)
			if s := f.only(t); s.Keys != 1 || !strings.Contains(s.Error, "read initial keys") {
				t.Errorf("%s: %+v", name, s)
			}
		}
		writeFile(t, o.doc.KeysFile, []byte(keysOf(t, b)))

		// Once they are fetched, it is those that count.
		o.away.Store(false)
		time.Sleep(maxRetry)
		f.publishes(t, "fetched", is(c))
		o.away.Store(true)
		time.Sleep(time.Hour)
		f.publishes(t, "away", nil)
		o.doc.KeysFile = ""
		f.Set([]segment.TokenIssuer{o.doc})
		f.publishes(t, "no longer in the document", nil)
	})
}

func TestIssuerRemovedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		dir := stateDir(t)
		a, b := keyNamed(t, "a"), keyNamed(t, "b")
		o, stays := net.serveOpenID(t, "issuer.org", keysOf(t, a)), net.serveOpenID(t, "stays.org", keysOf(t, b))
		stays.doc.Name = "stays"
		f := followIssuers(t, dir, net.dial)
		f.Set([]segment.TokenIssuer{stays.doc, o.doc})
		synctest.Wait()
		for len(f.news) > 0 {
			<-f.news
		}
		if s := f.Status(); len(s) != 2 || s[0].Name != "corp" || s[1].Name != "stays" {
			t.Errorf("%+v", s)
		}
		o.handle(silent) // in the middle of a fetch that will never end
		time.Sleep(5*time.Minute + time.Second)
		now := time.Now()
		f.Set([]segment.TokenIssuer{stays.doc})
		f.publishes(t, "removed", map[segment.IssuerName]string{"stays": segment.KeySet([]jose.JSONWebKey{b})})
		if s := f.only(t); s.Name != "stays" || !time.Now().Equal(now) {
			t.Errorf("%+v after %s", s, time.Since(now))
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
			t.Errorf("left behind: %v, %v", files, err)
		}
	})
}

// The lowest layer does not even try what no document may say.
func TestFetchKeysRefuses(t *testing.T) {
	for _, doc := range []segment.TokenIssuer{
		{Issuer: "http://issuer.org"}, {Issuer: "https://a:b@issuer.org"}, {Issuer: "https://issuer.org?x"}, {Issuer: "https://issuer.org#x"},
		{Issuer: "::"}, {}, {Issuer: "https://issuer.org", JWKSURI: "http://issuer.org/keys"},
		{Issuer: "https://issuer.org", CAFile: "/dev/zero"}, {Issuer: "https://issuer.org", CAFile: "/nowhere"},
	} {
		f := fetcher{dial: func(context.Context, string, string) (netConn, error) {
			t.Errorf("%+v was dialled", doc)
			return nil, os.ErrInvalid
		}}
		if _, err := f.keys(t.Context(), doc); err == nil {
			t.Errorf("%+v: no error", doc)
		}
	}
}

// A bundle that a document no longer has, and that nobody has ever fetched, is nobody's.
func TestInitialBundleIsTakenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		root := authority(t, other)
		f := follow(t, stateDir(t), net.dial)
		doc := spiffeDocument(other, "https://spiffe.other.org/", svid(t, root, "/bundles").ID, marshal(t, bundleOf(1, root)))
		f.Set([]segment.TrustDomain{doc})
		synctest.Wait()
		if b, _ := f.told(); !b[other].Equal(bundleOf(1, root)) {
			t.Fatalf("%+v", f.Status())
		}
		doc.Bundle = ""
		f.Set([]segment.TrustDomain{doc})
		synctest.Wait()
		if b, changed := f.told(); !changed || len(b) != 0 {
			t.Errorf("%v: %+v", b, f.Status())
		}
	})
}
