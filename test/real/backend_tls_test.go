package real

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBackendTLS speaks to servers over TLS as the documents say, and to no other server in their place.
func TestBackendTLS(t *testing.T) {
	t.Parallel()
	u := startUp(t, nil)
	roots := x509.NewCertPool()
	roots.AddCert(u.keys.ca)
	serve := func(p paper, client tls.ClientAuthType) (*backend, *string) {
		b := &backend{streams: make(chan *stream, 1)}
		var peer string
		b.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if certs := r.TLS.PeerCertificates; len(certs) > 0 && len(certs[0].URIs) > 0 {
				peer = certs[0].URIs[0].String()
			}
			b.ServeHTTP(w, r)
		}))
		b.server.TLS = &tls.Config{Certificates: []tls.Certificate{u.keys.sign(t, p)}, ClientAuth: client, ClientCAs: roots}
		b.server.StartTLS()
		t.Cleanup(b.server.Close)
		return b, &peer
	}
	// An SVID and a DNS name in one: the modes must tell them apart.
	named := func(id string, dns ...string) paper {
		p := svid(id, time.Hour)
		p.dns = dns
		return p
	}
	model, peer := serve(named("/model-server", "models.internal"), tls.RequireAndVerifyClientCert)
	impostor, _ := serve(named("/impostor", "elsewhere.internal"), tls.RequestClientCert)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.keys.ca.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	stranger := authority(t, "example.org")
	other := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(other, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: stranger.ca.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	mutual := fmt.Sprintf("{mode: Mutual, spiffeID: %s/model-server}", domain)
	var documents strings.Builder
	cases := []struct {
		name string
		to   *backend
		tls  string
		want int
	}{
		{"mutual", model, mutual, http.StatusOK},
		{"mutual-impostor", impostor, mutual, http.StatusServiceUnavailable},
		{"server", impostor, "{mode: Server, serverName: elsewhere.internal, caFile: " + ca + "}", http.StatusOK},
		{"server-other-name", impostor, "{mode: Server, serverName: models.internal, caFile: " + ca + "}", http.StatusServiceUnavailable},
		{"server-other-ca", impostor, "{mode: Server, serverName: elsewhere.internal, caFile: " + other + "}", http.StatusServiceUnavailable},
		{"plain-to-tls", impostor, "{mode: None}", http.StatusServiceUnavailable},
	}
	for _, c := range cases {
		documents.WriteString(strings.Replace(openAI(c.name, c.to), "{mode: None}", c.tls, 1))
		documents.WriteString(grant(c.name, "/app", c.name, "Infer", "m"))
	}
	u.write(t, "all.yaml", documents.String())
	who := u.as(t, "/app", http1)
	eventually(t, "the first endpoint", func() bool { return who.chat(t, "mutual", "m").status == http.StatusOK })
	for _, c := range cases {
		a := who.chat(t, c.name, "m")
		if a.status != c.want && !(c.name == "plain-to-tls" && a.status == http.StatusBadRequest) { // Go's server says so in plain text
			t.Errorf("%s: %v, want %d", c.name, a, c.want)
		}
	}
	if got := len(impostor.taken()); got != 1 {
		t.Errorf("the server for elsewhere was asked %d times, want once", got)
	}
	if *peer != domain+"/gateway/local" {
		t.Errorf("the model server was asked by %q", *peer)
	}
}
