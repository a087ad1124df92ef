package sds_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/sds"
	"sallyport.dev/segment"
)

const (
	gateway = "spiffe://example.org/gateway"
	app     = "spiffe://example.org/app"
	domain  = "spiffe://example.org"
	typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// serve entitles this process to be gateway and app.
func serve(t *testing.T, log *slog.Logger) (secretservice.SecretDiscoveryServiceClient, *issuer.Issuer) {
	t.Helper()
	socket, i := identitytest.Serve(t, func(s grpc.ServiceRegistrar, i *issuer.Issuer) { sds.Register(s, i, log) })
	i.Set(entries())
	cc, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return secretservice.NewSecretDiscoveryServiceClient(cc), i
}

func entries() []issuer.Entry {
	return []issuer.Entry{
		identitytest.Entry("secret", segment.Selector{Type: "unix", Value: fmt.Sprint("uid:", os.Getuid()+1)}),
		identitytest.Entry("gateway", identitytest.Me()),
		identitytest.Entry("app", identitytest.Me()),
	}
}

func unpack(t *testing.T, packed *anypb.Any) *tls.Secret {
	t.Helper()
	s := new(tls.Secret)
	if packed.TypeUrl != typeURL {
		t.Fatalf("got a %s", packed.TypeUrl)
	}
	if err := packed.UnmarshalTo(s); err != nil {
		t.Fatal(err)
	}
	if err := s.ValidateAll(); err != nil {
		t.Fatal(err)
	}
	return s
}

// describe says what a secret is, having checked what it holds.
func describe(t *testing.T, s *tls.Secret) string {
	t.Helper()
	switch v := s.Type.(type) {
	case *tls.Secret_TlsCertificate:
		chain, key := v.TlsCertificate.CertificateChain.GetInlineBytes(), v.TlsCertificate.PrivateKey.GetInlineBytes()
		svid, err := x509svid.Parse(chain, key)
		if err != nil {
			t.Fatal(err)
		}
		return s.Name + " certificate of " + svid.ID.String()
	case *tls.Secret_ValidationContext:
		if ca := v.ValidationContext.TrustedCa; ca != nil {
			return s.Name + " trusts " + authorities(t, ca.GetInlineBytes())
		}
		custom := v.ValidationContext.CustomValidatorConfig
		var config tls.SPIFFECertValidatorConfig
		if err := custom.TypedConfig.UnmarshalTo(&config); err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		fmt.Fprintf(&b, "%s validates with %s", s.Name, custom.Name)
		for _, td := range config.TrustDomains {
			fmt.Fprintf(&b, ", for %s trusts %s", td.Name, authorities(t, td.TrustBundle.GetInlineBytes()))
		}
		return b.String()
	}
	return s.Name + " is something else"
}

func authorities(t *testing.T, pemBytes []byte) string {
	t.Helper()
	bundle, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), pemBytes)
	if err != nil {
		t.Fatal(err)
	}
	var uris []string
	for _, c := range bundle.X509Authorities() {
		uris = append(uris, fmt.Sprint(c.URIs))
	}
	return strings.Join(uris, " ")
}

var kinds = map[string]string{
	"default": "default certificate of " + gateway,
	gateway:   gateway + " certificate of " + gateway,
	app:       app + " certificate of " + app,
	"ROOTCA":  "ROOTCA trusts [spiffe://example.org]",
	domain:    domain + " trusts [spiffe://example.org]",
	"ALL":     "ALL validates with envoy.tls.cert_validator.spiffe, for example.org trusts [spiffe://example.org]",
}

// names that this process may not have.
var others = []string{"spiffe://example.org/secret", "spiffe://example.org/none", "spiffe://other.org", "rootca", ""}

func TestFetch(t *testing.T) {
	c, i := serve(t, slog.Default())
	for name, want := range kinds {
		resp, err := c.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{ResourceNames: []string{name}, TypeUrl: typeURL})
		if err != nil || len(resp.Resources) != 1 {
			t.Fatalf("%s: %v, %v", name, resp, err)
		}
		if diff := cmp.Diff(want, describe(t, unpack(t, resp.Resources[0]))); diff != "" {
			t.Error(diff)
		}
	}
	for _, name := range others {
		_, err := c.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA", name}})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%q: %v", name, err)
		}
	}
	i.Set(entries()[:1])
	for name := range kinds {
		_, err := c.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{ResourceNames: []string{name}})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%q without identity: %v", name, err)
		}
	}
}

// stream is a state-of-the-world client.
type stream struct {
	t *testing.T
	secretservice.SecretDiscoveryService_StreamSecretsClient
}

func open(t *testing.T, c secretservice.SecretDiscoveryServiceClient) stream {
	t.Helper()
	s, err := c.StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return stream{t, s}
}

func (s stream) send(req *discovery.DiscoveryRequest) {
	s.t.Helper()
	if err := s.Send(req); err != nil {
		s.t.Fatal(err)
	}
}

// next returns the next response's secrets, and the request that acknowledges it.
func (s stream) next() ([]*tls.Secret, *discovery.DiscoveryRequest) {
	s.t.Helper()
	resp, err := s.Recv()
	if err != nil {
		s.t.Fatal(err)
	}
	ack := &discovery.DiscoveryRequest{TypeUrl: resp.TypeUrl, VersionInfo: resp.VersionInfo, ResponseNonce: resp.Nonce}
	var secrets []*tls.Secret
	for _, r := range resp.Resources {
		secret := unpack(s.t, r)
		secrets = append(secrets, secret)
		ack.ResourceNames = append(ack.ResourceNames, secret.Name)
	}
	return secrets, ack
}

func describeAll(t *testing.T, secrets []*tls.Secret) []string {
	t.Helper()
	var got []string
	for _, s := range secrets {
		got = append(got, describe(t, s))
	}
	slices.Sort(got)
	return got
}

