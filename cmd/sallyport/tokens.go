package main

import (
	"context"
	"path/filepath"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/identity/federation"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/provider"
	"sallyport.dev/segment"
)

// tokenKeys are what tokens of callers without certificates are verified with: the keys of issuers, and those of trust
// domains for JWT-SVIDs.
type tokenKeys struct {
	changed chan envoy.Keys // of size 1; newest wins

	mu  sync.Mutex
	now envoy.Keys
}

func newTokenKeys() *tokenKeys { return &tokenKeys{changed: make(chan envoy.Keys, 1)} }

func (k *tokenKeys) edit(edit func(*envoy.Keys)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	edit(&k.now)
	newest(k.changed, k.now)
}

// ofIssuers replaces the keys of issuers.
func (k *tokenKeys) ofIssuers(keys map[segment.IssuerName]string) {
	k.edit(func(to *envoy.Keys) { to.Issuers = keys })
}

// ofTrustDomains replaces the keys of all trust domains.
func (k *tokenKeys) ofTrustDomains(b issuer.Bundles) {
	keys := make(map[spiffeid.TrustDomain]string, len(b.Federated)+1)
	for td, bundle := range b.Federated {
		keys[td] = segment.JWTKeys(bundle)
	}
	if b.Own != nil {
		keys[b.Own.TrustDomain()] = segment.JWTKeys(b.Own)
	}
	k.edit(func(to *envoy.Keys) { to.TrustDomains = keys })
}

// follow takes over the keys of a provider that is not us, until the context ends.
func (k *tokenKeys) follow(ctx context.Context, p *provider.Source) error {
	for {
		bundles, changed := p.JWTBundles()
		keys := make(map[spiffeid.TrustDomain]string, len(bundles))
		for td, b := range bundles {
			keys[td] = segment.JWTKeys(spiffebundle.FromJWTBundle(b))
		}
		k.edit(func(to *envoy.Keys) { to.TrustDomains = keys })
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// openTokenIssuers opens what follows the keys of issuers.
func (p *plane) openTokenIssuers() (err error) {
	p.tokenIssuers, err = federation.NewIssuers(federation.IssuersConfig{
		Dir: filepath.Join(p.state.dir, "issuers"), Publish: p.tokenKeys.ofIssuers, Log: p.log})
	return err
}

// issuing is the sink that says which issuers of tokens are followed.
type issuing struct{ issuers *federation.Issuers }

func (s issuing) Publish(_ context.Context, g *controlplane.Generation) error {
	s.issuers.Set(g.Config.Issuers)
	return nil
}
