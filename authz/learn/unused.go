package learn

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// Part is a part of a grant: all of it that has the fields that are not empty. Without any, it is the whole grant.
type Part struct {
	Grant     segment.GrantName    `json:"grant"`
	Pos       segment.Pos          `json:"pos"`
	Endpoint  segment.EndpointName `json:"endpoint,omitempty"`
	Caller    string               `json:"caller,omitempty"` // as the grant has it: a SPIFFE ID or a prefix of some
	Operation segment.Operation    `json:"operation,omitempty"`
	Resource  segment.Pattern      `json:"resource,omitempty"`
	// Formerly is how many requests a whole grant decided about that it does not cover as it is written now.
	Formerly int64 `json:"formerly,omitempty"`
}

// Idle is what nobody used.
type Idle struct {
	Grants int    `json:"grants"` // that were looked at: those that allow, and are enforced
	Parts  []Part `json:"parts"`  // sorted by grant, larger ones first
	More   int    `json:"more"`   // further parts, of one caller, operation and resource each
}

// maxCells is how many parts of one grant are listed that are one caller, operation and resource each.
const maxCells = 100

// cell is the smallest part of a grant.
type cell struct {
	caller segment.Pattern
	what
}

type what struct {
	endpoint  segment.EndpointName
	operation segment.Operation
	resource  segment.Pattern
}

// Unused returns the parts of Allow grants that none of the tallies used. If all of them are taken away, everything that
// was let through and that the grants still allow is still allowed. With a name it looks at that endpoint only.
//
// A request uses every part that covers it, not only that of the grant which is named as its rule: which one is named
// depends on nothing but names. Discover and Enter follow from any operation. They use parts only where no operation
// of the same caller was seen that surely implies them; then they use all that cover them.
//
// Deny grants are never called unused, as taking one away gives access; nor are grants in shadow, which allow nothing.
func Unused(cfg *segment.Config, seen []telemetry.Tally, only segment.EndpointName) Idle {
	u := newUsage(cfg)
	implied := map[telemetry.Judged]bool{}
	sure := map[asked]bool{}
	formerly := map[string]int64{}
	for _, t := range seen {
		if !t.Granted() {
			continue
		}
		if isImplied(t.Operation) {
			implied[telemetry.Judged{Caller: t.Caller, Endpoint: t.Endpoint, Operation: t.Operation, Resource: t.Resource}] = true
			continue
		}
		always, named := u.use(t.Judged)
		if !named {
			formerly[t.Rule] += t.Count
		}
		if always && !u.denied(t.Judged) {
			sure[asked{t.Caller, t.Endpoint, ""}] = true
			sure[asked{t.Caller, t.Endpoint, t.Resource}] = true
		}
	}
	for j := range implied {
		a := asked{caller: j.Caller, endpoint: j.Endpoint}
		if j.Operation == segment.Discover {
			a.resource = j.Resource
		}
		if !sure[a] {
			u.use(j)
		}
	}
	out := Idle{Parts: []Part{}}
	for i := range cfg.Grants {
		g := &cfg.Grants[i]
		if !gives(g) {
			continue
		}
		parts, more, some := idle(g, u.used[g.Name], only)
		if !some {
			continue
		}
		out.Grants++
		if len(parts) > 0 && parts[0].Endpoint == "" && parts[0].Caller == "" {
			parts[0].Formerly = formerly[string(authz.RuleOf(g.Name))]
		}
		out.Parts, out.More = append(out.Parts, parts...), out.More+more
	}
	return out
}

func gives(g *segment.Grant) bool { return g.Effect == segment.Allow && g.Mode == segment.Enforce }

// usage finds the grants that cover a request, and notes which of their cells do.
type usage struct {
	about map[segment.EndpointName]map[segment.Pattern][]target // by the callers that they name
	used  map[segment.GrantName]map[cell]bool
}

type target struct {
	grant *segment.Grant
	to    *segment.Target
}

func newUsage(cfg *segment.Config) *usage {
	u := &usage{about: map[segment.EndpointName]map[segment.Pattern][]target{}, used: map[segment.GrantName]map[cell]bool{}}
	for i := range cfg.Grants {
		g := &cfg.Grants[i]
		if g.Mode != segment.Enforce {
			continue
		}
		for n := range g.To {
			to := &g.To[n]
			if u.about[to.Endpoint] == nil {
				u.about[to.Endpoint] = map[segment.Pattern][]target{}
			}
			for _, from := range g.From {
				u.about[to.Endpoint][from.Pattern()] = append(u.about[to.Endpoint][from.Pattern()], target{g, to})
			}
		}
	}
	return u
}

