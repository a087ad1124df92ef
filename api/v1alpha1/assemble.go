package v1alpha1

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

const (
	maxReported = 1000 // problems of all documents together
	maxSearched = 100  // names for which a similar one is looked for
)

// Options is what a configuration has that stands in no document.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	SVIDTTL     time.Duration    // lifetime of all X.509-SVIDs
	Gateway     *segment.Gateway // of this process, beside those that stand in documents; nil: none
}

// Assemble makes a configuration of all documents: it sets defaults, resolves references and checks every rule of
// the model. If anything is wrong with any document it returns all problems and no configuration. The order of the
// documents has no meaning. No documents are a configuration too: the one that denies everything.
func Assemble(docs []Document, o Options) (segment.Config, segment.Problems) {
	return newAssembler(o).assemble(docs)
}

func newAssembler(o Options) *assembler {
	return &assembler{
		Options:   o,
		names:     make(map[documentName]*Document),
		endpoints: make(map[string]*endpoint),
		workloads: make(map[string]*segment.Workload),
		hosts:     make(map[string]segment.Pos),
		ids:       make(map[spiffeid.ID]*Document),
		labelled:  make(map[label][]*segment.Workload),
		federated: make(map[spiffeid.TrustDomain]*segment.TrustDomain),
		issuers:   make(map[string]struct{}),
		zones:     make(map[string]*time.Location),
	}
}

func (a *assembler) assemble(docs []Document) (segment.Config, segment.Problems) {
	o := a.Options
	config := segment.Config{TrustDomain: o.TrustDomain}
	if o.Gateway != nil {
		config.Gateways = append(config.Gateways, *o.Gateway)
	}
	var grants, gateways []*Document
	sorted := a.sorted(docs)
	config.Federated = a.trustDomains(sorted)
	config.Issuers = a.tokenIssuers(sorted)
	for _, d := range sorted {
		broken := len(d.problems) > 0
		switch spec := d.Spec.(type) {
		case *EndpointSpec:
			a.endpoints[d.Metadata.Name] = nil
			if !broken {
				config.Endpoints = append(config.Endpoints, a.endpoint(d, spec))
			}
		case *WorkloadSpec:
			a.workloads[d.Metadata.Name] = nil
			if broken {
				a.unlabelled = true
			} else {
				config.Workloads = append(config.Workloads, a.workload(d, spec))
			}
		case *GrantSpec:
			if !broken {
				grants = append(grants, d)
			}
		case *GatewaySpec:
			if !broken {
				gateways = append(gateways, d)
			}
		}
	}
	slices.SortFunc(config.Endpoints, func(a, b segment.Endpoint) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(config.Workloads, func(a, b segment.Workload) int { return cmp.Compare(a.Name, b.Name) })
	a.index(config.Workloads)
	for _, d := range gateways {
		config.Gateways = append(config.Gateways, a.gateway(d, d.Spec.(*GatewaySpec), config.Endpoints))
	}
	slices.SortFunc(config.Gateways, func(a, b segment.Gateway) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(grants, func(a, b *Document) int { return cmp.Compare(a.Metadata.Name, b.Metadata.Name) })
	config.Grants = slices.Grow(config.Grants, len(grants))
	for _, d := range grants {
		config.Grants = append(config.Grants, a.grant(d, d.Spec.(*GrantSpec)))
	}
	if len(a.problems) > 0 {
		return segment.Config{}, a.reported()
	}
	return config, nil
}

// AssembleShadow makes the grants of a shadow folder: those that would be in force if its documents took the place of the
// enforced documents. Of these, it goes on with all but the grants, and but those that the folder has by the same kind and
// name. They should be good by themselves. If anything is wrong it returns all problems and no grants.
func AssembleShadow(enforced, shadow []Document, o Options) ([]segment.Grant, segment.Problems) {
	replaced := make(map[documentName]bool, len(shadow))
	for i := range shadow {
		replaced[documentName{shadow[i].Kind, shadow[i].Metadata.Name}] = true
	}
	together := slices.Clone(shadow)
	for _, d := range enforced {
		if d.Kind != KindGrant && !replaced[documentName{d.Kind, d.Metadata.Name}] {
			together = append(together, d)
		}
	}
	config, problems := Assemble(together, o)
	return config.Grants, problems
}

// assembler is one call of Assemble.
type assembler struct {
	Options
	problems segment.Problems
	searched int

	// blind: some document is unreadable, so that a name that is nowhere may be in it. What is said to be missing
	// would then send the user to the wrong place.
	blind      bool
	unlabelled bool // the same, of labels: something is wrong with a workload

	names     map[documentName]*Document
	endpoints map[string]*endpoint         // nil: it is there, and something is wrong with it
	workloads map[string]*segment.Workload // the same
	hosts     map[string]segment.Pos
	ids       map[spiffeid.ID]*Document
	labelled  map[label][]*segment.Workload

	federated   map[spiffeid.TrustDomain]*segment.TrustDomain
	unfederated bool                // something is wrong with a TrustDomain, so that one which is nowhere may be that
	issuers     map[string]struct{} // the names of TokenIssuers, also of those that something is wrong with
	zones       map[string]*time.Location
}

type documentName struct {
	kind Kind
	name string
}

// sorted returns the documents in the order in which they stand, and reports what is wrong with each and with
// their names.
func (a *assembler) sorted(docs []Document) []*Document {
	all := make([]*Document, len(docs))
	for i := range docs {
		all[i] = &docs[i]
	}
	slices.SortFunc(all, byPosition)
	unique := all[:0]
	for _, d := range all {
		a.problems = append(a.problems, d.Problems()...)
		name := documentName{d.Kind, d.Metadata.Name}
		if d.Spec == nil || name.name == "" {
			a.blind = true
			if len(d.problems) == 0 {
				a.report(d, "syntax", "", "is not a document", "") // one that Decode did not make
			}
			continue
		}
		if first := a.names[name]; first != nil {
			a.report(d, "duplicate-name", "metadata.name", fmt.Sprintf("is %q, the name of another %s", name.name, name.kind),
				fmt.Sprintf("the first is at %s", first.Pos("metadata.name")))
			continue
		}
		a.names[name] = d
		if !isLabel(name.name) {
			a.report(d, "bad-name", "metadata.name", fmt.Sprintf("is %q", name.name),
				labelHint)
		}
		unique = append(unique, d)
	}
	return unique
}

func (a *assembler) report(d *Document, code, field, msg, hint string) {
	a.problems = append(a.problems, segment.Problem{Code: code, Pos: d.Pos(field), Field: field, Msg: msg, Hint: hint})
}

// reported returns the problems as they stand in the files, the first of very many.
func (a *assembler) reported() segment.Problems {
	a.problems.Sort()
	if more := len(a.problems) - maxReported; more > 0 {
		return append(a.problems[:maxReported], segment.Problem{Code: "too-many", Msg: fmt.Sprintf("and %d more problems", more)})
	}
	return a.problems
}

// missing reports a name that is nowhere.
func (a *assembler) missing(d *Document, field string, what, name string, known iter.Seq[string]) {
	hint := ""
	if a.searched++; a.searched <= maxSearched {
		names := slices.Sorted(known)
		switch hint = didYouMean(name, names); {
		case hint != "":
		case len(names) == 0:
			hint = fmt.Sprintf("there is no %s at all", what)
		case len(names) <= 8:
			hint = "there are: " + strings.Join(names, ", ")
		}
	}
	a.report(d, "unknown-"+what, field, fmt.Sprintf("there is no %s %q", what, name), hint)
}
