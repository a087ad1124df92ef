package real

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/test/corpus"
)

// wire is a server behind the gateway that speaks whatever it is told to, over connections.
type wire struct {
	listener net.Listener
	accepted atomic.Int32
}

// newWire serves until the test ends. With a TLS configuration a connection counts when its handshake is done.
func newWire(t testing.TB, config *tls.Config, serve func(net.Conn)) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: l}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if config != nil {
					over := tls.Server(conn, config)
					if over.Handshake() != nil {
						return
					}
					conn = over
				}
				w.accepted.Add(1)
				serve(conn)
			}()
		}
	}()
	return w
}

func (w *wire) address() string { return w.listener.Addr().String() }

// taken is how many connections there were since it was called last.
func (w *wire) taken() int { return int(w.accepted.Swap(0)) }

type halfCloser interface{ CloseWrite() error }

// echo sends back what comes, and ends when that does.
func echo(conn net.Conn) {
	if _, err := io.Copy(conn, conn); err == nil {
		_ = conn.(halfCloser).CloseWrite()
	}
}

// greet speaks first, as MySQL and SMTP do.
func greet(conn net.Conn) {
	_, _ = io.WriteString(conn, "220 welcome\r\n")
	echo(conn)
}

// connect opens a connection to an endpoint, and gives it so long in all.
func (c *caller) connect(t testing.TB, endpoint string, protocols ...string) *tls.Conn {
	t.Helper()
	only := *c
	only.config = c.config.Clone()
	only.config.NextProtos = protocols
	conn, err := only.dial(t.Context(), hostOf(endpoint))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// says sends a text and returns what comes back, as long as the text or less.
func says(conn net.Conn, text string) (string, error) {
	if _, err := io.WriteString(conn, text); err != nil {
		return "", err
	}
	got := make([]byte, len(text))
	n, err := io.ReadFull(conn, got)
	return string(got[:n]), err
}

// reaches reports whether a new connection gets through to a server that sends back what it gets.
func (c *caller) reaches(t testing.TB, endpoint string) bool {
	t.Helper()
	conn := c.connect(t, endpoint)
	defer conn.Close()
	got, err := says(conn, "hello")
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("neither let through nor closed: %v", err)
	}
	return got == "hello"
}

// connection waits for the flow of a connection by somebody.
func (u *up) connection(t testing.TB, who, endpoint string, verdict telemetry.Verdict) telemetry.Flow {
	t.Helper()
	return u.flows(t, 1, func(f telemetry.Flow) bool {
		return f.Caller.String() == domain+who && string(f.Endpoint) == endpoint && f.Verdict == verdict
	})[0]
}

