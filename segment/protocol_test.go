package segment

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Every operation of a protocol can be asked for, and grants can name no other.
func TestOperations(t *testing.T) {
	for _, p := range Protocols() {
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

// A changed number is a changed API: look at the row again, and at docs/protocols.md.
func TestTables(t *testing.T) {
	var got strings.Builder
	for _, p := range Protocols() {
		n := map[Operation]int{}
		everything := 0
		for _, r := range p.Routes() {
			n[r.Operation]++
			if r.Resource == Everything {
				everything++
			}
		}
		fmt.Fprintf(&got, "%s %d:", p, len(p.Routes()))
		for _, o := range append(Operations(), Discover, Enter) {
			if n[o] > 0 {
				fmt.Fprintf(&got, " %s %d", o, n[o])
			}
		}
		fmt.Fprintf(&got, ", * %d\n", everything)
	}
	want := `OpenAI 152: Infer 49 Embed 3 Read 22 Write 19 Admin 46 Connect 7 Discover 1 Enter 5, * 105
Anthropic 60: Infer 4 Read 6 Write 4 Admin 44 Discover 1 Enter 1, * 55
Gemini 142: Infer 22 Embed 6 Read 24 Write 22 Admin 62 Connect 2 Discover 2 Enter 2, * 122
Chroma 33: Read 7 Write 4 Admin 11 Discover 2 Enter 9, * 7
Qdrant 132: Read 38 Write 18 Admin 64 Discover 4 Enter 8, * 26
Weaviate 66: Read 13 Write 15 Admin 30 Discover 1 Enter 7, * 32
Milvus 205: Read 32 Write 9 Admin 143 Discover 14 Enter 7, * 92
MCP 13: Read 4 Call 4 Enter 5, * 5
HTTP 7: Read 3 Write 4, * 0
GRPC 2: Call 1 Enter 1, * 0
TCP 1: Connect 1, * 1
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Error(diff)
	}
}

//go:embed testdata/requests.txt
var requests string

// Every request has the row that a person would look for, by a matcher that is plain to see.
func TestRequests(t *testing.T) {
	patterns := map[string]*regexp.Regexp{}
	for _, p := range Protocols() {
		for _, r := range p.Routes() {
			patterns[r.Path] = pattern(r.Path)
		}
	}
	n := 0
	for i, line := range strings.Split(requests, "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "#" {
			continue
		}
		n++
		path, method, _ := strings.Cut(f[2], "#")
		path, _, _ = strings.Cut(path, "?")
		got := []string{"-"}
		for _, r := range Protocol(f[0]).Routes() {
			if m := patterns[r.Path].FindStringSubmatch(path); m != nil && r.Method == f[1] && r.MCP == method {
				got = []string{r.Name}
				if r.Resource == PathName || r.Resource == PathID {
					got = append(got, m[1])
				}
				break
			}
		}
		if !slices.Equal(got, f[3:]) {
			t.Errorf("line %d: %q, not %q", i+1, got, f[3:])
		}
	}
	if n < 100 {
		t.Errorf("only %d requests", n)
	}
}

// pattern is a template as Envoy understands it, at an endpoint with tenant T and database D.
func pattern(path string) *regexp.Regexp {
	path = strings.NewReplacer("{tenant}", "T", "{database}", "D").Replace(path)
	expr := regexp.MustCompile(`\\\{[a-z]+(=\\\*\\\*)?\\\}`).ReplaceAllStringFunc(regexp.QuoteMeta(path), func(v string) string {
		one := "[^/]+"
		if strings.Contains(v, "=") {
			one = ".*"
		}
		if strings.HasPrefix(v, `\{name`) {
			one = "(" + one + ")"
		}
		return one
	})
	return regexp.MustCompile("^" + expr + "$")
}

// The first of two routes that one request fits is the one whose path is literal where they begin to differ, so that the
// order of rows doesn't hide one, nor say what nobody meant.
func TestReachable(t *testing.T) {
	for _, p := range Protocols() {
		routes := p.Routes()
		for j := range routes {
			for i := range j {
				a, b := &routes[i], &routes[j]
				if a.Method == b.Method && a.MCP == b.MCP && overlap(segments(a), segments(b)) && !before(segments(a), segments(b)) {
					t.Errorf("%s: %s (%s) takes requests of %s (%s)", p, a.Name, a.Path, b.Name, b.Path)
				}
			}
		}
	}
}

func segments(r *Route) []string { return strings.Split(r.Path, "/")[min(1, len(r.Path)):] }

// A segment of a template: {variable}, {variable}:verb, {variable=**}, or text.
func overlap(a, b []string) bool {
	for i := range max(len(a), len(b)) {
		switch {
		case i < len(a) && strings.HasSuffix(a[i], "=**}"), i < len(b) && strings.HasSuffix(b[i], "=**}"):
			return true
		case i >= len(a) || i >= len(b):
			return false
		}
		x, xVerb := variable(a[i])
		y, yVerb := variable(b[i])
		switch {
		case !x && !y && a[i] != b[i], x && !y && !strings.HasSuffix(b[i], xVerb), y && !x && !strings.HasSuffix(a[i], yVerb),
			x && y && !strings.HasSuffix(xVerb, yVerb) && !strings.HasSuffix(yVerb, xVerb):
			return false
		}
	}
	return true
}

// variable reports whether a segment is one, and what stands behind it.
func variable(segment string) (is bool, verb string) {
	if !strings.HasPrefix(segment, "{") {
		return false, ""
	}
	return true, segment[strings.Index(segment, "}")+1:]
}

// before reports whether a may stand before b, both of which some request fits: where they differ first, a says more.
func before(a, b []string) bool {
	says := func(s []string, i int) int {
		switch {
		case i >= len(s):
			return 4 // the end
		case !strings.HasPrefix(s[i], "{"):
			return 3
		case !strings.HasSuffix(s[i], "}"):
			return 2 // with a verb
		case !strings.HasSuffix(s[i], "=**}"):
			return 1
		}
		return 0
	}
	for i := range max(len(a), len(b)) {
		if x, y := says(a, i), says(b, i); x != y {
			return x > y
		}
	}
	return false
}

func TestOverlap(t *testing.T) {
	for _, test := range []struct {
		a, b            string
		overlap, before bool
	}{
		{"/a/b", "/a/b", true, false},
		{"/a/b", "/a/c", false, true},
		{"/a/b", "/a/{x}", true, true},
		{"/a/{x}", "/a/b", true, false},
		{"/a/{x}", "/a/{y}", true, false},
		{"/a/{x}", "/a/{x}/b", false, true},
		{"/a/{x}:v", "/a/{y}", true, true},
		{"/a/{x}:v", "/a/{y}:w", false, false},
		{"/a/{x}:v", "/a/b", false, false},
		{"/a/{x}:v", "/a/b:v", true, false},
		{"/a/b/{x}", "/a/{y}/c", true, true},
		{"/a/{y}/c", "/a/b/{x}", true, false},
		{"/a/{x=**}", "/a/b/c", true, false},
		{"/a/{x}/b", "/a/{x=**}", true, true},
		{"/a/{x=**}", "/b/{x=**}", false, false},
	} {
		a, b := segments(&Route{Path: test.a}), segments(&Route{Path: test.b})
		if overlap(a, b) != test.overlap || overlap(b, a) != test.overlap {
			t.Errorf("%s and %s: overlap is %t", test.a, test.b, !test.overlap)
		}
		if test.overlap && before(a, b) != test.before {
			t.Errorf("%s before %s: %t", test.a, test.b, !test.before)
		}
	}
}

// A table says what it means, or nothing at all.
func TestParseTable(t *testing.T) {
	got, err := parseTable(Milvus, `
# a comment
$P = /p
$Q = $P/q    Read # another
one-two  POST  $Q  body:n  also=a,b also1=c also3=d,e same2=f db=body:x=y  # why
three    POST  /S/M  Write  grpc:1=2.1!3  grpc
v        GET   /(v1|v2)/{name}:x  Enter  -  catalog
`)
	if err != nil {
		t.Fatal(err)
	}
	want := []Route{
		{Name: "one-two", Method: "POST", Path: "/p/q", Operation: Read, Resource: "body:n", Database: "body:x=y",
			Also: []string{"a", "b"}, AlsoAt: map[int][]string{1: {"c"}, 3: {"d", "e"}}, SameAt: map[int][]string{2: {"f"}}},
		{Name: "three", Method: "POST", Path: "/S/M", Operation: Write, Resource: "grpc:1=2.1!3", Kind: Unary},
		{Name: "v-v1", Method: "GET", Path: "/v1/{name}:x", Operation: Enter, Answer: FromCatalog},
		{Name: "v-v2", Method: "GET", Path: "/v2/{name}:x", Operation: Enter, Answer: FromCatalog},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for text, want := range map[string]string{
		"a GET /a Read":                         "4 columns",
		"A GET /a Read *":                       "lower-case words",
		"a GET /a Read *\na GET /b Read *":      "another row has this name",
		"a GET a Read *":                        "no template",
		"a GET /a/{x=**}/b Read *":              "no template",
		"a GET /a*b Read *":                     "no template",
		"a GET /a?b Read *":                     "no template",
		"a TRACE /a Read *":                     "the method is none of",
		"a - - Read *":                          "TCP has no method",
		"a GET /a Infer *":                      "no operation \"Infer\"",
		"a GET /a Enter *":                      "if its operation is Enter",
		"a GET /a Read -":                       "if its operation is Enter",
		"a GET /a Read * nothing":               "unknown flag",
		"a GET /a Read * catalog catalog":       "second of its kind",
		"a POST /a/b Enter - grpc stream":       "second of its kind",
		"a GET /a Read * mcp=tools/call":        "belongs to MCP",
		"a POST /a Read * also=x":               "everything is needed already",
		"a POST /a Read body:n also=":           "unknown flag",
		"a POST /a Read body:n also=x,":         "no list of keys",
		"a POST /a Read body:n also=x also=y":   "second of its kind",
		"a POST /a Read body:n also0=x":         "no depth",
		"a POST /a Read body:n also1=x also1=x": "there twice",
		"a POST /a Read body:n never1=x":        "unknown flag",
		"a POST /a Read body:n same1=n":         "the same as itself",
		"a GET /{name} Read path:name also1=x":  "not there",
		"a GET /a Read body:n":                  "no name can be at",
		"a POST /a Read body:n=m":               "no name can be at",
		"a POST /a Read body:":                  "no name can be at",
		"a GET /a Read query:a-b":               "no name can be at",
		"a GET /a Read path:name":               "no name can be at",
		"a GET /{other} Read path:name":         "no name can be at",
		"a GET /a Read path":                    "no name can be at",
		"a GET /a Read elsewhere":               "no name can be at",
		"a POST /a Read mcp:name":               "no name can be at",
		"a POST /a/b Read grpc:1":               "no name can be at",
		"a POST /a/b Read grpc:0 grpc":          "no name can be at",
		"a POST /a/b Read grpc:1.2* grpc":       "no name can be at",
		"a POST /a/b Read grpc:1! grpc":         "no name can be at",
		"a POST /a/b Read grpc:1=2!!3 grpc":     "no name can be at",
		"a POST /a/b Read grpc:1 stream":        "no name can be at",
		"a POST /a/b Read * grpc db=grpc:1!2":   "no name can be at",
		"a POST /a Read * db=path:name":         "no name can be at",
		"a POST /a Read * grpc":                 "a call of gRPC",
		"a GET /a/b Read * grpc":                "a call of gRPC",
		"a POST /a Read * websocket":            "RFC 6455",
		"a GET $X Read *":                       "$X is not defined",
		"$X = /a\n$X = /b":                      "columns of at least 5",
		"$x = /a":                               "not defined",
	} {
		if got, err := parseTable(Milvus, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; wanted %s", text, got, err, want)
		}
	}
	if _, err := parseTable(Qdrant, "a POST /a Read * db=body:x"); err == nil {
		t.Error("Qdrant has no databases")
	}
	if _, err := readTable("Nothing"); err == nil {
		t.Error("there is no such table")
	}
}

func TestFields(t *testing.T) {
	got, ok := Source("grpc:3=5.3!4!2.1*.8").Fields()
	want := Fields{
		Name:  FieldPath{{Number: 3}},
		Same:  []FieldPath{{{Number: 5}, {Number: 3}}},
		Other: []FieldPath{{{Number: 4}}, {{Number: 2}, {Number: 1, Nested: true}, {Number: 8}}},
	}
	if diff := cmp.Diff(want, got); diff != "" || !ok {
		t.Error(diff)
	}
	if text := want.Other[1].String(); text != "2.1*.8" {
		t.Errorf("it says %s", text)
	}
	for _, s := range []Source{"", "*", "path:name", "grpc:", "grpc:a", "grpc:01", "grpc:+1", "grpc:-1", "grpc:1..2", "grpc:.1", "grpc:1*", "grpc:1=", "grpc:!1",
		"grpc:536870912", "grpc:1 ", "grpc:1**.2", "grpc:99999999999999999999"} {
		if f, ok := s.Fields(); ok {
			t.Errorf("%q: %v", s, f)
		}
	}
	if keys := Source("body:dbName=newDbName").Keys(); !slices.Equal(keys, []string{"dbName", "newDbName"}) {
		t.Errorf("keys: %q", keys)
	}
	if keys := PathName.Keys(); keys != nil {
		t.Errorf("keys: %q", keys)
	}
}
