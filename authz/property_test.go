package authz_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

// naive is the policy read aloud: it searches all grants for every request.
type naive struct {
	cfg    *segment.Config
	now    time.Time
	shadow bool
}

func (n naive) decide(r authz.Request) authz.Leaf {
	none := authz.Leaf{Rule: authz.DefaultDeny}
	at := slices.IndexFunc(n.cfg.Endpoints, func(e segment.Endpoint) bool { return e.Name == r.Endpoint })
	if at < 0 {
		return none
	}
	e := &n.cfg.Endpoints[at]
	switch r.Operation {
	case segment.Discover: // whoever may do anything with it
		denied := none
		for _, r.Operation = range e.Protocol.Operations() {
			leaf := n.decide(r)
			if leaf.Allowed {
				leaf.Budget = segment.Budget{}
				return leaf
			}
			if denied == none {
				denied = leaf
			}
		}
		return denied
	case segment.Enter: // whoever may do anything with anything that is named, or that no grant names
		r.Operation = segment.Discover
		for _, p := range n.named(e, r.Caller) {
			if r.Resource = string(p); p.IsPrefix() {
				r.Resource = p.Stem() + "\x01"
			}
			if leaf := n.decide(r); leaf.Allowed {
				return leaf
			}
		}
		return none
	}
	if models := modelsOf(e); models != nil && !slices.Contains(models, r.Resource) {
		return none
	}
	leaf := none
	for g := range n.about(r.Caller) {
		for _, to := range g.To {
			if to.Endpoint != r.Endpoint || !slices.Contains(to.Operations, r.Operation) ||
				!slices.ContainsFunc(to.Resources, func(p segment.Pattern) bool { return p.Matches(r.Resource) }) && (g.Effect != segment.Deny || r.Resource != "") {
				continue
			}
			if g.Effect == segment.Deny {
				return authz.Leaf{Rule: authz.RuleOf(g.Name)}
			}
			if !leaf.Allowed || g.Budget.IsZero() && !leaf.Budget.IsZero() {
				leaf = authz.Leaf{Allowed: true, Rule: authz.RuleOf(g.Name), Budget: g.Budget}
			}
		}
	}
	return leaf
}

// about yields the grants that hold and speak of the caller.
func (n naive) about(caller string) func(func(*segment.Grant) bool) {
	return func(yield func(*segment.Grant) bool) {
		grants, tried := n.cfg.Grants, n.shadow
		if n.shadow && n.cfg.ShadowFolder {
			grants, tried = n.cfg.Shadow, false
		}
		for i := range grants {
			g := &grants[i]
			if holds(g, n.now) && (tried || g.Mode == segment.Enforce) &&
				slices.ContainsFunc(g.From, func(c segment.Caller) bool { return c.Matches(caller) }) && !yield(g) {
				return
			}
		}
	}
}

// holds looks at a clock on the wall.
func holds(g *segment.Grant, now time.Time) bool {
	if now.Before(g.NotBefore) || !g.Expires.IsZero() && !now.Before(g.Expires) {
		return false
	}
	return g.Windows == nil || slices.ContainsFunc(g.Windows, func(w segment.Window) bool {
		from, to, shows := w.From.String(), w.To.String(), now.In(w.Zone).Format("15:04")
		y, m, d := now.In(w.Zone).Date()
		today := slices.Contains(w.Days, time.Date(y, m, d, 12, 0, 0, 0, time.UTC).Weekday())
		yesterday := slices.Contains(w.Days, time.Date(y, m, d-1, 12, 0, 0, 0, time.UTC).Weekday())
		if from < to {
			return today && from <= shows && shows < to
		}
		return today && from <= shows || yesterday && shows < to
	})
}

func (n naive) named(e *segment.Endpoint, caller string) []segment.Pattern {
	var all []segment.Pattern
	for _, m := range modelsOf(e) {
		all = append(all, segment.Pattern(m))
	}
	for g := range n.about(caller) {
		for _, to := range g.To {
			if to.Endpoint == e.Name && e.Models == nil {
				all = append(all, to.Resources...)
			}
		}
	}
	slices.Sort(all)
	return all
}

func modelsOf(e *segment.Endpoint) []string {
	var all []string
	for _, m := range e.Models {
		all = append(append(all, m.Name), m.Aliases...)
	}
	return all
}

func (n naive) both(r authz.Request) authz.Decision {
	enforced := n.decide(r)
	n.shadow = true
	shadow := n.decide(r)
	return authz.Decision{Allowed: enforced.Allowed, Rule: enforced.Rule, Budget: enforced.Budget, ShadowAllowed: shadow.Allowed, ShadowRule: shadow.Rule}
}

