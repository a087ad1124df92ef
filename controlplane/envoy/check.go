package envoy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/authz"
)

// Check reads what was lowered once more, knowing nothing of how it came about, and returns everything that would
// open something or break something. What does not pass is never published.
func Check(r *Resources) error {
	c := &checker{
		clusters:    map[string]bool{CatalogCluster: true},
		assignments: map[string]bool{},
		routes:      map[string]bool{},
		extensions:  map[string]bool{},
	}
	for _, x := range r.Clusters {
		c.clusters[x.Name] = true
	}
	for _, x := range r.Assignments {
		c.assignments[x.ClusterName] = true
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
	for _, x := range r.Routes {
		c.route(x)
	}
	for _, x := range r.Extensions {
		c.at = "extension " + x.Name
		c.everywhere(x)
		if strings.HasSuffix(x.Name, "/rights") {
			c.rights(x.TypedConfig)
		}
	}
	for _, x := range r.Listeners {
		c.listener(x)
	}
	return errors.Join(c.found...)
}

type checker struct {
	clusters, assignments, routes, extensions map[string]bool

	at    string // what is being read
	found []error
}

func (c *checker) wrong(format string, args ...any) {
	c.found = append(c.found, fmt.Errorf("%s: %s", c.at, fmt.Sprintf(format, args...)))
}

func (c *checker) cluster(x *clusterv3.Cluster) {
	c.at = "cluster " + x.Name
	c.everywhere(x)
	if x.GetType() == clusterv3.Cluster_EDS && !c.assignments[x.Name] {
		c.wrong("has no addresses")
	}
}

func (c *checker) route(x *routev3.RouteConfiguration) {
	c.at = "routes " + x.Name
	c.everywhere(x)
	for _, host := range x.VirtualHosts {
		if slices.Contains(host.Domains, "*") {
			c.wrong("takes every host name")
		}
		for _, route := range host.Routes {
			if name := route.GetRoute().GetCluster(); route.GetRoute() != nil && !c.clusters[name] {
				c.wrong("route %s leads to cluster %q, which does not exist", route.Name, name)
			}
		}
	}
}

func (c *checker) listener(x *listenerv3.Listener) {
	c.at = "listener " + x.Name
	c.everywhere(x)
	if x.DefaultFilterChain != nil {
		c.wrong("has a filter chain for every server name")
	}
	taken := map[string]string{}
	for _, chain := range x.FilterChains {
		c.at = "listener " + x.Name + ", filter chain " + chain.Name
		if len(chain.GetFilterChainMatch().GetServerNames()) == 0 {
			c.wrong("matches every server name")
		}
		for _, name := range chain.GetFilterChainMatch().GetServerNames() {
			if taken[name] != "" {
				c.wrong("and filter chain %s have the same server name %s", taken[name], name)
			}
			taken[name] = chain.Name
		}
		c.downstream(chain.TransportSocket.GetTypedConfig())
		if len(chain.Filters) != 1 {
			c.wrong("has %d network filters, not one", len(chain.Filters))
			continue
		}
		manager := &hcmv3.HttpConnectionManager{}
		if !c.unpack(chain.Filters[0].GetTypedConfig(), manager) {
			continue
		}
		if name := manager.GetRds().GetRouteConfigName(); !c.routes[name] {
			c.wrong("has routes %q, which do not exist", name)
		}
		if manager.GetCommonHttpProtocolOptions().GetMaxConnectionDuration().AsDuration() <= 0 {
			c.wrong("has connections that never end")
		}
		c.filters(manager.HttpFilters)
	}
}

func (c *checker) downstream(socket *anypb.Any) {
	tls := &tlsv3.DownstreamTlsContext{}
	if !c.unpack(socket, tls) {
		return
	}
	if !tls.GetRequireClientCertificate().GetValue() {
		c.wrong("does not require a client certificate")
	}
	if !tls.GetDisableStatelessSessionResumption() || !tls.GetDisableStatefulSessionResumption() {
		c.wrong("resumes sessions, which skips the validation of certificates")
	}
	common := tls.GetCommonTlsContext()
	if common.GetTlsParams().GetTlsMinimumProtocolVersion() != tlsv3.TlsParameters_TLSv1_3 {
		c.wrong("allows less than TLS 1.3")
	}
	if common.GetValidationContextSdsSecretConfig().GetName() != validationSecret {
		c.wrong("does not validate SPIFFE IDs")
	}
	if s := common.GetTlsCertificateSdsSecretConfigs(); len(s) != 1 || !strings.HasPrefix(s[0].Name, "spiffe://") {
		c.wrong("has another certificate than an SVID")
	}
}

// filters demands: every discovered filter exists and denies while it is missing, rights come after all that
// prepare the question and directly before the router, which comes last.
func (c *checker) filters(filters []*hcmv3.HttpFilter) {
	n := len(filters)
	if n < 2 || filters[n-1].Name != routerFilter || !strings.HasSuffix(filters[n-2].Name, "/rights") || filters[n-2].GetConfigDiscovery() == nil {
		c.wrong("does not decide directly before it forwards")
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
		if c.unpack(d.DefaultConfig, deny) && (deny.Rules == nil || len(deny.Rules.Policies) != 0 || deny.Rules.Action != rbacconfigv3.RBAC_ALLOW) {
			c.wrong("filter %s is open until it has come", f.Name)
		}
	}
}

func (c *checker) rights(config *anypb.Any) {
	rbac := &rbacv3.RBAC{}
	if !c.unpack(config, rbac) {
		return
	}
	if rbac.Matcher == nil {
		c.wrong("decides nothing, which allows everything")
		return
	}
	for _, m := range []*matcherv3.Matcher{rbac.Matcher, rbac.ShadowMatcher} {
		if m != nil && !c.ends(m) {
			c.wrong("does not end in the default deny")
		}
	}
}

// ends reports whether whatever matches nothing is denied, all the way down.
func (c *checker) ends(m *matcherv3.Matcher) bool {
	for ; m != nil; m = m.OnNoMatch.GetMatcher() {
		tree := m.GetMatcherTree()
		for _, branch := range tree.GetPrefixMatchMap().GetMap() {
			if below := branch.GetMatcher(); below != nil && !c.ends(below) {
				return false
			}
		}
		if act := m.OnNoMatch.GetAction(); act != nil {
			action := &rbacconfigv3.Action{}
			return c.unpack(act.TypedConfig, action) && action.Action == rbacconfigv3.RBAC_DENY && action.Name == string(authz.DefaultDeny)
		}
	}
	return false
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
	switch x := m.(type) {
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
	case *anypb.Any:
		inner, err := x.UnmarshalNew()
		if err != nil {
			c.wrong("holds something unknown: %v", err)
			return
		}
		c.everywhere(inner)
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
