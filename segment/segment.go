// Package segment is the model of what Sallyport protects and who may reach it: gateways, endpoints, workloads
// and grants, resolved and validated, on one screen each.
//
// It is for every other package, and knows none of them: nothing here comes from Kubernetes, Envoy or gRPC. It
// holds values only: no IO, no clock, no goroutine. The zero value of everything that decides is "no".
package segment

import (
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Names are the names that users give in metadata.name. They are distinct types so that none is taken for another.
type (
	EndpointName string
	WorkloadName string
	GrantName    string
	BackendName  string
	GatewayName  string
	NodeName     string // of the agent on a machine: the last part of its SPIFFE ID
)

// Config is everything that a generation is made of: the documents after references have been resolved and
// every rule of the model has been checked. All slices are sorted by name, so equal configurations are equal values.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Gateways    []Gateway
	Gateway     Gateway // the one that this is for, after For; zero: for all
	Endpoints   []Endpoint
	Workloads   []Workload
	Grants      []Grant
	// Shadow are the grants of a shadow folder: what would be enforced instead of Grants, and is only recorded. They
	// count if ShadowFolder; else there is no such folder, and grants in Shadow mode are tried beside the others.
	Shadow       []Grant
	ShadowFolder bool
	Federated    []TrustDomain // the other trust domains whose members can be authenticated
	Issuers      []TokenIssuer // whose tokens can be
}

// Endpoint returns the endpoint of this name, or nil.
func (c *Config) Endpoint(name EndpointName) *Endpoint {
	for i := range c.Endpoints {
		if c.Endpoints[i].Name == name {
			return &c.Endpoints[i]
		}
	}
	return nil
}

// Issuer returns the issuer of this name, or nil.
func (c *Config) Issuer(name IssuerName) *TokenIssuer {
	for i := range c.Issuers {
		if c.Issuers[i].Name == name {
			return &c.Issuers[i]
		}
	}
	return nil
}

// For is the configuration as one gateway may see it: its own endpoints, and nothing of another gateway.
func (c *Config) For(g Gateway) Config {
	only := *c
	only.Gateways, only.Gateway, only.Endpoints = []Gateway{g}, g, nil
	for _, e := range c.Endpoints {
		if g.Serves(e.Name) {
			only.Endpoints = append(only.Endpoints, e)
		}
	}
	return only
}

// Gateway is one Envoy in front of endpoints.
type Gateway struct {
	Name   GatewayName
	ID     spiffeid.ID    // whom the gateway is, to callers and to the control plane
	Listen netip.AddrPort // where it accepts mTLS connections
	// Address is where callers on other machines reach it; zero: at Listen, if that is one address.
	Address Address
	// SVIDTTL is the lifetime of the X.509-SVIDs that callers hold. No connection lives as long.
	SVIDTTL time.Duration
	// Node is the agent on whose machine it runs, and Selectors are how its Envoy is recognised there; empty for the
	// gateway of this very process.
	Node      NodeName
	Selectors []Selector
	Endpoints []EndpointName // those that it serves; nil: all that there are
}

// Serves reports whether the gateway is in front of the endpoint.
func (g *Gateway) Serves(e EndpointName) bool {
	return g.Endpoints == nil || slices.Contains(g.Endpoints, e)
}

// Endpoint is one protected API: the hostnames that clients use, its protocol, and the servers behind it.
type Endpoint struct {
	Name      EndpointName
	Labels    map[string]string
	Hostnames []string // lower case, unique over all endpoints; the SNI and Host that select this endpoint
	Protocol  Protocol
	Backends  []Backend // at least one
	// Models says which backends serve which model. Empty: every model goes to every backend.
	Models []Model
	// Database is where collections live: of Chroma a tenant and a database, of Milvus a database, of Weaviate a tenant.
	Database Database
	// Templates are paths of an HTTP endpoint that are one resource each, as in "/users/{id}/orders", sorted.
	Templates []string
	Tokens    *Tokens // nil: callers have client certificates, all of them
}

// ModelNames are the names and aliases of all models, which then are all resources that there are; nil: unknown.
func (e *Endpoint) ModelNames() []string {
	var names []string
	for i := range e.Models {
		names = append(names, e.Models[i].Names()...)
	}
	return names
}

// Backend is one pool of equal servers.
type Backend struct {
	Name      BackendName
	Addresses []Address // at least one
	GRPC      []Address // where it speaks gRPC, if that is elsewhere
	TLS       BackendTLS
}

// Address is a host (an IP address or a DNS name) and a port.
type Address struct {
	Host string
	Port uint16
}

// BackendTLS says how a gateway speaks to a backend.
type BackendTLS struct {
	Mode       TLSMode
	ServerName string      // Server: the DNS name that the certificate must have
	CAFile     string      // Server: PEM bundle to trust, an absolute path on the gateway
	ID         spiffeid.ID // Mutual: the SPIFFE ID that the server must have
}

