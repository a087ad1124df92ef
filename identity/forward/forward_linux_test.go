package forward

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	spiffe "sallyport.dev/identity"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/segment"
)

// role tells this test's program that it is an application, and which.
const role = "FORWARD_TEST_ROLE"

func TestMain(m *testing.M) {
	if do := applications[os.Getenv(role)]; do != nil {
		if err := do(os.Args[1:]); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// answer is what the gateway of these tests says of a request.
type answer struct {
	Caller string // by its certificate
	Serial string // of that
	Conn   string
	SNI    string
	Host   string
	Method string
	URI    string
	Header http.Header
	Body   string
}

// gateway is a server that demands X.509-SVIDs.
type gateway struct {
	authority *spiffe.Authority
	closed    chan string // the connections that were, as in answer.Conn

	mu      sync.Mutex
	target  Target
	handler http.HandlerFunc // nil: answer
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	h := g.handler
	g.mu.Unlock()
	if h != nil {
		h(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	leaf := r.TLS.PeerCertificates[0]
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer{
		Caller: leaf.URIs[0].String(), Serial: leaf.SerialNumber.String(), Conn: r.RemoteAddr, SNI: r.TLS.ServerName,
		Host: r.Host, Method: r.Method, URI: r.RequestURI, Header: r.Header, Body: string(body),
	})
}

func (g *gateway) handle(h http.HandlerFunc) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.handler = h
}

// where is what the forwarder is told of it.
func (g *gateway) where() Target {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.target
}

func (g *gateway) move(t Target) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.target = t
}

func startGateway(t *testing.T, a *spiffe.Authority) *gateway {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString("spiffe://example.org/gateway")
	template, err := a.SVIDTemplate(spiffe.Request{ID: id, TTL: time.Hour}, time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Sign(template, key.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	config := tlsconfig.MTLSServerConfig(&x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, a.Bundle(), tlsconfig.AuthorizeAny())
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{
		authority: a,
		target:    Target{Addresses: []string{l.Addr().String()}, ServerName: "chat.models.internal", IDs: []spiffeid.ID{id}},
		closed:    make(chan string, 1000),
	}
	s := &http.Server{Handler: g, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo),
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				g.closed <- c.RemoteAddr().String()
			}
		}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return g
}

// wait waits until the connections are closed.
func (g *gateway) wait(t *testing.T, conns ...string) {
	t.Helper()
	for len(conns) > 0 {
		select {
		case c := <-g.closed:
			conns = slices.DeleteFunc(conns, func(s string) bool { return s == c })
		case <-time.After(20 * time.Second):
			t.Fatalf("still open: %q", conns)
		}
	}
}

// world is a forwarder with a gateway behind it and an issuer beside it.
type world struct {
	*gateway
	issuer *issuer.Issuer
	*server
	base   string // URL
	socket string // where it listens, if it does on a Unix socket
	client *http.Client
}

func newWorld(t *testing.T, network string) *world {
	t.Helper()
	a := identitytest.Authority(t)
	w := &world{gateway: startGateway(t, a), issuer: identitytest.Issuer(a, Selectors)}
	w.start(t, network, w.issuer)
	return w
}

func (w *world) start(t *testing.T, network string, source Source) {
	t.Helper()
	transport := &http.Transport{}
	var l net.Listener
	var err error
	if network == "unix" {
		w.socket = filepath.Join(open(t), "forward.sock")
		w.base = "http://localhost"
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", w.socket)
		}
		if l, err = net.Listen("unix", w.socket); err == nil {
			err = os.Chmod(w.socket, 0o777)
		}
	} else {
		if l, err = Listen(t.Context(), "127.0.0.1:0"); err == nil {
			w.base = "http://" + l.Addr().String()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	w.client = &http.Client{Transport: transport}
	w.server = newServer(&Forwarder{
		Listener: l,
		Source:   source,
		Gateway: func(endpoint string) (Target, error) {
			switch endpoint {
			case "chat":
				return w.where(), nil
			case "docs":
				t := w.where()
				t.ServerName = "docs.models.internal"
				return t, nil
			case "early":
				return Target{}, ErrNotTold
			case "lost":
				return Target{}, ErrNoAddress
			}
			return Target{}, ErrNoEndpoint
		},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(w.sessions) != 0 || w.slots.total != 0 || len(w.slots.used) != 0 {
			t.Errorf("left behind: %d sessions, %d connections of %d users", len(w.sessions), w.slots.total, len(w.slots.used))
		}
	})
}

// ask sends a request as this test's own process.
func (w *world) ask(t *testing.T) answer {
	t.Helper()
	a, err := ask(w.client, w.base+"/chat/v1/models")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func ask(c *http.Client, url string) (answer, error) {
	resp, err := c.Get(url)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("%s: %s", resp.Status, body)
	}
	var a answer
	return a, json.Unmarshal(body, &a)
}

// refusal sends a request and returns the error in the answer.
func (w *world) refusal(t *testing.T, r *http.Request) problem {
	t.Helper()
	resp, err := w.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var body struct {
		Error struct{ Message, Type, Code string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	message, hint, _ := strings.Cut(body.Error.Message, "; hint: ")
	p := problem{resp.StatusCode, message, body.Error.Type, body.Error.Code, hint}
	if message == "" || hint == "" || p.kind == "" || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%+v", p)
	}
	return p
}

func (w *world) get(t *testing.T, path string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", w.base+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// open returns a folder that other users can look into.
func open(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "forward")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// application is a process that runs this test's program, from a copy.
type application struct {
	cmd     *exec.Cmd
	program string
	in      io.WriteCloser
	lines   *bufio.Scanner
}

// further is a group that applications of other users have the rights of.
const further = 4_000_000_000

// start runs a copy of this program as a user; as our own if that is 0.
func start(t *testing.T, uid int, do string, args ...string) *application {
	t.Helper()
	a := &application{program: filepath.Join(open(t), "app")}
	copyProgram(t, a.program)
	a.cmd = exec.Command(a.program, args...)
	a.cmd.Dir = "/"
	a.cmd.Env = append(os.Environ(), role+"="+do)
	if uid != 0 {
		a.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), Groups: []uint32{further}}}
	}
	var err error
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe() // not a StdoutPipe: what it leaves behind may go on writing
	if err != nil {
		t.Fatal(err)
	}
	a.cmd.Stdout, a.cmd.Stderr = w, w
	if err := errors.Join(a.cmd.Start(), w.Close()); err != nil {
		t.Fatal(err)
	}
	a.lines = bufio.NewScanner(r)
	a.lines.Buffer(nil, 10<<20)
	t.Cleanup(func() {
		a.in.Close() // ends it
		_ = a.cmd.Wait()
		r.Close()
	})
	return a
}

func copyProgram(t *testing.T, to string) {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, self, 0o755); err != nil {
		t.Fatal(err)
	}
}

