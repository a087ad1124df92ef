package attest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// role tells this test's program that it is a child, and what to do.
const role = "ATTEST_TEST_ROLE"

func TestMain(m *testing.M) {
	if do := children[os.Getenv(role)]; do != nil {
		runtime.LockOSThread() // here it is the first thread still, which "hide" needs
		if err := do(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// server answers every call on a socket with its caller's selectors.
func server(t *testing.T) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(NewCredentials()), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		selectors, err := Selectors(stream.Context(), true)
		if err != nil {
			return err
		}
		return stream.SendMsg(wrapperspb.String(fmt.Sprint(selectors)))
	}))
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// child is a process that runs this test's program, from a copy.
type child struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
}

// start runs a copy of this program, made at the path.
func start(t *testing.T, program, do string, args ...string) child {
	t.Helper()
	copyProgram(t, program)
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), role+"="+do)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Not a StdoutPipe: what the child leaves behind may go on writing after it.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := errors.Join(cmd.Start(), w.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // ends it
		_ = cmd.Wait()
		r.Close()
	})
	return child{cmd, in, bufio.NewScanner(r)}
}

// ask wakes the child and returns the line that it answers.
func (c child) ask(t *testing.T) string {
	t.Helper()
	if _, err := io.WriteString(c.in, "go\n"); err != nil {
		t.Fatal(err)
	}
	return c.line(t)
}

func (c child) line(t *testing.T) string {
	t.Helper()
	if !c.lines.Scan() {
		t.Fatalf("child: %v", c.lines.Err())
	}
	return c.lines.Text()
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

var children = map[string]func() error{
	// calls: at each line of input, call the server at args[1] and print what it answers.
	"calls": func() error {
		cc, err := grpc.NewClient("unix:"+os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			var answer wrapperspb.StringValue
			if err := cc.Invoke(context.Background(), "/a/b", &emptypb.Empty{}, &answer); err != nil {
				fmt.Println("error:", err)
			} else {
				fmt.Println(answer.Value)
			}
		}
		return nil
	},
	// become: connect to args[1]; at a line of input, go on with the connection as the program at args[2].
	"become": func() error {
		f, err := dial(os.Args[1])
		if err != nil {
			return err
		}
		in := bufio.NewScanner(os.Stdin)
		in.Scan()
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil { // inherited
			return err
		}
		if err := os.Setenv(role, "stay"); err != nil {
			return err
		}
		return unix.Exec(os.Args[2], os.Args[2:], os.Environ())
	},
	// leave: connect to args[1]; at a line of input, leave the connection to a child and end.
	"leave": func() error {
		f, err := dial(os.Args[1])
		if err != nil {
			return err
		}
		in := bufio.NewScanner(os.Stdin)
		in.Scan()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), role+"=stay")
		cmd.Stdin, cmd.Stdout, cmd.ExtraFiles = os.Stdin, os.Stdout, []*os.File{f}
		return cmd.Start()
	},
	// hide: connect to args[1]; at a line of input end the first thread, but not the process. From then on nobody may
	// read its program, as if it were another user's.
	"hide": func() error {
		if unix.Gettid() != os.Getpid() {
			return errors.New("not the first thread")
		}
		if _, err := dial(os.Args[1]); err != nil {
			return err
		}
		in := bufio.NewScanner(os.Stdin)
		in.Scan()
		go func() {
			for err := error(nil); err == nil; runtime.Gosched() {
				_, err = os.Readlink("/proc/self/exe")
			}
			fmt.Println("hidden")
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
		_, _, errno := unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
		return errno
	},
	// stay: hold on to what was inherited until there is no more input.
	"stay": func() error {
		fmt.Println("staying")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	},
}

func TestSelectors(t *testing.T) {
	socket := server(t)
	program := filepath.Join(t.TempDir(), "app")
	c := start(t, program, "calls", socket)
	got := c.ask(t)
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("[unix:uid:%s unix:user:%s unix:gid:%s unix:path:%s unix:sha256:%s]",
		me.Uid, me.Username, me.Gid, program, sum(t, program))
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}

	// A program that is no longer where it was has no path, whatever is there instead.
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	gone := strings.Replace(want, "unix:path:"+program+" ", "", 1)
	if got := c.ask(t); got != gone {
		t.Errorf("deleted: got %s\nwant %s", got, gone)
	}
	copyProgram(t, program)
	copyProgram(t, program+" (deleted)")
	if got := c.ask(t); got != gone {
		t.Errorf("replaced: got %s\nwant %s", got, gone)
	}
}

