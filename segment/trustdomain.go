package segment

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TrustDomainName is the name of a TrustDomain in metadata.name, which need not be the trust domain's own.
type TrustDomainName string

// TrustDomain is another trust domain whose members can be authenticated, and where its bundle is found.
type TrustDomain struct {
	Name     TrustDomainName
	Domain   spiffeid.TrustDomain // never the own one
	Endpoint BundleEndpoint
	// Bundle is the initial bundle, a document that ParseBundle accepts, and BundleFile the path of a file with one,
	// on the control plane's machine. At most one is there; none is needed where the first fetch can do without.
	Bundle     string
	BundleFile string
	Refresh    time.Duration // how often the bundle is fetched; 0: as often as the bundle says
}

// BundleEndpoint is where a bundle is fetched (SPIFFE Federation, 5.1).
type BundleEndpoint struct {
	URL     string // https, without user and fragment
	Profile EndpointProfile
	CAFile  string      // HTTPSWeb: PEM bundle to trust, a path on the control plane's machine; "": the system's
	ID      spiffeid.ID // HTTPSSPIFFE: the SPIFFE ID that the endpoint must have, of this or another trust domain
}

// EndpointProfile is how a bundle endpoint is authenticated (SPIFFE Federation, 5.2). The zero value is not a profile.
type EndpointProfile string

const (
	HTTPSWeb    EndpointProfile = "https_web"    // by a certificate for its host name
	HTTPSSPIFFE EndpointProfile = "https_spiffe" // by its X.509-SVID
)

const (
	// MaxBundle is the size of the largest bundle document.
	MaxBundle = 1 << 20
	// maxKeys are in a bundle at most.
	maxKeys = 256
)

// ErrEmptyBundle says that a bundle has no keys that authenticate anybody. Its trust domain may have revoked all that
// there were (SPIFFE Trust Domain and Bundle, 4.1.3).
var ErrEmptyBundle = errors.New("there is no key in it for X.509-SVIDs or JWT-SVIDs")

// ParseBundle reads a SPIFFE bundle (SPIFFE Trust Domain and Bundle, 4) of a trust domain. Keys for other uses or of
// types that SVIDs don't have are left out, as the specification wants. A bundle is not self-describing; one with a
// certificate that names another trust domain is refused, and so is one without keys.
func ParseBundle(td spiffeid.TrustDomain, document []byte) (*spiffebundle.Bundle, error) {
	if len(document) > MaxBundle {
		return nil, fmt.Errorf("parse bundle: it is larger than %d MiB", MaxBundle>>20)
	}
	var set struct {
		Keys     []json.RawMessage `json:"keys"`
		Sequence *uint64           `json:"spiffe_sequence"`
		Refresh  *int64            `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, fmt.Errorf("parse bundle: it is not a JWK set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("parse bundle: it has more than %d keys", maxKeys)
	}
	b := spiffebundle.New(td)
	for i, key := range set.Keys {
		if err := addKey(b, key); err != nil {
			return nil, fmt.Errorf("parse bundle: key %d: %w", i, err)
		}
	}
	if len(b.X509Authorities()) == 0 && len(b.JWTAuthorities()) == 0 {
		return nil, fmt.Errorf("parse bundle: %w", ErrEmptyBundle)
	}
	if set.Sequence != nil {
		b.SetSequenceNumber(*set.Sequence)
	}
	if set.Refresh != nil && *set.Refresh > 0 {
		b.SetRefreshHint(time.Duration(min(*set.Refresh, int64(maxHint/time.Second))) * time.Second)
	}
	return b, nil
}

// maxHint is more than anybody waits, and little enough to be a duration.
const maxHint = 10 * 365 * 24 * time.Hour

// addKey adds one JWK to the bundle, or nothing if it is not for us (X509-SVID, 6.2; JWT-SVID, 6.2).
func addKey(b *spiffebundle.Bundle, document []byte) error {
	var head map[string]json.RawMessage
	if err := json.Unmarshal(document, &head); err != nil {
		return err
	}
	var use, kty, crv string
	for name, v := range map[string]*string{"use": &use, "kty": &kty, "crv": &crv} {
		if err := json.Unmarshal(head[name], v); head[name] != nil && err != nil {
			return fmt.Errorf("%s is not text", name)
		}
	}
	curves := map[string][]string{"RSA": {""}, "EC": {"P-256", "P-384", "P-521"}, "OKP": {"Ed25519"}}
	if use != "x509-svid" && use != "jwt-svid" || !slices.Contains(curves[kty], crv) {
		return nil
	}
	if use == "x509-svid" {
		var chain []json.RawMessage
		if err := json.Unmarshal(head["x5c"], &chain); head["x5c"] != nil && err != nil {
			return errors.New("x5c is not a list")
		}
		if len(chain) == 0 {
			return nil
		}
		// All but the first are ignored.
		head["x5c"] = slices.Concat([]byte("["), chain[0], []byte("]"))
	} else {
		delete(head, "x5c") // a JWT key is no certificate, whatever comes with it
	}
	document, err := json.Marshal(head)
	if err != nil {
		return err
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(document); err != nil {
		return err
	}
	if !key.IsPublic() {
		return errors.New("it is not a public key")
	}
	if use == "jwt-svid" {
		switch key.Key.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey: // JWT-SVID, 2.1: the algorithms that there are
			return b.AddJWTAuthority(key.KeyID, key.Key)
		}
		return nil
	}
	c := key.Certificates[0]
	if !c.IsCA {
		return fmt.Errorf("the certificate %q is not an authority's", c.Subject)
	}
	for _, u := range c.URIs {
		if u.Scheme != "spiffe" {
			continue
		}
		if id, err := spiffeid.FromURI(u); err != nil || !id.MemberOf(b.TrustDomain()) {
			return fmt.Errorf("the certificate is of %q, not of trust domain %s", u, b.TrustDomain())
		}
	}
	b.AddX509Authority(c)
	return nil
}
