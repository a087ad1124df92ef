package agent_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"sallyport.dev/identity"
	"sallyport.dev/identity/agent"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// certifier signs JWT-SVIDs that say what was asked for.
type certifier struct{ *issuer.Local }

func (certifier) CertifyJWT(_ context.Context, e issuer.Entry, audience []string) (string, error) {
	return fmt.Sprint(e.ID, audience), nil
}

// lines is a log that tests can wait for.
type lines chan string

func newLines() lines { return make(lines, 1000) }

func (l lines) Write(p []byte) (int, error) {
	select {
	case l <- string(p):
	default: // nobody waits for so many
	}
	return len(p), nil
}

func (l lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l lines) wait(t *testing.T, want string) string {
	t.Helper()
	for {
		select {
		case line := <-l:
			if strings.Contains(line, want) {
				return line
			}
		case <-t.Context().Done():
			t.Fatalf("nothing was logged of %q", want)
		}
	}
}

// plane is a control plane that can go away and come back.
type plane struct {
	*node.Server
	t         *testing.T
	authority *identity.Authority
	bundle    *spiffebundle.Bundle // that it began with
	trusted   atomic.Pointer[spiffebundle.Bundle]
	local     *issuer.Local
	config    node.Config
	log       lines

	inMemory bool
	mu       sync.Mutex
	addr     string
	pipe     *bufconn.Listener
	stop     func()
}

// startPlane starts a control plane on loopback, or in memory, without entries.
func startPlane(t *testing.T, inMemory bool, edit func(*node.Config)) *plane {
	t.Helper()
	a := identitytest.Authority(t)
	local := &issuer.Local{}
	p := &plane{t: t, authority: a, bundle: spiffebundle.FromX509Bundle(a.Bundle()), log: newLines(), inMemory: inMemory}
	local.Set(identity.Authorities{X509: a, Bundle: p.bundle})
	p.local = local
	p.trusted.Store(p.bundle)
	p.config = node.Config{TrustDomain: td, Certifier: certifier{local}, Dir: t.TempDir(), Log: p.log.logger()}
	if edit != nil {
		edit(&p.config)
	}
	p.config.Certificate = p.certificate(issuer.Entry{ID: nodepb.ControlPlane(td), TTL: cmp.Or(p.config.TTL, time.Hour)})
	p.start()
	p.Set(nil, nil)
	t.Cleanup(func() { p.away() })
	return p
}

// certificate is what the control plane shows, renewed when it is asked for.
func (p *plane) certificate(e issuer.Entry) func() (*tls.Certificate, error) {
	self := &issuer.Self{Signer: p.config.Certifier, Entry: e, Bundle: p.trusted.Load, Log: p.log.logger()}
	var mu sync.Mutex
	return func() (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		self.Renew(context.Background())
		return self.Certificate()
	}
}

// signs has an authority sign from now on, and these be trusted.
func (p *plane) signs(a *identity.Authority, trusted ...*identity.Authority) {
	p.t.Helper()
	var roots []*x509.Certificate
	for _, one := range trusted {
		roots = append(roots, one.Root())
	}
	bundle := spiffebundle.FromX509Authorities(td, roots)
	p.trusted.Store(bundle)
	p.SetBundles(issuer.Bundles{Own: bundle})
	p.local.Set(identity.Authorities{X509: a, Bundle: bundle})
}

// start opens the server anew, as after a restart.
func (p *plane) start() {
	p.t.Helper()
	s, err := node.Open(p.config)
	if err != nil {
		p.t.Fatal(err)
	}
	s.SetBundles(issuer.Bundles{Own: p.trusted.Load()})
	p.Server = s
	p.back()
}

// back lets the server be reached.
func (p *plane) back() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	var l net.Listener
	if p.inMemory {
		p.pipe = bufconn.Listen(1 << 20)
		l = p.pipe
	} else {
		at := p.addr
		if at == "" {
			at = "127.0.0.1:0"
		}
		var err error
		if l, err = net.Listen("tcp", at); err != nil {
			p.t.Fatal(err)
		}
		p.addr = l.Addr().String()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, l) }()
	p.stop = func() {
		cancel()
		if err := <-done; err != nil {
			p.t.Error(err)
		}
	}
}

// away ends the server, with all its connections.
func (p *plane) away() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop != nil {
		p.stop()
		p.stop = nil
	}
}

