package learn

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// Suggestion is the least that would have had to be granted.
type Suggestion struct {
	Grants []Proposal `json:"grants"` // sorted by caller and endpoint: one for each pair
	Left   []Left     `json:"left"`   // what no grant was written for, and why
}

// Proposal is a grant that could be written.
type Proposal struct {
	Name     segment.GrantName    `json:"name"` // no other grant has it
	Caller   spiffeid.ID          `json:"caller"`
	Workload segment.WorkloadName `json:"workload,omitempty"` // that has this SPIFFE ID now
	Endpoint segment.EndpointName `json:"endpoint"`
	To       []Product            `json:"to"`
	Count    int64                `json:"count"` // of requests that it stands for, without those that it only implies
	First    time.Time            `json:"first"`
	Last     time.Time            `json:"last"`
}

// Product is operations on resources: each of them was seen on each of these.
type Product struct {
	Operations []segment.Operation `json:"operations"`
	Resources  []Seen              `json:"resources"`
}

// Seen is a resource and what was seen of it.
type Seen struct {
	Pattern segment.Pattern `json:"resource"`
	Count   int64           `json:"count"`
	Last    time.Time       `json:"last"`
	// Names are what a pattern with "*" stands for, sorted, at most ten of Different.
	Names     []string `json:"names,omitempty"`
	Different int      `json:"different,omitempty"`
}

// Left is what no grant can say, or what says too much.
type Left struct {
	Caller    spiffeid.ID          `json:"caller"`
	Endpoint  segment.EndpointName `json:"endpoint,omitempty"`
	Operation segment.Operation    `json:"operation,omitempty"`
	Resource  string               `json:"resource,omitempty"`
	Count     int64                `json:"count"`
	Last      time.Time            `json:"last"`
	Why       string               `json:"why"`
}

const (
	maxNames    = 10   // of a pattern
	clipped     = 1020 // bytes of a resource that may have been longer before it was recorded
	maxLabel    = 63   // RFC 1123, of a name of a document
	maxReadable = 48   // of it, for people
)

// Suggest makes grants that allow what the tallies count and nothing else, except that a resource that one of the
// prefixes covers is granted by the longest such prefix. What it leaves out it says. The grants fit the configuration's
// endpoints, and have other names than its grants.
func Suggest(cfg *segment.Config, seen []telemetry.Tally, prefixes []segment.Pattern) Suggestion {
	s := suggester{cfg: cfg, prefixes: prefixes, pairs: map[asked]*pair{}, left: map[Left]*telemetry.Tally{}}
	for _, t := range seen {
		if !isImplied(t.Operation) {
			s.add(t)
		}
	}
	for _, t := range seen { // after all that could imply them
		if isImplied(t.Operation) {
			s.imply(t)
		}
	}
	return s.suggestion()
}

type suggester struct {
	cfg      *segment.Config
	prefixes []segment.Pattern
	pairs    map[asked]*pair // without a resource
	left     map[Left]*telemetry.Tally
}

// pair is what one caller did at one endpoint.
type pair struct {
	telemetry.Tally
	done map[segment.Pattern]map[segment.Operation]*evidence
}

type evidence struct {
	telemetry.Tally
	names map[string]bool
}

func (s *suggester) leave(t telemetry.Tally, why string) {
	l := Left{Caller: t.Caller, Endpoint: t.Endpoint, Operation: t.Operation, Resource: t.Resource, Why: why}
	if s.left[l] == nil {
		s.left[l] = &telemetry.Tally{}
	}
	s.left[l].Add(t)
}

func (s *suggester) add(t telemetry.Tally) {
	pattern, why := s.pattern(t)
	if why == "" {
		why = s.whyNot(t)
	}
	if why != "" {
		s.leave(t, why)
		return
	}
	key := asked{caller: t.Caller, endpoint: t.Endpoint}
	p := s.pairs[key]
	if p == nil {
		p = &pair{done: map[segment.Pattern]map[segment.Operation]*evidence{}}
		s.pairs[key] = p
	}
	p.Add(t)
	if p.done[pattern] == nil {
		p.done[pattern] = map[segment.Operation]*evidence{}
	}
	e := p.done[pattern][t.Operation]
	if e == nil {
		e = &evidence{names: map[string]bool{}}
		p.done[pattern][t.Operation] = e
	}
	e.Add(t)
	e.names[t.Resource] = true
}

