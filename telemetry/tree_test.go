package telemetry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// at is n milliseconds after the start of every test.
func at(n int) time.Time {
	return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(n) * time.Millisecond)
}

// readSpans reads lines "id parent start [source]"; "-" is no parent.
func readSpans(t *testing.T, text string) (spans []Span) {
	t.Helper()
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		var start int
		if _, err := fmt.Sscan(f[2], &start); err != nil {
			t.Fatal(err)
		}
		s := Span{SpanID: SpanID(f[0]), Parent: SpanID(strings.Trim(f[1], "-")), Start: at(start), End: at(start + 1),
			Source: FromGateway, Name: f[0]}
		if len(f) > 3 {
			s.Source = Source(f[3])
			s.Name += "(" + f[3] + ")"
		}
		spans = append(spans, s)
	}
	return spans
}

func draw(nodes []*Node) string {
	var b strings.Builder
	for i, n := range nodes {
		if i > 0 {
			b.WriteString(" ")
		}
		b.WriteString(n.Span.Name)
		if n.Orphan {
			b.WriteString("?")
		}
		if n.Flow != nil {
			b.WriteString("=" + string(n.Flow.Verdict))
		}
		if len(n.Children) > 0 {
			b.WriteString("[" + draw(n.Children) + "]")
		}
	}
	return b.String()
}

func TestTree(t *testing.T) {
	for _, test := range []struct{ name, spans, want string }{
		{"nothing", "", ""},
		{"parents after children", "c b 2\nb a 1\na - 0", "a[b[c]]"},
		{"siblings by start", "a - 0\nc a 2\nb a 1", "a[b c]"},
		{"parent not seen", "b lost 1\nc b 2\nd lost 3", "b?[c] d?"},
		{"duplicates: the first stays", "a - 0\nb a 1\nb a 2", "a[b]"},
		{"an application takes no gateway's place", "a - 0 application\nb a 1 application\nb a 2", "a(application)[b]"},
		{"own parent", "a a 0\nb a 1", "a?[b]"},
		{"ring", "c b 2\na c 0\nb a 1", "a?[b[c]]"},
		{"ring with a tail that began first", "t a 0\na b 1\nb a 2", "a?[t b]"},
		{"two rings", "a b 0\nb a 1\nc d 2\nd c 3", "a?[b] c?[d]"},
		{"child before parent by the clock", "a - 10\nb a 0\nc b 5", "a[b[c]]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := draw(Tree(readSpans(t, test.spans), nil)); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestTreeJoinsFlows(t *testing.T) {
	flow := func(id string, start int, v Verdict) Flow {
		return Flow{SpanID: SpanID(id), Time: at(start), Method: "POST", Path: "/" + id, Verdict: v}
	}
	spans := readSpans(t, "a - 0 application\ng a 1\nx a 2 application")
	for _, test := range []struct {
		name  string
		flows []Flow
		want  string
	}{
		{"on its span", []Flow{flow("g", 1, Allowed)}, "a(application)[g=allowed x(application)]"},
		{"without a span", []Flow{flow("", 9, Denied)}, "a(application)[g x(application)] POST /=denied"},
		{"an application's span with the flow's id gives way", []Flow{flow("x", 2, Denied)}, "a(application)[g] POST /x=denied"},
		{"two of one id", []Flow{flow("g", 1, Allowed), flow("g", 3, Denied)}, "a(application)[g=allowed x(application)] POST /g=denied"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := draw(Tree(spans, test.flows)); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

// Whatever arrives, every span id is in the tree exactly once, and the order of arrival changes nothing.
func TestTreeKeepsEverySpanOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ids := []SpanID{"", "a", "b", "c", "d", "e", "f"}
		n := rapid.IntRange(0, 6).Draw(t, "n")
		spans := make([]Span, n)
		for i := range spans {
			spans[i] = Span{SpanID: ids[i+1], Name: string(ids[i+1]), Parent: rapid.SampledFrom(ids).Draw(t, "parent"),
				Start: at(rapid.IntRange(0, 5).Draw(t, "start")), Source: FromGateway}
		}
		roots := Tree(spans, nil)
		seen := map[SpanID]int{}
		Walk(roots, func(n *Node) { seen[n.Span.SpanID]++ })
		for _, s := range spans {
			if seen[s.SpanID] != 1 {
				t.Fatalf("span %s is %d times in %s", s.SpanID, seen[s.SpanID], draw(roots))
			}
		}
		if got := draw(Tree(rapid.Permutation(spans).Draw(t, "shuffled"), nil)); got != draw(roots) {
			t.Fatal(cmp.Diff(draw(roots), got))
		}
	})
}