// connection starts a child that connects, and holds it.
func connection(t *testing.T, do string, args ...string) (child, *process) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c := start(t, filepath.Join(t.TempDir(), "app"), do, append([]string{socket}, args...)...)
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	p, err := hold(accepted.(*net.UnixConn), newHashes())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.pidfd.Close() })
	if seen, err := p.look(false); err != nil || seen.PID != c.cmd.Process.Pid || seen.Path == "" || seen.SHA256 != "" {
		t.Fatalf("got %+v, %v", seen, err)
	}
	return c, p
}

func TestAnotherProgram(t *testing.T) {
	trusted := filepath.Join(t.TempDir(), "trusted")
	copyProgram(t, trusted)
	c, p := connection(t, "become", trusted)
	if got := c.ask(t); got != "staying" {
		t.Fatal(got)
	}
	if seen, err := p.look(true); err == nil || !strings.Contains(err.Error(), "another program") || seen != (Process{}) {
		t.Errorf("got %+v, %v", seen, err)
	}
}

func TestUnreadableProgram(t *testing.T) {
	c, p := connection(t, "hide")
	begun := p.exe
	p.exe = nil // as if it had been unreadable
	if seen, err := p.look(true); err == nil || seen != (Process{}) {
		t.Errorf("readable only now: got %+v, %v", seen, err)
	}
	p.exe = begun
	if got := c.ask(t); got != "hidden" {
		t.Fatal(got)
	}
	if seen, err := p.look(true); err == nil || !strings.Contains(err.Error(), "another program") || seen != (Process{}) {
		t.Errorf("unreadable only now: got %+v, %v", seen, err)
	}
	p.exe = nil
	want := Process{PID: c.cmd.Process.Pid, UID: os.Getuid(), GID: os.Getgid()}
	seen, err := p.look(true)
	if want.User = seen.User; err != nil || seen != want {
		t.Errorf("never readable: got %+v, %v", seen, err)
	}
}

func TestConnectionLeftToAnother(t *testing.T) {
	c, p := connection(t, "leave")
	if got := c.ask(t); got != "staying" {
		t.Fatal(got)
	}
	if err := c.cmd.Wait(); err != nil { // from here on, its PID may be anybody's
		t.Fatal(err)
	}
	if seen, err := p.look(true); err == nil || !strings.Contains(err.Error(), "has ended") || seen != (Process{}) {
		t.Errorf("got %+v, %v", seen, err)
	}
}

func TestConnectionClosed(t *testing.T) {
	_, p := connection(t, "become", "")
	if err := p.pidfd.Close(); err != nil {
		t.Fatal(err)
	}
	if seen, err := p.look(true); err == nil || seen != (Process{}) {
		t.Errorf("got %+v, %v", seen, err)
	}
}

func TestUnattested(t *testing.T) {
	if selectors, err := Selectors(t.Context(), true); err == nil || selectors != nil {
		t.Errorf("got %v, %v", selectors, err)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := NewCredentials().ServerHandshake(a); err == nil {
		t.Error("accepted a connection that is on no Unix socket")
	}
}

func TestHashes(t *testing.T) {
	h := newHashes()
	dir := t.TempDir()
	hash := func(path string) string {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return h.of(path, info)
	}
	path := filepath.Join(dir, "a")
	for _, content := range []string{"one", "two"} { // the same file, of the same size
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := hash(path); got != sum(t, path) {
			t.Errorf("%s: %s", content, got)
		}
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "b")
	if err := os.WriteFile(other, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := newHashes().of(other, before); got != "" {
		t.Error("hashed another file than the one asked for")
	}
	large := filepath.Join(dir, "large")
	f, err := os.Create(large)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(maxProgram+1), f.Close()); err != nil {
		t.Fatal(err)
	}
	if got := hash(large); got != "" {
		t.Error("hashed a file without bound")
	}
	for i := range maxHashes + 10 {
		name := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		hash(name)
	}
	if n := len(h.sums); n != maxHashes {
		t.Errorf("%d hashes are kept", n)
	}
}

func TestNothingOfAProgram(t *testing.T) {
	got := Process{PID: 1, UID: 2, GID: 3}.Selectors()
	var text []string
	for _, s := range got {
		text = append(text, s.String())
	}
	if want := []string{"unix:uid:2", "unix:gid:3"}; !slices.Equal(text, want) {
		t.Errorf("got %q", text)
	}
}

func sum(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}

// dial connects and returns the connection as a file, for other programs to inherit.
func dial(socket string) (*os.File, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn).File()
}
