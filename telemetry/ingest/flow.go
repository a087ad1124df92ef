package ingest

import (
	"cmp"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

const (
	rbacMetadata     = "envoy.filters.http.rbac" // what Envoy's RBAC filter says it did
	connectMetadata  = "envoy.filters.network.rbac"
	connectDenied    = "rbac_access_denied" // how connection termination details begin
	ourMetadata      = "sallyport"          // what extraction says of the request and of its answer
	nameState        = "sallyport.name"     // filter state: the resource
	defaultDeny      = "default-deny"
	tagEndpoint      = "endpoint"
	tagOperation     = "operation"
	tagTraceID       = "trace_id"
	tagSpanID        = "span_id"
	tagGRPCStatus    = "grpc_status" // number; of calls of gRPC only
	clientDisconnect = "downstream_remote_disconnect"
)

// FlowOf reads the access log entry of one finished request. Who asked comes from the verified certificate or, without
// one, from the token that was verified, and the verdict from what RBAC did: no header is believed in either. An entry without a verdict of RBAC is Refused.
func FlowOf(entry *accesslogv3.HTTPAccessLogEntry, node *corev3.Node) telemetry.Flow {
	common, req, resp := entry.GetCommonProperties(), entry.GetRequest(), entry.GetResponse()
	ours := fields{common.GetMetadata().GetFilterMetadata()[ourMetadata]}
	rbac := fields{common.GetMetadata().GetFilterMetadata()[rbacMetadata]}

	f := flowOf(common, node)
	if f.Caller = callerOf(common); f.Caller.IsZero() {
		f.Caller, _ = spiffeid.FromString(ours.text("caller"))
	}
	f.ID = clip(req.GetRequestId(), maxName)
	f.FirstByte = max(0, common.GetTimeToFirstUpstreamRxByte().AsDuration())
	f.Endpoint, f.Operation = segment.EndpointName(tag(common, tagEndpoint)), segment.Operation(tag(common, tagOperation))
	f.Resource = resourceOf(common, ours)
	if f.TraceID, _ = telemetry.ParseTraceID(tag(common, tagTraceID)); f.TraceID != "" {
		f.SpanID, _ = telemetry.ParseSpanID(tag(common, tagSpanID))
	}
	f.InputTokens, f.OutputTokens = ours.count("input_tokens"), ours.count("output_tokens")

	if m := req.GetRequestMethod(); m != corev3.RequestMethod_METHOD_UNSPECIFIED {
		f.Method = m.String()
	}
	path, _, _ := strings.Cut(req.GetPath(), "?")
	f.Path = clip(path, maxText)
	f.Status = int(resp.GetResponseCode().GetValue())
	if code := tag(common, tagGRPCStatus); code != "" && f.Status == http.StatusOK {
		f.Status = statusOfGRPC(code)
	}
	f.Detail = clip(resp.GetResponseCodeDetails(), maxText)
	if why := ours.text("refused"); why != "" {
		f.Detail = why
	} else if more := ours.text("beyond"); more != "" { // than its name, which the flow is not about then
		f.Detail = "asks for " + strings.TrimPrefix(more, "on ")
	}
	f.BytesIn, f.BytesOut = size(req.GetRequestBodyBytes()), size(resp.GetResponseBodyBytes())

	f.Verdict, f.Rule = verdict(rbac.text("enforced_engine_result"), rbac.text("enforced_effective_policy_id"))
	if f.Verdict == telemetry.Allowed && overBudget(resp.GetResponseCodeDetails()) {
		f.Verdict, f.Detail = telemetry.Limited, "over its budget"
		if f.Status != http.StatusTooManyRequests {
			f.Detail = "its budget can't be counted"
		}
	}
	if f.Verdict == telemetry.Allowed && backendFailed(f, common.GetResponseFlags()) {
		f.Verdict = telemetry.Failed
	}
	f.Shadow, f.ShadowBy = verdict(rbac.text("shadow_engine_result"), rbac.text("shadow_effective_policy_id"))
	if f.Shadow == telemetry.Refused {
		f.Shadow = "" // no shadow grants were in place
	}
	return f
}

// ConnectionOf reads the access log entry of a connection to an endpoint of protocol TCP. It is no flow if it did not get
// through TLS, which RefusedOf sees. One that sent nothing before it ended was not judged, and is Refused.
func ConnectionOf(entry *accesslogv3.TCPAccessLogEntry, node *corev3.Node) (flow telemetry.Flow, ok bool) {
	common := entry.GetCommonProperties()
	rbac := fields{common.GetMetadata().GetFilterMetadata()[connectMetadata]}
	denied := strings.HasPrefix(common.GetConnectionTerminationDetails(), connectDenied)
	if !denied && rbac.Struct == nil && common.GetDownstreamTransportFailureReason() != "" {
		return telemetry.Flow{}, false
	}
	f := flowOf(common, node)
	f.ID = clip(common.GetStreamId(), maxName)
	f.Caller = callerOf(common)
	f.Endpoint, f.Operation = segment.EndpointName(tag(common, tagEndpoint)), segment.Operation(tag(common, tagOperation))
	f.BytesIn, f.BytesOut = size(entry.GetConnectionProperties().GetReceivedBytes()), size(entry.GetConnectionProperties().GetSentBytes())

	f.Verdict, f.Rule = verdict(rbac.text("enforced_shadow_engine_result"), rbac.text("enforced_shadow_effective_policy_id"))
	f.Shadow, f.ShadowBy = verdict(rbac.text("shadow_engine_result"), rbac.text("shadow_effective_policy_id"))
	if f.Shadow == telemetry.Refused {
		f.Shadow = ""
	}
	switch flags := common.GetResponseFlags(); {
	case denied && f.Verdict != telemetry.Denied: // by what stands in for rights that have not come
		f.Verdict, f.Rule = telemetry.Denied, defaultDeny
	case f.Verdict == telemetry.Refused:
		f.Detail = "it has sent nothing"
	case f.Verdict == telemetry.Allowed && unreachable(flags):
		f.Verdict = telemetry.Failed
		f.Detail = clip(cmp.Or(tlsFailure(common.GetUpstreamTransportFailureReason()), "the backend can't be reached"), maxText)
	case flags.GetDurationTimeout():
		f.Detail = "its time was over"
	case flags.GetStreamIdleTimeout():
		f.Detail = "it was idle"
	}
	return f, true
}

// RefusedOf reads the access log entry of a connection. It is a flow only when the connection came to nothing: it did
// not get through TLS, or asked for a server name that no endpoint has.
func RefusedOf(entry *accesslogv3.TCPAccessLogEntry, node *corev3.Node) (flow telemetry.Flow, ok bool) {
	common := entry.GetCommonProperties()
	if common.GetMetadata().GetFilterMetadata()[connectMetadata] != nil { // it did, and ConnectionOf sees it
		return telemetry.Flow{}, false
	}
	why := tlsFailure(common.GetDownstreamTransportFailureReason())
	if why == "" && common.GetResponseFlags().GetNoRouteFound() {
		why = "no endpoint has this server name"
	}
	if why == "" {
		return telemetry.Flow{}, false
	}
	f := flowOf(common, node) // without a caller: whoever it claimed to be has not been verified
	f.ID = clip(common.GetStreamId(), maxName)
	f.Verdict = telemetry.Refused
	f.Detail = clip(why, maxText)
	if name := common.GetTlsProperties().GetTlsSniHostname(); name != "" {
		f.Detail += " (server name " + clip(name, maxName) + ")"
	}
	f.BytesIn = size(entry.GetConnectionProperties().GetReceivedBytes())
	f.BytesOut = size(entry.GetConnectionProperties().GetSentBytes())
	return f, true
}

// flowOf reads what requests and connections have in common.
func flowOf(common *accesslogv3.AccessLogCommon, node *corev3.Node) telemetry.Flow {
	took := common.GetTimeToLastDownstreamTxByte()
	if took == nil {
		took = common.GetDuration()
	}
	return telemetry.Flow{
		Time:     moment(common.GetStartTime()),
		Duration: max(0, took.AsDuration()),
		Gateway:  segment.GatewayName(clip(node.GetId(), maxName)),
	}
}

// grpcStatuses are what the status codes of gRPC are in HTTP, by google.rpc.Code.
var grpcStatuses = []int{200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401}

// statusOfGRPC returns the status of HTTP that a status code of gRPC stands for; all calls have 200 themselves.
func statusOfGRPC(code string) int {
	n, err := strconv.Atoi(code)
	if err != nil || n < 0 || n >= len(grpcStatuses) {
		return http.StatusInternalServerError
	}
	return grpcStatuses[n]
}

// tag returns a custom tag of the log entry. Envoy writes "-" for a value that is missing.
func tag(common *accesslogv3.AccessLogCommon, key string) string {
	if v := common.GetCustomTags()[key]; v != "-" {
		return clip(v, maxName)
	}
	return ""
}

// callerOf returns the first URI of the peer's certificate as a SPIFFE ID (X509-SVID, section 2: there is only one).
func callerOf(common *accesslogv3.AccessLogCommon) spiffeid.ID {
	for _, san := range common.GetTlsProperties().GetPeerCertificateProperties().GetSubjectAltName() {
		if uri := san.GetUri(); uri != "" {
			id, _ := spiffeid.FromString(uri)
			return id
		}
	}
	return spiffeid.ID{}
}

func resourceOf(common *accesslogv3.AccessLogCommon, ours fields) string {
	if state := common.GetFilterStateObjects()[nameState]; state != nil {
		if m, err := state.UnmarshalNew(); err == nil {
			var value string
			switch m := m.(type) {
			case *wrapperspb.StringValue:
				value = m.GetValue()
			case *wrapperspb.BytesValue:
				value = strings.ToValidUTF8(string(m.GetValue()), "\uFFFD")
			}
			if value != "" {
				return clip(value, maxText)
			}
		}
	}
	return ours.text("name")
}

// overBudget reports whether the gate has stopped the request, or could not be asked. Envoy's own words, after which it may
// say more in braces.
func overBudget(details string) bool {
	return strings.HasPrefix(details, "ext_authz_denied") || strings.HasPrefix(details, "ext_authz_error")
}

// verdict reads the result of one RBAC engine. Only "allowed" allows; no result means the request was not judged. Behind the
// rule stands its budget, if it has one.
func verdict(result, rule string) (telemetry.Verdict, string) {
	rule, _, _ = strings.Cut(rule, " ")
	switch {
	case result == "allowed":
		return telemetry.Allowed, rule
	case result == "":
		return telemetry.Refused, ""
	case rule == "":
		return telemetry.Denied, defaultDeny
	}
	return telemetry.Denied, rule
}

// backendFailed reports whether a request that was let through came to grief behind the gateway. A caller that went
// away is no failure of the backend.
func backendFailed(f telemetry.Flow, flags *accesslogv3.ResponseFlags) bool {
	switch {
	case f.Status >= 500, unreachable(flags), flags.GetUpstreamConnectionTermination(), flags.GetUpstreamRemoteReset(),
		flags.GetUpstreamRequestTimeout(), flags.GetUpstreamRetryLimitExceeded(), flags.GetUpstreamProtocolError(),
		flags.GetUpstreamMaxStreamDurationReached():
		return true
	case f.Status == 0:
		return !strings.HasPrefix(f.Detail, clientDisconnect)
	}
	return false
}

// unreachable reports whether there was no connection to a backend.
func unreachable(flags *accesslogv3.ResponseFlags) bool {
	return flags.GetNoHealthyUpstream() || flags.GetNoClusterFound() || flags.GetDnsResolutionFailure() || flags.GetUpstreamOverflow() ||
		flags.GetUpstreamConnectionFailure()
}

// tlsFailure makes "TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:TLS_error_end", as
// Envoy writes it, into "certificate verify failed".
func tlsFailure(raw string) string {
	var reasons []string
	for part := range strings.SplitSeq(raw, "|") {
		_, said, ok := strings.Cut(part, "OPENSSL_internal:")
		if !ok {
			continue
		}
		reason, more, _ := strings.Cut(strings.TrimSuffix(said, ":TLS_error_end"), ":")
		reason = strings.ToLower(strings.ReplaceAll(reason, "_", " "))
		if more != "" { // what Envoy adds of its own
			reason += ": " + more
		}
		reasons = append(reasons, reason)
	}
	if reasons == nil {
		return raw
	}
	return strings.Join(reasons, "; ")
}

// fields are the values of one metadata namespace.
type fields struct{ *structpb.Struct }

func (f fields) text(key string) string { return clip(f.GetFields()[key].GetStringValue(), maxText) }

// count reads a number; built-in filters may write it as text.
func (f fields) count(key string) int64 {
	const most = 1 << 53 // what a float64 counts without gaps
	switch v := f.GetFields()[key].GetKind().(type) {
	case *structpb.Value_NumberValue:
		if v.NumberValue >= 0 && v.NumberValue <= most { // false for NaN
			return int64(v.NumberValue)
		}
	case *structpb.Value_StringValue:
		return telemetry.Attributes{key: v.StringValue}.Int(key)
	}
	return 0
}

// moment returns the zero time for what is no time, or none that nanoseconds can tell.
func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil || t.GetSeconds() < 0 || t.GetSeconds() > 1<<33 { // until 2242
		return time.Time{}
	}
	return t.AsTime()
}

func size(n uint64) int64 { return int64(min(n, 1<<62)) }
