package real

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport.dev/telemetry"
)

const domain = "spiffe://example.org"

// keys are the authority of an `up`: its tests are whoever they like.
type keys struct {
	ca   *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool
}

func (k *keys) load(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return err
			}
			k.key = key.(crypto.Signer)
		case "CERTIFICATE":
			if k.ca, err = x509.ParseCertificate(block.Bytes); err != nil {
				return err
			}
		}
	}
	k.pool = x509.NewCertPool()
	k.pool.AddCert(k.ca)
	return nil
}

// paper is what a certificate says.
type paper struct {
	uris      []string
	dns       []string
	from, to  time.Time
	change    func(*x509.Certificate)
	by        *x509.Certificate // nil: the authority
	signer    crypto.Signer
	withChain []*x509.Certificate
}

// svid is what an SVID says. A caller that begins with "/" is in example.org.
func svid(caller string, ttl time.Duration) paper {
	if strings.HasPrefix(caller, "/") {
		caller = domain + caller
	}
	return paper{uris: []string{caller}, from: time.Now().Add(-time.Minute), to: time.Now().Add(ttl)}
}

func (k *keys) sign(t testing.TB, p paper) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: p.from, NotAfter: p.to, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	var names []asn1.RawValue // by hand, because crypto/x509 refuses what an attacker would not
	for _, uri := range p.uris {
		names = append(names, asn1.RawValue{Tag: 6, Class: asn1.ClassContextSpecific, Bytes: []byte(uri)})
	}
	for _, name := range p.dns {
		names = append(names, asn1.RawValue{Tag: 2, Class: asn1.ClassContextSpecific, Bytes: []byte(name)})
	}
	if len(names) > 0 {
		value, err := asn1.Marshal(names)
		if err != nil {
			t.Fatal(err)
		}
		template.ExtraExtensions = append(template.ExtraExtensions, extension(asn1.ObjectIdentifier{2, 5, 29, 17}, value))
	}
	if p.change != nil {
		p.change(template)
	}
	parent, signer := k.ca, k.key
	if p.by != nil {
		parent, signer = p.by, p.signer
	} else if p.signer != nil { // signed by itself
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	out := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	for _, c := range p.withChain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

// --- HTTP ---

type version string

const (
	http1 version = "HTTP/1.1"
	http2 version = "HTTP/2.0"
)

// caller sends requests to one `up` with one certificate.
type caller struct {
	up     *up
	config *tls.Config
	client *http.Client
	dialed chan *tls.Conn // every connection that was opened, as far as somebody wants to know
}

// as returns a caller with an SVID of its own.
func (u *up) as(t testing.TB, who string, v version) *caller {
	t.Helper()
	return u.with(t, v, u.keys.sign(t, svid(who, time.Hour)))
}

func (u *up) with(t testing.TB, v version, certificates ...tls.Certificate) *caller {
	t.Helper()
	c := &caller{up: u, config: &tls.Config{RootCAs: u.keys.pool}, dialed: make(chan *tls.Conn, 64)}
	if len(certificates) > 0 { // also one that the gateway does not ask for
		c.config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificates[0], nil }
	}
	protocols := &http.Protocols{}
	protocols.SetHTTP1(v == http1)
	protocols.SetHTTP2(v == http2)
	c.config.NextProtos = []string{map[version]string{http1: "http/1.1", http2: "h2"}[v]}
	transport := &http.Transport{
		Protocols: protocols, DisableCompression: true, ExpectContinueTimeout: patience, MaxIdleConnsPerHost: 8,
		DialTLSContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			host, _, _ := net.SplitHostPort(address)
			conn, err := c.dial(ctx, host)
			if err == nil {
				select {
				case c.dialed <- conn:
				default:
				}
			}
			return conn, err
		},
	}
	c.client = &http.Client{Transport: transport, Timeout: 2 * patience,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(transport.CloseIdleConnections)
	return c
}

func (c *caller) dial(ctx context.Context, sni string) (*tls.Conn, error) {
	config := c.config.Clone()
	config.ServerName = sni
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", c.up.listen)
	if err != nil {
		return nil, err
	}
	return conn.(*tls.Conn), nil
}

