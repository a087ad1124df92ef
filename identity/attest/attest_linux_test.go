package attest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// all is every kind of selector that costs something.
var all = []string{
	"unix:group", "unix:supplementary_gid", "unix:supplementary_group", "unix:sha256", "systemd:unit", "container:id", "k8s:pod-uid",
}

func empty(p Process) bool { return reflect.DeepEqual(p, Process{}) }

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

// server answers every call on a socket with its caller's selectors of these kinds and of those that cost nothing.
func server(t *testing.T, kinds ...string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(NewCredentials()), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		selectors, err := Selectors(stream.Context(), kinds)
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
	return startAs(t, nil, program, do, args...)
}

// startAs is start, with the rights of other users or groups.
func startAs(t *testing.T, who *syscall.Credential, program, do string, args ...string) child {
	t.Helper()
	copyProgram(t, program)
	cmd := exec.Command(program, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
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
	socket := server(t, "unix:sha256")
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

func TestGroups(t *testing.T) {
	supplementary, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	var who *syscall.Credential
	if os.Getuid() == 0 { // any will do
		who = &syscall.Credential{Gid: uint32(os.Getgid()), Groups: []uint32{1, 4_000_000_000}}
		supplementary = []int{1, 4_000_000_000}
	}
	c := startAs(t, who, filepath.Join(t.TempDir(), "app"), "calls", server(t, "unix:group", "unix:supplementary_group"))
	got := c.ask(t)
	want := fmt.Sprintf("unix:gid:%d%s ", os.Getgid(), optional(" unix:group:", groupName(os.Getgid())))
	for _, gid := range supplementary {
		want += fmt.Sprintf("unix:supplementary_gid:%d%s ", gid, optional(" unix:supplementary_group:", groupName(gid)))
	}
	if !strings.Contains(got, want+"unix:path:") {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func optional(before, s string) string {
	if s == "" {
		return ""
	}
	return before + s
}

func TestGroupsOf(t *testing.T) {
	many := strings.Repeat("5 ", maxGroups)
	for _, c := range []struct {
		status string
		want   int
	}{
		{"Name:\tapp\nGid:\t7\t7\t7\t7\nFDSize:\t64\nGroups:\t4 27 1000 \nNStgid:\t1\n", 3},
		{"Groups:\t \n", 0},
		{"Name:\tGroups: 5\nGroups:\t4\n", 1},
		{"Groups:\t4\nGroups:\t5 6\n", 1},
		{"Groups:\t" + many + "\n", maxGroups},
		{"Groups:\t" + many + "5\n", 0},
		{"Groups:\t4 -1\n", 0},
		{"Groups:\t4 adm\n", 0},
		{"Groups:\t4 4294967296\n", 0},
		{"", 0},
	} {
		if got := groupsOf(c.status); len(got) != c.want {
			t.Errorf("%.40q has %v", c.status, got)
		}
	}
}

// What nobody asks for is not looked for.
func TestNothingUnasked(t *testing.T) {
	_, p := connection(t, "become", "")
	seen, err := p.look(t.Context(), wantsOf([]string{"unix:uid", "unix:path", "k8s:ns"}))
	if err != nil || seen.Path == "" {
		t.Fatalf("got %+v, %v", seen, err)
	}
	seen.User, seen.Path = "", ""
	if want := (Process{PID: seen.PID, UID: os.Getuid(), GID: os.Getgid()}); !reflect.DeepEqual(seen, want) {
		t.Errorf("got %+v", seen)
	}
}

// cgroupTree returns where a tree of control groups is mounted, as a type and with an option.
func cgroupTree(t *testing.T, kind, option string) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 3 && f[2] == kind && (option == "" || slices.Contains(strings.Split(f[3], ","), option)) {
			return f[1]
		}
	}
	return ""
}

// group makes a control group until the test ends. All the groups above it that it makes are removed, too.
func group(t *testing.T, tree, path string) string {
	t.Helper()
	for dir := tree; path != ""; {
		name, rest, _ := strings.Cut(path, "/")
		dir, path = filepath.Join(dir, name), rest
		err := os.Mkdir(dir, 0o755)
		switch {
		case err == nil:
			t.Cleanup(func() {
				if err := os.Remove(dir); err != nil {
					t.Error(err)
				}
			})
		case !errors.Is(err, fs.ErrExist):
			t.Skipf("control groups cannot be made here: %v", err)
		}
		if path == "" {
			return dir
		}
	}
	return tree
}

// A process in real control groups. Its user may have made those below, whatever they are called.
func TestControlGroups(t *testing.T) {
	v2 := cgroupTree(t, "cgroup2", "")
	if v2 == "" {
		t.Skip("no control groups of version 2 are mounted here")
	}
	id := strings.Repeat("0123456789abcdef", 4)
	mine := fmt.Sprintf("sallyporttest%d", os.Getpid())
	for _, c := range []struct{ v2, v1, want string }{
		{mine + ".service", "", "[systemd:unit:" + mine + ".service]"},
		{mine + ".slice/" + mine + "-a.slice/" + mine + "@1.service/other.service", "", "[systemd:unit:" + mine + "@1.service]"},
		{mine + ".service/docker-" + id + ".scope", "", "[systemd:unit:" + mine + ".service]"},
		{mine + ".slice/docker-" + id + ".scope/libpod-" + strings.Repeat("f", 64) + ".scope", "", "[systemd:unit:docker-" + id + ".scope container:id:" + id + "]"},
		{mine, "", "[]"},
		{mine + ".service", mine + ".service/a", "[systemd:unit:" + mine + ".service]"},
		{mine + ".service", mine + "other.service", "[]"},
		{mine + ".service", mine + ".slice/docker-" + id + ".scope", "[container:id:" + id + "]"},
	} {
		t.Run(c.v2+" "+c.v1, func(t *testing.T) {
			join := map[string]string{group(t, v2, c.v2): "0::/" + c.v2}
			if c.v1 != "" {
				v1 := cgroupTree(t, "cgroup", "name=systemd")
				if v1 == "" {
					t.Skip("systemd's control groups of version 1 are not mounted here")
				}
				join[group(t, v1, c.v1)] = ":name=systemd:/" + c.v1
			}
			child := start(t, filepath.Join(t.TempDir(), "app"), "calls", server(t, "systemd:unit", "container:id", "k8s:pod-uid"))
			for dir, line := range join {
				if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(child.cmd.Process.Pid)), 0); err != nil {
					t.Skipf("processes cannot be moved to another control group here: %v", err)
				}
				is, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", child.cmd.Process.Pid))
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(string(is), line+"\n") {
					t.Skipf("what is mounted is not the root of the control groups: %q is not in %q", line, is)
				}
			}
			answer := child.ask(t)
			_, after, _ := strings.Cut(answer, "unix:path:")
			_, got, _ := strings.Cut(strings.TrimSuffix(after, "]"), " ")
			if "["+got+"]" != c.want {
				t.Errorf("got %s, want %s", answer, c.want)
			}
		})
	}
}

