package attest

import (
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
)

// hashes remembers the hashes of programs. It does not lock while it reads, so a file system that hangs holds up
// only those who run programs from it.
type hashes struct {
	mu   sync.Mutex
	sums map[version]string
}

// version is a file's content as far as it can be told apart without reading it. The time of the last change of the
// inode is part of it because, unlike the time of modification, no program can set it.
type version struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func newHashes() *hashes { return &hashes{sums: make(map[version]string)} }

// of returns the SHA-256 in hex of the program at the path, which must still be the given file; "" if it cannot.
func (h *hashes) of(path string, exe fs.FileInfo) string {
	v := versionOf(exe)
	h.mu.Lock()
	sum, ok := h.sums[v]
	h.mu.Unlock()
	if ok {
		return sum
	}
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || versionOf(info) != v || v.size > maxProgram {
		return ""
	}
	digest := sha256.New()
	if n, err := io.Copy(digest, io.LimitReader(f, v.size+1)); err != nil || n != v.size {
		return ""
	}
	if info, err := f.Stat(); err != nil || versionOf(info) != v {
		return "" // changed while it was read
	}
	sum = hex.EncodeToString(digest.Sum(nil))
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.sums) >= maxHashes {
		for old := range h.sums { // any one: it can be had again
			delete(h.sums, old)
			break
		}
	}
	h.sums[v] = sum
	return sum
}

func versionOf(info fs.FileInfo) version {
	s := unixStat(info)
	return version{dev: s.Dev, ino: s.Ino, size: s.Size, mtime: s.Mtim, ctime: s.Ctim}
}

// unixStat is what every FileInfo of package os holds on Linux.
func unixStat(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }
