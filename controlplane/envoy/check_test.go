package envoy

import (
	"strings"
	"testing"
	"time"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	commonmatchingv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/test/corpus"
)

// edit changes a message that is packed.
func edit[M proto.Message](t testing.TB, a *anypb.Any, change func(M)) {
	m, err := a.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	change(m.(M))
	if err := a.MarshalFrom(m); err != nil {
		t.Fatal(err)
	}
}

// victim is good resources, and how to change them at their first endpoint, chat.
type victim struct {
	testing.TB
	*Resources
}

func (v victim) chain() *listenerv3.FilterChain { return v.Listeners[0].FilterChains[0] }

func (v victim) manager(change func(*hcmv3.HttpConnectionManager)) {
	edit(v, v.chain().Filters[0].GetTypedConfig(), change)
}

func (v victim) filters(change func([]*hcmv3.HttpFilter) []*hcmv3.HttpFilter) {
	v.manager(func(m *hcmv3.HttpConnectionManager) { m.HttpFilters = change(m.HttpFilters) })
}

func (v victim) tls(change func(*tlsv3.DownstreamTlsContext)) {
	edit(v, v.chain().TransportSocket.GetTypedConfig(), change)
}

func (v victim) extension(name string) *anypb.Any {
	for _, x := range v.Extensions {
		if x.Name == "authz/chat/"+name {
			return x.TypedConfig
		}
	}
	v.Fatal("no extension " + name)
	return nil
}

func (v victim) rights(change func(*rbacv3.RBAC)) { edit(v, v.extension("rights"), change) }

// discovery changes the source of the n-th filter from behind.
func (v victim) discovery(n int, change func(*corev3.ExtensionConfigSource)) {
	v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
		change(f[len(f)-n].GetConfigDiscovery())
		return f
	})
}

func (v victim) route() *routev3.Route { return v.Routes[0].VirtualHosts[0].Routes[0] }

func onMatch(m *matcherv3.Matcher) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{Matcher: m}}
}

func verdict(action rbacconfigv3.RBAC_Action, name string) *matcherv3.Matcher_OnMatch {
	return act("decide", &rbacconfigv3.Action{Name: name, Action: action})
}

// deepest returns the last step of a chain of steps.
func deepest(m *matcherv3.Matcher) *matcherv3.Matcher {
	for m.OnNoMatch.GetMatcher() != nil {
		m = m.OnNoMatch.GetMatcher()
	}
	return m
}

// below returns a matcher that a caller prefix leads to.
func below(m *matcherv3.Matcher) *matcherv3.Matcher {
	for _, branch := range deepest(m).GetMatcherTree().GetPrefixMatchMap().GetMap() {
		return branch.GetMatcher()
	}
	return nil
}

type mutation struct {
	name   string
	change func(v victim)
}