// covering yields each cell that covers the request.
func (u *usage) covering(j telemetry.Judged) func(yield func(*segment.Grant, cell) bool) {
	return func(yield func(*segment.Grant, cell) bool) {
		at, id := u.about[j.Endpoint], j.Caller.String()
		for caller := range callers(id) {
			for _, t := range at[caller] {
				for _, op := range t.to.Operations {
					if op != j.Operation && !isImplied(j.Operation) {
						continue
					}
					for _, p := range t.to.Resources {
						if (j.Operation == segment.Enter || t.grant.Effect.Covers(p, j.Resource)) && !yield(t.grant, cell{caller, what{j.Endpoint, op, p}}) {
							return
						}
					}
				}
			}
		}
	}
}

// callers yields all patterns that a grant can name a SPIFFE ID by.
func callers(id string) func(yield func(segment.Pattern) bool) {
	return func(yield func(segment.Pattern) bool) {
		if !yield(segment.Pattern(id)) {
			return
		}
		for i := len("spiffe://"); i < len(id); i++ {
			if id[i] == '/' && !yield(segment.Pattern(id[:i+1]+"*")) {
				return
			}
		}
	}
}

// use notes what the request uses. It reports whether any grant that does holds at all times, and whether the one that
// was recorded as its rule is among them.
func (u *usage) use(j telemetry.Judged) (always, named bool) {
	for g, c := range u.covering(j) {
		if !gives(g) {
			continue
		}
		if u.used[g.Name] == nil {
			u.used[g.Name] = map[cell]bool{}
		}
		u.used[g.Name][c] = true
		always = always || g.NotBefore.IsZero() && g.Expires.IsZero() && len(g.Windows) == 0
		named = named || j.Rule == string(authz.RuleOf(g.Name))
	}
	return always, named
}

// denied reports whether a grant takes it, at any time.
func (u *usage) denied(j telemetry.Judged) bool {
	for g := range u.covering(j) {
		if g.Effect != segment.Allow {
			return true
		}
	}
	return false
}

// idle lists the parts of a grant that are not used, the largest only. some: there is something to look at.
func idle(g *segment.Grant, used map[cell]bool, only segment.EndpointName) (parts []Part, more int, some bool) {
	all := map[what]bool{}
	ends := map[segment.EndpointName]bool{}
	for _, to := range g.To {
		if only != "" && to.Endpoint != only {
			continue
		}
		ends[to.Endpoint] = true
		for _, op := range to.Operations {
			for _, p := range to.Resources {
				all[what{to.Endpoint, op, p}] = true
			}
		}
	}
	if len(all) == 0 || len(g.From) == 0 {
		return nil, 0, false
	}
	part := func(p Part) { p.Grant, p.Pos = g.Name, g.Pos; parts = append(parts, p) }

	usedEnds, usedCallers, usedWhats := map[segment.EndpointName]bool{}, map[segment.Pattern]bool{}, map[what]bool{}
	inUse := 0
	for c := range used {
		if ends[c.endpoint] {
			inUse++
			usedEnds[c.endpoint], usedCallers[c.caller] = true, true
			usedWhats[c.what] = true
			usedWhats[what{c.endpoint, c.operation, ""}] = true
			usedWhats[what{c.endpoint, "", c.resource}] = true
		}
	}
	if inUse == 0 {
		if only == "" {
			part(Part{})
		} else {
			part(Part{Endpoint: only})
		}
		return parts, 0, true
	}
	for _, e := range slices.Sorted(maps.Keys(ends)) {
		if !usedEnds[e] {
			part(Part{Endpoint: e})
		}
	}
	var left []segment.Pattern
	for _, from := range g.From {
		if usedCallers[from.Pattern()] {
			left = append(left, from.Pattern())
		} else {
			part(Part{Endpoint: only, Caller: from.String()})
		}
	}
	var whats []what
	told := map[what]bool{}
	once := func(w what) {
		if !told[w] {
			told[w] = true
			part(Part{Endpoint: w.endpoint, Operation: w.operation, Resource: w.resource})
		}
	}
	for _, w := range slices.SortedFunc(maps.Keys(all), func(a, b what) int {
		return cmp.Or(cmp.Compare(a.endpoint, b.endpoint), cmp.Compare(a.operation, b.operation), strings.Compare(string(a.resource), string(b.resource)))
	}) {
		op, resource := what{w.endpoint, w.operation, ""}, what{w.endpoint, "", w.resource}
		switch {
		case !usedEnds[w.endpoint]:
		case !usedWhats[op]:
			once(op)
		case !usedWhats[resource]:
			once(resource)
		case !usedWhats[w]:
			once(w)
		default:
			whats = append(whats, w)
		}
	}
	cells := 0
	for _, caller := range left {
		for _, w := range whats {
			if cells == maxCells {
				return parts, len(left)*len(whats) - inUse - cells, true
			}
			if !used[cell{caller, w}] {
				cells++
				part(Part{Caller: string(caller), Endpoint: w.endpoint, Operation: w.operation, Resource: w.resource})
			}
		}
	}
	return parts, 0, true
}