func (p *plane) dial(ctx context.Context, addr string) (net.Conn, error) {
	if !p.inMemory {
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil {
		return nil, errors.New("nobody is there")
	}
	return p.pipe.DialContext(ctx)
}

func (p *plane) token(name string) nodepb.Token {
	p.t.Helper()
	token, err := p.Tokens().Create(name, time.Hour)
	if err != nil {
		p.t.Fatal(err)
	}
	return token
}

// machine is an agent, and the issuer that it feeds.
type machine struct {
	*agent.Agent
	*issuer.Issuer
	t      *testing.T
	config agent.Config
	log    lines
	told   chan string // "entries" or "bundles", whenever it is fed
	ended  chan error
	stop   context.CancelFunc
}

func (m *machine) Set(e []issuer.Entry) {
	m.Issuer.Set(e)
	m.told <- "entries"
}

func (m *machine) SetBundles(b issuer.Bundles) {
	m.Issuer.SetBundles(b)
	m.told <- "bundles"
}

// machine makes an agent of this control plane.
func (p *plane) machine(edit func(*agent.Config)) *machine {
	m := &machine{t: p.t, log: newLines(), told: make(chan string, 1000)}
	m.config = agent.Config{
		Addr: "in-memory", TrustDomain: td, TrustBundle: p.bundle, Dir: p.t.TempDir(), Dial: p.dial, Log: m.log.logger(),
	}
	if !p.inMemory {
		m.config.Addr = p.addr
	}
	edit(&m.config)
	m.run()
	p.t.Cleanup(m.end)
	return m
}

// run starts the agent, as after a restart.
func (m *machine) run() {
	m.Agent = agent.New(m.config)
	m.Issuer = issuer.New(issuer.Config{Certifier: m.Agent, Attest: func(context.Context, []string) ([]segment.Selector, error) {
		return []segment.Selector{identitytest.Me()}, nil
	}})
	ctx, cancel := context.WithCancel(context.Background())
	m.stop, m.ended = cancel, make(chan error, 1)
	ended := m.ended
	go func() { ended <- m.Agent.Run(ctx, m) }()
}

// end stops the agent.
func (m *machine) end() {
	m.stop()
	m.ended <- <-m.ended
}

// failed waits for the agent to end, and returns how it did.
func (m *machine) failed() error {
	err := <-m.ended
	m.ended <- err
	return err
}

// wait waits until the agent was told something.
func (m *machine) wait(what string) {
	m.t.Helper()
	for {
		select {
		case told := <-m.told:
			if told == what {
				return
			}
		case err := <-m.ended:
			m.t.Fatalf("the agent ended: %v", err)
		}
	}
}

// silent fails if the agent was told something.
func (m *machine) silent() {
	m.t.Helper()
	select {
	case told := <-m.told:
		m.t.Errorf("the agent was told %s", told)
	default:
	}
}

// svids has everything certified that the machine's workload is entitled to.
func (m *machine) svids() (*issuer.Wallet, issuer.View, error) {
	var w issuer.Wallet
	view, err := m.Entitled(context.Background())
	if err != nil {
		return nil, view, err
	}
	_, err = w.Renew(context.Background(), m.Issuer, view.Entries, nil)
	return &w, view, err
}

// self is the agent's own SVID, as it is on the disk.
func (m *machine) self() *x509svid.SVID {
	m.t.Helper()
	file := filepath.Join(m.config.Dir, "agent.pem")
	svid, err := x509svid.Load(file, file)
	if err != nil {
		m.t.Fatal(err)
	}
	return svid
}

// raw returns a client that presents an SVID, or none.
func (p *plane) raw(svid *x509svid.SVID) nodepb.NodeClient {
	p.t.Helper()
	c := &tls.Config{InsecureSkipVerify: true}
	if svid != nil {
		cert := tls.Certificate{PrivateKey: svid.PrivateKey}
		for _, one := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, one.Raw)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	conn, err := grpc.NewClient("passthrough:///"+p.addr, grpc.WithTransportCredentials(credentials.NewTLS(c)),
		grpc.WithContextDialer(p.dial))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return nodepb.NewNodeClient(conn)
}

// svid makes an SVID of the trust domain.
func (p *plane) svid(path string) *x509svid.SVID {
	p.t.Helper()
	var w issuer.Wallet
	e := issuer.Entry{ID: spiffeid.RequireFromPath(td, path), TTL: time.Hour}
	if _, err := w.Renew(p.t.Context(), p.config.Certifier, []issuer.Entry{e}, nil); err != nil {
		p.t.Fatal(err)
	}
	return w.SVIDs()[0]
}

func assign(e issuer.Entry, agents ...string) node.Assignment {
	a := node.Assignment{Entry: e}
	for _, name := range agents {
		a.Agents = append(a.Agents, spiffeid.RequireFromPath(td, "/agent/"+name))
	}
	return a
}

func withToken(token nodepb.Token) func(*agent.Config) {
	return func(c *agent.Config) { c.JoinToken = token }
}

func csr(t *testing.T, template *x509.CertificateRequest) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestTwoMachines(t *testing.T) {
	p := startPlane(t, false, nil)
	web, db := identitytest.Entry("web", identitytest.Me()), identitytest.Entry("db", identitytest.Me())
	web.DNSNames, web.TTL = []string{"web.internal"}, 10*time.Minute
	p.Set([]node.Assignment{assign(web, "one"), assign(db, "two"), assign(identitytest.Entry("unassigned", identitytest.Me()))}, nil)
	one, two := p.machine(withToken(p.token("one"))), p.machine(withToken(p.token("two")))
	for _, c := range []struct {
		m    *machine
		want issuer.Entry
	}{{one, web}, {two, db}} {
		c.m.wait("entries")
		w, view, err := c.m.svids()
		if err != nil {
			t.Fatal(err)
		}
		if len(view.Entries) != 1 || view.Entries[0].ID != c.want.ID || !view.Bundles.Own.Equal(p.bundle) {
			t.Errorf("got %v", view.Entries)
		}
		leaf := w.SVIDs()[0].Certificates[0]
		if id, err := identity.Verify(w.SVIDs()[0].Certificates, p.authority.Bundle(), time.Now()); err != nil || id != c.want.ID {
			t.Errorf("got %s, %v", id, err)
		}
		if !slices.Equal(leaf.DNSNames, c.want.DNSNames) || time.Until(leaf.NotAfter) > c.want.TTL {
			t.Errorf("%s: names %q, ends %s", c.want.ID, leaf.DNSNames, leaf.NotAfter)
		}
		jwt, err := c.m.Issuer.CertifyJWT(t.Context(), view.Entries[0], []string{"a"})
		if want := fmt.Sprint(c.want.ID, []string{"a"}); err != nil || jwt != want {
			t.Errorf("got %q, %v", jwt, err)
		}
	}
	var ids []string
	for _, info := range p.Agents() {
		ids = append(ids, info.ID.Path()+" "+info.Attested)
		if info.Revoked || time.Since(info.LastSeen) > time.Minute || time.Until(info.Expires) <= 0 {
			t.Errorf("listed as %+v", info)
		}
	}
	if !slices.Equal(ids, []string{"/agent/one join_token", "/agent/two join_token"}) {
		t.Errorf("listed %q", ids)
	}

	// What an agent that was taken over could send.
	evil, other := p.raw(one.self()), p.raw(two.self())
	known := func(c nodepb.NodeClient) *nodepb.WatchResponse {
		stream, err := c.Watch(t.Context(), &nodepb.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	mine, others := known(evil).Entries.Entries, known(other).Entries.Entries
	if len(mine) != 1 || len(others) != 1 {
		t.Fatalf("got %v and %v", mine, others)
	}
	lie := csr(t, &x509.CertificateRequest{
		URIs: []*url.URL{db.ID.URL()}, DNSNames: []string{"db.internal"}, Subject: pkix.Name{CommonName: "root"},
	})
	resp, err := evil.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: mine[0].Id, Csr: lie})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(resp.CertChain[0])
	if err != nil || leaf.URIs[0].String() != web.ID.String() || !slices.Equal(leaf.DNSNames, web.DNSNames) || leaf.Subject.CommonName != "" {
		t.Errorf("the request was believed: %v %q, %v", leaf.URIs, leaf.DNSNames, err)
	}
	for _, name := range []string{others[0].Id, "", "x", db.ID.String()} {
		if _, err := evil.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: name, Csr: lie}); status.Code(err) != codes.NotFound {
			t.Errorf("X.509-SVID of %q: %v", name, err)
		}
		if _, err := evil.CertifyJWT(t.Context(), &nodepb.CertifyJWTRequest{EntryId: name, Audience: []string{"a"}}); status.Code(err) != codes.NotFound {
			t.Errorf("JWT-SVID of %q: %v", name, err)
		}
	}
	for _, request := range [][]byte{nil, []byte("x"), make([]byte, 5000), lie[:len(lie)-1]} {
		if _, err := evil.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: mine[0].Id, Csr: request}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%d bytes: %v", len(request), err)
		}
	}
	forged := bytes.Clone(lie)
	forged[len(forged)-1] ^= 1
	if _, err := evil.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: mine[0].Id, Csr: forged}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a request that its key did not sign: %v", err)
	}
	for _, audience := range [][]string{nil, {""}, make([]string, 17), {strings.Repeat("a", 1025)}} {
		if _, err := evil.CertifyJWT(t.Context(), &nodepb.CertifyJWTRequest{EntryId: mine[0].Id, Audience: audience}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("audience %d: %v", len(audience), err)
		}
	}

	// What is taken away is gone at both ends.
	p.Set([]node.Assignment{assign(db, "two")}, nil)
	one.wait("entries")
	if _, _, err := one.svids(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after it was taken away: %v", err)
	}
	if _, err := evil.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: mine[0].Id, Csr: lie}); status.Code(err) != codes.NotFound {
		t.Errorf("after it was taken away: %v", err)
	}
	two.silentButFor(t, "bundles", "entries")
}

