package forward

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
)

// mine is a world in which this test's process has an identity.
func mine(t *testing.T, network string) *world {
	t.Helper()
	w := newWorld(t, network)
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	return w
}

// wire is a connection on which requests are written letter by letter.
type wire struct {
	net.Conn
	*bufio.Reader
	t *testing.T
}

func (w *wire) Read(p []byte) (int, error) { return w.Reader.Read(p) }

func (w *world) wire(t *testing.T) *wire {
	t.Helper()
	network := "tcp"
	if w.socket != "" {
		network = "unix"
	}
	c, err := net.Dial(network, w.address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return &wire{c, bufio.NewReader(c), t}
}

// say sends lines, in which HOST is what this machine is called, and then an empty one.
func (w *wire) say(lines ...string) {
	w.t.Helper()
	host := "localhost"
	if tcp, ok := w.RemoteAddr().(*net.TCPAddr); ok {
		host = tcp.String()
	}
	text := strings.ReplaceAll(strings.Join(lines, "\r\n"), "HOST", host)
	if _, err := io.WriteString(w.Conn, text+"\r\n\r\n"); err != nil {
		w.t.Fatal(err)
	}
}

// heard is an answer that has been read.
type heard struct {
	status int
	length int64 // as the header has it
	header http.Header
	body   string
}

func (w *wire) hear(method string) heard {
	w.t.Helper()
	resp, err := http.ReadResponse(w.Reader, &http.Request{Method: method})
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return heard{resp.StatusCode, resp.ContentLength, resp.Header, string(body)}
}

// seen returns what the gateway saw of a request.
func (w *wire) seen(method string) answer {
	w.t.Helper()
	got := w.hear(method)
	var a answer
	if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 {
		w.t.Fatalf("%d: %s", got.status, got.body)
	}
	return a
}

// ended fails if the connection is still open, or something else is on it.
func (w *wire) ended() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.Reader); err != nil || len(rest) > 0 {
		w.t.Errorf("then %q, %v", rest, err)
	}
}

// What asks for another protocol gets an answer in this one: nothing passes that is not HTTP.
func TestUpgrade(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		upgrades := map[string][]string{
			"websocket": {"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="},
			"h2c":       {"Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"},
		}
		for name, lines := range upgrades {
			c := w.wire(t)
			c.say(append([]string{"GET /chat/v1/realtime HTTP/1.1", "Host: HOST"}, lines...)...)
			if a := c.seen("GET"); a.URI != "/v1/realtime" || a.Header["Upgrade"] != nil || a.Header["Http2-Settings"] != nil {
				t.Errorf("%s: the gateway saw %+v", name, a)
			}
			c.say("GET /chat/v1/models HTTP/1.1", "Host: HOST") // it is still HTTP
			c.seen("GET")
		}
		for _, headers := range []http.Header{{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}, {}} {
			w.handle(func(rw http.ResponseWriter, _ *http.Request) {
				for name, values := range headers {
					rw.Header()[name] = values
				}
				rw.WriteHeader(http.StatusSwitchingProtocols)
			})
			c := w.wire(t)
			c.say("GET /chat/v1/realtime HTTP/1.1", "Host: HOST", "Connection: Upgrade", "Upgrade: websocket")
			if got := c.hear("GET"); got.status != 502 || !strings.Contains(got.body, "gateway_error") {
				t.Errorf("a gateway that switches with %v: %+v", headers, got)
			}
		}
	})
}

