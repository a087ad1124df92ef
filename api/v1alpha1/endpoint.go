package v1alpha1

import (
	"cmp"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"sallyport.dev/segment"
)

// endpoint is an endpoint and what grants may name in it.
type endpoint struct {
	protocol   segment.Protocol
	operations []segment.Operation // of the protocol
	models     []string            // names and aliases; none: any model
	issuers    []string            // the TokenIssuers whose tokens it takes
}

func (a *assembler) endpoint(d *Document, spec *EndpointSpec) segment.Endpoint {
	e := segment.Endpoint{
		Name:      segment.EndpointName(d.Metadata.Name),
		Labels:    d.Metadata.Labels,
		Hostnames: a.hostnames(d, spec.Hostnames),
		Protocol:  spec.Protocol,
		Backends:  a.backends(d, spec),
	}
	known := &endpoint{protocol: spec.Protocol, operations: spec.Protocol.Operations()}
	e.Models, known.models = a.models(d, spec, e.Backends)
	e.Database = a.database(d, spec)
	e.Templates = a.templates(d, spec)
	if spec.Tokens != nil {
		if spec.Protocol == segment.TCP {
			a.report(d, "not-in-protocol", "spec.tokens", fmt.Sprintf("means nothing in protocol %s", spec.Protocol), "leave it out: callers of connections have certificates, all of them")
		}
		e.Tokens = a.tokens(d, spec.Tokens, e.Hostnames)
		known.issuers = spec.Tokens.Issuers
	}
	a.endpoints[d.Metadata.Name] = known
	return e
}

func (a *assembler) hostnames(d *Document, written []string) []string {
	var hosts []string
	for i, host := range written {
		at := fmt.Sprintf("spec.hostnames[%d]", i)
		host = strings.ToLower(host)
		if why := notDNS(host); why != "" {
			a.report(d, "bad-hostname", at, fmt.Sprintf("is %q: %s", host, why), "write a DNS name, like chat.models.internal")
			continue
		}
		if first, ok := a.hosts[host]; ok {
			a.report(d, "duplicate-hostname", at, fmt.Sprintf("is %q, and that leads to an endpoint already", host),
				fmt.Sprintf("the first is at %s", first))
			continue
		}
		a.hosts[host] = d.Pos(at)
		hosts = append(hosts, host)
	}
	slices.Sort(hosts)
	return hosts
}

func (a *assembler) backends(d *Document, spec *EndpointSpec) []segment.Backend {
	var backends []segment.Backend
	for i, w := range spec.Backends {
		at := fmt.Sprintf("spec.backends[%d]", i)
		b := segment.Backend{Name: segment.BackendName(w.Name)}
		if !isLabel(w.Name) {
			a.report(d, "bad-name", at+".name", fmt.Sprintf("is %q", w.Name), labelHint)
		}
		if slices.ContainsFunc(backends, func(o segment.Backend) bool { return o.Name == b.Name }) {
			a.report(d, "duplicate-name", at+".name", fmt.Sprintf("is %q, the name of another backend", w.Name), "give each its own name")
		}
		b.Addresses = a.addresses(d, at+".addresses", w.Addresses)
		b.GRPC = a.grpcAddresses(d, at+".grpcAddresses", spec.Protocol, w.GRPCAddresses, b.Addresses)
		b.TLS = a.tls(d, at+".tls", w.TLS, slices.Concat(b.Addresses, b.GRPC))
		backends = append(backends, b)
	}
	slices.SortFunc(backends, func(a, b segment.Backend) int { return cmp.Compare(a.Name, b.Name) })
	return backends
}

func (a *assembler) addresses(d *Document, at string, written []string) []segment.Address {
	var addresses []segment.Address
	for i, s := range written {
		address, why := parseAddress(s)
		switch {
		case why != "":
			a.report(d, "bad-address", fmt.Sprintf("%s[%d]", at, i), fmt.Sprintf("is %q: %s", s, why),
				"write host:port, like 127.0.0.1:8080, [::1]:8080 or model.internal:443")
		case slices.Contains(addresses, address):
			a.report(d, "duplicate-address", fmt.Sprintf("%s[%d]", at, i), fmt.Sprintf("is %q, which stands here already", s), "keep one of the two")
		default:
			addresses = append(addresses, address)
		}
	}
	slices.SortFunc(addresses, func(a, b segment.Address) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port))
	})
	return addresses
}

// grpcAddresses are where a backend speaks gRPC. Milvus does where it speaks HTTP, unless it is said otherwise.
func (a *assembler) grpcAddresses(d *Document, at string, p segment.Protocol, written []string, addresses []segment.Address) []segment.Address {
	switch {
	case p == segment.Qdrant, p == segment.Weaviate, p == segment.Milvus && written != nil:
		return a.addresses(d, at, written)
	case written != nil:
		a.report(d, "not-in-protocol", at, fmt.Sprintf("means nothing in protocol %s", p), "leave it out")
	case p == segment.Milvus, p == segment.GRPC:
		return addresses
	}
	return nil
}

