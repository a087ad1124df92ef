package envoy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	bufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/buffer/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	uritemplatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/path/match/uri_template/v3"
	matchv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/segment"
)

// metadataSpace is the namespace of all metadata that is ours: on routes, and what a request is found to be.
const metadataSpace = "sallyport"

// Headers that tell the catalogue who asks for what. Whatever a client sends in them is overwritten.
const (
	CallerHeader   = "x-sallyport-caller"
	EndpointHeader = "x-sallyport-endpoint"
	RouteHeader    = "x-sallyport-route"
)

// routesName is the RDS resource of an endpoint.
func routesName(e segment.EndpointName, tokens bool) string {
	return "endpoint/" + string(e) + told(tokens)
}

var keyHeaders = []string{"authorization", "proxy-authorization", "x-api-key", "api-key", "x-chroma-token"}

// overrideHeaders make some servers take a request for another one than it is, or for one of somebody else.
var overrideHeaders = []string{
	CallerHeader, EndpointHeader, RouteHeader, "forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip",
	"x-forwarded-path", "x-forwarded-port", "x-forwarded-prefix", "x-forwarded-uri", "x-original-url", "x-rewrite-url", "x-accel-redirect",
	"x-http-method", "x-http-method-override", "x-method-override",
	"x-envoy-attempt-count", "x-envoy-degraded", "x-envoy-fault-abort-request", "x-envoy-immediate-health-check-fail",
	"x-envoy-is-timeout-retry", "x-envoy-livenesscheck", "x-envoy-local-overloaded", "x-envoy-original-method", "x-envoy-peer-metadata",
}

// milvusHeaders name a database past what is read here; one is read (extract.go), and the other is not needed.
var milvusHeaders = []string{"db-name"}

// rows are the routes of the endpoint's protocol as they are for this endpoint. What it can't serve, or nobody reads, is not
// there.
func rows(e *segment.Endpoint) []segment.Route {
	var all []segment.Route
	for _, r := range e.Protocol.Routes() {
		switch {
		case r.Path == "": // not HTTP
		case overGRPC(r) && !speaksGRPC(e.Backends):
		case r.Database == segment.Everything && ownDatabase(e) != "": // it could name another one where nobody looks
		case r.Resource == segment.WholePath && e.Protocol == segment.HTTP:
			for i, template := range e.Templates {
				t := r
				t.Name, t.Path = fmt.Sprintf("%s-%d", r.Name, i+1), template
				all = append(all, t)
			}
			all = append(all, r)
		default:
			all = append(all, r)
		}
	}
	return all
}

func overGRPC(r segment.Route) bool { return r.Kind == segment.Unary || r.Kind == segment.Streaming }

func speaksGRPC(backends []segment.Backend) bool {
	return slices.ContainsFunc(backends, func(b segment.Backend) bool { return b.GRPC != nil })
}

func routes(e *segment.Endpoint) *routev3.RouteConfiguration {
	host := &routev3.VirtualHost{
		Name:    string(e.Name),
		Domains: e.Hostnames,
		// A caller is its certificate. Whatever key its SDK insists on is none of the backend's business, and
		// whatever it says of where it comes from is no better.
		RequestHeadersToRemove: slices.Concat(keyHeaders, overrideHeaders),
	}
	if usageOf(e.Protocol).key != "" { // usage can't be read from an answer that is compressed
		host.RequestHeadersToRemove = append(host.RequestHeadersToRemove, "accept-encoding")
	}
	if e.Protocol == segment.Milvus {
		host.RequestHeadersToRemove = append(host.RequestHeadersToRemove, milvusHeaders...)
	}
	if e.Protocol == segment.MCP {
		host.RequestHeadersToRemove = append(host.RequestHeadersToRemove, mcpHeaders...)
	}
	pools := modelPools(e)
	for _, r := range rows(e) {
		if r.Answer == segment.FromCatalog || len(pools) == 1 || r.Resource == segment.NoResource || r.Resource == segment.Everything {
			host.Routes = append(host.Routes, route(e, r, pools[0].cluster)) // who names no model asks the backends of the first
			continue
		}
		for _, pool := range pools {
			chosen := route(e, r, pool.cluster)
			for _, model := range pool.models {
				host.Routes = append(host.Routes, forModel(chosen, model, pool.cluster))
			}
		}
		host.Routes = append(host.Routes, unserved(e, r, pools[0].cluster)) // taken first, before the model is known
	}
	if speaksGRPC(e.Backends) {
		host.Routes = append(host.Routes, elsewhereOverGRPC())
	}
	if e.Protocol == segment.MCP {
		host.Routes = append(host.Routes, elsewhereOverMCP())
	}
	host.Routes = append(host.Routes, elsewhere())
	return &routev3.RouteConfiguration{
		Name:                            routesName(e.Name, e.Tokens != nil),
		VirtualHosts:                    []*routev3.VirtualHost{host},
		MostSpecificHeaderMutationsWins: true,                   // a route to the catalogue adds headers that the host removes
		ValidateClusters:                wrapperspb.Bool(false), // Check has seen that they exist; CDS may come a moment later
	}
}

