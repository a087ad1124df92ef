package envoy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	commonmatchingv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// Check reads what was lowered once more, knowing nothing of how it came about, and returns everything that would
// open something or break something. What does not pass is never published.
//
// What is also in resources that have passed is not read again: it is the same pointer, nothing is changed once it was
// lowered, and what an extension has to be follows from itself alone. Of a route it is read again where it leads. What a
// listener has to be follows from it and from what else there is by which name, so it is read again unless that is the same.
func Check(r *Resources, passed ...*Resources) error {
	c := &checker{
		clusters:    map[string]bool{CatalogCluster: true},
		assignments: map[string]*endpointv3.ClusterLoadAssignment{},
		routes:      map[string]bool{},
		extensions:  map[string]bool{},
	}
	for _, x := range r.Clusters {
		c.clusters[x.Name] = true
	}
	for _, x := range r.Assignments {
		c.assignments[x.ClusterName] = x
	}
	for _, x := range r.Routes {
		c.routes[x.Name] = true
	}
	for _, x := range r.Extensions {
		c.extensions[x.Name] = true
	}
	for _, x := range r.Clusters {
		c.cluster(x)
	}
	known := map[proto.Message]bool{}
	for _, p := range passed {
		for _, x := range p.Extensions {
			known[x] = true
		}
		for _, x := range p.Routes {
			known[x] = true
		}
	}
	for _, x := range r.Routes {
		c.route(x, known[x])
	}
	for _, x := range r.Extensions {
		if known[x] {
			continue
		}
		c.at = "extension " + x.Name
		held, err := x.GetTypedConfig().UnmarshalNew()
		if err != nil {
			c.wrong("holds something unknown: %v", err)
			continue
		}
		c.opened = map[string]map[string]proto.Message{}
		c.everywhere(held)
		if parts := strings.SplitN(x.Name, "/", 4); len(parts) > 2 {
			switch parts[2] {
			case "rights":
				c.rights(held)
			case "connect":
				c.connects(held, len(parts) > 3)
			}
		}
		if strings.HasPrefix(x.Name, TokensName("")) {
			c.verifies(held)
		}
	}
	c.opened = nil
	for _, x := range r.Listeners {
		if !slices.ContainsFunc(passed, func(p *Resources) bool { return slices.Contains(p.Listeners, x) && sameNames(r, p) }) {
			c.listener(x)
		}
	}
	return errors.Join(c.found...)
}

// sameNames reports whether all that listeners refer to is there by the same names.
func sameNames(a, b *Resources) bool {
	return slices.EqualFunc(a.Extensions, b.Extensions, func(x, y *corev3.TypedExtensionConfig) bool { return x.Name == y.Name }) &&
		slices.EqualFunc(a.Routes, b.Routes, func(x, y *routev3.RouteConfiguration) bool { return x.Name == y.Name }) &&
		slices.EqualFunc(a.Clusters, b.Clusters, func(x, y *clusterv3.Cluster) bool { return x.Name == y.Name })
}

type checker struct {
	clusters, routes, extensions map[string]bool
	assignments                  map[string]*endpointv3.ClusterLoadAssignment

	at    string // what is being read
	found []error

	// Of one extension: what it holds, by type and by encoding. There is little in many leaves that differs.
	opened map[string]map[string]proto.Message
}

func (c *checker) wrong(format string, args ...any) {
	c.found = append(c.found, fmt.Errorf("%s: %s", c.at, fmt.Sprintf(format, args...)))
}

func (c *checker) cluster(x *clusterv3.Cluster) {
	c.at = "cluster " + x.Name
	c.everywhere(x)
	var load *endpointv3.ClusterLoadAssignment
	switch x.GetType() {
	case clusterv3.Cluster_EDS:
		load = c.assignments[x.Name]
	case clusterv3.Cluster_STRICT_DNS:
		load = x.GetLoadAssignment()
	}
	if len(load.GetEndpoints()) == 0 {
		c.wrong("has no addresses")
	}
	for _, group := range load.GetEndpoints() {
		for _, e := range group.GetLbEndpoints() {
			host := e.GetEndpoint().GetAddress().GetSocketAddress().GetAddress()
			if ip, err := netip.ParseAddr(host); x.TransportSocket == nil && host != "localhost" && (err != nil || !ip.IsLoopback()) {
				c.wrong("is spoken to in plain text, and %s is not on this machine", host)
			}
		}
	}
}

