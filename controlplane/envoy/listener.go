package envoy

import (
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	commonmatchingv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	bufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/buffer/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/segment"
)

// ListenerName is the one LDS resource of a gateway.
const ListenerName = "mtls"

// MaxBodyBytes is the largest request body that a gateway reads. Longer ones are answered with 413.
const MaxBodyBytes = 16 << 20

// Names of the HTTP filters, in their order.
const (
	bodyFilter     = "body"
	extractFilter  = "extract"
	judgedFilter   = "judged"
	questionFilter = "question"
	routerFilter   = "router"
)

func listener(cfg *segment.Config, r *Resources) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name:    ListenerName,
		Address: socketAddress(cfg.Gateway.Listen.Addr().String(), cfg.Gateway.Listen.Port()),
		ListenerFilters: []*listenerv3.ListenerFilter{{
			Name:       "tls_inspector",
			ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(&inspectorv3.TlsInspector{})},
		}},
		AccessLog: connections(),
		// A listener that can't be bound must be an error, not a silent share with another process.
		EnableReusePort: wrapperspb.Bool(false),
	}
	for i := range cfg.Endpoints {
		e := &cfg.Endpoints[i]
		chain := &listenerv3.FilterChain{
			Name:                          string(e.Name),
			FilterChainMatch:              &listenerv3.FilterChainMatch{ServerNames: e.Hostnames},
			TransportSocketConnectTimeout: durationpb.New(10 * time.Second),
		}
		if e.Protocol == segment.TCP {
			chain.TransportSocket = downstreamTLS(cfg.Gateway, false, tcpProtocols...)
			chain.Filters = connectionFilters(e, cfg.Gateway)
		} else {
			chain.TransportSocket = downstreamTLS(cfg.Gateway, e.Tokens != nil, "h2", "http/1.1")
			chain.Filters = []*listenerv3.Filter{{
				Name:       "http",
				ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(connectionManager(e, cfg.Gateway, r))},
			}}
		}
		l.FilterChains = append(l.FilterChains, chain)
	}
	return l
}

// downstreamTLS demands a certificate that the SPIFFE validator accepts. There is no resumption: a resumed session
// would skip the validation. Where there are tokens, there need not be a certificate; one that comes must be good. Both the
// SPIFFE validator and a matcher of names would demand one nevertheless, so there it is the authorities of the own trust
// domain alone that count, and the caller stage looks at the name.
func downstreamTLS(g segment.Gateway, tokens bool, protocols ...string) *corev3.TransportSocket {
	common := &tlsv3.CommonTlsContext{
		TlsParams:                      &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3},
		AlpnProtocols:                  protocols,
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{secret(g.ID.String())},
	}
	validation := validationSecret
	if tokens {
		validation = g.ID.TrustDomain().IDString()
	}
	common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: secret(validation)}
	return &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(&tlsv3.DownstreamTlsContext{
		RequireClientCertificate:         wrapperspb.Bool(!tokens),
		DisableStatefulSessionResumption: true,
		SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
		CommonTlsContext:                 common,
	})}}
}

// MaxConnectionAge is when a connection is told to close with its next answer, or at once if it is idle for as long
// again. A caller renews its SVID between two and three fifths of its life, so it opens every connection with at least
// two fifths of it left: connections end before the certificate that opened them, and none is closed under a request.
// (extract.lua sees to callers that renew later: a request on a certificate that has ended is refused.)
func MaxConnectionAge(svidTTL time.Duration) time.Duration { return svidTTL / 5 }

