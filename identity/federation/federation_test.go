package federation

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	client "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	identityissuer "sallyport.dev/identity/issuer"
	"sallyport.dev/identity/workloadapi"
	"sallyport.dev/segment"
)

func handler(t testing.TB, c HandlerConfig) http.Handler {
	t.Helper()
	h, err := NewHandler(c)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// watcher is go-spiffe's client side, which asks again at once.
type watcher struct {
	t    testing.TB
	news chan *spiffebundle.Bundle
}

func (watcher) NextRefresh(time.Duration) time.Duration { return 10 * time.Millisecond }
func (w watcher) OnUpdate(b *spiffebundle.Bundle)       { w.news <- b }
func (w watcher) OnError(err error)                     { w.t.Error(err) }

// go-spiffe's client fetches from us by both profiles, and sees a rotation.
func TestServesGoSPIFFE(t *testing.T) {
	before, after := authority(t, ours), authority(t, ours)
	server := svid(t, before, "/controlplane")
	cert := webCert(t, time.Hour)
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	dir := t.TempDir()
	web, err := WebTLS(writeFile(t, filepath.Join(dir, "cert"), certPEM(cert)), writeFile(t, filepath.Join(dir, "key"), keyPEM(t, cert.PrivateKey)), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		tls  *tls.Config
		auth gospiffe.FetchOption
	}{
		"https_web":    {web, gospiffe.WithWebPKIRoots(roots)},
		"https_spiffe": {SPIFFETLS(server), gospiffe.WithSPIFFEAuth(bundleOf(0, before), server.ID)},
	} {
		t.Run(name, func(t *testing.T) {
			own := bundleOf(0, before)
			for _, id := range []string{"b", "a"} {
				if err := own.AddJWTAuthority(id, newKey(t).Public()); err != nil {
					t.Fatal(err)
				}
			}
			source := boxed(own)
			s := listen(t, c.tls, handler(t, HandlerConfig{Bundle: source.Load}))
			got, err := gospiffe.FetchBundle(t.Context(), ours, s.URL, c.auth)
			if err != nil {
				t.Fatal(err)
			}
			hint, _ := got.RefreshHint()
			first, numbered := got.SequenceNumber()
			if !sameKeys(got, own) || hint != 5*time.Minute || !numbered {
				t.Errorf("%v, hint %s, number %d", got, hint, first)
			}

			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			w := watcher{t, make(chan *spiffebundle.Bundle, 10)}
			watched := make(chan error, 1)
			go func() { watched <- gospiffe.WatchBundle(ctx, ours, s.URL+"/", w, c.auth) }()
			if b := <-w.news; !b.Equal(got) {
				t.Error("another bundle at the second look")
			}
			source.Store(bundleOf(0, before, after))
			select {
			case b := <-w.news:
				if next, _ := b.SequenceNumber(); len(b.X509Authorities()) != 2 || next <= first {
					t.Errorf("after %d: %d, %d roots", first, next, len(b.X509Authorities()))
				}
			case <-ctx.Done():
				t.Error("the rotation was not seen")
			}
			cancel()
			if err := <-watched; err == nil {
				t.Error("watching ended without a reason")
			}
		})
	}
}

func TestBundleEndpoint(t *testing.T) {
	source := boxed(nil)
	h := handler(t, HandlerConfig{Bundle: source.Load, RefreshHint: time.Hour})
	do := func(method, path string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, strings.NewReader("x"))
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	status := func(want int, r *httptest.ResponseRecorder) *httptest.ResponseRecorder {
		t.Helper()
		if r.Code != want {
			t.Errorf("status %d, want %d", r.Code, want)
		}
		return r
	}
	status(503, do("GET", "/"))
	source.Store(spiffebundle.New(ours))
	if r := status(503, do("GET", "/")); r.Header().Get("Retry-After") == "" { // never "all keys are revoked" by mistake
		t.Error("no Retry-After")
	}
	source.Store(bundleOf(3, authority(t, ours)))
	r := status(200, do("GET", "/"))
	body := r.Body.Bytes()
	if b, err := segment.ParseBundle(ours, body); err != nil || !sameKeys(b, source.Load()) || !strings.Contains(string(body), `"spiffe_sequence":3,"spiffe_refresh_hint":3600`) {
		t.Errorf("%s: %v", body, err)
	}
	if strings.Contains(string(body), `"kid"`) {
		t.Error("an X.509 authority has a kid") // X509-SVID, 6.1
	}
	if r.Header().Get("Content-Type") != "application/json" {
		t.Errorf("header %v", r.Header())
	}
	tag := r.Header().Get("ETag")
	status(304, do("GET", "/", "If-None-Match", tag))
	r = status(200, do("HEAD", "/"))
	if r.Body.Len() != 0 {
		t.Error("HEAD has a body")
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
		if r := status(405, do(method, "/")); r.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: allow %q", method, r.Header().Get("Allow"))
		}
	}
	for _, path := range []string{"/x", "/keys", "/.well-known/openid-configuration"} {
		status(404, do("GET", path))
	}
	source.Store(bundleOf(4, authority(t, ours)))
	r = status(200, do("GET", "/", "If-None-Match", tag))
	if r.Header().Get("ETag") == tag {
		t.Error("the same tag for another bundle")
	}
	// Whoever asks can't keep the answer from being the present one.
	source.Store(nil)
	status(503, do("GET", "/", "If-None-Match", r.Header().Get("ETag")))
}

