package view

import (
	"fmt"
	"io"

	"sallyport.dev/telemetry"
)

// Flows writes flows as lines of a table.
type Flows struct{ table Table }

// NewFlows returns a table that writes to out, with colours if they are wanted.
func NewFlows(out io.Writer, colours bool) *Flows {
	return &Flows{Table{out: out, colours: colours, heading: []string{
		"TIME", "CALLER", "ENDPOINT", "OPERATION", "RESOURCE", "VERDICT", "RULE", "STATUS", "LATENCY", "TOKENS", "NOTE"}}}
}

// Write appends flows in the order given.
func (t *Flows) Write(flows ...telemetry.Flow) error {
	rows := make([][]cell, len(flows))
	for i, f := range flows {
		status := "-"
		if f.Status != 0 {
			status = fmt.Sprint(f.Status)
		}
		rows[i] = []cell{
			{f.Time.Format("15:04:05.000"), dim}, {caller(f.Caller), ""}, {or(clean(string(f.Endpoint), 32)), ""},
			{or(clean(string(f.Operation), 16)), ""}, {or(clean(f.Resource, 24)), ""}, verdict(f.Verdict), {or(clean(f.Rule, 48)), ""},
			{status, ""}, {took(f.Duration), ""}, {tokens(f.InputTokens, f.OutputTokens), ""}, note(f),
		}
	}
	return t.table.write(rows)
}

// note says what is out of the ordinary: why it was not served, or what the shadow grants would change.
func note(f telemetry.Flow) cell {
	if f.Verdict == telemetry.Refused || f.Verdict == telemetry.Failed || f.Verdict == telemetry.Limited {
		return cell{clean(f.Detail, 100), ""}
	}
	if f.Shadow != "" && f.Shadow != f.Verdict {
		return cell{"shadow: " + verdict(f.Shadow).text + " by " + clean(f.ShadowBy, 48), yellow}
	}
	return cell{}
}
