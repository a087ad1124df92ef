// Package xds serves generations to gateways over incremental xDS (ADS), and knows of each gateway what it has
// taken and what it has refused.
//
// It is for the pipeline, which publishes, and for status, where "in force" must be a fact. A gateway is sent what
// its name selects and nothing else; an unknown one is refused. What a gateway already has is not sent again.
package xds

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// Server is the xDS server of all gateways. Make it with New.
type Server struct {
	cache cachev3.SnapshotCache

	mu       sync.Mutex
	gateways map[segment.GatewayName]*gateway
	streams  map[int64]*stream
	changed  chan struct{} // closed and replaced whenever a gateway's state changes
}

// gateway is what is known of one gateway. Versions are by type URL and resource name.
type gateway struct {
	stream   int64  // the newest, which alone is believed; 0: none
	target   string // generation
	wanted   versions
	taken    versions
	r        *envoy.Resources // of the target
	retained map[string]bool  // wanted extensions that are not in the target: connections that began before need them
	inForce  string
	rejected map[string]Rejection      // by type URL
	refusals map[string]map[string]int // how often each resource was refused, or came with one that was
}

type versions map[string]map[string]string

type stream struct {
	gateway segment.GatewayName
	sent    map[string]*discoveryv3.DeltaDiscoveryResponse // by nonce, until it is answered
}

// Rejection is what a gateway refused, and why.
type Rejection struct {
	Type      string    `json:"type"`
	Resources []string  `json:"resources"`
	Error     string    `json:"error"`
	Time      time.Time `json:"time"`
}

// Status is the state of one gateway.
type Status struct {
	Gateway   segment.GatewayName `json:"gateway"`
	Connected bool                `json:"connected"`
	Target    string              `json:"target"`             // the generation that was published for it
	InForce   string              `json:"in_force"`           // the last generation that it has taken whole
	Pending   []string            `json:"pending,omitempty"`  // what it has not yet taken
	Rejected  []Rejection         `json:"rejected,omitempty"` // what it has refused of the target
}

// New returns a server that serves nothing yet.
func New() *Server {
	return &Server{
		cache:    cachev3.NewSnapshotCache(true, cachev3.IDHash{}, nil),
		gateways: map[segment.GatewayName]*gateway{},
		streams:  map[int64]*stream{},
		changed:  make(chan struct{}),
	}
}

// Register adds the services to a gRPC server. Streams live as long as ctx.
func (s *Server) Register(ctx context.Context, to *grpc.Server) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(to, serverv3.NewServer(ctx, s.cache, serverv3.CallbackFuncs{
		DeltaStreamOpenFunc:     s.opened,
		DeltaStreamClosedFunc:   s.closed,
		StreamDeltaRequestFunc:  s.asked,
		StreamDeltaResponseFunc: s.answered,
		StreamOpenFunc: func(context.Context, int64, string) error {
			return status.Error(codes.Unimplemented, "this control plane speaks incremental xDS only: set api_type DELTA_GRPC")
		},
	}))
}

// Publish makes the resources the target of a gateway. It returns at once; WaitInForce tells when they are in force.
func (s *Server) Publish(ctx context.Context, name segment.GatewayName, generation string, r *envoy.Resources) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.gateways[name]
	if g == nil {
		g = &gateway{taken: versions{}, retained: map[string]bool{}, rejected: map[string]Rejection{}, refusals: map[string]map[string]int{}}
		s.gateways[name] = g
	}
	g.target, g.r = generation, r
	clear(g.rejected)
	err := s.offer(ctx, name, g)
	s.settle(g)
	return err
}

