package workloadapi_test

import (
	"context"
	"crypto"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
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
)

// apiOf returns the API without a library's own checks, and a context that its calls are made with.
func apiOf(t *testing.T, p *identitytest.Provider) (workload.SpiffeWorkloadAPIClient, context.Context) {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+p.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return workload.NewSpiffeWorkloadAPIClient(cc), metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
}

// federate gives the provider bundles of other trust domains, and app those of some.
func federate(t *testing.T, p *identitytest.Provider, app *issuer.Entry, domains ...string) map[string]identity.Authorities {
	t.Helper()
	authorities := make(map[string]identity.Authorities)
	bundles := issuer.Bundles{Own: p.Authorities.Bundle, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{}}
	for _, d := range append(domains, "unwanted.org") {
		authorities[d] = identitytest.Authorities(t, d)
		bundles.Federated[authorities[d].Bundle.TrustDomain()] = authorities[d].Bundle
	}
	for _, d := range domains {
		app.FederatesWith = append(app.FederatesWith, spiffeid.RequireTrustDomainFromString(d))
	}
	p.Issuer.SetBundles(bundles)
	return authorities
}

// tokenOf returns a token for the audience "db".
func tokenOf(t *testing.T, a identity.Authorities, id string) string {
	t.Helper()
	token, err := a.JWT.Sign(identity.JWTRequest{ID: spiffeid.RequireFromString(id), Audience: []string{"db"}, TTL: time.Minute}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func keyIDs(s *jwtbundle.Set) map[string][]string {
	ids := make(map[string][]string)
	for _, b := range s.Bundles() {
		ids[b.TrustDomain().Name()] = slices.Sorted(maps.Keys(b.JWTAuthorities()))
	}
	return ids
}

func TestFetchJWT(t *testing.T) {
	c, p := start(t)
	app, db := identitytest.Entry("app", identitytest.Me()), identitytest.Entry("db", identitytest.Me())
	p.Issuer.Set([]issuer.Entry{app, identitytest.Entry("other", notMe()), db})
	bundles, err := c.FetchJWTBundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	svids, err := c.FetchJWTSVIDs(t.Context(), jwtsvid.Params{Audience: "db", ExtraAudiences: []string{"cache"}})
	if err != nil {
		t.Fatal(err)
	}
	var ids []spiffeid.ID
	for _, svid := range svids {
		ids = append(ids, svid.ID)
		for _, audience := range []string{"db", "cache"} {
			if got, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{audience}); err != nil || got.ID != svid.ID {
				t.Errorf("%s validates as %v, %v", svid.ID, got, err)
			}
			if got, err := c.ValidateJWTSVID(t.Context(), svid.Marshal(), audience); err != nil || got.ID != svid.ID {
				t.Errorf("%s is validated as %v, %v", svid.ID, got, err)
			}
		}
		if life := time.Until(svid.Expiry); life < 4*time.Minute || life > 5*time.Minute {
			t.Errorf("%s lives %s", svid.ID, life)
		}
	}
	if diff := cmp.Diff([]spiffeid.ID{app.ID, db.ID}, ids, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	one, err := c.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db", Subject: db.ID})
	if err != nil || one.ID != db.ID || !slices.Equal(one.Audience, []string{"db"}) {
		t.Errorf("got %v, %v", one, err)
	}
	for _, id := range []string{"spiffe://example.org/other", "spiffe://example.org/none", "spiffe://example.org", "spiffe://other.org/app"} {
		got, err := c.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db", Subject: spiffeid.RequireFromString(id)})
		if status.Code(err) != codes.PermissionDenied || got != nil {
			t.Errorf("%s: %v, %v", id, got, err)
		}
	}
}

func TestJWTRefuses(t *testing.T) {
	_, p := start(t)
	app := identitytest.Entry("app", identitytest.Me())
	p.Issuer.Set([]issuer.Entry{app})
	api, ctx := apiOf(t, p)
	many := strings.Split(strings.Repeat("a", 17), "")
	for name, req := range map[string]*workload.JWTSVIDRequest{
		"no audience": {}, "empty audience": {Audience: []string{""}}, "many": {Audience: many},
		"large": {Audience: []string{strings.Repeat("a", 2049)}}, "no SPIFFE ID": {Audience: []string{"db"}, SpiffeId: "app"},
	} {
		if resp, err := api.FetchJWTSVID(ctx, req); status.Code(err) != codes.InvalidArgument || resp != nil {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	other := identitytest.Authorities(t, "example.org") // of the same name, with a key of the same name
	for name, req := range map[string]*workload.ValidateJWTSVIDRequest{
		"no audience":      {Svid: tokenOf(t, p.Authorities, "spiffe://example.org/app")},
		"no token":         {Audience: "db"},
		"another audience": {Audience: "cache", Svid: tokenOf(t, p.Authorities, "spiffe://example.org/app")},
		"another key":      {Audience: "db", Svid: tokenOf(t, other, "spiffe://example.org/app")},
		"another domain":   {Audience: "db", Svid: tokenOf(t, identitytest.Authorities(t, "other.org"), "spiffe://other.org/app")},
		"nonsense":         {Audience: "db", Svid: "a.b.c"},
		"large":            {Audience: "db", Svid: strings.Repeat("a", 1<<20)},
	} {
		resp, err := api.ValidateJWTSVID(ctx, req)
		if status.Code(err) != codes.InvalidArgument || resp != nil {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
		t.Logf("%s: %v", name, err)
	}

	p.Certifier.Set(identity.Authorities{X509: p.Authorities.X509, Bundle: p.Authorities.Bundle})
	if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}}); status.Code(err) != codes.Unavailable {
		t.Errorf("without a key: %v", err)
	}
}

// A bundle that is taken away, or that was never ours, validates nothing.
func TestValidateFederated(t *testing.T) {
	_, p := start(t)
	app := identitytest.Entry("app", identitytest.Me())
	authorities := federate(t, p, &app, "other.org")
	p.Issuer.Set([]issuer.Entry{app})
	api, ctx := apiOf(t, p)
	validate := func(token string) (*workload.ValidateJWTSVIDResponse, error) {
		return api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
	}
	claims := func(token string) string {
		t.Helper()
		resp, err := validate(token)
		if err != nil {
			t.Fatal(err)
		}
		if aud := resp.Claims.Fields["aud"].GetListValue(); len(aud.GetValues()) != 1 || aud.Values[0].GetStringValue() != "db" {
			t.Errorf("audience %v", aud)
		}
		if resp.Claims.Fields["sub"].GetStringValue() != resp.SpiffeId {
			t.Errorf("%s is of %s", resp.Claims.Fields["sub"], resp.SpiffeId)
		}
		return resp.SpiffeId + " " + strings.Join(slices.Sorted(maps.Keys(resp.Claims.Fields)), " ")
	}
	if got, want := claims(tokenOf(t, p.Authorities, "spiffe://example.org/db")), "spiffe://example.org/db aud exp iat sub"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	theirs := tokenOf(t, authorities["other.org"], "spiffe://other.org/app")
	if got, want := claims(theirs), "spiffe://other.org/app aud exp sub"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if resp, err := validate(tokenOf(t, authorities["unwanted.org"], "spiffe://unwanted.org/app")); status.Code(err) != codes.InvalidArgument {
		t.Errorf("not federated with: %v, %v", resp, err)
	}
	// Their keys in the place of ours.
	p.Issuer.SetBundles(issuer.Bundles{Own: p.Authorities.Bundle, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{
		p.Authorities.Bundle.TrustDomain(): identitytest.Authorities(t, "example.org").Bundle,
	}})
	claims(tokenOf(t, p.Authorities, "spiffe://example.org/db"))
	if resp, err := validate(theirs); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no longer federated: %v, %v", resp, err)
	}
}

// jwtWatcher hands on what go-spiffe's client is pushed.
type jwtWatcher struct {
	updates chan *jwtbundle.Set
	errs    chan error
}

func (w jwtWatcher) OnJWTBundlesUpdate(s *jwtbundle.Set) { w.updates <- s }
func (w jwtWatcher) OnJWTBundlesWatchError(err error)    { w.errs <- err }
func (w jwtWatcher) next(t *testing.T) map[string][]string {
	t.Helper()
	select {
	case s := <-w.updates:
		return keyIDs(s)
	case err := <-w.errs:
		t.Fatal(err)
	}
	return nil
}

func watchJWT(t *testing.T, c *workloadapi.Client) jwtWatcher {
	w := jwtWatcher{make(chan *jwtbundle.Set), make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.WatchJWTBundles(ctx, w) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; status.Code(err) != codes.Canceled && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return w
}

func TestPushJWTBundles(t *testing.T) {
	c, p := start(t)
	app := identitytest.Entry("app", identitytest.Me())
	p.Issuer.Set([]issuer.Entry{app})
	w := watchJWT(t, c)
	check := func(want map[string][]string) {
		t.Helper()
		if diff := cmp.Diff(want, w.next(t)); diff != "" {
			t.Error(diff)
		}
	}
	check(map[string][]string{"example.org": {"first"}})

	// What concerns certificates alone is not pushed here.
	own := p.Authorities.Bundle.Clone()
	own.AddX509Authority(identitytest.Authority(t).Certificate())
	own.SetSequenceNumber(2)
	p.Issuer.SetBundles(issuer.Bundles{Own: own})

	// A rotation: the key is published, then signs, then the old one goes.
	next := p.Authorities
	next.JWT = identitytest.JWTAuthority(t, "example.org", "second")
	both := own.Clone()
	if err := both.AddJWTAuthority("second", next.JWT.PublicKey()); err != nil {
		t.Fatal(err)
	}
	p.Issuer.SetBundles(issuer.Bundles{Own: both})
	check(map[string][]string{"example.org": {"first", "second"}})
	old, err := c.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	p.Certifier.Set(next)
	young, err := c.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	for name, svid := range map[string]*jwtsvid.SVID{"old": old, "young": young} {
		if _, err := c.ValidateJWTSVID(t.Context(), svid.Marshal(), "db"); err != nil {
			t.Errorf("%s, while both keys are there: %v", name, err)
		}
	}
	after := both.Clone()
	after.RemoveJWTAuthority("first")
	p.Issuer.SetBundles(issuer.Bundles{Own: after})
	check(map[string][]string{"example.org": {"second"}})
	if _, err := c.ValidateJWTSVID(t.Context(), old.Marshal(), "db"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("the old key is gone: %v", err)
	}
	if _, err := c.ValidateJWTSVID(t.Context(), young.Marshal(), "db"); err != nil {
		t.Errorf("young, with its key alone: %v", err)
	}

	// Federation: only what the caller's entries ask for, as soon as they do.
	p.Authorities.Bundle = after
	federate(t, p, &app, "other.org")
	p.Issuer.Set([]issuer.Entry{app})
	check(map[string][]string{"example.org": {"second"}, "other.org": {"first"}})
	app.FederatesAll = true
	p.Issuer.Set([]issuer.Entry{app})
	check(map[string][]string{"example.org": {"second"}, "other.org": {"first"}, "unwanted.org": {"first"}})
	p.Issuer.SetBundles(issuer.Bundles{Own: after})
	check(map[string][]string{"example.org": {"second"}})
	p.Issuer.Set(nil)
	if err := nextError(t, c); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without an entry: %v", err)
	}
}

// nextError is what a new call gets: go-spiffe's watcher of JWT bundles keeps to itself why its stream ended.
func nextError(t *testing.T, c *workloadapi.Client) error {
	t.Helper()
	_, err := c.FetchJWTBundles(t.Context())
	return err
}

// A foreign trust domain that has revoked its keys, or that signs with what no JWT-SVID is signed with, has an empty set.
func TestJWTBundlesOfOthers(t *testing.T) {
	c, p := start(t)
	app := identitytest.Entry("app", identitytest.Me())
	app.FederatesAll = true
	p.Issuer.Set([]issuer.Entry{app})
	empty, strange := spiffeid.RequireTrustDomainFromString("empty.org"), spiffeid.RequireTrustDomainFromString("strange.org")
	p.Issuer.SetBundles(issuer.Bundles{Own: p.Authorities.Bundle, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{
		empty:   spiffebundle.New(empty),
		strange: spiffebundle.FromJWTAuthorities(strange, map[string]crypto.PublicKey{"secret": []byte("0123456789abcdef")}),
	}})
	got, err := c.FetchJWTBundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string][]string{"example.org": {"first"}, "empty.org": nil, "strange.org": nil}, keyIDs(got)); diff != "" {
		t.Error(diff)
	}
	// Without certificates they are not among those of X.509.
	x509, err := c.FetchX509Bundles(t.Context())
	if err != nil || x509.Len() != 1 {
		t.Errorf("got %v, %v", x509, err)
	}
	svids, err := c.FetchX509Context(t.Context())
	if err != nil || svids.Bundles.Len() != 1 {
		t.Errorf("got %v, %v", svids, err)
	}
}

