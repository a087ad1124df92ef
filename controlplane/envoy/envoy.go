// Package envoy lowers a configuration and its policy to Envoy resources, and checks what was lowered.
//
// It is for the pipeline, which publishes the resources over xDS, and for `sallyport render`. It is pure: the same
// input gives the same bytes. It never emits a resource that lets a request through without a decision: every
// filter chain demands a client certificate, and what has not been discovered denies.
package envoy

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"reflect"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// Resources are all that one gateway is sent, each list sorted by name.
type Resources struct {
	Listeners   []*listenerv3.Listener              // LDS
	Routes      []*routev3.RouteConfiguration       // RDS
	Extensions  []*corev3.TypedExtensionConfig      // ECDS
	Clusters    []*clusterv3.Cluster                // CDS
	Assignments []*endpointv3.ClusterLoadAssignment // EDS

	policy   *authz.Policy
	limits   limits
	members  map[segment.EndpointName][]member
	forms    map[segment.EndpointName]form
	earlier  []*Resources
	made     map[string]made // extensions, and what they are made of
	tables   map[segment.EndpointName]*table
	choices  map[segment.EndpointName]chosen
	versions map[proto.Message]string
}

// Learned is what a configuration depends on that no document says.
type Learned struct {
	Names Names
	Keys  Keys
}

// Names tells, for each endpoint whose protocol addresses resources by UUID, which UUID is which resource's now.
type Names map[segment.EndpointName]map[string]string

// Clusters of the bootstrap that the resources refer to. They lead to the control plane.
const (
	ControlCluster  = "sallyport/control"  // gRPC: ADS, access logs, traces
	IdentityCluster = "sallyport/identity" // gRPC: SDS
	CatalogCluster  = "sallyport/catalog"  // HTTP: the catalogue
	BudgetCluster   = "sallyport/budget"   // gRPC: the gate, which is on the gateway's own machine
)

// validationSecret is the bundles of every trust domain, for the SPIFFE validator, under the name that SPIRE's agent
// serves them under too. The gateway's own X.509-SVID goes by its SPIFFE ID.
const validationSecret = "ALL"

// Lower makes the resources of the configuration's gateway. Editing one endpoint leaves those of all others as they
// were, byte for byte, and changing a grant changes nothing but the endpoint's "rights" and "members".
//
// What is equal in earlier resources is taken over: the result is the same, sooner made, and extensions that are as they
// were are the same pointers.
func Lower(cfg *segment.Config, policy *authz.Policy, learned Learned, earlier ...*Resources) *Resources {
	return lower(defaultLimits, cfg, policy, learned, earlier...)
}

func lower(l limits, cfg *segment.Config, policy *authz.Policy, learned Learned, earlier ...*Resources) *Resources {
	r := &Resources{policy: policy, limits: l, members: map[segment.EndpointName][]member{}, forms: map[segment.EndpointName]form{}, earlier: earlier, made: map[string]made{},
		tables: map[segment.EndpointName]*table{}, choices: map[segment.EndpointName]chosen{}}
	for i := range cfg.Endpoints {
		e := &cfg.Endpoints[i]
		if e.Protocol != segment.TCP {
			r.Routes = append(r.Routes, r.table(e).routes)
		}
		r.Extensions = append(r.Extensions, r.authorization(e, policy.Endpoints[e.Name], learned.Names[e.Name])...)
		if e.Tokens != nil {
			r.Extensions = append(r.Extensions, extension(TokensName(e.Name), verifier(cfg, e, learned.Keys)))
		}
		clusters, assignments := backends(e, cfg.Gateway)
		r.Clusters = append(r.Clusters, clusters...)
		r.Assignments = append(r.Assignments, assignments...)
	}
	if len(cfg.Endpoints) > 0 {
		r.Listeners = []*listenerv3.Listener{r.same(listener(cfg, r))}
	}
	slices.SortFunc(r.Extensions, byName)
	slices.SortFunc(r.Clusters, byName)
	r.remember()
	r.earlier = nil
	return r
}

// table is what an endpoint's protocol becomes; it is long, and depends on nothing but the endpoint.
type table struct {
	of      segment.Endpoint
	routes  *routev3.RouteConfiguration
	extract *hcmv3.HttpFilter
}

// table makes the endpoint's, unless it has been made before of the same.
func (r *Resources) table(e *segment.Endpoint) *table {
	for _, earlier := range append(r.earlier, r) {
		if t := earlier.tables[e.Name]; t != nil && reflect.DeepEqual(t.of, *e) {
			r.tables[e.Name] = t
			return t
		}
	}
	r.tables[e.Name] = &table{*e, routes(e), filter(extractFilter, extractor(e))}
	return r.tables[e.Name]
}

// Version names what one of the resources holds: equal content, equal version.
func (r *Resources) Version(m proto.Message) string {
	if v := r.versions[m]; v != "" {
		return v
	}
	sum := sha256.Sum256(pack(m).Value)
	return hex.EncodeToString(sum[:])
}

// same returns the listener of earlier resources that holds the same, else this one.
func (r *Resources) same(l *listenerv3.Listener) *listenerv3.Listener {
	version := r.Version(l)
	for _, e := range r.earlier {
		for _, before := range e.Listeners {
			if e.versions[before] == version {
				return before
			}
		}
	}
	return l
}

// remember keeps the versions of all resources; those that earlier ones share are not read again.
func (r *Resources) remember() {
	versions := map[proto.Message]string{}
	for _, m := range r.All() {
		for _, e := range r.earlier {
			if versions[m] == "" {
				versions[m] = e.versions[m]
			}
		}
		if versions[m] == "" {
			versions[m] = r.Version(m)
		}
	}
	r.versions = versions
}

func byName[T interface{ GetName() string }](a, b T) int {
	switch {
	case a.GetName() < b.GetName():
		return -1
	case a.GetName() > b.GetName():
		return 1
	}
	return 0
}

// pack wraps a message. Encoding is deterministic, so that equal input gives equal bytes.
func pack(m proto.Message) *anypb.Any {
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic("encode " + string(m.ProtoReflect().Descriptor().FullName()) + ": " + err.Error()) // only a string that is not UTF-8: all are validated
	}
	return a
}

func sortedKeys[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