// tell wakes it and returns the line that it answers.
func (a *application) tell(t *testing.T, what any) string {
	t.Helper()
	if _, err := fmt.Fprintln(a.in, what); err != nil {
		t.Fatal(err)
	}
	return a.line(t)
}

func (a *application) line(t *testing.T) string {
	t.Helper()
	if !a.lines.Scan() {
		t.Fatalf("application ended: %v", a.lines.Err())
	}
	return a.lines.Text()
}

// asks has it send some requests at once.
func (a *application) asks(t *testing.T, n int) []answer {
	t.Helper()
	var answers []answer
	line := a.tell(t, n)
	if err := json.Unmarshal([]byte(line), &answers); err != nil {
		t.Fatal(line)
	}
	if len(answers) != n {
		t.Fatalf("%d answers", len(answers))
	}
	return answers
}

// byPath recognises it by its program.
func (a *application) byPath() segment.Selector {
	return segment.Selector{Type: "unix", Value: "path:" + a.program}
}

var applications = map[string]func([]string) error{
	// asks: at each line of input, so many requests at once to args[0], by way of the socket args[1] if that is given.
	"asks": func(args []string) error {
		transport := &http.Transport{MaxIdleConnsPerHost: 100}
		if args[1] != "" {
			transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", args[1])
			}
		}
		client := &http.Client{Transport: transport}
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			var n int
			if _, err := fmt.Sscan(in.Text(), &n); err != nil {
				return err
			}
			answers, errs := make([]answer, n), make([]error, n)
			var all sync.WaitGroup
			for i := range n {
				all.Go(func() { answers[i], errs[i] = ask(client, args[0]) })
			}
			all.Wait()
			if err := errors.Join(errs...); err != nil {
				fmt.Printf("error: %q\n", err)
				continue
			}
			if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
				return err
			}
		}
		return nil
	},
	// share: connect to args[0], give the connection to a child as well, and stay.
	"share": func(args []string) error {
		f, err := dial(args[0])
		if err != nil {
			return err
		}
		cmd := inherit(f, "stay")
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		defer cmd.Wait()
		defer stdin.Close()
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	},
	// leave: connect to args[0], send a request, and at a line of input leave the connection to a child and end.
	"leave": func(args []string) error {
		f, err := dial(args[0])
		if err != nil {
			return err
		}
		if err := request(f); err != nil {
			return err
		}
		bufio.NewScanner(os.Stdin).Scan()
		cmd := inherit(f, "inherit")
		cmd.Stdin = os.Stdin
		return cmd.Start()
	},
	// become: connect to args[0], send a request, and at a line of input go on as the program args[1].
	"become": func(args []string) error {
		f, err := dial(args[0])
		if err != nil {
			return err
		}
		if err := request(f); err != nil {
			return err
		}
		one := make([]byte, len("go\n"))
		if _, err := io.ReadFull(os.Stdin, one); err != nil {
			return err
		}
		if err := unix.Dup3(int(f.Fd()), 3, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
		if _, err := unix.FcntlInt(3, unix.F_SETFD, 0); err != nil {
			return err
		}
		if err := os.Setenv(role, "inherit"); err != nil {
			return err
		}
		return unix.Exec(args[1], args[1:], os.Environ())
	},
	// inherit: say so, and at each line of input send a request on the connection that was inherited.
	"inherit": func([]string) error {
		fmt.Println("inherited")
		f := os.NewFile(3, "connection")
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			if err := request(f); err != nil {
				return err
			}
		}
		return nil
	},
	// stay: hold on to what was inherited until there is no more input.
	"stay": func([]string) error {
		fmt.Println("staying")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	},
}

