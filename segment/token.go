package segment

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// IssuerName is the name of a TokenIssuer in metadata.name.
type IssuerName string

// TokenIssuer is an OpenID provider whose tokens identify callers that have no certificate, and where its keys are found.
type TokenIssuer struct {
	Name   IssuerName
	Issuer string // the iss claim, letter by letter: an https URL (OpenID Connect Core 1.0, 2)
	// JWKSURI is where its keys are; "": where its discovery document says (OpenID Connect Discovery 1.0, 4).
	JWKSURI string
	CAFile  string // PEM bundle to trust there, a path on the control plane's machine; "": the system's
	// Keys is a JWK set to begin with, a document that ParseKeys accepts, and KeysFile the path of a file with one, on
	// the control plane's machine. At most one is there; none is needed where the first fetch can do without.
	Keys     string
	KeysFile string
	Refresh  time.Duration // how often the keys are fetched; 0: every five minutes
}

// Tokens says whose tokens an endpoint takes from callers that have no client certificate. Then its TLS shows who the
// server is, and no more.
type Tokens struct {
	Audiences    []string               // a token must be for one of these; sorted, at least one
	Issuers      []IssuerName           // sorted
	TrustDomains []spiffeid.TrustDomain // whose JWT-SVIDs; sorted
}

// TokenDomain is where the callers stand that are known by their tokens: beside the own trust domain, so that what is
// granted to all of that is not theirs. No certificate is of it.
func TokenDomain(td spiffeid.TrustDomain) spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString("oidc." + td.Name())
}

// MaxSubject is the length of the longest subject (OpenID Connect Core 1.0, 2).
const MaxSubject = 255

// TokenCaller is who comes with a token of this issuer and subject: spiffe://oidc.TRUST-DOMAIN/ISSUER/SUBJECT, where
// "_XX" stands for each byte of the subject that is not a letter, a digit, "-" or ".", and for the dots of "." and "..".
// No two subjects are the same caller.
func TokenCaller(td spiffeid.TrustDomain, issuer IssuerName, subject string) (spiffeid.ID, error) {
	if subject == "" || len(subject) > MaxSubject {
		return spiffeid.ID{}, fmt.Errorf("a subject has 1 to %d bytes, and this one %d", MaxSubject, len(subject))
	}
	var b strings.Builder
	for i := range len(subject) {
		c := subject[i]
		plain := c == '-' || c == '.' || '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
		if c == '.' && (subject == "." || subject == "..") {
			plain = false
		}
		if plain {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "_%02X", c)
		}
	}
	return spiffeid.FromPath(TokenDomain(td), "/"+string(issuer)+"/"+b.String())
}

// TokenCallers is everyone who comes with a token of this issuer.
func TokenCallers(td spiffeid.TrustDomain, issuer IssuerName) Caller {
	return Caller{Pattern(TokenDomain(td).IDString() + "/" + string(issuer) + "/*")}
}

// TokenSubject is whose token a caller comes with, the inverse of TokenCaller. It is false for all SPIFFE IDs that
// TokenCaller does not make.
func TokenSubject(td spiffeid.TrustDomain, id spiffeid.ID) (IssuerName, string, bool) {
	rest, _ := strings.CutPrefix(id.Path(), "/")
	issuer, name, _ := strings.Cut(rest, "/")
	subject, err := url.PathUnescape(strings.ReplaceAll(name, "_", "%")) // a SPIFFE ID has no % in it
	if err != nil {
		return "", "", false
	}
	// There is one way to write a subject, and no other.
	if made, err := TokenCaller(td, IssuerName(issuer), subject); err != nil || made != id {
		return "", "", false
	}
	return IssuerName(issuer), subject, true
}

// The lengths of the RSA keys that verify tokens, in bits: RFC 7518, 3.3, and what nobody exceeds who wants to be fast.
const minRSA, maxRSA = 2048, 8192

// errPrivateKey says that whoever serves keys has shown a secret.
var errPrivateKey = errors.New("it is a private key, and whoever has seen it can make tokens")

