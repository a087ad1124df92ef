package envoy

import (
	"slices"
	"strings"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	commonmatchingv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	statev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	networkinputv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	sslinputv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"
	"google.golang.org/protobuf/proto"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// How a decision is made in Envoy:
//
//	members   class    := the caller's SPIFFE ID, or the digest of the class that it belongs to
//	names     name     := the resource that the UUID in the path belongs to (only where there are UUIDs)
//	question  question := =CLASS|OPERATION=NAME and request := OPERATION=NAME
//	rights    RBAC: question in the exact map? its leaf. A prefix of it in the prefix map? its leaf.
//	          CLASS below a caller prefix? request in that prefix's two maps. Else default-deny.
//
// Every step is a look-up, so cost does not grow with the number of grants. The "=" stands in both only when the
// extraction stage has judged the request and the name is known, so a stage that failed or was left out makes a
// question that no grant answers; the first one also for a caller whose own name looks like a whole question.
const (
	stateClass    = "sallyport.class"
	stateName     = "sallyport.name"
	stateResolved = "sallyport.resolved"
	stateID       = "sallyport.id"
	stateServed   = "sallyport.served" // the name again, also where it is not what is asked for: it chooses the backends
	stateQuestion = "sallyport.question"
	stateRequest  = "sallyport.request"
)

// limits say in what form rights are lowered.
type limits struct {
	writtenOut int // above this many leaves, written out for each caller, callers with equal rights are put into classes
	saves      int // if that makes so many times fewer. One more look-up then keeps apps × models from multiplying out
	shard      int // above this many, rights are kept apart in several resources
}

// A shard of this size takes some ten milliseconds of Envoy's main thread.
var defaultLimits = limits{writtenOut: 20000, saves: 4, shard: 2000}

// What an endpoint's authorization is depends on its form, and so do the names of its ECDS resources: a filter chain
// has them all of one form, whatever comes when.

// MembersName is the ECDS resource that takes callers as they are.
func MembersName(e segment.EndpointName) string { return "authz/" + string(e) + "/members" }

// ClassesName is the one that puts them into classes.
func ClassesName(e segment.EndpointName) string { return "authz/" + string(e) + "/classes" }

// NamesName is the ECDS resource that turns an endpoint's UUIDs into names.
func NamesName(e segment.EndpointName) string { return "authz/" + string(e) + "/names" }

// RightsName is the ECDS resource that decides at an endpoint, or the filter that chooses a shard of it.
func RightsName(e segment.EndpointName) string { return "authz/" + string(e) + "/rights" }

// ClassRightsName is the one that decides about classes.
func ClassRightsName(e segment.EndpointName) string { return RightsName(e) + "/classes" }

func (r *Resources) authorization(e *segment.Endpoint, policy *authz.Endpoint, names map[string]string) []*corev3.TypedExtensionConfig {
	if policy == nil {
		policy = &authz.Endpoint{}
	}
	all, f := r.arranged(e.Name, policy)
	r.members[e.Name], r.forms[e.Name] = all, f
	if e.Protocol == segment.TCP {
		return r.connection(e, policy)
	}
	from := origin{members: all, shadowed: policy.Shadowed, classes: f.classes}
	callers := origin{tokens: e.Tokens != nil}
	var extensions []*corev3.TypedExtensionConfig
	if f.classes {
		callers.members, callers.classes = all, true
		extensions = append(extensions, r.extension(ClassesName(e.Name)+told(callers.tokens), callers, func() proto.Message { return members(callers) }),
			r.extension(ClassRightsName(e.Name), from, func() proto.Message { return rights(policy, from) }))
	} else {
		extensions = append(extensions, r.extension(MembersName(e.Name)+told(callers.tokens), callers, func() proto.Message { return members(callers) }))
	}
	if addressesByID(e.Protocol) {
		extensions = append(extensions, extension(NamesName(e.Name), resolve(names)))
	}
	for _, s := range f.shards {
		part := origin{members: s.members, shadowed: from.shadowed}
		extensions = append(extensions, r.extension(s.name(e.Name), part, func() proto.Message { return rights(policy, part) }))
	}
	if !f.classes && f.shards == nil {
		extensions = append(extensions, r.extension(RightsName(e.Name), from, func() proto.Message { return rights(policy, from) }))
	}
	return extensions
}

// form is how an endpoint's rights are lowered.
type form struct {
	classes bool
	shards  []shard // nil: as a whole
}

// origin is what one resource is made of.
type origin struct {
	members                   []member
	classes, shadowed, tokens bool
}

func (o origin) equal(other origin) bool {
	return o.shadowed == other.shadowed && o.classes == other.classes && o.tokens == other.tokens && sameMembers(o.members, other.members)
}

// sameMembers is slices.Equal, which does not look at a list that is the very same.
func sameMembers(a, b []member) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

type made struct {
	from origin
	it   *corev3.TypedExtensionConfig
}

// extension makes a resource, unless it has been made before of the same.
func (r *Resources) extension(name string, from origin, make func() proto.Message) *corev3.TypedExtensionConfig {
	for _, e := range r.earlier {
		before, ok := e.made[name]
		if ok && before.from.equal(from) {
			r.made[name] = before
			return before.it
		}
	}
	r.made[name] = made{from: from, it: extension(name, make())}
	return r.made[name].it
}

// useClasses decides by size alone: how many leaves there are if they are written out for each caller.
func (l limits) useClasses(policy *authz.Endpoint, written int) bool {
	if written <= l.writtenOut {
		return false
	}
	classed := 0
	for _, class := range policy.Classes {
		classed += class.Leaves()
	}
	return classed*l.saves < written
}

// members is the filter that sets the class.
func members(from origin) proto.Message {
	if !from.classes {
		return setState(state{stateClass, callerFormat(from.tokens)})
	}
	exact, prefix := branches{}, branches{}
	set := map[*authz.Class]*matcherv3.Matcher_OnMatch{}
	for _, m := range from.members {
		if set[m.class] == nil {
			set[m.class] = runFilter(setState(state{stateClass, m.class.ID}))
		}
		exact.or(prefix, m.caller)[m.caller.Stem()] = set[m.class]
	}
	caller := callerInput(from.tokens)
	return matched(exactly(caller, exact, longest(caller, prefix, nil)))
}

// resolve is the filter that turns a UUID into the name of what it belongs to. What it does not know stays unresolved.
func resolve(names map[string]string) proto.Message {
	exact := branches{}
	for id, name := range names {
		exact[id] = runFilter(setState(state{stateName, literal(name)}, state{stateResolved, "="}))
	}
	return matched(exactly(stateInput(stateID), exact, nil))
}

// rights is the RBAC filter that answers the question.
func rights(policy *authz.Endpoint, from origin) proto.Message {
	filter := &rbacv3.RBAC{Matcher: decisions(policy, from, func(c *authz.Class) authz.Rights { return c.Enforced })}
	if from.shadowed {
		filter.ShadowMatcher = decisions(policy, from, func(c *authz.Class) authz.Rights { return c.Shadow })
	}
	return filter
}

func decisions(policy *authz.Endpoint, from origin, of func(*authz.Class) authz.Rights) *matcherv3.Matcher {
	exact, prefix, below := branches{}, branches{}, branches{}
	ends := endings{}
	if from.classes {
		for _, class := range policy.Classes {
			ends.add(exact, prefix, "="+class.ID+"|", of(class))
		}
	} else {
		for _, m := range from.members {
			if !m.caller.IsPrefix() {
				ends.add(exact, prefix, "="+string(m.caller)+"|", of(m.class))
				continue
			}
			requests, families := branches{}, branches{}
			ends.add(requests, families, "", of(m.class))
			below[m.caller.Stem()] = &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{
				Matcher: orDeny(exactly(stateInput(stateRequest), requests, longest(stateInput(stateRequest), families, nil)))}}
		}
	}
	return orDeny(exactly(stateInput(stateQuestion), exact,
		longest(stateInput(stateQuestion), prefix, longest(stateInput(stateClass), below, nil))))
}

