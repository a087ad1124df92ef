package workloadapi_test

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	served "sallyport.dev/identity/workloadapi"
	"sallyport.dev/segment"
)

// start returns a client of go-spiffe's and the provider behind it.
func start(t *testing.T) (*workloadapi.Client, *identitytest.Provider) {
	t.Helper()
	p := identitytest.Start(t, func(s grpc.ServiceRegistrar, i *issuer.Issuer) { served.Register(s, i) })
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+p.Socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, p
}

// serve returns the client, the socket that it uses, and the issuer.
func serve(t *testing.T) (*workloadapi.Client, string, *issuer.Issuer) {
	t.Helper()
	c, p := start(t)
	return c, p.Socket, p.Issuer
}

func notMe() segment.Selector {
	return segment.Selector{Type: "unix", Value: fmt.Sprint("uid:", os.Getuid()+1)}
}

func TestFetch(t *testing.T) {
	c, _, i := serve(t)
	app, db := identitytest.Entry("app", identitytest.Me()), identitytest.Entry("db", identitytest.Me())
	app.DNSNames = []string{"app.internal"}
	i.Set([]issuer.Entry{app, identitytest.Entry("other", notMe()), db})
	got, err := c.FetchX509Context(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var ids []spiffeid.ID
	for _, svid := range got.SVIDs {
		ids = append(ids, svid.ID)
		if id, err := identity.Verify(svid.Certificates, got.Bundles, time.Now()); err != nil || id != svid.ID {
			t.Errorf("%s verifies as %s, %v", svid.ID, id, err)
		}
		if !svid.PrivateKey.(*ecdsa.PrivateKey).PublicKey.Equal(svid.Certificates[0].PublicKey) {
			t.Errorf("%s: key and certificate differ", svid.ID)
		}
	}
	if !slices.Equal(ids, []spiffeid.ID{app.ID, db.ID}) {
		t.Errorf("got %s", ids)
	}
	if names := got.SVIDs[0].Certificates[0].DNSNames; !slices.Equal(names, app.DNSNames) {
		t.Errorf("names %q", names)
	}
	bundles, err := c.FetchX509Bundles(t.Context())
	if err != nil || bundles.Len() != 1 {
		t.Fatalf("got %v, %v", bundles, err)
	}
	if _, err := identity.Verify(got.SVIDs[0].Certificates, bundles, time.Now()); err != nil {
		t.Error(err)
	}
}

func TestDenied(t *testing.T) {
	c, _, i := serve(t)
	for name, entries := range map[string][]issuer.Entry{
		"no entries":        nil,
		"another's":         {identitytest.Entry("other", notMe())},
		"not all selectors": {identitytest.Entry("other", identitytest.Me(), segment.Selector{Type: "unix", Value: "path:/secret"})},
		"no selectors":      {identitytest.Entry("other")},
	} {
		t.Run(name, func(t *testing.T) {
			i.Set(entries)
			check := func(err error) {
				t.Helper()
				s := status.Convert(err)
				if s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), identitytest.Me().String()) {
					t.Errorf("got %v", err)
				}
				if strings.Contains(s.Message(), "other") || strings.Contains(s.Message(), "secret") {
					t.Errorf("hints at what others have: %v", err)
				}
			}
			_, err := c.FetchX509SVID(t.Context())
			check(err)
			_, err = c.FetchX509Bundles(t.Context())
			check(err)
			_, err = c.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"})
			check(err)
			_, err = c.FetchJWTBundles(t.Context())
			check(err)
			_, err = c.ValidateJWTSVID(t.Context(), "token", "db")
			check(err)
		})
	}
}

