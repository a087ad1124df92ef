// Package federation makes others' keys known here, and ours to others (SPIFFE Federation; OpenID Connect Discovery
// 1.0): it serves the own bundle, to other trust domains and to whoever verifies JWT-SVIDs as OpenID Connect tokens, and
// follows the bundles of other trust domains and the keys of OpenID providers.
//
// It is for control planes. Keys are trusted only if they came from where a document says, authenticated as the document
// says, and only for the trust domain or the issuer that the document names; those of two are never put together. What is
// doubtful is refused, and the last good keys stay until better ones come or the document goes. It listens nowhere, holds
// no private key of a trust domain, verifies no token, and never asks its peers who they are: everything that it serves
// is public.
package federation

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
)

// HandlerConfig is what a handler serves.
type HandlerConfig struct {
	// Bundle returns the own bundle, which must not be changed afterwards; nil: there is none yet. It is asked at each
	// request. Whoever keeps the authorities should number their changes in it: without a number, the time is taken.
	Bundle func() *spiffebundle.Bundle
	// RefreshHint is how often others shall ask, if the bundle does not say; 0: five minutes.
	RefreshHint time.Duration
	// Issuer is the https URL that JWT-SVIDs have as their issuer; "": no OpenID Connect discovery.
	Issuer string
}

// NewHandler returns a handler for the bundle at "/" (SPIFFE Federation, 5.2.1.3 and 5.2.2.3), and below the path of
// the issuer for the two documents of OpenID Connect Discovery 1.0: /.well-known/openid-configuration (4) and /keys.
// It answers GET and HEAD only, and 503 while there is no bundle.
func NewHandler(c HandlerConfig) (http.Handler, error) {
	if c.RefreshHint == 0 {
		c.RefreshHint = defaultHint
	}
	mux := http.NewServeMux()
	bundle := &published{source: c.Bundle, encode: newNumbered(c.RefreshHint).document}
	mux.Handle("GET /{$}", bundle)
	if c.Issuer == "" {
		return mux, nil
	}
	base, err := issuerPath(c.Issuer)
	if err != nil {
		return nil, fmt.Errorf("use issuer: %w", err)
	}
	configuration, err := json.MarshalIndent(newConfiguration(c.Issuer), "", "  ")
	if err != nil {
		return nil, fmt.Errorf("use issuer: %w", err)
	}
	mux.HandleFunc("GET "+base+discovery, func(w http.ResponseWriter, r *http.Request) {
		serve(w, r, configuration)
	})
	mux.Handle("GET "+base+"/keys", &published{source: c.Bundle, encode: keySet})
	return mux, nil
}

// issuerPath returns the path of an issuer, without a slash at its end. What could be written in two ways is refused:
// whoever verifies compares issuers letter by letter.
func issuerPath(issuer string) (string, error) {
	u, err := url.Parse(issuer)
	if err != nil {
		return "", errors.New("it is not a URL")
	}
	base := strings.TrimSuffix(u.Path, "/")
	if u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.EscapedPath() != u.Path || strings.ContainsAny(issuer, "?#{}") ||
		base != "" && path.Clean(u.Path) != base {
		return "", fmt.Errorf("%q is not an https URL of host and plain path alone", u.Redacted())
	}
	return base, nil
}

// discovery is where an OpenID provider describes itself, below its issuer (OpenID Connect Discovery 1.0, 4).
const discovery = "/.well-known/openid-configuration"

// configuration is an OpenID provider's metadata (OpenID Connect Discovery 1.0, 3), as far as there is something to
// say: nobody logs in here, so there is no authorization endpoint.
type configuration struct {
	Issuer                string   `json:"issuer"`
	JWKSURI               string   `json:"jwks_uri"`
	AuthorizationEndpoint string   `json:"authorization_endpoint"`
	ResponseTypes         []string `json:"response_types_supported"`
	SubjectTypes          []string `json:"subject_types_supported"`
	Algorithms            []string `json:"id_token_signing_alg_values_supported"`
}

func newConfiguration(issuer string) configuration {
	return configuration{
		Issuer:        issuer,
		JWKSURI:       strings.TrimSuffix(issuer, "/") + "/keys",
		ResponseTypes: []string{"id_token"},
		SubjectTypes:  []string{"public"},
		Algorithms:    []string{"RS256", "ES256", "ES384", "ES512"}, // RS256 must be among them
	}
}

