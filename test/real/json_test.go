package real

import (
	"archive/zip"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"sallyport.dev/telemetry"
)

// suite is what parsers of JSON are tried with everywhere: https://github.com/nst/JSONTestSuite, test_parsing, as of
// 1ef36fa01286573e846ac449e8683f8833c5b26a, by Nicolas Seriot under the MIT license, which is in the archive. A name that begins
// with "y" must be read, one with "n" must not, and about one with "i" parsers differ.
func suite(t testing.TB) map[string]string {
	t.Helper()
	archive, err := zip.OpenReader("testdata/JSONTestSuite.zip")
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	files := map[string]string{}
	for _, f := range archive.File {
		name, ok := strings.CutPrefix(f.Name, "test_parsing/")
		if !ok {
			continue
		}
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(text)
	}
	if len(files) != 318 {
		t.Fatalf("the suite has %d files", len(files))
	}
	return files
}

// TestJSONTestSuite sends each file of the suite in bodies of four kinds. Whatever is let through is about the model that was
// judged to all who might read it: Go's encoding/json, Python's json, and the model server itself, llama.cpp. What must be read
// is not refused.
func TestJSONTestSuite(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "suite")
	kinds := []string{`%s`, `{"model":"m","input":"a","x":%s}`, `{"x":%s,"input":"a","model":"m"}`, `{"input":"a","model":%s}`}
	callers := map[version]*caller{http1: u.as(t, "/suite", http1), http2: u.as(t, "/suite", http2)}
	var through []string
	ids := map[string]string{} // of requests, by body
	for name, text := range suite(t) {
		for i, kind := range kinds {
			body := fmt.Sprintf(kind, text)
			a := callers[[]version{http1, http2}[i%2]].post(t, "suite", "/v1/embeddings", body)
			got := b.taken()
			switch {
			case a.err != nil || a.status != http.StatusOK && a.status != http.StatusBadRequest:
				t.Errorf("%s in %s: %v", name, kind, a)
			case (a.status == http.StatusOK) != (len(got) == 1 && got[0].body == body):
				t.Errorf("%s in %s: %v, and the backend got %.300v", name, kind, a, got)
			case a.status == http.StatusOK:
				through = append(through, body)
				ids[body] = a.id()
			case name[0] == 'y' && (i == 1 || i == 2):
				t.Errorf("%s in %s is good: %v", name, kind, a)
			}
		}
	}
	slices.Sort(through)
	flows := map[string]telemetry.Flow{}
	for _, f := range u.flows(t, len(through), func(f telemetry.Flow) bool { return f.Endpoint == "suite" && f.Verdict == telemetry.Allowed }) {
		flows[f.ID] = f
	}
	if len(through) < 200 {
		t.Errorf("only %d bodies were let through", len(through))
	}
	for name, read := range map[string]func(t *testing.T, bodies []string) []string{"Go": readByGo, "Python": readByPython, "llama.cpp": readByServer} {
		t.Run(name, func(t *testing.T) {
			refused := 0
			for i, model := range read(t, through) {
				judged := flows[ids[through[i]]].Resource
				switch {
				case model == refusedByReader:
					refused++
				case judged == "" || model != judged:
					t.Errorf("%.300q is judged to be about %q, and read as %q", through[i], judged, model)
				}
			}
			t.Logf("%d bodies read alike, %d are not read at all", len(through)-refused, refused)
			if refused > len(through)/10 {
				t.Errorf("%d of %d bodies are not read at all: that shows little", refused, len(through))
			}
		})
	}
}

// refusedByReader stands for the model of a body that a reader does not take.
const refusedByReader = "\x00refused"

func readByGo(_ *testing.T, bodies []string) []string {
	models := make([]string, len(bodies))
	for i, body := range bodies {
		var asked struct{ Model string }
		if json.Unmarshal([]byte(body), &asked) != nil {
			asked.Model = refusedByReader
		}
		models[i] = asked.Model
	}
	return models
}

