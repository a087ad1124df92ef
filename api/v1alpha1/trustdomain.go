package v1alpha1

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

const (
	// maxTrustDomain is the length of the longest trust domain name (SPIFFE ID, 2.3).
	maxTrustDomain = 255
	// How often a bundle or keys can be asked for.
	minRefresh, maxRefresh = time.Minute, 24 * time.Hour
)

const trustDomainHint = "write the name alone, in lower case, like example.org"

// trustDomains reads all documents of the kind, and makes them known to the others.
func (a *assembler) trustDomains(docs []*Document) []segment.TrustDomain {
	var all []segment.TrustDomain
	from := make(map[spiffeid.TrustDomain]*Document)
	for _, d := range docs {
		spec, ok := d.Spec.(*TrustDomainSpec)
		if !ok {
			continue
		}
		if len(d.problems) > 0 {
			a.unfederated = true
			continue
		}
		t := a.trustDomain(d, spec)
		if first := from[t.Domain]; first != nil && !t.Domain.IsZero() {
			a.report(d, "duplicate-trust-domain", "spec.trustDomain", fmt.Sprintf("is %q, and there is a document for that already", t.Domain.Name()),
				fmt.Sprintf("the first is at %s", first.Pos("spec.trustDomain")))
			continue
		}
		from[t.Domain] = d
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b segment.TrustDomain) int { return cmp.Compare(a.Name, b.Name) })
	for i := range all {
		if !all[i].Domain.IsZero() {
			a.federated[all[i].Domain] = &all[i]
		}
	}
	for _, t := range all {
		a.reaches(from[t.Domain], t)
	}
	return all
}

func (a *assembler) trustDomain(d *Document, spec *TrustDomainSpec) segment.TrustDomain {
	t := segment.TrustDomain{Name: segment.TrustDomainName(d.Metadata.Name), Bundle: string(spec.Bundle), BundleFile: spec.BundleFile}
	td, err := spiffeid.TrustDomainFromString(spec.TrustDomain)
	switch {
	case td == segment.TokenDomain(a.TrustDomain):
		a.report(d, "reserved-trust-domain", "spec.trustDomain", fmt.Sprintf("is %q, where callers stand that are known by their tokens", td.Name()),
			"federate with another trust domain")
		a.unfederated = true
	case err != nil || td.Name() != spec.TrustDomain || len(td.Name()) > maxTrustDomain:
		a.report(d, "bad-trust-domain", "spec.trustDomain", fmt.Sprintf("is %q", clip(spec.TrustDomain)), trustDomainHint)
		a.unfederated = true
	case td == a.TrustDomain:
		a.report(d, "own-trust-domain", "spec.trustDomain", fmt.Sprintf("is %q, the trust domain of this control plane", td.Name()),
			"its own bundle is known; leave the document out")
		a.unfederated = true
	default:
		t.Domain = td
	}
	t.Endpoint = a.bundleEndpoint(d, spec.BundleEndpoint)
	switch {
	case t.Bundle != "" && t.BundleFile != "":
		a.report(d, "not-one-of", "spec.bundleFile", "is a second initial bundle", "write one of bundle and bundleFile")
	case t.Bundle != "" && !t.Domain.IsZero():
		if _, err := segment.ParseBundle(t.Domain, []byte(t.Bundle)); err != nil {
			a.report(d, "bad-bundle", "spec.bundle", fmt.Sprintf("is no bundle of %s: %v", t.Domain, cause(err)),
				"copy what the trust domain's bundle endpoint answers, or what `spire-server bundle show -format spiffe` prints")
		}
	case t.BundleFile != "":
		a.absolute(d, "spec.bundleFile", t.BundleFile)
	}
	t.Refresh = a.refresh(d, spec.Refresh)
	return t
}

// refresh reads how often something is fetched; 0: nothing is written.
func (a *assembler) refresh(d *Document, written string) time.Duration {
	if written == "" {
		return 0
	}
	every, err := time.ParseDuration(written)
	if err != nil || every < minRefresh || every > maxRefresh {
		a.report(d, "bad-value", "spec.refresh", fmt.Sprintf("is %q, and must be a duration from 1m to 24h", clip(written)), "write it like 10m or 1h30m")
	}
	return every
}