// TLSMode is how the connection to a backend is protected. The zero value is not a mode.
type TLSMode string

const (
	TLSNone   TLSMode = "None"   // plain text, for loopback addresses only
	TLSServer TLSMode = "Server" // the server has a web PKI or private certificate
	TLSMutual TLSMode = "Mutual" // both sides have X.509-SVIDs and the server's SPIFFE ID is pinned
)

// Model is a model name and the backends that serve it.
type Model struct {
	Name     string
	Aliases  []string      // further names for the same servers; each is a resource of its own to grants
	Backends []BackendName // spoken to in one and the same way
}

// Database is the tenant and database that a vector store keeps collections in.
type Database struct {
	Tenant string
	Name   string
}

// Names are the name and the aliases.
func (m *Model) Names() []string { return append([]string{m.Name}, m.Aliases...) }

// Workload is who may hold an identity, and how it is recognised.
type Workload struct {
	Name      WorkloadName
	Labels    map[string]string
	ID        spiffeid.ID
	Selectors []Selector // all must hold; at least one
	Nodes     []NodeName // the agents on whose machines it may run; none: on this machine only
	// FederatesWith are the other trust domains whose bundles it gets, sorted. Each is in Config.Federated.
	FederatesWith []spiffeid.TrustDomain
}

// Selector is one fact about a process, as SPIRE writes it: "unix:uid:1000" is Type "unix", Value "uid:1000".
type Selector struct {
	Type  string
	Value string
}

// String returns the selector as users write it.
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Grant says what some callers may do.
type Grant struct {
	Name   GrantName
	Effect Effect
	Mode   Mode
	From   []Caller // who; workloads and label selectors are already resolved to SPIFFE IDs
	To     []Target // what
	// NotBefore is the first moment at which the grant holds; zero: it always has.
	NotBefore time.Time
	// Expires is the first moment at which the grant no longer holds; zero: it never ends.
	Expires time.Time
	// Windows are when it holds in between: within any of them; none: always.
	Windows []Window
	Budget  Budget // how much may be used of what an Allow gives
	// Who answers for the grant, why it is there, and where that was agreed; without any effect.
	Owner, Reason, Ticket string
	Pos                   Pos // where the user wrote it
}

// Says reports whether the other grant says the same; where it stands and who answers for it does not matter.
func (g *Grant) Says(other *Grant) bool {
	return g.Name == other.Name && g.Effect == other.Effect && g.Mode == other.Mode &&
		g.NotBefore.Equal(other.NotBefore) && g.Expires.Equal(other.Expires) && g.SameWindows(other) && g.Budget == other.Budget &&
		slices.Equal(g.From, other.From) &&
		slices.EqualFunc(g.To, other.To, func(a, b Target) bool {
			return a.Endpoint == b.Endpoint && slices.Equal(a.Operations, b.Operations) && slices.Equal(a.Resources, b.Resources)
		})
}

// Target is a set of operations on a set of resources of one endpoint.
type Target struct {
	Endpoint   EndpointName
	Operations []Operation
	Resources  []Pattern
}

// Effect says whether a grant gives or takes. The zero value gives nothing.
type Effect string

const (
	Allow Effect = "Allow"
	Deny  Effect = "Deny" // overrides every Allow, whatever the order
)

// Covers reports whether a grant of this effect on p speaks about the resource; "" is a request for everything. That may
// reach whatever a Deny names, so each Deny speaks about it.
func (e Effect) Covers(p Pattern, resource string) bool {
	return p.Matches(resource) || e != Allow && resource == ""
}

// Mode says whether a grant is in force.
type Mode string

const (
	Enforce Mode = "Enforce"
	Shadow  Mode = "Shadow" // evaluated and recorded beside the enforced grants, never enforced
)

// Operation is what a caller wants to do. There are few and they are the same for every protocol.
type Operation string

const (
	Infer   Operation = "Infer"   // run a model
	Embed   Operation = "Embed"   // turn text into vectors
	Read    Operation = "Read"    // read from a collection
	Write   Operation = "Write"   // change the records of a collection
	Admin   Operation = "Admin"   // create, rename, delete
	Call    Operation = "Call"    // call a tool
	Connect Operation = "Connect" // open a TCP connection

	// Discover is learning that a resource exists and what it is: a model by its name, a collection's UUID. It is
	// never granted by itself: whoever may do anything with a resource may discover that resource, nobody else.
	Discover Operation = "Discover"
	// Enter is what a client asks before it names a resource: version, its own identity, a list (which is filtered).
	// It is never granted by itself either: whoever may do anything at an endpoint may enter it.
	Enter Operation = "Enter"
)

// Operations are the operations that a grant can name.
func Operations() []Operation { return []Operation{Infer, Embed, Read, Write, Admin, Call, Connect} }
