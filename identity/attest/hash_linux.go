package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
)

const (
	maxProgram = 512 << 20 // bytes; larger programs have no hash
	maxHashes  = 256       // remembered
	maxReaders = 2         // programs that are read at a time
)

// Hashes remembers the hashes of programs, and reads few at a time: one for a user, and two for all of them. So
// neither a user with many programs, nor one whose file system hangs, keeps the others from theirs. NewHashes makes one.
type Hashes struct {
	readers chan struct{} // one for each program that is being read
	mu      sync.Mutex
	sums    map[version]string
	turns   map[uint32]*turn // of users with programs that are being read, or wait
}

// turn is taken by the one of a user's callers that goes on.
type turn struct {
	taken chan struct{}
	users int // who hold it or wait for it; guarded by Hashes.mu
}

// version is a file's content as far as it can be told apart without reading it. The time of the last change of the
// inode is part of it because, unlike the time of modification, no program can set it.
type version struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// NewHashes returns one that remembers nothing yet, for all processes of a server to share.
func NewHashes() *Hashes {
	return &Hashes{
		readers: make(chan struct{}, maxReaders),
		sums:    make(map[version]string),
		turns:   make(map[uint32]*turn),
	}
}

// of returns the SHA-256 in hex of the program at the path, which a process of the user runs, and which must still be
// the given file; "" if it cannot. It fails once the context is done.
func (h *Hashes) of(ctx context.Context, uid uint32, path string, exe fs.FileInfo) (string, error) {
	v := versionOf(exe)
	if v.size > maxProgram {
		return "", nil
	}
	if sum := h.known(v); sum != "" {
		return sum, nil
	}
	leave, err := h.enter(ctx, uid)
	if err != nil {
		return "", err
	}
	defer leave()
	if sum := h.known(v); sum != "" { // since then
		return sum, nil
	}
	sum := v.read(ctx, path)
	if sum == "" {
		return "", ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.sums) >= maxHashes {
		for old := range h.sums { // any one: it can be had again
			delete(h.sums, old)
			break
		}
	}
	h.sums[v] = sum
	return sum, nil
}

func (h *Hashes) known(v version) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sums[v]
}

// enter waits until a user may have a program read. Of the users that wait, each waits with one caller only.
func (h *Hashes) enter(ctx context.Context, uid uint32) (leave func(), err error) {
	h.mu.Lock()
	t := h.turns[uid]
	if t == nil {
		t = &turn{taken: make(chan struct{}, 1)}
		h.turns[uid] = t
	}
	t.users++
	h.mu.Unlock()
	done := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(h.turns, uid)
		}
	}
	select {
	case t.taken <- struct{}{}:
	case <-ctx.Done():
		done()
		return nil, ctx.Err()
	}
	select {
	case h.readers <- struct{}{}:
	case <-ctx.Done():
		<-t.taken
		done()
		return nil, ctx.Err()
	}
	return func() {
		<-h.readers
		<-t.taken
		done()
	}, nil
}

// read returns the hash of the file at the path if it is this version, before and after.
func (v version) read(ctx context.Context, path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || versionOf(info) != v {
		return ""
	}
	digest := sha256.New()
	if n, err := io.Copy(digest, io.LimitReader(untilDone{ctx, f}, v.size+1)); err != nil || n != v.size {
		return ""
	}
	if info, err := f.Stat(); err != nil || versionOf(info) != v {
		return "" // changed while it was read
	}
	return hex.EncodeToString(digest.Sum(nil))
}

// untilDone reads until the context is done.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func versionOf(info fs.FileInfo) version {
	s := unixStat(info)
	return version{dev: s.Dev, ino: s.Ino, size: s.Size, mtime: s.Mtim, ctime: s.Ctim}
}

// unixStat is what every FileInfo of package os holds on Linux.
func unixStat(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }
