package sds_test

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/sds"
	"sallyport.dev/segment"
)

// When an authority is distrusted, every open stream is sent another certificate with the authorities that are left, in one
// response.
func TestDistrustReachesStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 20
		first, second := identitytest.Authority(t), identitytest.Authority(t)
		local := &issuer.Local{}
		i := issuer.New(issuer.Config{Certifier: local, Attest: func(context.Context, []string) ([]segment.Selector, error) {
			return []segment.Selector{identitytest.Me()}, nil
		}})
		signs := func(a *identity.Authority, trusted ...*identity.Authority) {
			bundle := spiffebundle.New(a.TrustDomain())
			for _, one := range trusted {
				bundle.AddX509Authority(one.Root())
			}
			i.SetBundles(issuer.Bundles{Own: bundle})
			local.Set(identity.Authorities{X509: a, Bundle: bundle})
		}
		signs(first, first)
		i.Set(entries())
		l := bufconn.Listen(1 << 20)
		server := grpc.NewServer()
		sds.Register(server, i, slog.Default())
		go func() { _ = server.Serve(l) }()
		cc, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var sent [streams]chan *discovery.DiscoveryResponse
		for n := range sent {
			sent[n] = make(chan *discovery.DiscoveryResponse, 10)
			stream, err := secretservice.NewSecretDiscoveryServiceClient(cc).StreamSecrets(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}, TypeUrl: typeURL}); err != nil {
				t.Fatal(err)
			}
			go func() {
				for {
					resp, err := stream.Recv()
					if err != nil {
						return
					}
					sent[n] <- resp
				}
			}()
		}
		// check wants one response on each stream, and a certificate in it if it is below an authority.
		check := func(what string, below *identity.Authority, roots int) {
			t.Helper()
			synctest.Wait() // no time passes
			for n := range sent {
				if len(sent[n]) != 1 {
					t.Fatalf("%s: %d responses", what, len(sent[n]))
				}
				var svid *x509svid.SVID
				var trusted *x509bundle.Bundle
				var err error
				for _, packed := range (<-sent[n]).Resources {
					switch v := unpack(t, packed).Type.(type) {
					case *tls.Secret_TlsCertificate:
						svid, err = x509svid.Parse(v.TlsCertificate.CertificateChain.GetInlineBytes(), v.TlsCertificate.PrivateKey.GetInlineBytes())
					case *tls.Secret_ValidationContext:
						trusted, err = x509bundle.Parse(first.TrustDomain(), v.ValidationContext.TrustedCa.GetInlineBytes())
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if trusted == nil || len(trusted.X509Authorities()) != roots || (svid != nil) != (below != nil) {
					t.Fatalf("%s: got %v, %v", what, svid, trusted)
				}
				if below == nil {
					continue
				}
				for _, b := range []*x509bundle.Bundle{below.Bundle(), trusted} {
					if _, err := identity.Verify(svid.Certificates, b, time.Now()); err != nil {
						t.Errorf("%s: %v", what, err)
					}
				}
			}
		}
		check("at first", first, 1)
		signs(second, first, second)
		check("rotated", nil, 2)
		signs(second, second)
		check("distrusted", second, 1)
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		for n := range sent {
			if len(sent[n]) != 0 {
				t.Error("sent once more")
			}
		}
		cancel()
		cc.Close()
		server.Stop()
	})
}