// route looks, at one that is known, only at what depends on others.
func (c *checker) route(x *routev3.RouteConfiguration, known bool) {
	c.at = "routes " + x.Name
	if !known {
		c.everywhere(x)
	}
	for _, host := range x.VirtualHosts {
		if !exactNames(host.Domains) {
			c.wrong("takes other host names than those that are named")
		}
		for _, route := range host.Routes {
			if name := route.GetRoute().GetCluster(); route.GetRoute() != nil && !c.clusters[name] {
				c.wrong("route %s leads to cluster %q, which does not exist", route.Name, name)
			}
			if !known {
				c.endless(route)
			}
		}
	}
}

// endless demands that a request passes before its end only if it is a call of gRPC or a WebSocket, nothing looks into what
// follows, and it has an end nevertheless; and that nothing is upgraded to but such a WebSocket.
func (c *checker) endless(x *routev3.Route) {
	upgrades := x.GetRoute().GetUpgradeConfigs()
	off := x.TypedPerFilterConfig[bodyFilter]
	context := &luav3.LuaPerRoute{}
	if look := x.TypedPerFilterConfig[extractFilter]; look != nil && !c.unpack(look, context) {
		return
	}
	words := strings.Fields(context.GetFilterContext().GetFields()["from"].GetStringValue())
	c.rpc(x, words, context.GetFilterContext())
	if off == nil && upgrades == nil && !slices.Contains(words, wordEndless) {
		return
	}
	if !proto.Equal(off, pack(bufferOff())) {
		c.wrong("route %s has another body filter, or none that lets it pass", x.Name)
	}
	for _, word := range words {
		if slices.Contains(bodyReaders, word) {
			c.wrong("route %s looks into a body that does not end", x.Name)
		}
	}
	socket := len(upgrades) == 1 && proto.Equal(upgrades[0], &routev3.RouteAction_UpgradeConfig{UpgradeType: upgradeType})
	if upgrades != nil && !socket {
		c.wrong("route %s is upgraded to something else than a WebSocket", x.Name)
	}
	if !socket && !slices.ContainsFunc(x.GetMatch().GetHeaders(), func(h *routev3.HeaderMatcher) bool { return proto.Equal(h, grpcContent()) }) {
		c.wrong("route %s takes endless requests that are neither gRPC nor a WebSocket", x.Name)
	}
	if x.GetRoute() == nil {
		return
	}
	if most := x.GetRoute().GetMaxStreamDuration(); most.GetMaxStreamDuration().AsDuration() <= 0 ||
		most.GrpcTimeoutHeaderMax == nil || most.GrpcTimeoutHeaderMax.AsDuration() != 0 || most.GrpcTimeoutHeaderOffset != nil ||
		!slices.Contains(words, wordEndless) {
		c.wrong("route %s has streams that outlive their certificate", x.Name)
	}
}

func (c *checker) listener(x *listenerv3.Listener) {
	c.at = "listener " + x.Name
	c.everywhere(x)
	if x.DefaultFilterChain != nil || x.FilterChainMatcher != nil {
		c.wrong("has a filter chain that is not chosen by its server names")
	}
	taken := map[string]string{}
	for _, chain := range x.FilterChains {
		c.at = "listener " + x.Name + ", filter chain " + chain.Name
		if !exactNames(chain.GetFilterChainMatch().GetServerNames()) {
			c.wrong("matches other server names than those that are named")
		}
		for _, name := range chain.GetFilterChainMatch().GetServerNames() {
			if taken[name] != "" {
				c.wrong("and filter chain %s have the same server name %s", taken[name], name)
			}
			taken[name] = chain.Name
		}
		tokens := c.downstream(chain.TransportSocket.GetTypedConfig())
		if n := len(chain.Filters); n > 0 && chain.Filters[n-1].GetTypedConfig().MessageIs(&tcpproxyv3.TcpProxy{}) {
			if !tokens.IsZero() {
				c.wrong("requires no client certificate, and nobody asks for tokens")
			}
			c.connection(chain)
			continue
		}
		if len(chain.Filters) != 1 {
			c.wrong("has %d network filters, not one", len(chain.Filters))
			continue
		}
		manager := &hcmv3.HttpConnectionManager{}
		if !c.unpack(chain.Filters[0].GetTypedConfig(), manager) {
			continue
		}
		endpoint := segment.EndpointName(chain.Name)
		if name := manager.GetRds().GetRouteConfigName(); name != routesName(endpoint, !tokens.IsZero()) || !c.routes[name] {
			c.wrong("has routes %q, which do not exist or are another's", name)
		}
		if len(manager.UpgradeConfigs) > 0 {
			c.wrong("has upgrades, which go by filters of their own")
		}
		if manager.GetCommonHttpProtocolOptions().GetMaxConnectionDuration().AsDuration() <= 0 {
			c.wrong("has connections that never end")
		}
		c.filters(endpoint, tokens, manager.HttpFilters)
	}
}

