package workloadapi_test

import (
	"context"
	"fmt"
	"net"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	served "sallyport.dev/identity/workloadapi"
	"sallyport.dev/segment"
)

// TestQuiet counts what each stream is pushed. Software may reload for each (Workload API, 4.3): nothing is pushed for
// a change that the stream does not show.
func TestQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.Authorities(t, "example.org")
		local := &issuer.Local{}
		local.Set(a)
		i := issuer.New(issuer.Config{Certifier: local, Attest: func(context.Context, []string) ([]segment.Selector, error) {
			return []segment.Selector{identitytest.Me()}, nil
		}})
		i.SetBundles(issuer.Bundles{Own: a.Bundle})
		app := identitytest.Entry("app", identitytest.Me())
		i.Set([]issuer.Entry{app})

		l := bufconn.Listen(1 << 20)
		s := grpc.NewServer()
		served.Register(s, i)
		go s.Serve(l)
		defer s.Stop()
		cc, err := grpc.NewClient("passthrough:", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return l.Dial() }))
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		api := workload.NewSpiffeWorkloadAPIClient(cc)
		ctx := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
		var svids, roots, keys int
		svidStream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		rootStream, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		keyStream, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		go count(svidStream, &svids)
		go count(rootStream, &roots)
		go count(keyStream, &keys)
		check := func(after, want string) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(want, fmt.Sprint(svids, " ", roots, " ", keys)); diff != "" {
				t.Errorf("after %s:\n%s", after, diff)
			}
		}
		check("the beginning", "1 1 1")

		own := a.Bundle.Clone()
		own.SetSequenceNumber(2)
		i.SetBundles(issuer.Bundles{Own: own})
		check("a new sequence number", "1 1 1")

		i.Set([]issuer.Entry{app, identitytest.Entry("other", notMe())})
		check("another's entry", "1 1 1")

		own = own.Clone()
		if err := own.AddJWTAuthority("second", identitytest.JWTAuthority(t, "example.org", "second").PublicKey()); err != nil {
			t.Fatal(err)
		}
		i.SetBundles(issuer.Bundles{Own: own})
		check("a new key", "1 1 2")

		own = own.Clone()
		own.AddX509Authority(identitytest.Authority(t).Certificate())
		i.SetBundles(issuer.Bundles{Own: own})
		check("a new root", "2 2 2")

		other := identitytest.Authorities(t, "other.org").Bundle
		bundles := issuer.Bundles{Own: own}
		bundles.Federated = map[spiffeid.TrustDomain]*spiffebundle.Bundle{other.TrustDomain(): other}
		i.SetBundles(bundles)
		check("a trust domain that it does not federate with", "2 2 2")

		app.FederatesAll = true
		i.Set([]issuer.Entry{app})
		check("federation", "3 3 3")

		app.DNSNames = []string{"app.internal"}
		i.Set([]issuer.Entry{app})
		check("a new name", "4 3 3")
	})
}

// count counts what comes until the stream ends.
func count[T any](stream grpc.ServerStreamingClient[T], n *int) {
	for {
		if _, err := stream.Recv(); err != nil {
			return
		}
		*n++
	}
}
