package real

import (
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"sallyport.dev/test/corpus"
)

// found are the numbers of policies that were judged wrongly once, after the two that are tried in any case.
var found = []int{101, 102}

// TestPolicies makes policies of numbers, sends them through the whole pipeline into a real Envoy, and asks it what the policy
// decides. Beside what was found, `make fuzz` has it go on with random numbers for $FUZZTIME. Go's own fuzzing would not do:
// it would try all that it ever thought interesting each time, at a second for each.
func TestPolicies(t *testing.T) {
	t.Parallel()
	first, err := corpus.Generated(0) // all cases have the same collections
	if err != nil {
		t.Fatal(err)
	}
	q := newInquiry(t, []corpus.Case{first})
	try := func(number int) {
		c, err := corpus.Generated(number)
		if err != nil {
			t.Fatal(err)
		}
		q.deleted = 0
		q.ask(t, &c, string(c.Documents)+separator)
		if t.Failed() {
			t.Fatalf("policy %d is enforced otherwise than it says; let `found` have its number:\n%s", number, c.Documents)
		}
	}
	for _, number := range found {
		try(number)
	}
	more := 0
	if limit := os.Getenv("FUZZTIME"); limit != "" {
		for end := time.Now().Add(durationOf(t, limit)); time.Now().Before(end); more++ {
			try(rand.Int())
		}
	}
	total := 0
	for _, n := range q.asked {
		total += n
	}
	t.Logf("%d policies, %d decisions", len(found)+more, total)
}

func durationOf(t *testing.T, s string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("read $FUZZTIME: %v", err)
	}
	return d
}
