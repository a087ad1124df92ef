package authz

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport.dev/segment"
)

// Explanation says how a decision came about.
type Explanation struct {
	Request  Request  `json:"request"`
	Decision Decision `json:"decision"`
	// Deciding are the grants that speak about exactly this request, in force, shadow or out of their time.
	Deciding []Reason `json:"deciding,omitempty"`
	// Near are the grants that would speak about it if one thing were different, the closest first.
	Near []Reason `json:"near,omitempty"`
	// Notes say what in the request is not known at all, which is often a slip.
	Notes []string `json:"notes,omitempty"`
}

// Reason is one grant and what it has to do with the request.
type Reason struct {
	Grant  segment.GrantName `json:"grant"`
	Pos    segment.Pos       `json:"pos"`
	Effect segment.Effect    `json:"effect"`
	Says   string            `json:"says"` // in words, after the grant's name
}

// Explain decides the request and finds the grants that decide and those that nearly do. The policy must have been
// compiled from the same configuration at the same moment. Enter is about no resource, so one is left out of account.
func Explain(p *Policy, cfg *segment.Config, r Request, now time.Time) Explanation {
	if r.Operation == segment.Enter {
		r.Resource = ""
	}
	ex := Explanation{Request: r, Decision: Decide(p, r), Notes: unknown(cfg, r)}
	denies := "denies it, which overrides every Allow"
	if isImplied(r.Operation) && ex.Decision.Allowed {
		denies = "denies a part of what is allowed, and what is left is enough"
	}
	served := serves(cfg, r)
	for i := range cfg.Grants {
		g := &cfg.Grants[i]
		state := untimely(g, now)
		if state == "" && g.Mode != segment.Enforce {
			state = "is only in shadow mode"
			if cfg.ShadowFolder {
				state += ", which a shadow folder replaces"
			}
		}
		ex.add(g, closest(g, r, served), denies, state)
	}
	for i := range cfg.Shadow {
		g := &cfg.Shadow[i]
		if misses := closest(g, r, served); len(misses) == 0 && g.Mode == segment.Enforce {
			state := "is only in the shadow folder"
			if late := untimely(g, now); late != "" {
				state += " and " + late
			}
			ex.add(g, misses, denies, state)
		}
	}
	return ex
}

// add says what a grant has to do with the request, from which it differs in the misses. The state is why it is not in
// force; empty: it is.
func (ex *Explanation) add(g *segment.Grant, misses []string, denies, state string) {
	reason := Reason{Grant: g.Name, Pos: g.Pos, Effect: g.Effect}
	switch {
	case len(misses) == 0 && state == "":
		reason.Says = map[segment.Effect]string{segment.Allow: "allows it", segment.Deny: denies}[g.Effect]
		if !g.Budget.IsZero() && !isImplied(ex.Request.Operation) {
			reason.Says += " within " + g.Budget.String()
		}
		ex.Deciding = append(ex.Deciding, reason)
	case len(misses) == 0:
		reason.Says = fmt.Sprintf("would %s it, but %s", map[segment.Effect]string{segment.Allow: "allow", segment.Deny: "deny"}[g.Effect], state)
		ex.Deciding = append(ex.Deciding, reason)
	case len(misses) == 1 && g.Effect == segment.Allow:
		reason.Says = misses[0]
		ex.Near = append(ex.Near, reason)
	}
}

// untimely says why a grant does not hold at a moment; empty: it holds.
func untimely(g *segment.Grant, now time.Time) string {
	holds, _ := g.Holds(now)
	switch {
	case holds:
		return ""
	case !g.Expires.IsZero() && !now.Before(g.Expires):
		return "expired at " + g.Expires.Format(time.RFC3339)
	case now.Before(g.NotBefore):
		return "does not hold before " + g.NotBefore.Format(time.RFC3339)
	}
	return "holds only " + list(g.Windows, segment.Window.String)
}

func isImplied(o segment.Operation) bool { return o == segment.Discover || o == segment.Enter }

// serves reports whether the endpoint can have the resource: where models are declared there are no others.
func serves(cfg *segment.Config, r Request) bool {
	e := cfg.Endpoint(r.Endpoint)
	return e == nil || len(e.Models) == 0 || slices.Contains(e.ModelNames(), r.Resource)
}

