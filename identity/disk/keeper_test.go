package disk_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
)

// running is a keeper that runs, and what it has published last.
type running struct {
	*disk.Keeper
	published atomic.Pointer[[]published] // the last comes last
	stop      func()
}

type published struct {
	at time.Time
	identity.Authorities
}

// run opens a keeper and runs it until stop.
func run(t *testing.T, c disk.Config) *running {
	t.Helper()
	r := &running{}
	r.published.Store(&[]published{})
	c.Publish = func(a identity.Authorities) {
		all := slices.Concat(*r.published.Load(), []published{{time.Now(), a}})
		r.published.Store(&all)
	}
	r.Keeper = open(t, c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stopped := false
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.Close()
	}
	t.Cleanup(r.stop)
	synctest.Wait()
	return r
}

// authorities are those published, which must be those that are told.
func (r *running) authorities(t testing.TB) identity.Authorities {
	t.Helper()
	synctest.Wait()
	all := *r.published.Load()
	if len(all) == 0 {
		t.Fatal("nothing was published")
	}
	a := all[len(all)-1]
	if a.X509 != r.Authorities().X509 || a.JWT != r.Authorities().JWT || a.Bundle != r.Authorities().Bundle {
		t.Fatal("what is in force is not what was published")
	}
	return a.Authorities
}

// bundles are the newest, and that which somebody has who learns of it late.
func (r *running) bundles(t testing.TB, late time.Duration) map[string]*spiffebundle.Bundle {
	t.Helper()
	b := map[string]*spiffebundle.Bundle{"newest": r.authorities(t).Bundle}
	for _, p := range *r.published.Load() {
		if b["late"] == nil || !time.Now().Before(p.at.Add(late)) {
			b["late"] = p.Bundle
		}
	}
	return b
}

// member is a workload far away: it has SVIDs for as long as they are valid, and is late to learn of bundles.
type member struct {
	late   time.Duration
	svids  [][]*x509.Certificate
	tokens []token
}

type token struct {
	text  string
	until time.Time
}

// meet gets new SVIDs, and has them verified by one who is late; and all that it holds, by one who has the newest bundle.
func (m *member) meet(t testing.TB, r *running) {
	t.Helper()
	now, a := time.Now(), r.authorities(t)
	fresh := issue(t, a.X509)
	text, err := a.JWT.Sign(identity.JWTRequest{ID: spiffeid.RequireFromString("spiffe://example.org/app"), Audience: []string{"db"}, TTL: time.Hour}, now)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range r.bundles(t, m.late) {
		if _, err := identity.Verify(fresh, b, now); err != nil {
			t.Fatalf("%s, %s: %v", now, name, err)
		}
		if _, _, err := identity.ValidateJWT(text, b, []string{"db"}, now); err != nil {
			t.Fatalf("%s, %s: %v", now, name, err)
		}
	}
	m.svids = append(m.svids, fresh)
	for len(m.svids) > 0 && now.After(m.svids[0][0].NotAfter) {
		m.svids = m.svids[1:]
	}
	for _, s := range m.svids {
		if _, err := identity.Verify(s, a.Bundle, now); err != nil {
			t.Fatalf("%s: an SVID that is valid until %s: %v", now, s[0].NotAfter, err)
		}
	}
	m.tokens = append(m.tokens, token{text, now.Add(time.Hour)})
	for len(m.tokens) > 0 && !now.Before(m.tokens[0].until) {
		m.tokens = m.tokens[1:]
	}
	for _, o := range m.tokens {
		if _, _, err := identity.ValidateJWT(o.text, a.Bundle, []string{"db"}, now); err != nil {
			t.Fatalf("%s: a token that is valid until %s: %v", now, o.until, err)
		}
	}
}

// Over many lives of roots and keys, and restarts between, whoever learns of the bundle an overlap late meets nothing
// that he does not know, and what is valid stays verifiable.
func TestLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), RootTTL: 60 * day, JWTKeyTTL: 10 * day, Overlap: day}
		r := run(t, c)
		m := &member{late: c.Overlap}
		roots, keys, before := map[string]bool{}, map[string]bool{}, uint64(0)
		bundle := spiffebundle.New(td)
		for hour := range 24 * 250 {
			if hour%(24*31) == 24*30 {
				r.stop()
				r = run(t, c)
			}
			if hour%5 == 0 {
				a := r.authorities(t)
				m.meet(t, r)
				roots[a.X509.Root().SerialNumber.String()], keys[a.JWT.KeyID()] = true, true
				seq, _ := a.Bundle.SequenceNumber()
				if len(a.Bundle.X509Authorities()) > 3 || len(a.Bundle.JWTAuthorities()) > 3 {
					t.Fatalf("%s: %d roots, %d keys", time.Now(), len(a.Bundle.X509Authorities()), len(a.Bundle.JWTAuthorities()))
				}
				bare := a.Bundle.Clone()
				bare.ClearSequenceNumber()
				if changed := !bare.Equal(bundle); changed != (seq > before) || seq < before {
					t.Fatalf("%s: sequence number %d after %d, changed: %t", time.Now(), seq, before, changed)
				}
				before, bundle = seq, bare
			}
			time.Sleep(time.Hour)
		}
		if len(roots) != 8 || len(keys) < 30 {
			t.Errorf("%d roots and %d keys in 250 days", len(roots), len(keys))
		}
	})
}