// imply finds out whether an operation that no grant names follows from those that were seen.
func (s *suggester) imply(t telemetry.Tally) {
	if why := s.whyNot(t); why != "" {
		s.leave(t, why)
		return
	}
	p := s.pairs[asked{caller: t.Caller, endpoint: t.Endpoint}]
	if p != nil && t.Operation == segment.Enter {
		return
	}
	if p != nil {
		for pattern := range p.done {
			if pattern.Matches(t.Resource) {
				return
			}
		}
	}
	s.leave(t, fmt.Sprintf("%s is never granted by itself, and nothing else was done there", t.Operation))
}

// pattern is what to write for the resource, or why nothing can be.
func (s *suggester) pattern(t telemetry.Tally) (segment.Pattern, string) {
	best, found := segment.Pattern(""), false
	for _, p := range s.prefixes {
		if p.IsPrefix() && p.Matches(t.Resource) && (!found || len(p) > len(best)) {
			best, found = p, true
		}
	}
	switch r := t.Resource; {
	case r == "" && s.isTCP(t.Endpoint):
		return "*", "" // a connection has no resource, so this is not more than was seen
	case found:
		return best, ""
	case r == "":
		return "", `it names no resource, and only "*" covers that`
	case strings.Contains(r, "*"):
		return "", `its name has a "*" in it, which in a grant stands for more`
	case len(r) > clipped:
		return "", "its name is so long that it may not be recorded whole"
	case strings.TrimSpace(r) == "", strings.ContainsFunc(r, func(c rune) bool { return !unicode.IsPrint(c) }):
		return "", "its name has characters in it that cannot be seen"
	default:
		return segment.Pattern(r), ""
	}
}

// whyNot says why a document could not name the caller, the endpoint, the operation or the resource.
func (s *suggester) whyNot(t telemetry.Tally) string {
	e := s.cfg.Endpoint(t.Endpoint)
	switch {
	case t.Caller.IsZero():
		return "nobody knows who asked"
	case t.Operation == "":
		return "it is no part of the API"
	case e == nil:
		return "there is no such endpoint"
	case !isImplied(t.Operation) && !slices.Contains(e.Protocol.Operations(), t.Operation):
		return fmt.Sprintf("%s has no such operation", e.Protocol)
	case !t.Granted() && t.Verdict != telemetry.Denied:
		return "it was not judged"
	case t.Verdict == telemetry.Denied && t.Rule != string(authz.DefaultDeny):
		return t.Rule + " denies it, which overrides every Allow"
	case t.Operation != segment.Enter && !serves(e, t.Resource):
		return "the endpoint has no such model"
	}
	td := t.Caller.TrustDomain()
	switch {
	case t.Caller.Path() == "":
		return "the caller is a trust domain and no member of one"
	case td == segment.TokenDomain(s.cfg.TrustDomain):
		issuer, _, ok := segment.TokenSubject(s.cfg.TrustDomain, t.Caller)
		if !ok || s.cfg.Issuer(issuer) == nil || e.Tokens == nil || !slices.Contains(e.Tokens.Issuers, issuer) {
			return "the endpoint takes no tokens of this issuer"
		}
	case td != s.cfg.TrustDomain && !slices.ContainsFunc(s.cfg.Federated, func(f segment.TrustDomain) bool { return f.Domain == td }):
		return "the caller's trust domain is not federated with"
	}
	return ""
}

// serves reports whether the endpoint can have the resource: where models are declared there are no others. One without a
// name is for the pattern to decide about.
func serves(e *segment.Endpoint, resource string) bool {
	return len(e.Models) == 0 || resource == "" || slices.Contains(e.ModelNames(), resource)
}

func (s *suggester) suggestion() Suggestion {
	out := Suggestion{Grants: []Proposal{}, Left: []Left{}}
	for key, p := range s.pairs {
		out.Grants = append(out.Grants, Proposal{Caller: key.caller, Endpoint: key.endpoint, To: p.products(),
			Count: p.Count, First: p.First, Last: p.Last})
	}
	slices.SortFunc(out.Grants, func(a, b Proposal) int {
		return cmp.Or(cmp.Compare(a.Caller.String(), b.Caller.String()), cmp.Compare(a.Endpoint, b.Endpoint))
	})
	taken := map[segment.GrantName]bool{}
	for i := range s.cfg.Grants {
		taken[s.cfg.Grants[i].Name] = true
	}
	workloads := make(map[spiffeid.ID]segment.WorkloadName, len(s.cfg.Workloads))
	for i := range s.cfg.Workloads {
		workloads[s.cfg.Workloads[i].ID] = s.cfg.Workloads[i].Name
	}
	for i := range out.Grants {
		g := &out.Grants[i]
		g.Name, g.Workload = name(s.cfg.TrustDomain, g.Caller, g.Endpoint, taken), workloads[g.Caller]
		taken[g.Name] = true
	}
	for l, t := range s.left {
		l.Count, l.Last = t.Count, t.Last
		out.Left = append(out.Left, l)
	}
	slices.SortFunc(out.Left, func(a, b Left) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Caller.String(), b.Caller.String()), cmp.Compare(a.Endpoint, b.Endpoint),
			cmp.Compare(a.Operation, b.Operation), cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Why, b.Why))
	})
	return out
}

