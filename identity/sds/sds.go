// Package sds serves identities to Envoy: the Secret Discovery Service, with the resource names of SPIRE's agent.
//
// It is for Envoys on the same machine, over the same socket as the Workload API; they are callers like any other.
// It makes an Envoy's private key, sends it over that socket, and keeps it only as long as the stream is open. It
// never writes or logs a key, and serves nobody but the caller's own identities and the bundles that it is to trust.
//
// An answer to a name is complete or there is none: a stream that asks for what its caller may not have ends with
// PermissionDenied, and Envoy comes again. What Envoy once trusted it would go on to trust: a bundle that is taken away
// is replaced by one that trusts nobody.
package sds

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"sallyport.dev/identity/issuer"
)

// The names of secrets, beside SPIFFE IDs (the caller's own, as a certificate), the trust domain's ID (its bundle, as
// RootCA) and those of other trust domains (the bundle of each, for Envoy's SPIFFE validator: it speaks for its own
// members only).
const (
	Default = "default" // the caller's first identity, as a certificate
	RootCA  = "ROOTCA"  // the trust domain's bundle, as plain authorities: does not check whose SVID it is
	All     = "ALL"     // the bundle of each trusted domain, for Envoy's SPIFFE validator
)

// Issuer says what callers are entitled to and signs for them: an *issuer.Issuer. Its errors are the statuses that
// callers get.
type Issuer interface {
	issuer.Signer
	Entitled(context.Context) (issuer.View, error)
}

// Register makes a gRPC server serve SDS. What Envoys refuse is logged. The server's streams stay open: end them with
// Stop, not GracefulStop.
func Register(s grpc.ServiceRegistrar, i Issuer, log *slog.Logger) {
	secretservice.RegisterSecretDiscoveryServiceServer(s, &server{issuer: i, log: log})
}

// nobodys is the name of a trust domain that none can have (SPIFFE ID, 2.1).
const nobodys = "(nobody)"

// secret is one answer.
type secret struct {
	name    string
	version string // equal secrets have equal versions
	any     *anypb.Any
}

type bundles map[spiffeid.TrustDomain]*spiffebundle.Bundle

// caller is what one stream has.
type caller struct {
	issuer Issuer
	wallet issuer.Wallet
	view   issuer.View
	// federated are the names of other trust domains that were answered.
	federated map[string]bool
}

func newCaller(i Issuer) caller { return caller{issuer: i, federated: make(map[string]bool)} }

// secrets returns the caller's secrets of these names as they now are, in their order; PermissionDenied if it may
// not have one of them. Keys are made for those only that are named.
func (c *caller) secrets(ctx context.Context, names []string) ([]secret, error) {
	var err error
	if c.view, err = c.issuer.Entitled(ctx); err != nil {
		return nil, err
	}
	entries, err := c.named(names)
	if err != nil {
		return nil, err
	}
	if _, err := c.wallet.Renew(ctx, c.issuer, entries, c.view.Bundles.Own); err != nil {
		return nil, err
	}
	secrets := make([]secret, len(names))
	for i, name := range names {
		s, err := c.secret(name)
		if err != nil {
			return nil, fmt.Errorf("make secret %q: %w", name, err)
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(s)
		if err != nil {
			return nil, fmt.Errorf("make secret %q: %w", name, err)
		}
		digest := sha256.Sum256(b)
		secrets[i] = secret{
			name:    name,
			version: hex.EncodeToString(digest[:8]),
			any:     &anypb.Any{TypeUrl: typeURL, Value: b},
		}
	}
	return secrets, nil
}

// named returns the entries whose SVIDs are asked for by the names.
func (c *caller) named(names []string) ([]issuer.Entry, error) {
	var entries []issuer.Entry
	for _, name := range names {
		if name == RootCA || name == All || name == c.view.Bundles.Own.TrustDomain().IDString() || c.foreign(name) != nil {
			continue
		}
		i := slices.IndexFunc(c.view.Entries, func(e issuer.Entry) bool { return e.ID.String() == name })
		if name == Default {
			i = 0
		}
		if i < 0 {
			return nil, status.Errorf(codes.PermissionDenied, "no secret %q for this process", name)
		}
		e := c.view.Entries[i]
		if !slices.ContainsFunc(entries, func(o issuer.Entry) bool { return o.ID == e.ID }) {
			entries = append(entries, e)
		}
	}
	return entries, nil
}

// foreign returns what to trust for a name that is another trust domain's ID: its bundle; nothing, if the caller had
// it on this stream and no longer has; nil, if it is no name of the caller's.
func (c *caller) foreign(name string) bundles {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil || td.IDString() != name {
		return nil
	}
	if b, ok := c.view.Bundles.Federated[td]; ok {
		return bundles{td: b}
	}
	if c.federated[name] {
		return bundles{}
	}
	return nil
}

// secret makes one secret from what is held.
func (c *caller) secret(name string) (*tls.Secret, error) {
	own := c.view.Bundles.Own
	switch {
	case name == RootCA || name == own.TrustDomain().IDString():
		ca, err := own.X509Bundle().Marshal()
		if err != nil {
			return nil, err
		}
		return validation(name, &tls.CertificateValidationContext{TrustedCa: inline(ca)}), nil
	case name == All:
		trusted := bundles{}
		maps.Copy(trusted, c.view.Bundles.Federated)
		trusted[own.TrustDomain()] = own // last: nobody puts himself in its place
		return c.spiffeValidation(name, trusted)
	case c.foreign(name) != nil:
		c.federated[name] = true
		return c.spiffeValidation(name, c.foreign(name))
	}
	id := name
	if name == Default {
		id = c.view.Entries[0].ID.String()
	}
	svids := c.wallet.SVIDs()
	svid := svids[slices.IndexFunc(svids, func(s *x509svid.SVID) bool { return s.ID.String() == id })]
	chain, key, err := svid.Marshal()
	if err != nil {
		return nil, err
	}
	return &tls.Secret{Name: name, Type: &tls.Secret_TlsCertificate{
		TlsCertificate: &tls.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)},
	}}, nil
}

// spiffeValidation makes Envoy check each peer against the bundle of the trust domain that it claims, and that it
// claims one that is trusted. Where no bundle has a certificate it trusts nobody, with the own authorities for a name
// that they can't certify: Envoy refuses a configuration without any, and would go on with what it had.
func (c *caller) spiffeValidation(name string, trusted bundles) (*tls.Secret, error) {
	var config tls.SPIFFECertValidatorConfig
	trust := func(domain string, b *spiffebundle.Bundle) error {
		ca, err := b.X509Bundle().Marshal()
		if err != nil || len(ca) == 0 {
			return err
		}
		config.TrustDomains = append(config.TrustDomains, &tls.SPIFFECertValidatorConfig_TrustDomain{Name: domain, TrustBundle: inline(ca)})
		return nil
	}
	for _, td := range slices.SortedFunc(maps.Keys(trusted), spiffeid.TrustDomain.Compare) {
		if err := trust(td.Name(), trusted[td]); err != nil {
			return nil, err
		}
	}
	if len(config.TrustDomains) == 0 {
		if err := trust(nobodys, c.view.Bundles.Own); err != nil {
			return nil, err
		}
	}
	packed, err := anypb.New(&config)
	if err != nil {
		return nil, err
	}
	return validation(name, &tls.CertificateValidationContext{
		CustomValidatorConfig: &core.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: packed},
	}), nil
}

func validation(name string, c *tls.CertificateValidationContext) *tls.Secret {
	return &tls.Secret{Name: name, Type: &tls.Secret_ValidationContext{ValidationContext: c}}
}

func inline(b []byte) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
}
