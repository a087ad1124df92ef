package forward

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sallyport.dev/identity/attest"
	"sallyport.dev/segment"
)

// process is what package attest looks at, held for as long as its connections last.
type process struct{ attest.Held }

// key tells apart all processes that live at one moment, and what each was when it connected.
type key struct {
	pid, uid, gid int
	dev, ino      uint64 // of the program
}

func (p *process) key() key {
	k := key{pid: p.PID, uid: p.UID, gid: p.GID}
	if p.Program != nil {
		s := unixStat(p.Program)
		k.dev, k.ino = s.Dev, s.Ino
	}
	return k
}

// holdPeer returns the process that connected a Unix socket.
func holdPeer(c *net.UnixConn) (*process, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var fd int
	var credErr, fdErr error
	err = raw.Control(func(s uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED)
		fd, fdErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, err
	}
	if cred.Pid <= 0 {
		return nil, errors.New("its process is in a PID namespace that cannot be seen from here")
	}
	old := errors.Is(fdErr, unix.ENOPROTOOPT) // Linux before 6.5
	if old {
		fd, fdErr = unix.PidfdOpen(int(cred.Pid), 0)
	}
	if fdErr != nil {
		return nil, fmt.Errorf("hold process %d: %w", cred.Pid, fdErr)
	}
	p, err := newProcess(int(cred.Pid), fd)
	if err != nil {
		return nil, err
	}
	p.UID, p.GID = int(cred.Uid), int(cred.Gid)
	// A pidfd that was opened by PID may be that of a process which has got the PID since the connection.
	if old {
		uid, gid, err := p.user()
		if err == nil && (uid != p.UID || gid != p.GID) {
			err = errors.New("its process has ended and another has its PID")
		}
		if err != nil {
			p.close()
			return nil, err
		}
	}
	return p.begin()
}

// holdPID returns the process that has a PID now, as the user that it runs as now.
func holdPID(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("hold process %d: %w", pid, err)
	}
	p, err := newProcess(pid, fd)
	if err != nil {
		return nil, err
	}
	if p.UID, p.GID, err = p.user(); err != nil {
		p.close()
		return nil, err
	}
	return p.begin()
}

func newProcess(pid, pidfd int) (*process, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil { // lets Go wait for it without a thread
		return nil, errors.Join(fmt.Errorf("hold process %d: %w", pid, err), unix.Close(pidfd))
	}
	return &process{attest.Held{PID: pid, Pidfd: os.NewFile(uintptr(pidfd), "pidfd")}}, nil
}

// begin notes which program runs.
func (p *process) begin() (*process, error) {
	// Not readable: it gets no selectors of its program, as in package attest.
	p.Program, _ = os.Stat(p.proc("exe"))
	if err := p.Alive(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// again returns the same process, held once more.
func (p *process) again() (*process, error) {
	raw, err := p.Pidfd.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("hold process %d: %w", p.PID, err)
	}
	var fd int
	var dupErr error
	err = raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("hold process %d: %w", p.PID, err)
	}
	q, err := newProcess(p.PID, fd)
	if err != nil {
		return nil, err
	}
	q.UID, q.GID, q.Program, q.Hashes = p.UID, p.GID, p.Program, p.Hashes
	return q, nil
}

func (p *process) close() { p.Pidfd.Close() }

type processKey struct{}

// Selectors is an issuer's Config.Attest that knows the processes for which a Forwarder asks, and asks package attest
// about all others. Of ours it knows the same as of those.
func Selectors(ctx context.Context, kinds []string) ([]segment.Selector, error) {
	p, ok := ctx.Value(processKey{}).(*process)
	if !ok {
		return attest.Selectors(ctx, kinds)
	}
	seen, err := p.Look(ctx, kinds)
	if err != nil {
		return nil, err
	}
	return seen.Selectors(), nil
}

// wait returns when the process has ended, or is let go.
func (p *process) wait() error {
	raw, err := p.Pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	var pollErr error
	err = raw.Read(func(fd uintptr) bool {
		var ended bool
		ended, pollErr = readable(fd)
		return ended || pollErr != nil
	})
	if err := errors.Join(err, pollErr); err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	return fmt.Errorf("process %d has ended", p.PID)
}

// readable reports whether a pidfd is: its process has ended then.
func readable(pidfd uintptr) (bool, error) {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n != 0, err
		}
	}
}

// user returns the user and the group that the process runs as.
func (p *process) user() (uid, gid int, err error) {
	status, err := os.ReadFile(p.proc("status")) // the kernel bounds it
	if err != nil {
		return 0, 0, fmt.Errorf("look at process %d: %w", p.PID, err)
	}
	if uid, err = effective(string(status), "Uid:"); err == nil {
		gid, err = effective(string(status), "Gid:")
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look at process %d: %w", p.PID, err)
	}
	return uid, gid, nil
}

// effective returns the second of the IDs in a line of /proc/PID/status: real, effective, saved, file system's.
func effective(status, name string) (int, error) {
	for line := range strings.Lines(status) {
		if fields := strings.Fields(line); len(fields) == 5 && fields[0] == name {
			id, err := strconv.ParseUint(fields[2], 10, 32)
			return int(id), err
		}
	}
	return 0, fmt.Errorf("its status has no %s", name)
}

func (p *process) proc(name string) string { return fmt.Sprintf("/proc/%d/%s", p.PID, name) }

// unixStat is what every FileInfo of package os holds on Linux.
func unixStat(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }
