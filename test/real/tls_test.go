package real

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport.dev/telemetry"
)

// authority makes a CA of its own for a trust domain, ours or another.
func authority(t *testing.T, domain string) keys {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{{Scheme: "spiffe", Host: domain}}, BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return keys{ca: ca, key: key}
}

// TestTLS lets nobody in whose certificate or connection is not as it must be, and each attempt leaves a flow.
func TestTLS(t *testing.T) {
	t.Parallel()
	b := ownBackend(t)
	const name = "tls"
	good := svid("/tls", time.Hour)
	forged, foreign := authority(t, "example.org"), authority(t, "other.example")
	changed := func(change func(*paper)) func(*up) []tls.Certificate {
		return func(u *up) []tls.Certificate {
			p := good
			p.uris = slices.Clone(p.uris)
			change(&p)
			return []tls.Certificate{u.keys.sign(t, p)}
		}
	}
	cases := []struct {
		name   string
		papers func(*up) []tls.Certificate
		config func(*tls.Config)
		denied bool // Envoy lets it in, and then it may do nothing
	}{
		{name: "no certificate", papers: func(*up) []tls.Certificate { return nil }},
		{name: "expired", papers: changed(func(p *paper) { p.to = time.Now().Add(-time.Second) })},
		{name: "not yet valid", papers: changed(func(p *paper) { p.from = time.Now().Add(time.Minute) })},
		{name: "other trust domain, its own CA", papers: changed(func(p *paper) {
			p.uris, p.by, p.signer = []string{"spiffe://other.example/tls"}, foreign.ca, foreign.key
		})},
		{name: "other trust domain, our CA", papers: changed(func(p *paper) { p.uris = []string{"spiffe://other.example/tls"} })},
		{name: "our trust domain, another's CA", papers: changed(func(p *paper) { p.by, p.signer = foreign.ca, foreign.key })},
		{name: "our trust domain, a CA that only looks like ours", papers: changed(func(p *paper) {
			p.by, p.signer, p.withChain = forged.ca, forged.key, []*x509.Certificate{forged.ca}
		})},
		{name: "self-signed", papers: changed(func(p *paper) { p.signer = forged.key })},
		{name: "an ID that no SPIFFE ID can be", denied: true, papers: changed(func(p *paper) { p.uris[0] = domain + "/a|Infer=m" })},
		{name: "no URI name", papers: changed(func(p *paper) { p.uris, p.dns = nil, []string{"tls.example.org"} })},
		{name: "no name at all", papers: changed(func(p *paper) { p.uris = nil })},
		{name: "two SPIFFE IDs", denied: true, papers: changed(func(p *paper) { p.uris = append(p.uris, domain+"/nobody") })},
		{name: "two SPIFFE IDs, ours last", denied: true, papers: changed(func(p *paper) { p.uris = []string{domain + "/nobody", domain + "/tls"} })},
		{name: "SPIFFE ID and another URI", denied: true, papers: changed(func(p *paper) { p.uris = append(p.uris, "https://example.org/") })},
		{name: "a CA as a leaf", papers: changed(func(p *paper) {
			p.change = func(c *x509.Certificate) {
				c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
			}
		})},
		{name: "signed by a leaf", papers: func(u *up) []tls.Certificate {
			leaf := u.keys.sign(t, svid("/nobody", time.Hour))
			parsed, err := x509.ParseCertificate(leaf.Certificate[0])
			if err != nil {
				t.Fatal(err)
			}
			p := good
			p.by, p.signer, p.withChain = parsed, leaf.PrivateKey.(*ecdsa.PrivateKey), []*x509.Certificate{parsed}
			return []tls.Certificate{u.keys.sign(t, p)}
		}},
		{name: "TLS 1.2", config: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }},
		{name: "no common protocol version", config: func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }},
	}
	var hosts string
	for i := range cases {
		hosts += fmt.Sprintf(", case-%d.test.internal", i)
	}
	document := strings.Replace(openAI(name, b), hostOf(name), hostOf(name)+hosts, 1)
	u := startUp(t, map[string]string{"all.yaml": document + grant("all", "/*", name, "Infer", "'*'")})
	ask := func(t *testing.T, c *caller, host string) answer {
		return c.send(t, request{host: host, path: "/v1/chat/completions", body: strings.NewReader(`{"model":"m"}`)})
	}
	refused := func(t *testing.T, detail string) {
		t.Helper()
		f := u.flows(t, 1, func(f telemetry.Flow) bool {
			return f.Verdict == telemetry.Refused && strings.HasSuffix(f.Detail, detail)
		})[0]
		if !f.Caller.IsZero() || f.Endpoint != "" && f.Endpoint != name || f.Rule != "" || f.Status != 0 {
			t.Errorf("a connection that got nowhere is recorded as %+v", f)
		}
	}

	if a := ask(t, u.with(t, http2, u.keys.sign(t, good)), hostOf(name)); a.status != http.StatusOK {
		t.Fatalf("a good certificate: %v", a) // or what follows shows nothing
	}
	b.taken()
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			who := u.with(t, http1, u.keys.sign(t, good))
			if c.papers != nil {
				who = u.with(t, http1, c.papers(u)...)
			}
			if c.config != nil {
				c.config(who.config)
			}
			host := fmt.Sprintf("case-%d.test.internal", i)
			a := ask(t, who, host)
			if c.denied {
				wantProblem(t, a, http.StatusForbidden, "no_grant")
				if f := u.flow(t, a); f.Verdict != telemetry.Denied || f.Rule != "default-deny" {
					t.Errorf("recorded as %+v", f)
				}
				return
			}
			if a.err == nil {
				t.Errorf("got through: %v", a)
			}
			refused(t, "(server name "+host+")")
		})
	}
	who := u.with(t, http1, u.keys.sign(t, good))
	who.config.InsecureSkipVerify = true // whoever the gateway is to it
	t.Run("unknown server name", func(t *testing.T) {
		if a := ask(t, who, "unknown.internal"); a.err == nil {
			t.Errorf("got through: %v", a)
		}
		refused(t, "(server name unknown.internal)")
	})
	t.Run("no server name", func(t *testing.T) {
		a := who.raw(t, "", "GET /v1/models HTTP/1.1\r\nHost: "+hostOf(name)+"\r\n\r\n")
		if a.err == nil {
			t.Errorf("got through: %v", a)
		}
		refused(t, "server name")
	})
	if got := b.taken(); len(got) > 0 {
		t.Errorf("the backend was asked %d times", len(got))
	}
}

