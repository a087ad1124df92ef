package learn_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/authz/learn"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/test/corpus"
)

func request(t telemetry.Tally) authz.Request {
	return authz.Request{Caller: t.Caller.String(), Endpoint: t.Endpoint, Operation: t.Operation, Resource: t.Resource}
}

// traffic is some tallies of requests that make a difference to the grants of the corpus, and more of the likely ones.
func traffic(likely []authz.Request, verdicts ...telemetry.Verdict) *rapid.Generator[[]telemetry.Tally] {
	requests := corpus.Requests()
	// What names no resource is another request, too.
	for _, op := range []segment.Operation{segment.Infer, segment.Read} {
		for _, endpoint := range []segment.EndpointName{"chat", "open", "docs"} {
			requests = append(requests, authz.Request{Caller: "spiffe://example.org/t/a", Endpoint: endpoint, Operation: op})
		}
	}
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) telemetry.Tally {
		r := rapid.SampledFrom(requests).Draw(t, "request")
		if len(likely) > 0 && rapid.Bool().Draw(t, "likely") {
			r = rapid.SampledFrom(likely).Draw(t, "request")
		}
		at := time.Unix(1_800_000_000+rapid.Int64Range(0, 1000).Draw(t, "at"), 0).UTC()
		tally := telemetry.Tally{Count: rapid.Int64Range(1, 3).Draw(t, "count"), First: at, Last: at}
		tally.Caller, _ = spiffeid.FromString(r.Caller)
		tally.Endpoint, tally.Operation, tally.Resource = r.Endpoint, r.Operation, r.Resource
		tally.Verdict, tally.Rule = rapid.SampledFrom(verdicts).Draw(t, "verdict"), "grant/g1"
		if tally.Verdict == telemetry.Denied {
			tally.Rule = rapid.SampledFrom([]string{"default-deny", "default-deny", "grant/g2"}).Draw(t, "rule")
		}
		return tally
	}), 0, 40)
}

// What is suggested allows everything that was seen, as far as it does not say otherwise, and nothing else.
func TestSuggestionIsExact(t *testing.T) {
	granted, leftOut, products, widened := 0, 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		cfg := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...))
		seen := traffic(nil, telemetry.Allowed, telemetry.Failed, telemetry.Denied).Draw(t, "seen")
		prefixes := rapid.SliceOfN(rapid.SampledFrom([]segment.Pattern{"a*", "ab*", "b*", "*", "a"}), 0, 2).Draw(t, "prefixes")
		s := learn.Suggest(&cfg, seen, prefixes)
		if diff := cmp.Diff(s, learn.Suggest(&cfg, rapid.Permutation(seen).Draw(t, "shuffled"), prefixes), cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); diff != "" {
			t.Fatal("the order of tallies matters:", diff)
		}

		names := map[segment.GrantName]bool{}
		for _, g := range cfg.Grants {
			names[g.Name] = true
		}
		alone := cfg
		alone.Grants = nil
		for _, p := range s.Grants {
			if names[p.Name] || len(p.Name) > 63 {
				t.Fatalf("%s is taken or too long", p.Name)
			}
			names[p.Name] = true
			g := segment.Grant{Name: p.Name, Effect: segment.Allow, Mode: segment.Enforce, From: []segment.Caller{segment.CallerID(p.Caller)}}
			for _, to := range p.To {
				target := segment.Target{Endpoint: p.Endpoint, Operations: to.Operations}
				for _, r := range to.Resources {
					target.Resources = append(target.Resources, r.Pattern)
				}
				g.To = append(g.To, target)
			}
			products += len(g.To)
			alone.Grants = append(alone.Grants, g)
		}
		slices.SortFunc(alone.Grants, func(a, b segment.Grant) int { return strings.Compare(string(a.Name), string(b.Name)) })
		policy := authz.Compile(&alone, time.Unix(1_900_000_000, 0))

		left := func(tally telemetry.Tally) bool {
			return slices.ContainsFunc(s.Left, func(l learn.Left) bool {
				return l.Caller == tally.Caller && l.Endpoint == tally.Endpoint && l.Operation == tally.Operation && l.Resource == tally.Resource
			})
		}
		for _, tally := range seen {
			switch allowed := authz.Decide(policy, request(tally)).Allowed; {
			case allowed:
				granted++
			case !left(tally):
				t.Fatalf("%+v was seen, is not allowed, and nothing is said of it", tally)
			default:
				leftOut++
			}
		}

		justified := func(r authz.Request, by func(telemetry.Tally) bool) bool {
			return slices.ContainsFunc(seen, func(tally telemetry.Tally) bool {
				return tally.Caller.String() == r.Caller && tally.Endpoint == r.Endpoint && tally.Operation != segment.Enter && tally.Operation != segment.Discover && by(tally)
			})
		}
		var asked []authz.Request
		for _, tally := range seen {
			asked = append(asked, request(tally))
		}
		for _, r := range append(asked, corpus.Requests()...) {
			if !authz.Decide(policy, r).Allowed {
				continue
			}
			exact := justified(r, func(tally telemetry.Tally) bool {
				return (r.Operation == tally.Operation || r.Operation == segment.Discover) && r.Resource == tally.Resource || r.Operation == segment.Enter
			})
			if exact {
				continue
			}
			wide := justified(r, func(tally telemetry.Tally) bool {
				return (r.Operation == tally.Operation || r.Operation == segment.Discover) && slices.ContainsFunc(prefixes, func(p segment.Pattern) bool {
					return p.IsPrefix() && p.Matches(r.Resource) && p.Matches(tally.Resource)
				})
			})
			if !wide {
				t.Fatalf("%+v is allowed, and nothing like it was seen", r)
			}
			widened++
		}
	})
	if granted < 30 || leftOut < 30 || products < 30 || widened < 30 {
		t.Errorf("%d granted, %d left out, %d products, %d widened: the test shows little", granted, leftOut, products, widened)
	}
}

