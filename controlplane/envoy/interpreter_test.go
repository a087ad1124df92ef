package envoy

import (
	"slices"
	"strings"
	"testing"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	commonmatchingv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkinputv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	sslinputv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// request is what is known of a request when it has passed the extraction stage, and what becomes of it. It goes
// through the filters as it does in Envoy, as far as they decide.
type request struct {
	t                 testing.TB
	caller, operation string
	found, state      map[string]string // dynamic metadata and filter state
	decided           authz.Decision
	opened            map[*anypb.Any]proto.Message // nil, or what other requests have unpacked
}

// pass sends the request through all filters of the endpoint.
func (q *request) pass(r *Resources, endpoint segment.EndpointName) authz.Decision {
	q.state = map[string]string{}
	for _, chain := range r.Listeners[0].FilterChains {
		if chain.Name != string(endpoint) {
			continue
		}
		for _, f := range q.open(chain.Filters[0].GetTypedConfig()).(*hcmv3.HttpConnectionManager).HttpFilters {
			if f.Name == callerFilter && q.caller != "" {
				q.state[stateCaller] = q.caller // as tokens.lua does, by certificate or token
			}
			config := f.GetTypedConfig()
			if f.GetConfigDiscovery() != nil {
				config = discover(r, f.Name)
			}
			q.run(r, config)
		}
		return q.decided
	}
	q.t.Fatalf("no endpoint %s", endpoint)
	return authz.Decision{}
}

func discover(r *Resources, name string) *anypb.Any {
	i := slices.IndexFunc(r.Extensions, func(x *xt) bool { return x.Name == name })
	return r.Extensions[i].TypedConfig
}

func (q *request) open(a *anypb.Any) proto.Message {
	if m := q.opened[a]; m != nil {
		return m
	}
	m, err := a.UnmarshalNew()
	if err != nil {
		q.t.Fatal(err)
	}
	if q.opened != nil {
		q.opened[a] = m
	}
	return m
}

func (q *request) run(r *Resources, config *anypb.Any) {
	switch f := q.open(config).(type) {
	case *setstatev3.Config:
		for _, v := range f.OnRequestHeaders {
			text := q.format(v.GetFormatString().GetTextFormatSource().GetInlineString(), v.GetFormatString().OmitEmptyValues)
			if text != "" || !v.SkipIfEmpty {
				q.state[v.GetObjectKey()] = text
			}
		}
	case *commonmatchingv3.ExtensionWithMatcher:
		if action := q.match(f.XdsMatcher); action != nil {
			run := q.open(action.TypedConfig).(*compositev3.ExecuteFilterAction)
			if run.DynamicConfig != nil {
				q.run(r, discover(r, run.DynamicConfig.Name))
			} else {
				q.run(r, run.TypedConfig.TypedConfig)
			}
		}
	case *rbacv3.RBAC:
		said := q.verdict(f.Matcher)
		q.decided = authz.Decision{Allowed: said.Allowed, Rule: said.Rule, Budget: said.Budget, ShadowAllowed: said.Allowed, ShadowRule: said.Rule}
		if f.ShadowMatcher != nil {
			said = q.verdict(f.ShadowMatcher)
			q.decided.ShadowAllowed, q.decided.ShadowRule = said.Allowed, said.Rule
		}
	}
}

func (q *request) verdict(m *matcherv3.Matcher) authz.Leaf {
	action := q.match(m)
	if action == nil {
		return authz.Leaf{} // denied, and nobody knows why
	}
	a := q.open(action.TypedConfig).(*rbacconfigv3.Action)
	rule, text, counted := strings.Cut(a.Name, " ")
	b, err := segment.ParseBudget(text)
	if counted && err != nil {
		q.t.Error(err)
	}
	return authz.Leaf{Allowed: a.Action != rbacconfigv3.RBAC_DENY, Rule: authz.Rule(rule), Budget: b} // LOG allows, too
}

func (q *request) match(m *matcherv3.Matcher) *xdscorev3.TypedExtensionConfig {
	if m == nil {
		return nil
	}
	tree := m.GetMatcherTree()
	if input, ok := q.input(tree.GetInput()); tree != nil && ok {
		if branch, ok := tree.GetExactMatchMap().GetMap()[input]; ok {
			return q.take(branch)
		}
		for n := len(input); n >= 0; n-- {
			if branch, ok := tree.GetPrefixMatchMap().GetMap()[input[:n]]; ok {
				return q.take(branch)
			}
		}
	}
	return q.take(m.OnNoMatch)
}

func (q *request) take(branch *matcherv3.Matcher_OnMatch) *xdscorev3.TypedExtensionConfig {
	if next := branch.GetMatcher(); next != nil {
		return q.match(next)
	}
	return branch.GetAction()
}

func (q *request) input(x *xdscorev3.TypedExtensionConfig) (string, bool) {
	if x == nil {
		return "", false
	}
	switch in := q.open(x.TypedConfig).(type) {
	case *networkinputv3.FilterStateInput:
		v, ok := q.state[in.Key]
		return v, ok
	case *sslinputv3.UriSanInput:
		return q.caller, q.caller != ""
	}
	q.t.Fatalf("unknown input %s", x.Name)
	return "", false
}

// format fills in what Envoy does: a value that is missing reads "-", or nothing if it says so.
func (q *request) format(text string, omit bool) string {
	var out strings.Builder
	for {
		plain, rest, found := strings.Cut(text, "%")
		out.WriteString(plain)
		if !found {
			return out.String()
		}
		command, after, _ := strings.Cut(rest, "%")
		if text = after; command == "" {
			out.WriteByte('%')
			continue
		}
		value := q.value(command)
		if value == "" && !omit {
			value = "-"
		}
		out.WriteString(value)
	}
}

func (q *request) value(command string) string {
	name, arg, _ := strings.Cut(strings.TrimSuffix(command, ")"), "(")
	switch arg = strings.TrimSuffix(arg, ":PLAIN"); name {
	case "DOWNSTREAM_PEER_URI_SAN":
		return q.caller
	case "FILTER_STATE":
		return q.state[arg]
	case "DYNAMIC_METADATA":
		return q.found[strings.TrimPrefix(arg, "sallyport:")]
	case "METADATA":
		if arg == "ROUTE:sallyport:operation" {
			return q.operation
		}
	}
	q.t.Fatalf("unknown command %s", command)
	return ""
}
