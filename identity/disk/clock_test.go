package disk

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/identity"
)

// TestAnyClock keeps a folder with a clock that does as it likes, as no clock does that tests can have otherwise. What
// signs is trusted and accepted, what is valid is trusted, and the file says what is in force.
func TestAnyClock(t *testing.T) {
	dir := t.TempDir()
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, n := spiffeid.RequireFromString("spiffe://example.org/app"), 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		const life = 1000 * time.Hour
		c := Config{Dir: filepath.Join(dir, time.Duration(n).String()), TrustDomain: id.TrustDomain(), RootTTL: life, JWTKeyTTL: life / 3, Overlap: 10 * time.Hour}.withDefaults()
		k := &Keeper{config: c, folder: folder{dir: c.Dir}}
		if err := k.folder.open(); err != nil {
			t.Fatal(err)
		}
		now := time.Date(2026, 3, 1, 12, 0, 0, 500e6, time.UTC)
		if err := k.open(t.Context(), now); err != nil {
			t.Fatal(err)
		}
		type signed struct {
			by    string // the ID of a root or of a key
			chain []*x509.Certificate
			token string
			from  time.Time
			until time.Time
		}
		var all []signed
		gone := map[string]bool{} // for ever, whoever was distrusted
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			switch rapid.IntRange(0, 7).Draw(t, "what happens") {
			case 0:
				now = now.Add(-time.Duration(rapid.Int64Range(0, int64(2*life)).Draw(t, "clock goes back")))
			case 1:
				now = now.Add(time.Duration(rapid.Int64Range(0, int64(2*life)).Draw(t, "sleeps")))
			case 2:
				asked := &request{what: rapid.SampledFrom([]What{X509, JWT, All}).Draw(t, "what"), now: rapid.Bool().Draw(t, "now")}
				_ = k.look(t.Context(), now, asked) // which a clock that is behind, or too many of them, make fail
			case 3:
				k = &Keeper{config: c, folder: folder{dir: c.Dir}} // it is started again
				s, err := k.folder.load(c.TrustDomain, now)
				if err != nil {
					t.Fatal(err)
				}
				k.state, k.exists = s, true
			case 4:
				d := describe(k.state, now)
				one := rapid.SampledFrom(slices.Concat(d.Roots, d.JWT, []Slot{*d.Intermediate})).Draw(t, "distrusted")
				if err := k.distrust(t.Context(), one.ID, now); err == nil { // else it signs
					gone[one.ID] = true
					all = slices.DeleteFunc(all, func(s signed) bool { return gone[s.by] })
				}
			default:
				now = now.Add(time.Duration(rapid.Int64Range(0, int64(life/8)).Draw(t, "time goes by")))
			}
			if err := k.look(t.Context(), now, nil); err != nil {
				t.Fatalf("%s: %v", now, err)
			}
			shown := k.shown.Load()
			if shown == nil {
				t.Fatalf("%s: nothing is in force", now)
			}
			a := shown.authorities
			if len(a.Bundle.X509Authorities()) == 0 {
				t.Fatalf("%s: nobody is trusted", now)
			}
			if stored, err := k.folder.load(c.TrustDomain, now); err != nil || !stored.bundle().Equal(a.Bundle) {
				t.Fatalf("%s: the file says something else: %v", now, err)
			}
			for _, c := range a.Bundle.X509Authorities() {
				if gone[fingerprint(c.Raw)] {
					t.Fatalf("%s: a root is trusted again", now)
				}
			}
			for id := range a.Bundle.JWTAuthorities() {
				if gone[id] {
					t.Fatalf("%s: a key is trusted again", now)
				}
			}
			all = slices.DeleteFunc(all, func(s signed) bool { return now.After(s.until) })
			s := signed{by: fingerprint(a.X509.Root().Raw), from: now, until: now.Add(time.Hour)}
			if template, err := a.X509.SVIDTemplate(identity.Request{ID: id, TTL: time.Hour}, now, rand.Reader); err == nil {
				if s.chain, err = a.X509.Sign(template, leaf.Public(), now); err != nil {
					t.Fatal(err)
				}
			} else if slices.ContainsFunc(k.state.roots, func(r root) bool { return r.Valid(now.Add(time.Minute)) && r.Valid(now) }) {
				t.Fatalf("%s: nothing can be signed although there is a root: %v", now, err)
			}
			token := signed{from: now, until: now.Add(time.Hour)}
			if a.JWT != nil {
				token.by = a.JWT.KeyID()
				if token.token, err = a.JWT.Sign(identity.JWTRequest{ID: id, Audience: []string{"db"}, TTL: time.Hour}, now); err != nil && a.JWT.NotAfter().Sub(now) > time.Minute {
					t.Fatalf("%s: %v", now, err)
				}
			}
			all = append(all, s, token)
			for _, s := range all {
				if now.Before(s.from) {
					continue
				}
				if s.chain != nil && !now.After(s.chain[0].NotAfter) {
					if _, err := identity.Verify(s.chain, a.Bundle, now); err != nil {
						t.Fatalf("%s: signed at %s: %v", now, s.from, err)
					}
				}
				if s.token != "" && now.Before(s.until) {
					if _, _, err := identity.ValidateJWT(s.token, a.Bundle, []string{"db"}, now); err != nil {
						t.Fatalf("%s: signed at %s: %v", now, s.from, err)
					}
				}
			}
		}
	})
}