// offer puts the target into the cache, and what the gateway needs beside it. The caller holds the lock.
func (s *Server) offer(ctx context.Context, name segment.GatewayName, g *gateway) error {
	o := offerOf(g.target, g.r)
	clear(g.retained)
	for has := range g.taken[resourcev3.ExtensionConfigType] {
		if o.resources[resourcev3.ExtensionConfigType][has].Resource != nil {
			continue
		}
		if x := g.r.Retained(has); x != nil {
			o.add(x, g.r)
			g.retained[has] = true
		}
	}
	g.wanted = versions{}
	for url, names := range o.versions {
		g.wanted[url] = maps.Clone(names)
	}
	// The cache takes what was refused for sent. Under another version it is sent again.
	for url, names := range g.refusals {
		for name, n := range names {
			if version, ok := o.versions[url][name]; ok {
				o.versions[url][name] = fmt.Sprintf("%s+%d", version, n)
			}
		}
	}
	if err := s.cache.SetSnapshot(ctx, string(name), o); err != nil {
		return fmt.Errorf("offer generation: %w", err)
	}
	return nil
}

// offering is a snapshot whose versions are known from the resources. All maps are by type URL, then by name.
type offering struct {
	generation string
	resources  map[string]map[string]types.ResourceWithTTL
	versions   versions
}

func offerOf(generation string, r *envoy.Resources) *offering {
	o := &offering{generation, map[string]map[string]types.ResourceWithTTL{}, versions{}}
	for _, url := range []string{resourcev3.ListenerType, resourcev3.RouteType, resourcev3.ExtensionConfigType, resourcev3.ClusterType, resourcev3.EndpointType} {
		o.resources[url], o.versions[url] = map[string]types.ResourceWithTTL{}, map[string]string{}
	}
	for _, m := range r.All() {
		o.add(m, r)
	}
	return o
}

func (o *offering) add(m proto.Message, r *envoy.Resources) {
	url, name := "type.googleapis.com/"+string(m.ProtoReflect().Descriptor().FullName()), cachev3.GetResourceName(m)
	o.resources[url][name], o.versions[url][name] = types.ResourceWithTTL{Resource: m}, r.Version(m)
}

func (o *offering) GetVersion(string) string   { return o.generation }
func (o *offering) ConstructVersionMap() error { return nil }

func (o *offering) GetVersionMap(url string) map[string]string { return o.versions[url] }

func (o *offering) GetResourcesAndTTL(url string) map[string]types.ResourceWithTTL {
	return o.resources[url]
}

func (o *offering) GetResources(url string) map[string]types.Resource {
	all := make(map[string]types.Resource, len(o.resources[url]))
	for name, r := range o.resources[url] {
		all[name] = r.Resource
	}
	return all
}

// settle finds out whether the target is in force, and tells who waits. The caller holds the lock.
func (s *Server) settle(g *gateway) {
	if g.stream != 0 && len(g.pending()) == 0 {
		g.inForce = g.target
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// pending are the wanted resources that the gateway has not taken, and the unwanted ones that it still has.
func (g *gateway) pending() []string {
	var names []string
	for url, wanted := range g.wanted {
		taken := g.taken[url]
		for name, version := range wanted {
			if taken[name] != version {
				names = append(names, name)
			}
		}
		for name := range taken {
			if _, ok := wanted[name]; !ok {
				names = append(names, name+" (to remove)")
			}
		}
	}
	slices.Sort(names)
	return names
}

// WaitInForce returns nil once the gateway has taken whatever is published for it.
func (s *Server) WaitInForce(ctx context.Context, name segment.GatewayName) error {
	for {
		s.mu.Lock()
		g, changed := s.gateways[name], s.changed
		done := g != nil && g.inForce == g.target
		s.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for gateway %s: %w", name, ctx.Err())
		}
	}
}

// InForce returns the last generation that the gateway has taken whole.
func (s *Server) InForce(name segment.GatewayName) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.gateways[name]; g != nil {
		return g.inForce
	}
	return ""
}

