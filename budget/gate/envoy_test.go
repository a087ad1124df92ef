package gate_test

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"sallyport.dev/budget"
	"sallyport.dev/budget/gate"
	"sallyport.dev/budget/local"
	"sallyport.dev/controlplane/gateway"
)

var (
	//go:embed testdata/envoy.yaml
	envoyText string
	//go:embed testdata/extract.lua
	scriptText string
)

// rules are the grants of the tests: the value of x-grant, and the name of the rule.
var rules = map[string]string{
	"free":   "grant/free",
	"few":    budget.Rule("few", budget.Terms{Requests: budget.Limit{Max: 3, Per: budget.Month}}),
	"often":  budget.Rule("often", budget.Terms{Requests: budget.Limit{Max: 1, Per: budget.Minute}}),
	"tokens": budget.Rule("tokens", budget.Terms{Tokens: budget.Limit{Max: 100_000, Per: budget.Month}}),
	"both": budget.Rule("both", budget.Terms{Requests: budget.Limit{Max: 1000, Per: budget.Month},
		Tokens: budget.Limit{Max: 1000, Per: budget.Month}, Shared: true}),
	"open":   budget.Rule("open", budget.Terms{Requests: budget.Limit{Max: 3, Per: budget.Month}, Open: true}),
	"broken": "grant/broken requests=many",
}

// lab is an Envoy, the gate that it asks, and the backend behind it.
type lab struct {
	t       *testing.T
	url     string
	envoy   *exec.Cmd
	socket  string
	backend *httptest.Server
	served  chan string // the paths that the backend was asked for
}

// serve has a gate answer at the socket. stop ends it at once.
func (l *lab) serve(counters gate.Counters) (g *gate.Gate, stop func()) {
	l.t.Helper()
	_ = os.Remove(l.socket)
	listener, err := net.Listen("unix", l.socket)
	if err != nil {
		l.t.Fatal(err)
	}
	server := grpc.NewServer()
	g = gate.New(counters, slog.New(slog.DiscardHandler))
	g.Register(server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener)
	}()
	stop = sync.OnceFunc(func() { server.Stop(); <-done })
	l.t.Cleanup(stop)
	return g, stop
}

func newLab(t *testing.T) *lab {
	t.Helper()
	binary, err := gateway.Find(t.Context(), os.Getenv("ENVOY"), "../../.parts/bin")
	if err != nil {
		t.Fatalf("these tests need Envoy %s (`make parts`, or set $ENVOY): %v", gateway.Version, err)
	}
	dir, err := os.MkdirTemp("/tmp", "sp") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{t: t, socket: filepath.Join(dir, "gate.sock"), served: make(chan string, 10_000)}
	l.backend = httptest.NewServer(http.HandlerFunc(l.answer))
	t.Cleanup(l.backend.Close)
	_, port, _ := net.SplitHostPort(l.backend.Listener.Addr().String())

	decisions := map[string]any{}
	for grant, rule := range rules {
		decisions[grant] = map[string]any{"action": map[string]any{"name": "decide", "typed_config": map[string]any{
			"@type": "type.googleapis.com/envoy.config.rbac.v3.Action", "name": rule, "action": "ALLOW"}}}
	}
	admin := filepath.Join(dir, "admin.sock")
	text := strings.NewReplacer("ADMIN", admin, "GATE", l.socket, "BACKEND", port, "LUA", jsonText(t, scriptText),
		"RULES", jsonText(t, decisions)).Replace(envoyText)
	config := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	l.start(binary, config)

	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", admin)
	}}}
	until(t, "Envoy listens", func() bool {
		resp, err := client.Get("http://admin/listeners?format=json")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		var at struct {
			Statuses []struct {
				Address struct {
					Socket struct {
						Port int `json:"port_value"`
					} `json:"socket_address"`
				} `json:"local_address"`
			} `json:"listener_statuses"`
		}
		if json.NewDecoder(resp.Body).Decode(&at) != nil || len(at.Statuses) == 0 || at.Statuses[0].Address.Socket.Port == 0 {
			return false
		}
		l.url = fmt.Sprintf("http://127.0.0.1:%d", at.Statuses[0].Address.Socket.Port)
		return true
	})
	return l
}

