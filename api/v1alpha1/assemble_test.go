package v1alpha1

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the test needs no time zones of the machine

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

var update = flag.Bool("update", false, "write what is reported into the golden files")

func testOptions() Options {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	return Options{TrustDomain: td, SVIDTTL: time.Hour, Gateway: &segment.Gateway{Name: "local", ID: spiffeid.RequireFromPath(td, "/edge")}}
}

// Each file of testdata/problems is some documents and all that is wrong with them.
func TestProblems(t *testing.T) {
	files, err := filepath.Glob("testdata/problems/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no golden files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var docs []Document
			for _, f := range archive.Files[:len(archive.Files)-1] {
				docs = append(docs, Decode(f.Name, f.Data)...)
			}
			config, problems := Assemble(docs, testOptions())
			if diff := cmp.Diff(segment.Config{}, config, same()...); len(problems) == 0 || diff != "" {
				t.Errorf("%d problems, and a configuration: %s", len(problems), diff)
			}
			want := &archive.Files[len(archive.Files)-1]
			var got strings.Builder
			for _, p := range problems {
				got.WriteString(p.Code + ": " + p.String() + "\n")
				if p.Pos.Line == 0 {
					t.Errorf("nobody can find this: %s", p)
				}
			}
			if *update {
				want.Data = []byte(got.String())
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(want.Data), got.String()); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// same compares the types that hide what they hold.
func same() []cmp.Option {
	return []cmp.Option{
		cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }),
		cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmp.Comparer(func(a, b segment.Caller) bool { return a == b }),
		cmp.Comparer(func(a, b *time.Location) bool { return a.String() == b.String() }),
	}
}