func inherit(f *os.File, do string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"="+do)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdout, os.Stderr, []*os.File{f}
	return cmd
}

// dial connects to an address or to a Unix socket's path and returns the connection as a file, for others to inherit.
func dial(address string) (*os.File, error) {
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	c, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(interface{ File() (*os.File, error) }).File()
}

// request sends a request on a connection and prints the answer's status and body in one line.
func request(f *os.File) error {
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	defer c.Close()
	host := "localhost"
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		host = tcp.String()
	}
	if _, err := fmt.Fprintf(c, "GET /chat/v1/models HTTP/1.1\r\nHost: %s\r\n\r\n", host); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	fmt.Println(resp.StatusCode, string(bytes.TrimSpace(body)))
	return nil
}

// onBoth runs a test over TCP and over a Unix socket.
func onBoth(t *testing.T, test func(*testing.T, *world)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) { test(t, newWorld(t, network)) })
	}
}

// address is where a world listens, for dial.
func (w *world) address() string {
	if w.socket != "" {
		return w.socket
	}
	return w.Listener.Addr().String()
}

// TestNeverMixed has two processes ask at the same time, again and again, over connections that are kept.
func TestNeverMixed(t *testing.T) {
	test := func(t *testing.T, w *world, uids [2]int, selectors func(int, *application) segment.Selector) {
		var apps [2]*application
		var entries []issuer.Entry
		for i := range apps {
			apps[i] = start(t, uids[i], "asks", w.base+"/chat/v1/models", w.socket)
			entries = append(entries, identitytest.Entry(fmt.Sprint("app", i), selectors(uids[i], apps[i])))
		}
		w.issuer.Set(entries)
		conns := map[string]string{}
		for range 5 {
			var answers [2][]answer
			var both sync.WaitGroup
			for i, app := range apps {
				both.Go(func() { answers[i] = app.asks(t, 20) })
			}
			both.Wait()
			for i := range apps {
				for _, a := range answers[i] {
					if want := entries[i].ID.String(); a.Caller != want {
						t.Errorf("%s was taken for %s", want, a.Caller)
					}
					if before, ok := conns[a.Conn]; ok && before != a.Caller {
						t.Errorf("%s and %s have one connection", before, a.Caller)
					}
					conns[a.Conn] = a.Caller
				}
			}
		}
		if len(conns) >= 200 {
			t.Error("no connection was used twice")
		}
	}
	onBoth(t, func(t *testing.T, w *world) {
		t.Run("by program", func(t *testing.T) {
			test(t, w, [2]int{}, func(_ int, a *application) segment.Selector { return a.byPath() })
		})
		t.Run("by user", func(t *testing.T) {
			if os.Getuid() != 0 {
				t.Skip("only root can start processes of other users")
			}
			test(t, w, [2]int{65533, 65532}, func(uid int, _ *application) segment.Selector {
				return segment.Selector{Type: "unix", Value: fmt.Sprint("uid:", uid)}
			})
		})
	})
}