func tally(caller, endpoint, operation, resource string, more ...string) telemetry.Tally {
	t := telemetry.Tally{Count: 1, First: time.Unix(1_800_000_000, 0).UTC(), Last: time.Unix(1_800_000_000, 0).UTC()}
	t.Caller, _ = spiffeid.FromString(caller)
	t.Endpoint, t.Operation, t.Resource = segment.EndpointName(endpoint), segment.Operation(operation), resource
	t.Verdict, t.Rule = telemetry.Allowed, "grant/g"
	if len(more) == 2 {
		t.Verdict, t.Rule = telemetry.Verdict(more[0]), more[1]
	}
	return t
}

func TestSuggestionIsReadable(t *testing.T) {
	cfg := corpus.Assemble(rapidless{t}, append(corpus.Endpoints(), "---\napiVersion: sallyport.dev/v1alpha1\nkind: Workload\nmetadata: {name: app}\n"+
		"spec: {spiffeID: 'spiffe://example.org/team/app', selectors: ['unix:uid:1']}\n"))
	const app, other = "spiffe://example.org/team/app", "spiffe://example.org/Other_One"
	got := learn.Suggest(&cfg, []telemetry.Tally{
		tally(app, "docs", "Read", "a"), tally(app, "docs", "Read", "b"), tally(app, "docs", "Read", "c"),
		tally(app, "docs", "Write", "a"), tally(app, "docs", "Write", "b"), tally(app, "docs", "Write", "c"),
		tally(app, "docs", "Admin", "c"), tally(app, "docs", "Enter", ""), tally(app, "docs", "Discover", "d"),
		tally(app, "chat", "Infer", "ab"), tally(app, "chat", "Infer", "gone"),
		tally(other, "docs", "Read", "x1"), tally(other, "docs", "Read", "x2"), tally(other, "docs", "Write", "y"),
		tally(other, "docs", "Read", "y*"), tally(other, "docs", "Read", "a\nb"), tally(other, "docs", "Read", ""), tally(other, "docs", "Infer", "x"),
		tally(other, "docs", "Read", strings.Repeat("x", 1024)), tally(other, "docs", "Read", "z", "denied", "grant/no"),
		tally(other, "gone", "Read", "x"), tally("", "docs", "Read", "x"), tally("spiffe://else.org/x", "docs", "Read", "x"),
		tally("spiffe://oidc.example.org/google/me", "docs", "Read", "x"),
	}, []segment.Pattern{"x*"})
	var lines []string
	for _, g := range got.Grants {
		for _, to := range g.To {
			var resources []string
			for _, r := range to.Resources {
				resources = append(resources, fmt.Sprintf("%s=%d", r.Pattern, r.Count))
			}
			lines = append(lines, fmt.Sprintf("%s %s %s %v %v", g.Name, g.Workload, g.Endpoint, to.Operations, resources))
		}
	}
	for _, l := range got.Left {
		lines = append(lines, fmt.Sprintf("%q: %s", l.Resource[:min(5, len(l.Resource))], l.Why))
	}
	slices.Sort(lines)
	want := []string{
		`"": it names no resource, and only "*" covers that`,
		`"a\nb": its name has characters in it that cannot be seen`,
		`"d": Discover is never granted by itself, and nothing else was done there`,
		`"gone": the endpoint has no such model`,
		`"x": Chroma has no such operation`,
		`"x": nobody knows who asked`,
		`"x": the caller's trust domain is not federated with`,
		`"x": the endpoint takes no tokens of this issuer`,
		`"x": there is no such endpoint`,
		`"y*": its name has a "*" in it, which in a grant stands for more`,
		`"z": grant/no denies it, which overrides every Allow`,
		`seen-other-one-docs  docs [Read] [x*=3]`,
		`seen-other-one-docs  docs [Write] [y=1]`,
		`seen-team-app-chat app chat [Infer] [ab=1]`,
		`seen-team-app-docs app docs [Admin] [c=1]`,
		`seen-team-app-docs app docs [Read Write] [a=2 b=2 c=2]`,
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
}

// rapidless lets a plain test use what is made for those of package rapid.
type rapidless struct{ *testing.T }

func matches(p learn.Part, g segment.GrantName, from segment.Caller, endpoint segment.EndpointName, op segment.Operation, r segment.Pattern) bool {
	return p.Grant == g && (p.Caller == "" || p.Caller == from.String()) && (p.Endpoint == "" || p.Endpoint == endpoint) &&
		(p.Operation == "" || p.Operation == op) && (p.Resource == "" || p.Resource == r)
}

// without cuts grants into their smallest parts, and leaves those out that are covered.
func without(cfg segment.Config, parts []learn.Part) (left segment.Config, removed int) {
	left = cfg
	left.Grants = nil
	for _, g := range cfg.Grants {
		if g.Effect != segment.Allow || g.Mode != segment.Enforce {
			left.Grants = append(left.Grants, g)
			continue
		}
		for _, from := range g.From {
			for _, to := range g.To {
				for _, op := range to.Operations {
					for _, r := range to.Resources {
						if slices.ContainsFunc(parts, func(p learn.Part) bool { return matches(p, g.Name, from, to.Endpoint, op, r) }) {
							removed++
							continue
						}
						one := g
						one.From, one.To = []segment.Caller{from}, []segment.Target{{Endpoint: to.Endpoint, Operations: []segment.Operation{op}, Resources: []segment.Pattern{r}}}
						left.Grants = append(left.Grants, one)
					}
				}
			}
		}
	}
	return left, removed
}

// Taking away all that is called unused takes nothing from anybody who used it, at any time.
func TestUnusedIsNotMissed(t *testing.T) {
	removed, kept := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		cfg := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...))
		early := authz.Compile(&cfg, time.Unix(0, 0))
		allowed := slices.DeleteFunc(corpus.Requests(), func(r authz.Request) bool { return !authz.Decide(early, r).Allowed })
		seen := traffic(allowed, telemetry.Allowed, telemetry.Failed, telemetry.Denied).Draw(t, "seen")
		only := rapid.SampledFrom([]segment.EndpointName{"", "", "docs"}).Draw(t, "only")
		idle := learn.Unused(&cfg, seen, only)
		left, n := without(cfg, idle.Parts)
		removed += n
		for _, at := range []string{corpus.Early, corpus.Late} {
			now, err := time.Parse(time.RFC3339, at)
			if err != nil {
				t.Fatal(err)
			}
			before, after := authz.Compile(&cfg, now), authz.Compile(&left, now)
			for _, tally := range seen {
				if r := request(tally); tally.Granted() && authz.Decide(before, r).Allowed {
					if !authz.Decide(after, r).Allowed {
						t.Fatalf("%+v was used, and is taken away by %+v", r, idle.Parts)
					}
					kept++
				}
			}
		}
		// And nothing is left that nobody used.
		for _, g := range left.Grants {
			if g.Effect != segment.Allow || g.Mode != segment.Enforce || only != "" && g.To[0].Endpoint != only || idle.More > 0 {
				continue
			}
			if !slices.ContainsFunc(seen, func(tally telemetry.Tally) bool { return tally.Granted() && learn.Concerns("", &g, tally.Judged) }) {
				t.Fatalf("nobody used %+v, and that is not said: %+v", g, idle.Parts)
			}
		}
		for i, p := range idle.Parts {
			if only != "" && p.Endpoint != only {
				t.Fatalf("%+v is not about %s", p, only)
			}
			if slices.Contains(idle.Parts[:i], p) {
				t.Fatalf("%+v is listed twice", p)
			}
		}
	})
	if removed < 300 || kept < 50 {
		t.Errorf("%d removed, %d kept: the test shows little", removed, kept)
	}
}

