package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// What the schema of SARIF 2.1.0 demands of the objects that we write, and where GitHub's code scanning looks.
func TestSARIF(t *testing.T) {
	dir := t.TempDir()
	const endpoint = `apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: chat}
spec:
  hostnames: [chat.internal]
  protocol: OpenAI
  backends: [{name: local, addresses: ["127.0.0.1:8080"], tls: {mode: None}}]
`
	const grants = `---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: now}
spec:
  from: [{spiffeID: "spiffe://example.org/app"}]
  to: [{endpoint: chat, operations: [Infer], resources: [a, "b*"]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: Grant
metadata: {name: later}
spec:
  notBefore: 2100-01-01T00:00:00Z
  from: [{spiffeID: "spiffe://example.org/app"}]
  to: [{endpoint: chat, operations: [Embed], resources: [a]}]
`
	for name, text := range map[string]string{"old.yaml": endpoint, "a b%.yaml": endpoint + grants} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	run := func(args ...string) (log map[string]any, code int) {
		var out, errOut bytes.Buffer
		code = Main(append([]string{"diff", "-o", "sarif"}, args...), &out, &errOut)
		if err := json.Unmarshal(out.Bytes(), &log); err != nil {
			t.Fatalf("%v: %s%s", err, out.String(), errOut.String())
		}
		return log, code
	}
	log, code := run("old.yaml", "a b%.yaml")
	if code != exitProblems {
		t.Errorf("ends with %d", code)
	}
	if log["version"] != "2.1.0" || !strings.HasPrefix(log["$schema"].(string), "https://") {
		t.Errorf("version %v, schema %v", log["version"], log["$schema"])
	}
	runs := log["runs"].([]any)
	first := runs[0].(map[string]any)
	driver := first["tool"].(map[string]any)["driver"].(map[string]any)
	if driver["name"] != "sallyport" || len(runs) != 1 {
		t.Errorf("%d runs, driver %v", len(runs), driver)
	}
	var rules []string
	for _, r := range driver["rules"].([]any) {
		rules = append(rules, r.(map[string]any)["id"].(string))
	}
	found, prints := map[string]string{}, map[any]bool{}
	for _, r := range first["results"].([]any) {
		r := r.(map[string]any)
		id := r["ruleId"].(string)
		if rules[int(r["ruleIndex"].(float64))] != id || !slices.Contains([]any{"error", "warning", "note", "none"}, r["level"]) {
			t.Errorf("result %v", r)
		}
		found[id] = r["message"].(map[string]any)["text"].(string)
		place := r["locations"].([]any)[0].(map[string]any)["physicalLocation"].(map[string]any)
		if uri := place["artifactLocation"].(map[string]any)["uri"]; uri != "a%20b%25.yaml" || place["region"].(map[string]any)["startLine"].(float64) < 8 {
			t.Errorf("stands at %v", place)
		}
		prints[r["partialFingerprints"].(map[string]any)["sallyport/v1"]] = true
	}
	if len(found) != 2 || len(prints) != 2 ||
		found["access-gained"] != "spiffe://example.org/app may now Infer at chat: a, b* (by grant/now, was default-deny)" ||
		found["access-gained-later"] != "From 2100-01-01T00:00:00Z on, spiffe://example.org/app may now Embed at chat: a (by grant/later, was default-deny)" {
		t.Errorf("results %q", found)
	}
	log, code = run("old.yaml", "old.yaml")
	if results := log["runs"].([]any)[0].(map[string]any)["results"]; code != 0 || results == nil || len(results.([]any)) > 0 {
		t.Errorf("without a difference: exit %d, %v", code, results) // null would say that nothing was looked for
	}
}

// Names from documents and from the network are names in a comment, whatever is in them.
func TestMarkdownIsNames(t *testing.T) {
	hostile := "a|b`*</code><img src=x>\n@everyone [x](y)\x1b[31m_&"
	out := comparison{Gains: 1, Changes: []authz.Change{{Gain: true, Callers: authz.Set{Of: []segment.Pattern{"spiffe://example.org/a"}}, Endpoint: "chat",
		Operations: []segment.Operation{segment.Infer}, Resources: authz.Set{Of: []segment.Pattern{segment.Pattern(hostile)}}, Causes: []authz.Cause{{Was: "default-deny", Is: "grant/x"}}}}}
	text := out.markdown()
	rows := strings.Split(strings.TrimSpace(text), "\n")
	last := rows[len(rows)-1]
	if strings.Count(last, "|") != 7 || strings.Count(last, "</code>") != 6 || strings.ContainsAny(last, "`*@[_\x1b") || strings.Contains(last, "<img") {
		t.Error(text)
	}
	if text := changeText(&out.Changes[0], plain); strings.ContainsAny(text, "\n\x1b") {
		t.Errorf("%q", text)
	}
}

// However many windows there are, a comparison ends; and one with too many moments says so, and is no success.
func TestMoments(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	asked := 0
	clock := func(next func(time.Time) time.Time) *side {
		return &side{at: func(now time.Time) (*authz.Policy, error) {
			asked++
			return &authz.Policy{NextChange: next(now)}, nil
		}}
	}
	hourly := clock(func(now time.Time) time.Time { return now.Add(time.Hour) })
	never := clock(func(time.Time) time.Time { return time.Time{} })
	c := comparing{now: start}
	if _, err := c.compare(hourly, never); err != nil || asked < 2*7*24 || asked > 2*9*24 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	years := start.AddDate(5, 0, 0)
	hourly.Moments, asked = []time.Time{years}, 0
	if _, err := c.compare(never, hourly); err != nil || asked < 4*7*24 || asked > 4*9*24 {
		t.Errorf("with a moment in five years asked %d times: %v", asked, err)
	}
	if _, err := c.compare(clock(func(now time.Time) time.Time { return now.Add(time.Second) }), never); err == nil {
		t.Error("compares every second of a week")
	}
}
