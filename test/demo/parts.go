package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"sallyport.dev/telemetry"
)

// folders of the checkout that the demo uses; everything that it writes is below .parts.
type folders struct {
	root  string // of the checkout
	parts string
	work  string // conf, logs, the vector store's data
	state string // of `sallyport up`
	run   string // the Workload API's socket: a short path, as sockets have short paths
}

// demo is everything that runs.
type demo struct {
	folders
	listen, otlp string
	llm, chroma  int
	workload     string
	children     []*exec.Cmd
}

func newDemo() (*demo, error) {
	root, err := filepath.Abs(".")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(root, "examples/rag/sallyport")); err != nil {
		return nil, fmt.Errorf("run this in the checkout's root folder, as `make demo` does: %w", err)
	}
	d := &demo{folders: folders{root: root, parts: filepath.Join(root, ".parts")}}
	d.work = filepath.Join(d.parts, "demo")
	d.state = filepath.Join(d.work, "state")
	if len(d.state) > 80 { // sockets below it would not fit
		d.state = filepath.Join(os.TempDir(), "sallyport-demo-"+strconv.Itoa(os.Getuid()))
	}
	if err := os.MkdirAll(d.work, 0o700); err != nil {
		return nil, err
	}
	if d.run, err = os.MkdirTemp("", "sallyport-"); err != nil {
		return nil, err
	}
	if err := os.Chmod(d.run, 0o755); err != nil {
		return nil, err
	}
	d.workload = filepath.Join(d.run, "workload.sock")
	ports, err := freePorts(4)
	if err != nil {
		return nil, err
	}
	d.listen, d.otlp = addr(ports[0]), addr(ports[1])
	d.llm, d.chroma = ports[2], ports[3]
	return d, nil
}

func addr(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// freePorts asks the system for ports that nobody has.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all are held until all are known, so that none comes twice
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// documents fills in the example's documents.
func (d *demo) documents() (string, error) {
	from, to := filepath.Join(d.root, "examples/rag/sallyport"), filepath.Join(d.work, "documents")
	if err := os.RemoveAll(to); err != nil {
		return "", err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return "", err
	}
	apps, err := filepath.EvalSymlinks(filepath.Join(d.parts, "apps"))
	if err != nil {
		return "", err
	}
	files, err := os.ReadDir(from)
	if err != nil {
		return "", err
	}
	fill := strings.NewReplacer("@APPS@", apps, "@LLM_PORT@", strconv.Itoa(d.llm), "@CHROMA_PORT@", strconv.Itoa(d.chroma))
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(from, f.Name()))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(to, f.Name()), []byte(fill.Replace(string(text))), 0o644); err != nil {
			return "", err
		}
	}
	return to, nil
}