// start runs Envoy until the test ends. It dies with the thread that started it.
func (l *lab) start(binary, config string) {
	l.t.Helper()
	l.envoy = exec.Command(binary, "--config-path", config, "--use-dynamic-base-id", "--log-level", "error", "--concurrency", "1")
	l.envoy.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	said := &bytes.Buffer{}
	l.envoy.Stderr = said
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		started <- l.envoy.Start()
		_ = l.envoy.Wait()
		close(ended)
	}()
	if err := <-started; err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = l.envoy.Process.Kill()
		<-ended
		if l.t.Failed() {
			l.t.Log(said)
		}
	})
}

func jsonText(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// answer is a model server. What it does is in the path.
func (l *lab) answer(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	select {
	case l.served <- r.URL.Path:
	default:
	}
	kind, n, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	count, _ := strconv.Atoi(n)
	switch kind {
	case "usage":
		w.Header().Set("x-ratelimit-limit-tokens", "the backend's own")
		fmt.Fprintf(w, `{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":%d,"total_tokens":0}}`, count)
	case "silent": // about its usage
		fmt.Fprint(w, strings.Repeat("x", count))
	case "error":
		w.WriteHeader(count)
		fmt.Fprint(w, `{"error":{}}`)
	case "stream", "hang":
		w.Header().Set("content-type", "text/event-stream")
		for range count {
			fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}]}\n\n")
			w.(http.Flusher).Flush()
		}
		if kind == "hang" {
			<-r.Context().Done()
		}
	case "abort": // in the middle of a stream
		w.Header().Set("content-type", "text/event-stream")
		for range count {
			fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}]}\n\n")
			w.(http.Flusher).Flush()
		}
		panic(http.ErrAbortHandler)
	case "mute":
		<-r.Context().Done()
	}
}

// post asks for a path with a grant. More are names and values of headers.
func (l *lab) post(ctx context.Context, path, grant, body string, more ...string) (*http.Response, error) {
	return l.postBy(ctx, http.DefaultClient, path, grant, body, more...)
}

func (l *lab) postBy(ctx context.Context, client *http.Client, path, grant, body string, more ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.url+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("x-grant", grant)
	req.Header.Set("x-caller", "spiffe://example.org/app")
	for i := 0; i < len(more); i += 2 {
		req.Header.Set(more[i], more[i+1])
	}
	return client.Do(req)
}

// ask is post, and reads the answer.
func (l *lab) ask(path, grant, body string, more ...string) (status int, header http.Header, answer string) {
	l.t.Helper()
	resp, err := l.post(l.t.Context(), path, grant, body, more...)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(text)
}