// Requests of other forms lead to endpoints as well, or nowhere.
func TestRequestForms(t *testing.T) {
	w := mine(t, "tcp")
	for _, c := range []struct {
		request string
		status  int
		sni     string // of the endpoint that it leads to
		uri     string
	}{
		{"GET http://HOST/chat/v1/models", 200, "chat", "/v1/models"},
		{"GET http://evil.example/chat/v1/models", 403, "", ""},
		{"CONNECT HOST", 404, "", ""},
		{"CONNECT edge.internal:8443", 403, "", ""},
		{"OPTIONS *", 404, "", ""},
		{"OPTIONS /chat/v1/models", 200, "chat", "/v1/models"},
		{"GET /chat", 200, "chat", "/"},
		{"GET /chat?to=/docs/", 200, "chat", "/?to=/docs/"},
		{"GET /chat?", 200, "chat", "/?"},
		{"GET /docs/v1", 200, "docs", "/v1"},
		// Whoever is behind the gateway may read these as he likes: the endpoint is the one that was named first.
		{"GET /chat/../docs/v1", 200, "chat", "/../docs/v1"},
		{"GET /chat/%2e%2e/docs/v1", 200, "chat", "/%2e%2e/docs/v1"},
		{"GET /chat/..%2fdocs/v1", 200, "chat", "/..%2fdocs/v1"},
		{"GET /chat//docs/v1", 200, "chat", "//docs/v1"},
		{"GET /chat/http://docs.models.internal/v1", 200, "chat", "/http://docs.models.internal/v1"},
		{`GET /chat/\..\docs/v1`, 200, "chat", `/%5C..%5Cdocs/v1`},
		{"GET /chat/a%2Fb%25", 200, "chat", "/a%2Fb%25"},
		{"GET /../chat/v1", 404, "", ""},
		{"GET /./chat/v1", 404, "", ""},
		{"GET /%2e%2e/chat/v1", 404, "", ""},
		{"GET /chat%2f..%2fdocs/v1", 404, "", ""},
		{"GET /chat%00/v1", 404, "", ""},
		{"GET /chat;docs/v1", 404, "", ""},
		{`GET /chat\..\docs/v1`, 404, "", ""},
		{"GET /CHAT/v1", 404, "", ""},
		{"GET /chat /v1", 400, "", ""},
		{"GET chat/v1", 400, "", ""},
		{"GET /chat/%zz", 400, "", ""},
	} {
		conn := w.wire(t)
		conn.say(c.request+" HTTP/1.1", "Host: HOST", "Connection: close")
		if c.status == 200 {
			if a := conn.seen("GET"); a.SNI != c.sni+".models.internal" || a.Host != a.SNI || a.URI != c.uri {
				t.Errorf("%s: the gateway saw %s of %s", c.request, a.URI, a.SNI)
			}
			continue
		}
		if got := conn.hear("GET"); got.status != c.status {
			t.Errorf("%s: %+v", c.request, got)
		}
	}
}

// What could be read as one request or as two is one, or none.
func TestSmuggling(t *testing.T) {
	w := mine(t, "tcp")
	const hidden = "GET /docs/v1/secret HTTP/1.1\r\nHost: HOST\r\n"
	c := w.wire(t)
	c.say("POST /chat/v1/a HTTP/1.1", "Host: HOST", "Content-Length: 4", "Transfer-Encoding: chunked", "", "3", "abc", "0")
	if a := c.seen("POST"); a.Body != "abc" || a.Header["Content-Length"] != nil {
		t.Errorf("the gateway saw %+v", a)
	}
	c.say("GET /chat/v1/b HTTP/1.1", "Host: HOST", "Connection: close")
	if a := c.seen("GET"); a.URI != "/v1/b" {
		t.Errorf("the gateway saw %+v", a)
	}
	c.ended()
	for name, lines := range map[string][]string{
		"two lengths":      {"Content-Length: 0", "Content-Length: 60", "", hidden},
		"a length of many": {"Content-Length: 0, 60", "", hidden},
		"a signed length":  {"Content-Length: +60", "", hidden},
		"another coding":   {"Transfer-Encoding: xchunked", "", hidden},
		"two codings":      {"Transfer-Encoding: chunked", "Transfer-Encoding: identity", "", "0", "", hidden},
		"a blank":          {"Transfer-Encoding : chunked", "", "0", "", hidden},
		"no name":          {": x", "", hidden},
		"a bad chunk":      {"Transfer-Encoding: chunked", "", "0x3", "abc", "0", "", hidden},
		"two hosts":        {"Host: docs.models.internal", "", hidden},
	} {
		c := w.wire(t)
		c.say(append([]string{"POST /chat/v1/a HTTP/1.1", "Host: HOST"}, lines...)...)
		got := c.hear("POST")
		if got.status/100 != 4 && got.status/100 != 5 {
			t.Errorf("%s: %+v", name, got)
		}
		if rest, _ := io.ReadAll(c.Reader); len(rest) > 0 { // the connection may be reset
			t.Errorf("%s: then %q", name, rest)
		}
	}
}

