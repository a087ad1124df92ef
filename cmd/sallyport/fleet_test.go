package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/identity/agent"
	"sallyport.dev/identity/forward"
	"sallyport.dev/identity/node"
	"sallyport.dev/segment"
)

const fleetDocuments = `
{apiVersion: sallyport.dev/v1alpha1, kind: Endpoint, metadata: {name: chat}, spec: {hostnames: [other.internal, chat.internal], protocol: OpenAI, backends: [{name: b, addresses: ["127.0.0.1:1"], tls: {mode: None}}]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Endpoint, metadata: {name: docs}, spec: {hostnames: [docs.internal], protocol: Chroma, backends: [{name: b, addresses: ["127.0.0.1:1"], tls: {mode: None}}]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Gateway, metadata: {name: both}, spec: {listen: "10.0.0.1:8443", node: gw, selectors: ["unix:uid:1"]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Gateway, metadata: {name: inner}, spec: {listen: "[::]:8443", node: app-b, selectors: ["unix:uid:1"], endpoints: [docs]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Gateway, metadata: {name: named}, spec: {listen: "0.0.0.0:8443", node: gw2, selectors: ["unix:uid:1"], endpoints: [chat]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Workload, metadata: {name: one}, spec: {spiffeID: "spiffe://example.org/one", nodes: [app-a, app-b], selectors: ["unix:uid:1"]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Workload, metadata: {name: two}, spec: {spiffeID: "spiffe://example.org/team/two", nodes: [app-c], selectors: ["unix:uid:1"]}}
---
{apiVersion: sallyport.dev/v1alpha1, kind: Workload, metadata: {name: here}, spec: {spiffeID: "spiffe://example.org/here", selectors: ["unix:uid:1"]}}
`