// TestNoResumption opens every connection with a full handshake: a resumed one would not look at the certificate.
func TestNoResumption(t *testing.T) {
	t.Parallel()
	u, _ := shared(t, "tls")
	who := u.as(t, "/tls", http1)
	who.config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 3 {
		if a := who.chat(t, "tls", "m"); a.status != http.StatusOK {
			t.Fatal(a)
		}
		if conn := <-who.dialed; conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		who.client.CloseIdleConnections()
	}
}

// TestHostOfAnotherEndpoint denies who comes in by the server name of one endpoint and asks for the host of another.
func TestHostOfAnotherEndpoint(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "other")
	const ask = "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Length: 13\r\n\r\n{\"model\":\"m\"}"
	for _, who := range []string{"/tls", "/other"} { // who may ask the one, and who may ask the other
		for _, host := range []string{hostOf("other"), hostOf("other") + ":443", strings.ToUpper(hostOf("other")), "", "unknown", "*"} {
			a := u.as(t, who, http1).raw(t, hostOf("tls"), fmt.Sprintf(ask, host))
			if a.status != http.StatusForbidden && a.status != http.StatusBadRequest && a.status != http.StatusNotFound {
				t.Errorf("%s asks for host %q with server name %s: %v", who, host, hostOf("tls"), a)
			}
		}
	}
	if got := b.taken(); len(got) > 0 {
		t.Errorf("the other backend was asked: %+v", got)
	}
}
