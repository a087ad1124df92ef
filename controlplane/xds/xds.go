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

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// Server is the xDS server of all gateways. Make it with New.
type Server struct {
	cache cachev3.SnapshotCache

	mu       sync.Mutex
	gateways map[segment.GatewayName]*gateway
	streams  map[streamID]*stream
	changed  chan struct{} // closed and replaced whenever a gateway's state changes
}

// gateway is what is known of one gateway. Versions are by type URL and resource name.
type gateway struct {
	stream   *stream // the newest, which alone is believed; nil: none
	target   string  // generation
	wanted   versions
	taken    versions
	asked    map[string]map[string]bool // by type URL: what the newest stream is subscribed to by name, or (false) was
	r        *envoy.Resources           // of the target
	kept     map[string]*envoy.Kept     // what was retained last
	retained map[string]bool            // wanted extensions that are not in the target: connections that began before need them
	inForce  string
	rejected map[string]Rejection      // by type URL
	refusals map[string]map[string]int // how often each resource was refused, or came with one that was
}

type versions map[string]map[string]string

// door is one gRPC server through which gateways come. go-control-plane numbers the streams of each by itself.
type door struct {
	*Server
	whose func(context.Context) (segment.GatewayName, error)
}

type streamID struct {
	door *door
	id   int64
}

type stream struct {
	only    segment.GatewayName // whom the caller may be; empty: whom it says
	end     context.CancelFunc  // nil: it ends by itself only
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
		streams:  map[streamID]*stream{},
		changed:  make(chan struct{}),
	}
}

// Register adds the services to a gRPC server. Streams live as long as ctx. Whose says which gateway a caller is; without
// it callers are believed, which is for sockets that only a gateway can open. For Keep to end streams at once, the
// server needs the option Endable.
func (s *Server) Register(ctx context.Context, to *grpc.Server, whose func(context.Context) (segment.GatewayName, error)) {
	d := &door{s, whose}
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(to, serverv3.NewServer(ctx, s.cache, serverv3.CallbackFuncs{
		DeltaStreamOpenFunc:     d.opened,
		DeltaStreamClosedFunc:   d.closed,
		StreamDeltaRequestFunc:  d.asked,
		StreamDeltaResponseFunc: d.answered,
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
		g = &gateway{taken: versions{}, asked: map[string]map[string]bool{}, retained: map[string]bool{}, kept: map[string]*envoy.Kept{}, rejected: map[string]Rejection{}, refusals: map[string]map[string]int{}}
		s.gateways[name] = g
	}
	g.target, g.r = generation, r
	clear(g.rejected)
	err := s.offer(ctx, name, g)
	s.settle(g)
	return err
}

// Keep forgets all gateways but these, and ends their streams: they are refused from then on.
func (s *Server) Keep(known func(segment.GatewayName) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, g := range s.gateways {
		if known(name) {
			continue
		}
		delete(s.gateways, name)
		s.cache.ClearSnapshot(string(name))
		if g.stream != nil && g.stream.end != nil {
			g.stream.end()
		}
	}
}

type endKey struct{}

// Endable makes the streams of a gRPC server such that Keep can end them.
func Endable() grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		ctx, end := context.WithCancel(ss.Context())
		defer end()
		return next(srv, endable{ss, context.WithValue(ctx, endKey{}, end)})
	})
}

type endable struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // it is the stream's own
}

func (s endable) Context() context.Context { return s.ctx }

