package envoy

import (
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	matchv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// How a budget is kept (budget/gate answers at BudgetCluster, beside each gateway):
//
//	rights   names what it decides by "grant/NAME BUDGET" if the grant has a budget, so that nobody need be told budgets
//	budget   asks the gate before such a request is sent on, and no other; what the gate holds stays in dynamic metadata
//	settle   an access log tells the gate what became of it
const (
	budgetFilter   = "budget"
	rbacMetadata   = "envoy.filters.http.rbac"
	budgetMetadata = "envoy.filters.http.ext_authz"
)

// ruleText is the name that a decision has in Envoy. Whoever wants the rule alone cuts it at the first space.
func ruleText(leaf authz.Leaf) string {
	if leaf.Budget.IsZero() {
		return string(leaf.Rule)
	}
	return string(leaf.Rule) + " " + leaf.Budget.String()
}

// budgeted is the filter that asks whether a request is within its budget. If there is no answer, the request is denied.
func budgeted() *extauthzv3.ExtAuthz {
	budget := grpcTo(BudgetCluster)
	budget.Timeout = durationpb.New(500 * time.Millisecond)
	return &extauthzv3.ExtAuthz{
		Services:                       &extauthzv3.ExtAuthz_GrpcService{GrpcService: budget},
		TransportApiVersion:            corev3.ApiVersion_V3,
		StatusOnError:                  &typev3.HttpStatus{Code: typev3.StatusCode_ServiceUnavailable},
		MetadataContextNamespaces:      []string{rbacMetadata, metadataSpace},
		RouteMetadataContextNamespaces: []string{metadataSpace},
		AllowedHeaders:                 &matchv3.ListStringMatcher{Patterns: []*matchv3.StringMatcher{exact("content-type")}}, // else all are sent
		FilterEnabledMetadata: &matchv3.MetadataMatcher{
			Filter: rbacMetadata,
			Path:   []*matchv3.MetadataMatcher_PathSegment{{Segment: &matchv3.MetadataMatcher_PathSegment_Key{Key: "enforced_effective_policy_id"}}},
			Value: &matchv3.ValueMatcher{MatchPattern: &matchv3.ValueMatcher_StringMatch{StringMatch: &matchv3.StringMatcher{
				MatchPattern: &matchv3.StringMatcher_Contains{Contains: " "}}}},
		},
	}
}

// settlements tell the gate what became of requests that hold tokens.
func settlements() *accesslogv3.AccessLog {
	common := logTo("budget")
	common.GrpcService = grpcTo(BudgetCluster)
	common.BufferFlushInterval = durationpb.New(50 * time.Millisecond)
	log := accessLog("budget", &grpclogv3.HttpGrpcAccessLogConfig{CommonConfig: common})
	log.Filter = whenFound(budgetMetadata, "hold")
	return log
}

// bounds are the keys of a body that say how long its answers may be, for json.lua. Some bound the answer wherever the route
// is served; the others are taken for a bound by some servers, and ignored by others: they only make what is reserved more.
func bounds(p segment.Protocol, r segment.Route) []string {
	if !counts(p, r) || r.Operation == segment.Embed {
		return nil
	}
	if p == segment.Gemini {
		return []string{"most2=maxOutputTokens", "more2=max_output_tokens", "times2=candidateCount,candidate_count"}
	}
	most := ""
	switch path := strings.TrimPrefix(r.Path, "/v1"); {
	case strings.HasPrefix(path, "/chat/"):
		most = "most1=max_tokens,max_completion_tokens"
	case strings.HasPrefix(path, "/responses"):
		most = "most1=max_output_tokens"
	case strings.HasPrefix(path, "/messages"), strings.HasPrefix(path, "/completions"):
		most = "most1=max_tokens"
	case path == "/complete":
		most = "most1=max_tokens_to_sample"
	case path == "/completion", path == "/infill": // llama.cpp
		most = "most1=n_predict"
	}
	return []string{most, "more1=max_tokens,max_completion_tokens,max_output_tokens,max_tokens_to_sample,n_predict",
		"times1=n,best_of", "each1=prompt,messages"}
}
