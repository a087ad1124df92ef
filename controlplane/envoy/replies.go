package envoy

import (
	"strconv"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matchv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/segment"
)

// reply is what a gateway itself says to a client: what it is about, in the client's own words, and nothing of what
// else exists.
type reply struct {
	status    uint32 // 0: every other
	grpc      uint32 // gRPC's status code; 0: what Envoy makes of the HTTP status
	kind      string // OpenAI's error.type
	code      string // OpenAI's error.code
	anthropic string // error.type
	gemini    string // error.status, a google.rpc.Code
	chroma    string // the name of Chroma's error
	message   string
}

const (
	detail     = "%LOCAL_REPLY_BODY%"
	requestID  = "%REQ(X-REQUEST-ID)%"
	callerHere = "CALLER"             // replaced by how the endpoint knows its callers
	uncounted  = "budget_unavailable" // the code where there is no answer of the backend, nor of the gate
)

// A denial repeats the name that the caller gave, or says what it gave besides. It does not tell the name behind a UUID, nor
// whether there is one.

var replies = []reply{
	{403, 7, "permission_denied", "no_grant", "permission_error", "PERMISSION_DENIED", "AuthError",
		callerHere + " has no grant for %METADATA(ROUTE:sallyport:asks)%%DYNAMIC_METADATA(sallyport:name)%%DYNAMIC_METADATA(sallyport:beyond)%"},
	{400, 3, "invalid_request_error", "ambiguous_request", "invalid_request_error", "INVALID_ARGUMENT", "InvalidArgumentError", detail},
	{401, 16, "authentication_error", "unauthenticated", "authentication_error", "UNAUTHENTICATED", "AuthError", detail},
	{404, 12, "invalid_request_error", "not_found", "not_found_error", "NOT_FOUND", "NotFoundError", "nothing here serves this"},
	{408, 4, "invalid_request_error", "request_timeout", "timeout_error", "DEADLINE_EXCEEDED", "InvalidArgumentError", "the request took too long to arrive"},
	{413, 8, "invalid_request_error", "request_too_large", "request_too_large", "INVALID_ARGUMENT", "InvalidArgumentError", "the request body is larger than this gateway reads"},
	{429, 8, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED", "RateLimitError", detail},
	{503, 14, "api_error", uncounted, "api_error", "UNAVAILABLE", "InternalError", "the budget of this request can't be counted just now"},
	{503, 14, "api_error", "backend_unavailable", "api_error", "UNAVAILABLE", "InternalError", "the backend can't be reached"},
	{504, 14, "api_error", "backend_timeout", "timeout_error", "DEADLINE_EXCEEDED", "InternalError", "the backend did not answer while the caller's certificate or token was valid"},
	{0, 0, "api_error", "gateway_error", "api_error", "INTERNAL", "InternalError", "%RESPONSE_CODE_DETAILS%"},
}

// ErrorReply is the JSON that a client of the protocol takes for an error, with the same words as a gateway's own.
func ErrorReply(p segment.Protocol, status int, message, requestID string) map[string]any {
	for _, r := range replies {
		if r.code != uncounted && (int(r.status) == status || r.status == 0) {
			r.status = uint32(status)
			return r.body(p, message, requestID)
		}
	}
	return nil
}

func (r *reply) body(p segment.Protocol, message, requestID string) map[string]any {
	withID := message + " (request " + requestID + ")" // where there is no other place for it
	switch p {
	case segment.Anthropic:
		return map[string]any{"type": "error", "error": map[string]any{"type": r.anthropic, "message": message}, "request_id": requestID}
	case segment.Gemini: // google.rpc.Status, as Google's APIs write it
		return map[string]any{"error": map[string]any{"code": r.number(), "status": r.gemini, "message": withID}}
	case segment.Chroma:
		return map[string]any{"error": r.chroma, "message": withID}
	case segment.Qdrant:
		return map[string]any{"status": map[string]any{"error": withID}, "time": 0}
	case segment.Weaviate:
		return map[string]any{"error": []any{map[string]any{"message": withID}}}
	case segment.Milvus:
		return map[string]any{"code": r.number(), "message": withID}
	case segment.MCP:
		return r.rpcError(message, requestID)
	case segment.HTTP, segment.GRPC, segment.TCP: // RFC 9457, section 3
		return map[string]any{"title": strings.ReplaceAll(r.code, "_", " "), "status": r.number(), "detail": message, "request_id": requestID}
	}
	return map[string]any{"error": map[string]any{"message": message, "type": r.kind, "code": r.code, "request_id": requestID}}
}

// number is the status as a number in a body.
func (r *reply) number() float64 {
	if r.status == 0 {
		return 500
	}
	return float64(r.status)
}

func localReplies(e *segment.Endpoint) *hcmv3.LocalReplyConfig {
	config := &hcmv3.LocalReplyConfig{}
	if speaksGRPC(e.Backends) { // whose clients read a text: whatever body there is would be that
		for _, r := range replies {
			config.Mappers = append(config.Mappers, r.overGRPC(e))
		}
	}
	if e.Protocol == segment.MCP {
		config.Mappers = append(config.Mappers, rpcRefusals())
	}
	for _, r := range replies {
		if e.Protocol == segment.MCP {
			config.Mappers = append(config.Mappers, r.rpcTold(e), r.rpcUntold(e))
			continue
		}
		mapper := inJSON(r.body(e.Protocol, r.said(e), requestID), true, r.when())
		format := mapper.BodyFormatOverride
		if e.Protocol == segment.HTTP {
			format.ContentType = "application/problem+json"
		}
		if r.status == 0 {
			config.BodyFormat = format
		}
		if e.Protocol == segment.Anthropic { // where its SDKs look for it
			mapper.HeadersToAdd = []*corev3.HeaderValueOption{header("request-id", requestID)}
		}
		if r.status != 0 || mapper.HeadersToAdd != nil {
			config.Mappers = append(config.Mappers, mapper)
		}
	}
	return config
}

// inJSON answers with an object in which Envoy fills in what stands between percent signs.
func inJSON(told map[string]any, omit bool, when *accesslogv3.AccessLogFilter) *hcmv3.ResponseMapper {
	body, err := structpb.NewStruct(told)
	if err != nil {
		panic("encode reply: " + err.Error()) // constants only
	}
	return &hcmv3.ResponseMapper{Filter: when, BodyFormatOverride: &corev3.SubstitutionFormatString{
		Format: &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: body}, OmitEmptyValues: omit}}
}