// silentButFor drains what was told, and fails if it is anything else.
func (m *machine) silentButFor(t *testing.T, expected ...string) {
	t.Helper()
	for {
		select {
		case told := <-m.told:
			if !slices.Contains(expected, told) {
				t.Errorf("the agent was told %s", told)
			}
			continue
		default:
		}
		return
	}
}

// An agent's SVID, and only that, opens more than attestation.
func TestWhoIsNoAgent(t *testing.T) {
	p := startPlane(t, false, nil)
	stranger := identitytest.Authority(t)
	var w issuer.Wallet
	local := &issuer.Local{}
	local.Set(identity.Authorities{X509: stranger})
	if _, err := w.Renew(t.Context(), local, []issuer.Entry{{ID: spiffeid.RequireFromPath(td, "/agent/one"), TTL: time.Hour}}, nil); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		svid *x509svid.SVID
		want codes.Code
	}{
		"nobody":                             {nil, codes.Unauthenticated},
		"a workload":                         {p.svid("/web"), codes.PermissionDenied},
		"the control plane":                  {p.svid("/controlplane"), codes.PermissionDenied},
		"an agent that was never attested":   {p.svid("/agent/one"), codes.PermissionDenied},
		"an agent by another authority":      {w.SVIDs()[0], codes.Unauthenticated},
		"a workload whose path begins alike": {p.svid("/agents/one"), codes.PermissionDenied},
	} {
		client := p.raw(c.svid)
		_, err := client.RenewAgent(t.Context(), &nodepb.RenewAgentRequest{Csr: csr(t, &x509.CertificateRequest{})})
		_, x509Err := client.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: "x"})
		_, jwtErr := client.CertifyJWT(t.Context(), &nodepb.CertifyJWTRequest{EntryId: "x", Audience: []string{"a"}})
		stream, watchErr := client.Watch(t.Context(), &nodepb.WatchRequest{})
		if watchErr == nil {
			_, watchErr = stream.Recv()
		}
		for call, err := range map[string]error{"RenewAgent": err, "CertifyX509": x509Err, "CertifyJWT": jwtErr, "Watch": watchErr} {
			if status.Code(err) != c.want {
				t.Errorf("%s as %s: %v", call, name, err)
			}
		}
	}
}

// The reserved names are nobody's, whatever is configured.
func TestReservedEntries(t *testing.T) {
	p := startPlane(t, false, nil)
	reserved := []node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one")}
	for _, id := range []string{"spiffe://example.org/controlplane", "spiffe://example.org/agent/two", "spiffe://other.org/web"} {
		e := identitytest.Entry("x", identitytest.Me())
		e.ID = spiffeid.RequireFromString(id)
		reserved = append(reserved, assign(e, "one"))
	}
	p.Set(reserved, nil)
	m := p.machine(withToken(p.token("one")))
	m.wait("entries")
	_, view, err := m.svids()
	if err != nil || len(view.Entries) != 1 || view.Entries[0].ID.Path() != "/web" {
		t.Errorf("got %v, %v", view.Entries, err)
	}
}

