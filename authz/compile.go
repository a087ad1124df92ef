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
// classes and endpoints that are as they were are the same pointers.
//
// The grants are compared with those before, one by one. What they say is looked at only where it is new, is no longer said,
// or begins or ends to hold; and only callers that this names, or that are below one, are decided about again.
func Recompile(last *Policy, cfg *segment.Config, now time.Time) *Policy {
	if last == nil {
		last = &Policy{}
	}
	p := &Policy{Endpoints: make(map[segment.EndpointName]*Endpoint, len(cfg.Endpoints)), origin: originOf(cfg)}
	w := writer{Policy: p, last: last.origin, now: now, compilers: make(map[segment.EndpointName]*compiler, len(cfg.Endpoints))}
	afresh := p.origin.folder != last.origin.folder // the same grants take part in other decisions
	if afresh {
		w.last = origin{}
	}
	w.unused = w.last.unused
	for i := range cfg.Endpoints {
		e := &cfg.Endpoints[i]
		c := newCompiler(e, last.Endpoints[e.Name], afresh)
		c.folder = cfg.ShadowFolder
		w.compilers[e.Name], w.afresh = c, w.afresh || c.last == nil
	}
	w.compare(0, p.origin.shadow, 0, w.last.shadow)
	w.compare(p.origin.shadow, len(p.origin.grants), w.last.shadow, len(w.last.grants))
	p.origin.unused = w.unused
	for name, c := range w.compilers {
		p.Endpoints[name] = c.compile()
	}
	return p
}

// origin is what a policy was compiled from.
type origin struct {
	grants []segment.Grant // those that are enforced, sorted by name, and behind them those of the shadow folder
	shadow int             // where these begin
	folder bool            // whether there is such a folder
	// said are the statements of each grant, one for each target, nil where there is no such endpoint; nil: the grant does
	// not hold, or has no part in anything.
	said   [][]*statement
	unused int // the first number that no statement has had
}

