package v1alpha1

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

// gatewayPath is where the SPIFFE IDs of gateways are. No workload can have one of them.
const gatewayPath = "/gateway"

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
	case w.ID == a.Gateway.ID || w.ID.Path() == gatewayPath || strings.HasPrefix(w.ID.Path(), gatewayPath+"/"):
		a.report(d, "reserved-spiffe-id", "spec.spiffeID", fmt.Sprintf("is %q, which is reserved for gateways", w.ID),
			"choose a path that does not begin with "+gatewayPath)
	}
	for i, s := range spec.Selectors {
		selector, why := parseSelector(s)
		if why != "" {
			a.report(d, "bad-selector", fmt.Sprintf("spec.selectors[%d]", i), fmt.Sprintf("is %q: %s", s, why), selectorHint)
			continue
		}
		w.Selectors = append(w.Selectors, selector)
	}
	slices.SortFunc(w.Selectors, func(a, b segment.Selector) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Value, b.Value))
	})
	w.Selectors = slices.Compact(w.Selectors)
	return w
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

const (
	spiffeHint   = "write a SPIFFE ID, like spiffe://example.org/rag-app"
	selectorHint = "selectors are unix:uid:NUMBER, unix:gid:NUMBER, unix:user:NAME, unix:path:/ABSOLUTE/PATH and unix:sha256:HEX"
)

// parseSelector reads a selector as SPIRE's unix workload attestor writes it, or says why it cannot. A selector
// that no process could ever have is refused, too.
func parseSelector(s string) (segment.Selector, string) {
	fact, isUnix := strings.CutPrefix(s, "unix:")
	kind, value, _ := strings.Cut(fact, ":")
	if !isUnix {
		return segment.Selector{}, "there is no such type of selector"
	}
	switch kind {
	case "uid", "gid":
		if n, err := strconv.ParseUint(value, 10, 32); err != nil || strconv.FormatUint(n, 10) != value {
			return segment.Selector{}, "it is not a number"
		}
	case "user":
		if value == "" || strings.ContainsAny(value, ": ") {
			return segment.Selector{}, "it is not the name of a user"
		}
	case "path":
		if !path.IsAbs(value) || path.Clean(value) != value {
			return segment.Selector{}, "it is not an absolute path without . and .. in it"
		}
	case "sha256":
		if sum, err := hex.DecodeString(value); err != nil || len(sum) != 32 || strings.ToLower(value) != value {
			return segment.Selector{}, "it is not 64 lower-case hexadecimal digits"
		}
	default:
		return segment.Selector{}, "there is no such type of selector"
	}
	return segment.Selector{Type: "unix", Value: fact}, ""
}
