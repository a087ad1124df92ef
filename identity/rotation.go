package identity

import "time"

// Slot is one authority of several that follow each other, as far as time goes: a root, or a key for JWT-SVIDs.
type Slot struct {
	NotBefore, NotAfter time.Time
	Prepared            time.Time // since when others are told to trust it
	Activated           time.Time // since when it signs; zero: it does not yet
	SignedUntil         time.Time // when the last thing that it signed ends
	Leaving             bool      // it is to be replaced as soon as may be, whatever its age
	Distrusted          bool      // nobody is to trust it any more, whatever it signed: its key is somebody else's too
}

// Valid reports whether the slot may sign now, if it has been activated.
func (s Slot) Valid(now time.Time) bool {
	return !s.Distrusted && !now.Before(s.NotBefore) && now.Before(s.NotAfter)
}

// at is the moment when a part of the slot's life is over.
func (s Slot) at(part, of int64) time.Time {
	return s.NotBefore.Add(s.NotAfter.Sub(s.NotBefore) / time.Duration(of) * time.Duration(part))
}

// Signing returns the slot that signs now: of those that have been activated and are valid, the last; -1: none.
func Signing(slots []Slot, now time.Time) int {
	for i := len(slots) - 1; i >= 0; i-- {
		if !slots[i].Activated.IsZero() && slots[i].Valid(now) {
			return i
		}
	}
	return -1
}

// Rotation is how authorities follow each other. The next is prepared at half the life of the one that signs, and
// takes over at two thirds of it. From its preparation on it stands in the bundle, so that nobody meets a signature of
// an authority that he has not heard of; the one before stays there until everything that it signed has ended.
type Rotation struct {
	// Overlap is for how long everybody is told of an authority at least before it signs, and for how long its
	// predecessor is kept at least. An authority that takes over from none has nothing to wait for.
	Overlap time.Duration
}

// Plan is what is to be done now, in this order.
type Plan struct {
	Prepare bool  // make another slot and append it to the others
	Signs   int   // the slot that signs, to be activated if it is not; it may be the one to be prepared; -1: none may
	Retire  []int // slots that nobody needs or ought to trust any more, in rising order; never the one that signs
	// Again is when to plan again if nothing happens before; zero: not known.
	Again time.Time
}

// Plan says what is to be done with slots, which stand in the order in which they were prepared. When it is done and
// the slots are planned again for the same moment, after at most two rounds there is nothing left to do.
//
// It trusts no clock more than it must. If everything has ended, the next slot signs at once, whether it was prepared
// or not; if everything begins later, because the clock has gone back, nobody signs, nothing is made, and nothing is
// thrown away. A slot whose successor lies in the future signs on. What a clock that ran ahead has ended is there for
// another Overlap, should it go back.
//
// A slot that is distrusted never signs, and goes as soon as another has signed, whatever time it is.
func (r Rotation) Plan(slots []Slot, now time.Time) Plan {
	p := Plan{Signs: Signing(slots, now)}
	next, behind := -1, false
	for i, s := range slots {
		behind = behind || now.Before(s.NotBefore)
		if s.Activated.IsZero() && s.Valid(now) {
			next = i
		}
	}
	again := func(at time.Time) {
		if at.After(now) && (p.Again.IsZero() || at.Before(p.Again)) {
			p.Again = at
		}
	}
	for _, s := range slots {
		again(s.NotBefore)
		again(s.NotAfter)
	}
	switch {
	case p.Signs >= 0 && next >= 0:
		if at := r.takeover(slots[p.Signs], slots[next]); !now.Before(at) {
			p.Signs = next
		} else {
			again(at)
		}
	case p.Signs >= 0:
		if at := slots[p.Signs].at(1, 2); slots[p.Signs].Leaving || !now.Before(at) {
			p.Prepare = true
		} else {
			again(at)
		}
	case next >= 0:
		p.Signs = next
	case !behind:
		p.Prepare, p.Signs = true, len(slots)
	}
	if p.Signs < 0 || p.Signs == len(slots) || slots[p.Signs].Activated.IsZero() {
		return p // whoever takes over has to prove itself before anything is thrown away
	}
	proven := slots[p.Signs].Activated.Add(r.Overlap)
	for i, s := range slots {
		over := s.SignedUntil
		if s.Activated.IsZero() {
			over = s.NotAfter
		}
		switch {
		case s.Distrusted:
			p.Retire = append(p.Retire, i)
		case i == p.Signs || now.Before(s.NotBefore):
		case now.Before(over) || now.Before(proven):
			again(over)
			again(proven)
		default:
			p.Retire = append(p.Retire, i)
		}
	}
	return p
}

// takeover is when a slot takes over from another that is still valid.
func (r Rotation) takeover(from, to Slot) time.Time {
	at := to.Prepared.Add(r.Overlap)
	if usual := from.at(2, 3); !from.Leaving && usual.After(at) {
		return usual
	}
	return at
}