// cause is the error below the outermost, which says what the place of the problem says as well.
func cause(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

func (a *assembler) absolute(d *Document, field, file string) {
	if !path.IsAbs(file) || path.Clean(file) != file {
		a.report(d, "bad-value", field, fmt.Sprintf("is %q", file), "write an absolute path without . and .. in it")
	}
}

// bundleEndpoint checks where a bundle is fetched (SPIFFE Federation, 5.2.1.1 and 5.2.2.1).
func (a *assembler) bundleEndpoint(d *Document, w BundleEndpoint) segment.BundleEndpoint {
	const at = "spec.bundleEndpoint"
	e := segment.BundleEndpoint{URL: w.URL, Profile: w.Profile, CAFile: w.CAFile}
	a.url(d, at+".url", w.URL, notEndpointURL(w.URL), "write it like https://spiffe.other.org/bundle.json")
	for _, f := range []struct {
		name, value string
		profile     segment.EndpointProfile
	}{{"caFile", w.CAFile, segment.HTTPSWeb}, {"endpointSPIFFEID", w.EndpointSPIFFEID, segment.HTTPSSPIFFE}} {
		if f.value != "" && f.profile != w.Profile {
			a.report(d, "not-in-profile", at+"."+f.name, fmt.Sprintf("means nothing in profile %s", w.Profile),
				fmt.Sprintf("leave it out, or set profile: %s", f.profile))
		}
	}
	switch w.Profile {
	case segment.HTTPSWeb:
		if w.CAFile != "" {
			a.absolute(d, at+".caFile", w.CAFile)
		}
	case segment.HTTPSSPIFFE:
		if w.EndpointSPIFFEID == "" {
			a.report(d, "missing-field", at+".endpointSPIFFEID", "is missing", "write the SPIFFE ID that the endpoint must have")
			break
		}
		e.ID = a.workloadID(d, at+".endpointSPIFFEID", w.EndpointSPIFFEID)
	}
	return e
}

// url reports a URL that something is wrong with.
func (a *assembler) url(d *Document, field, written, why, hint string) {
	if why == "" {
		return
	}
	shown := written
	if u, err := url.Parse(written); err == nil && u.User != nil {
		shown = u.Redacted()
	}
	a.report(d, "bad-url", field, fmt.Sprintf("is %q: %s", clip(shown), why), hint)
}

// notEndpointURL says why bundles or keys can't be fetched at this URL, or returns "".
func notEndpointURL(s string) string {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return "it is not a URL"
	case u.Scheme != "https":
		return "it does not begin with https://"
	case u.User != nil:
		return "there is a user in it"
	case strings.Contains(s, "#"):
		return "there is a # in it"
	case u.Opaque != "" || u.Hostname() == "":
		return "there is no host in it"
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() {
			return "it is not the address of one server"
		}
	} else if why := notDNS(strings.ToLower(u.Hostname())); why != "" {
		return why
	}
	_, port, found := strings.Cut(strings.TrimPrefix(u.Host, "["+u.Hostname()+"]"), ":")
	if n, err := strconv.ParseUint(port, 10, 16); found && (err != nil || n == 0) {
		return "a port is a number from 1 to 65535"
	}
	return ""
}

// reaches sees to it that the first fetch of a bundle is possible: an endpoint with an X.509-SVID needs a bundle to be
// verified with, which is given, or our own, or fetched from an endpoint that can be reached in its turn (SPIFFE
// Federation, 7.6).
func (a *assembler) reaches(d *Document, t segment.TrustDomain) {
	if t.Domain.IsZero() || t.Endpoint.ID.IsZero() { // by the web, or there is a problem already
		return
	}
	by := t.Endpoint.ID.TrustDomain()
	if by != t.Domain {
		a.knows(d, "spec.bundleEndpoint.endpointSPIFFEID", by)
	}
	// A chain has no more links than there are documents, unless it is a ring.
	for range len(a.federated) + 1 {
		if t.Bundle != "" || t.BundleFile != "" || t.Endpoint.ID.IsZero() {
			return
		}
		next := a.federated[t.Endpoint.ID.TrustDomain()]
		if next == nil { // our own, or unknown, which has been reported
			return
		}
		t = *next
	}
	a.report(d, "missing-field", "spec.bundle", "is missing, and without one the endpoint can never be verified",
		fmt.Sprintf("write the present bundle of %s into bundle, or into a file and its path into bundleFile", by))
}

// knows reports a trust domain whose members can't be authenticated.
func (a *assembler) knows(d *Document, field string, td spiffeid.TrustDomain) {
	if td == a.TrustDomain || td == segment.TokenDomain(a.TrustDomain) || a.federated[td] != nil || a.blind || a.unfederated || td.IsZero() {
		return
	}
	hint := ""
	if a.searched++; a.searched <= maxSearched {
		known := []string{a.TrustDomain.Name()}
		for other := range a.federated {
			known = append(known, other.Name())
		}
		slices.Sort(known)
		hint = didYouMean(td.Name(), known)
	}
	a.report(d, "unknown-trust-domain", field, fmt.Sprintf("is in another trust domain, and there is no TrustDomain document for %s", td),
		cmp.Or(hint, fmt.Sprintf("write a document of kind TrustDomain with trustDomain: %s in its spec", td)))
}

// named resolves names of TrustDomains, of the documents or of the trust domains themselves; own says whether the own
// one can be among them.
func (a *assembler) named(d *Document, field string, written []string, own bool) []spiffeid.TrustDomain {
	byName := make(map[string]spiffeid.TrustDomain)
	for td, t := range a.federated {
		byName[string(t.Name)] = td
	}
	var all []spiffeid.TrustDomain
	for i, w := range written {
		at := fmt.Sprintf("%s[%d]", field, i)
		named, isName := byName[w]
		td, err := spiffeid.TrustDomainFromString(w)
		isText := err == nil && td.Name() == w
		isOwn := isText && td == a.TrustDomain
		isDomain := isText && a.federated[td] != nil || isOwn && own
		switch {
		case isName && isDomain && named != td:
			a.report(d, "ambiguous", at, fmt.Sprintf("is %q, the name of the document for %s and of another trust domain", w, named),
				"rename the document")
		case isName:
			all = append(all, named)
		case isDomain:
			all = append(all, td)
		case isOwn:
			a.report(d, "own-trust-domain", at, fmt.Sprintf("is %q, the workload's own trust domain", w), "leave it out; every workload has its bundle")
		case !a.blind && !a.unfederated:
			hint := ""
			if a.searched++; a.searched <= maxSearched {
				hint = didYouMean(w, slices.Sorted(maps.Keys(byName)))
			}
			a.report(d, "unknown-trust-domain", at, fmt.Sprintf("is %q, and no TrustDomain document has that name or is for that trust domain", w),
				cmp.Or(hint, "write the metadata.name or the spec.trustDomain of a TrustDomain document"))
		}
	}
	slices.SortFunc(all, spiffeid.TrustDomain.Compare)
	return slices.Compact(all)
}
