package envoy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sort"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
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

// lineup is an endpoint's members sorted by caller, or some that stand side by side, and how many leaves they are.
type lineup struct {
	members []member
	before  []int // the leaves of all members before each of these, and before the one that follows
}

func lineUp(members []member) lineup {
	l := lineup{members, make([]int, 1, len(members)+1)}
	for i, m := range members {
		l.before = append(l.before, l.before[i]+m.class.Leaves())
	}
	return l
}

func (l lineup) weight() int { return l.before[len(l.members)] - l.before[0] }

func (l lineup) slice(from, to int) lineup { return lineup{l.members[from:to], l.before[from : to+1]} }

// membersOf lists the entries sorted by caller.
func membersOf(policy *authz.Endpoint) []member {
	all := make([]member, 0, policy.Members.Len())
	for caller, class := range policy.Members.All() {
		all = append(all, member{caller, class})
	}
	return all
}

// arranged is who may do something at an endpoint, and in what form that is lowered. It is the same as long as the policy is.
func (r *Resources) arranged(e segment.EndpointName, policy *authz.Endpoint) ([]member, form) {
	for _, last := range r.earlier {
		if last.policy != nil && last.policy.Endpoints[e] == policy && last.limits == r.limits {
			if f, ok := last.forms[e]; ok {
				return last.members[e], f
			}
		}
	}
	all := membersOf(policy)
	l := lineUp(all)
	f := form{classes: r.limits.useClasses(policy, l.weight())}
	if !f.classes && l.weight() > r.limits.shard {
		f.shards = r.limits.cut(l)
	}
	return all, f
}

// shard is a part: the callers that begin with the prefix and with no longer one of another shard.
type shard struct {
	prefix  string
	rest    string   // longer ones cut callers out of it: their digest; empty: there are none
	members []member // sorted by caller; the last may be a larger family that callers in here fall to
}

// name of the resource. What it holds follows from the policy and the name.
func (s shard) name(e segment.EndpointName) string {
	if s.rest != "" { // for one who was led here by other cuts this is not the answer, so it has another name
		return RightsName(e) + "/rest/" + s.rest + "/" + s.prefix
	}
	return RightsName(e) + "/all/" + s.prefix
}

// shardOf is the endpoint and the prefix of a shard of this name, as name puts them together.
func shardOf(name string) (e segment.EndpointName, prefix string, ok bool) {
	parts := strings.SplitN(name, "/", 5)
	if len(parts) < 5 || parts[0] != "authz" || parts[2] != "rights" {
		return "", "", false
	}
	switch e, prefix = segment.EndpointName(parts[1]), parts[4]; parts[3] {
	case "all":
		return e, prefix, true
	case "rest":
		_, prefix, ok = strings.Cut(prefix, "/")
		return e, prefix, ok
	}
	return "", "", false
}

// cut is split, and tells each rest what was cut out of it.
func (l limits) cut(all lineup) []shard {
	shards := l.split(all, "", nil, nil)
	for i := range shards {
		if shards[i].rest == "" {
			continue
		}
		h := sha256.New()
		for _, s := range shards {
			if len(s.prefix) > len(shards[i].prefix) && strings.HasPrefix(s.prefix, shards[i].prefix) {
				fmt.Fprintf(h, "%q\n", s.prefix)
			}
		}
		shards[i].rest = hex.EncodeToString(h.Sum(nil)[:8])
	}
	return shards
}