func TestJoinTokenServesOnce(t *testing.T) {
	p := startPlane(t, false, nil)
	token := p.token("one")
	thief := p.machine(withToken(token))
	thief.wait("bundles")
	if err := p.machine(withToken(token)).failed(); err == nil || !strings.Contains(err.Error(), "was used") {
		t.Errorf("a token that was stolen and used: %v", err)
	}
	if line := p.log.wait(t, "join token used again"); !strings.Contains(line, "spiffe://example.org/agent/one") {
		t.Errorf("logged %q", line)
	}
	thief.end()
	p.away()
	p.start()
	if err := p.machine(withToken(token)).failed(); err == nil || !strings.Contains(err.Error(), "was used") {
		t.Errorf("after a restart: %v", err)
	}

	ended, err := p.Tokens().Create("two", time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]nodepb.Token{
		"ended": ended, "empty": " ", "of nobody": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "longer": token + "x", "huge": nodepb.Token(strings.Repeat("a", 1000)),
	} {
		if err := p.machine(withToken(bad)).failed(); err == nil || !strings.Contains(err.Error(), "the control plane refuses") {
			t.Errorf("a token that is %s: %v", name, err)
		}
	}
	if n := len(p.Agents()); n != 1 {
		t.Errorf("%d agents", n)
	}
}

func TestJoinTokenUsedTwiceAtOnce(t *testing.T) {
	p := startPlane(t, false, nil)
	for range 3 {
		token := p.token("one")
		both := []*machine{p.machine(withToken(token)), p.machine(withToken(token))}
		won := 0
		for _, m := range both {
			select {
			case <-m.told: // a bundle: it is an agent
				won++
			case err := <-m.ended:
				m.ended <- err
			}
		}
		if won != 1 {
			t.Errorf("%d of two became agents", won)
		}
		for _, m := range both {
			m.end()
		}
	}
}

func TestWrongTrustBundle(t *testing.T) {
	p := startPlane(t, false, nil)
	token := p.token("one")
	m := p.machine(func(c *agent.Config) {
		c.JoinToken, c.TrustBundle = token, spiffebundle.FromX509Bundle(identitytest.Authority(t).Bundle())
	})
	if line := m.log.wait(t, "agent not attested"); !strings.Contains(line, "verify SVID") {
		t.Errorf("logged %q", line)
	}
	m.end()
	if err := m.failed(); err != nil {
		t.Error(err)
	}
	if used := p.Tokens().List()[0].Used; !used.IsZero() || len(p.Agents()) != 0 {
		t.Error("the token was sent to somebody whom the agent does not trust")
	}
	for name, edit := range map[string]func(*agent.Config){
		"none":             func(c *agent.Config) { c.TrustBundle = nil },
		"empty":            func(c *agent.Config) { c.TrustBundle = spiffebundle.New(td) },
		"of another":       func(c *agent.Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") },
		"and no way to be": func(*agent.Config) {},
	} {
		if err := p.machine(edit).failed(); err == nil {
			t.Errorf("%s: the agent ended without an error", name)
		}
	}
}

// impostor is somebody with an SVID of the trust domain who stands in the control plane's place.
type impostor struct {
	nodepb.UnimplementedNodeServer
	reached chan struct{}
}

func (i impostor) AttestAgent(grpc.BidiStreamingServer[nodepb.AttestAgentRequest, nodepb.AttestAgentResponse]) error {
	close(i.reached)
	return status.Error(codes.Unavailable, "thank you for the token")
}

func TestImpostor(t *testing.T) {
	p := startPlane(t, false, nil)
	token := p.token("one")
	for _, path := range []string{"/web", "/agent/two", "/controlplane/x", "/Controlplane"} {
		svid := p.svid(path)
		cert := tls.Certificate{PrivateKey: svid.PrivateKey, Certificate: [][]byte{svid.Certificates[0].Raw}}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&cert)))
		i := impostor{reached: make(chan struct{})}
		nodepb.RegisterNodeServer(s, i)
		go s.Serve(l)
		m := p.machine(func(c *agent.Config) { c.JoinToken, c.Addr = token, l.Addr().String() })
		if line := m.log.wait(t, "agent not attested"); !strings.Contains(line, "not spiffe://example.org/controlplane") {
			t.Errorf("logged %q", line)
		}
		m.end()
		s.Stop()
		select {
		case <-i.reached:
			t.Errorf("%s got the token", path)
		default:
		}
	}
}

// ca certifies machines.
type ca struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

func newCA(t *testing.T) *ca {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{t, cert, key}
}

