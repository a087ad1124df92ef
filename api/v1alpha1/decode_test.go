package v1alpha1

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sallyport.dev/segment"
)

func problemsOf(docs []Document) segment.Problems {
	var all segment.Problems
	for i := range docs {
		all = append(all, docs[i].Problems()...)
	}
	return all
}

// What a golden file cannot hold.
func TestUnreadable(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"too large":          {strings.Repeat("#", MaxBytes+1), "f: is larger than 16 MiB"},
		"document too large": {"\n---\n" + strings.Repeat("#", maxDocument), "f:2: is a document larger than 1 MiB"},
		"truncated":          {"", "f: is empty"},
		"not UTF-8":          {"a: b\nc: ä\xff\n", "f:2:5: is not UTF-8"},
		"UTF-16":             {"\xff\xfea\x00", "f:1:1: is not UTF-8"},
		"zero byte":          {"a: \x00\n", "f:1: is not YAML: control characters are not allowed"},
		"deep":               {strings.Repeat("[", 100_000), "f:1: is not YAML: exceeded max depth of 10000"},
		"half a comment":     {"---\n# effec", "f:2: ends within a line"},
		"half a document":    {"kind: Grant\nspe", "f:2: is not YAML: could not find expected ':'"},
		"only a marker":      {"---", "f:1: ends within a line"},
	} {
		t.Run(name, func(t *testing.T) {
			problems := problemsOf(Decode("f", []byte(c.text)))
			if len(problems) == 0 || !strings.HasPrefix(problems[0].String(), c.want) {
				t.Errorf("got %v, want %s", problems, c.want)
			}
		})
	}
}

func TestNoDocuments(t *testing.T) {
	for _, text := range []string{"\n", "# nothing\n", "---\n", "---\n---\n# nothing\n...\n", "\ufeff# nothing\n"} {
		if docs := Decode("f", []byte(text)); len(docs) != 0 {
			t.Errorf("%q: %+v", text, docs)
		}
	}
}

