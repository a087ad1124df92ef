// Package authz is the policy: it compiles grants into tables of exact and prefix look-ups, decides requests with
// them, and explains the decisions.
//
// It is for the lowering to Envoy, which enforces the same tables, and for everything that has to know in advance
// or afterwards what Envoy decides. It holds no clock: time is a parameter. It never does IO, and everything that
// it has not been told is denied.
package authz

import (
	"time"

	"sallyport.dev/segment"
)

// Rule names what decided: "grant/NAME", or DefaultDeny.
type Rule string

// DefaultDeny is the rule that denies what no grant allows.
const DefaultDeny Rule = "default-deny"

// RuleOf names a grant as the rule that decides.
func RuleOf(g segment.GrantName) Rule { return Rule("grant/" + g) }

// Request is one question to the policy.
type Request struct {
	Caller    string               `json:"caller"` // SPIFFE ID, as the certificate has it
	Endpoint  segment.EndpointName `json:"endpoint"`
	Operation segment.Operation    `json:"operation"`
	Resource  string               `json:"resource,omitempty"` // empty for Enter
}

// Decision is the answer. The zero value denies, but without a rule; Decide always names one.
type Decision struct {
	Allowed bool `json:"allowed"`
	Rule    Rule `json:"rule"`
	// Budget is what the request is counted against, if it is allowed; zero: it is not counted.
	Budget segment.Budget `json:"budget,omitzero"`
	// What the answer would be if the shadow folder were enforced instead; without one, if every grant in Shadow mode
	// were enforced, too.
	ShadowAllowed bool `json:"shadow_allowed"`
	ShadowRule    Rule `json:"shadow_rule"`
}

// Policy is the compiled form of a configuration's grants at one moment. It is immutable.
type Policy struct {
	Endpoints map[segment.EndpointName]*Endpoint
	// NextChange is until when time alone does not change the policy, and when it must be compiled again: the first
	// moment after that of compilation at which a grant begins, ends, or may do so; zero: never.
	NextChange time.Time

	origin origin
}

// Endpoint is the policy of one endpoint. A caller's class is that of its exact entry, else of the longest entry
// that is a prefix, else none. The class of a longer entry already holds all that shorter ones give and take.
type Endpoint struct {
	Members Table[*Class]
	Classes []*Class // distinct, sorted by ID
	// Shadowed says whether any grant in Shadow mode speaks about this endpoint, or there is a shadow folder, which by
	// its silence denies.
	Shadowed bool

	// What the next policy may take over.
	models     []string
	operations []segment.Operation
	about      Table[[]*statement] // the statements that name a caller, in their order
	uses       Table[use]          // of the classes, by their IDs
	tried      int                 // statements that take part in one of the two decisions only
}

// Class is what a set of callers may do at one endpoint: all callers with the same rights by the same rules.
type Class struct {
	ID       string // digest of its content
	Enforced Rights
	Shadow   Rights // see Decision; equal to Enforced where nothing is tried

	leaves int // zero: not counted yet
}

// Leaves is the size of the class: how many leaves the larger of its two rights has.
func (c *Class) Leaves() int {
	if c.leaves > 0 {
		return c.leaves
	}
	return c.count()
}

func (c *Class) count() int {
	enforced, shadow := 0, 0
	for _, table := range c.Enforced {
		enforced += table.Len()
	}
	for _, table := range c.Shadow {
		shadow += table.Len()
	}
	return max(enforced, shadow)
}

// Rights maps operations to what is decided about resources. Operations that are missing are denied.
type Rights map[segment.Operation]Table[Leaf]

// Leaf is one decision and what it is named after.
type Leaf struct {
	Allowed bool           `json:"allowed"`
	Rule    Rule           `json:"rule"`
	Budget  segment.Budget `json:"budget,omitzero"` // of the grant, where it is allowed
}

// Lookup decides operation × resource.
func (r Rights) Lookup(op segment.Operation, resource string) Leaf {
	if leaf, ok := r[op].Lookup(resource); ok {
		return leaf
	}
	return Leaf{Rule: DefaultDeny}
}

// Decide answers a request from the compiled policy, by the very look-ups that Envoy does.
func Decide(p *Policy, r Request) Decision {
	denied := Decision{Rule: DefaultDeny, ShadowRule: DefaultDeny}
	endpoint := p.Endpoints[r.Endpoint]
	if endpoint == nil {
		return denied
	}
	class, ok := endpoint.Members.Lookup(r.Caller)
	if !ok {
		return denied
	}
	enforced := class.Enforced.Lookup(r.Operation, r.Resource)
	shadow := class.Shadow.Lookup(r.Operation, r.Resource)
	return Decision{enforced.Allowed, enforced.Rule, enforced.Budget, shadow.Allowed, shadow.Rule}
}