func TestExpectContinue(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		c := w.wire(t)
		c.say("POST /chat/v1/files HTTP/1.1", "Host: HOST", "Content-Length: 4", "Expect: 100-continue")
		if got := c.hear("POST"); got.status != 100 {
			t.Fatalf("got %+v", got)
		}
		if _, err := io.WriteString(c.Conn, "body"); err != nil {
			t.Fatal(err)
		}
		// Both the gateway and the forwarder may have said so (RFC 9110, 15.2: as often as they like).
		for next, err := c.Peek(len("HTTP/1.1 100")); string(next) == "HTTP/1.1 100"; next, err = c.Peek(len("HTTP/1.1 100")) {
			if c.hear("POST"); err != nil {
				t.Fatal(err)
			}
		}
		if a := c.seen("POST"); a.Body != "body" {
			t.Errorf("the gateway saw %+v", a)
		}

		// Who is refused need not send what he would have sent.
		w.handle(func(rw http.ResponseWriter, _ *http.Request) { http.Error(rw, "no", http.StatusForbidden) })
		c = w.wire(t)
		c.say("POST /chat/v1/files HTTP/1.1", "Host: HOST", "Content-Length: 1000000000", "Expect: 100-continue")
		if got := c.hear("POST"); got.status != 403 || got.body != "no\n" {
			t.Errorf("got %+v", got)
		}
		c.ended()
	})
}

func TestHTTP10(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		c := w.wire(t)
		c.say("GET /chat/v1/models HTTP/1.0", "Host: HOST")
		if a := c.seen("GET"); a.Caller != "spiffe://example.org/me" {
			t.Errorf("got %+v", a)
		}
		c.ended()
		c = w.wire(t)
		c.say("POST /chat/v1/a HTTP/1.0", "Host: HOST", "Connection: keep-alive", "Content-Length: 3", "", "abcGET /docs/v1/b HTTP/1.0", "Host: HOST")
		if a := c.seen("POST"); a.Body != "abc" {
			t.Errorf("got %+v", a)
		}
		if a := c.seen("GET"); a.URI != "/v1/b" {
			t.Errorf("got %+v", a)
		}
		c.ended()

		// It has no Host to be known by, where that matters.
		c = w.wire(t)
		c.say("GET /chat/v1/models HTTP/1.0")
		if got := c.hear("GET"); (got.status == 200) != (w.socket != "") || w.socket == "" && !strings.Contains(got.body, "not_an_application") {
			t.Errorf("got %+v", got)
		}

		// It knows no chunks: what is streamed ends with the connection.
		sent := make(chan struct{})
		w.handle(func(rw http.ResponseWriter, _ *http.Request) {
			io.WriteString(rw, "data: 1\n\n")
			rw.(http.Flusher).Flush()
			<-sent
			io.WriteString(rw, "data: 2\n\n")
		})
		c = w.wire(t)
		c.say("GET /chat/v1/events HTTP/1.0", "Host: HOST")
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		first := make([]byte, len("data: 1\n\n"))
		if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "data: 1\n\n" || len(resp.TransferEncoding) > 0 {
			t.Errorf("%q, %v, %q", first, err, resp.TransferEncoding)
		}
		close(sent)
		if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != "data: 2\n\n" {
			t.Errorf("%q, %v", rest, err)
		}
	})
}

func TestPipelined(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		c := w.wire(t)
		c.say("GET /chat/v1/1 HTTP/1.1", "Host: HOST", "",
			"POST /docs/v1/2 HTTP/1.1", "Host: HOST", "Content-Length: 3", "",
			"twoGET /none/v1/3 HTTP/1.1", "Host: HOST", "",
			"POST /chat/v1/4 HTTP/1.1", "Host: HOST", "Transfer-Encoding: chunked", "", "4", "four", "0", "",
			"GET /chat/v1/5 HTTP/1.1", "Host: HOST", "Connection: close")
		for i, want := range []string{"chat GET /v1/1 ", "docs POST /v1/2 two", "", "chat POST /v1/4 four", "chat GET /v1/5 "} {
			if want == "" {
				if got := c.hear("GET"); got.status != 404 {
					t.Errorf("%d: %+v", i, got)
				}
				continue
			}
			a := c.seen("GET")
			if got := fmt.Sprint(strings.TrimSuffix(a.SNI, ".models.internal"), " ", a.Method, " ", a.URI, " ", a.Body); got != want {
				t.Errorf("%d: the gateway saw %q", i, got)
			}
		}
		c.ended()
	})
}

