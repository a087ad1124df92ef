package disk_test

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport.dev/identity/disk"
)

// organisation is a CA as organisations have them: it knows nothing of SPIFFE.
type organisation struct {
	certs []*x509.Certificate // the one that signs first, the root last
	key   crypto.Signer
}

// above makes a CA below o; the zero organisation's is a root.
func (o organisation) above(t testing.TB, key crypto.Signer, change func(*x509.Certificate)) organisation {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Organisation", SerialNumber: serial.String()},
		NotBefore: time.Now().Add(-day), NotAfter: time.Now().Add(1000 * day),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	if change != nil {
		change(template)
	}
	parent, signer := template, key
	if len(o.certs) > 0 {
		parent, signer = o.certs[0], o.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return organisation{append([]*x509.Certificate{cert}, o.certs...), key}
}

func (o organisation) root() *x509.Certificate { return o.certs[len(o.certs)-1] }

func pemOf(certs ...*x509.Certificate) (text []byte) {
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

func write(t testing.TB, path string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
}

// files writes the CA where u looks for it.
func (o organisation) files(t testing.TB, u disk.UpstreamCA) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(o.key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, u.Cert, pemOf(o.certs...), 0o644)
	write(t, u.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func upstream(t testing.TB) disk.UpstreamCA {
	t.Helper()
	dir := t.TempDir()
	return disk.UpstreamCA{TrustDomain: td, Cert: filepath.Join(dir, "ca.crt"), Key: filepath.Join(dir, "ca.key")}
}

// Whoever trusts the organisation's root accepts the SVIDs: OpenSSL does, which knows nothing of SPIFFE either.
func TestBelowUpstream(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := organisation{}.above(t, newKey(t), nil)
	for name, o := range map[string]organisation{
		"root":             root,
		"RSA":              organisation{}.above(t, rsaKey, nil),
		"Ed25519":          organisation{}.above(t, edKey, nil),
		"below":            root.above(t, newKey(t), nil),
		"far below":        root.above(t, newKey(t), nil).above(t, newKey(t), nil),
		"for this domain":  root.above(t, newKey(t), func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }),
		"one below it":     root.above(t, newKey(t), func(c *x509.Certificate) { c.MaxPathLen = 1 }),
		"for TLS":          root.above(t, newKey(t), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{1, 2} }),
		"ends before ours": root.above(t, newKey(t), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Hour) }),
	} {
		t.Run(name, func(t *testing.T) {
			u := upstream(t)
			o.files(t, u)
			dir := filepath.Join(t.TempDir(), "state")
			k := open(t, disk.Config{Dir: dir, Upstream: u})
			a := k.Authorities()
			if roots := a.Bundle.X509Authorities(); len(roots) != 1 || !roots[0].Equal(o.root()) {
				t.Errorf("trusts %d roots", len(roots))
			}
			ca, svid := a.X509.Certificate(), issue(t, a.X509)
			if !ca.MaxPathLenZero || ca.URIs[0].String() != "spiffe://example.org" || ca.NotAfter.After(o.certs[0].NotAfter) {
				t.Errorf("%s, path length %d, until %s", ca.URIs, ca.MaxPathLen, ca.NotAfter)
			}
			folder := t.TempDir()
			path := func(name string) string { return filepath.Join(folder, name) }
			write(t, path("root"), pemOf(o.root()), 0o600)
			write(t, path("rest"), pemOf(svid[1:]...), 0o600)
			write(t, path("leaf"), pemOf(svid[0]), 0o600)
			for _, purpose := range []string{"sslclient", "sslserver"} {
				if out, err := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", path("root"),
					"-untrusted", path("rest"), path("leaf")).CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			}
			if d := k.Show(); !d.Upstream || states(d) != "active active-key" {
				t.Errorf("%+v", d)
			}
			key, err := os.ReadFile(u.Key)
			if err != nil || strings.Contains(string(content(t, dir)), strings.Split(string(key), "\n")[1]) {
				t.Errorf("the organisation's key was copied, %v", err)
			}
			k.Close()
			again := open(t, disk.Config{Dir: dir, Upstream: u})
			if !again.Authorities().X509.Certificate().Equal(ca) {
				t.Error("another authority after a restart")
			}
		})
	}
}

