package federation

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"sallyport.dev/identity"
	"sallyport.dev/segment"
)

var (
	ours  = spiffeid.RequireTrustDomainFromString("example.org")
	other = spiffeid.RequireTrustDomainFromString("other.org")
	third = spiffeid.RequireTrustDomainFromString("third.org")
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// authority is a new root of a trust domain.
func authority(t testing.TB, td spiffeid.TrustDomain) *identity.Authority {
	t.Helper()
	template, err := identity.CATemplate(td, 1000*time.Hour, time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a, err := identity.SelfSign(template, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// svid is a new X.509-SVID, and a source of itself.
func svid(t testing.TB, a *identity.Authority, path string) *x509svid.SVID {
	t.Helper()
	key, now := newKey(t), time.Now()
	id := spiffeid.RequireFromPath(a.TrustDomain(), path)
	template, err := a.SVIDTemplate(identity.Request{ID: id, TTL: 900 * time.Hour}, now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Sign(template, key.Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

// bundleOf is the bundle of authorities of one trust domain. The zero number is none.
func bundleOf(number uint64, as ...*identity.Authority) *spiffebundle.Bundle {
	b := spiffebundle.New(as[0].TrustDomain())
	for _, a := range as {
		b.AddX509Authority(a.Certificate())
	}
	if number > 0 {
		b.SetSequenceNumber(number)
	}
	return b
}

func marshal(t testing.TB, b *spiffebundle.Bundle) string {
	t.Helper()
	document, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return string(document)
}

// webCert is a self-signed certificate for host names and 127.0.0.1, valid for so long from now on.
func webCert(t testing.TB, life time.Duration, hosts ...string) tls.Certificate {
	t.Helper()
	key, now := newKey(t), time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), DNSNames: hosts, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(life), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func certPEM(c tls.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
}

func keyPEM(t testing.TB, key crypto.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func writeFile(t testing.TB, path string, data []byte) string {
	t.Helper()
	// As programs do that renew certificates: another file by the same name.
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// netConn is net.Conn where a network is called net.
type netConn = net.Conn

// listen serves on a real socket until the test ends. Without the detour httptest would put in a certificate of its own.
func listen(t testing.TB, config *tls.Config, handler http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return config, nil }}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// network is hosts that are reached by wires, so that the time in which they talk is the test's.
type network struct {
	mu    sync.Mutex
	hosts map[string]*host
}

// host is a server that can be changed while it runs.
type host struct {
	tls     atomic.Pointer[tls.Config] // nil: it speaks plain HTTP
	handler atomic.Pointer[http.Handler]
	asked   atomic.Int64
	away    atomic.Bool

	conns chan net.Conn
	done  chan struct{}
}

func (n *network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	h := n.hosts[address]
	n.mu.Unlock()
	if h == nil || h.away.Load() {
		return nil, errors.New("no route to " + address)
	}
	client, server := newWire()
	select {
	case h.conns <- server:
		return client, nil
	case <-h.done:
		return nil, errors.New("closed")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// serve adds a host until the test ends.
func (n *network) serve(t testing.TB, address string, config *tls.Config, handler http.Handler) *host {
	h := &host{conns: make(chan net.Conn), done: make(chan struct{})}
	h.tls.Store(config)
	h.handle(handler)
	n.mu.Lock()
	if n.hosts == nil {
		n.hosts = make(map[string]*host)
	}
	n.hosts[address] = h
	n.mu.Unlock()
	s := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.asked.Add(1)
		(*h.handler.Load()).ServeHTTP(w, r)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(h) })
	t.Cleanup(func() {
		s.Close()
		serving.Wait()
	})
	return h
}

func (h *host) handle(handler http.Handler) { h.handler.Store(&handler) }

func (h *host) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		if config := h.tls.Load(); config != nil {
			return tls.Server(c, config), nil
		}
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *host) Close() error   { close(h.done); return nil }
func (h *host) Addr() net.Addr { return &net.TCPAddr{} }

// box is a source of whatever bundle is in it.
type box struct {
	atomic.Pointer[spiffebundle.Bundle]
}

func (b *box) GetBundleForTrustDomain(spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	if got := b.Load(); got != nil {
		return got, nil
	}
	return nil, errors.New("no bundle")
}

func boxed(b *spiffebundle.Bundle) *box {
	var x box
	x.Store(b)
	return &x
}

// following is a follower that runs.
type following struct {
	*Follower
	news chan Bundles // newest wins
	own  box
	end  func()
}

func follow(t testing.TB, dir string, dial func(context.Context, string, string) (net.Conn, error)) *following {
	t.Helper()
	f := &following{news: make(chan Bundles, 1)}
	var err error
	f.Follower, err = New(Config{TrustDomain: ours, Own: f.own.Load, Dir: dir, Log: slog.New(slog.DiscardHandler), Publish: func(b Bundles) {
		select {
		case <-f.news:
		default:
		}
		f.news <- b
	}})
	if err != nil {
		t.Fatal(err)
	}
	f.fetcher.dial = dial
	f.end = runs(t, f.Run)
	return f
}

// runs has run go on until the test or the caller ends it.
func runs(t testing.TB, run func(context.Context) error) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := run(ctx); err != nil {
			t.Error(err)
		}
	})
	end = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(end)
	return end
}

// of is the status of a trust domain.
func (f *following) of(t testing.TB, td spiffeid.TrustDomain) Status {
	t.Helper()
	for _, s := range f.Status() {
		if s.TrustDomain == td.Name() {
			return s
		}
	}
	t.Fatalf("no status of %s: %+v", td, f.Status())
	return Status{}
}

// told returns what was published since it was last asked.
func (f *following) told() (Bundles, bool) {
	select {
	case b := <-f.news:
		return b, true
	default:
		return nil, false
	}
}

func stateDir(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "federation")
}

func webDocument(td spiffeid.TrustDomain, url, caFile string) segment.TrustDomain {
	return segment.TrustDomain{Name: segment.TrustDomainName("doc"), Domain: td,
		Endpoint: segment.BundleEndpoint{URL: url, Profile: segment.HTTPSWeb, CAFile: caFile}}
}

func spiffeDocument(td spiffeid.TrustDomain, url string, id spiffeid.ID, bundle string) segment.TrustDomain {
	return segment.TrustDomain{Name: segment.TrustDomainName("doc"), Domain: td, Bundle: bundle,
		Endpoint: segment.BundleEndpoint{URL: url, Profile: segment.HTTPSSPIFFE, ID: id}}
}
