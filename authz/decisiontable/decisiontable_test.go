package decisiontable_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/authz/decisiontable"
	"sallyport.dev/segment"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestParse(t *testing.T) {
	lines, problems := decisiontable.Parse(segment.Pos{File: "t", Line: 5}, `# who may what
/a chat Infer m → allow
spiffe://other.test/b chat	Infer "m 1" -> deny default-deny

now: 2026-01-02T15:04:05Z
/a chat Enter "" → allow grant/x, shadow deny grant/y
/a chat Enter "" →
`, td)
	if problems != nil {
		t.Fatal(problems)
	}
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	want := []decisiontable.Line{
		{Pos: segment.Pos{File: "t", Line: 6}, Request: authz.Request{Caller: "spiffe://example.org/a", Endpoint: "chat", Operation: "Infer", Resource: "m"},
			Want: authz.Decision{Allowed: true, ShadowAllowed: true}, Wants: decisiontable.Verdict},
		{Pos: segment.Pos{File: "t", Line: 7}, Request: authz.Request{Caller: "spiffe://other.test/b", Endpoint: "chat", Operation: "Infer", Resource: "m 1"},
			Want: authz.Decision{Rule: "default-deny", ShadowRule: "default-deny"}, Wants: decisiontable.Everything},
		{Pos: segment.Pos{File: "t", Line: 10}, Now: now, Request: authz.Request{Caller: "spiffe://example.org/a", Endpoint: "chat", Operation: "Enter"},
			Want: authz.Decision{Allowed: true, Rule: "grant/x", ShadowRule: "grant/y"}, Wants: decisiontable.Everything},
		{Pos: segment.Pos{File: "t", Line: 11}, Now: now, Request: authz.Request{Caller: "spiffe://example.org/a", Endpoint: "chat", Operation: "Enter"}},
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
	if lines[0].Holds(authz.Decision{}) || !lines[0].Holds(authz.Decision{Allowed: true, Rule: "grant/z"}) ||
		lines[1].Holds(authz.Decision{Rule: "grant/z"}) || lines[3].Holds(authz.Decision{}) {
		t.Error("a line holds other decisions than it says")
	}
}

func TestProblems(t *testing.T) {
	for text, want := range map[string]string{
		"/a chat Infer m → allowed":                      "allowed",
		"/a chat Infer m → Allow grant/x":                "Allow",
		"/a chat Infer m → allow grant/x, shadow no yes": `"no"`,
		"/a chat Infer m → allow grant/x deny":           "must have",
		"/a chat Infer → allow":                          "arrow",
		"/a chat Infer m allow":                          "arrow",
		`/a chat Infer "m → allow`:                       "read",
		"now: tomorrow":                                  "no time",
	} {
		_, problems := decisiontable.Parse(segment.Pos{File: "t", Line: 1}, "# first\n"+text+"\n"+text, td)
		if len(problems) != 2 || problems[0].Pos.Line != 2 || problems[1].Pos.Line != 3 || !strings.Contains(problems[0].Msg, want) {
			t.Errorf("%s: %v", text, problems)
		}
	}
}

// What is written is read.
func TestColumns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.StringOf(rapid.SampledFrom([]rune("a/ \t\"\\#→-\n\x00\u200b:")))
		r := authz.Request{Caller: td.IDString() + "/" + text.Draw(t, "caller"), Endpoint: segment.EndpointName(text.Draw(t, "endpoint")),
			Operation: segment.Operation(text.Draw(t, "operation")), Resource: text.Draw(t, "resource")}
		d := authz.Decision{Allowed: rapid.Bool().Draw(t, "allowed"), Rule: "grant/a", ShadowAllowed: rapid.Bool().Draw(t, "shadow"), ShadowRule: "grant/b"}
		line := strings.Join(decisiontable.Columns(r, td), " ") + " → " + decisiontable.Text(d)
		lines, problems := decisiontable.Parse(segment.Pos{}, line, td)
		if problems != nil || len(lines) != 1 {
			t.Fatalf("%s: %v, %v", line, lines, problems)
		}
		if lines[0].Request != r || !lines[0].Holds(d) || lines[0].Expected() != decisiontable.Text(d) {
			t.Fatalf("%s: %+v", line, lines[0])
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add("/a chat Infer m → allow\nnow: 2026-01-02T15:04:05Z\n")
	f.Fuzz(func(t *testing.T, text string) {
		lines, problems := decisiontable.Parse(segment.Pos{Line: 1}, text, td)
		if n := strings.Count(text, "\n") + 1; len(lines)+len(problems) > n {
			t.Errorf("%d lines and %d problems of %d lines", len(lines), len(problems), n)
		}
	})
}