// start runs a program in the background, its output in a log file, until the demo ends, however that ends.
func (d *demo) start(name string, env []string, program string, args ...string) error {
	log, err := os.Create(filepath.Join(d.work, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.root, log, log
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	d.children = append(d.children, cmd)
	return nil
}

// stop ends what was started, the last first, and waits for it.
func (d *demo) stop() {
	for i := len(d.children) - 1; i >= 0; i-- {
		c := d.children[i]
		_ = c.Process.Signal(syscall.SIGTERM) // it may have ended already
		timer := time.AfterFunc(15*time.Second, func() { _ = c.Process.Kill() })
		_ = c.Wait()
		timer.Stop()
	}
	os.RemoveAll(d.run)
}

// everything starts both servers and Sallyport, and returns when all are ready.
func (d *demo) everything(ctx context.Context) (documents string, err error) {
	if documents, err = d.documents(); err != nil {
		return "", err
	}
	python := filepath.Join(d.parts, "venv/bin/python")
	if err := d.start("llm", nil, python, "examples/rag/servers/llm_server.py", "--port", strconv.Itoa(d.llm)); err != nil {
		return "", err
	}
	if err := d.start("chroma", []string{"ANONYMIZED_TELEMETRY=False"}, filepath.Join(d.parts, "venv/bin/chroma"),
		"run", "--host", "127.0.0.1", "--port", strconv.Itoa(d.chroma), "--path", filepath.Join(d.work, "chroma")); err != nil {
		return "", err
	}
	for name, url := range map[string]string{
		"llm": fmt.Sprintf("http://127.0.0.1:%d/health", d.llm), "chroma": fmt.Sprintf("http://127.0.0.1:%d/api/v2/heartbeat", d.chroma),
	} {
		if err := d.await(ctx, name, func() bool {
			resp, err := http.Get(url)
			if err != nil {
				return false
			}
			resp.Body.Close()
			return resp.StatusCode == http.StatusOK
		}); err != nil {
			return "", err
		}
	}
	if err := d.start("sallyport", nil, d.sallyport(), "up", "-f", documents, "--state", d.state, "--workload-socket", d.workload,
		"--listen", d.listen, "--otlp-listen", d.otlp, "--svid-ttl", "1m"); err != nil {
		return "", err
	}
	return documents, d.await(ctx, "sallyport", func() bool {
		out, err := exec.Command(d.sallyport(), "status", "--state", d.state, "-o", "json").Output()
		var st struct {
			Generation *struct{ Digest string }
			Gateways   []struct {
				Connected bool
				Target    string
				InForce   string `json:"in_force"`
			}
		}
		return err == nil && json.Unmarshal(out, &st) == nil && len(st.Gateways) == 1 &&
			st.Gateways[0].Connected && st.Gateways[0].InForce != "" && st.Gateways[0].InForce == st.Gateways[0].Target
	})
}

func (d *demo) sallyport() string { return filepath.Join(d.parts, "bin/sallyport") }

// await waits for something that was started, and gives up when its process ends or a minute has passed.
func (d *demo) await(ctx context.Context, name string, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s did not get ready; its log:\n%s", name, tail(filepath.Join(d.work, name+".log")))
		}
	}
	return nil
}

func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// environment is what an application needs to reach the gateway.
func (d *demo) environment() []string {
	return []string{
		"SALLYPORT_CHAT=https://chat.models.internal:" + port(d.listen),
		"SALLYPORT_DOCS=https://docs.vectors.internal:" + port(d.listen),
		"SALLYPORT_RESOLVE=chat.models.internal=127.0.0.1,docs.vectors.internal=127.0.0.1",
		"SPIFFE_ENDPOINT_SOCKET=unix://" + d.workload,
		"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + d.otlp,
		"PYTHONDONTWRITEBYTECODE=1",
	}
}

func port(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }

// attempt is one line of an application: something that it tried, and what came of it as it saw it.
type attempt struct {
	TS        float64
	Caller    string
	Endpoint  string
	Operation string
	Resource  string
	What      string
	Expect    string
	OK        bool
	Request   string
	GotStatus int             `json:"got_status"`
	ErrorBody json.RawMessage `json:"error_body"`
	MS        float64
	Tokens    int
	TraceID   telemetry.TraceID `json:"trace_id"`
	Rotations int

	// Other lines.
	Collection string
	ID         string
	Indexed    *int
	Question   string
	Answer     string
	Sources    []string
}

// app is a running application.
type app struct {
	cmd   *exec.Cmd
	lines <-chan attempt
	errs  *strings.Builder
}

// launch starts an application under its own identity: its own copy of Python.
func (d *demo) launch(name string, args ...string) (*app, error) {
	cmd := exec.Command(filepath.Join(d.parts, "apps", name, "bin/python"), args...)
	cmd.Dir, cmd.Env = filepath.Join(d.root, "examples/rag"), append(os.Environ(), d.environment()...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	a := &app{cmd: cmd, errs: &strings.Builder{}}
	cmd.Stderr = a.errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	lines := make(chan attempt, 4096)
	go read(out, lines) // ends with the application
	a.lines = lines
	return a, nil
}

func read(from io.Reader, into chan<- attempt) {
	defer close(into)
	scan := bufio.NewScanner(from)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		var a attempt
		if json.Unmarshal(scan.Bytes(), &a) == nil {
			into <- a
		}
	}
}

// finish waits for an application and returns all its lines.
func (a *app) finish() ([]attempt, error) {
	var all []attempt
	for line := range a.lines {
		all = append(all, line)
	}
	if err := a.cmd.Wait(); err != nil {
		return all, fmt.Errorf("%s: %w\n%s", strings.Join(a.cmd.Args, " "), err, a.errs)
	}
	return all, nil
}
