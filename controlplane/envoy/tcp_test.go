package envoy

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

const wireDocument = `---
apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: %s}
spec: {hostnames: [%s.internal], protocol: TCP, backends: [{name: one, addresses: ['127.0.0.1:%d'], tls: {mode: None}}, {name: two, addresses: ['127.0.0.1:5433'], tls: {mode: None}}]}
`

// wires are documents of two TCP endpoints.
func wires() []string {
	return []string{fmt.Sprintf(wireDocument, "wire", "wire", 5432), fmt.Sprintf(wireDocument, "line", "line", 5434)}
}

var wireCallers = []string{"/a", "/b", "/t", "/t/*", "/t/a", "/t/u/*", "/t/u/a"}

// connectGrant is a random grant to one of them or both.
func connectGrant(name string) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		var from, to []string
		for _, c := range rapid.SliceOfNDistinct(rapid.SampledFrom(wireCallers), 1, 3, rapid.ID).Draw(t, "callers") {
			from = append(from, fmt.Sprintf("{spiffeID: 'spiffe://example.org%s'}", c))
		}
		for _, e := range rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"wire", "line"}), 1, 2, rapid.ID).Draw(t, "endpoints") {
			to = append(to, fmt.Sprintf("{endpoint: %s, operations: [Connect], resources: ['*']}", e))
		}
		return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: %s}\nspec: {effect: %s, mode: %s, from: [%s], to: [%s]}\n", name,
			rapid.SampledFrom([]string{"Allow", "Allow", "Deny"}).Draw(t, "effect"), rapid.SampledFrom([]string{"Enforce", "Enforce", "Shadow"}).Draw(t, "mode"),
			strings.Join(from, ", "), strings.Join(to, ", "))
	})
}

func connectGrants(t *rapid.T) []string {
	var docs []string
	for i := range rapid.IntRange(0, 6).Draw(t, "grants") {
		docs = append(docs, connectGrant(fmt.Sprintf("g%d", i)).Draw(t, "grant"))
	}
	return docs
}

// connect sends the first bytes of a connection through the network filters, and returns what they note.
func (q *request) connect(r *Resources, endpoint segment.EndpointName) authz.Decision {
	i := slices.IndexFunc(r.Listeners[0].FilterChains, func(c *listenerv3.FilterChain) bool { return c.Name == string(endpoint) })
	var decided, noted, tried authz.Leaf
	for _, f := range r.Listeners[0].FilterChains[i].Filters {
		config := f.GetTypedConfig()
		if f.GetConfigDiscovery() != nil {
			config = discover(r, f.Name)
		}
		rbac, ok := q.open(config).(*rbacv3.RBAC)
		switch {
		case !ok: // the backend
			if noted != decided {
				q.t.Fatalf("noted is %+v, and decided %+v", noted, decided)
			}
		case rbac.ShadowMatcher != nil && rbac.ShadowRulesStatPrefix == enforcedPrefix:
			noted = q.named(rbac.ShadowMatcher)
		case rbac.ShadowMatcher != nil:
			tried = q.named(rbac.ShadowMatcher)
		}
		if ok && rbac.Matcher != nil {
			decided = q.named(rbac.Matcher)
		}
	}
	return authz.Decision{Allowed: decided.Allowed, Rule: decided.Rule, ShadowAllowed: tried.Allowed, ShadowRule: tried.Rule}
}

// named is verdict behind the question whether the caller's name is a SPIFFE ID.
func (q *request) named(m *matcherv3.Matcher) authz.Leaf {
	first := m.GetMatcherList().GetMatchers()[0]
	is := first.GetPredicate().GetSinglePredicate()
	if input, ok := q.input(is.GetInput()); ok && regexp.MustCompile(`^(?:`+is.GetValueMatch().GetSafeRegex().GetRegex()+`)$`).MatchString(input) {
		return q.verdict(first.OnMatch.GetMatcher())
	}
	return q.verdict(&matcherv3.Matcher{OnNoMatch: m.OnNoMatch})
}