func TestNoDocumentIsLost(t *testing.T) {
	one := `{apiVersion: sallyport.dev/v1alpha1, kind: Workload, metadata: {name: %s}, spec: {spiffeID: "spiffe://example.org/%[1]s", selectors: ["unix:uid:1"]}}`
	a, b := fmt.Sprintf(one, "a"), fmt.Sprintf(one, "b")
	for _, text := range []string{
		a + "\n---\n" + b, "--- " + a + "\n--- " + b + "\n", a + "\r\n---\r\n" + b, a + "\r---\r" + b,
		a + "\n---\t\n" + b, "\ufeff---\n" + a + "\n---\n" + b, a + "\n...\n---\n" + b, a + "\u0085---\u0085" + b,
	} {
		docs := Decode("f", []byte(text))
		if len(docs) != 2 || problemsOf(docs) != nil || docs[0].Metadata.Name+docs[1].Metadata.Name != "ab" {
			t.Errorf("%q: %d documents, %v", text, len(docs), problemsOf(docs))
		}
	}
	// These are one text to YAML, and not two: nothing of it may pass.
	for _, text := range []string{a + "\n" + b, a + b, a + "\n...\n" + b, a + "\n--- # x: {\n}" + b} {
		if problemsOf(Decode("f", []byte(text))) == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

// A document cut within a line is never read, whatever is lost with the rest: here, that it denies.
func TestHalfWritten(t *testing.T) {
	const text = `apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: g}
spec:
  from: [{trustDomain: example.org}]
  to:
  - endpoint: docs
    operations: [Read]
    resources:
    - payroll-of-everyone
  effect: Deny
`
	if ps := problemsOf(Decode("f", []byte(text))); ps != nil {
		t.Fatal(ps)
	}
	for end := range len(text) {
		if cut := text[:end]; !strings.HasSuffix(cut, "\n") && problemsOf(Decode("f", []byte(cut))) == nil {
			t.Errorf("accepted: %q", cut)
		}
	}
}

func TestPos(t *testing.T) {
	const text = `# a comment
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata:
  name: g
spec:
  from:
  - workload: ä
  - {trustDomain: "x", workload: y}
  to: []
`
	docs := Decode("f", []byte(text))
	if len(docs) != 1 {
		t.Fatal(docs)
	}
	for path, want := range map[string]string{
		"": "f:3:1", "kind": "f:4:7", "metadata": "f:5:1", "metadata.name": "f:6:9", "spec.from": "f:8:3", "spec.from[0]": "f:9:5",
		"spec.from[0].workload": "f:9:15", "spec.from[1]": "f:10:5", "spec.from[1].workload": "f:10:34",
		"spec.from[1].spiffeID": "f:10:5", "spec.from[7].x": "f:8:3", "spec.expires": "f:7:1", "nothing": "f:3:1",
		"spec.from[": "f:8:3", "spec.from[x]": "f:8:3", "...": "f:3:1",
	} {
		if got := docs[0].Pos(path).String(); got != want {
			t.Errorf("%q stands at %s, want %s", path, got, want)
		}
	}
}

func TestProblemsAreBounded(t *testing.T) {
	docs := Decode("f", []byte("{"+strings.Repeat("? x\n, ", 10_000)+"}"))
	if n := len(problemsOf(docs)); n != maxProblems {
		t.Errorf("%d problems of one document", n)
	}
	docs = Decode("f", []byte(strings.Repeat("x: y\n---\n", 3000)))
	_, problems := Assemble(docs, testOptions())
	if last := problems[len(problems)-1]; len(problems) != maxReported+1 || last.Code != "too-many" {
		t.Errorf("%d problems, the last %v", len(problems), last)
	}
}

func TestDidYouMean(t *testing.T) {
	for _, c := range []struct{ name, candidates, want string }{
		{"chatt", "chat docs", "chat"}, {"hcat", "chat", "chat"}, {"efect", "effect", "effect"}, {"CHAT", "docs chat", "chat"},
		{"a", "b", "b"}, {"ab", "cd", ""}, {"smolm", "smollm2 smollm3", ""}, {"smolm2", "smollm3 smollm2", "smollm2"}, {"workload", "workloadSelector", ""},
		{"", "", ""}, {"kitten", "sitting", ""}, {"cat", "car bat", "bat"},
	} {
		want := ""
		if c.want != "" {
			want = fmt.Sprintf("did you mean %q?", c.want)
		}
		if got := didYouMean(c.name, strings.Fields(c.candidates)); got != want {
			t.Errorf("%s of %s: %s, want %s", c.name, c.candidates, got, want)
		}
	}
}

// anything is some documents, many of them with something wrong.
func anything(most int) *rapid.Generator[[]string] {
	name := rapid.SampledFrom([]string{"a", "b", "c", "d", "E"})
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string {
		n, m, o := name.Draw(t, "name"), name.Draw(t, "other"), name.Draw(t, "another")
		spec := rapid.SampledFrom([]string{
			"Endpoint|{hostnames: [%s.x], protocol: OpenAI, backends: [{name: b, addresses: ['127.0.0.1:1'], tls: {mode: None}}], models: [{name: %s}]}",
			"Endpoint|{hostnames: [%s.y], protocol: Chroma, backends: [{name: %s, addresses: ['%[2]s.z:1'], tls: {mode: Server, caFile: /ca}}]}",
			"Workload|{spiffeID: 'spiffe://example.org/%s', selectors: ['unix:user:%s']}",
			"Grant|{from: [{workload: %s}], to: [{endpoint: %s, operations: [Infer], resources: ['*']}]}",
			"Grant|{effect: Deny, from: [{workloadSelector: {matchLabels: {of: %s}}}], to: [{endpoint: %s, operations: [Read, Write], resources: [%[1]s, '%[2]s*']}]}",
			"TrustDomain|{trustDomain: %s.test, bundleEndpoint: {url: 'https://%s.test/', profile: https_web}}",
			"TrustDomain|{trustDomain: %s, bundleEndpoint: {url: 'https://x', profile: https_spiffe, endpointSPIFFEID: 'spiffe://%s.test/b'}}",
			"Grant|{from: [{trustDomain: %s.test}], to: [{endpoint: %s, operations: [Infer], resources: ['*']}]}",
			"TokenIssuer|{issuer: 'https://%s.test', caFile: /%s}",
			"Endpoint|{hostnames: [%s.t], protocol: OpenAI, backends: [{name: b, addresses: ['127.0.0.1:1'], tls: {mode: None}}], tokens: {issuers: [%s], trustDomains: [example.org]}}",
			"Grant|{from: [{tokenIssuer: %s, subject: x@y}, {spiffeID: 'spiffe://oidc.example.org/*'}], to: [{endpoint: %s, operations: [Infer], resources: ['*']}]}",
			"Grant|{form: [{workload: %s}], to: %s}",
			"Grand|[%s, %s",
		}).Draw(t, "spec")
		kind, spec, _ := strings.Cut(spec, "|")
		return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: %s\nmetadata: {name: %s, labels: {of: %s}}\nspec: %s\n", kind, n, o, fmt.Sprintf(spec, m, o))
	}), 0, most)
}