func (c *ca) issue(key crypto.Signer, edit func(*x509.Certificate)) *tls.Certificate {
	c.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "machine"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(50 * time.Hour),
	}
	if edit != nil {
		edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func ecKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func withX509POP(cert *tls.Certificate) func(*agent.Config) {
	return func(c *agent.Config) { c.X509POP = func() (*tls.Certificate, error) { return cert, nil } }
}

func TestX509POP(t *testing.T) {
	machines := newCA(t)
	p := startPlane(t, false, func(c *node.Config) { c.X509POP = []*x509.Certificate{machines.cert} })
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{ecKey(t), rsaKey, edKey} {
		m := p.machine(withX509POP(machines.issue(key, nil)))
		m.wait("bundles")
		if id := m.Status().ID; !strings.HasPrefix(id.Path(), "/agent/x509pop/") || m.self().ID != id {
			t.Errorf("%T: became %s", key, id)
		}
	}
	if n := len(p.Agents()); n != 3 {
		t.Errorf("%d agents", n)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	wrongKey := machines.issue(ecKey(t), nil)
	wrongKey.PrivateKey = ecKey(t)
	wrongType := machines.issue(ecKey(t), nil)
	wrongType.PrivateKey = edKey
	long := machines.issue(ecKey(t), nil)
	for range 5 {
		long.Certificate = append(long.Certificate, machines.cert.Raw)
	}
	for name, cert := range map[string]*tls.Certificate{
		"another key":         wrongKey,
		"a key of other kind": wrongType,
		"has ended":           machines.issue(ecKey(t), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		"has not begun":       machines.issue(ecKey(t), func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
		"of another CA":       newCA(t).issue(ecKey(t), nil),
		"an authority":        {Certificate: [][]byte{machines.cert.Raw}, PrivateKey: machines.key},
		"not for signatures":  machines.issue(ecKey(t), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }),
		"not for clients": machines.issue(ecKey(t), func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}),
		"weak":       machines.issue(weak, nil),
		"none":       {PrivateKey: ecKey(t)},
		"no DER":     {Certificate: [][]byte{[]byte("x")}, PrivateKey: ecKey(t)},
		"very long":  long,
		"SVID alike": {Certificate: [][]byte{p.svid("/agent/x509pop/one").Certificates[0].Raw}, PrivateKey: ecKey(t)},
	} {
		if err := p.machine(withX509POP(cert)).failed(); err == nil || !strings.Contains(err.Error(), "x509pop") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(p.Agents()); n != 3 {
		t.Errorf("%d agents", n)
	}
	without := startPlane(t, false, nil)
	if err := without.machine(withX509POP(machines.issue(ecKey(t), nil))).failed(); err == nil || !strings.Contains(err.Error(), "not accepted") {
		t.Errorf("without authorities: %v", err)
	}
}

func TestRevocation(t *testing.T) {
	p := startPlane(t, false, nil)
	web := identitytest.Entry("web", identitytest.Me())
	p.Set([]node.Assignment{assign(web, "one", "two")}, nil)
	one, two := p.machine(withToken(p.token("one"))), p.machine(withToken(p.token("two")))
	one.wait("entries")
	two.wait("entries")
	id := spiffeid.RequireFromPath(td, "/agent/one")
	self, spare := one.self(), p.token("one")
	stolen := p.raw(self)
	stream, err := stolen.Watch(t.Context(), &nodepb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Revoke(id); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied || nodepb.Reason(err) != nodepb.AgentRevoked {
		t.Errorf("its stream: %v", err)
	}
	if err := one.failed(); !errors.Is(err, agent.ErrRevoked) {
		t.Errorf("the agent: %v", err)
	}
	if _, err := one.Entitled(t.Context()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("its workloads: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(one.config.Dir, "known.json")); err != nil || strings.Contains(string(data), "/web") {
		t.Errorf("it remembers %s, %v", data, err)
	}
	refused := func() {
		t.Helper()
		stolen := p.raw(self)
		_, err := stolen.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: first.Entries.Entries[0].Id, Csr: csr(t, &x509.CertificateRequest{})})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("CertifyX509: %v", err)
		}
		_, err = stolen.RenewAgent(t.Context(), &nodepb.RenewAgentRequest{Csr: csr(t, &x509.CertificateRequest{})})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("RenewAgent: %v", err)
		}
		if err := p.machine(withToken(spare)).failed(); err == nil {
			t.Error("a token of before makes it an agent again")
		}
		if err := p.machine(withToken(p.token("one"))).failed(); !errors.Is(err, agent.ErrRevoked) {
			t.Errorf("a new token: %v", err)
		}
		one.run()
		if err := one.failed(); !errors.Is(err, agent.ErrRevoked) {
			t.Errorf("the agent, once more: %v", err)
		}
		if list := p.Agents(); len(list) != 2 || !list[0].Revoked || list[1].Revoked {
			t.Errorf("listed %+v", list)
		}
	}
	refused()
	p.away()
	p.start()
	p.Set([]node.Assignment{assign(web, "one", "two")}, nil)
	refused()
	two.log.wait(t, "control plane not reached")
	p.Set([]node.Assignment{assign(identitytest.Entry("db", identitytest.Me()), "two")}, nil)
	two.wait("entries")
	for _, bad := range []string{"spiffe://example.org/web", "spiffe://other.org/agent/one", "spiffe://example.org/agent"} {
		if p.Revoke(spiffeid.RequireFromString(bad)) == nil {
			t.Errorf("revoked %s", bad)
		}
	}
}

// Who has what there is is told nothing, by whichever end the connection was lost.
func TestReconnectPushesNothing(t *testing.T) {
	p := startPlane(t, false, nil)
	web := identitytest.Entry("web", identitytest.Me())
	p.Set([]node.Assignment{assign(web, "one")}, nil)
	m := p.machine(withToken(p.token("one")))
	m.wait("entries")
	m.silent()
	serial := m.self().Certificates[0].SerialNumber

	p.away()
	m.log.wait(t, "control plane not reached")
	p.start() // it knows nothing yet, which is not nothing
	m.log.wait(t, "control plane reached")
	p.Set([]node.Assignment{assign(web, "one"), assign(web, "two")}, nil)
	p.SetBundles(issuer.Bundles{Own: p.bundle.Clone()})
	other := spiffebundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("other.org"), p.authority.Bundle().X509Authorities())
	p.SetBundles(issuer.Bundles{Own: p.bundle, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{other.TrustDomain(): other}})
	m.silent()
	web.FederatesAll = true
	p.Set([]node.Assignment{assign(web, "one")}, nil)
	if told := []string{<-m.told, <-m.told}; !slices.Equal(told, []string{"bundles", "entries"}) {
		t.Errorf("was told %q", told)
	}
	if _, view, err := m.svids(); err != nil || !other.Equal(view.Bundles.Federated[other.TrustDomain()]) {
		t.Errorf("got %v, %v", view.Bundles, err)
	}

	m.end()
	m.run()
	m.wait("bundles") // from the disk
	m.wait("entries")
	m.log.wait(t, "control plane reached")
	m.silent()
	if m.self().Certificates[0].SerialNumber.Cmp(serial) != 0 {
		t.Error("it was attested again")
	}

	m.end()
	p.away()
	m.run()
	m.wait("entries")
	m.log.wait(t, "control plane not reached")
	if view, err := m.Entitled(t.Context()); err != nil || len(view.Entries) != 1 || view.Bundles.Own == nil {
		t.Errorf("while the control plane is away: %v, %v", view, err)
	}
	if _, _, err := m.svids(); status.Code(err) != codes.Unavailable {
		t.Errorf("certified while the control plane is away: %v", err)
	}
	for _, file := range []string{"agent.pem", "known.json"} {
		if info, err := os.Stat(filepath.Join(m.config.Dir, file)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
}

// An agent that wants to know is told its own endpoints, whenever they change, and knows them while the control plane is
// away.
func TestEndpoints(t *testing.T) {
	p := startPlane(t, false, nil)
	edge := spiffeid.RequireFromPath(td, "/gateway/edge")
	endpoint := func(name string, addresses ...string) node.Endpoint {
		e := node.Endpoint{Name: segment.EndpointName(name), Hostname: name + ".internal"}
		for _, a := range addresses {
			e.Gateways = append(e.Gateways, node.Gateway{ID: edge, Address: a})
		}
		return e
	}
	set := func(one, two []node.Endpoint) {
		p.Set([]node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one", "two")}, map[spiffeid.ID][]node.Endpoint{
			spiffeid.RequireFromPath(td, "/agent/one"): one, spiffeid.RequireFromPath(td, "/agent/two"): two,
		})
	}
	told := make(chan []agent.Endpoint, 100)
	is := func(what string, want ...string) {
		t.Helper()
		var names []string
		for _, e := range <-told {
			name := fmt.Sprint(e.Name, " ", e.Hostname)
			for _, g := range e.Gateways {
				name += fmt.Sprint(" ", g.ID.Path(), "=", g.Address)
			}
			names = append(names, name)
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s: told %q", what, names)
		}
	}
	set([]node.Endpoint{endpoint("chat", "edge.internal:8443", "10.0.0.2:8443")}, []node.Endpoint{endpoint("docs", "edge.internal:8443")})
	m := p.machine(func(c *agent.Config) {
		c.JoinToken, c.Endpoints = p.token("one"), func(e []agent.Endpoint) { told <- e }
	})
	is("at first", "chat chat.internal /gateway/edge=edge.internal:8443 /gateway/edge=10.0.0.2:8443")
	m.wait("entries")
	set([]node.Endpoint{endpoint("chat", "edge.internal:8443"), endpoint("other")}, nil)
	is("a change", "chat chat.internal /gateway/edge=edge.internal:8443", "other other.internal")
	m.silent()

	p.away()
	m.log.wait(t, "control plane not reached")
	m.end()
	m.run()
	is("from the disk", "chat chat.internal /gateway/edge=edge.internal:8443", "other other.internal")
	p.start()
	m.log.wait(t, "control plane reached")
	set([]node.Endpoint{endpoint("chat", "edge.internal:8443"), endpoint("other")}, nil) // as before
	set(nil, nil)
	is("nothing any more")
	set([]node.Endpoint{endpoint("chat", "10.0.0.4:8443")}, nil)
	is("and again", "chat chat.internal /gateway/edge=10.0.0.4:8443")
	m.end()

	// Who does not ask is told nothing, and forgets.
	known := func() string {
		data, err := os.ReadFile(filepath.Join(m.config.Dir, "known.json"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if !strings.Contains(known(), "10.0.0.4") {
		t.Errorf("it remembers %s", known())
	}
	wants := m.config.Endpoints
	m.config.Endpoints = nil
	m.run()
	m.log.wait(t, "control plane reached")
	stream, err := p.raw(m.self()).Watch(t.Context(), &nodepb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || resp.Endpoints != nil || len(resp.Entries.GetEntries()) != 1 {
		t.Errorf("told %v, %v", resp, err)
	}
	m.silentButFor(t, "bundles", "entries") // from the disk
	p.Set(nil, map[spiffeid.ID][]node.Endpoint{spiffeid.RequireFromPath(td, "/agent/one"): {endpoint("chat", "10.0.0.5:8443")}})
	if resp, err := stream.Recv(); err != nil || resp.Endpoints != nil || resp.Entries == nil {
		t.Errorf("told %v, %v", resp, err)
	}
	m.wait("entries")
	m.end()
	if strings.Contains(known(), "10.0.0.") {
		t.Errorf("it remembers %s", known())
	}

	m.config.Endpoints = wants
	m.run()
	is("asked for again", "chat chat.internal /gateway/edge=10.0.0.5:8443")
	if err := p.Revoke(spiffeid.RequireFromPath(td, "/agent/one")); err != nil {
		t.Fatal(err)
	}
	if err := m.failed(); !errors.Is(err, agent.ErrRevoked) {
		t.Error(err)
	}
	is("revoked")
	if strings.Contains(known(), "10.0.0.") {
		t.Errorf("it remembers %s", known())
	}
	if len(told) != 0 {
		t.Errorf("told %v besides", <-told)
	}
}

// What cannot be is not believed, and what was stays; nor does it keep the agent from what comes next.
func TestEndpointsThatCannotBe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, true, nil)
		one := spiffeid.RequireFromPath(td, "/agent/one")
		set := func(e node.Endpoint) {
			p.Set(nil, map[spiffeid.ID][]node.Endpoint{one: {e}})
			settle(time.Minute)
		}
		good := func(address string) node.Endpoint {
			return node.Endpoint{Name: "chat", Hostname: "chat.internal", Gateways: []node.Gateway{{ID: spiffeid.RequireFromPath(td, "/gateway/edge"), Address: address}}}
		}
		told := make(chan []agent.Endpoint, 100)
		m := p.machine(func(c *agent.Config) {
			c.JoinToken, c.Endpoints = p.token("one"), func(e []agent.Endpoint) { told <- e }
		})
		set(good("edge.internal:8443"))
		for len(told) > 0 {
			<-told
		}
		for name, edit := range map[string]func(*node.Endpoint){
			"no name":       func(e *node.Endpoint) { e.Name = "" },
			"no host name":  func(e *node.Endpoint) { e.Hostname = "" },
			"two lines":     func(e *node.Endpoint) { e.Hostname = "a\r\nb" },
			"a path":        func(e *node.Endpoint) { e.Hostname = "chat/../docs" },
			"no port":       func(e *node.Endpoint) { e.Gateways[0].Address = "edge.internal" },
			"an empty port": func(e *node.Endpoint) { e.Gateways[0].Address = "edge.internal:" },
			"no host":       func(e *node.Endpoint) { e.Gateways[0].Address = ":8443" },
			"nobody":        func(e *node.Endpoint) { e.Gateways[0].ID = spiffeid.ID{} },
			"another one's": func(e *node.Endpoint) {
				e.Gateways[0].ID = spiffeid.RequireFromString("spiffe://other.org/gateway/edge")
			},
			"an agent":            func(e *node.Endpoint) { e.Gateways[0].ID = one },
			"the control plane's": func(e *node.Endpoint) { e.Gateways[0].ID = nodepb.ControlPlane(td) },
		} {
			bad := good("edge.internal:8443")
			edit(&bad)
			set(bad)
			if problem := m.Status().Problem; len(told) != 0 || !strings.Contains(problem, "read what the control plane sent") {
				t.Errorf("%s: %q", name, problem)
			}
		}
		set(good("10.0.0.1:8443"))
		if e := <-told; len(e) != 1 || e[0].Gateways[0].Address != "10.0.0.1:8443" || len(told) != 0 {
			t.Errorf("then told %v", e)
		}
		m.end()
		p.away()
	})
}

// A control plane that knows nothing yet says nothing of endpoints either.
func TestEndpointsUnknownYet(t *testing.T) {
	p := startPlane(t, false, nil)
	told := make(chan []agent.Endpoint, 100)
	m := p.machine(func(c *agent.Config) {
		c.JoinToken, c.Endpoints = p.token("one"), func(e []agent.Endpoint) { told <- e }
	})
	<-told // none, and that is known
	p.away()
	m.log.wait(t, "control plane not reached")
	p.start()
	m.log.wait(t, "control plane reached")
	p.Set(nil, map[spiffeid.ID][]node.Endpoint{spiffeid.RequireFromPath(td, "/agent/one"): {{Name: "chat", Hostname: "chat.internal"}}})
	if e := <-told; len(e) != 1 || len(told) != 0 {
		t.Errorf("told %v", e)
	}
}

// What a later version keeps in its file does not keep this one from its own.
func TestFileOfALaterVersion(t *testing.T) {
	p := startPlane(t, false, nil)
	p.Set([]node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one")}, nil)
	m := p.machine(withToken(p.token("one")))
	m.wait("entries")
	m.end()
	file := filepath.Join(m.config.Dir, "known.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, bytes.Replace(data, []byte("{"), []byte(`{"news":{"digest":"AA=="},`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	p.away()
	m.run()
	m.wait("entries")
}

// Whoever has a copy of an agent's SVID is noticed, and out, when the agent uses its next one.
func TestCopiedSVID(t *testing.T) {
	p := startPlane(t, false, nil)
	m := p.machine(withToken(p.token("one")))
	m.wait("bundles")
	m.end()
	before := m.self()
	copied := p.raw(before)
	renew := func(c nodepb.NodeClient) (*x509svid.SVID, error) {
		key := ecKey(t)
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.RenewAgent(t.Context(), &nodepb.RenewAgentRequest{Csr: der})
		if err != nil {
			return nil, err
		}
		chain, err := x509.ParseCertificates(resp.Svid.CertChain[0])
		return &x509svid.SVID{Certificates: chain, PrivateKey: key}, err
	}
	if _, err := renew(copied); err != nil { // an answer that was lost
		t.Fatal(err)
	}
	next, err := renew(copied)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := renew(p.raw(next)); err != nil {
		t.Fatal(err)
	}
	if _, err := renew(copied); status.Code(err) != codes.PermissionDenied || nodepb.Reason(err) != nodepb.MustReattest {
		t.Errorf("the copy: %v", err)
	}
	m.config.JoinToken = ""
	m.run()
	if err := m.failed(); err == nil || !strings.Contains(err.Error(), "start the agent with a new one") {
		t.Errorf("the agent whose SVID was used elsewhere: %v", err)
	}
	m = p.machine(withToken(p.token("one")))
	m.wait("bundles")
	if _, err := renew(p.raw(next)); nodepb.Reason(err) != nodepb.MustReattest {
		t.Errorf("the machine before: %v", err)
	}
}

func TestUnusableState(t *testing.T) {
	p := startPlane(t, false, nil)
	m := p.machine(withToken(p.token("one")))
	m.wait("entries")
	m.end()
	for name, damage := range map[string]func(dir string) error{
		"torn SVID":    func(dir string) error { return os.WriteFile(filepath.Join(dir, "agent.pem"), []byte("x"), 0o600) },
		"readable key": func(dir string) error { return os.Chmod(filepath.Join(dir, "agent.pem"), 0o644) },
		"torn entries": func(dir string) error { return os.WriteFile(filepath.Join(dir, "known.json"), []byte("{"), 0o600) },
		"wrong entries": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "known.json"), []byte(`{"bundles":{"own":"e30="}}`), 0o600)
		},
	} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(m.config.Dir)); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{"agent.pem", "known.json"} {
			if err := os.Chmod(filepath.Join(dir, file), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := damage(dir); err != nil {
			t.Fatal(err)
		}
		if err := p.machine(func(c *agent.Config) { c.Dir = dir }).failed(); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// settle lets everything happen that needs no time, and then so much time pass.
func settle(d time.Duration) {
	synctest.Wait()
	time.Sleep(d)
	synctest.Wait()
}

// A stream of a workload lives through an hour without the control plane but for the identity's end.
func TestAwayForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, true, func(c *node.Config) { c.TTL = 4 * time.Hour })
		long, short := identitytest.Entry("long", identitytest.Me()), identitytest.Entry("short", identitytest.Me())
		long.TTL, short.TTL = 3*time.Hour, 30*time.Minute
		p.Set([]node.Assignment{assign(long, "one")}, nil)
		m := p.machine(withToken(p.token("one")))
		m.wait("entries")
		w, view, err := m.svids()
		if err != nil {
			t.Fatal(err)
		}
		serial := w.SVIDs()[0].Certificates[0].SerialNumber
		settle(time.Hour)
		p.away()
		for begun := time.Now(); time.Since(begun) < time.Hour; {
			select {
			case <-w.Due():
				if _, err := w.Renew(t.Context(), m.Issuer, view.Entries, nil); err != nil {
					t.Fatal(err)
				}
			case <-time.After(10 * time.Minute):
			}
			if now := w.SVIDs()[0]; now.Certificates[0].SerialNumber.Cmp(serial) != 0 || !time.Now().Before(now.Certificates[0].NotAfter) {
				t.Fatalf("holds one that ends at %s", now.Certificates[0].NotAfter)
			}
		}
		p.back()
		settle(2 * time.Minute)
		if !m.Status().Connected {
			t.Errorf("not connected: %+v", m.Status())
		}
		<-w.Due()
		if changed, err := w.Renew(t.Context(), m.Issuer, view.Entries, nil); err != nil || !changed {
			t.Errorf("not renewed: %t, %v", changed, err)
		}
		p.Set([]node.Assignment{assign(short, "one")}, nil)
		settle(time.Second)
		if w, view, err = m.svids(); err != nil || view.Entries[0].ID != short.ID {
			t.Fatalf("got %v, %v", view.Entries, err)
		}
		p.away()
		time.Sleep(time.Until(w.SVIDs()[0].Certificates[0].NotAfter))
		if _, err := w.Renew(t.Context(), m.Issuer, view.Entries, nil); status.Code(err) != codes.Unavailable {
			t.Errorf("held longer than it is valid: %v", err)
		}
		m.end()
		p.away()
	})
}