// TestKinds recognises an application by what only package attest knows.
func TestKinds(t *testing.T) {
	gid := fmt.Sprint(os.Getgid())
	for kind, c := range map[string]struct {
		uid   int
		value func(*testing.T, *application) string
	}{
		"unix:group": {0, func(t *testing.T, _ *application) string {
			g, err := user.LookupGroupId(gid)
			if err != nil {
				t.Skip("our group has no name")
			}
			return g.Name
		}},
		"unix:supplementary_gid": {65533, func(*testing.T, *application) string { return fmt.Sprint(further) }},
		"systemd:unit":           {0, func(t *testing.T, a *application) string { return a.join(t) }},
	} {
		t.Run(kind, func(t *testing.T) {
			if c.uid != 0 && os.Getuid() != 0 {
				t.Skip("only root can start processes of other users")
			}
			onBoth(t, func(t *testing.T, w *world) {
				app := start(t, c.uid, "asks", w.base+"/chat/v1/models", w.socket)
				plugin, fact, _ := strings.Cut(kind, ":")
				is := segment.Selector{Type: plugin, Value: fact + ":" + c.value(t, app)}
				isNot := segment.Selector{Type: plugin, Value: is.Value + "1"}
				w.issuer.Set([]issuer.Entry{
					identitytest.Entry("another", isNot, app.byPath()),
					identitytest.Entry("app", is, app.byPath()),
				})
				if a := app.asks(t, 1)[0]; a.Caller != "spiffe://example.org/app" {
					t.Errorf("got %+v", a)
				}
			})
		})
	}
}

// join moves the application into a control group of its own, and returns the systemd unit whose group it looks like.
func (a *application) join(t *testing.T) (unit string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var tree string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			tree = f[1]
		}
	}
	if tree == "" {
		t.Skip("no control groups of version 2 are mounted here")
	}
	unit = fmt.Sprintf("sallyporttest%d.service", a.cmd.Process.Pid)
	dir := filepath.Join(tree, unit)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("control groups cannot be made here: %v", err)
	}
	t.Cleanup(func() {
		a.in.Close() // ends it: a group with processes stays
		_ = a.cmd.Wait()
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(a.cmd.Process.Pid)), 0); err != nil {
		t.Skipf("processes cannot be moved to another control group here: %v", err)
	}
	is, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", a.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(is), "0::/"+unit+"\n") {
		t.Skipf("what is mounted is not the root of the control groups: %q", is)
	}
	return unit
}

// TestIPv6 connects from sockets that may be in either of the kernel's tables.
func TestIPv6(t *testing.T) {
	w := newWorld(t, "tcp")
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Skip("no IPv6 here")
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	to := &unix.SockaddrInet6{Port: w.Listener.Addr().(*net.TCPAddr).Port}
	copy(to.Addr[:], net.IPv4(127, 0, 0, 1).To16())
	if err := unix.Connect(fd, to); err != nil {
		t.Skip("no IPv4 in IPv6 here")
	}
	mapped, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // or two of our descriptors hold it, which is none of anybody's business
	w.client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) { return mapped, nil }
	if a := w.ask(t); a.Caller != "spiffe://example.org/me" {
		t.Errorf("got %+v", a)
	}
}

// TestStream has each event confirmed by the application before the next is sent.
func TestStream(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		confirmed := make(chan struct{})
		w.handle(func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Type", "text/event-stream")
			for i := range 5 {
				fmt.Fprintf(rw, "data: %d\n\n", i)
				rw.(http.Flusher).Flush()
				select {
				case <-confirmed:
				case <-r.Context().Done():
					return
				}
			}
		})
		resp, err := w.client.Get(w.base + "/chat/v1/chat/completions")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		events := bufio.NewScanner(resp.Body)
		for i := range 5 {
			if !events.Scan() || events.Text() != fmt.Sprint("data: ", i) || !events.Scan() {
				t.Fatalf("event %d: %q, %v", i, events.Text(), events.Err())
			}
			confirmed <- struct{}{}
		}
		if events.Scan() || events.Err() != nil {
			t.Errorf("then %q, %v", events.Text(), events.Err())
		}
	})
}

// TestBodyUnbuffered has each part of a body arrive before the next is sent, and the gateway see that the caller leaves.
func TestBodyUnbuffered(t *testing.T) {
	w := newWorld(t, "tcp")
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	arrived, left := make(chan string), make(chan struct{})
	w.handle(func(_ http.ResponseWriter, r *http.Request) {
		b := make([]byte, 4)
		for range 3 {
			if _, err := io.ReadFull(r.Body, b); err != nil {
				t.Error(err)
			}
			arrived <- string(b)
		}
		_, err := r.Body.Read(b)
		if err == nil || err == io.EOF {
			t.Errorf("an unfinished body ends with %v", err)
		}
		close(left)
	})
	r, body := io.Pipe()
	ctx, leave := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "POST", w.base+"/chat/v1/files", r)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := w.client.Do(req); err == nil {
			resp.Body.Close()
			t.Error("got an answer")
		}
	}()
	for i := range 3 {
		part := fmt.Sprintf("%04d", i)
		if _, err := io.WriteString(body, part); err != nil {
			t.Fatal(err)
		}
		if got := <-arrived; got != part {
			t.Errorf("got %q", got)
		}
	}
	leave()
	body.CloseWithError(context.Canceled) // or this test's own client would wait for more of it
	<-left
	<-done
}

