package segment_test

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"sallyport.dev/segment"
)

func TestWindow(t *testing.T) {
	for _, c := range []struct{ per, at, start, end string }{
		{"Minute", "2026-11-23T20:03:59Z", "2026-11-23T20:03:00Z", "2026-11-23T20:04:00Z"},
		{"Hour", "2026-11-23T23:03:59Z", "2026-11-23T23:00:00Z", "2026-11-24T00:00:00Z"},
		{"Day", "2026-11-23T23:59:59Z", "2026-11-23T00:00:00Z", "2026-11-24T00:00:00Z"},
		{"Day", "2026-11-24T00:00:00Z", "2026-11-24T00:00:00Z", "2026-11-25T00:00:00Z"},
		{"Day", "2026-11-24T00:30:00+01:00", "2026-11-23T00:00:00Z", "2026-11-24T00:00:00Z"}, // UTC, whatever the machine has
		{"Day", "2026-03-29T02:30:00+02:00", "2026-03-29T00:00:00Z", "2026-03-30T00:00:00Z"}, // summer time begins in Europe
		{"Month", "2026-01-31T12:00:00Z", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"},
		{"Month", "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"},
		{"Month", "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"},
	} {
		at, err := time.Parse(time.RFC3339, c.at)
		if err != nil {
			t.Fatal(err)
		}
		start, end := segment.Period(c.per).Window(at)
		if start.Format(time.RFC3339) != c.start || end.Format(time.RFC3339) != c.end {
			t.Errorf("%s at %s: %v to %v", c.per, c.at, start, end)
		}
	}
}

func anyBudget(t *rapid.T, label string) segment.Budget {
	limit := func(unit string) segment.Limit {
		return segment.Limit{Max: rapid.OneOf(rapid.Int64Range(1, segment.MaxLimit), rapid.Int64Range(1, 100)).Draw(t, label+unit),
			Per: rapid.SampledFrom(segment.Periods()).Draw(t, "per")}
	}
	b := segment.Budget{Shared: rapid.Bool().Draw(t, "shared"), Open: rapid.Bool().Draw(t, "open")}
	which := rapid.IntRange(1, 3).Draw(t, "which")
	if which&1 != 0 {
		b.Requests = limit("requests")
	}
	if which&2 != 0 {
		b.Tokens = limit("tokens")
	}
	return b
}

func TestBudgetAsText(t *testing.T) {
	for _, bad := range []string{"", "requests=0/Day", "requests=-1/Day", "requests=1/day", "requests=1/Year", "requests=1", "tokens=1/Day requests=1/Day",
		"requests=1/Day  shared", "requests=01/Day", "requests=+1/Day", "requests=1/Day requests=1/Day", "open requests=1/Day", "shared", "cats=1/Day",
		"requests=9223372036854775807/Day", "requests=1/Day open shared", " requests=1/Day"} {
		if b, err := segment.ParseBudget(bad); err == nil || !b.IsZero() {
			t.Errorf("%q: %v", bad, b)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		b := anyBudget(t, "")
		if got, err := segment.ParseBudget(b.String()); err != nil || got != b {
			t.Errorf("%v: %v, %v", b, got, err)
		}
	})
}

// Who is within a budget never gets more than it gives, however the windows lie.
func TestWithin(t *testing.T) {
	budget := func(text string) segment.Budget {
		b, err := segment.ParseBudget(text)
		if text != "" && err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"requests=60/Minute", "", true}, {"", "requests=60/Minute", false}, {"requests=60/Minute", "requests=60/Minute", true},
		{"requests=61/Minute", "requests=60/Minute", false}, {"requests=60/Minute", "requests=3600/Hour", true}, {"requests=3600/Hour", "requests=60/Minute", false},
		{"requests=60/Minute", "requests=3599/Hour", false}, {"requests=60/Hour", "requests=60/Minute", true}, {"tokens=1/Day", "tokens=31/Month", true},
		{"tokens=1/Day", "tokens=30/Month", false}, {"requests=1/Day", "requests=1/Day tokens=1/Day", false}, {"requests=1/Day tokens=1/Day", "requests=1/Day", true},
		{"requests=1/Day shared", "requests=1/Day", true}, {"requests=1/Day", "requests=1/Day shared", false},
		{"requests=1/Day open", "requests=1/Day", false}, {"requests=1/Day", "requests=1/Day open", true}, {"requests=1/Day", "tokens=1/Day", false},
	} {
		if got := budget(c.a).Within(budget(c.b)); got != c.want {
			t.Errorf("%q within %q: %t", c.a, c.b, got)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := anyBudget(t, "a"), anyBudget(t, "b"), anyBudget(t, "c")
		if !a.Within(a) || a.Within(b) && b.Within(c) && !a.Within(c) {
			t.Errorf("%v, %v, %v", a, b, c)
		}
	})
}
