package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

var equalIDs = cmpopts.EquateComparable(spiffeid.ID{})

// start runs a store until the test ends or stop is called.
func start(t testing.TB, cfg Config) (s *Store, stop func()) {
	t.Helper()
	if cfg.Path == "" {
		cfg.Path = filepath.Join(t.TempDir(), "telemetry.db")
	}
	ctx, cancel := context.WithCancel(context.Background())
	s = New(cfg)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

// until waits for a condition.
func until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited too long for: %s", what)
		}
	}
}

func written(t testing.TB, s *Store) {
	t.Helper()
	until(t, "everything written", func() bool {
		n := s.Stats(t.Context())
		return n.Problem == "" && n.Flows.Waiting+n.Spans.Waiting+n.Applications.Waiting == 0
	})
}

func flowOf(n int) telemetry.Flow {
	return telemetry.Flow{
		ID: fmt.Sprint("r-", n), Time: time.Unix(1_800_000_000, int64(n)).UTC(), Duration: time.Millisecond, Gateway: "gw",
		Caller: spiffeid.RequireFromString("spiffe://example.org/rag-app"), Endpoint: "chat", Verdict: telemetry.Allowed,
		TraceID: telemetry.TraceID(fmt.Sprintf("%032x", n+1)), Method: "POST", Path: "/v1/chat/completions",
	}
}

func spanOf(trace, span int, from telemetry.Source) telemetry.Span {
	return telemetry.Span{
		TraceID: telemetry.TraceID(fmt.Sprintf("%032x", trace+1)), SpanID: telemetry.SpanID(fmt.Sprintf("%016x", span+1)),
		Name: "span", Source: from, Start: time.Unix(1_800_000_000, 0).UTC(), End: time.Unix(1_800_000_001, 0).UTC(),
		Attributes: telemetry.Attributes{"n": int64(span)},
	}
}

func idsOf(list []telemetry.Flow) (ids []string) {
	for _, f := range list {
		ids = append(ids, f.ID)
	}
	return ids
}

func TestFlowsAreSeenAtOnceAndAfterReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "telemetry.db")
	s, stop := start(t, Config{Path: path})
	for n := range 5 {
		s.Add(flowOf(n))
	}
	want := []string{"r-4", "r-3", "r-2"}
	filter := telemetry.FlowFilter{Limit: 3}
	got, err := s.Flows(t.Context(), filter)
	if err != nil && !errors.Is(err, ErrMemoryOnly) { // it may not have opened the file yet
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, idsOf(got)); diff != "" {
		t.Error("before it is written:", diff)
	}
	written(t, s)
	before, err := s.Flows(t.Context(), filter)
	if diff := cmp.Diff(want, idsOf(before)); diff != "" || err != nil {
		t.Error("written:", diff, err)
	}
	stop()

	for _, part := range []string{"", "-wal", "-shm"} {
		if info, err := os.Stat(path + part); err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s%s has mode %s", path, part, info.Mode())
		}
	}
	s, _ = start(t, Config{Path: path})
	s.Add(flowOf(5))
	written(t, s)
	after, err := s.Flows(t.Context(), telemetry.FlowFilter{})
	if err != nil || len(after) != 6 || after[0].Seq <= before[0].Seq {
		t.Fatalf("after reopening: %v, %v", idsOf(after), err)
	}
	if diff := cmp.Diff(before, after[1:4], equalIDs); diff != "" {
		t.Error("a flow changed on the disk:", diff)
	}
}

func TestModeOfLiveFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "telemetry.db")
	if err := os.WriteFile(path, nil, 0o644); err != nil { // as a careless umask would
		t.Fatal(err)
	}
	s, _ := start(t, Config{Path: path})
	s.Add(flowOf(1))
	written(t, s)
	for _, part := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(path + part)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s%s: %v, %v", path, part, info, err)
		}
	}
}

func TestStopWritesWhatWaits(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "telemetry.db")
	s, stop := start(t, Config{Path: path})
	for n := range 2000 {
		s.Add(flowOf(n))
		s.AddSpans([]telemetry.Span{spanOf(n, 0, telemetry.FromGateway), spanOf(n, 1, telemetry.FromApplication)})
	}
	stop()
	s, _ = start(t, Config{Path: path})
	written(t, s)
	until(t, "the file", func() bool { return s.Stats(t.Context()).Bytes > 0 })
	got := s.Stats(t.Context())
	if got.Flows.Rows != 2000 || got.Spans.Rows != 2000 || got.Applications.Rows != 2000 {
		t.Errorf("%+v", got)
	}
}

