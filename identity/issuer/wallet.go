package issuer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"sallyport.dev/identity"
)

// Signer certifies keys: an *Issuer.
type Signer interface {
	Issue(context.Context, Entry, crypto.PublicKey) ([]*x509.Certificate, error)
}

// Wallet holds the X.509-SVIDs of one stream, with their keys, and knows when they are due for replacement. Its zero
// value is empty. It belongs to one goroutine.
type Wallet struct {
	held []held
}

type held struct {
	entry Entry
	svid  *x509svid.SVID
}

// rotateAt is when the SVID is to be replaced.
func (h held) rotateAt() time.Time {
	leaf := h.svid.Certificates[0]
	return identity.RotateAt(leaf.NotBefore, leaf.NotAfter)
}

// Renew makes the wallet hold one SVID for each entry, in their order, and no other. Those before half their life
// whose entry is the same are kept; for the others it makes a new key and has it certified. It reports whether anything
// is different now. On an error, everything is as before.
func (w *Wallet) Renew(ctx context.Context, s Signer, entries []Entry) (changed bool, err error) {
	next := make([]held, len(entries))
	changed = len(entries) != len(w.held)
	for i, e := range entries {
		h, ok := w.find(e)
		if !ok {
			svid, err := newSVID(ctx, s, e)
			if err != nil {
				return false, err
			}
			h = held{e, svid}
		}
		next[i] = h
		changed = changed || !ok || w.held[i].svid != h.svid
	}
	w.held = next
	return changed, nil
}

// find returns what is held for an entry and may still be held.
func (w *Wallet) find(e Entry) (held, bool) {
	now := time.Now()
	for _, h := range w.held {
		if h.entry.equal(e) && now.Before(h.rotateAt()) {
			return h, true
		}
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

// Due fires when the first SVID is to be replaced; never, if none is held.
func (w *Wallet) Due() <-chan time.Time {
	if len(w.held) == 0 {
		return nil
	}
	first := w.held[0].rotateAt()
	for _, h := range w.held[1:] {
		if at := h.rotateAt(); at.Before(first) {
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
	chain, err := s.Issue(ctx, e, key.Public())
	if err != nil {
		return nil, err
	}
	return &x509svid.SVID{ID: e.ID, Certificates: chain, PrivateKey: key}, nil
}