func TestOrderOfDocumentsHasNoMeaning(t *testing.T) {
	good, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
	rapid.Check(t, func(t *rapid.T) {
		var docs []Document
		if rapid.Bool().Draw(t, "good") {
			docs = Decode("good.yaml", good)
		}
		for i, text := range anything(rapid.IntRange(0, 1).Draw(t, "most")*12).Draw(t, "documents") {
			docs = append(docs, Decode(fmt.Sprintf("f%02d", i), []byte(text))...)
		}
		config, problems := Assemble(docs, testOptions())
		shuffled := rapid.Permutation(docs).Draw(t, "shuffled")
		again, problemsAgain := Assemble(shuffled, testOptions())
		if !reflect.DeepEqual(config, again) || !reflect.DeepEqual(problems, problemsAgain) {
			t.Fatalf("%v\n%v\n\n%v\n%v", config, problems, again, problemsAgain)
		}
		if problems == nil && len(config.Grants) > 0 {
			accepted++
		}
	})
	if accepted == 0 {
		t.Error("no case was accepted: the test shows nothing")
	}
}

// What is remembered is what would be decoded, positions and all.
func TestMemo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var memo Memo
		for range 4 {
			text := strings.Join(anything(12).Draw(t, "documents"), rapid.SampledFrom([]string{"", "\n", "# a comment\n"}).Draw(t, "between")) + "\n"
			got, want := memo.Decode("f", text), Decode("f", []byte(text))
			if !reflect.DeepEqual(got, want) {
				t.Fatal(cmp.Diff(problemsOf(want), problemsOf(got)))
			}
			if rapid.Bool().Draw(t, "forget") {
				memo.Forget()
			}
		}
	})
}

func TestMemoForgets(t *testing.T) {
	var memo Memo
	first := memo.Decode("f", "a: b\n---\nc: d\n")
	memo.Decode("g", "a: b\n")
	memo.Forget()
	if again := memo.Decode("f", "a: b\n---\nc: d\n"); &again[0] != &first[0] {
		t.Error("decodes what it knows")
	}
	memo.Forget()
	if len(memo.texts) != 1 || len(memo.texts["f"].parts) != 2 {
		t.Errorf("remembers %+v", memo.texts)
	}
	memo.Decode("f", "---\nc: d\n")
	if len(memo.texts["f"].parts) != 1 {
		t.Errorf("remembers %+v", memo.texts["f"].parts)
	}
}

