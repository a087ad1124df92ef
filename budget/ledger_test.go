package budget_test

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sallyport.dev/budget"
	"sallyport.dev/segment"
)

var epoch = time.Date(2028, time.February, 28, 23, 58, 30, 0, time.UTC) // before a leap day

// A gateway has the budget in the name of the rule.
func TestParseRule(t *testing.T) {
	grant, b, err := budget.ParseRule("grant/a-grant requests=60/Minute shared")
	if want := (segment.Budget{Requests: segment.Limit{Max: 60, Per: segment.Minute}, Shared: true}); grant != "a-grant" || b != want || err != nil {
		t.Errorf("%s %v %v", grant, b, err)
	}
	for _, bad := range []string{"", "grant/a-grant", "grant/a-grant ", "grant/ requests=1/Day", "default-deny requests=1/Day", "grant/a requests=1"} {
		if _, b, err := budget.ParseRule(bad); err == nil || !b.IsZero() {
			t.Errorf("%q: %v", bad, b)
		}
	}
}

// Whatever comes in whatever order, also if the counters are read from their balances again in between, and the clock goes
// back a little: what is given in a window is never more than its max, and nothing that ended is counted for less than it used.
func TestNeverMoreThanMax(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const most = 100
		per := rapid.SampledFrom(segment.Periods()).Draw(t, "per")
		callers := []string{"", "a", "b"}
		ledger := budget.NewLedger(10)
		now := epoch
		given := map[string]int64{} // by account and window: what counts
		beyond := map[string]int64{}
		var open []*budget.Settlement
		key := func(a budget.Account, w time.Time) string { return fmt.Sprint(a, w.Unix()) }
		t.Repeat(map[string]func(*rapid.T){
			"reserve": func(t *rapid.T) {
				account := budget.Account{Grant: "g", Caller: rapid.SampledFrom(callers).Draw(t, "caller"), Unit: budget.Tokens, Per: per}
				amount := rapid.Int64Range(0, most+10).Draw(t, "amount")
				answer, err := ledger.Reserve(now, []budget.Charge{{Account: account, Max: most, Amount: amount}})
				if err != nil {
					t.Fatal(err)
				}
				b := answer.Balances[0]
				k := key(account, b.Window)
				if !answer.Allowed {
					if given[k]+beyond[k]+amount <= most {
						t.Fatalf("%d were refused with %d given", amount, given[k])
					}
					return
				}
				given[k] += amount
				if given[k] > most {
					t.Fatalf("%d are given", given[k])
				}
				if b.Used != given[k]+beyond[k] {
					t.Fatalf("%d are used by the books, %d by the ledger", given[k]+beyond[k], b.Used)
				}
				open = append(open, &budget.Settlement{Account: account, Window: b.Window, Reserved: amount})
			},
			"settle": func(t *rapid.T) {
				if len(open) == 0 {
					t.Skip("nothing is open")
				}
				i := rapid.IntRange(0, len(open)-1).Draw(t, "which")
				r := open[i]
				open = slices.Delete(open, i, i+1)
				r.Used = rapid.OneOf(rapid.Int64Range(0, r.Reserved), rapid.Int64Range(r.Reserved, r.Reserved+5)).Draw(t, "used")
				b, err := ledger.Settle(now, *r)
				if err != nil {
					t.Fatal(err)
				}
				k := key(r.Account, r.Window)
				switch {
				case b.Account == (budget.Account{}): // the window is over, and nothing is owed
					if r.Used > r.Reserved {
						t.Fatal("what was used beyond counts nowhere")
					}
				case b.Window.Equal(r.Window):
					if _, end := per.Window(r.Window); r.Used > r.Reserved && !now.Before(end) {
						t.Fatal("what was used beyond counts in a window that is over")
					}
					given[k] -= max(0, r.Reserved-r.Used)
					beyond[k] += max(0, r.Used-r.Reserved)
				default:
					beyond[key(r.Account, b.Window)] += r.Used - r.Reserved
				}
			},
			"time": func(t *rapid.T) {
				d := rapid.SampledFrom([]time.Duration{time.Second, 20 * time.Second, time.Hour, 11 * time.Hour, 20 * 24 * time.Hour, -30 * time.Second, -2 * time.Minute})
				now = now.Add(d.Draw(t, "by"))
			},
			"restart": func(t *rapid.T) {
				next := budget.NewLedger(10)
				for b := range ledger.All(now.Add(-budget.Slack)) {
					next.Put(b)
				}
				ledger = next
			},
			"forget": func(*rapid.T) { ledger.Forget(now) },
		})
	})
}