func TestUnused(t *testing.T) {
	doc := func(name, rest string) string {
		return "---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: " + name + "}\nspec: " + rest + "\n"
	}
	cfg := corpus.Assemble(rapidless{t}, append(corpus.Endpoints(),
		doc("all", "{from: [{trustDomain: example.org}], to: [{endpoint: docs, operations: [Read], resources: ['*']}]}"),
		doc("both", "{from: [{spiffeID: 'spiffe://example.org/a'}, {spiffeID: 'spiffe://example.org/b'}], to: [{endpoint: docs, operations: [Read, Write], resources: [x, y, z]}, {endpoint: open, operations: [Infer], resources: [m]}]}"),
		doc("idle", "{from: [{spiffeID: 'spiffe://example.org/b'}], to: [{endpoint: docs, operations: [Admin], resources: [x]}]}"),
		doc("never", "{effect: Deny, from: [{spiffeID: 'spiffe://example.org/b'}], to: [{endpoint: docs, operations: [Admin], resources: [y]}]}"),
		doc("tried", "{mode: Shadow, from: [{spiffeID: 'spiffe://example.org/b'}], to: [{endpoint: docs, operations: [Admin], resources: [y]}]}")))
	const a, b = "spiffe://example.org/a", "spiffe://example.org/b"
	seen := []telemetry.Tally{tally(a, "docs", "Read", "x", "allowed", "grant/all"), tally(a, "docs", "Write", "y"), tally(b, "docs", "Read", "y"),
		tally(b, "docs", "Write", "x", "denied", "default-deny"), tally(a, "open", "Infer", "old", "allowed", "grant/idle")}
	text := func(idle learn.Idle) (lines []string) {
		for _, p := range idle.Parts {
			lines = append(lines, strings.TrimRight(fmt.Sprintf("%s|%s|%s|%s|%s", p.Grant, p.Endpoint, strings.TrimPrefix(p.Caller, "spiffe://example.org"), p.Operation, p.Resource), "|")+
				map[bool]string{true: " formerly"}[p.Formerly > 0])
		}
		return append(lines, fmt.Sprint(idle.Grants))
	}
	want := []string{"both|open", "both|docs|||z", "both|docs|/a|Read|y", "both|docs|/b|Read|x", "both|docs|/b|Write|y", "both|docs||Write|x", "idle formerly", "3"}
	got := text(learn.Unused(&cfg, seen, ""))
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"both|open", "1"}, text(learn.Unused(&cfg, seen, "open"))); diff != "" {
		t.Error(diff)
	}
	// b does nothing but look around, and that needs one of its rights: nobody can say which.
	if got := text(learn.Unused(&cfg, []telemetry.Tally{tally(b, "docs", "Enter", "")}, "docs")); slices.Contains(got, "all|docs") || slices.Contains(got, "idle|docs") {
		t.Error(got)
	}
}