// TestClockOfAYear has a clock that is a year ahead for days, long enough for all that is due then, and one that is a
// year behind. What could be signed at the right time can be signed when it is back, or an operator can make it so.
func TestClockOfAYear(t *testing.T) {
	const day = 24 * time.Hour
	td, start := spiffeid.RequireTrustDomainFromString("example.org"), time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	c := Config{Dir: filepath.Join(t.TempDir(), "state"), TrustDomain: td}.withDefaults()
	k := &Keeper{config: c, folder: folder{dir: c.Dir}}
	if err := k.folder.open(); err != nil {
		t.Fatal(err)
	}
	if err := k.open(t.Context(), start); err != nil {
		t.Fatal(err)
	}
	first := k.Authorities()
	look := func(now time.Time) {
		t.Helper()
		if err := k.look(t.Context(), now, nil); err != nil {
			t.Fatalf("%s: %v", now, err)
		}
	}
	signs := func(now time.Time, want bool) {
		t.Helper()
		a := k.Authorities()
		if _, err := a.X509.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromPath(td, "/app"), TTL: time.Hour}, now, rand.Reader); (err == nil) != want {
			t.Errorf("%s: X.509: %v", now, err)
		}
		if problem := k.Show().Problem; (problem == "") != want {
			t.Errorf("%s: problem %q", now, problem)
		}
		if (a.JWT != nil) != want {
			t.Errorf("%s: JWT: %v", now, a.JWT)
		}
	}
	signs(start, true)

	behind := start.Add(-365 * day)
	look(behind)
	signs(behind, false)
	if a := k.Authorities(); !a.Bundle.Equal(first.Bundle) {
		t.Error("another bundle, by a clock that is behind")
	}
	if err := (&Keeper{config: c, folder: folder{dir: c.Dir}}).open(t.Context(), behind); err == nil {
		t.Error("started with a clock that is behind")
	}
	look(start.Add(time.Hour))
	signs(start.Add(time.Hour), true)

	ahead := start.Add(365 * day)
	for h := range 72 {
		look(ahead.Add(time.Duration(h) * time.Hour))
		signs(ahead.Add(time.Duration(h)*time.Hour), true)
	}
	now := start.Add(4 * day)
	look(now)
	if a := k.Authorities(); a.X509.Root() != first.X509.Root() || a.X509.Check(now) != nil {
		t.Error("X.509-SVIDs are not signed as before")
	}
	if problem := k.Show().Problem; !strings.Contains(problem, "rotate jwt with --now") {
		t.Errorf("nobody is told what to do: %q", problem)
	}
	if err := k.look(t.Context(), now, &request{what: JWT}); err == nil {
		t.Error("rotated by a clock that may be behind")
	}
	if err := k.look(t.Context(), now, &request{what: JWT, now: true}); err != nil {
		t.Fatal(err)
	}
	for ; now.Before(ahead.Add(60 * day)); now = now.Add(day) {
		look(now)
		signs(now, true)
	}
}
