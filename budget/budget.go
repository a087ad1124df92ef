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
	"fmt"
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

// ParseRule reads the name of a rule that counts, as a gateway has it: "grant/NAME BUDGET".
func ParseRule(rule string) (segment.GrantName, segment.Budget, error) {
	name, text, _ := strings.Cut(rule, " ")
	grant, isGrant := strings.CutPrefix(name, "grant/")
	if !isGrant || grant == "" {
		return "", segment.Budget{}, fmt.Errorf("read rule %.100q: it is no grant's", rule)
	}
	b, err := segment.ParseBudget(text)
	return segment.GrantName(grant), b, err
}

// Account is one counter: what is counted, and for whom.
type Account struct {
	Grant  segment.GrantName `json:"grant"`
	Caller string            `json:"caller,omitempty"` // SPIFFE ID; "": all callers together
	Unit   Unit              `json:"unit"`
	Per    segment.Period    `json:"per"`
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
