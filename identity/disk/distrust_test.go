package disk_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
)

func id(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// wantDistrusted checks that nobody accepts any more what was signed below a root.
func (r *running) wantDistrusted(t testing.TB, svid []*x509.Certificate) {
	t.Helper()
	if _, err := identity.Verify(svid, r.authorities(t).Bundle, time.Now()); err == nil {
		t.Errorf("what %s signed is accepted", svid[1].Subject)
	}
}

func (r *running) refuses(t testing.TB, id, says string) {
	t.Helper()
	before := r.authorities(t)
	if err := r.Distrust(t.Context(), id); err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("distrust %q: %v", id, err)
	}
	if now := r.authorities(t); now.X509 != before.X509 || now.JWT != before.JWT || !now.Bundle.Equal(before.Bundle) {
		t.Errorf("distrust %q: refused and done", id)
	}
}

// A thief has the whole file. What he could sign is refused as soon as an operator says so, and for good.
func TestDistrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state")}
		r := run(t, c)
		stolen, file := r.authorities(t), content(t, c.Dir)
		svid := issue(t, stolen.X509)
		forge := func() string {
			text, err := stolen.JWT.Sign(identity.JWTRequest{ID: spiffeid.RequireFromString("spiffe://example.org/app"), Audience: []string{"db"}, TTL: time.Hour}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		root, key := id(stolen.X509.Root()), stolen.JWT.KeyID()
		r.refuses(t, root, "signs now")
		r.refuses(t, key, "signs now")
		r.refuses(t, id(stolen.X509.Certificate()), "intermediate")
		r.refuses(t, "", "none is named")
		r.refuses(t, "nobody", "no authority has an ID")

		if err := r.Rotate(t.Context(), disk.All, true); err != nil {
			t.Fatal(err)
		}
		before, _ := r.authorities(t).Bundle.SequenceNumber()
		at := time.Now()
		for _, one := range []string{root[:16], key[:16]} {
			if err := r.Distrust(t.Context(), one); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if all := *r.published.Load(); !all[len(all)-1].at.Equal(at) {
			t.Errorf("published %s later", all[len(all)-1].at.Sub(at))
		}
		if now, _ := r.authorities(t).Bundle.SequenceNumber(); now != before+2 {
			t.Errorf("bundle %d after %d", now, before)
		}
		for range 2 {
			r.wantStates(t, "active active-key")
			r.wantDistrusted(t, svid)
			if _, _, err := identity.ValidateJWT(forge(), r.authorities(t).Bundle, []string{"db"}, time.Now()); err == nil {
				t.Error("a token of the key is accepted")
			}
			(&member{}).meet(t, r)
			r.refuses(t, root, "no authority has an ID")
			for _, block := range bytes.SplitAfter(file, []byte("-----END PRIVATE KEY-----")) {
				if i := bytes.Index(block, []byte("-----BEGIN PRIVATE KEY")); i >= 0 && bytes.Contains(content(t, c.Dir), block[bytes.LastIndex(block, []byte("\n\n"))+2:]) {
					t.Error("the key is still in the file")
				}
			}
			r.stop()
			r = run(t, c)
		}
	})
}

func TestFind(t *testing.T) {
	d := disk.Description{Roots: []disk.Slot{{ID: "aab"}, {ID: "abb"}}, Intermediate: &disk.Slot{ID: "baa"}, JWT: []disk.Slot{{ID: "ba"}, {ID: "c"}}}
	for id, want := range map[string]string{"aab": "aab", "ab": "abb", "baa": "baa", "c": "c", "ba": "ba", "": "", "a": "", "b": "", "cc": "", "B": ""} {
		if got, err := d.Find(id); got.ID != want || (err == nil) != (want != "") {
			t.Errorf("%q: found %q, %v", id, got.ID, err)
		}
	}
}

// What is prepared lies in the same file, so it goes too, and another takes its place.
func TestDistrustPrepared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t, disk.Config{Dir: filepath.Join(t.TempDir(), "state")})
		if err := r.Rotate(t.Context(), disk.All, false); err != nil {
			t.Fatal(err)
		}
		before := r.Show()
		for _, s := range []disk.Slot{before.Roots[1], before.JWT[1]} {
			if err := r.Distrust(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
		}
		r.wantStates(t, "active prepared active-key prepared-key")
		if now := r.Show(); now.Roots[1].ID == before.Roots[1].ID || now.JWT[1].ID == before.JWT[1].ID {
			t.Error("it is there still")
		}
		time.Sleep(2 * day)
		m := &member{late: day}
		m.meet(t, r)
	})
}

