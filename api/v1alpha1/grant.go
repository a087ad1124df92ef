package v1alpha1

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

func (a *assembler) grant(d *Document, spec *GrantSpec) segment.Grant {
	g := segment.Grant{
		Name:   segment.GrantName(d.Metadata.Name),
		Effect: cmp.Or(spec.Effect, segment.Allow),
		Mode:   cmp.Or(spec.Mode, segment.Enforce),
		Owner:  spec.Owner,
		Reason: spec.Reason,
		Ticket: spec.Ticket,
		Pos:    d.Pos(""),
	}
	if spec.NotBefore != nil {
		g.NotBefore = *spec.NotBefore
	}
	if spec.Expires != nil {
		g.Expires = *spec.Expires
	}
	g.Windows = a.windows(d, spec.Windows)
	for i := range spec.From {
		g.From = append(g.From, a.callers(d, i, &spec.From[i])...)
	}
	slices.SortFunc(g.From, func(a, b segment.Caller) int { return cmp.Compare(a.String(), b.String()) })
	g.From = slices.Compact(g.From)
	for i := range spec.To {
		g.To = append(g.To, a.target(d, i, &spec.To[i]))
		a.taken(d, i, &spec.To[i], g.From)
	}
	if spec.Budget != nil {
		g.Budget = a.budget(d, spec)
	}
	slices.SortFunc(g.To, func(a, b segment.Target) int {
		return cmp.Or(cmp.Compare(a.Endpoint, b.Endpoint), slices.Compare(a.Operations, b.Operations), slices.Compare(a.Resources, b.Resources))
	})
	return g
}

// days are the days of the week as users write them, by their time.Weekday.
var days = []string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}

// maxWindows is how many a grant may have: nobody can say when one with more of them holds.
const maxWindows = 50

func (a *assembler) windows(d *Document, windows []Window) []segment.Window {
	if len(windows) > maxWindows {
		a.report(d, "too-large", "spec.windows", fmt.Sprintf("has %d items, and may have %d", len(windows), maxWindows), "write several grants")
		return nil
	}
	var all []segment.Window
	for i := range windows {
		all = append(all, a.window(d, i, &windows[i]))
	}
	return all
}

// window reads one entry of spec.windows.
func (a *assembler) window(d *Document, i int, window *Window) segment.Window {
	at := func(field string) string { return fmt.Sprintf("spec.windows[%d].%s", i, field) }
	clock := func(field, s string) segment.TimeOfDay {
		t, err := segment.ParseTimeOfDay(s)
		if err != nil || field == "from" && s == "24:00" {
			a.report(d, "bad-value", at(field), fmt.Sprintf("is %q, and must be a time of day", clip(s)),
				`write it with two digits each, like "08:00"; only the end can be "24:00"`)
		}
		return t
	}
	w := segment.Window{From: clock("from", window.From), To: clock("to", window.To), Zone: a.zone(d, at("timeZone"), cmp.Or(window.TimeZone, "UTC"))}
	if window.From == window.To {
		a.report(d, "bad-value", at("to"), fmt.Sprintf("is %q, and so is from", window.To), `for the whole day write from: "00:00" and to: "24:00"`)
	}
	for weekday, day := range days {
		if window.Days == nil || slices.Contains(window.Days, Day(day)) {
			w.Days = append(w.Days, time.Weekday(weekday))
		}
	}
	return w
}

// zone reads the name of a time zone: UTC, or one that is called after a place, which means the same on every machine.
func (a *assembler) zone(d *Document, field, name string) *time.Location {
	if known := a.zones[name]; known != nil {
		return known
	}
	area, place, _ := strings.Cut(name, "/")
	zone, err := time.LoadLocation(name)
	if err != nil || path.Clean(name) != name || name != "UTC" && (place == "" || area == "posix" || area == "right") {
		a.report(d, "bad-time-zone", field, fmt.Sprintf("is %q, and must be UTC or a time zone of the IANA database", clip(name)),
			"write it after a place, like Europe/Berlin")
		return nil
	}
	a.zones[name] = zone
	return zone
}