const readingInPython = `
import base64, json, sys
for line in sys.stdin:
    try:
        asked = json.loads(base64.b64decode(line))
        print(json.dumps(asked["model"]))
    except (ValueError, RecursionError):
        print("null")
`

func readByPython(t *testing.T, bodies []string) []string {
	var in bytes.Buffer
	for _, body := range bodies {
		fmt.Fprintln(&in, base64.StdEncoding.EncodeToString([]byte(body)))
	}
	cmd := exec.CommandContext(t.Context(), "../../.parts/venv/bin/python", "-c", readingInPython)
	cmd.Stdin = &in
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var models []string
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var model *string
		if err := dec.Decode(&model); err != nil {
			t.Fatal(err)
		}
		if model == nil {
			model = new(refusedByReader)
		}
		models = append(models, *model)
	}
	if len(models) != len(bodies) {
		t.Fatalf("%d answers about %d bodies", len(models), len(bodies))
	}
	return models
}

// readByServer asks llama.cpp, whose answers say what model was asked.
func readByServer(t *testing.T, bodies []string) []string {
	python, err := filepath.Abs("../../.parts/venv/bin/python")
	if err != nil {
		t.Fatal(err)
	}
	address := startPart(t, "/health", python, "../../examples/rag/servers/llm_server.py", "--port")
	models := make([]string, len(bodies))
	for i, body := range bodies {
		resp, err := http.Post("http://"+address+"/v1/embeddings", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		a := read(resp)
		var told struct{ Model string }
		switch {
		case a.status == http.StatusBadRequest || a.status == http.StatusInternalServerError:
			told.Model = refusedByReader
		case a.status != http.StatusOK || json.Unmarshal([]byte(a.body), &told) != nil:
			t.Fatalf("%.300q: %v", body, a)
		}
		models[i] = told.Model
	}
	return models
}

// TestBodiesAsDecodersReadThem changes bodies in ways that nobody thought of, and has the gateway agree with Go's decoder and
// with the rules that it says it has. The caller is granted one model, so what is let through has been judged to be about that
// one. `make fuzz` goes on for $FUZZTIME. Go's own fuzzing sees nothing of what Envoy does, and is forty times slower here.
func TestBodiesAsDecodersReadThem(t *testing.T) {
	t.Parallel()
	var all, good []string // good: those that are let through
	for _, text := range suite(t) {
		if len(text) < 500 {
			all = append(all, text, `{"model":"m","x":`+text+`}`, `{"x":`+text+`,"model":"m"}`)
		}
	}
	for _, c := range slices.Concat(ambiguous, exactly) {
		if len(c.body) < 500 {
			all = append(all, c.body)
		}
	}
	u, _ := shared(t, "fuzzed")
	who := u.as(t, "/fuzzed", http2)
	random := rand.New(rand.NewPCG(rand.Uint64(), 0)) // a body that is told says all
	tried, through := 0, 0
	try := func(body string) (passed bool) {
		tried++
		a := who.post(t, "fuzzed", "/v1/score", body)
		passed = a.status == http.StatusOK
		switch about := isAbout([]byte(body), "m"); {
		case a.err != nil || !passed && a.status != http.StatusBadRequest && a.status != http.StatusForbidden:
			t.Fatalf("%q: %v", body, a)
		case passed && !about:
			t.Fatalf("%q is let through, and is not about m alone", body)
		case !passed && about && isStrict([]byte(body)):
			t.Fatalf("%q is good, and gets %v", body, a)
		case passed:
			through++
		}
		return passed
	}
	for _, body := range all {
		if try(body) {
			good = append(good, body)
		}
	}
	end := time.Now()
	if limit := os.Getenv("FUZZTIME"); limit != "" {
		end = end.Add(durationOf(t, limit))
	}
	for n := 0; n < 500 || time.Now().Before(end); n++ {
		body := good[random.IntN(len(good))]
		for range 1 + random.IntN(2) {
			body = changedBody(random, body, all)
		}
		try(body)
	}
	t.Logf("%d bodies, of which %d were let through", tried, through)
	if through < tried/20 {
		t.Error("so few that it shows little")
	}
}

// tokens are what bodies are changed with.
var tokens = []string{`"model"`, `"m"`, `"o"`, `"model":"o"`, `"model":"m"`, `"Model":"o"`, `"mod\u0065l":"o"`, `"\u006d"`, `{`, `}`, `[`, `]`, `,`, `:`, `"`, `\`, `\"`, `\u`, `\ud800`, `\u0000`,
	"\x00", "\t", "\n", " ", "\u00a0", "\u2028", "\ufeff", "\xff", "\xc0", "\xed\xa0\x80", "é", "ſ", `null`, `true`, `1e9`, `-0`, `0.1`, `//`, `/*`, `*/`, `#`, `'`, `NaN`, `1`, `{"model":"o"}`, `["model"]`}

// changedBody is a body with something put in, taken out, doubled or replaced.
func changedBody(random *rand.Rand, body string, others []string) string {
	i := random.IntN(len(body) + 1)
	j := min(len(body), i+random.IntN(12))
	switch random.IntN(6) {
	case 0:
		return body[:i] + body[j:]
	case 1:
		return body[:i] + body[i:j] + body[i:]
	case 2:
		other := others[random.IntN(len(others))]
		return body[:i] + other[random.IntN(len(other)+1):]
	case 3:
		return body[:i] + string([]byte{byte(random.Uint32())}) + body[j:]
	}
	return body[:i] + tokens[random.IntN(len(tokens))] + body[[]int{i, j}[random.IntN(2)]:]
}

// isAbout reports whether every decoder reads the body as one JSON object about this model: the one that looks at letter case
// and the one that does not, the one that takes the first of several values and the one that takes the last.
func isAbout(body []byte, model string) bool {
	var folded struct{ Model string }
	var exact map[string]json.RawMessage
	if json.Unmarshal(body, &folded) != nil || json.Unmarshal(body, &exact) != nil || folded.Model != model || string(exact["model"]) != `"`+model+`"` {
		return false
	}
	named := 0
	for key := range keysOf(body) {
		if strings.EqualFold(key, "model") {
			named++
		}
	}
	return named == 1
}

// keysOf yields the keys of the object that the body is.
func keysOf(body []byte) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		dec := json.NewDecoder(bytes.NewReader(body))
		_, _ = dec.Token()
		for dec.More() {
			key, err := dec.Token()
			text, ok := key.(string)
			if err != nil || !ok || !yield(text) {
				return
			}
			var value json.RawMessage
			if dec.Decode(&value) != nil {
				return
			}
		}
	}
}

// deepestBody is how deep objects and arrays may be in one another.
const deepestBody = 64

// isStrict reports whether a body that Go reads is one that the gateway must read, too: UTF-8, no half of a surrogate pair, no
// escape in a key beside the model's, and not too deep.
func isStrict(body []byte) bool {
	if !utf8.Valid(body) || bytes.Contains(body, []byte(`\u`)) || bytes.Contains(body, []byte(`\`)) && escapedKey(body) {
		return false
	}
	deep, deepest := 0, 0
	for dec := json.NewDecoder(bytes.NewReader(body)); ; {
		token, err := dec.Token()
		if err != nil {
			return deepest <= deepestBody
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			deep++
			deepest = max(deepest, deep)
		case json.Delim('}'), json.Delim(']'):
			deep--
		}
	}
}

// escapedKey reports whether a key of the object may be written with an escape, as far as it matters here.
func escapedKey(body []byte) bool {
	for key := range keysOf(body) {
		if !bytes.Contains(body, []byte(`"`+key+`"`)) {
			return true
		}
	}
	return bytes.Contains(body, []byte(`\"`)) // which could make a key look as if it stood there
}
