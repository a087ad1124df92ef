package authz_test

import (
	"fmt"
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

func TestWarnings(t *testing.T) {
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	grant := func(name, from, operations, resources, more string) string {
		return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: %s}\nspec: {owner: me, reason: it must be, ticket: T-1, "+
			"from: [%s], to: [{endpoint: docs, operations: [%s], resources: [%s]}]%s}\n", name, from, operations, resources, more)
	}
	const a, team, all = "{spiffeID: 'spiffe://example.org/t/a'}", "{spiffeID: 'spiffe://example.org/t/*'}", "{trustDomain: example.org}"
	const budget = ", budget: {requests: {max: 1, per: Day}}"
	const window = ", windows: [{from: '08:00', to: '18:00', timeZone: Europe/Berlin}]"
	for _, c := range []struct {
		what   string
		grants []string
		want   string
	}{
		{"nothing to say", []string{grant("a", a, "Read", "wiki", ""), grant("b", a, "Write", "wiki", ", expires: '2026-05-31T00:00:00Z'"), grant("c", a, "Read", "'x*'", ", effect: Deny")}, ""},
		{"nobody answers for it", []string{strings.Replace(grant("a", a, "Read", "wiki", ""), "owner: me, reason: it must be, ticket: T-1, ", "", 1)}, `unaccounted: grant "a" has no owner, no reason, no ticket`},
		{"no ticket", []string{strings.Replace(grant("a", a, "Read", "wiki", ""), ", ticket: T-1", "", 1)}, `unaccounted: grant "a" has no ticket`},
		{"never", []string{grant("a", a, "Read", "wiki", ", notBefore: '2027-01-01T00:00:00Z', expires: '2027-01-01T00:00:00Z'")}, `never-holds: grant "a" expires before it begins`},
		{"long ago", []string{grant("a", a, "Read", "wiki", ", expires: '2026-05-01T00:00:00Z'")}, `expired: grant "a" expired at 2026-05-01T00:00:00Z`},
		{"wide", []string{grant("a", all, "Read", "'*'", "")}, `wide: grant "a" gives every resource of an endpoint to a whole trust domain`},
		{"a wide Deny", []string{grant("a", all, "Read", "'*'", ", effect: Deny")}, ""},
		{"twice", []string{grant("a", a, "Read", "wiki", ""), grant("b", a, "Read", "wiki", "")}, `no-effect: grant "b" changes no verdict: grant "a" (f01:2:1) says all of it`},
		{"covered", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read, Write", "'w*'", "")}, `no-effect: grant "a" changes no verdict: grant "b" (f02:2:1) says all of it`},
		{"overlapping", []string{grant("a", a, "Read, Write", "wiki", ""), grant("b", team, "Read", "'w*'", "")}, ""},
		{"another caller more", []string{grant("a", a+", {spiffeID: 'spiffe://example.org/x'}", "Read", "wiki", ""), grant("b", team, "Read", "'w*'", "")}, ""},
		{"in vain", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read", "'w*'", ", effect: Deny")}, `no-effect: grant "a" changes no verdict: grant "b" (f02:2:1) denies all of it`},
		{"a Deny within an Allow", []string{grant("a", a, "Read", "wiki", ", effect: Deny"), grant("b", team, "Read", "'w*'", "")}, ""},
		{"a Deny for some time", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read", "'w*'", ", effect: Deny"+window)}, ""},
		{"both for the same time", []string{grant("a", a, "Read", "wiki", window), grant("b", team, "Read", "'w*'", ", effect: Deny"+window)}, `no-effect: grant "a" changes no verdict: grant "b" (f02:2:1) denies all of it`},
		{"longer", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read", "'w*'", ", expires: '2099-01-01T00:00:00Z'")}, ""},
		{"earlier", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read", "'w*'", ", notBefore: '2020-01-01T00:00:00Z'")}, ""},
		{"within", []string{grant("a", a, "Read", "wiki", ", notBefore: '2026-01-01T00:00:00Z', expires: '2027-01-01T00:00:00Z'"), grant("b", team, "Read", "'w*'", ", expires: '2099-01-01T00:00:00Z'")}, `no-effect: grant "a" changes no verdict: grant "b" (f02:2:1) says all of it`},
		{"tried although it is so already", []string{grant("a", a, "Read", "wiki", ""), grant("b", a, "Read", "wiki", ", mode: Shadow")}, `no-effect: grant "b" changes no verdict: grant "a" (f01:2:1) says all of it`},
		{"without a budget beside one with", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read", "'w*'", budget)}, ""},
		{"with a budget beside one without", []string{grant("a", a, "Read", "wiki", budget), grant("b", team, "Read", "'w*'", "")}, `no-effect: grant "a" changes no verdict: grant "b" (f02:2:1) says all of it`},
		{"both with a budget", []string{grant("a", a, "Read", "wiki", budget), grant("b", team, "Read", "'w*'", budget)},
			`two-budgets: grant "a" allows something that grant "b" (f02:2:1) allows, too, with another budget`},
		{"both with a budget, and the first is wider", []string{grant("a", team, "Read", "'w*'", budget), grant("b", a, "Read", "wiki", budget)},
			`no-effect: grant "b" changes no verdict: grant "a" (f01:2:1) says all of it` + "\n" + `two-budgets: grant "b" allows something that grant "a" (f01:2:1) allows, too, with another budget`},
		{"covered by what is only tried", []string{grant("a", a, "Read", "wiki", ""), grant("b", team, "Read", "'*'", ", mode: Shadow")}, ""},
	} {
		text := func(ps segment.Problems) string {
			var lines []string
			for _, p := range ps {
				lines = append(lines, p.Code+": "+p.Msg)
			}
			return strings.Join(lines, "\n")
		}
		docs := append([]string{corpus.Endpoints()[2]}, c.grants...)
		cfg := corpus.Assemble(t, docs)
		if diff := cmp.Diff(c.want, text(authz.Warnings(&cfg, now))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.what, diff)
		}
		// Of the grants of a shadow folder the same is said, but for those in Shadow mode.
		beside := corpus.AssembleBeside(t, docs[:1], docs)
		if got := strings.ReplaceAll(text(authz.Warnings(&beside, now)), "(s0", "(f0"); got != c.want && !strings.Contains(strings.Join(c.grants, ""), "mode: Shadow") {
			t.Errorf("%s, in a shadow folder: %s", c.what, got)
		}
		beside = corpus.AssembleBeside(t, docs, nil)
		ignored := strings.Count(text(authz.Warnings(&beside, now)), "is in Shadow mode, and a shadow folder is there")
		if ignored != strings.Count(strings.Join(c.grants, ""), "mode: Shadow") {
			t.Errorf("%s, beside a shadow folder: %d are ignored", c.what, ignored)
		}
	}
}

// Whoever believes all warnings and deletes what changes no verdict has changed none, at any time.
func TestWarningsAreCertain(t *testing.T) {
	deleted := 0
	rapid.Check(t, func(t *rapid.T) {
		cfg, now := anyConfig(t), moment(t)
		idle := map[segment.Pos]bool{}
		for _, p := range authz.Warnings(&cfg, now) {
			if p.Code == "no-effect" || p.Code == "never-holds" || p.Code == "expired" {
				idle[p.Pos] = true
			}
		}
		less := cfg
		for _, grants := range []*[]segment.Grant{&less.Grants, &less.Shadow} {
			*grants = slices.DeleteFunc(slices.Clone(*grants), func(g segment.Grant) bool { return idle[g.Pos] })
		}
		deleted += len(cfg.Grants) + len(cfg.Shadow) - len(less.Grants) - len(less.Shadow)
		if rapid.Bool().Draw(t, "later") {
			now = now.Add(time.Duration(rapid.IntRange(0, 400*24*60).Draw(t, "minutes")) * time.Minute)
		}
		with, without := authz.Compile(&cfg, now), authz.Compile(&less, now)
		for _, r := range corpus.Requests() {
			a, b := authz.Decide(with, r), authz.Decide(without, r)
			if a.Allowed != b.Allowed || a.ShadowAllowed != b.ShadowAllowed || a.Budget != b.Budget {
				t.Fatalf("%+v was %+v, and is %+v", r, a, b)
			}
		}
	})
	if deleted < 50 {
		t.Errorf("only %d grants are without effect: the test shows little", deleted)
	}
}