var mutations = []mutation{
	// What must stand nowhere.
	{"RBACPerRoute on a route", func(v victim) {
		v.route().TypedPerFilterConfig["authz/chat/rights"] = pack(&rbacv3.RBACPerRoute{})
	}},
	{"RBACPerRoute on a virtual host", func(v victim) {
		v.Routes[0].VirtualHosts[0].TypedPerFilterConfig = map[string]*anypb.Any{"rights": pack(&rbacv3.RBACPerRoute{})}
	}},
	{"RBACPerRoute deep inside", func(v victim) {
		v.route().TypedPerFilterConfig["x"] = pack(&routev3.FilterConfig{Config: pack(&rbacv3.RBACPerRoute{})})
	}},
	{"RBACPerRoute in a matcher", func(v victim) {
		*v.extension("members") = *pack(&commonmatchingv3.ExtensionWithMatcher{
			XdsMatcher:      &matcherv3.Matcher{OnNoMatch: act("run", &compositev3.ExecuteFilterAction{TypedConfig: extension("x", &rbacv3.RBACPerRoute{})})},
			ExtensionConfig: extension("composite", &compositev3.Composite{})})
	}},
	{"a filter switched off for a route", func(v victim) {
		v.route().TypedPerFilterConfig["authz/chat/rights"] = pack(&routev3.FilterConfig{Disabled: true})
	}},
	{"another question for a route", func(v victim) {
		v.route().TypedPerFilterConfig[questionFilter] = pack(setState(state{stateQuestion, "a|Infer=m"}))
	}},
	{"another question for a weighted cluster", func(v victim) {
		v.route().GetRoute().ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: &routev3.WeightedCluster{
			Clusters: []*routev3.WeightedCluster_ClusterWeight{{Name: CatalogCluster, TypedPerFilterConfig: map[string]*anypb.Any{questionFilter: pack(setState())}}}}}
	}},
	{"something unknown", func(v victim) {
		v.route().TypedPerFilterConfig[extractFilter] = &anypb.Any{TypeUrl: "type.googleapis.com/x.Y"}
	}},
	{"RBAC without rules", func(v victim) { *v.extension("rights") = *pack(&rbacv3.RBAC{}) }},
	{"RBAC without rules among the filters", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			return append([]*hcmv3.HttpFilter{filter("x", &rbacv3.RBAC{})}, f...)
		})
	}},
	{"Authenticated principal", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			return append([]*hcmv3.HttpFilter{filter("x", &rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{Policies: map[string]*rbacconfigv3.Policy{"p": {
				Principals: []*rbacconfigv3.Principal{{Identifier: &rbacconfigv3.Principal_NotId{NotId: &rbacconfigv3.Principal{
					Identifier: &rbacconfigv3.Principal_Authenticated_{Authenticated: &rbacconfigv3.Principal_Authenticated{}}}}}}}}}})}, f...)
		})
	}},

	// Who may connect.
	{"no TLS", func(v victim) { v.chain().TransportSocket = nil }},
	{"no client certificate", func(v victim) { v.tls(func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = nil }) }},
	{"client certificate optional", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = wrapperspb.Bool(false) })
	}},
	{"session tickets", func(v victim) { v.tls(func(c *tlsv3.DownstreamTlsContext) { c.SessionTicketKeysType = nil }) }},
	{"session cache", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) { c.DisableStatefulSessionResumption = false })
	}},
	{"TLS 1.2", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) {
			c.CommonTlsContext.TlsParams.TlsMinimumProtocolVersion = tlsv3.TlsParameters_TLSv1_2
		})
	}},
	{"TLS by default", func(v victim) { v.tls(func(c *tlsv3.DownstreamTlsContext) { c.CommonTlsContext.TlsParams = nil }) }},
	{"no validation", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) { c.CommonTlsContext.ValidationContextType = nil })
	}},
	{"validation by other means", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) {
			c.CommonTlsContext.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{}}
		})
	}},
	{"another certificate", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) {
			c.CommonTlsContext.TlsCertificateSdsSecretConfigs[0].Name = "default"
		})
	}},
	{"connections without an end", func(v victim) {
		v.manager(func(m *hcmv3.HttpConnectionManager) { m.CommonHttpProtocolOptions.MaxConnectionDuration = nil })
	}},
	{"connections of age 0", func(v victim) {
		v.manager(func(m *hcmv3.HttpConnectionManager) {
			m.CommonHttpProtocolOptions.MaxConnectionDuration = durationpb.New(0)
		})
	}},
	{"upgrades with filters of their own", func(v victim) {
		v.manager(func(m *hcmv3.HttpConnectionManager) {
			m.UpgradeConfigs = []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}}
		})
	}},

	// Where it leads.
	{"default filter chain", func(v victim) { v.Listeners[0].DefaultFilterChain = v.chain() }},
	{"filter chain chosen by other means", func(v victim) { v.Listeners[0].FilterChainMatcher = &matcherv3.Matcher{} }},
	{"no server name", func(v victim) { v.chain().FilterChainMatch.ServerNames = nil }},
	{"no match at all", func(v victim) { v.chain().FilterChainMatch = nil }},
	{"wildcard server name", func(v victim) { v.chain().FilterChainMatch.ServerNames = []string{"*.internal"} }},
	{"same server name", func(v victim) {
		v.chain().FilterChainMatch.ServerNames = v.Listeners[0].FilterChains[1].FilterChainMatch.ServerNames
	}},
	{"no network filter", func(v victim) { v.chain().Filters = nil }},
	{"another network filter", func(v victim) { v.chain().Filters = append(v.chain().Filters, v.chain().Filters[0]) }},
	{"not an HTTP connection manager", func(v victim) {
		v.chain().Filters[0].ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(&rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{}})}
	}},
	{"routes missing", func(v victim) { v.Routes = v.Routes[1:] }},
	{"routes inline", func(v victim) {
		v.manager(func(m *hcmv3.HttpConnectionManager) {
			m.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: v.Routes[0]}
		})
	}},
	{"routes of another endpoint", func(v victim) {
		v.manager(func(m *hcmv3.HttpConnectionManager) { m.GetRds().RouteConfigName = routesName("docs", false) })
	}},
	{"every host name", func(v victim) { v.Routes[0].VirtualHosts[0].Domains = []string{"*"} }},
	{"wildcard host name", func(v victim) { v.Routes[0].VirtualHosts[0].Domains = []string{"*.internal"} }},
	{"no host name", func(v victim) { v.Routes[0].VirtualHosts[0].Domains = nil }},
	{"cluster missing", func(v victim) { v.Clusters = v.Clusters[1:] }},
	{"cluster by header", func(v victim) {
		v.route().GetRoute().ClusterSpecifier = &routev3.RouteAction_ClusterHeader{ClusterHeader: "x-to"}
	}},
	{"a copy to elsewhere", func(v victim) {
		v.route().GetRoute().RequestMirrorPolicies = []*routev3.RouteAction_RequestMirrorPolicy{{Cluster: CatalogCluster}}
	}},
	{"assignment missing", func(v victim) { v.Assignments = v.Assignments[1:] }},
	{"addresses missing", func(v victim) {
		v.Clusters[0].ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STRICT_DNS}
	}},
	{"wherever the client wanted", func(v victim) {
		v.Clusters[0].ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST}
	}},
	{"plain text over a network", func(v victim) {
		v.Assignments[0].Endpoints[0].LbEndpoints[0].GetEndpoint().Address = socketAddress("10.0.0.9", 443)
	}},
	{"plain text to a name", func(v victim) {
		v.Assignments[0].Endpoints[0].LbEndpoints[0].GetEndpoint().Address = socketAddress("models.internal", 443)
	}},

	// What decides.
	{"extension missing", func(v victim) { v.Extensions = v.Extensions[1:] }},
	{"no filter", func(v victim) { v.filters(func([]*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return nil }) }},
	{"no rights", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return append(f[:len(f)-3], f[len(f)-2:]...) })
	}},
	{"nobody counts", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return append(f[:len(f)-2], f[len(f)-1]) })
	}},
	{"what can't be counted passes", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			open := budgeted()
			open.FailureModeAllow = true
			f[len(f)-2] = filter(budgetFilter, open)
			return f
		})
	}},
	{"rights of another endpoint", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { f[len(f)-3].Name = RightsName("docs"); return f })
	}},
	{"nothing looks into the request", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return append(f[:1:1], f[2:]...) })
	}},
	{"members before extraction", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { f[1], f[3] = f[3], f[1]; return f })
	}},
	{"rights before the question", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			n := len(f)
			f[n-3], f[n-4] = f[n-4], f[n-3]
			return f
		})
	}},
	{"route chosen again behind rights", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			again := setState()
			again.ClearRouteCache = true
			n := len(f)
			return append(f[:n-1:n-1], filter("again", again), f[n-1])
		})
	}},
	{"a filter behind the router", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return append(f, filter("x", setState())) })
	}},
	{"another filter called router", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			f[len(f)-1] = filter(routerFilter, setState())
			return f
		})
	}},
	{"rights inline", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			f[len(f)-3] = filter(RightsName("chat"), &rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{}})
			return f
		})
	}},
	{"filter optional", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { f[len(f)-3].IsOptional = true; return f })
	}},
	{"filter disabled", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { f[1].Disabled = true; return f })
	}},
	{"default missing", func(v victim) { v.discovery(3, func(d *corev3.ExtensionConfigSource) { d.DefaultConfig = nil }) }},
	{"default of members missing", func(v victim) { v.discovery(5, func(d *corev3.ExtensionConfigSource) { d.DefaultConfig = nil }) }},
	{"default without rules", func(v victim) {
		v.discovery(3, func(d *corev3.ExtensionConfigSource) { d.DefaultConfig = pack(&rbacv3.RBAC{}) })
	}},
	{"default that denies nothing", func(v victim) {
		v.discovery(3, func(d *corev3.ExtensionConfigSource) {
			d.DefaultConfig = pack(&rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{Action: rbacconfigv3.RBAC_DENY}})
		})
	}},
	{"default that only logs", func(v victim) {
		v.discovery(3, func(d *corev3.ExtensionConfigSource) {
			d.DefaultConfig = pack(&rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{Action: rbacconfigv3.RBAC_LOG}})
		})
	}},
	{"default that allows something", func(v victim) {
		v.discovery(3, func(d *corev3.ExtensionConfigSource) {
			d.DefaultConfig = pack(&rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{Policies: map[string]*rbacconfigv3.Policy{"p": {}}}})
		})
	}},
	{"default with a matcher that allows", func(v victim) {
		v.discovery(3, func(d *corev3.ExtensionConfigSource) {
			d.DefaultConfig = pack(&rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{}, Matcher: &matcherv3.Matcher{OnNoMatch: verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")}})
		})
	}},
	{"default that is another filter", func(v victim) {
		v.discovery(3, func(d *corev3.ExtensionConfigSource) { d.DefaultConfig = pack(setState()) })
	}},

	// What is decided.
	{"rights that are another filter", func(v victim) { *v.extension("rights") = *pack(setState()) }},
	{"rights by rules", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) { r.Matcher, r.Rules = nil, &rbacconfigv3.RBAC{Action: rbacconfigv3.RBAC_DENY} })
	}},
	{"no default deny", func(v victim) { v.rights(func(r *rbacv3.RBAC) { deepest(r.Matcher).OnNoMatch = nil }) }},
	{"no default deny in the shadow", func(v victim) { v.rights(func(r *rbacv3.RBAC) { deepest(r.ShadowMatcher).OnNoMatch = nil }) }},
	{"no default deny below a caller prefix", func(v victim) { v.rights(func(r *rbacv3.RBAC) { deepest(below(r.Matcher)).OnNoMatch = nil }) }},
	{"default allow", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			deepest(r.Matcher).OnNoMatch = verdict(rbacconfigv3.RBAC_ALLOW, string(authz.DefaultDeny))
		})
	}},
	{"default allow below a caller prefix", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			deepest(below(r.Matcher)).OnNoMatch = verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")
		})
	}},
	{"default log", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			deepest(r.Matcher).OnNoMatch = verdict(rbacconfigv3.RBAC_LOG, string(authz.DefaultDeny))
		})
	}},
	{"default deny by another name", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) { deepest(r.Matcher).OnNoMatch = verdict(rbacconfigv3.RBAC_DENY, "no") })
	}},
	{"default that is something else", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) { deepest(r.Matcher).OnNoMatch = runFilter(setState()) })
	}},
	{"a branch without a default deny", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			r.Matcher.GetMatcherTree().GetExactMatchMap().Map["x|Infer=y"] = onMatch(exactly(stateInput(stateRequest), branches{"a": verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")}, nil))
		})
	}},
	{"a branch of nothing", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			r.Matcher.GetMatcherTree().GetExactMatchMap().Map["x|Infer=y"] = &matcherv3.Matcher_OnMatch{}
		})
	}},
	{"a branch that only logs", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			r.Matcher.GetMatcherTree().GetExactMatchMap().Map["x|Infer=y"] = verdict(rbacconfigv3.RBAC_LOG, "grant/x")
		})
	}},
	{"an Allow that no grant stands behind", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			r.Matcher.GetMatcherTree().GetExactMatchMap().Map["x|Infer=y"] = verdict(rbacconfigv3.RBAC_ALLOW, string(authz.DefaultDeny))
		})
	}},
	{"a branch for every caller", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			deepest(r.Matcher).GetMatcherTree().GetPrefixMatchMap().Map[""] = onMatch(orDeny(nil))
		})
	}},
	{"a list in place of a look-up", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			r.Matcher.MatcherType = &matcherv3.Matcher_MatcherList_{MatcherList: &matcherv3.Matcher_MatcherList{
				Matchers: []*matcherv3.Matcher_MatcherList_FieldMatcher{{OnMatch: verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")}}}}
		})
	}},
	{"a custom look-up", func(v victim) {
		v.rights(func(r *rbacv3.RBAC) {
			r.Matcher.GetMatcherTree().TreeType = &matcherv3.Matcher_MatcherTree_CustomMatch{CustomMatch: act("x", &rbacconfigv3.Action{}).GetAction()}
		})
	}},
}