func TestStream(t *testing.T) {
	var log bytes.Buffer
	c, i := serve(t, slog.New(slog.NewTextHandler(&log, nil)))
	s := open(t, c)
	s.send(&discovery.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: []string{"default", "ALL"}})
	secrets, ack := s.next()
	if diff := cmp.Diff([]string{kinds["ALL"], kinds["default"]}, describeAll(t, secrets)); diff != "" {
		t.Fatal(diff)
	}
	s.send(ack)

	// Another name is answered with that alone; a change that concerns others, not at all.
	ack.ResourceNames = append(ack.ResourceNames, app)
	s.send(ack)
	secrets, ack = s.next()
	if diff := cmp.Diff([]string{kinds[app]}, describeAll(t, secrets)); diff != "" {
		t.Error(diff)
	}
	first := leaf(t, secrets[0])
	all := []string{"ALL", "default", app}
	ack.ResourceNames = all
	s.send(ack)
	changed := entries()
	i.Set(changed[1:])
	changed = entries()
	changed[2].DNSNames = []string{"app.internal"}
	i.Set(changed)
	secrets, ack = s.next()
	if diff := cmp.Diff([]string{kinds[app]}, describeAll(t, secrets)); diff != "" {
		t.Error(diff)
	}
	second := leaf(t, secrets[0])
	if !slices.Equal(second.DNSNames, []string{"app.internal"}) || second.Equal(first) {
		t.Errorf("was pushed one for %q", second.DNSNames)
	}

	// What is refused is not sent again, until there is another. Stale answers change nothing.
	s.send(&discovery.DiscoveryRequest{ResourceNames: all, ResponseNonce: ack.ResponseNonce, ErrorDetail: &rpcstatus.Status{Message: "no such curve"}})
	s.send(&discovery.DiscoveryRequest{ResourceNames: []string{"nonsense"}, ResponseNonce: "1"})
	s.send(&discovery.DiscoveryRequest{ResourceNames: []string{"ALL", "default"}, ResponseNonce: ack.ResponseNonce})
	s.send(&discovery.DiscoveryRequest{ResourceNames: all, ResponseNonce: ack.ResponseNonce})
	secrets, _ = s.next()
	if diff := cmp.Diff([]string{kinds[app]}, describeAll(t, secrets)); diff != "" {
		t.Errorf("asked for again: %s", diff)
	}
	if !strings.Contains(log.String(), "no such curve") {
		t.Errorf("logged %q", log.String())
	}

	i.Set(changed[:2])
	if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("app is gone: %v", err)
	}
}

func TestStreamRefuses(t *testing.T) {
	c, _ := serve(t, slog.Default())
	for _, name := range others {
		s := open(t, c)
		s.send(&discovery.DiscoveryRequest{ResourceNames: []string{"default", name}})
		if resp, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%q: %v, %v", name, resp, err)
		}
	}
	s := open(t, c)
	s.send(&discovery.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"})
	if _, err := s.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("clusters: %v", err)
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	c, i := serve(t, slog.Default())
	short := entries()
	short[1].TTL = identity.MinTTL
	i.Set(short)
	s := open(t, c)
	s.send(&discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}})
	secrets, ack := s.next()
	if len(secrets) != 2 {
		t.Fatalf("%d secrets", len(secrets))
	}
	old := leaf(t, secrets[slices.IndexFunc(secrets, func(s *tls.Secret) bool { return s.Name == "default" })])
	s.send(ack)
	secrets, _ = s.next()
	now := time.Now()
	if len(secrets) != 1 || leaf(t, secrets[0]).Equal(old) {
		t.Errorf("%d secrets at half life", len(secrets))
	}
	if now.Before(identity.RenewAt(old)) || now.After(old.NotAfter) {
		t.Errorf("valid %s to %s, replaced at %s", old.NotBefore, old.NotAfter, now)
	}
}

func TestDelta(t *testing.T) {
	c, i := serve(t, slog.Default())
	s, err := c.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	exchange := func(req *discovery.DeltaDiscoveryRequest, want ...string) []*tls.Secret {
		t.Helper()
		if req != nil {
			if err := s.Send(req); err != nil {
				t.Fatal(err)
			}
		}
		resp, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var secrets []*tls.Secret
		for _, r := range resp.Resources {
			secrets = append(secrets, unpack(t, r.Resource))
			if r.Version == "" || r.Name != secrets[len(secrets)-1].Name {
				t.Errorf("%s has version %q", r.Name, r.Version)
			}
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, describeAll(t, secrets)); diff != "" {
			t.Error(diff)
		}
		if err := s.Send(&discovery.DeltaDiscoveryRequest{ResponseNonce: resp.Nonce}); err != nil {
			t.Fatal(err)
		}
		return secrets
	}
	exchange(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"default", "ALL", domain}},
		kinds["default"], kinds["ALL"], kinds[domain])
	first := exchange(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{app}}, kinds[app])
	again := exchange(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{app}}, kinds[app])
	if !leaf(t, first[0]).Equal(leaf(t, again[0])) {
		t.Error("a new certificate for who asks again")
	}
	changed := entries()
	changed[2].DNSNames = []string{"app.internal"}
	i.Set(changed)
	exchange(nil, kinds[app])
	if err := s.Send(&discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{app}}); err != nil {
		t.Fatal(err)
	}
	exchange(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}}, kinds["ROOTCA"])
	i.Set(changed[:2]) // app is gone, and no longer wanted
	exchange(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{gateway}}, kinds[gateway])
	i.Set(nil)
	if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without an identity: %v", err)
	}
}

func leaf(t *testing.T, s *tls.Secret) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if block == nil {
		t.Fatalf("%s has no certificate", s.Name)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