// The agent's own SVID is renewed all along, also late, and calls go on meanwhile.
func TestAgentRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, true, nil) // an hour
		p.Set([]node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one")}, nil)
		m := p.machine(withToken(p.token("one")))
		m.wait("entries")
		first := m.self().Certificates[0].SerialNumber
		settle(37 * time.Minute) // three fifths at the latest
		second := m.self().Certificates[0].SerialNumber
		if first.Cmp(second) == 0 {
			t.Error("not renewed in time")
		}
		if _, _, err := m.svids(); err != nil {
			t.Error(err)
		}
		p.away()
		settle(38 * time.Minute) // it is overdue, and has not ended
		if m.self().Certificates[0].SerialNumber.Cmp(second) != 0 {
			t.Error("renewed by nobody")
		}
		p.start()
		p.Set([]node.Assignment{assign(identitytest.Entry("db", identitytest.Me()), "one")}, nil)
		settle(2 * time.Minute)
		if m.self().Certificates[0].SerialNumber.Cmp(second) == 0 {
			t.Error("not renewed late")
		}
		if _, view, err := m.svids(); err != nil || view.Entries[0].ID.Path() != "/db" {
			t.Errorf("got %v, %v", view.Entries, err)
		}
		settle(20 * time.Hour)
		if !m.Status().Connected || len(p.Agents()) != 1 {
			t.Errorf("after a day: %+v, %+v", m.Status(), p.Agents())
		}
		settle(5 * time.Hour) // the authority has ended
		if m.Status().Connected {
			t.Errorf("after the authority's end: %+v", m.Status())
		}
		m.end()
		p.away()
	})
}

// The control plane, or the machine, was away until the agent's SVID had ended.
func TestSVIDEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		machines := newCA(t)
		p := startPlane(t, true, func(c *node.Config) { c.X509POP = []*x509.Certificate{machines.cert} })
		cert := machines.issue(ecKey(t), nil)
		again, never := p.machine(withX509POP(cert)), p.machine(withToken(p.token("one")))
		again.wait("bundles")
		never.wait("bundles")
		id := again.Status().ID
		p.away()
		settle(2 * time.Hour)
		if err := never.failed(); err == nil || !strings.Contains(err.Error(), "has ended") || !strings.Contains(err.Error(), "join token serves only once") {
			t.Errorf("by join token: %v", err)
		}
		p.back()
		settle(time.Minute)
		if s := again.Status(); !s.Connected || s.ID != id || time.Until(s.Expires) < time.Minute {
			t.Errorf("by certificate: %+v", s)
		}
		again.end()
		never.run()
		if err := never.failed(); err == nil || !strings.Contains(err.Error(), "has ended") {
			t.Errorf("by join token, once more: %v", err)
		}
		never.config.JoinToken = p.token("one")
		never.run()
		settle(time.Second)
		if !never.Status().Connected {
			t.Errorf("with a new token: %+v", never.Status())
		}
		never.end()
		p.away()
	})
}
