package agent_test

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node"
	"sallyport.dev/identity/node/nodepb"
)

func rootOf(a *identity.Authority) string {
	digest := sha256.Sum256(a.Root().Raw)
	return hex.EncodeToString(digest[:])
}

// below reports whether an SVID stands below an authority.
func below(svid *x509svid.SVID, a *identity.Authority) bool {
	_, err := identity.Verify(svid.Certificates, a.Bundle(), time.Now())
	return err == nil
}

// renews keeps a wallet up to date, as a stream does, for a while, and returns how often it changed.
func (m *machine) renews(w *issuer.Wallet, d time.Duration) (changes int) {
	m.t.Helper()
	for end := time.After(d); ; {
		view, err := m.Entitled(m.t.Context())
		if err != nil {
			m.t.Fatal(err)
		}
		changed, err := w.Renew(m.t.Context(), m.Issuer, view.Entries, view.Bundles.Own)
		if err != nil {
			m.t.Fatal(err)
		}
		if changed {
			changes++
		}
		select {
		case <-view.Changed:
		case <-w.Due():
		case <-end:
			return changes
		}
	}
}

// In the order that is documented nothing is lost: who is connected has another SVID before the first authority leaves the
// bundle, is not attested again, and its workloads have theirs at once.
func TestDistrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, true, nil)
		p.Set([]node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one")}, nil)
		m := p.machine(withToken(p.token("one")))
		m.wait("entries")
		var w issuer.Wallet
		if n := m.renews(&w, time.Second); n != 1 {
			t.Fatalf("%d SVIDs at first", n)
		}
		if list := p.Agents(); list[0].Root != rootOf(p.authority) {
			t.Errorf("listed %+v", list)
		}
		first := m.self()

		second := identitytest.Authority(t)
		p.signs(second, p.authority, second)
		if n := m.renews(&w, 5*time.Second); n != 0 {
			t.Errorf("%d new SVIDs although the old one is trusted", n)
		}
		renewed := m.self()
		if !below(renewed, second) || renewed.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 {
			t.Error("the agent has not renewed its own")
		}
		if list := p.Agents(); list[0].Root != rootOf(second) {
			t.Errorf("listed %+v", list)
		}

		p.signs(second, second)
		if n := m.renews(&w, 20*time.Second); n != 1 || !below(w.SVIDs()[0], second) {
			t.Errorf("%d new SVIDs of a workload whose authority is distrusted", n)
		}
		if s := m.Status(); !s.Connected || s.Problem != "" {
			t.Errorf("got on as %+v", s)
		}
		if got := m.self(); got.Certificates[0].SerialNumber.Cmp(renewed.Certificates[0].SerialNumber) != 0 {
			t.Error("the agent has renewed once more")
		}
		m.end()
		p.away()
	})
}

// Who could not renew before learns whom to trust, and needs another proof: below what is distrusted, an SVID is none.
func TestDistrustAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		machines := newCA(t)
		p := startPlane(t, true, func(c *node.Config) { c.X509POP = []*x509.Certificate{machines.cert} })
		byCert := p.machine(withX509POP(machines.issue(ecKey(t), nil)))
		byCert.wait("entries")
		p.Set([]node.Assignment{
			assign(identitytest.Entry("web", identitytest.Me()), "one", strings.TrimPrefix(byCert.Status().ID.Path(), "/agent/")),
		}, nil)
		byToken := p.machine(withToken(p.token("one")))
		byToken.wait("entries")
		settle(time.Second)
		var atCert, atToken issuer.Wallet
		byCert.renews(&atCert, 0)
		byToken.renews(&atToken, 0)
		stolen := byToken.self()

		second := identitytest.Authority(t)
		p.signs(second, p.authority, second)
		synctest.Wait() // they are told, and renew a second later at the earliest
		p.signs(second, second)
		synctest.Wait()
		for name, m := range map[string]*machine{"by certificate": byCert, "by token": byToken} {
			if _, view, _ := m.svids(); !view.Bundles.Own.HasX509Authority(second.Root()) || view.Bundles.Own.HasX509Authority(p.authority.Root()) {
				t.Errorf("%s: still trusts what is distrusted", name)
			}
		}
		if n := byCert.renews(&atCert, 20*time.Second); n != 1 || !below(atCert.SVIDs()[0], second) || !byCert.Status().Connected {
			t.Errorf("by certificate: %d SVIDs, %+v", n, byCert.Status())
		}
		if n := byToken.renews(&atToken, 20*time.Second); n != 0 {
			t.Errorf("by token: %d SVIDs", n)
		}
		if s := byToken.Status(); s.Connected || !strings.Contains(s.Problem, "new join token") {
			t.Errorf("by token: %+v", s)
		}

		// It goes on learning, although it is nobody.
		third := identitytest.Authority(t)
		p.signs(third, second, third)
		settle(40 * time.Second)
		if _, view, _ := byToken.svids(); !view.Bundles.Own.HasX509Authority(third.Root()) {
			t.Error("by token: is told nothing more")
		}
		byToken.end()
		byToken.run()
		settle(time.Minute)
		if s := byToken.Status(); s.Connected || below(byToken.self(), third) {
			t.Errorf("by token, once more: %+v", s)
		}
		byToken.end()
		byToken.config.JoinToken = p.token("one")
		byToken.run()
		settle(5 * time.Second)
		if s := byToken.Status(); !s.Connected || !below(byToken.self(), third) {
			t.Errorf("with a new token: %+v", s)
		}
		if w, _, err := byToken.svids(); err != nil || !below(w.SVIDs()[0], third) {
			t.Errorf("its workload: %v", err)
		}

		stream, err := p.raw(stolen).Watch(t.Context(), &nodepb.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.Unauthenticated || nodepb.Trusted(err) == nil {
			t.Errorf("an SVID of before: %v", err)
		}
		byCert.end()
		byToken.end()
		p.away()
	})
}