// The filter means the same in memory, where Match judges, and in the file, where SQL does.
func TestFiltersAgree(t *testing.T) {
	t.Parallel()
	callers := []string{"spiffe://example.org/rag-app", "spiffe://example.org/rag", "spiffe://example.org/a/b", "spiffe://other.org/rag", ""}
	endpoints := []segment.EndpointName{"chat", "docs", ""}
	var all []telemetry.Flow
	s, _ := start(t, Config{})
	for n := range 200 {
		f := flowOf(n)
		f.Caller, _ = spiffeid.FromString(callers[n%len(callers)])
		f.Endpoint = endpoints[n%len(endpoints)]
		f.Verdict = telemetry.Verdicts()[n%4]
		s.Add(f)
		all = append(all, f)
	}
	written(t, s)
	rapid.Check(t, func(t *rapid.T) {
		at := func(name string) time.Time {
			if n := rapid.IntRange(-1, 200).Draw(t, name); n >= 0 {
				return time.Unix(1_800_000_000, int64(n))
			}
			return time.Time{}
		}
		f := telemetry.FlowFilter{
			Caller: segment.Pattern(rapid.SampledFrom([]string{"", "*", "spiffe://example.org/rag", "spiffe://example.org/rag*",
				"spiffe://example.org/*", "spiffe://example.org/a/*", "spiffe://none.org/*", "%", "spiffe://example.org/ra_"}).Draw(t, "caller")),
			Endpoint: rapid.SampledFrom(append(endpoints, "none")).Draw(t, "endpoint"),
			Verdict:  rapid.SampledFrom(append(telemetry.Verdicts(), "")).Draw(t, "verdict"),
			Since:    at("since"),
			Limit:    rapid.IntRange(1, 300).Draw(t, "limit"),
		}
		var want []string
		for _, flow := range slices.Backward(all) {
			if f.Match(flow) && len(want) < f.Limit {
				want = append(want, flow.ID)
			}
		}
		got, err := s.Flows(context.Background(), f)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, idsOf(got)); diff != "" {
			t.Fatalf("%+v: %s", f, diff)
		}
	})
}

func TestTraces(t *testing.T) {
	for _, where := range []string{"memory", "file"} {
		t.Run(where, func(t *testing.T) {
			s := New(Config{Path: filepath.Join(t.TempDir(), "telemetry.db")})
			if where == "file" {
				s, _ = start(t, Config{})
			}
			denied := flowOf(0)
			denied.Endpoint, denied.Verdict, denied.Time = "docs", telemetry.Denied, denied.Time.Add(time.Second)
			s.Add(flowOf(0))
			s.Add(denied)
			s.Add(flowOf(1))
			untraced := flowOf(2)
			untraced.TraceID = ""
			s.Add(untraced)
			s.AddSpans([]telemetry.Span{spanOf(0, 0, telemetry.FromGateway), spanOf(0, 0, telemetry.FromApplication),
				spanOf(7, 0, telemetry.FromApplication)})
			check := func(err error) {
				t.Helper()
				if where == "memory" && !errors.Is(err, ErrMemoryOnly) || where == "file" && err != nil {
					t.Error(err)
				}
			}
			if where == "file" {
				written(t, s)
			}

			list, err := s.Traces(t.Context(), telemetry.FlowFilter{})
			check(err)
			if len(list) != 2 || list[0].TraceID != denied.TraceID || list[0].Verdict != telemetry.Denied || list[0].Flows != 2 ||
				list[0].Spans != 2 || list[0].Root != "POST /v1/chat/completions" || list[1].TraceID != flowOf(1).TraceID {
				t.Errorf("%+v", list)
			}
			list, err = s.Traces(t.Context(), telemetry.FlowFilter{Verdict: telemetry.Denied, Limit: 1})
			check(err)
			if len(list) != 1 || len(list[0].Endpoints) != 2 {
				t.Errorf("a trace of which one flow matches is summed up whole: %+v", list)
			}

			full := string(denied.TraceID)
			trace, err := s.Trace(t.Context(), full)
			check(err)
			if len(trace.Flows) != 2 || len(trace.Spans) != 2 || trace.Spans[0].Source == trace.Spans[1].Source ||
				trace.Spans[0].Attributes["n"] != int64(0) {
				t.Errorf("%+v", trace)
			}
			if _, err := s.Trace(t.Context(), full[:31]); !errors.Is(err, ErrAmbiguous) {
				t.Errorf("a prefix of several: %v", err)
			}
			for _, none := range []string{"", "f", "%", "xyz"} {
				_, err := s.Trace(t.Context(), none)
				if !errors.Is(err, ErrNoTrace) && !(where == "memory" && errors.Is(err, ErrMemoryOnly)) {
					t.Errorf("%q: %v", none, err)
				}
			}
			unique, err := s.Trace(t.Context(), strings.ToUpper(string(spanOf(7, 0, "").TraceID)))
			check(err)
			if len(unique.Spans) != 1 {
				t.Errorf("a trace without flows: %+v", unique)
			}
		})
	}
}

