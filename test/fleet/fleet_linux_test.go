// Package fleet runs a control plane, gateways, applications and a backend on machines of their own, with bad networks
// between them.
package fleet

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport.dev/controlplane/gateway"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/test/fleet/netlab"
)

// patience is how long anything may take that must happen: more than an SVID lives.
const patience = time.Minute

// ttl of all SVIDs: renewed after half of it, and long enough to be without a control plane for half.
const ttl = 40 * time.Second

var program, envoy string

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(play(role))
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("/tmp", "sp")
		if err != nil {
			fmt.Fprintln(os.Stderr, "FAIL:", err)
			return 1
		}
		defer os.RemoveAll(dir)
		if envoy, err = gateway.Find(context.Background(), os.Getenv("ENVOY"), "../../.parts/bin"); err == nil {
			envoy, err = filepath.EvalSymlinks(envoy)
		}
		if err == nil {
			envoy, err = filepath.Abs(envoy)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "FAIL: these tests need Envoy %s (`make parts`, or set $ENVOY): %v\n", gateway.Version, err)
			return 1
		}
		program = filepath.Join(dir, "sallyport")
		if out, err := exec.Command("go", "build", "-o", program, "sallyport.dev/cmd/sallyport").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "FAIL: build sallyport: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// fleet is all machines.
type fleet struct {
	*testing.T
	dir   string
	lab   *netlab.Lab
	hosts map[string]*netlab.Host
	docs  string
}

// running is a program on a machine.
type running struct {
	cmd *exec.Cmd

	mu   sync.Mutex
	log  bytes.Buffer
	last map[string]answer // by gateway, of an application
	bad  []answer          // since it was last cleared: those that were not what was wanted
	want int
	done chan struct{}
}

func (f *fleet) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

// start starts a program on a machine.
func (f *fleet) start(host, name string, args ...string) *running {
	f.Helper()
	r := &running{cmd: f.hosts[host].Command(f.Context(), name, args...), last: map[string]answer{}, done: make(chan struct{})}
	r.cmd.Env = os.Environ()
	return f.launch(host, r)
}

// role starts this test program in a role.
func (f *fleet) role(host string, want int, role ...string) *running {
	f.Helper()
	self, err := os.Executable()
	if err != nil {
		f.Fatal(err)
	}
	r := &running{cmd: f.hosts[host].Command(f.Context(), self), last: map[string]answer{}, want: want, done: make(chan struct{})}
	r.cmd.Env = append(os.Environ(), roleVariable+"="+strings.Join(role, " "))
	return f.launch(host, r)
}

func (f *fleet) launch(host string, r *running) *running {
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		f.Fatal(err)
	}
	r.cmd.Stderr = lockedWriter{r}
	if err := f.hosts[host].Start(r.cmd); err != nil {
		f.Fatal(err)
	}
	go func() {
		defer close(r.done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var a answer
			if json.Unmarshal(lines.Bytes(), &a) != nil {
				continue
			}
			r.mu.Lock()
			r.last[a.Gateway] = a
			if r.want != 0 && a.Status != r.want {
				r.bad = append(r.bad, a)
			}
			r.mu.Unlock()
		}
		_ = r.cmd.Wait() // its state says it all
	}()
	f.Cleanup(func() {
		if f.Failed() {
			r.mu.Lock()
			defer r.mu.Unlock()
			f.Logf("%s on %s:\n%s", filepath.Base(r.cmd.Path), host, r.log.String())
		}
	})
	return r
}

type lockedWriter struct{ r *running }

func (w lockedWriter) Write(p []byte) (int, error) {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	return w.r.log.Write(p)
}

func (r *running) said(text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Contains(r.log.String(), text)
}

// status is what came last through a gateway.
func (r *running) status(gateway string) answer {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last[gateway]
}

// expect says what must come from now on, and returns what did not since the last time.
func (r *running) expect(status int) []answer {
	r.mu.Lock()
	defer r.mu.Unlock()
	bad := r.bad
	r.bad, r.want = nil, status
	return bad
}

