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
				!slices.ContainsFunc(to.Resources, func(p segment.Pattern) bool { return p.Matches(r.Resource) }) {
				continue
			}
			if g.Effect == segment.Deny {
				return authz.Leaf{Rule: authz.RuleOf(g.Name)}
			}
			if !leaf.Allowed {
				leaf = authz.Leaf{Allowed: true, Rule: authz.RuleOf(g.Name)}
			}
		}
	}
	return leaf
}

// about yields the grants that hold and speak of the caller.
func (n naive) about(caller string) func(func(*segment.Grant) bool) {
	return func(yield func(*segment.Grant) bool) {
		for i := range n.cfg.Grants {
			g := &n.cfg.Grants[i]
			if (g.Expires.IsZero() || n.now.Before(g.Expires)) && (n.shadow || g.Mode == segment.Enforce) &&
				slices.ContainsFunc(g.From, func(c segment.Caller) bool { return c.Matches(caller) }) && !yield(g) {
				return
			}
		}
	}
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
	return authz.Decision{Allowed: enforced.Allowed, Rule: enforced.Rule, ShadowAllowed: shadow.Allowed, ShadowRule: shadow.Rule}
}

func moment(t *rapid.T) time.Time {
	now, err := time.Parse(time.RFC3339, rapid.SampledFrom([]string{corpus.Early, corpus.Between, corpus.Late}).Draw(t, "now"))
	if err != nil {
		t.Fatal(err)
	}
	return now
}

func anyConfig(t *rapid.T) segment.Config {
	return corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...))
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
				allows = allows || reason.Says == "allows it"
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
				want := authz.Decision{Allowed: right.Allowed, Rule: right.Rule, ShadowAllowed: right.Shadow.Allowed, ShadowRule: right.Shadow.Rule}
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
				if last == nil {
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

func TestNextChange(t *testing.T) {
	at := func(s string) time.Time {
		m, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	early, between, late := at(corpus.Early), at(corpus.Between), at(corpus.Late)
	cfg := segment.Config{Grants: []segment.Grant{{Name: "a", Expires: late}, {Name: "b", Expires: between}, {Name: "c"}}}
	for _, c := range []struct{ now, want time.Time }{
		{early, between}, {between.Add(-1), between}, {between, late}, {late.Add(-1), late}, {late, time.Time{}}, {late.Add(1), time.Time{}},
	} {
		if got := authz.Compile(&cfg, c.now).NextChange; !got.Equal(c.want) {
			t.Errorf("at %s the next change is at %s, not %s", c.now, got, c.want)
		}
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
	if got := authz.Decide(authz.Compile(&segment.Config{}, time.Time{}), request); got != (authz.Decision{Rule: authz.DefaultDeny, ShadowRule: authz.DefaultDeny}) {
		t.Errorf("nothing decides %+v", got)
	}
}