// Whoever enters by a right that it may not have at all times needs another, and which one nobody can say.
func TestUnusedButImplied(t *testing.T) {
	caller, err := segment.ParseCaller("spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	grant := func(name, resource string) segment.Grant {
		return segment.Grant{Name: segment.GrantName(name), Effect: segment.Allow, Mode: segment.Enforce, From: []segment.Caller{caller},
			To: []segment.Target{{Endpoint: "docs", Operations: []segment.Operation{segment.Read}, Resources: []segment.Pattern{segment.Pattern(resource)}}}}
	}
	for name, c := range map[string]struct {
		change func(*segment.Grant)
		deny   bool
		want   bool // that the other grant is named
	}{
		"as ever":    {want: true},
		"expires":    {change: func(g *segment.Grant) { g.Expires = time.Unix(1, 0) }},
		"begins":     {change: func(g *segment.Grant) { g.NotBefore = time.Unix(1, 0) }},
		"in windows": {change: func(g *segment.Grant) { g.Windows = make([]segment.Window, 1) }},
		"taken":      {deny: true},
	} {
		used, other, deny := grant("used", "x"), grant("other", "y"), grant("deny", "x")
		if deny.Effect = segment.Deny; c.change != nil {
			c.change(&used)
		}
		cfg := segment.Config{Endpoints: []segment.Endpoint{{Name: "docs", Protocol: segment.Chroma}}, Grants: []segment.Grant{other, used}}
		if c.deny {
			cfg.Grants = append([]segment.Grant{deny}, cfg.Grants...)
		}
		seen := []telemetry.Tally{tally(caller.String(), "docs", "Enter", ""), tally(caller.String(), "docs", "Read", "x", "allowed", "grant/used")}
		idle := learn.Unused(&cfg, seen, "")
		if got := len(idle.Parts) == 1 && idle.Parts[0].Grant == "other"; got != c.want || len(idle.Parts) > 1 {
			t.Errorf("%s: %+v", name, idle.Parts)
		}
	}
}

