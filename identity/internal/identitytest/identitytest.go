// Package identitytest runs an identity provider on a real Unix socket, for the tests of the servers and clients of
// identities. The test's own process is the workload. It is never part of the program.
package identitytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"sallyport.dev/identity"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/segment"
)

// TrustDomain is that of the workloads.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// Authority returns a new authority of TrustDomain, valid for a day.
func Authority(t testing.TB) *identity.Authority {
	t.Helper()
	return authority(t, TrustDomain)
}

func authority(t testing.TB, td spiffeid.TrustDomain) *identity.Authority {
	t.Helper()
	template, err := identity.CATemplate(td, 24*time.Hour, time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a, err := identity.SelfSign(template, key(t))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// JWTAuthority returns a new authority for JWT-SVIDs of a trust domain, valid for a day.
func JWTAuthority(t testing.TB, domain, keyID string) *identity.JWTAuthority {
	t.Helper()
	a, err := identity.NewJWTAuthority(spiffeid.RequireTrustDomainFromString(domain), keyID, key(t), time.Now().Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Authorities returns both of a trust domain, and the bundle that they make. The JWT key is "first".
func Authorities(t testing.TB, domain string) identity.Authorities {
	t.Helper()
	a := identity.Authorities{
		X509: authority(t, spiffeid.RequireTrustDomainFromString(domain)),
		JWT:  JWTAuthority(t, domain, "first"),
	}
	a.Bundle = spiffebundle.FromX509Bundle(a.X509.Bundle())
	a.Bundle.SetJWTAuthorities(a.JWT.Bundle().JWTAuthorities())
	return a
}

func key(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Issuer certifies with an authority.
func Issuer(a *identity.Authority, attested func(context.Context, []string) ([]segment.Selector, error)) *issuer.Issuer {
	bundle := spiffebundle.FromX509Bundle(a.Bundle())
	local := &issuer.Local{}
	local.Set(identity.Authorities{X509: a, Bundle: bundle})
	i := issuer.New(issuer.Config{Certifier: local, Attest: attested})
	i.SetBundles(issuer.Bundles{Own: bundle})
	return i
}

// Provider is an identity provider of the trust domain example.org on a socket.
type Provider struct {
	Socket      string
	Issuer      *issuer.Issuer       // has no entries
	Certifier   *issuer.Local        // the issuer's
	Authorities identity.Authorities // that the certifier began with
}

// Start serves on a socket until the test ends.
func Start(t testing.TB, register func(grpc.ServiceRegistrar, *issuer.Issuer)) *Provider {
	t.Helper()
	p := &Provider{
		Socket:      filepath.Join(t.TempDir(), "api.sock"),
		Certifier:   &issuer.Local{},
		Authorities: Authorities(t, "example.org"),
	}
	p.Certifier.Set(p.Authorities)
	p.Issuer = issuer.New(issuer.Config{Certifier: p.Certifier, Attest: attest.Selectors})
	p.Issuer.SetBundles(issuer.Bundles{Own: p.Authorities.Bundle})
	l, err := net.Listen("unix", p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(attest.NewCredentials()))
	register(s, p.Issuer)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return p
}

// Serve is Start, for who needs no more than the socket's path and the issuer.
func Serve(t testing.TB, register func(grpc.ServiceRegistrar, *issuer.Issuer)) (string, *issuer.Issuer) {
	t.Helper()
	p := Start(t, register)
	return p.Socket, p.Issuer
}

// Me recognises the test's own process.
func Me() segment.Selector {
	return segment.Selector{Type: "unix", Value: "uid:" + strconv.Itoa(os.Getuid())}
}

// Entry entitles whom the selectors recognise to spiffe://example.org/NAME, for an hour at a time.
func Entry(name string, selectors ...segment.Selector) issuer.Entry {
	return issuer.Entry{ID: spiffeid.RequireFromString("spiffe://example.org/" + name), Selectors: selectors, TTL: time.Hour}
}