func TestProgramsHash(t *testing.T) {
	c, _, i := serve(t)
	i.Set([]issuer.Entry{identitytest.Entry("app", segment.Selector{Type: "unix", Value: "sha256:" + strings.Repeat("0", 64)})})
	_, err := c.FetchX509SVID(t.Context())
	_, hash, ok := strings.Cut(status.Convert(err).Message(), "unix:sha256:")
	if status.Code(err) != codes.PermissionDenied || !ok {
		t.Fatalf("got %v", err)
	}
	i.Set([]issuer.Entry{identitytest.Entry("app", segment.Selector{Type: "unix", Value: "sha256:" + hash})})
	if _, err := c.FetchX509SVID(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestHeaderAndMethods(t *testing.T) {
	c, socket, i := serve(t)
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	cc, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	api := workload.NewSpiffeWorkloadAPIClient(cc)
	for _, values := range [][]string{nil, {"false"}, {"TRUE"}, {"true", "true"}} {
		ctx := t.Context()
		for _, v := range values {
			ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", v)
		}
		svids, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := svids.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("SVIDs with %q: %v", values, err)
		}
		bundles, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bundles.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("bundles with %q: %v", values, err)
		}
		keys, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := keys.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("JWT bundles with %q: %v", values, err)
		}
		want := "security header"
		if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("JWT-SVIDs with %q: %v", values, err)
		}
		if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "a"}); !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("validation with %q: %v", values, err)
		}
	}
	if _, err := c.FetchWITBundles(t.Context()); status.Code(err) != codes.Unimplemented {
		t.Errorf("WIT bundles: %v", err)
	}
}

// watcher hands on what go-spiffe's client is pushed.
type watcher struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.updates <- c }
func (w watcher) OnX509ContextWatchError(err error)              { w.errs <- err }

func watch(t *testing.T, c *workloadapi.Client) watcher {
	w := watcher{make(chan *workloadapi.X509Context), make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.WatchX509Context(ctx, w) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; status.Code(err) != codes.Canceled && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return w
}

func (w watcher) next(t *testing.T) *workloadapi.X509Context {
	t.Helper()
	select {
	case c := <-w.updates:
		return c
	case err := <-w.errs:
		t.Fatal(err)
	}
	return nil
}

func TestPush(t *testing.T) {
	c, _, i := serve(t)
	app := identitytest.Entry("app", identitytest.Me())
	i.Set([]issuer.Entry{app})
	w := watch(t, c)
	first := w.next(t).DefaultSVID().Certificates[0]

	i.Set([]issuer.Entry{app, identitytest.Entry("other", notMe())}) // no concern of ours: nothing is pushed
	app.DNSNames = []string{"app.internal"}
	i.Set([]issuer.Entry{app})
	second := w.next(t).DefaultSVID().Certificates[0]
	if first.Equal(second) || !slices.Equal(second.DNSNames, app.DNSNames) {
		t.Errorf("was pushed %q", second.DNSNames)
	}

	i.Set([]issuer.Entry{app, identitytest.Entry("db", identitytest.Me())})
	third := w.next(t)
	if len(third.SVIDs) != 2 || !third.SVIDs[0].Certificates[0].Equal(second) {
		t.Errorf("was pushed %d SVIDs", len(third.SVIDs))
	}

	i.Set(nil)
	if err := <-w.errs; status.Code(err) != codes.PermissionDenied {
		t.Errorf("without an entry: %v", err)
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	c, _, i := serve(t)
	app := identitytest.Entry("app", identitytest.Me())
	app.TTL = identity.MinTTL
	i.Set([]issuer.Entry{app})
	w := watch(t, c)
	first := w.next(t).DefaultSVID()
	second := w.next(t).DefaultSVID()
	now := time.Now()
	old, leaf := first.Certificates[0], second.Certificates[0]
	if leaf.Equal(old) || first.PrivateKey.(*ecdsa.PrivateKey).Equal(second.PrivateKey) {
		t.Error("pushed the same again")
	}
	if now.Before(identity.RenewAt(old)) || now.After(old.NotAfter) {
		t.Errorf("valid %s to %s, replaced at %s", old.NotBefore, old.NotAfter, now)
	}
}
