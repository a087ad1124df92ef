package disk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"sallyport.dev/identity"
)

// Description is what a folder keeps, without its secrets.
type Description struct {
	TrustDomain string `json:"trust_domain"`
	Sequence    uint64 `json:"sequence"`  // of the bundle
	Upstream    bool   `json:"upstream"`  // the root is somebody else's
	Encrypted   bool   `json:"encrypted"` // the file is
	Roots       []Slot `json:"roots"`
	// Intermediate is what signs X.509-SVIDs, below the active root.
	Intermediate *Slot     `json:"intermediate,omitempty"`
	JWT          []Slot    `json:"jwt"`
	Next         time.Time `json:"next,omitzero"`     // when there is something to do
	Problem      string    `json:"problem,omitempty"` // what could not be done when it was due, and is tried again
}

// Slot is one authority.
type Slot struct {
	ID        string    `json:"id"`    // SHA-256 of the certificate, or key ID (kid)
	State     State     `json:"state"` // what it is for
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Prepared  time.Time `json:"prepared,omitzero"`  // since when others are told to trust it
	Activated time.Time `json:"activated,omitzero"` // since when it signs
	// SignedUntil is when the last that it signed ends; of what is active, by now.
	SignedUntil time.Time `json:"signed_until,omitzero"`
	Leaving     bool      `json:"leaving,omitempty"` // it is to be replaced as soon as may be
}

// State is what an authority is for.
type State string

// States, in the order in which an authority has them.
const (
	Prepared State = "prepared" // it is trusted, so that everybody knows it when it signs
	Active   State = "active"   // it signs
	Old      State = "old"      // it is trusted as long as something that it signed is valid
	// Distrusted is what an upstream authority may name still, and nobody is to trust.
	Distrusted State = "distrusted"
)

func describe(s state, now time.Time) Description {
	d := Description{TrustDomain: s.td.Name(), Sequence: s.sequence}
	slot := func(i int, one identity.Slot, id string, active int) Slot {
		out := Slot{ID: id, State: Old, NotBefore: one.NotBefore.UTC(), NotAfter: one.NotAfter.UTC(), Prepared: one.Prepared,
			Activated: one.Activated, SignedUntil: one.SignedUntil, Leaving: one.Leaving}
		switch {
		case one.Distrusted:
			out.State = Distrusted
		case i == active:
			out.State = Active
		case one.Activated.IsZero():
			out.State = Prepared
		}
		return out
	}
	active := s.signs(now)
	for i, r := range s.roots {
		d.Roots = append(d.Roots, slot(i, r.Slot, fingerprint(r.cert.Raw), active))
	}
	if s.below != nil {
		c := s.below.chain[0]
		d.Intermediate = &Slot{ID: fingerprint(c.Raw), State: Active, NotBefore: c.NotBefore, NotAfter: c.NotAfter}
	}
	active = identity.Signing(slots(s.jwt, (*jwtKey).slot), now)
	for i, k := range s.jwt {
		d.JWT = append(d.JWT, slot(i, k.Slot, k.authority.KeyID(), active))
	}
	return d
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// tell logs what is different in a state that is about to be in force.
func (k *Keeper) tell(next state, now time.Time) {
	was, is := describe(k.state, now), describe(next, now)
	log := func(kind string, was, is []Slot) {
		for _, s := range is {
			i := slices.IndexFunc(was, func(w Slot) bool { return w.ID == s.ID })
			switch {
			case s.State == Distrusted && i >= 0 && was[i].State != Distrusted:
				k.config.Log.Warn("authority distrusted: whatever it signed is refused from now on", "kind", kind, "id", s.ID)
			case s.State == Active && len(was) > 0 && s.Activated.Equal(now) && s.Activated.Sub(s.Prepared) < k.config.Overlap:
				k.config.Log.Warn("authority signs before everybody can know it: whoever refuses it must get the bundle", "kind", kind, "id", s.ID, "until", s.NotAfter)
			case i < 0 || was[i].State != s.State:
				k.config.Log.Info("authority "+string(s.State), "kind", kind, "id", s.ID, "until", s.NotAfter)
			}
		}
		for _, w := range was {
			if w.State != Distrusted && !slices.ContainsFunc(is, func(s Slot) bool { return w.ID == s.ID }) {
				k.config.Log.Info("authority no longer trusted", "kind", kind, "id", w.ID)
			}
		}
	}
	log("x509", was.Roots, is.Roots)
	log("jwt", was.JWT, is.JWT)
	if i := is.Intermediate; i != nil && (was.Intermediate == nil || was.Intermediate.ID != i.ID) {
		k.config.Log.Info("intermediate authority active", "id", i.ID, "until", i.NotAfter)
	}
}

// Show returns what is kept, without its secrets.
func (k *Keeper) Show() Description { return k.shown.Load().description }

// Forms of a bundle.
const (
	PEM    = "pem"    // the roots, for programs that know X.509 and not SPIFFE
	SPIFFE = "spiffe" // all of it, as JSON (Trust Domain and Bundle 4)
)

// Export writes a bundle in one of the forms.
func Export(b *spiffebundle.Bundle, form string) ([]byte, error) {
	switch form {
	case PEM:
		return b.X509Bundle().Marshal()
	case SPIFFE:
		return b.Marshal()
	}
	return nil, errors.New("export bundle: the forms are " + PEM + " and " + SPIFFE)
}

// Actions are what operators may have the keeper do, and nobody else, by the patterns of their requests. What each returns
// is its answer as JSON.
//
//	GET  /ca                                   the Description
//	GET  /ca/bundle?format=pem|spiffe          whom to trust: a string of PEM, or a SPIFFE bundle
//	POST /ca/rotate?what=x509|jwt|all&now=true see Rotate; the Description then
//	POST /ca/distrust?id=ID                    see Distrust; the Description then
func (k *Keeper) Actions() map[string]func(url.Values) (any, error) {
	return map[string]func(url.Values) (any, error){
		"GET /ca": func(url.Values) (any, error) { return k.Show(), nil },
		"GET /ca/bundle": func(q url.Values) (any, error) {
			data, err := Export(k.Authorities().Bundle, q.Get("format"))
			if err != nil {
				return nil, err
			}
			if q.Get("format") == PEM {
				return string(data), nil
			}
			return json.RawMessage(data), nil
		},
		"POST /ca/rotate": func(q url.Values) (any, error) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*upstreamWait)
			defer cancel()
			if err := k.Rotate(ctx, What(q.Get("what")), q.Get("now") == "true"); err != nil {
				return nil, err
			}
			return k.Show(), nil
		},
		"POST /ca/distrust": func(q url.Values) (any, error) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*upstreamWait)
			defer cancel()
			if err := k.Distrust(ctx, q.Get("id")); err != nil {
				return nil, err
			}
			return k.Show(), nil
		},
	}
}