// offer puts the target into the cache, and what the gateway needs beside it. The caller holds the lock.
func (s *Server) offer(ctx context.Context, name segment.GatewayName, g *gateway) error {
	o := offerOf(g.target, g.r)
	clear(g.retained)
	for name, now := range g.asked[resourcev3.ExtensionConfigType] {
		if !now || o.resources[resourcev3.ExtensionConfigType][name].Resource != nil {
			continue
		}
		if kept := g.r.Retained(name, g.kept[name]); kept != nil {
			url := resourcev3.ExtensionConfigType
			o.resources[url][name], o.versions[url][name] = types.ResourceWithTTL{Resource: kept.Extension}, kept.Version
			g.retained[name], g.kept[name] = true, kept
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
		url, name := "type.googleapis.com/"+string(m.ProtoReflect().Descriptor().FullName()), cachev3.GetResourceName(m)
		o.resources[url][name], o.versions[url][name] = types.ResourceWithTTL{Resource: m}, r.Version(m)
	}
	return o
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
	if g.stream != nil && len(g.pending()) == 0 {
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
	return slices.Compact(names) // a cluster and its addresses have one name
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
		st := Status{Gateway: name, Connected: g.stream != nil, Target: g.target, InForce: g.inForce, Pending: g.pending()}
		for _, url := range slices.Sorted(maps.Keys(g.rejected)) {
			st.Rejected = append(st.Rejected, g.rejected[url])
		}
		all = append(all, st)
	}
	return all
}

// --- what go-control-plane calls ---

func (d *door) opened(ctx context.Context, id int64, _ string) error {
	st := &stream{sent: map[string]*discoveryv3.DeltaDiscoveryResponse{}}
	if d.whose != nil {
		var err error
		if st.only, err = d.whose(ctx); err != nil {
			return status.Error(codes.PermissionDenied, err.Error())
		}
	}
	st.end, _ = ctx.Value(endKey{}).(context.CancelFunc)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.streams[streamID{d, id}] = st
	return nil
}

func (d *door) closed(id int64, _ *corev3.Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := d.streams[streamID{d, id}]
	if st == nil {
		return // it was not let in
	}
	if g := d.gateways[st.gateway]; g != nil && g.stream == st {
		g.stream = nil
		d.settle(g)
	}
	delete(d.streams, streamID{d, id})
}

func (d *door) asked(id int64, r *discoveryv3.DeltaDiscoveryRequest) error {
	s := d.Server
	s.mu.Lock()
	defer s.mu.Unlock()
	st, stale := s.streams[streamID{d, id}], false // whether what the gateway needs beside the target is another now
	if node := r.GetNode(); node != nil || st.gateway == "" {
		name := segment.GatewayName(node.GetId())
		g := s.gateways[name]
		if g == nil || st.gateway != "" && st.gateway != name || st.only != "" && st.only != name {
			return status.Errorf(codes.PermissionDenied, "no gateway is called %q here, or it is another", name)
		}
		if st.gateway == "" {
			st.gateway = name
			g.stream, g.taken, g.inForce = st, versions{}, "" // it says itself what it has
			clear(g.asked)
			stale = len(g.retained) > 0
			clear(g.rejected)
		}
	}
	g := s.gateways[st.gateway]
	if g == nil {
		return status.Errorf(codes.PermissionDenied, "no gateway is called %q here any more", st.gateway)
	}
	if g.stream != st {
		return nil // an old stream that is about to end
	}
	if len(r.InitialResourceVersions) > 0 {
		g.took(r.TypeUrl, r.InitialResourceVersions)
	}
	for _, name := range r.ResourceNamesSubscribe {
		if g.asked[r.TypeUrl] == nil {
			g.asked[r.TypeUrl] = map[string]bool{}
		}
		if _, again := g.asked[r.TypeUrl][name]; again { // it may have thrown away what the cache takes for sent
			g.again(r.TypeUrl, name)
			stale = true
		}
		g.asked[r.TypeUrl][name] = true
		_, ok := g.wanted[r.TypeUrl][name]
		stale = stale || !ok && r.TypeUrl == resourcev3.ExtensionConfigType
	}
	for _, name := range r.ResourceNamesUnsubscribe {
		if g.asked[r.TypeUrl] != nil {
			g.asked[r.TypeUrl][name] = false
		}
		delete(g.taken[r.TypeUrl], name)
		if g.retained[name] && r.TypeUrl == resourcev3.ExtensionConfigType {
			delete(g.retained, name)
			delete(g.kept, name)
			delete(g.wanted[r.TypeUrl], name)
		}
	}
	if stale {
		if err := s.offer(context.Background(), st.gateway, g); err != nil { // before it is answered
			return err
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
				if byName := g.asked[r.TypeUrl]; byName == nil || byName[res.Name] { // else it has left it meanwhile
					took[res.Name] = res.Version
				}
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

func (d *door) answered(id int64, _ *discoveryv3.DeltaDiscoveryRequest, r *discoveryv3.DeltaDiscoveryResponse) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.streams[streamID{d, id}].sent[r.Nonce] = r
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
	for _, res := range sent.Resources {
		r.Resources = append(r.Resources, res.Name)
		g.again(sent.TypeUrl, res.Name)
		delete(g.taken[sent.TypeUrl], res.Name) // which of them it has taken after all, it does not say
	}
	g.rejected[sent.TypeUrl] = r
}

// again has a resource sent once more.
func (g *gateway) again(url, name string) {
	if g.refusals[url] == nil {
		g.refusals[url] = map[string]int{}
	}
	g.refusals[url][name]++
}