func (f *fleet) eventually(what string, is func() bool) {
	f.Helper()
	began := time.Now()
	for !is() {
		if time.Since(began) > patience {
			f.Fatalf("no %s within %s", what, patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
	f.Logf("%s after %s", what, time.Since(began).Round(10*time.Millisecond))
}

// ask runs a command of an operator on the control plane's machine.
func (f *fleet) ask(args ...string) string {
	f.Helper()
	out, err := exec.Command(program, append(args, "--state", f.path("plane"))...).CombinedOutput()
	if err != nil {
		f.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// write changes the documents, whole and at once.
func (f *fleet) write(name, text string) {
	f.Helper()
	fresh := f.path(name + ".new")
	if err := os.WriteFile(fresh, []byte(text), 0o600); err != nil {
		f.Fatal(err)
	}
	if err := os.Rename(fresh, filepath.Join(f.docs, name)); err != nil {
		f.Fatal(err)
	}
}

// gateways returns which gateways are connected and have everything.
func (f *fleet) inForce() (names []string) {
	var st operator.Status
	if err := operator.NewClient(f.path("plane", "run", "operator.sock")).Get(f.Context(), "/status", nil, &st); err != nil {
		return nil
	}
	for _, g := range st.Gateways {
		if g.Connected && g.InForce == g.Target {
			names = append(names, string(g.Gateway))
		}
	}
	return names
}

// updates is how often a gateway's Envoy has been sent authorization.
func (f *fleet) updates(gateway string) string {
	f.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", f.path(gateway, "run", "envoy.sock"))
	}}}
	resp, err := client.Get("http://envoy/stats?filter=(extension_config_discovery|listener_manager.lds|cluster_manager.cds|rds).*update_success")
	if err != nil {
		f.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		f.Fatal(err)
	}
	return string(text)
}

// agent makes a machine a node.
func (f *fleet) agent(host string) *running {
	f.Helper()
	token := f.path(host + ".token")
	if err := os.WriteFile(token, []byte(f.ask("token", "create", "--node", host)), 0o600); err != nil {
		f.Fatal(err)
	}
	a := f.start(host, program, "agent", "--control-plane", f.hosts["plane"].Addr.String()+":9443", "--trust-bundle", f.path("bundle.pem"),
		"--join-token-file", token, "--state", f.path(host+"-agent"), "--workload-socket", f.socket(host), "--connect", "unix://"+f.connect(host))
	f.eventually("agent on "+host, func() bool { return a.said("agent attested") })
	return a
}

func (f *fleet) socket(host string) string { return f.path(host + ".sock") }

func (f *fleet) connect(host string) string { return f.path(host + "-c.sock") }

// bundle writes whom agents believe at first: the root in the authority's file.
func (f *fleet) bundle() {
	f.Helper()
	text, err := os.ReadFile(f.path("plane", "ca", "ca.pem"))
	if err != nil {
		f.Fatal(err)
	}
	var out []byte
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
		}
	}
	if err := os.WriteFile(f.path("bundle.pem"), out, 0o600); err != nil {
		f.Fatal(err)
	}
}

func document(kind, name, spec string) string {
	return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: %s\nmetadata: {name: %s}\nspec: {%s}\n", kind, name, spec)
}

func grant(name, workload string) string {
	return document("Grant", name, fmt.Sprintf("from: [{workload: %s}], to: [{endpoint: chat, operations: [Infer], resources: [m]}]", workload))
}

// newFleet makes machines with these names, and documents of an endpoint "chat" whose backend is on "store".
func newFleet(t *testing.T, hosts ...string) *fleet {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sp") // short: paths of sockets have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{T: t, dir: dir, lab: netlab.New(t), hosts: map[string]*netlab.Host{}, docs: filepath.Join(dir, "docs")}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, name := range hosts {
		f.hosts[name] = f.lab.Host(name)
	}
	if err := os.Mkdir(f.docs, 0o700); err != nil {
		t.Fatal(err)
	}
	f.write("chat.yaml", f.endpoint("chat"))
	return f
}

