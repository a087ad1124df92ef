package authz

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"time"

	"sallyport.dev/segment"
)

// Compile makes the policy of a configuration at the moment now. It assumes that the configuration is valid; what
// it cannot place it leaves out, which denies it.
//
// The idea: a request falls to the most specific pattern that covers its caller, and there to the most specific
// pattern that covers its resource. So it is enough to decide once at each pattern that some grant names, taking
// all grants into account that cover this pattern; nothing is searched or compared when a request comes. Cost and
// size are the number of patterns, not of grants × callers × resources.
func Compile(cfg *segment.Config, now time.Time) *Policy { return Recompile(nil, cfg, now) }

// Recompile is Compile for one who has an earlier policy, or nil. The policy is the same; it is sooner made, and
// classes that are as they were are the same pointers.
func Recompile(last *Policy, cfg *segment.Config, now time.Time) *Policy {
	if last == nil {
		last = &Policy{}
	}
	p := &Policy{Endpoints: make(map[segment.EndpointName]*Endpoint, len(cfg.Endpoints)), origin: last.origin.next(cfg)}
	compilers := make(map[segment.EndpointName]*compiler, len(cfg.Endpoints))
	for i := range cfg.Endpoints {
		e := &cfg.Endpoints[i]
		compilers[e.Name] = newCompiler(e, last.Endpoints[e.Name])
		compilers[e.Name].shadowed = cfg.ShadowFolder
	}
	for i := range p.origin.grants {
		g, in := &p.origin.grants[i], p.origin.part(i)
		if in == (part{}) {
			continue
		}
		holds, until := g.Holds(now)
		if !until.IsZero() && (p.NextChange.IsZero() || until.Before(p.NextChange)) {
			p.NextChange = until
		}
		if !holds {
			continue
		}
		for n, to := range g.To {
			if c := compilers[to.Endpoint]; c != nil {
				c.add(g, to, in, statementID{p.origin.ids[i], n})
			}
		}
	}
	for name, c := range compilers {
		p.Endpoints[name] = c.compile()
	}
	return p
}

// origin is what a policy was compiled from: the grants, and for each of them a number that an equal grant of an
// earlier policy had, too.
type origin struct {
	grants []segment.Grant // those that are enforced, sorted by name, and behind them those of the shadow folder
	shadow int             // where these begin
	folder bool            // whether there is such a folder
	ids    []int
	unused int // the first number that no grant has had
}

// part says in which of the two decisions a grant takes part.
type part struct{ enforced, shadow bool }

func (o *origin) part(i int) part {
	enforced := o.grants[i].Mode == segment.Enforce
	switch {
	case i >= o.shadow:
		return part{shadow: enforced}
	case o.folder:
		return part{enforced: enforced}
	}
	return part{enforced, true}
}

// next numbers the grants of the policy that follows.
func (o origin) next(cfg *segment.Config) origin {
	n := origin{grants: cfg.Grants, shadow: len(cfg.Grants), folder: cfg.ShadowFolder, unused: o.unused}
	if n.folder {
		n.grants = slices.Concat(cfg.Grants, cfg.Shadow)
	}
	if n.folder != o.folder {
		o = origin{} // the same grants take part in other decisions
	}
	n.ids = make([]int, len(n.grants))
	n.number(0, n.shadow, o.grants[:o.shadow], o.ids)
	n.number(n.shadow, len(n.grants), o.grants[o.shadow:], o.ids[o.shadow:])
	return n
}

// number gives numbers to some grants: those that they had among the earlier ones, or new ones.
func (o *origin) number(from, to int, earlier []segment.Grant, ids []int) {
	before := 0
	for i := from; i < to; i++ {
		for before < len(earlier) && earlier[before].Name < o.grants[i].Name {
			before++
		}
		if before < len(earlier) && earlier[before].Says(&o.grants[i]) {
			o.ids[i] = ids[before]
			continue
		}
		o.ids[i] = o.unused
		o.unused++
	}
}

// statementID names one target of one grant, for as long as the grant says the same.
type statementID struct{ grant, target int }

