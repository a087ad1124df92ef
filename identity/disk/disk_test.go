package disk_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
	"sallyport.dev/segment"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const day = 24 * time.Hour

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// state is a folder in which a keeper has been.
func state(t testing.TB, c disk.Config) string {
	t.Helper()
	c.Dir = filepath.Join(t.TempDir(), "state")
	open(t, c).Close()
	return c.Dir
}

func open(t testing.TB, c disk.Config) *disk.Keeper {
	t.Helper()
	c.TrustDomain = td
	k, err := disk.OpenKeeper(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func content(t testing.TB, dir string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, disk.File))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// former puts an authority into a folder as versions did that had one root, which signed itself.
func former(t testing.TB, from time.Time) (dir string, a *identity.Authority) {
	t.Helper()
	key := newKey(t)
	template, err := identity.CATemplate(td, 3650*day, from, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if a, err = identity.SelfSign(template, key); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	data := append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})...)
	if err := os.WriteFile(filepath.Join(dir, disk.File), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, a
}

// issue has an X.509-SVID signed.
func issue(t testing.TB, a *identity.Authority) []*x509.Certificate {
	t.Helper()
	now := time.Now()
	template, err := a.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: time.Hour}, now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Sign(template, newKey(t).Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

func TestSameAfterRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "state")
	k := open(t, disk.Config{Dir: dir})
	first, file := k.Authorities(), content(t, dir)
	k.Close()
	again := open(t, disk.Config{Dir: dir}).Authorities()
	if !first.X509.Certificate().Equal(again.X509.Certificate()) || first.JWT.KeyID() != again.JWT.KeyID() || !first.Bundle.Equal(again.Bundle) {
		t.Error("another authority after a restart")
	}
	if !bytes.Equal(file, content(t, dir)) {
		t.Error("written although nothing was to be done")
	}
	root, ca := first.X509.Root(), first.X509.Certificate()
	if years := time.Until(root.NotAfter).Hours() / 24 / 365; years < 9.9 || years > 10 {
		t.Errorf("the root lives for %f years", years)
	}
	if ca.Equal(root) || !ca.MaxPathLenZero || ca.MaxPathLen != 0 || ca.URIs[0].String() != "spiffe://example.org" {
		t.Errorf("signs as %s, path length %d, %s", ca.Subject, ca.MaxPathLen, ca.URIs)
	}
	if _, err := identity.Verify(issue(t, again.X509), first.Bundle, time.Now()); err != nil {
		t.Error(err)
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
			got[i], err = disk.Open(dir, td, time.Now())
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
	k := open(t, disk.Config{Dir: dir})
	if !k.Authorities().X509.Root().Equal(got[0].Certificate()) {
		t.Error("the keeper has another root")
	}
	issue(t, got[0]) // as those do that do not have things kept
}

