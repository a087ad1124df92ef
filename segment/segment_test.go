package segment

import (
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		pattern Pattern
		yes, no string // names, apart by blanks; "." is the empty one
	}{
		{"", ".", "a *"},
		{"a", "a", ". aa A a* *"},
		{"*", ". a * a*", ""},
		{"a*", "a ab a* a/b", ". b ba A"},
		{"a/*", "a/ a/b", "a ab ."},
	} {
		for want, names := range map[bool]string{true: c.yes, false: c.no} {
			for _, name := range strings.Fields(names) {
				if name == "." {
					name = ""
				}
				if c.pattern.Matches(name) != want {
					t.Errorf("%q matches %q: %t", c.pattern, name, !want)
				}
			}
		}
	}
}

// One pattern covers another if and only if it matches all that the other one matches.
func TestCovers(t *testing.T) {
	text := rapid.StringOfN(rapid.SampledFrom([]rune("ab")), 0, 3, -1)
	pattern := rapid.Custom(func(t *rapid.T) Pattern {
		return Pattern(text.Draw(t, "stem") + rapid.SampledFrom([]string{"", "*"}).Draw(t, "star"))
	})
	var names []string // all of up to five letters
	for next := []string{""}; len(next[0]) <= 5; {
		names = append(names, next...)
		var longer []string
		for _, n := range next {
			longer = append(longer, n+"a", n+"b")
		}
		next = longer
	}
	rapid.Check(t, func(t *rapid.T) {
		p, q := pattern.Draw(t, "p"), pattern.Draw(t, "q")
		all := !slices.ContainsFunc(names, func(n string) bool { return q.Matches(n) && !p.Matches(n) })
		if p.Covers(q) != all {
			t.Fatalf("%q covers %q: %t", p, q, !all)
		}
		if p.IsPrefix() != strings.HasSuffix(string(p), "*") || !p.Covers(p) || p.Stem()+map[bool]string{true: "*"}[p.IsPrefix()] != string(p) {
			t.Fatalf("%q is made of %q", p, p.Stem())
		}
	})
}

