package federation

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/segment"
)

// theirs is go-spiffe's own server side.
func theirs(t testing.TB, td spiffeid.TrustDomain, b *box) http.Handler {
	t.Helper()
	h, err := gospiffe.NewHandler(td, b)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Over real sockets, from go-spiffe's handler, by both profiles.
func TestFollowsGoSPIFFE(t *testing.T) {
	root := authority(t, other)
	want := bundleOf(7, root)
	if err := want.AddJWTAuthority("k", newKey(t).Public()); err != nil {
		t.Fatal(err)
	}
	server := svid(t, root, "/bundles")
	cert := webCert(t, time.Hour)
	for name, c := range map[string]struct {
		tls *tls.Config
		doc func(url string) segment.TrustDomain
	}{
		"https_web": {&tls.Config{Certificates: []tls.Certificate{cert}}, func(url string) segment.TrustDomain {
			return webDocument(other, url, writeFile(t, filepath.Join(t.TempDir(), "ca.pem"), certPEM(cert)))
		}},
		"https_spiffe": {SPIFFETLS(server), func(url string) segment.TrustDomain {
			return spiffeDocument(other, url, server.ID, marshal(t, bundleOf(1, root)))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := listen(t, c.tls, theirs(t, other, boxed(want)))
			f := follow(t, stateDir(t), nil)
			f.Set([]segment.TrustDomain{c.doc(s.URL + "/some/path")})
			late := time.After(20 * time.Second)
			for got := (Bundles)(nil); !got[other].Equal(want); {
				select {
				case got = <-f.news:
				case <-late:
					t.Fatalf("%+v", f.Status())
				}
			}
			f.end()
			if s := f.of(t, other); s.Sequence != 7 || s.Roots != 1 || s.JWTKeys != 1 || s.Error != "" || time.Until(s.Next) < 4*time.Minute {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// The endpoint's trust domain changes its root: the new one is announced, used, and the old one goes.
func TestFollowsRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		before, after := authority(t, other), authority(t, other)
		published := boxed(bundleOf(1, before))
		published.Load().SetRefreshHint(10 * time.Minute)
		server := svid(t, before, "/bundles")
		h := net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, other, published))
		f := follow(t, stateDir(t), net.dial)
		f.Set([]segment.TrustDomain{spiffeDocument(other, "https://spiffe.other.org/", server.ID, marshal(t, bundleOf(1, before)))})
		synctest.Wait()
		if b, _ := f.told(); !b[other].Equal(published.Load()) {
			t.Fatalf("%+v", f.Status())
		}

		published.Store(bundleOf(2, before, after))
		time.Sleep(10*time.Minute - time.Second)
		if _, ok := f.told(); ok || h.asked.Load() != 1 {
			t.Fatal("the hint was not kept")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if b, _ := f.told(); len(b[other].X509Authorities()) != 2 {
			t.Fatalf("%+v", f.Status())
		}

		published.Store(bundleOf(3, after))
		h.tls.Store(SPIFFETLS(svid(t, after, "/bundles"))) // the initial bundle could not verify it
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if b, _ := f.told(); !b[other].Equal(bundleOf(3, after)) {
			t.Fatalf("%+v", f.Status())
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, ok := f.told(); ok || f.of(t, other).Error != "" {
			t.Errorf("without a change: %+v", f.Status())
		}
	})
}

// What an endpoint does wrong takes nothing away and adds nothing.
func TestAttacks(t *testing.T) {
	type world struct {
		*testing.T
		host *host
		good http.Handler
		net  *network
	}
	answer := func(body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) })
	}
	redirect := func(to string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusTemporaryRedirect) })
	}
	serves := func(b func(w world) *spiffebundle.Bundle) func(w world) {
		return func(w world) { w.host.handle(theirs(w, other, boxed(b(w)))) }
	}
	for _, c := range []struct{ name, profile, want string }{
		{name: "keys of a third", want: "not of trust domain other.org"},
		{name: "our keys", want: "not of trust domain other.org"},
		{name: "a leaf as root", want: "is not an authority's"},
		{name: "not a word of keys", want: "there is no key in it"},
		{name: "null", want: "there is no key in it"},
		{name: "revocation from before", want: "goes back from 5 to 4"},
		{name: "private key", want: "not a public key"},
		{name: "no document", want: "not a JWK set"},
		{name: "page", want: "not a JWK set"},
		{name: "sequence back", want: "goes back from 5 to 4"},
		{name: "100 MiB", want: "larger than 1 MiB"},
		{name: "many keys", want: "more than 256 keys"},
		{name: "slow body", want: "deadline exceeded"},
		{name: "silence", want: "deadline exceeded"},
		{name: "half a body", want: "unexpected EOF"},
		{name: "endless header", want: "server response headers exceeded"},
		{name: "status", want: "answers 404"},
		{name: "redirect to another host", want: "redirects to another host"},
		{name: "redirect to another port", want: "redirects to another host"},
		{name: "redirect to HTTP", want: "not over https"},
		{name: "redirect for ever", want: "more than 3 times"},
		{name: "redirect with a user", want: "user in the URL"},
		{name: "plain HTTP", want: "HTTP response to HTTPS client"},
		{name: "expired web certificate", profile: "web", want: "expired"},
		{name: "another's web certificate", profile: "web", want: "unknown authority"},
		{name: "web certificate for another host", profile: "web", want: "not spiffe.other.org"},
		{name: "SVID for a web endpoint", profile: "web", want: "x509"},
		{name: "old TLS", profile: "web", want: "protocol version"},
		{name: "wrong SPIFFE ID", profile: "spiffe", want: `unexpected ID "spiffe://other.org/bundlez"`},
		{name: "SPIFFE ID of another trust domain", profile: "spiffe", want: "no X.509 bundle"},
		{name: "SVID of another authority", profile: "spiffe", want: "unknown authority"},
		{name: "web certificate for a SPIFFE endpoint", profile: "spiffe", want: "x509"},
		{name: "away", want: "no route"},
	} {
		var poured atomic.Int64
		attack := map[string]func(w world){
			"keys of a third": serves(func(w world) *spiffebundle.Bundle {
				return spiffebundle.FromX509Authorities(other, []*x509.Certificate{authority(w, third).Certificate()})
			}),
			"our keys": serves(func(w world) *spiffebundle.Bundle {
				return spiffebundle.FromX509Authorities(other, []*x509.Certificate{authority(w, ours).Certificate()})
			}),
			"a leaf as root": serves(func(w world) *spiffebundle.Bundle {
				return spiffebundle.FromX509Authorities(other, svid(w, authority(w, other), "/x").Certificates)
			}),
			"not a word of keys":     func(w world) { w.host.handle(answer(`{"spiffe_sequence": 9}`)) },
			"null":                   func(w world) { w.host.handle(answer(`{"keys": null, "spiffe_sequence": 9}`)) },
			"revocation from before": func(w world) { w.host.handle(answer(`{"keys": [], "spiffe_sequence": 4}`)) },
			"private key": func(w world) {
				w.host.handle(answer(`{"keys": [{"kty":"EC","crv":"P-256","use":"jwt-svid","kid":"a",
					"x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","d":"870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE"}]}`))
			},
			"no document":   func(w world) { w.host.handle(answer("")) },
			"page":          func(w world) { w.host.handle(answer("<html>")) },
			"sequence back": serves(func(w world) *spiffebundle.Bundle { return bundleOf(4, authority(w, other)) }),
			"100 MiB": func(w world) {
				w.host.handle(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					for range 100 << 4 {
						poured.Add(64 << 10)
						if _, err := w.Write(make([]byte, 64<<10)); err != nil {
							return
						}
					}
				}))
			},
			"many keys": func(w world) { w.host.handle(answer(`{"keys": [{}` + strings.Repeat(",{}", 300) + "]}")) },
			"slow body": func(w world) {
				w.host.handle(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					for r.Context().Err() == nil {
						fmt.Fprint(w, " ")
						_ = http.NewResponseController(w).Flush()
						time.Sleep(time.Second)
					}
				}))
			},
			"silence": func(w world) {
				w.host.handle(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
			},
			"half a body": func(w world) {
				w.host.handle(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Length", "1000")
					fmt.Fprint(w, `{"keys": []}`)
				}))
			},
			"endless header": func(w world) {
				w.host.handle(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("X", strings.Repeat("x", 1<<20))
				}))
			},
			"status":                   func(w world) { w.host.handle(http.NotFoundHandler()) },
			"redirect to another host": func(w world) { w.host.handle(redirect("https://elsewhere.org/")) },
			"redirect to another port": func(w world) { w.host.handle(redirect("https://spiffe.other.org:8443/")) },
			"redirect to HTTP":         func(w world) { w.host.handle(redirect("http://spiffe.other.org/")) },
			"redirect for ever":        func(w world) { w.host.handle(redirect("/again")) },
			"redirect with a user":     func(w world) { w.host.handle(redirect("https://a:b@spiffe.other.org/")) },
			"plain HTTP":               func(w world) { w.host.tls.Store(nil) },
			"expired web certificate":  func(world) { time.Sleep(3 * time.Hour) },
			"another's web certificate": func(w world) {
				w.host.tls.Store(&tls.Config{Certificates: []tls.Certificate{webCert(w, time.Hour, "spiffe.other.org")}})
			},
			"web certificate for another host": func(w world) {
				c := webCert(w, time.Hour, "elsewhere.org")
				ca := (*w.host.tls.Load()).Certificates[0]
				leaf, err := x509.CreateCertificate(rand.Reader, c.Leaf, ca.Leaf, c.Leaf.PublicKey, ca.PrivateKey)
				if err != nil {
					w.Fatal(err)
				}
				c.Certificate = [][]byte{leaf}
				w.host.tls.Store(&tls.Config{Certificates: []tls.Certificate{c}})
			},
			"SVID for a web endpoint": func(w world) { w.host.tls.Store(SPIFFETLS(svid(w, authority(w, other), "/bundles"))) },
			"old TLS": func(w world) {
				c := w.host.tls.Load().Clone()
				c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
				w.host.tls.Store(c)
			},
			"SPIFFE ID of another trust domain": func(w world) { w.host.tls.Store(SPIFFETLS(svid(w, authority(w, third), "/bundles"))) },
			"SVID of another authority":         func(w world) { w.host.tls.Store(SPIFFETLS(svid(w, authority(w, other), "/bundles"))) },
			"web certificate for a SPIFFE endpoint": func(w world) {
				w.host.tls.Store(&tls.Config{Certificates: []tls.Certificate{webCert(w, time.Hour, "spiffe.other.org")}})
			},
			"away": func(w world) { w.host.away.Store(true) },
		}[c.name]
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := &network{}
				root := authority(t, other)
				good := bundleOf(5, root)
				server := svid(t, root, "/bundles")
				handler := theirs(t, other, boxed(good))
				cert := webCert(t, 3*time.Hour, "spiffe.other.org")
				config := &tls.Config{Certificates: []tls.Certificate{cert}}
				doc := webDocument(other, "https://spiffe.other.org/bundle", writeFile(t, filepath.Join(t.TempDir(), "ca"), certPEM(cert)))
				if c.profile == "spiffe" {
					config = SPIFFETLS(server)
					doc = spiffeDocument(other, "https://spiffe.other.org/bundle", server.ID, marshal(t, good))
				}
				h := net.serve(t, "spiffe.other.org:443", config, handler)
				elsewhere := net.serve(t, "elsewhere.org:443", config, handler)
				otherPort := net.serve(t, "spiffe.other.org:8443", config, handler)
				clear := net.serve(t, "spiffe.other.org:80", nil, handler)
				f := follow(t, stateDir(t), net.dial)
				f.Set([]segment.TrustDomain{doc})
				synctest.Wait()
				if b, _ := f.told(); !b[other].Equal(good) {
					t.Fatalf("%+v", f.Status())
				}
				since := f.of(t, other).LastSuccess

				if c.name == "wrong SPIFFE ID" {
					h.tls.Store(SPIFFETLS(svid(t, root, "/bundlez")))
				} else {
					attack(world{t, h, handler, net})
				}
				time.Sleep(6 * time.Minute)
				synctest.Wait()
				s := f.of(t, other)
				if b, changed := f.told(); changed || s.Roots != 1 || s.Sequence != 5 {
					t.Errorf("changed to %v: %+v", b, s)
				}
				if !strings.Contains(s.Error, c.want) || s.LastSuccess.After(since.Add(3*time.Hour)) {
					t.Errorf("%+v, want %s", s, c.want)
				}
				if len(s.Error) > 500 {
					t.Errorf("%d bytes of error", len(s.Error))
				}
				if n := poured.Load(); n > 2*segment.MaxBundle*h.asked.Load() {
					t.Errorf("%d bytes were taken", n)
				}
				if elsewhere.asked.Load()+otherPort.asked.Load()+clear.asked.Load() > 0 {
					t.Error("it was led away")
				}

				// And when all is well again, so are we.
				h.away.Store(false)
				h.handle(theirs(t, other, boxed(bundleOf(6, root))))
				if c.profile == "" {
					h.tls.Store(config)
					time.Sleep(11 * time.Minute)
					synctest.Wait()
					if s := f.of(t, other); s.Error != "" || s.Sequence != 6 {
						t.Errorf("afterwards: %+v", s)
					}
				}
			})
		})
	}
}

