package v1alpha1

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

const issuerHint = "write it as the iss of its tokens is, like https://login.example.com"

// tokenIssuers reads all documents of the kind, and makes them known to the others.
func (a *assembler) tokenIssuers(docs []*Document) []segment.TokenIssuer {
	var all []segment.TokenIssuer
	from := make(map[string]*Document)
	for _, d := range docs {
		spec, ok := d.Spec.(*TokenIssuerSpec)
		if !ok {
			continue
		}
		a.issuers[d.Metadata.Name] = struct{}{}
		if len(d.problems) > 0 {
			continue
		}
		t := a.tokenIssuer(d, spec)
		if first := from[spec.Issuer]; first != nil { // one token would be two callers
			a.report(d, "duplicate-issuer", "spec.issuer", fmt.Sprintf("is %q, and there is a document for that already", clip(spec.Issuer)),
				fmt.Sprintf("the first is at %s", first.Pos("spec.issuer")))
			continue
		}
		from[spec.Issuer] = d
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b segment.TokenIssuer) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

func (a *assembler) tokenIssuer(d *Document, spec *TokenIssuerSpec) segment.TokenIssuer {
	t := segment.TokenIssuer{Name: segment.IssuerName(d.Metadata.Name), Issuer: spec.Issuer, JWKSURI: spec.JWKSURI, CAFile: spec.CAFile,
		Keys: string(spec.Keys), KeysFile: spec.KeysFile}
	a.url(d, "spec.issuer", t.Issuer, notIssuer(t.Issuer), issuerHint)
	if t.JWKSURI != "" {
		a.url(d, "spec.jwksURI", t.JWKSURI, notEndpointURL(t.JWKSURI), "write the jwks_uri of the issuer's discovery document, or leave it out")
	}
	if t.CAFile != "" {
		a.absolute(d, "spec.caFile", t.CAFile)
	}
	switch {
	case t.Keys != "" && t.KeysFile != "":
		a.report(d, "not-one-of", "spec.keysFile", "is a second initial set of keys", "write one of keys and keysFile")
	case t.Keys != "":
		if _, err := segment.ParseKeys([]byte(t.Keys)); err != nil {
			a.report(d, "bad-keys", "spec.keys", fmt.Sprintf("are no keys of an issuer: %v", cause(err)), "copy what the issuer's jwks_uri answers")
		}
	case t.KeysFile != "":
		a.absolute(d, "spec.keysFile", t.KeysFile)
	}
	t.Refresh = a.refresh(d, spec.Refresh)
	return t
}

// notIssuer says why an issuer can't be called so (OpenID Connect Core 1.0, 2; Discovery 1.0, 4.3), or returns "".
func notIssuer(s string) string {
	if why := notEndpointURL(s); why != "" {
		return why
	}
	if strings.Contains(s, "?") {
		return "there is a ? in it"
	}
	if u, err := url.Parse(s); err != nil || u.String() != s {
		return "it is not written as a URL is (RFC 3986)"
	}
	return ""
}

// tokens checks whose tokens an endpoint takes.
func (a *assembler) tokens(d *Document, w *Tokens, hostnames []string) *segment.Tokens {
	const at = "spec.tokens"
	t := &segment.Tokens{Audiences: sortedSet(w.Audiences)}
	if len(t.Audiences) == 0 {
		t.Audiences = slices.Clone(hostnames)
	}
	for i, audience := range w.Audiences {
		// Without scheme and slashes, which make no difference to gateways.
		if bare := strings.TrimPrefix(strings.TrimPrefix(audience, "https://"), "http://"); strings.Trim(bare, "/") == "" {
			a.report(d, "bad-value", fmt.Sprintf("%s.audiences[%d]", at, i), fmt.Sprintf("is %q, which names no audience", audience), "write what the aud of the tokens is")
		}
	}
	for i, name := range w.Issuers {
		a.knowsIssuer(d, fmt.Sprintf("%s.issuers[%d]", at, i), name)
		t.Issuers = append(t.Issuers, segment.IssuerName(name))
	}
	t.Issuers = sortedSet(t.Issuers)
	t.TrustDomains = a.named(d, at+".trustDomains", w.TrustDomains, true)
	if len(w.Issuers)+len(w.TrustDomains) == 0 {
		a.report(d, "missing-field", at+".issuers", "is missing, and so is trustDomains",
			"write whose tokens are taken, or leave tokens out; then callers have certificates")
	}
	return t
}

// knowsIssuer reports a TokenIssuer that is nowhere.
func (a *assembler) knowsIssuer(d *Document, field, name string) bool {
	_, ok := a.issuers[name]
	if !ok && !a.blind {
		a.missing(d, field, "issuer", name, maps.Keys(a.issuers))
	}
	return ok
}

// tokenCaller resolves callers that a grant names by their tokens.
func (a *assembler) tokenCaller(d *Document, at func(string) string, from *From) []segment.Caller {
	issuer := segment.IssuerName(from.TokenIssuer)
	if !a.knowsIssuer(d, at(".tokenIssuer"), from.TokenIssuer) {
		return nil
	}
	if from.Subject == "" {
		return []segment.Caller{segment.TokenCallers(a.TrustDomain, issuer)}
	}
	id, err := segment.TokenCaller(a.TrustDomain, issuer, from.Subject)
	if err != nil {
		if isLabel(from.TokenIssuer) { // else the name has been reported
			a.report(d, "bad-subject", at(".subject"), fmt.Sprintf("is %q: %v", clip(from.Subject), err), "write the sub of the caller's tokens")
		}
		return nil
	}
	return []segment.Caller{segment.CallerID(id)}
}

// comesWithToken checks a SPIFFE ID where callers stand that are known by their tokens: nobody else is there.
func (a *assembler) comesWithToken(d *Document, field string, c segment.Caller) {
	rest, ok := strings.CutPrefix(c.String(), segment.TokenDomain(a.TrustDomain).IDString()+"/")
	if !ok {
		return
	}
	issuer, subject, _ := strings.Cut(rest, "/")
	id, _ := spiffeid.FromString(c.String())
	_, _, isSubject := segment.TokenSubject(a.TrustDomain, id)
	switch {
	case issuer == "*":
		if len(a.issuers) == 0 && !a.blind {
			a.report(d, "matches-nothing", field, "matches nobody: there is no TokenIssuer", "write a document of kind TokenIssuer, or leave the item out")
		}
	case issuer != "" && !a.knowsIssuer(d, field, issuer), subject == "*", isSubject:
	default:
		a.report(d, "bad-spiffe-id", field, fmt.Sprintf("is %q, which is nobody", c),
			"write tokenIssuer, and subject as it is in the tokens; for everyone with a token of that issuer, tokenIssuer alone")
	}
}

// taken reports callers of a grant that can never come to one of its endpoints, because it does not take their tokens.
func (a *assembler) taken(d *Document, i int, to *To, from []segment.Caller) {
	e := a.endpoints[to.Endpoint]
	if e == nil {
		return
	}
	var last string
	for _, c := range from { // sorted, and so are their issuers
		issuer := a.issuerOf(c)
		if _, ok := a.issuers[issuer]; !ok || issuer == last || slices.Contains(e.issuers, issuer) {
			continue
		}
		last = issuer
		a.report(d, "takes-no-tokens", fmt.Sprintf("spec.to[%d].endpoint", i), fmt.Sprintf("is %q, and that takes no tokens of issuer %q", to.Endpoint, issuer),
			fmt.Sprintf("write %s into spec.tokens.issuers of the endpoint, or grant its callers in a document of their own", issuer))
	}
}

// issuerOf is the TokenIssuer that all of the callers have tokens of; "" if there is no such one.
func (a *assembler) issuerOf(c segment.Caller) string {
	rest, ok := strings.CutPrefix(c.String(), segment.TokenDomain(a.TrustDomain).IDString()+"/")
	if !ok {
		return ""
	}
	issuer, _, _ := strings.Cut(rest, "/")
	return issuer
}