// shards are mutations of rights that are kept apart.
var shards = []mutation{
	{"a choice by something else", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) { m.GetMatcherTree().Input = stateInput(stateName) })
	}},
	{"a choice of nothing", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) { m.MatcherType = nil })
	}},
	{"a choice that is not the end", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) {
			for _, branch := range m.GetMatcherTree().GetPrefixMatchMap().Map {
				branch.KeepMatching = true
			}
		})
	}},
	{"a choice with an open end", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) { m.OnNoMatch = nil })
	}},
	{"a choice that ends in an allow", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) {
			m.OnNoMatch = runFilter(&rbacv3.RBAC{Matcher: &matcherv3.Matcher{OnNoMatch: verdict(rbacconfigv3.RBAC_ALLOW, "grant/x")}})
		})
	}},
	{"a choice that ends in no RBAC", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) { m.OnNoMatch = runFilter(setState()) })
	}},
	{"a choice that ends in an RBAC without rules", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) { m.OnNoMatch = runFilter(&rbacv3.RBAC{}) })
	}},
	{"a choice of an inline filter", func(v victim) {
		v.choose(func(_ string, run *compositev3.ExecuteFilterAction) {
			run.DynamicConfig, run.TypedConfig = nil, extension("run", &rbacv3.RBAC{Matcher: orDeny(nil)})
		})
	}},
	{"a choice that is taken at times", func(v victim) {
		v.choose(func(_ string, run *compositev3.ExecuteFilterAction) {
			run.SamplePercent = &corev3.RuntimeFractionalPercent{}
		})
	}},
	{"rights that do not exist", func(v victim) {
		v.choose(func(_ string, run *compositev3.ExecuteFilterAction) { run.DynamicConfig.Name += "x" })
	}},
	{"the rights of another caller", func(v victim) {
		v.choice(func(m *matcherv3.Matcher) {
			to := m.GetMatcherTree().GetPrefixMatchMap().Map
			names := sortedKeys(to)
			to[names[0]] = to[names[1]]
		})
	}},
	{"the rights of another endpoint", func(v victim) {
		v.choose(func(prefix string, run *compositev3.ExecuteFilterAction) {
			run.DynamicConfig.Name = "authz/open/rights/all/" + prefix
		})
	}},
	{"rights that are open until they have come", func(v victim) {
		v.choose(func(_ string, run *compositev3.ExecuteFilterAction) {
			run.DynamicConfig.ConfigDiscovery.DefaultConfig = pack(&rbacv3.RBAC{})
		})
	}},
	{"rights that may come as another filter", func(v victim) {
		v.choose(func(_ string, run *compositev3.ExecuteFilterAction) {
			run.DynamicConfig.ConfigDiscovery.TypeUrls = append(run.DynamicConfig.ConfigDiscovery.TypeUrls, typeURL(&luav3.Lua{}))
		})
	}},
	{"an open shard", func(v victim) {
		for _, x := range v.Extensions {
			if strings.HasPrefix(x.Name, "authz/chat/rights/") {
				edit(v, x.TypedConfig, func(r *rbacv3.RBAC) { r.Matcher = nil })
			}
		}
	}},
	{"a shard that is a choice", func(v victim) {
		for _, x := range v.Extensions {
			if strings.HasPrefix(x.Name, "authz/chat/rights/") {
				x.TypedConfig = pack(matched(orDeny(nil)))
			}
		}
	}},
}

