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
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity/internal/whole"
	"sallyport.dev/segment"
)

// folder keeps the last good bundles, each in a file of its own. Whoever can write there says whom we trust.
type folder string

// record is a file of the folder.
type record struct {
	TrustDomain string          `json:"trustDomain"`
	Endpoint    string          `json:"endpoint"`          // digest of where it came from
	Initial     string          `json:"initial,omitempty"` // digest of the initial bundle
	Floor       *uint64         `json:"floor,omitempty"`   // the highest sequence number so far
	Fetched     time.Time       `json:"fetched"`
	Bundle      json.RawMessage `json:"bundle"` // SPIFFE bundle

	bundle *spiffebundle.Bundle
}

const (
	fileEnd   = ".json"
	tempStart = ".new-"
)

// openFolder makes the folder, or checks that nobody else gets into it, and removes what a crash has left half written.
func openFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create folder of bundles: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open folder of bundles: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return segment.Problems{{Code: "state-folder-open", Pos: segment.Pos{File: dir},
			Msg: fmt.Sprintf("the folder with the bundles of other trust domains is open to others (mode %04o)", mode), Hint: "chmod 700 " + dir}}
	}
	left, err := filepath.Glob(filepath.Join(dir, tempStart+"*"))
	if err != nil {
		return fmt.Errorf("open folder of bundles: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("open folder of bundles: %w", err)
		}
	}
	return nil
}

// path is the file of a trust domain. It is named by a digest: a trust domain's name can be longer than a file's.
func (f folder) path(td spiffeid.TrustDomain) string {
	return filepath.Join(string(f), digest([]byte(td.Name()))[:32]+fileEnd)
}

// load returns what is kept of a trust domain; nil if nothing is. What is doubtful is refused.
func (f folder) load(td spiffeid.TrustDomain) (*record, error) {
	path := f.path(td)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load bundle: %w", err)
	}
	if info.Mode()&^0o700 != 0 {
		return nil, fmt.Errorf("load bundle: %s is not a file of ours alone (%s)", path, info.Mode())
	}
	data, err := readFile(path, 2*segment.MaxBundle)
	if err != nil {
		return nil, fmt.Errorf("load bundle: %w", err)
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("load bundle: %s: %w", path, err)
	}
	if r.TrustDomain != td.Name() {
		return nil, fmt.Errorf("load bundle: %s is of trust domain %q", path, r.TrustDomain)
	}
	if r.bundle, err = decodeBundle(td, r.Bundle); err != nil {
		return nil, fmt.Errorf("load bundle: %s: %w", path, err)
	}
	return &r, nil
}

// save keeps a record in place of the one before, whole or not at all.
func (f folder) save(td spiffeid.TrustDomain, r record) error {
	if err := f.write(td, r); err != nil {
		return fmt.Errorf("keep bundle: %w", err)
	}
	return nil
}

func (f folder) write(td spiffeid.TrustDomain, r record) error {
	r.TrustDomain = td.Name()
	var err error
	if r.Bundle, err = encodeBundle(r.bundle); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return whole.Write(f.path(td), append(data, '\n'), tempStart+"*", os.Rename)
}

// retain removes the files of all other trust domains.
func (f folder) retain(wanted map[spiffeid.TrustDomain]bool) error {
	keep := make(map[string]bool)
	for td := range wanted {
		keep[filepath.Base(f.path(td))] = true
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

// endpointDigest tells one way to get a bundle from another.
func endpointDigest(e segment.BundleEndpoint) string {
	return digest(fmt.Appendf(nil, "%q %q %q %q", e.URL, e.Profile, e.CAFile, e.ID))
}