// forModel is the route for one model. All that is the same for another is shared with its route.
func forModel(r *routev3.Route, model, cluster string) *routev3.Route {
	return &routev3.Route{
		Name: r.Name + "/" + cluster,
		Match: &routev3.RouteMatch{PathSpecifier: r.Match.PathSpecifier, Headers: r.Match.Headers, FilterState: []*matchv3.FilterStateMatcher{{
			Key:     stateServed,
			Matcher: &matchv3.FilterStateMatcher_StringMatch{StringMatch: exact(model)},
		}}},
		Action: r.Action, Metadata: r.Metadata, TypedPerFilterConfig: r.TypedPerFilterConfig,
		RequestHeadersToAdd: r.RequestHeadersToAdd, RequestHeadersToRemove: r.RequestHeadersToRemove,
	}
}

// pool is a cluster and the models that it serves; all models, if none is named.
type pool struct {
	cluster string
	models  []string
}

// modelPools groups an endpoint's models by the backends that serve them. There is at least one pool.
func modelPools(e *segment.Endpoint) []pool {
	var pools []pool
	for _, m := range e.Models {
		cluster := clusterName(e, m.Backends)
		i := slices.IndexFunc(pools, func(p pool) bool { return p.cluster == cluster })
		if i < 0 {
			i = len(pools)
			pools = append(pools, pool{cluster: cluster})
		}
		pools[i].models = append(pools[i].models, m.Names()...)
	}
	if pools == nil {
		pools = []pool{{cluster: clusterName(e, allBackends(e))}}
	}
	return pools
}

func route(e *segment.Endpoint, r segment.Route, cluster string) *routev3.Route {
	out := bare(e, r)
	if overGRPC(r) {
		cluster = overHTTP2(cluster)
	}
	action := &routev3.RouteAction{
		ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster},
		Timeout:          durationpb.New(0), // a stream may take as long as the caller's certificate is good for
	}
	if r.Answer == segment.FromCatalog {
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: CatalogCluster}
		out.RequestHeadersToAdd = []*corev3.HeaderValueOption{
			header(CallerHeader, callerFormat(e.Tokens != nil)),
			header(EndpointHeader, string(e.Name)),
			header(RouteHeader, r.Name),
		}
	}
	if endless(r) {
		// The script writes how long it may take into the header that this looks at; for requests that never end, that of
		// the others does nothing.
		action.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{
			MaxStreamDuration: durationpb.New(longestStream), GrpcTimeoutHeaderMax: durationpb.New(0)}
		action.IdleTimeout = durationpb.New(0)
	}
	if r.Kind == segment.WebSocket {
		action.UpgradeConfigs = []*routev3.RouteAction_UpgradeConfig{{UpgradeType: upgradeType}}
		out.RequestHeadersToRemove = []string{"grpc-timeout"}
	}
	out.Action = &routev3.Route_Route{Route: action}
	return out
}

const (
	upgradeType = "websocket" // RFC 6455, over HTTP/1.1
	// longestStream is how long a stream lasts at most, whatever the caller's certificate says.
	longestStream = 24 * time.Hour
)

// unserved answers for a model that is allowed but that no backend serves. A WebSocket needs a route that it could take
// before the model is known; it goes to the first backends.
func unserved(e *segment.Endpoint, r segment.Route, first string) *routev3.Route {
	if r.Kind == segment.WebSocket {
		return route(e, r, first)
	}
	out := bare(e, r)
	out.Name += "/unserved"
	out.Action = &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 404}}
	return out
}

