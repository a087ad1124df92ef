package identity_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sallyport.dev/identity"
)

const day = 24 * time.Hour

// line is a line of authorities that follow each other as they are told to.
type line struct {
	identity.Rotation
	life, ttl time.Duration
	slots     []identity.Slot
	names     []int // of the slots
	made      int
	signed    []signature
	log       strings.Builder
}

// signature is something that a slot has signed.
type signature struct {
	by          int
	from, until time.Time
}

// follow does what is planned until there is nothing left to do. It returns the last plan.
func (l *line) follow(t fataler, now time.Time) identity.Plan {
	t.Helper()
	for range 4 {
		p := l.Plan(l.slots, now)
		if !l.acts(p) {
			if p.Signs >= 0 && slices.ContainsFunc(l.slots, func(s identity.Slot) bool { return s.Distrusted }) {
				t.Fatalf("who is distrusted stays at %s: %+v", now, l.slots)
			}
			return p
		}
		taken := slices.ContainsFunc(l.slots, func(s identity.Slot) bool { return !s.Activated.IsZero() && s.Valid(now) })
		if p.Prepare {
			l.made++
			l.names = append(l.names, l.made)
			l.slots = append(l.slots, identity.Slot{NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(l.life), Prepared: now})
			fmt.Fprintf(&l.log, "%s prepare %d\n", now.Format(time.DateOnly), l.made)
		}
		if p.Signs >= 0 && l.slots[p.Signs].Activated.IsZero() {
			if wait := l.slots[p.Signs].Prepared.Add(l.Overlap); taken && now.Before(wait) {
				t.Fatalf("%d signs at %s, others know of it for sure at %s", l.names[p.Signs], now, wait)
			}
			l.slots[p.Signs].Activated = now
			fmt.Fprintf(&l.log, "%s activate %d\n", now.Format(time.DateOnly), l.names[p.Signs])
		}
		for _, i := range slices.Backward(p.Retire) {
			if i == p.Signs {
				t.Fatalf("the one that signs is thrown away")
			}
			fmt.Fprintf(&l.log, "%s retire %d\n", now.Format(time.DateOnly), l.names[i])
			l.slots, l.names = slices.Delete(l.slots, i, i+1), slices.Delete(l.names, i, i+1)
		}
	}
	t.Fatalf("there is always something left to do at %s: %+v", now, l.slots)
	panic("unreachable")
}

// acts reports whether a plan says to do anything.
func (l *line) acts(p identity.Plan) bool {
	return p.Prepare || len(p.Retire) > 0 || p.Signs >= 0 && l.slots[p.Signs].Activated.IsZero()
}

// sign signs something now with the slot that may.
func (l *line) sign(t fataler, p identity.Plan, now time.Time) {
	t.Helper()
	if p.Signs < 0 {
		later := func(s identity.Slot) bool { return now.Before(s.NotBefore) }
		valid := func(s identity.Slot) bool { return s.Valid(now) }
		if slices.ContainsFunc(l.slots, valid) || !slices.ContainsFunc(l.slots, later) {
			t.Fatalf("nobody signs at %s: %+v", now, l.slots)
		}
		return
	}
	s := &l.slots[p.Signs]
	if !s.Valid(now) {
		t.Fatalf("signs at %s: %+v", now, s)
	}
	until := now.Add(l.ttl)
	if until.After(s.NotAfter) {
		until = s.NotAfter
	}
	if until.After(s.SignedUntil) {
		s.SignedUntil = until
	}
	l.signed = append(l.signed, signature{l.names[p.Signs], now, until})
}

// covered checks that whatever may still be valid was signed by one who is in the bundle.
func (l *line) covered(t fataler, now time.Time) {
	t.Helper()
	if len(l.slots) == 0 {
		t.Fatalf("the bundle is empty at %s", now)
	}
	l.signed = slices.DeleteFunc(l.signed, func(s signature) bool { return !now.Before(s.until) })
	for _, s := range l.signed {
		if !slices.Contains(l.names, s.by) {
			t.Fatalf("%d has signed something for %s to %s, and is gone at %s", s.by, s.from, s.until, now)
		}
	}
}

// distrust makes a slot one whose key was stolen: nobody needs what it signed any more.
func (l *line) distrust(i int) {
	l.slots[i].Distrusted = true
	l.signed = slices.DeleteFunc(l.signed, func(s signature) bool { return s.by == l.names[i] })
}

// duration draws from a range.
func duration(t *rapid.T, from, to time.Duration, what string) time.Duration {
	return time.Duration(rapid.Int64Range(int64(from), int64(to)).Draw(t, what))
}

func drawLine(t *rapid.T) *line {
	life := duration(t, time.Hour, 10*365*day, "life")
	return &line{
		Rotation: identity.Rotation{Overlap: duration(t, 0, life/6, "overlap")},
		life:     life,
		ttl:      duration(t, time.Second, life/3, "ttl"),
	}
}

