package authz

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sallyport.dev/segment"
)

// Change is access that some callers gain or lose between two policies: all of Operations, on all of Resources, for
// all of Callers.
type Change struct {
	Gain bool `json:"gain"` // else they lose it
	// Budget is whether they have it before and after, and gain or lose how much they may use.
	Budget     bool                 `json:"budget,omitempty"`
	Callers    Set                  `json:"callers"`
	Endpoint   segment.EndpointName `json:"endpoint"`
	Operations []segment.Operation  `json:"operations"`
	Resources  Set                  `json:"resources"` // for Enter: the resource without a name
	Causes     []Cause              `json:"causes"`    // at least one
}

// Cause is what decided on each side about a part of a change.
type Cause struct {
	Callers   *Set `json:"callers,omitempty"`   // nil: all of the change
	Resources *Set `json:"resources,omitempty"` // nil: all of the change
	Was       Rule `json:"was"`
	Is        Rule `json:"is"`
	// What they count against, if that is the change.
	WasBudget segment.Budget `json:"was_budget,omitzero"`
	IsBudget  segment.Budget `json:"is_budget,omitzero"`
}

// Set is a set of names. A name belongs to the most specific pattern of all three lists that matches it, and is in
// the set if that one is in Of. All are sorted.
type Set struct {
	Of     []segment.Pattern `json:"of"`
	Except []segment.Pattern `json:"except,omitempty"`
	// Already are those that are left out because all of it was before as it is now for the others: what a caller who
	// gains may do anyway, what one who loses never could.
	Already []segment.Pattern `json:"already,omitempty"`
}

// Has reports whether a name is in the set.
func (s Set) Has(name string) bool {
	best, has := -1, false
	for i, patterns := range [][]segment.Pattern{s.Of, s.Except, s.Already} {
		for _, p := range patterns {
			if p.Matches(name) {
				if n := specificity(p); n > best {
					best, has = n, i == 0
				}
			}
		}
	}
	return has
}

// table answers Has for many names.
func (s Set) table() Table[bool] {
	entries := make(map[segment.Pattern]bool, len(s.Of)+len(s.Except)+len(s.Already))
	for i, patterns := range [][]segment.Pattern{s.Of, s.Except, s.Already} {
		for _, p := range patterns {
			entries[p] = i == 0
		}
	}
	return NewTable(entries)
}

// specificity orders the patterns that match one and the same name.
func specificity(p segment.Pattern) int {
	if p.IsPrefix() {
		return 2 * len(p.Stem())
	}
	return 2*len(p) + 1
}

// Diff says who gains and who loses access from one policy to another, exactly: a request is decided differently if
// and only if it is in a change, and in one alone. Discover and Enter, which follow from other operations, are listed
// only where no other change of the same caller tells them. Changes are sorted by callers, endpoint and operations.
//
// Which rule decides may differ as well; where the verdict is the same, that is no change, unless either rule counts. Who
// counts against another grant gains, however little that has: it is had beside what was there before.
func Diff(old, new *Policy) []Change {
	return diff(old, new, func(c *Class) Rights { return c.Enforced })
}

// DiffShadow is Diff with all grants in Shadow mode enforced, on both sides.
func DiffShadow(old, new *Policy) []Change {
	return diff(old, new, func(c *Class) Rights { return c.Shadow })
}

// The idea is that of Compile: all names that fall to one pattern are decided alike. So it is enough to decide at
// each pattern that either side has, of callers and, for each pair of classes that meet there, of resources.
func diff(old, new *Policy, view func(*Class) Rights) []Change {
	endpoints := map[segment.EndpointName]bool{}
	for _, p := range []*Policy{old, new} {
		for name := range p.Endpoints {
			endpoints[name] = true
		}
	}
	var changes []Change
	for name := range endpoints {
		changes = append(changes, diffEndpoint(name, old.Endpoints[name], new.Endpoints[name], view)...)
	}
	slices.SortFunc(changes, func(a, b Change) int {
		return cmp.Or(slices.Compare(a.Callers.Of, b.Callers.Of), slices.Compare(a.Callers.Except, b.Callers.Except),
			slices.Compare(a.Callers.Already, b.Callers.Already), cmp.Compare(a.Endpoint, b.Endpoint), compareOperations(a.Operations, b.Operations),
			slices.Compare(a.Resources.Of, b.Resources.Of), slices.Compare(a.Resources.Except, b.Resources.Except))
	})
	return changes
}

func compareOperations(a, b []segment.Operation) int {
	all := append(segment.Operations(), segment.Discover, segment.Enter)
	return slices.CompareFunc(a, b, func(a, b segment.Operation) int {
		return cmp.Compare(slices.Index(all, a), slices.Index(all, b))
	})
}

// region is what changes for everybody in one class of each side.
type region struct {
	gain       bool
	budget     bool
	operations []segment.Operation
	resources  Set
	within     Table[bool] // resources
	causes     []Cause
}