// tls checks how a backend is spoken to. Nothing is sent in clear text over a network, and no certificate is
// believed that nothing is pinned to.
func (a *assembler) tls(d *Document, at string, w TLS, addresses []segment.Address) segment.BackendTLS {
	tls := segment.BackendTLS{Mode: w.Mode}
	for _, f := range []struct {
		name, value string
		mode        segment.TLSMode
	}{
		{"serverName", w.ServerName, segment.TLSServer}, {"caFile", w.CAFile, segment.TLSServer}, {"spiffeID", w.SPIFFEID, segment.TLSMutual},
	} {
		if f.value != "" && f.mode != w.Mode {
			a.report(d, "not-in-mode", at+"."+f.name, fmt.Sprintf("means nothing in mode %s", w.Mode),
				fmt.Sprintf("leave it out, or set mode: %s", f.mode))
		}
	}
	switch w.Mode {
	case segment.TLSNone:
		for _, address := range addresses {
			if !isLoopback(address.Host) {
				a.report(d, "plain-text", at+".mode", fmt.Sprintf("is None, and %s is on a network", address.Host),
					"set mode: Server or mode: Mutual; None is for loopback addresses")
			}
		}
	case segment.TLSServer:
		tls.ServerName, tls.CAFile = strings.ToLower(w.ServerName), w.CAFile
		if tls.ServerName == "" {
			tls.ServerName = onlyName(addresses)
		}
		switch why := notDNS(tls.ServerName); {
		case tls.ServerName == "":
			a.report(d, "missing-field", at+".serverName", "is missing, and does not follow from the addresses",
				"write the DNS name that the server's certificate has")
		case why != "":
			a.report(d, "bad-hostname", at+".serverName", fmt.Sprintf("is %q: %s", w.ServerName, why),
				"write the DNS name that the server's certificate has")
		}
		switch {
		case w.CAFile == "":
			a.report(d, "missing-field", at+".caFile", "is missing", "for public certificates it is /etc/ssl/certs/ca-certificates.crt on most systems")
		case !path.IsAbs(w.CAFile) || path.Clean(w.CAFile) != w.CAFile:
			a.report(d, "bad-value", at+".caFile", fmt.Sprintf("is %q", w.CAFile), "write an absolute path without . and .. in it")
		}
	case segment.TLSMutual:
		if w.SPIFFEID == "" {
			a.report(d, "missing-field", at+".spiffeID", "is missing", "write the SPIFFE ID that the server must have")
			break
		}
		tls.ID = a.workloadID(d, at+".spiffeID", w.SPIFFEID)
	}
	return tls
}

// onlyName returns the DNS name of the addresses, if it is one and the same.
func onlyName(addresses []segment.Address) string {
	for _, address := range addresses {
		if address.Host != addresses[0].Host || notDNS(address.Host) != "" {
			return ""
		}
	}
	if len(addresses) == 0 {
		return ""
	}
	return addresses[0].Host
}

// models returns the models, and all names that lead to one.
func (a *assembler) models(d *Document, spec *EndpointSpec, backends []segment.Backend) ([]segment.Model, []string) {
	if len(spec.Models) > 0 && !slices.Contains([]segment.Protocol{segment.OpenAI, segment.Anthropic, segment.Gemini}, spec.Protocol) {
		a.report(d, "not-in-protocol", "spec.models", fmt.Sprintf("means nothing in protocol %s", spec.Protocol), "leave it out")
	}
	var all []segment.BackendName
	for _, b := range backends {
		all = append(all, b.Name)
	}
	var models []segment.Model
	var names []string
	for i, w := range spec.Models {
		at := fmt.Sprintf("spec.models[%d]", i)
		name := func(at, name string) {
			switch {
			case strings.Contains(name, "*"):
				a.report(d, "bad-name", at, fmt.Sprintf("is %q", name), "a model name has no * in it")
			case slices.Contains(names, name):
				a.report(d, "duplicate-name", at, fmt.Sprintf("is %q, the name of another model", name), "keep one of the two")
			}
			names = append(names, name)
		}
		name(at+".name", w.Name)
		m := segment.Model{Name: w.Name, Aliases: slices.Sorted(slices.Values(w.Aliases))}
		for j, alias := range w.Aliases {
			name(fmt.Sprintf("%s.aliases[%d]", at, j), alias)
		}
		for j, backend := range w.Backends {
			if !slices.Contains(all, segment.BackendName(backend)) {
				a.missing(d, fmt.Sprintf("%s.backends[%d]", at, j), "backend", backend, slices.Values(texts(all)))
			}
			m.Backends = append(m.Backends, segment.BackendName(backend))
		}
		if len(m.Backends) == 0 {
			m.Backends = slices.Clone(all)
		}
		slices.Sort(m.Backends)
		m.Backends = slices.Compact(m.Backends)
		a.oneWay(d, at+".backends", backends, m.Backends)
		models = append(models, m)
	}
	if len(spec.Models) == 0 {
		a.oneWay(d, "spec.backends", backends, all)
	}
	slices.SortFunc(models, func(a, b segment.Model) int { return cmp.Compare(a.Name, b.Name) })
	return models, names
}