func originOf(cfg *segment.Config) origin {
	o := origin{grants: cfg.Grants, shadow: len(cfg.Grants), folder: cfg.ShadowFolder}
	if o.folder {
		o.grants = slices.Concat(cfg.Grants, cfg.Shadow)
	}
	o.said = make([][]*statement, len(o.grants))
	return o
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

// statement is one grant's word about one endpoint. A grant that names the endpoint twice makes two. It is made once, and
// stays the same for as long as the grant says the same and holds.
type statement struct {
	id         int // no other has had it
	grant      segment.GrantName
	target     int
	endpoint   segment.EndpointName
	rule       Rule
	deny       bool
	budget     segment.Budget
	in         part
	operations []segment.Operation
	resources  []segment.Pattern
}

// inOrder is the order in which statements count.
func inOrder(s, t *statement) int {
	return cmp.Or(cmp.Compare(s.grant, t.grant), cmp.Compare(s.target, t.target), cmp.Compare(s.id, t.id))
}

// writer is one call of Recompile.
type writer struct {
	*Policy
	last      origin
	now       time.Time
	compilers map[segment.EndpointName]*compiler
	afresh    bool // some of these take nothing over
	unused    int
}

// compare goes through some grants and the earlier ones of the same kind, both sorted by name. Were they not, it would find
// more that has changed, and nothing else.
func (w *writer) compare(from, to, before, end int) {
	grants, earlier := w.origin.grants, w.last.grants
	for i := from; i < to; i++ {
		g := &grants[i]
		for before < end && earlier[before].Name < g.Name {
			w.drop(before)
			before++
		}
		var kept []*statement
		if before < end && earlier[before].Name == g.Name {
			if earlier[before].Says(g) {
				kept = w.last.said[before]
			} else {
				w.drop(before)
			}
			before++
		}
		in := w.origin.part(i)
		if in == (part{}) {
			continue
		}
		holds, until := g.Holds(w.now)
		if !until.IsZero() && (w.NextChange.IsZero() || until.Before(w.NextChange)) {
			w.NextChange = until
		}
		switch {
		case holds && (kept == nil || w.afresh):
			w.origin.said[i] = w.say(g, in, kept)
		case holds:
			w.origin.said[i] = kept
		case kept != nil:
			w.drop(before - 1)
		}
	}
	for ; before < end; before++ {
		w.drop(before)
	}
}

// say makes the statements of a grant that holds, but for those that were kept and are still good.
func (w *writer) say(g *segment.Grant, in part, kept []*statement) []*statement {
	said := make([]*statement, len(g.To))
	for n, to := range g.To {
		c := w.compilers[to.Endpoint]
		switch {
		case c == nil:
			continue
		case kept != nil && c.last != nil && kept[n] != nil:
			said[n] = kept[n]
			continue
		}
		said[n] = &statement{
			id:         w.unused,
			grant:      g.Name,
			target:     n,
			endpoint:   to.Endpoint,
			rule:       RuleOf(g.Name),
			deny:       g.Effect != segment.Allow,
			budget:     g.Budget,
			in:         in,
			operations: to.Operations,
			resources:  c.resources(g.Effect, to.Resources),
		}
		w.unused++
		for _, from := range g.From {
			c.change(from.Pattern()).add(said[n])
		}
		c.count(said[n], 1)
	}
	return said
}

// drop takes back what an earlier grant said.
func (w *writer) drop(i int) {
	for _, s := range w.last.said[i] {
		if s == nil {
			continue
		}
		c := w.compilers[s.endpoint]
		if c == nil || c.last == nil {
			continue
		}
		for _, from := range w.last.grants[i].From {
			c.change(from.Pattern()).drop(s)
		}
		c.count(s, -1)
	}
}

// compiler makes the policy of one endpoint.
type compiler struct {
	models     []string // the only resources there are; nil: unknown
	operations []segment.Operation
	folder     bool
	last       *Endpoint  // all of which is taken over but for the changes; nil: nothing is
	before     Table[use] // the classes that there were, in any case
	changes    map[segment.Pattern]*change
	tried      int // as in Endpoint
}

// change is what is newly said, and no longer said, of one caller.
type change struct {
	more []*statement
	gone map[*statement]bool
}

func (ch *change) add(s *statement) {
	if n := len(ch.more); n == 0 || ch.more[n-1] != s {
		ch.more = append(ch.more, s)
	}
}

func (ch *change) drop(s *statement) {
	if ch.gone == nil {
		ch.gone = map[*statement]bool{}
	}
	ch.gone[s] = true
}

// use is a class, and how many entries of Members are of it.
type use struct {
	class   *Class
	callers int
}

func newCompiler(e *segment.Endpoint, last *Endpoint, afresh bool) *compiler {
	c := &compiler{models: e.ModelNames(), operations: e.Protocol.Operations(), changes: map[segment.Pattern]*change{}}
	if last == nil {
		return c
	}
	c.before = last.uses
	if !afresh && slices.Equal(last.models, c.models) && slices.Equal(last.operations, c.operations) {
		c.last, c.tried = last, last.tried
	}
	return c
}

func (c *compiler) change(caller segment.Pattern) *change {
	ch := c.changes[caller]
	if ch == nil {
		ch = &change{}
		c.changes[caller] = ch
	}
	return ch
}

func (c *compiler) count(s *statement, n int) {
	if s.in.enforced != s.in.shadow {
		c.tried += n
	}
}

// resources spells patterns out where all resources are known, so that nothing is granted that no backend serves. A Deny
// on anything is one on requests for everything too, which name nothing and may reach it.
func (c *compiler) resources(effect segment.Effect, patterns []segment.Pattern) []segment.Pattern {
	if c.models == nil {
		if effect != segment.Allow {
			patterns = append(slices.Clip(patterns), "")
		}
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
	shadowed := c.folder || c.tried > 0
	last := c.last
	switch {
	case last == nil:
		last = &Endpoint{}
	case len(c.changes) == 0 && last.Shadowed == shadowed:
		return last
	}
	said, silent := make(map[segment.Pattern][]*statement, len(c.changes)), map[segment.Pattern]bool{}
	for caller, ch := range c.changes {
		was, _ := last.about.at(caller)
		now := slices.DeleteFunc(slices.Concat(was, ch.more), func(s *statement) bool { return ch.gone[s] })
		slices.SortFunc(now, inOrder)
		if said[caller] = now; len(now) == 0 {
			delete(said, caller)
			silent[caller] = true
		}
	}
	e := &Endpoint{Shadowed: shadowed, models: c.models, operations: c.operations, tried: c.tried, about: last.about.edit(said, silent)}

	maker := classes{c, e.about, map[string]*Class{}}
	members, more, distinct := make(map[segment.Pattern]*Class, len(said)), map[string]int{}, map[string]*Class{}
	decide := func(caller segment.Pattern) {
		if members[caller] != nil {
			return
		}
		class := maker.of(caller)
		if same, ok := c.before.at(segment.Pattern(class.ID)); ok {
			class = same.class
		} else if same := distinct[class.ID]; same != nil {
			class = same
		}
		distinct[class.ID], members[caller] = class, class
		more[class.ID]++
		if was, ok := last.Members.at(caller); ok {
			more[was.ID]--
		}
	}
	for caller := range c.changes {
		if !silent[caller] {
			decide(caller)
		}
		if caller.IsPrefix() { // all that are below it are covered by other statements now
			for below := range e.about.below(caller) {
				decide(below)
			}
		}
	}
	for caller := range silent {
		if was, ok := last.Members.at(caller); ok {
			more[was.ID]--
		}
	}
	e.Members = last.Members.edit(members, silent)

	uses, unused := map[segment.Pattern]use{}, map[segment.Pattern]bool{}
	for id, n := range more {
		was, _ := last.uses.at(segment.Pattern(id))
		switch {
		case n == 0:
		case was.callers+n == 0:
			unused[segment.Pattern(id)] = true
		default:
			uses[segment.Pattern(id)] = use{cmp.Or(was.class, distinct[id]), was.callers + n}
		}
	}
	e.uses = last.uses.edit(uses, unused)
	e.Classes = make([]*Class, 0, e.uses.Len())
	for _, u := range e.uses.All() {
		e.Classes = append(e.Classes, u.class)
	}
	return e
}

// classes makes the classes of callers.
type classes struct {
	*compiler
	about Table[[]*statement]
	made  map[string]*Class // by the statements that each is made from; some are equal
}

// of returns the class of everybody who falls to this caller pattern.
func (c *classes) of(caller segment.Pattern) *Class {
	parts := slices.Collect(c.about.covering(caller)) // also of the shorter prefixes: "spiffe://td/a/*", "spiffe://td/*"
	covering := parts[0]
	if len(parts) > 1 {
		covering = slices.Concat(parts...)
		slices.SortFunc(covering, inOrder)
		covering = slices.Compact(covering)
	}
	var key []byte
	for _, s := range covering {
		key = append(strconv.AppendInt(key, int64(s.id), 36), ' ')
	}
	if class := c.made[string(key)]; class != nil {
		return class
	}
	enforced, shadow := make([]*statement, 0, len(covering)), make([]*statement, 0, len(covering))
	for _, s := range covering {
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
	class.ID, class.leaves = digest(class), class.count()
	c.made[string(key)] = class
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

// word is the first Deny, the first Allow without a budget and the first Allow with one that name a pattern, as places in
// the statements counted from 1; 0: none.
type word struct{ deny, allow, counted int }

func (s *statement) word(i int) word {
	switch {
	case s.deny:
		return word{deny: i + 1}
	case s.budget.IsZero():
		return word{allow: i + 1}
	}
	return word{counted: i + 1}
}

// first is what both words say together.
func (w word) first(v word) word {
	if w.deny == 0 || v.deny != 0 && v.deny < w.deny {
		w.deny = v.deny
	}
	if w.allow == 0 || v.allow != 0 && v.allow < w.allow {
		w.allow = v.allow
	}
	if w.counted == 0 || v.counted != 0 && v.counted < w.counted {
		w.counted = v.counted
	}
	return w
}

// decideAt decides about all names that fall to the pattern p: a Deny that covers it, else an Allow without a budget, else
// one with a budget, else nothing.
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
	case all.counted > 0:
		s := statements[all.counted-1]
		return Leaf{Allowed: true, Rule: s.rule, Budget: s.budget}
	}
	return Leaf{Rule: DefaultDeny}
}

// implied decides about Discover: allowed where any operation is. That is never counted.
func (c *compiler) implied(statements []*statement, words map[segment.Operation]Table[word], p segment.Pattern) Leaf {
	denied := Leaf{Rule: DefaultDeny}
	for _, op := range c.operations {
		leaf := decideAt(statements, words[op], p)
		if leaf.Allowed {
			leaf.Budget = segment.Budget{}
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
				text = append(text, leaf.Rule...)
				if !leaf.Budget.IsZero() {
					text = append(append(text, ' '), leaf.Budget.String()...)
				}
				text = append(text, '\n')
			}
		}
		text = append(text, "--\n"...)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}
