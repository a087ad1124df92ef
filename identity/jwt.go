package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxJWTLifetime is the longest lifetime of a JWT-SVID that can be asked for. Whoever sees one can use it, and it can't be
// taken back (JWT-SVID 7.1). The shortest is MinTTL.
const MaxJWTLifetime = time.Hour

const (
	maxToken          = 16 << 10 // bytes; web servers take less in a header
	maxKeyID          = 256      // bytes
	maxAudience       = 16       // values
	maxAudienceLength = 2048     // bytes of one value, as of the longest SPIFFE ID (SPIFFE ID 2.3)
	maxAudienceTotal  = 4096     // bytes of all
	// maxAhead is how far an issuer's clock may be ahead of ours. A token that has expired by our clock has expired.
	maxAhead = time.Minute
)

// signatures are what a JWT-SVID may be signed with (JWT-SVID 2.1). What is not here, "none" and shared secrets above
// all, is refused before anything else is looked at.
var signatures = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
}

// JWTAuthority signs the JWT-SVIDs of one trust domain with one key. It is immutable and safe for concurrent use.
type JWTAuthority struct {
	td       spiffeid.TrustDomain
	keyID    string
	signer   crypto.Signer
	notAfter time.Time
}

// NewJWTAuthority checks that a key can sign JWT-SVIDs (JWT-SVID 2.1): ECDSA on P-256, P-384 or P-521, or RSA of 2048
// to 8192 bits. The key ID is the name of its public key in the trust domain's bundle; nothing is signed that would
// be valid after notAfter. It does not look at the time.
func NewJWTAuthority(td spiffeid.TrustDomain, keyID string, signer crypto.Signer, notAfter time.Time) (*JWTAuthority, error) {
	switch {
	case td.IsZero():
		return nil, errors.New("use JWT authority: no trust domain")
	case keyID == "" || len(keyID) > maxKeyID || !utf8.ValidString(keyID):
		return nil, fmt.Errorf("use JWT authority: the key ID is not a text of 1 to %d bytes", maxKeyID)
	case signer == nil || len(algorithms(signer.Public())) == 0:
		return nil, errors.New("use JWT authority: no key that can sign JWT-SVIDs")
	case notAfter.IsZero():
		return nil, errors.New("use JWT authority: no end given")
	}
	return &JWTAuthority{td: td, keyID: keyID, signer: signer, notAfter: notAfter}, nil
}

// TrustDomain returns the trust domain whose members the authority may name.
func (a *JWTAuthority) TrustDomain() spiffeid.TrustDomain { return a.td }

// KeyID returns the name of the public key in the bundle.
func (a *JWTAuthority) KeyID() string { return a.keyID }

// PublicKey returns what others must know to verify what the authority signed.
func (a *JWTAuthority) PublicKey() crypto.PublicKey { return a.signer.Public() }

// NotAfter returns when everything that the authority signed has expired.
func (a *JWTAuthority) NotAfter() time.Time { return a.notAfter }

// Bundle returns what others must trust to verify what the authority signed: its public key.
func (a *JWTAuthority) Bundle() *jwtbundle.Bundle {
	return jwtbundle.FromJWTAuthorities(a.td, map[string]crypto.PublicKey{a.keyID: a.PublicKey()})
}

// String names the authority, never its key.
func (a *JWTAuthority) String() string { return "JWT authority " + a.keyID + " of " + a.td.IDString() }

// JWTRequest is what a JWT-SVID shall say.
type JWTRequest struct {
	ID       spiffeid.ID   // a workload of the authority's trust domain
	Audience []string      // see CheckAudience
	TTL      time.Duration // from MinTTL to MaxJWTLifetime; cut short where the authority ends earlier
	Issuer   string        // URL of the OpenID provider that publishes the keys (OpenID Connect Discovery 1.0, 3); "": none
}

// CheckAudience refuses what an audience claim can't be made of (JWT-SVID 3.2): it has 1 to 16 values of 1 to 2048
// bytes of text, not more than 4096 bytes together.
func CheckAudience(audience []string) error {
	if len(audience) == 0 {
		return errors.New("no audience given")
	}
	if len(audience) > maxAudience {
		return fmt.Errorf("%d audiences, more than %d", len(audience), maxAudience)
	}
	total := 0
	for _, value := range audience {
		if value == "" || len(value) > maxAudienceLength || !utf8.ValidString(value) {
			return fmt.Errorf("an audience is not a text of 1 to %d bytes", maxAudienceLength)
		}
		total += len(value)
	}
	if total > maxAudienceTotal {
		return fmt.Errorf("audiences have %d bytes, more than %d", total, maxAudienceTotal)
	}
	return nil
}

