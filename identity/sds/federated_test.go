package sds_test

import (
	"log/slog"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
)

const (
	spiffe  = " validates with envoy.tls.cert_validator.spiffe"
	own     = ", for example.org trusts [spiffe://example.org]"
	other   = ", for other.org trusts [spiffe://other.org]"
	other2  = ", for other.org trusts [spiffe://other.org] [spiffe://other.org]"
	third   = ", for a-third.org trusts [spiffe://a-third.org]"
	nobody  = ", for (nobody) trusts [spiffe://example.org]"
	otherID = "spiffe://other.org"
	thirdID = "spiffe://a-third.org"
)

// bundlesOf adds those of other trust domains to the issuer's.
func bundlesOf(own *spiffebundle.Bundle, others ...*spiffebundle.Bundle) issuer.Bundles {
	b := issuer.Bundles{Own: own, Federated: make(map[spiffeid.TrustDomain]*spiffebundle.Bundle)}
	for _, o := range others {
		b.Federated[o.TrustDomain()] = o
	}
	return b
}

func TestFederated(t *testing.T) {
	c, i := serve(t, slog.Default())
	ours := identitytest.Authorities(t, "example.org").Bundle
	theirs := identitytest.Authorities(t, "other.org").Bundle
	thirds := identitytest.Authorities(t, "a-third.org").Bundle
	unwanted := identitytest.Authorities(t, "unwanted.org").Bundle
	i.SetBundles(bundlesOf(ours, theirs, thirds, unwanted))
	federated := func(domains ...string) []issuer.Entry {
		e := entries()
		for _, d := range domains {
			e[1].FederatesWith = append(e[1].FederatesWith, spiffeid.RequireTrustDomainFromString(d))
		}
		return e
	}
	i.Set(federated("other.org", "a-third.org"))

	for _, name := range append(others[:2:2], "other.org", otherID+"/app", "spiffe://unwanted.org") {
		s := open(t, c)
		s.send(&discovery.DiscoveryRequest{ResourceNames: []string{name}})
		if resp, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%q: %v, %v", name, resp, err)
		}
	}

	s := open(t, c)
	s.send(&discovery.DiscoveryRequest{ResourceNames: []string{"ALL", "ROOTCA", domain, otherID, thirdID}})
	check := func(want ...string) {
		t.Helper()
		secrets, _ := s.next()
		if diff := cmp.Diff(want, describeAll(t, secrets)); diff != "" {
			t.Error(diff)
		}
	}
	check("ALL"+spiffe+third+own+other, kinds["ROOTCA"], thirdID+spiffe+third, kinds[domain], otherID+spiffe+other)

	// A change of one changes the secrets that it is in.
	rotated := theirs.Clone()
	rotated.AddX509Authority(identitytest.Authorities(t, "other.org").X509.Certificate())
	i.SetBundles(bundlesOf(ours, rotated, thirds, unwanted))
	check("ALL"+spiffe+third+own+other2, otherID+spiffe+other2)

	// One that has revoked its authorities, or has keys for tokens only, is not trusted, rather than as before.
	i.SetBundles(bundlesOf(ours, spiffebundle.FromJWTBundle(theirs.JWTBundle()), thirds, unwanted))
	check("ALL"+spiffe+third+own, otherID+spiffe+nobody)

	// Neither is one that is taken away; and it can come back.
	i.SetBundles(bundlesOf(ours, rotated, thirds, unwanted))
	check("ALL"+spiffe+third+own+other2, otherID+spiffe+other2)
	i.Set(federated("a-third.org"))
	check("ALL"+spiffe+third+own, otherID+spiffe+nobody)
	i.Set(federated("other.org", "a-third.org"))
	check("ALL"+spiffe+third+own+other2, otherID+spiffe+other2)
	i.SetBundles(bundlesOf(ours))
	check("ALL"+spiffe+own, thirdID+spiffe+nobody, otherID+spiffe+nobody)

	// Nobody puts himself in our place.
	impostor := identitytest.Authorities(t, "example.org").Bundle
	impostor.AddX509Authority(identitytest.Authorities(t, "example.org").X509.Certificate())
	all := entries()
	all[1].FederatesAll = true
	i.Set(all)
	i.SetBundles(bundlesOf(ours, impostor, theirs))
	check("ALL"+spiffe+own+other, otherID+spiffe+other)

	i.Set(nil)
	if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without an identity: %v", err)
	}
}
