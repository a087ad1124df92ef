package envoy

import (
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/segment"
)

// reply is what a gateway itself says to a client: what it is about, in the client's own words, and nothing of what
// else exists.
type reply struct {
	status  uint32 // 0: every other
	kind    string // OpenAI's error.type
	code    string // OpenAI's error.code
	chroma  string // the name of Chroma's error
	message string
}

const (
	detail     = "%LOCAL_REPLY_BODY%"
	callerHere = "CALLER" // replaced by how the endpoint knows its callers
)

// A denial repeats the name that the caller gave. It does not tell the name behind a UUID, nor whether there is one.

var replies = []reply{
	{403, "permission_denied", "no_grant", "AuthError",
		callerHere + " has no grant for %METADATA(ROUTE:sallyport:asks)%%DYNAMIC_METADATA(sallyport:name)%"},
	{400, "invalid_request_error", "ambiguous_request", "InvalidArgumentError", detail},
	{401, "authentication_error", "unauthenticated", "AuthError", detail},
	{404, "invalid_request_error", "not_found", "NotFoundError", "nothing here serves this"},
	{408, "invalid_request_error", "request_timeout", "InvalidArgumentError", "the request took too long to arrive"},
	{413, "invalid_request_error", "request_too_large", "InvalidArgumentError", "the request body is larger than this gateway reads"},
	{503, "api_error", "backend_unavailable", "InternalError", "the backend can't be reached"},
	{504, "api_error", "backend_timeout", "InternalError", "the backend did not answer while the caller's certificate or token was valid"},
	{0, "api_error", "gateway_error", "InternalError", "%RESPONSE_CODE_DETAILS%"},
}

// ErrorReply is the JSON that a client of the protocol takes for an error, with the same words as a gateway's own.
func ErrorReply(p segment.Protocol, status int, message, requestID string) map[string]any {
	for _, r := range replies {
		if int(r.status) == status || r.status == 0 {
			return r.body(p, message, requestID)
		}
	}
	return nil
}

func (r *reply) body(p segment.Protocol, message, requestID string) map[string]any {
	if p == segment.Chroma {
		return map[string]any{"error": r.chroma, "message": message + " (request " + requestID + ")"}
	}
	return map[string]any{"error": map[string]any{"message": message, "type": r.kind, "code": r.code, "request_id": requestID}}
}

func localReplies(e *segment.Endpoint) *hcmv3.LocalReplyConfig {
	config := &hcmv3.LocalReplyConfig{}
	for _, r := range replies {
		message := strings.Replace(r.message, callerHere, callerFormat(e.Tokens != nil), 1)
		body, err := structpb.NewStruct(r.body(e.Protocol, message, "%REQ(X-REQUEST-ID)%"))
		if err != nil {
			panic("encode reply: " + err.Error()) // constants only
		}
		format := &corev3.SubstitutionFormatString{
			Format:          &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: body},
			OmitEmptyValues: true,
		}
		if r.status == 0 {
			config.BodyFormat = format
			continue
		}
		config.Mappers = append(config.Mappers, &hcmv3.ResponseMapper{Filter: whenStatus(r.status), BodyFormatOverride: format})
	}
	return config
}

func whenStatus(status uint32) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{
		StatusCodeFilter: &accesslogv3.StatusCodeFilter{Comparison: &accesslogv3.ComparisonFilter{
			Op:    accesslogv3.ComparisonFilter_EQ,
			Value: &corev3.RuntimeUInt32{DefaultValue: status, RuntimeKey: "sallyport.reply"},
		}},
	}}
}
