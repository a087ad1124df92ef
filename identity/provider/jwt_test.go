package provider_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"maps"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
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

// untilKeys waits until the source has just these keys by trust domain, for as long as the test may take.
func untilKeys(t *testing.T, s *provider.Source, want map[string][]string) map[spiffeid.TrustDomain]*jwtbundle.Bundle {
	t.Helper()
	for late := time.After(20 * time.Second); ; {
		bundles, changed := s.JWTBundles()
		got := make(map[string][]string)
		for td, b := range bundles {
			got[td.Name()] = slices.Sorted(maps.Keys(b.JWTAuthorities()))
		}
		diff := cmp.Diff(want, got)
		if diff == "" {
			return bundles
		}
		select {
		case <-changed:
		case <-late:
			t.Fatal(diff)
		}
	}
}

func TestJWTBundles(t *testing.T) {
	p := identitytest.Start(t, func(s grpc.ServiceRegistrar, i *issuer.Issuer) { workloadapi.Register(s, i) })
	s := run(t, p.Socket)
	app := identitytest.Entry("app", identitytest.Me())
	app.FederatesAll = true
	p.Issuer.Set([]issuer.Entry{app})
	bundles := untilKeys(t, s, map[string][]string{"example.org": {"first"}})
	token, err := p.Authorities.JWT.Sign(identity.JWTRequest{ID: app.ID, Audience: []string{"chat"}, TTL: time.Minute}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if id, _, err := identity.ValidateJWT(token, bundles[td], []string{"chat"}, time.Now()); err != nil || id != app.ID {
		t.Errorf("%s, %v", id, err)
	}

	// Another trust domain, and another key of our own.
	second := p.Authorities.Bundle.Clone()
	if err := second.AddJWTAuthority("second", identitytest.JWTAuthority(t, "example.org", "second").PublicKey()); err != nil {
		t.Fatal(err)
	}
	other, empty := identitytest.Authorities(t, "other.org"), spiffebundle.New(spiffeid.RequireTrustDomainFromString("empty.org"))
	p.Issuer.SetBundles(issuer.Bundles{Own: second, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{
		other.Bundle.TrustDomain(): other.Bundle, empty.TrustDomain(): empty}})
	untilKeys(t, s, map[string][]string{"example.org": {"first", "second"}, "other.org": {"first"}})
	p.Issuer.SetBundles(issuer.Bundles{Own: p.Authorities.Bundle})
	untilKeys(t, s, map[string][]string{"example.org": {"first"}})

	p.Issuer.Set(nil)
	untilKeys(t, s, map[string][]string{})
	p.Issuer.Set([]issuer.Entry{app})
	untilKeys(t, s, map[string][]string{"example.org": {"first"}})
}

func TestJWTBundlesWhileAway(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	serve := func(keyID string) (stop func()) {
		a := identitytest.Authorities(t, "example.org")
		a.JWT = identitytest.JWTAuthority(t, "example.org", keyID)
		a.Bundle.SetJWTAuthorities(a.JWT.Bundle().JWTAuthorities())
		local := &issuer.Local{}
		local.Set(a)
		i := issuer.New(issuer.Config{Certifier: local, Attest: attest.Selectors})
		i.SetBundles(issuer.Bundles{Own: a.Bundle})
		i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
		return start(t, socket, func(g *grpc.Server) { workloadapi.Register(g, i) })
	}
	s := run(t, socket) // there is nobody yet
	stop := serve("before")
	untilKeys(t, s, map[string][]string{"example.org": {"before"}})
	before, changed := s.JWTBundles()
	stop()
	if now, _ := s.JWTBundles(); len(now) != 1 || now[td] != before[td] {
		t.Errorf("while it is away: %v", now)
	}
	defer serve("after")()
	<-changed // for the first time
	if now, _ := s.JWTBundles(); len(now) != 1 || !now[td].HasJWTAuthority("after") || now[td].HasJWTAuthority("before") {
		t.Errorf("back again: %v", now)
	}
}

// scriptedJWT is a provider of a good SVID that answers each call for JWT bundles by the next of its answers.
type scriptedJWT struct {
	scripted
	svid       *workload.X509SVIDResponse
	jwtAnswers chan func(grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error
}

func (s scriptedJWT) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := stream.Send(s.svid); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (s scriptedJWT) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	select {
	case answer := <-s.jwtAnswers:
		return answer(stream)
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

// TestJWTAnswersOfOthers is a provider that does what ours does not. Whatever it says of JWT bundles, X.509 goes on.
func TestJWTAnswersOfOthers(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	a := identitytest.Authority(t)
	p := scriptedJWT{svid: response(t, a, a.Bundle(), time.Hour),
		jwtAnswers: make(chan func(grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error)}
	defer start(t, socket, func(g *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(g, p) })()
	s := run(t, socket)
	send := func(bundles ...map[string]string) {
		p.jwtAnswers <- func(stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
			for _, b := range bundles {
				r := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
				for td, text := range b {
					r.Bundles[td] = []byte(text)
				}
				if err := stream.Send(r); err != nil {
					return err
				}
			}
			return nil
		}
	}
	fail := func(code codes.Code) {
		p.jwtAnswers <- func(grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
			return status.Error(code, "scripted")
		}
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set := func(keys ...jose.JSONWebKey) string {
		text, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	key := func(id string) jose.JSONWebKey { return jose.JSONWebKey{Key: private.Public(), KeyID: id} }

	fail(codes.Unimplemented)
	fail(codes.Canceled) // ends go-spiffe's watch, but not ours
	send(map[string]string{td.IDString(): set(key("a"),
		jose.JSONWebKey{Key: private, KeyID: "private"}, jose.JSONWebKey{Key: []byte("0123456789abcdef"), KeyID: "shared"}),
		"spiffe://other.org": set(jose.JSONWebKey{Key: []byte("0123456789abcdef"), KeyID: "shared"})})
	good := map[string][]string{"example.org": {"a"}}
	untilKeys(t, s, good)
	if svid, err := s.GetX509SVID(); err != nil {
		t.Errorf("%v, %v", svid, err)
	}
	before, changed := s.JWTBundles()

	// What cannot be used changes nothing, and neither does what is the same.
	send(map[string]string{}, map[string]string{td.IDString(): "<html>"}, map[string]string{td.IDString(): set(key(""))},
		map[string]string{"?": set(key("b"))}, map[string]string{td.IDString(): set(key("a"))})
	fail(codes.Unavailable)
	fail(codes.Internal) // all before has been read
	select {
	case <-changed:
		t.Error("changed by what cannot be used")
	default:
	}
	if now, _ := s.JWTBundles(); !maps.EqualFunc(before, now, (*jwtbundle.Bundle).Equal) {
		t.Errorf("%v, before %v", now, before)
	}

	// An empty set revokes all keys of its trust domain, and a provider without JWT bundles those of all.
	send(map[string]string{td.IDString(): `{"keys":[]}`, "spiffe://other.org": set(key("b"))})
	untilKeys(t, s, map[string][]string{"other.org": {"b"}})
	fail(codes.PermissionDenied)
	untilKeys(t, s, map[string][]string{})
	send(map[string]string{td.IDString(): set(key("a"))})
	untilKeys(t, s, good)
	fail(codes.Unimplemented)
	untilKeys(t, s, map[string][]string{})
	fail(codes.InvalidArgument) // and no more is asked
	if svid, err := s.GetX509SVID(); err != nil {
		t.Errorf("%v, %v", svid, err)
	}
}
