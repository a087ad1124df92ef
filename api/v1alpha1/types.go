// Package v1alpha1 is the documents of group sallyport.dev/v1alpha1 as users write them, and what they mean
// together: Decode reads YAML or JSON into documents, Assemble makes one segment.Config of all of them.
//
// It is for whatever brings documents (files, the Kubernetes API) and for whoever checks them offline. It is
// strict: what it does not know it refuses, so that no field is ever accepted and ignored. It is pure: it opens
// no file, but for the rules of time zones, and reads no clock. It never returns a part of a configuration: all problems of all documents are
// reported at once, and as long as there is one there is no configuration.
//
// A field without ",omitempty" is required. Nothing that is written may be empty.
package v1alpha1

import (
	"time"

	"sallyport.dev/segment"
)

// APIVersion is the group and version of a document.
type APIVersion string

// Version is the only version so far.
const Version APIVersion = "sallyport.dev/v1alpha1"

// Kind is what a document describes.
type Kind string

// The kinds that are read; see EndpointSpec and so on.
const (
	KindGateway     Kind = "Gateway"
	KindEndpoint    Kind = "Endpoint"
	KindWorkload    Kind = "Workload"
	KindGrant       Kind = "Grant"
	KindTrustDomain Kind = "TrustDomain"
	KindTokenIssuer Kind = "TokenIssuer"
)

// Metadata names a document, as in Kubernetes.
type Metadata struct {
	Name        string            `json:"name"` // DNS-1123 label, unique for its kind
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"` // kept, without meaning
}

// EndpointSpec is a protected API; see segment.Endpoint.
type EndpointSpec struct {
	Hostnames []string         `json:"hostnames"` // DNS names, in any case
	Protocol  segment.Protocol `json:"protocol"`
	Backends  []Backend        `json:"backends"`
	Models    []Model          `json:"models,omitempty"`   // where resources are models; none: every model on every backend
	Database  *Database        `json:"database,omitempty"` // Chroma, Milvus, Weaviate
	Paths     []string         `json:"paths,omitempty"`    // HTTP only: templates, as in "/users/{id}/orders", that are one resource each
	Tokens    *Tokens          `json:"tokens,omitempty"`   // none: callers have client certificates, all of them
}

// Tokens says whose tokens are taken from callers without a client certificate. At least one is named.
type Tokens struct {
	Issuers      []string `json:"issuers,omitempty"`      // names of TokenIssuers
	TrustDomains []string `json:"trustDomains,omitempty"` // whose JWT-SVIDs: the own name, or TrustDomains by metadata.name or spec.trustDomain
	Audiences    []string `json:"audiences,omitempty"`    // a token must be for one of these; default: the host names
}

// Backend is one pool of equal servers.
type Backend struct {
	Name      string   `json:"name"`
	Addresses []string `json:"addresses"` // "host:port", "[2001:db8::1]:port"
	// GRPCAddresses are where it speaks gRPC: Qdrant, Weaviate; Milvus, by default at its addresses.
	GRPCAddresses []string `json:"grpcAddresses,omitempty"`
	TLS           TLS      `json:"tls"`
}

// TLS says how a gateway speaks to a backend. A field that does not belong to the mode is refused.
type TLS struct {
	Mode       segment.TLSMode `json:"mode"`                 // None only for loopback addresses
	ServerName string          `json:"serverName,omitempty"` // Server; default: the one DNS name of the addresses
	CAFile     string          `json:"caFile,omitempty"`     // Server, required: path of a PEM bundle on the gateway
	SPIFFEID   string          `json:"spiffeID,omitempty"`   // Mutual, required
}

// Model is a model and who serves it.
type Model struct {
	Name     string   `json:"name"`
	Aliases  []string `json:"aliases,omitempty"`
	Backends []string `json:"backends,omitempty"` // default: all
}

// Database is where collections live.
type Database struct {
	Tenant string `json:"tenant,omitempty"` // Chroma, default: default_tenant; Weaviate, default: every tenant
	Name   string `json:"name,omitempty"`   // Chroma, default: default_database; Milvus, default: default
}

// WorkloadSpec is who may hold an identity; see segment.Workload.
type WorkloadSpec struct {
	SPIFFEID  string   `json:"spiffeID"`
	Selectors []string `json:"selectors"`       // "unix:uid:1000"; all must hold
	Nodes     []string `json:"nodes,omitempty"` // names of agents; default: the machine of the control plane, with `up`
	// FederatesWith are TrustDomains, by metadata.name or spec.trustDomain, whose bundles the workload gets.
	FederatesWith []string `json:"federatesWith,omitempty"`
}

// GatewaySpec is an Envoy on a machine with an agent; see segment.Gateway.
type GatewaySpec struct {
	Listen           string            `json:"listen"`                     // IP address and port on which it accepts callers
	Address          string            `json:"address,omitempty"`          // host:port where others reach it; default: listen, if that is one address
	Node             string            `json:"node"`                       // name of the agent on its machine
	Selectors        []string          `json:"selectors"`                  // how its Envoy is recognised there; all must hold
	Endpoints        []string          `json:"endpoints,omitempty"`        // names of those that it serves; default: all
	EndpointSelector *WorkloadSelector `json:"endpointSelector,omitempty"` // or by their labels
}