// silent is an upstream authority that may not answer.
type silent struct {
	disk.UpstreamCA
	away *atomic.Bool
}

func (s silent) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	if s.away.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.UpstreamCA.Roots(ctx)
}

// An upstream authority may go on naming a root; here it is trusted no more, and neither is another one of its key.
func TestDistrustUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := upstream(t)
		u.Bundle = u.Cert + ".roots"
		var away atomic.Bool
		key := newKey(t)
		stolen, again, next := organisation{}.above(t, key, nil), organisation{}.above(t, key, nil), organisation{}.above(t, newKey(t), nil)
		stolen.files(t, u)
		write(t, u.Bundle, pemOf(stolen.root(), again.root()), 0o644)
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), Upstream: silent{u, &away}, IntermediateTTL: day, Overlap: time.Hour}
		r := run(t, c)
		svid := issue(t, r.authorities(t).X509)
		r.wantStates(t, "active prepared active-key")
		r.refuses(t, id(stolen.root()), "signs now")
		r.refuses(t, id(again.root()), "signs now") // by its key
		r.refuses(t, id(r.authorities(t).X509.Certificate()), "intermediate")

		next.files(t, u)
		all := pemOf(stolen.root(), again.root(), next.root())
		write(t, u.Bundle, all, 0o644)
		if err := r.Rotate(t.Context(), disk.X509, true); err != nil {
			t.Fatal(err)
		}
		r.wantStates(t, "old prepared active active-key")
		away.Store(true)
		at := time.Now()
		if err := r.Distrust(t.Context(), id(again.root())); err != nil {
			t.Fatal(err)
		}
		r.wantDistrusted(t, svid)
		if p := *r.published.Load(); !p[len(p)-1].at.Equal(at) {
			t.Errorf("published %s later", p[len(p)-1].at.Sub(at))
		}
		away.Store(false)
		write(t, u.Bundle, pemOf(organisation{}.above(t, key, nil).root(), again.root(), next.root()), 0o644)
		time.Sleep(2 * time.Minute)
		for range 3 {
			r.wantStates(t, "distrusted distrusted active active-key")
			if roots := r.authorities(t).Bundle.X509Authorities(); len(roots) != 1 || !roots[0].Equal(next.root()) {
				t.Errorf("trusts %d roots", len(roots))
			}
			r.wantDistrusted(t, svid)
			(&member{}).meet(t, r)
			if p := r.Show().Problem; p != "" {
				t.Error(p)
			}
			if err := r.Distrust(t.Context(), id(stolen.root())); err != nil {
				t.Errorf("twice: %v", err)
			}
			time.Sleep(14 * time.Hour)
			r.stop()
			write(t, u.Bundle, pemOf(organisation{}.above(t, key, nil).root(), again.root(), stolen.root(), next.root()), 0o644)
			r = run(t, c)
			if n := len(r.authorities(t).Bundle.X509Authorities()); n != 1 {
				t.Errorf("trusts %d roots", n)
			}
		}

		stolen.files(t, u) // nothing is signed below it any more
		write(t, u.Bundle, all, 0o644)
		if err := r.Rotate(t.Context(), disk.X509, true); err == nil {
			t.Error("rotated to a root that is distrusted")
		}
		r.wantStates(t, "distrusted distrusted active active-key")

		c.Upstream = nil // with a root of its own, it is not trusted again either
		r.stop()
		r = run(t, c)
		time.Sleep(12 * time.Hour)
		r.wantStates(t, "distrusted distrusted old active active-key")
	})
}

// What cannot be written down is not done: nobody would know it after a restart.
func TestDistrustOnABrokenDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state")
		r := run(t, disk.Config{Dir: dir})
		old := id(r.authorities(t).X509.Root())
		if err := r.Rotate(t.Context(), disk.X509, true); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir, dir+".away"); err != nil {
			t.Fatal(err)
		}
		r.refuses(t, old, "no such file")
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
		if err := r.Distrust(t.Context(), old); err != nil {
			t.Error(err)
		}
		r.wantStates(t, "active active-key")
	})
}