// statement is one grant's word about one endpoint. A grant that names the endpoint twice makes two.
type statement struct {
	id         statementID
	rule       Rule
	deny       bool
	in         part
	operations []segment.Operation
	resources  []segment.Pattern
}

type compiler struct {
	models     []string // the only resources there are; nil: unknown
	operations []segment.Operation
	statements []statement               // in the order of the grants' names
	about      map[segment.Pattern][]int // caller → the statements that name it
	families   []int                     // lengths of the stems of the callers that are prefixes
	before     map[string]*Class         // the classes of an earlier policy, by the statements that they are made from
	distinct   map[string]*Class         // and by their IDs
	classes    map[string]*Class
	shadowed   bool
}

func newCompiler(e *segment.Endpoint, last *Endpoint) *compiler {
	c := &compiler{
		models:     e.ModelNames(),
		operations: e.Protocol.Operations(),
		about:      map[segment.Pattern][]int{},
		classes:    map[string]*Class{},
	}
	if last != nil && slices.Equal(last.models, c.models) && slices.Equal(last.operations, c.operations) {
		c.before, c.distinct = last.made, last.distinct
		c.about = make(map[segment.Pattern][]int, last.Members.Len())
		c.classes = make(map[string]*Class, len(last.made))
	}
	return c
}

func (c *compiler) add(g *segment.Grant, to segment.Target, in part, id statementID) {
	n := len(c.statements)
	c.statements = append(c.statements, statement{
		id:         id,
		rule:       RuleOf(g.Name),
		deny:       g.Effect != segment.Allow,
		in:         in,
		operations: to.Operations,
		resources:  c.known(to.Resources),
	})
	c.shadowed = c.shadowed || in.enforced != in.shadow
	for _, from := range g.From {
		p := from.Pattern()
		named := c.about[p]
		if len(named) == 0 || named[len(named)-1] != n {
			c.about[p] = append(named, n)
		}
		if length := len(p.Stem()); p.IsPrefix() && !slices.Contains(c.families, length) {
			c.families = append(c.families, length)
		}
	}
}

// known spells patterns out where all resources are known, so that nothing is granted that no backend serves.
func (c *compiler) known(patterns []segment.Pattern) []segment.Pattern {
	if c.models == nil {
		return patterns
	}
	var names []segment.Pattern
	for _, m := range c.models {
		if slices.ContainsFunc(patterns, func(p segment.Pattern) bool { return p.Matches(m) }) {
			names = append(names, segment.Pattern(m))
		}
	}
	return names
}

func (c *compiler) compile() *Endpoint {
	e := &Endpoint{Shadowed: c.shadowed, models: c.models, operations: c.operations}
	members := make(map[segment.Pattern]*Class, len(c.about))
	distinct := make(map[string]*Class, len(c.before))
	for caller := range c.about {
		class := c.class(caller)
		if same := cmp.Or(distinct[class.ID], c.distinct[class.ID]); same != nil {
			class = same
		}
		distinct[class.ID] = class
		members[caller] = class
	}
	e.Members, e.made, e.distinct = NewTable(members), c.classes, distinct
	e.Classes = slices.SortedFunc(maps.Values(distinct), func(a, b *Class) int { return cmp.Compare(a.ID, b.ID) })
	return e
}

// class returns the class of everybody who falls to this caller pattern.
func (c *compiler) class(caller segment.Pattern) *Class {
	covering := slices.Clip(c.about[caller])
	stem := caller.Stem()
	for _, n := range c.families { // the shorter prefixes: "spiffe://td/a/*", "spiffe://td/*"
		if n < len(stem) {
			covering = append(covering, c.about[segment.Pattern(stem[:n]+"*")]...)
		}
	}
	if len(covering) > 1 {
		slices.Sort(covering)
		covering = slices.Compact(covering)
	}
	var key []byte
	for _, n := range covering {
		id := c.statements[n].id
		key = append(strconv.AppendInt(key, int64(id.grant), 36), '.')
		key = append(strconv.AppendInt(key, int64(id.target), 36), ' ')
	}
	if class := c.classes[string(key)]; class != nil {
		return class
	}
	if class := c.before[string(key)]; class != nil {
		c.classes[string(key)] = class
		return class
	}
	enforced, shadow := make([]*statement, 0, len(covering)), make([]*statement, 0, len(covering))
	for _, n := range covering {
		s := &c.statements[n]
		if s.in.enforced {
			enforced = append(enforced, s)
		}
		if s.in.shadow {
			shadow = append(shadow, s)
		}
	}
	class := &Class{Enforced: c.rights(enforced)}
	class.Shadow = class.Enforced
	if !slices.Equal(enforced, shadow) {
		class.Shadow = c.rights(shadow)
	}
	class.ID = digest(class)
	c.classes[string(key)] = class
	return class
}

