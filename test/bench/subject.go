package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"text/template"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
)

const (
	chatHost = "chat.bench.internal"
	docsHost = "docs.bench.internal"

	withTelemetry = "SAN rule + telemetry"
)

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("example.org")
	caller      = spiffeid.RequireFromPath(trustDomain, "/bench")
)

// subject is one way to the backend.
type subject struct {
	name   string
	url    string
	client *http.Client
	envoy  int // process IDs; 0: it has none
	plane  int
	up     *process // of Sallyport
	folder string   // its documents
}

// direct is no gateway at all.
func (b *bench) direct() *subject {
	return &subject{name: "direct", url: "http://" + b.backend.address, client: &http.Client{Transport: transport(nil)}}
}

//go:embed testdata/san.yaml
var sanConfig string

// san is the Envoy that is configured by hand, alone or with the telemetry that Sallyport has.
func (b *bench) san(telemetry bool) (*subject, error) {
	name := "SAN rule"
	if telemetry {
		name = withTelemetry
	}
	folder, authority, own, err := b.gatewayFolder(identity.Request{
		ID: spiffeid.RequireFromPath(trustDomain, "/gateway"), DNSNames: []string{chatHost}, TTL: time.Hour})
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	_, backendPort, err := net.SplitHostPort(b.backend.address)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(folder, "envoy.yaml")
	config, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer config.Close()
	err = template.Must(template.New("").Parse(sanConfig)).Execute(config, map[string]any{
		"Admin": filepath.Join(folder, "admin.sock"), "Port": port, "Host": chatHost, "Chain": own.chain, "Key": own.key,
		"Bundle": own.bundle, "Telemetry": telemetry, "Caller": caller.String(), "Backend": backendPort,
		"Sink": filepath.Join(b.folder, "sink.sock"),
	})
	if err != nil {
		return nil, err
	}
	return b.startEnvoy(name, path, port, authority)
}

// files are where a gateway finds its own certificate and whom to trust.
type files struct{ chain, key, bundle string }

// gatewayFolder makes a folder with an authority of its own and a certificate by it.
func (b *bench) gatewayFolder(r identity.Request) (folder string, authority *identity.Authority, own *files, err error) {
	if folder, err = os.MkdirTemp(b.folder, "envoy"); err != nil {
		return "", nil, nil, err
	}
	if authority, err = disk.Open(filepath.Join(folder, "ca"), trustDomain, time.Now()); err != nil {
		return "", nil, nil, err
	}
	certificate, err := certify(authority, r)
	if err != nil {
		return "", nil, nil, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		return "", nil, nil, err
	}
	own = &files{filepath.Join(folder, "chain.pem"), filepath.Join(folder, "key.pem"), filepath.Join(folder, "bundle.pem")}
	for path, block := range map[string]*pem.Block{
		own.chain:  {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]},
		own.key:    {Type: "PRIVATE KEY", Bytes: key},
		own.bundle: {Type: "CERTIFICATE", Bytes: authority.Certificate().Raw},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			return "", nil, nil, err
		}
	}
	return folder, authority, own, nil
}

// sallyport is a whole `sallyport up` with these documents, and flags.
func (b *bench) sallyport(ctx context.Context, with build, documents map[string]string, flags ...string) (*subject, error) {
	folder, err := os.MkdirTemp(b.folder, "up")
	if err != nil {
		return nil, err
	}
	state := filepath.Join(folder, "state")
	s := &subject{name: with.name, folder: filepath.Join(folder, "documents")}
	if err := os.Mkdir(s.folder, 0o700); err != nil {
		return nil, err
	}
	for name, text := range documents {
		if err := os.WriteFile(filepath.Join(s.folder, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, err
	}
	authority, err := disk.Open(filepath.Join(state, "ca"), trustDomain, time.Now())
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s.url = fmt.Sprintf("https://127.0.0.1:%d", port)
	s.up, err = startProcess(with.path, append([]string{"up", "-f", s.folder, "--state", state, "--listen", fmt.Sprintf("127.0.0.1:%d", port),
		"--workload-socket", filepath.Join(folder, "workload.sock"), "--otlp-listen", "", "--envoy", b.envoy,
		"--envoy-threads", strconv.Itoa(b.threads), "--log-format", "json"}, flags...)...)
	if err != nil {
		return nil, err
	}
	b.started = append(b.started, s.up)
	if err := s.up.await("be ready", time.Minute, func() bool { return ctx.Err() != nil || s.up.said(`"ready"`) != nil }); err != nil {
		return nil, err
	}
	s.plane = s.up.cmd.Process.Pid
	s.envoy = childOf(s.plane)
	if s.client, err = clientOf(authority, caller, chatHost); err != nil {
		return nil, err
	}
	return s, s.up.await("answer", 20*time.Second, s.answers)
}

// answers reports whether the subject lets the caller through.
func (s *subject) answers() bool {
	status, err := chat(300, 0).once(context.Background(), s)
	return err == nil && status == http.StatusOK
}

func transport(config *tls.Config) *http.Transport {
	return &http.Transport{TLSClientConfig: config, MaxIdleConnsPerHost: 1000, DisableCompression: true}
}

// clientOf speaks as the caller, over HTTP/1.1.
func clientOf(a *identity.Authority, id spiffeid.ID, host string) (*http.Client, error) {
	own, err := certify(a, identity.Request{ID: id, TTL: time.Hour})
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.Certificate())
	return &http.Client{Transport: transport(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{*own}, ServerName: host})}, nil
}

// certify signs an X.509-SVID with the authority of a state folder, for whomever we like.
func certify(a *identity.Authority, r identity.Request) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t, err := a.SVIDTemplate(r, time.Now(), rand.Reader)
	if err != nil {
		return nil, err
	}
	chain, err := a.Sign(t, key.Public(), time.Now())
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{chain[0].Raw}, PrivateKey: key, Leaf: chain[0]}, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// docsClient speaks to the vector store's endpoint.
func (b *bench) docsClient(s *subject) (*http.Client, error) {
	authority, err := disk.Open(filepath.Join(filepath.Dir(s.folder), "state", "ca"), trustDomain, time.Now())
	if err != nil {
		return nil, err
	}
	return clientOf(authority, caller, docsHost)
}