// Several accounts are charged together or not at all, and a ledger does not grow without bound.
func TestTogether(t *testing.T) {
	ledger := budget.NewLedger(4)
	requests := budget.Charge{Account: budget.Account{Grant: "g", Unit: budget.Requests, Per: segment.Minute}, Max: 2, Amount: 1}
	tokens := budget.Charge{Account: budget.Account{Grant: "g", Unit: budget.Tokens, Per: segment.Day}, Max: 10, Amount: 11}
	answer, err := ledger.Reserve(epoch, []budget.Charge{requests, tokens})
	if err != nil || answer.Allowed || answer.Balances[0].Used != 0 || answer.Refusal(epoch, []budget.Charge{requests, tokens}).Wait != 0 {
		t.Errorf("%v %v", answer, err)
	}
	tokens.Amount = 8
	both := []budget.Charge{requests, tokens}
	if answer, err = ledger.Reserve(epoch, both); err != nil || !answer.Allowed {
		t.Errorf("%v %v", answer, err)
	}
	answer, _ = ledger.Reserve(epoch, both)
	if r := answer.Refusal(epoch, both); answer.Allowed || r.Charge.Unit != budget.Tokens || r.Wait != 2*time.Second { // what is held may come back
		t.Errorf("%v", r)
	}
	if _, err := ledger.Settle(epoch, budget.Settlement{Account: tokens.Account, Window: answer.Balances[1].Window, Reserved: 8, Used: 8}); err != nil {
		t.Error(err)
	}
	answer, _ = ledger.Reserve(epoch, both)
	if r := answer.Refusal(epoch, both); r.Wait != 90*time.Second { // until midnight
		t.Errorf("%v", r)
	}
	ledger.Cancel([]budget.Charge{{Account: tokens.Account, Amount: 8}})
	if answer, _ = ledger.Reserve(epoch, both); !answer.Allowed {
		t.Errorf("what was taken back is not there: %v", answer)
	}

	of := func(caller string) []budget.Charge {
		c := requests
		c.Caller = caller
		return []budget.Charge{c}
	}
	for i := range 1000 {
		_, err := ledger.Reserve(epoch, of(fmt.Sprint(i)))
		if (err == nil) != (i < 2) {
			t.Fatalf("caller %d: %v", i, err)
		}
	}
	if _, err := ledger.Reserve(epoch.Add(2*time.Hour), of("later")); err != nil {
		t.Errorf("when there is room again: %v", err)
	}
}

// A clock that was far ahead gives nothing back, and nobody waits for the time that it told.
func TestClock(t *testing.T) {
	ledger := budget.NewLedger(10)
	charge := []budget.Charge{{Account: budget.Account{Grant: "g", Unit: budget.Requests, Per: segment.Day}, Max: 10, Amount: 6}}
	for _, step := range []struct {
		at   time.Time
		want bool
	}{{epoch, true}, {epoch, false}, {epoch.AddDate(10, 0, 0), true}, {epoch.AddDate(10, 0, 0), false}, {epoch, false}, {epoch.AddDate(0, 0, 1), true}} {
		if answer, _ := ledger.Reserve(step.at, charge); answer.Allowed != step.want {
			t.Errorf("at %v: %v", step.at, answer)
		}
	}
	ahead, _ := ledger.Reserve(epoch.AddDate(20, 0, 0), charge)
	if answer, _ := ledger.Reserve(epoch, charge); answer.Allowed {
		t.Errorf("back again: %v", answer)
	}
	held := budget.Settlement{Account: charge[0].Account, Window: ahead.Balances[0].Window, Reserved: 6}
	if b, err := ledger.Settle(epoch, held); err != nil || b.Account != (budget.Account{}) {
		t.Errorf("what was taken then was given back now: %v %v", b, err)
	}
}