// published serves a document that is made of the bundle, anew only when the bundle has changed.
type published struct {
	source func() *spiffebundle.Bundle
	encode func(*spiffebundle.Bundle) ([]byte, error)

	mu       sync.Mutex
	of       *spiffebundle.Bundle
	document []byte
}

func (p *published) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	document, err := p.current()
	if err != nil {
		w.Header().Set("Retry-After", "10")
		http.Error(w, "no bundle yet", http.StatusServiceUnavailable)
		return
	}
	serve(w, r, document)
}

var errNoBundle = errors.New("no bundle yet")

func (p *published) current() ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.source() // under the lock, so that a later answer is never of an earlier bundle
	if b == nil || b.Empty() {
		return nil, errNoBundle // to publish no keys would revoke all (SPIFFE Trust Domain and Bundle, 4.1.3)
	}
	if p.of == nil || !p.of.Equal(b) {
		document, err := p.encode(b)
		if err != nil {
			return nil, err
		}
		p.of, p.document = b.Clone(), document
	}
	return p.document, nil
}

// serve answers with a document, or with 304 to whoever has it.
func serve(w http.ResponseWriter, r *http.Request, document []byte) {
	sum := sha256.Sum256(document)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-cache") // keep it, but ask each time
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("ETag", `"`+hex.EncodeToString(sum[:16])+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(document))
}

// numbered encodes bundles with sequence numbers that only grow.
type numbered struct {
	hint time.Duration
	now  func() time.Time
	last uint64
}

func newNumbered(hint time.Duration) *numbered { return &numbered{hint: hint, now: time.Now} }

// document is the bundle as JWK set (SPIFFE Trust Domain and Bundle, 4), the keys always in the same order. It is
// called when the bundle has changed, and by nobody else at the same time. The number is the bundle's own; or else the
// time, which is later than any before, also before a restart; and in any case more than the one before.
func (n *numbered) document(b *spiffebundle.Bundle) ([]byte, error) {
	sequence, ok := b.SequenceNumber()
	if !ok {
		sequence = uint64(max(n.now().Unix(), 1))
	}
	if sequence <= n.last {
		sequence = n.last + 1
	}
	hint, ok := b.RefreshHint()
	if !ok || hint <= 0 {
		hint = n.hint
	}
	keys := []jose.JSONWebKey{}
	for _, c := range b.X509Authorities() { // X509-SVID, 6.1
		keys = append(keys, jose.JSONWebKey{Key: c.PublicKey, Certificates: []*x509.Certificate{c}, Use: "x509-svid"})
	}
	jwt := b.JWTAuthorities()
	for _, id := range slices.Sorted(maps.Keys(jwt)) { // JWT-SVID, 6.1
		keys = append(keys, jose.JSONWebKey{Key: jwt[id], KeyID: id, Use: "jwt-svid"})
	}
	document, err := json.Marshal(struct {
		Keys     []jose.JSONWebKey `json:"keys"`
		Sequence uint64            `json:"spiffe_sequence"`
		Refresh  int64             `json:"spiffe_refresh_hint"` // seconds
	}{keys, sequence, int64((hint + time.Second - 1) / time.Second)})
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	n.last = sequence
	return document, nil
}

// keySet is the JWT keys of the bundle as those who know nothing of SPIFFE read them (RFC 7517, 5; OpenID Connect
// Discovery 1.0, 3).
func keySet(b *spiffebundle.Bundle) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	jwt := b.JWTAuthorities()
	for _, id := range slices.Sorted(maps.Keys(jwt)) {
		if alg := algorithm(jwt[id]); alg != "" {
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: jwt[id], KeyID: id, Use: "sig", Algorithm: string(alg)})
		}
	}
	document, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("encode JWT keys: %w", err)
	}
	return document, nil
}

// algorithm is what a key signs JWT-SVIDs with (JWT-SVID, 2.1); "" if there is none.
func algorithm(key crypto.PublicKey) jose.SignatureAlgorithm {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return jose.RS256
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return jose.ES256
		case elliptic.P384():
			return jose.ES384
		case elliptic.P521():
			return jose.ES512
		}
	}
	return ""
}
