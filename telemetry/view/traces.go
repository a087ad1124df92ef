package view

import (
	"cmp"
	"fmt"
	"io"
	"strings"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// maxIndent is, in bytes, how far a tree goes to the right before it starts again on the left.
const maxIndent = 200

// Traces writes traces as lines of a table.
func Traces(out io.Writer, traces []telemetry.Summary, colours bool) error {
	t := Table{out: out, colours: colours, heading: []string{
		"TIME", "TRACE", "CALLER", "ENDPOINTS", "VERDICT", "DURATION", "SPANS", "TOKENS", "ROOT"}}
	rows := make([][]cell, len(traces))
	for i, s := range traces {
		id := string(s.TraceID)
		rows[i] = []cell{
			{s.Start.Format("15:04:05.000"), dim}, {id[:min(12, len(id))], ""}, {caller(s.Caller), ""},
			{or(endpoints(s.Endpoints)), ""}, verdict(s.Verdict), {took(s.Duration), ""}, {fmt.Sprint(s.Spans), ""},
			{tokens(s.InputTokens, s.OutputTokens), ""}, {clean(s.Root, 60), ""},
		}
	}
	return t.write(rows)
}

// Trace writes one trace as a tree: what took how long, and what the gateways said of it.
func Trace(out io.Writer, trace telemetry.Trace, colours bool) error {
	s := trace.Summary()
	who := caller(s.Caller)
	if list := endpoints(s.Endpoints); list != "" {
		who += " → " + list
	}
	head := fmt.Sprintf("trace %s  %s  %s  %s", clean(string(trace.ID), 32), who, took(s.Duration), verdict(s.Verdict).paint(0, colours))
	if s.InputTokens+s.OutputTokens > 0 {
		head += "  " + tokens(s.InputTokens, s.OutputTokens) + " tokens"
	}
	if _, err := io.WriteString(out, head+"\n"); err != nil {
		return err
	}
	t := Table{out: out, colours: colours, heading: []string{"SPAN", "SERVICE", "START", "DURATION", "VERDICT", "RULE", "DETAILS"}}
	var rows [][]cell
	var add func(nodes []*telemetry.Node, indent string, top bool)
	add = func(nodes []*telemetry.Node, indent string, top bool) {
		if len(indent) > maxIndent {
			indent = "… "
		}
		for i, n := range nodes {
			branch, below := "├─ ", "│  "
			switch {
			case top:
				branch, below = "", ""
			case i == len(nodes)-1:
				branch, below = "└─ ", "   "
			}
			name := indent + branch + clean(n.Span.Name, 60)
			if n.Orphan {
				name += " (parent not seen)"
			}
			rows = append(rows, row(n, name, s))
			add(n.Children, indent+below, false)
		}
	}
	add(telemetry.Tree(trace.Spans, trace.Flows), "", true)
	return t.write(rows)
}

func row(n *telemetry.Node, name string, s telemetry.Summary) []cell {
	said, rule := judged(n)
	at := "-"
	if !n.Span.Start.IsZero() {
		at = "+" + took(max(0, n.Span.Start.Sub(s.Start)))
	}
	return []cell{{name, ""}, {or(clean(n.Span.Service, 24)), ""}, {at, dim}, {took(n.Span.Duration()), ""},
		said, {clean(rule, 48), ""}, {details(n), dim}}
}

// judged returns the verdict on a span: the access log's, or else what a gateway wrote on its own span.
func judged(n *telemetry.Node) (cell, string) {
	if n.Flow != nil {
		return verdict(n.Flow.Verdict), n.Flow.Rule
	}
	rule := n.Span.Attributes.Text(telemetry.SecurityRuleName)
	outcome := telemetry.Verdict(n.Span.Attributes.Text(telemetry.EventOutcome))
	if n.Span.Source != telemetry.FromGateway || outcome == "" {
		return cell{}, ""
	}
	return verdict(outcome), rule
}

// details says what the span worked on.
func details(n *telemetry.Node) string {
	a := n.Span.Attributes
	var flow telemetry.Flow
	if n.Flow != nil {
		flow = *n.Flow
	}
	var parts []string
	add := func(text string) {
		if text != "" {
			parts = append(parts, clean(text, 60))
		}
	}
	if flow.Operation != "" || flow.Resource != "" {
		add(strings.TrimSpace(string(flow.Operation) + " " + flow.Resource))
	} else {
		add(cmp.Or(a.Text(telemetry.GenAIRequestModel), a.Text(telemetry.DBCollectionName)))
	}
	if flow.Status != 0 {
		add(fmt.Sprint(flow.Status))
	}
	if flow.FirstByte != 0 {
		add("first byte " + took(flow.FirstByte))
	}
	in, out := flow.InputTokens, flow.OutputTokens
	if n.Flow == nil {
		in, out = a.Int(telemetry.GenAIInputTokens), a.Int(telemetry.GenAIOutputTokens)
	}
	if in+out != 0 {
		add(tokens(in, out) + " tokens")
	}
	switch {
	case flow.Verdict == telemetry.Refused || flow.Verdict == telemetry.Failed || flow.Verdict == telemetry.Limited:
		add(flow.Detail)
	case n.Span.Status == telemetry.StatusError:
		add("error: " + n.Span.Message)
	}
	return strings.Join(parts, ", ")
}

func endpoints(list []segment.EndpointName) string {
	names := make([]string, len(list))
	for i, e := range list {
		names[i] = string(e)
	}
	return clean(strings.Join(names, ", "), 48)
}