// What Envoy's look-ups find for a connection is what authz.Decide says, and it is noted.
func TestConnectionsAgreeWithDecide(outer *testing.T) {
	seen := map[authz.Decision]bool{}
	rapid.Check(outer, func(t *rapid.T) {
		cfg := corpus.Assemble(t, append(wires(), connectGrants(t)...))
		policy, r := lowered(&cfg, at(t, corpus.Early), rapid.SampledFrom(slices.Sorted(maps.Keys(forms))).Draw(t, "form")) // which makes no difference here
		if err := Check(r); err != nil {
			t.Fatal(err)
		}
		for _, endpoint := range []segment.EndpointName{"wire", "line"} {
			for _, path := range []string{"/a", "/b", "/c", "/t", "/t/a", "/t/c", "/t/u", "/t/u/a", "/t/u/c", "/t/*", "/t/"} {
				ask := authz.Request{Caller: "spiffe://example.org" + path, Endpoint: endpoint, Operation: segment.Connect}
				want := authz.Decide(policy, ask)
				if strings.HasSuffix(path, "*") || strings.HasSuffix(path, "/") { // no SPIFFE ID
					want = authz.Decision{Rule: authz.DefaultDeny, ShadowRule: authz.DefaultDeny}
				}
				q := &request{t: outer, caller: ask.Caller}
				got := q.connect(r, endpoint)
				if !policy.Endpoints[endpoint].Shadowed { // then nothing is noted of it
					got.ShadowAllowed, got.ShadowRule = want.ShadowAllowed, want.ShadowRule
				}
				if got != want {
					t.Fatalf("%+v: lowered %+v, decided %+v", ask, got, want)
				}
				seen[want] = true
			}
		}
	})
	if len(seen) < 20 {
		outer.Errorf("only %d different decisions: the test shows little", len(seen))
	}
}

// A caller whose name only begins like that of one who is let in is not let in.
func TestConnectionsOfNobody(t *testing.T) {
	cfg := corpus.Assemble(t, append(wires(), "---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: all}\nspec: {from: [{trustDomain: example.org}], to: [{endpoint: wire, operations: [Connect], resources: ['*']}]}\n"))
	_, r := lowered(&cfg, time.Unix(0, 0), "written out")
	for path, want := range map[string]bool{
		"/a": true, "/a/b": true, "/.a": true, "/...": true, "/..a": true, "/a.": true, "/A_b-c": true,
		"": false, "/": false, "/a/": false, "//a": false, "/a//b": false, "/.": false, "/..": false, "/a/..": false, "/a/./b": false, "/../a": false,
		"/a,spiffe://example.org/b": false, "/a|b": false, "/a b": false, "/ä": false, "/a%2f": false, "/a\n": false, "/a\x00": false, "/*": false,
	} {
		q := &request{t: t, caller: "spiffe://example.org" + path}
		if got := q.connect(r, "wire"); got.Allowed != want {
			t.Errorf("%q: %+v", path, got)
		}
	}
	if q := (&request{t: t}); q.connect(r, "wire").Allowed {
		t.Error("nobody at all is let in")
	}
}

// The order of documents makes no difference, and a changed grant changes what decides at its endpoints and nothing else: no
// connection is moved.
func TestConnectionsChangeWhereTheyAre(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		docs := append(wires(), connectGrants(t)...)
		docs = append(docs, connectGrant("new").Draw(t, "before"))
		cfg, again := corpus.Assemble(t, docs), corpus.Assemble(t, rapid.Permutation(docs).Draw(t, "shuffled"))
		policy, before := lowered(&cfg, at(t, corpus.Early), "written out")
		_, same := lowered(&again, at(t, corpus.Early), "written out")
		if diff := changed(fingerprints(t, before), fingerprints(t, same)); diff != nil {
			t.Fatalf("other bytes: %q", diff)
		}
		edited, about := slices.Clone(docs), docs[len(docs)-1]
		backend := rapid.Bool().Draw(t, "a backend changes")
		if backend {
			edited[0] = strings.Replace(docs[0], "5432", "5499", 1)
		} else {
			edited[len(docs)-1] = connectGrant("new").Draw(t, "after")
			about += edited[len(docs)-1]
		}
		next := corpus.Assemble(t, edited)
		only := next.For(next.Gateways[0])
		after := lower(forms["written out"], &only, authz.Recompile(policy, &next, at(t, corpus.Early)), Learned{}, before)
		if err := Check(after, before); err != nil {
			t.Fatal(err)
		}
		_, anew := lowered(&next, at(t, corpus.Early), "written out")
		if diff := changed(fingerprints(t, after), fingerprints(t, anew)); diff != nil {
			t.Fatalf("made from earlier resources, these have other bytes: %q", diff)
		}
		for _, name := range changed(fingerprints(t, before), fingerprints(t, after)) {
			endpoint, _, _ := strings.Cut(strings.TrimPrefix(name, "extensions/authz/"), "/")
			switch {
			case backend && name == "assignments/endpoint/wire/one+two":
			case !backend && strings.HasPrefix(name, "extensions/authz/") && strings.Contains(about, "endpoint: "+endpoint):
			default:
				t.Fatalf("%s changes, too", name)
			}
		}
	})
}