// The number grows with each change, also over a restart, whether or not the bundle has numbers of its own.
func TestSequence(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	roots := bundleOf(0, authority(t, ours))
	encode := func(n *numbered, own uint64) uint64 {
		t.Helper()
		b := roots.Clone()
		if own > 0 {
			b.SetSequenceNumber(own)
		}
		document, err := n.document(b)
		if err != nil {
			t.Fatal(err)
		}
		got, err := segment.ParseBundle(ours, document)
		if err != nil {
			t.Fatal(err)
		}
		sequence, _ := got.SequenceNumber()
		return sequence
	}
	var last uint64
	grows := func(sequence uint64) {
		t.Helper()
		if sequence <= last {
			t.Errorf("%d after %d", sequence, last)
		}
		last = sequence
	}
	n := &numbered{hint: time.Minute, now: func() time.Time { return now }}
	grows(encode(n, 0))
	grows(encode(n, 0)) // within a second
	now = now.Add(-time.Hour)
	grows(encode(n, 0)) // the clock was set back
	now = now.Add(2 * time.Hour)
	grows(encode(&numbered{hint: time.Minute, now: n.now}, 0)) // a restart
	if got := encode(&numbered{hint: time.Minute, now: n.now}, 7); got != 7 {
		t.Errorf("its own number is 7, and it is served with %d", got)
	}
	n = &numbered{hint: time.Minute, now: n.now}
	last = 0
	grows(encode(n, 7))
	grows(encode(n, 6))
}

// A relying party that knows nothing of SPIFFE verifies JWT-SVIDs.
func TestOpenIDConnect(t *testing.T) {
	key := newKey(t)
	big, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	own := bundleOf(1, authority(t, ours))
	if err := own.AddJWTAuthority("small", key.Public()); err != nil {
		t.Fatal(err)
	}
	if err := own.AddJWTAuthority("big", big.Public()); err != nil {
		t.Fatal(err)
	}
	token := func(issuer, kid string, alg jose.SignatureAlgorithm, key *ecdsa.PrivateKey) string {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		text, err := jwt.Signed(signer).Claims(jwt.Claims{Issuer: issuer, Subject: "spiffe://example.org/app", Audience: jwt.Audience{"cloud"},
			Expiry: jwt.NewNumericDate(time.Now().Add(time.Minute)), IssuedAt: jwt.NewNumericDate(time.Now())}).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for _, path := range []string{"", "/tenant/a"} {
		t.Run(path, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			issuer := "https://" + l.Addr().String() + path
			s := httptest.NewUnstartedServer(handler(t, HandlerConfig{Bundle: boxed(own).Load, Issuer: issuer}))
			s.Listener.Close()
			s.Listener = l
			s.StartTLS()
			defer s.Close()
			ctx := oidc.ClientContext(t.Context(), s.Client())
			provider, err := oidc.NewProvider(ctx, issuer)
			if err != nil {
				t.Fatal(err)
			}
			verifier := provider.Verifier(&oidc.Config{ClientID: "cloud"})
			for _, good := range []string{token(issuer, "small", jose.ES256, key), token(issuer, "big", jose.ES384, big)} {
				if id, err := verifier.Verify(ctx, good); err != nil || id.Subject != "spiffe://example.org/app" {
					t.Errorf("%v, %v", id, err)
				}
			}
			for name, bad := range map[string]string{
				"another key": token(issuer, "small", jose.ES256, newKey(t)), "another issuer": token(issuer+"/", "small", jose.ES256, key),
			} {
				if _, err := verifier.Verify(ctx, bad); err == nil {
					t.Errorf("%s: verified", name)
				}
			}
			r, err := s.Client().Get(issuer + "/keys")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			body, _ := io.ReadAll(r.Body)
			if n := strings.Count(string(body), `"use":"sig"`); n != 2 || strings.Contains(string(body), "x5c") || strings.Contains(string(body), "spiffe") {
				t.Errorf("keys: %s", body)
			}
		})
	}
	for _, issuer := range []string{
		"http://a.org", "https://", "a.org", "https://a.org?x", "https://a.org/#", "https://u@a.org", "https://a.org//x", "https://a.org/../x",
		"https://a.org/{x}", "https://a.org/x y", "https://a.org/%41", "https://a.org/x//", "://",
	} {
		if _, err := NewHandler(HandlerConfig{Bundle: boxed(own).Load, Issuer: issuer}); err == nil {
			t.Errorf("issuer %q is accepted", issuer)
		}
	}
}

