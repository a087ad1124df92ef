// Package learn holds the policy against what was recorded of traffic: which grants would have been enough
// (Suggest), which parts of grants nobody used (Unused), and what the shadow grants would have changed (Trial).
//
// It is for people who narrow a policy down, by the commands `suggest` and `shadow`. It only proposes: it changes no
// grant, and nothing that it says is ever enforced by itself. It takes tallies of flows as values, and does no IO. What
// it does not know for sure it neither grants nor calls unused.
package learn

import (
	"cmp"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// Trial sums up what the shadow grants would have changed. The zero value is ready.
type Trial struct {
	Requests  int64 // that were judged in shadow
	Different int64 // of them, those that would have been answered otherwise
	found     map[telemetry.Judged]*telemetry.Tally
}

// maxDifferences is how many different differences are kept apart; the others are counted.
const maxDifferences = 10_000

// Add counts a tally, of which there may be any number: it keeps the first 10,000 differences, so give the largest
// first.
func (t *Trial) Add(tally telemetry.Tally) {
	if tally.Shadow == "" {
		return
	}
	t.Requests += tally.Count
	if !tally.Differs() {
		return
	}
	t.Different += tally.Count
	if tally.Granted() {
		tally.Verdict = telemetry.Allowed // that the backend failed makes no difference here
	}
	if known := t.found[tally.Judged]; known != nil {
		known.Add(tally)
	} else if len(t.found) < maxDifferences {
		if t.found == nil {
			t.found = map[telemetry.Judged]*telemetry.Tally{}
		}
		t.found[tally.Judged] = &tally
	}
}

// Differences are what would have been answered otherwise: first what would have been denied, the most frequent first.
func (t *Trial) Differences() []telemetry.Tally {
	all := []telemetry.Tally{}
	for _, tally := range t.found {
		all = append(all, *tally)
	}
	slices.SortFunc(all, func(a, b telemetry.Tally) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(b.Count, a.Count), compare(a.Judged, b.Judged))
	})
	return all
}

func compare(a, b telemetry.Judged) int {
	return cmp.Or(cmp.Compare(a.Caller.String(), b.Caller.String()), cmp.Compare(a.Endpoint, b.Endpoint),
		cmp.Compare(a.Operation, b.Operation), cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Rule, b.Rule),
		cmp.Compare(a.ShadowBy, b.ShadowBy))
}

// Concerns reports whether a grant decided about a request, in force or in shadow, or speaks about it as it is written
// now. A nil grant speaks about nothing.
func Concerns(name segment.GrantName, g *segment.Grant, j telemetry.Judged) bool {
	if rule := string(authz.RuleOf(name)); j.Rule == rule || j.ShadowBy == rule {
		return true
	}
	if g == nil || !slices.ContainsFunc(g.From, func(c segment.Caller) bool { return c.Matches(j.Caller.String()) }) {
		return false
	}
	return slices.ContainsFunc(g.To, func(to segment.Target) bool {
		return to.Endpoint == j.Endpoint && (isImplied(j.Operation) || slices.Contains(to.Operations, j.Operation)) &&
			(j.Operation == segment.Enter || slices.ContainsFunc(to.Resources, func(p segment.Pattern) bool { return g.Effect.Covers(p, j.Resource) }))
	})
}

// isImplied reports whether an operation is never granted by itself.
func isImplied(o segment.Operation) bool { return o == segment.Discover || o == segment.Enter }

// asked is a caller at an endpoint, about a resource or ("") any.
type asked struct {
	caller   spiffeid.ID
	endpoint segment.EndpointName
	resource string
}