// until waits for a condition.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for tick := time.Tick(10 * time.Millisecond); !holds(); <-tick {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func openCounters(t *testing.T, path string) *local.Counters {
	t.Helper()
	c, err := local.Open(path, time.Now(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c
}

// usedOf is what a grant's account has used.
func usedOf(t *testing.T, c *local.Counters, grant string, unit budget.Unit) budget.Balance {
	t.Helper()
	all, err := c.Balances(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if string(b.Grant) == grant && b.Unit == unit {
			return b
		}
	}
	return budget.Balance{}
}

func TestRequests(t *testing.T) {
	l := newLab(t)
	l.serve(openCounters(t, filepath.Join(t.TempDir(), "budgets")))
	for i := range 3 {
		status, header, _ := l.ask("/usage/1", "few", "hello")
		if want := strconv.Itoa(2 - i); status != 200 || header.Get("x-ratelimit-remaining-requests") != want {
			t.Fatalf("request %d: %d %v", i, status, header)
		}
	}
	status, header, body := l.ask("/usage/1", "few", "hello")
	if status != 429 || header.Get("retry-after") == "" || header.Get("x-ratelimit-limit-requests") != "3" ||
		header.Get("x-ratelimit-remaining-requests") != "0" || header.Get("x-should-retry") != "false" ||
		!strings.HasPrefix(header.Get("ratelimit"), `"requests";r=0;t=`) || !strings.HasPrefix(header.Get("ratelimit-policy"), `"requests";q=3;w=`) {
		t.Errorf("over the budget: %d %v", status, header)
	}
	var said struct {
		Error struct{ Message, Type, Code string }
	}
	if err := json.Unmarshal([]byte(body), &said); err != nil || said.Error.Code != "rate_limit_exceeded" ||
		!strings.HasPrefix(said.Error.Message, "grant/few has 3 requests a month for a caller: 3 are taken") {
		t.Errorf("over the budget: %s (%v)", body, err)
	}
	if status, _, _ := l.ask("/usage/1", "few", "hello", "x-caller", "spiffe://example.org/other"); status != 200 {
		t.Errorf("another caller: %d", status)
	}
	for range 5 {
		if status, header, _ := l.ask("/usage/1", "free", "hello"); status != 200 || header.Get("x-ratelimit-limit-requests") != "" {
			t.Errorf("without a budget: %d %v", status, header)
		}
	}
	for grant, want := range map[string]int{"broken": 500, "nobody": 403} {
		if status, _, _ := l.ask("/usage/1", grant, "hello"); status != want {
			t.Errorf("%s: %d", grant, status)
		}
	}
	if status, _, _ := l.ask("/usage/1", "few", "hello", "x-caller", ""); status != 500 {
		t.Errorf("without a caller: %d", status)
	}
	// A window that is over soon is worth waiting for.
	var last http.Header
	until(t, "the minute's budget is used", func() bool {
		status, last, _ = l.ask("/usage/1", "often", "hello")
		return status == 429
	})
	if n, err := strconv.Atoi(last.Get("retry-after")); err != nil || n < 1 || n > 60 || last.Get("x-should-retry") != "" {
		t.Errorf("a minute's budget: %v", last)
	}
}

// HTTP/2, and gRPC, which has its own words.
func TestProtocols(t *testing.T) {
	l := newLab(t)
	l.serve(openCounters(t, filepath.Join(t.TempDir(), "budgets")))
	transport := &http.Transport{Protocols: &http.Protocols{}}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	type answer struct {
		status, proto int
		header        http.Header
		body          string
	}
	ask := func(path, contentType string) answer {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, l.url+path, strings.NewReader(strings.Repeat("x", 100_000)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"X-Grant": {"few"}, "X-Caller": {"spiffe://example.org/app"}, "Content-Type": {contentType}, "Te": {"trailers"}}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer{resp.StatusCode, resp.ProtoMajor, resp.Header, string(text)}
	}
	for range 3 {
		ask("/usage/1", "application/json")
	}
	if a := ask("/usage/1", "application/json"); a.status != 429 || a.proto != 2 || !strings.Contains(a.body, "rate_limit_exceeded") || a.header.Get("retry-after") == "" {
		t.Errorf("HTTP/2: %+v", a)
	}
	if a := ask("/package.Service/Method", "application/grpc"); a.status != 200 || a.header.Get("grpc-status") != "8" || a.header.Get("retry-after") == "" {
		t.Errorf("gRPC: %+v", a)
	}
}

func TestTokens(t *testing.T) {
	l := newLab(t)
	counters := openCounters(t, filepath.Join(t.TempDir(), "budgets"))
	l.serve(counters)
	body := strings.Repeat("x", 100)
	before := int64(0)
	for _, c := range []struct {
		path, max string
		more      []string
		want      int64
	}{
		{"/usage/7", "50", nil, 17},                                      // what was reported
		{"/usage/500", "50", nil, 510},                                   // even if it is more
		{"/silent/20", "50", nil, 120},                                   // what can have been sent
		{"/silent/20000", "50", nil, 150},                                // and no more than the request allows
		{"/silent/20000", "", nil, 20_100},                               // if it does
		{"/silent/20000", "50", []string{"x-answers", "3"}, 250},         // of each answer
		{"/error/500", "50", nil, 0},                                     // nothing came of it
		{"/stream/20", "50", nil, 120},                                   // an event is a token
		{"/stream/20", "", nil, 120},                                     // here too
		{"/embeddings", "50", nil, 100},                                  // an answer without tokens
		{"/stream/20", "not a number", nil, 120},                         // says nothing
		{"/stream/20", "-1", nil, 120},                                   // nor this
		{"/stream/20", "50", []string{"x-answers", "-1"}, 120},           // nor this
		{"/stream/20", "1", []string{"x-answers", "1"}, 101},             // can't be
		{"/usage/7", "50", []string{"transfer-encoding", "chunked"}, 17}, // whatever the length is sent as
	} {
		status, header, answer := l.ask(c.path, "tokens", body, append([]string{"x-max", c.max}, c.more...)...)
		if status != 200 && status != 500 {
			t.Fatalf("%s: %d %v %s", c.path, status, header, answer)
		}
		if got := header.Get("x-ratelimit-limit-tokens"); got != "100000" {
			t.Errorf("%s: limit %q", c.path, got)
		}
		var b budget.Balance
		until(t, c.path+" is settled", func() bool { b = usedOf(t, counters, "tokens", budget.Tokens); return b.Held == 0 })
		if b.Used-before != c.want {
			t.Errorf("%s with max_tokens %q: %d tokens, want %d", c.path, c.max, b.Used-before, c.want)
		}
		before = b.Used
	}
	// One account for all, and two units at once: a request that has too many tokens takes no request either.
	status, header, text := l.ask("/usage/7", "both", body, "x-max", "2000", "x-caller", "spiffe://example.org/a")
	if status != 429 || header.Get("retry-after") != "" || header.Get("x-should-retry") != "false" || !strings.Contains(text, "state a smaller max_tokens") {
		t.Errorf("more than there ever is: %d %v %s", status, header, text)
	}
	if status, header, text := l.ask("/usage/790", "both", body, "x-max", "800", "x-caller", "spiffe://example.org/b"); status != 200 || header.Get("x-ratelimit-remaining-requests") != "999" {
		t.Errorf("%d %v %s", status, header, text)
	}
	until(t, "it is settled", func() bool { return usedOf(t, counters, "both", budget.Tokens).Held == 0 })
	if status, header, text := l.ask("/usage/7", "both", body, "x-max", "200"); status != 429 || header.Get("x-ratelimit-remaining-tokens") != "200" {
		t.Errorf("%d %v %s", status, header, text)
	}
}

// What is cut settles by what was seen, and what nobody tells about stays taken.
func TestCut(t *testing.T) {
	l := newLab(t)
	path := filepath.Join(t.TempDir(), "budgets")
	counters := openCounters(t, path)
	l.serve(counters)
	body := strings.Repeat("x", 100)
	transport := &http.Transport{Protocols: &http.Protocols{}}
	transport.Protocols.SetUnencryptedHTTP2(true)
	client := &http.Client{Transport: transport}
	defer transport.CloseIdleConnections()
	cut := func(path, maximum string, lines int) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if lines == 0 {
			go func() { <-l.served; cancel() }()
			if resp, err := l.postBy(ctx, client, path, "tokens", body, "x-max", maximum); err == nil {
				resp.Body.Close()
				t.Errorf("%s: an answer", path)
			}
			return
		}
		resp, err := l.postBy(ctx, client, path, "tokens", body, "x-max", maximum)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		events := bufio.NewScanner(resp.Body)
		for range 2 * lines {
			if !events.Scan() {
				t.Fatal(events.Err())
			}
		}
		<-l.served
	}
	settled := func() int64 {
		var b budget.Balance
		until(t, "it is settled", func() bool { b = usedOf(t, counters, "tokens", budget.Tokens); return b.Held == 0 && b.Used > 0 })
		return b.Used
	}
	var before int64
	for _, c := range []struct {
		what, path string
		lines      int
		want       int64
	}{
		{"after 30 events", "/hang/30", 30, 130},
		{"before there was an answer", "/mute", 0, 600},
		{"by the backend", "/abort/20", 20, 120},
	} {
		for _, client = range []*http.Client{{Transport: transport}, {Transport: &http.Transport{DisableKeepAlives: true}}} {
			cut(c.path, "500", c.lines)
			var after int64
			until(t, "it is settled", func() bool { after = settled(); return after != before })
			if after-before != c.want {
				t.Errorf("cut %s: %d, want %d", c.what, after-before, c.want)
			}
			before = after
		}
	}

	// Envoy ends at once.
	resp, err := l.post(t.Context(), "/hang/3", "tokens", body, "x-max", "500")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	<-l.served
	_ = l.envoy.Process.Kill()
	_, _ = io.Copy(io.Discard, resp.Body)
	if b := usedOf(t, counters, "tokens", budget.Tokens); b.Used != before+600 {
		t.Errorf("Envoy was killed: %d, want %d", b.Used, before+600)
	}
	again, err := local.ReadFile(path, time.Now())
	if err != nil || len(again) != 1 || again[0].Used != before+600 {
		t.Errorf("in the file: %v %v", again, err)
	}
}

