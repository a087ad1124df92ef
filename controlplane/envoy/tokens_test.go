package envoy

import (
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matchv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

const keySet = `{"keys":[]}` // whatever it is: Envoy reads it

// goodWithTokens are resources whose endpoints take tokens, of our own trust domain's members and of an issuer.
func goodWithTokens(t rapid.TB, form string) *Resources {
	cfg := corpus.Assemble(t, append(corpus.Endpoints(), corpus.Grants().Example(7)...))
	cfg.Issuers = []segment.TokenIssuer{{Name: "corp", Issuer: "https://login.corp.test"}}
	takeTokens(&cfg)
	for i := range cfg.Endpoints {
		cfg.Endpoints[i].Tokens.Issuers = []segment.IssuerName{"corp"}
	}
	cfg = cfg.For(cfg.Gateways[0])
	return lower(forms[form], &cfg, authz.Compile(&cfg, time.Unix(0, 0)), Learned{
		Names: Names{"docs": collections()},
		Keys: Keys{Issuers: map[segment.IssuerName]string{"corp": keySet},
			TrustDomains: map[spiffeid.TrustDomain]string{cfg.TrustDomain: keySet}},
	})
}

func (v victim) verifier(change func(*jwtv3.JwtAuthentication)) {
	for _, x := range v.Extensions {
		if x.Name == TokensName("chat") {
			edit(v, x.TypedConfig, change)
		}
	}
}

func (v victim) provider(name string, change func(*jwtv3.JwtProvider)) {
	v.verifier(func(f *jwtv3.JwtAuthentication) { change(f.Providers[name]) })
}

var tokenMutations = []mutation{
	{"nobody is refused", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return append(f[:1:1], f[2:]...) })
	}},
	{"somebody else refuses", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			f[1] = filter(callerFilter, extractor(&segment.Endpoint{Protocol: segment.OpenAI}))
			return f
		})
	}},
	{"no verifier", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter { return f[1:] })
	}},
	{"a verifier that is open until it has come", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			f[0].GetConfigDiscovery().DefaultConfig = pack(&rbacv3.RBAC{Rules: nil})
			return f
		})
	}},
	{"a verifier that is none", func(v victim) {
		for _, x := range v.Extensions {
			if x.Name == TokensName("chat") {
				x.TypedConfig = pack(setState(state{stateCaller, "spiffe://example.org/a"}))
			}
		}
	}},
	{"callers of the connection", func(v victim) {
		v.filters(func(f []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
			for _, x := range f {
				x.Name = strings.TrimSuffix(x.Name, told(true))
			}
			return f
		})
	}},
	{"routes of certificates", func(v victim) {
		v.manager(func(m *hcmv3.HttpConnectionManager) { m.GetRds().RouteConfigName = routesName("chat", false) })
	}},
	{"certificates that nobody validates", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) { c.CommonTlsContext.ValidationContextType = nil })
	}},
	{"certificates demanded of those who have tokens", func(v victim) {
		v.tls(func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = wrapperspb.Bool(true) })
	}},
	{"tokens for anybody", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.Audiences = nil }) }},
	{"tokens for nobody in particular", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.Audiences = []string{""} }) }},
	{"tokens without an end", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.RequireExpiration = false }) }},
	{"a minute more", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.ClockSkewSeconds = 0 }) }},
	{"tokens of any issuer", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.Issuer = "" }) }},
	{"any issuer's word for a SPIFFE ID", func(v victim) {
		v.provider("corp", func(p *jwtv3.JwtProvider) { p.PayloadInMetadata = "svid:spiffe://example.org/" })
	}},
	{"a whole trust domain's word for a subject", func(v victim) {
		v.provider("spiffe://example.org", func(p *jwtv3.JwtProvider) { p.PayloadInMetadata = "subject:spiffe://example.org/" })
	}},
	{"members of another trust domain", func(v victim) {
		v.provider("spiffe://example.org", func(p *jwtv3.JwtProvider) {
			p.Subjects = &matchv3.StringMatcher{MatchPattern: &matchv3.StringMatcher_Prefix{Prefix: "spiffe://"}}
		})
	}},
	{"any subject", func(v victim) {
		v.provider("spiffe://example.org", func(p *jwtv3.JwtProvider) { p.Subjects = nil })
	}},
	{"claims under another name", func(v victim) {
		v.provider("corp", func(p *jwtv3.JwtProvider) { p.PayloadInMetadata = "claims" })
	}},
	{"no keys", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.JwksSourceSpecifier = nil }) }},
	{"keys that Envoy fetches", func(v victim) {
		v.provider("corp", func(p *jwtv3.JwtProvider) {
			p.JwksSourceSpecifier = &jwtv3.JwtProvider_RemoteJwks{RemoteJwks: &jwtv3.RemoteJwks{HttpUri: &corev3.HttpUri{Uri: "https://a.test"}}}
		})
	}},
	{"tokens from a query", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.FromHeaders = nil }) }},
	{"tokens from a cookie", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.FromCookies = []string{"a"} }) }},
	{"tokens for the backend", func(v victim) { v.provider("corp", func(p *jwtv3.JwtProvider) { p.Forward = true }) }},
	{"no rule", func(v victim) { v.verifier(func(f *jwtv3.JwtAuthentication) { f.Rules = nil }) }},
	{"a way around", func(v victim) { v.verifier(func(f *jwtv3.JwtAuthentication) { f.BypassCorsPreflight = true }) }},
}

func TestCheckRefusesTokens(t *testing.T) {
	for form := range forms {
		if err := Check(goodWithTokens(t, form)); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range tokenMutations {
		t.Run(m.name, func(t *testing.T) {
			r := goodWithTokens(t, "written out")
			m.change(victim{t, r})
			err := Check(r)
			if err == nil {
				t.Fatal("passes")
			}
			t.Log(strings.ReplaceAll(err.Error(), "\n", "; "))
		})
	}
}

// Who takes tokens changes its own resources only, and whose keys are not known verifies nothing.
func TestTokensStandAlone(t *testing.T) {
	cfg := corpus.Assemble(t, corpus.Endpoints())
	cfg = cfg.For(cfg.Gateways[0])
	policy := authz.Compile(&cfg, time.Unix(0, 0))
	before := lower(forms["written out"], &cfg, policy, Learned{})
	chat := cfg.Endpoint("chat")
	chat.Tokens = &segment.Tokens{Audiences: chat.Hostnames, TrustDomains: []spiffeid.TrustDomain{cfg.TrustDomain}}
	after := lower(forms["written out"], &cfg, policy, Learned{})
	for _, name := range changed(fingerprints(t, before), fingerprints(t, after)) {
		if !strings.Contains(name, "chat") && !strings.Contains(name, ListenerName) {
			t.Errorf("%s has changed", name)
		}
	}
	if err := Check(after); err != nil {
		t.Fatal(err)
	}
	v := victim{t, after}
	v.verifier(func(f *jwtv3.JwtAuthentication) {
		if len(f.Providers) != 0 {
			t.Errorf("verified without keys: %v", f.Providers)
		}
	})
	known := lower(forms["written out"], &cfg, policy, Learned{Keys: Keys{TrustDomains: map[spiffeid.TrustDomain]string{cfg.TrustDomain: keySet}}})
	if got := changed(fingerprints(t, after), fingerprints(t, known)); len(got) != 1 || !strings.Contains(got[0], TokensName("chat")) {
		t.Errorf("new keys change %q", got)
	}
}