// budget reads spec.budget. A gateway counts requests, and the tokens of answers that it can read.
func (a *assembler) budget(d *Document, spec *GrantSpec) segment.Budget {
	limit := func(l *Limit) segment.Limit {
		if l == nil {
			return segment.Limit{}
		}
		return segment.Limit{Max: l.Max, Per: l.Per}
	}
	b := segment.Budget{Requests: limit(spec.Budget.Requests), Tokens: limit(spec.Budget.Tokens),
		Shared: spec.Budget.Scope == shared, Open: spec.Budget.WhenUnavailable == segment.Allow}
	if b.IsZero() {
		a.report(d, "missing-field", "spec.budget", "bounds nothing", "write requests or tokens, like: requests: {max: 60, per: Minute}")
	}
	if spec.Effect == segment.Deny {
		a.report(d, "bad-budget", "spec.budget", "stands in a Deny, of which nobody uses anything", "leave it out, or write an Allow")
	}
	for i, to := range spec.To {
		e := a.endpoints[to.Endpoint]
		if e != nil && e.protocol == segment.TCP {
			a.report(d, "bad-budget", "spec.budget", fmt.Sprintf("can't be counted at endpoint %q: a TCP connection has no requests", to.Endpoint),
				"leave it out, or put the other endpoints into another grant")
		} else if e != nil && spec.Budget.Tokens != nil && !reportsUsage(e.protocol) {
			a.report(d, "bad-budget", "spec.budget.tokens", fmt.Sprintf("can't be counted at endpoint %q: %s has none", to.Endpoint, e.protocol), "bound requests instead")
		} else if e != nil && spec.Budget.Tokens != nil {
			for j, o := range to.Operations {
				if o != segment.Infer && o != segment.Embed && slices.Contains(e.operations, o) {
					a.report(d, "bad-budget", fmt.Sprintf("spec.to[%d].operations[%d]", i, j),
						fmt.Sprintf("is %q, whose tokens nobody can count, and the grant has a budget of tokens", o), "put it into another grant")
				}
			}
		}
	}
	return b
}

// reportsUsage says whether answers tell how many tokens they took.
func reportsUsage(p segment.Protocol) bool {
	return p == segment.OpenAI || p == segment.Anthropic || p == segment.Gemini
}

// callers resolves one entry of spec.from.
func (a *assembler) callers(d *Document, i int, from *From) []segment.Caller {
	at := func(field string) string { return fmt.Sprintf("spec.from[%d]%s", i, field) }
	if from.Subject != "" && from.TokenIssuer == "" {
		a.report(d, "missing-field", at(".tokenIssuer"), "is missing, and without one nobody knows whose subject that is",
			"write the name of a TokenIssuer beside the subject, or leave the subject out")
		return nil
	}
	written := 0
	for _, there := range []bool{from.Workload != "", from.WorkloadSelector != nil, from.SPIFFEID != "", from.TrustDomain != "", from.TokenIssuer != ""} {
		if there {
			written++
		}
	}
	if written != 1 {
		a.report(d, "not-one-of", at(""), fmt.Sprintf("names callers in %d ways, and must name them in one", written),
			"write one of workload, workloadSelector, spiffeID, trustDomain and tokenIssuer, and the next in an item of its own")
		return nil
	}
	switch {
	case from.Workload != "":
		w, ok := a.workloads[from.Workload]
		if !ok && !a.blind {
			a.missing(d, at(".workload"), "workload", from.Workload, maps.Keys(a.workloads))
		}
		if w == nil {
			return nil
		}
		return []segment.Caller{segment.CallerID(w.ID)}
	case from.WorkloadSelector != nil:
		var callers []segment.Caller
		for _, w := range a.matching(from.WorkloadSelector.MatchLabels) {
			callers = append(callers, segment.CallerID(w.ID))
		}
		if len(callers) == 0 && !a.blind && !a.unlabelled {
			a.report(d, "matches-nothing", at(".workloadSelector"), "matches no workload",
				"give a workload these labels, or leave the item out")
		}
		return callers
	case from.SPIFFEID != "":
		caller, err := segment.ParseCaller(from.SPIFFEID)
		switch {
		case err != nil:
			a.report(d, "bad-spiffe-id", at(".spiffeID"), fmt.Sprintf("is %q: %s", from.SPIFFEID, err),
				spiffeHint+`, with "/*" behind it for all below`)
		case caller.String() == caller.TrustDomain().IDString():
			a.report(d, "bad-spiffe-id", at(".spiffeID"), fmt.Sprintf("is %q, which is nobody", from.SPIFFEID),
				fmt.Sprintf("for everyone in it write trustDomain: %s", caller.TrustDomain().Name()))
		default:
			a.knows(d, at(".spiffeID"), caller.TrustDomain())
			a.comesWithToken(d, at(".spiffeID"), caller)
		}
		return []segment.Caller{caller}
	case from.TokenIssuer != "":
		return a.tokenCaller(d, at, from)
	default:
		td, err := spiffeid.TrustDomainFromString(from.TrustDomain)
		if err != nil || td.Name() != from.TrustDomain {
			a.report(d, "bad-trust-domain", at(".trustDomain"), fmt.Sprintf("is %q", from.TrustDomain),
				trustDomainHint)
		} else {
			a.knows(d, at(".trustDomain"), td)
			a.comesWithToken(d, at(".trustDomain"), segment.CallersIn(td))
		}
		return []segment.Caller{segment.CallersIn(td)}
	}
}

