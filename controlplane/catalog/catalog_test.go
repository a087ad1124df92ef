package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
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
		Gateway:     segment.Gateway{Name: "local", ID: spiffeid.RequireFromString("spiffe://example.org/gateway/local"), SVIDTTL: time.Hour}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	f.catalog = &Catalog{Every: 50 * time.Millisecond, Log: slog.New(slog.DiscardHandler), InForce: func(context.Context) error { return nil }}
	f.catalog.Learned = func(n envoy.Names) { // the pipeline, as far as it matters here
		f.told.Store(&n)
		g, err := controlplane.Generate(cfg, n, time.Now())
		if err != nil {
			t.Error(err)
			return
		}
		go func() { _ = f.catalog.Publish(context.Background(), g) }()
	}
	g, err := controlplane.Generate(cfg, nil, time.Now())
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
