package disk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport.dev/identity"
)

// Distrust takes an authority out of the bundle at once and for good, as after the theft of its key: nobody is to accept
// any longer what it signed, however long that is valid. The ID is one of the Description's, or the beginning of one. A
// root goes together with every other certificate of its key, and an upstream authority's stays away also if that names it
// again. What signs now is refused; see Rotate. Run must be running.
func (k *Keeper) Distrust(ctx context.Context, id string) error {
	if id == "" {
		return errors.New("distrust authority: none is named")
	}
	return k.ask(ctx, request{distrust: id})
}

// distrust puts the fact in force first, and then what follows from it, which may fail.
func (k *Keeper) distrust(ctx context.Context, id string, now time.Time) error {
	next, err := k.state.distrust(id, now)
	if err != nil {
		return fmt.Errorf("distrust authority: %w", err)
	}
	if err := k.keep(next, now); err != nil {
		return err
	}
	k.show(now, now, nil)
	k.idle = [2]time.Time{}
	if err := k.look(ctx, now, nil); err != nil {
		k.config.Log.Error("authority not kept up", "error", err)
	}
	return nil
}

// distrust returns a state in which an authority is distrusted.
func (s state) distrust(id string, now time.Time) (state, error) {
	one, err := describe(s, now).Find(id)
	if err != nil {
		return state{}, err
	}
	if s.below != nil && one.ID == fingerprint(s.below.chain[0].Raw) {
		return state{}, errors.New("an intermediate is trusted because its root is, which alone can be distrusted")
	}
	next := s.clone()
	if i := slices.IndexFunc(s.jwt, func(k jwtKey) bool { return k.authority.KeyID() == one.ID }); i >= 0 {
		next.jwt[i].Distrusted = true
		return next, stillSigns(identity.Signing(slots(s.jwt, (*jwtKey).slot), now), slots(next.jwt, (*jwtKey).slot))
	}
	named := slices.IndexFunc(s.roots, func(r root) bool { return fingerprint(r.cert.Raw) == one.ID })
	for i := range next.roots {
		if sameKey(s.roots[i].cert, s.roots[named].cert) {
			next.roots[i].Distrusted = true
		}
	}
	return next, stillSigns(s.signs(now), slots(next.roots, (*root).slot))
}

// stillSigns refuses to distrust what has signed so far. So the last of its kind stays too.
func stillSigns(signed int, all []identity.Slot) error {
	switch {
	case signed < 0:
		return errors.New("nothing of its kind can sign now, so that something must stay")
	case all[signed].Distrusted:
		return errors.New("it is what signs now, or has the same key")
	}
	return nil
}

// Find returns the authority with an ID, or the one whose ID begins so.
func (d Description) Find(id string) (Slot, error) {
	all := slices.Concat(d.Roots, d.JWT)
	if d.Intermediate != nil {
		all = append(all, *d.Intermediate)
	}
	if i := slices.IndexFunc(all, func(s Slot) bool { return s.ID == id }); i >= 0 && id != "" {
		return all[i], nil
	}
	all = slices.DeleteFunc(all, func(s Slot) bool { return id == "" || !strings.HasPrefix(s.ID, id) })
	switch {
	case len(all) == 0:
		return Slot{}, fmt.Errorf("no authority has an ID that begins with %q", id)
	case len(all) > 1:
		return Slot{}, fmt.Errorf("%d authorities have an ID that begins with %q", len(all), id)
	}
	return all[0], nil
}
