// Package netlab makes a network of test machines out of this one, for tests of many machines: each is a network
// namespace, and this process is the switch between them, which delays, loses and cuts off what it is told to. It
// needs root, but nothing of the kernel for bad networks (tc netem). It is never part of the program.
//
// The namespaces have no names: they last as long as something holds them, which is this process and what it starts in
// them. So a test that panics or is killed leaves nothing that another would have to sweep. Machines have their own
// network and nothing else: they share files, processes and Unix sockets that have a path, and reach no other network.
package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
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

	"golang.org/x/sys/unix"
)

const (
	mtu      = 1500
	maxHosts = 250             // 10.77.0.1 and on
	maxQueue = 1000            // packets under way from one host to another; further ones are lost, as with netem
	patience = 5 * time.Second // for what was killed to be gone

	networkOfThread = "/proc/thread-self/ns/net"
)

// Link is what happens to packets. The zero value passes them on at once.
type Link struct {
	Delay   time.Duration // each way: a round trip takes two
	Jitter  time.Duration // up to so much more
	Loss    float64       // which part of the packets is lost each way, from 0 to 1; which ones is the same in every run
	Reorder bool          // jitter lets packets overtake others; if not, they wait for those before them
	Cut     bool          // nothing passes, and what is under way is lost
}

// Lab is a network of hosts.
type Lab struct {
	t       testing.TB
	starter chan func()
	readers sync.WaitGroup

	mu      sync.Mutex // held while a packet is delivered too, so that nothing passes a link once it is cut
	closed  bool
	hosts   map[netip.Addr]*Host
	links   map[[2]*Host]Link // by pair
	ways    map[[2]*Host]*way // by sender and receiver
	started []*exec.Cmd
}

// Host is a machine of a lab. What the test's own process does in it, it does with Dial and Listen.
type Host struct {
	Name string
	Addr netip.Addr

	lab       *Lab
	tun       *os.File // eth0
	namespace *os.File
	id        string // of the namespace, as /proc shows it
}

// way is what is under way from one host to another.
type way struct {
	random *rand.Rand
	count  int
	queue  [][]byte // those that keep their order
	last   time.Time
}

// New returns a network without hosts, which ends with the test. Where there can be none it skips the test, or fails it
// if $SALLYPORT_FLEET is "required".
func New(t testing.TB) *Lab {
	t.Helper()
	probe, err := (&Lab{}).open("probe", 1)
	if err != nil {
		if os.Getenv("SALLYPORT_FLEET") == "required" {
			t.Fatalf("no network of test machines, and SALLYPORT_FLEET=required: %v", err)
		}
		t.Skipf("no network of test machines: %v", err)
	}
	probe.close()
	l := &Lab{t: t, starter: make(chan func()), hosts: map[netip.Addr]*Host{}, links: map[[2]*Host]Link{}, ways: map[[2]*Host]*way{}}
	go func() {
		// The kernel kills what a thread started when the thread ends (Pdeathsig), so one thread starts everything. It
		// goes back to the runtime afterwards, because it may have started other people's processes before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for f := range l.starter {
			f()
		}
	}()
	t.Cleanup(l.close)
	return l
}

// Host adds a host, which reaches all others and is reached by them. It is for the test's own goroutine.
func (l *Lab) Host(name string) *Host {
	l.t.Helper()
	l.mu.Lock()
	number := len(l.hosts) + 1
	l.mu.Unlock()
	h, err := l.open(name, number)
	if err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hosts[h.Addr] = h
	l.readers.Go(func() {
		packet := make([]byte, mtu)
		for {
			n, err := h.tun.Read(packet)
			if err != nil {
				return // closed
			}
			l.forward(h, packet[:n])
		}
	})
	return h
}

// Link sets what happens to packets between two hosts from now on, whichever sends them.
func (l *Lab) Link(a, b *Host, link Link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.links[pair(a, b)] = link
}

// Cable sets what happens to all packets to and from the host from now on, in addition to what Link says.
func (h *Host) Cable(link Link) { h.lab.Link(h, h, link) }

func pair(a, b *Host) [2]*Host {
	if b.Addr.Less(a.Addr) {
		a, b = b, a
	}
	return [2]*Host{a, b}
}

// forward takes a packet from a host. All but IPv4 between hosts is lost, which is the kernel's talk of IPv6.
func (l *Lab) forward(from *Host, packet []byte) {
	if len(packet) < 20 || packet[0]>>4 != 4 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	to := l.hosts[netip.AddrFrom4([4]byte(packet[16:20]))]
	if to == nil || to == from || l.cut(from, to) {
		return
	}
	w := l.ways[[2]*Host{from, to}]
	if w == nil {
		w = &way{random: rand.New(rand.NewPCG(uint64(from.Addr.As4()[3]), uint64(to.Addr.As4()[3])))}
		l.ways[[2]*Host{from, to}] = w
	}
	now := time.Now()
	due, reorder := now, false
	for _, link := range l.between(from, to) {
		if w.random.Float64() < link.Loss {
			return
		}
		due = due.Add(link.Delay + time.Duration(w.random.Float64()*float64(link.Jitter)))
		reorder = reorder || link.Reorder
	}
	if !reorder && due.Before(w.last) {
		due = w.last
	}
	switch {
	case w.count == maxQueue:
		return
	case w.count == 0 && due.Equal(now):
		_, _ = to.tun.Write(packet) // what its kernel does not take is lost
		return
	}
	w.count++
	packet = bytes.Clone(packet)
	if !reorder {
		w.queue, w.last = append(w.queue, packet), due
	}
	time.AfterFunc(due.Sub(now), func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		w.count--
		if !reorder { // timers race, so each takes whatever is first
			packet, w.queue = w.queue[0], w.queue[1:]
		}
		if !l.closed && !l.cut(from, to) {
			_, _ = to.tun.Write(packet)
		}
	})
}

