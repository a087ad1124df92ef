// Package disk keeps the authorities of a trust domain in a folder, and keeps them going: it makes them, has each
// followed by the next in time, and publishes what signs and whom to trust.
//
// It is for a control plane that is its own identity provider, with a root of its own or below somebody else's (an
// UpstreamAuthority). All that it knows stands in one file, which is written whole or not at all, before anybody hears
// of it. What is doubtful in the folder (wrong trust domain, a key that others can read, a torn file, one that is
// encrypted with another key) is refused, never repaired: nobody who trusted an authority loses it unasked. Private
// keys are never logged or shown.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/whole"
	"sallyport.dev/segment"
)

// File is the name of the file in the folder.
const File = "ca.pem"

// temporary is what a file is called that is not whole yet.
const temporary = ".ca-*"

// maxFile bounds the file: it holds at most maxSlots of each kind.
const maxFile = 1 << 20

// Open returns the root authority kept in dir as one that signs SVIDs itself, or makes one where there is none. It is for
// tools that sign by hand what nobody keeps fresh: nothing follows this authority in time, as with OpenKeeper.
func Open(dir string, td spiffeid.TrustDomain, now time.Time) (*identity.Authority, error) {
	f := folder{dir: dir}
	if err := f.open(); err != nil {
		return nil, err
	}
	s, err := f.load(td, now)
	if errors.Is(err, fs.ErrNotExist) {
		k := Keeper{config: Config{TrustDomain: td}.withDefaults()}
		s = state{td: td, sequence: 1}
		if _, err := k.rotateOwn(&s, now, nil); err != nil {
			return nil, err
		}
		if err := f.write(s, os.Link); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		s, err = f.load(td, now) // made by us or, at the same moment, by another process
	}
	if err != nil {
		return nil, err
	}
	if err := s.begun(f.path(), now); err != nil {
		return nil, err
	}
	i := s.signs(now)
	if i < 0 || s.roots[i].key == nil || !s.roots[i].Valid(now) {
		return nil, problem("authority-expired", f.path(), "there is no root that is valid now", startAnew(f.path()))
	}
	return s.roots[i].authority()
}

// Read returns what a folder keeps, without what is secret, and whom to trust, whether a control plane is running or
// not. It changes nothing.
func Read(dir string, key Key, now time.Time) (Description, *spiffebundle.Bundle, error) {
	f := folder{dir: dir, key: key}
	s, err := f.load(spiffeid.TrustDomain{}, now)
	if err != nil {
		return Description{}, nil, err
	}
	d := describe(s, now)
	d.Encrypted = f.sealed
	return d, s.bundle(), nil
}

// folder is where the file is.
type folder struct {
	dir    string
	key    Key
	sealed bool     // the file that was read last was encrypted
	lock   *os.File // the folder itself, open while a keeper has it
}

func (f *folder) path() string { return filepath.Join(f.dir, File) }

// open makes the folder, or checks that nobody else gets into it.
func (f *folder) open() error {
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return fmt.Errorf("create state folder: %w", err)
	}
	info, err := os.Stat(f.dir)
	if err != nil {
		return fmt.Errorf("open state folder: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return problem("state-folder-open", f.dir, fmt.Sprintf("the folder with the authority's key is open to others (mode %04o)", mode),
			"chmod 700 "+f.dir)
	}
	if owner := ownerOf(info); owner != os.Geteuid() {
		return problem("state-folder-open", f.dir, fmt.Sprintf("the folder with the authority's key belongs to user %d", owner),
			fmt.Sprintf("chown %d %s", os.Geteuid(), f.dir))
	}
	info, err = os.Stat(f.path()) // nobody else can exchange it any more
	if err != nil {
		return nil //nolint:nilerr // whoever reads it says what is wrong
	}
	if owner := ownerOf(info); owner != os.Geteuid() {
		return problem("authority-readable", f.path(), fmt.Sprintf("user %d may have read the private key: the file is his", owner),
			fmt.Sprintf("if he has not: chown %d %s; otherwise %s", os.Geteuid(), f.path(), startAnew(f.path())))
	}
	return nil
}

func ownerOf(info fs.FileInfo) int {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid)
	}
	return -1
}