func TestProcessEnds(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		app := start(t, 0, "asks", w.base+"/chat/v1/models", w.socket)
		w.issuer.Set([]issuer.Entry{identitytest.Entry("app", app.byPath())})
		var conns []string
		for _, a := range app.asks(t, 5) {
			if !slices.Contains(conns, a.Conn) {
				conns = append(conns, a.Conn)
			}
		}
		if err := app.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		w.wait(t, conns...)
	})
}

// TestLeftToAnother has a process end whose connection is held by its child.
func TestLeftToAnother(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		app := start(t, 0, "leave", w.address())
		w.issuer.Set([]issuer.Entry{identitytest.Entry("app", app.byPath())})
		var a answer
		code, body, _ := strings.Cut(app.line(t), " ")
		if err := json.Unmarshal([]byte(body), &a); err != nil || code != "200" {
			t.Fatalf("%s %s: %v", code, body, err)
		}
		if got := app.tell(t, "go"); got != "inherited" {
			t.Fatal(got)
		}
		w.wait(t, a.Conn)
	})
}

func TestAnotherProgram(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		trusted := filepath.Join(open(t), "trusted")
		copyProgram(t, trusted)
		app := start(t, 0, "become", w.address(), trusted)
		w.issuer.Set([]issuer.Entry{
			identitytest.Entry("app", app.byPath()),
			identitytest.Entry("trusted", segment.Selector{Type: "unix", Value: "path:" + trusted}),
		})
		if got := app.line(t); !strings.HasPrefix(got, "200 ") || !strings.Contains(got, "spiffe://example.org/app") {
			t.Fatal(got)
		}
		if got := app.tell(t, "go"); got != "inherited" {
			t.Fatal(got)
		}
		if got := app.tell(t, "go"); !strings.HasPrefix(got, "503 ") || !strings.Contains(got, "another program") {
			t.Error(got)
		}
	})
}

// TestSharedSocket has a connection held by two processes when it is looked at.
func TestSharedSocket(t *testing.T) {
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	app := start(t, 0, "share", l.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := app.line(t); got != "staying" {
		t.Fatal(got)
	}
	var s sockets
	if p, err := s.hold(t.Context(), c); err == nil || !strings.Contains(err.Error(), "2 processes hold") {
		t.Errorf("got %+v, %v", p, err)
	}
	// The client's end is gone, and nobody's.
	app.in.Close()
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Fatal(err)
	}
	if p, err := s.hold(t.Context(), c); err == nil {
		t.Errorf("got %+v", p)
	}
}

// TestAnothersSocket has a process of one user hold a socket that another user made.
func TestAnothersSocket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start processes of other users")
	}
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := dial(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	program := filepath.Join(open(t), "app")
	copyProgram(t, program)
	cmd := inherit(f, "stay")
	cmd.Path, cmd.Stdout = program, nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65533, Gid: 65533}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	f.Close()
	var s sockets
	if p, err := s.hold(t.Context(), c); err == nil || !strings.Contains(err.Error(), "user 0 made the socket") {
		t.Errorf("got %+v, %v", p, err)
	}
}

// stream begins a request whose answer is what the test sends, until it closes the channel.
func (w *world) stream(t *testing.T) (io.Reader, chan<- string) {
	t.Helper()
	events := make(chan string)
	w.handle(func(rw http.ResponseWriter, _ *http.Request) {
		rw.(http.Flusher).Flush()
		for e := range events {
			_, _ = io.WriteString(rw, e)
			rw.(http.Flusher).Flush()
		}
	})
	stream, err := w.client.Get(w.base + "/chat/v1/chat/completions")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stream.Body.Close() })
	return stream.Body, events
}

func TestRotation(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		me := identitytest.Entry("me", identitytest.Me())
		w.issuer.Set([]issuer.Entry{me})
		before := w.ask(t)
		if again := w.ask(t); again.Conn != before.Conn {
			t.Error("connections are not kept")
		}
		stream, events := w.stream(t)
		w.handle(nil)
		me.DNSNames = []string{"me.internal"} // another certificate
		w.issuer.Set([]issuer.Entry{me})
		after := w.ask(t)
		for after.Serial == before.Serial { // it takes a moment, in which the one before is good
			after = w.ask(t)
		}
		if after.Conn == before.Conn || after.Caller != before.Caller {
			t.Errorf("got %+v", after)
		}
		events <- "still here" // over the connection from before
		close(events)
		if b, err := io.ReadAll(stream); err != nil || string(b) != "still here" {
			t.Errorf("the stream brought %q, %v", b, err)
		}
	})
}

