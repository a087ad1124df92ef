package main

import (
	"context"
	"crypto/tls"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/identity/federation"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/provider"
)

// openProvider makes us a workload of somebody else's identity provider: a SPIRE agent, or whoever else serves the
// Workload API. It issues all identities, ours and those of gateways, by entries of its own, and federates.
func (p *plane) openProvider() error {
	socket, err := providerSocket(p.identity)
	if err != nil {
		return err
	}
	switch {
	case p.agentListen != "" || p.x509pop != "":
		return usage("leave --agent-listen and --x509pop-ca out: the provider has agents of its own", "--identity: agents are attested by the provider")
	case p.ca != (caFlags{}):
		return usage("leave the flags of the CA out", "--identity: the provider has a CA of its own")
	case p.federation != (federationFlags{}):
		return usage("leave --bundle-endpoint and --oidc-issuer out", "--identity: the provider federates")
	}
	p.provider = provider.New(provider.Config{Addr: "unix://" + socket, Log: p.log})
	return nil
}

// providerSocket reads where a provider serves the Workload API: spire:unix:///PATH, or unix:///PATH.
func providerSocket(s string) (string, error) {
	socket, ok := strings.CutPrefix(strings.TrimPrefix(s, "spire:"), "unix://")
	if !ok || !filepath.IsAbs(socket) {
		return "", usage("as in --identity unix:///run/sallyport/workload.sock or spire:unix:///run/spire/agent.sock", "--identity: %q is no Unix socket", s)
	}
	return socket, nil
}

// serveIdentity keeps what identities come from.
func (p *plane) serveIdentity(ctx context.Context, group *errgroup.Group) {
	group.Go(func() error { return p.tokenIssuers.Run(ctx) })
	if p.provider != nil {
		group.Go(func() error { return p.provider.Run(ctx) })
		group.Go(func() error { return p.tokenKeys.follow(ctx, p.provider) })
		return
	}
	group.Go(func() error { return p.keeper.Run(ctx) })
	group.Go(func() error { return p.own.Run(ctx) })
	group.Go(func() error { return p.follower.Run(ctx) })
}

// certificate is the control plane's own X.509-SVID.
func (p *plane) certificate() (*tls.Certificate, error) {
	if p.provider == nil {
		return p.own.Certificate()
	}
	svid, err := p.provider.GetX509SVID()
	if err != nil {
		return nil, err
	}
	return issuer.Certificate(svid), nil
}

// believes is whom the control plane believes who it is: members of the own trust domain only.
func (p *plane) believes() x509bundle.Source {
	if p.provider == nil {
		return p.bundles.now().Own.X509Bundle()
	}
	own, err := p.provider.GetX509BundleForTrustDomain(p.options.TrustDomain)
	if err != nil {
		return x509bundle.New(p.options.TrustDomain) // nobody
	}
	return own
}

// nobody is the other trust domains of a control plane that follows none.
type nobody struct{}

func (nobody) Status() []federation.Status { return nil }

func (p *plane) federatedWith() interface{ Status() []federation.Status } {
	if p.follower == nil {
		return nobody{}
	}
	return p.follower
}

// caActions are what operators may do with the CA.
func (p *plane) caActions() map[string]func(url.Values) (any, error) {
	if p.provider == nil {
		return p.keeper.Actions()
	}
	others := func(url.Values) (any, error) {
		return nil, &operator.RefusedError{Failure: operator.Failure{
			Error: "the CA is the identity provider's", Hint: "ask the provider: this control plane was started with --identity"}}
	}
	return map[string]func(url.Values) (any, error){"GET /ca": others, "GET /ca/bundle": others, "POST /ca/rotate": others, "POST /ca/distrust": others}
}