func TestParseCaller(t *testing.T) {
	for _, c := range []struct{ text, domain, yes, no string }{
		{"spiffe://x.org/a", "x.org", "spiffe://x.org/a", "spiffe://x.org/a/b spiffe://x.org/A spiffe://x.org spiffe://x.or/a"},
		{"spiffe://x.org/a/*", "x.org", "spiffe://x.org/a/b spiffe://x.org/a/b/c", "spiffe://x.org/a spiffe://x.org/ab spiffe://y.org/a/b"},
		{"spiffe://x.org/*", "x.org", "spiffe://x.org/a spiffe://x.org/a/b", "spiffe://x.org spiffe://x.org.y/a spiffe://x.orgs/a"},
		{"spiffe://x.org", "x.org", "spiffe://x.org", "spiffe://x.org/a"},
	} {
		caller, err := ParseCaller(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if caller.String() != c.text || caller.TrustDomain().Name() != c.domain {
			t.Errorf("%s is %s of %s", c.text, caller, caller.TrustDomain())
		}
		for _, id := range strings.Fields(c.yes) {
			if !caller.Matches(id) {
				t.Errorf("%s does not match %s", caller, id)
			}
		}
		for _, id := range append(strings.Fields(c.no), "", "*") {
			if caller.Matches(id) {
				t.Errorf("%s matches %s", caller, id)
			}
		}
	}
	for _, bad := range []string{"", "*", "/*", "x.org/a", "spiffe://", "spiffe:///*", "spiffe://x.org/", "spiffe://x.org/a*", "spiffe://x.org/*/b",
		"spiffe://x.org/a/*/*", "spiffe://x.org/**", "spiffe://*/*", "spiffe://X.org/a", "spiffe://x.org/a//b", "spiffe://x.org/../a", "spiffe://x.org/a|b", "spiffe://x.org/a b"} {
		if caller, err := ParseCaller(bad); err == nil || caller != (Caller{}) {
			t.Errorf("%q is %q, %v", bad, caller, err)
		}
	}
}

func TestCaller(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("x.org")
	if c := CallersIn(td); c.String() != "spiffe://x.org/*" || c.TrustDomain() != td || c.Pattern().Stem() != "spiffe://x.org/" {
		t.Errorf("all of x.org are %s", c)
	}
	id := spiffeid.RequireFromPath(td, "/a")
	if c := CallerID(id); !c.Matches(id.String()) || c.Pattern().IsPrefix() || c.TrustDomain() != td {
		t.Errorf("%s is %s", id, c)
	}
	var nobody Caller
	for _, id := range []string{"", "*", "spiffe://x.org/a"} {
		if nobody.Matches(id) {
			t.Errorf("the zero caller matches %q", id)
		}
	}
	if !nobody.TrustDomain().IsZero() || nobody.String() != "" {
		t.Errorf("the zero caller is %q of %s", nobody, nobody.TrustDomain())
	}
}

func TestProblem(t *testing.T) {
	for want, p := range map[string]Problem{
		"is wrong":                     {Msg: "is wrong"},
		"f: is wrong":                  {Pos: Pos{File: "f"}, Msg: "is wrong"},
		"f:3: spec.to: is wrong":       {Pos: Pos{File: "f", Line: 3}, Field: "spec.to", Msg: "is wrong"},
		"f:3:4: no\n    hint: do this": {Code: "x", Pos: Pos{File: "f", Line: 3, Column: 4}, Msg: "no", Hint: "do this"},
	} {
		if got := p.String(); got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
	ps := Problems{
		{Pos: Pos{"b", 1, 1}, Msg: "6"}, {Pos: Pos{"a", 10, 1}, Msg: "5"}, {Pos: Pos{"a", 2, 2}, Msg: "4"},
		{Pos: Pos{"a", 2, 1}, Field: "y", Msg: "3"}, {Pos: Pos{"a", 2, 1}, Field: "x", Msg: "2"}, {Pos: Pos{"a", 2, 1}, Field: "x", Msg: "1"},
	}
	ps.Sort()
	var order []string
	for _, p := range ps {
		order = append(order, p.Msg)
	}
	if got := strings.Join(order, ""); got != "123456" {
		t.Errorf("sorted as %s", got)
	}
	if lines := strings.Split(ps.Error(), "\n"); len(lines) != 6 || lines[0] != "a:2:1: x: 1" {
		t.Errorf("%q", lines)
	}
}

// Every route asks for an operation that can be answered, and says where its resource is.
func TestRoutes(t *testing.T) {
	for _, p := range Protocols() {
		names, paths := map[string]bool{}, map[string]bool{}
		for _, r := range p.Routes() {
			if names[r.Name] || paths[r.Method+r.Path] {
				t.Errorf("%s: %s is there twice", p, r.Name)
			}
			names[r.Name], paths[r.Method+r.Path] = true, true
			implied := r.Operation == Discover || r.Operation == Enter
			if !implied && !slices.Contains(p.Operations(), r.Operation) {
				t.Errorf("%s: %s asks for %s, which no grant can name", p, r.Name, r.Operation)
			}
			if (r.Operation == Enter) != (r.Resource == NoResource) {
				t.Errorf("%s: %s is %s of %q", p, r.Name, r.Operation, r.Resource)
			}
			if path, isPath := strings.CutPrefix(string(r.Resource), "path:"); isPath && strings.Count(r.Path, "{name") != 1 {
				t.Errorf("%s: %s has no %s in %s", p, r.Name, path, r.Path)
			}
			if strings.HasPrefix(string(r.Resource), "body:") && r.Method != "POST" {
				t.Errorf("%s: %s has a body in a %s", p, r.Name, r.Method)
			}
		}
		for _, o := range p.Operations() {
			if !slices.Contains(Operations(), o) || !slices.ContainsFunc(p.Routes(), func(r Route) bool { return r.Operation == o }) {
				t.Errorf("%s: nothing asks for %s", p, o)
			}
		}
	}
	if Protocol("").Operations() != nil || Protocol("").Routes() != nil {
		t.Error("no protocol has routes")
	}
}