func TestUpstreamRefused(t *testing.T) {
	root := organisation{}.above(t, newKey(t), nil)
	good := root.above(t, newKey(t), nil)
	with := func(change func(*x509.Certificate)) func(*testing.T, *disk.UpstreamCA) {
		return func(t *testing.T, u *disk.UpstreamCA) { root.above(t, newKey(t), change).files(t, *u) }
	}
	cases := map[string]struct {
		spoil func(*testing.T, *disk.UpstreamCA)
		code  string
	}{
		"no certificate": {func(t *testing.T, u *disk.UpstreamCA) { u.Cert += ".no" }, "file-missing"},
		"no key":         {func(t *testing.T, u *disk.UpstreamCA) { u.Key += ".no" }, "file-missing"},
		"key for all": {func(t *testing.T, u *disk.UpstreamCA) {
			if err := os.Chmod(u.Key, 0o644); err != nil {
				t.Fatal(err)
			}
		}, "authority-readable"},
		"another's key": {func(t *testing.T, u *disk.UpstreamCA) { organisation{good.certs, root.key}.files(t, *u) }, "upstream-invalid"},
		"encrypted key": {func(t *testing.T, u *disk.UpstreamCA) {
			write(t, u.Key, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("secret")}), 0o600)
		}, "upstream-unreadable"},
		"no PEM":      {func(t *testing.T, u *disk.UpstreamCA) { write(t, u.Cert, good.certs[0].Raw, 0o600) }, "upstream-unreadable"},
		"no root":     {func(t *testing.T, u *disk.UpstreamCA) { organisation{good.certs[:1], good.key}.files(t, *u) }, "upstream-incomplete"},
		"wrong order": {func(t *testing.T, u *disk.UpstreamCA) { write(t, u.Cert, pemOf(root.certs[0], good.certs[0]), 0o600) }, "upstream-invalid"},
		"a gap": {func(t *testing.T, u *disk.UpstreamCA) {
			far := good.above(t, newKey(t), nil)
			organisation{[]*x509.Certificate{far.certs[0], far.certs[2]}, far.key}.files(t, *u)
		}, "upstream-incomplete"},
		"another's root": {func(t *testing.T, u *disk.UpstreamCA) {
			u.Bundle = u.Cert + ".roots"
			write(t, u.Bundle, pemOf(organisation{}.above(t, newKey(t), nil).certs...), 0o600)
		}, "upstream-incomplete"},
		"bundle of others than roots": {func(t *testing.T, u *disk.UpstreamCA) {
			u.Bundle = u.Cert + ".roots"
			write(t, u.Bundle, pemOf(good.certs...), 0o600)
		}, "upstream-bundle"},
		"a leaf":          {with(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }), "upstream-invalid"},
		"may not sign":    {with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), "upstream-invalid"},
		"none below it":   {with(func(c *x509.Certificate) { c.MaxPathLenZero = true }), "upstream-invalid"},
		"expired":         {with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "upstream-expired"},
		"not begun":       {with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), "upstream-expired"},
		"for clients":     {with(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "upstream-invalid"},
		"for others":      {with(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.org"} }), "upstream-invalid"},
		"not for us":      {with(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} }), "upstream-invalid"},
		"ends in seconds": {with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second) }), "upstream-invalid"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			u := upstream(t)
			good.files(t, u)
			c.spoil(t, &u)
			dir := filepath.Join(t.TempDir(), "state")
			_, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td, Upstream: u})
			wantProblem(t, err, c.code)
			if _, err := os.Stat(filepath.Join(dir, disk.File)); err == nil {
				t.Error("there is a file")
			}
		})
	}
}

func TestUpstreamBundle(t *testing.T) {
	root, other := organisation{}.above(t, newKey(t), nil), organisation{}.above(t, newKey(t), nil)
	o := root.above(t, newKey(t), nil)
	u := upstream(t)
	organisation{o.certs[:1], o.key}.files(t, u)
	u.Bundle = u.Cert + ".roots"
	write(t, u.Bundle, pemOf(other.root(), root.root()), 0o644)
	k := open(t, disk.Config{Dir: filepath.Join(t.TempDir(), "state"), Upstream: u})
	if n := len(k.Authorities().Bundle.X509Authorities()); n != 2 || !k.Authorities().X509.Root().Equal(root.root()) {
		t.Errorf("trusts %d roots", n)
	}
	if s := states(k.Show()); s != "prepared active active-key" {
		t.Errorf("states %s", s)
	}
}

