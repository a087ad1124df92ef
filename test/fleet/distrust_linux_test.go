package fleet

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
	"sallyport.dev/test/fleet/netlab"
)

// TestDistrust replaces a CA whose key was stolen, in the order that the operator's manual gives. SVIDs live so long that
// none is renewed for its age. Who is connected loses nothing, who has a stolen SVID everything, and a machine that was away
// must be begun anew.
func TestDistrust(t *testing.T) {
	f := newFleet(t, "plane", "gw1", "app1", "app2", "store")
	f.write("edge1.yaml", f.edge("edge1", "gw1", ""))
	for workload, host := range map[string]string{"app-1": "app1", "app-2": "app2", "store": "store"} {
		f.write(workload+".yaml", f.workload(workload, host))
	}
	f.write("grant.yaml", grant("one", "app-1")+grant("two", "app-2"))
	f.controlPlane(time.Hour)
	agents := map[string]*running{}
	for _, host := range []string{"gw1", "app1", "app2", "store"} {
		agents[host] = f.agent(host)
	}
	f.role("store", 0, "backend", f.socket("store"), f.hosts["store"].Addr.String()+":8443")
	f.gateway("edge1", "gw1")
	f.eventually("the gateway in force", func() bool { return slices.Equal(f.inForce(), []string{"edge1"}) })
	edge := "edge1=" + f.hosts["gw1"].Addr.String() + ":8443"
	app := f.role("app1", 0, "app", f.socket("app1"), "chat.internal", edge)
	plain := f.role("app1", 0, "unmodified", f.connect("app1"), "chat")
	thief := f.role("app1", 0, "thief", f.socket("app1"), "chat.internal", edge)
	answers := func(r *running, gateway string) func() bool {
		return func() bool { return r.status(gateway).Status == http.StatusOK }
	}
	f.eventually("answers", answers(app, "edge1"))
	f.eventually("answers without TLS", answers(plain, connected))
	f.eventually("answers to a thief", answers(thief, "edge1"))
	app.expect(http.StatusOK)
	plain.expect(http.StatusOK)
	serial := app.status("edge1").Serial

	f.hosts["app2"].Cable(netlab.Link{Cut: true})
	var ca disk.Description
	if err := json.Unmarshal([]byte(f.ask("ca", "rotate", "x509", "--now", "-o", "json")), &ca); err != nil {
		t.Fatal(err)
	}
	old := slices.IndexFunc(ca.Roots, func(s disk.Slot) bool { return s.State == disk.Old })
	if old < 0 {
		t.Fatalf("no root is old: %+v", ca.Roots)
	}
	signs, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), []byte(f.ask("ca", "export")))
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range signs.X509Authorities() {
		if digest := sha256.Sum256(root.Raw); hex.EncodeToString(digest[:]) == ca.Roots[old].ID {
			signs.RemoveX509Authority(root)
		}
	}
	for _, host := range []string{"gw1", "app1", "store"} {
		f.eventually("another SVID of the agent on "+host, func() bool {
			file := f.path(host+"-agent", "agent", "agent.pem")
			svid, err := x509svid.Load(file, file)
			if err != nil {
				return false
			}
			_, err = identity.Verify(svid.Certificates, signs, time.Now())
			return err == nil
		})
	}
	if is := app.status("edge1").Serial; is != serial {
		t.Error("a workload's SVID was replaced although it is trusted")
	}

	f.ask("ca", "distrust", ca.Roots[old].ID)
	f.eventually("another SVID of the application", func() bool { return app.status("edge1").Serial != serial })
	f.eventually("no answer to the thief", func() bool { return thief.status("edge1").Status == 0 })
	f.eventually("the gateway in force", func() bool { return slices.Equal(f.inForce(), []string{"edge1"}) })
	fresh := f.role("app1", 0, "app", f.socket("app1"), "chat.internal", edge)
	f.eventually("answers on new connections", answers(fresh, "edge1"))
	for name, r := range map[string]*running{"app": app, "unmodified": plain} {
		if bad := r.expect(0); len(bad) > 0 {
			t.Errorf("%s: %d requests failed, first %+v", name, len(bad), bad[0])
		}
	}
	for _, host := range []string{"gw1", "app1", "store"} {
		if agents[host].said("agent must be attested again") {
			t.Errorf("the agent on %s had to be attested again", host)
		}
	}
	if a := thief.status("edge1"); a.Status != 0 || a.Error == "" {
		t.Errorf("the thief gets %+v", a)
	}

	// Whoever was away knows nobody: it trusts the one whose key was stolen, and he is not there.
	f.hosts["app2"].Cable(netlab.Link{})
	f.eventually("doubts of who was away", func() bool { return agents["app2"].said("verify SVID") })
	if err := agents["app2"].cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-agents["app2"].done
	if err := os.RemoveAll(f.path("app2-agent", "agent")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.path("bundle.pem"), []byte(f.ask("ca", "export")), 0o600); err != nil {
		t.Fatal(err)
	}
	f.agent("app2")
	f.eventually("answers to who was away", answers(f.role("app2", 0, "app", f.socket("app2"), "chat.internal", edge), "edge1"))
	if out := f.ask("agents"); strings.Count(out, "valid") != 4 {
		t.Errorf("agents:\n%s", out)
	}
}