// connection starts a child that connects, and holds it.
func connection(t *testing.T, do string, args ...string) (child, *Held) {
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
	p, err := Hold(accepted.(*net.UnixConn), NewHashes())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if seen, err := p.look(t.Context(), wants{}); err != nil || seen.PID != c.cmd.Process.Pid || seen.Path == "" || seen.SHA256 != "" {
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
	if seen, err := p.look(t.Context(), wantsOf(all)); err == nil || !strings.Contains(err.Error(), "another program") || !empty(seen) {
		t.Errorf("got %+v, %v", seen, err)
	}
}

func TestUnreadableProgram(t *testing.T) {
	c, p := connection(t, "hide")
	begun := p.Program
	p.Program = nil // as if it had been unreadable
	if seen, err := p.look(t.Context(), wantsOf(all)); err == nil || !empty(seen) {
		t.Errorf("readable only now: got %+v, %v", seen, err)
	}
	p.Program = begun
	if got := c.ask(t); got != "hidden" {
		t.Fatal(got)
	}
	if seen, err := p.look(t.Context(), wantsOf(all)); err == nil || !strings.Contains(err.Error(), "another program") || !empty(seen) {
		t.Errorf("unreadable only now: got %+v, %v", seen, err)
	}
	p.Program = nil
	want := Process{PID: c.cmd.Process.Pid, UID: os.Getuid(), GID: os.Getgid()}
	seen, err := p.look(t.Context(), wants{hash: true})
	if want.User = seen.User; err != nil || !reflect.DeepEqual(seen, want) {
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
	if seen, err := p.look(t.Context(), wantsOf(all)); err == nil || !strings.Contains(err.Error(), "has ended") || !empty(seen) {
		t.Errorf("got %+v, %v", seen, err)
	}
}

func TestConnectionClosed(t *testing.T) {
	_, p := connection(t, "become", "")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if seen, err := p.look(t.Context(), wantsOf(all)); err == nil || !empty(seen) {
		t.Errorf("got %+v, %v", seen, err)
	}
}

// A server that finds its callers in another way gets no more than it holds.
func TestHeld(t *testing.T) {
	c, p := connection(t, "become", "")
	want := sum(t, c.cmd.Path)
	if seen, err := p.Look(t.Context(), all); err != nil || seen.SHA256 != want || seen.Group != groupName(os.Getgid()) {
		t.Errorf("got %+v, %v", seen, err)
	}
	for name, held := range map[string]Held{
		"nothing":           {},
		"not by a pidfd":    {PID: p.PID, UID: p.UID, GID: p.GID, Program: p.Program, hashes: p.hashes},
		"of no program yet": {PID: p.PID, UID: p.UID, GID: p.GID, pidfd: p.pidfd, hashes: p.hashes},
	} {
		if seen, err := held.Look(t.Context(), []string{"unix:group", "systemd:unit"}); err == nil || !empty(seen) {
			t.Errorf("%s: got %+v, %v", name, seen, err)
		}
	}
}

func TestEffective(t *testing.T) {
	for status, want := range map[string]int{
		"Name:\tapp\nUid:\t1000\t7\t1000\t7\nGid:\t1\t2\t3\t4\n": 7,
		"Name:\tUid: 0 0 0 0\nUid:\t1\t2\t3\t4\n":                2,
		"Uid:\t1\t2\t3\n":     -1,
		"Uid:\t1\t-2\t3\t4\n": -1,
		"Gid:\t1\t2\t3\t4\n":  -1,
		"":                    -1,
	} {
		got, err := effective(status, "Uid:")
		if (err != nil) != (want < 0) || want >= 0 && got != want {
			t.Errorf("%q: got %d, %v", status, got, err)
		}
	}
}

func TestUnattested(t *testing.T) {
	if selectors, err := Selectors(t.Context(), all); err == nil || selectors != nil {
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
	h := NewHashes()
	dir := t.TempDir()
	hash := func(path string) string {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		sum, err := h.of(t.Context(), 0, path, info)
		if err != nil {
			t.Fatal(err)
		}
		return sum
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
	if got, err := NewHashes().of(t.Context(), 0, other, before); got != "" || err != nil {
		t.Errorf("hashed another file than the one asked for: %v", err)
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

// One user waits behind himself, two users go on, and who is gone does not wait.
func TestHashesFewAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHashes()
		entered := make(chan uint32, 10)
		enter := func(ctx context.Context, uid uint32) chan<- struct{} {
			leave := make(chan struct{})
			go func() {
				done, err := h.enter(ctx, uid)
				if err != nil {
					return
				}
				entered <- uid
				<-leave
				done()
			}()
			synctest.Wait()
			return leave
		}
		inside := func(want ...uint32) {
			t.Helper()
			var got []uint32
			for synctest.Wait(); len(entered) > 0; {
				got = append(got, <-entered)
			}
			if !slices.Equal(got, want) {
				t.Errorf("%d entered, want %d", got, want)
			}
		}
		first := enter(t.Context(), 1)
		inside(1)
		again := enter(t.Context(), 1)
		inside()
		other := enter(t.Context(), 2)
		inside(2)
		gone, leave := context.WithCancel(t.Context())
		enter(gone, 3)
		third := enter(t.Context(), 4)
		inside()
		leave() // 3 is gone before its turn
		inside()
		close(other)
		inside(4)
		close(first)
		inside(1)
		close(again)
		close(third)
		synctest.Wait()
		if len(h.turns) != 0 || len(h.readers) != 0 {
			t.Errorf("%d users and %d readers are left", len(h.turns), len(h.readers))
		}
	})
}

func TestHashNotWaitedFor(t *testing.T) {
	c, p := connection(t, "become", "")
	stop := make([]func(), maxReaders)
	for i := range stop {
		var err error
		if stop[i], err = p.hashes.enter(t.Context(), uint32(1_000_000+i)); err != nil { // others, whose programs take long
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if seen, err := p.look(ctx, wants{hash: true}); !errors.Is(err, context.Canceled) || !empty(seen) {
		t.Errorf("got %+v, %v", seen, err)
	}
	for _, f := range stop {
		f()
	}
	if seen, err := p.look(t.Context(), wants{hash: true}); err != nil || seen.SHA256 != sum(t, c.cmd.Path) {
		t.Errorf("got %+v, %v", seen, err)
	}
	if seen, err := p.look(ctx, wants{hash: true}); err != nil || seen.SHA256 == "" { // known, so that nothing is waited for
		t.Errorf("got %+v, %v", seen, err)
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