// states are the states of roots and keys, in order.
func states(d disk.Description) (s string) {
	for _, r := range d.Roots {
		s += fmt.Sprintf("%s ", r.State)
	}
	for _, k := range d.JWT {
		s += fmt.Sprintf("%s-key ", k.State)
	}
	return strings.TrimSpace(s)
}

func (r *running) wantStates(t testing.TB, want string) {
	t.Helper()
	synctest.Wait()
	if got := states(r.Show()); got != want {
		t.Fatalf("%s: got %s, want %s: %+v", time.Now(), got, want, r.Show())
	}
}

func TestRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), Overlap: time.Hour}
		r := run(t, c)
		m := &member{late: c.Overlap}
		m.meet(t, r)
		time.Sleep(2 * time.Hour)
		m.meet(t, r)
		rotate := func(what disk.What, now bool) {
			t.Helper()
			if err := r.Rotate(t.Context(), what, now); err != nil {
				t.Fatal(err)
			}
		}
		rotate(disk.X509, false)
		r.wantStates(t, "active prepared active-key")
		rotate(disk.X509, false) // once is enough
		r.wantStates(t, "active prepared active-key")
		m.meet(t, r)
		time.Sleep(30 * time.Minute)
		r.stop()
		r = run(t, c)
		time.Sleep(29 * time.Minute)
		r.wantStates(t, "active prepared active-key")
		time.Sleep(time.Minute)
		r.wantStates(t, "old active active-key")
		m.meet(t, r)
		time.Sleep(6 * day)
		r.wantStates(t, "old active active-key")
		time.Sleep(day)
		r.wantStates(t, "active active-key")

		rotate(disk.JWT, false)
		r.wantStates(t, "active active-key prepared-key")
		time.Sleep(time.Hour)
		r.wantStates(t, "active old-key active-key")
		m.meet(t, r)
		time.Sleep(2 * time.Hour)
		r.wantStates(t, "active active-key")

		m = &member{} // who knows at once
		rotate(disk.All, true)
		r.wantStates(t, "old active old-key active-key")
		m.meet(t, r)
		rotate(disk.All, false)
		rotate(disk.All, true) // what is prepared takes over
		r.wantStates(t, "old old active old-key old-key active-key")
		time.Sleep(3 * time.Hour)
		m.meet(t, r)

		var err error
		for n := 0; err == nil; n++ {
			if err = r.Rotate(t.Context(), disk.X509, true); n > 100 {
				t.Fatal("there is no end to it")
			}
		}
		if n := len(r.Show().Roots); n > 16 || !strings.Contains(err.Error(), "already") {
			t.Errorf("%d roots, %v", n, err)
		}
		if p := r.Show().Problem; p != "" {
			t.Errorf("what was refused is shown as a problem: %s", p)
		}
		m.meet(t, r)
		if err := r.Rotate(t.Context(), "everything", true); err == nil {
			t.Error("rotated something that is not there")
		}
	})
}

// An overlap shorter than what is signed lives: whoever was replaced is trusted for as long as it takes.
func TestRotateSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t, disk.Config{Dir: filepath.Join(t.TempDir(), "state"), Overlap: time.Minute})
		m := &member{late: time.Minute}
		for range 6 {
			m.meet(t, r)
			if err := r.Rotate(t.Context(), disk.All, false); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				time.Sleep(time.Minute)
				m.meet(t, r)
			}
			if n := len(r.authorities(t).Bundle.JWTAuthorities()); n > 6 {
				t.Fatalf("%d keys", n)
			}
		}
	})
}

// What the former kind of authority has signed may live for a month.
func TestTakenOverIsTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, a := former(t, time.Now())
		now := time.Now()
		template, err := a.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromString("spiffe://example.org/app"), TTL: 30 * day}, now, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		svid, err := a.Sign(template, newKey(t).Public(), now)
		if err != nil {
			t.Fatal(err)
		}
		r := run(t, disk.Config{Dir: dir})
		if err := r.Rotate(t.Context(), disk.X509, true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(29 * day)
		if _, err := identity.Verify(svid, r.authorities(t).Bundle, time.Now()); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * day)
		if n := len(r.authorities(t).Bundle.X509Authorities()); n != 1 {
			t.Errorf("trusts %d roots", n)
		}
	})
}