// The OpenAI SDK comes again when it is told that there will be more soon, and gives up when not.
func TestSDK(t *testing.T) {
	l := newLab(t)
	g, _ := l.serve(openCounters(t, filepath.Join(t.TempDir(), "budgets")))
	run := func(grant string) string {
		out, _ := exec.CommandContext(t.Context(), "../../.parts/venv/bin/python", "testdata/openai_client.py", l.url, grant).CombinedOutput()
		return strings.TrimSpace(string(out)) // which shows an error, too
	}
	for range 3 {
		l.ask("/usage/7", "few", "hello", "x-caller", "spiffe://example.org/sdk")
	}
	if said := run("few"); !strings.HasPrefix(said, "rate_limit_exceeded") || g.Stats().Limited != 1 {
		t.Errorf("%s after %d denials", said, g.Stats().Limited)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	resp, err := l.post(ctx, "/hang/1", "both", strings.Repeat("x", 100), "x-max", "800")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	said := make(chan string, 1)
	go func() { said <- run("both") }()
	until(t, "the SDK has been told to wait", func() bool { return g.Stats().Limited == 2 })
	cancel()
	if said := <-said; said != "answered" {
		t.Errorf("when others gave back what they held: %s", said)
	}
}

// hanging counters answer when it is too late.
type hanging struct{ *local.Counters }

func (hanging) Reserve(ctx context.Context, _ time.Time, _ []budget.Charge) (budget.Answer, error) {
	<-ctx.Done()
	return budget.Answer{Allowed: true}, ctx.Err()
}

// failing counters can't be asked.
type failing struct{ *local.Counters }

func (failing) Reserve(context.Context, time.Time, []budget.Charge) (budget.Answer, error) {
	return budget.Answer{Allowed: true}, io.ErrUnexpectedEOF
}

func TestAway(t *testing.T) {
	l := newLab(t)
	counters := openCounters(t, filepath.Join(t.TempDir(), "budgets"))
	expect := func(what, grant string, want int) {
		t.Helper()
		if status, _, body := l.ask("/usage/1", grant, "hello"); status != want || status == 503 && !strings.Contains(body, "budget_unavailable") {
			t.Errorf("%s, grant %s: %d %s", what, grant, status, body)
		}
	}
	expect("no gate", "few", 503)
	expect("no gate", "open", 503)
	expect("no gate", "free", 200)
	_, stop := l.serve(counters)
	until(t, "the gate is asked", func() bool { status, _, _ := l.ask("/usage/1", "tokens", "hello"); return status == 200 })
	expect("a gate", "few", 200)
	expect("a gate", "few", 200)
	stop()
	expect("the gate has ended", "few", 503)
	_, stop = l.serve(failing{counters})
	until(t, "the gate is asked", func() bool { status, _, _ := l.ask("/usage/1", "open", "hello"); return status == 200 })
	expect("no counters", "few", 503)
	for range 5 {
		expect("no counters", "open", 200)
	}
	stop()
	_, stop = l.serve(hanging{counters})
	began := time.Now()
	expect("a gate that hangs", "few", 503)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a gate that hangs: %v", took)
	}
	stop()
	l.serve(counters)
	until(t, "the gate is asked", func() bool { status, _, _ := l.ask("/usage/1", "tokens", "hello"); return status == 200 })
	expect("a gate again", "few", 200)
	expect("a gate again", "few", 429)
}
