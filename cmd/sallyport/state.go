package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// stateFolder is the folder of one running control plane, agent or gateway, and nobody else's while it runs.
type stateFolder struct {
	dir  string // what must be kept
	run  string // sockets and what Envoy reads
	lock *os.File
}

// A Unix socket's path has at most 107 bytes (unix(7)).
const longestSocket = 107

func openState(dir string) (*stateFolder, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	s := &stateFolder{dir: dir, run: filepath.Join(dir, "run")}
	if longest := filepath.Join(s.run, "operator.sock"); len(longest) > longestSocket {
		return nil, failed("name a shorter folder with --state", "open state: %s is too long a path for a socket", longest)
	}
	if err := os.MkdirAll(s.run, 0o700); err != nil {
		return nil, failed("name another folder with --state", "open state: %w", err)
	}
	for _, d := range []string{s.dir, s.run} {
		if err := os.Chmod(d, 0o700); err != nil {
			return nil, failed("the folder must belong to the user that runs this, or name another with --state", "open state: %w", err)
		}
	}
	s.lock, err = os.OpenFile(filepath.Join(s.run, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		s.lock.Close()
		return nil, failed("stop it, or name another folder with --state", "another sallyport is running with state %s", dir)
	}
	return s, nil
}

func (s *stateFolder) close() { s.lock.Close() }

// listen opens a socket that only we can reach. Whatever is left there is ours: we hold the lock.
func (s *stateFolder) listen(name string) (*net.UnixListener, error) {
	return listenUnix(filepath.Join(s.run, name), 0o600, 0o700, "name another folder with --state")
}

// listenUnix opens a socket in a folder, and makes the folder where there is none. It takes over what a process left
// that is gone, never what one is listening at. The hint says how to choose another place.
func listenUnix(path string, mode, folder fs.FileMode, hint string) (*net.UnixListener, error) {
	if len(path) > longestSocket {
		return nil, failed(hint, "listen at %s: the path is too long for a socket", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), folder); err != nil {
		return nil, failed(hint, "listen at %s: %w", path, err)
	}
	if err := ownFolder(filepath.Dir(path)); err != nil {
		return nil, failed(hint, "listen at %s: %w", path, err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, failed("stop it, or "+hint, "another process is listening at %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, failed(hint, "listen at %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, failed(hint, "listen: %w", err)
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, failed(hint, "listen at %s: %w", path, err)
	}
	return l, nil
}

// ownFolder refuses a folder in which somebody else could put a socket of his own in the place of ours.
func ownFolder(dir string) error {
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Getuid() && st.Uid != 0 {
		return fmt.Errorf("the folder belongs to user %d", st.Uid)
	}
	if st.Mode&0o022 != 0 && st.Mode&syscall.S_ISVTX == 0 {
		return errors.New("others may write to the folder")
	}
	return nil
}
