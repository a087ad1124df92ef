package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

const head = "---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: %s}\nspec: {from: [{spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: docs, operations: [Read], resources: [%s]}]%s}\n"

func grant(name, resource, more string) string { return fmt.Sprintf(head, name, resource, more) }

func snapshot(docs ...string) v1alpha1.Snapshot {
	var s v1alpha1.Snapshot
	for i, d := range docs {
		s.Files = append(s.Files, v1alpha1.Decode(fmt.Sprintf("f%d", i), []byte(d)))
	}
	return s
}

// line is a pipeline that runs, in a bubble of its own, and what it has published.
type line struct {
	*testing.T
	*Pipeline
	documents chan v1alpha1.Snapshot
	shadow    chan v1alpha1.Snapshot
	names     chan envoy.Names
	mu        sync.Mutex
	sunk      []*Generation
	fails     error
	ended     error
}

func (l *line) Publish(_ context.Context, g *Generation) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sunk = append(l.sunk, g)
	return l.fails
}

func (l *line) published() []*Generation {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.sunk)
}

func run(t *testing.T, test func(l *line)) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{T: t, documents: make(chan v1alpha1.Snapshot), shadow: make(chan v1alpha1.Snapshot), names: make(chan envoy.Names)}
		l.Pipeline = &Pipeline{Options: corpus.Options(), Documents: l.documents, Shadow: l.shadow, Names: l.names, Sinks: []Sink{l}, Log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { l.ended = l.Pipeline.Run(ctx); close(done) }()
		test(l)
		cancel()
		<-done
	})
}

func (l *line) edit(docs ...string) {
	l.documents <- snapshot(docs...)
	synctest.Wait()
}

// reads says what caller a may read in the generation that is in force.
func (l *line) reads(resource string) bool {
	l.Helper()
	g := l.State().Generation
	all := l.published()
	if g == nil || len(all) == 0 || g.Digest != all[len(all)-1].Digest {
		l.Fatalf("in force is %v, and that was not published last", g)
	}
	return authz.Decide(g.Policy, authz.Request{Caller: "spiffe://example.org/a", Endpoint: "docs", Operation: segment.Read, Resource: resource}).Allowed
}

func (l *line) wantPublished(n int) {
	l.Helper()
	if got := len(l.published()); got != n {
		l.Fatalf("%d generations are published, not %d", got, n)
	}
}

func endpoints() string { return strings.Join(corpus.Endpoints(), "") }

