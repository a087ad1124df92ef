package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz/learn"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/test/corpus"
)

const grantHead = "apiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: %s}\n"

const grantRest = "from: [{spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: docs, operations: [Read], resources: [x]}]"

// Whatever a document looks like, one word of it changes or nothing does.
func TestEnforced(t *testing.T) {
	head := func(name string) string { return fmt.Sprintf(grantHead, name) }
	block := "spec:\n  from:\n  - spiffeID: spiffe://example.org/a\n  to:\n  - endpoint: docs\n    operations: [Read]\n    resources: [Shadow]\n"
	other := head("other") + "spec: {mode: Shadow, " + grantRest + "}\n"
	for name, c := range map[string]struct {
		text string
		word string // what changes, of all that could be taken for it; "": nothing can
	}{
		"block, with comments":  {head("g") + "# mode: Shadow\n" + block + "  mode: ‹Shadow›   # mode: Shadow, for now\n# end\n", "Shadow"},
		"flow":                  {head("g") + "spec: {mode: ‹Shadow›, " + grantRest + "}\n", "Shadow"},
		"flow over lines":       {head("g") + "spec: {\n  mode:\n    ‹Shadow›, " + grantRest + "}\n", "Shadow"},
		"quoted":                {head("g") + "spec: {\"mode\" : \"‹Shadow›\", " + grantRest + "}\n", "Shadow"},
		"quoted once":           {head("g") + block + "  'mode': '‹Shadow›'\n", "Shadow"},
		"behind other letters":  {head("g") + "spec: {from: [{spiffeID: 'spiffe://example.org/a'}], to: [{endpoint: docs, operations: [Read], resources: [\"äöü日本😀\"]}], mode: ‹Shadow›}\n", "Shadow"},
		"JSON":                  {`{"apiVersion":"sallyport.dev/v1alpha1","kind":"Grant","metadata":{"name":"g","labels":{"mode":"Shadow"}},"spec":{"mode":"‹Shadow›","from":[{"spiffeID":"spiffe://example.org/a"}],"to":[{"endpoint":"docs","operations":["Read"],"resources":["Shadow"]}]}}`, "Shadow"},
		"the second of three":   {other + "---\n" + head("g") + "spec: {mode: ‹Shadow›, " + grantRest + "}\n---\n" + strings.Replace(other, "name: other", "name: third", 1), "Shadow"},
		"behind --- on a line":  {other + "--- {apiVersion: sallyport.dev/v1alpha1, kind: Grant, metadata: {name: g}, spec: {mode: ‹Shadow›, " + grantRest + "}}\n", "Shadow"},
		"behind an empty one":   {"---\n---\n# nothing\n---\n" + head("g") + block + "  mode: ‹Shadow›\n", "Shadow"},
		"CRLF":                  {strings.ReplaceAll(head("g")+block+"  mode: ‹Shadow›\n", "\n", "\r\n"), "Shadow"},
		"CR alone":              {strings.ReplaceAll(head("g")+block+"  mode: Shadow\n", "\n", "\r") + "\n", ""},
		"BOM":                   {"\ufeffapiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: g}\nspec: {mode: ‹Shadow›, " + grantRest + "}\n", "Shadow"},
		"a literal":             {head("g") + block + "  mode: |-\n    Shadow\n", ""},
		"escaped":               {head("g") + block + "  mode: \"Sh\\u0061dow\"\n", ""},
		"a name that is longer": {head("g") + "spec: {mode: ‹Shadow›, " + strings.Replace(grantRest, "[x]", "[Shadow, ShadowShadow]", 1) + "}\n", "Shadow"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.NewReplacer("‹", "", "›", "").Replace(c.text)
			got, err := enforced("f", text, "g")
			if c.word == "" {
				if err == nil {
					t.Fatalf("makes of it\n%s", got)
				}
				return
			}
			if want := strings.Replace(c.text, "‹"+c.word+"›", "Enforce", 1); err != nil || got != want {
				t.Errorf("%v\n%s\n--- not\n%s", err, got, want)
			}
		})
	}
}

func TestReplaced(t *testing.T) {
	doc := func(name, resource string) string {
		return fmt.Sprintf(grantHead+"spec: {%s}\n", name, strings.Replace(grantRest, "[x]", "["+resource+"]", 1))
	}
	into := "# ours\n" + doc("a", "x") + "--- # b stands here\n# about b\n" + doc("b", "x") + "---\n" + doc("c", "x")
	from := doc("z", "x") + "---\n# b is better\n" + doc("b", "y")
	got, err := replaced(into, from, named{"Grant", "b"}, "i.yaml", "f.yaml")
	want := "# ours\n" + doc("a", "x") + "--- # b stands here\n# b is better\n" + doc("b", "y") + "---\n" + doc("c", "x")
	if err != nil || got != want {
		t.Errorf("%v\n%s\n--- not\n%s", err, got, want)
	}
	if _, err := replaced(into, from, named{"Grant", "b"}, "i.json", "f.yaml"); err == nil {
		t.Error("writes YAML into a JSON file")
	}
	if _, err := replaced(into, from, named{"Grant", "d"}, "i.yaml", "f.yaml"); err == nil {
		t.Error("replaces what is not there")
	}
}

func TestWriteOfAFileThatChanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.yaml")
	link := filepath.Join(t.TempDir(), "link.yaml")
	if err := os.WriteFile(path, []byte("new\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := (edit{path: link, old: "old\n", text: "mine\n"}).write(); err == nil {
		t.Error("overwrites what somebody else wrote")
	}
	if err := (edit{path: link, text: "mine\n"}).write(); err == nil {
		t.Error("overwrites a file that was not there before")
	}
	if err := (edit{path: link, old: "new\n", text: "mine\n"}).write(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	info, _ := os.Stat(path)
	names, _ := os.ReadDir(filepath.Dir(path))
	if string(text) != "mine\n" || err != nil || info.Mode().Perm() != 0o640 || len(names) != 1 {
		t.Errorf("%q, %v, mode %s, %v", text, err, info.Mode(), names)
	}
}

// Whatever names came over the network, what is suggested is documents of exactly these resources.
func TestSuggestionIsDocuments(t *testing.T) {
	cfg := corpus.Assemble(rapidTB{t}, corpus.Endpoints())
	plenty := 0
	rapid.Check(t, func(t *rapid.T) {
		var seen []telemetry.Tally
		for range rapid.IntRange(1, 6).Draw(t, "requests") {
			at := time.Unix(1_800_000_000, 0)
			tally := telemetry.Tally{Count: 1, First: at, Last: at}
			tally.Caller = spiffeid.RequireFromString("spiffe://example.org/" + rapid.SampledFrom([]string{"a", "B/c", "a_b.c"}).Draw(t, "caller"))
			tally.Endpoint, tally.Operation, tally.Verdict = "docs", rapid.SampledFrom([]segment.Operation{"Read", "Write"}).Draw(t, "operation"), telemetry.Allowed
			tally.Resource = rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"null", "Yes", "1e3", "a: b", "x # y", "- x", "a\n---\nkind: Grant",
				"\"", "'", "\u2028", "\u0085", "~", "é", "<b>", "0x1", "2026-01-01", "!tag", "&a", "@", "`", "%", "?", "|", ">", "\u202e", "x:"})).Draw(t, "resource")
			seen = append(seen, tally)
		}
		s := operator.Suggestion{Suggestion: learn.Suggest(&cfg, seen, []segment.Pattern{"p*"})}
		var out strings.Builder
		if err := writeSuggestion(&out, s); err != nil {
			t.Fatal(err)
		}
		docs := v1alpha1.Decode("endpoints", []byte(strings.Join(corpus.Endpoints(), "")))
		if len(s.Grants) > 0 {
			docs = append(docs, v1alpha1.Decode("s", []byte(out.String()))...)
		}
		got, problems := v1alpha1.Assemble(docs, corpus.Options())
		if problems != nil || len(got.Grants) != len(s.Grants) {
			t.Fatalf("%v\n%s", problems, out.String())
		}
		byName := map[segment.GrantName]segment.Grant{}
		for _, g := range got.Grants {
			byName[g.Name] = g
		}
		for _, want := range s.Grants {
			g := byName[want.Name]
			count := 0
			for _, to := range want.To {
				for _, r := range to.Resources {
					for _, op := range to.Operations {
						count++
						if !learn.Concerns("", &g, telemetry.Judged{Caller: want.Caller, Endpoint: want.Endpoint, Operation: op, Resource: r.Pattern.Stem()}) {
							t.Fatalf("%q is not granted by\n%s", r.Pattern, out.String())
						}
					}
				}
			}
			for _, to := range g.To {
				count -= len(to.Operations) * len(to.Resources)
			}
			if plenty++; count != 0 {
				t.Fatalf("grants other things:\n%s", out.String())
			}
		}
	})
	if plenty < 100 {
		t.Errorf("only %d grants", plenty)
	}
}

// rapidTB lets a plain test use what is made for those of package rapid.
type rapidTB struct{ *testing.T }

func TestAge(t *testing.T) {
	for text, want := range map[string]time.Duration{"30d": 720 * time.Hour, "90m": 90 * time.Minute, "1h30m": 90 * time.Minute} {
		var a age
		if err := a.Set(text); err != nil || time.Duration(a) != want {
			t.Errorf("%s is %s, %v", text, &a, err)
		}
	}
	for _, text := range []string{"", "d", "-1d", "1.5d", "0d", "0s", "-1h", "7", "99999999d"} {
		var a age
		if a.Set(text) == nil {
			t.Errorf("%q is %s", text, &a)
		}
	}
}
