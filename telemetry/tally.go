package telemetry

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

// Judged is who asked for what, and what was said to it. Its fields are those of Flow.
type Judged struct {
	Caller    spiffeid.ID          `json:"caller"`
	Endpoint  segment.EndpointName `json:"endpoint,omitempty"`
	Operation segment.Operation    `json:"operation,omitempty"`
	Resource  string               `json:"resource,omitempty"`
	Verdict   Verdict              `json:"verdict"`
	Rule      string               `json:"rule,omitempty"`
	Shadow    Verdict              `json:"shadow,omitempty"`
	ShadowBy  string               `json:"shadow_rule,omitempty"`
}

// Judged returns what the flow has in common with others like it.
func (f Flow) Judged() Judged {
	return Judged{f.Caller, f.Endpoint, f.Operation, f.Resource, f.Verdict, f.Rule, f.Shadow, f.ShadowBy}
}

// Granted reports whether a grant allows it, whatever became of it then.
func (j Judged) Granted() bool {
	return j.Verdict == Allowed || j.Verdict == Failed || j.Verdict == Limited
}

// Differs reports whether the shadow grants would have answered otherwise. What was not judged does not differ.
func (j Judged) Differs() bool {
	return j.Granted() && j.Shadow == Denied || j.Verdict == Denied && j.Shadow == Allowed
}

// Tally is how often the same was asked and answered, and when.
type Tally struct {
	Judged
	Count    int64     `json:"count"`
	First    time.Time `json:"first"` // when the first and the last of them began
	Last     time.Time `json:"last"`
	FirstSeq int64     `json:"-"` // of the ones that the store received first and last
	LastSeq  int64     `json:"-"`
}

// Add counts in what another tally of the same counts.
func (t *Tally) Add(more Tally) {
	if t.Count == 0 {
		*t = more
		return
	}
	t.Count += more.Count
	if more.First.Before(t.First) {
		t.First = more.First
	}
	if more.Last.After(t.Last) {
		t.Last = more.Last
	}
	t.FirstSeq, t.LastSeq = min(t.FirstSeq, more.FirstSeq), max(t.LastSeq, more.LastSeq)
}

// Example names one request, so that it can be looked up.
type Example struct {
	ID      string    `json:"id,omitempty"`
	TraceID TraceID   `json:"trace_id,omitempty"`
	Time    time.Time `json:"time"`
}