func connectionManager(e *segment.Endpoint, g segment.Gateway, r *Resources) *hcmv3.HttpConnectionManager {
	manager := &hcmv3.HttpConnectionManager{
		StatPrefix: string(e.Name),
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			RouteConfigName: routesName(e.Name, e.Tokens != nil), ConfigSource: fromADS()}},
		HttpFilters:      filters(e, g, r),
		LocalReplyConfig: localReplies(e),
		Tracing:          tracing(e),
		AccessLog:        append(requests(e), settlements()),

		// One reading of a path, for us and for the backend.
		NormalizePath:                wrapperspb.Bool(true),
		MergeSlashes:                 true,
		PathWithEscapedSlashesAction: hcmv3.HttpConnectionManager_REJECT_REQUEST,
		StripPortMode:                &hcmv3.HttpConnectionManager_StripAnyHostPort{StripAnyHostPort: true},
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout:                  durationpb.New(min(time.Minute, MaxConnectionAge(g.SVIDTTL))),
			MaxConnectionDuration:        durationpb.New(MaxConnectionAge(g.SVIDTTL)),
			MaxHeadersCount:              wrapperspb.UInt32(100),
			HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST,
		},
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
			MaxConcurrentStreams:        wrapperspb.UInt32(100),
			InitialStreamWindowSize:     wrapperspb.UInt32(1 << 18),
			InitialConnectionWindowSize: wrapperspb.UInt32(1 << 20),
		},
		Http1SafeMaxConnectionDuration: true,
		RequestHeadersTimeout:          durationpb.New(10 * time.Second),
		RequestTimeout:                 durationpb.New(time.Minute),
		StreamIdleTimeout:              durationpb.New(5 * time.Minute),
		DrainTimeout:                   durationpb.New(time.Second),

		// Every caller is a stranger: what it says of itself in headers is overwritten.
		UseRemoteAddress:             wrapperspb.Bool(true),
		InternalAddressConfig:        &hcmv3.HttpConnectionManager_InternalAddressConfig{CidrRanges: nobody()},
		ForwardClientCertDetails:     hcmv3.HttpConnectionManager_SANITIZE_SET,
		SetCurrentClientCertDetails:  &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{Uri: true},
		AlwaysSetRequestIdInResponse: true,
		ServerHeaderTransformation:   hcmv3.HttpConnectionManager_PASS_THROUGH,
	}
	if e.Protocol == segment.GRPC { // clients stream for as long as they like, and nothing of it is kept
		manager.RequestTimeout = nil
	}
	return manager
}

func nobody() []*corev3.CidrRange {
	return []*corev3.CidrRange{{AddressPrefix: "255.255.255.255", PrefixLen: wrapperspb.UInt32(32)}}
}

// filters is the way of a request through an endpoint. The body is read first, so that a denied caller has sent it
// all and sees the answer (HTTP/2 clients take an answer before that for a broken stream). Nothing after rights
// may clear the route cache.
func filters(e *segment.Endpoint, g segment.Gateway, r *Resources) []*hcmv3.HttpFilter {
	tokens, form := e.Tokens != nil, r.forms[e.Name]
	members, rights := discovered(MembersName(e.Name)+told(tokens), typeURL(&setstatev3.Config{})), discovered(RightsName(e.Name))
	switch {
	case form.classes:
		members, rights = discovered(ClassesName(e.Name)+told(tokens), typeURL(&commonmatchingv3.ExtensionWithMatcher{})), discovered(ClassRightsName(e.Name))
	case form.shards != nil:
		rights = r.choice(e.Name, form.shards, tokens)
	}
	var list []*hcmv3.HttpFilter
	if tokens { // a stranger's body is not read
		list = append(list, discovered(TokensName(e.Name), typeURL(&jwtv3.JwtAuthentication{})), filter(callerFilter, identifier(g.ID.TrustDomain())))
	}
	list = append(list,
		filter(bodyFilter, &bufferv3.Buffer{MaxRequestBytes: wrapperspb.UInt32(MaxBodyBytes)}),
		r.table(e).extract,
		filter(judgedFilter, setState(judged(e)...)),
		members,
	)
	if addressesByID(e.Protocol) {
		list = append(list, discovered(NamesName(e.Name), typeURL(&commonmatchingv3.ExtensionWithMatcher{})))
	}
	return append(list,
		filter(questionFilter, question(e)),
		rights,
		filter(budgetFilter, budgeted()),
		filter(routerFilter, &routerv3.Router{SuppressEnvoyHeaders: true}),
	)
}

func filter(name string, config proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(config)}}
}

// discovered is a filter that comes by ECDS. A filter chain is not used before it has come, so that none takes the place
// of another whose rights are known; should it not come at all, it denies everything.
func discovered(name string, types ...string) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_ConfigDiscovery{ConfigDiscovery: deniesUntil(types...)}}
}

// deniesUntil is where a filter comes from that denies everything until it has come. RBAC it may always be.
func deniesUntil(types ...string) *corev3.ExtensionConfigSource {
	deny := &rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{}} // rules without a policy deny all; no rules at all would allow all
	source := fromADS()
	source.InitialFetchTimeout = durationpb.New(5 * time.Second) // then everything is denied until it comes
	return &corev3.ExtensionConfigSource{
		ConfigSource:  source,
		DefaultConfig: pack(deny),
		TypeUrls:      append(types, typeURL(deny)),
	}
}

func typeURL(m proto.Message) string {
	return "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
}
