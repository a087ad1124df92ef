package v1alpha1

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

// reserved are the paths of SPIFFE IDs that no workload can have.
var reserved = map[string]string{"/gateway": "gateways", "/agent": "agents", "/controlplane": "the control plane"}

func (a *assembler) workload(d *Document, spec *WorkloadSpec) segment.Workload {
	w := segment.Workload{
		Name:   segment.WorkloadName(d.Metadata.Name),
		Labels: d.Metadata.Labels,
		ID:     a.workloadID(d, "spec.spiffeID", spec.SPIFFEID),
	}
	if first := a.ids[w.ID]; first != nil && !w.ID.IsZero() {
		a.report(d, "duplicate-spiffe-id", "spec.spiffeID", fmt.Sprintf("is %q, the SPIFFE ID of another workload", w.ID),
			fmt.Sprintf("the first is at %s", first.Pos("spec.spiffeID")))
	}
	a.ids[w.ID] = d
	switch {
	case w.ID.IsZero():
	case !w.ID.MemberOf(a.TrustDomain):
		a.report(d, "other-trust-domain", "spec.spiffeID", fmt.Sprintf("is %q, and that is not in trust domain %q", w.ID, a.TrustDomain.Name()),
			fmt.Sprintf("identities are issued only below %s/", a.TrustDomain.IDString()))
	case a.Gateway != nil && w.ID == a.Gateway.ID:
		a.report(d, "reserved-spiffe-id", "spec.spiffeID", fmt.Sprintf("is %q, which is reserved for gateways", w.ID),
			"choose another")
	default:
		for path, whose := range reserved {
			if w.ID.Path() == path || strings.HasPrefix(w.ID.Path(), path+"/") {
				a.report(d, "reserved-spiffe-id", "spec.spiffeID", fmt.Sprintf("is %q, which is reserved for %s", w.ID, whose),
					"choose a path that does not begin with "+path)
			}
		}
	}
	w.Selectors = a.selectors(d, spec.Selectors)
	for i, name := range spec.Nodes {
		w.Nodes = append(w.Nodes, a.node(d, fmt.Sprintf("spec.nodes[%d]", i), name))
	}
	slices.Sort(w.Nodes)
	w.Nodes = slices.Compact(w.Nodes)
	w.FederatesWith = a.named(d, "spec.federatesWith", spec.FederatesWith, false)
	return w
}

// node reads the name of an agent: what follows /agent/ in its SPIFFE ID.
func (a *assembler) node(d *Document, field, name string) segment.NodeName {
	if _, err := spiffeid.FromPath(a.TrustDomain, "/agent/"+name); err != nil {
		a.report(d, "bad-node", field, fmt.Sprintf("is %q, which is no agent's name: %s", name, err),
			"write the name that the agent's join token is for, like host-a, or x509pop/FINGERPRINT")
	}
	return segment.NodeName(name)
}

// workloadID reads the SPIFFE ID of one workload: of a whole trust domain there is none.
func (a *assembler) workloadID(d *Document, field, s string) spiffeid.ID {
	id, err := spiffeid.FromString(s)
	switch {
	case err != nil:
		a.report(d, "bad-spiffe-id", field, fmt.Sprintf("is %q: %s", s, err), spiffeHint)
	case id.Path() == "":
		a.report(d, "bad-spiffe-id", field, fmt.Sprintf("is %q, the trust domain itself", s), spiffeHint)
		return spiffeid.ID{}
	}
	return id
}

const spiffeHint = "write a SPIFFE ID, like spiffe://example.org/rag-app"
