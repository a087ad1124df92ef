package envoy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

type xt = corev3.TypedExtensionConfig

// collections are UUIDs of all names in corpus.Requests but "c" and "abcd".
func collections() map[string]string {
	ids := map[string]string{}
	for i, name := range []string{"a", "ab", "abc", "aa", "b", "ba", "a*"} {
		ids[fmt.Sprintf("%08d-0000-0000-0000-000000000000", i)] = name
	}
	return ids
}

func idOf(name string) string {
	for id, n := range collections() {
		if n == name {
			return id
		}
	}
	return "ffffffff-0000-0000-0000-000000000000"
}

// extracted is the request as the extraction stage leaves it.
func extracted(t testing.TB, r authz.Request) *request {
	q := &request{t: t, caller: r.Caller, operation: string(r.Operation), found: map[string]string{"resolved": "="}}
	switch {
	case r.Endpoint == "docs" && (r.Operation == segment.Read || r.Operation == segment.Write):
		q.found = map[string]string{"id": idOf(r.Resource)}
	case r.Operation != segment.Enter:
		q.found["name"] = r.Resource
	}
	return q
}

// forms are the forms that rights are lowered in, whatever their size.
var forms = map[string]limits{
	"written out": {writtenOut: 1 << 30, shard: 1 << 30},
	"classes":     {writtenOut: -1, shard: 1 << 30},
	"shards":      {writtenOut: 1 << 30, shard: 3},
}

// tabled are the tables of endpoints that were lowered before: they are long, and the same in almost all that follows.
var tabled = &Resources{tables: map[segment.EndpointName]*table{}, versions: map[proto.Message]string{}}

func lowered(cfg *segment.Config, now time.Time, form string, earlier ...*Resources) (*authz.Policy, *Resources) {
	policy, only := authz.Compile(cfg, now), cfg.For(cfg.Gateways[0])
	return policy, lower(forms[form], &only, policy, Learned{Names: Names{"docs": collections()}, Keys: Keys{}}, earlier...)
}

// quickly is lowered, with tables that were made before. They are not to be changed.
func quickly(cfg *segment.Config, now time.Time, form string) (*authz.Policy, *Resources) {
	policy, r := lowered(cfg, now, form, tabled)
	keepTables(r)
	return policy, r
}

func keepTables(r *Resources) {
	for name, table := range r.tables {
		if tabled.tables[name] != table {
			tabled.tables[name], tabled.versions[table.routes] = table, r.versions[table.routes]
		}
	}
}

// check is Check, which reads each table once.
func check(r *Resources) error {
	err := Check(r, tabled)
	if err == nil {
		tabled.Routes = r.Routes
	}
	return err
}

// The tables of all protocols are the same each time, pass, and are long enough to be worth keeping.
func TestTables(t *testing.T) {
	for _, p := range segment.Protocols() {
		e := &segment.Endpoint{Name: "all", Hostnames: []string{"all.internal"}, Protocol: p, Templates: []string{"/users/{id}"},
			Backends: []segment.Backend{{Name: "local", Addresses: []segment.Address{{Host: "127.0.0.1", Port: 1}}, GRPC: []segment.Address{{Host: "127.0.0.1", Port: 2}}, TLS: segment.BackendTLS{Mode: segment.TLSNone}}}}
		cfg := segment.Config{Endpoints: []segment.Endpoint{*e}, Gateway: segment.Gateway{ID: spiffeid.RequireFromString("spiffe://example.org/gateway"), SVIDTTL: time.Hour}}
		made := func(earlier ...*Resources) *Resources {
			return lower(defaultLimits, &cfg, authz.Compile(&cfg, time.Unix(0, 0)), Learned{}, earlier...)
		}
		first := made()
		if err := Check(first); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		if diff := changed(fingerprints(t, first), fingerprints(t, made())); diff != nil {
			t.Errorf("%s: other bytes: %q", p, diff)
		}
		if p == segment.TCP { // which has no routes
			continue
		}
		if again := made(first); again.Routes[0] != first.Routes[0] {
			t.Errorf("%s: routes are made again", p)
		}
		cfg.Endpoints[0].Hostnames = []string{"other.internal"}
		if again := made(first); again.Routes[0].VirtualHosts[0].Domains[0] != "other.internal" {
			t.Errorf("%s: routes are kept that have changed", p)
		}
	}
}