func (c *compiler) rights(statements []*statement) Rights {
	rights := Rights{}
	words := map[segment.Operation]Table[word]{}
	everywhere := map[segment.Pattern]bool{}
	for _, op := range c.operations {
		said := map[segment.Pattern]word{}
		for i, s := range statements {
			if slices.Contains(s.operations, op) {
				for _, p := range s.resources {
					said[p] = said[p].first(s.word(i))
					everywhere[p] = true
				}
			}
		}
		if len(said) == 0 {
			continue
		}
		words[op] = NewTable(said)
		points := make(map[segment.Pattern]Leaf, len(said))
		for p := range said {
			points[p] = decideAt(statements, words[op], p)
		}
		rights[op] = NewTable(points)
	}
	if len(everywhere) == 0 {
		return rights
	}
	discover := make(map[segment.Pattern]Leaf, len(everywhere))
	enter := Leaf{Rule: DefaultDeny}
	for _, p := range slices.Sorted(maps.Keys(everywhere)) {
		discover[p] = c.implied(statements, words, p)
		if discover[p].Allowed && !enter.Allowed {
			enter = discover[p]
		}
	}
	rights[segment.Discover] = NewTable(discover)
	// Also where it is denied: who falls to this class must find its answer here, not at a larger family of callers.
	rights[segment.Enter] = NewTable(map[segment.Pattern]Leaf{"": enter})
	return rights
}

// word is the first Deny and the first Allow that name a pattern, as places in the statements counted from 1; 0: none.
type word struct{ deny, allow int }

func (s *statement) word(i int) word {
	if s.deny {
		return word{deny: i + 1}
	}
	return word{allow: i + 1}
}

// first is what both words say together.
func (w word) first(v word) word {
	if w.deny == 0 || v.deny != 0 && v.deny < w.deny {
		w.deny = v.deny
	}
	if w.allow == 0 || v.allow != 0 && v.allow < w.allow {
		w.allow = v.allow
	}
	return w
}

// decideAt decides about all names that fall to the pattern p: a Deny that covers it, else an Allow, else nothing.
func decideAt(statements []*statement, words Table[word], p segment.Pattern) Leaf {
	var all word
	for w := range words.covering(p) {
		all = all.first(w)
	}
	switch {
	case all.deny > 0:
		return Leaf{Rule: statements[all.deny-1].rule}
	case all.allow > 0:
		return Leaf{Allowed: true, Rule: statements[all.allow-1].rule}
	}
	return Leaf{Rule: DefaultDeny}
}

// implied decides about Discover: allowed where any operation is.
func (c *compiler) implied(statements []*statement, words map[segment.Operation]Table[word], p segment.Pattern) Leaf {
	denied := Leaf{Rule: DefaultDeny}
	for _, op := range c.operations {
		leaf := decideAt(statements, words[op], p)
		if leaf.Allowed {
			return leaf
		}
		if denied.Rule == DefaultDeny {
			denied = leaf
		}
	}
	return denied
}

func digest(class *Class) string {
	var text []byte
	for _, rights := range []Rights{class.Enforced, class.Shadow} {
		for _, op := range slices.Sorted(maps.Keys(rights)) {
			for p, leaf := range rights[op].All() {
				text = append(append(text, op...), ' ')
				text = append(strconv.AppendQuote(text, string(p)), ' ')
				text = append(strconv.AppendBool(text, leaf.Allowed), ' ')
				text = append(append(text, leaf.Rule...), '\n')
			}
		}
		text = append(text, "--\n"...)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}