// what is the region without its causes.
func (r *region) what() string {
	return fmt.Sprintf("%t %t %q %q", r.gain, r.budget, r.operations, r.resources)
}

func (r *region) why() string {
	var text strings.Builder
	for _, c := range r.causes {
		fmt.Fprintf(&text, "%q %s %q %s %q\n", c.Was, c.WasBudget, c.Is, c.IsBudget, *c.Resources)
	}
	return text.String()
}

func diffEndpoint(name segment.EndpointName, old, new *Endpoint, view func(*Class) Rights) []Change {
	if old == nil {
		old = &Endpoint{}
	}
	if new == nil {
		new = &Endpoint{}
	}
	callers := newForest(old.Members, new.Members)
	type pair struct{ old, new *Class }
	known := map[pair][]*region{}
	type group struct {
		*region
		holders []int            // callers
		reasons map[string][]int // callers by the causes that the region has for them
		first   map[string]*region
	}
	groups := map[string]*group{}
	names := map[*region][2]string{}
	pairs := make([]pair, len(callers.patterns))
	for i, caller := range callers.patterns {
		at := pair{at(old.Members, caller), at(new.Members, caller)}
		pairs[i] = at
		regions, ok := known[at]
		if !ok {
			regions = regionsOf(rightsOf(at.old, view), rightsOf(at.new, view))
			known[at] = regions
			for _, r := range regions {
				names[r] = [2]string{r.what(), r.why()}
			}
		}
		for _, r := range regions {
			what, why := names[r][0], names[r][1]
			g := groups[what]
			if g == nil {
				g = &group{region: r, reasons: map[string][]int{}, first: map[string]*region{}}
				groups[what] = g
			}
			g.holders = append(g.holders, i)
			if g.first[why] == nil {
				g.first[why] = r
			}
			g.reasons[why] = append(g.reasons[why], i)
		}
	}
	changes := make([]Change, 0, len(groups))
	for _, g := range groups {
		change := Change{Gain: g.gain, Budget: g.budget, Endpoint: name, Operations: g.operations, Resources: g.resources}
		already := map[pair]bool{}
		change.Callers = callers.set(g.holders, func(i int) bool {
			so, ok := already[pairs[i]]
			if !ok {
				so = g.holdsAll(rightsOf(pairs[i].old, view)) && g.holdsAll(rightsOf(pairs[i].new, view))
				already[pairs[i]] = so
			}
			return so
		})
		for _, why := range slices.Sorted(maps.Keys(g.reasons)) {
			for _, c := range g.first[why].causes {
				if len(g.first[why].causes) == 1 {
					c.Resources = nil
				}
				if len(g.reasons) > 1 {
					of := callers.set(g.reasons[why], nil)
					c.Callers = &of
				}
				change.Causes = append(change.Causes, c)
			}
		}
		changes = append(changes, change)
	}
	return changes
}

func rightsOf(c *Class, view func(*Class) Rights) Rights {
	if c == nil {
		return nil
	}
	return view(c)
}

// at returns the value for all names that fall to the pattern, or the zero value.
func at[V any](t Table[V], p segment.Pattern) V {
	for v := range t.covering(p) { // the most specific comes first
		return v
	}
	var none V
	return none
}

// leafAt decides about all names that fall to the pattern.
func (r Rights) leafAt(op segment.Operation, p segment.Pattern) Leaf {
	leaf := at(r[op], p)
	if leaf.Rule == "" {
		leaf.Rule = DefaultDeny
	}
	return leaf
}

// regionsOf compares the rights of two classes.
func regionsOf(old, new Rights) []*region {
	var all []*region
	for _, op := range segment.Operations() {
		for _, r := range regionsIn(old, new, op, nil) {
			what, why := r.what(), r.why()
			if i := slices.IndexFunc(all, func(other *region) bool {
				same := region{gain: other.gain, budget: other.budget, operations: []segment.Operation{op}, resources: other.resources, causes: other.causes}
				return same.what() == what && same.why() == why
			}); i >= 0 {
				all[i].operations = append(all[i].operations, op)
			} else {
				all = append(all, r)
			}
		}
	}
	granted := slices.Clone(all)
	all = append(all, regionsIn(old, new, segment.Discover, func(gain bool, p segment.Pattern) bool {
		return slices.ContainsFunc(granted, func(r *region) bool { return r.gain == gain && at(r.within, p) })
	})...)
	return append(all, regionsIn(old, new, segment.Enter, func(gain bool, _ segment.Pattern) bool {
		return slices.ContainsFunc(all, func(r *region) bool { return r.gain == gain })
	})...)
}