func TestIdentityLost(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		kept := w.ask(t)
		ended := make(chan struct{})
		w.handle(func(rw http.ResponseWriter, r *http.Request) {
			rw.(http.Flusher).Flush()
			<-r.Context().Done()
			close(ended)
		})
		stream, err := w.client.Get(w.base + "/chat/v1/chat/completions")
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Body.Close()
		w.handle(nil)
		w.issuer.Set(nil)
		if _, err := io.ReadAll(stream.Body); err == nil {
			t.Error("the stream came to a good end")
		}
		<-ended
		w.wait(t, kept.Conn)
		p := w.refusal(t, w.get(t, "/chat/v1/models"))
		if p.status != 503 || p.code != "no_identity" || !strings.Contains(p.message, identitytest.Me().String()) {
			t.Errorf("got %+v", p)
		}
		// Under another name, nothing of the old one is used.
		w.issuer.Set([]issuer.Entry{identitytest.Entry("other", identitytest.Me())})
		if a := w.ask(t); a.Caller != "spiffe://example.org/other" || a.Conn == kept.Conn {
			t.Errorf("got %+v", a)
		}
		w.issuer.Set([]issuer.Entry{identitytest.Entry("third", identitytest.Me())})
		for { // renamed without a gap; what is under way at that moment is not answered
			a, err := ask(w.client, w.base+"/chat/v1/models")
			if err == nil && a.Caller == "spiffe://example.org/third" {
				break
			}
			if err != nil && !strings.Contains(err.Error(), errLost.Error()) {
				t.Fatal(err)
			}
		}
	})
}

// flaky is a source that can be cut off.
type flaky struct {
	*issuer.Issuer
	mu  sync.Mutex
	err error
}

func (f *flaky) Entitled(ctx context.Context) (issuer.View, error) {
	f.mu.Lock()
	err := f.err
	f.mu.Unlock()
	if err != nil {
		return issuer.View{}, err
	}
	return f.Issuer.Entitled(ctx)
}

func (f *flaky) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func TestControlPlaneAway(t *testing.T) {
	a := identitytest.Authority(t)
	w := &world{gateway: startGateway(t, a), issuer: identitytest.Issuer(a, Selectors)}
	source := &flaky{Issuer: w.issuer, err: status.Error(codes.Unavailable, "no control plane")}
	w.start(t, "tcp", source)
	me := identitytest.Entry("me", identitytest.Me())
	w.issuer.Set([]issuer.Entry{me})
	p := w.refusal(t, w.get(t, "/chat/v1/models"))
	if p.status != 503 || p.code != "identity_unavailable" || !strings.Contains(p.message, "no control plane") {
		t.Errorf("got %+v", p)
	}
	source.set(nil)
	before := w.ask(t)
	source.set(status.Error(codes.Unavailable, "no control plane"))
	me.DNSNames = []string{"me.internal"} // would be another certificate
	w.issuer.Set([]issuer.Entry{me})
	if after := w.ask(t); after.Serial != before.Serial {
		t.Error("what was held is not used")
	}
}

func TestUnusedIdentityIsLetGo(t *testing.T) {
	w := newWorld(t, "tcp")
	w.server.mu.Lock()
	w.server.linger = 20 * time.Millisecond
	w.server.mu.Unlock()
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	before := w.ask(t)
	w.wait(t, before.Conn)
	if after := w.ask(t); after.Serial == before.Serial {
		t.Error("the SVID was kept")
	}
}