// split cuts members, which are sorted by caller and all begin with the prefix. What falls to none of them belongs to
// the family, which may be nil.
func (l limits) split(all lineup, prefix string, family *member, into []shard) []shard {
	members := all.members
	common := commonStem(members)
	own := 0 // those that end where the others go on
	for own < len(members) && len(members[own].caller.Stem()) == len(common) {
		own++
	}
	if own == len(members) || all.weight() <= l.shard {
		return append(into, shard{prefix: prefix, members: with(members, family)})
	}
	if own > 0 {
		into = append(into, shard{prefix: common, rest: "?", members: with(members[:own], family)})
		if last := &members[own-1]; last.caller.IsPrefix() {
			family = last
		}
	}
	for from := own; from < len(members); {
		next := members[from].caller.Stem()[:len(common)+1]
		to := from + sort.Search(len(members)-from, func(i int) bool { return !strings.HasPrefix(members[from+i].caller.Stem(), next) })
		into = l.split(all.slice(from, to), next, family, into)
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

// chosen is a choice, and what it was made of.
type chosen struct {
	shards []string // their names
	tokens bool
	filter *hcmv3.HttpFilter
}

// choice is the endpoint's, unless it has been made before of the same: it is long, and most changes move no shard.
func (r *Resources) choice(e segment.EndpointName, shards []shard, tokens bool) *hcmv3.HttpFilter {
	names := make([]string, len(shards)) // which tell the prefixes, too
	for i, s := range shards {
		names[i] = s.name(e)
	}
	for _, earlier := range r.earlier {
		if c := earlier.choices[e]; c.filter != nil && c.tokens == tokens && slices.Equal(c.shards, names) {
			r.choices[e] = c
			return c.filter
		}
	}
	r.choices[e] = chosen{names, tokens, filter(RightsName(e), choice(e, shards, tokens))}
	return r.choices[e].filter
}

// choice is the filter that runs the rights of the shard that a caller belongs to.
func choice(e segment.EndpointName, shards []shard, tokens bool) proto.Message {
	to := branches{}
	for _, s := range shards {
		to[s.prefix] = act("run", &compositev3.ExecuteFilterAction{DynamicConfig: &compositev3.DynamicConfig{
			Name: s.name(e), ConfigDiscovery: deniesUntil()}})
	}
	m := longest(callerInput(tokens), to, nil)
	m.OnNoMatch = runFilter(&rbacv3.RBAC{Matcher: orDeny(nil)})
	return matched(m)
}

// Retained returns an extension that these resources no longer have, but that a gateway still needs for connections
// that began before: an endpoint's authorization in another form, or a shard by other cuts. It holds what holds now. It
// returns nil if there is nothing of the kind, and the last one of this name, which may be nil, if that holds the same.
func (r *Resources) Retained(name string, last *Kept) *Kept {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) < 3 || r.policy == nil {
		return nil
	}
	e := segment.EndpointName(parts[1])
	policy := r.policy.Endpoints[e]
	if policy == nil {
		return nil
	}
	from := origin{members: r.members[e], shadowed: policy.Shadowed}
	switch own, tokens := strings.CutSuffix(name, told(true)); {
	case own == MembersName(e):
		callers := origin{tokens: tokens}
		return r.retain(name, callers, last, func() proto.Message { return members(callers) })
	case own == ClassesName(e):
		from = origin{members: from.members, classes: true, tokens: tokens}
		return r.retain(name, from, last, func() proto.Message { return members(from) })
	case name == ClassRightsName(e):
		from.classes = true
	case name == RightsName(e):
	default:
		_, prefix, ok := shardOf(name)
		if !ok {
			return nil
		}
		from.members = r.inside(e, name, prefix)
	}
	return r.retain(name, from, last, func() proto.Message { return rights(policy, from) })
}

// inside are the members of a shard of this name. Of other cuts, whoever was led there may be anybody with its prefix.
func (r *Resources) inside(e segment.EndpointName, name, prefix string) []member {
	for _, s := range r.forms[e].shards {
		if s.name(e) == name {
			return s.members
		}
	}
	var inside []member
	var family *member
	for i, m := range r.members[e] {
		switch stem := m.caller.Stem(); {
		case strings.HasPrefix(stem, prefix):
			inside = append(inside, m)
		case m.caller.IsPrefix() && strings.HasPrefix(prefix, stem) && (family == nil || len(stem) > len(family.caller.Stem())):
			family = &r.members[e][i]
		}
	}
	return with(inside, family)
}

// Kept is an extension that is retained.
type Kept struct {
	Extension *corev3.TypedExtensionConfig
	Version   string
	from      origin
}

func (r *Resources) retain(name string, from origin, last *Kept, make func() proto.Message) *Kept {
	if last != nil && last.Extension.Name == name && last.from.equal(from) {
		return last
	}
	it := extension(name, make())
	return &Kept{it, r.Version(it), from}
}