func FuzzDecode(f *testing.F) {
	good, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(good))
	for part := range parts(string(good)) {
		f.Add(part)
	}
	f.Add("? [a]\n: &x !!str\n- *x\n<<: {}\n")
	f.Add("a: [{b: |\n  c\n---\n%TAG\r---\u2028...\n")
	f.Fuzz(func(t *testing.T, text string) {
		docs := Decode("f", []byte(text))
		lines := strings.Count(text, "\n") + strings.Count(text, "\r") + strings.Count(text, "\u0085") + strings.Count(text, "\u2028") + strings.Count(text, "\u2029") + 1
		for _, p := range problemsOf(docs) {
			if p.Pos.File != "f" || p.Pos.Line > lines || p.Msg == "" || p.Code == "" {
				t.Errorf("%+v of %d lines", p, lines)
			}
		}
		config, problems := Assemble(docs, testOptions())
		if problems != nil {
			return
		}
		if len(config.Endpoints)+len(config.Workloads)+len(config.Grants)+len(config.Federated)+len(config.Issuers) != len(docs) {
			t.Errorf("%d documents became %+v", len(docs), config)
		}
		for _, g := range config.Grants {
			if len(g.From) == 0 || len(g.To) == 0 || g.Effect == "" || g.Mode == "" {
				t.Errorf("a grant of nothing: %+v", g)
			}
		}
		for _, e := range config.Endpoints {
			if tokens := e.Tokens; tokens != nil && (len(tokens.Audiences) == 0 || slices.Contains(tokens.Audiences, "") || len(tokens.Issuers)+len(tokens.TrustDomains) == 0) {
				t.Errorf("takes tokens for anybody, or of nobody: %+v", tokens)
			}
			for _, b := range e.Backends {
				for _, a := range b.Addresses {
					if b.TLS.Mode == segment.TLSNone && !strings.HasPrefix(a.Host, "127.") && a.Host != "::1" && a.Host != "localhost" {
						t.Errorf("in clear text to %+v", a)
					}
				}
			}
		}
	})
}

// manyGrants is a file of n grants, and what they need.
func manyGrants(n int) string {
	const head = "---\napiVersion: sallyport.dev/v1alpha1\n"
	var b strings.Builder
	for _, e := range []string{"chat|OpenAI", "docs|Chroma"} {
		name, protocol, _ := strings.Cut(e, "|")
		fmt.Fprintf(&b, head+"kind: Endpoint\nmetadata: {name: %s}\nspec:\n  hostnames: [%s.internal]\n  protocol: %s\n  backends: [{name: b, addresses: ['127.0.0.1:1'], tls: {mode: None}}]\n", name, name, protocol)
	}
	for i := range n / 10 {
		fmt.Fprintf(&b, head+"kind: Workload\nmetadata: {name: w-%d, labels: {team: t-%d}}\nspec: {spiffeID: 'spiffe://example.org/w/%d', selectors: ['unix:uid:%d']}\n", i, i%100, i, i)
	}
	for i := range n {
		fmt.Fprintf(&b, head+`kind: Grant
metadata: {name: g-%d}
spec:
  from:
  - workload: w-%d
  to:
  - endpoint: chat
    operations: [Infer]
    resources: [model-%d]
  - {endpoint: docs, operations: [Read], resources: ["handbook", "public-*"]}
`, i, i%(n/10), i%100)
	}
	return b.String()
}

func BenchmarkDecode(b *testing.B) {
	text := manyGrants(10_000)
	b.Run("new", func(b *testing.B) {
		for b.Loop() {
			new(Memo).Decode("f", text)
		}
	})
	b.Run("one changed", func(b *testing.B) {
		var memo Memo
		memo.Decode("f", text)
		for i := 0; b.Loop(); i++ {
			memo.Forget()
			memo.Decode("f", strings.Replace(text, "g-5000}", fmt.Sprintf("h-%d}", i), 1))
		}
	})
}

func BenchmarkAssemble(b *testing.B) {
	docs := Decode("f", []byte(manyGrants(10_000)))
	for b.Loop() {
		if _, problems := Assemble(docs, testOptions()); problems != nil {
			b.Fatal(problems[0])
		}
	}
}
