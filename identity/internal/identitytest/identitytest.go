// Package identitytest runs an identity provider on a real Unix socket, for the tests of the servers and clients of
// identities. The test's own process is the workload. It is never part of the program.
package identitytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"sallyport.dev/identity"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/segment"
)

// Authority returns a new authority of the trust domain example.org, valid for a day.
func Authority(t testing.TB) *identity.Authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	template, err := identity.CATemplate(td, 24*time.Hour, time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a, err := identity.SelfSign(template, key)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Serve serves on a socket until the test ends, and returns the socket's path and the issuer, which has no entries.
func Serve(t testing.TB, register func(grpc.ServiceRegistrar, *issuer.Issuer)) (string, *issuer.Issuer) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	i := issuer.New(issuer.Config{Authority: Authority(t), Attest: attest.Selectors})
	s := grpc.NewServer(grpc.Creds(attest.NewCredentials()))
	register(s, i)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket, i
}

// Me recognises the test's own process.
func Me() segment.Selector {
	return segment.Selector{Type: "unix", Value: "uid:" + strconv.Itoa(os.Getuid())}
}

// Entry entitles whom the selectors recognise to spiffe://example.org/NAME, for an hour at a time.
func Entry(name string, selectors ...segment.Selector) issuer.Entry {
	return issuer.Entry{ID: spiffeid.RequireFromString("spiffe://example.org/" + name), Selectors: selectors, TTL: time.Hour}
}