// Sign returns a JWT-SVID in its compact form (JWT-SVID 5.1): header alg, kid and typ (2), claims sub, aud, exp,
// iat (3) and, if there is an issuer, iss. It never outlives the authority, and is validated before it is returned.
func (a *JWTAuthority) Sign(r JWTRequest, now time.Time) (string, error) {
	switch {
	case !r.ID.MemberOf(a.td):
		return "", fmt.Errorf("sign JWT-SVID: %q is not in trust domain %s", r.ID, a.td)
	case r.ID.Path() == "":
		return "", fmt.Errorf("sign JWT-SVID: %s is a trust domain, not a workload", r.ID)
	case r.TTL < MinTTL || r.TTL > MaxJWTLifetime:
		return "", fmt.Errorf("sign JWT-SVID: lifetime %s is not between %s and %s", r.TTL, MinTTL, MaxJWTLifetime)
	}
	if err := CheckAudience(r.Audience); err != nil {
		return "", fmt.Errorf("sign JWT-SVID: %w", err)
	}
	expiry := now.Add(r.TTL)
	if expiry.After(a.notAfter) {
		expiry = a.notAfter
	}
	expiry = expiry.Truncate(time.Second) // claims count whole seconds
	if expiry.Sub(now) < minLife {
		return "", fmt.Errorf("sign JWT-SVID: the authority ends at %s", a.notAfter.Format(time.RFC3339))
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: algorithms(a.PublicKey())[0], Key: cryptosigner.Opaque(a.signer)},
		new(jose.SignerOptions).WithType("JWT").WithHeader("kid", a.keyID))
	if err != nil {
		return "", fmt.Errorf("sign JWT-SVID: %w", err)
	}
	claims := map[string]any{
		"sub": r.ID.String(),
		"aud": r.Audience, // a list, also of one: so does SPIRE, and that is what validators were tried with
		"exp": expiry.Unix(),
		"iat": now.Unix(),
	}
	if r.Issuer != "" {
		claims["iss"] = r.Issuer
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		return "", fmt.Errorf("sign JWT-SVID: %w", err)
	}
	if _, _, err := ValidateJWT(token, a.Bundle(), r.Audience, now); err != nil {
		return "", fmt.Errorf("sign JWT-SVID: %w", err)
	}
	return token, nil
}

// ValidateJWT returns whose JWT-SVID a token is and what it claims, if it is valid now, for one of the audiences, under
// the bundle of its subject's trust domain (JWT-SVID 4 and appendix A; Workload API, 6.3). Beyond what a validator must
// check, it refuses tokens of more than 16 KiB, header parameters that a JWT-SVID must not have (2), tokens that do
// not name their key, and subjects that are no workload.
func ValidateJWT(token string, bundles jwtbundle.Source, audience []string, now time.Time) (spiffeid.ID, map[string]any, error) {
	id, claims, err := validateJWT(token, bundles, audience, now)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("validate JWT-SVID: %w", err)
	}
	return id, claims, nil
}

