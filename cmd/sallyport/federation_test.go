package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/identity"
	"sallyport.dev/identity/federation"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/segment"
)

// opened is a control plane of the trust domain example.org, in a folder of the test's own, that is not started.
func opened(t *testing.T, f planeFlags) (*plane, error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp") // sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f.documents, f.state, f.poll = filepath.Join(dir, "documents"), filepath.Join(dir, "state"), time.Second
	f.trustDomain, f.svidTTL = "example.org", time.Hour
	if err := os.Mkdir(f.documents, 0o700); err != nil {
		t.Fatal(err)
	}
	options, err := f.identityOptions()
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPlane(t.Context(), f, options, slog.New(slog.DiscardHandler))
	if err == nil {
		t.Cleanup(p.state.close)
	}
	return p, err
}

// running is one that runs until the test ends.
func running(t *testing.T, f planeFlags) *plane {
	t.Helper()
	p, err := opened(t, f)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- p.run(ctx, operator.About{}, func(group *errgroup.Group, ctx, _ context.Context, stopServing func()) error {
			group.Go(func() error {
				<-ctx.Done()
				stopServing()
				return nil
			})
			return nil
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return p
}

// until waits for something to become true.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	late := time.After(20 * time.Second)
	for tick := time.Tick(5 * time.Millisecond); !is(); {
		select {
		case <-tick:
		case <-late:
			t.Fatalf("never %s", what)
		}
	}
}

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

// Others fetch our bundle with go-spiffe, which verifies us by our own X.509-SVID.
func TestBundleEndpointShowsSVID(t *testing.T) {
	p := running(t, planeFlags{federation: federationFlags{endpoint: "127.0.0.1:0", issuer: "https://identity.example.org/a"}})
	url := "https://" + p.bundleListener.Addr().String()
	own := p.bundles.now().Own
	id := spiffeid.RequireFromPath(exampleOrg, "/controlplane")
	got, err := gospiffe.FetchBundle(t.Context(), exampleOrg, url, gospiffe.WithSPIFFEAuth(own, id))
	if err != nil || !got.X509Bundle().Equal(own.X509Bundle()) || !got.JWTBundle().Equal(own.JWTBundle()) || len(got.JWTAuthorities()) == 0 {
		t.Errorf("%v, %v", got, err)
	}
	another := authoritiesOf(t, "example.org").Bundle
	if _, err := gospiffe.FetchBundle(t.Context(), exampleOrg, url, gospiffe.WithSPIFFEAuth(another, id)); err == nil {
		t.Error("verified by another bundle")
	}
	if _, err := p.own.Certificate(); err != nil {
		t.Error(err)
	}
	st := statusOf(t, p)
	if st.BundleProfile != segment.HTTPSSPIFFE || st.OIDCIssuer != "https://identity.example.org/a" {
		t.Errorf("%+v", st.About)
	}
	token, err := p.local.CertifyJWT(t.Context(), issuer.Entry{ID: spiffeid.RequireFromPath(exampleOrg, "/app"), TTL: time.Hour}, []string{"db"})
	if err != nil {
		t.Fatal(err)
	}
	if _, claims, err := identity.ValidateJWT(token, own, []string{"db"}, time.Now()); err != nil || claims["iss"] != "https://identity.example.org/a" {
		t.Errorf("%v, %v", claims, err)
	}
}

// Verifiers of OpenID Connect tokens find what they look for behind a web certificate.
func TestBundleEndpointShowsWebCertificate(t *testing.T) {
	cert, key, roots := webCertificate(t)
	p := running(t, planeFlags{federation: federationFlags{endpoint: "127.0.0.1:0", cert: cert, key: key, issuer: "https://127.0.0.1/a"}})
	address := p.bundleListener.Addr().String()
	got, err := gospiffe.FetchBundle(t.Context(), exampleOrg, "https://"+address, gospiffe.WithWebPKIRoots(roots))
	if err != nil || !got.X509Bundle().Equal(p.bundles.now().Own.X509Bundle()) {
		t.Errorf("%v, %v", got, err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	r, err := (&http.Client{Transport: transport}).Get("https://" + address + "/a/.well-known/openid-configuration")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, _ := io.ReadAll(r.Body)
	if !strings.Contains(string(body), `"issuer": "https://127.0.0.1/a"`) {
		t.Errorf("%d %s", r.StatusCode, body)
	}
}

// What is wrong with the flags is said before anything is made or started.
func TestBundleEndpointFlags(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, c := range map[string]struct {
		flags federationFlags
		code  int
	}{
		"certificate without endpoint": {federationFlags{cert: "a", key: "b"}, exitUsage},
		"issuer without endpoint":      {federationFlags{issuer: "https://a.org"}, exitUsage},
		"certificate without key":      {federationFlags{endpoint: "127.0.0.1:0", cert: "a"}, exitUsage},
		"key without certificate":      {federationFlags{endpoint: "127.0.0.1:0", key: "a"}, exitUsage},
		"issuer without TLS":           {federationFlags{endpoint: "127.0.0.1:0", issuer: "http://a.org"}, exitUsage},
		"no such certificate":          {federationFlags{endpoint: "127.0.0.1:0", cert: "/nowhere", key: "/nowhere"}, exitFailed},
		"no address":                   {federationFlags{endpoint: "nowhere"}, exitFailed},
		"port in use":                  {federationFlags{endpoint: taken.Addr().String()}, exitFailed},
	} {
		_, err := opened(t, planeFlags{federation: c.flags})
		var f *failure
		if !errors.As(err, &f) || f.code != c.code || f.hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A control plane with authorities that nobody trusts any longer gets another identity at once.
func TestOwnSVIDFollowsAuthorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &plane{log: slog.New(slog.DiscardHandler), local: &issuer.Local{}, tokenKeys: newTokenKeys()}
		p.identities = issuer.New(issuer.Config{Certifier: p.local})
		p.options.TrustDomain, p.options.SVIDTTL = exampleOrg, time.Hour
		p.own = p.newOwnSVID()
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.own.Run(ctx) }()
		synctest.Wait()
		if _, err := p.own.Certificate(); err == nil {
			t.Error("an identity by no authority")
		}
		holds := func(step string, by identity.Authorities) *big.Int {
			t.Helper()
			synctest.Wait()
			svid, err := p.own.GetX509SVID()
			if err != nil {
				t.Fatalf("%s: %v", step, err)
			}
			if id, err := identity.Verify(svid.Certificates, by.Bundle, time.Now()); err != nil || id.Path() != "/controlplane" {
				t.Errorf("%s: %s, %v", step, id, err)
			}
			return svid.Certificates[0].SerialNumber
		}
		first, second := authoritiesOf(t, "example.org"), authoritiesOf(t, "example.org")
		p.signs(first)
		serial := holds("with the first", first)
		time.Sleep(20 * time.Minute)
		p.signs(first)
		if holds("a little later", first).Cmp(serial) != 0 {
			t.Error("changed without a reason")
		}
		time.Sleep(20 * time.Minute)
		if holds("behind half its life", first).Cmp(serial) == 0 {
			t.Error("not renewed")
		}
		p.signs(second)
		holds("with the second", second)
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A trust domain is trusted for as long as there is a document of it.
func TestTrustDomainGoes(t *testing.T) {
	p := running(t, planeFlags{})
	other := spiffeid.RequireTrustDomainFromString("other.org")
	bundle, err := authoritiesOf(t, "other.org").Bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(string(bundle))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(p.planeFlags.documents, "other.yaml")
	document := fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: TrustDomain
metadata: {name: other}
spec:
  trustDomain: other.org
  bundleEndpoint: {url: "https://127.0.0.1:1", profile: https_spiffe, endpointSPIFFEID: "spiffe://other.org/controlplane"}
  bundle: %s
`, text)
	if err := os.WriteFile(path, []byte(document), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "trusted", func() bool { return p.bundles.now().Federated[other] != nil })
	digest := p.pipeline.State().Generation.Digest
	until(t, "asked for", func() bool {
		st := statusOf(t, p)
		return len(st.Federation) == 1 && st.Federation[0].Error != ""
	})
	var shown bytes.Buffer
	if err := writeStatus(&shown, statusOf(t, p)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"federated other.org", "1 root, 1 JWT key, never fetched, next ", "failed: ", "connection refused"} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("no %q in\n%s", want, &shown)
		}
	}
	for _, missing := range []string{"callers", "identities", "agents", "gateways", "bundle", "issuer"} {
		if strings.Contains(shown.String(), "\n"+missing+" ") {
			t.Errorf("there are no %s in\n%s", missing, &shown)
		}
	}

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	until(t, "dropped", func() bool { return len(p.bundles.now().Federated) == 0 })
	if p.pipeline.State().Generation.Digest == digest {
		t.Error("the generation is the same without it")
	}
	if left, err := os.ReadDir(filepath.Join(p.state.dir, "federation")); err != nil || len(left) > 0 {
		t.Errorf("left on the disk: %v, %v", left, err)
	}
}

func TestWriteStatus(t *testing.T) {
	st := operator.Status{About: operator.About{Listen: "a:1", Workload: "/w", AgentListen: "a:2", GatewayListen: "a:3",
		BundleEndpoint: "a:4", BundleProfile: segment.HTTPSSPIFFE, OIDCIssuer: "https://a.org"},
		Federation: []federation.Status{{TrustDomain: "revoked.org", LastSuccess: time.Now(), Next: time.Now()}}}
	var shown bytes.Buffer
	if err := writeStatus(&shown, st); err != nil {
		t.Fatal(err)
	}
	fields := strings.Join(strings.Fields(shown.String()), " ")
	for _, want := range []string{"callers https on a:1 identities unix:///w agents mTLS on a:2 gateways mTLS on a:3 bundle https on a:4, https_spiffe issuer https://a.org",
		"federated revoked.org nobody is trusted, fetched "} {
		if !strings.Contains(fields, want) {
			t.Errorf("no %q in\n%s", want, &shown)
		}
	}
}

// Strangers do not make us hold more connections than that.
func TestBundleServerIsBounded(t *testing.T) {
	h, err := federation.NewHandler(federation.HandlerConfig{Bundle: func() *spiffebundle.Bundle { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	s := bundleServer(h, &tls.Config{}, slog.New(slog.DiscardHandler))
	state := func(to http.ConnState) (closed bool) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		defer ours.Close()
		s.ConnState(ours, to)
		_ = ours.SetDeadline(time.Now())
		_, err := ours.Write([]byte{0})
		return errors.Is(err, io.ErrClosedPipe)
	}
	for range maxBundleConnections {
		if state(http.StateNew) {
			t.Fatal("closed too soon")
		}
	}
	if !state(http.StateNew) {
		t.Error("one too many is open")
	}
	state(http.StateClosed)
	state(http.StateClosed)
	if state(http.StateNew) {
		t.Error("closed although another has gone")
	}
}

// authoritiesOf are new ones of a trust domain.
func authoritiesOf(t *testing.T, domain string) identity.Authorities {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(domain)
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	template, err := identity.CATemplate(td, 24*time.Hour, time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var a identity.Authorities
	if a.X509, err = identity.SelfSign(template, key()); err != nil {
		t.Fatal(err)
	}
	if a.JWT, err = identity.NewJWTAuthority(td, "first", key(), time.Now().Add(24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	a.Bundle = spiffebundle.FromX509Bundle(a.X509.Bundle())
	a.Bundle.SetJWTAuthorities(a.JWT.Bundle().JWTAuthorities())
	return a
}

func statusOf(t *testing.T, p *plane) (st operator.Status) {
	t.Helper()
	client := operator.NewClient(operatorSocket(p.state.dir))
	if err := client.Get(t.Context(), "/status", nil, &st); err != nil {
		t.Fatal(err)
	}
	return st
}

// webCertificate writes a certificate for 127.0.0.1 that signs itself.
func webCertificate(t *testing.T) (cert, key string, roots *x509.CertPool) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	roots = x509.NewCertPool()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(c)
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", pkcs8), roots
}