// unknown says what the configuration does not know.
func unknown(cfg *segment.Config, r Request) []string {
	var notes []string
	if !slices.ContainsFunc(cfg.Workloads, func(w segment.Workload) bool { return w.ID.String() == r.Caller }) {
		notes = append(notes, "no workload has the SPIFFE ID "+r.Caller)
	}
	e := cfg.Endpoint(r.Endpoint)
	if e == nil {
		return append(notes, fmt.Sprintf("there is no endpoint %s; there are %s", r.Endpoint,
			list(cfg.Endpoints, func(e segment.Endpoint) string { return string(e.Name) })))
	}
	if ops := e.Protocol.Operations(); slices.Contains(segment.Operations(), r.Operation) && !slices.Contains(ops, r.Operation) {
		notes = append(notes, fmt.Sprintf("%s has no operation %s; it has %s", e.Protocol, r.Operation,
			list(ops, func(o segment.Operation) string { return string(o) })))
	}
	if r.Resource != "" && !serves(cfg, r) {
		notes = append(notes, fmt.Sprintf("endpoint %s has no model %s; it has %s", e.Name, r.Resource,
			list(e.Models, func(m segment.Model) string { return m.Name })))
	}
	return notes
}

// closest says in what the request differs from the grant, for the target that comes closest. Empty: in nothing.
func closest(g *segment.Grant, r Request, served bool) []string {
	var caller []string
	if !slices.ContainsFunc(g.From, func(c segment.Caller) bool { return c.Matches(r.Caller) }) {
		caller = []string{fmt.Sprintf("is for %s, not for %s", list(g.From, segment.Caller.String), r.Caller)}
	}
	var best []string
	for i, to := range g.To {
		misses := slices.Clone(caller)
		if to.Endpoint != r.Endpoint {
			misses = append(misses, fmt.Sprintf("is about endpoint %s, not %s", to.Endpoint, r.Endpoint))
		}
		if !isImplied(r.Operation) && !slices.Contains(to.Operations, r.Operation) {
			misses = append(misses, fmt.Sprintf("is for %s, not for %s", list(to.Operations, func(o segment.Operation) string { return string(o) }), r.Operation))
		}
		switch covers := slices.ContainsFunc(to.Resources, func(p segment.Pattern) bool { return g.Effect.Covers(p, r.Resource) }); {
		case r.Operation == segment.Enter:
		case covers && !served:
			misses = append(misses, fmt.Sprintf("covers %s, but endpoint %s has no such model", r.Resource, r.Endpoint))
		case !covers:
			misses = append(misses, fmt.Sprintf("is for %s, not for %s", list(to.Resources, func(p segment.Pattern) string { return string(p) }), r.Resource))
		}
		if i == 0 || len(misses) < len(best) {
			best = misses
		}
	}
	return best
}

func list[T any](items []T, text func(T) string) string {
	out := ""
	for i, item := range items {
		if i == 3 {
			return fmt.Sprintf("%s and %d more", out, len(items)-3)
		}
		if i > 0 {
			out += ", "
		}
		out += text(item)
	}
	return out
}

// Right is one line of what a caller may do.
type Right struct {
	Endpoint  segment.EndpointName `json:"endpoint"`
	Operation segment.Operation    `json:"operation"`
	Resource  segment.Pattern      `json:"resource"`
	Leaf
	Shadow Leaf `json:"shadow"`
}

// RightsOf lists everything that is decided for a caller, sorted by endpoint, operation and resource. What is not
// listed is denied by DefaultDeny.
func RightsOf(p *Policy, caller string) []Right {
	var rights []Right
	for _, name := range slices.Sorted(maps.Keys(p.Endpoints)) {
		class, ok := p.Endpoints[name].Members.Lookup(caller)
		if !ok {
			continue
		}
		for _, op := range segment.Operations() {
			seen := map[segment.Pattern]bool{}
			for pattern, leaf := range class.Enforced[op].All() {
				seen[pattern] = true
				rights = append(rights, Right{name, op, pattern, leaf, class.Shadow.at(op, pattern)})
			}
			for pattern, leaf := range class.Shadow[op].All() {
				if !seen[pattern] {
					rights = append(rights, Right{name, op, pattern, class.Enforced.at(op, pattern), leaf})
				}
			}
		}
	}
	return rights
}

// at decides about all names that fall to the pattern. A name that ends in "*" is nobody's exact name, so that it
// falls to the longest prefix, as they do.
func (r Rights) at(op segment.Operation, pattern segment.Pattern) Leaf {
	return r.Lookup(op, string(pattern))
}
