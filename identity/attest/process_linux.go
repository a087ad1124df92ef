package attest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Held is a process that is held by a pidfd, which goes on meaning the same process when its PID is another's. What is
// read from /proc/PID is therefore true of it if it is still alive after the reading. Hold, HoldPID and Again make one, and
// whoever has it closes it. The zero value is nobody.
type Held struct {
	PID, UID, GID int         // when it connected, or was held
	Program       fs.FileInfo // os.Stat of the program that it ran then; nil if that could not be read
	pidfd         *os.File
	hashes        *Hashes
}

// Hold returns the process that connected a Unix socket.
func Hold(c *net.UnixConn, hashes *Hashes) (*Held, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var fd int
	var credErr, fdErr error
	err = raw.Control(func(s uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr == nil && cred.Pid > 0 {
			fd, fdErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, err
	}
	if cred.Pid <= 0 {
		return nil, errors.New("its process is in a PID namespace that cannot be seen from here")
	}
	pid := int(cred.Pid)
	byPID := errors.Is(fdErr, unix.ENOPROTOOPT) // Linux before 6.5
	if byPID {
		fd, fdErr = unix.PidfdOpen(pid, 0)
	}
	if fdErr != nil {
		return nil, fmt.Errorf("hold process %d: %w", pid, fdErr)
	}
	return hold(pid, fd, hashes, func(p *Held) error {
		p.UID, p.GID = int(cred.Uid), int(cred.Gid)
		if !byPID {
			return nil
		}
		// It may be another one, which has got the PID since the connection; at least it must then run as the same user and
		// group.
		uid, gid, err := p.user()
		if err == nil && (uid != p.UID || gid != p.GID) {
			err = errors.New("its process has ended and another has its PID")
		}
		return err
	})
}

// HoldPID returns the process that has a PID now, as the user and group that it runs as now. Whether it is the one that is
// meant, the caller finds out.
func HoldPID(pid int, hashes *Hashes) (*Held, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("hold process %d: %w", pid, err)
	}
	return hold(pid, fd, hashes, func(p *Held) (err error) {
		p.UID, p.GID, err = p.user()
		return err
	})
}

// hold has a pidfd, which it owns, and notes who the process is and which program runs.
func hold(pid, fd int, hashes *Hashes, who func(*Held) error) (*Held, error) {
	if err := unix.SetNonblock(fd, true); err != nil { // lets Go wait for it without a thread
		return nil, errors.Join(fmt.Errorf("hold process %d: %w", pid, err), unix.Close(fd))
	}
	p := &Held{PID: pid, pidfd: os.NewFile(uintptr(fd), "pidfd"), hashes: hashes}
	err := who(p)
	if err == nil {
		// Not readable: it gets no selectors of its program. A control plane that is not root may read that of its own
		// user's processes only.
		p.Program, _ = os.Stat(p.proc("exe"))
		err = p.Alive()
	}
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Again returns the same process, held once more, and as the program that it was at first.
func (p *Held) Again() (*Held, error) {
	var fd int
	var dupErr error
	raw, err := p.pidfd.SyscallConn()
	if err == nil {
		err = raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	}
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("hold process %d: %w", p.PID, err)
	}
	q := *p
	q.pidfd = os.NewFile(uintptr(fd), "pidfd") // as non-blocking as the one that it is a copy of
	return &q, nil
}

// Close lets go of the process. Then Look knows nothing more.
func (p *Held) Close() error { return p.pidfd.Close() }

// Look returns what the process is now. What costs something is found out only if selectors of these kinds need it. It
// fails once the process has ended, or runs another program than Program, and if the context ends the wait for a hash.
func (p *Held) Look(ctx context.Context, kinds []string) (Process, error) {
	return p.look(ctx, wantsOf(kinds))
}

func (p *Held) look(ctx context.Context, w wants) (Process, error) {
	seen := Process{PID: p.PID, UID: p.UID, GID: p.GID}
	if u, err := user.LookupId(strconv.Itoa(seen.UID)); err == nil {
		seen.User = u.Username
	}
	if w.group {
		seen.Group = groupName(seen.GID)
	}
	if w.supplementary {
		status, err := p.read("status")
		if err == nil {
			seen.Supplementary = groupsOf(status)
		}
		for i := range seen.Supplementary {
			if w.names {
				seen.Supplementary[i].Name = groupName(seen.Supplementary[i].GID)
			}
		}
	}
	if w.place {
		if groups, err := p.read("cgroup"); err == nil {
			at := placeOf(groups)
			seen.Unit, seen.Container, seen.PodUID = at.unit, at.container, at.pod
		}
	}
	exe, unread := os.Stat(p.proc("exe"))
	if unread == nil {
		seen.Path = p.path(exe)
		if w.hash {
			var err error
			if seen.SHA256, err = p.hashes.of(ctx, uint32(p.UID), p.proc("exe"), exe); err != nil {
				return Process{}, fmt.Errorf("attest caller: hash program: %w", err)
			}
		}
	}
	if err := p.same(exe, unread); err != nil {
		return Process{}, fmt.Errorf("attest caller: %w", err)
	}
	return seen, nil
}

// Check returns an error if the process has ended, or runs another program than when it connected.
func (p *Held) Check() error {
	exe, unread := os.Stat(p.proc("exe"))
	return p.same(exe, unread)
}

// same returns an error if what was read of the process is not true of the one that connected: it has ended, or runs
// another program. Else it could ask and then become a trusted program, in whose name it would be answered. One whose
// program can be read no longer, or only now, is likely to have become a set-user-ID program, or to have been one.
func (p *Held) same(exe fs.FileInfo, unread error) error {
	if err := p.Alive(); err != nil {
		return err
	}
	if (unread == nil) != (p.Program != nil) || unread == nil && !os.SameFile(exe, p.Program) {
		return fmt.Errorf("process %d runs another program than when it connected, or hides which", p.PID)
	}
	return nil
}

// path returns the program's path if it leads to the program. So one that was deleted has none ("/bin/a (deleted)"
// in /proc), nor has one that is at that path only in a container of the process's own making.
func (p *Held) path(exe fs.FileInfo) string {
	path, err := os.Readlink(p.proc("exe"))
	if err != nil {
		return ""
	}
	if there, err := os.Stat(path); err != nil || !os.SameFile(there, exe) {
		return ""
	}
	return path
}

// Alive returns an error once the process has ended.
func (p *Held) Alive() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	var ended bool
	var pollErr error
	err = raw.Control(func(fd uintptr) { ended, pollErr = readable(fd) })
	return p.watched(ended, errors.Join(err, pollErr))
}

