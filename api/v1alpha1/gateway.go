package v1alpha1

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

func (a *assembler) gateway(d *Document, spec *GatewaySpec, endpoints []segment.Endpoint) segment.Gateway {
	g := segment.Gateway{
		Name:      segment.GatewayName(d.Metadata.Name),
		SVIDTTL:   a.SVIDTTL,
		Node:      a.node(d, "spec.node", spec.Node),
		Selectors: a.selectors(d, spec.Selectors),
	}
	if own := a.Gateway; own != nil && own.Name == g.Name {
		a.report(d, "duplicate-name", "metadata.name", fmt.Sprintf("is %q, the name of the gateway that `up` runs itself", g.Name), "choose another")
	}
	id, err := spiffeid.FromSegments(a.TrustDomain, "gateway", string(g.Name))
	if err == nil { // else the name has been reported
		g.ID = id
	}
	if g.Listen, err = netip.ParseAddrPort(spec.Listen); err != nil || g.Listen.Port() == 0 {
		a.report(d, "bad-address", "spec.listen", fmt.Sprintf("is %q, which is no IP address and port", spec.Listen), "write it like 0.0.0.0:8443")
	}
	if spec.Address != "" {
		var why string
		if g.Address, why = parseAddress(spec.Address); why != "" {
			a.report(d, "bad-address", "spec.address", fmt.Sprintf("is %q: %s", spec.Address, why), "write where callers reach it, like edge.internal:8443")
		}
	}
	switch {
	case spec.Endpoints != nil && spec.EndpointSelector != nil:
		a.report(d, "not-one-of", "spec", "names endpoints in two ways", "write endpoints or endpointSelector; without both the gateway serves all")
	case spec.Endpoints != nil:
		g.Endpoints = []segment.EndpointName{}
		for i, name := range spec.Endpoints {
			if _, ok := a.endpoints[name]; !ok && !a.blind {
				a.missing(d, fmt.Sprintf("spec.endpoints[%d]", i), "endpoint", name, maps.Keys(a.endpoints))
			}
			g.Endpoints = append(g.Endpoints, segment.EndpointName(name))
		}
	case spec.EndpointSelector != nil:
		g.Endpoints = []segment.EndpointName{}
		for _, e := range endpoints {
			if has(e.Labels, spec.EndpointSelector.MatchLabels) {
				g.Endpoints = append(g.Endpoints, e.Name)
			}
		}
		if len(g.Endpoints) == 0 && !a.blind {
			a.report(d, "matches-nothing", "spec.endpointSelector", "matches no endpoint", "give an endpoint these labels, or leave the selector out")
		}
	}
	slices.SortFunc(g.Endpoints, cmp.Compare)
	g.Endpoints = slices.Compact(g.Endpoints)
	return g
}

func has(labels, wanted map[string]string) bool {
	for k, v := range wanted {
		if labels[k] != v {
			return false
		}
	}
	return true
}