func TestFollow(t *testing.T) {
	s := New(Config{})
	ctx, cancel := context.WithCancel(t.Context())
	sub := s.Follow(ctx, telemetry.FlowFilter{Verdict: telemetry.Denied})
	s.Add(flowOf(0))
	denied := flowOf(1)
	denied.Verdict = telemetry.Denied
	s.Add(denied)
	if f := <-sub.Flows(); f.ID != "r-1" || f.Seq == 0 {
		t.Errorf("%+v", f)
	}
	cancel()
	for range sub.Flows() { // ends
		t.Error("another flow")
	}
	s.Add(denied) // nobody follows any more
}

// A follower that does not read gets what it was promised without a gap, and then learns that there is no more.
func TestFollowTooSlowly(t *testing.T) {
	s := New(Config{})
	ctx, cancel := context.WithCancel(t.Context())
	sub, other := s.Follow(ctx, telemetry.FlowFilter{}), s.Follow(ctx, telemetry.FlowFilter{Verdict: telemetry.Denied})
	for n := range followBuffer + 3 { // nobody reads: Add goes on
		f := flowOf(n)
		f.Verdict = telemetry.Allowed
		s.Add(f)
	}
	n := 0
	for f := range sub.Flows() { // ends
		if f.ID != fmt.Sprint("r-", n) {
			t.Fatalf("got %s as number %d", f.ID, n)
		}
		n++
	}
	if n != followBuffer || ctx.Err() != nil {
		t.Errorf("%d flows, want %d", n, followBuffer)
	}
	denied := flowOf(1)
	denied.Verdict = telemetry.Denied
	s.Add(denied)
	if f, ok := <-other.Flows(); !ok || f.ID != "r-1" {
		t.Error("the end of one follower ended another")
	}
	cancel()
	if _, ok := <-other.Flows(); ok {
		t.Error("another flow")
	}
}

func TestMemoryIsBounded(t *testing.T) {
	s := New(Config{Path: "/nowhere", QueueBytes: 64 << 10})
	for n := range 1000 {
		s.Add(flowOf(n))
		s.AddSpans([]telemetry.Span{spanOf(n, n, telemetry.FromApplication)})
	}
	s.AddSpans([]telemetry.Span{spanOf(0, 0, telemetry.FromGateway)})
	got := s.Stats(t.Context())
	if got.Flows.Dropped == 0 || int(got.Flows.Dropped)+got.Flows.Waiting != 1000 || got.Flows.Waiting < 10 {
		t.Errorf("flows: %+v", got.Flows)
	}
	if got.Applications.Dropped == 0 || got.Spans.Waiting != 1 || got.Spans.Dropped != 0 {
		t.Errorf("an application's spans pushed out others: %+v", got)
	}
	list, err := s.Flows(t.Context(), telemetry.FlowFilter{Limit: 1})
	if !errors.Is(err, ErrMemoryOnly) || len(list) != 1 || list[0].ID != "r-999" {
		t.Errorf("%v, %v", list, err)
	}
}