func TestOneKeeper(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	k := open(t, disk.Config{Dir: dir})
	_, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td})
	wantProblem(t, err, "state-folder-busy")
	if _, b, err := disk.Read(dir, disk.Key{}, time.Now()); err != nil || !b.Equal(k.Authorities().Bundle) {
		t.Errorf("read %v, %v", b, err)
	}
	k.Close()
	if err := os.WriteFile(filepath.Join(dir, ".ca-123"), []byte("half of a k"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, disk.Config{Dir: dir})
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// What was signed before is trusted, who trusted before trusts, and who has the new bundle trusts no more than before.
func TestTakesOver(t *testing.T) {
	dir, a := former(t, time.Now().Add(-100*day))
	before := issue(t, a)
	k := open(t, disk.Config{Dir: dir})
	now := k.Authorities()
	if roots := now.Bundle.X509Authorities(); len(roots) != 1 || !roots[0].Equal(a.Certificate()) {
		t.Errorf("trusts %d roots", len(roots))
	}
	for name, err := range map[string]error{
		"before": second(identity.Verify(before, now.Bundle, time.Now())),
		"after":  second(identity.Verify(issue(t, now.X509), a.Bundle(), time.Now())),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if now.X509.Certificate().Equal(a.Certificate()) {
		t.Error("the root signs itself still")
	}
	k.Close()
	again := open(t, disk.Config{Dir: dir}).Authorities()
	if !again.X509.Certificate().Equal(now.X509.Certificate()) {
		t.Error("taken over twice")
	}
}

func second[T any](_ T, err error) error { return err }

func wantProblem(t testing.TB, err error, code string) {
	t.Helper()
	var ps segment.Problems
	if !errors.As(err, &ps) || len(ps) != 1 {
		t.Fatalf("got %v, want problem %s", err, code)
	}
	if ps[0].Code != code || ps[0].Hint == "" || ps[0].Pos.File == "" {
		t.Errorf("got %+v, want code %s, a file and a hint", ps[0], code)
	}
}

func TestRefuses(t *testing.T) {
	rewrite := func(f func(data []byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, f(data), 0o600); err != nil {
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
	replace := func(from, to string) func(*testing.T, string) {
		return rewrite(func(d []byte) []byte { return bytes.Replace(d, []byte(from), []byte(to), 1) })
	}
	block := func(data []byte, kind string) []byte {
		for b, rest := pem.Decode(data); b != nil; b, rest = pem.Decode(rest) {
			if b.Type == kind {
				return pem.EncodeToMemory(&pem.Block{Type: b.Type, Bytes: b.Bytes})
			}
		}
		return nil
	}
	self := func(path string) string { return path }
	cases := []struct {
		name  string
		spoil func(t *testing.T, path string)
		code  string
	}{
		{"group may read the key", chmod(self, 0o640), "authority-readable"},
		{"world may read the key", chmod(self, 0o604), "authority-readable"},
		{"folder open", chmod(filepath.Dir, 0o750), "state-folder-open"},
		{"empty", rewrite(func([]byte) []byte { return nil }), "authority-torn"},
		{"half written", rewrite(func(d []byte) []byte { return d[:len(d)-40] }), "authority-torn"},
		{"without its last block", rewrite(func(d []byte) []byte { return d[:bytes.LastIndex(d, []byte("-----BEGIN"))] }), "authority-torn"},
		{"without its first block", rewrite(func(d []byte) []byte {
			_, rest := pem.Decode(d)
			return rest
		}), "authority-torn"},
		{"another date", replace("Activated: 20", "Activated: 21"), "authority-torn"},
		{"of a newer version", replace("Version: 1", "Version: 2"), "authority-invalid"},
		{"of another trust domain", replace("Trust-Domain: example.org", "Trust-Domain: example.com"), "authority-invalid"},
		{"certificate without key", rewrite(func(d []byte) []byte { return block(d, "CERTIFICATE") }), "authority-torn"},
		{"key without certificate", rewrite(func(d []byte) []byte { return block(d, "PRIVATE KEY") }), "authority-torn"},
		{"another's key", rewrite(func(d []byte) []byte { return append(block(d, "PRIVATE KEY"), block(d, "CERTIFICATE")...) }), "authority-invalid"},
		{"too large", rewrite(func(d []byte) []byte { return append(d, make([]byte, 2<<20)...) }), "authority-invalid"},
		{"a folder", func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, "authority-invalid"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := state(t, disk.Config{})
			path := filepath.Join(dir, disk.File)
			c.spoil(t, path)
			before, _ := os.ReadFile(path)
			k, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td})
			wantProblem(t, err, c.code)
			if k != nil {
				t.Error("opened")
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
		})
	}
	t.Run("wrong trust domain", func(t *testing.T) {
		dir := state(t, disk.Config{})
		_, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")})
		wantProblem(t, err, "authority-trust-domain")
	})
	t.Run("clock far behind", func(t *testing.T) {
		dir, _ := former(t, time.Now().Add(300*day))
		_, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td})
		wantProblem(t, err, "authority-not-begun")
	})
}