func TestNothingBeforeTheFirstDocuments(t *testing.T) {
	run(t, func(l *line) {
		if s := l.State(); s.Generation != nil || s.Problems != nil || s.Failure != "" {
			t.Errorf("begins with %+v", s)
		}
		l.names <- envoy.Names{"docs": {"x": "y"}}
		time.Sleep(time.Hour)
		l.wantPublished(0)
		l.edit("kind: Nonsense\n")
		l.wantPublished(0)
		if s := l.State(); s.Generation != nil || len(s.Problems) == 0 {
			t.Errorf("has %+v", s)
		}
		l.edit(endpoints())
		l.wantPublished(1)
		if got := l.published()[0].Learned.Names["docs"]["x"]; got != "y" {
			t.Errorf("names that came early are lost: %q", got)
		}
		if s := l.State(); len(s.Problems) != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestLastGoodStays(t *testing.T) {
	run(t, func(l *line) {
		l.edit(endpoints(), grant("g", "wiki", ""))
		l.wantPublished(1)
		l.edit(endpoints(), grant("g", "wiki", ""), grant("h", "'a*b'", ""))
		l.wantPublished(1)
		if s := l.State(); len(s.Problems) != 1 || s.Generation != l.published()[0] || !l.reads("wiki") {
			t.Errorf("%+v", s)
		}
		// A store's names are news, and the documents are still wrong.
		l.names <- envoy.Names{"docs": {"x": "wiki"}}
		synctest.Wait()
		l.wantPublished(2)
		if s := l.State(); len(s.Problems) != 1 || !l.reads("wiki") {
			t.Errorf("%+v", s)
		}
		l.edit(endpoints(), grant("g", "other", ""))
		l.wantPublished(3)
		if s := l.State(); len(s.Problems) != 0 || l.reads("wiki") || !l.reads("other") {
			t.Errorf("%+v", s)
		}
		// No documents at all are a decision, too.
		l.edit()
		l.wantPublished(4)
		if l.reads("other") {
			t.Error("deleted documents are in force")
		}
	})
}

func TestSameDocumentsAreNotPublished(t *testing.T) {
	run(t, func(l *line) {
		l.edit(endpoints(), grant("g", "wiki", ""), grant("h", "public", ""))
		l.edit(endpoints(), grant("g", "wiki", ""), grant("h", "public", ""))
		l.edit(grant("h", "public", ""), "# a comment\n"+endpoints(), grant("g", "wiki", ""))
		l.wantPublished(1)
		time.Sleep(24 * time.Hour)
		l.wantPublished(1)
	})
}

func TestNames(t *testing.T) {
	run(t, func(l *line) {
		l.edit(endpoints())
		for _, n := range []struct {
			names envoy.Names
			want  int
		}{
			{envoy.Names{"docs": {"1": "a"}}, 2}, {envoy.Names{"docs": {"1": "a"}}, 2},
			{envoy.Names{"docs": {"1": "b"}}, 3}, {envoy.Names{}, 4}, {nil, 4},
		} {
			l.names <- n.names
			synctest.Wait()
			l.wantPublished(n.want)
		}
	})
}

// Grants end by the clock alone, one after the other, and even while the newest documents are wrong.
func TestExpiry(t *testing.T) {
	run(t, func(l *line) {
		start := time.Now()
		at := func(d time.Duration) string { return start.Add(d).UTC().Format(", expires: '" + time.RFC3339 + "'") }
		l.edit(endpoints(), grant("one", "a", at(time.Minute)), grant("two", "b", at(time.Hour)), grant("three", "c", at(time.Hour)), grant("always", "d", ""))
		l.wantPublished(1)
		until := func(d time.Duration) {
			time.Sleep(time.Until(start.Add(d)))
			synctest.Wait()
		}
		until(time.Minute - time.Nanosecond)
		l.wantPublished(1)
		if !l.reads("a") {
			t.Error("a grant ends too early")
		}
		until(time.Minute)
		l.wantPublished(2)
		if l.reads("a") || !l.reads("b") {
			t.Error("the first grant should have ended, and the second not")
		}
		l.edit("kind: Nonsense\n")
		until(time.Hour)
		l.wantPublished(3)
		if l.reads("b") || l.reads("c") || !l.reads("d") || len(l.State().Problems) == 0 {
			t.Errorf("%+v", l.State())
		}
		until(24 * time.Hour)
		l.wantPublished(3)

		// One that is over already is no grant, and one that is taken back does not end.
		l.edit(endpoints(), grant("past", "a", at(time.Minute)), grant("soon", "b", at(48*time.Hour)))
		l.wantPublished(4)
		if l.reads("a") || !l.reads("b") {
			t.Error("a grant of the past is in force")
		}
		l.edit(endpoints(), grant("soon", "b", ""))
		until(72 * time.Hour)
		if !l.reads("b") {
			t.Error("a grant ends that has no end")
		}
	})
}

func TestSinkFails(t *testing.T) {
	run(t, func(l *line) {
		l.fails = errors.New("no wire")
		l.edit(endpoints())
		if !errors.Is(l.ended, l.fails) {
			t.Errorf("ends with %v", l.ended)
		}
		if l.State().Generation != nil {
			t.Error("what was not published is shown as in force")
		}
	})
}

func TestDigest(t *testing.T) {
	digest := func(names envoy.Names, docs ...string) Digest {
		config, problems := v1alpha1.Assemble(slices.Concat(snapshot(docs...).Files...), corpus.Options())
		if problems != nil {
			t.Fatal(problems)
		}
		g, err := Generate(config, envoy.Learned{Names: names}, time.Unix(0, 0))
		if err != nil {
			t.Fatal(err)
		}
		return g.Digest
	}
	workload := func(name, path, user string) string {
		return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Workload\nmetadata: {name: %s}\nspec: {spiffeID: 'spiffe://example.org/%s', selectors: ['unix:user:%s']}\n", name, path, user)
	}
	base := digest(nil, endpoints(), grant("g", "wiki", ""), workload("w", "w", "u"))
	if again := digest(nil, workload("w", "w", "u"), grant("g", "wiki", ""), endpoints()); again != base {
		t.Errorf("%s is %s in another order", base, again)
	}
	if len(base) != 64 || base.Short() != string(base[:12]) || Digest("").Short() != "" {
		t.Errorf("%q is %q for short", base, base.Short())
	}
	seen := map[Digest]string{base: "base"}
	for what, d := range map[string]Digest{
		"another grant":    digest(nil, endpoints(), grant("g", "wikis", ""), workload("w", "w", "u")),
		"another name":     digest(nil, endpoints(), grant("h", "wiki", ""), workload("w", "w", "u")),
		"another ID":       digest(nil, endpoints(), grant("g", "wiki", ""), workload("w", "v", "u")),
		"another selector": digest(nil, endpoints(), grant("g", "wiki", ""), workload("w", "w", "v")),
		"no workload":      digest(nil, endpoints(), grant("g", "wiki", "")),
		"names":            digest(envoy.Names{"docs": {"1": "a"}}, endpoints(), grant("g", "wiki", ""), workload("w", "w", "u")),
		"nothing":          digest(nil),
	} {
		if seen[d] != "" {
			t.Errorf("%s and %s are the same", what, seen[d])
		}
		seen[d] = what
	}
}

// A grant begins, and holds in its windows, by the clock alone.
func TestWindows(t *testing.T) {
	run(t, func(l *line) {
		start := time.Now() // 2000-01-01T00:00:00Z, a Saturday
		l.edit(endpoints(), grant("a", "a", `, windows: [{days: [Sat, Sun], from: "09:00", to: "17:00", timeZone: Europe/Berlin}]`),
			grant("b", "b", ", notBefore: '2000-01-01T10:00:00Z'"), grant("c", "a", ", effect: Deny, windows: [{days: [Sun], from: '12:00', to: '12:01'}]"))
		for _, c := range []struct {
			at   time.Duration
			a, b bool
		}{
			{0, false, false}, {8*time.Hour - 1, false, false}, {8 * time.Hour, true, false}, {10*time.Hour - 1, true, false}, {10 * time.Hour, true, true},
			{16*time.Hour - 1, true, true}, {16 * time.Hour, false, true}, {32 * time.Hour, true, true}, {36 * time.Hour, false, true},
			{36*time.Hour + time.Minute, true, true}, {40 * time.Hour, false, true}, {7 * 24 * time.Hour, false, true}, {7*24*time.Hour + 8*time.Hour, true, true},
		} {
			time.Sleep(time.Until(start.Add(c.at)))
			synctest.Wait()
			if a, b := l.reads("a"), l.reads("b"); a != c.a || b != c.b {
				t.Errorf("after %s: %t, %t", c.at, a, b)
			}
		}
	})
}

// tries says what the shadow says of what caller a may read.
func (l *line) tries(resource string) bool {
	l.Helper()
	l.reads(resource) // which looks at what is in force
	return authz.Decide(l.State().Generation.Policy, authz.Request{Caller: "spiffe://example.org/a", Endpoint: "docs", Operation: segment.Read, Resource: resource}).ShadowAllowed
}

func (l *line) try(docs ...string) {
	l.shadow <- snapshot(docs...)
	synctest.Wait()
}

func TestShadowFolder(t *testing.T) {
	run(t, func(l *line) {
		// It comes first, and alone it is nothing.
		l.try(grant("g", "tried", ""))
		l.wantPublished(0)
		l.edit(endpoints(), grant("g", "wiki", ""))
		l.wantPublished(1)
		if !l.reads("wiki") || l.tries("wiki") || l.reads("tried") || !l.tries("tried") {
			t.Error("not what is enforced, or not what is tried")
		}
		// The same enforced documents: only the shadow is another.
		l.try(grant("g", "wiki", ""))
		l.wantPublished(2)
		if !l.reads("wiki") || !l.tries("wiki") || l.tries("tried") {
			t.Error("the folder is not followed")
		}
		l.try(grant("g", "wiki", ""), "# the same\n")
		l.wantPublished(2)

		// Whatever is wrong with it stays there.
		for _, broken := range [][]string{{"kind: Nonsense\n"}, {grant("g", "'a*b'", "")}, {grant("h", "x", ""), "effect: Deny"},
			{strings.ReplaceAll(grant("g", "wiki", ""), "docs", "nowhere")}, {endpoints(), endpoints()}} {
			l.try(broken...)
			if s := l.State(); len(s.Shadow) == 0 || len(s.Problems) != 0 || s.Failure != "" || !l.reads("wiki") || !l.tries("wiki") {
				t.Errorf("%q: %+v", broken, s)
			}
		}
		l.wantPublished(2)
		// Meanwhile others change, for good and for bad, and both are told apart.
		l.edit(endpoints(), grant("g", "other", ""))
		l.wantPublished(3)
		if s := l.State(); len(s.Shadow) == 0 || !l.reads("other") || l.reads("wiki") || !l.tries("wiki") || l.tries("other") {
			t.Errorf("%+v", s)
		}
		l.edit("kind: Nonsense\n")
		if s := l.State(); len(s.Shadow) == 0 || len(s.Problems) == 0 || !l.reads("other") || !l.tries("wiki") {
			t.Errorf("%+v", s)
		}
		l.try(grant("g", "new", ""))
		l.wantPublished(4)
		if s := l.State(); len(s.Shadow) != 0 || len(s.Problems) == 0 || !l.reads("other") || l.tries("wiki") || !l.tries("new") {
			t.Errorf("%+v", s)
		}
		// What it needs of the enforced documents can go, and come back.
		l.edit(strings.Join(corpus.Endpoints()[:2], ""))
		if s := l.State(); len(s.Shadow) == 0 || len(s.Problems) != 0 {
			t.Errorf("%+v", s)
		}
		l.edit(endpoints(), grant("g", "other", ""))
		if s := l.State(); len(s.Shadow) != 0 || !l.reads("other") || !l.tries("new") {
			t.Errorf("%+v", s)
		}
		// An empty one denies everything, and enforces nothing.
		l.try()
		if !l.reads("other") || l.tries("other") || l.tries("new") {
			t.Error("the empty folder is not tried")
		}
	})
}

// A folder that was never good is none: then grants in Shadow mode are tried.
func TestShadowFolderBrokenFromTheStart(t *testing.T) {
	run(t, func(l *line) {
		l.edit(endpoints(), grant("g", "wiki", ""), grant("h", "tried", ", mode: Shadow"))
		l.try("kind: Nonsense\n")
		l.wantPublished(1)
		if s := l.State(); len(s.Shadow) == 0 || !l.tries("wiki") || !l.tries("tried") || l.reads("tried") {
			t.Errorf("%+v", s)
		}
	})
}

// Grants of the folder begin and end by the clock, too.
func TestShadowFolderInTime(t *testing.T) {
	run(t, func(l *line) {
		start := time.Now()
		l.edit(endpoints(), grant("g", "wiki", ""))
		l.try(grant("g", "wiki", start.Add(time.Hour).UTC().Format(", notBefore: '"+time.RFC3339+"'")))
		time.Sleep(time.Hour - time.Nanosecond)
		synctest.Wait()
		if !l.reads("wiki") || l.tries("wiki") {
			t.Error("it begins too early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !l.reads("wiki") || !l.tries("wiki") {
			t.Error("it does not begin")
		}
	})
}
