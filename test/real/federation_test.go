package real

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"sallyport.dev/telemetry"
)

// side is one of two trust domains that know each other.
type side struct {
	*up
	domain, endpoint string
}

func newSide(t *testing.T, domain, documents string) side {
	t.Helper()
	s := side{domain: domain, endpoint: freeAddress()}
	s.up = startUp(t, map[string]string{"all.yaml": documents}, "--trust-domain", domain, "--bundle-endpoint", s.endpoint)
	return s
}

// document makes the side known to others, as it is now.
func (s side) document(t *testing.T) string {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // a first bundle is carried over by hand
	defer transport.CloseIdleConnections()
	r, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + s.endpoint)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	bundle, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(string(bundle))
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(s.domain, ".")
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: TrustDomain
metadata: {name: %s}
spec:
  trustDomain: %s
  bundleEndpoint: {url: 'https://%s', profile: https_spiffe, endpointSPIFFEID: 'spiffe://%s/controlplane'}
  bundle: %s
`, name, s.domain, s.endpoint, s.domain, text)
}

// knows waits until another side's bundle has been fetched.
func (s side) knows(t *testing.T, other side) {
	t.Helper()
	eventually(t, "bundle of "+other.domain+" at "+s.domain, func() bool {
		for _, f := range s.status(t).Federation {
			if f.TrustDomain == other.domain {
				return !f.LastSuccess.IsZero() && f.Error == "" && f.Roots == 1
			}
		}
		return false
	})
}

// workload is a Workload document for this process.
func workload(domain, name, more string) string {
	return fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: Workload
metadata: {name: %s}
spec: {spiffeID: 'spiffe://%s/%s', selectors: ['unix:uid:%d']%s}
`, name, domain, name, os.Getuid(), more)
}

// comes is a caller with an identity of its own trust domain's provider, who knows the other side by that one's bundle
// as its provider hands it out.
func (s side) comes(t *testing.T, path string, to side) *caller {
	t.Helper()
	var own *x509svid.SVID
	var theirs *x509bundle.Bundle
	eventually(t, "identity and bundle", func() bool {
		got, err := workloadapi.FetchX509Context(t.Context(), workloadapi.WithAddr("unix://"+s.socket))
		if err != nil {
			return false
		}
		if i := slices.IndexFunc(got.SVIDs, func(svid *x509svid.SVID) bool { return svid.ID.Path() == path }); i >= 0 {
			own = got.SVIDs[i]
		}
		theirs, err = got.Bundles.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(to.domain))
		return err == nil && own != nil
	})
	cert := tls.Certificate{PrivateKey: own.PrivateKey}
	for _, c := range own.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	c := to.with(t, http2, cert)
	c.config.RootCAs = x509.NewCertPool()
	for _, root := range theirs.X509Authorities() {
		c.config.RootCAs.AddCert(root)
	}
	return c
}

// TestFederation has two trust domains know each other by their control planes' bundle endpoints. A caller of one gets
// at the other what a grant says, and nobody there knows him any more when the other's document has gone.
func TestFederation(t *testing.T) {
	t.Parallel()
	b := ownBackend(t)
	wire := newWire(t, nil, echo)
	one := newSide(t, "one.test", openAI("chat", b)+endpoint("wire", "TCP", wire.address()))
	two := newSide(t, "two.test", openAI("own", b)+workload("two.test", "stranger", ""))
	one.write(t, "two.yaml", two.document(t))
	two.write(t, "one.yaml", one.document(t))
	two.write(t, "app.yaml", workload("two.test", "app", ", federatesWith: [one.test]"))
	one.write(t, "grant.yaml", strings.ReplaceAll(grant("app", "/app", "chat", "Infer", "m")+grant("wire", "/app", "wire", "Connect", "'*'"), "example.org", "two.test"))
	one.knows(t, two)
	two.knows(t, one)

	app := two.comes(t, "/app", one)
	var a answer
	eventually(t, "answer", func() bool { // when the grant is in force
		a = app.chat(t, "chat", "m")
		return a.err == nil && a.status == http.StatusOK
	})
	if f := one.flow(t, a); f.Verdict != telemetry.Allowed || f.Caller.String() != "spiffe://two.test/app" {
		t.Errorf("recorded as %+v", f)
	}
	stranger := two.comes(t, "/stranger", one)
	a = stranger.chat(t, "chat", "m")
	wantProblem(t, a, http.StatusForbidden, "no_grant")
	if f := one.flow(t, a); f.Verdict != telemetry.Denied || f.Caller.String() != "spiffe://two.test/stranger" {
		t.Errorf("recorded as %+v", f)
	}
	if !app.reaches(t, "wire") || stranger.reaches(t, "wire") || wire.taken() != 1 {
		t.Error("a connection is judged in another way")
	}
	// Nobody speaks for another trust domain's members, whichever of the two he has keys of.
	for _, who := range []struct {
		keys    *keys
		as      string
		believe bool
	}{
		{&two.keys, "spiffe://two.test/app", true},
		{&two.keys, "spiffe://one.test/app", false},
		{&one.keys, "spiffe://two.test/app", false},
	} {
		a := one.with(t, http2, who.keys.sign(t, svid(who.as, time.Hour))).chat(t, "chat", "m")
		if believed := a.err == nil && a.status == http.StatusOK; believed != who.believe || !believed && a.err == nil {
			t.Errorf("%s by the authority of %s: %v", who.as, who.keys.ca.Subject, a)
		}
	}

	for _, name := range []string{"grant.yaml", "two.yaml"} { // while there is a grant, the document must be there
		if err := os.Remove(filepath.Join(one.docs, name)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "refusal in the handshake", func() bool {
		app.client.CloseIdleConnections()
		a := app.chat(t, "chat", "m")
		return a.err != nil && strings.Contains(a.err.Error(), "tls: ")
	})
	t.Log(app.chat(t, "chat", "m"))
	if st := one.status(t); len(st.Federation) > 0 {
		t.Errorf("still followed: %+v", st.Federation)
	}
}
