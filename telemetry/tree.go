package telemetry

import (
	"cmp"
	"slices"
	"time"
)

// Node is a span in its place in a trace.
type Node struct {
	Span Span
	// Flow is what the gateway's access log says of the same request; nil: nothing. Only a gateway's span has one.
	Flow     *Flow
	Children []*Node // by start
	// Orphan tells a root whose parent is named but was not seen, from one that has none.
	Orphan bool
}

// Tree puts the spans and flows of one trace in their places and returns the roots by start. Every span is in it once,
// whatever was sent:
//
//   - a parent that was not seen makes its children roots (Orphan);
//   - of spans with the same id the gateway's stays, then the first;
//   - a ring of spans is cut before the one that began first;
//   - clocks that disagree change the order of siblings, and nothing else.
//
// A flow without a gateway's span gets one made from it, so a verdict is never missing from a tree.
func Tree(spans []Span, flows []Flow) []*Node {
	nodes := nodesOf(spans, flows)
	byID := make(map[SpanID]*Node, len(nodes))
	for _, n := range nodes {
		if n.Span.SpanID != "" {
			byID[n.Span.SpanID] = n
		}
	}
	parent := make(map[*Node]*Node, len(nodes))
	for _, n := range nodes {
		if p := byID[n.Span.Parent]; p != nil {
			parent[n] = p
		}
	}
	cutRings(nodes, parent)

	var roots []*Node
	for _, n := range nodes { // by start, so children and roots come out by start
		if p := parent[n]; p != nil {
			p.Children = append(p.Children, n)
			continue
		}
		n.Orphan = n.Span.Parent != ""
		roots = append(roots, n)
	}
	return roots
}

// Extent returns when the first of the spans began and how long it took until the last one ended. Spans that do not say
// when they began play no part.
func Extent(roots []*Node) (start time.Time, d time.Duration) {
	var end time.Time
	Walk(roots, func(n *Node) {
		if at := n.Span.Start; !at.IsZero() && (start.IsZero() || at.Before(start)) {
			start = at
		}
		if !n.Span.Start.IsZero() && n.Span.End.After(end) {
			end = n.Span.End
		}
	})
	return start, max(0, end.Sub(start))
}

// Walk calls visit with every node, parents before children.
func Walk(nodes []*Node, visit func(*Node)) {
	for _, n := range nodes {
		visit(n)
		Walk(n.Children, visit)
	}
}

// nodesOf makes one node of each span id, joined with its flow, by start.
func nodesOf(spans []Span, flows []Flow) []*Node {
	var nodes []*Node
	byID := map[SpanID]*Node{}
	add := func(s Span) *Node {
		n := &Node{Span: s}
		nodes = append(nodes, n)
		if s.SpanID != "" {
			byID[s.SpanID] = n
		}
		return n
	}
	addFrom := func(gateway bool) {
		for _, s := range spans {
			if (s.Source == FromGateway) == gateway && byID[s.SpanID] == nil {
				add(s)
			}
		}
	}
	addFrom(true) // before all others, so nobody takes the place of a gateway's span
	for _, f := range flows {
		n := byID[f.SpanID]
		switch {
		case n == nil:
			n = add(spanOf(f))
		case n.Flow != nil: // two flows with one id: keep both
			again := spanOf(f)
			again.SpanID = ""
			n = add(again)
		}
		n.Flow = &f
	}
	addFrom(false)
	slices.SortStableFunc(nodes, func(a, b *Node) int {
		return cmp.Or(a.Span.Start.Compare(b.Span.Start), cmp.Compare(a.Span.SpanID, b.Span.SpanID))
	})
	return nodes
}

// spanOf is the span that a gateway would have sent for the flow.
func spanOf(f Flow) Span {
	name := f.Method + " " + f.Path
	if f.Method == "" {
		name = "connection"
	}
	return Span{TraceID: f.TraceID, SpanID: f.SpanID, Name: name, Kind: KindServer, Start: f.Time, End: f.End(),
		Service: string(f.Gateway), Source: FromGateway}
}

// cutRings takes one edge out of every ring of parents: the one above the node that comes first in nodes.
func cutRings(nodes []*Node, parent map[*Node]*Node) {
	order := make(map[*Node]int, len(nodes))
	for i, n := range nodes {
		order[n] = i
	}
	walk := make(map[*Node]int, len(nodes)) // in which walk upwards a node was passed; 0: in none
	for i, from := range nodes {
		at := from
		for at != nil && walk[at] == 0 {
			walk[at] = i + 1
			at = parent[at]
		}
		if at == nil || walk[at] != i+1 {
			continue // a root, or a node that an earlier walk has seen to
		}
		first := at
		for n := parent[at]; n != at; n = parent[n] {
			if order[n] < order[first] {
				first = n
			}
		}
		delete(parent, first)
	}
}