func TestUsed(t *testing.T) {
	for _, c := range []struct {
		name           string
		ask            budget.Ask
		seen           budget.Seen
		reserved, want int64
	}{
		{"reported", budget.Ask{Bytes: 100, Output: 50}, budget.Seen{Status: 200, Complete: true, HasReport: true, Input: 20, Output: 5}, 150, 25},
		{"reported, but cut", budget.Ask{Bytes: 100, Output: 50}, budget.Seen{Status: 200, HasReport: true, Input: 20, Output: 1, Events: 9, Smallest: 50, Bytes: 460}, 150, 119},
		{"more is reported, and cut", budget.Ask{Bytes: 10, Output: 50}, budget.Seen{Status: 200, HasReport: true, Input: 200, Output: 1, Events: 9}, 60, 201},
		{"many answers", budget.Ask{Bytes: 100, Output: 50, Answers: 4}, budget.Seen{Status: 0, Worked: true}, 300, 300},
		{"no number of answers", budget.Ask{Bytes: 100, Output: 50, Answers: -4}, budget.Seen{Status: 503}, 150, 0},
		{"no answer in time", budget.Ask{Bytes: 100, Output: 50}, budget.Seen{Status: 504, Worked: true}, 150, 150},
		{"half an answer", budget.Ask{Bytes: 100, Output: 50}, budget.Seen{Status: 200, Bytes: 3}, 150, 150},
		{"a stream that says nothing", budget.Ask{Bytes: 100}, budget.Seen{Status: 200, Complete: true, Bytes: 1000, Events: 10, Smallest: 98}, 4196, 130},
		{"huge", budget.Ask{Bytes: math.MaxInt64, Output: math.MaxInt64, Answers: math.MaxInt64}, budget.Seen{Status: 200, Bytes: math.MaxInt64, Events: math.MaxInt64, Smallest: math.MaxInt64}, segment.MaxLimit, segment.MaxLimit},
		{"negative", budget.Ask{Bytes: -5, Output: -5, Answers: -5}, budget.Seen{Status: -1, Bytes: -1, Events: -1, Smallest: -1, Input: -1, Output: -1}, 4096, 4096},
		{"embeddings", budget.Ask{Operation: "Embed", Bytes: 100, Output: 50}, budget.Seen{Status: 200, Complete: true, Bytes: 100_000}, 100, 100},
	} {
		c.ask.Budget.Tokens = segment.Limit{Max: 1_000_000, Per: segment.Day}
		charges, hold := c.ask.Charges()
		if len(charges) != 1 || charges[0].Amount != hold.Reserved || hold.Reserved != c.reserved {
			t.Errorf("%s: %+v reserved", c.name, hold)
		}
		if got := hold.Used(c.seen); got != c.want {
			t.Errorf("%s: %d used, want %d", c.name, got, c.want)
		}
	}
}

// Whatever is seen, what counts is bounded, and never less than what was certainly sent: a token in each event, and no more
// than was held if the request has a bound and the backend claims nothing else.
func TestUsedIsBounded(t *testing.T) {
	n := rapid.OneOf(rapid.Int64(), rapid.Int64Range(0, 10_000))
	rapid.Check(t, func(t *rapid.T) {
		ask := budget.Ask{Budget: segment.Budget{Tokens: segment.Limit{Max: rapid.Int64Range(1, segment.MaxLimit).Draw(t, "max"), Per: segment.Day}},
			Bytes: n.Draw(t, "bytes"), Output: n.Draw(t, "output"), Answers: n.Draw(t, "answers")}
		_, hold := ask.Charges()
		seen := budget.Seen{Status: rapid.SampledFrom([]int{0, 200, 400, 503}).Draw(t, "status"), Complete: rapid.Bool().Draw(t, "complete"),
			Worked: rapid.Bool().Draw(t, "worked"), Bytes: n.Draw(t, "sent"), Events: n.Draw(t, "events"), Smallest: n.Draw(t, "smallest")}
		used := hold.Used(seen)
		if used < 0 || used > segment.MaxLimit || hold.Reserved < 0 || hold.Reserved > segment.MaxLimit {
			t.Fatalf("%+v: %d", hold, used)
		}
		if hold.Bounded && used > hold.Reserved {
			t.Fatalf("%d used of %d", used, hold.Reserved)
		}
		if seen.Status == 200 && used < min(seen.Events, hold.Reserved) {
			t.Fatalf("%d used in %d events", used, seen.Events)
		}
	})
}

func TestSorted(t *testing.T) {
	of := func(grant, caller string) budget.Balance {
		return budget.Balance{Account: budget.Account{Grant: "g", Caller: grant + caller}}
	}
	got := budget.Sorted(maps.Values(map[int]budget.Balance{1: of("b", ""), 2: of("a", "2"), 3: of("a", "1")}))
	if got[0].Caller != "a1" || got[2].Caller != "b" {
		t.Error(got)
	}
}