// elsewhere is every request that is in no table: it asks for nothing that could be granted.
func elsewhere() *routev3.Route {
	return &routev3.Route{
		Name:     "elsewhere",
		Match:    &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action:   &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 404}},
		Metadata: metadata(map[string]string{"asks": "this path, which is not part of the API here"}),
	}
}

// elsewhereOverGRPC is the same for calls of gRPC, of which nobody knows whether they ever end: the answer does not wait.
func elsewhereOverGRPC() *routev3.Route {
	out := elsewhere()
	out.Name += "-grpc"
	out.Match.Headers = []*routev3.HeaderMatcher{grpcContent()}
	out.TypedPerFilterConfig = map[string]*anypb.Any{bodyFilter: pack(bufferOff())}
	return out
}

// bufferOff lets a request pass before its end.
func bufferOff() *bufferv3.BufferPerRoute {
	return &bufferv3.BufferPerRoute{Override: &bufferv3.BufferPerRoute_Disabled{Disabled: true}}
}

// grpcContent matches what a call of gRPC says that it is (gRPC over HTTP/2, "Content-Type"), and no other message format
// than Protocol Buffers.
func grpcContent() *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{
		Name: "content-type",
		HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matchv3.StringMatcher{
			MatchPattern: &matchv3.StringMatcher_SafeRegex{SafeRegex: &matchv3.RegexMatcher{Regex: `application/grpc(\+proto)?`}}}},
	}
}

func bare(e *segment.Endpoint, r segment.Route) *routev3.Route {
	asks := string(r.Operation) + " " // what the caller named follows
	switch r.Resource {
	case segment.NoResource:
		asks = "anything here"
	case segment.Everything:
		asks = fmt.Sprintf("%s on everything here, which %s needs: it names its %s where this gateway does not look, or not at all",
			r.Operation, r.Name, resources(e.Protocol))
	case segment.PathID:
		asks = string(r.Operation) + " on this collection"
	}
	out := &routev3.Route{
		Name:  r.Name,
		Match: matchOf(ownPath(e, r.Path), r.Method),
		Metadata: metadata(map[string]string{
			"operation": string(r.Operation),
			"asks":      asks,
			"gen_ai":    genAIOperation(e.Protocol, r),
		}),
		TypedPerFilterConfig: map[string]*anypb.Any{extractFilter: pack(&luav3.LuaPerRoute{FilterContext: extraction(e, r).context()})},
	}
	if overGRPC(r) {
		out.Match.Headers = append(out.Match.Headers, grpcContent())
	}
	if r.MCP != "" {
		out.Match.Headers = append(out.Match.Headers, mcpMethod(r.MCP))
	}
	if endless(r) {
		out.TypedPerFilterConfig[bodyFilter] = pack(bufferOff())
	}
	return out
}

// resources is what the protocol's resources are to those who read an answer.
func resources(p segment.Protocol) string {
	switch p {
	case segment.OpenAI, segment.Anthropic, segment.Gemini:
		return "models"
	case segment.HTTP:
		return "paths"
	case segment.GRPC:
		return "methods"
	case segment.MCP:
		return "tools"
	}
	return "collections"
}

// ownPath writes the endpoint's own tenant and database into a path template.
func ownPath(e *segment.Endpoint, path string) string {
	return strings.NewReplacer("{tenant}", e.Database.Tenant, "{database}", e.Database.Name).Replace(path)
}

func matchOf(path, method string) *routev3.RouteMatch {
	match := &routev3.RouteMatch{
		PathSpecifier: &routev3.RouteMatch_Path{Path: path},
		Headers: []*routev3.HeaderMatcher{{
			Name:                 ":method",
			HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: exact(method)},
		}},
	}
	if strings.Contains(path, "{") {
		path = strings.ReplaceAll(path, "}:", "=*}:") // Envoy wants it said that a part of a segment is meant
		match.PathSpecifier = &routev3.RouteMatch_PathMatchPolicy{
			PathMatchPolicy: extension("template", &uritemplatev3.UriTemplateMatchConfig{PathTemplate: path})}
	}
	return match
}

func metadata(fields map[string]string) *corev3.Metadata {
	s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range fields {
		if v != "" {
			s.Fields[k] = structpb.NewStringValue(v)
		}
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataSpace: s}}
}

func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: name, Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

func exact(s string) *matchv3.StringMatcher {
	return &matchv3.StringMatcher{MatchPattern: &matchv3.StringMatcher_Exact{Exact: s}}
}