func TestWhatTheGatewaySees(t *testing.T) {
	w := newWorld(t, "tcp")
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	r, err := http.NewRequestWithContext(t.Context(), "POST", w.base+"/chat/v1/a%2Fb/%E4%BD%A0?x=%zz;y&x=1", strings.NewReader(`{"model":"m"}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"Authorization", "Proxy-Authorization", "X-Api-Key", "Api-Key", "X-Chroma-Token", "X-Forwarded-For",
		"Forwarded", "Keep-Alive", "X-Hop", "Upgrade"} {
		r.Header.Set(h, "secret")
	}
	r.Header.Set("Connection", "x-hop, upgrade")
	r.Header.Set("Traceparent", "00-1-2-3")
	resp, err := w.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var a answer
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		t.Fatal(err)
	}
	for name, values := range a.Header {
		if slices.Contains(values, "secret") {
			t.Errorf("%s got through", name)
		}
	}
	if a.Header.Get("Traceparent") != "00-1-2-3" || a.Header.Get("Accept-Encoding") != "gzip" { // the latter is this client's own
		t.Errorf("got %v", a.Header)
	}
	if a.URI != "/v1/a%2Fb/%E4%BD%A0?x=%zz;y&x=1" || a.Method != "POST" || a.Body != `{"model":"m"}` {
		t.Errorf("got %s %s %s", a.Method, a.URI, a.Body)
	}
	if a.SNI != "chat.models.internal" || a.Host != "chat.models.internal" {
		t.Errorf("SNI %s, host %s", a.SNI, a.Host)
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t, "tcp")
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	port := w.Listener.Addr().(*net.TCPAddr).Port
	for _, c := range []struct {
		name, path, host string
		header           [2]string
		status           int
		code             string
	}{
		{name: "unknown endpoint", path: "/none/v1", status: 404, code: "unknown_endpoint"},
		{name: "no endpoint", path: "/", status: 404, code: "unknown_endpoint"},
		{name: "empty endpoint", path: "//chat/v1", status: 404, code: "unknown_endpoint"},
		{name: "escaped endpoint", path: "/ch%61t/v1", status: 404, code: "unknown_endpoint"},
		{name: "nothing told yet", path: "/early/v1", status: 503, code: "endpoints_unknown"},
		{name: "no address", path: "/lost/v1", status: 503, code: "gateway_unknown"},
		{name: "another host", path: "/chat/v1", host: fmt.Sprint("evil.example:", port), status: 403, code: "not_an_application"},
		{name: "another port", path: "/chat/v1", host: "127.0.0.1:1", status: 403, code: "not_an_application"},
		{name: "no port", path: "/chat/v1", host: "localhost", status: 403, code: "not_an_application"},
		{name: "a name below localhost", path: "/chat/v1", host: fmt.Sprint("a.localhost:", port), status: 403, code: "not_an_application"},
		{name: "an address", path: "/chat/v1", host: fmt.Sprint("10.0.0.1:", port), status: 403, code: "not_an_application"},
		{name: "a page", path: "/chat/v1", header: [2]string{"Origin", "https://evil.example"}, status: 403, code: "not_an_application"},
		{name: "a page without a name", path: "/chat/v1", header: [2]string{"Origin", "null"}, status: 403, code: "not_an_application"},
		{name: "a picture", path: "/chat/v1", header: [2]string{"Sec-Fetch-Site", "cross-site"}, status: 403, code: "not_an_application"},
		{name: "a page of ours", path: "/chat/v1", header: [2]string{"Sec-Fetch-Site", "same-origin"}, status: 403, code: "not_an_application"},
		{name: "Node's fetch", path: "/chat/v1", header: [2]string{"Sec-Fetch-Mode", "cors"}},
		{name: "localhost", path: "/chat/v1", host: fmt.Sprint("LOCALHOST:", port)},
		{name: "IPv6", path: "/chat/v1", host: fmt.Sprint("[::1]:", port)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := w.get(t, c.path)
			r.Host = c.host
			if c.header[0] != "" {
				r.Header.Set(c.header[0], c.header[1])
			}
			if c.status != 0 {
				if p := w.refusal(t, r); p.status != c.status || p.code != c.code {
					t.Errorf("got %+v", p)
				}
				return
			}
			resp, err := w.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != 200 {
				t.Error(resp.Status)
			}
		})
	}
}

func TestGatewayProblems(t *testing.T) {
	good := newWorld(t, "tcp")
	stranger := startGateway(t, identitytest.Authority(t)) // of another trust domain with the same name
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for name, c := range map[string]struct {
		change func(*Target)
		status int
		code   string
	}{
		"nobody":               {func(g *Target) { g.Addresses = []string{closed.Addr().String()} }, 503, "gateway_unreachable"},
		"another workload":     {func(g *Target) { g.IDs = []spiffeid.ID{spiffeid.RequireFromString("spiffe://example.org/other")} }, 502, "gateway_not_trusted"},
		"no ID":                {func(g *Target) { g.IDs = nil }, 502, "gateway_not_trusted"},
		"another trust domain": {func(g *Target) { g.Addresses = stranger.target.Addresses }, 502, "gateway_not_trusted"},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{gateway: &gateway{target: good.target}, issuer: good.issuer}
			c.change(&w.target)
			w.start(t, "tcp", w.issuer)
			w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
			if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.status != c.status || p.code != c.code {
				t.Errorf("got %+v", p)
			}
		})
	}
	t.Run("does not accept us", func(t *testing.T) {
		a := identitytest.Authority(t)
		w := &world{gateway: &gateway{target: good.target}, issuer: identitytest.Issuer(a, Selectors)}
		// It is trusted, and does not trust.
		own := spiffebundle.FromX509Bundle(good.authority.Bundle())
		own.AddX509Authority(a.Root())
		w.issuer.SetBundles(issuer.Bundles{Own: own})
		w.start(t, "tcp", w.issuer)
		w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		if p := w.refusal(t, w.get(t, "/chat/v1/models")); p.status != 502 || p.code != "identity_not_accepted" {
			t.Errorf("got %+v", p)
		}
	})
	t.Run("breaks off", func(t *testing.T) {
		good.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
		good.handle(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		if p := good.refusal(t, good.get(t, "/chat/v1/models")); p.status != 502 || p.code != "gateway_error" {
			t.Errorf("got %+v", p)
		}
	})
}

func TestListen(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "localhost:0", "127.1.2.3:0", "[::1]:0"} {
		l, err := Listen(t.Context(), address)
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue // no IPv6
		}
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		l.Close()
	}
	for _, address := range []string{"0.0.0.0:0", ":0", "[::]:0", "10.0.0.1:0", "example.org:0", "127.0.0.1", "", "localhost.example.org:0"} {
		if l, err := Listen(t.Context(), address); err == nil {
			t.Errorf("listens on %s", l.Addr())
			l.Close()
		}
	}
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := (&Forwarder{Listener: l}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "not a loopback address") {
		t.Errorf("got %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestTooMany(t *testing.T) {
	s := slots{all: 3, user: 2, used: map[int]int{}}
	for range 2 {
		if !s.take() || !s.takeFor(7) {
			t.Fatal("refused too early")
		}
	}
	if !s.take() || s.takeFor(7) {
		t.Error("one user has too many")
	}
	if s.take() {
		t.Error("all have too many")
	}
	s.release(nil)
	if !s.take() || !s.takeFor(8) {
		t.Error("another user's was not free")
	}
	seven, eight := 7, 8
	s.release(&seven)
	s.release(&seven)
	s.release(&eight)
	if s.total != 0 || len(s.used) != 0 {
		t.Errorf("left: %d, %v", s.total, s.used)
	}
}

// TestTooManyOfOneUser is told so and not left to guess.
func TestTooManyOfOneUser(t *testing.T) {
	w := newWorld(t, "unix")
	w.slots.mu.Lock()
	w.slots.user = 1
	w.slots.mu.Unlock()
	w.issuer.Set([]issuer.Entry{identitytest.Entry("me", identitytest.Me())})
	c, err := net.Dial("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "GET /chat/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	defer resp.Body.Close()
	if p := w.refusal(t, w.get(t, "/chat/")); p.status != 503 || !strings.Contains(p.message, "connections already") {
		t.Errorf("got %+v", p)
	}
	c.Close()
}

func TestSelectors(t *testing.T) {
	app := start(t, 0, "stay")
	if got := app.line(t); got != "staying" {
		t.Fatal(got)
	}
	p, err := attest.HoldPID(app.cmd.Process.Pid, attest.NewHashes())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx := context.WithValue(t.Context(), processKey{}, p)
	program, err := os.ReadFile(app.program)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(program)
	for range 2 {
		got, err := Selectors(ctx, []string{"unix:sha256"})
		if err != nil {
			t.Fatal(err)
		}
		var text []string
		for _, s := range got {
			text = append(text, s.String())
		}
		for _, want := range []string{fmt.Sprint("unix:uid:", os.Getuid()), fmt.Sprint("unix:gid:", os.Getgid()),
			"unix:path:" + app.program, "unix:sha256:" + hex.EncodeToString(digest[:])} {
			if !slices.Contains(text, want) {
				t.Errorf("%s is not in %q", want, text)
			}
		}
	}
	begun := p.Program
	for name, before := range map[string]string{"another program": "/proc/self/exe", "an unreadable one": "/nonexistent"} {
		p.Program, _ = os.Stat(before)
		if got, err := Selectors(ctx, nil); err == nil || !strings.Contains(err.Error(), "another program") {
			t.Errorf("%s when it connected: got %v, %v", name, got, err)
		}
	}
	p.Program = begun
	app.in.Close()
	_ = app.cmd.Wait()
	if got, err := Selectors(ctx, nil); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := Selectors(t.Context(), nil); err == nil {
		t.Errorf("nobody's: %v", got)
	}
}