// oneWay refuses backends that share the load and are not spoken to in the same way: a gateway has one way for all of
// them, and it must not be the weakest.
func (a *assembler) oneWay(d *Document, at string, backends []segment.Backend, sharing []segment.BackendName) {
	var first *segment.Backend
	for i := range backends {
		b := &backends[i]
		switch {
		case !slices.Contains(sharing, b.Name):
		case first == nil:
			first = b
		case b.TLS != first.TLS:
			a.report(d, "mixed-tls", at, fmt.Sprintf("mixes %s and %s, whose tls differs", first.Name, b.Name),
				"give backends that serve the same model the same tls, or let them serve different models")
			return
		}
	}
}

func (a *assembler) database(d *Document, spec *EndpointSpec) segment.Database {
	var w Database
	if spec.Database != nil {
		w = *spec.Database
	}
	db := segment.Database{Tenant: w.Tenant, Name: w.Name}
	tenant, name := true, true // may be named
	switch spec.Protocol {
	case segment.Chroma:
		db = segment.Database{Tenant: cmp.Or(w.Tenant, "default_tenant"), Name: cmp.Or(w.Name, "default_database")}
	case segment.Milvus:
		db.Name, tenant = cmp.Or(w.Name, "default"), false
	case segment.Weaviate:
		name = false
	default:
		if spec.Database != nil {
			a.report(d, "not-in-protocol", "spec.database", fmt.Sprintf("means nothing in protocol %s", spec.Protocol), "leave it out")
		}
		return segment.Database{}
	}
	for _, f := range []struct {
		field, value string
		may          bool
	}{{"tenant", db.Tenant, tenant}, {"name", db.Name, name}} {
		switch {
		case f.value == "":
		case !f.may:
			a.report(d, "not-in-protocol", "spec.database."+f.field, fmt.Sprintf("means nothing in protocol %s", spec.Protocol), "leave it out")
		// It becomes a segment of a path, and two spellings of one path would be two answers to one question.
		case strings.Trim(f.value, nameLetters) != "" || strings.Trim(f.value, ".") == "":
			a.report(d, "bad-name", "spec.database."+f.field, fmt.Sprintf("is %q", f.value), "use letters, digits, dots, dashes and underscores")
		}
	}
	return db
}

// pathTemplate is what a template looks like: Envoy's URI templates, as far as names in them are of one segment, or of all the rest.
var pathTemplate = regexp.MustCompile(`^(/([A-Za-z0-9._~!$&'()+,=:@-]+|\{[a-z][a-z0-9_]{0,15}\}))*(/|/\{[a-z][a-z0-9_]{0,15}=\*\*\})?$`)

// maxVariables is how many Envoy takes in a template.
const maxVariables = 5

// templates are the paths that are one resource each, the more literal ones first, so that the first that fits is the one.
func (a *assembler) templates(d *Document, spec *EndpointSpec) []string {
	if len(spec.Paths) > 0 && spec.Protocol != segment.HTTP {
		a.report(d, "not-in-protocol", "spec.paths", fmt.Sprintf("means nothing in protocol %s", spec.Protocol), "leave it out")
		return nil
	}
	var templates []string
	for i, path := range spec.Paths {
		at := fmt.Sprintf("spec.paths[%d]", i)
		variables := variable.FindAllString(path, -1)
		first := slices.IndexFunc(templates, func(other string) bool { return fitness(other) == fitness(path) })
		switch {
		case !pathTemplate.MatchString(path) || path == "" || len(path) > 256 || strings.Contains(path, "/./") || strings.Contains(path, "/../"):
			a.report(d, "bad-value", at, fmt.Sprintf("is %q", clip(path)), "write a path like /users/{id}/orders, or /static/{rest=**} for all below one")
		case len(variables) > maxVariables || len(slices.Compact(slices.Sorted(slices.Values(variables)))) < len(variables):
			a.report(d, "bad-value", at, fmt.Sprintf("is %q", clip(path)), fmt.Sprintf("use at most %d variables, each once", maxVariables))
		case first >= 0:
			a.report(d, "duplicate-path", at, fmt.Sprintf("is %q, which fits what %q fits", path, templates[first]), "keep one of the two")
		default:
			templates = append(templates, path)
		}
	}
	slices.SortFunc(templates, func(a, b string) int { return cmp.Compare(fitness(a), fitness(b)) })
	return templates
}

// fitness is what a template is without the names of its variables: equal if two fit the same paths. Of two that fit one path,
// that of the more literal one is less.
func fitness(path string) string {
	return oneSegment.ReplaceAllString(allTheRest.ReplaceAllString(path, "\x7f\x7f"), "\x7f")
}

var (
	variable   = regexp.MustCompile(`\{[a-z0-9_]+`)
	oneSegment = regexp.MustCompile(`\{[a-z0-9_]+\}`)
	allTheRest = regexp.MustCompile(`\{[a-z0-9_]+=\*\*\}`)
)
