package authz

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport.dev/segment"
)

const (
	// stale is how long a grant may have expired before that is worth a word.
	stale = 30 * 24 * time.Hour
	// maxCompared is with how many others a grant is compared.
	maxCompared = 1000
)

// Warnings are what is probably not meant so, although nothing is wrong with it: grants that nobody answers for, that
// give everything to everybody, or that change no verdict. All that are said to change none can be deleted together.
// Not all of these are found, but what is said of them is certain.
func Warnings(cfg *segment.Config, now time.Time) segment.Problems {
	var all segment.Problems
	all = append(all, warnings(cfg.Grants, now, cfg.ShadowFolder, "a shadow folder is there, which alone is tried")...)
	if cfg.ShadowFolder {
		all = append(all, warnings(cfg.Shadow, now, true, "in a shadow folder only what is in mode Enforce is tried")...)
	}
	all.Sort()
	return all
}

// warnings are those about grants that are in force together, of which those in Shadow mode may not count.
func warnings(grants []segment.Grant, now time.Time, ignored bool, why string) segment.Problems {
	var all segment.Problems
	in, paired := newIndex(grants), map[[2]int]bool{}
	for i := range grants {
		g := &grants[i]
		warn := func(code, field, msg, hint string) {
			all = append(all, segment.Problem{Code: code, Pos: g.Pos, Field: field, Msg: msg, Hint: hint})
		}
		if missing := unaccounted(g); missing != "" {
			warn("unaccounted", "spec", fmt.Sprintf("grant %q has no %s", g.Name, missing), "say it now, for whoever asks in a year whether it is still needed")
		}
		switch other := in.covering(i); {
		case !g.Expires.IsZero() && !g.NotBefore.Before(g.Expires):
			warn("never-holds", "spec.notBefore", fmt.Sprintf("grant %q expires before it begins", g.Name), "move notBefore or expires, or delete the grant")
		case !g.Expires.IsZero() && now.Sub(g.Expires) > stale:
			warn("expired", "spec.expires", fmt.Sprintf("grant %q expired at %s", g.Name, g.Expires.Format(time.RFC3339)), "delete it")
		case ignored && g.Mode != segment.Enforce:
			warn("no-effect", "spec.mode", fmt.Sprintf("grant %q is in Shadow mode, and %s", g.Name, why), "move it to the shadow folder, in mode Enforce, or delete it")
		case other != nil:
			says := "says all of it"
			if other.Effect != g.Effect {
				says = "denies all of it"
			}
			warn("no-effect", "", fmt.Sprintf("grant %q changes no verdict: grant %q (%s) %s", g.Name, other.Name, other.Pos, says), "delete it, or narrow the other one")
		case g.Effect == segment.Allow && slices.ContainsFunc(g.From, everybody) && slices.ContainsFunc(g.To, everything):
			warn("wide", "spec.from", fmt.Sprintf("grant %q gives every resource of an endpoint to a whole trust domain", g.Name),
				"name the callers by workload or path, or the resources")
		}
		if g.Budget.IsZero() {
			continue
		}
		if n := in.counting(i); n >= 0 && !paired[[2]int{n, i}] {
			paired[[2]int{i, n}] = true
			other, first, second := &grants[n], grants[min(i, n)].Name, grants[max(i, n)].Name
			warn("two-budgets", "spec.budget", fmt.Sprintf("grant %q allows something that grant %q (%s) allows, too, with another budget", g.Name, other.Name, other.Pos),
				fmt.Sprintf("it counts against %q alone, the first by name; narrow one of the two if you mean %q", first, second))
		}
		if g.Budget.Tokens != (segment.Limit{}) && slices.ContainsFunc(g.To, everything) {
			warn("unseen-tokens", "spec.to", fmt.Sprintf("grant %q has a budget of tokens for every resource, also for what names none: batches, and runs of assistants, use tokens that no answer tells", g.Name),
				`name the models in place of "*", or leave it so if no such API is there`)
		}
	}
	return all
}

// unaccounted says what is missing that somebody will ask for.
func unaccounted(g *segment.Grant) string {
	var missing []string
	for _, field := range [][2]string{{"owner", g.Owner}, {"reason", g.Reason}, {"ticket", g.Ticket}} {
		if field[1] == "" {
			missing = append(missing, field[0])
		}
	}
	return strings.Join(missing, ", no ")
}

func everybody(c segment.Caller) bool { return c == segment.CallersIn(c.TrustDomain()) }

func everything(to segment.Target) bool { return slices.Contains(to.Resources, "*") }

// index finds the grants that may cover another: those that name one of its callers, and those that name one of its
// resources. The fewer of both are looked at.
type index struct {
	grants    []segment.Grant
	callers   map[place]Table[[]int]
	resources map[place]Table[[]int]
}

// place is where patterns are compared.
type place struct {
	endpoint  segment.EndpointName
	operation segment.Operation // empty, for callers
}