func validateJWT(token string, bundles jwtbundle.Source, audience []string, now time.Time) (spiffeid.ID, map[string]any, error) {
	none := spiffeid.ID{}
	switch {
	case now.IsZero(): // the library would take its own clock
		return none, nil, errors.New("no time given")
	case len(audience) == 0: // the library would take any
		return none, nil, errors.New("no audience given")
	case len(token) > maxToken:
		return none, nil, fmt.Errorf("the token has more than %d bytes", maxToken)
	}
	keyID, err := checkHeader(token)
	if err != nil {
		return none, nil, err
	}
	parsed, err := jwt.ParseSigned(token, signatures)
	if err != nil {
		return none, nil, errors.New("it is not a signed token of three parts")
	}
	var said jwt.Claims // not to be believed before the signature is verified
	if err := parsed.UnsafeClaimsWithoutVerification(&said); err != nil {
		return none, nil, errors.New("its claims cannot be read")
	}
	id, err := spiffeid.FromString(said.Subject)
	if err != nil {
		return none, nil, fmt.Errorf("its subject is no SPIFFE ID: %w", err)
	}
	if id.Path() == "" {
		return none, nil, fmt.Errorf("its subject %s is a trust domain, not a workload", id)
	}
	bundle, err := bundles.GetJWTBundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return none, nil, fmt.Errorf("trust domain %s is not trusted", id.TrustDomain())
	}
	key, ok := bundle.FindJWTAuthority(keyID)
	if !ok {
		return none, nil, fmt.Errorf("trust domain %s has no key %q", id.TrustDomain(), keyID)
	}
	if !slices.Contains(algorithms(key), jose.SignatureAlgorithm(parsed.Headers[0].Algorithm)) {
		return none, nil, fmt.Errorf("key %q does not sign with %s", keyID, parsed.Headers[0].Algorithm)
	}
	var claims map[string]any
	if err := parsed.Claims(key, &claims); err != nil {
		return none, nil, errors.New("its signature is not the key's")
	}
	switch {
	case said.Expiry == nil:
		return none, nil, errors.New("it does not say when it expires")
	case !now.Before(said.Expiry.Time()): // RFC 7519 4.1.4
		return none, nil, fmt.Errorf("it expired at %s", said.Expiry.Time().UTC().Format(time.RFC3339))
	case said.NotBefore != nil && said.NotBefore.Time().After(now.Add(maxAhead)):
		return none, nil, fmt.Errorf("it is valid only from %s", said.NotBefore.Time().UTC().Format(time.RFC3339))
	case said.IssuedAt != nil && said.IssuedAt.Time().After(now.Add(maxAhead)):
		return none, nil, fmt.Errorf("it was issued in the future, at %s", said.IssuedAt.Time().UTC().Format(time.RFC3339))
	case !slices.ContainsFunc(audience, func(a string) bool { return a != "" && slices.Contains(said.Audience, a) }):
		return none, nil, fmt.Errorf("it is not for audience %q", audience)
	}
	return id, claims, nil
}

// checkHeader returns the ID of the key that a token says it is signed with. It refuses headers that say anything but
// alg, kid and typ, such as a key or where to find one.
func checkHeader(token string) (keyID string, err error) {
	if strings.ContainsAny(token, "\r\n") { // decoders of base64 pass over them
		return "", errors.New("it is not a signed token of three parts")
	}
	encoded, _, _ := strings.Cut(token, ".")
	decoded, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		return "", errors.New("it is not a signed token of three parts")
	}
	var header map[string]string // the three are strings, and nothing else may be here
	if err := json.Unmarshal(decoded, &header); err != nil {
		return "", errors.New("its header cannot be read, or says more than alg, kid and typ")
	}
	if !slices.Contains(signatures, jose.SignatureAlgorithm(header["alg"])) {
		return "", errors.New("its algorithm is none that signs JWT-SVIDs")
	}
	if typ, ok := header["typ"]; ok && typ != "JWT" && typ != "JOSE" {
		return "", errors.New("its type is neither JWT nor JOSE")
	}
	keyID = header["kid"]
	if keyID == "" || len(keyID) > maxKeyID {
		return "", errors.New("it does not name its key")
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return "", errors.New("its header says more than alg, kid and typ")
		}
	}
	return keyID, nil
}

// algorithms are those that a key may sign JWT-SVIDs with, the usual one first; none, if it is not of a kind or size
// to do so (RFC 7518 3.3, 3.4 and 3.5).
func algorithms(key crypto.PublicKey) []jose.SignatureAlgorithm {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return []jose.SignatureAlgorithm{jose.ES256}
		case elliptic.P384():
			return []jose.SignatureAlgorithm{jose.ES384}
		case elliptic.P521():
			return []jose.SignatureAlgorithm{jose.ES512}
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits >= 2048 && bits <= 8192 {
			return []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512}
		}
	}
	return nil
}

// MarshalJWTBundle returns a bundle as a plain JWK Set (RFC 7517 5; Workload API, 6.2.2), in the order of the key IDs.
// Keys that sign no JWT-SVIDs are left out, and the parameter use is: its value in SPIFFE bundles means nothing to the
// validators that the Workload API serves the set for (6.3).
func MarshalJWTBundle(b *jwtbundle.Bundle) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	authorities := b.JWTAuthorities()
	for _, id := range slices.Sorted(maps.Keys(authorities)) {
		if len(algorithms(authorities[id])) > 0 {
			set.Keys = append(set.Keys, jose.JSONWebKey{KeyID: id, Key: authorities[id]})
		}
	}
	encoded, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("encode JWT bundle of %s: %w", b.TrustDomain(), err)
	}
	return encoded, nil
}