func at(t rapid.TB, s string) time.Time {
	m, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// takeTokens lets callers of all endpoints come with tokens.
func takeTokens(cfg *segment.Config) {
	for i := range cfg.Endpoints {
		e := &cfg.Endpoints[i]
		e.Tokens = &segment.Tokens{Audiences: e.Hostnames, TrustDomains: []spiffeid.TrustDomain{cfg.TrustDomain}}
	}
}

// byToken is the request of one who came with a token. Nothing may be asked of his connection: it is of nobody.
func (q *request) byToken() {
	q.found["caller"], q.caller = q.caller, ""
}

// What Envoy's look-ups find in the lowered policy is what authz.Decide says, written out and in classes, and however
// callers are known.
func TestLoweringAgreesWithDecide(t *testing.T) {
	for form := range forms {
		t.Run(form, func(t *testing.T) { agreesWithDecide(t, form, false) })
		t.Run(form+", tokens", func(t *testing.T) { agreesWithDecide(t, form, true) })
	}
}

func agreesWithDecide(outer *testing.T, form string, tokens bool) {
	requests := corpus.Requests()
	seen := map[authz.Decision]bool{}
	rapid.Check(outer, func(t *rapid.T) {
		cfg := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...))
		if tokens {
			takeTokens(&cfg)
		}
		policy, r := quickly(&cfg, at(t, corpus.Early), form)
		if err := check(r); err != nil {
			t.Fatal(err)
		}
		opened := map[*anypb.Any]proto.Message{}
		for i := rapid.IntRange(0, 4).Draw(t, "first"); i < len(requests); i += 5 {
			ask := requests[i]
			if policy.Endpoints[ask.Endpoint] == nil {
				continue
			}
			want := authz.Decide(policy, ask)
			q := extracted(outer, ask)
			q.opened = opened
			if tokens {
				q.byToken()
			}
			if q.found["id"] != "" && collections()[q.found["id"]] == "" {
				want = authz.Decision{Rule: authz.DefaultDeny, ShadowRule: authz.DefaultDeny}
			}
			if diff := cmp.Diff(want, q.pass(r, ask.Endpoint)); diff != "" {
				t.Fatalf("%+v: (-decided +lowered)\n%s\n%v", ask, diff, q.state)
			}
			seen[want] = true
		}
	})
	if len(seen) < 20 {
		outer.Errorf("only %d different decisions: the test shows little", len(seen))
	}
}

// The same tables that authz.Decide answers, hostile names and all.
func TestLoweringAgreesWithTables(t *testing.T) {
	cases, err := corpus.Load("../../authz/testdata/decisions")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		cfg, err := c.Config()
		if err != nil {
			t.Fatal(err)
		}
		for form := range forms {
			policy, r := quickly(&cfg, c.Now, form)
			for _, line := range c.Lines {
				if policy.Endpoints[line.Request.Endpoint] == nil {
					continue
				}
				if strings.Contains(line.Request.Caller, "|") || strings.Contains(string(line.Request.Operation), "=") {
					continue // extraction refuses who is no SPIFFE ID (SPIFFE-ID, section 2), and no route has such an operation
				}
				q := &request{t: t, caller: line.Request.Caller, operation: string(line.Request.Operation),
					found: map[string]string{"resolved": "=", "name": line.Request.Resource}}
				want := line.Want
				want.Budget = authz.Decide(policy, line.Request).Budget // which tables don't say
				if diff := cmp.Diff(want, q.pass(r, line.Request.Endpoint)); diff != "" {
					t.Errorf("%s: %s: (-want +lowered)\n%s", line.Pos, form, diff)
				}
			}
		}
	}
}

// A stage that failed or was left out makes a question that nothing answers.
func TestNothingIsAnsweredUnjudged(t *testing.T) {
	cfg := corpus.Assemble(t, append(corpus.Endpoints(), `---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: all}
spec: {from: [{trustDomain: example.org}, {spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: open, operations: [Infer, Embed], resources: ['*', a, '=a']}, {endpoint: docs, operations: [Read, Write, Admin], resources: ['*']}]}
`))
	for form := range forms {
		_, r := quickly(&cfg, at(t, corpus.Early), form)
		good := request{t: t, caller: "spiffe://example.org/a", operation: "Infer", found: map[string]string{"resolved": "=", "name": "a"}}
		if got := good.pass(r, "open"); !got.Allowed {
			t.Fatalf("the base of this test is denied: %+v", got)
		}
		for name, q := range map[string]request{
			"not resolved":       {caller: good.caller, operation: "Infer", found: map[string]string{"name": "a"}},
			"nothing extracted":  {caller: good.caller, operation: "Infer"},
			"no operation":       {caller: good.caller, found: good.found},
			"no caller":          {operation: "Infer", found: good.found},
			"no caller, no rest": {},
			"other resolution":   {caller: good.caller, operation: "Infer", found: map[string]string{"resolved": "-", "name": "a"}},
			"id without a name":  {caller: good.caller, operation: "Read", found: map[string]string{"id": idOf("a"), "name": ""}},
		} {
			q.t = t
			if got := q.pass(r, "open"); got.Allowed || got.Rule != authz.DefaultDeny {
				t.Errorf("%s, %s: %+v of %v", form, name, got, q.state)
			}
		}
		unknown := request{t: t, caller: good.caller, operation: "Read", found: map[string]string{"id": "ffffffff-0000-0000-0000-000000000000"}}
		if got := unknown.pass(r, "docs"); got.Allowed {
			t.Errorf("%s: an unknown UUID is allowed: %v", form, unknown.state)
		}
	}
}