// ParseKeys reads the JWK set of an issuer (RFC 7517, 5): the public keys that its tokens are verified with. Keys for
// other uses, of other types (shared secrets above all) and of other sizes are left out, as the specification wants. A
// set is refused if it has a private key, two keys that one token could name, or none that is left.
func ParseKeys(document []byte) ([]jose.JSONWebKey, error) {
	keys, err := parseKeys(document)
	if err != nil {
		return nil, fmt.Errorf("parse keys: %w", err)
	}
	return keys, nil
}

func parseKeys(document []byte) ([]jose.JSONWebKey, error) {
	if len(document) > MaxBundle {
		return nil, fmt.Errorf("they are larger than %d MiB", MaxBundle>>20)
	}
	var set map[string]json.RawMessage // and not a struct, which would take "KEYS" as well
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, fmt.Errorf("it is not a JWK set: %w", err)
	}
	var documents []json.RawMessage
	if err := json.Unmarshal(set["keys"], &documents); err != nil {
		return nil, errors.New(`it is not a JWK set: "keys" is not a list`)
	}
	if len(documents) > maxKeys {
		return nil, fmt.Errorf("it has more than %d keys", maxKeys)
	}
	var keys []jose.JSONWebKey
	var why error // the first one was left out
	for i, d := range documents {
		key, err := parseKey(d)
		switch {
		case errors.Is(err, errPrivateKey):
			return nil, fmt.Errorf("key %d: %w", i, err)
		case err != nil:
			why = cmp.Or(why, fmt.Errorf("key %d: %w", i, err))
			continue
		case slices.ContainsFunc(keys, func(other jose.JSONWebKey) bool { return sameName(key, other) }):
			return nil, fmt.Errorf("key %d: there is another one with its kid %.40q", i, key.KeyID)
		}
		keys = append(keys, key)
	}
	switch {
	case len(keys) > 0:
		return keys, nil
	case why != nil:
		return nil, fmt.Errorf("there is no key in it that verifies tokens: %w", why)
	}
	return nil, errors.New("there is no key in it")
}

// parseKey reads one JWK, or says why it verifies no tokens. Only what makes up a public key is read: certificates may
// come with it, and say nothing to us.
func parseKey(document []byte) (jose.JSONWebKey, error) {
	var head map[string]json.RawMessage
	if err := json.Unmarshal(document, &head); err != nil {
		return jose.JSONWebKey{}, errors.New("it is not an object")
	}
	var kty, crv, use, kid, alg string
	for name, v := range map[string]*string{"kty": &kty, "crv": &crv, "use": &use, "kid": &kid, "alg": &alg} {
		if err := json.Unmarshal(head[name], v); head[name] != nil && err != nil {
			return jose.JSONWebKey{}, fmt.Errorf("%s is not text", name)
		}
	}
	var members []string // that a public key is made of
	switch kty {
	case "RSA":
		members = []string{"kty", "n", "e"}
	case "EC":
		members = []string{"kty", "crv", "x", "y"}
	case "OKP":
		members = []string{"kty", "crv", "x"}
	default:
		return jose.JSONWebKey{}, fmt.Errorf("its type is %.40q, and must be RSA, EC or OKP", kty)
	}
	for _, secret := range []string{"d", "p", "q", "dp", "dq", "qi", "oth"} { // RFC 7518, 6.2.2 and 6.3.2; RFC 8037, 2
		if head[secret] != nil {
			return jose.JSONWebKey{}, errPrivateKey
		}
	}
	if use != "" && use != "sig" {
		return jose.JSONWebKey{}, fmt.Errorf("its use is %.40q, and must be sig", use)
	}
	var ops []string
	if err := json.Unmarshal(head["key_ops"], &ops); head["key_ops"] != nil && (err != nil || !slices.Contains(ops, "verify")) {
		return jose.JSONWebKey{}, errors.New("verify is not among its key_ops")
	}
	if kty != "RSA" && !slices.Contains([]string{"P-256", "P-384", "P-521", "Ed25519"}, crv) {
		return jose.JSONWebKey{}, fmt.Errorf("its curve is %.40q, and must be P-256, P-384, P-521 or Ed25519", crv)
	}
	public := make(map[string]json.RawMessage)
	for _, name := range members {
		if head[name] == nil {
			return jose.JSONWebKey{}, fmt.Errorf("%s is missing", name)
		}
		public[name] = head[name]
	}
	text, err := json.Marshal(public)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	var read jose.JSONWebKey
	if err := read.UnmarshalJSON(text); err != nil {
		return jose.JSONWebKey{}, err
	}
	key := jose.JSONWebKey{Key: read.Key, KeyID: kid, Algorithm: alg, Use: "sig"}
	return key, unusable(key)
}

