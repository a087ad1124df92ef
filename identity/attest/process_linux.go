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
// read from /proc/PID is therefore true of it if it is still alive after the reading. Look needs all of it. Whoever
// fills it in answers for it that PID, UID and GID were those of the process that the pidfd holds.
type Held struct {
	PID, UID, GID int         // when it connected
	Pidfd         *os.File    // the caller's, who closes it: then Look knows nothing more
	Program       fs.FileInfo // os.Stat of the program that it ran when it connected; nil if that could not be read
	Hashes        *Hashes
}

// hold returns the process that connected a socket.
func hold(c *net.UnixConn, hashes *Hashes) (*Held, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("attest connection: %w", err)
	}
	var cred *unix.Ucred
	var fd int
	var credErr, fdErr error
	err = raw.Control(func(s uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED)
		fd, fdErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("attest connection: %w", err)
	}
	if cred.Pid <= 0 {
		return nil, errors.New("attest connection: its process is in a PID namespace that cannot be seen from here")
	}
	old := errors.Is(fdErr, unix.ENOPROTOOPT)
	if old { // Linux before 6.5
		fd, fdErr = unix.PidfdOpen(int(cred.Pid), 0)
	}
	if fdErr != nil {
		return nil, fmt.Errorf("attest connection: hold process %d: %w", cred.Pid, fdErr)
	}
	p := &Held{PID: int(cred.Pid), UID: int(cred.Uid), GID: int(cred.Gid), Pidfd: os.NewFile(uintptr(fd), "pidfd"), Hashes: hashes}
	if err := p.begin(old); err != nil {
		return nil, errors.Join(fmt.Errorf("attest connection: %w", err), p.Pidfd.Close())
	}
	return p, nil
}

// begin notes which program runs. A pidfd that was opened by PID may be that of a process which has got the PID since
// the connection; at least it must then run as the user and group that connected.
func (p *Held) begin(byPID bool) error {
	if byPID {
		info, err := os.Stat(p.proc(""))
		if err != nil {
			return fmt.Errorf("look at process: %w", err)
		}
		if s := unixStat(info); int(s.Uid) != p.UID || int(s.Gid) != p.GID {
			return errors.New("its process has ended and another has its PID")
		}
	}
	// Not readable: it gets no selectors of its program. A control plane that is not root may read that of its own
	// user's processes only.
	p.Program, _ = os.Stat(p.proc("exe"))
	return p.Alive()
}

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
			if seen.SHA256, err = p.Hashes.of(ctx, uint32(p.UID), p.proc("exe"), exe); err != nil {
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

// Alive returns an error once the process has ended: its pidfd is readable then.
func (p *Held) Alive() error {
	raw, err := p.Pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	var n int
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		for {
			n, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			if pollErr != unix.EINTR {
				return
			}
		}
	})
	if err := errors.Join(err, pollErr); err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	if n != 0 {
		return fmt.Errorf("process %d has ended", p.PID)
	}
	return nil
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
