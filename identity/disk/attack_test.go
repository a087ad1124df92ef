package disk_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity/disk"
)

// However much of the file is there, it is whole or refused, and what is refused is left as it is.
func TestEveryLength(t *testing.T) {
	for name, c := range map[string]disk.Config{"plain": {}, "encrypted": {Key: key(t, "a")}} {
		dir := state(t, c)
		path, data := filepath.Join(dir, disk.File), content(t, dir)
		_, want, err := disk.Read(dir, c.Key, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		whole := len(bytes.TrimRight(data, "\n"))
		for n := range data {
			write(t, path, data[:n], 0o600)
			_, got, err := disk.Read(dir, c.Key, time.Now())
			switch {
			case err == nil && (n < whole || !got.Equal(want)):
				t.Fatalf("%s: read from %d bytes of %d", name, n, len(data))
			case err != nil && n%50 == 0:
				wantProblem(t, err, "authority-torn")
			}
		}
		write(t, path, data[:whole-1], 0o600)
		c.Dir, c.TrustDomain = dir, td
		if _, err := disk.OpenKeeper(t.Context(), c); err == nil || !bytes.Equal(content(t, dir), data[:whole-1]) {
			t.Errorf("%s: %v, or the file was changed", name, err)
		}
	}
}

// TestMain is also another process that keeps a folder, and rotates in it until it is killed.
func TestMain(m *testing.M) {
	dir := os.Getenv("KEEP_FOLDER")
	if dir == "" {
		os.Exit(m.Run())
	}
	ctx := context.Background()
	k, err := disk.OpenKeeper(ctx, disk.Config{Dir: dir, TrustDomain: td})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go func() { _ = k.Run(ctx) }()
	fmt.Println("kept")
	for {
		if err := k.Rotate(ctx, disk.All, true); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		d := k.Show()
		for _, s := range append(d.Roots[:len(d.Roots)-1], d.JWT[:len(d.JWT)-1]...) {
			if err := k.Distrust(ctx, s.ID); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
	}
}

// Two processes never keep one folder. One that is killed while it writes leaves a whole file, and who reads meanwhile
// reads a whole one.
func TestKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	roots := map[string]bool{}
	for range 5 {
		other := exec.CommandContext(t.Context(), os.Args[0])
		other.Env = append(os.Environ(), "KEEP_FOLDER="+dir)
		out, err := other.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := other.Start(); err != nil {
			t.Fatal(err)
		}
		said := bufio.NewScanner(out)
		if said.Scan(); said.Text() != "kept" {
			t.Fatalf("the other process: %q", said.Text())
		}
		for range 50 {
			d, b, err := disk.Read(dir, disk.Key{}, time.Now())
			if err != nil || len(b.X509Authorities()) == 0 || d.Intermediate == nil {
				t.Fatalf("read %+v, %v", d, err)
			}
			roots[id(b.X509Authorities()[0])] = true
		}
		_, err = disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td})
		wantProblem(t, err, "state-folder-busy")
		if err := other.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if said.Scan() {
			t.Errorf("the other process: %q", said.Text())
		}
		_ = other.Wait() // it was killed
		k := open(t, disk.Config{Dir: dir})
		issue(t, k.Authorities().X509)
		k.Close()
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
	if len(roots) < 2 {
		t.Errorf("%d roots were seen: nothing was written meanwhile", len(roots))
	}
}

// Where the folder was moved away and another made, the one who had the first does not write into the second.
func TestFolderExchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), IntermediateTTL: day}
		r := run(t, c)
		before := r.authorities(t)
		if err := os.Rename(c.Dir, c.Dir+".away"); err != nil {
			t.Fatal(err)
		}
		other := open(t, c)
		file := content(t, c.Dir)
		if err := r.Rotate(t.Context(), disk.All, true); err == nil {
			t.Error("rotated in another's folder")
		}
		time.Sleep(20 * time.Hour) // the intermediate is due
		if a := r.authorities(t); a.X509 != before.X509 || r.Show().Problem == "" {
			t.Errorf("something is in force that is not on the disk, or nobody says so: %+v", r.Show())
		}
		if !bytes.Equal(content(t, c.Dir), file) || other.Authorities().X509.Root().Equal(before.X509.Root()) {
			t.Error("two keepers have one folder")
		}
	})
}

// Who owns a folder or a file reads it whatever its mode is.
func TestOthersOwn(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root gives things away")
	}
	for name, code := range map[string]string{"": "state-folder-open", disk.File: "authority-readable"} {
		dir := state(t, disk.Config{})
		if err := os.Chown(filepath.Join(dir, name), 12345, -1); err != nil {
			t.Fatal(err)
		}
		_, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td})
		wantProblem(t, err, code)
		_, err = disk.Open(dir, td, time.Now())
		wantProblem(t, err, code)
		if _, _, err := disk.Read(dir, disk.Key{}, time.Now()); err != nil {
			t.Errorf("root reads nothing: %v", err)
		}
	}
}

// A file of another kind in the place of ours is not waited for, and not followed anywhere.
func TestOtherKindsOfFile(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"pipe":   func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"device": func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		dir := state(t, disk.Config{})
		path := filepath.Join(dir, disk.File)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := put(path); err != nil {
			t.Fatal(err)
		}
		if _, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td}); err == nil {
			t.Errorf("%s: opened", name)
		} else {
			wantProblem(t, err, "authority-invalid")
		}
	}
}

// The folder of another trust domain, and of one that was encrypted for another machine, stay as they are.
func TestOfAnother(t *testing.T) {
	for code, c := range map[string]disk.Config{
		"authority-trust-domain": {TrustDomain: spiffeid.RequireTrustDomainFromString("example.com"), Key: key(t, "a")},
		"authority-wrong-key":    {TrustDomain: td, Key: key(t, "b")},
		"authority-encrypted":    {TrustDomain: td},
	} {
		c.Dir = state(t, disk.Config{Key: key(t, "a")})
		before := content(t, c.Dir)
		_, err := disk.OpenKeeper(t.Context(), c)
		wantProblem(t, err, code)
		if strings.Contains(err.Error(), strings.Repeat("a", 8)) || strings.Contains(err.Error(), strings.Repeat("b", 8)) {
			t.Errorf("it tells a key: %v", err)
		}
		if !bytes.Equal(before, content(t, c.Dir)) {
			t.Errorf("%s: the file was changed", code)
		}
	}
}