// said is the message, about this endpoint's callers.
func (r *reply) said(e *segment.Endpoint) string {
	return strings.Replace(r.message, callerHere, callerFormat(e.Tokens != nil), 1)
}

// overGRPC answers calls of gRPC in its own words: a status code, and a text.
func (r *reply) overGRPC(e *segment.Endpoint) *hcmv3.ResponseMapper {
	mapper := &hcmv3.ResponseMapper{
		Filter: whenAll(r.when(), whenGRPC()),
		BodyFormatOverride: &corev3.SubstitutionFormatString{
			Format:          &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: inline(r.said(e) + " (request " + requestID + ")")},
			OmitEmptyValues: true,
		},
	}
	if r.grpc != 0 {
		mapper.HeadersToAdd = []*corev3.HeaderValueOption{header("grpc-status", strconv.Itoa(int(r.grpc)))}
	}
	return mapper
}

func whenGRPC() *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_HeaderFilter{HeaderFilter: &accesslogv3.HeaderFilter{
		Header: &routev3.HeaderMatcher{Name: "content-type", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{
			StringMatch: &matchv3.StringMatcher{MatchPattern: &matchv3.StringMatcher_Prefix{Prefix: "application/grpc"}}}},
	}}}
}

// whenFound looks for something in dynamic metadata.
func whenFound(space, key string) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_MetadataFilter{MetadataFilter: &accesslogv3.MetadataFilter{
		Matcher: &matchv3.MetadataMatcher{
			Filter: space,
			Path:   []*matchv3.MetadataMatcher_PathSegment{{Segment: &matchv3.MetadataMatcher_PathSegment_Key{Key: key}}},
			Value:  &matchv3.ValueMatcher{MatchPattern: &matchv3.ValueMatcher_PresentMatch{PresentMatch: true}},
		},
		MatchIfKeyNotFound: wrapperspb.Bool(false),
	}}}
}

// when is what the reply answers.
func (r *reply) when() *accesslogv3.AccessLogFilter {
	if r.code != uncounted {
		return whenStatus(r.status)
	}
	return whenAll(whenStatus(r.status), &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{
		ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{Flags: []string{"UAEX"}}}})
}

func whenAll(filters ...*accesslogv3.AccessLogFilter) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{AndFilter: &accesslogv3.AndFilter{Filters: filters}}}
}

// whenStatus is any status if it is 0.
func whenStatus(status uint32) *accesslogv3.AccessLogFilter {
	op := accesslogv3.ComparisonFilter_EQ
	if status == 0 {
		op = accesslogv3.ComparisonFilter_GE
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{
		StatusCodeFilter: &accesslogv3.StatusCodeFilter{Comparison: &accesslogv3.ComparisonFilter{
			Op:    op,
			Value: &corev3.RuntimeUInt32{DefaultValue: status, RuntimeKey: "sallyport.reply"},
		}},
	}}
}