// moment is one at which grants expire or begin, or one on a day on which clocks somewhere are put forward or back.
func moment(t *rapid.T) time.Time {
	days := []string{corpus.Early, corpus.Between, corpus.Late, "2026-03-08T00:00:00Z", "2026-03-29T00:00:00Z", "2026-04-04T00:00:00Z",
		"2026-10-03T00:00:00Z", "2026-10-25T00:00:00Z", "2026-11-01T00:00:00Z"}
	now, err := time.Parse(time.RFC3339, rapid.SampledFrom(days).Draw(t, "now"))
	if err != nil {
		t.Fatal(err)
	}
	return now.Add(time.Duration(rapid.SampledFrom([]int{0, 0, 1, 60, 45 * 60, rapid.IntRange(0, 36*60*60).Draw(t, "seconds")}).Draw(t, "later")) * time.Second)
}

// anyConfig has a shadow folder, or not.
func anyConfig(t *rapid.T) segment.Config {
	docs := append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...)
	if rapid.IntRange(0, 2).Draw(t, "folder") > 0 {
		return corpus.Assemble(t, docs)
	}
	return corpus.AssembleBeside(t, docs, corpus.Grants().Draw(t, "shadow"))
}

func TestAgreesWithNaive(t *testing.T) {
	requests := corpus.Requests()
	seen := map[authz.Decision]bool{}
	rapid.Check(t, func(t *rapid.T) {
		cfg, now := anyConfig(t), moment(t)
		policy := authz.Compile(&cfg, now)
		twin := naive{cfg: &cfg, now: now}
		for _, r := range requests {
			want := twin.both(r)
			if diff := cmp.Diff(want, authz.Decide(policy, r)); diff != "" {
				t.Fatalf("%+v: (-naive +compiled)\n%s", r, diff)
			}
			seen[want] = true
		}
	})
	if len(seen) < 20 {
		t.Errorf("only %d different decisions: the test shows little", len(seen))
	}
}

func TestExplain(t *testing.T) {
	requests := corpus.Requests()
	rapid.Check(t, func(t *rapid.T) {
		cfg, now := anyConfig(t), moment(t)
		policy := authz.Compile(&cfg, now)
		for i := rapid.IntRange(0, 4).Draw(t, "first"); i < len(requests); i += 5 {
			r := requests[i]
			got := authz.Decide(policy, r)
			ex := authz.Explain(policy, &cfg, r, now)
			if ex.Decision != got || ex.Request != r {
				t.Fatalf("explains %+v with %+v, not %+v", r, ex.Decision, got)
			}
			allows, denies, named := false, false, got.Rule == authz.DefaultDeny
			for _, reason := range ex.Deciding {
				allows = allows || strings.HasPrefix(reason.Says, "allows it")
				denies = denies || strings.HasPrefix(reason.Says, "denies it")
				named = named || authz.RuleOf(reason.Grant) == got.Rule
			}
			switch {
			case !named:
				t.Fatalf("%+v: %s decides, and is not among %+v", r, got.Rule, ex.Deciding)
			case got.Allowed && (!allows || denies), !got.Allowed && allows && !denies:
				t.Fatalf("%+v is %+v, and that does not follow from %+v", r, got, ex.Deciding)
			case got.Rule != authz.DefaultDeny && !allows && !denies:
				t.Fatalf("%+v is %+v: %+v", r, got, ex.Deciding)
			}
		}
	})
}

// A right says what holds for names that fall to its pattern: itself, or one that nothing else names.
func TestRightsOf(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg, now := anyConfig(t), moment(t)
		policy := authz.Compile(&cfg, now)
		for _, caller := range []string{"/a", "/t/a", "/t/c", "/t/u/a", "/x"} {
			caller = "spiffe://example.org" + caller
			listed := map[string]bool{}
			for _, right := range authz.RightsOf(policy, caller) {
				name := string(right.Resource)
				if right.Resource.IsPrefix() {
					name = right.Resource.Stem() + "\x01"
				}
				r := authz.Request{Caller: caller, Endpoint: right.Endpoint, Operation: right.Operation, Resource: name}
				want := authz.Decision{Allowed: right.Allowed, Rule: right.Rule, Budget: right.Budget, ShadowAllowed: right.Shadow.Allowed, ShadowRule: right.Shadow.Rule}
				if diff := cmp.Diff(authz.Decide(policy, r), want); diff != "" {
					t.Fatalf("%+v: (-decided +listed)\n%s", right, diff)
				}
				key := fmt.Sprint(right.Endpoint, right.Operation, right.Resource)
				if listed[key] {
					t.Fatalf("%+v is listed twice", right)
				}
				listed[key] = true
			}
			for _, r := range corpus.Requests() {
				if r.Caller != caller || r.Operation == segment.Discover || r.Operation == segment.Enter || authz.Decide(policy, r).Rule == authz.DefaultDeny {
					continue
				}
				if !slices.ContainsFunc(authz.RightsOf(policy, caller), func(right authz.Right) bool {
					return right.Endpoint == r.Endpoint && right.Operation == r.Operation && right.Resource.Matches(r.Resource)
				}) {
					t.Fatalf("%+v is not listed", r)
				}
			}
		}
	})
}

