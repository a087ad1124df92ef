package envoy

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/segment"
)

// Every set of backends that serves some model is one cluster, so that the load is spread over all its servers.

func allBackends(e *segment.Endpoint) []segment.BackendName {
	names := make([]segment.BackendName, len(e.Backends))
	for i, b := range e.Backends {
		names[i] = b.Name
	}
	return names
}

func clusterName(e *segment.Endpoint, backends []segment.BackendName) string {
	parts := make([]string, len(backends))
	for i, b := range backends {
		parts[i] = string(b)
	}
	slices.Sort(parts)
	return "endpoint/" + string(e.Name) + "/" + strings.Join(slices.Compact(parts), "+")
}

// overHTTP2 is the cluster of the addresses that speak gRPC. Which protocol is spoken is a matter of the route and not of what
// the client speaks: servers of REST need not know HTTP/2, and gRPC is nothing without it.
func overHTTP2(cluster string) string { return cluster + "/grpc" }

func backends(e *segment.Endpoint, g segment.Gateway) ([]*clusterv3.Cluster, []*endpointv3.ClusterLoadAssignment) {
	sets := map[string][]segment.BackendName{}
	for _, m := range e.Models {
		sets[clusterName(e, m.Backends)] = m.Backends
	}
	if len(e.Models) == 0 {
		sets[clusterName(e, allBackends(e))] = allBackends(e)
	}
	var clusters []*clusterv3.Cluster
	var assignments []*endpointv3.ClusterLoadAssignment
	add := func(cluster *clusterv3.Cluster, assignment *endpointv3.ClusterLoadAssignment) {
		clusters = append(clusters, cluster)
		if cluster.GetType() == clusterv3.Cluster_EDS {
			assignments = append(assignments, assignment)
		} else {
			cluster.LoadAssignment = assignment
		}
	}
	for _, name := range sortedKeys(sets) {
		if e.Protocol != segment.GRPC {
			add(pooled(e, name, sets[name], g, false))
		}
		if speaksGRPC(e.Backends) {
			add(pooled(e, overHTTP2(name), sets[name], g, true))
		}
	}
	return clusters, assignments
}

func pooled(e *segment.Endpoint, name string, members []segment.BackendName, g segment.Gateway, grpc bool) (*clusterv3.Cluster, *endpointv3.ClusterLoadAssignment) {
	cluster := &clusterv3.Cluster{
		Name:                 name,
		ConnectTimeout:       durationpb.New(2 * time.Second),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: fromADS()},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: atOnce(), MaxPendingRequests: atOnce(), MaxRequests: atOnce()}}},
	}
	var alpn []string
	if e.Protocol == segment.TCP {
		alpn = tcpProtocols
	}
	if grpc {
		cluster.TypedExtensionProtocolOptions = http2(&corev3.Http2ProtocolOptions{})
		alpn = []string{"h2"}
	}
	assignment := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	for _, b := range e.Backends {
		addresses := b.Addresses
		if grpc {
			addresses = b.GRPC
		}
		if !slices.Contains(members, b.Name) || len(addresses) == 0 {
			continue
		}
		group := &endpointv3.LocalityLbEndpoints{}
		for _, a := range addresses {
			if _, err := netip.ParseAddr(a.Host); err != nil { // EDS carries no host names
				cluster.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STRICT_DNS}
				cluster.EdsClusterConfig = nil
			}
			group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(a.Host, a.Port)}},
			})
		}
		assignment.Endpoints = append(assignment.Endpoints, group)
		cluster.TransportSocket = upstreamTLS(b.TLS, g, alpn...) // the same for all: Assemble refuses a mix
	}
	return cluster, assignment
}

// http2 makes a cluster speak HTTP/2, also in plain text.
func http2(options *corev3.Http2ProtocolOptions) map[string]*anypb.Any {
	return map[string]*anypb.Any{
		"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(&httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: options}}}})}
}

// atOnce is how many requests a gateway has under way to a backend: streams are long, and Envoy's own limit is short.
func atOnce() *wrapperspb.UInt32Value { return wrapperspb.UInt32(10_000) }

func upstreamTLS(t segment.BackendTLS, g segment.Gateway, protocols ...string) *corev3.TransportSocket {
	common := &tlsv3.CommonTlsContext{
		AlpnProtocols: protocols,
		// As a client, Envoy by itself goes no further than 1.2.
		TlsParams: &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3},
	}
	up := &tlsv3.UpstreamTlsContext{CommonTlsContext: common}
	switch t.Mode {
	case segment.TLSNone: // Assemble allows it for loopback only, and Check looks again
		return nil
	case segment.TLSServer:
		up.Sni = t.ServerName
		bundle := &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: t.CAFile}}
		validation := &tlsv3.CertificateValidationContext{
			TrustedCa: bundle,
			MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{
				SanType: tlsv3.SubjectAltNameMatcher_DNS, Matcher: exact(t.ServerName)}},
		}
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: validation}
	default: // Mutual; and what is no mode demands an ID that nobody has
		common.TlsCertificateSdsSecretConfigs = []*tlsv3.SdsSecretConfig{secret(g.ID.String())}
		common.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext: &tlsv3.CertificateValidationContext{
					MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{
						SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: exact(t.ID.String())}},
				},
				ValidationContextSdsSecretConfig: secret(validationSecret),
			}}
	}
	return &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(up)}}
}

// secret names a secret of the identity socket.
func secret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType:             corev3.ApiConfigSource_GRPC,
			TransportApiVersion: corev3.ApiVersion_V3,
			GrpcServices:        []*corev3.GrpcService{grpcTo(IdentityCluster)},
		}},
	}}
}

func fromADS() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func grpcTo(cluster string) *corev3.GrpcService {
	return &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
		EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: cluster}}}
}

func socketAddress(host string, port uint16) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)}}}}
}