// Who has the key of a CA makes SVIDs of agents, with whatever they say. They prove nothing, be the CA trusted or not.
func TestForgedAgent(t *testing.T) {
	p := startPlane(t, false, nil)
	p.Set([]node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one")}, nil)
	m := p.machine(withToken(p.token("one")))
	m.wait("entries")
	key := ecKey(t)
	template, err := p.authority.SVIDTemplate(identity.Request{ID: spiffeid.RequireFromPath(td, "/agent/one"), TTL: time.Hour}, time.Now(), zeros{})
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = m.self().Certificates[0].SerialNumber
	chain, err := p.authority.Sign(template, key.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := p.raw(&x509svid.SVID{Certificates: chain, PrivateKey: key})
	calls := func() map[string]error {
		stream, err := c.Watch(t.Context(), &nodepb.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		resp, watch := stream.Recv()
		if resp != nil {
			t.Errorf("was told %v", resp)
		}
		_, renew := c.RenewAgent(t.Context(), &nodepb.RenewAgentRequest{Csr: csr(t, &x509.CertificateRequest{})})
		_, certify := c.CertifyX509(t.Context(), &nodepb.CertifyX509Request{EntryId: "x"})
		_, certifyJWT := c.CertifyJWT(t.Context(), &nodepb.CertifyJWTRequest{EntryId: "x", Audience: []string{"a"}})
		return map[string]error{"Watch": watch, "RenewAgent": renew, "CertifyX509": certify, "CertifyJWT": certifyJWT}
	}
	for name, err := range calls() {
		if nodepb.Reason(err) != nodepb.MustReattest {
			t.Errorf("%s while its authority is trusted: %v", name, err)
		}
	}
	second := identitytest.Authority(t)
	p.signs(second, second)
	for name, err := range calls() {
		if status.Code(err) != codes.Unauthenticated || nodepb.Reason(err) != "" {
			t.Errorf("%s: %v", name, err)
		}
		if len(status.Convert(err).Details()) != 1 || len(nodepb.Trusted(err)) == 0 {
			t.Errorf("%s says %v", name, status.Convert(err).Details())
		}
	}
}

// zeros is no randomness: what it is for is replaced.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 1
	}
	return len(b), nil
}

// Who was away meanwhile can't know that it is the control plane who is back: only who has the stolen key could prove it.
func TestAwayDuringDistrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, true, nil)
		p.Set([]node.Assignment{assign(identitytest.Entry("web", identitytest.Me()), "one")}, nil)
		m := p.machine(withToken(p.token("one")))
		m.wait("entries")
		p.away()
		second := identitytest.Authority(t)
		p.signs(second, second)
		p.back()
		settle(time.Minute)
		if s := m.Status(); s.Connected || !strings.Contains(s.Problem, "verify SVID") {
			t.Errorf("got on as %+v", s)
		}
		m.end()
		m.config.Dir, m.config.TrustBundle, m.config.JoinToken = t.TempDir(), p.trusted.Load(), p.token("one")
		m.run()
		settle(time.Second)
		if w, _, err := m.svids(); err != nil || !below(w.SVIDs()[0], second) {
			t.Errorf("begun anew: %v", err)
		}
		m.end()
		p.away()
	})
}