func TestAssemble(t *testing.T) {
	data, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, problems := Assemble(Decode("good.yaml", data), testOptions())
	if problems != nil {
		t.Fatal(problems)
	}
	id := func(s string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.org/" + s) }
	partner, away := spiffeid.RequireTrustDomainFromString("partner.example"), spiffeid.RequireTrustDomainFromString("away.example")
	caller := func(s string) segment.Caller {
		c, err := segment.ParseCaller(s)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	want := segment.Config{
		TrustDomain: testOptions().TrustDomain,
		Gateways:    []segment.Gateway{*testOptions().Gateway},
		Endpoints: []segment.Endpoint{{
			Name: "chat", Labels: map[string]string{"tier": "prod"}, Hostnames: []string{"chat.models.internal", "llm.internal"}, Protocol: segment.OpenAI,
			Backends: []segment.Backend{
				{Name: "far", Addresses: []segment.Address{{Host: "models.example.com", Port: 443}},
					TLS: segment.BackendTLS{Mode: segment.TLSServer, ServerName: "models.example.com", CAFile: "/etc/ssl/certs/ca-certificates.crt"}},
				{Name: "local", Addresses: []segment.Address{{Host: "127.0.0.1", Port: 8080}, {Host: "::1", Port: 8080}},
					TLS: segment.BackendTLS{Mode: segment.TLSNone}},
				{Name: "pinned", Addresses: []segment.Address{{Host: "10.0.0.9", Port: 8443}},
					TLS: segment.BackendTLS{Mode: segment.TLSMutual, ID: id("model-server")}},
			},
			Models: []segment.Model{
				{Name: "big", Backends: []segment.BackendName{"pinned"}},
				{Name: "huge", Backends: []segment.BackendName{"far"}},
				{Name: "smollm2", Aliases: []string{"small", "tiny"}, Backends: []segment.BackendName{"local"}},
			},
			Tokens: &segment.Tokens{Audiences: []string{"chat", "https://llm.internal"}, Issuers: []segment.IssuerName{"corp", "guests"},
				TrustDomains: []spiffeid.TrustDomain{away, testOptions().TrustDomain, partner}},
		}, {
			Name: "docs", Hostnames: []string{"docs.internal"}, Protocol: segment.Chroma,
			Backends: []segment.Backend{{Name: "local", Addresses: []segment.Address{{Host: "localhost", Port: 8000}}, TLS: segment.BackendTLS{Mode: segment.TLSNone}}},
			Database: segment.Database{Tenant: "default_tenant", Name: "hr"},
			Tokens:   &segment.Tokens{Audiences: []string{"docs.internal"}, Issuers: []segment.IssuerName{"corp"}},
		}},
		Workloads: []segment.Workload{
			{Name: "indexer", Labels: map[string]string{"team": "search"}, ID: id("indexer"), Selectors: []segment.Selector{{Type: "unix", Value: "user:indexer"}},
				FederatesWith: []spiffeid.TrustDomain{away, partner}},
			{Name: "rag-app", Labels: map[string]string{"team": "search", "tier": "web"}, ID: id("rag-app"),
				Selectors: []segment.Selector{{Type: "unix", Value: "path:/usr/bin/app"}, {Type: "unix", Value: "uid:1000"}}},
		},
		Grants: []segment.Grant{{
			Name: "all", Effect: segment.Allow, Mode: segment.Enforce,
			From: []segment.Caller{caller("spiffe://example.org/indexer"), caller("spiffe://example.org/ops/*"), caller("spiffe://example.org/rag-app"),
				caller("spiffe://oidc.example.org/corp/alice_40example.org"), caller("spiffe://oidc.example.org/corp/system_3Aserviceaccount_3Ans_3Aname"), caller("spiffe://partner.example/*")},
			To: []segment.Target{
				{Endpoint: "chat", Operations: []segment.Operation{segment.Embed, segment.Infer}, Resources: []segment.Pattern{"small", "smollm2"}},
				{Endpoint: "docs", Operations: []segment.Operation{segment.Read}, Resources: []segment.Pattern{"handbook", "public-*"}},
			},
			NotBefore: time.Date(2026, 6, 30, 22, 0, 0, 0, time.UTC),
			Expires:   time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC),
			Windows: []segment.Window{
				{Days: []time.Weekday{time.Monday, time.Tuesday}, From: 8 * 60, To: 18 * 60, Zone: berlin},
				{Days: []time.Weekday{0, 1, 2, 3, 4, 5, 6}, From: 22*60 + 30, To: 24 * 60, Zone: time.UTC},
				{Days: []time.Weekday{time.Saturday}, From: 23 * 60, To: 6*60 + 30, Zone: time.UTC},
			},
			Budget: segment.Budget{Requests: segment.Limit{Max: 60, Per: segment.Minute}, Shared: true, Open: true},
			Owner:  "search@example.org", Reason: "the search team answers questions", Ticket: "SEC-1234",
			Pos: segment.Pos{File: "good.yaml", Line: 54, Column: 1},
		}, {
			Name: "not-payroll", Effect: segment.Deny, Mode: segment.Shadow,
			From: []segment.Caller{caller("spiffe://example.org/rag-app")},
			To:   []segment.Target{{Endpoint: "docs", Operations: []segment.Operation{segment.Read}, Resources: []segment.Pattern{"*"}}},
			Pos:  segment.Pos{File: "good.yaml", Line: 84, Column: 1},
		}, {
			Name: "with-tokens", Effect: segment.Allow, Mode: segment.Enforce,
			From:   []segment.Caller{caller("spiffe://oidc.example.org/*"), caller("spiffe://oidc.example.org/corp/bob"), caller("spiffe://oidc.example.org/guests/*")},
			To:     []segment.Target{{Endpoint: "chat", Operations: []segment.Operation{segment.Infer}, Resources: []segment.Pattern{"small"}}},
			Budget: segment.Budget{Tokens: segment.Limit{Max: 100000, Per: segment.Day}},
			Pos:    segment.Pos{File: "good.yaml", Line: 88, Column: 1},
		}},
		Issuers: []segment.TokenIssuer{
			{Name: "corp", Issuer: "https://login.corp.example", JWKSURI: "https://[2001:db8::1]:8443/keys?of=all", CAFile: "/etc/sallyport/corp-ca.pem",
				Keys: blockOf(t, "keys"), Refresh: 10 * time.Minute},
			{Name: "guests", Issuer: "https://Login.guests.example:8443/Tenant%2F1/", KeysFile: "/etc/sallyport/guests.json"},
		},
		Federated: []segment.TrustDomain{
			{Name: "away", Domain: away, BundleFile: "/etc/sallyport/away.json",
				Endpoint: segment.BundleEndpoint{URL: "https://[2001:db8::1]:8443", Profile: segment.HTTPSSPIFFE, ID: spiffeid.RequireFromPath(away, "/spire/server")}},
			{Name: "by-another", Domain: spiffeid.RequireTrustDomainFromString("third.example"),
				Endpoint: segment.BundleEndpoint{URL: "https://spiffe.away.example/third", Profile: segment.HTTPSSPIFFE, ID: spiffeid.RequireFromPath(away, "/spire/server")}},
			{Name: "partner", Domain: partner, Bundle: blockOf(t, "bundle"), Refresh: 90 * time.Minute,
				Endpoint: segment.BundleEndpoint{URL: "https://spiffe.partner.example/bundle?of=all", Profile: segment.HTTPSWeb, CAFile: "/etc/ssl/certs/ca-certificates.crt"}},
		},
	}
	if diff := cmp.Diff(want, got, same()...); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
}

// blockOf returns the block of text that stands in good.yaml behind the key.
func blockOf(t *testing.T, key string) string {
	t.Helper()
	data, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "  "+key+": |\n")
	var block strings.Builder
	for line := range strings.Lines(rest) {
		text, ok := strings.CutPrefix(line, "    ")
		if !ok {
			break
		}
		block.WriteString(text)
	}
	return block.String()
}