// Whichever byte is another one, the file is refused or says the same: no root is lost, and none is added.
func TestEveryByteCounts(t *testing.T) {
	dir := state(t, disk.Config{})
	path, data := filepath.Join(dir, disk.File), content(t, dir)
	_, want, err := disk.Read(dir, disk.Key{}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(data); i += 3 {
		spoiled := bytes.Clone(data)
		spoiled[i] ^= 1
		if err := os.WriteFile(path, spoiled, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, got, err := disk.Read(dir, disk.Key{}, time.Now()); err == nil {
			got.SetSequenceNumber(1)
			want.SetSequenceNumber(1)
			if !got.Equal(want) {
				t.Fatalf("byte %d: another bundle", i)
			}
		}
	}
}

func key(t testing.TB, text string) disk.Key {
	t.Helper()
	k, err := disk.NewKey([]byte(strings.Repeat(text, 40)), "test")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestEncrypted(t *testing.T) {
	dir := state(t, disk.Config{}) // in plain text, at first
	before := open(t, disk.Config{Dir: dir})
	want := before.Authorities()
	before.Close()

	k := open(t, disk.Config{Dir: dir, Key: key(t, "a")})
	if got := k.Authorities(); !got.X509.Certificate().Equal(want.X509.Certificate()) || !got.Bundle.Equal(want.Bundle) {
		t.Error("another authority since it is encrypted")
	}
	if !k.Show().Encrypted {
		t.Error("does not say that it is encrypted")
	}
	k.Close()
	file := content(t, dir)
	for _, never := range []string{"PRIVATE", "CERTIFICATE-", "example.org"} {
		if bytes.Contains(file, []byte(never)) {
			t.Errorf("the file has %q", never)
		}
	}
	for _, must := range []string{"Cipher: AES-256-GCM", "Key-Derivation: HKDF-SHA256", "SALLYPORT_CA_KEY"} {
		if !bytes.Contains(file, []byte(must)) {
			t.Errorf("the file lacks %q", must)
		}
	}
	again := open(t, disk.Config{Dir: dir, Key: key(t, "a")})
	if got := again.Authorities(); !got.X509.Certificate().Equal(want.X509.Certificate()) {
		t.Error("another authority after a restart")
	}
	again.Close()
	if !bytes.Equal(file, content(t, dir)) {
		t.Error("written although nothing was to be done")
	}

	for code, config := range map[string]disk.Config{
		"authority-encrypted": {},
		"authority-wrong-key": {Key: key(t, "b")},
	} {
		config.Dir, config.TrustDomain = dir, td
		_, err := disk.OpenKeeper(t.Context(), config)
		wantProblem(t, err, code)
		_, _, err = disk.Read(dir, config.Key, time.Now())
		wantProblem(t, err, code)
		_, err = disk.Open(dir, td, time.Now())
		wantProblem(t, err, "authority-encrypted")
	}
	if !bytes.Equal(file, content(t, dir)) {
		t.Error("the file was changed")
	}
	for i := bytes.Index(file, []byte("-----BEGIN")); i < len(file); i += 5 {
		spoiled := bytes.Clone(file)
		spoiled[i] ^= 1
		if err := os.WriteFile(filepath.Join(dir, disk.File), spoiled, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, got, err := disk.Read(dir, key(t, "a"), time.Now()); err == nil && !got.Equal(want.Bundle) {
			t.Fatalf("byte %d: another bundle", i)
		}
	}
}

func TestKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	_, err := disk.ReadKey(path)
	wantProblem(t, err, "file-missing")
	secret := strings.Repeat("secret", 8)
	write(secret, 0o644)
	_, err = disk.ReadKey(path)
	wantProblem(t, err, "authority-readable")
	write("\n"+secret[:31]+"\n", 0o600)
	_, err = disk.ReadKey(path)
	wantProblem(t, err, "authority-key-short")
	write(secret+"\n", 0o440)
	k, err := disk.ReadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("key", "key", k, "config", disk.Config{Key: k})
	slog.New(slog.NewJSONHandler(&log, nil)).Info("key", "key", k, "pointer", &k)
	out, _ := json.Marshal(map[string]any{"key": k})
	fmt.Fprintf(&log, "%v %+v %#v %s %q %x %s", k, k, k, k, k, k, out)
	if strings.Contains(log.String(), "secret") || strings.Contains(log.String(), "736563726574") || strings.Contains(log.String(), "115 101 99") {
		t.Errorf("tells the key: %s", &log)
	}
}