// products writes what was done as few products: either resources with the same operations stand together, or
// operations on the same resources.
func (p *pair) products() []Product {
	on := map[segment.Operation][]segment.Pattern{}
	with := map[string][]segment.Pattern{} // by the operations that were seen
	sets := map[string][]segment.Operation{}
	for _, pattern := range slices.Sorted(maps.Keys(p.done)) {
		ops := slices.Sorted(maps.Keys(p.done[pattern]))
		key := fmt.Sprint(ops)
		with[key], sets[key] = append(with[key], pattern), ops
		for _, op := range ops {
			on[op] = append(on[op], pattern)
		}
	}
	var byResources []Product
	for _, key := range slices.Sorted(maps.Keys(with)) {
		byResources = append(byResources, Product{sets[key], p.evidence(sets[key], with[key])})
	}
	type group struct {
		operations []segment.Operation
		patterns   []segment.Pattern
	}
	var groups []group
	for _, op := range slices.Sorted(maps.Keys(on)) {
		at := slices.IndexFunc(groups, func(g group) bool { return slices.Equal(g.patterns, on[op]) })
		if at < 0 {
			at = len(groups)
			groups = append(groups, group{patterns: on[op]})
		}
		groups[at].operations = append(groups[at].operations, op)
	}
	if len(byResources) < len(groups) {
		return byResources
	}
	var byOperations []Product
	for _, g := range groups {
		byOperations = append(byOperations, Product{g.operations, p.evidence(g.operations, g.patterns)})
	}
	return byOperations
}

func (p *pair) evidence(operations []segment.Operation, patterns []segment.Pattern) []Seen {
	all := make([]Seen, len(patterns))
	for i, pattern := range patterns {
		e := evidence{names: map[string]bool{}}
		for _, op := range operations {
			e.Add(p.done[pattern][op].Tally)
			maps.Copy(e.names, p.done[pattern][op].names)
		}
		all[i] = Seen{Pattern: pattern, Count: e.Count, Last: e.Last}
		if pattern.IsPrefix() {
			names := slices.Sorted(maps.Keys(e.names))
			all[i].Different, all[i].Names = len(names), names[:min(maxNames, len(names))]
		}
	}
	return all
}

// name makes a name that people recognise, of the caller's path and the endpoint, and that nothing else has.
func name(own spiffeid.TrustDomain, caller spiffeid.ID, endpoint segment.EndpointName, taken map[segment.GrantName]bool) segment.GrantName {
	text := caller.Path()
	if caller.TrustDomain() != own {
		text = caller.TrustDomain().Name() + text
	}
	plain := strings.Map(func(c rune) rune {
		switch {
		case 'a' <= c && c <= 'z' || '0' <= c && c <= '9':
			return c
		case 'A' <= c && c <= 'Z':
			return c - 'A' + 'a'
		}
		return '-'
	}, text+"-"+string(endpoint))
	plain = "seen-" + strings.Trim(plain, "-")
	short := strings.TrimRight(plain[:min(len(plain), maxReadable)], "-")
	name := segment.GrantName(short)
	sum := sha256.Sum256([]byte(caller.String() + " " + string(endpoint)))
	for n := 4; (len(plain) > len(short) || taken[name]) && n <= len(sum) && len(short)+1+2*n <= maxLabel; n++ {
		if name = segment.GrantName(short + "-" + hex.EncodeToString(sum[:n])); !taken[name] {
			break
		}
	}
	for n := 2; taken[name]; n++ {
		name = segment.GrantName(fmt.Sprintf("seen-%d", n))
	}
	return name
}

func (s *suggester) isTCP(name segment.EndpointName) bool {
	e := s.cfg.Endpoint(name)
	return e != nil && e.Protocol == segment.TCP
}