// hold keeps every other keeper out until close, and clears up what one left that was killed while it wrote.
func (f *folder) hold() error {
	d, err := os.Open(f.dir)
	if err != nil {
		return fmt.Errorf("open state folder: %w", err)
	}
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		d.Close()
		return problem("state-folder-busy", f.dir, "another process keeps the authority in this folder", "stop it, or use another state folder")
	}
	f.lock = d
	left, err := filepath.Glob(filepath.Join(f.dir, temporary))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		f.close()
		return fmt.Errorf("clear up state folder: %w", err)
	}
	return nil
}

func (f *folder) close() error { return f.lock.Close() }

// held fails if the folder is no longer the one that was taken: what has its name now may be another keeper's.
func (f *folder) held() error {
	if f.lock == nil {
		return nil
	}
	taken, err := f.lock.Stat()
	if err != nil {
		return err
	}
	named, err := os.Stat(f.dir)
	if err == nil && !os.SameFile(taken, named) {
		err = fmt.Errorf("%s is another folder than it was", f.dir)
	}
	return err
}

// load reads the file; fs.ErrNotExist if there is none. With the zero trust domain, any will do.
func (f *folder) load(td spiffeid.TrustDomain, now time.Time) (state, error) {
	data, err := read(f.path(), 0o077, startAnew(f.path()))
	if err != nil {
		return state{}, err
	}
	if f.sealed = isSealed(data); f.sealed {
		if data, err = unseal(data, f.key, f.path()); err != nil {
			return state{}, err
		}
	}
	s, err := decode(data, now)
	if err != nil {
		code := "authority-invalid"
		if errors.As(err, new(tornError)) {
			code = "authority-torn"
		}
		return state{}, problem(code, f.path(), err.Error(), startAnew(f.path()))
	}
	if !td.IsZero() && s.td != td {
		return state{}, problem("authority-trust-domain", f.path(),
			fmt.Sprintf("the authority is %s's, but the trust domain is %s", s.td, td),
			fmt.Sprintf("set the trust domain back to %s, or use another state folder for %s", s.td, td))
	}
	return s, nil
}

// write puts the whole file on the disk, by os.Rename, or by os.Link: only where none is, else fs.ErrExist.
func (f *folder) write(s state, put func(from, to string) error) error {
	if err := f.held(); err != nil {
		return fmt.Errorf("write authority: %w", err)
	}
	data, err := s.encode()
	if err != nil {
		return fmt.Errorf("write authority: %w", err)
	}
	if !f.key.IsZero() {
		if data, err = seal(data, f.key); err != nil {
			return fmt.Errorf("write authority: %w", err)
		}
	}
	if len(data) > maxFile {
		return fmt.Errorf("write authority: it has %d bytes, more than %d", len(data), maxFile)
	}
	if err := whole.Write(f.path(), data, temporary, put); err != nil {
		return fmt.Errorf("write authority: %w", err)
	}
	f.sealed = !f.key.IsZero()
	return nil
}

// read returns the content of a file, if none of those could have read it whom the mode's bits stand for; otherwise, say
// what to do. It asks the open file, so it cannot be exchanged between the question and the reading.
func read(path string, others fs.FileMode, otherwise string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // does not wait for a pipe's other end
	if err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, problem("authority-invalid", path, "not a file, or too large", otherwise)
	}
	if mode := info.Mode().Perm(); mode&others != 0 {
		return nil, problem("authority-readable", path, fmt.Sprintf("others may have read the private key (mode %04o)", mode),
			"if nobody has: chmod 600 "+path+"; otherwise "+otherwise)
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	return data, nil
}

// readGiven reads a file that the user has named.
func readGiven(path string, others fs.FileMode, otherwise string) ([]byte, error) {
	data, err := read(path, others, otherwise)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, problem("file-missing", path, "the file cannot be opened", otherwise)
	}
	return data, err
}

// startAnew is the way out that always works, and its price.
func startAnew(path string) string {
	return "restore " + path + " from a backup, or move it away: a new authority is then made, and whoever trusts this one must get the new bundle"
}

func problem(code, path, msg, hint string) error {
	return segment.Problems{{Code: code, Pos: segment.Pos{File: path}, Msg: msg, Hint: hint}}
}