// TestTCP lets callers through to a server, or not a byte of them.
func TestTCP(t *testing.T) {
	t.Parallel()
	server, first := newWire(t, nil, echo), newWire(t, nil, greet)
	given := grant("app", "/app", "wire", "Connect", "'*'")
	u := startUp(t, map[string]string{
		"endpoints.yaml": endpoint("wire", "TCP", server.address()) + endpoint("greets", "TCP", first.address()) + endpoint("gone", "TCP", freeAddress()),
		"app.yaml":       given,
		"more.yaml": grant("family", "/family/*", "wire", "Connect", "'*'") + grant("bad", "/family/bad", "wire", "Connect", "'*'") + "  effect: Deny\n" +
			grant("greets", "/app", "greets", "Connect", "'*'") + grant("gone", "/app", "gone", "Connect", "'*'") +
			grant("tried", "/tried", "wire", "Connect", "'*'") + "  mode: Shadow\n" + grant("less", "/family/less", "wire", "Connect", "'*'") + "  effect: Deny\n  mode: Shadow\n",
	})
	papers := func(who string, more ...string) *caller {
		p := svid(who, time.Hour)
		p.uris = append(p.uris, more...)
		return u.with(t, http1, u.keys.sign(t, p))
	}

	t.Run("callers", func(t *testing.T) {
		for _, c := range []struct {
			who    string
			want   bool
			rule   string
			shadow telemetry.Verdict
			by     string
		}{
			{"/app", true, "grant/app", telemetry.Allowed, "grant/app"},
			{"/family/x", true, "grant/family", telemetry.Allowed, "grant/family"},
			{"/family/less", true, "grant/family", telemetry.Denied, "grant/less"},
			{"/family/bad", false, "grant/bad", telemetry.Denied, "grant/bad"},
			{"/tried", false, "default-deny", telemetry.Allowed, "grant/tried"},
			{"/nobody", false, "default-deny", telemetry.Denied, "default-deny"},
			{"/family", false, "default-deny", telemetry.Denied, "default-deny"},
		} {
			if got := papers(c.who).reaches(t, "wire"); got != c.want {
				t.Errorf("%s: let through: %t", c.who, got)
			}
			if n := server.taken(); (n == 1) != c.want || n > 1 {
				t.Errorf("%s: the server had %d connections", c.who, n)
			}
			verdict := map[bool]telemetry.Verdict{true: telemetry.Allowed, false: telemetry.Denied}[c.want]
			f := u.connection(t, c.who, "wire", verdict)
			if f.Operation != "Connect" || f.Rule != c.rule || f.Shadow != c.shadow || f.ShadowBy != c.by || f.ID == "" || f.BytesIn != 5 || (f.BytesOut == 5) != c.want {
				t.Errorf("%s: recorded as %+v", c.who, f)
			}
		}
	})
	t.Run("no SPIFFE IDs", func(t *testing.T) { // Envoy's validator lets them in, and the prefix would cover them
		for _, c := range []*caller{
			papers("/family/x", domain+"/nobody"), papers("/nobody", domain+"/family/x"), papers("/family/x", "https://example.org/"),
			papers("/family/x|y"), papers("/family/../app"), papers("/family/"), papers("/family//x"), papers("/family/x,y"),
		} {
			if c.reaches(t, "wire") {
				t.Error("let through")
			}
		}
		if n := server.taken(); n != 0 {
			t.Errorf("the server had %d connections", n)
		}
	})
	t.Run("no certificate", func(t *testing.T) {
		conn := u.with(t, http1).connect(t, "wire")
		if got, err := says(conn, "hello"); err == nil {
			t.Errorf("let through: %q", got)
		}
		refused := func(f telemetry.Flow) bool { return f.Caller.IsZero() && f.Verdict == telemetry.Refused }
		u.flows(t, 1, refused)
		u.as(t, "/last", http1).reaches(t, "wire")
		u.connection(t, "/last", "wire", telemetry.Denied) // so all that came before has been received
		if got := u.flows(t, 1, refused); len(got) != 1 || got[0].Endpoint != "" || !strings.HasSuffix(got[0].Detail, "(server name "+hostOf("wire")+")") {
			t.Errorf("recorded as %+v", got)
		}
	})
	t.Run("protocols", func(t *testing.T) {
		for _, c := range []struct {
			asks []string
			want string
		}{{nil, ""}, {[]string{"postgresql"}, "postgresql"}, {[]string{"h2", "postgresql"}, "postgresql"}} {
			conn := u.as(t, "/app", http1).connect(t, "wire", c.asks...)
			if got := conn.ConnectionState().NegotiatedProtocol; got != c.want {
				t.Errorf("%v: %q", c.asks, got)
			}
			if got, err := says(conn, "hello"); got != "hello" {
				t.Errorf("%v: %q, %v", c.asks, got, err)
			}
		}
		conn := u.as(t, "/app", http1).connect(t, "wire", "h2")
		t.Logf("asked for h2: %q", conn.ConnectionState().NegotiatedProtocol)
	})
	t.Run("who waits hears nothing", func(t *testing.T) {
		for _, who := range []string{"/app", "/nobody"} { // nobody is let through before he says something
			conn := u.as(t, who, http1).connect(t, "greets")
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if got, err := io.ReadAll(conn); len(got) > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %q, %v", who, got, err)
			}
			if n := first.taken(); n != 0 {
				t.Errorf("%s: the server had %d connections", who, n)
			}
			conn.Close()
		}
		f := u.connection(t, "/nobody", "greets", telemetry.Denied)
		t.Logf("recorded as %+v", f)
	})
	t.Run("large", func(t *testing.T) {
		conn := u.as(t, "/app", http1).connect(t, "wire")
		sent, got := make([]byte, 24<<20), make([]byte, 24<<20)
		_, _ = rand.Read(sent)
		go func() { _, _ = conn.Write(sent) }()
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(sent, got) {
			t.Errorf("not what was sent: %v", err)
		}
	})
	t.Run("half-close", func(t *testing.T) {
		for _, text := range []string{"hello", strings.Repeat("long", 1<<20)} {
			conn := u.as(t, "/app", http1).connect(t, "wire")
			go func() {
				_, _ = io.WriteString(conn, text)
				_ = conn.CloseWrite()
			}()
			if got, err := io.ReadAll(conn); err != nil || string(got) != text { // the server goes on after we have ended
				t.Errorf("%d bytes of %d: %v", len(got), len(text), err)
			}
		}
	})
	t.Run("backend away", func(t *testing.T) {
		if u.as(t, "/app", http1).reaches(t, "gone") {
			t.Error("let through to nobody")
		}
		if f := u.connection(t, "/app", "gone", telemetry.Failed); f.Rule != "grant/gone" || f.Detail == "" {
			t.Errorf("recorded as %+v", f)
		}
	})
	t.Run("taken and given", func(t *testing.T) {
		who := u.as(t, "/app", http1)
		open := who.connect(t, "wire")
		goesOn := func() {
			t.Helper()
			if got, err := says(open, "still"); got != "still" {
				t.Errorf("a connection that was open: %q, %v", got, err)
			}
		}
		goesOn()
		if err := os.Remove(filepath.Join(u.docs, "app.yaml")); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		eventually(t, "denial", func() bool { return !who.reaches(t, "wire") })
		t.Logf("denied %s after the edit", time.Since(began).Round(time.Millisecond))
		goesOn() // until its time is over
		u.write(t, "app.yaml", given)
		began = time.Now()
		eventually(t, "connection again", func() bool { return who.reaches(t, "wire") })
		t.Logf("let through %s after the edit", time.Since(began).Round(time.Millisecond))
		goesOn()
	})
	t.Run("explained", func(t *testing.T) {
		out, stderr, code := u.ask(t, "explain", "--caller", "/family/bad", "--endpoint", "wire", "--operation", "Connect")
		if code != 1 || !strings.Contains(out, "grant/bad") {
			t.Errorf("exit %d: %s%s", code, out, stderr)
		}
		for who, verdict := range map[string]string{"/app": "allowed", "/nobody": "denied"} {
			out, stderr, code := u.ask(t, "flows", "--endpoint", "wire", "--caller", domain+who, "--verdict", verdict, "-n", "1", "-o", "json")
			if code != 0 || strings.Count(out, "\n") != 1 {
				t.Fatalf("exit %d: %s%s", code, out, stderr)
			}
			again, stderr, code := u.ask(t, "explain", "--replay", out)
			if code != 0 || !strings.Contains(again, "same") {
				t.Errorf("exit %d: %s%s", code, again, stderr)
			}
			t.Log(strings.TrimSpace(again))
		}
	})
}

