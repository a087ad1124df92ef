package telemetry

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

// Trace is all that is known of one trace, in no particular order.
type Trace struct {
	ID    TraceID `json:"trace_id"`
	Spans []Span  `json:"spans"`
	Flows []Flow  `json:"flows"`
}

// Summary is one trace on one line.
type Summary struct {
	TraceID      TraceID                `json:"trace_id"`
	Start        time.Time              `json:"start"`
	Duration     time.Duration          `json:"duration_ns"` // from the first start to the last end
	Root         string                 `json:"root"`        // name of the first root span
	Caller       spiffeid.ID            `json:"caller"`      // of the first flow
	Endpoints    []segment.EndpointName `json:"endpoints"`   // sorted
	Verdict      Verdict                `json:"verdict"`     // the worst
	Spans        int                    `json:"spans"`
	Flows        int                    `json:"flows"`
	InputTokens  int64                  `json:"input_tokens,omitempty"`
	OutputTokens int64                  `json:"output_tokens,omitempty"`
}

// Summary sums the trace up. Who, where and the verdict come from flows alone: anybody can send a span.
func (t Trace) Summary() Summary {
	s := Summary{TraceID: t.ID, Spans: len(t.Spans), Flows: len(t.Flows), Endpoints: []segment.EndpointName{}}
	flows := slices.SortedFunc(slices.Values(t.Flows), func(a, b Flow) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Seq, b.Seq))
	})
	for i, f := range flows {
		if i == 0 {
			s.Caller = f.Caller
		}
		if f.Endpoint != "" {
			s.Endpoints = append(s.Endpoints, f.Endpoint)
		}
		s.Verdict = Worst(s.Verdict, f.Verdict)
		s.InputTokens += f.InputTokens
		s.OutputTokens += f.OutputTokens
	}
	slices.Sort(s.Endpoints)
	s.Endpoints = slices.Compact(s.Endpoints)
	roots := Tree(t.Spans, t.Flows)
	if len(roots) > 0 {
		s.Root = roots[0].Span.Name
		s.Start, s.Duration = Extent(roots)
	}
	return s
}
