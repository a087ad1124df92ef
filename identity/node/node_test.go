package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func open(t *testing.T, dir string) *Server {
	t.Helper()
	s, err := Open(Config{TrustDomain: td, Dir: dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTokensAreKeptAsHashes(t *testing.T) {
	dir := t.TempDir()
	tokens := open(t, dir).Tokens()
	token, err := tokens.Create("one", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if len(token) < 128/6 || strings.Contains(fmt.Sprintf("%s %v %+v %#v %q", token, token, token, token, token), string(token)) {
		t.Errorf("a token of %d letters, printed as %s", len(token), token)
	}
	file := filepath.Join(dir, "join-tokens.json")
	data, err := os.ReadFile(file)
	if err != nil || strings.Contains(string(data), string(token)) {
		t.Errorf("kept as %s, %v", data, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(file, data[:len(data)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{TrustDomain: td, Dir: dir}); err == nil || !strings.Contains(err.Error(), "restore it") {
		t.Errorf("a torn file: %v", err)
	}
}

func TestTokensThatAreNotMade(t *testing.T) {
	tokens := open(t, t.TempDir()).Tokens()
	for _, c := range []struct {
		name string
		ttl  time.Duration
	}{
		{"", time.Hour}, {"a/b", time.Hour}, {"/a", time.Hour}, {"..", time.Hour}, {"x509pop/" + strings.Repeat("0", 64), time.Hour},
		{"ü", time.Hour}, {"a b", time.Hour}, {"a", 0}, {"a", -1}, {"a", 31 * 24 * time.Hour},
	} {
		if _, err := tokens.Create(c.name, c.ttl); err == nil {
			t.Errorf("made one for %q, %s", c.name, c.ttl)
		}
	}
	for range maxTokens {
		tokens.tokens = append(tokens.tokens, token{Expires: time.Now().Add(time.Hour)})
	}
	if _, err := tokens.Create("one", time.Hour); err == nil {
		t.Error("made one too many")
	}
	tokens.tokens[7].Expires = time.Now()
	if _, err := tokens.Create("one", time.Hour); err != nil {
		t.Errorf("one has ended: %v", err)
	}
}

// Whatever happens in whatever order, restarts too: a token serves once, before its end, if its agent is not revoked.
func TestTokensProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "tokens")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "t.json")
		tokens, err := openTokens(path, td)
		if err != nil {
			t.Fatal(err)
		}
		type made struct {
			token nodepb.Token
			agent spiffeid.ID
			end   time.Time
			good  bool
		}
		var all []*made
		now := time.Now()
		t.Repeat(map[string]func(*rapid.T){
			"create": func(t *rapid.T) {
				ttl := time.Duration(rapid.IntRange(1, 100).Draw(t, "ttl")) * time.Second
				name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "name")
				token, err := tokens.create(name, ttl, now)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, &made{token, spiffeid.RequireFromPath(td, "/agent/"+name), now.Add(ttl), true})
			},
			"use": func(t *rapid.T) {
				if len(all) == 0 {
					t.Skip()
				}
				m := rapid.SampledFrom(all).Draw(t, "token")
				fails := rapid.Bool().Draw(t, "fails")
				failure := errors.New("not now")
				err := tokens.use(m.token, now, func(id spiffeid.ID) error {
					if id != m.agent || !m.good {
						t.Fatalf("%s was let in as %s", m.agent, id)
					}
					if err := tokens.use(m.token, now, func(spiffeid.ID) error { return nil }); !errors.Is(err, errTokenRefused) {
						t.Fatalf("twice at once: %v", err)
					}
					if fails {
						return failure
					}
					return nil
				})
				want := m.good && now.Before(m.end)
				switch {
				case want && fails && !errors.Is(err, failure), want && !fails && err != nil, !want && !errors.Is(err, errTokenRefused):
					t.Fatalf("good %t, failing %t: %v", want, fails, err)
				}
				m.good = m.good && (!want || fails)
			},
			"drop": func(t *rapid.T) {
				id := spiffeid.RequireFromPath(td, "/agent/"+rapid.SampledFrom([]string{"a", "b"}).Draw(t, "name"))
				if err := tokens.drop(id); err != nil {
					t.Fatal(err)
				}
				for _, m := range all {
					m.good = m.good && m.agent != id
				}
			},
			"wait": func(t *rapid.T) { now = now.Add(time.Duration(rapid.IntRange(1, 50).Draw(t, "s")) * time.Second) },
			"restart": func(t *rapid.T) {
				if tokens, err = openTokens(path, td); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
}

func TestOneOfManyWins(t *testing.T) {
	tokens := open(t, t.TempDir()).Tokens()
	token, err := tokens.Create("one", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	var won atomic.Int32
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			if tokens.use(token, time.Now(), func(spiffeid.ID) error { return nil }) == nil {
				won.Add(1)
			}
		})
	}
	group.Wait()
	if won.Load() != 1 {
		t.Errorf("%d won", won.Load())
	}
}

func svid(serial int64, end time.Time) signed {
	c := &x509.Certificate{Raw: fmt.Append(nil, serial), SerialNumber: big.NewInt(serial), NotAfter: end}
	return signed{chain: []*x509.Certificate{c}}
}

// unwritable makes a folder into which nothing can be written any more, also by root.
func unwritable(t *testing.T, dir string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
}

// What cannot be kept is not granted, and what is taken away is gone all the same.
func TestDiskFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	id := spiffeid.RequireFromPath(td, "/agent/one")
	token, err := s.Tokens().Create("one", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.agents.admit(id, byJoinToken, svid(1, time.Now().Add(time.Hour)), time.Now()); err != nil {
		t.Fatal(err)
	}
	unwritable(t, dir)
	if err := s.agents.admit(id, byJoinToken, svid(2, time.Now().Add(time.Hour)), time.Now()); status.Code(err) != codes.Unavailable {
		t.Errorf("admitted: %v", err)
	}
	if err := s.agents.authorize(id, svid(2, time.Time{}).chain[0], time.Now()); err == nil {
		t.Error("what was not kept is good")
	}
	if err := s.agents.authorize(id, svid(1, time.Time{}).chain[0], time.Now()); err != nil {
		t.Error(err)
	}
	if err := s.agents.renew(id, svid(3, time.Now())); status.Code(err) != codes.Unavailable {
		t.Errorf("renewed: %v", err)
	}
	admit := func(spiffeid.ID) error { return nil }
	if err := s.Tokens().use(token, time.Now(), admit); err == nil {
		t.Error("a token was used that may serve again")
	}
	if err := s.Tokens().use(token, time.Now(), admit); !errors.Is(err, errTokenRefused) {
		t.Errorf("the token serves again: %v", err)
	}
	if _, err := s.Tokens().Create("two", time.Hour); err == nil {
		t.Error("made a token that is not kept")
	}
	if err := s.Revoke(id); err == nil {
		t.Error("nobody is told that a restart will revive it")
	}
	if err := s.agents.authorize(id, svid(1, time.Time{}).chain[0], time.Now()); nodepb.Reason(err) != nodepb.AgentRevoked {
		t.Errorf("revoked: %v", err)
	}
}

// Whoever has the CA's key knows how to give a certificate any serial number. What an earlier version kept is one, and good
// until the agent uses its next SVID.
func TestForgedSerial(t *testing.T) {
	s := open(t, t.TempDir())
	id, now := spiffeid.RequireFromPath(td, "/agent/one"), time.Now()
	forged := svid(1, now.Add(time.Hour)).chain[0]
	forged.Raw = []byte("another key")
	if err := s.agents.admit(id, byJoinToken, svid(1, now.Add(time.Hour)), now); err != nil {
		t.Fatal(err)
	}
	if err := s.agents.authorize(id, forged, now); nodepb.Reason(err) != nodepb.MustReattest {
		t.Errorf("forged: %v", err)
	}
	one := s.agents.byID[id]
	one.SVID = "1"
	s.agents.byID[id] = one
	if err := s.agents.authorize(id, svid(1, now).chain[0], now); err != nil {
		t.Error(err)
	}
	if err := s.agents.renew(id, svid(2, now.Add(time.Hour))); err != nil {
		t.Fatal(err)
	}
	if err := s.agents.authorize(id, svid(2, now).chain[0], now); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]*x509.Certificate{"the one before": svid(1, now).chain[0], "forged": forged} {
		if err := s.agents.authorize(id, c, now); nodepb.Reason(err) != nodepb.MustReattest {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTooManyAgents(t *testing.T) {
	s := open(t, t.TempDir())
	now := time.Now()
	for i := range maxAgents {
		id := spiffeid.RequireFromPath(td, fmt.Sprint("/agent/", i))
		one := agent{ID: id, Expires: now.Add(time.Hour)}
		switch i {
		case 7:
			one.Expires, one.Revoked = now.Add(-time.Hour), now
		case 8:
			one.Expires = now.Add(-time.Hour)
		}
		s.agents.byID[id] = one
	}
	admit := func(name string) error {
		return s.agents.admit(spiffeid.RequireFromPath(td, "/agent/"+name), byJoinToken, svid(1, now.Add(time.Hour)), now)
	}
	if err := admit("x"); err != nil { // in the place of 8
		t.Error(err)
	}
	if err := admit("y"); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	if err := admit("9"); err != nil {
		t.Errorf("one that is known: %v", err)
	}
	if err := admit("7"); nodepb.Reason(err) != nodepb.AgentRevoked {
		t.Errorf("one that is revoked: %v", err)
	}
}

func TestLimiter(t *testing.T) {
	var l limiter
	now := time.Now()
	from := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	count := func(p netip.Prefix, n int) (allowed int) {
		for range n {
			if l.allow(p, now) {
				allowed++
			}
		}
		return allowed
	}
	if n := count(from(0), 100); n != attemptBurst {
		t.Errorf("a burst of %d", n)
	}
	if n := count(from(1), 1); n != 1 {
		t.Error("one is limited by what another did")
	}
	now = now.Add(-time.Hour) // the clock was set
	if n := count(from(0), 10); n != 0 {
		t.Errorf("%d after the clock was set back", n)
	}
	now = now.Add(3 * time.Second)
	if n := count(from(0), 100); n != 3*attemptRate {
		t.Errorf("%d after three seconds", n)
	}
	for i := range 2 * maxAddresses {
		l.allow(from(i), now)
	}
	if n := len(l.buckets); n > maxAddresses+1 {
		t.Errorf("%d addresses are remembered", n)
	}
	if n := count(from(3*maxAddresses), 100); n != 0 {
		t.Errorf("%d of one who shares the limit of all others", n)
	}
	now = now.Add(time.Minute)
	if n := count(from(3*maxAddresses), 100); n != attemptBurst {
		t.Errorf("%d when there is room again", n)
	}
}

func TestLimitListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newLimitListener(inner, 1)
	defer l.Close()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := dial()
	defer first.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	next := make(chan net.Conn)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		next <- c
	}()
	second := dial()
	if _, err := second.Read(make([]byte, 1)); err == nil {
		t.Error("one too many is served")
	}
	accepted.Close()
	accepted.Close() // counts once
	third := dial()
	defer third.Close()
	c := <-next
	defer c.Close()
	if c.RemoteAddr().String() != third.LocalAddr().String() {
		t.Error("another one was accepted")
	}
}

// The library writes the keys of a bundle in any order: what is equal must have one digest.
func TestDigestOfBundle(t *testing.T) {
	b := spiffebundle.New(td)
	for i := range 8 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.AddJWTAuthority(fmt.Sprint(i), key.Public()); err != nil {
			t.Fatal(err)
		}
	}
	digests := map[string]bool{}
	for range 20 {
		m, err := marshalBundle(b)
		if err != nil {
			t.Fatal(err)
		}
		digests[string(m.digest)] = true
	}
	b.SetSequenceNumber(7)
	m, err := marshalBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(digests) != 1 || digests[string(m.digest)] {
		t.Errorf("%d digests of one bundle", len(digests))
	}
}

// An agent gets the bundles of those whom its workloads federate with.
func TestBundlesOfAnAgent(t *testing.T) {
	all := bundles{federated: map[spiffeid.TrustDomain]bundle{}}
	for _, name := range []string{"a.org", "b.org", "c.org"} {
		all.federated[spiffeid.RequireTrustDomainFromString(name)] = bundle{document: []byte(name)}
	}
	of := func(entries ...issuer.Entry) string {
		a := newAssigned()
		for _, e := range entries {
			a.add(e)
		}
		var names []string
		for _, name := range []string{"a.org", "b.org", "c.org"} {
			if all.of(a).Federated[name] != nil {
				names = append(names, name)
			}
		}
		return strings.Join(names, " ")
	}
	with := func(names ...string) issuer.Entry {
		var e issuer.Entry
		for _, name := range names {
			e.FederatesWith = append(e.FederatesWith, spiffeid.RequireTrustDomainFromString(name))
		}
		return e
	}
	for got, want := range map[string]string{
		of(): "", of(with("a.org")): "a.org", of(with("c.org"), with("a.org", "d.org")): "a.org c.org",
		of(with("a.org"), issuer.Entry{FederatesAll: true}): "a.org b.org c.org",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// silence is a client that says nothing.
type silence struct {
	attestStream
	ctx context.Context
}

func (s silence) Context() context.Context { return s.ctx }

func (s silence) Recv() (*nodepb.AttestAgentRequest, error) {
	<-s.ctx.Done()
	return nil, s.ctx.Err()
}

func TestSilentClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, t.TempDir())
		s.SetBundles(issuer.Bundles{Own: spiffebundle.New(td)})
		begun := time.Now()
		if err := s.AttestAgent(silence{ctx: t.Context()}); status.Code(err) != codes.DeadlineExceeded || time.Since(begun) > attestTime {
			t.Errorf("%v after %s", err, time.Since(begun))
		}
	})
}