func (f *fleet) endpoint(name string) string {
	return document("Endpoint", name, fmt.Sprintf("hostnames: [%s.internal], protocol: OpenAI, backends: [{name: store, addresses: ['%s:8443'], tls: {mode: Mutual, spiffeID: 'spiffe://example.org/store'}}]", name, f.hosts["store"].Addr))
}

func (f *fleet) edge(name, host, more string) string {
	return document("Gateway", name, fmt.Sprintf("listen: '%s:8443', node: %s, selectors: ['unix:uid:%d', 'unix:path:%s']%s", f.hosts[host].Addr, host, os.Getuid(), envoy, more))
}

// workload is this test program on a machine.
func (f *fleet) workload(name, host string) string {
	f.Helper()
	self, err := os.Executable()
	if err != nil {
		f.Fatal(err)
	}
	return document("Workload", name, fmt.Sprintf("spiffeID: 'spiffe://example.org/%s', selectors: ['unix:uid:%d', 'unix:path:%s'], nodes: [%s]", name, os.Getuid(), self, host))
}

// controlPlane starts the control plane, and writes whom to believe.
func (f *fleet) controlPlane(ttl time.Duration) {
	f.Helper()
	plane := f.start("plane", program, "controlplane", "-f", f.docs, "--state", f.path("plane"), "--svid-ttl", ttl.String(), "--otlp-listen=")
	f.eventually("control plane", func() bool { return plane.said("msg=ready") })
	f.bundle()
}

func (f *fleet) gateway(name, host string) {
	f.Helper()
	f.start(host, program, "gateway", "--name", name, "--control-plane", f.hosts["plane"].Addr.String()+":9444",
		"--identity", "unix://"+f.socket(host), "--state", f.path(name), "--envoy", envoy, "--envoy-threads", "1")
}