func TestManyPartsAreBounded(t *testing.T) {
	g := segment.Grant{Name: "g", Effect: segment.Allow, Mode: segment.Enforce, To: []segment.Target{{Endpoint: "docs", Operations: []segment.Operation{segment.Read}}}}
	var seen []telemetry.Tally
	for n := range 300 {
		caller, resource := fmt.Sprintf("spiffe://example.org/%03d", n), fmt.Sprintf("%03d", n)
		g.From = append(g.From, segment.CallerID(spiffeid.RequireFromString(caller)))
		g.To[0].Resources = append(g.To[0].Resources, segment.Pattern(resource))
		seen = append(seen, tally(caller, "docs", "Read", resource))
	}
	cfg := segment.Config{Endpoints: []segment.Endpoint{{Name: "docs", Protocol: segment.Chroma}}, Grants: []segment.Grant{g}}
	if idle := learn.Unused(&cfg, seen, ""); len(idle.Parts) != 100 || idle.More != 300*299-100 {
		t.Errorf("%d parts and %d more", len(idle.Parts), idle.More)
	}
}

func TestTrial(t *testing.T) {
	with := func(count int64, verdict, shadow telemetry.Verdict) telemetry.Tally {
		t := tally("spiffe://example.org/a", "docs", "Read", "x", string(verdict), "grant/g")
		t.Shadow, t.Count = shadow, count
		return t
	}
	var trial learn.Trial
	for _, t := range []telemetry.Tally{with(1, "allowed", "allowed"), with(2, "allowed", "denied"), with(4, "failed", "denied"), with(8, "denied", "denied"),
		with(16, "denied", "allowed"), with(32, "refused", ""), with(64, "allowed", ""), with(128, "refused", "allowed")} {
		trial.Add(t)
	}
	var got []string
	for _, d := range trial.Differences() {
		got = append(got, fmt.Sprint(d.Count, d.Verdict, d.Shadow))
	}
	if diff := cmp.Diff([]string{"6alloweddenied", "16deniedallowed"}, got); diff != "" || trial.Requests != 159 || trial.Different != 22 {
		t.Error(diff, trial.Requests, trial.Different)
	}
}