// regionsIn compares what two classes may do with one operation, but for what has been told.
func regionsIn(old, new Rights, op segment.Operation, told func(gain bool, p segment.Pattern) bool) []*region {
	if slices.Equal(old[op].entries, new[op].entries) { // as nearly always
		return nil
	}
	resources := newForest(old[op], new[op])
	type causing struct{ was, is Leaf }
	var changed [4][]int // losses and gains, and those of budgets alone
	causes := [4]map[causing][]int{{}, {}, {}, {}}
	is := make([]Leaf, len(resources.patterns))
	for i, p := range resources.patterns {
		var was Leaf
		was, is[i] = old.leafAt(op, p), new.leafAt(op, p)
		side, why := 0, causing{Leaf{Rule: was.Rule}, Leaf{Rule: is[i].Rule}}
		switch gain, differs := counts(was, is[i]); {
		case was.Allowed == is[i].Allowed && !differs || told != nil && told(is[i].Allowed, p):
			continue
		case was.Allowed != is[i].Allowed && is[i].Allowed:
			side = 1
		case was.Allowed == is[i].Allowed:
			side, why = 2, causing{was, is[i]}
			if gain {
				side = 3
			}
		}
		changed[side] = append(changed[side], i)
		causes[side][why] = append(causes[side][why], i)
	}
	var regions []*region
	for side, atoms := range changed {
		if len(atoms) == 0 {
			continue
		}
		gain := side%2 == 1
		r := &region{gain: gain, budget: side > 1, operations: []segment.Operation{op}}
		r.resources = resources.set(atoms, func(i int) bool { return !r.budget && is[i].Allowed == gain })
		r.within = r.resources.table()
		for why, where := range causes[side] {
			of := resources.set(where, nil)
			r.causes = append(r.causes, Cause{Resources: &of, Was: why.was.Rule, Is: why.is.Rule, WasBudget: why.was.Budget, IsBudget: why.is.Budget})
		}
		slices.SortFunc(r.causes, func(a, b Cause) int {
			return cmp.Or(cmp.Compare(a.Is, b.Is), cmp.Compare(a.Was, b.Was),
				cmp.Compare(a.IsBudget.String(), b.IsBudget.String()), cmp.Compare(a.WasBudget.String(), b.WasBudget.String()))
		})
		regions = append(regions, r)
	}
	return regions
}

// counts compares what is allowed on both sides: whether it counts otherwise, and whether that may be more.
func counts(was, is Leaf) (gain, differs bool) {
	if !was.Allowed || !is.Allowed || was.Budget.IsZero() && is.Budget.IsZero() || was == is {
		return false, false
	}
	return !is.Budget.Within(was.Budget) || !was.Budget.IsZero() && was.Rule != is.Rule, true
}

// holdsAll reports whether somebody with these rights has all of what is gained, or nothing of what is lost.
func (r *region) holdsAll(rights Rights) bool {
	if r.budget {
		return false
	}
	for _, op := range r.operations {
		for _, p := range r.resources.Of {
			if rights.leafAt(op, p).Allowed != r.gain {
				return false
			}
		}
		for p, leaf := range rights[op].All() {
			if leaf.Allowed != r.gain && at(r.within, p) {
				return false
			}
		}
	}
	return true
}

// forest is patterns, each below the most specific other that covers it.
type forest struct {
	patterns []segment.Pattern // sorted
	parents  []int             // -1: none
	children [][]int
}

func newForest[V any](sides ...Table[V]) forest {
	places := map[segment.Pattern]int{}
	for _, side := range sides {
		for p := range side.All() {
			places[p] = 0
		}
	}
	f := forest{patterns: slices.Sorted(maps.Keys(places))}
	for i, p := range f.patterns {
		places[p] = i
	}
	tree := NewTable(places)
	f.parents, f.children = make([]int, len(f.patterns)), make([][]int, len(f.patterns))
	for i, p := range f.patterns {
		f.parents[i] = -1
		for j := range tree.covering(p) {
			if j != i {
				f.parents[i] = j
				f.children[j] = append(f.children[j], i)
				break
			}
		}
	}
	return f
}

// set writes the names that fall to some of the patterns, given by their places in order, with as few patterns as
// possible. A pattern that is left out of them is in Already if already says so of all names below it, but for those
// of other members.
func (f *forest) set(members []int, already func(i int) bool) Set {
	isMember := make(map[int]bool, len(members))
	for _, i := range members {
		isMember[i] = true
	}
	var s Set
	var out []int
	for _, i := range members {
		if f.parents[i] < 0 || !isMember[f.parents[i]] {
			s.Of = append(s.Of, f.patterns[i])
		}
		for _, child := range f.children[i] {
			if !isMember[child] {
				out = append(out, child)
			}
		}
	}
	slices.Sort(out)
	var below func(i int) bool
	below = func(i int) bool {
		return isMember[i] || already(i) && !slices.ContainsFunc(f.children[i], func(child int) bool { return !below(child) })
	}
	for _, i := range out {
		if already != nil && below(i) {
			s.Already = append(s.Already, f.patterns[i])
		} else {
			s.Except = append(s.Except, f.patterns[i])
		}
	}
	return s
}
