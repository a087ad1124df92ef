package identitytest

import (
	"context"
	"crypto/x509"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/segment"
)

// Sent is one message of a server of identities: the chain of an SVID, or none, and the bundle.
type Sent struct {
	Chain   []*x509.Certificate
	Trusted *x509bundle.Bundle
}

// Distrust has an authority be rotated, and then distrusted, while many streams are open: each of them must at once be
// sent one message, and when the authority is trusted no more another SVID and the bundle that says so in the same one.
// Register serves identities, Open begins one stream and returns how to receive, Always is true where every message
// has an SVID.
type Distrust struct {
	Register func(*grpc.Server, *issuer.Issuer)
	Open     func(context.Context, *grpc.ClientConn) (func() (Sent, error), error)
	Always   bool
}

// Run is the whole test.
func (d Distrust) Run(t *testing.T) { synctest.Test(t, d.run) }

func (d Distrust) run(t *testing.T) {
	first, second := Authority(t), Authority(t)
	local := &issuer.Local{}
	i := issuer.New(issuer.Config{Certifier: local, Attest: func(context.Context, []string) ([]segment.Selector, error) {
		return []segment.Selector{Me()}, nil
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
	i.Set([]issuer.Entry{Entry("app", Me())})
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	d.Register(server, i)
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	cc, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var streams [20]chan Sent
	for n := range streams {
		streams[n] = make(chan Sent, 10)
		receive, err := d.Open(ctx, cc)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				one, err := receive()
				if err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				streams[n] <- one
			}
		}()
	}
	// check wants one message on each stream, with an SVID below an authority if one is given.
	check := func(what string, below *identity.Authority, roots int) {
		t.Helper()
		synctest.Wait() // no time passes
		for n := range streams {
			if len(streams[n]) != 1 {
				t.Fatalf("%s: %d messages", what, len(streams[n]))
			}
			one := <-streams[n]
			if one.Trusted == nil || len(one.Trusted.X509Authorities()) != roots || (len(one.Chain) > 0) != (below != nil) {
				t.Fatalf("%s: got %d certificates, %v", what, len(one.Chain), one.Trusted)
			}
			if below == nil {
				continue
			}
			for _, b := range []*x509bundle.Bundle{below.Bundle(), one.Trusted} {
				if _, err := identity.Verify(one.Chain, b, time.Now()); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
		}
	}
	check("at first", first, 1)
	signs(second, first, second)
	rotated := first
	if !d.Always {
		rotated = nil
	}
	check("rotated", rotated, 2)
	signs(second, second)
	check("distrusted", second, 1)
	time.Sleep(20 * time.Minute) // of the bubble
	synctest.Wait()
	for n := range streams {
		if len(streams[n]) != 0 {
			t.Error("sent once more")
		}
	}
}
