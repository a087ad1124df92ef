package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
)

// Signer certifies keys: an *Issuer.
type Signer interface {
	CertifyX509(ctx context.Context, e Entry, k Key) ([]*x509.Certificate, error)
}

// How long to wait before a replacement that failed is tried again: between the two, longer each time.
const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// Wallet holds the X.509-SVIDs of one stream, with their keys, and knows when they are due for replacement. Its zero
// value is empty. It belongs to one goroutine.
type Wallet struct {
	held []held
}

type held struct {
	entry Entry
	svid  *x509svid.SVID
	own   *spiffebundle.Bundle // in force when the SVID was made or last looked at
	// While whoever signs cannot be reached, what should have been replaced is held on to until it ends.
	retryAt time.Time     // when to ask again; zero: it is not overdue
	wait    time.Duration // how long was waited last
}

// due is when the SVID is to be replaced, or that is to be tried again.
func (h held) due() time.Time {
	if !h.retryAt.IsZero() {
		return h.retryAt
	}
	leaf := h.svid.Certificates[0]
	return identity.RenewAt(leaf)
}

// overdue returns it with the next time to try. The waits double, and get shorter again towards the end of the SVID,
// which is tried last of all. Chance keeps those apart who lost the same signer at the same time.
func (h held) overdue(now time.Time) held {
	left := h.end().Sub(now)
	h.wait = min(max(2*h.wait, firstRetry), lastRetry)
	h.retryAt = now.Add(min(spread(min(h.wait, max(left/4, firstRetry))), left))
	return h
}

// spread returns between three quarters of a time and all of it.
func spread(d time.Duration) time.Duration {
	return d - time.Duration(mathrand.Int64N(int64(max(d/4, 1)))) //nolint:gosec // nobody gains by guessing it
}

// isTrusted reports whether the trust domain's members still accept the SVID. It verifies once for each bundle. Of what is
// fresh that is not asked: whoever signed it may know a bundle already that is told to the caller next.
func (h held) isTrusted(own *spiffebundle.Bundle, now time.Time) bool {
	if own == nil || own == h.own {
		return true
	}
	_, err := identity.Verify(h.svid.Certificates, own.X509Bundle(), now)
	return err == nil
}

// Renew makes the wallet hold one SVID for each entry, in their order, and no other. Those before half their life
// whose entry is the same, and whose authority the bundle of their own trust domain still has, are kept; for the others it
// makes a new key and has it certified. While whoever signs cannot be reached (the gRPC status Unavailable and its like),
// an SVID of the same ID that has not ended is kept too, and Due says when to try again. Without a bundle (nil), no
// authority is asked for. It reports whether anything is different now. On an error, everything is as before.
func (w *Wallet) Renew(ctx context.Context, s Signer, entries []Entry, own *spiffebundle.Bundle) (changed bool, err error) {
	now := time.Now()
	next := make([]held, len(entries))
	changed = len(entries) != len(w.held)
	var away error // whoever signs: the others are not made to wait for it too
	for i, e := range entries {
		h, ok := w.find(func(h held) bool { return h.entry.equal(e) && now.Before(h.due()) && now.Before(h.end()) })
		if !ok || !h.isTrusted(own, now) {
			svid, err := (*x509svid.SVID)(nil), away
			if err == nil {
				svid, err = newSVID(ctx, s, e)
			}
			old, valid := w.find(func(h held) bool { return h.entry.ID == e.ID && now.Before(h.end()) })
			switch {
			case err == nil:
				h = held{entry: e, svid: svid}
			case isAway(err) && ctx.Err() == nil && valid:
				away, h = err, old.overdue(now)
			default:
				return false, err
			}
		}
		h.own = own
		next[i] = h
		changed = changed || w.held[i].svid != h.svid
	}
	w.held = next
	return changed, nil
}

func (h held) end() time.Time { return h.svid.Certificates[0].NotAfter }

// isAway reports whether an error says that there is no answer now, rather than that it is no.
func isAway(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted:
		return true
	}
	return false
}

func (w *Wallet) find(is func(held) bool) (held, bool) {
	if i := slices.IndexFunc(w.held, is); i >= 0 {
		return w.held[i], true
	}
	return held{}, false
}

// SVIDs returns what is held, in the order of the entries last given to Renew.
func (w *Wallet) SVIDs() []*x509svid.SVID {
	svids := make([]*x509svid.SVID, len(w.held))
	for i, h := range w.held {
		svids[i] = h.svid
	}
	return svids
}

// Due fires when Renew is next to be called: when the first SVID is to be replaced, or that is to be tried again; never,
// if none is held.
func (w *Wallet) Due() <-chan time.Time {
	if len(w.held) == 0 {
		return nil
	}
	first := w.held[0].due()
	for _, h := range w.held[1:] {
		if at := h.due(); at.Before(first) {
			first = at
		}
	}
	return time.After(time.Until(first))
}

func newSVID(ctx context.Context, s Signer, e Entry) (*x509svid.SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of %s: %w", e.ID, err)
	}
	chain, err := s.CertifyX509(ctx, e, HeldKey(key))
	if err != nil {
		return nil, err
	}
	return &x509svid.SVID{ID: e.ID, Certificates: chain, PrivateKey: key}, nil
}
