package envoy

import (
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	"google.golang.org/protobuf/proto"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// How the rights of many callers are kept apart, so that a changed grant sends few of them again:
//
// One resource holds up to so many leaves. Where there are more, callers are cut by what their SPIFFE IDs begin with,
// letter by letter, until a part is small enough. Each part is an ECDS resource of its own, and the filter that is called
// rights then only chooses: the part with the longest beginning that the caller has, else nothing but the default
// deny. Where the cuts are depends on nothing but the callers, and a caller more or less moves them in its own part
// at most.
//
// The choice stands in the listener. When cuts move, Envoy puts a new filter chain in the place of the endpoint's old
// one as soon as it has all the parts, and connections that began in the old one drain (see Retained). It must not come
// by ECDS itself: Envoy 1.40 does not subscribe to what it finds in such a filter after its start, and when one is
// replaced under a request, a worker frees what belongs to the main thread.

// member is an entry of an endpoint's policy.
type member struct {
	caller segment.Pattern
	class  *authz.Class
}

// membersOf lists the entries sorted by caller.
func membersOf(policy *authz.Endpoint) []member {
	all := make([]member, 0, policy.Members.Len())
	for caller, class := range policy.Members.All() {
		all = append(all, member{caller, class})
	}
	return all
}

// shard is a part: the callers that begin with the prefix and with no longer one of another shard.
type shard struct {
	prefix  string
	rest    bool     // longer ones cut callers out of it
	members []member // sorted by caller; the last may be a larger family that callers in here fall to
}

// name of the resource. What it holds follows from the policy and the name.
func (s shard) name(e segment.EndpointName) string {
	if s.rest {
		return RightsName(e) + "/rest/" + s.prefix
	}
	return RightsName(e) + "/all/" + s.prefix
}

// split cuts members, which are sorted by caller and all begin with the prefix. What falls to none of them belongs to
// the family, which may be nil.
func (l limits) split(members []member, prefix string, family *member, into []shard) []shard {
	common := commonStem(members)
	own := 0 // those that end where the others go on
	for own < len(members) && len(members[own].caller.Stem()) == len(common) {
		own++
	}
	if own == len(members) || weight(members) <= l.shard {
		return append(into, shard{prefix: prefix, members: with(members, family)})
	}
	if own > 0 {
		into = append(into, shard{prefix: common, rest: true, members: with(members[:own], family)})
		if last := &members[own-1]; last.caller.IsPrefix() {
			family = last
		}
	}
	for from := own; from < len(members); {
		next := members[from].caller.Stem()[:len(common)+1]
		to := from + 1
		for to < len(members) && strings.HasPrefix(members[to].caller.Stem(), next) {
			to++
		}
		into = l.split(members[from:to], next, family, into)
		from = to
	}
	return into
}

func with(members []member, family *member) []member {
	if family == nil {
		return members
	}
	return append(members[:len(members):len(members)], *family)
}

// commonStem is what all members begin with. As they are sorted, the first and the last tell.
func commonStem(members []member) string {
	first, last := members[0].caller.Stem(), members[len(members)-1].caller.Stem()
	n := 0
	for n < len(first) && n < len(last) && first[n] == last[n] {
		n++
	}
	return first[:n]
}

// weight is how many leaves they are when they are written out.
func weight(members []member) (n int) {
	for _, m := range members {
		n += leaves(m.class)
	}
	return n
}

// choice is the filter that runs the rights of the shard that a caller belongs to.
func choice(e segment.EndpointName, shards []shard) proto.Message {
	to := branches{}
	for _, s := range shards {
		to[s.prefix] = act("run", &compositev3.ExecuteFilterAction{DynamicConfig: &compositev3.DynamicConfig{
			Name: s.name(e), ConfigDiscovery: deniesUntil()}})
	}
	m := longest(callerInput(), to, nil)
	m.OnNoMatch = runFilter(&rbacv3.RBAC{Matcher: orDeny(nil)})
	return matched(m)
}

// Retained returns an extension that these resources no longer have, but that a gateway still needs for connections
// that began before: an endpoint's rights as a whole, or a shard that callers have since been cut out of or put together
// with. It holds what holds now. It returns nil if there is nothing of the kind.
func (r *Resources) Retained(name string) *corev3.TypedExtensionConfig {
	parts := strings.SplitN(name, "/", 5)
	if len(parts) < 3 || parts[0] != "authz" || parts[2] != "rights" || len(parts) == 4 {
		return nil
	}
	policy := r.policy.Endpoints[segment.EndpointName(parts[1])]
	if policy == nil {
		return nil
	}
	members := membersOf(policy)
	if len(parts) == 5 {
		rest, prefix, family := parts[3] == "rest", parts[4], (*member)(nil)
		var inside []member
		for i, m := range members {
			switch stem := m.caller.Stem(); {
			case stem == prefix, strings.HasPrefix(stem, prefix) && !rest:
				inside = append(inside, m)
			case m.caller.IsPrefix() && strings.HasPrefix(prefix, stem) && (family == nil || len(stem) > len(family.caller.Stem())):
				family = &members[i]
			}
		}
		members = with(inside, family)
	}
	return extension(name, rights(policy, origin{members: members, shadowed: policy.Shadowed}))
}
