package authz_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

// pair is two random configurations that have much in common, or little.
func pair(t *rapid.T) (old, new segment.Config) {
	grants := corpus.Grants().Draw(t, "grants")
	others := append(slices.Clone(grants[min(len(grants), rapid.IntRange(0, 3).Draw(t, "removed")):]),
		corpus.Grant("a0", "Allow", "Enforce").Draw(t, "more"))
	if rapid.Bool().Draw(t, "unlike") {
		others = corpus.Grants().Draw(t, "others")
	}
	old, new = corpus.Assemble(t, append(corpus.Endpoints(), grants...)), corpus.Assemble(t, append(corpus.Endpoints(), others...))
	for _, cfg := range []*segment.Config{&old, &new} {
		switch rapid.IntRange(0, 5).Draw(t, "endpoints") {
		case 0: // one is missing
			cfg.Endpoints = slices.Delete(cfg.Endpoints, 1, 2)
		case 1: // any model will do
			cfg.Endpoints[0].Models = nil
		}
	}
	return old, new
}

func covers(c *authz.Change, r authz.Request) bool {
	return c.Endpoint == r.Endpoint && c.Callers.Has(r.Caller) && slices.Contains(c.Operations, r.Operation) && c.Resources.Has(r.Resource)
}

// tells reports whether a change says that what follows from it is decided differently.
func tells(c *authz.Change, r authz.Request) bool {
	return c.Endpoint == r.Endpoint && c.Callers.Has(r.Caller) && (r.Operation == segment.Enter || c.Resources.Has(r.Resource))
}

// leafOf is what a policy says of a request, or what it would say.
func leafOf(p *authz.Policy, r authz.Request, shadow bool) authz.Leaf {
	if e := p.Endpoints[r.Endpoint]; e != nil {
		if class, ok := e.Members.Lookup(r.Caller); ok && shadow {
			return class.Shadow.Lookup(r.Operation, r.Resource)
		} else if ok {
			return class.Enforced.Lookup(r.Operation, r.Resource)
		}
	}
	return authz.Leaf{Rule: authz.DefaultDeny}
}

func explained(c *authz.Change, r authz.Request, was, is authz.Leaf) bool {
	n := 0
	for _, why := range c.Causes {
		if (why.Callers == nil || why.Callers.Has(r.Caller)) && (why.Resources == nil || why.Resources.Has(r.Resource)) {
			n++
			if why.Was != was.Rule || why.Is != is.Rule || c.Budget && (why.WasBudget != was.Budget || why.IsBudget != is.Budget) {
				return false
			}
		}
	}
	return n == 1
}

// A request is decided differently if and only if one change says so, and for the reasons that it says.
func TestDiff(t *testing.T) {
	requests := corpus.Requests()
	differ, budgets := map[bool]int{}, 0
	rapid.Check(t, func(t *rapid.T) {
		before, after := pair(t)
		old, new := authz.Compile(&before, moment(t)), authz.Compile(&after, moment(t))
		for _, shadow := range []bool{false, true} {
			changes := authz.Diff(old, new)
			if shadow {
				changes = authz.DiffShadow(old, new)
			}
			for _, r := range requests {
				was, is := leafOf(old, r, shadow), leafOf(new, r, shadow)
				counts := was.Allowed && is.Allowed && was != is && !(was.Budget.IsZero() && is.Budget.IsZero())
				gain := is.Allowed
				if counts {
					gain = !is.Budget.Within(was.Budget) || !was.Budget.IsZero() && was.Rule != is.Rule
				}
				var covering []authz.Change
				for _, c := range changes {
					if covers(&c, r) {
						covering = append(covering, c)
					}
				}
				implied := r.Operation == segment.Discover || r.Operation == segment.Enter
				told := slices.ContainsFunc(changes, func(c authz.Change) bool { return c.Gain == is.Allowed && tells(&c, r) })
				switch {
				case len(covering) > 1:
					t.Fatalf("%+v is in several changes: %+v", r, covering)
				case was.Allowed == is.Allowed && !counts && len(covering) > 0:
					t.Fatalf("%+v is %+v as before, but %+v", r, is, covering)
				case was.Allowed == is.Allowed && !counts:
					continue
				case len(covering) > 0 && covering[0].Budget != counts:
					t.Fatalf("%+v was %+v, is %+v, and is told as something else: %+v", r, was, is, covering)
				case implied && !told, !implied && len(covering) == 0:
					t.Fatalf("%+v was %+v, is %+v, and no change says so: %+v", r, was, is, changes)
				case len(covering) > 0 && covering[0].Gain != gain:
					t.Fatalf("%+v was %+v, is %+v, but %+v", r, was, is, covering)
				case len(covering) > 0 && !explained(&covering[0], r, was, is):
					t.Fatalf("%+v was %+v, is %+v, for other reasons than %+v", r, was, is, covering)
				}
				differ[gain]++
				if counts {
					budgets++
				}
			}
			if same := authz.Diff(new, new); len(same) > 0 {
				t.Fatalf("differs from itself: %+v", same)
			}
		}
	})
	if differ[true] < 100 || differ[false] < 100 || budgets < 20 {
		t.Errorf("only %d gains and %d losses, and %d of budgets: the test shows little", differ[true], differ[false], budgets)
	}
}