// GrantSpec says what some callers may do; see segment.Grant.
type GrantSpec struct {
	Effect    segment.Effect `json:"effect,omitempty"` // default: Allow
	Mode      segment.Mode   `json:"mode,omitempty"`   // default: Enforce
	From      []From         `json:"from"`
	To        []To           `json:"to"`
	NotBefore *time.Time     `json:"notBefore,omitempty"` // RFC 3339; before this moment the grant does not hold
	Expires   *time.Time     `json:"expires,omitempty"`   // RFC 3339; from this moment on the grant does not hold
	Windows   []Window       `json:"windows,omitempty"`   // in between it holds within any of these; default: always
	Budget    *Budget        `json:"budget,omitempty"`    // how much may be used; default: as much as one likes
	Owner     string         `json:"owner,omitempty"`     // who answers for it
	Reason    string         `json:"reason,omitempty"`
	Ticket    string         `json:"ticket,omitempty"` // where that was agreed
}

// Window is a part of each week; see segment.Window.
type Window struct {
	Days     []Day  `json:"days,omitempty"`     // on which it begins; default: all
	From     string `json:"from"`               // "08:00"
	To       string `json:"to"`                 // "18:00", "24:00"; if earlier than from, on the next day
	TimeZone string `json:"timeZone,omitempty"` // of the IANA database, "Europe/Berlin"; default: UTC
}

// Budget bounds what the callers of a grant use; see segment.Budget. One of requests and tokens is there.
type Budget struct {
	Requests        *Limit         `json:"requests,omitempty"`
	Tokens          *Limit         `json:"tokens,omitempty"`          // of what is sent and what is answered; for Infer and Embed
	Scope           Scope          `json:"scope,omitempty"`           // default: Caller
	WhenUnavailable segment.Effect `json:"whenUnavailable,omitempty"` // while nobody can count; default: Deny
}

// Scope says whose a budget is.
type Scope string

const (
	perCaller Scope = "Caller" // each caller has its own
	shared    Scope = "Shared" // all callers of the grant have one together
)

// Limit is so much in each window; see segment.Limit.
type Limit struct {
	Max int64          `json:"max"` // at least 1
	Per segment.Period `json:"per"`
}

// Day is a day of the week, in the three letters of RFC 5322, 3.3.
type Day string

// TrustDomainSpec is another trust domain that is federated with; see segment.TrustDomain.
type TrustDomainSpec struct {
	TrustDomain    string         `json:"trustDomain"` // "other.org"
	BundleEndpoint BundleEndpoint `json:"bundleEndpoint"`
	Bundle         bundleText     `json:"bundle,omitempty"`     // initial SPIFFE bundle, JSON
	BundleFile     string         `json:"bundleFile,omitempty"` // or the path of one on the control plane's machine
	Refresh        string         `json:"refresh,omitempty"`    // "10m"; default: what the bundle says
}

// BundleEndpoint is where a bundle is fetched. A field that does not belong to the profile is refused.
type BundleEndpoint struct {
	URL              string                  `json:"url"` // https
	Profile          segment.EndpointProfile `json:"profile"`
	CAFile           string                  `json:"caFile,omitempty"`           // https_web; default: what the system trusts
	EndpointSPIFFEID string                  `json:"endpointSPIFFEID,omitempty"` // https_spiffe, required
}

// bundleText is a document within the document: long, and of several lines. A field with File behind its name takes the
// path of what is too long.
type bundleText string

// TokenIssuerSpec is an OpenID provider whose tokens identify callers; see segment.TokenIssuer.
type TokenIssuerSpec struct {
	Issuer   string     `json:"issuer"`             // https URL, letter by letter as it is in the tokens
	JWKSURI  string     `json:"jwksURI,omitempty"`  // https URL; default: what the issuer's discovery document says
	CAFile   string     `json:"caFile,omitempty"`   // default: what the system trusts
	Keys     bundleText `json:"keys,omitempty"`     // initial JWK set, JSON
	KeysFile string     `json:"keysFile,omitempty"` // or the path of one on the control plane's machine
	Refresh  string     `json:"refresh,omitempty"`  // "10m"; default: five minutes
}

// From is some callers, by exactly one of its fields; only a subject stands beside its tokenIssuer.
type From struct {
	Workload         string            `json:"workload,omitempty"`
	WorkloadSelector *WorkloadSelector `json:"workloadSelector,omitempty"`
	SPIFFEID         string            `json:"spiffeID,omitempty"`    // exact, or with a trailing "/*"
	TrustDomain      string            `json:"trustDomain,omitempty"` // "example.org": everyone in it
	TokenIssuer      string            `json:"tokenIssuer,omitempty"` // everyone with a token of this TokenIssuer
	Subject          string            `json:"subject,omitempty"`     // of them, only this one: the token's sub
}

// WorkloadSelector is all workloads that have all of these labels.
type WorkloadSelector struct {
	MatchLabels map[string]string `json:"matchLabels"`
}

// To is operations on resources of one endpoint.
type To struct {
	Endpoint   string              `json:"endpoint"`
	Operations []segment.Operation `json:"operations"`
	Resources  []string            `json:"resources"` // names, or beginnings of names with a trailing "*"
}