// exactNames reports whether there are names, and each is one.
func exactNames(names []string) bool {
	return len(names) > 0 && !slices.ContainsFunc(names, func(s string) bool { return s == "" || strings.Contains(s, "*") })
}

// downstream returns the trust domain whose members need no client certificate; then they need a token, and the filters must
// see to it. Zero: everybody needs one.
func (c *checker) downstream(socket *anypb.Any) (tokens spiffeid.TrustDomain) {
	tls := &tlsv3.DownstreamTlsContext{}
	if !c.unpack(socket, tls) {
		return tokens
	}
	if !tls.GetDisableStatelessSessionResumption() || !tls.GetDisableStatefulSessionResumption() {
		c.wrong("resumes sessions, which skips the validation of certificates")
	}
	common := tls.GetCommonTlsContext()
	if common.GetTlsParams().GetTlsMinimumProtocolVersion() != tlsv3.TlsParameters_TLSv1_3 {
		c.wrong("allows less than TLS 1.3")
	}
	s := common.GetTlsCertificateSdsSecretConfigs()
	if len(s) != 1 {
		c.wrong("has another certificate than an SVID")
		return tokens
	}
	own, err := spiffeid.FromString(s[0].Name)
	if err != nil {
		c.wrong("has another certificate than an SVID: %v", err)
		return tokens
	}
	validation := validationSecret
	if !tls.GetRequireClientCertificate().GetValue() {
		tokens, validation = own.TrustDomain(), own.TrustDomain().IDString()
	}
	if common.GetValidationContextSdsSecretConfig().GetName() != validation {
		c.wrong("does not validate SPIFFE IDs")
	}
	return tokens
}

// filters demands: every discovered filter exists and denies while it is missing, rights come after all that
// prepare the question, in its order, and before the budget and the router, which come last.
func (c *checker) filters(endpoint segment.EndpointName, own spiffeid.TrustDomain, filters []*hcmv3.HttpFilter) {
	n, tokens := len(filters), !own.IsZero()
	members, rights := MembersName(endpoint)+told(tokens), RightsName(endpoint)
	if classes := ClassesName(endpoint) + told(tokens); c.extensions[classes] {
		members, rights = classes, ClassRightsName(endpoint)
	}
	if n < 3 || !filters[n-1].GetTypedConfig().MessageIs(&routerv3.Router{}) || filters[n-3].Name != rights {
		c.wrong("does not decide directly before it counts and forwards")
	} else if filters[n-3].GetConfigDiscovery() == nil {
		c.chooses(endpoint, tokens, filters[n-3].GetTypedConfig())
	}
	if n >= 2 && !proto.Equal(filters[n-2].GetTypedConfig(), pack(budgeted())) {
		c.wrong("does not ask whether a request is within its budget")
	}
	order := []string{bodyFilter, extractFilter, judgedFilter, members, questionFilter, rights, budgetFilter, routerFilter}
	if c.extensions[NamesName(endpoint)] {
		order = slices.Insert(order, 4, NamesName(endpoint))
	}
	if tokens {
		order = slices.Insert(order, 0, TokensName(endpoint), callerFilter)
		if n < 2 || !proto.Equal(filters[1].GetTypedConfig(), pack(identifier(own))) {
			c.wrong("requires no client certificate, and lets in whoever has no token either")
		}
	}
	if !slices.EqualFunc(filters, order, func(f *hcmv3.HttpFilter, name string) bool { return f.Name == name }) {
		c.wrong("has other filters than %s", strings.Join(order, ", "))
	}
	for _, f := range filters {
		d := f.GetConfigDiscovery()
		if f.IsOptional || f.Disabled {
			c.wrong("filter %s may be left out", f.Name)
		}
		if d == nil {
			continue
		}
		if !c.extensions[f.Name] {
			c.wrong("filter %s does not exist", f.Name)
		}
		deny := &rbacv3.RBAC{}
		if c.unpack(d.DefaultConfig, deny) && !proto.Equal(deny, &rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{}}) {
			c.wrong("filter %s is open until it has come", f.Name)
		}
	}
}

func (c *checker) rights(held proto.Message) {
	rbac, ok := held.(*rbacv3.RBAC)
	if !ok {
		c.wrong("is no RBAC, which decides nothing")
		return
	}
	if rbac.Matcher == nil {
		c.wrong("decides nothing, which allows everything")
		return
	}
	c.decides(rbac.Matcher)
	if rbac.ShadowMatcher != nil {
		c.decides(rbac.ShadowMatcher)
	}
}

