// Package controlplane is the pipeline from documents to gateways: whatever arrives is made into a generation, a
// generation is checked, and only then everybody is told.
//
// It is for cmd, which connects sources and sinks to it. A generation is immutable and published whole. The last
// good one stays in force when new input is bad, and nothing is published before the first.
package controlplane

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// Digest names a generation by its content: equal content, equal digest.
type Digest string

// Short is the digest as people read it.
func (d Digest) Short() string { return string(d[:min(len(d), 12)]) }

// Generation is a configuration and everything that was made of it, at one moment.
type Generation struct {
	Digest    Digest
	Config    segment.Config
	Policy    *authz.Policy
	Learned   envoy.Learned
	Resources map[segment.GatewayName]*envoy.Resources
	Made      time.Time
}

// Generate makes and checks a generation. An error is a defect of ours, not of the user's documents.
func Generate(cfg segment.Config, learned envoy.Learned, now time.Time) (*Generation, error) {
	return Regenerate(nil, cfg, learned, now)
}

// Regenerate is Generate for one who has an earlier generation, or nil. What it makes is the same; it is sooner made,
// because what did not change is taken over.
func Regenerate(last *Generation, cfg segment.Config, learned envoy.Learned, now time.Time) (*Generation, error) {
	if last == nil {
		last = &Generation{}
	}
	g := &Generation{Config: cfg, Policy: authz.Recompile(last.Policy, &cfg, now), Learned: learned, Made: now}
	g.Resources = make(map[segment.GatewayName]*envoy.Resources, len(cfg.Gateways))
	earlier := slices.Collect(maps.Values(last.Resources))
	for _, gateway := range cfg.Gateways {
		only := cfg.For(gateway)
		r := envoy.Lower(&only, g.Policy, learned, earlier...)
		if err := envoy.Check(r, earlier...); err != nil {
			return nil, fmt.Errorf("check what was lowered for gateway %s: %w", gateway.Name, err)
		}
		g.Resources[gateway.Name] = r
		earlier = append(earlier, r) // gateways share what they have in common
	}
	g.Digest = digest(g)
	return g, nil
}

// digest covers the resources and the identities, which is all that has an effect.
func digest(g *Generation) Digest {
	h := sha256.New()
	for _, gateway := range g.Config.Gateways {
		fmt.Fprintf(h, "%q %q %q %q %v\n", gateway.Name, gateway.ID, gateway.Node, gateway.Selectors, gateway.Address)
		r := g.Resources[gateway.Name]
		for field, m := range r.All() {
			fmt.Fprintf(h, "%s %s\n", field, r.Version(m))
		}
	}
	for _, w := range g.Config.Workloads {
		fmt.Fprintf(h, "%q %q %q %q %q\n", w.Name, w.ID, w.Selectors, w.Nodes, w.FederatesWith)
	}
	for _, td := range g.Config.Federated {
		fmt.Fprintf(h, "%+v\n", td)
	}
	for _, issuer := range g.Config.Issuers {
		fmt.Fprintf(h, "%+v\n", issuer)
	}
	return Digest(hex.EncodeToString(h.Sum(nil)))
}