// The name of a collection is anybody's choice, and no format string.
func TestNamesAreLiteral(t *testing.T) {
	for _, name := range []string{"%REQ(X)%", "50%", "%%", "%DOWNSTREAM_PEER_URI_SAN%", "=", "a|b=c", "ü"} {
		q := request{t: t, caller: "spiffe://example.org/a", found: map[string]string{"id": "1"}, state: map[string]string{stateID: "1"}}
		q.run(nil, pack(resolve(map[string]string{"1": name})))
		if q.state[stateName] != name || q.state[stateResolved] != "=" {
			t.Errorf("%q becomes %q", name, q.state)
		}
	}
}

// fingerprints are all resources, and each filter chain by itself.
func fingerprints(t rapid.TB, r *Resources) map[string]string {
	all := map[string]string{}
	add := func(key string, m proto.Message) {
		if _, twice := all[key]; twice {
			t.Fatalf("%s is there twice", key)
		}
		if all[key] = tabled.versions[m]; all[key] != "" {
			return
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		all[key] = string(b)
	}
	for field, m := range r.All() {
		switch m := m.(type) {
		case *listenerv3.Listener:
			for _, chain := range m.FilterChains {
				add("chain/"+chain.Name, chain)
			}
		case interface{ GetClusterName() string }:
			add(field+"/"+m.GetClusterName(), m.(proto.Message))
		default:
			add(field+"/"+m.(interface{ GetName() string }).GetName(), m)
		}
	}
	return all
}

// changed are the resources that differ, are new or are gone.
func changed(a, b map[string]string) []string {
	var names []string
	for name := range a {
		if b[name] != a[name] {
			names = append(names, name)
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// The tables of endpoints, which no grant changes, are looked at by TestTables.
func TestSameBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		docs := append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...)
		cfg, again := corpus.Assemble(t, docs), corpus.Assemble(t, rapid.Permutation(docs).Draw(t, "shuffled"))
		for form := range forms {
			_, r := quickly(&cfg, at(t, corpus.Early), form)
			_, same := quickly(&again, at(t, corpus.Early), form)
			if diff := changed(fingerprints(t, r), fingerprints(t, same)); diff != nil {
				t.Fatalf("other bytes: %q", diff)
			}
		}
	})
}

func TestChangeStaysWhereItIsMade(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		docs := append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...)
		grant := func() string {
			return corpus.Grant("new", rapid.SampledFrom([]string{"Allow", "Deny"}).Draw(t, "effect"), rapid.SampledFrom([]string{"Enforce", "Shadow"}).Draw(t, "mode")).Draw(t, "grant")
		}
		docs = append(docs, grant())
		edited := slices.Clone(docs)
		form := rapid.SampledFrom(slices.Sorted(maps.Keys(forms))).Draw(t, "form")
		var allowed func(name string) bool
		if edit := rapid.SampledFrom([]string{"grant", "hostname", "backend", "models", "more"}).Draw(t, "edit"); edit == "grant" {
			edited[len(edited)-1] = grant()
			about := docs[len(docs)-1] + edited[len(edited)-1]
			allowed = func(name string) bool {
				if chain, ok := strings.CutPrefix(name, "chain/"); ok {
					return form != "written out" && strings.Contains(about, "endpoint: "+chain) // it takes another form, or where callers are cut moves
				}
				endpoint, what, _ := strings.Cut(strings.TrimPrefix(name, "extensions/authz/"), "/")
				return strings.HasPrefix(name, "extensions/authz/") && strings.Contains(about, "endpoint: "+endpoint) && (strings.HasPrefix(what, "rights") || form == "classes" && (what == "classes" || what == "members"))
			}
		} else {
			change := map[string][2]string{"hostname": {"chat.internal", "talk.internal"}, "backend": {":8002", ":9002"},
				"models": {"models: [{name: a, ", "models: [{name: new}, {name: a, "}, "more": {"{name: one,", "{name: four, addresses: ['127.0.0.1:4'], tls: {mode: None}}, {name: one,"}}[edit]
			if edited[0] = strings.Replace(docs[0], change[0], change[1], 1); edited[0] == docs[0] {
				t.Fatalf("%s changes nothing in %s", edit, docs[0])
			}
			allowed = func(name string) bool {
				_, name, _ = strings.Cut(name, "/")
				return name == "chat" || strings.HasPrefix(name, "authz/chat/") || strings.HasPrefix(name, "endpoint/chat/") || name == "endpoint/chat"
			}
		}
		cfg, next := corpus.Assemble(t, docs), corpus.Assemble(t, edited)
		_, before := quickly(&cfg, at(t, corpus.Early), form)
		_, after := quickly(&next, at(t, corpus.Early), form)
		if err := check(after); err != nil {
			t.Fatal(err)
		}
		for _, name := range changed(fingerprints(t, before), fingerprints(t, after)) {
			if !allowed(name) {
				t.Fatalf("%s changes, too", name)
			}
		}
	})
}

