package issuer_test

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
)

// distant is a signer that can be out of reach.
type distant struct {
	*issuer.Issuer
	err   error
	asked int
}

func (d *distant) CertifyX509(ctx context.Context, e issuer.Entry, k issuer.Key) ([]*x509.Certificate, error) {
	if d.asked++; d.err != nil {
		return nil, d.err
	}
	return d.Issuer.CertifyX509(ctx, e, k)
}

// Whoever signs is away when an SVID is half through its life: it is held until it ends, and not a moment longer.
func TestWalletHoldsWhileSignerIsAway(t *testing.T) {
	for _, ttl := range []time.Duration{time.Hour, time.Minute, 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			a, b := entry("a", unix("uid:1")), entry("b", unix("uid:1"))
			a.TTL, b.TTL = ttl, ttl
			signer := &distant{Issuer: newIssuer(t, nil)}
			signer.Set([]issuer.Entry{a, b})
			var w issuer.Wallet
			if _, err := w.Renew(t.Context(), signer, []issuer.Entry{a, b}, nil); err != nil {
				t.Fatal(err)
			}
			first, end := serials(&w), w.SVIDs()[0].Certificates[0].NotAfter

			signer.err, signer.asked = status.Error(codes.Unavailable, "away"), 0
			rounds := 0
			for {
				<-w.Due()
				changed, err := w.Renew(t.Context(), signer, []issuer.Entry{a, b}, nil)
				if err != nil {
					break
				}
				if rounds++; changed || serials(&w)[0] != first[0] {
					t.Fatal("something else is held")
				}
				if !time.Now().Before(end) {
					t.Fatalf("held at %s, ended %s", time.Now(), end)
				}
			}
			if late := time.Since(end); late < 0 || late > time.Second {
				t.Errorf("%s: given up %s after the end", ttl, late)
			}
			if rounds < 1 || rounds > 150 || signer.asked > rounds+1 {
				t.Errorf("%s: tried %d times, asked %d times for two entries", ttl, rounds, signer.asked)
			}
		})
	}
}

func TestWalletRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := entry("a", unix("uid:1"))
		a.TTL = time.Hour
		signer := &distant{Issuer: newIssuer(t, nil)}
		signer.Set([]issuer.Entry{a})
		var w issuer.Wallet
		renew := func(want bool) {
			t.Helper()
			if changed, err := w.Renew(t.Context(), signer, []issuer.Entry{a}, nil); err != nil || changed != want {
				t.Fatalf("changed %t, %v", changed, err)
			}
		}
		renew(true)
		<-w.Due()
		signer.err = status.Error(codes.Unavailable, "away")
		renew(false)
		asked := signer.asked
		renew(false) // something else woke the stream: it is not yet time to ask again
		if signer.asked != asked {
			t.Error("asked again at once")
		}
		a.DNSNames = []string{"a.internal"}
		renew(false) // what says too little is better than nothing
		signer.err = nil
		<-w.Due()
		renew(true)
		if w.SVIDs()[0].Certificates[0].DNSNames == nil {
			t.Error("the old entry was certified")
		}
		if due := <-w.Due(); time.Until(due) > 0 {
			t.Error("due early")
		}
		renew(true)
	})
}

// What is refused, or asked for by somebody who left, is not held on to.
func TestWalletDoesNotOverrule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := entry("a", unix("uid:1"))
		signer := &distant{Issuer: newIssuer(t, nil)}
		signer.Set([]issuer.Entry{a})
		for _, refusal := range []error{
			status.Error(codes.PermissionDenied, "no"), status.Error(codes.NotFound, "no"), errors.New("no"),
		} {
			var w issuer.Wallet
			signer.err = nil
			if _, err := w.Renew(t.Context(), signer, []issuer.Entry{a}, nil); err != nil {
				t.Fatal(err)
			}
			<-w.Due()
			signer.err = refusal
			if _, err := w.Renew(t.Context(), signer, []issuer.Entry{a}, nil); !errors.Is(err, refusal) {
				t.Errorf("%v became %v", refusal, err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			signer.err = status.Error(codes.Unavailable, "away")
			if _, err := w.Renew(ctx, signer, []issuer.Entry{a}, nil); err == nil {
				t.Error("renewed for nobody")
			}
		}
	})
}

// When the authority leaves the bundle, what it signed is replaced at once and once, however young it is.
func TestWalletDistrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := identitytest.Authority(t), identitytest.Authority(t)
		bundle := func(of ...*identity.Authority) *spiffebundle.Bundle {
			b := spiffebundle.New(first.TrustDomain())
			for _, a := range of {
				b.AddX509Authority(a.Root())
			}
			return b
		}
		a := entry("a", unix("uid:1"))
		a.TTL = time.Hour
		var local issuer.Local
		local.Set(identity.Authorities{X509: first})
		signer := &distant{Issuer: issuer.New(issuer.Config{Certifier: &local})}
		signer.Set([]issuer.Entry{a})
		var w issuer.Wallet
		renew := func(own *spiffebundle.Bundle, want bool) {
			t.Helper()
			if changed, err := w.Renew(t.Context(), signer, []issuer.Entry{a}, own); err != nil || changed != want {
				t.Fatalf("changed %t, %v", changed, err)
			}
		}
		renew(bundle(second), true) // whoever signs may be ahead of the bundle, or behind: what is fresh is taken
		renew(bundle(first), false)
		local.Set(identity.Authorities{X509: second})
		renew(bundle(first, second), false)

		after := bundle(second)
		signer.err = status.Error(codes.Unavailable, "away")
		renew(after, false) // held on to, and tried again soon
		asked := signer.asked
		renew(after, false)
		if signer.asked != asked {
			t.Error("asked again at once")
		}
		if begun := time.Now(); (<-w.Due()).Sub(begun) > time.Second {
			t.Errorf("tried again after %s", time.Since(begun))
		}
		signer.err = nil
		renew(after, true)
		renew(after, false)
		renew(bundle(second, first), false)
		renew(nil, false)
		if _, err := identity.Verify(w.SVIDs()[0].Certificates, after.X509Bundle(), time.Now()); err != nil {
			t.Error(err)
		}
		if begun := time.Now(); (<-w.Due()).Sub(begun) < 25*time.Minute {
			t.Errorf("due after %s", time.Since(begun))
		}
	})
}