// TestFleet goes through the life of a fleet: it comes up over a slow network that loses packets, obeys changes, goes on
// without a control plane, catches up, and loses who is no longer wanted.
func TestFleet(t *testing.T) {
	f := newFleet(t, "plane", "gw1", "gw2", "app1", "app2", "store")
	// Wide-area links to the control plane.
	f.hosts["plane"].Cable(netlab.Link{Delay: 30 * time.Millisecond, Jitter: 10 * time.Millisecond, Loss: 0.03})
	f.write("other.yaml", f.endpoint("other"))
	f.write("edge1.yaml", f.edge("edge1", "gw1", ""))
	f.write("edge2.yaml", f.edge("edge2", "gw2", ", endpoints: [chat]"))
	for workload, host := range map[string]string{"app-1": "app1", "app-2": "app2", "store": "store"} {
		f.write(workload+".yaml", f.workload(workload, host))
	}
	f.write("grant.yaml", grant("one", "app-1"))

	f.controlPlane(ttl)
	agents := map[string]*running{}
	for _, host := range []string{"gw1", "gw2", "app1", "app2", "store"} {
		agents[host] = f.agent(host)
	}
	f.role("store", 0, "backend", f.socket("store"), f.hosts["store"].Addr.String()+":8443")
	for name, host := range map[string]string{"edge1": "gw1", "edge2": "gw2"} {
		f.gateway(name, host)
	}
	f.eventually("both gateways in force", func() bool { return slices.Equal(f.inForce(), []string{"edge1", "edge2"}) })

	edges := []string{"edge1=" + f.hosts["gw1"].Addr.String() + ":8443", "edge2=" + f.hosts["gw2"].Addr.String() + ":8443"}
	app := func(host, endpoint string) *running {
		return f.role(host, 0, append([]string{"app", f.socket(host), endpoint}, edges...)...)
	}
	one, two, other := app("app1", "chat.internal"), app("app2", "chat.internal"), app("app1", "other.internal")
	unmodified := func(host, endpoint string) *running { return f.role(host, 0, "unmodified", f.connect(host), endpoint) }
	plain, plainTwo, plainOther := unmodified("app1", "chat"), unmodified("app2", "chat"), unmodified("app1", "other")
	through := func(r *running, gateway string, status int) func() bool {
		return func() bool { return r.status(gateway).Status == status }
	}
	both := func(r *running, status int) func() bool {
		return func() bool { return r.status("edge1").Status == status && r.status("edge2").Status == status }
	}
	f.eventually("answers for who is granted", both(one, http.StatusOK))
	f.eventually("denials for who is not", both(two, http.StatusForbidden))
	f.eventually("denial at the gateway that has the other endpoint", through(other, "edge1", http.StatusForbidden))
	if a := other.status("edge2"); a.Status != 0 || a.Error == "" {
		t.Errorf("a gateway serves an endpoint that is not its own: %+v", a)
	}
	f.eventually("answers for an application that is not changed", through(plain, connected, http.StatusOK))
	f.eventually("another one is told of no endpoint", through(plainTwo, connected, http.StatusNotFound))
	f.eventually("nor is the first of others", through(plainOther, connected, http.StatusNotFound))

	one.expect(http.StatusOK) // from here on, whatever happens
	plain.expect(http.StatusOK)
	f.write("grant.yaml", grant("one", "app-1")+grant("two", "app-2"))
	f.eventually("a grant in force over a bad network", both(two, http.StatusOK))
	f.eventually("the other one is told of the endpoint", through(plainTwo, connected, http.StatusOK))
	f.write("grant.yaml", grant("one", "app-1"))
	f.eventually("its end", both(two, http.StatusForbidden))
	f.eventually("it is told of none", through(plainTwo, connected, http.StatusNotFound))

	// Without a control plane for longer than SVIDs wait for their renewal.
	f.eventually("quiet", func() bool { return len(f.inForce()) == 2 })
	before, serial := map[string]string{"edge1": f.updates("edge1"), "edge2": f.updates("edge2")}, one.status("edge1").Serial
	f.hosts["plane"].Cable(netlab.Link{Cut: true})
	t.Log("the control plane is cut off")
	time.Sleep(ttl/2 + 2*time.Second)
	for _, r := range []*running{one, plain} {
		if bad := r.expect(http.StatusOK); len(bad) > 0 {
			t.Errorf("without a control plane %d requests failed, first %+v", len(bad), bad[0])
		}
	}
	f.hosts["plane"].Cable(netlab.Link{Delay: 30 * time.Millisecond})
	f.eventually("both gateways back", func() bool { return len(f.inForce()) == 2 })
	f.eventually("a renewed SVID", func() bool { return one.status("edge1").Serial != serial })
	for name, was := range before {
		if is := f.updates(name); is != was {
			t.Errorf("%s was sent again what it had:\n%s\nand before\n%s", name, is, was)
		}
	}
	f.write("grant.yaml", grant("one", "app-1")+grant("two", "app-2"))
	f.eventually("changes in force again", both(two, http.StatusOK))

	// Whoever is no longer wanted.
	if err := os.Remove(filepath.Join(f.docs, "edge2.yaml")); err != nil {
		t.Fatal(err)
	}
	f.eventually("end of a gateway that no document names", func() bool { return slices.Equal(f.inForce(), []string{"edge1"}) })
	if bad := plain.expect(0); len(bad) > 0 {
		t.Errorf("by --connect %d requests failed, first %+v", len(bad), bad[0])
	}
	if bad := one.expect(0); slices.ContainsFunc(bad, func(a answer) bool { return a.Gateway == "edge1" }) {
		t.Errorf("%d requests failed that should not, first %+v", len(bad), bad[0])
	}
	f.ask("agents", "revoke", "app2")
	select {
	case <-agents["app2"].done:
	case <-time.After(patience):
		t.Error("a revoked agent goes on")
	}
	f.eventually("end of what its workload held", func() bool { return two.status("edge1").Status != http.StatusOK })
	if a := one.status("edge1"); a.Status != http.StatusOK {
		t.Errorf("that concerns the others: %+v", a)
	}
	f.ask("agents", "revoke", "gw1")
	f.eventually("end of the gateway of a revoked agent", func() bool { return len(f.inForce()) == 0 })
}
