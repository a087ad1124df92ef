package real

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/grpc"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/gateway"
	"sallyport.dev/controlplane/xds"
	"sallyport.dev/identity"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/disk"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/sds"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

// TestAuthorizationThatNeverComes leaves out one resource of each endpoint's authorization. What has not arrived
// denies, whatever has.
func TestAuthorizationThatNeverComes(t *testing.T) {
	t.Parallel()
	b := ownBackend(t)
	dir, err := os.MkdirTemp("/tmp", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	options := corpus.Options()
	options.Gateway.Listen = netip.MustParseAddrPort(freeAddress())
	missing := map[string]func(segment.EndpointName) []string{
		"whole":   func(segment.EndpointName) []string { return nil },
		"members": func(e segment.EndpointName) []string { return []string{envoy.MembersName(e)} },
		"rights":  func(e segment.EndpointName) []string { return []string{envoy.RightsName(e)} },
		"names":   func(e segment.EndpointName) []string { return []string{envoy.NamesName(e)} },
		"all": func(e segment.EndpointName) []string {
			return []string{envoy.MembersName(e), envoy.NamesName(e), envoy.RightsName(e)}
		},
	}
	var text string
	names := envoy.Names{}
	for name := range missing {
		text += chroma(name, b) + grant(name, "/app", name, "Read, Write, Admin", "'*'")
		names[segment.EndpointName(name)] = map[string]string{uuidOf("handbook"): "handbook"}
	}
	config, problems := v1alpha1.Assemble(v1alpha1.Decode("late.yaml", []byte(text)), options)
	if problems != nil {
		t.Fatal(problems)
	}
	config = config.For(*options.Gateway)
	resources := envoy.Lower(&config, authz.Compile(&config, time.Now()), envoy.Learned{Names: names})
	if err := envoy.Check(resources); err != nil {
		t.Fatal(err)
	}
	// Not what Lower made, which would know what it lacks.
	resources = &envoy.Resources{Listeners: resources.Listeners, Routes: resources.Routes, Extensions: resources.Extensions,
		Clusters: resources.Clusters, Assignments: resources.Assignments}
	for name, without := range missing {
		resources.Extensions = slices.DeleteFunc(resources.Extensions, func(e *corev3.TypedExtensionConfig) bool {
			return slices.Contains(without(segment.EndpointName(name)), e.Name)
		})
	}

	u := &up{listen: options.Gateway.Listen.String()}
	sockets := serveParts(t, dir, options, resources, u)
	log := newOutput()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of Envoy:\n%s", log)
		}
	})
	supervisor := gateway.Supervisor{Binary: binary, Bootstrap: envoy.Bootstrap(options.Gateway.Name, sockets), Folder: dir,
		Concurrency: 1, Log: slog.New(slog.NewTextHandler(log, nil))}
	ended := make(chan error)
	go func() { ended <- supervisor.Run(t.Context()) }()
	t.Cleanup(func() { <-ended })

	who := u.as(t, "/app", http2)
	query := func(endpoint string) answer {
		return who.send(t, request{host: hostOf(endpoint), path: listPath + "/" + uuidOf("handbook") + "/query"})
	}
	eventually(t, "way through where nothing is missing", func() bool { return query("whole").status == http.StatusOK })
	b.taken()
	for name := range missing {
		if name == "whole" {
			continue
		}
		for range 3 {
			for _, a := range []answer{query(name),
				who.send(t, request{method: "GET", host: hostOf(name), path: "/api/v2/heartbeat"}),
				who.send(t, request{method: "DELETE", host: hostOf(name), path: listPath + "/handbook"})} {
				if a.status != http.StatusForbidden || !strings.Contains(a.body, "AuthError") {
					t.Errorf("without %s: %v", name, a)
				}
			}
		}
	}
	if got := b.taken(); len(got) > 0 {
		t.Errorf("the backend was asked: %+v", got)
	}
}

// serveParts serves identities and resources to one gateway, and gives u the authority.
func serveParts(t *testing.T, dir string, options v1alpha1.Options, resources *envoy.Resources, u *up) envoy.Sockets {
	t.Helper()
	sockets := envoy.Sockets{Control: filepath.Join(dir, "c"), Identity: filepath.Join(dir, "i"), Catalog: filepath.Join(dir, "k"), Budget: filepath.Join(dir, "b"), Admin: filepath.Join(dir, "a")}
	authority, err := disk.Open(filepath.Join(dir, "ca"), options.TrustDomain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := u.keys.load(filepath.Join(dir, "ca", "ca.pem")); err != nil {
		t.Fatal(err)
	}
	local := &issuer.Local{}
	local.Set(identity.Authorities{X509: authority})
	identities := issuer.New(issuer.Config{Certifier: local, Attest: attest.Selectors})
	identities.SetBundles(issuer.Bundles{Own: spiffebundle.FromX509Bundle(authority.Bundle())})
	var hosts []string
	for _, l := range resources.Listeners {
		for _, chain := range l.FilterChains {
			hosts = append(hosts, chain.FilterChainMatch.ServerNames...)
		}
	}
	identities.Set([]issuer.Entry{{ID: options.Gateway.ID, DNSNames: hosts, TTL: time.Hour,
		Selectors: []segment.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}}}})
	gateways := xds.New()
	if err := gateways.Publish(t.Context(), options.Gateway.Name, "one", resources); err != nil {
		t.Fatal(err)
	}
	identityServer := grpc.NewServer(grpc.Creds(attest.NewCredentials()))
	sds.Register(identityServer, identities, slog.New(slog.DiscardHandler))
	control := grpc.NewServer()
	gateways.Register(t.Context(), control, nil)
	for path, server := range map[string]*grpc.Server{sockets.Identity: identityServer, sockets.Control: control} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		go server.Serve(l)
		t.Cleanup(server.Stop)
	}
	return sockets
}