// Status returns the state of every gateway, sorted by name.
func (s *Server) Status() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Status
	for _, name := range slices.Sorted(maps.Keys(s.gateways)) {
		g := s.gateways[name]
		st := Status{Gateway: name, Connected: g.stream != 0, Target: g.target, InForce: g.inForce, Pending: g.pending()}
		for _, url := range slices.Sorted(maps.Keys(g.rejected)) {
			st.Rejected = append(st.Rejected, g.rejected[url])
		}
		all = append(all, st)
	}
	return all
}

// --- what go-control-plane calls ---

func (s *Server) opened(_ context.Context, id int64, _ string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams[id] = &stream{sent: map[string]*discoveryv3.DeltaDiscoveryResponse{}}
	return nil
}

func (s *Server) closed(id int64, _ *corev3.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.gateways[s.streams[id].gateway]; g != nil && g.stream == id {
		g.stream = 0
		s.settle(g)
	}
	delete(s.streams, id)
}

func (s *Server) asked(id int64, r *discoveryv3.DeltaDiscoveryRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[id]
	if node := r.GetNode(); node != nil || st.gateway == "" {
		name := segment.GatewayName(node.GetId())
		g := s.gateways[name]
		if g == nil || st.gateway != "" && st.gateway != name {
			return status.Errorf(codes.PermissionDenied, "no gateway is called %q here", name)
		}
		if st.gateway == "" {
			st.gateway = name
			g.stream, g.taken, g.inForce = id, versions{}, "" // it says itself what it has
			clear(g.rejected)
		}
	}
	g := s.gateways[st.gateway]
	if g.stream != id {
		return nil // an old stream that is about to end
	}
	if len(r.InitialResourceVersions) > 0 {
		g.took(r.TypeUrl, r.InitialResourceVersions)
	}
	if len(r.InitialResourceVersions) > 0 && r.TypeUrl == resourcev3.ExtensionConfigType {
		if err := s.offer(context.Background(), st.gateway, g); err != nil { // before it is answered
			return err
		}
	}
	for _, name := range r.ResourceNamesUnsubscribe {
		delete(g.taken[r.TypeUrl], name)
		if g.retained[name] && r.TypeUrl == resourcev3.ExtensionConfigType {
			delete(g.retained, name)
			delete(g.wanted[r.TypeUrl], name)
		}
	}
	if sent := st.sent[r.ResponseNonce]; sent != nil {
		delete(st.sent, r.ResponseNonce)
		if r.ErrorDetail != nil {
			g.refused(sent, r.ErrorDetail.Message)
		} else {
			delete(g.rejected, r.TypeUrl)
			took := map[string]string{}
			for _, res := range sent.Resources {
				took[res.Name] = res.Version
			}
			g.took(r.TypeUrl, took)
			for _, name := range sent.RemovedResources {
				delete(g.taken[r.TypeUrl], name)
			}
		}
	}
	s.settle(g)
	return nil
}

func (s *Server) answered(id int64, _ *discoveryv3.DeltaDiscoveryRequest, r *discoveryv3.DeltaDiscoveryResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams[id].sent[r.Nonce] = r
}

func (g *gateway) took(url string, names map[string]string) {
	if g.taken[url] == nil {
		g.taken[url] = map[string]string{}
	}
	for name, version := range names {
		g.taken[url][name], _, _ = strings.Cut(version, "+") // what follows says how it was offered
	}
}

func (g *gateway) refused(sent *discoveryv3.DeltaDiscoveryResponse, why string) {
	r := Rejection{Type: sent.TypeUrl[strings.LastIndexByte(sent.TypeUrl, '.')+1:], Error: why, Time: time.Now()}
	if g.refusals[sent.TypeUrl] == nil {
		g.refusals[sent.TypeUrl] = map[string]int{}
	}
	for _, res := range sent.Resources {
		r.Resources = append(r.Resources, res.Name)
		g.refusals[sent.TypeUrl][res.Name]++
		delete(g.taken[sent.TypeUrl], res.Name) // which of them it has taken after all, it does not say
	}
	g.rejected[sent.TypeUrl] = r
}