// An empty bundle revokes all keys that there were (SPIFFE Trust Domain and Bundle, 4.1.3), until there are others.
func TestRevokesAllKeys(t *testing.T) {
	for name, empty := range map[string]string{
		"no keys":         `{"keys": [], "spiffe_sequence": 9}`,
		"not numbered":    `{"keys": []}`,
		"keys for others": `{"keys": [{"kty":"oct","k":"AAAA","use":"jwt-svid","kid":"a"}, {"kty":"new","use":"x509-svid"}, {"kty":"EC","use":"sig"}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var net network
				dir := stateDir(t)
				before, after := authority(t, other), authority(t, other)
				cert := webCert(t, 24*time.Hour, "spiffe.other.org")
				h := net.serve(t, "spiffe.other.org:443", &tls.Config{Certificates: []tls.Certificate{cert}}, theirs(t, other, boxed(bundleOf(5, before))))
				// Whoever is verified by the keys that are revoked is not believed any more either.
				byThem := net.serve(t, "spiffe.third.org:443", SPIFFETLS(svid(t, before, "/bundles")), theirs(t, third, boxed(bundleOf(1, authority(t, third)))))
				doc := webDocument(other, "https://spiffe.other.org/", writeFile(t, filepath.Join(t.TempDir(), "ca"), certPEM(cert)))
				doc.Bundle = marshal(t, bundleOf(1, before))
				docs := []segment.TrustDomain{doc, spiffeDocument(third, "https://spiffe.third.org/", spiffeid.RequireFromPath(other, "/bundles"), "")}
				f := follow(t, dir, net.dial)
				f.Set(docs)
				synctest.Wait()
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if b, _ := f.told(); !b[other].Equal(bundleOf(5, before)) || b[third] == nil {
					t.Fatalf("%+v", f.Status())
				}

				h.handle(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, empty) }))
				time.Sleep(6 * time.Minute)
				synctest.Wait()
				if b, changed := f.told(); !changed || b[other] != nil {
					t.Errorf("changed %t: %v", changed, b)
				}
				if s := f.of(t, other); s.Roots+s.JWTKeys != 0 || s.Error != "" || time.Since(s.LastSuccess) > 6*time.Minute {
					t.Errorf("%+v", s)
				}
				asked := byThem.asked.Load()
				time.Sleep(6 * time.Minute)
				synctest.Wait()
				if s := f.of(t, third); byThem.asked.Load() > asked || s.Error == "" {
					t.Errorf("asked %d times more: %+v", byThem.asked.Load()-asked, s)
				}
				f.end()

				// Over a restart, too, whatever the document began with, and nobody can bring the keys from before back.
				h.away.Store(true)
				f = follow(t, dir, net.dial)
				f.Set(docs)
				synctest.Wait()
				if b, changed := f.told(); b[other] != nil {
					t.Errorf("after a restart, changed %t: %v", changed, b)
				}
				h.handle(theirs(t, other, boxed(bundleOf(4, before))))
				h.away.Store(false)
				time.Sleep(11 * time.Minute)
				synctest.Wait()
				if s := f.of(t, other); s.Roots != 0 || !strings.Contains(s.Error, "goes back") {
					t.Errorf("%+v", s)
				}
				h.handle(theirs(t, other, boxed(bundleOf(10, after))))
				time.Sleep(11 * time.Minute)
				synctest.Wait()
				if b, _ := f.told(); !b[other].Equal(bundleOf(10, after)) {
					t.Errorf("with new keys: %+v", f.Status())
				}
			})
		})
	}
}

// Nobody writes a bundle without keys into a document but by mistake.
func TestEmptyInitialBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		doc := webDocument(other, "https://spiffe.other.org/", "")
		doc.Bundle = `{"keys": []}`
		f := follow(t, stateDir(t), net.dial)
		f.Set([]segment.TrustDomain{doc})
		synctest.Wait()
		if s := f.of(t, other); !strings.Contains(s.Error, "there is no key in it") {
			t.Errorf("%+v", s)
		}
	})
}

// A redirect within the host is followed, each time anew (SPIFFE Federation, 5.2.1.4).
func TestFollowsRedirectWithinHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		root := authority(t, other)
		server := svid(t, root, "/bundles")
		mux := http.NewServeMux()
		mux.Handle("/moved", theirs(t, other, boxed(bundleOf(1, root))))
		mux.Handle("/", http.RedirectHandler("/moved", http.StatusMovedPermanently))
		h := net.serve(t, "spiffe.other.org:8443", SPIFFETLS(server), mux)
		f := follow(t, stateDir(t), net.dial)
		f.Set([]segment.TrustDomain{spiffeDocument(other, "https://spiffe.other.org:8443/old", server.ID, marshal(t, bundleOf(1, root)))})
		synctest.Wait()
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if s := f.of(t, other); s.Error != "" || h.asked.Load() != 4 {
			t.Errorf("asked %d times: %+v", h.asked.Load(), s)
		}
	})
}

func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		dir := stateDir(t)
		before, after := authority(t, other), authority(t, other)
		published := boxed(bundleOf(8, after))
		server := svid(t, before, "/bundles")
		h := net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, other, published))
		docs := []segment.TrustDomain{spiffeDocument(other, "https://spiffe.other.org/", server.ID, marshal(t, bundleOf(1, before)))}
		f := follow(t, dir, net.dial)
		f.Set(docs)
		synctest.Wait()
		since := f.of(t, other).LastSuccess
		f.end()

		// The other side is away. What is known is what was fetched, not what the document began with.
		h.away.Store(true)
		time.Sleep(time.Hour)
		f = follow(t, dir, net.dial)
		f.Set(docs)
		synctest.Wait()
		if b, _ := f.told(); !b[other].Equal(bundleOf(8, after)) {
			t.Fatalf("%+v", f.Status())
		}
		if s := f.of(t, other); s.Error == "" || !s.LastSuccess.Equal(since) {
			t.Errorf("%+v", s)
		}

		// It comes back with a bundle from before, and the number is remembered, too.
		h.away.Store(false)
		h.tls.Store(SPIFFETLS(svid(t, after, "/bundles")))
		published.Store(bundleOf(7, before))
		time.Sleep(time.Hour)
		synctest.Wait()
		if s := f.of(t, other); !strings.Contains(s.Error, "goes back from 8 to 7") {
			t.Errorf("%+v", s)
		}
		f.end()

		// Another endpoint counts in its own way.
		docs[0].Endpoint.URL += "moved"
		f = follow(t, dir, net.dial)
		f.Set(docs)
		synctest.Wait()
		if s := f.of(t, other); s.Error != "" || s.Sequence != 7 {
			t.Errorf("%+v", s)
		}
		f.end()

		for path, want := range map[string]os.FileMode{dir: 0o700, f.engine.folder.path(other.Name()): 0o600} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v, %v", path, info, err)
			}
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
			t.Errorf("left behind: %v, %v", files, err)
		}
	})
}

// Somebody edits the document because the bundle in it is the latest (SPIFFE Federation, 4.2).
func TestInitialBundleIsEdited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		dir := stateDir(t)
		lost, found := authority(t, other), authority(t, other)
		server := svid(t, found, "/bundles")
		net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, other, boxed(bundleOf(2, found))))
		file := writeFile(t, filepath.Join(t.TempDir(), "bundle.json"), []byte(marshal(t, bundleOf(9, lost))))
		doc := spiffeDocument(other, "https://spiffe.other.org/", server.ID, "")
		doc.BundleFile = file
		f := follow(t, dir, net.dial)
		f.Set([]segment.TrustDomain{doc})
		synctest.Wait()
		if b, _ := f.told(); !b[other].Equal(bundleOf(9, lost)) || !strings.Contains(f.of(t, other).Error, "unknown authority") {
			t.Fatalf("%+v", f.Status())
		}
		writeFile(t, file, []byte("{"))
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, changed := f.told(); changed || !strings.Contains(f.of(t, other).Error, "initial bundle") {
			t.Errorf("%+v", f.Status())
		}
		writeFile(t, file, []byte(marshal(t, bundleOf(1, found))))
		time.Sleep(maxRetry)
		synctest.Wait()
		if s := f.of(t, other); s.Error != "" || s.Sequence != 2 {
			t.Errorf("%+v", s)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if s := f.of(t, other); s.Roots != 1 || !strings.Contains(s.Error, "no such file") || time.Since(s.LastSuccess) > 10*time.Minute {
			t.Errorf("%+v", s)
		}
	})
}

// The document names another endpoint while the first is being asked. It may count in another way.
func TestEndpointIsChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		root := authority(t, other)
		server := svid(t, root, "/bundles")
		published := boxed(bundleOf(9, root))
		h := net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, other, published))
		doc := spiffeDocument(other, "https://spiffe.other.org/", server.ID, marshal(t, bundleOf(1, root)))
		f := follow(t, stateDir(t), net.dial)
		f.Set([]segment.TrustDomain{doc})
		synctest.Wait()
		good := *h.handler.Load()
		h.handle(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/new" {
				good.ServeHTTP(w, r)
			} else {
				<-r.Context().Done()
			}
		}))
		time.Sleep(5*time.Minute + time.Second)
		synctest.Wait()
		published.Store(bundleOf(3, root, authority(t, other)))
		doc.Endpoint.URL += "new"
		f.Set([]segment.TrustDomain{doc})
		synctest.Wait()
		if s := f.of(t, other); s.Error != "" || s.Sequence != 3 || !s.LastSuccess.Equal(time.Now()) {
			t.Errorf("%+v", s)
		}
	})
}

func TestRemovedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		dir := stateDir(t)
		root := authority(t, other)
		server := svid(t, root, "/bundles")
		h := net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, other, boxed(bundleOf(1, root))))
		docs := []segment.TrustDomain{spiffeDocument(other, "https://spiffe.other.org/", server.ID, marshal(t, bundleOf(1, root)))}
		f := follow(t, dir, net.dial)
		f.Set(docs)
		synctest.Wait()
		// In the middle of a fetch that will never end.
		h.handle(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		time.Sleep(5*time.Minute + time.Second)
		synctest.Wait()
		f.told()
		now := time.Now()
		f.Set(nil)
		synctest.Wait()
		if b, ok := f.told(); !ok || len(b) != 0 || len(f.Status()) != 0 || !time.Now().Equal(now) {
			t.Errorf("%v %v after %s", b, f.Status(), time.Since(now))
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
			t.Errorf("left behind: %v, %v", files, err)
		}
		f.end()

		// The same while nobody ran.
		h.handle(theirs(t, other, boxed(bundleOf(1, root))))
		f = follow(t, dir, net.dial)
		f.Set(docs)
		synctest.Wait()
		f.end()
		f = follow(t, dir, net.dial)
		f.Set(nil)
		synctest.Wait()
		if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
			t.Errorf("left behind: %v, %v", files, err)
		}
	})
}

// third.org's bundle is served by other.org, whose own is fetched from the web, and ours.org serves a fourth.
func TestChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		a, b, us := authority(t, other), authority(t, third), authority(t, ours)
		fourth := spiffeid.RequireTrustDomainFromString("fourth.org")
		server := svid(t, a, "/bundles")
		cert := webCert(t, 100*time.Hour, "www.other.org")
		net.serve(t, "www.other.org:443", &tls.Config{Certificates: []tls.Certificate{cert}}, theirs(t, other, boxed(bundleOf(0, a))))
		net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, third, boxed(bundleOf(0, b))))
		mirror := svid(t, us, "/mirror")
		net.serve(t, "mirror:443", SPIFFETLS(mirror), theirs(t, fourth, boxed(bundleOf(0, authority(t, fourth)))))
		f := follow(t, stateDir(t), net.dial)
		byOther := spiffeDocument(third, "https://spiffe.other.org/", server.ID, "")
		f.Set([]segment.TrustDomain{byOther, spiffeDocument(fourth, "https://mirror/", mirror.ID, "")})
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, ok := f.told(); ok || !strings.Contains(f.of(t, third).Error, "no bundle of its trust domain yet") {
			t.Fatalf("%+v", f.Status())
		}
		now := time.Now()
		f.own.Store(bundleOf(0, us))
		f.Set([]segment.TrustDomain{byOther, spiffeDocument(fourth, "https://mirror/again", mirror.ID, ""),
			webDocument(other, "https://www.other.org/", writeFile(t, filepath.Join(t.TempDir(), "ca"), certPEM(cert)))})
		synctest.Wait()
		if got, _ := f.told(); !got[other].Equal(bundleOf(0, a)) || !got[third].Equal(bundleOf(0, b)) || got[fourth] == nil || !time.Now().Equal(now) {
			t.Errorf("%+v", f.Status())
		}
	})
}

func TestNobodySpeaksForUs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		root := authority(t, ours)
		server := svid(t, root, "/bundles")
		h := net.serve(t, "spiffe.example.org:443", SPIFFETLS(server), theirs(t, ours, boxed(bundleOf(1, root))))
		f := follow(t, stateDir(t), net.dial)
		f.Set([]segment.TrustDomain{spiffeDocument(ours, "https://spiffe.example.org/", server.ID, marshal(t, bundleOf(1, root))), {}})
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, ok := f.told(); ok || len(f.Status()) != 0 || h.asked.Load() != 0 {
			t.Errorf("%+v", f.Status())
		}
	})
}

// Many endpoints that never answer delay the others, and stop nobody.
func TestManySilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var net network
		root := authority(t, other)
		server := svid(t, root, "/bundles")
		net.serve(t, "spiffe.other.org:443", SPIFFETLS(server), theirs(t, other, boxed(bundleOf(3, root))))
		net.hosts["silent:443"] = &host{} // nobody ever accepts
		var docs []segment.TrustDomain
		for i := range 3 * maxFetches {
			td := spiffeid.RequireTrustDomainFromString(fmt.Sprintf("a%02d.org", i))
			docs = append(docs, webDocument(td, "https://silent/", ""))
		}
		f := follow(t, stateDir(t), net.dial)
		f.Set(append(docs, spiffeDocument(other, "https://spiffe.other.org/", server.ID, marshal(t, bundleOf(1, root)))))
		time.Sleep(4*fetchTime + time.Minute)
		synctest.Wait()
		if s := f.of(t, other); s.Sequence != 3 {
			t.Errorf("%+v", s)
		}
	})
}

func TestDoubtfulFolder(t *testing.T) {
	dir := stateDir(t)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that is open to others: %v", err)
	}

	f, err := New(Config{Dir: stateDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	good := bundleOf(3, authority(t, other))
	save := func(b *spiffebundle.Bundle) error {
		return (&domain{Follower: f, bundle: b}).keep(segment.TrustDomain{Domain: b.TrustDomain()}, time.Now())
	}
	path := f.engine.folder.path(other.Name())
	for name, spoil := range map[string]func(text []byte) error{
		"torn": func(text []byte) error { return os.WriteFile(path, text[:len(text)/2], 0o600) },
		"open": func([]byte) error { return os.Chmod(path, 0o644) },
		"link": func([]byte) error { return errors.Join(os.Symlink("/dev/zero", path+"x"), os.Rename(path+"x", path)) },
		"theirs": func([]byte) error {
			return errors.Join(save(bundleOf(1, authority(t, third))), os.Rename(f.engine.folder.path(third.Name()), path))
		},
		"moved": func(text []byte) error {
			return os.WriteFile(path, []byte(strings.Replace(string(text), `"other.org"`, `"third.org"`, 1)), 0o600)
		},
		"bundle without a word of keys": func(text []byte) error {
			var r map[string]json.RawMessage
			if err := json.Unmarshal(text, &r); err != nil {
				return err
			}
			r["bundle"] = json.RawMessage(`{"keys":null}`)
			text, err := json.Marshal(r)
			if err != nil {
				return err
			}
			return os.WriteFile(path, text, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := save(good); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			d := &domain{Follower: f}
			if err := d.load(other); err != nil || !d.bundle.Equal(good) {
				t.Fatal(d.bundle, err)
			}
			if err := spoil(text); err != nil {
				t.Fatal(err)
			}
			d = &domain{Follower: f}
			if err := d.load(other); err == nil || d.bundle != nil {
				t.Errorf("loaded %+v", d)
			}
		})
	}
	d := &domain{Follower: f}
	if err := d.load(third); err != nil || d.bundle != nil {
		t.Error(d, err)
	}
}

func TestTimes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		failures, chance := rapid.IntRange(1, 1<<40).Draw(t, "failures"), rapid.Float64Range(0, 1).Draw(t, "chance")
		if wait := retryAfter(failures, chance); wait < minRetry/2 || wait > maxRetry || retryAfter(failures+1, chance) < wait {
			t.Errorf("after %d failures: %s", failures, wait)
		}
		b := spiffebundle.New(other)
		if rapid.Bool().Draw(t, "hinted") {
			b.SetRefreshHint(time.Duration(rapid.Int64().Draw(t, "hint")))
		}
		hint, _ := b.RefreshHint()
		if wait := refreshAfter(0, hint); wait < minRefresh || wait > maxRefresh {
			t.Errorf("refresh after %s", wait)
		}
	})
	if wait := refreshAfter(0, 0); wait != 5*time.Minute {
		t.Errorf("without a hint: %s", wait)
	}
	if wait := refreshAfter(2*time.Minute, time.Hour); wait != 2*time.Minute {
		t.Errorf("against the document: %s", wait)
	}
}

// The lowest layer does not even try what no document may say.
func TestFetchRefuses(t *testing.T) {
	for _, e := range []segment.BundleEndpoint{
		{URL: "http://other.org/", Profile: segment.HTTPSWeb},
		{URL: "https://a:b@other.org/", Profile: segment.HTTPSWeb},
		{URL: "https://other.org/"},
		{URL: "https://other.org/", Profile: segment.HTTPSSPIFFE},
		{URL: "https://other.org/", Profile: segment.HTTPSSPIFFE, ID: spiffeid.RequireFromPath(other, "/x")},
		{URL: "https://other.org/", Profile: segment.HTTPSWeb, CAFile: "/dev/zero"},
		{URL: "https://other.org/", Profile: segment.HTTPSWeb, CAFile: "/nowhere"},
		{URL: "::", Profile: segment.HTTPSWeb},
	} {
		f := fetcher{dial: func(context.Context, string, string) (netConn, error) {
			t.Errorf("%+v was dialled", e)
			return nil, os.ErrInvalid
		}}
		if _, err := f.bundle(t.Context(), segment.TrustDomain{Domain: other, Endpoint: e}, nil); err == nil {
			t.Errorf("%+v: no error", e)
		}
	}
}
