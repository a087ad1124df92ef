package envoy

import (
	"slices"
	"strings"
	"time"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// How a connection of protocol TCP is decided in Envoy, by network filters and at the caller's first bytes:
//
//	shadow   RBAC that enforces nothing: it notes what shadow grants would say
//	connect  RBAC: is the caller's name a SPIFFE ID? In the exact map? Its leaf. A prefix of it in the prefix map? Its
//	         leaf. Else default-deny
//	tcp      connects to a backend, and not before there are bytes that have passed
//
// A caller's leaf is that of Connect on the resource without a name, so there is no question to write and no form to choose:
// rights are one resource with one leaf for each caller. Nothing asks again later: a connection that has passed lasts until
// MaxConnectionAge at most, whatever becomes of its grant.

// ConnectName is the ECDS resource that decides at an endpoint of protocol TCP.
func ConnectName(e segment.EndpointName) string { return "authz/" + string(e) + "/connect" }

// ConnectShadowName is the one that notes what shadow grants would say.
func ConnectShadowName(e segment.EndpointName) string { return ConnectName(e) + "/shadow" }

// tcpFilter is the name of the last network filter.
const tcpFilter = "tcp"

// tcpProtocols are offered in the TLS handshake (RFC 7301) to callers and servers. Clients of Postgres insist on it when they
// begin with TLS (PostgreSQL 17, section 54.2.11); whoever asks for none, or for others, speaks without.
var tcpProtocols = []string{"postgresql"}

const (
	maxEarlyBytes = 16 << 10         // of a caller's, kept while the backend is connected to
	tcpIdle       = 10 * time.Minute // a query may be silent for long
)

// The enforced decision leaves nothing behind of what it allowed, so the same is asked as a shadow rule, which does. What it
// writes is "enforced_shadow_engine_result" and "enforced_shadow_effective_policy_id".
const enforcedPrefix = "enforced_"

// connectionFilters is the way of a connection through an endpoint of protocol TCP.
func connectionFilters(e *segment.Endpoint, g segment.Gateway) []*listenerv3.Filter {
	age := MaxConnectionAge(g.SVIDTTL)
	return []*listenerv3.Filter{
		discoveredConnect(ConnectShadowName(e.Name)),
		discoveredConnect(ConnectName(e.Name)),
		{Name: tcpFilter, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(&tcpproxyv3.TcpProxy{
			StatPrefix:                      string(e.Name),
			ClusterSpecifier:                &tcpproxyv3.TcpProxy_Cluster{Cluster: clusterName(e, allBackends(e))},
			UpstreamConnectMode:             tcpproxyv3.UpstreamConnectMode_ON_DOWNSTREAM_DATA,
			MaxEarlyDataBytes:               wrapperspb.UInt32(maxEarlyBytes),
			MaxDownstreamConnectionDuration: durationpb.New(age),
			IdleTimeout:                     durationpb.New(min(tcpIdle, age)),
			AccessLog:                       connects(e),
		})}},
	}
}

// discoveredConnect is a network filter that comes by ECDS, and denies everything until it has come.
func discoveredConnect(name string) *listenerv3.Filter {
	deny := &rbacv3.RBAC{StatPrefix: "missing", Rules: &rbacconfigv3.RBAC{}}
	source := deniesUntil()
	source.DefaultConfig, source.TypeUrls = pack(deny), []string{typeURL(deny)}
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_ConfigDiscovery{ConfigDiscovery: source}}
}

// connection makes the ECDS resources of an endpoint of protocol TCP.
func (r *Resources) connection(e *segment.Endpoint, policy *authz.Endpoint) []*corev3.TypedExtensionConfig {
	from := origin{members: r.members[e.Name]}
	tried := origin{shadowed: policy.Shadowed}
	if tried.shadowed {
		tried.members = from.members
	}
	return []*corev3.TypedExtensionConfig{
		r.extension(ConnectName(e.Name), from, func() proto.Message {
			m := connectDecisions(from, func(c *authz.Class) authz.Rights { return c.Enforced })
			return &rbacv3.RBAC{StatPrefix: "connect", Matcher: m, ShadowMatcher: m, ShadowRulesStatPrefix: enforcedPrefix}
		}),
		r.extension(ConnectShadowName(e.Name), tried, func() proto.Message {
			filter := &rbacv3.RBAC{StatPrefix: "shadow"}
			if tried.shadowed {
				filter.ShadowMatcher = connectDecisions(tried, func(c *authz.Class) authz.Rights { return c.Shadow })
			}
			return filter
		}),
	}
}

func connectDecisions(from origin, of func(*authz.Class) authz.Rights) *matcherv3.Matcher {
	exact, prefix := branches{}, branches{}
	ends := map[authz.Leaf]*matcherv3.Matcher_OnMatch{}
	for _, m := range from.members {
		leaf := of(m.class).Lookup(segment.Connect, "")
		if ends[leaf] == nil {
			ends[leaf] = decide(leaf)
		}
		exact.or(prefix, m.caller)[m.caller.Stem()] = ends[leaf]
	}
	caller := callerInput(false)
	return ofSPIFFEID(orDeny(exactly(caller, exact, longest(caller, prefix, nil))))
}