// The files change while the program runs: a new root is trusted at once, and signs when everybody can know it.
func TestUpstreamReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := upstream(t)
		first, next := organisation{}.above(t, newKey(t), nil), organisation{}.above(t, newKey(t), nil)
		first.files(t, u)
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), Upstream: u, IntermediateTTL: day, Overlap: 3 * time.Hour}
		r := run(t, c)
		m := &member{late: c.Overlap}
		live := func(hours int) {
			t.Helper()
			for range hours {
				m.meet(t, r)
				time.Sleep(time.Hour)
			}
		}
		live(48)
		r.wantStates(t, "active active-key")

		next.files(t, u)
		time.Sleep(2 * time.Minute)
		r.wantStates(t, "active prepared active-key")
		if !r.authorities(t).X509.Root().Equal(first.root()) {
			t.Error("signs below a root that nobody knows")
		}
		live(3)
		r.wantStates(t, "old active active-key")
		live(26)
		if n := len(r.authorities(t).Bundle.X509Authorities()); n != 1 || !r.authorities(t).X509.Root().Equal(next.root()) {
			t.Errorf("trusts %d roots", n)
		}

		before := r.authorities(t).X509
		if err := r.Rotate(t.Context(), disk.X509, false); err != nil || r.authorities(t).X509 == before {
			t.Errorf("not rotated: %v", err)
		}
		first.files(t, u)
		if err := r.Rotate(t.Context(), disk.X509, true); err != nil || !r.authorities(t).X509.Root().Equal(first.root()) {
			t.Errorf("not at once: %v", err)
		}

		// Without the files it goes on, as long as it can, and fails closed then.
		if err := os.Remove(u.Key); err != nil {
			t.Fatal(err)
		}
		before = r.authorities(t).X509
		r.stop()
		r = run(t, c)
		time.Sleep(20 * time.Hour)
		if !r.authorities(t).X509.Certificate().Equal(before.Certificate()) || r.Show().Problem == "" {
			t.Errorf("%+v", r.Show())
		}
		if err := r.Rotate(t.Context(), disk.X509, true); err == nil {
			t.Error("rotated without a key")
		}
		issue(t, r.authorities(t).X509)
		time.Sleep(5 * time.Hour)
		if err := r.authorities(t).X509.Check(time.Now()); err == nil {
			t.Error("it signs on and on")
		}
		first.files(t, u)
		time.Sleep(2 * time.Minute)
		(&member{}).meet(t, r)
	})
}

// From a root of its own below somebody else's, and back: nobody is told too late.
func TestUpstreamComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := upstream(t)
		o := organisation{}.above(t, newKey(t), func(c *x509.Certificate) { c.NotBefore = time.Now() })
		o.files(t, u)
		own := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), Overlap: time.Hour, Key: key(t, "a")}
		below := own
		below.Upstream = u
		m := &member{late: time.Hour}
		live := func(c disk.Config, before, after string) *x509.Certificate {
			t.Helper()
			r := run(t, c)
			defer r.stop()
			r.wantStates(t, before)
			for range 24 * 2 {
				m.meet(t, r)
				time.Sleep(time.Hour)
			}
			r.wantStates(t, after)
			return r.authorities(t).X509.Root()
		}
		first := live(own, "active active-key", "active active-key")
		if root := live(below, "active prepared active-key", "old active active-key"); !root.Equal(o.root()) {
			t.Error("does not sign below the organisation")
		}
		if root := live(own, "old active prepared active-key", "old old active active-key"); root.Equal(o.root()) || root.Equal(first) {
			t.Error("signs with what it had given up")
		}
	})
}

// liar is an upstream authority that answers what it should not.
type liar struct {
	disk.UpstreamAuthority
	change func([]*x509.Certificate) []*x509.Certificate
	roots  []*x509.Certificate
}

func (l liar) MintIntermediate(ctx context.Context, csr []byte, ttl time.Duration) ([]*x509.Certificate, error) {
	chain, err := l.UpstreamAuthority.MintIntermediate(ctx, csr, ttl)
	if err != nil {
		return nil, err
	}
	return l.change(chain), nil
}

func (l liar) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	if l.roots != nil {
		return l.roots, nil
	}
	return l.UpstreamAuthority.Roots(ctx)
}

func TestUpstreamLies(t *testing.T) {
	u := upstream(t)
	o := organisation{}.above(t, newKey(t), nil)
	o.files(t, u)
	same := func(c []*x509.Certificate) []*x509.Certificate { return c }
	many := make([]*x509.Certificate, 20)
	for i := range many {
		many[i] = organisation{}.above(t, newKey(t), nil).root()
	}
	for name, l := range map[string]liar{
		"nothing":           {u, func([]*x509.Certificate) []*x509.Certificate { return nil }, nil},
		"no intermediate":   {u, func(c []*x509.Certificate) []*x509.Certificate { return c[1:] }, nil},
		"no root":           {u, func(c []*x509.Certificate) []*x509.Certificate { return c[:1] }, nil},
		"another key":       {u, func(c []*x509.Certificate) []*x509.Certificate { return o.above(t, newKey(t), nil).certs }, nil},
		"a very long chain": {u, func(c []*x509.Certificate) []*x509.Certificate { return append(c, many...) }, nil},
		"another root":      {u, same, many[:1]},
		"no roots":          {u, same, []*x509.Certificate{}},
		"very many roots":   {u, same, many},
		"a root that is none": {u, same, append([]*x509.Certificate{o.root()},
			o.above(t, newKey(t), func(c *x509.Certificate) { c.IsCA = false }).certs[0])},
	} {
		dir := filepath.Join(t.TempDir(), "state")
		_, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: dir, TrustDomain: td, Upstream: l})
		if err == nil {
			t.Errorf("%s: believed", name)
		}
		if _, err := os.Stat(filepath.Join(dir, disk.File)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: there is a file", name)
		}
	}
}
