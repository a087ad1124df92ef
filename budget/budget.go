// Package budget counts what callers use of what a grant gives them: requests and tokens in windows of time.
//
// It is for whoever keeps counters beside a gateway (budget/local in a file, budget/shared in Redis) and for the service
// that the gateway asks (budget/gate). A budget is a bound, not a bill: a request takes in advance the most that it can use,
// and what it did not use is given back when it has ended. So no order of requests, and no crash, gives more than the bound;
// what nobody settles stays taken until the window ends. The exception is an answer that is longer than the request said, or
// could have said and did not: it is taken when it has ended, also beyond the bound.
//
// Windows are fixed and begin where people expect it: a day at 00:00 UTC, a month on its first day. A sliding window or a
// leaky bucket would smooth the load, which is the backend's affair, but nobody could be told when there will be more, nor
// compare it with an invoice. The price is that a caller may use two minutes' worth around the turn of a minute.
//
// The package has no clock and does no IO: time is a parameter.
package budget

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"sallyport.dev/segment"
)

// Unit is what is counted.
type Unit string

// What a budget can bound.
const (
	Requests Unit = "requests"
	Tokens   Unit = "tokens"
)

// Period is how long a window is. The zero value is no period.
type Period string

// Windows begin at full minutes and hours, at midnight and on the first of a month, all in UTC.
const (
	Minute Period = "Minute"
	Hour   Period = "Hour"
	Day    Period = "Day"
	Month  Period = "Month"
)

// Periods are the periods that a budget can name.
func Periods() []Period { return []Period{Minute, Hour, Day, Month} }

// Window returns the window that the moment is in: its first moment, and that of the next one.
func (p Period) Window(now time.Time) (start, end time.Time) {
	now = now.UTC()
	switch p {
	case Minute:
		start = now.Truncate(time.Minute)
		return start, start.Add(time.Minute)
	case Hour:
		start = now.Truncate(time.Hour)
		return start, start.Add(time.Hour)
	case Month:
		start = time.Date(now.Year(), now.Month(), 1, 0, 0, 0, 0, time.UTC)
		return start, start.AddDate(0, 1, 0)
	}
	start = time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, time.UTC)
	return start, start.AddDate(0, 0, 1)
}

// Most is the largest bound, and more than anything that is counted: Lua and JSON still tell it from its neighbours.
const Most = 1 << 50

// Limit is so much in each window. The zero value does not limit.
type Limit struct {
	Max int64
	Per Period
}

// Terms are what a grant says of its budget. The zero value bounds nothing.
type Terms struct {
	Requests, Tokens Limit
	// Shared is whether all callers of the grant share one budget; else each has its own.
	Shared bool
	// Open is whether requests pass uncounted while the counters can't be asked; else they are denied.
	Open bool
}

// IsZero reports whether nothing is bounded.
func (t Terms) IsZero() bool { return t.Requests == Limit{} && t.Tokens == Limit{} }

const (
	wordShared = "shared"
	wordOpen   = "open"
)

// String writes the terms as ParseTerms reads them: "requests=60/Minute tokens=100000/Day shared open".
func (t Terms) String() string {
	var words []string
	for _, l := range []struct {
		unit Unit
		Limit
	}{{Requests, t.Requests}, {Tokens, t.Tokens}} {
		if l.Limit != (Limit{}) {
			words = append(words, fmt.Sprintf("%s=%d/%s", l.unit, l.Max, l.Per))
		}
	}
	if t.Shared {
		words = append(words, wordShared)
	}
	if t.Open {
		words = append(words, wordOpen)
	}
	return strings.Join(words, " ")
}

var errTerms = errors.New("these are no terms of a budget")

