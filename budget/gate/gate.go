// Package gate lets a gateway ask whether a request is within its budget, and tells it what became of it: Envoy's external
// authorization (envoy.service.auth.v3.Authorization) before the request is sent on, and an access log
// (envoy.service.accesslog.v3.AccessLogService) when it has ended.
//
// It is for the process that runs an Envoy, which alone can reach it: what comes in here is believed. It knows no documents. What
// a grant bounds is in the name of the rule that decided, so a decision and its budget never come from different generations. It
// never allows what was denied: only requests that a grant with a budget has allowed are asked about. What it can't read, or
// count, is denied; if there are no counters to ask, what the grant says for that is done.
package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/budget"
	"sallyport.dev/segment"
)

// Counters are where budgets are counted. Any error of Reserve means that nothing may be given.
type Counters interface {
	Reserve(ctx context.Context, now time.Time, charges []budget.Charge) (budget.Answer, error)
	Settle(ctx context.Context, now time.Time, s budget.Settlement) error
}

// Namespaces and keys of metadata.
const (
	rbacMetadata = "envoy.filters.http.rbac"
	rbacRule     = "enforced_effective_policy_id"
	ourMetadata  = "sallyport"
	// ownMetadata is the namespace in which the gate itself leaves what it must find again.
	ownMetadata = "envoy.filters.http.ext_authz"
	// holdKey is there if the request has taken tokens, and must be reported when it has ended.
	holdKey = "hold"
)

// Gate is made by New. All methods may be called at any time from anywhere.
type Gate struct {
	counters Counters
	log      *slog.Logger
	silent   atomic.Bool // the counters can't be asked, and that has been said

	allowed, limited, uncounted, failed, settled atomic.Uint64
}

// New returns a gate.
func New(counters Counters, log *slog.Logger) *Gate { return &Gate{counters: counters, log: log} }

// Register adds both services to a server, which must admit the gateway only.
func (g *Gate) Register(s grpc.ServiceRegistrar) {
	authv3.RegisterAuthorizationServer(s, g)
	alsv3.RegisterAccessLogServiceServer(s, g)
}

// Stats count requests since the start.
type Stats struct {
	Allowed   uint64 `json:"allowed"`
	Limited   uint64 `json:"limited"`
	Uncounted uint64 `json:"uncounted"` // allowed without being counted, as their grants wish
	Failed    uint64 `json:"failed"`    // denied because they could not be counted
	Settled   uint64 `json:"settled"`   // of those that took tokens
}

// Stats returns the counts so far.
func (g *Gate) Stats() Stats {
	return Stats{g.allowed.Load(), g.limited.Load(), g.uncounted.Load(), g.failed.Load(), g.settled.Load()}
}

// Check answers whether a request is within its budget.
func (g *Gate) Check(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	now := time.Now()
	ask, err := read(r.GetAttributes())
	if err != nil {
		g.failed.Add(1)
		g.log.Error("a request can't be counted", "error", err)
		return denied(typev3.StatusCode_InternalServerError, codes.Internal, "this request can't be counted"), nil
	}
	charges, hold := ask.Charges()
	answer, err := g.counters.Reserve(ctx, now, charges)
	g.note(ctx, err)
	switch {
	case err != nil:
		return g.blind(ask.Budget), nil //nolint:nilerr // the answer says it
	case !answer.Allowed:
		g.limited.Add(1)
		return limited(now, charges, answer), nil
	}
	g.allowed.Add(1)
	ok := &authv3.CheckResponse{Status: &status.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{
		OkResponse: &authv3.OkHttpResponse{ResponseHeadersToAdd: standing(now, answer.Balances)}}}
	if hold != nil {
		hold.Window = answer.Balances[len(answer.Balances)-1].Window
		text, err := json.Marshal(hold)
		if err != nil {
			return nil, fmt.Errorf("encode hold: %w", err) // and the request is denied
		}
		ok.DynamicMetadata = &structpb.Struct{Fields: map[string]*structpb.Value{holdKey: structpb.NewStringValue(string(text))}}
	}
	return ok, nil
}