func TestOrderOfGrantsHasNoMeaning(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		docs, now := append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...), moment(t)
		cfg, again := corpus.Assemble(t, docs), corpus.Assemble(t, rapid.Permutation(docs).Draw(t, "shuffled"))
		policy, same := authz.Compile(&cfg, now), authz.Compile(&again, now)
		for i := range again.Endpoints {
			name := again.Endpoints[i].Name
			if !slices.EqualFunc(policy.Endpoints[name].Classes, same.Endpoints[name].Classes, func(a, b *authz.Class) bool { return a.ID == b.ID }) {
				t.Fatalf("other classes at %s", name)
			}
		}
		// Even if they are not sorted: then the same is decided, under another name.
		rand.Shuffle(len(again.Grants), func(i, j int) { again.Grants[i], again.Grants[j] = again.Grants[j], again.Grants[i] })
		mixed := authz.Compile(&again, now)
		for _, r := range corpus.Requests() {
			a, b, c := authz.Decide(policy, r), authz.Decide(same, r), authz.Decide(mixed, r)
			if a != b || a.Allowed != c.Allowed || a.ShadowAllowed != c.ShadowAllowed {
				t.Fatalf("%+v: %+v, %+v, %+v", r, a, b, c)
			}
		}
	})
}

func sameTable(a, b authz.Table[authz.Leaf]) bool {
	return maps.Equal(maps.Collect(a.All()), maps.Collect(b.All()))
}

// Whatever was compiled before, the policy is the one that is compiled from nothing, and what is as it was is kept.
func TestRecompile(t *testing.T) {
	kept := 0
	rapid.Check(t, func(t *rapid.T) {
		var last *authz.Policy
		grants := corpus.Grants().Draw(t, "grants")
		for step := range rapid.IntRange(2, 4).Draw(t, "edits") {
			cfg, now := corpus.Assemble(t, append(corpus.Endpoints(), grants...)), moment(t)
			switch rapid.IntRange(0, 9).Draw(t, "otherwise") {
			case 0: // another model, which may be all that a grant gives
				cfg.Endpoints[0].Models = append(slices.Clone(cfg.Endpoints[0].Models), segment.Model{Name: "aa"})
			case 1: // grants about an endpoint that is gone
				cfg.Endpoints = cfg.Endpoints[1:]
			case 2: // not sorted, which nobody promises to notice
				cfg.Grants = slices.Clone(cfg.Grants)
				slices.Reverse(cfg.Grants)
			}
			if rapid.IntRange(0, 2).Draw(t, "folder") == 0 {
				cfg.ShadowFolder = true // the grants in it have the names of others, and most say the same
				cfg.Shadow = slices.Concat(cfg.Grants[:len(cfg.Grants)/2], corpus.Assemble(t, append(corpus.Endpoints(),
					corpus.Grant("z", "Deny", "Enforce").Draw(t, "tried"))).Grants)
			}
			fresh, policy := authz.Compile(&cfg, now), authz.Recompile(last, &cfg, now)
			for name, want := range fresh.Endpoints {
				got := policy.Endpoints[name]
				equal := func(a, b *authz.Class) bool {
					return a.ID == b.ID && maps.EqualFunc(a.Enforced, b.Enforced, sameTable) && maps.EqualFunc(a.Shadow, b.Shadow, sameTable)
				}
				if !slices.EqualFunc(got.Classes, want.Classes, equal) || got.Shadowed != want.Shadowed ||
					!maps.EqualFunc(maps.Collect(got.Members.All()), maps.Collect(want.Members.All()), equal) {
					t.Fatalf("another policy of %s: %+v, not %+v", name, got, want)
				}
				if last == nil || last.Endpoints[name] == nil {
					continue
				}
				for _, class := range got.Classes {
					for _, before := range last.Endpoints[name].Classes {
						if before.ID == class.ID && before != class {
							t.Fatalf("class %s of %s is another pointer", class.ID, name)
						} else if before == class {
							kept++
						}
					}
				}
			}
			if !policy.NextChange.Equal(fresh.NextChange) {
				t.Fatalf("changes at %s, not %s", policy.NextChange, fresh.NextChange)
			}
			last = policy
			grants = append(grants[min(len(grants), rapid.IntRange(0, 2).Draw(t, "removed")):],
				corpus.Grant(fmt.Sprintf("a%d", step), "Allow", "Enforce").Draw(t, "more"))
			if n := len(grants); n > 1 && rapid.Bool().Draw(t, "edited") {
				at := rapid.IntRange(0, n-2).Draw(t, "where")
				name, _, _ := strings.Cut(strings.SplitAfter(grants[at], "metadata: {name: ")[1], "}")
				grants = slices.Clone(grants)
				grants[at] = corpus.Grant(name, rapid.SampledFrom([]string{"Allow", "Deny"}).Draw(t, "effect"), rapid.SampledFrom([]string{"Enforce", "Shadow"}).Draw(t, "mode")).Draw(t, "other")
			}
		}
	})
	if kept == 0 {
		t.Error("nothing is ever kept")
	}
}

func TestOneGrantMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		docs, now := append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...), moment(t)
		effect := rapid.SampledFrom([]string{"Allow", "Deny"}).Draw(t, "effect")
		mode := rapid.SampledFrom([]string{"Enforce", "Shadow"}).Draw(t, "mode")
		name := rapid.SampledFrom([]string{"a", "z"}).Draw(t, "name")
		cfg, more := corpus.Assemble(t, docs), corpus.Assemble(t, append(docs, corpus.Grant(name, effect, mode).Draw(t, "more")))
		before, after := authz.Compile(&cfg, now), authz.Compile(&more, now)
		for _, r := range corpus.Requests() {
			was, is := authz.Decide(before, r), authz.Decide(after, r)
			switch {
			case effect == "Allow" && (was.Allowed && !is.Allowed || was.ShadowAllowed && !is.ShadowAllowed):
				t.Fatalf("an Allow takes %+v away", r)
			case effect == "Deny" && (!was.Allowed && is.Allowed || !was.ShadowAllowed && is.ShadowAllowed):
				t.Fatalf("a Deny gives %+v", r)
			case mode == "Shadow" && (was.Allowed != is.Allowed || was.Rule != is.Rule):
				t.Fatalf("a grant in Shadow mode changes %+v", r)
			}
		}
	})
}

// Until the next change no grant begins or ends, however short, and the policy stays what it is.
func TestNextChange(t *testing.T) {
	changes := 0
	rapid.Check(t, func(t *rapid.T) {
		cfg, now := anyConfig(t), moment(t)
		policy := authz.Compile(&cfg, now)
		all := slices.Concat(cfg.Grants, cfg.Shadow)
		if cfg.ShadowFolder { // beside it, those in Shadow mode have no part in anything
			all = slices.DeleteFunc(all, func(g segment.Grant) bool { return g.Mode == segment.Shadow })
		}
		hold := func(at time.Time) (text string) {
			for i := range all {
				text += fmt.Sprint(holds(&all[i], at), " ")
			}
			return text
		}
		next := policy.NextChange
		end := now.Add(10 * 24 * time.Hour)
		switch {
		case next.IsZero():
		case !next.After(now):
			t.Fatalf("at %s the next change was at %s", now, next)
		case next.Before(end):
			end = next
		}
		was := hold(now)
		for at := now.Truncate(time.Minute).Add(time.Minute); at.Before(end); at = at.Add(time.Minute) {
			if is := hold(at); is != was {
				t.Fatalf("from %s to %s nothing should change, and %sbecomes %sat %s", now, next, was, is, at)
			}
		}
		before := end.Add(-1)
		if is := hold(before); is != was {
			t.Fatalf("from %s to %s nothing should change, and %sbecomes %sat %s", now, next, was, is, before)
		}
		if !next.IsZero() && hold(next) != was {
			changes++
		}
		later := authz.Compile(&cfg, before)
		if !later.NextChange.Equal(next) && end.Equal(next) {
			t.Fatalf("the change at %s is one at %s just before", next, later.NextChange)
		}
		for name, e := range policy.Endpoints {
			same := func(a, b *authz.Class) bool { return a.ID == b.ID }
			if !maps.EqualFunc(maps.Collect(e.Members.All()), maps.Collect(later.Endpoints[name].Members.All()), same) {
				t.Fatalf("%s is another before %s", name, next)
			}
		}
	})
	if changes < 10 {
		t.Errorf("only %d times something changes: the test shows little", changes)
	}
}