func (l *Lab) between(a, b *Host) [3]Link {
	return [3]Link{l.links[pair(a, a)], l.links[pair(b, b)], l.links[pair(a, b)]}
}

func (l *Lab) cut(a, b *Host) bool {
	links := l.between(a, b)
	return links[0].Cut || links[1].Cut || links[2].Cut
}

// Command returns a command that runs a program in the host. It is killed when this process ends or the lab does, and
// so is what it starts when the lab ends. For a program that is to last, start it with Start.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), h.namespace.Fd())
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{enter, "--", name}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if _, err := exec.LookPath(name); err != nil && cmd.Err == nil {
		cmd.Err = err
	}
	return cmd
}

// Start starts a command that Command returned. If it is started otherwise, it is killed too early if the thread that
// does it ends, as those of gateway.Supervisor do.
func (h *Host) Start(cmd *exec.Cmd) error {
	done := make(chan error)
	h.lab.starter <- func() { done <- cmd.Start() }
	if err := <-done; err != nil {
		return err
	}
	h.lab.mu.Lock()
	defer h.lab.mu.Unlock()
	h.lab.started = append(h.lab.started, cmd)
	return nil
}

// Dial connects this process from the host to an address, which is an IP address and a port: hosts have no names. It is
// what net.Dialer.DialContext is.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil { // a name would be looked up by other threads, outside
		return nil, fmt.Errorf("dial from %s: %w", h.Name, err)
	}
	err = h.inside(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen opens a TCP port of the host in this process; port 0 is any that is free.
func (h *Host) Listen(port uint16) (listener net.Listener, err error) {
	err = h.inside(func() error {
		listener, err = net.Listen("tcp4", netip.AddrPortFrom(h.Addr, port).String())
		return err
	})
	return listener, err
}

// inside runs f on a thread that is in the host; the sockets that it makes stay there.
func (h *Host) inside(f func() error) error {
	enter := func() error { return unix.Setns(int(h.namespace.Fd()), unix.CLONE_NEWNET) }
	if err := elsewhere(enter, f); err != nil {
		return fmt.Errorf("in host %s: %w", h.Name, err)
	}
	return nil
}

// elsewhere runs f on a thread that enter moves to another network namespace.
func elsewhere(enter, f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open(networkOfThread)
	if err == nil {
		defer home.Close()
		err = enter()
	}
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil { // so the thread ends with its goroutine
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// open makes a host. It isn't in the lab yet.
func (l *Lab) open(name string, number int) (_ *Host, err error) {
	if number > maxHosts {
		return nil, fmt.Errorf("make host %s: there are %d", name, maxHosts)
	}
	h := &Host{Name: name, Addr: netip.AddrFrom4([4]byte{10, 77, 0, byte(number)}), lab: l}
	defer func() {
		if err != nil {
			h.close()
			err = fmt.Errorf("make host %s: %w", name, err)
		}
	}()
	enter := func() error { return unix.Unshare(unix.CLONE_NEWNET) }
	err = elsewhere(enter, func() error {
		if h.namespace, err = os.Open(networkOfThread); err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		request, err := unix.NewIfreq("eth0")
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		h.tun = os.NewFile(uintptr(fd), "tun of "+name) // not before, because a device without a name can't be polled
		if err != nil {
			return fmt.Errorf("make TUN device: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if h.id, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", h.namespace.Fd())); err != nil {
		return nil, err
	}
	configure := h.Command(context.Background(), "ip", "-batch", "-")
	configure.Stdin = strings.NewReader(fmt.Sprintf("link set lo up\nlink set eth0 mtu %d up\naddr add %s/16 dev eth0\n", mtu, h.Addr))
	if out, err := configure.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("configure network: %w: %s", err, bytes.TrimSpace(out))
	}
	return h, nil
}

func (h *Host) close() {
	if h.tun != nil {
		h.tun.Close()
	}
	if h.namespace != nil {
		h.namespace.Close()
	}
}

func (l *Lab) close() {
	close(l.starter)
	l.mu.Lock()
	l.closed = true
	for _, cmd := range l.started { // it may not be in its host yet
		_ = cmd.Process.Kill() // it may have ended
	}
	l.mu.Unlock() // nobody adds a host any more
	for _, h := range l.hosts {
		if err := h.kill(); err != nil {
			l.t.Error(err)
		}
		h.close()
	}
	l.readers.Wait()
}

// kill ends all processes in the host, and returns when they are gone.
func (h *Host) kill() error {
	deadline := time.Now().Add(patience)
	for {
		processes := h.processes()
		if len(processes) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end host %s: processes %v stay", h.Name, processes)
		}
		for _, pid := range processes {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
		}
		time.Sleep(time.Millisecond) // the kernel has nothing to wait for: they are not all our children
	}
}

// processes returns those whose network is the host's, but never this one, whose first thread may be visiting.
func (h *Host) processes() (pids []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net") // the pattern is well-formed
	for _, link := range links {
		if id, err := os.Readlink(link); err != nil || id != h.id {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}