// endings are the ends that decide, each of them made once: most leaves are the same as another.
type endings map[authz.Leaf]*matcherv3.Matcher_OnMatch

// add writes out what one class may do.
func (ends endings) add(exact, prefix branches, before string, rights authz.Rights) {
	for op, resources := range rights {
		for resource, leaf := range resources.All() {
			if ends[leaf] == nil {
				ends[leaf] = decide(leaf)
			}
			exact.or(prefix, resource)[before+string(op)+"="+resource.Stem()] = ends[leaf]
		}
	}
}

// --- matchers, in the words of xDS ---

type branches map[string]*matcherv3.Matcher_OnMatch

// or returns exact or prefix, by what the pattern is.
func (exact branches) or(prefix branches, p segment.Pattern) branches {
	if p.IsPrefix() {
		return prefix
	}
	return exact
}

// exactly is one step: the branch whose key is the input, else the next step. Without branches it is the next step.
func exactly(input *xdscorev3.TypedExtensionConfig, to branches, next *matcherv3.Matcher) *matcherv3.Matcher {
	return step(input, to, next, &matcherv3.Matcher_MatcherTree{TreeType: &matcherv3.Matcher_MatcherTree_ExactMatchMap{
		ExactMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: to}}})
}

// longest is one step: the branch whose key is the longest prefix of the input, else the next step.
func longest(input *xdscorev3.TypedExtensionConfig, to branches, next *matcherv3.Matcher) *matcherv3.Matcher {
	return step(input, to, next, &matcherv3.Matcher_MatcherTree{TreeType: &matcherv3.Matcher_MatcherTree_PrefixMatchMap{
		PrefixMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: to}}})
}

