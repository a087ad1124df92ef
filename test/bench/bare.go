package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/identity"
	"sallyport.dev/segment"
)

// bare is what Sallyport would be without telemetry, which no command gives: the resources that it lowers, with logs and
// traces cut out, and the reading of usage for them if asked, and everything that is discovered written in. It compares
// with the SAN rule, which has none of it.
func (b *bench) bare(documents map[string]string, usage bool) (*subject, error) {
	name := "sallyport, decisions only"
	if usage {
		name = "sallyport, decisions and usage"
	}
	folder, authority, own, err := b.gatewayFolder(identity.Request{
		ID: spiffeid.RequireFromPath(trustDomain, "/gateway"), DNSNames: []string{chatHost, docsHost}, TTL: time.Hour})
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	var docs []v1alpha1.Document
	for name, text := range documents {
		docs = append(docs, v1alpha1.Decode(name, []byte(text))...)
	}
	cfg, problems := v1alpha1.Assemble(docs, v1alpha1.Options{TrustDomain: trustDomain, SVIDTTL: time.Hour, Gateway: &segment.Gateway{
		Name: "bare", ID: spiffeid.RequireFromPath(trustDomain, "/gateway"), SVIDTTL: time.Hour,
		Listen: netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", port))}})
	if problems != nil {
		return nil, problems
	}
	cfg = cfg.For(cfg.Gateways[0])
	resources := envoy.Lower(&cfg, authz.Compile(&cfg, time.Now()), envoy.Learned{})
	if err := writeIn(resources, own, usage); err != nil {
		return nil, err
	}
	sink := filepath.Join(b.folder, "sink.sock")
	bootstrap := envoy.Bootstrap("bare", envoy.Sockets{Control: sink, Identity: sink, Catalog: sink, Budget: sink, Admin: filepath.Join(folder, "admin.sock")})
	bootstrap.DynamicResources = nil
	bootstrap.StaticResources.Listeners = resources.Listeners
	bootstrap.StaticResources.Clusters = append(bootstrap.StaticResources.Clusters, resources.Clusters...)
	text, err := protojson.Marshal(bootstrap)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(folder, "envoy.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return nil, err
	}
	return b.startEnvoy(name, path, port, authority)
}

// writeIn puts into listeners and clusters what they would discover, and takes their telemetry out.
func writeIn(r *envoy.Resources, own *files, usage bool) error {
	extensions := map[string]*corev3.TypedExtensionConfig{}
	for _, x := range r.Extensions {
		extensions[x.Name] = x
	}
	routes := map[string]*routev3.RouteConfiguration{}
	for _, x := range r.Routes {
		routes[x.Name] = x
	}
	for i, c := range r.Clusters {
		c = proto.CloneOf(c)
		c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		c.EdsClusterConfig = nil
		for _, a := range r.Assignments {
			if a.ClusterName == c.Name {
				c.LoadAssignment = a
			}
		}
		r.Clusters[i] = c
	}
	l := r.Listeners[0]
	l.AccessLog = nil
	for _, chain := range l.FilterChains {
		tls, manager := &tlsv3.DownstreamTlsContext{}, &hcmv3.HttpConnectionManager{}
		if err := chain.TransportSocket.GetTypedConfig().UnmarshalTo(tls); err != nil {
			return err
		}
		if err := chain.Filters[0].GetTypedConfig().UnmarshalTo(manager); err != nil {
			return err
		}
		file := func(path string) *corev3.DataSource {
			return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: path}}
		}
		validator, err := anypb.New(&tlsv3.SPIFFECertValidatorConfig{TrustDomains: []*tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			{Name: trustDomain.Name(), TrustBundle: file(own.bundle)}}})
		if err != nil {
			return err
		}
		common := tls.CommonTlsContext
		common.TlsCertificateSdsSecretConfigs = nil
		common.TlsCertificates = []*tlsv3.TlsCertificate{{CertificateChain: file(own.chain), PrivateKey: file(own.key)}}
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: validator}}}

		manager.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: routes[manager.GetRds().GetRouteConfigName()]}
		manager.Tracing, manager.AccessLog = nil, nil
		for _, f := range manager.HttpFilters {
			if f.GetConfigDiscovery() != nil {
				f.ConfigType = &hcmv3.HttpFilter_TypedConfig{TypedConfig: extensions[f.Name].TypedConfig}
			}
			script := &luav3.Lua{}
			if usage || f.GetTypedConfig().UnmarshalTo(script) != nil {
				continue
			}
			source := script.DefaultSourceCode.Specifier.(*corev3.DataSource_InlineString)
			source.InlineString += "\nenvoy_on_response = nil\n"
			if f.GetTypedConfig().Value, err = proto.Marshal(script); err != nil {
				return err
			}
		}
		if chain.TransportSocket.ConfigType.(*corev3.TransportSocket_TypedConfig).TypedConfig, err = anypb.New(tls); err != nil {
			return err
		}
		if chain.Filters[0].GetTypedConfig().Value, err = proto.Marshal(manager); err != nil {
			return err
		}
	}
	return nil
}

// startEnvoy starts an Envoy of ours and waits until it answers.
func (b *bench) startEnvoy(name, config string, port int, authority *identity.Authority) (*subject, error) {
	p, err := startProcess(b.envoy, "--config-path", config, "--disable-hot-restart", "--log-level", "error",
		"--concurrency", strconv.Itoa(b.threads))
	if err != nil {
		return nil, err
	}
	b.started = append(b.started, p)
	s := &subject{name: name, url: fmt.Sprintf("https://127.0.0.1:%d", port), envoy: p.cmd.Process.Pid}
	if s.client, err = clientOf(authority, caller, chatHost); err != nil {
		return nil, err
	}
	return s, p.await("answer", 20*time.Second, s.answers)
}