// Many callers are cut into parts that are small, each of them is in one, and one more changes one part.
func TestShards(t *testing.T) {
	config := func(callers int, skip int) *segment.Config {
		docs := corpus.Endpoints()
		for i := range callers {
			if i != skip {
				docs = append(docs, fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: g%d}\nspec: {from: [{spiffeID: 'spiffe://example.org/ns/x/app-%d'}], to: [{endpoint: open, operations: [Infer], resources: [a]}]}\n", i, i))
			}
		}
		cfg := corpus.Assemble(t, docs)
		cfg = cfg.For(cfg.Gateways[0])
		return &cfg
	}
	l := limits{writtenOut: 1 << 30, shard: 100}
	all, less := config(500, -1), config(500, 123)
	before := lower(l, all, authz.Compile(all, time.Unix(0, 0)), Learned{})
	parts, callers := 0, 0
	for _, x := range before.Extensions {
		if !strings.HasPrefix(x.Name, RightsName("open")+"/") {
			continue
		}
		n := len(before.made[x.Name].from.members)
		if lineUp(before.made[x.Name].from.members).weight() > l.shard {
			t.Errorf("%s has %d callers", x.Name, n)
		}
		parts, callers = parts+1, callers+n
	}
	if parts < 15 || callers != 500 {
		t.Errorf("%d callers in %d parts", callers, parts)
	}
	after := lower(l, less, authz.Compile(less, time.Unix(0, 0)), Learned{})
	if got := changed(fingerprints(t, before), fingerprints(t, after)); len(got) != 1 || !strings.Contains(got[0], "app-12") {
		t.Errorf("one caller less changes %q", got)
	}
}

// What is retained under the name of a shard is what that shard holds, and so it is with the names of other forms.
func TestRetained(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "grants")...))
		_, r := quickly(&cfg, at(t, corpus.Early), "shards")
		for _, x := range r.Extensions {
			got := r.Retained(x.Name, nil)
			if !strings.HasSuffix(x.Name, "/names") && (got == nil || !proto.Equal(got.Extension, x) || r.Retained(x.Name, got) != got) {
				t.Fatalf("%s is retained as %v, not %v", x.Name, got, x)
			}
		}
		for _, form := range []string{"written out", "classes"} {
			_, other := quickly(&cfg, at(t, corpus.Early), form)
			for _, x := range other.Extensions {
				if !strings.HasSuffix(x.Name, "/names") && !proto.Equal(r.Retained(x.Name, nil).Extension, x) {
					t.Fatalf("%s is not retained", x.Name)
				}
			}
		}
		for _, name := range []string{"", "x", "authz/chat", "authz/chat/names", "authz/nobody/rights", "authz/chat/rights/x", "a/chat/rights", "authz//rights"} {
			if got := r.Retained(name, nil); got != nil {
				t.Fatalf("%q is retained: %v", name, got)
			}
		}
	})
}

