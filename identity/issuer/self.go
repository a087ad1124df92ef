package issuer

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// retrySelf is how soon it is tried again to get the control plane's own identity.
const retrySelf = 5 * time.Second

// Self is the control plane's own X.509-SVID, for what it serves to other machines. It has none until Renew, which is one
// goroutine's; the rest is safe for concurrent use. All fields are needed.
type Self struct {
	Signer Signer
	Entry  Entry
	Bundle func() *spiffebundle.Bundle // of the own trust domain; it may return nil
	Log    *slog.Logger

	wallet Wallet
	svid   atomic.Pointer[x509svid.SVID]
}

// Renew gets an SVID if there is none, if it is time, or if nobody trusts any longer whoever signed the last. It returns
// when to come again.
func (s *Self) Renew(ctx context.Context) (due <-chan time.Time) {
	changed, err := s.wallet.Renew(ctx, s.Signer, []Entry{s.Entry}, s.Bundle())
	if err != nil {
		if ctx.Err() == nil {
			s.Log.Error("no identity for the control plane", "error", err)
		}
		return time.After(retrySelf) // the wallet's own time may be past
	}
	if changed {
		s.svid.Store(s.wallet.SVIDs()[0])
	}
	return s.wallet.Due()
}

// GetX509SVID makes it an x509svid.Source.
func (s *Self) GetX509SVID() (*x509svid.SVID, error) {
	svid := s.svid.Load()
	if svid == nil {
		return nil, errors.New("the control plane has no identity yet")
	}
	return svid, nil
}

// Certificate returns what a TLS server shows.
func (s *Self) Certificate() (*tls.Certificate, error) {
	svid, err := s.GetX509SVID()
	if err != nil {
		return nil, err
	}
	return Certificate(svid), nil
}

// Certificate is an SVID as crypto/tls has it.
func Certificate(svid *x509svid.SVID) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, cert := range svid.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}