func TestHead(t *testing.T) {
	w := mine(t, "tcp")
	w.handle(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Length", "12345")
		rw.Header().Set("X-Method", r.Method)
	})
	c := w.wire(t)
	for range 2 { // the connection goes on
		c.say("HEAD /chat/v1/models HTTP/1.1", "Host: HOST")
		if got := c.hear("HEAD"); got.status != 200 || got.length != 12345 || got.body != "" || got.header.Get("X-Method") != "HEAD" {
			t.Errorf("got %+v", got)
		}
	}
	c.say("HEAD /none/v1/models HTTP/1.1", "Host: HOST")
	if got := c.hear("HEAD"); got.status != 404 || got.body != "" {
		t.Errorf("got %+v", got)
	}
	c.say("HEAD /chat/v1/models HTTP/1.1", "Host: HOST", "Connection: close")
	c.hear("HEAD")
	c.ended()
}

func TestHugeHeaders(t *testing.T) {
	w := mine(t, "tcp")
	long := func(n int) string { return "X-Long: " + strings.Repeat("a", n) }
	c := w.wire(t)
	c.say("GET /chat/v1/models HTTP/1.1", "Host: HOST", long(60<<10))
	if a := c.seen("GET"); len(a.Header.Get("X-Long")) != 60<<10 {
		t.Error("a long header got lost")
	}
	w.handle(func(http.ResponseWriter, *http.Request) { t.Error("the gateway was asked") })
	for name, lines := range map[string][]string{
		"long":      {long(100 << 10)},
		"many":      slices.Repeat([]string{long(90)}, 1000),
		"long path": {"X: y"},
	} {
		path := "/chat/v1/models"
		if name == "long path" {
			path += strings.Repeat("/a", 50<<10)
		}
		c := w.wire(t)
		c.say(append([]string{"GET " + path + " HTTP/1.1", "Host: HOST"}, lines...)...)
		if got := c.hear("GET"); got.status != 431 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	w.handle(func(rw http.ResponseWriter, _ *http.Request) { rw.Header().Set("X-Long", strings.Repeat("a", 300<<10)) })
	if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.status != 502 || p.code != "gateway_error" {
		t.Errorf("got %+v", p)
	}
}

// counted is so many bytes that can be told from others.
func counted(n int64) io.Reader {
	return io.LimitReader(readerFunc(func(p []byte) (int, error) {
		for i := range p {
			p[i] = byte(i * 7)
		}
		return len(p), nil
	}), n)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// sum reads all.
func sum(r io.Reader) (n int64, digest [32]byte, err error) {
	h := sha256.New()
	n, err = io.Copy(h, r)
	return n, [32]byte(h.Sum(nil)), err
}

func TestLargeBodies(t *testing.T) {
	const size = 50 << 20
	type received struct {
		n      int64
		digest [32]byte
	}
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		got := make(chan received, 1)
		w.handle(func(rw http.ResponseWriter, r *http.Request) {
			h := sha256.New()
			up, err := io.Copy(h, r.Body)
			if err != nil {
				t.Error(err)
			}
			got <- received{up, [32]byte(h.Sum(nil))}
			h.Reset()
			rw.Header().Set("Trailer", "X-Digest")
			if _, err := io.Copy(io.MultiWriter(rw, h), counted(size)); err != nil {
				t.Error(err)
			}
			rw.Header().Set("X-Digest", fmt.Sprintf("%x", h.Sum(nil)))
		})
		for _, length := range []int64{-1, size} {
			sent := sha256.New()
			req, err := http.NewRequestWithContext(t.Context(), "POST", w.base+"/chat/v1/files", io.TeeReader(counted(size), sent))
			if err != nil {
				t.Fatal(err)
			}
			req.ContentLength = length
			resp, err := w.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			n, digest, err := sum(resp.Body)
			resp.Body.Close()
			if err != nil || n != size || resp.Trailer.Get("X-Digest") != fmt.Sprintf("%x", digest) {
				t.Errorf("the answer has %d bytes, %v, %v", n, err, resp.Trailer)
			}
			if r := <-got; r.n != size || r.digest != [32]byte(sent.Sum(nil)) {
				t.Errorf("the gateway got %d bytes", r.n)
			}
		}
	})
}