// Whatever a clock does, nobody signs before everybody can know, or when it could not be, and nothing that is still
// valid loses its authority.
func TestRotationUnderAnyClock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l, now := drawLine(t), start
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			p := l.follow(t, now)
			l.covered(t, now)
			l.sign(t, p, now)
			switch rapid.IntRange(0, 6).Draw(t, "what happens") {
			case 0:
				now = now.Add(-duration(t, 0, 3*l.life, "clock goes back"))
			case 1:
				now = now.Add(duration(t, 0, 3*l.life, "sleeps"))
			case 2:
				if p.Signs >= 0 {
					l.slots[p.Signs].Leaving = true
				}
			case 3:
				l.distrust(rapid.IntRange(0, len(l.slots)-1).Draw(t, "distrusted"))
			default:
				now = now.Add(duration(t, 0, l.life/4, "time goes by"))
			}
		}
	})
}

// Where nobody sleeps, there is always one that signs, and at most the first of them all was ever news.
func TestRotationInGoodOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l, now := drawLine(t), start
		for range 60 {
			p := l.follow(t, now)
			l.covered(t, now)
			l.sign(t, p, now)
			s := l.slots[p.Signs]
			if l.names[p.Signs] > 1 && s.Activated.Sub(s.Prepared) < l.Overlap {
				t.Fatalf("activated %s after it was prepared", s.Activated.Sub(s.Prepared))
			}
			if len(l.slots) > 3 {
				t.Fatalf("%d at once: %+v", len(l.slots), l.slots)
			}
			now = now.Add(duration(t, time.Second, l.life/6, "step"))
		}
	})
}

// Nothing has to be done before the time that a plan names for looking again, and something is named always.
func TestNothingToDoUntilAgain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l, now := drawLine(t), start
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			p := l.follow(t, now)
			l.sign(t, p, now)
			p = l.Plan(l.slots, now)
			if !p.Again.After(now) {
				t.Fatalf("at %s: look again at %s", now, p.Again)
			}
			between := now.Add(duration(t, 0, p.Again.Sub(now)-1, "between"))
			if q := l.Plan(l.slots, between); l.acts(q) || q.Signs != p.Signs {
				t.Fatalf("at %s there was something to do before %s, at %s: %+v", now, p.Again, between, q)
			}
			now = p.Again.Add(duration(t, -l.life/20, l.life/10, "not on time"))
		}
	})
}

// One after the other: by itself, because somebody wants it, after a long sleep, and with a clock that goes back.
func TestLifeOfRoots(t *testing.T) {
	l := &line{Rotation: identity.Rotation{Overlap: day}, life: 3650 * day, ttl: 30 * day}
	now := start
	live := func(until string) {
		for ; now.Format(time.DateOnly) != until; now = now.Add(day) {
			l.sign(t, l.follow(t, now), now)
			l.covered(t, now)
		}
		fmt.Fprintf(&l.log, "%s it is now\n", until)
	}
	live("2034-01-01")
	l.slots[l.Plan(l.slots, now).Signs].Leaving = true
	live("2035-01-01")
	now = now.AddDate(40, 0, 0)
	live("2075-01-02")
	now = now.AddDate(-25, 0, 0)
	live("2050-01-05")
	want := `2026-03-01 prepare 1
2026-03-01 activate 1
2031-02-28 prepare 2
2032-10-29 activate 2
2032-11-27 retire 1
2034-01-01 it is now
2034-01-01 prepare 3
2034-01-02 activate 3
2034-01-31 retire 2
2035-01-01 it is now
2075-01-01 prepare 4
2075-01-01 activate 4
2075-01-02 it is now
2050-01-05 it is now
`
	if diff := cmp.Diff(want, l.log.String()); diff != "" {
		t.Error(diff)
	}
}

// Who is distrusted goes at once, whatever it signed; the one that signs, as soon as another signs in its place.
func TestDistrusted(t *testing.T) {
	l := &line{Rotation: identity.Rotation{Overlap: day}, life: 100 * day, ttl: 10 * day}
	now := start
	for range 68 {
		l.sign(t, l.follow(t, now), now)
		now = now.Add(day)
	}
	l.distrust(0) // the one before
	l.follow(t, now)
	l.distrust(0) // the only one
	l.sign(t, l.follow(t, now), now)
	l.covered(t, now)
	now = now.Add(50 * day)
	l.follow(t, now)
	l.distrust(1) // the next
	l.sign(t, l.follow(t, now), now)
	want := `2026-03-01 prepare 1
2026-03-01 activate 1
2026-04-20 prepare 2
2026-05-07 activate 2
2026-05-08 retire 1
2026-05-08 prepare 3
2026-05-08 activate 3
2026-05-08 retire 2
2026-06-27 prepare 4
2026-06-27 prepare 5
2026-06-27 retire 4
`
	if diff := cmp.Diff(want, l.log.String()); diff != "" {
		t.Error(diff)
	}
}

// A clock that runs ahead and comes back costs nothing: who signed signs on, and what was made ahead stays for its time.
func TestClockAhead(t *testing.T) {
	l := &line{Rotation: identity.Rotation{Overlap: day}, life: 100 * day, ttl: day}
	l.follow(t, start)
	ahead := start.Add(1000 * day)
	l.follow(t, ahead)
	now := start.Add(10 * day)
	p := l.follow(t, now)
	if p.Signs != 0 || len(l.slots) != 2 || len(l.Plan(l.slots, now).Retire) > 0 {
		t.Errorf("%d of %d signs", p.Signs, len(l.slots))
	}
	if p := l.follow(t, ahead.Add(2*day)); p.Signs != 0 || len(l.slots) != 1 {
		t.Errorf("when it is due: %d of %d signs", p.Signs, len(l.slots))
	}
}
