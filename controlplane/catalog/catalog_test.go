package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const documents = `
apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: docs}
spec:
  hostnames: [docs.internal]
  protocol: Chroma
  backends: [{name: chroma, addresses: ["%s"], tls: {mode: None}}]
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: team-reads}
spec:
  from: [{spiffeID: spiffe://example.org/reader}]
  to: [{endpoint: docs, operations: [Read], resources: ["public-*"]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: owner}
spec:
  from: [{spiffeID: spiffe://example.org/owner}]
  to: [{endpoint: docs, operations: [Admin], resources: ["*"]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: own}
spec:
  from: [{spiffeID: spiffe://example.org/half}]
  to: [{endpoint: docs, operations: [Admin], resources: ["public-*"]}]
`

// chroma starts the real server and returns its address.
func chroma(t *testing.T) string {
	t.Helper()
	program, err := filepath.Abs("../../.parts/venv/bin/chroma")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("this test runs a real Chroma: %v; `make parts` fetches it", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	host, port, _ := net.SplitHostPort(address)
	cmd := exec.Command(program, "run", "--host", host, "--port", port, "--path", t.TempDir())
	cmd.Env = append(os.Environ(), "ANONYMIZED_TELEMETRY=False")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	await(t, "chroma", func() bool {
		resp, err := http.Get("http://" + address + "/api/v2/heartbeat")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return address
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// fixture is a catalogue before a real Chroma, behind a stand-in for the gateway's headers.
type fixture struct {
	t       *testing.T
	address string
	catalog *Catalog
	told    atomic.Pointer[envoy.Names] // what Learned was told last
}

func newFixture(t *testing.T, address string) *fixture {
	f := &fixture{t: t, address: address}
	cfg, problems := v1alpha1.Assemble(v1alpha1.Decode("test.yaml", fmt.Appendf(nil, documents, address)), v1alpha1.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Gateway:     &segment.Gateway{Name: "local", ID: spiffeid.RequireFromString("spiffe://example.org/gateway/local"), SVIDTTL: time.Hour}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	f.catalog = &Catalog{Every: 50 * time.Millisecond, Log: slog.New(slog.DiscardHandler), InForce: func(context.Context) error { return nil }}
	f.catalog.Learned = func(n envoy.Names) { // the pipeline, as far as it matters here
		f.told.Store(&n)
		g, err := controlplane.Generate(cfg, envoy.Learned{Names: n}, time.Now())
		if err != nil {
			t.Error(err)
			return
		}
		go func() { _ = f.catalog.Publish(context.Background(), g) }()
	}
	g, err := controlplane.Generate(cfg, envoy.Learned{}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := f.catalog.Publish(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.catalog.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	return f
}

func (f *fixture) names() map[string]string {
	if n := f.told.Load(); n != nil {
		return (*n)["docs"]
	}
	return nil
}

const database = "/api/v2/tenants/default_tenant/databases/default_database"

// ask asks as a gateway does that has let the request through.
func (f *fixture) ask(caller, route, method, path, body string) (int, string) {
	f.t.Helper()
	r := httptest.NewRequest(method, database+path, strings.NewReader(body))
	r.Header.Set(envoy.CallerHeader, "spiffe://example.org/"+caller)
	r.Header.Set(envoy.EndpointHeader, "docs")
	r.Header.Set(envoy.RouteHeader, route)
	w := httptest.NewRecorder()
	f.catalog.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func (f *fixture) create(name string) string {
	f.t.Helper()
	code, body := f.ask("owner", "create-collection", "POST", "/collections", `{"name":"`+name+`"}`)
	var col collection
	if err := json.Unmarshal([]byte(body), &col); err != nil || code != 200 {
		f.t.Fatalf("create %s: %d %s", name, code, body)
	}
	return col.ID
}

// behind asks the store itself, past gateway and catalogue.
func (f *fixture) behind(method, path, body string) {
	f.t.Helper()
	req, err := http.NewRequest(method, "http://"+f.address+database+path, bytes.NewReader([]byte(body)))
	if err != nil {
		f.t.Fatal(err)
	}
	req.Header.Set("content-type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		f.t.Fatalf("%s %s: %s", method, path, resp.Status)
	}
}

func TestNamesStayFresh(t *testing.T) {
	f := newFixture(t, chroma(t))
	id := f.create("public-one")
	if f.names()[id] != "public-one" {
		t.Fatalf("a client knows %s before the gateways do: %v", id, f.names())
	}

	// Deleted and made again behind our back: the old UUID is nobody's, the new one is known.
	f.behind("DELETE", "/collections/public-one", "")
	f.behind("POST", "/collections", `{"name":"public-one"}`)
	await(t, "the new UUID", func() bool {
		n := f.names()
		return n[id] == "" && len(n) == 1
	})
	var again string
	for again = range f.names() {
	}
	if again == id || f.names()[again] != "public-one" {
		t.Fatalf("names are %v", f.names())
	}

	// Renamed behind our back: the UUID goes with the new name.
	f.behind("PUT", "/collections/"+again, `{"new_name":"secret-one"}`)
	await(t, "the new name", func() bool { return f.names()[again] == "secret-one" })

	// Deleted through the gateway: forgotten before the client hears of it.
	if code, body := f.ask("owner", "delete-collection", "DELETE", "/collections/secret-one", ""); code != 200 || len(f.names()) != 0 {
		t.Fatalf("%d %s, and names are %v", code, body, f.names())
	}
}

func TestListsAreFiltered(t *testing.T) {
	f := newFixture(t, chroma(t))
	for _, name := range []string{"public-one", "secret-one", "public-two", "secret-two", "public-three"} {
		f.create(name)
	}
	list := func(caller, query string) (names []string) {
		t.Helper()
		code, body := f.ask(caller, "list-collections", "GET", "/collections"+query, "")
		var all []collection
		if err := json.Unmarshal([]byte(body), &all); err != nil || code != 200 {
			t.Fatalf("%d %s", code, body)
		}
		for _, c := range all {
			names = append(names, c.Name)
		}
		return names
	}
	all := list("reader", "")
	slices.Sort(all)
	if !slices.Equal(all, []string{"public-one", "public-three", "public-two"}) {
		t.Errorf("reader sees %v", all)
	}
	if n := list("owner", ""); len(n) != 5 {
		t.Errorf("owner sees %v", n)
	}
	if n := list("stranger", ""); len(n) != 0 {
		t.Errorf("a stranger sees %v", n)
	}
	paged := append(list("reader", "?limit=2"), list("reader", "?limit=2&offset=2")...)
	slices.Sort(paged)
	if !slices.Equal(paged, all) {
		t.Errorf("by pages reader sees %v", paged)
	}
	if n := list("reader", "?offset=9"); len(n) != 0 {
		t.Errorf("behind the end reader sees %v", n)
	}
	if code, body := f.ask("reader", "count-collections", "GET", "/collections_count", ""); code != 200 || strings.TrimSpace(body) != "3" {
		t.Errorf("reader counts %d %s", code, body)
	}
}

// Whoever renames a collection must have the new name too, or could put his own in the place of another's.
func TestRename(t *testing.T) {
	f := newFixture(t, chroma(t))
	id := f.create("public-one")
	for _, body := range []string{
		`{"new_name":"secret-one"}`, `{"new_name":"public-two","new_name":"secret-one"}`, `{"new_name":5}`, `{"new_name":["public-two"]}`,
	} {
		if code, answer := f.ask("half", "modify-collection", "PUT", "/collections/"+id, body); code != http.StatusForbidden {
			t.Errorf("%s: %d %s", body, code, answer)
		}
	}
	for _, body := range []string{``, `[]`, `{"new_name":`} {
		if code, answer := f.ask("half", "modify-collection", "PUT", "/collections/"+id, body); code != http.StatusBadRequest {
			t.Errorf("%s: %d %s", body, code, answer)
		}
	}
	if code, answer := f.ask("half", "modify-collection", "PUT", "/collections/"+id, `{"new_name":"public-two"}`); code != 200 || f.names()[id] != "public-two" {
		t.Errorf("%d %s, and names are %v", code, answer, f.names())
	}
}

func TestNobodyButAGateway(t *testing.T) {
	f := newFixture(t, "127.0.0.1:1")
	r := httptest.NewRequest("GET", database+"/collections", nil)
	w := httptest.NewRecorder()
	f.catalog.ServeHTTP(w, r)
	if w.Code != http.StatusForbidden {
		t.Errorf("without a caller: %d", w.Code)
	}
	if code, _ := (&fixture{t: t, catalog: &Catalog{}}).ask("owner", "list-collections", "GET", "/collections", ""); code != http.StatusForbidden {
		t.Errorf("before the first generation: %d", code)
	}
	code, body := f.ask("owner", "list-collections", "GET", "/collections", "")
	if code != http.StatusServiceUnavailable || !strings.Contains(body, `"error":"InternalError"`) {
		t.Errorf("store down: %d %s", code, body)
	}
}

// slow is a way to a store on which answers to one request can be held back.
type slow struct {
	address string
	held    chan struct{} // receives once per answer that is held
	free    chan struct{} // and this lets it go
	holds   atomic.Value  // string: the method and path whose next answer is held
}

func newSlow(t *testing.T, address string) *slow {
	s := &slow{held: make(chan struct{}), free: make(chan struct{})}
	s.holds.Store("")
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address})
	proxy.ModifyResponse = func(r *http.Response) error {
		if what := r.Request.Method + " " + strings.TrimPrefix(r.Request.URL.Path, database); s.holds.CompareAndSwap(what, "") {
			body, err := io.ReadAll(r.Body) // the store has answered
			r.Body = io.NopCloser(bytes.NewReader(body))
			s.held <- struct{}{}
			<-s.free
			return err
		}
		return nil
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(server.Close)
	s.address = server.Listener.Addr().String()
	return s
}

// What a store has said before a change must not undo it, whenever it arrives.
func TestOlderAnswersUndoNothing(t *testing.T) {
	way := newSlow(t, chroma(t))
	f := newFixture(t, way.address)
	id := f.create("public-one")
	var wrong atomic.Value // a name that has been left behind, and was told since
	wrong.Store("")
	learned, left := f.catalog.Learned, atomic.Value{}
	left.Store("")
	f.catalog.mu.Lock()
	f.catalog.Learned = func(n envoy.Names) {
		if name := n["docs"][id]; name != "" && name == left.Load() {
			wrong.Store(name)
		}
		learned(n)
	}
	f.catalog.mu.Unlock()
	change := func(old, route, method, path, body string) {
		t.Helper()
		if code, answer := f.ask("owner", route, method, path, body); code != 200 {
			t.Fatalf("%s: %d %s", route, code, answer)
		}
		left.Store(old)
	}
	passed := func() { // the next list is under way only when the one before it has been taken
		t.Helper()
		way.free <- struct{}{}
		way.holds.Store("GET /collections")
		<-way.held
		way.free <- struct{}{}
		if name := wrong.Load(); name != "" {
			t.Errorf("%s is called %s again", id, name)
		}
	}

	way.holds.Store("GET /collections")
	<-way.held
	change("public-one", "modify-collection", "PUT", "/collections/"+id, `{"new_name":"public-two"}`)
	passed()

	way.holds.Store("GET /collections/public-two")
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.ask("owner", "get-collection", "GET", "/collections/public-two", "")
	}()
	<-way.held
	change("public-two", "modify-collection", "PUT", "/collections/"+id, `{"new_name":"public-three"}`)
	way.free <- struct{}{}
	<-done
	if name := wrong.Load(); name != "" {
		t.Errorf("%s is called %s again", id, name)
	}

	way.holds.Store("GET /collections")
	<-way.held
	change("public-three", "delete-collection", "DELETE", "/collections/public-three", "")
	passed()
}

// A client hears of a new name, or of an end, only when the gateways know; of a new collection even when they don't.
func TestClientsWaitForGateways(t *testing.T) {
	f := newFixture(t, chroma(t))
	id := f.create("public-one")
	var inForce map[string]string
	f.catalog.InForce = func(context.Context) error {
		g, _ := f.catalog.current()
		inForce = g.Learned.Names["docs"]
		return nil
	}
	if code, _ := f.ask("owner", "modify-collection", "PUT", "/collections/"+id, `{"new_name":"public-two"}`); code != 200 || inForce[id] != "public-two" {
		t.Errorf("renamed: %d, and in force is %v", code, inForce)
	}
	if code, _ := f.ask("owner", "delete-collection", "DELETE", "/collections/public-two", ""); code != 200 || len(inForce) != 0 || inForce == nil {
		t.Errorf("deleted: %d, and in force is %v", code, inForce)
	}

	f.catalog.InForce = func(context.Context) error { return context.DeadlineExceeded }
	id = f.create("public-one")
	if code, _ := f.ask("owner", "get-collection", "GET", "/collections/public-one", ""); code != 200 {
		t.Errorf("get, not in force: %d", code)
	}
	if code, _ := f.ask("owner", "modify-collection", "PUT", "/collections/"+id, `{"new_name":"public-two"}`); code != 503 {
		t.Errorf("renamed, not in force: %d", code)
	}
	if code, _ := f.ask("owner", "delete-collection", "DELETE", "/collections/public-two", ""); code != 503 {
		t.Errorf("deleted, not in force: %d", code)
	}
	if code, _ := f.ask("owner", "delete-collection", "DELETE", "/collections/public-two", ""); code != 404 {
		t.Errorf("deleted again: %d", code)
	}
}

func TestUsable(t *testing.T) {
	const id = "0b0ff8a4-8a3b-4d4c-9a49-8f9d0a2e7c11"
	for _, c := range []struct {
		id, name string
		usable   bool
	}{
		{id, "a.B_c-9", true},
		{id, strings.Repeat("a", 512), true},
		{id, strings.Repeat("a", 513), false},
		{id, "", false},
		{id, "a|b", false},
		{id, "a%b", false},
		{id, "a\n", false},
		{id, "ä", false},
		{strings.ToUpper(id), "abc", false},
		{"{" + id + "}", "abc", false},
		{id + "\n", "abc", false},
		{strings.ReplaceAll(id, "-", ""), "abc", false},
		{"", "abc", false},
	} {
		if got := (collection{ID: c.id, Name: c.name}).usable(); got != c.usable {
			t.Errorf("%q %q: %v", c.id, c.name, got)
		}
	}
}

// odd is a store that does what a real one doesn't, and counts how often it is asked.
func odd(t *testing.T, answer http.HandlerFunc) (segment.Backend, *atomic.Int32) {
	asked := new(atomic.Int32)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		answer(w, r)
	}))
	t.Cleanup(server.Close)
	return behindAddress(t, server, segment.BackendTLS{Mode: segment.TLSNone}), asked
}

func behindAddress(t *testing.T, server *httptest.Server, how segment.BackendTLS) segment.Backend {
	t.Helper()
	at, err := netip.ParseAddrPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return segment.Backend{Name: "odd", Addresses: []segment.Address{{Host: at.Addr().String(), Port: at.Port()}}, TLS: how}
}

func TestOddLists(t *testing.T) {
	page := func(from, n int) string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf(`{"id":"%08x-0000-4000-8000-000000000000","name":"n"}`, from+i))
		}
		return "[" + strings.Join(all, ",") + "]"
	}
	same, asked := odd(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, page(0, 500)) })
	e := &segment.Endpoint{Name: "docs", Backends: []segment.Backend{same}}
	if all, err := new(Catalog).storeOf(e).listed(t.Context()); err == nil || asked.Load() != 2 {
		t.Errorf("always the same page: %d, %v, asked %d times", len(all), err, asked.Load())
	}
	next := 0
	more, _ := odd(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, page(next, 50_000)); next += 50_000 })
	e.Backends[0] = more
	if all, err := new(Catalog).storeOf(e).listed(t.Context()); err == nil {
		t.Errorf("without end: %d", len(all))
	}

	// What can't be used is not told to gateways, and said once.
	strange, _ := odd(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `[{"id":"0b0ff8a4-8a3b-4d4c-9a49-8f9d0a2e7c11","name":"good"},{"id":"0B0FF8A4-8A3B-4D4C-9A49-8F9D0A2E7C12","name":"bad"},
			{"id":"0b0ff8a4-8a3b-4d4c-9a49-8f9d0a2e7c13","name":"b|ad"},{"id":5}]`)
	})
	e.Backends[0] = strange
	var log strings.Builder
	c := &Catalog{Log: slog.New(slog.NewTextHandler(&log, nil)), Learned: func(envoy.Names) {}}
	c.refresh(t.Context(), e)
	c.refresh(t.Context(), e)
	if n := c.names["docs"]; len(n) != 1 || n["0b0ff8a4-8a3b-4d4c-9a49-8f9d0a2e7c11"] != "good" {
		t.Errorf("names are %v", n)
	}
	if n := strings.Count(log.String(), "WARN"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
}

