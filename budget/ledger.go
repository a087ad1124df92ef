package budget

import (
	"cmp"
	"errors"
	"iter"
	"slices"
	"time"
)

// ErrFull is that there are as many counters as there can be.
var ErrFull = errors.New("there are too many counters")

// Slack is by how much a clock may go back unnoticed. Counters are kept for so long after their window.
const Slack = time.Hour

// sweepEvery is how often a full ledger looks for counters that are over.
const sweepEvery = time.Second

// Ledger is the counters of one machine. It is made by NewLedger, and for one goroutine at a time.
type Ledger struct {
	counters map[Account]*counter
	most     int
	swept    time.Time
}

type counter struct {
	window     time.Time
	max        int64 // as the last charge had it
	used, held int64
}

// NewLedger returns a ledger of at most so many counters.
func NewLedger(most int) *Ledger { return &Ledger{counters: map[Account]*counter{}, most: most} }

// Reserve takes all charges, or none of them. ErrFull is that there is no room to count.
func (l *Ledger) Reserve(now time.Time, charges []Charge) (Answer, error) {
	if !l.room(now, charges) {
		return Answer{}, ErrFull
	}
	answer := Answer{Allowed: true}
	for _, c := range charges {
		at := l.at(now, c.Account)
		at.max = c.Max
		answer.Allowed = answer.Allowed && bounded(c.Amount) <= c.Max-at.used
	}
	for _, c := range charges {
		at := l.counters[c.Account]
		if answer.Allowed {
			at.used += bounded(c.Amount)
			if c.Unit == Tokens {
				at.held += bounded(c.Amount)
			}
		}
		answer.Balances = append(answer.Balances, at.balance(c.Account))
	}
	return answer, nil
}

// Cancel takes back what Reserve has just taken, for one who could not write it down.
func (l *Ledger) Cancel(charges []Charge) {
	for _, c := range charges {
		if at := l.counters[c.Account]; at != nil {
			at.used = max(0, at.used-bounded(c.Amount))
			if c.Unit == Tokens {
				at.held = max(0, at.held-bounded(c.Amount))
			}
		}
	}
}

// Settle gives back what was not used, never more than was reserved, and takes what was used beyond. If the window is over,
// nothing is given back, and what was used beyond counts in the window of now. It returns how the account stands, if it
// changed.
func (l *Ledger) Settle(now time.Time, s Settlement) (Balance, error) {
	reserved, used := bounded(s.Reserved), bounded(s.Used)
	start, _ := s.Per.Window(now)
	if at := l.counters[s.Account]; at != nil && at.window.Equal(s.Window) && !start.After(s.Window) {
		at.used = bounded(at.used + used - reserved)
		at.held = max(0, at.held-reserved)
		return at.balance(s.Account), nil
	}
	if used <= reserved {
		return Balance{}, nil
	}
	if !l.room(now, []Charge{{Account: s.Account}}) {
		return Balance{}, ErrFull
	}
	at := l.at(now, s.Account)
	at.used = bounded(at.used + used - reserved)
	return at.balance(s.Account), nil
}

// All are the accounts whose windows are not over.
func (l *Ledger) All(now time.Time) iter.Seq[Balance] {
	return func(yield func(Balance) bool) {
		for a, at := range l.counters {
			if b := at.balance(a); now.Before(b.Resets) && !yield(b) {
				return
			}
		}
	}
}

// Put sets an account as it stood: what it holds is used.
func (l *Ledger) Put(b Balance) {
	l.counters[b.Account] = &counter{window: b.Window.UTC(), max: b.Max, used: bounded(b.Used)}
}

// Forget leaves out what is over.
func (l *Ledger) Forget(now time.Time) {
	for a, at := range l.counters {
		if _, end := a.Per.Window(at.window); now.Sub(end) > Slack {
			delete(l.counters, a)
		}
	}
}

// room makes room for accounts that are not there yet.
func (l *Ledger) room(now time.Time, charges []Charge) bool {
	fits := func() bool {
		more := 0
		for _, c := range charges {
			if l.counters[c.Account] == nil {
				more++
			}
		}
		return more == 0 || len(l.counters)+more <= l.most
	}
	if fits() {
		return true
	}
	if now.Sub(l.swept).Abs() < sweepEvery {
		return false
	}
	l.swept = now
	l.Forget(now)
	return fits()
}

// at is the counter of the account in the window of now.
//
// A clock that goes back a little leaves it in the later window. One that goes back far was wrong before: then what is used
// counts in the earlier window, so that nothing is given back.
func (l *Ledger) at(now time.Time, a Account) *counter {
	start, _ := a.Per.Window(now)
	at := l.counters[a]
	switch {
	case at == nil:
		at = &counter{window: start}
		l.counters[a] = at
	case start.After(at.window):
		*at = counter{window: start, max: at.max}
	case at.window.Sub(now) > Slack:
		at.window = start
	}
	return at
}

func (c *counter) balance(a Account) Balance {
	_, end := a.Per.Window(c.window)
	return Balance{Account: a, Max: c.max, Used: c.used, Held: min(c.held, c.used), Window: c.window, Resets: end}
}

// Sorted are balances in the order of their accounts.
func Sorted(all iter.Seq[Balance]) []Balance {
	return slices.SortedFunc(all, func(a, b Balance) int {
		return cmp.Or(cmp.Compare(a.Grant, b.Grant), cmp.Compare(a.Caller, b.Caller), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Per, b.Per))
	})
}