// Wait returns when the process has ended, or is let go, and says which.
func (p *Held) Wait() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	var ended bool
	var pollErr error
	err = raw.Read(func(fd uintptr) bool {
		ended, pollErr = readable(fd)
		return ended || pollErr != nil
	})
	return p.watched(ended, errors.Join(err, pollErr))
}

func (p *Held) watched(ended bool, err error) error {
	switch {
	case err != nil:
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	case ended:
		return fmt.Errorf("process %d has ended", p.PID)
	}
	return nil
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
func (p *Held) user() (uid, gid int, err error) {
	status, err := os.ReadFile(p.proc("status")) // the kernel bounds it
	if err == nil {
		uid, err = effective(string(status), "Uid:")
	}
	if err == nil {
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

// maxRead is the size of the largest file of /proc that is read, in bytes: a path of a control group has at most 4096,
// and there are about a dozen.
const maxRead = 64 << 10

// read returns a file of the process. It fails if that is too large.
func (p *Held) read(name string) (string, error) {
	f, err := os.Open(p.proc(name))
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRead+1))
	if err == nil && len(data) > maxRead {
		err = fmt.Errorf("%s is larger than %d bytes", f.Name(), maxRead)
	}
	return string(data), err
}

// maxGroups is the largest number of supplementary groups that are looked at. A process that has more has none for us.
const maxGroups = 256

// groupsOf reads the supplementary groups in /proc/PID/status.
func groupsOf(status string) []Group {
	var groups []Group
	for line := range strings.SplitSeq(status, "\n") {
		gids, ok := strings.CutPrefix(line, "Groups:") // the kernel lets no name of a program have lines of its own
		if !ok {
			continue
		}
		for gid := range strings.FieldsSeq(gids) {
			n, err := strconv.ParseUint(gid, 10, 32)
			if err != nil || len(groups) == maxGroups {
				return nil
			}
			groups = append(groups, Group{GID: int(n)})
		}
		return groups
	}
	return nil
}

func groupName(gid int) string {
	g, err := user.LookupGroupId(strconv.Itoa(gid))
	if err != nil {
		return ""
	}
	return g.Name
}

func (p *Held) proc(name string) string {
	return fmt.Sprintf("/proc/%d/%s", p.PID, name)
}