// blind answers while nothing can be counted.
func (g *Gate) blind(b segment.Budget) *authv3.CheckResponse {
	if b.Open {
		g.uncounted.Add(1)
		return &authv3.CheckResponse{Status: &status.Status{}}
	}
	g.failed.Add(1)
	return denied(typev3.StatusCode_ServiceUnavailable, codes.Unavailable, "the budget of this request can't be counted just now",
		header("retry-after", "1"))
}

// note says once that counters are away, and once that they are back. A question that the gateway gave up says nothing.
func (g *Gate) note(ctx context.Context, err error) {
	switch {
	case err != nil && ctx.Err() == nil && !g.silent.Swap(true):
		g.log.Error("budgets can't be counted: requests are denied unless their grants say otherwise", "error", err)
	case err == nil && g.silent.Load() && g.silent.Swap(false):
		g.log.Info("budgets are counted again")
	}
}

var errCaller = errors.New("nobody says who the caller is")

// read finds out what a request asks for.
func read(a *authv3.AttributeContext) (budget.Ask, error) {
	said := a.GetMetadataContext().GetFilterMetadata()
	grant, bounds, err := budget.ParseRule(said[rbacMetadata].GetFields()[rbacRule].GetStringValue())
	if err != nil {
		return budget.Ask{}, err
	}
	ours := said[ourMetadata].GetFields()
	ask := budget.Ask{
		Grant:     grant,
		Budget:    bounds,
		Caller:    ours["caller"].GetStringValue(), // where callers may have tokens
		Operation: segment.Operation(a.GetRouteMetadataContext().GetFilterMetadata()[ourMetadata].GetFields()["operation"].GetStringValue()),
		Bytes:     a.GetRequest().GetHttp().GetSize(),
		Output:    number(ours["max_output"]),
		Answers:   number(ours["answers"]),
	}
	if ask.Caller == "" {
		ask.Caller = a.GetSource().GetPrincipal()
	}
	if ask.Caller == "" {
		return ask, errCaller
	}
	return ask, nil
}

// number reads a count; what is none counts as not there.
func number(v *structpb.Value) int64 {
	n := v.GetNumberValue()
	if !(n >= 0) { // nor is NaN
		return 0
	}
	return int64(math.Ceil(min(n, segment.MaxLimit)))
}

// longRetry is from when on it is no use that a client waits. Those of OpenAI wait no minute.
const longRetry = time.Minute

func limited(now time.Time, charges []budget.Charge, answer budget.Answer) *authv3.CheckResponse {
	why := answer.Refusal(now, charges)
	c, b := why.Charge, why.Balance
	whose := "a caller"
	if c.Caller == "" {
		whose = "all its callers together"
	}
	message := fmt.Sprintf("grant/%s has %d %s a %s for %s: %d are taken, and this request takes %d",
		c.Grant, c.Max, c.Unit, strings.ToLower(string(c.Per)), whose, b.Used, c.Amount)
	headers := standing(now, answer.Balances)
	switch {
	case why.Wait == 0:
		message += ", which is more than there ever is; state a smaller max_tokens, or send less"
	default:
		message += ". There are more at " + b.Resets.Format(time.RFC3339)
		headers = append(headers, header("retry-after", strconv.FormatInt(seconds(why.Wait), 10)))
	}
	if why.Wait == 0 || why.Wait > longRetry {
		headers = append(headers, header("x-should-retry", "false"))
	}
	return denied(typev3.StatusCode_TooManyRequests, codes.ResourceExhausted, message, headers...)
}

// seconds rounds up, so that nobody comes too early.
func seconds(d time.Duration) int64 { return int64((max(0, d) + time.Second - 1) / time.Second) }

