package envoy

import (
	_ "embed"
	"fmt"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	matchv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"sallyport.dev/segment"
)

// How a caller without a certificate is known, at endpoints that take tokens:
//
//	tokens  verifies the bearer token (RFC 6750, section 2.1), and leaves its claims in dynamic metadata
//	caller  is the certificate's SPIFFE ID if there is a certificate, else what the claims stand for; else the answer is 401
//	judged  takes the caller over into filter state
//
// All that follows reads the caller from there and not from the connection, so what such an endpoint is sent has names of
// its own: connections that began before an endpoint took tokens, or after it did, end in the form that they began in.

// stateCaller is who asks, where that need not be the one that the connection is of.
const stateCaller = "sallyport.caller"

// callerFilter is the name of the filter that refuses whoever is nobody.
const callerFilter = "caller"

//go:embed caller.lua
var callerScript string

//go:embed tokens.lua
var tokensScript string

// TokensName is the ECDS resource that verifies an endpoint's tokens.
func TokensName(e segment.EndpointName) string { return "tokens/" + string(e) }

// told is what the names of resources end in that read the caller from filter state.
func told(tokens bool) string {
	if tokens {
		return "/tokens"
	}
	return ""
}

// Keys are what tokens are verified with, as JWK sets (RFC 7517, section 5).
type Keys struct {
	Issuers      map[segment.IssuerName]string
	TrustDomains map[spiffeid.TrustDomain]string // for JWT-SVIDs
}

// What the claims of a token are kept under: how they are read, and what the caller's SPIFFE ID begins with.
const (
	claimsSVID = "svid:"    // sub is the SPIFFE ID
	claimsOIDC = "subject:" // sub is to be written as in segment.TokenCaller
)

// verifier is the filter that verifies tokens. It lets everything pass: who is nobody then is refused by caller.
// Issuers whose keys are not known verify nothing.
func verifier(cfg *segment.Config, e *segment.Endpoint, keys Keys) proto.Message {
	filter := &jwtv3.JwtAuthentication{Providers: map[string]*jwtv3.JwtProvider{}}
	var any []*jwtv3.JwtRequirement
	add := func(name, claims, keys string, provider *jwtv3.JwtProvider) {
		if keys == "" {
			return
		}
		provider.Audiences = e.Tokens.Audiences
		provider.RequireExpiration = true
		provider.ClockSkewSeconds = 1 // 0 would be a minute
		provider.JwksSourceSpecifier = &jwtv3.JwtProvider_LocalJwks{LocalJwks: inline(keys)}
		provider.FromHeaders = []*jwtv3.JwtHeader{{Name: "authorization", ValuePrefix: "Bearer "}} // never from a query
		provider.PayloadInMetadata = claims
		provider.FailedStatusInMetadata = "why " + name
		provider.JwtCacheConfig = &jwtv3.JwtCacheConfig{JwtCacheSize: 1000}
		filter.Providers[name] = provider
		any = append(any, &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_ProviderName{ProviderName: name}})
	}
	for _, td := range e.Tokens.TrustDomains {
		add(td.IDString(), claimsSVID+td.IDString()+"/", keys.TrustDomains[td], &jwtv3.JwtProvider{
			// JWT-SVID, section 3.1: a trust domain speaks for its own members only.
			Subjects: &matchv3.StringMatcher{MatchPattern: &matchv3.StringMatcher_Prefix{Prefix: td.IDString() + "/"}},
		})
	}
	for _, name := range e.Tokens.Issuers {
		add(string(name), claimsOIDC+segment.TokenCallers(cfg.TrustDomain, name).Pattern().Stem(), keys.Issuers[name], &jwtv3.JwtProvider{
			Issuer: cfg.Issuer(name).Issuer,
		})
	}
	requires := &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_AllowMissingOrFailed{AllowMissingOrFailed: &emptypb.Empty{}}}
	if len(any) > 0 { // of one thing alone Envoy accepts no list
		requires = &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_RequiresAny{RequiresAny: &jwtv3.JwtRequirementOrList{Requirements: append(any, requires)}}}
	}
	filter.Rules = []*jwtv3.RequirementRule{{
		Match:           &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		RequirementType: &jwtv3.RequirementRule_Requires{Requires: requires},
	}}
	return filter
}

// identifier is the filter that knows the caller. Certificates are those of the own trust domain.
func identifier(own spiffeid.TrustDomain) proto.Message {
	return &luav3.Lua{DefaultSourceCode: inline(fmt.Sprintf("local OWN = %q\n", own.IDString()+"/") + callerScript + tokensScript)}
}