func TestNothingIsAConfiguration(t *testing.T) {
	o := testOptions()
	config, problems := Assemble(nil, o)
	want := segment.Config{TrustDomain: o.TrustDomain, Gateways: []segment.Gateway{*o.Gateway}}
	if diff := cmp.Diff(want, config, same()...); problems != nil || diff != "" {
		t.Errorf("problems %v, config %s", problems, diff)
	}
}

// Documents that Decode did not make could have lost a Deny on their way.
func TestNoConfigurationOfUnreadableDocuments(t *testing.T) {
	for _, d := range []Document{{}, {Spec: &GrantSpec{}}, Unreadable(segment.Problem{Msg: "gone"})} {
		if _, problems := Assemble([]Document{d}, testOptions()); len(problems) != 1 {
			t.Errorf("%+v: problems %v", d, problems)
		}
	}
}

// The grants of a shadow folder are those of the documents that there would be if the folder were enforced.
func TestAssembleShadow(t *testing.T) {
	workload := func(name, path, team string) string {
		return "---\napiVersion: sallyport.dev/v1alpha1\nkind: Workload\nmetadata: {name: " + name + ", labels: {team: " + team + "}}\n" +
			"spec: {spiffeID: 'spiffe://example.org/" + path + "', selectors: ['unix:uid:1']}\n"
	}
	endpoint := func(models string) string {
		return "---\napiVersion: sallyport.dev/v1alpha1\nkind: Endpoint\nmetadata: {name: chat}\nspec: {hostnames: [chat.internal], protocol: OpenAI, " +
			"backends: [{name: b, addresses: ['127.0.0.1:1'], tls: {mode: None}}], models: [" + models + "]}\n"
	}
	grant := func(name, from, model string) string {
		return "---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: " + name + "}\n" +
			"spec: {from: [{" + from + "}], to: [{endpoint: chat, operations: [Infer], resources: [" + model + "]}]}\n"
	}
	const search = "workloadSelector: {matchLabels: {team: search}}"
	enforced := Decode("enforced", []byte(endpoint("{name: small}")+workload("a", "a", "search")+workload("b", "b", "ml")+grant("g", search, "small")+grant("h", search, "small")))
	for _, c := range []struct{ what, shadow, want string }{
		{"nothing", "", ""},
		{"a grant by the name of an enforced one", grant("g", "workload: b", "small"), "g [spiffe://example.org/b]"},
		{"a workload more", workload("c", "c", "search") + grant("n", search, "small"), "n [spiffe://example.org/a spiffe://example.org/c]"},
		{"a workload with other labels", workload("b", "b", "search") + grant("n", search, "small"), "n [spiffe://example.org/a spiffe://example.org/b]"},
		{"a workload with another ID", workload("a", "z", "search") + grant("n", "workload: a", "small"), "n [spiffe://example.org/z]"},
		{"an endpoint with another model", endpoint("{name: large}") + grant("n", "workload: a", "large"), "n [spiffe://example.org/a]"},
		{"a model that is there no more", endpoint("{name: large}") + grant("n", "workload: a", "small"), "shadow:11:86: unknown-model"},
		{"a model that is nowhere", grant("n", "workload: a", "large"), "shadow:6:86: unknown-model"},
		{"the ID of another workload", workload("c", "a", "search"), "shadow:6:18: duplicate-spiffe-id"},
		{"text", "effect: Deny\n", "unknown-field"},
		{"half a document", strings.TrimSuffix(grant("n", "workload: a", "small"), "}\n"), "syntax"},
	} {
		var got strings.Builder
		grants, problems := AssembleShadow(enforced, Decode("shadow", []byte("# nothing\n"+c.shadow)), testOptions())
		for _, g := range grants {
			got.WriteString(string(g.Name) + " " + fmt.Sprint(g.From))
		}
		for _, p := range problems {
			got.WriteString(p.Pos.String() + ": " + p.Code + " ")
		}
		if !strings.Contains(got.String(), c.want) || (c.want == "") != (got.String() == "") || len(problems) > 0 && grants != nil {
			t.Errorf("%s: %s, not %s", c.what, got.String(), c.want)
		}
	}
	if config, problems := Assemble(enforced, testOptions()); problems != nil || len(config.Grants) != 2 {
		t.Errorf("the enforced documents have changed: %+v, %v", config, problems)
	}
}
