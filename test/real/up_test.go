package real

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/telemetry"
)

// patience is how long anything may take that must happen. It is long: machines are slow, and it is not a measure.
const patience = 15 * time.Second

// up is a running `sallyport up`, and the folder that it has to itself.
type up struct {
	dir, docs, state, socket, listen string

	args     []string
	cmd      *exec.Cmd
	log      *output
	exit     chan struct{} // closed when the process has ended
	keys     keys
	operator *operator.Client
	canary   *caller // who may do everything, as far as a test has one
}

// newUp makes the folder and writes the documents, and starts nothing.
func newUp(documents map[string]string, args ...string) (*up, error) {
	dir, err := os.MkdirTemp("/tmp", "sp") // short: paths of sockets have 107 bytes
	if err != nil {
		return nil, err
	}
	u := &up{dir: dir, docs: filepath.Join(dir, "docs"), state: filepath.Join(dir, "state"), socket: filepath.Join(dir, "w.sock")}
	if err := os.Mkdir(u.docs, 0o700); err != nil {
		return nil, err
	}
	for name, text := range documents {
		if err := os.WriteFile(filepath.Join(u.docs, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	u.listen = freeAddress()
	u.operator = operator.NewClient(filepath.Join(u.state, "run", "operator.sock"))
	u.args = append([]string{"up", "-f", u.docs, "--state", u.state, "--workload-socket", u.socket, "--listen", u.listen,
		"--otlp-listen=", "--envoy", binary, "--envoy-threads", "1"}, args...)
	return u, nil
}

// launch starts the program.
func (u *up) launch() error {
	u.cmd = exec.Command(program, u.args...)
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	u.log, u.exit = newOutput(), make(chan struct{})
	u.cmd.Stderr = u.log
	if err := start(u.cmd); err != nil {
		return err
	}
	go func(cmd *exec.Cmd, log *output, exit chan struct{}) {
		_ = cmd.Wait() // its state says it all
		log.end()
		close(exit)
	}(u.cmd, u.log, u.exit)
	return nil
}

func (u *up) ready() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := u.log.line(ctx, "msg=ready"); err != nil {
		return fmt.Errorf("wait for `up` to be ready: %w\n%s", err, u.log)
	}
	// Envoy has taken the generation by then. Its listener opens when the certificates are there, a moment later.
	for entries, _ := os.ReadDir(u.docs); len(entries) > 0; {
		conn, err := net.Dial("tcp", u.listen)
		if err == nil {
			conn.Close()
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for the listener: %w\n%s", err, u.log)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return u.keys.load(filepath.Join(u.state, "ca", "ca.pem"))
}

// startUp starts an `up` for one test.
func startUp(t testing.TB, documents map[string]string, args ...string) *up {
	t.Helper()
	u := prepareUp(t, documents, args...)
	u.mustLaunch(t)
	return u
}

func prepareUp(t testing.TB, documents map[string]string, args ...string) *up {
	t.Helper()
	u, err := newUp(documents, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if u.cmd != nil && u.cmd.Process != nil {
			u.kill()
		}
		os.RemoveAll(u.dir)
		if t.Failed() && u.log != nil {
			t.Logf("log of `up`:\n%s", u.log)
		}
	})
	return u
}

func (u *up) mustLaunch(t testing.TB) {
	t.Helper()
	if err := u.launch(); err != nil {
		t.Fatal(err)
	}
	if err := u.ready(); err != nil {
		t.Fatal(err)
	}
}

func (u *up) kill() {
	_ = u.cmd.Process.Kill() // it may have ended already
	<-u.exit
}

// envoy returns the process id of the child.
func (u *up) envoy(t testing.TB) int {
	t.Helper()
	var pid int
	eventually(t, "an Envoy", func() bool {
		children := childrenOf(u.cmd.Process.Pid)
		if len(children) != 1 {
			return false
		}
		pid = children[0]
		return true
	})
	return pid
}

func childrenOf(parent int) []int {
	var pids []int
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		if len(fields) > 1 && fields[1] == strconv.Itoa(parent) && fields[0] != "Z" {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// write writes a document as careful editors do: whole, at once.
func (u *up) write(t testing.TB, name, text string) {
	t.Helper()
	write(t, u.dir, u.docs, name, text)
}

func write(t testing.TB, elsewhere, folder, name, text string) {
	t.Helper()
	temporary := filepath.Join(elsewhere, name+".new")
	if err := os.WriteFile(temporary, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(folder, name)); err != nil {
		t.Fatal(err)
	}
}

// ask runs another command against this `up` and returns what it printed and its exit code.
func (u *up) ask(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runProgram(t, append(args, "--state", u.state)...)
}

func runProgram(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func (u *up) status(t testing.TB) operator.Status {
	t.Helper()
	var st operator.Status
	if err := u.operator.Get(t.Context(), "/status", nil, &st); err != nil {
		t.Fatal(err)
	}
	return st
}

// flows waits for all flows that the filter selects to be at least so many.
func (u *up) flows(t testing.TB, least int, fits func(telemetry.Flow) bool) []telemetry.Flow {
	t.Helper()
	var found []telemetry.Flow
	eventually(t, fmt.Sprintf("%d flows", least), func() bool {
		found = nil
		for _, f := range u.allFlows(t) {
			if fits(f) {
				found = append(found, f)
			}
		}
		return len(found) >= least
	})
	return found
}

// flow waits for the flow of a request.
func (u *up) flow(t testing.TB, a answer) telemetry.Flow {
	t.Helper()
	if a.id() == "" {
		t.Fatalf("an answer without a request id: %v", a)
	}
	return u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == a.id() })[0]
}

func (u *up) allFlows(t testing.TB) []telemetry.Flow {
	t.Helper()
	body, err := u.operator.Stream(t.Context(), "/flows", url.Values{"limit": {"10000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	return readFlows(t, body)
}

// commonUp is the `up` that many tests share. Each has endpoints and backends of its own in it.
type commonUp struct {
	once sync.Once
	up   *up
	err  error

	backends map[string]*backend
}

func (c *commonUp) stop() {
	if c.up != nil {
		c.up.kill()
		os.RemoveAll(c.up.dir)
	}
}

// shared returns the common `up` and the backend of an endpoint of it.
func shared(t testing.TB, endpoint string) (*up, *backend) {
	t.Helper()
	common.once.Do(func() {
		common.backends = map[string]*backend{}
		common.up, common.err = newUp(map[string]string{"all.yaml": common.documents()})
		if common.err == nil {
			common.err = common.up.launch()
		}
		if common.err == nil {
			common.err = common.up.ready()
		}
	})
	if common.err != nil {
		t.Fatal(common.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the common `up`:\n%s", common.up.log)
		}
	})
	return common.up, common.backends[endpoint]
}

// documents are an endpoint for each test that has one here.
func (c *commonUp) documents() string {
	var text string
	for _, name := range []string{"bodies", "suite", "encoded", "large", "smuggling", "streams", "leaving", "paths", "headers", "denied", "traces", "tls", "other"} {
		c.backends[name] = newBackend()
		text += openAI(name, c.backends[name]) +
			grant(name+"-all", "/"+name, name, "Infer, Embed", "'*'")
	}
	for _, name := range []string{"fuzzed", "pipelined"} {
		c.backends[name] = newBackend()
		text += openAI(name, c.backends[name]) + grant(name+"-m", "/"+name, name, "Infer", "m")
	}
	for _, name := range []string{"vectors"} {
		c.backends[name] = newBackend()
		c.backends[name].collections = []string{"handbook", "payroll"}
		text += chroma(name, c.backends[name]) + grant(name+"-read", "/"+name, name, "Read", "handbook") +
			grant(name+"-admin", "/"+name+"-admin", name, "Admin, Read, Write", "'*'")
	}
	return text
}

// --- documents ---

func hostOf(endpoint string) string { return endpoint + ".test.internal" }

func openAI(name string, b *backend) string { return endpoint(name, "OpenAI", b.address()) }
func chroma(name string, b *backend) string { return endpoint(name, "Chroma", b.address()) }

func endpoint(name, protocol, address string) string {
	return fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: %s}
spec:
  hostnames: [%s]
  protocol: %s
  backends: [{name: local, addresses: ['%s'], tls: {mode: None}}]
`, name, hostOf(name), protocol, address)
}

// grant allows a caller, given by its path, something.
func grant(name, caller, endpoint, operations, resources string) string {
	return fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: %s}
spec:
  from: [{spiffeID: 'spiffe://example.org%s'}]
  to: [{endpoint: %s, operations: [%s], resources: [%s]}]
`, name, caller, endpoint, operations, resources)
}

// --- small things ---

// eventually asks until the answer is yes.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %s", what, patience)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

var lastPort atomic.Uint32

// freeAddress returns an address that nobody has. It is below the ports that the kernel gives away by itself, so it
// stays free until it is used.
func freeAddress() string {
	for {
		port := 12000 + (uint32(os.Getpid())*64+lastPort.Add(1))%18000
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			l.Close()
			return l.Addr().String()
		}
	}
}