// unusable says why tokens can't be verified with a key.
func unusable(key jose.JSONWebKey) error {
	known := algorithms(key.Key)
	switch {
	case len(known) == 0:
		return fmt.Errorf("it is neither RSA of %d to %d bits with a usual exponent, nor ECDSA on P-256, P-384 or P-521, nor Ed25519", minRSA, maxRSA)
	case key.Algorithm != "" && !slices.Contains(known, jose.SignatureAlgorithm(key.Algorithm)):
		return fmt.Errorf("its algorithm is %.40q, and must be one of %q", key.Algorithm, known)
	}
	return nil
}

// algorithms are what tokens can be signed with by the owner of a public key (RFC 7518, 3.1; RFC 8037, 3.1); none: it is
// of no use. Shared secrets and private keys are of none.
func algorithms(key any) []jose.SignatureAlgorithm {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); minRSA <= bits && bits <= maxRSA && key.N.Bit(0) == 1 && (key.E == 3 || key.E == 65537) {
			return []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512}
		}
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return []jose.SignatureAlgorithm{jose.ES256}
		case elliptic.P384():
			return []jose.SignatureAlgorithm{jose.ES384}
		case elliptic.P521():
			return []jose.SignatureAlgorithm{jose.ES512}
		}
	case ed25519.PublicKey:
		if len(key) == ed25519.PublicKeySize {
			return []jose.SignatureAlgorithm{jose.EdDSA}
		}
	}
	return nil
}

// sameName reports whether a token could name both keys (RFC 7517, 4.5).
func sameName(a, b jose.JSONWebKey) bool {
	return a.KeyID != "" && a.KeyID == b.KeyID && slices.ContainsFunc(signsWith(a), func(alg jose.SignatureAlgorithm) bool {
		return slices.Contains(signsWith(b), alg)
	})
}

// signsWith is what the key's own algorithm leaves of those that it could have.
func signsWith(key jose.JSONWebKey) []jose.SignatureAlgorithm {
	if key.Algorithm != "" {
		return []jose.SignatureAlgorithm{jose.SignatureAlgorithm(key.Algorithm)}
	}
	return algorithms(key.Key)
}

// KeySet writes keys as a JWK set (RFC 7517, 5): each once and sorted, so that the same keys are the same text. What
// verifies no tokens is left out, private keys above all; "" if nothing is left.
func KeySet(keys []jose.JSONWebKey) string {
	type named struct{ kid, text string }
	var set []named
	for _, key := range keys {
		if unusable(key) != nil {
			continue
		}
		text, err := jose.JSONWebKey{Key: key.Key, KeyID: key.KeyID, Algorithm: key.Algorithm, Use: "sig"}.MarshalJSON()
		if err != nil {
			continue
		}
		set = append(set, named{key.KeyID, string(text)})
	}
	if len(set) == 0 {
		return ""
	}
	slices.SortFunc(set, func(a, b named) int { return cmp.Or(cmp.Compare(a.kid, b.kid), cmp.Compare(a.text, b.text)) })
	set = slices.Compact(set)
	texts := make([]string, len(set))
	for i, key := range set {
		texts[i] = key.text
	}
	return `{"keys":[` + strings.Join(texts, ",") + `]}`
}

// JWTKeys writes the keys that verify a trust domain's JWT-SVIDs as KeySet does. An RSA key has no algorithm in it: the
// trust domain may use any that there are for such keys (JWT-SVID, 2.1). A nil bundle has no keys.
func JWTKeys(b *spiffebundle.Bundle) string {
	if b == nil {
		return ""
	}
	var keys []jose.JSONWebKey
	for id, public := range b.JWTAuthorities() {
		if _, ok := public.(ed25519.PublicKey); ok {
			continue // which JWT-SVIDs don't have
		}
		key := jose.JSONWebKey{Key: public, KeyID: id}
		if known := algorithms(public); len(known) == 1 {
			key.Algorithm = string(known[0])
		}
		keys = append(keys, key)
	}
	return KeySet(keys)
}
