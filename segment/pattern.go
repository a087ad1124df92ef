package segment

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Pattern is a resource name or, with a trailing "*", all resources that begin with what stands before it.
// "*" alone is every resource, also one without a name. The zero value matches only the resource without a name.
type Pattern string

// IsPrefix reports whether p stands for a family of names.
func (p Pattern) IsPrefix() bool { return strings.HasSuffix(string(p), "*") }

// Stem returns the name, or what all names of the family begin with.
func (p Pattern) Stem() string { return strings.TrimSuffix(string(p), "*") }

// Matches reports whether p covers the resource name.
func (p Pattern) Matches(name string) bool {
	if p.IsPrefix() {
		return strings.HasPrefix(name, p.Stem())
	}
	return string(p) == name
}

// Covers reports whether every name that q matches is also matched by p.
func (p Pattern) Covers(q Pattern) bool {
	if p.IsPrefix() {
		return strings.HasPrefix(q.Stem(), p.Stem())
	}
	return p == q
}

// Caller is a SPIFFE ID or, with a trailing "/*", all IDs below that path. "spiffe://example.org/*" is a whole
// trust domain. Construct it with CallerID, CallersBelow or ParseCaller; the zero value matches nobody.
type Caller struct{ pattern Pattern }

// CallerID is exactly one caller.
func CallerID(id spiffeid.ID) Caller { return Caller{Pattern(id.String())} }

// CallersIn is every caller of a trust domain.
func CallersIn(td spiffeid.TrustDomain) Caller { return Caller{Pattern(td.IDString() + "/*")} }

// ParseCaller reads a SPIFFE ID, exact or with a trailing "/*".
func ParseCaller(s string) (Caller, error) {
	id, err := spiffeid.FromString(strings.TrimSuffix(s, "/*"))
	if err != nil {
		return Caller{}, err
	}
	if strings.HasSuffix(s, "/*") {
		return Caller{Pattern(id.String() + "/*")}, nil
	}
	return CallerID(id), nil
}

// String returns the caller as users write it.
func (c Caller) String() string { return string(c.pattern) }

// Pattern returns the pattern that the caller's SPIFFE ID must match; its stem ends in "/" where it is a prefix.
func (c Caller) Pattern() Pattern { return c.pattern }

// TrustDomain returns the trust domain that the caller belongs to.
func (c Caller) TrustDomain() spiffeid.TrustDomain {
	id, err := spiffeid.FromString(strings.TrimSuffix(string(c.pattern), "/*"))
	if err != nil {
		return spiffeid.TrustDomain{}
	}
	return id.TrustDomain()
}

// Matches reports whether c covers the SPIFFE ID.
func (c Caller) Matches(id string) bool { return c.pattern != "" && c.pattern.Matches(id) }