// ParseTerms reads what String writes, and nothing else.
func ParseTerms(text string) (Terms, error) {
	var t Terms
	for word := range strings.SplitSeq(text, " ") {
		unit, limit, _ := strings.Cut(word, "=")
		most, per, _ := strings.Cut(limit, "/")
		n, err := strconv.ParseInt(most, 10, 64)
		l := Limit{n, Period(per)}
		switch {
		case word == wordShared:
			t.Shared = true
		case word == wordOpen:
			t.Open = true
		case err != nil || !l.valid():
			return Terms{}, fmt.Errorf("read %.100q: %w", text, errTerms)
		case unit == string(Requests):
			t.Requests = l
		default:
			t.Tokens = l
		}
	}
	if t.IsZero() || t.String() != text { // which also takes care of what stands twice, or in another order
		return Terms{}, fmt.Errorf("read %.100q: %w", text, errTerms)
	}
	return t, nil
}

func (l Limit) valid() bool {
	switch l.Per {
	case Minute, Hour, Day, Month:
		return l.Max > 0 && l.Max <= Most
	}
	return false
}

// Rule is the name of a rule whose grant has a budget, as it stands in a gateway: "grant/NAME TERMS". So whoever reads which rule
// has decided knows its terms, too.
func Rule(grant segment.GrantName, terms Terms) string {
	return grantPrefix + string(grant) + " " + terms.String()
}

const grantPrefix = "grant/"

// ParseRule reads what Rule writes.
func ParseRule(rule string) (segment.GrantName, Terms, error) {
	name, text, ok := strings.Cut(rule, " ")
	grant, isGrant := strings.CutPrefix(name, grantPrefix)
	if !ok || !isGrant || grant == "" {
		return "", Terms{}, fmt.Errorf("read %.100q: %w", rule, errTerms)
	}
	terms, err := ParseTerms(text)
	return segment.GrantName(grant), terms, err
}

// Account is one counter: what is counted, and for whom.
type Account struct {
	Grant  segment.GrantName `json:"grant"`
	Caller string            `json:"caller,omitempty"` // SPIFFE ID; "": all callers together
	Unit   Unit              `json:"unit"`
	Per    Period            `json:"per"`
}

// Charge takes an amount of an account that has Max.
type Charge struct {
	Account
	Max    int64
	Amount int64 // negative counts as nothing
}

// Balance is how an account stands in the window that begins at Window.
type Balance struct {
	Account
	Max    int64     `json:"max"`
	Used   int64     `json:"used"` // with what is held
	Held   int64     `json:"held"` // of this, what requests under way have taken in advance
	Window time.Time `json:"window"`
	Resets time.Time `json:"resets"`
}

// Remaining is what is left.
func (b Balance) Remaining() int64 { return max(0, b.Max-b.Used) }

// Answer says whether all charges were taken, or none of them, and how the accounts stand after that, in their order.
type Answer struct {
	Allowed  bool
	Balances []Balance
}

// heldFor is how soon to ask again where what others hold would be enough.
const heldFor = 2 * time.Second

// Refusal is why a charge was not taken, and when it is worth to try again.
type Refusal struct {
	Charge  Charge
	Balance Balance
	Wait    time.Duration // 0: never, since it is more than a whole window has
}

// Refusal returns why the charges were not taken. Of several reasons it is the one that takes longest to go away.
func (a Answer) Refusal(now time.Time, charges []Charge) Refusal {
	var worst Refusal
	for i, b := range a.Balances {
		c := charges[i]
		if b.Used+c.Amount <= c.Max {
			continue
		}
		r := Refusal{Charge: c, Balance: b, Wait: max(b.Resets.Sub(now), time.Second)}
		if c.Amount > c.Max {
			r.Wait = 0
			return r
		}
		if b.Used-b.Held+c.Amount <= c.Max {
			r.Wait = min(r.Wait, heldFor)
		}
		if r.Wait > worst.Wait {
			worst = r
		}
	}
	return worst
}

// Settlement is what became of a charge: the caller had Reserved in the window that began at Window, and used Used.
type Settlement struct {
	Account
	Window         time.Time
	Reserved, Used int64
}