func step(input *xdscorev3.TypedExtensionConfig, to branches, next *matcherv3.Matcher, tree *matcherv3.Matcher_MatcherTree) *matcherv3.Matcher {
	if len(to) == 0 {
		return next
	}
	tree.Input = input
	m := &matcherv3.Matcher{MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: tree}}
	if next != nil {
		m.OnNoMatch = &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{Matcher: next}}
	}
	return m
}

// orDeny ends a chain of steps with the default deny.
func orDeny(m *matcherv3.Matcher) *matcherv3.Matcher {
	deny := decide(authz.Leaf{Rule: authz.DefaultDeny})
	if m == nil {
		return &matcherv3.Matcher{OnNoMatch: deny}
	}
	last := m
	for last.OnNoMatch != nil {
		last = last.OnNoMatch.GetMatcher()
	}
	last.OnNoMatch = deny
	return m
}

// decide is the end of the way: the verdict and the rule that it is named after.
func decide(leaf authz.Leaf) *matcherv3.Matcher_OnMatch {
	action := rbacconfigv3.RBAC_DENY
	if leaf.Allowed {
		action = rbacconfigv3.RBAC_ALLOW
	}
	return act("decide", &rbacconfigv3.Action{Name: ruleText(leaf), Action: action})
}

// runFilter is the end of the way in a composite filter: run this filter.
func runFilter(filter proto.Message) *matcherv3.Matcher_OnMatch {
	return act("run", &compositev3.ExecuteFilterAction{TypedConfig: extension("run", filter)})
}

func act(name string, config proto.Message) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{
		Action: &xdscorev3.TypedExtensionConfig{Name: name, TypedConfig: pack(config)}}}
}

func matched(m *matcherv3.Matcher) proto.Message {
	return &commonmatchingv3.ExtensionWithMatcher{
		XdsMatcher:      m,
		ExtensionConfig: extension("composite", &compositev3.Composite{}),
	}
}

func stateInput(key string) *xdscorev3.TypedExtensionConfig {
	return &xdscorev3.TypedExtensionConfig{Name: key, TypedConfig: pack(&networkinputv3.FilterStateInput{Key: key})}
}

// callerInput is the caller's SPIFFE ID, for matchers.
func callerInput(tokens bool) *xdscorev3.TypedExtensionConfig {
	if tokens {
		return stateInput(stateCaller)
	}
	return &xdscorev3.TypedExtensionConfig{Name: "caller", TypedConfig: pack(&sslinputv3.UriSanInput{})}
}

// callerFormat is the caller's SPIFFE ID, for texts.
func callerFormat(tokens bool) string {
	if tokens {
		return "%FILTER_STATE(" + stateCaller + ":PLAIN)%"
	}
	return "%DOWNSTREAM_PEER_URI_SAN%"
}

func extension(name string, config proto.Message) *corev3.TypedExtensionConfig {
	return &corev3.TypedExtensionConfig{Name: name, TypedConfig: pack(config)}
}

// --- filter state ---

// state is one object of filter state and the format string that fills it.
type state struct{ key, format string }

// setState fills filter state from what is known when the request's headers pass. An object without a value is not set.
func setState(states ...state) *setstatev3.Config {
	config := &setstatev3.Config{}
	for _, s := range states {
		config.OnRequestHeaders = append(config.OnRequestHeaders, &statev3.FilterStateValue{
			Key:        &statev3.FilterStateValue_ObjectKey{ObjectKey: s.key},
			FactoryKey: "envoy.string",
			Value: &statev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
				Format:          &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: inline(s.format)},
				OmitEmptyValues: true, // else a missing value reads "-"
			}},
			SkipIfEmpty: true,
		})
	}
	return config
}

func inline(text string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: text}}
}

// literal protects text from being read as a format.
func literal(text string) string { return strings.ReplaceAll(text, "%", "%%") }