// What our Workload API hands out, a relying party verifies by our discovery documents, and by nobody else's.
func TestIssuedTokensVerify(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	issuer := "https://" + l.Addr().String() + "/identity"
	p := identitytest.Start(t, func(s grpc.ServiceRegistrar, i *identityissuer.Issuer) { workloadapi.Register(s, i) })
	p.Certifier.Issuer = issuer
	p.Issuer.Set([]identityissuer.Entry{identitytest.Entry("app", identitytest.Me())})
	s := httptest.NewUnstartedServer(handler(t, HandlerConfig{Bundle: boxed(p.Authorities.Bundle).Load, Issuer: issuer}))
	s.Listener.Close()
	s.Listener = l
	s.StartTLS()
	defer s.Close()

	svid, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "cloud"}, client.WithAddr("unix://"+p.Socket))
	if err != nil {
		t.Fatal(err)
	}
	ctx := oidc.ClientContext(t.Context(), s.Client())
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		t.Fatal(err)
	}
	got, err := provider.Verifier(&oidc.Config{ClientID: "cloud"}).Verify(ctx, svid.Marshal())
	if err != nil || got.Subject != "spiffe://example.org/app" || got.Issuer != issuer {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := provider.Verifier(&oidc.Config{ClientID: "another"}).Verify(ctx, svid.Marshal()); err == nil {
		t.Error("verified for another audience")
	}
	if id, _, err := identity.ValidateJWT(svid.Marshal(), p.Authorities.Bundle, []string{"cloud"}, time.Now()); err != nil || id != svid.ID {
		t.Errorf("as a JWT-SVID: %s, %v", id, err)
	}

	// Two that share the key but not the issuer are not taken for each other.
	others := identityissuer.Local{Issuer: issuer + "/"}
	others.Set(p.Authorities)
	token, err := others.CertifyJWT(t.Context(), identitytest.Entry("app"), []string{"cloud"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := provider.Verifier(&oidc.Config{ClientID: "cloud"}).Verify(ctx, token); err == nil {
		t.Error("another issuer's token verified")
	}
}

func TestWebCertificate(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	if _, err := WebTLS(certFile, keyFile, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("served without a certificate")
	}
	first, second := webCert(t, time.Hour, "a.org"), webCert(t, 2*time.Hour, "a.org")
	writeFile(t, certFile, certPEM(first))
	writeFile(t, keyFile, keyPEM(t, first.PrivateKey))
	w := &webCertificate{certFile: certFile, keyFile: keyFile, log: slog.New(slog.DiscardHandler)}
	if err := w.load(); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	serves := func(step string, want tls.Certificate) {
		t.Helper()
		now = now.Add(lookEvery)
		if got := w.get(now); !got.Leaf.Equal(want.Leaf) {
			t.Errorf("%s: the certificate until %s", step, got.Leaf.NotAfter)
		}
	}
	serves("at first", first)
	writeFile(t, certFile, certPEM(second))
	serves("half renewed", first)
	writeFile(t, keyFile, keyPEM(t, second.PrivateKey))
	if got := w.get(now); !got.Leaf.Equal(first.Leaf) {
		t.Error("looked too soon")
	}
	serves("renewed", second)
	writeFile(t, certFile, []byte("garbage"))
	serves("spoilt", second)
	writeFile(t, certFile, certPEM(first))
	writeFile(t, keyFile, keyPEM(t, first.PrivateKey))
	serves("put right", first)
}

func FuzzParseBundle(f *testing.F) {
	f.Add(`{"keys":[{"use":"x509-svid","kty":"EC","crv":"P-256","x5c":[]}],"spiffe_sequence":1,"spiffe_refresh_hint":` + strconv.Itoa(1<<62) + `}`)
	f.Add(marshal(f, bundleOf(1, authority(f, other))))
	f.Fuzz(func(t *testing.T, document string) {
		b, err := segment.ParseBundle(other, []byte(document))
		if err != nil {
			return
		}
		if len(b.X509Authorities())+len(b.JWTAuthorities()) == 0 || b.TrustDomain() != other {
			t.Errorf("accepted: %q", document)
		}
		if hint, ok := b.RefreshHint(); ok && hint <= 0 {
			t.Errorf("hint %s", hint)
		}
		again, err := segment.ParseBundle(other, []byte(marshal(t, b)))
		if err != nil || !again.Equal(b) {
			t.Errorf("what is kept is not what was read: %v", err)
		}
	})
}
