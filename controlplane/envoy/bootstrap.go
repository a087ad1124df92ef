package envoy

import (
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	connectionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	heapv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/fixed_heap/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/segment"
)

// Sockets are the Unix sockets that a gateway finds its control plane at.
type Sockets struct {
	Control  string // ADS, access logs, traces
	Identity string // SDS
	Catalog  string
	Budget   string // external authorization and access logs, on this machine in any case
	Admin    string // Envoy's own administration, which it opens itself
	// Remote is where the control plane is instead of Control and Catalog, if it is on another machine.
	Remote *Remote
}

// Remote is a control plane on another machine. The link is mTLS with SPIFFE IDs on both sides.
type Remote struct {
	Address segment.Address
	ID      spiffeid.ID // whom the control plane must be
	Own     spiffeid.ID // whom the gateway is, by its identity socket
}

// A gateway holds so many callers' connections at once, and one more is refused. Bodies are read before anything is
// decided, so memory has a bound too: near it, requests are answered with 503 and then connections refused.
const (
	maxConnections = 50_000
	maxHeapBytes   = 2 << 30
	heapMonitor    = "envoy.resource_monitors.fixed_heap"
)

// Bootstrap is what an Envoy is started with: who it is and where its control plane is, and nothing else.
func Bootstrap(gateway segment.GatewayName, sockets Sockets) *bootstrapv3.Bootstrap {
	ads := grpcTo(ControlCluster)
	ads.GetEnvoyGrpc().RetryPolicy = &corev3.RetryPolicy{RetryBackOff: &corev3.BackoffStrategy{ // of the stream: seconds, not half a minute
		BaseInterval: durationpb.New(500 * time.Millisecond), MaxInterval: durationpb.New(5 * time.Second)}}
	return &bootstrapv3.Bootstrap{
		Node:  &corev3.Node{Id: string(gateway), Cluster: "sallyport"},
		Admin: &bootstrapv3.Admin{Address: pipe(sockets.Admin)},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			LdsConfig: fromADS(),
			CdsConfig: fromADS(),
			AdsConfig: &corev3.ApiConfigSource{
				ApiType:                   corev3.ApiConfigSource_DELTA_GRPC,
				TransportApiVersion:       corev3.ApiVersion_V3,
				GrpcServices:              []*corev3.GrpcService{ads},
				SetNodeOnFirstMessageOnly: true,
			},
		},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{
			sockets.cluster(ControlCluster, sockets.Control, true),
			planeCluster(IdentityCluster, sockets.Identity, true),
			sockets.cluster(CatalogCluster, sockets.Catalog, true),
			planeCluster(BudgetCluster, sockets.Budget, true),
		}},
		OverloadManager: &overloadv3.OverloadManager{
			ResourceMonitors: []*overloadv3.ResourceMonitor{
				monitor("envoy.resource_monitors.global_downstream_max_connections",
					&connectionsv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: maxConnections}),
				monitor(heapMonitor, &heapv3.FixedHeapConfig{MaxHeapSizeBytes: maxHeapBytes}),
			},
			Actions: []*overloadv3.OverloadAction{
				onHeap("envoy.overload_actions.shrink_heap", 0.8),
				onHeap("envoy.overload_actions.stop_accepting_requests", 0.9),
				onHeap("envoy.overload_actions.stop_accepting_connections", 0.95),
			},
		},
		LayeredRuntime: &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name: "sallyport",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: &structpb.Struct{Fields: map[string]*structpb.Value{
				"tracing.opentelemetry.flush_interval_ms": structpb.NewNumberValue(500),
				"tracing.opentelemetry.min_flush_spans":   structpb.NewNumberValue(100),
			}}},
		}}},
	}
}

func monitor(name string, config proto.Message) *overloadv3.ResourceMonitor {
	return &overloadv3.ResourceMonitor{Name: name, ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: pack(config)}}
}

// onHeap does something once so much of the heap is in use.
func onHeap(action string, part float64) *overloadv3.OverloadAction {
	return &overloadv3.OverloadAction{Name: action, Triggers: []*overloadv3.Trigger{{
		Name:         heapMonitor,
		TriggerOneof: &overloadv3.Trigger_Threshold{Threshold: &overloadv3.ThresholdTrigger{Value: part}},
	}}}
}

// cluster leads to the control plane, wherever it is.
func (s Sockets) cluster(name, socket string, overHTTP2 bool) *clusterv3.Cluster {
	if s.Remote == nil {
		return planeCluster(name, socket, overHTTP2)
	}
	c := planeCluster(name, "", true)
	c.ConnectTimeout = durationpb.New(5 * time.Second)
	c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STRICT_DNS}
	c.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address = socketAddress(s.Remote.Address.Host, s.Remote.Address.Port)
	c.TransportSocket = upstreamTLS(segment.BackendTLS{Mode: segment.TLSMutual, ID: s.Remote.ID}, segment.Gateway{ID: s.Remote.Own}, "h2")
	return c
}

func planeCluster(name, socket string, overHTTP2 bool) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                 name,
		ConnectTimeout:       durationpb.New(time.Second),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
				Endpoint: &endpointv3.Endpoint{Address: pipe(socket)}}}}}}},
	}
	if overHTTP2 {
		// So that a control plane that is cut off is noticed, and asked again.
		c.TypedExtensionProtocolOptions = http2(&corev3.Http2ProtocolOptions{ConnectionKeepalive: &corev3.KeepaliveSettings{
			Interval: durationpb.New(30 * time.Second), Timeout: durationpb.New(10 * time.Second)}})
	}
	return c
}

func pipe(path string) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path, Mode: 0o600}}}
}
