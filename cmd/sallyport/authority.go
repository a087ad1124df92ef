package main

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/spf13/pflag"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
	"sallyport.dev/identity/issuer"
)

// caFlags are what a control plane's own authorities are kept by.
type caFlags struct {
	keyFile        string
	upstreamCert   string
	upstreamKey    string
	upstreamBundle string
}

func (c *caFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&c.keyFile, "ca-key-file", "", "`PATH` of the key that the authorities' keys are encrypted with; or $SALLYPORT_CA_KEY holds it")
	flags.StringVar(&c.upstreamCert, "upstream-ca-cert", "", "`PATH` of the chain (PEM) of the authority that signs ours, instead of a root of our own")
	flags.StringVar(&c.upstreamKey, "upstream-ca-key", "", "`PATH` of its private key (PEM)")
	flags.StringVar(&c.upstreamBundle, "upstream-bundle", "", "`PATH` of the roots above it (PEM), if they are not in its chain")
}

// key reads what the authorities' keys are encrypted with; the zero value if there is nothing.
func (c *caFlags) key() (disk.Key, error) {
	if c.keyFile != "" {
		return disk.ReadKey(c.keyFile)
	}
	if text := os.Getenv("SALLYPORT_CA_KEY"); text != "" {
		os.Unsetenv("SALLYPORT_CA_KEY") // Envoy would inherit it
		return disk.NewKey([]byte(text), "$SALLYPORT_CA_KEY")
	}
	return disk.Key{}, nil
}

// openAuthority opens the state folder's authorities.
func (p *plane) openAuthority(ctx context.Context) error {
	c := disk.Config{Dir: filepath.Join(p.state.dir, "ca"), TrustDomain: p.options.TrustDomain, SVIDTTL: p.options.SVIDTTL,
		Publish: p.signs, Log: p.log}
	var err error
	if c.Key, err = p.ca.key(); err != nil {
		return err
	}
	if p.ca.upstreamCert != "" || p.ca.upstreamKey != "" {
		c.Upstream = disk.UpstreamCA{TrustDomain: p.options.TrustDomain, Cert: p.ca.upstreamCert, Key: p.ca.upstreamKey, Bundle: p.ca.upstreamBundle}
	}
	if p.keeper, err = disk.OpenKeeper(ctx, c); err != nil {
		return err
	}
	p.signs(p.keeper.Authorities())
	return nil
}

// signs takes over what signs from now on. Whom to trust goes first: nothing may be signed that nobody can verify.
func (p *plane) signs(a identity.Authorities) {
	p.trust(func(to *issuer.Bundles) { to.Own = a.Bundle })
	p.local.Set(a)
	newest(p.own.changed, struct{}{})
}

// bundles is whom to trust now.
type bundles struct{ atomic.Pointer[issuer.Bundles] }

func (b *bundles) now() issuer.Bundles {
	if p := b.Load(); p != nil {
		return *p
	}
	return issuer.Bundles{}
}

// trust changes whom to trust, and tells everybody.
func (p *plane) trust(edit func(*issuer.Bundles)) {
	p.trusting.Lock()
	defer p.trusting.Unlock()
	next := p.bundles.now()
	edit(&next)
	p.bundles.Store(&next)
	p.identities.SetBundles(next)
	p.tokenKeys.ofTrustDomains(next)
	if p.nodes != nil {
		p.nodes.SetBundles(next)
	}
}
