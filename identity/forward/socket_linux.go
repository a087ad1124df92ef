package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sallyport.dev/identity/attest"
)

// attempts to find the owner of a socket. While a process starts a program, its child holds all its sockets too for a
// moment, and the kernel's table may skip a line while it changes.
const (
	attempts   = 6
	firstPause = 5 * time.Millisecond // then twice as long each time: 155 ms in all
)

// sockets finds out whose connections are.
type sockets struct {
	mu   sync.Mutex
	next *scan      // which may be joined until it begins
	busy sync.Mutex // one at a time

	hashes *attest.Hashes
}

// hold returns the process at the other end of a connection.
func (s *sockets) hold(ctx context.Context, c net.Conn) (*attest.Held, error) {
	var p *attest.Held
	var err error
	switch c := c.(type) {
	case *net.UnixConn:
		p, err = attest.Hold(c, s.hashes)
	case *net.TCPConn:
		p, err = s.holdOwner(ctx, c)
	default:
		err = errors.New("neither on a Unix socket nor on TCP")
	}
	if err != nil {
		return nil, fmt.Errorf("attest connection: %w", err)
	}
	return p, nil
}

// holdOwner returns the one process that holds the client's end of a connection.
func (s *sockets) holdOwner(ctx context.Context, c *net.TCPConn) (*attest.Held, error) {
	client, server := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	if !client.Addr().IsLoopback() || !server.Addr().IsLoopback() {
		return nil, fmt.Errorf("%s is not on this machine", client)
	}
	pause := firstPause
	for i := 1; ; i++ {
		p, err := s.owner(client, server)
		if err == nil || i == attempts {
			return p, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
		pause *= 2
	}
}

func (s *sockets) owner(client, server netip.AddrPort) (*attest.Held, error) {
	// As long as the connection is open at our end, nobody else can have a socket between these two addresses.
	r, err := lookup(client, server)
	if err != nil {
		return nil, err
	}
	pids, err := s.holders(r.inode)
	if err != nil {
		return nil, err
	}
	switch {
	case len(pids) == 0:
		return nil, fmt.Errorf("no process that can be seen from here holds the socket of user %d (to see those of others takes root)", r.uid)
	case len(pids) > 1:
		return nil, fmt.Errorf("%d processes hold its socket", len(pids))
	}
	p, err := attest.HoldPID(pids[0], s.hashes)
	if err != nil {
		return nil, err
	}
	// The process that is held now has the PID of the one that was seen. It is that one if it holds the socket as well.
	holds, err := holds(p.PID, map[uint64][]int{r.inode: nil})
	switch {
	case err != nil:
	case len(holds) == 0:
		err = errors.New("its process has ended and another has its PID")
	case p.UID != r.uid:
		err = fmt.Errorf("user %d made the socket and process %d of user %d holds it", r.uid, p.PID, p.UID)
	default:
		err = p.Check()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// row is a line of /proc/net/tcp or /proc/net/tcp6: a TCP socket of this machine.
type row struct {
	local, remote netip.AddrPort // IPv4 addresses are never mapped into IPv6
	uid           int
	inode         uint64 // 0: no process has it any more
}

// lookup returns the client's socket of a connection.
func lookup(client, server netip.AddrPort) (row, error) {
	var found []row
	for _, path := range []string{"/proc/net/tcp", "/proc/net/tcp6"} { // a client of ours may use either for IPv4
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return row{}, fmt.Errorf("read sockets: %w", err)
		}
		rows, err := between(f, client, server)
		f.Close()
		if err != nil {
			return row{}, fmt.Errorf("read %s: %w", path, err)
		}
		found = append(found, rows...)
	}
	// One socket may be read twice while the table changes.
	found = slices.CompactFunc(found, func(a, b row) bool { return a == b })
	if len(found) != 1 {
		return row{}, fmt.Errorf("%d sockets are connected from %s", len(found), client)
	}
	return found[0], nil
}

// between returns the sockets in a table that are connected from local to remote and that a process has.
func between(table io.Reader, local, remote netip.AddrPort) ([]row, error) {
	var found []row
	lines := bufio.NewScanner(table) // which bounds a line to 64 KiB
	if !lines.Scan() {
		return nil, errors.Join(errors.New("no header"), lines.Err())
	}
	for lines.Scan() {
		r, err := parseRow(lines.Text())
		if err != nil {
			return nil, err
		}
		if r.local == local && r.remote == remote && r.inode != 0 {
			found = append(found, r)
		}
	}
	return found, lines.Err()
}

// parseRow reads a line: number, local address, remote address, state, queues, timer, retransmissions, user, time-out,
// inode, and what is of no interest here (proc_pid_net(5)).
func parseRow(line string) (row, error) {
	fields := strings.Fields(line)
	if len(fields) < 10 {
		return row{}, fmt.Errorf("line of %d fields", len(fields))
	}
	local, err := parseAddr(fields[1])
	if err != nil {
		return row{}, err
	}
	remote, err := parseAddr(fields[2])
	if err != nil {
		return row{}, err
	}
	uid, err := strconv.ParseUint(fields[7], 10, 32)
	if err != nil {
		return row{}, fmt.Errorf("user: %w", err)
	}
	inode, err := strconv.ParseUint(fields[9], 10, 64)
	if err != nil {
		return row{}, fmt.Errorf("inode: %w", err)
	}
	return row{local: local, remote: remote, uid: int(uid), inode: inode}, nil
}

// parseAddr reads an address and port in hex: the address as one or four words in the machine's own order.
func parseAddr(text string) (netip.AddrPort, error) {
	words, port, _ := strings.Cut(text, ":")
	if len(words) != 8 && len(words) != 32 || len(port) != 4 {
		return netip.AddrPort{}, fmt.Errorf("address %q", text)
	}
	b := make([]byte, len(words)/2)
	for i := 0; i < len(words); i += 8 {
		word, err := strconv.ParseUint(words[i:i+8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("address %q: %w", text, err)
		}
		binary.NativeEndian.PutUint32(b[i/2:], uint32(word))
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: %w", text, err)
	}
	addr, _ := netip.AddrFromSlice(b) // of 4 or 16 bytes
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), nil
}

// scan is one look at the descriptors of all processes, for all who wait for it.
type scan struct {
	pids map[uint64][]int // by the inode of a socket that somebody asked for
	err  error
	done chan struct{}
}

// holders returns the processes that hold a socket. Those whose descriptors may not be read are not among them.
func (s *sockets) holders(inode uint64) ([]int, error) {
	s.mu.Lock()
	joined, first := s.next, s.next == nil
	if first {
		joined = &scan{pids: map[uint64][]int{}, done: make(chan struct{})}
		s.next = joined
	}
	joined.pids[inode] = nil
	s.mu.Unlock()
	if !first {
		<-joined.done
		return joined.pids[inode], joined.err
	}
	s.busy.Lock() // those who come meanwhile join
	defer s.busy.Unlock()
	s.mu.Lock()
	s.next = nil
	s.mu.Unlock()
	joined.err = joined.run()
	close(joined.done)
	return joined.pids[inode], joined.err
}

func (s *scan) run() error {
	proc, err := os.Open("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue // not a process
		}
		held, err := holds(pid, s.pids)
		if errors.Is(err, fs.ErrPermission) {
			continue // see the package's comment
		}
		if err != nil {
			return err
		}
		for _, inode := range held {
			s.pids[inode] = append(s.pids[inode], pid)
		}
	}
	return nil
}

// holds returns those of the sockets that a process holds; none if there is no such process.
func holds(pid int, wanted map[uint64][]int) ([]uint64, error) {
	folder := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.Open(folder)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at process %d: %w", pid, err)
	}
	defer fds.Close()
	names, err := fds.Readdirnames(-1)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at process %d: %w", pid, err)
	}
	var held []uint64
	for _, name := range names {
		target, err := os.Readlink(folder + "/" + name)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look at process %d: %w", pid, err)
		}
		text, ok := strings.CutPrefix(target, "socket:[")
		if !ok {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64)
		if err != nil {
			continue // no socket of the kernel's: a file may have that name
		}
		if _, ok := wanted[inode]; ok && !slices.Contains(held, inode) {
			held = append(held, inode)
		}
	}
	return held, nil
}

// gone reports whether what was to be read has ended meanwhile.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}
