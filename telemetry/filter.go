package telemetry

import (
	"time"

	"sallyport.dev/segment"
)

// FlowFilter selects flows, and traces by their flows: a trace is selected when one of its flows is. A field with its
// zero value selects everything.
type FlowFilter struct {
	Caller   segment.Pattern      `json:"caller,omitempty"` // SPIFFE ID, or what it begins with and a "*"
	Endpoint segment.EndpointName `json:"endpoint,omitempty"`
	Verdict  Verdict              `json:"verdict,omitempty"`
	Since    time.Time            `json:"since,omitzero"` // flows that began then or later
	Limit    int                  `json:"limit,omitempty"`
}

const (
	defaultLimit = 100
	maxLimit     = 10_000
)

// Rows returns how many flows or traces are wanted: Limit, 100 by default and at most 10,000.
func (f FlowFilter) Rows() int {
	if f.Limit <= 0 {
		return defaultLimit
	}
	return min(f.Limit, maxLimit)
}

// Match reports whether the filter selects the flow. Limit plays no part.
func (f FlowFilter) Match(flow Flow) bool {
	return (f.Caller == "" || f.Caller.Matches(flow.Caller.String())) &&
		(f.Endpoint == "" || f.Endpoint == flow.Endpoint) &&
		(f.Verdict == "" || f.Verdict == flow.Verdict) &&
		(f.Since.IsZero() || !flow.Time.Before(f.Since))
}
