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
func Compile(cfg *segment.Config, now time.Time) *Policy {
	p := &Policy{Endpoints: make(map[segment.EndpointName]*Endpoint, len(cfg.Endpoints))}
	compilers := make(map[segment.EndpointName]*compiler, len(cfg.Endpoints))
	for i := range cfg.Endpoints {
		e := &cfg.Endpoints[i]
		compilers[e.Name] = newCompiler(e)
	}
	for i := range cfg.Grants {
		g := &cfg.Grants[i]
		if !g.Expires.IsZero() {
			if !now.Before(g.Expires) {
				continue
			}
			if p.NextChange.IsZero() || g.Expires.Before(p.NextChange) {
				p.NextChange = g.Expires
			}
		}
		for _, to := range g.To {
			if c := compilers[to.Endpoint]; c != nil {
				c.add(g, to)
			}
		}
	}
	for name, c := range compilers {
		p.Endpoints[name] = c.compile()
	}
	return p
}

// statement is one grant's word about one endpoint. A grant that names the endpoint twice makes two.
type statement struct {
	rule       Rule
	deny       bool
	shadow     bool
	operations []segment.Operation
	resources  []segment.Pattern
}

type compiler struct {
	models     []string // the only resources there are; nil: unknown
	operations []segment.Operation
	statements []statement               // in the order of the grants' names
	about      map[segment.Pattern][]int // caller → the statements that name it
	classes    map[string]*Class         // by the statements that it is made from
	shadowed   bool
}

func newCompiler(e *segment.Endpoint) *compiler {
	return &compiler{
		models:     e.ModelNames(),
		operations: e.Protocol.Operations(),
		about:      map[segment.Pattern][]int{},
		classes:    map[string]*Class{},
	}
}

func (c *compiler) add(g *segment.Grant, to segment.Target) {
	n := len(c.statements)
	c.statements = append(c.statements, statement{
		rule:       RuleOf(g.Name),
		deny:       g.Effect != segment.Allow,
		shadow:     g.Mode != segment.Enforce,
		operations: to.Operations,
		resources:  c.known(to.Resources),
	})
	c.shadowed = c.shadowed || g.Mode != segment.Enforce
	for _, from := range g.From {
		if named := c.about[from.Pattern()]; len(named) == 0 || named[len(named)-1] != n {
			c.about[from.Pattern()] = append(named, n)
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
	e := &Endpoint{Shadowed: c.shadowed}
	members := make(map[segment.Pattern]*Class, len(c.about))
	distinct := map[string]*Class{}
	for caller := range c.about {
		class := c.class(caller)
		if same := distinct[class.ID]; same != nil {
			class = same
		}
		distinct[class.ID] = class
		members[caller] = class
	}
	e.Members = NewTable(members)
	e.Classes = slices.SortedFunc(maps.Values(distinct), func(a, b *Class) int { return cmp.Compare(a.ID, b.ID) })
	return e
}

// class returns the class of everybody who falls to this caller pattern.
func (c *compiler) class(caller segment.Pattern) *Class {
	covering := slices.Clone(c.about[caller])
	stem := caller.Stem()
	for i := range len(stem) { // the shorter prefixes: "spiffe://td/a/*", "spiffe://td/*"
		if stem[i] == '/' && i+1 < len(stem) {
			covering = append(covering, c.about[segment.Pattern(stem[:i+1]+"*")]...)
		}
	}
	slices.Sort(covering)
	covering = slices.Compact(covering)
	var key []byte
	for _, n := range covering {
		key = append(strconv.AppendInt(key, int64(n), 36), ' ')
	}
	if class := c.classes[string(key)]; class != nil {
		return class
	}
	statements := make([]*statement, len(covering))
	enforced := make([]*statement, 0, len(covering))
	for i, n := range covering {
		statements[i] = &c.statements[n]
		if !statements[i].shadow {
			enforced = append(enforced, statements[i])
		}
	}
	class := &Class{Enforced: c.rights(enforced)}
	class.Shadow = class.Enforced
	if len(enforced) != len(statements) {
		class.Shadow = c.rights(statements)
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