// TestRefusedEarly has the gateway answer before it has read what is sent, as for a body that is too large.
func TestRefusedEarly(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		w.handle(func(rw http.ResponseWriter, r *http.Request) {
			_, _ = r.Body.Read(make([]byte, 1))
			http.Error(rw, "too large", http.StatusRequestEntityTooLarge)
		})
		for range 5 {
			resp, err := w.client.Post(w.base+"/chat/v1/files", "application/octet-stream", counted(50<<20))
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != 413 || string(body) != "too large\n" {
				t.Errorf("%s %q, %v", resp.Status, body, err)
			}
		}
	})
}

// TestCallerVanishes has a caller go away in the middle of an answer.
func TestCallerVanishes(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		ended := make(chan string)
		w.handle(func(rw http.ResponseWriter, r *http.Request) {
			io.WriteString(rw, "data: 1\n\n")
			rw.(http.Flusher).Flush()
			<-r.Context().Done()
			ended <- r.RemoteAddr
		})
		c := w.wire(t)
		c.say("GET /chat/v1/events HTTP/1.1", "Host: HOST")
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.ReadFull(resp.Body, make([]byte, 9)); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		w.wait(t, <-ended) // and the connection is nobody else's afterwards
	})
}

// TestSlowAnswer has each part of an answer arrive before the next is sent, also where its length is known.
func TestSlowAnswer(t *testing.T) {
	w := mine(t, "tcp")
	arrived := make(chan struct{})
	w.handle(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		rw.Header().Set("Content-Length", "12")
		for range 3 {
			io.WriteString(rw, "part")
			rw.(http.Flusher).Flush()
			select {
			case <-arrived:
			case <-r.Context().Done():
				return
			}
		}
	})
	c := w.wire(t)
	c.say("GET /chat/v1/slow HTTP/1.1", "Host: HOST")
	resp, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for range 3 {
		part := make([]byte, 4)
		if _, err := io.ReadFull(resp.Body, part); err != nil || string(part) != "part" {
			t.Fatalf("%q, %v", part, err)
		}
		arrived <- struct{}{}
	}
}

// What belongs to one connection ends with it, in both directions.
func TestHopByHop(t *testing.T) {
	w := mine(t, "tcp")
	hop := []string{"Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Upgrade", "X-Hop"}
	w.handle(func(rw http.ResponseWriter, r *http.Request) {
		for _, name := range hop {
			if v := r.Header.Values(name); v != nil {
				t.Errorf("the gateway got %s: %q", name, v)
			}
			rw.Header().Set(name, "x")
		}
		if r.Header.Get("X-End") != "kept" || r.Header["X-Forwarded-For"] != nil {
			t.Errorf("the gateway got %v", r.Header)
		}
		rw.Header().Set("Connection", "X-Hop")
		rw.Header().Set("X-End", "kept")
		rw.Header().Set("Set-Cookie", "a=b")
		io.WriteString(rw, "body")
	})
	c := w.wire(t)
	lines := []string{"GET /chat/v1/models HTTP/1.1", "Host: HOST", "Connection: x-hop", "Connection: keep-alive", "X-End: kept", "X-Forwarded-For: 10.0.0.1"}
	for _, name := range hop {
		lines = append(lines, name+": x")
	}
	for range 2 {
		c.say(lines...)
		got := c.hear("GET")
		for _, name := range hop {
			if v := got.header.Values(name); v != nil {
				t.Errorf("the caller got %s: %q", name, v)
			}
		}
		if got.header.Get("X-End") != "kept" || got.header.Get("Set-Cookie") != "a=b" || got.body != "body" {
			t.Errorf("the caller got %+v", got)
		}
	}
}