// An endpoint that becomes one of protocol TCP, or ceases to be, shares no name with what it was: connections that began
// before end by what they began with, and find nothing there that lets them in.
func TestProtocolChanges(t *testing.T) {
	tcp := fmt.Sprintf(wireDocument, "wire", "wire", 5432)
	http := strings.Replace(tcp, "protocol: TCP", "protocol: OpenAI", 1)
	given := func(operation string) string {
		return "---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: all}\nspec: {from: [{trustDomain: example.org}], to: [{endpoint: wire, operations: [" + operation + "], resources: ['*']}]}\n"
	}
	before, after := corpus.Assemble(t, []string{tcp, given("Connect")}), corpus.Assemble(t, []string{http, given("Connect, Infer")})
	_, a := lowered(&before, time.Unix(0, 0), "written out")
	_, b := lowered(&after, time.Unix(0, 0), "written out")
	for _, x := range a.Extensions {
		if slices.ContainsFunc(b.Extensions, func(o *xt) bool { return o.Name == x.Name }) || b.Retained(x.Name, nil) != nil {
			t.Errorf("%s is there after it", x.Name)
		}
	}
	for _, x := range b.Extensions {
		if slices.ContainsFunc(a.Extensions, func(o *xt) bool { return o.Name == x.Name }) {
			t.Errorf("%s was there before it", x.Name)
		}
		if kept := a.Retained(x.Name, nil); kept != nil && strings.HasPrefix(x.Name, RightsName("wire")) {
			q := &request{t: t, state: map[string]string{stateQuestion: "=spiffe://example.org/a|Infer=", stateRequest: "Infer="}}
			if q.run(a, kept.Extension.TypedConfig); q.decided.Allowed {
				t.Errorf("a request that began before is let through: %+v", q.decided)
			}
		}
	}
}

// --- what Check refuses ---

func (v victim) proxy(change func(*tcpproxyv3.TcpProxy)) {
	filters := v.chain().Filters
	edit(v, filters[len(filters)-1].GetTypedConfig(), change)
}

func (v victim) source(n int, change func(*corev3.ExtensionConfigSource)) {
	change(v.chain().Filters[n].GetConfigDiscovery())
}

func (v victim) named(name string) *xt {
	for _, x := range v.Extensions {
		if x.Name == name {
			return x
		}
	}
	v.Fatal("no extension " + name)
	return nil
}

// connects changes what decides; what is noted goes with it.
func (v victim) connects(change func(*matcherv3.Matcher)) {
	edit(v, v.named(ConnectName("line")).TypedConfig, func(r *rbacv3.RBAC) {
		change(r.Matcher)
		r.ShadowMatcher = r.Matcher
	})
}

func (v victim) connectRBAC(change func(*rbacv3.RBAC)) {
	edit(v, v.named(ConnectName("line")).TypedConfig, change)
}

// behind is what follows for a caller whose name is one.
func behind(m *matcherv3.Matcher) *matcherv3.Matcher {
	return m.GetMatcherList().Matchers[0].OnMatch.GetMatcher()
}

