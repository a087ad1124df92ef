package envoy

import (
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tracev3 "github.com/envoyproxy/go-control-plane/envoy/config/trace/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	samplersv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/tracers/opentelemetry/samplers/v3"
	tagv3 "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// genAIOperation is the value of gen_ai.operation.name, by the OpenTelemetry semantic conventions for generative AI; ""
// where they have none.
func genAIOperation(p segment.Protocol, r segment.Route) string {
	base, _, _ := strings.Cut(strings.TrimPrefix(r.Path, "/v1/"), "/")
	switch {
	case usageOf(p).key == "" || r.Resource == segment.Everything:
		return ""
	case r.Operation == segment.Embed:
		return "embeddings"
	case r.Operation != segment.Infer:
		return ""
	case p == segment.Gemini:
		return "generate_content"
	case base == "chat", base == "responses", base == "messages":
		return "chat"
	case base == "completions", base == "complete":
		return "text_completion"
	}
	return ""
}

// usage is how answers of a protocol tell what they used: the key of the object, and those of the numbers in it: of inputs
// and outputs one is there, and moreInputs and moreOutputs are not in these.
type usage struct {
	key                     string
	inputs, outputs         []string
	moreInputs, moreOutputs []string
}

func usageOf(p segment.Protocol) usage {
	cached := []string{"cache_read_input_tokens", "cache_creation_input_tokens"} // of Anthropic's messages, whoever serves them
	switch p {
	case segment.OpenAI:
		return usage{"usage", []string{"prompt_tokens", "input_tokens"}, []string{"completion_tokens", "output_tokens"}, cached, nil}
	case segment.Anthropic:
		return usage{"usage", []string{"input_tokens"}, []string{"output_tokens"}, cached, nil}
	case segment.Gemini:
		return usage{"usageMetadata", []string{"promptTokenCount"}, []string{"candidatesTokenCount"},
			[]string{"toolUsePromptTokenCount"}, []string{"thoughtsTokenCount"}}
	}
	return usage{}
}

// counts reports whether answers to the route tell what they used.
func counts(p segment.Protocol, r segment.Route) bool {
	return usageOf(p).key != "" && r.Kind == segment.Plain && (r.Operation == segment.Infer || r.Operation == segment.Embed) && r.Resource != segment.Everything
}

// provider is the value of gen_ai.provider.name: whose API it is, whoever serves it.
func provider(p segment.Protocol) string {
	return map[segment.Protocol]string{segment.OpenAI: "openai", segment.Anthropic: "anthropic", segment.Gemini: "gcp.gemini"}[p]
}

func tracing(e *segment.Endpoint) *hcmv3.HttpConnectionManager_Tracing {
	const (
		name   = "%FILTER_STATE(sallyport.name:PLAIN)%"
		rule   = "%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_effective_policy_id)%"
		result = "%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_engine_result)%"
	)
	tags := []*tagv3.CustomTag{
		tag(telemetry.SallyportCaller, callerFormat(e.Tokens != nil)),
		tag(telemetry.SallyportEndpoint, string(e.Name)),
		tag(telemetry.SallyportOperation, "%METADATA(ROUTE:sallyport:operation)%"),
		tag(telemetry.SallyportResource, name),
		tag(telemetry.SecurityRuleName, rule),
		tag(telemetry.EventOutcome, result),
	}
	switch e.Protocol {
	case segment.OpenAI, segment.Anthropic, segment.Gemini:
		tags = append(tags,
			tag(telemetry.GenAIOperationName, "%METADATA(ROUTE:sallyport:gen_ai)%"),
			tag(telemetry.GenAIProviderName, provider(e.Protocol)),
			tag(telemetry.GenAIRequestModel, name),
			number(telemetry.GenAIInputTokens, "%DYNAMIC_METADATA(sallyport:input_tokens)%"),
			number(telemetry.GenAIOutputTokens, "%DYNAMIC_METADATA(sallyport:output_tokens)%"),
		)
	case segment.Chroma, segment.Qdrant, segment.Weaviate, segment.Milvus:
		tags = append(tags, tag(telemetry.DBSystemName, strings.ToLower(string(e.Protocol))), tag(telemetry.DBCollectionName, name), tag(telemetry.DBOperationName, "%ROUTE_NAME%"))
	}
	return &hcmv3.HttpConnectionManager_Tracing{
		RandomSampling:    &typev3.Percent{Value: 100},
		OverallSampling:   &typev3.Percent{Value: 100},
		Operation:         "%METADATA(ROUTE:sallyport:operation)% " + name,
		SpawnUpstreamSpan: wrapperspb.Bool(true),
		UpstreamOperation: "to %UPSTREAM_CLUSTER%",
		CustomTags:        tags,
		Provider: &tracev3.Tracing_Http{Name: "opentelemetry", ConfigType: &tracev3.Tracing_Http_TypedConfig{
			TypedConfig: pack(&tracev3.OpenTelemetryConfig{
				GrpcService: grpcTo(ControlCluster),
				ServiceName: "sallyport-gateway",
				Sampler:     extension("always", &samplersv3.AlwaysOnSamplerConfig{}), // else a caller could ask not to be traced
			})}},
	}
}

func tag(key, format string) *tagv3.CustomTag {
	return &tagv3.CustomTag{Tag: key, Type: &tagv3.CustomTag_Value{Value: format}}
}

func number(key, format string) *tagv3.CustomTag {
	t := tag(key, format)
	t.ValueType = tagv3.CustomTag_INT
	return t
}

// requests logs every request, with what was decided and why.
func requests(e *segment.Endpoint) []*accesslogv3.AccessLog {
	common := logTo("requests")
	common.FilterStateObjectsToLog = []string{stateName}
	common.CustomTags = []*tagv3.CustomTag{
		tag("endpoint", string(e.Name)),
		tag("operation", "%METADATA(ROUTE:sallyport:operation)%"),
		tag("trace_id", "%TRACE_ID%"),
		tag("span_id", "%SPAN_ID%"),
	}
	if speaksGRPC(e.Backends) { // whose answers all have the same status of HTTP
		common.CustomTags = append(common.CustomTags, tag("grpc_status", "%GRPC_STATUS_NUMBER%"))
	}
	return []*accesslogv3.AccessLog{accessLog("requests", &grpclogv3.HttpGrpcAccessLogConfig{CommonConfig: common})}
}

// connects logs every connection to an endpoint of protocol TCP, when it ends.
func connects(e *segment.Endpoint) []*accesslogv3.AccessLog {
	common := logTo("connects")
	common.CustomTags = []*tagv3.CustomTag{tag("endpoint", string(e.Name)), tag("operation", string(segment.Connect))}
	return []*accesslogv3.AccessLog{accessLog("connects", &grpclogv3.TcpGrpcAccessLogConfig{CommonConfig: common})}
}

// connections logs every connection when it ends, because only then is it known whether it got through TLS. Those that
// did are seen by their requests, or by what connects logs, and their entries are skipped where they are received.
func connections() []*accesslogv3.AccessLog {
	return []*accesslogv3.AccessLog{accessLog("connections", &grpclogv3.TcpGrpcAccessLogConfig{CommonConfig: logTo("connections")})}
}

func accessLog(name string, config proto.Message) *accesslogv3.AccessLog {
	return &accesslogv3.AccessLog{Name: name, ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: pack(config)}}
}

func logTo(name string) *grpclogv3.CommonGrpcAccessLogConfig {
	return &grpclogv3.CommonGrpcAccessLogConfig{
		LogName:             name,
		TransportApiVersion: corev3.ApiVersion_V3,
		GrpcService:         grpcTo(ControlCluster),
		BufferFlushInterval: durationpb.New(200 * time.Millisecond),
		BufferSizeBytes:     wrapperspb.UInt32(64 << 10),
	}
}
