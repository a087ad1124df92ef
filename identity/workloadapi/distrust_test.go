package workloadapi_test

import (
	"context"
	"crypto/x509"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	served "sallyport.dev/identity/workloadapi"
	"sallyport.dev/segment"
)

// When an authority is distrusted, every open stream is sent another SVID with the bundle that says so, in one message.
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
		i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
		l := bufconn.Listen(1 << 20)
		server := grpc.NewServer()
		served.Register(server, i)
		go func() { _ = server.Serve(l) }()
		cc, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"))
		var sent [streams]chan *workload.X509SVIDResponse
		for n := range sent {
			sent[n] = make(chan *workload.X509SVIDResponse, 10)
			stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
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
		// check wants one message on each stream, whose SVID stands below an authority and is valid by its bundle.
		check := func(what string, below *identity.Authority, roots int) {
			t.Helper()
			synctest.Wait() // no time passes
			for n := range sent {
				if len(sent[n]) != 1 {
					t.Fatalf("%s: %d messages", what, len(sent[n]))
				}
				svid := (<-sent[n]).Svids[0]
				chain, err := x509.ParseCertificates(svid.X509Svid)
				if err != nil {
					t.Fatal(err)
				}
				trusted, err := x509.ParseCertificates(svid.Bundle)
				if err != nil || len(trusted) != roots {
					t.Fatalf("%s: a bundle of %d, %v", what, len(trusted), err)
				}
				for _, b := range []*x509bundle.Bundle{below.Bundle(), x509bundle.FromX509Authorities(below.TrustDomain(), trusted)} {
					if _, err := identity.Verify(chain, b, time.Now()); err != nil {
						t.Errorf("%s: %v", what, err)
					}
				}
			}
		}
		check("at first", first, 1)
		signs(second, first, second)
		check("rotated", first, 2)
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