// spiffeID is what a caller's one name must be (SPIFFE-ID, section 2), as caller.lua has it for requests: Envoy's validator
// lets in whoever has several URI names, which are joined by a comma here, and any letters in them. A prefix would cover them.
const spiffeID = `spiffe://[a-z0-9._-]+(/([A-Za-z0-9_-][A-Za-z0-9._-]*|\.[A-Za-z0-9_-][A-Za-z0-9._-]*|\.\.[A-Za-z0-9._-]+))+`

// ofSPIFFEID goes on for callers whose name is one, and denies all others.
func ofSPIFFEID(next *matcherv3.Matcher) *matcherv3.Matcher {
	return orDeny(&matcherv3.Matcher{MatcherType: &matcherv3.Matcher_MatcherList_{MatcherList: &matcherv3.Matcher_MatcherList{
		Matchers: []*matcherv3.Matcher_MatcherList_FieldMatcher{{
			Predicate: &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
				SinglePredicate: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate{
					Input: callerInput(false),
					Matcher: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: &matcherv3.StringMatcher{
						MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{
							EngineType: &matcherv3.RegexMatcher_GoogleRe2{GoogleRe2: &matcherv3.RegexMatcher_GoogleRE2{}}, Regex: spiffeID}}}},
				}}},
			OnMatch: &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{Matcher: next}},
		}},
	}}})
}

// --- and once more, for Check ---

// connection reads a filter chain of protocol TCP.
func (c *checker) connection(chain *listenerv3.FilterChain) {
	e := segment.EndpointName(chain.Name)
	order := []string{ConnectShadowName(e), ConnectName(e), tcpFilter}
	if !slices.EqualFunc(chain.Filters, order, func(f *listenerv3.Filter, name string) bool { return f.Name == name }) {
		c.wrong("has other filters than %s", strings.Join(order, ", "))
		return
	}
	for i, name := range order[:2] {
		if !c.extensions[name] {
			c.wrong("filter %s does not exist", name)
		}
		if !proto.Equal(chain.Filters[i], discoveredConnect(name)) {
			c.wrong("filter %s is open until it has come, or is no RBAC", name)
		}
	}
	tcp := &tcpproxyv3.TcpProxy{}
	if !c.unpack(chain.Filters[2].GetTypedConfig(), tcp) {
		return
	}
	if to := tcp.GetCluster(); !c.clusters[to] || !strings.HasPrefix(to, "endpoint/"+string(e)+"/") {
		c.wrong("leads to cluster %q, which does not exist or is another's", to)
	}
	if tcp.UpstreamConnectMode != tcpproxyv3.UpstreamConnectMode_ON_DOWNSTREAM_DATA || tcp.MaxEarlyDataBytes.GetValue() == 0 {
		c.wrong("connects to the backend before it has decided")
	}
	if tcp.MaxDownstreamConnectionDuration.AsDuration() <= 0 || tcp.IdleTimeout.AsDuration() <= 0 {
		c.wrong("has connections that never end")
	}
	if !proto.Equal(tcp, &tcpproxyv3.TcpProxy{
		StatPrefix: tcp.StatPrefix, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: tcp.GetCluster()}, UpstreamConnectMode: tcp.UpstreamConnectMode,
		MaxEarlyDataBytes: tcp.MaxEarlyDataBytes, MaxDownstreamConnectionDuration: tcp.MaxDownstreamConnectionDuration,
		IdleTimeout: tcp.IdleTimeout, AccessLog: tcp.AccessLog,
	}) {
		c.wrong("does more with a connection than to pass it on")
	}
}

// connects demands of rights that they enforce what they note, and nothing else; of the shadow, that it enforces nothing.
func (c *checker) connects(held proto.Message, shadow bool) {
	rbac, ok := held.(*rbacv3.RBAC)
	if !ok {
		c.wrong("is no RBAC of connections, which decides nothing")
		return
	}
	want := &rbacv3.RBAC{StatPrefix: rbac.StatPrefix, ShadowMatcher: rbac.ShadowMatcher}
	if !shadow {
		want.Matcher, want.ShadowRulesStatPrefix = rbac.ShadowMatcher, enforcedPrefix
		if rbac.Matcher == nil {
			c.wrong("decides nothing, which allows everything")
		}
	}
	if !proto.Equal(rbac, want) {
		c.wrong("decides something else than it notes, or by other means")
	}
	for _, m := range []*matcherv3.Matcher{rbac.Matcher, rbac.ShadowMatcher} {
		if m == nil {
			continue
		}
		var next *matcherv3.Matcher
		if named := m.GetMatcherList().GetMatchers(); len(named) > 0 {
			next = named[0].GetOnMatch().GetMatcher()
		}
		if next == nil || !proto.Equal(m, ofSPIFFEID(next)) {
			c.wrong("takes callers whose name is no SPIFFE ID")
			continue
		}
		c.decides(next)
		for step := next; step != nil; step = step.OnNoMatch.GetMatcher() {
			if in := step.GetMatcherTree().GetInput(); step.MatcherType != nil && !proto.Equal(in, callerInput(false)) {
				c.wrong("decides by something else than the caller: %s", in.GetName())
			}
		}
	}
}