// verifies demands that claims are believed only if they are for this endpoint, have an end, are of somebody who may speak
// of the caller that they stand for, and are signed by a key that was sent along.
func (c *checker) verifies(held proto.Message) {
	filter, ok := held.(*jwtv3.JwtAuthentication)
	if !ok {
		c.wrong("verifies no tokens")
		return
	}
	for name, p := range filter.Providers {
		how, stem, _ := strings.Cut(p.PayloadInMetadata, ":")
		subjects := p.GetSubjects().GetPrefix()
		switch {
		case how == "svid" && (subjects != stem || p.Issuer != ""), how == "subject" && p.Issuer == "", how != "svid" && how != "subject",
			!strings.HasPrefix(stem, "spiffe://") || !strings.HasSuffix(stem, "/"):
			c.wrong("believes claims of %s that it can't make", name)
		case len(p.Audiences) == 0 || slices.Contains(p.Audiences, ""):
			c.wrong("takes tokens of %s that are for anybody", name)
		case !p.RequireExpiration || p.ClockSkewSeconds != 1:
			c.wrong("takes tokens of %s that have no end, or have had it", name)
		case p.GetLocalJwks().GetInlineString() == "":
			c.wrong("has no keys of %s", name)
		case len(p.FromHeaders) != 1 || len(p.FromParams)+len(p.FromCookies) > 0 || p.Forward || p.ForwardPayloadHeader != "" || len(p.ClaimToHeaders) > 0:
			c.wrong("takes tokens of %s from where they are no secret, or passes them on", name)
		}
	}
	if len(filter.Rules) != 1 || len(filter.RequirementMap) > 0 || filter.FilterStateRules != nil || filter.BypassCorsPreflight {
		c.wrong("does not look at the tokens of all requests")
	}
}

// chooses demands that a caller is led to one of this endpoint's rights by its own name, and everybody else to the default deny.
func (c *checker) chooses(endpoint segment.EndpointName, tokens bool, filter *anypb.Any) {
	choice := &commonmatchingv3.ExtensionWithMatcher{}
	if !c.unpack(filter, choice) {
		return
	}
	if !choice.GetExtensionConfig().GetTypedConfig().MessageIs(&compositev3.Composite{}) {
		c.wrong("runs something else than what it chooses")
	}
	tree := choice.GetXdsMatcher().GetMatcherTree()
	if !proto.Equal(tree.GetInput(), callerInput(tokens)) {
		c.wrong("chooses by something else than the caller")
	}
	run := func(on *matcherv3.Matcher_OnMatch) *compositev3.ExecuteFilterAction {
		opened, _, err := c.open(on.GetAction().GetTypedConfig())
		action, ok := opened.(*compositev3.ExecuteFilterAction)
		if !ok || on.KeepMatching {
			c.wrong("is not what it should be: %v", cmp.Or(err, errors.New("no ExecuteFilterAction that is the end")))
			return nil
		}
		if action.SamplePercent != nil || action.FilterChain != nil || action.FilterChainName != "" {
			c.wrong("may run something else than rights")
		}
		return action
	}
	prefixes := tree.GetPrefixMatchMap().GetMap()
	if len(prefixes) == 0 {
		c.wrong("chooses nothing")
	}
	for prefix, branch := range prefixes {
		dynamic := run(branch).GetDynamicConfig()
		e, begins, ok := shardOf(dynamic.GetName())
		if !ok || e != endpoint || !c.extensions[dynamic.GetName()] || begins != prefix {
			c.wrong("leads %q to %q, which does not exist or is another's", prefix, dynamic.GetName())
		}
		if !proto.Equal(dynamic.GetConfigDiscovery(), deniesUntil()) {
			c.wrong("leads %q to something that is open until it has come, or is no RBAC", prefix)
		}
	}
	deny := &rbacv3.RBAC{}
	if c.unpack(run(choice.GetXdsMatcher().GetOnNoMatch()).GetTypedConfig().GetTypedConfig(), deny) {
		if deny.Matcher.GetMatcherType() != nil {
			c.wrong("does not end in the default deny")
		}
		c.rights(deny)
	}
}