// Whatever may have changed something is asked once.
func TestNextAddress(t *testing.T) {
	broken, _ := odd(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	huge, _ := odd(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.CopyN(w, zeros{}, maxAnswer+1)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	down := broken
	down.Addresses = []segment.Address{{Host: "127.0.0.1", Port: uint16(l.Addr().(*net.TCPAddr).Port)}}
	l.Close()
	mutual := broken
	mutual.TLS = segment.BackendTLS{Mode: segment.TLSMutual}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		what   string
		ctx    context.Context
		first  segment.Backend
		method string
		lists  bool
		next   bool
	}{
		{"breaks off a read", t.Context(), broken, "GET", false, true},
		{"breaks off a change", t.Context(), broken, "POST", false, false},
		{"breaks off a list", t.Context(), broken, "POST", true, true},
		{"is down for a read", t.Context(), down, "GET", false, true},
		{"is down for a change", t.Context(), down, "POST", false, true},
		{"is asked too late", over, down, "GET", false, false},
		{"is beyond the control plane", t.Context(), mutual, "POST", false, true},
		{"says too much", t.Context(), huge, "POST", false, false},
	} {
		good, asked := odd(t, func(http.ResponseWriter, *http.Request) {})
		e := &segment.Endpoint{Backends: []segment.Backend{c.first, good}}
		_, err := new(Catalog).storeOf(e).do(c.ctx, call{method: c.method, at: "/", lists: c.lists})
		if (asked.Load() == 1) != c.next || (err == nil) != c.next {
			t.Errorf("the first %s: the next is asked %d times, %v", c.what, asked.Load(), err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestCAIsReadOncePerGeneration(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(file, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	b := behindAddress(t, server, segment.BackendTLS{Mode: segment.TLSServer, ServerName: "example.com", CAFile: file})
	c := &Catalog{}
	ask := func() error {
		_, err := c.storeOf(&segment.Endpoint{Backends: []segment.Backend{b}}).do(t.Context(), call{method: "GET", at: "/"})
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := ask(); err != nil {
		t.Errorf("the same generation: %v", err)
	}
	if err := c.Publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := ask(); err == nil {
		t.Error("the next generation does not read the CA")
	}
}
