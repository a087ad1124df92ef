package segment

import (
	"fmt"
	"strings"
	"time"

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
	// Keys is a JWK set to begin with, and KeysFile the path of a file with one, on the control plane's machine. At
	// most one is there; none is needed where the first fetch can do without.
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

// TokenPath is below which path of the own trust domain the callers stand that are known by their tokens.
const TokenPath = "/oidc/"

// MaxSubject is the length of the longest subject (OpenID Connect Core 1.0, 2).
const MaxSubject = 255

// TokenCaller is who comes with a token of this issuer and subject: spiffe://TRUST-DOMAIN/oidc/ISSUER/SUBJECT, where
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
	return spiffeid.FromPath(td, TokenPath+string(issuer)+"/"+b.String())
}

// TokenCallers is everyone who comes with a token of this issuer.
func TokenCallers(td spiffeid.TrustDomain, issuer IssuerName) Caller {
	return Caller{Pattern(td.IDString() + TokenPath + string(issuer) + "/*")}
}