// Who sleeps through everything acts when he wakes up, and says so.
func TestSleptThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &lockedLog{}
		c := disk.Config{Dir: filepath.Join(t.TempDir(), "state"), RootTTL: 30 * day, Log: slog.New(slog.NewTextHandler(log, nil))}
		r := run(t, c)
		first := r.authorities(t)
		r.stop()
		time.Sleep(31 * day)
		r = run(t, c)
		a := r.authorities(t)
		(&member{}).meet(t, r)
		if a.X509.Root().Equal(first.X509.Root()) || a.JWT.KeyID() == first.JWT.KeyID() {
			t.Error("what has ended signs")
		}
		if !strings.Contains(log.String(), "signs before everybody can know it") {
			t.Errorf("the log says nothing of it: %s", log)
		}
		if strings.Contains(log.String(), "PRIVATE") {
			t.Error("the log tells keys")
		}
		time.Sleep(2 * day)
		r.wantStates(t, "active active-key")
	})
}

// What cannot be written down is not in force; when it can be, it is.
func TestDiskFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state")
		c := disk.Config{Dir: dir, Overlap: time.Hour, IntermediateTTL: day}
		r := run(t, c)
		before := r.authorities(t)
		if err := os.Rename(dir, dir+".away"); err != nil {
			t.Fatal(err)
		}
		if err := r.Rotate(t.Context(), disk.All, true); err == nil {
			t.Error("rotated without a folder")
		}
		if a := r.authorities(t); a.X509 != before.X509 || a.JWT != before.JWT || !a.Bundle.Equal(before.Bundle) {
			t.Error("something is in force that is not on the disk")
		}
		time.Sleep(20 * time.Hour) // the intermediate is due
		if a := r.authorities(t); a.X509 != before.X509 || r.Show().Problem == "" {
			t.Errorf("something is in force that is not on the disk, or nobody says so: %+v", r.Show())
		}
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if a := r.authorities(t); a.X509 == before.X509 || r.Show().Problem != "" {
			t.Errorf("not healed: %+v", r.Show())
		}
		(&member{}).meet(t, r)
	})
}

func TestPublishesOnlyWhatIsNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t, disk.Config{Dir: filepath.Join(t.TempDir(), "state")})
		time.Sleep(day)
		if n := len(*r.published.Load()); n != 1 {
			t.Errorf("published %d times", n)
		}
	})
}

func TestConfig(t *testing.T) {
	for name, c := range map[string]disk.Config{
		"no overlap":                {Overlap: time.Millisecond},
		"overlap too long":          {Overlap: 6 * day},
		"intermediate too long":     {RootTTL: day, IntermediateTTL: 7 * time.Hour},
		"intermediate too short":    {IntermediateTTL: time.Second},
		"root too short":            {RootTTL: time.Second},
		"a life before its own end": {SVIDTTL: -time.Hour},
	} {
		c.TrustDomain, c.Dir = td, filepath.Join(t.TempDir(), "state")
		if _, err := disk.OpenKeeper(t.Context(), c); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := os.Stat(c.Dir); err == nil {
			t.Errorf("%s: made a folder", name)
		}
	}
	if _, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: t.TempDir()}); err == nil {
		t.Error("no trust domain: accepted")
	}
}

func TestActions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t, disk.Config{Dir: filepath.Join(t.TempDir(), "state")})
		actions := r.Actions()
		ask := func(pattern, query string, into any) error {
			t.Helper()
			q, err := url.ParseQuery(query)
			if err != nil {
				t.Fatal(err)
			}
			v, err := actions[pattern](q)
			if err != nil {
				return err
			}
			text, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(text, []byte("PRIVATE")) {
				t.Errorf("%s tells keys", pattern)
			}
			return json.Unmarshal(text, into)
		}
		var d disk.Description
		if err := ask("GET /ca", "", &d); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r.Show(), d); diff != "" {
			t.Error(diff)
		}
		var bundle json.RawMessage
		if err := ask("GET /ca/bundle", "format=spiffe", &bundle); err != nil {
			t.Fatal(err)
		}
		if b, err := spiffebundle.Parse(td, bundle); err != nil || !b.Equal(r.Authorities().Bundle) {
			t.Errorf("SPIFFE bundle: %v, %v", b, err)
		}
		var text string
		if err := ask("GET /ca/bundle", "format=pem", &text); err != nil || text != string(pemOf(r.Authorities().X509.Root())) {
			t.Errorf("PEM: %s, %v", text, err)
		}
		for pattern, query := range map[string]string{"GET /ca/bundle": "format=xml", "POST /ca/rotate": "what=everything"} {
			if err := ask(pattern, query, &d); err == nil {
				t.Errorf("%s: %s is done", pattern, query)
			}
		}
		if err := ask("POST /ca/rotate", "what=jwt", &d); err != nil || states(d) != "active active-key prepared-key" {
			t.Errorf("%s, %v", states(d), err)
		}
		if err := ask("POST /ca/rotate", "what=x509&now=true", &d); err != nil || states(d) != "old active active-key prepared-key" {
			t.Errorf("%s, %v", states(d), err)
		}
	})
}

// lockedLog is read while a keeper writes to it.
type lockedLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