// TestTCPEnds cuts connections while the certificates that opened them are still good, whether or not anything is said.
func TestTCPEnds(t *testing.T) {
	t.Parallel()
	server := newWire(t, nil, echo)
	u := startUp(t, map[string]string{"all.yaml": endpoint("wire", "TCP", server.address()) + grant("app", "/app", "wire", "Connect", "'*'")}, "--svid-ttl", "20s")
	const age = 4 * time.Second // a fifth
	for _, who := range []string{"/app", "/nobody"} {
		t.Run("silent"+who, func(t *testing.T) {
			t.Parallel()
			conn, began := u.as(t, who, http1).connect(t, "wire"), time.Now()
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("still open")
			}
			if took := time.Since(began); took < age/2 || took > age+time.Second {
				t.Errorf("cut after %s, want %s", took, age)
			}
			t.Logf("recorded as %+v", u.flows(t, 1, func(f telemetry.Flow) bool { return f.Caller.String() == domain+who && f.BytesIn == 0 })[0])
		})
	}
	t.Run("busy", func(t *testing.T) {
		t.Parallel()
		conn, began := u.as(t, "/app", http1).connect(t, "wire"), time.Now()
		eventually(t, "end", func() bool { _, err := says(conn, "hello"); return err != nil })
		if took := time.Since(began); took < age-100*time.Millisecond || took > age+time.Second {
			t.Errorf("cut after %s, want %s", took, age)
		}
		t.Logf("recorded as %+v", u.flows(t, 1, func(f telemetry.Flow) bool { return f.Caller.String() == domain+"/app" && f.BytesIn > 0 })[0])
	})
}