// What limits grants in time gives nothing that they don't give without it, nor takes it.
func TestTimesOnlyNarrow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg, now := anyConfig(t), moment(t)
		effect := rapid.SampledFrom([]segment.Effect{segment.Allow, segment.Deny}).Draw(t, "effect")
		always := cfg
		for _, grants := range []*[]segment.Grant{&always.Grants, &always.Shadow} {
			*grants = slices.Clone(*grants)
			for i := range *grants {
				if g := &(*grants)[i]; g.Effect == effect {
					g.NotBefore, g.Expires, g.Windows = time.Time{}, time.Time{}, nil
				}
			}
		}
		limited, unlimited := authz.Compile(&cfg, now), authz.Compile(&always, now)
		for _, r := range corpus.Requests() {
			a, b := authz.Decide(limited, r), authz.Decide(unlimited, r)
			if effect == segment.Deny {
				a, b = b, a
			}
			if a.Allowed && !b.Allowed || a.ShadowAllowed && !b.ShadowAllowed {
				t.Fatalf("%+v is %+v with times of %s, and %+v without", r, authz.Decide(limited, r), effect, authz.Decide(unlimited, r))
			}
		}
	})
}

// A shadow folder changes nothing that is enforced, and is decided as if it were all that is.
func TestShadowFolder(t *testing.T) {
	differ := 0
	rapid.Check(t, func(t *rapid.T) {
		docs, shadow, now := append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...), corpus.Grants().Draw(t, "shadow"), moment(t)
		without, with := corpus.Assemble(t, docs), corpus.AssembleBeside(t, docs, shadow)
		promoted := corpus.Assemble(t, append(corpus.Endpoints(), shadow...))
		before, after, alone := authz.Compile(&without, now), authz.Compile(&with, now), authz.Compile(&promoted, now)
		for _, r := range corpus.Requests() {
			was, is, tried := authz.Decide(before, r), authz.Decide(after, r), authz.Decide(alone, r)
			switch {
			case is.Allowed != was.Allowed || is.Rule != was.Rule:
				t.Fatalf("%+v is %+v with the folder, and %+v without", r, is, was)
			case is.ShadowAllowed != tried.Allowed || is.ShadowRule != tried.Rule:
				t.Fatalf("%+v is tried as %+v, and will be %+v", r, is, tried)
			case is.Allowed != is.ShadowAllowed:
				differ++
			}
		}
		for name, e := range after.Endpoints {
			if !e.Shadowed {
				t.Fatalf("nothing is tried at %s", name)
			}
		}
	})
	if differ < 100 {
		t.Errorf("only %d verdicts differ: the test shows little", differ)
	}
}

// What is neither Allow nor Enforce takes, and gives only to the shadow: the zero values are no mistake to profit from.
func TestZeroGrant(t *testing.T) {
	caller, err := segment.ParseCaller("spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	request := authz.Request{Caller: caller.String(), Endpoint: "docs", Operation: segment.Read, Resource: "x"}
	for _, g := range []segment.Grant{{}, {Effect: segment.Allow}, {Mode: segment.Enforce}, {Effect: "allow", Mode: "enforce"}} {
		g.From, g.To = []segment.Caller{caller}, []segment.Target{{Endpoint: "docs", Operations: []segment.Operation{segment.Read}, Resources: []segment.Pattern{"*"}}}
		cfg := segment.Config{Endpoints: []segment.Endpoint{{Name: "docs", Protocol: segment.Chroma}}, Grants: []segment.Grant{g}}
		if got := authz.Decide(authz.Compile(&cfg, time.Time{}), request); got.Allowed {
			t.Errorf("%+v allows: %+v", g, got)
		}
	}
	cfg := segment.Config{Endpoints: []segment.Endpoint{{Name: "docs", Protocol: segment.Chroma}}, ShadowFolder: true,
		Shadow: []segment.Grant{{Effect: segment.Allow, From: []segment.Caller{caller}, To: []segment.Target{{Endpoint: "docs",
			Operations: []segment.Operation{segment.Read}, Resources: []segment.Pattern{"*"}}}}}}
	if got := authz.Decide(authz.Compile(&cfg, time.Time{}), request); got.Allowed || got.ShadowAllowed {
		t.Errorf("a grant without a mode allows: %+v", got)
	}
	if got := authz.Decide(authz.Compile(&segment.Config{}, time.Time{}), request); got != (authz.Decision{Rule: authz.DefaultDeny, ShadowRule: authz.DefaultDeny}) {
		t.Errorf("nothing decides %+v", got)
	}
}
