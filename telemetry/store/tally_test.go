package store

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

func tallies(t testing.TB, s *Store, filter telemetry.FlowFilter, shadowed bool) map[telemetry.Judged]telemetry.Tally {
	t.Helper()
	got := map[telemetry.Judged]telemetry.Tally{}
	if err := s.Tally(context.Background(), filter, shadowed, func(more telemetry.Tally) {
		sum := got[more.Judged]
		sum.Add(more)
		got[more.Judged] = sum
	}); err != nil && !errors.Is(err, ErrMemoryOnly) {
		t.Fatal(err)
	}
	return got
}

// What is counted in the file and what is counted in memory is what one would count by hand.
func TestTally(t *testing.T) {
	t.Parallel()
	var all []telemetry.Flow
	s, _ := start(t, Config{})
	add := func(n int) {
		f := flowOf(n)
		f.Time = time.Unix(1_800_000_000, int64(n*7919%1000)).UTC() // not in the order of their coming
		f.Caller, _ = spiffeid.FromString([]string{"spiffe://example.org/a", "spiffe://example.org/b", ""}[n%3])
		f.Operation = []segment.Operation{segment.Infer, segment.Embed, ""}[n/3%3]
		f.Resource = []string{"", "small", "\"quoted\" \x1b[31m\n", "日本", "null", "\"shadow\":\"denied\""}[n/9%6]
		f.Verdict, f.Rule = telemetry.Verdicts()[n%4], "grant/g"
		if n%5 == 0 {
			f.Shadow, f.ShadowBy = telemetry.Denied, "default-deny"
		}
		s.Add(f)
		all = append(all, f)
	}
	for n := range 400 {
		add(n)
	}
	written(t, s)
	seqs := map[string]int64{}
	for _, f := range must(s.Flows(t.Context(), telemetry.FlowFilter{Limit: 1000})) {
		seqs[f.ID] = f.Seq
	}
	check := func(t *rapid.T) {
		filter := telemetry.FlowFilter{
			Caller:  segment.Pattern(rapid.SampledFrom([]string{"", "spiffe://example.org/a", "spiffe://example.org/*"}).Draw(t, "caller")),
			Verdict: rapid.SampledFrom(append(telemetry.Verdicts(), "")).Draw(t, "verdict"),
			Since:   time.Unix(1_800_000_000, rapid.Int64Range(0, 1000).Draw(t, "since")),
			Limit:   1,
		}
		shadowed := rapid.Bool().Draw(t, "shadowed")
		want := map[telemetry.Judged]telemetry.Tally{}
		for _, f := range all {
			if filter.Match(f) && (!shadowed || f.Shadow != "") {
				sum := want[f.Judged()]
				sum.Count++
				if sum.Count == 1 || f.Time.Before(sum.First) {
					sum.First = f.Time
				}
				if sum.Count == 1 || f.Time.After(sum.Last) {
					sum.Last = f.Time
				}
				if sum.Judged = f.Judged(); sum.FirstSeq == 0 {
					sum.FirstSeq = seqs[f.ID]
				}
				sum.LastSeq = seqs[f.ID]
				want[f.Judged()] = sum
			}
		}
		got := map[telemetry.Judged]telemetry.Tally{}
		last := int64(1 << 60)
		if err := s.Tally(context.Background(), filter, shadowed, func(tally telemetry.Tally) {
			if _, twice := got[tally.Judged]; twice || tally.Count > last {
				t.Fatalf("%+v comes twice, or after a smaller one", tally)
			}
			got[tally.Judged], last = tally, tally.Count
		}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, equalIDs); diff != "" {
			t.Fatal(diff)
		}
	}
	rapid.Check(t, check)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A store whose file is not open yet counts what it has, and says that this may not be all.
func TestTallyOfMemory(t *testing.T) {
	s := New(Config{})
	for n := range 10 {
		s.Add(flowOf(n))
	}
	count := int64(0)
	err := s.Tally(t.Context(), telemetry.FlowFilter{}, false, func(tally telemetry.Tally) { count += tally.Count })
	if !errors.Is(err, ErrMemoryOnly) || count != 10 {
		t.Errorf("%d, %v", count, err)
	}
	if _, err := s.Since(t.Context()); !errors.Is(err, ErrMemoryOnly) {
		t.Errorf("knows since when there is something: %v", err)
	}
	for _, tally := range tallies(t, s, telemetry.FlowFilter{}, false) {
		if examples, err := s.Examples(t.Context(), tally); len(examples) != 2 || examples[0].ID != "r-0" || !errors.Is(err, ErrMemoryOnly) {
			t.Errorf("%v, %v", examples, err)
		}
	}
}

func TestExamplesAndSince(t *testing.T) {
	s, _ := start(t, Config{})
	until(t, "the file", func() bool { return s.Stats(t.Context()).Problem == "" })
	if since, err := s.Since(t.Context()); !since.IsZero() || err != nil {
		t.Errorf("nothing is there since %s, %v", since, err)
	}
	before := time.Now()
	for n := range 3 {
		s.Add(flowOf(n))
	}
	written(t, s)
	if since, err := s.Since(t.Context()); err != nil || since.Before(before.Add(-time.Millisecond)) || since.After(time.Now().Add(time.Millisecond)) {
		t.Errorf("since %s, %v", since, err)
	}
	for _, tally := range tallies(t, s, telemetry.FlowFilter{}, false) {
		got, err := s.Examples(t.Context(), tally)
		first, last := flowOf(0), flowOf(2)
		want := []telemetry.Example{{ID: "r-0", TraceID: first.TraceID, Time: first.Time}, {ID: "r-2", TraceID: last.TraceID, Time: last.Time}}
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Error(diff, err)
		}
	}
}

// Requests that are all different make as many tallies.
func TestTallyOfManyDifferent(t *testing.T) {
	t.Parallel()
	s, _ := start(t, Config{})
	until(t, "the file", func() bool { return s.Stats(t.Context()).Problem == "" })
	const n = 4_000
	for i := range n {
		f := flowOf(i)
		f.Resource = fmt.Sprint("model-", i)
		s.Add(f)
	}
	written(t, s)
	if got := tallies(t, s, telemetry.FlowFilter{}, false); len(got) != n-int(s.Stats(t.Context()).Flows.Dropped) {
		t.Errorf("%d", len(got))
	}
}
