package disk_test

import (
	"bytes"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
	"sallyport.dev/segment"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("example.org")
	now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

func open(t *testing.T, dir string) *identity.Authority {
	t.Helper()
	a, err := disk.Open(dir, td, now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSameAfterRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "state")
	first := open(t, dir)
	again, err := disk.Open(dir, td, now.Add(365*24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if !first.Certificate().Equal(again.Certificate()) {
		t.Error("another authority after a restart")
	}
	if years := first.Certificate().NotAfter.Sub(now).Hours() / 24 / 365; years < 9.9 || years > 10 {
		t.Errorf("lives for %f years", years)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, disk.File): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestManyAtOnceAgree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	got := make([]*identity.Authority, 8)
	var g errgroup.Group
	for i := range got {
		g.Go(func() (err error) {
			got[i], err = disk.Open(dir, td, now)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, a := range got {
		if !a.Certificate().Equal(got[0].Certificate()) {
			t.Fatal("two authorities in one folder")
		}
	}
}

func TestRefuses(t *testing.T) {
	block := func(data []byte, kind string) []byte {
		for b, rest := pem.Decode(data); b != nil; b, rest = pem.Decode(rest) {
			if b.Type == kind {
				return pem.EncodeToMemory(b)
			}
		}
		return nil
	}
	rewrite := func(f func(t *testing.T, data []byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, f(t, data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	chmod := func(name func(string) string, mode os.FileMode) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.Chmod(name(path), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	self := func(path string) string { return path }
	cases := []struct {
		name  string
		spoil func(t *testing.T, path string)
		td    string
		now   time.Time
		code  string
	}{
		{"wrong trust domain", nil, "other.org", now, "authority-trust-domain"},
		{"expired", nil, "example.org", now.AddDate(11, 0, 0), "authority-expired"},
		{"clock far behind", nil, "example.org", now.AddDate(-1, 0, 0), "authority-not-begun"},
		{"group may read the key", chmod(self, 0o640), "example.org", now, "authority-readable"},
		{"world may read the key", chmod(self, 0o604), "example.org", now, "authority-readable"},
		{"folder open", chmod(filepath.Dir, 0o750), "example.org", now, "state-folder-open"},
		{"empty", rewrite(func(*testing.T, []byte) []byte { return nil }), "example.org", now, "authority-torn"},
		{"half written", rewrite(func(_ *testing.T, d []byte) []byte { return d[:len(d)-40] }), "example.org", now, "authority-torn"},
		{"certificate without key", rewrite(func(_ *testing.T, d []byte) []byte { return block(d, "CERTIFICATE") }), "example.org", now, "authority-torn"},
		{"key without certificate", rewrite(func(_ *testing.T, d []byte) []byte { return block(d, "PRIVATE KEY") }), "example.org", now, "authority-torn"},
		{"two keys", rewrite(func(_ *testing.T, d []byte) []byte { return append(block(d, "PRIVATE KEY"), d...) }), "example.org", now, "authority-torn"},
		{"another's key", rewrite(func(t *testing.T, d []byte) []byte {
			other := filepath.Join(t.TempDir(), "state")
			open(t, other)
			o, err := os.ReadFile(filepath.Join(other, disk.File))
			if err != nil {
				t.Fatal(err)
			}
			return append(block(o, "PRIVATE KEY"), block(d, "CERTIFICATE")...)
		}), "example.org", now, "authority-invalid"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			open(t, dir)
			path := filepath.Join(dir, disk.File)
			if c.spoil != nil {
				c.spoil(t, path)
			}
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			a, err := disk.Open(dir, spiffeid.RequireTrustDomainFromString(c.td), c.now)
			var ps segment.Problems
			if !errors.As(err, &ps) || len(ps) != 1 || a != nil {
				t.Fatalf("got %v, %v", a, err)
			}
			if ps[0].Code != c.code || ps[0].Hint == "" || ps[0].Pos.File == "" {
				t.Errorf("got %+v, want code %s, a file and a hint", ps[0], c.code)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
		})
	}
}