func TestAge(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "telemetry.db")
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{Path: path, MaxAge: 24 * time.Hour})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		rows := func() int64 {
			synctest.Wait()
			n := s.Stats(ctx)
			return n.Flows.Rows + n.Spans.Rows
		}
		for n := range 4100 { // more than one turn of pruning
			s.Add(flowOf(n))
		}
		s.AddSpans([]telemetry.Span{spanOf(0, 0, telemetry.FromGateway)})
		time.Sleep(23 * time.Hour)
		s.Add(flowOf(7777))
		time.Sleep(30 * time.Minute)
		if n := rows(); n != 4102 {
			t.Errorf("%d rows before a day has passed", n)
		}
		time.Sleep(40 * time.Minute)
		if n := rows(); n != 1 {
			t.Errorf("%d rows after a day, want the newest", n)
		}
		time.Sleep(24 * time.Hour)
		if n := rows(); n != 0 {
			t.Errorf("%d rows after two days", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSizeIsBoundedAndSharesHold(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "telemetry.db")
	const most = 4 << 20
	s, _ := start(t, Config{Path: path, MaxBytes: most})
	for n := range 200 {
		s.Add(flowOf(n))
		s.AddSpans([]telemetry.Span{spanOf(n, 0, telemetry.FromGateway)})
	}
	written(t, s)
	big := strings.Repeat("x", 8000)
	for n := range 1000 { // 8 MB of an application's spans
		span := spanOf(n, n, telemetry.FromApplication)
		span.Attributes = telemetry.Attributes{"text": big}
		s.AddSpans([]telemetry.Span{span})
		if n%100 == 0 {
			written(t, s)
		}
	}
	written(t, s)
	got := s.Stats(t.Context())
	info, err := os.Stat(path)
	if err != nil || info.Size() > most || got.Bytes > most {
		t.Errorf("the file has %v bytes (%d), at most %d are allowed; %v", info.Size(), got.Bytes, most, err)
	}
	if got.Applications.Rows == 1000 || got.Applications.Rows < 100 {
		t.Errorf("%d rows of the application are left", got.Applications.Rows)
	}
	if got.Flows.Rows != 200 || got.Spans.Rows != 200 {
		t.Errorf("an application pushed out what a gateway said: %+v", got)
	}
	newest, err := s.Trace(t.Context(), string(spanOf(999, 0, "").TraceID))
	if err != nil || len(newest.Spans) != 1 {
		t.Errorf("the newest is gone: %v", err)
	}
}

func TestSmallerBoundShrinksTheFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "telemetry.db")
	s, stop := start(t, Config{Path: path, MaxBytes: 64 << 20})
	for n := range 2000 {
		f := flowOf(n)
		f.Path = "/" + strings.Repeat("x", 4000)
		s.Add(f)
	}
	written(t, s)
	was := s.Stats(t.Context()).Bytes
	stop()
	s, _ = start(t, Config{Path: path, MaxBytes: 4 << 20})
	s.Add(flowOf(1))
	until(t, "a smaller file", func() bool {
		n := s.Stats(t.Context()).Bytes
		return n > 0 && n <= 4<<20
	})
	if was <= 4<<20 {
		t.Errorf("it was small before: %d", was)
	}
}

func TestBrokenFiles(t *testing.T) {
	t.Parallel()
	whole := filepath.Join(t.TempDir(), "telemetry.db")
	s, stop := start(t, Config{Path: whole})
	for n := range 2000 {
		s.Add(flowOf(n))
	}
	written(t, s)
	stop()
	file, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	grown := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "telemetry.db")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	overwrite := func(t *testing.T, path string, at, bytes int) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte(strings.Repeat("garbage!", bytes/8)), int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name string
		path func(*testing.T) string
	}{
		{"no database at all", func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "telemetry.db")
			if err := os.WriteFile(path, []byte(strings.Repeat("not a database\n", 1000)), 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}},
		{"pages overwritten", func(t *testing.T) string {
			path := grown(t)
			overwrite(t, path, 4096, 400_000)
			return path
		}},
		{"cut in half", func(t *testing.T) string {
			path := grown(t)
			if err := os.Truncate(path, 300_000); err != nil {
				t.Fatal(err)
			}
			return path
		}},
		{"of a later version", func(t *testing.T) string {
			path := grown(t)
			overwrite(t, path, 60, 8) // user_version
			return path
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := test.path(t)
			earlier := path + asideSuffix
			if err := os.WriteFile(earlier, []byte("of last time"), 0o600); err != nil {
				t.Fatal(err)
			}
			log := &logged{}
			s, stop := start(t, Config{Path: path, Log: slog.New(slog.NewTextHandler(log, nil))})
			s.Add(flowOf(1))
			until(t, "a new file with the flow in it", func() bool {
				_, _ = s.Flows(t.Context(), telemetry.FlowFilter{Limit: 1000}) // readers find what writers do not
				_, err := os.Stat(earlier + ".1")
				return err == nil && s.Stats(t.Context()).Problem == ""
			})
			s.Add(flowOf(2))
			written(t, s)
			list, err := s.Flows(t.Context(), telemetry.FlowFilter{})
			if err != nil || len(list) == 0 || list[0].ID != "r-2" {
				t.Errorf("%v, %v", idsOf(list), err)
			}
			stop()
			if text, err := os.ReadFile(earlier); err != nil || string(text) != "of last time" {
				t.Errorf("what was put aside earlier: %q, %v", text, err)
			}
			said := log.count("store is of another version, a new one") == 1
			if said != (test.name == "of a later version") || !said && log.count("store is broken, a new one") != 1 {
				t.Errorf("logged: %s", log)
			}
			s, _ = start(t, Config{Path: path})
			s.Add(flowOf(3))
			written(t, s)
			if n := s.Stats(t.Context()).Flows.Rows; n == 0 || n > 3 {
				t.Errorf("the new file has %d flows", n)
			}
		})
	}
}

func TestNoFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	block := filepath.Join(dir, "state") // a file stands where the folder must be
	if err := os.WriteFile(block, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ := start(t, Config{Path: filepath.Join(block, "telemetry.db")})
	s.Add(flowOf(1))
	until(t, "a problem", func() bool { return strings.Contains(s.Stats(t.Context()).Problem, "not a directory") })
	if list, err := s.Flows(t.Context(), telemetry.FlowFilter{}); len(list) != 1 || !errors.Is(err, ErrMemoryOnly) {
		t.Errorf("%v, %v", idsOf(list), err)
	}
	if err := os.Remove(block); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	written(t, s) // by a retry
}

// Everything at once, for the race detector: nothing is lost, nothing is seen twice.
func TestTogether(t *testing.T) {
	t.Parallel()
	s, _ := start(t, Config{MaxBytes: 64 << 20})
	const senders, each = 4, 1500
	var wg sync.WaitGroup
	for w := range senders {
		wg.Go(func() {
			for n := range each {
				s.Add(flowOf(w*each + n))
				s.AddSpans([]telemetry.Span{spanOf(n, w, telemetry.FromApplication)})
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	for range 3 {
		wg.Go(func() {
			sub := s.Follow(ctx, telemetry.FlowFilter{})
			for f := range sub.Flows() {
				if f.Seq == 0 {
					t.Error("a flow without Seq")
				}
			}
		})
	}
	wg.Go(func() {
		defer cancel()
		most := 0
		for most < senders*each {
			list, err := s.Flows(t.Context(), telemetry.FlowFilter{Limit: 10_000})
			if err != nil {
				if errors.Is(err, ErrMemoryOnly) && most == 0 {
					continue
				}
				t.Error(err)
				return
			}
			seen := map[int64]bool{}
			for _, f := range list {
				if seen[f.Seq] {
					t.Errorf("flow %d twice", f.Seq)
				}
				seen[f.Seq] = true
			}
			if len(list) < most {
				t.Errorf("saw %d flows, and %d before", len(list), most)
				return
			}
			most = len(list)
			s.Stats(t.Context())
			_, _ = s.Traces(t.Context(), telemetry.FlowFilter{Limit: 2})
		}
	})
	wg.Wait()
}

func BenchmarkAdd(b *testing.B) {
	s, _ := start(b, Config{})
	f := flowOf(1)
	b.ReportAllocs()
	for b.Loop() {
		s.Add(f)
	}
}

// Several records that come together are as much a reason to write as one.
func TestSpansThatComeTogether(t *testing.T) {
	s, _ := start(t, Config{})
	s.Add(flowOf(0))
	written(t, s) // and idle from here on
	s.AddSpans([]telemetry.Span{spanOf(0, 0, telemetry.FromGateway), spanOf(0, 1, telemetry.FromGateway)})
	written(t, s)
	if got := s.Stats(t.Context()).Spans.Rows; got != 2 {
		t.Errorf("%d rows", got)
	}
}