var connectionMutations = []mutation{
	// The way.
	{"no rights", func(v victim) { v.chain().Filters = slices.Delete(v.chain().Filters, 1, 2) }},
	{"nothing but the backend", func(v victim) { v.chain().Filters = v.chain().Filters[2:] }},
	{"rights behind the backend", func(v victim) { f := v.chain().Filters; f[1], f[2] = f[2], f[1] }},
	{"the shadow behind rights", func(v victim) { f := v.chain().Filters; f[0], f[1] = f[1], f[0] }},
	{"one filter more", func(v victim) { f := v.chain().Filters; v.chain().Filters = append(f[:1:1], f...) }},
	{"the shadow in place of rights", func(v victim) { v.chain().Filters[1] = discoveredConnect(ConnectShadowName("line")) }},
	{"the shadow called rights", func(v victim) {
		v.named(ConnectName("line")).TypedConfig = v.named(ConnectShadowName("line")).TypedConfig
	}},
	{"rights of another endpoint", func(v victim) { v.chain().Filters[1] = discoveredConnect(ConnectName("wire")) }},
	{"rights that do not exist", func(v victim) {
		v.Extensions = slices.DeleteFunc(v.Extensions, func(x *xt) bool { return x.Name == ConnectName("line") })
	}},
	{"rights inline", func(v victim) {
		v.chain().Filters[1].ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: v.named(ConnectName("line")).TypedConfig}
	}},
	{"rights of requests", func(v victim) { v.chain().Filters[1].GetConfigDiscovery().DefaultConfig = pack(&httprbacv3.RBAC{}) }},
	{"rights that are open until they have come", func(v victim) {
		v.source(1, func(s *corev3.ExtensionConfigSource) { s.DefaultConfig = pack(&rbacv3.RBAC{StatPrefix: "missing"}) })
	}},
	{"rights without a default", func(v victim) { v.source(1, func(s *corev3.ExtensionConfigSource) { s.DefaultConfig = nil }) }},
	{"rights that are used before they have come", func(v victim) {
		v.source(1, func(s *corev3.ExtensionConfigSource) { s.ApplyDefaultConfigWithoutWarming = true })
	}},
	{"rights that may come as another filter", func(v victim) {
		v.source(1, func(s *corev3.ExtensionConfigSource) {
			s.TypeUrls = append(s.TypeUrls, typeURL(&tcpproxyv3.TcpProxy{}))
		})
	}},
	{"no client certificate", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) {
			c.RequireClientCertificate = wrapperspb.Bool(false)
			c.CommonTlsContext.GetValidationContextSdsSecretConfig().Name = "spiffe://example.org"
		})
	}},

	// The backend.
	{"a backend at once", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) { p.UpstreamConnectMode = tcpproxyv3.UpstreamConnectMode_IMMEDIATE })
	}},
	{"a backend behind the handshake", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) {
			p.UpstreamConnectMode = tcpproxyv3.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE
		})
	}},
	{"no early data", func(v victim) { v.proxy(func(p *tcpproxyv3.TcpProxy) { p.MaxEarlyDataBytes = nil }) }},
	{"another's cluster", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) {
			p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: "endpoint/wire/one+two"}
		})
	}},
	{"no such cluster", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) {
			p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: "endpoint/line/three"}
		})
	}},
	{"clusters by weight", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) {
			p.ClusterSpecifier = &tcpproxyv3.TcpProxy_WeightedClusters{WeightedClusters: &tcpproxyv3.TcpProxy_WeightedCluster{}}
		})
	}},
	{"a tunnel", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) {
			p.TunnelingConfig = &tcpproxyv3.TcpProxy_TunnelingConfig{Hostname: "x"}
		})
	}},
	{"a cluster on demand", func(v victim) { v.proxy(func(p *tcpproxyv3.TcpProxy) { p.OnDemand = &tcpproxyv3.TcpProxy_OnDemand{} }) }},
	{"no end", func(v victim) { v.proxy(func(p *tcpproxyv3.TcpProxy) { p.MaxDownstreamConnectionDuration = nil }) }},
	{"an end at random", func(v victim) {
		v.proxy(func(p *tcpproxyv3.TcpProxy) {
			p.MaxDownstreamConnectionDurationJitterPercentage = &typev3.Percent{Value: 100}
		})
	}},
	{"no idle end", func(v victim) { v.proxy(func(p *tcpproxyv3.TcpProxy) { p.IdleTimeout = durationpb.New(0) }) }},
	{"plain text over a network", func(v victim) {
		v.Assignments[0].Endpoints[0].LbEndpoints[0].GetEndpoint().Address = socketAddress("10.0.0.9", 5432)
	}},

	// What is decided.
	{"no matcher", func(v victim) { v.connectRBAC(func(r *rbacv3.RBAC) { r.Matcher, r.ShadowMatcher = nil, nil }) }},
	{"only noted", func(v victim) { v.connectRBAC(func(r *rbacv3.RBAC) { r.Matcher = nil }) }},
	{"not noted", func(v victim) { v.connectRBAC(func(r *rbacv3.RBAC) { r.ShadowMatcher = nil }) }},
	{"something else is noted", func(v victim) {
		v.connectRBAC(func(r *rbacv3.RBAC) {
			deepest(behind(r.ShadowMatcher)).OnNoMatch = verdict(rbacconfigv3.RBAC_DENY, "grant/x")
		})
	}},
	{"noted as the shadow", func(v victim) { v.connectRBAC(func(r *rbacv3.RBAC) { r.ShadowRulesStatPrefix = "" }) }},
	{"rules", func(v victim) { v.connectRBAC(func(r *rbacv3.RBAC) { r.Rules = &rbacconfigv3.RBAC{} }) }},
	{"a delay", func(v victim) { v.connectRBAC(func(r *rbacv3.RBAC) { r.DelayDeny = durationpb.New(time.Hour) }) }},
	{"every caller", func(v victim) {
		v.connectRBAC(func(r *rbacv3.RBAC) { r.Matcher = behind(r.Matcher); r.ShadowMatcher = r.Matcher })
	}},
	{"callers of any name", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) {
			m.GetMatcherList().Matchers[0].Predicate.GetSinglePredicate().GetValueMatch().GetSafeRegex().Regex = ".*"
		})
	}},
	{"names of something else", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) {
			m.GetMatcherList().Matchers[0].Predicate.GetSinglePredicate().Input = stateInput(stateClass)
		})
	}},
	{"another way in front", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) {
			list := m.GetMatcherList()
			other := proto.Clone(list.Matchers[0]).(*matcherv3.Matcher_MatcherList_FieldMatcher)
			other.OnMatch = verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")
			list.Matchers = append([]*matcherv3.Matcher_MatcherList_FieldMatcher{other}, list.Matchers...)
		})
	}},
	{"another way behind", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) { m.OnNoMatch = verdict(rbacconfigv3.RBAC_ALLOW, "grant/x") })
	}},
	{"no default deny", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) { deepest(behind(m)).OnNoMatch = verdict(rbacconfigv3.RBAC_ALLOW, "grant/x") })
	}},
	{"an Allow that no grant stands behind", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) {
			behind(m).GetMatcherTree().GetExactMatchMap().Map["x"] = verdict(rbacconfigv3.RBAC_ALLOW, "x")
		})
	}},
	{"a caller that is everybody", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) {
			deepest(behind(m)).GetMatcherTree().GetPrefixMatchMap().Map[""] = verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")
		})
	}},
	{"a look-up of something else", func(v victim) {
		v.connects(func(m *matcherv3.Matcher) { deepest(behind(m)).GetMatcherTree().Input = stateInput(stateClass) })
	}},
	{"a shadow that decides", func(v victim) {
		edit(v, v.named(ConnectShadowName("line")).TypedConfig, func(r *rbacv3.RBAC) { r.Matcher = r.ShadowMatcher })
	}},
	{"a shadow that notes what is enforced", func(v victim) {
		edit(v, v.named(ConnectShadowName("line")).TypedConfig, func(r *rbacv3.RBAC) { r.ShadowRulesStatPrefix = enforcedPrefix })
	}},
	{"a shadow that is something else", func(v victim) { v.named(ConnectShadowName("line")).TypedConfig = pack(setState()) }},
}

// connecting are good resources, whose first endpoint is line.
func connecting(t testing.TB) *Resources {
	cfg := corpus.Assemble(t, append(wires(), `---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: one}
spec: {from: [{spiffeID: 'spiffe://example.org/t/*'}, {spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: line, operations: [Connect], resources: ['*']}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: two}
spec: {mode: Shadow, from: [{spiffeID: 'spiffe://example.org/b'}], to: [{endpoint: line, operations: [Connect], resources: ['*']}]}
`))
	_, r := lowered(&cfg, time.Unix(0, 0), "written out")
	return r
}

func TestCheckRefusesConnections(t *testing.T) {
	if err := Check(connecting(t)); err != nil {
		t.Fatal(err)
	}
	for _, m := range connectionMutations {
		t.Run(m.name, func(t *testing.T) {
			r := connecting(t)
			m.change(victim{t, r})
			err := Check(r)
			if err == nil {
				t.Fatal("passes")
			}
			t.Log(strings.ReplaceAll(err.Error(), "\n", "; "))
		})
	}
}
