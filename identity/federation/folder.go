package federation

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sallyport.dev/identity/internal/whole"
	"sallyport.dev/segment"
)

// folder keeps the last good keys of each party in a file of its own. Whoever can write there says whom we trust.
type folder string

const (
	fileEnd   = ".json"
	tempStart = ".new-"
)

// open makes the folder, or checks that nobody else gets into it, and removes what a crash has left half written.
func (f folder) open() error {
	dir := string(f)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create folder of keys: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open folder of keys: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return segment.Problems{{Code: "state-folder-open", Pos: segment.Pos{File: dir},
			Msg: fmt.Sprintf("the folder with the keys of others whom we trust is open to others (mode %04o)", mode), Hint: "chmod 700 " + dir}}
	}
	left, err := filepath.Glob(filepath.Join(dir, tempStart+"*"))
	if err != nil {
		return fmt.Errorf("open folder of keys: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("open folder of keys: %w", err)
		}
	}
	return nil
}

// path is the file of a party. It is named by a digest: a trust domain's name can be longer than a file's.
func (f folder) path(id string) string {
	return filepath.Join(string(f), digest([]byte(id))[:32]+fileEnd)
}

// load reads the record of a party, and reports whether there is one. What is doubtful is refused.
func (f folder) load(id string, record any) (bool, error) {
	path := f.path(id)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if info.Mode()&^0o700 != 0 {
		return false, fmt.Errorf("%s is not a file of ours alone (%s)", path, info.Mode())
	}
	data, err := readFile(path, 2*segment.MaxBundle)
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(data, record); err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return true, nil
}

// save keeps a record in place of the one before, whole or not at all.
func (f folder) save(id string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return whole.Write(f.path(id), append(data, '\n'), tempStart+"*", os.Rename)
}

// retain removes the files of all other parties.
func (f folder) retain(wanted map[string]bool) error {
	keep := make(map[string]bool)
	for id := range wanted {
		keep[filepath.Base(f.path(id))] = true
	}
	entries, err := os.ReadDir(string(f))
	if err != nil {
		return err
	}
	removed := false
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), fileEnd) && !keep[e.Name()] {
			if err := os.Remove(filepath.Join(string(f), e.Name())); err != nil {
				return err
			}
			removed = true
		}
	}
	if !removed {
		return nil
	}
	return whole.SyncFolder(string(f))
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