// TestGatewayMoves has an endpoint go to another gateway, while a request is under way at the one before.
func TestGatewayMoves(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		other := startGateway(t, w.authority)
		before := w.ask(t)
		stream, events := w.stream(t)
		w.move(other.target)
		if a := w.ask(t); a.Caller != before.Caller || a.Serial != before.Serial {
			t.Errorf("got %+v", a)
		}
		moved := other.target
		moved.IDs = []spiffeid.ID{spiffeid.RequireFromString("spiffe://example.org/other")}
		w.move(moved)
		if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.code != "gateway_not_trusted" {
			t.Errorf("over a connection from before: %+v", p)
		}
		moved = other.target
		moved.ServerName = "other.models.internal"
		w.move(moved)
		if a := w.ask(t); a.SNI != "other.models.internal" || a.Host != a.SNI {
			t.Errorf("got %+v", a)
		}
		events <- "still here"
		close(events)
		if b, err := io.ReadAll(stream); err != nil || string(b) != "still here" {
			t.Errorf("the stream brought %q, %v", b, err)
		}
	})
}

// TestNextGateway has some of the gateways of an endpoint not be there, or not be who they should be.
func TestNextGateway(t *testing.T) {
	w := mine(t, "tcp")
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	nobody, good := closed.Addr().String(), w.where()
	stranger := startGateway(t, identitytest.Authority(t)).target.Addresses[0]
	to := func(addresses ...string) {
		next := good
		next.Addresses = addresses
		w.move(next)
	}
	for _, addresses := range [][]string{{nobody, good.Addresses[0]}, {stranger, nobody, good.Addresses[0]}, {good.Addresses[0], nobody}} {
		to(addresses...)
		w.ask(t)
	}
	to(nobody, nobody)
	if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.status != 503 || p.code != "gateway_unreachable" || strings.Contains(p.message, "\n") {
		t.Errorf("nobody: %+v", p)
	}
	to(nobody, stranger)
	if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.code != "gateway_not_trusted" {
		t.Errorf("a stranger: %+v", p)
	}
	to()
	if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.status != 503 || p.code != "gateway_unknown" {
		t.Errorf("none: %+v", p)
	}
}

// TestGatewayRenews has the agent's bundle be newer than the gateway's certificate, for three handshakes.
func TestGatewayRenews(t *testing.T) {
	w := mine(t, "tcp")
	renews, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer renews.Close()
	before, after := startGateway(t, identitytest.Authority(t)).target.Addresses[0], w.where()
	go func() {
		for n := 0; ; n++ {
			in, err := renews.Accept()
			if err != nil {
				return
			}
			to := after.Addresses[0]
			if n < 3 {
				to = before
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			go func() { _, _ = io.Copy(out, in); out.Close() }()
			go func() { _, _ = io.Copy(in, out); in.Close() }()
		}
	}()
	moved := after
	moved.Addresses = []string{renews.Addr().String()}
	w.move(moved)
	w.ask(t)
}

// TestSilentGateway has one accept connections and say nothing: it costs its share of the time, once.
func TestSilentGateway(t *testing.T) {
	w := mine(t, "tcp")
	w.ask(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	w.server.mu.Lock()
	var identity *identity
	for _, s := range w.sessions {
		identity = s.identity.Load()
	}
	w.server.mu.Unlock()
	good := w.where()
	good.Addresses = []string{silent.Addr().String(), good.Addresses[0]}
	d := identity.dialer(good)
	d.timeout = 500 * time.Millisecond
	var asked atomic.Int32
	go func() {
		for {
			c, err := silent.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			asked.Add(1)
		}
	}()
	for range 2 {
		c, err := d.dial(t.Context(), "tcp", "")
		if err != nil {
			t.Fatal(err)
		}
		if c.RemoteAddr().String() != good.Addresses[1] {
			t.Errorf("connected to %s", c.RemoteAddr())
		}
		c.Close()
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the silent one was asked %d times", n)
	}
}