// What is made from earlier resources is what is made from nothing, and what did not change is the same pointer.
func TestLowerFromEarlier(t *testing.T) {
	kept := 0
	rapid.Check(t, func(t *rapid.T) {
		grants := corpus.Grants().Draw(t, "grants")
		var policy *authz.Policy
		last := &Resources{}
		for step := range rapid.IntRange(2, 4).Draw(t, "edits") {
			cfg := corpus.Assemble(t, append(corpus.Endpoints(), grants...))
			cfg = cfg.For(cfg.Gateways[0])
			form := forms[rapid.SampledFrom(slices.Sorted(maps.Keys(forms))).Draw(t, "form")]
			policy = authz.Recompile(policy, &cfg, at(t, corpus.Early))
			got, want := lower(form, &cfg, policy, Learned{}, last, tabled), lower(form, &cfg, policy, Learned{}, tabled)
			keepTables(want)
			if diff := changed(fingerprints(t, got), fingerprints(t, want)); diff != nil {
				t.Fatalf("other bytes: %q", diff)
			}
			if err := Check(got, last, tabled); err != nil {
				t.Fatal(err)
			}
			for _, x := range got.Extensions {
				if slices.Contains(last.Extensions, x) {
					kept++
				}
			}
			last = got
			grants = append(grants[min(len(grants), rapid.IntRange(0, 2).Draw(t, "removed")):],
				corpus.Grant(fmt.Sprintf("a%d", step), "Allow", "Enforce").Draw(t, "more"))
		}
	})
	if kept == 0 {
		t.Error("nothing is ever kept")
	}
}

// Above the threshold callers are put into classes, if that is smaller, and the same is decided.
func TestUseClasses(t *testing.T) {
	policy := func(callers, resources int, same bool) *authz.Endpoint {
		members := map[segment.Pattern]*authz.Class{}
		p := &authz.Endpoint{}
		var class *authz.Class
		for i := range callers {
			if class == nil || !same {
				points := map[segment.Pattern]authz.Leaf{}
				for j := range resources {
					points[segment.Pattern(fmt.Sprint(j))] = authz.Leaf{Allowed: true, Rule: "grant/x"}
				}
				class = &authz.Class{ID: fmt.Sprint(i), Enforced: authz.Rights{segment.Infer: authz.NewTable(points)}}
				p.Classes = append(p.Classes, class)
			}
			members[segment.Pattern(fmt.Sprintf("spiffe://x/%d", i))] = class
		}
		p.Members = authz.NewTable(members)
		return p
	}
	for _, c := range []struct {
		callers, resources int
		same, want         bool
	}{{200, 100, true, false}, {201, 100, true, true}, {201, 100, false, false}, {0, 0, true, false}} {
		p := policy(c.callers, c.resources, c.same)
		if got := defaultLimits.useClasses(p, lineUp(membersOf(p)).weight()); got != c.want {
			t.Errorf("%+v: %t", c, got)
		}
	}
}

// Connections that began in one filter chain are judged by what later ones say: whoever was led somewhere by old cuts or
// in an old form finds there what is decided now, or nothing.
func TestRetainedDecidesAsNow(outer *testing.T) {
	requests := corpus.Requests()
	names := slices.Sorted(maps.Keys(forms))
	rapid.Check(outer, func(t *rapid.T) {
		cfg := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "before")...))
		next := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Draw(t, "after")...))
		_, old := quickly(&cfg, at(t, corpus.Early), rapid.SampledFrom(names).Draw(t, "old form"))
		policy, now := quickly(&next, at(t, corpus.Early), rapid.SampledFrom(names).Draw(t, "form"))
		mixed := &Resources{Listeners: old.Listeners}
		for _, x := range old.Extensions {
			if i := slices.IndexFunc(now.Extensions, func(n *xt) bool { return n.Name == x.Name }); i >= 0 {
				mixed.Extensions = append(mixed.Extensions, now.Extensions[i])
			} else {
				mixed.Extensions = append(mixed.Extensions, now.Retained(x.Name, nil).Extension)
			}
		}
		for i := rapid.IntRange(0, 4).Draw(t, "first"); i < len(requests); i += 5 {
			ask := requests[i]
			if policy.Endpoints[ask.Endpoint] == nil || ask.Endpoint == "docs" {
				continue
			}
			q := extracted(outer, ask)
			got, want := q.pass(mixed, ask.Endpoint), authz.Decide(policy, ask)
			if got.Allowed && !want.Allowed {
				t.Fatalf("%+v is allowed by %s on an old connection, and now %s denies it", ask, got.Rule, want.Rule)
			}
			if want.Allowed && !got.Allowed && got.Rule != authz.DefaultDeny {
				t.Fatalf("%+v is denied by %s on an old connection, and now %s allows it", ask, got.Rule, want.Rule)
			}
		}
	})
}