// standing are the headers that say how the accounts stand: those of OpenAI, and RateLimit-Policy and RateLimit
// (draft-ietf-httpapi-ratelimit-headers-10).
func standing(now time.Time, balances []budget.Balance) []*corev3.HeaderValueOption {
	var headers []*corev3.HeaderValueOption
	var policy, limit []string
	for _, b := range balances {
		resets := seconds(b.Resets.Sub(now))
		unit := string(b.Unit)
		headers = append(headers,
			header("x-ratelimit-limit-"+unit, strconv.FormatInt(b.Max, 10)),
			header("x-ratelimit-remaining-"+unit, strconv.FormatInt(b.Remaining(), 10)),
			header("x-ratelimit-reset-"+unit, (time.Duration(resets)*time.Second).String()))
		policy = append(policy, fmt.Sprintf(`"%s";q=%d;w=%d`, unit, b.Max, seconds(b.Resets.Sub(b.Window))))
		limit = append(limit, fmt.Sprintf(`"%s";r=%d;t=%d`, unit, b.Remaining(), resets))
	}
	return append(headers, header("ratelimit-policy", strings.Join(policy, ", ")), header("ratelimit", strings.Join(limit, ", ")))
}

// header takes the place of one that the backend sends: it knows nothing of this budget.
func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD}
}

func denied(code typev3.StatusCode, grpcCode codes.Code, message string, headers ...*corev3.HeaderValueOption) *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &status.Status{Code: int32(grpcCode), Message: message},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: code}, Headers: headers, Body: message}}}
}

// StreamAccessLogs settles what has ended, until the gateway ends the stream.
func (g *Gate) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&alsv3.StreamAccessLogsResponse{})
		}
		if err != nil {
			return err
		}
		for _, e := range m.GetHttpLogs().GetLogEntry() {
			g.settle(stream.Context(), e)
		}
	}
}

func (g *Gate) settle(ctx context.Context, e *accesslogv3.HTTPAccessLogEntry) {
	said := e.GetCommonProperties().GetMetadata().GetFilterMetadata()
	text := said[ownMetadata].GetFields()[holdKey].GetStringValue()
	if kind := e.GetCommonProperties().GetAccessLogType(); text == "" ||
		kind != accesslogv3.AccessLogType_NotSet && kind != accesslogv3.AccessLogType_DownstreamEnd {
		return
	}
	var hold budget.Hold
	if err := json.Unmarshal([]byte(text), &hold); err != nil {
		g.log.Error("what a request took can't be read, and stays taken", "error", err)
		return
	}
	s := budget.Settlement{Account: hold.Account, Window: hold.Window, Reserved: hold.Reserved, Used: hold.Used(seen(e))}
	if err := g.counters.Settle(ctx, time.Now(), s); err != nil {
		g.note(ctx, err)
		return
	}
	g.settled.Add(1)
}

// fromBackend is what Envoy says of an answer that is not its own.
const fromBackend = "via_upstream"

// seen reads what the gateway saw of a request.
func seen(e *accesslogv3.HTTPAccessLogEntry) budget.Seen {
	common, resp := e.GetCommonProperties(), e.GetResponse()
	flags := common.GetResponseFlags()
	ours := common.GetMetadata().GetFilterMetadata()[ourMetadata].GetFields()
	s := budget.Seen{
		Status:   int(resp.GetResponseCode().GetValue()),
		Bytes:    int64(min(resp.GetResponseBodyBytes(), segment.MaxLimit)),
		Input:    number(ours["input_tokens"]),
		Output:   number(ours["output_tokens"]),
		Events:   number(ours["events"]),
		Smallest: number(ours["smallest_event"]),
	}
	s.HasReport = ours["input_tokens"] != nil || ours["output_tokens"] != nil
	// Only what came to its end, from the backend to the caller, is whole.
	s.Complete = s.Status != 0 && common.GetTimeToLastUpstreamRxByte() != nil && resp.GetResponseCodeDetails() == fromBackend &&
		!flags.GetDownstreamConnectionTermination() && !flags.GetDownstreamRemoteReset() && !flags.GetDownstreamProtocolError() &&
		!flags.GetUpstreamRemoteReset() && !flags.GetUpstreamConnectionTermination() && !flags.GetUpstreamProtocolError()
	// A backend that was asked and has not answered may be at work, unless the connection to it was lost.
	s.Worked = common.GetUpstreamRemoteAddress() != nil && common.GetTimeToLastUpstreamTxByte() != nil && resp.GetResponseCodeDetails() != fromBackend &&
		!flags.GetUpstreamConnectionFailure() && !flags.GetUpstreamConnectionTermination() && !flags.GetUpstreamRemoteReset()
	return s
}