// told is what each agent is told, a line for each endpoint. The gateway "named" is reached at named.internal:443.
func told(t *testing.T, p *plane, grants ...string) string {
	t.Helper()
	text := fleetDocuments
	for i, g := range grants {
		text += fmt.Sprintf("---\n{apiVersion: sallyport.dev/v1alpha1, kind: Grant, metadata: {name: g%d}, spec: {%s}}\n", i, g)
	}
	cfg, problems := v1alpha1.Assemble(v1alpha1.Decode("all.yaml", []byte(text)), p.options)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for i := range cfg.Gateways {
		if cfg.Gateways[i].Name == "named" {
			cfg.Gateways[i].Address = segment.Address{Host: "named.internal", Port: 443}
		}
	}
	g := &controlplane.Generation{Config: cfg, Policy: authz.Compile(&cfg, time.Now())}
	all := assignments{p}.endpoints(g)
	var lines []string
	for _, id := range slices.SortedFunc(maps.Keys(all), func(a, b spiffeid.ID) int { return strings.Compare(a.Path(), b.Path()) }) {
		for _, e := range all[id] {
			line := fmt.Sprint(id.Path(), " ", e.Name, " ", e.Hostname)
			for _, g := range e.Gateways {
				line += fmt.Sprint(" ", g.ID.Path(), "=", g.Address)
			}
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

func testPlane() *plane {
	return &plane{options: v1alpha1.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), SVIDTTL: time.Hour}}
}

// An agent is told where its own workloads may do something, and nothing else.
func TestEndpointsOfAgents(t *testing.T) {
	const infer, read = "to: [{endpoint: chat, operations: [Infer], resources: ['*']}]", "to: [{endpoint: docs, operations: [Read], resources: ['*']}]"
	const chatAtC = "/agent/app-c chat chat.internal /gateway/both=10.0.0.1:8443 /gateway/named=named.internal:443"
	for name, c := range map[string]struct {
		grants []string
		want   []string
	}{
		"nothing is granted": {nil, nil},
		"by name":            {[]string{"from: [{workload: two}], " + infer}, []string{chatAtC}},
		"by a prefix":        {[]string{"from: [{spiffeID: 'spiffe://example.org/team/*'}], " + infer}, []string{chatAtC}},
		"on several machines, and the gateway of the same one first": {[]string{"from: [{workload: one}], " + read}, []string{
			"/agent/app-a docs docs.internal /gateway/both=10.0.0.1:8443",
			"/agent/app-b docs docs.internal /gateway/inner=[::1]:8443 /gateway/both=10.0.0.1:8443"}},
		"to everybody": {[]string{"from: [{trustDomain: example.org}], " + infer, "from: [{workload: two}], " + read}, []string{
			"/agent/app-a chat chat.internal /gateway/both=10.0.0.1:8443 /gateway/named=named.internal:443",
			"/agent/app-b chat chat.internal /gateway/both=10.0.0.1:8443 /gateway/named=named.internal:443",
			chatAtC,
			"/agent/app-c docs docs.internal /gateway/both=10.0.0.1:8443"}},
		"to others":                     {[]string{"from: [{workload: here}, {spiffeID: 'spiffe://example.org/teams/*'}], " + infer}, nil},
		"for a look":                    {[]string{"mode: Shadow, from: [{workload: two}], " + infer}, []string{chatAtC}},
		"and denied":                    {[]string{"from: [{workload: two}], " + infer, "effect: Deny, from: [{workload: two}], " + infer}, nil},
		"and may be denied":             {[]string{"from: [{workload: two}], " + infer, "effect: Deny, mode: Shadow, from: [{workload: two}], " + infer}, []string{chatAtC}},
		"only denied":                   {[]string{"effect: Deny, from: [{workload: two}], " + infer}, nil},
		"until some time ago":           {[]string{"expires: 2020-01-01T00:00:00Z, from: [{workload: two}], " + infer}, nil},
		"of a gateway's, which is none": {[]string{"from: [{spiffeID: 'spiffe://example.org/gateway/both'}], " + infer}, nil},
	} {
		if diff := cmp.Diff(strings.Join(c.want, "\n"), told(t, testPlane(), c.grants...)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

// A gateway whose agent is revoked is not one to go to.
func TestRevokedGatewayIsNotTold(t *testing.T) {
	p := testPlane()
	var err error
	if p.nodes, err = node.Open(node.Config{TrustDomain: p.options.TrustDomain, Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))}); err != nil {
		t.Fatal(err)
	}
	if err := p.nodes.Revoke(spiffeid.RequireFromString("spiffe://example.org/agent/gw")); err != nil {
		t.Fatal(err)
	}
	got := told(t, p, "from: [{workload: one}], to: [{endpoint: docs, operations: [Read], resources: ['*']}]")
	if want := "/agent/app-a docs docs.internal\n/agent/app-b docs docs.internal /gateway/inner=[::1]:8443"; got != want {
		t.Errorf("got %s", got)
	}
}

func TestAddressFrom(t *testing.T) {
	for _, c := range []struct{ listen, own, others string }{
		{"10.0.0.1:8443", "10.0.0.1:8443", "10.0.0.1:8443"},
		{"[2001:db8::1]:8443", "[2001:db8::1]:8443", "[2001:db8::1]:8443"},
		{"0.0.0.0:8443", "127.0.0.1:8443", ""},
		{"[::]:8443", "[::1]:8443", ""},
		{"[::ffff:0.0.0.0]:8443", "127.0.0.1:8443", ""},
		{"127.0.0.1:8443", "127.0.0.1:8443", ""},
		{"[::1]:8443", "[::1]:8443", ""},
		{"[::ffff:127.0.0.1]:8443", "127.0.0.1:8443", ""},
	} {
		g := &segment.Gateway{Node: "own", Listen: netip.MustParseAddrPort(c.listen)}
		if own, others := addressFrom("own", g), addressFrom("other", g); own != c.own || others != c.others {
			t.Errorf("%s: %q and %q", c.listen, own, others)
		}
		g.Node = "" // of this process
		if got := addressFrom("other", g); got != c.others {
			t.Errorf("%s: %q", c.listen, got)
		}
		g.Address = segment.Address{Host: "2001:db8::2", Port: 443}
		if got := addressFrom("own", g); got != "[2001:db8::2]:443" {
			t.Errorf("said to be elsewhere: %q", got)
		}
	}
}

// Not all machines begin with the same gateway, and none with another today than yesterday.
func TestGatewaysAreShared(t *testing.T) {
	p, g := testPlane(), &controlplane.Generation{}
	for i := range 4 {
		g.Config.Gateways = append(g.Config.Gateways, segment.Gateway{
			Name: segment.GatewayName(fmt.Sprint("edge", i)), Listen: netip.MustParseAddrPort(fmt.Sprintf("10.0.0.%d:8443", i+1))})
	}
	first := map[string]int{}
	for i := range 400 {
		n := segment.NodeName(fmt.Sprint("host-", i))
		all := p.gatewaysFrom(n, g)
		if len(all) != 4 {
			t.Fatalf("got %v", all)
		}
		first[all[0].address]++
		slices.Reverse(g.Config.Gateways)
		if again := p.gatewaysFrom(n, g); again[0].address != all[0].address || again[3].address != all[3].address {
			t.Errorf("got %v and %v", all, again)
		}
	}
	for address, n := range first {
		if n < 60 || n > 140 {
			t.Errorf("%d of 400 machines begin with %s", n, address)
		}
	}
}

// What the flags of an agent name comes before what the control plane says.
func TestWays(t *testing.T) {
	id := func(name string) spiffeid.ID {
		return spiffeid.RequireFromString("spiffe://example.org/gateway/" + name)
	}
	said := []agent.Endpoint{
		{Name: "chat", Hostname: "chat.internal", Gateways: []agent.Gateway{{ID: id("a"), Address: "a:1"}, {ID: id("b"), Address: "b:2"}}},
		{Name: "docs", Hostname: "docs.internal"},
	}
	for name, c := range map[string]struct {
		flags    host
		untold   bool
		endpoint string
		want     forward.Target
		err      error
	}{
		"told":             {endpoint: "chat", want: forward.Target{Addresses: []string{"a:1", "b:2"}, IDs: []spiffeid.ID{id("a"), id("b")}, ServerName: "chat.internal"}},
		"told, but for it": {endpoint: "docs", err: forward.ErrNoAddress},
		"not told":         {endpoint: "other", err: forward.ErrNoEndpoint},
		"nothing told":     {endpoint: "chat", untold: true, err: forward.ErrNotTold},
		"by flags elsewhere": {flags: host{gateway: "f:3", gatewayName: "f"}, endpoint: "docs",
			want: forward.Target{Addresses: []string{"f:3"}, IDs: []spiffeid.ID{id("f")}, ServerName: "docs.internal"}},
		"by flags": {flags: host{gateway: "f:3", gatewayName: "f", endpoints: map[string]string{"chat": "other.internal"}}, endpoint: "chat",
			want: forward.Target{Addresses: []string{"f:3"}, IDs: []spiffeid.ID{id("f")}, ServerName: "other.internal"}},
		"by flags alone": {flags: host{gateway: "f:3", gatewayName: "f", endpoints: map[string]string{"chat": "other.internal"}}, endpoint: "chat",
			untold: true, want: forward.Target{Addresses: []string{"f:3"}, IDs: []spiffeid.ID{id("f")}, ServerName: "other.internal"}},
	} {
		c.flags.trustDomain, c.flags.connect = "example.org", "127.0.0.1:0"
		w, err := c.flags.ways()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !c.untold {
			w.tell(said)
		}
		got, err := w.to(c.endpoint)
		if diff := cmp.Diff(c.want, got, cmpopts.EquateComparable(spiffeid.ID{})); diff != "" || !errors.Is(err, c.err) {
			t.Errorf("%s: %v, %s", name, err, diff)
		}
	}
	for name, bad := range map[string]host{
		"no --connect":      {gateway: "f:3"},
		"no --gateway":      {connect: "127.0.0.1:0", endpoints: map[string]string{"chat": "chat.internal"}},
		"no --gateway-name": {connect: "127.0.0.1:0", gateway: "f:3"},
		"no name":           {connect: "127.0.0.1:0", gateway: "f:3", gatewayName: "a b"},
		"no address":        {connect: "127.0.0.1:0", gateway: "f", gatewayName: "f"},
	} {
		bad.trustDomain = "example.org"
		if w, err := bad.ways(); err == nil {
			t.Errorf("%s: %v", name, w)
		}
	}
}