// answer is an answer, read to its end.
type answer struct {
	status int
	proto  string
	header http.Header
	body   string
	err    error
}

func (a answer) id() string { return a.header.Get("x-request-id") }

func (a answer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d %s", a.status, strings.TrimSpace(a.body))
}

// request describes what is to be sent.
type request struct {
	method string // POST, where there is a body
	host   string
	path   string // sent as it stands here
	body   io.Reader
	header http.Header
	length int64 // of the body; 0: unknown, so it is sent in chunks
}

func (r request) build(ctx context.Context) (*http.Request, error) {
	if r.method == "" {
		r.method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(ctx, r.method, "https://"+r.host+"/", r.body)
	if err != nil {
		return nil, err
	}
	req.URL.Opaque = r.path
	if r.length != 0 {
		req.ContentLength = r.length
	}
	for key, values := range r.header {
		req.Header[key] = values
	}
	return req, nil
}

func (c *caller) send(t testing.TB, r request) answer {
	t.Helper()
	req, err := r.build(t.Context())
	if err != nil {
		return answer{err: err}
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return answer{err: err}
	}
	return read(resp)
}

func read(resp *http.Response) answer {
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Proto, resp.Header, string(body), err}
}

// chat asks a model.
func (c *caller) chat(t testing.TB, endpoint, model string) answer {
	t.Helper()
	return c.post(t, endpoint, chatPath, fmt.Sprintf(`{"model":%q,"messages":[]}`, model))
}

func (c *caller) post(t testing.TB, endpoint, path, body string) answer {
	t.Helper()
	return c.send(t, request{host: hostOf(endpoint), path: path, body: strings.NewReader(body),
		header: http.Header{"Content-Type": {"application/json"}}})
}

// opened is an answer that is still being written.
type opened struct {
	header http.Header
	body   io.ReadCloser
}

// open sends a request whose answer is a stream, and returns with the answer's headers.
func (c *caller) open(t testing.TB, endpoint, model string) opened {
	t.Helper()
	req, err := request{host: hostOf(endpoint), path: chatPath,
		body: strings.NewReader(fmt.Sprintf(`{"model":%q,"stream":true}`, model))}.build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("stream: %v", read(resp))
	}
	return opened{resp.Header, resp.Body}
}

// raw sends bytes over a connection of its own (HTTP/1.1) and reads one answer.
func (c *caller) raw(t testing.TB, sni, text string) answer {
	t.Helper()
	conn, err := c.dial(t.Context(), sni)
	if err != nil {
		return answer{err: err}
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, text); err != nil {
		return answer{err: err}
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return answer{err: err}
	}
	return read(resp)
}

// problem is an error as the OpenAI API writes it.
type problem struct {
	Error struct {
		Message   string `json:"message"`
		Type      string `json:"type"`
		Code      string `json:"code"`
		RequestID string `json:"request_id"`
	} `json:"error"`
}

// wantProblem checks that an answer is an error of this status in the OpenAI API's own shape.
func wantProblem(t testing.TB, a answer, status int, code string) problem {
	t.Helper()
	var p problem
	if a.err != nil || a.status != status {
		t.Errorf("got %v, want status %d", a, status)
		return p
	}
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Errorf("the error is not JSON: %v: %s", err, a.body)
		return p
	}
	if p.Error.Code != code || p.Error.Message == "" || p.Error.Type == "" || p.Error.RequestID == "" || p.Error.RequestID != a.id() {
		t.Errorf("got error %s, want code %q, a message, a type and request id %q", a.body, code, a.id())
	}
	if got := a.header.Get("content-type"); got != "application/json" {
		t.Errorf("the error has content type %q", got)
	}
	return p
}

func readFlows(t testing.TB, from io.Reader) []telemetry.Flow {
	t.Helper()
	var all []telemetry.Flow
	for dec := json.NewDecoder(from); ; {
		var f telemetry.Flow
		err := dec.Decode(&f)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
}

// extension is a certificate extension that must be understood.
func extension(id asn1.ObjectIdentifier, value []byte) pkix.Extension {
	return pkix.Extension{Id: id, Critical: true, Value: value}
}