func TestFederatedX509(t *testing.T) {
	c, p := start(t)
	app := identitytest.Entry("app", identitytest.Me())
	authorities := federate(t, p, &app, "other.org", "third.org")
	p.Issuer.Set([]issuer.Entry{app})
	w := watch(t, c)
	first := w.next(t)
	fetched, err := c.FetchX509Bundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]*spiffebundle.Bundle{
		"example.org": p.Authorities.Bundle, "other.org": authorities["other.org"].Bundle, "third.org": authorities["third.org"].Bundle,
	} {
		td := spiffeid.RequireTrustDomainFromString(name)
		for _, bundles := range []interface {
			Has(spiffeid.TrustDomain) bool
		}{first.Bundles, fetched} {
			if !bundles.Has(td) {
				t.Errorf("no bundle of %s", name)
			}
		}
		if got, err := fetched.GetX509BundleForTrustDomain(td); err != nil || !got.Equal(want.X509Bundle()) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if first.Bundles.Len() != 3 || fetched.Len() != 3 {
		t.Errorf("%d and %d bundles", first.Bundles.Len(), fetched.Len())
	}

	// What concerns JWT-SVIDs alone is not pushed; a new root is, with the SVID as it was.
	jwt := authorities["other.org"].Bundle.Clone()
	jwt.RemoveJWTAuthority("first")
	set := func(other *spiffebundle.Bundle) {
		b := issuer.Bundles{Own: p.Authorities.Bundle, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{}}
		for _, a := range authorities {
			b.Federated[a.Bundle.TrustDomain()] = a.Bundle
		}
		b.Federated[other.TrustDomain()] = other
		p.Issuer.SetBundles(b)
	}
	set(jwt)
	both := jwt.Clone()
	both.AddX509Authority(identitytest.Authorities(t, "other.org").X509.Certificate())
	set(both)
	second := w.next(t)
	got, err := second.Bundles.GetX509BundleForTrustDomain(both.TrustDomain())
	if err != nil || !got.Equal(both.X509Bundle()) {
		t.Errorf("was pushed %v, %v", got, err)
	}
	if !second.DefaultSVID().Certificates[0].Equal(first.DefaultSVID().Certificates[0]) {
		t.Error("with another SVID")
	}
	app.FederatesWith = nil
	p.Issuer.Set([]issuer.Entry{app})
	if third := w.next(t); third.Bundles.Len() != 1 || !third.Bundles.Has(p.Authorities.Bundle.TrustDomain()) {
		t.Errorf("no longer federated, with %d bundles", third.Bundles.Len())
	}
}

// hint and crl are of no use here, and no library is to see them.
func TestEmptyFields(t *testing.T) {
	_, p := start(t)
	app := identitytest.Entry("app", identitytest.Me())
	federate(t, p, &app, "other.org")
	p.Issuer.Set([]issuer.Entry{app})
	api, ctx := apiOf(t, p)
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	svids, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(svids.Crl) > 0 || svids.Svids[0].Hint != "" || len(svids.FederatedBundles) != 1 || svids.FederatedBundles["spiffe://other.org"] == nil {
		t.Errorf("got %v", svids)
	}
	tokens, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}})
	if err != nil || len(tokens.Svids) != 1 || tokens.Svids[0].Hint != "" || tokens.Svids[0].SpiffeId != app.ID.String() {
		t.Errorf("got %v, %v", tokens, err)
	}
}