func (v victim) choice(change func(*matcherv3.Matcher)) {
	v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
		edit(v, f[len(f)-3].GetTypedConfig(), func(x *commonmatchingv3.ExtensionWithMatcher) { change(x.XdsMatcher) })
		return f
	})
}

func (v victim) choose(change func(prefix string, run *compositev3.ExecuteFilterAction)) {
	v.choice(func(m *matcherv3.Matcher) {
		for prefix, branch := range m.GetMatcherTree().GetPrefixMatchMap().Map {
			edit(v, branch.GetAction().TypedConfig, func(run *compositev3.ExecuteFilterAction) { change(prefix, run) })
		}
	})
}

func good(t rapid.TB) *Resources { return goodIn(t, "written out") }

func goodIn(t rapid.TB, form string) *Resources {
	cfg := corpus.Assemble(t, append(corpus.Endpoints(), `---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: one}
spec: {from: [{spiffeID: 'spiffe://example.org/t/*'}, {spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: chat, operations: [Infer], resources: [a, ab]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: two}
spec: {mode: Shadow, from: [{spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: chat, operations: [Infer], resources: [b]}]}
`))
	_, r := lowered(&cfg, time.Unix(0, 0), form)
	return r
}

func TestCheckRefuses(t *testing.T) {
	if err := Check(good(t)); err != nil {
		t.Fatal(err)
	}
	if err := Check(&Resources{}); err != nil {
		t.Fatal(err)
	}
	if err := Check(goodIn(t, "shards")); err != nil {
		t.Fatal(err)
	}
	refuses := func(form string, mutations []mutation) {
		for _, m := range mutations {
			t.Run(m.name, func(t *testing.T) {
				r := goodIn(t, form)
				m.change(victim{t, r})
				err := Check(r)
				if err == nil {
					t.Fatal("passes")
				}
				t.Log(strings.ReplaceAll(err.Error(), "\n", "; "))
			})
		}
	}
	refuses("written out", mutations)
	refuses("shards", shards)
}