func newIndex(grants []segment.Grant) *index {
	callers, resources := map[place]map[segment.Pattern][]int{}, map[place]map[segment.Pattern][]int{}
	add := func(to map[place]map[segment.Pattern][]int, where place, p segment.Pattern, i int) {
		if to[where] == nil {
			to[where] = map[segment.Pattern][]int{}
		}
		if known := to[where][p]; len(known) == 0 || known[len(known)-1] != i {
			to[where][p] = append(known, i)
		}
	}
	for i := range grants {
		if grants[i].Mode != segment.Enforce {
			continue
		}
		for _, to := range grants[i].To {
			for _, from := range grants[i].From {
				add(callers, place{endpoint: to.Endpoint}, from.Pattern(), i)
			}
			for _, o := range to.Operations {
				for _, p := range to.Resources {
					add(resources, place{to.Endpoint, o}, p, i)
				}
			}
		}
	}
	tables := func(of map[place]map[segment.Pattern][]int) map[place]Table[[]int] {
		all := make(map[place]Table[[]int], len(of))
		for where, entries := range of {
			all[where] = NewTable(entries)
		}
		return all
	}
	return &index{grants, tables(callers), tables(resources)}
}

// covering returns an enforced grant beside which this one changes no verdict, or nil. Of two that say the same, the
// first by name is left.
func (in *index) covering(i int) *segment.Grant {
	g := &in.grants[i]
	if len(g.From) == 0 || len(g.To) == 0 || len(g.To[0].Operations) == 0 || len(g.To[0].Resources) == 0 {
		return nil
	}
	to := g.To[0]
	table, p := in.callers[place{endpoint: to.Endpoint}], g.From[0].Pattern()
	fewest := named(table, p)
	other := in.resources[place{to.Endpoint, to.Operations[0]}]
	for _, resource := range to.Resources {
		if n := named(other, resource); n < fewest {
			table, p, fewest = other, resource, n
		}
	}
	compared := 0
	for some := range table.covering(p) {
		for _, n := range some[:min(len(some), maxCompared-compared)] {
			compared++
			o := &in.grants[n]
			if n == i || o.Effect != g.Effect && o.Effect != segment.Deny || !covers(o, g) {
				continue
			}
			if o.Effect == g.Effect && g.Mode == segment.Enforce && n > i && covers(g, o) && o.Budget.IsZero() == g.Budget.IsZero() {
				continue // this is what will be said of that one
			}
			if o.Effect == g.Effect && !o.Budget.IsZero() && (g.Budget.IsZero() || n > i) {
				continue // without this one it would be counted, or against another budget
			}
			return o
		}
	}
	return nil
}

// counting returns another enforced grant with a budget that allows some of what this one does, or -1.
func (in *index) counting(i int) int {
	g, compared := &in.grants[i], 0
	for _, to := range g.To {
		for _, from := range g.From {
			for some := range in.callers[place{endpoint: to.Endpoint}].covering(from.Pattern()) {
				for _, n := range some[:min(len(some), maxCompared-compared)] {
					compared++
					o := &in.grants[n]
					if n == i || o.Budget.IsZero() || !slices.ContainsFunc(o.To, func(t segment.Target) bool { return overlap(t, to) }) {
						continue
					}
					return n
				}
			}
		}
	}
	return -1
}

// named is how many grants name what covers a pattern.
func named(t Table[[]int], p segment.Pattern) (n int) {
	for some := range t.covering(p) {
		n += len(some)
	}
	return n
}

// overlap reports whether both speak of the same operation on the same resource.
func overlap(a, b segment.Target) bool {
	return a.Endpoint == b.Endpoint && slices.ContainsFunc(a.Operations, func(o segment.Operation) bool { return slices.Contains(b.Operations, o) }) &&
		slices.ContainsFunc(a.Resources, func(p segment.Pattern) bool {
			return slices.ContainsFunc(b.Resources, func(q segment.Pattern) bool { return p.Covers(q) || q.Covers(p) })
		})
}

// covers reports whether o speaks of all that g speaks of, whenever g does.
func covers(o, g *segment.Grant) bool {
	if g.NotBefore.Before(o.NotBefore) || !o.Expires.IsZero() && (g.Expires.IsZero() || g.Expires.After(o.Expires)) ||
		len(o.Windows) > 0 && !o.SameWindows(g) {
		return false
	}
	for _, to := range g.To {
		for _, op := range to.Operations {
			for _, p := range to.Resources {
				if !slices.ContainsFunc(o.To, func(t segment.Target) bool {
					return t.Endpoint == to.Endpoint && slices.Contains(t.Operations, op) &&
						slices.ContainsFunc(t.Resources, func(q segment.Pattern) bool { return q.Covers(p) })
				}) {
					return false
				}
			}
		}
	}
	for _, from := range g.From {
		if !slices.ContainsFunc(o.From, func(c segment.Caller) bool { return c.Pattern().Covers(from.Pattern()) }) {
			return false
		}
	}
	return true
}
