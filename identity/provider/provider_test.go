package provider_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/provider"
	"sallyport.dev/identity/workloadapi"
)

var (
	_ x509svid.Source   = (*provider.Source)(nil)
	_ x509bundle.Source = (*provider.Source)(nil)

	td = spiffeid.RequireTrustDomainFromString("example.org")
)

// run runs a source on a socket until the test ends.
func run(t *testing.T, socket string) *provider.Source {
	t.Helper()
	s := provider.New(provider.Config{Addr: "unix://" + socket, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// ours serves our own Workload API.
func ours(t *testing.T) (string, *issuer.Issuer) {
	t.Helper()
	return identitytest.Serve(t, func(s grpc.ServiceRegistrar, i *issuer.Issuer) { workloadapi.Register(s, i) })
}

// until waits until what the source has is as wanted, for as long as the test may take.
func until(t *testing.T, s *provider.Source, wanted func([]*x509svid.SVID, *x509bundle.Set) bool) {
	t.Helper()
	for {
		svids, bundles, changed := s.X509()
		if wanted(svids, bundles) {
			return
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatalf("has %d SVIDs", len(svids))
		}
	}
}

func none(svids []*x509svid.SVID, _ *x509bundle.Set) bool { return len(svids) == 0 }

func TestSource(t *testing.T) {
	socket, i := ours(t)
	app, db := identitytest.Entry("app", identitytest.Me()), identitytest.Entry("db", identitytest.Me())
	i.Set([]issuer.Entry{app, db})
	s := run(t, socket)
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	svids, bundles, _ := s.X509()
	if len(svids) != 2 || svids[0].ID != app.ID || svids[1].ID != db.ID {
		t.Fatalf("got %d SVIDs", len(svids))
	}
	first, err := s.GetX509SVID()
	if err != nil || first != svids[0] {
		t.Errorf("default: %v, %v", first, err)
	}
	bundle, err := s.GetX509BundleForTrustDomain(td)
	if err != nil {
		t.Fatal(err)
	}
	if set, err := bundles.GetX509BundleForTrustDomain(td); err != nil || !set.Equal(bundle) {
		t.Errorf("bundles differ: %v", err)
	}
	if _, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.org")); err == nil {
		t.Error("has the bundle of a trust domain that it was not told of")
	}
}

// TestTLS uses a source on both sides of a connection, as a control plane and its agent do.
func TestTLS(t *testing.T) {
	socket, i := ours(t)
	app := identitytest.Entry("app", identitytest.Me())
	i.Set([]issuer.Entry{app})
	s := run(t, socket)
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(s, s, tlsconfig.AuthorizeID(app.ID)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(app.ID)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
}

func TestRotation(t *testing.T) {
	socket, i := ours(t)
	app := identitytest.Entry("app", identitytest.Me())
	i.Set([]issuer.Entry{app})
	s := run(t, socket)
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, _, changed := s.X509()
	app.DNSNames = []string{"app.internal"}
	i.Set([]issuer.Entry{app})
	<-changed
	after, _, _ := s.X509()
	if len(after) != 1 || after[0].Certificates[0].Equal(before[0].Certificates[0]) {
		t.Error("still has the one before")
	}
}

func TestDeniedThenEntitledThenTakenBack(t *testing.T) {
	socket, i := ours(t)
	s := run(t, socket)
	// Wait says why, once there is an answer. How long that takes, nobody knows.
	for code := codes.OK; code != codes.PermissionDenied; {
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		err := s.Wait(short)
		cancel()
		if err == nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		_, err = s.GetX509SVID()
		code = status.Code(err)
	}
	if _, err := s.GetX509SVID(); !strings.Contains(err.Error(), "recognises no workload") || !strings.Contains(err.Error(), socket) {
		t.Errorf("got %v", err)
	}
	if _, err := s.GetX509BundleForTrustDomain(td); err == nil {
		t.Error("has a bundle")
	}
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	i.Set(nil)
	until(t, s, none)
	if _, err := s.GetX509SVID(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("taken back: %v", err)
	}
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// start serves any Workload API on a socket until it is stopped.
func start(t *testing.T, socket string, register func(*grpc.Server)) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(attest.NewCredentials()))
	register(s)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	stop = func() {
		s.Stop() // removes the socket
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return stop
}

func TestProviderAwayAndBackAgain(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	s := run(t, socket) // there is nobody yet
	i := identitytest.Issuer(identitytest.Authority(t), attest.Selectors)
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	stop := start(t, socket, func(g *grpc.Server) { workloadapi.Register(g, i) })
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, _, changed := s.X509()
	stop()
	if now, err := s.GetX509SVID(); err != nil || now != before[0] {
		t.Errorf("while it is away: %v", err)
	}
	// Another authority, as after a restart without a memory: the new bundle replaces the old one.
	a := identitytest.Authority(t)
	i = identitytest.Issuer(a, attest.Selectors)
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	stop = start(t, socket, func(g *grpc.Server) { workloadapi.Register(g, i) })
	defer stop()
	<-changed
	after, err := s.GetX509SVID()
	if err != nil || after == before[0] {
		t.Errorf("back again: %v", err)
	}
	if bundle, err := s.GetX509BundleForTrustDomain(td); err != nil || !bundle.Equal(a.Bundle()) {
		t.Errorf("back again: %v", err)
	}
}

// scripted is a provider that answers each call by the next of its answers.
type scripted struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	answers chan func(grpc.ServerStreamingServer[workload.X509SVIDResponse]) error
}

func (s scripted) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	select {
	case answer := <-s.answers:
		return answer(stream)
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

// response is an SVID with a bundle and what it is federated with.
func response(t *testing.T, a *identity.Authority, bundle *x509bundle.Bundle, ttl time.Duration, federated ...string) *workload.X509SVIDResponse {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(td, "/app")
	template, err := a.SVIDTemplate(identity.Request{ID: id, TTL: ttl}, time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Sign(template, key.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	leaf, der, err := (&x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}).MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	var ca []byte
	for _, c := range bundle.X509Authorities() {
		ca = append(ca, c.Raw...)
	}
	resp := &workload.X509SVIDResponse{
		Svids:            []*workload.X509SVID{{SpiffeId: id.String(), X509Svid: leaf, X509SvidKey: der, Bundle: ca}},
		FederatedBundles: map[string][]byte{},
	}
	for _, other := range federated {
		resp.FederatedBundles[other] = ca
	}
	return resp
}

// TestAnswersOfOthers is a provider that does what ours does not.
func TestAnswersOfOthers(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	p := scripted{answers: make(chan func(grpc.ServerStreamingServer[workload.X509SVIDResponse]) error)}
	defer start(t, socket, func(g *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(g, p) })()
	s := run(t, socket)
	a := identitytest.Authority(t)
	stranger := identitytest.Authority(t)
	send := func(rs ...*workload.X509SVIDResponse) {
		p.answers <- func(stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
			for _, r := range rs {
				if err := stream.Send(r); err != nil {
					return err
				}
			}
			return nil
		}
	}
	fail := func(code codes.Code) {
		p.answers <- func(grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
			return status.Error(code, "scripted")
		}
	}

	fail(codes.Canceled) // ends go-spiffe's watch, but not ours
	fail(codes.Unavailable)
	send(response(t, a, stranger.Bundle(), time.Hour), // not signed by whom it says
		&workload.X509SVIDResponse{},
		&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: "spiffe://example.org/app", X509Svid: []byte("rubbish")}}})
	fail(codes.Internal) // all before has been read
	if svids, bundles, _ := s.X509(); len(svids) != 0 || bundles != nil {
		t.Fatal("took what nobody can use")
	}
	send(response(t, a, a.Bundle(), time.Hour, "other.org"))
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.org")); err != nil {
		t.Error(err)
	}
	held, _ := s.GetX509SVID()
	send(response(t, a, stranger.Bundle(), time.Hour))
	fail(codes.Internal)
	if now, err := s.GetX509SVID(); err != nil || now != held {
		t.Errorf("did not keep what was good: %v", err)
	}
	_, _, changed := s.X509()
	send(response(t, a, a.Bundle(), identity.MinTTL))
	<-changed
	if _, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.org")); err == nil {
		t.Error("kept a federated bundle that was taken back")
	}
	until(t, s, none) // it expires, and nobody brings another
	if svid, err := s.GetX509SVID(); err == nil {
		t.Errorf("gives out an SVID that is valid until %s", svid.Certificates[0].NotAfter)
	}
	if _, err := s.GetX509BundleForTrustDomain(td); err != nil {
		t.Errorf("no longer trusts anybody: %v", err)
	}
}

func TestNoRetryThatCannotHelp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	p := scripted{answers: make(chan func(grpc.ServerStreamingServer[workload.X509SVIDResponse]) error, 1)}
	defer start(t, socket, func(g *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(g, p) })()
	p.answers <- func(grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
		return status.Error(codes.InvalidArgument, "scripted")
	}
	for _, addr := range []string{"unix://" + socket, "ftp://example.org", "unix:relative", "http://127.0.0.1:1"} {
		s := provider.New(provider.Config{Addr: addr, Log: slog.New(slog.DiscardHandler)})
		if err := s.Run(t.Context()); err == nil {
			t.Errorf("%s: no error", addr)
		}
	}
}