// Who is left out of a change has nothing (or keeps it), or had it already (or never had it).
func TestDiffLeavesOut(t *testing.T) {
	requests := corpus.Requests()
	seen := 0
	rapid.Check(t, func(t *rapid.T) {
		before, after := pair(t)
		now := moment(t)
		old, new := authz.Compile(&before, now), authz.Compile(&after, now)
		for _, c := range authz.Diff(old, new) {
			for _, r := range requests {
				if r.Endpoint != c.Endpoint || !slices.Contains(c.Operations, r.Operation) {
					continue
				}
				// As if it were so for all others.
				callers, resources := c.Callers, c.Resources
				callers.Of, callers.Already = slices.Concat(callers.Of, callers.Already), nil
				resources.Of, resources.Already = slices.Concat(resources.Of, resources.Already), nil
				if c.Callers.Has(r.Caller) && !c.Resources.Has(r.Resource) && resources.Has(r.Resource) ||
					c.Resources.Has(r.Resource) && !c.Callers.Has(r.Caller) && callers.Has(r.Caller) {
					seen++
					was, is := authz.Decide(old, r), authz.Decide(new, r)
					if was.Allowed != c.Gain || is.Allowed != c.Gain {
						t.Fatalf("%+v was %+v, is %+v, and is listed as already so in %+v", r, was, is, c)
					}
				}
			}
		}
	})
	if seen < 20 {
		t.Errorf("only %d times: the test shows little", seen)
	}
}

func TestDiffReads(t *testing.T) {
	caller := func(s string) segment.Caller {
		c, err := segment.ParseCaller("spiffe://example.org" + s)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	grant := func(name string, effect segment.Effect, resources []segment.Pattern, from ...string) segment.Grant {
		g := segment.Grant{Name: segment.GrantName(name), Effect: effect, Mode: segment.Enforce, To: []segment.Target{{
			Endpoint: "chat", Operations: []segment.Operation{segment.Infer, segment.Embed}, Resources: resources}}}
		for _, f := range from {
			g.From = append(g.From, caller(f))
		}
		return g
	}
	policy := func(grants ...segment.Grant) *authz.Policy {
		return authz.Compile(&segment.Config{Endpoints: []segment.Endpoint{{Name: "chat", Protocol: segment.OpenAI}}, Grants: grants}, time.Time{})
	}
	type patterns = []segment.Pattern
	in := func(s string) segment.Pattern { return segment.Pattern("spiffe://example.org" + s) }
	both := []segment.Operation{segment.Infer, segment.Embed}
	secret := grant("no-secret", segment.Deny, patterns{"llama-secret"}, "/*")
	had := grant("had", segment.Allow, patterns{"llama-7b"}, "/app")
	for _, c := range []struct {
		name     string
		old, new *authz.Policy
		want     []authz.Change
	}{
		{"a family of models, but for one that is denied and one that it had", policy(had, secret), policy(had, secret, grant("more", segment.Allow, patterns{"llama*"}, "/app")),
			[]authz.Change{{true, false, authz.Set{Of: patterns{in("/app")}}, "chat", both,
				authz.Set{Of: patterns{"llama*"}, Except: patterns{"llama-secret"}, Already: patterns{"llama-7b"}}, []authz.Cause{{Was: authz.DefaultDeny, Is: "grant/more"}}}}},
		{"a Deny that goes", policy(had, grant("no", segment.Deny, patterns{"*"}, "/*")), policy(had),
			[]authz.Change{{true, false, authz.Set{Of: patterns{in("/app")}}, "chat", both, authz.Set{Of: patterns{"llama-7b"}},
				[]authz.Cause{{Was: "grant/no", Is: "grant/had"}}}}},
		{"an endpoint that goes", policy(had), authz.Compile(&segment.Config{}, time.Time{}),
			[]authz.Change{{false, false, authz.Set{Of: patterns{in("/app")}}, "chat", both, authz.Set{Of: patterns{"llama-7b"}},
				[]authz.Cause{{Was: "grant/had", Is: authz.DefaultDeny}}}}},
		{"a family of callers, with one that had it and one that gets it from another grant", policy(grant("had", segment.Allow, patterns{"m"}, "/t/a")),
			policy(grant("a", segment.Allow, patterns{"m"}, "/t/b"), grant("all", segment.Allow, patterns{"m"}, "/t/*"), grant("had", segment.Allow, patterns{"m"}, "/t/a")),
			[]authz.Change{{true, false, authz.Set{Of: patterns{in("/t/*")}, Already: patterns{in("/t/a")}}, "chat", both, authz.Set{Of: patterns{"m"}},
				[]authz.Cause{{Callers: &authz.Set{Of: patterns{in("/t/b")}}, Was: authz.DefaultDeny, Is: "grant/a"},
					{Callers: &authz.Set{Of: patterns{in("/t/*")}, Except: patterns{in("/t/a"), in("/t/b")}}, Was: authz.DefaultDeny, Is: "grant/all"}}}}},
		{"another rule, the same verdict", policy(had), policy(grant("other", segment.Allow, patterns{"llama-7b"}, "/app")), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, authz.Diff(c.old, c.new)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func BenchmarkDiff(b *testing.B) {
	for _, c := range []struct {
		name     string
		oneGroup bool
	}{{"callers", false}, {"group", true}} {
		old, now := many(b, 10_000, c.oneGroup), time.Time{}
		changed := many(b, 10_000, c.oneGroup)
		for i := range changed.Grants {
			changed.Grants[i].To[0].Resources = []segment.Pattern{segment.Pattern(fmt.Sprintf("d%d", i))}
		}
		was, is := authz.Compile(old, now), authz.Compile(changed, now)
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(float64(len(authz.Diff(was, is))), "changes")
			}
		})
	}
}