// decides demands that every way through a matcher ends in a verdict: a name that is found in that of a grant, all
// others in the default deny.
func (c *checker) decides(m *matcherv3.Matcher) {
	for {
		tree := m.GetMatcherTree()
		exact, prefix := tree.GetExactMatchMap().GetMap(), tree.GetPrefixMatchMap().GetMap()
		if m.MatcherType != nil && len(exact)+len(prefix) == 0 {
			c.wrong("decides by something else than a look-up")
		}
		if prefix[""] != nil {
			c.wrong("has a branch that everything takes")
		}
		for _, branches := range []branches{exact, prefix} {
			for _, branch := range branches {
				switch {
				case branch.KeepMatching:
					c.wrong("has a branch that is not the end")
				case branch.GetMatcher() != nil:
					c.decides(branch.GetMatcher())
				default:
					c.verdict(branch.GetAction())
				}
			}
		}
		next := m.OnNoMatch.GetMatcher()
		if next == nil {
			break
		}
		m = next
	}
	action := &rbacconfigv3.Action{Name: string(authz.DefaultDeny), Action: rbacconfigv3.RBAC_DENY}
	if !proto.Equal(c.verdict(m.OnNoMatch.GetAction()), action) {
		c.wrong("does not end in the default deny")
	}
}

// verdict demands that an action allows by a grant or denies by a rule, and returns it.
func (c *checker) verdict(x *xdscorev3.TypedExtensionConfig) *rbacconfigv3.Action {
	opened, _, err := c.open(x.GetTypedConfig())
	action, ok := opened.(*rbacconfigv3.Action)
	if !ok {
		c.wrong("is not what it should be: %v", cmp.Or(err, errors.New("no Action")))
		return nil
	}
	allowed := action.Action == rbacconfigv3.RBAC_ALLOW && strings.HasPrefix(action.Name, string(authz.RuleOf("")))
	denied := action.Action == rbacconfigv3.RBAC_DENY && action.Name != ""
	if !allowed && !denied {
		c.wrong("has a verdict %s by %q", action.Action, action.Name)
	}
	return action
}

// open unpacks what an extension holds, and tells whether the same has been opened in it before.
func (c *checker) open(a *anypb.Any) (m proto.Message, before bool, err error) {
	if m = c.opened[a.GetTypeUrl()][string(a.GetValue())]; m != nil {
		return m, true, nil
	}
	if m, err = a.UnmarshalNew(); err != nil {
		return nil, false, err
	}
	if c.opened != nil {
		if c.opened[a.TypeUrl] == nil {
			c.opened[a.TypeUrl] = map[string]proto.Message{}
		}
		c.opened[a.TypeUrl][string(a.Value)] = m
	}
	return m, false, nil
}

func (c *checker) unpack(a *anypb.Any, into proto.Message) bool {
	if err := a.UnmarshalTo(into); err != nil {
		c.wrong("is not what it should be: %v", err)
		return false
	}
	return true
}

// everywhere looks for what must stand nowhere, however deep.
func (c *checker) everywhere(m proto.Message) {
	if x, ok := m.(interface {
		GetTypedPerFilterConfig() map[string]*anypb.Any
	}); ok {
		_, route := m.(*routev3.Route)
		for name := range x.GetTypedPerFilterConfig() {
			if name != extractFilter && !(route && name == bodyFilter) { // which endless looks at
				c.wrong("makes filter %s another one", name)
			}
		}
	}
	switch x := m.(type) {
	case *routev3.FilterConfig:
		c.wrong("has a FilterConfig, which can switch a filter off")
	case *routev3.RouteAction_RequestMirrorPolicy:
		c.wrong("sends copies of requests elsewhere")
	case *rbacv3.RBACPerRoute:
		c.wrong("has an RBACPerRoute, which can switch authorization off")
	case *rbacv3.RBAC:
		if x.Rules == nil && x.Matcher == nil {
			c.wrong("has an RBAC without rules, which allows everything")
		}
	case *rbacconfigv3.Principal:
		if _, is := x.Identifier.(*rbacconfigv3.Principal_Authenticated_); is {
			c.wrong("has an Authenticated principal, which admits callers by DNS names or without a certificate")
		}
	case *matcherv3.Matcher_OnMatch: // no other message is so frequent; the rest of an action is its name
		if held := x.GetAction().GetTypedConfig(); held != nil {
			c.everywhere(held)
			return
		}
	case *anypb.Any:
		inner, before, err := c.open(x)
		if err != nil {
			c.wrong("holds something unknown: %v", err)
			return
		}
		if !before {
			c.everywhere(inner)
		}
		return
	}
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					c.everywhere(v.Message().Interface())
					return true
				})
			}
		case f.IsList():
			if f.Message() != nil {
				for i := range v.List().Len() {
					c.everywhere(v.List().Get(i).Message().Interface())
				}
			}
		case f.Message() != nil:
			c.everywhere(v.Message().Interface())
		}
		return true
	})
}
