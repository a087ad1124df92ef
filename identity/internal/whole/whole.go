// Package whole puts files on the disk whole or not at all.
//
// It is for the parts of identity that keep state: what they say has happened must still be true after a crash. It
// never leaves a file that others can read.
package whole

import (
	"errors"
	"os"
	"path/filepath"
)

// Write puts a whole file, on the disk, at the path: put is os.Rename to take the place of the one before, or os.Link to
// fail if there is one. Until then the file stands beside it under a name by the pattern (os.CreateTemp), with mode 0600.
func Write(path string, data []byte, pattern string, put func(from, to string) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), pattern) // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := put(f.Name(), path); err != nil {
		return err
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder puts on the disk which files a folder has.
func SyncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