// TestTCPBackendTLS speaks to servers over TLS as the documents say, and to no other server in their place.
func TestTCPBackendTLS(t *testing.T) {
	t.Parallel()
	u := startUp(t, nil)
	roots := x509.NewCertPool()
	roots.AddCert(u.keys.ca)
	asked := make(chan *tls.ClientHelloInfo, 64)
	serve := func(id, name string) *wire {
		p := svid(id, time.Hour)
		p.dns = []string{name}
		return newWire(t, &tls.Config{Certificates: []tls.Certificate{u.keys.sign(t, p)}, ClientAuth: tls.RequestClientCert, ClientCAs: roots, NextProtos: []string{"postgresql"},
			GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) { asked <- hello; return nil, nil }},
			func(conn net.Conn) {
				if certs := conn.(*tls.Conn).ConnectionState().PeerCertificates; len(certs) > 0 && certs[0].URIs[0].String() != domain+"/gateway/local" {
					return
				}
				echo(conn)
			})
	}
	one, other := serve("/server", "one.internal"), serve("/other", "other.internal")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.keys.ca.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	mutual := fmt.Sprintf("{mode: Mutual, spiffeID: %s/server}", domain)
	server := "{mode: Server, serverName: one.internal, caFile: " + ca + "}"
	var documents strings.Builder
	cases := []struct {
		name string
		to   *wire
		tls  string
		want bool
	}{
		{"mutual", one, mutual, true}, {"mutual-impostor", other, mutual, false}, {"server", one, server, true}, {"server-other-name", other, server, false}, {"plain-to-tls", one, "{mode: None}", false},
	}
	for _, c := range cases {
		documents.WriteString(strings.Replace(endpoint(c.name, "TCP", c.to.address()), "{mode: None}", c.tls, 1))
		documents.WriteString(grant(c.name, "/app", c.name, "Connect", "'*'"))
	}
	u.write(t, "all.yaml", documents.String())
	who := u.as(t, "/app", http1)
	eventually(t, "the first endpoint", func() bool {
		conn, err := who.dial(t.Context(), hostOf("mutual"))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	for _, c := range cases {
		if got := who.reaches(t, c.name); got != c.want {
			t.Errorf("%s: let through: %t", c.name, got)
		}
	}
	for len(asked) > 0 {
		if hello := <-asked; !slices.Equal(hello.SupportedProtos, []string{"postgresql"}) {
			t.Errorf("the server was offered %q", hello.SupportedProtos)
		}
	}
	if f := u.connection(t, "/app", "mutual-impostor", telemetry.Failed); !strings.Contains(f.Detail, "verif") {
		t.Errorf("recorded as %+v", f)
	}
}

// TestTCPDecisions asks the real Envoy what generated policies decide about connections.
func TestTCPDecisions(t *testing.T) {
	t.Parallel()
	server := newWire(t, nil, echo)
	u := startUp(t, nil)
	asked := map[authz.Decision]int{}
	for number := range 6 {
		c, err := corpus.Generated(number)
		if err != nil {
			t.Fatal(err)
		}
		config, err := c.Config()
		if err != nil {
			t.Fatal(err)
		}
		policy, e := authz.Compile(&config, c.Now), config.Endpoint("tcp")
		canary := fmt.Sprintf("/canary/%d", number)
		before := u.status(t).Generation.Digest
		u.write(t, "case.yaml", strings.NewReplacer(e.Hostnames[0], hostOf("tcp"), e.Backends[0].Addresses[0].Host+fmt.Sprintf(":%d", e.Backends[0].Addresses[0].Port), server.address()).Replace(string(c.Documents))+
			grant("canary", canary, "tcp", "Connect", "'*'"))
		eventually(t, "the policy in force", func() bool {
			st := u.status(t)
			return st.Generation.Digest != before && st.Gateways[0].InForce == string(st.Generation.Digest)
		})
		eventually(t, "way through", func() bool { // all of Envoy's threads have it
			conn, err := u.as(t, canary, http1).dial(t.Context(), hostOf("tcp"))
			if err != nil {
				return false
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			_, _ = says(conn, "hello")
			return slices.ContainsFunc(u.allFlows(t), func(f telemetry.Flow) bool { return f.Caller.String() == domain+canary && f.Rule == "grant/canary" })
		})
		began := time.Now()
		want := map[string]authz.Decision{}
		for _, path := range []string{"/a", "/b", "/c", "/t", "/t/a", "/t/c", "/t/u", "/t/u/a", "/t/u/b", "/t/u/c"} {
			d := authz.Decide(policy, authz.Request{Caller: domain + path, Endpoint: "tcp", Operation: segment.Connect})
			want[domain+path] = d
			asked[d]++
			if got := u.as(t, path, http1).reaches(t, "tcp"); got != d.Allowed {
				t.Errorf("policy %d: %s is let through: %t, want %+v\n%s", number, path, got, d, c.Documents)
			}
		}
		for _, f := range u.flows(t, len(want), func(f telemetry.Flow) bool { return !f.Time.Before(began) && want[f.Caller.String()].Rule != "" }) {
			d, verdict := want[f.Caller.String()], map[bool]telemetry.Verdict{true: telemetry.Allowed, false: telemetry.Denied}
			if f.Verdict != verdict[d.Allowed] || f.Rule != string(d.Rule) {
				t.Errorf("policy %d: %s is recorded as %s by %s, want %+v", number, f.Caller, f.Verdict, f.Rule, d)
			}
			if policy.Endpoints["tcp"].Shadowed && (f.Shadow != verdict[d.ShadowAllowed] || f.ShadowBy != string(d.ShadowRule)) {
				t.Errorf("policy %d: %s has shadow %s by %s, want %+v", number, f.Caller, f.Shadow, f.ShadowBy, d)
			}
		}
	}
	if len(asked) < 10 {
		t.Errorf("only %d different decisions: %v", len(asked), asked)
	}
}