// target resolves one entry of spec.to.
func (a *assembler) target(d *Document, i int, to *To) segment.Target {
	at := func(field string, j int) string { return fmt.Sprintf("spec.to[%d].%s[%d]", i, field, j) }
	t := segment.Target{Endpoint: segment.EndpointName(to.Endpoint), Operations: sortedSet(to.Operations)}
	e, ok := a.endpoints[to.Endpoint]
	if !ok && !a.blind {
		a.missing(d, fmt.Sprintf("spec.to[%d].endpoint", i), "endpoint", to.Endpoint, maps.Keys(a.endpoints))
	}
	if e != nil {
		for j, o := range to.Operations {
			if !slices.Contains(e.operations, o) {
				a.report(d, "unknown-operation", at("operations", j),
					fmt.Sprintf("is %q, and endpoint %q speaks %s, which has no such operation", o, to.Endpoint, e.protocol),
					fmt.Sprintf("%s has %s", e.protocol, list(e.operations)))
			}
		}
	}
	resources := make([]segment.Pattern, len(to.Resources))
	for j, r := range to.Resources {
		p := segment.Pattern(r)
		switch {
		case strings.Contains(p.Stem(), "*"):
			a.report(d, "bad-pattern", at("resources", j), fmt.Sprintf("is %q", r), "* stands for the rest of a name, and only at its end")
		case e != nil && e.protocol == segment.TCP && r != "*":
			a.report(d, "not-in-protocol", at("resources", j), fmt.Sprintf("is %q, and a TCP connection to endpoint %q names no resource", r, to.Endpoint), `write "*"`)
		case e != nil && len(e.models) > 0 && r != "*" && !slices.ContainsFunc(e.models, p.Matches):
			a.missing(d, at("resources", j), "model", r, slices.Values(e.models))
		}
		resources[j] = p
	}
	t.Resources = sortedSet(resources)
	return t
}

func sortedSet[T cmp.Ordered](values []T) []T {
	sorted := slices.Clone(values)
	slices.Sort(sorted)
	return slices.Compact(sorted)
}

type label struct{ key, value string }

// index makes all workloads known to the grants.
func (a *assembler) index(workloads []segment.Workload) {
	for i := range workloads {
		w := &workloads[i]
		a.workloads[string(w.Name)] = w
		for key, value := range w.Labels {
			a.labelled[label{key, value}] = append(a.labelled[label{key, value}], w)
		}
	}
}

// matching returns all workloads that have all of the labels; without labels, none.
func (a *assembler) matching(labels map[string]string) []*segment.Workload {
	var fewest []*segment.Workload
	first := true
	for key, value := range labels {
		if with := a.labelled[label{key, value}]; first || len(with) < len(fewest) {
			fewest, first = with, false
		}
	}
	var all []*segment.Workload
	for _, w := range fewest {
		matches := true
		for key, value := range labels {
			found, ok := w.Labels[key]
			matches = matches && ok && found == value
		}
		if matches {
			all = append(all, w)
		}
	}
	return all
}
