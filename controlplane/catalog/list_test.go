package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// Each route that a table gives to the catalogue is answered, and no other.
func TestAnswersAreTheTables(t *testing.T) {
	for _, p := range segment.Protocols() {
		var marked []string
		for _, r := range p.Routes() {
			if r.Answer == segment.FromCatalog {
				marked = append(marked, r.Name)
			}
		}
		slices.Sort(marked)
		if diff := cmp.Diff(marked, slices.Sorted(maps.Keys(answers[p]))); diff != "" {
			t.Errorf("%s: the table (-) and the catalogue (+) differ:\n%s", p, diff)
		}
	}
}

// upstream is a server whose answers are as the real ones' that were recorded, at paths of any protocol, over HTTP/1.1 and
// HTTP/2. A path that it does not know is not found.
type upstream map[string]string

func (u upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	at := r.URL.Path
	if r.URL.RawQuery != "" {
		at += "?" + r.URL.RawQuery
	}
	if r.URL.Path == "/mcp" {
		at += " " + r.Header.Get("mcp-method")
	}
	body, ok := u[at]
	if !ok {
		http.NotFound(w, r)
		return
	}
	if r.Header.Get("content-type") == grpcContent {
		w.Header().Set("content-type", grpcContent)
		w.Header().Set("trailer", "grpc-status")
		_, _ = w.Write(framed([]byte(body)))
		w.Header().Set("grpc-status", "0")
		return
	}
	w.Header().Set("content-type", "application/json")
	_, _ = io.WriteString(w, body)
}

// listing is a catalogue in front of a server.
type listing struct {
	t        *testing.T
	catalog  *Catalog
	endpoint segment.Endpoint
}

const reader = "spiffe://example.org/reader"

func newListing(t *testing.T, p segment.Protocol, server http.Handler) *listing {
	t.Helper()
	return &listing{t: t, catalog: &Catalog{Log: slog.New(slog.DiscardHandler)}, endpoint: segment.Endpoint{
		Name: "it", Protocol: p, Backends: []segment.Backend{serving(t, server)}, Database: segment.Database{Name: "default"}}}
}

// serving is a backend that speaks gRPC too, in plain text.
func serving(t *testing.T, server http.Handler) segment.Backend {
	t.Helper()
	s := overBoth(server)
	t.Cleanup(s.Close)
	b := behindAddress(t, s, segment.BackendTLS{Mode: segment.TLSNone})
	b.GRPC = b.Addresses
	return b
}

func overBoth(h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	return s
}

// grants puts grants in force.
func (l *listing) grants(grants ...segment.Grant) *listing {
	cfg := segment.Config{Endpoints: []segment.Endpoint{l.endpoint}, Grants: grants}
	for i := range cfg.Grants {
		cfg.Grants[i].Name = segment.GrantName(fmt.Sprintf("g%03d", i))
	}
	g := &controlplane.Generation{Config: cfg, Policy: authz.Compile(&cfg, time.Unix(0, 0))}
	_ = l.catalog.Publish(context.Background(), g)
	return l
}

// allow puts one grant in force, for all operations.
func (l *listing) allow(resources ...segment.Pattern) *listing {
	return l.grants(grant(segment.Allow, l.endpoint.Protocol.Operations(), resources...))
}

func grant(effect segment.Effect, ops []segment.Operation, resources ...segment.Pattern) segment.Grant {
	return segment.Grant{Effect: effect, Mode: segment.Enforce, From: []segment.Caller{segment.CallerID(spiffeid.RequireFromString(reader))},
		To: []segment.Target{{Endpoint: "it", Operations: ops, Resources: resources}}}
}

// ask asks as a gateway does.
func (l *listing) ask(route, at, body string) *httptest.ResponseRecorder {
	method := http.MethodPost
	if body == "" {
		method = http.MethodGet
	}
	r := httptest.NewRequest(method, at, strings.NewReader(body))
	r.Header.Set(envoy.CallerHeader, reader)
	r.Header.Set(envoy.EndpointHeader, "it")
	r.Header.Set(envoy.RouteHeader, route)
	r.Header.Set("x-request-id", "r-1")
	w := httptest.NewRecorder()
	l.catalog.ServeHTTP(w, r)
	return w
}

// answers reports what is not exactly this answer.
func (l *listing) answers(route, at, body string, code int, want string) {
	l.t.Helper()
	w := l.ask(route, at, body)
	var got, wanted any
	if err := json.Unmarshal([]byte(want), &wanted); err != nil {
		l.t.Fatal(err)
	}
	_ = json.Unmarshal(w.Body.Bytes(), &got)
	if diff := cmp.Diff(wanted, got); w.Code != code || diff != "" {
		l.t.Errorf("%s %s %s: %d %s\n%s", route, at, body, w.Code, w.Body, diff)
	}
}

func TestAnthropic(t *testing.T) {
	model := func(id string) string {
		return `{"type":"model","id":"` + id + `","display_name":"Model","created_at":"2026-02-04T00:00:00Z","max_tokens":128000}`
	}
	l := newListing(t, segment.Anthropic, upstream{
		"/v1/models?limit=1000": `{"data":[` + model("m-5") + `,` + model("secret-4") + `,` + model("m-4") +
			`],"has_more":true,"first_id":"m-5","last_id":"m-4"}`,
		"/v1/models?limit=1000&after_id=m-4": `{"data":[` + model("m-3") + `,` + model("secret-3") + `,` + model("m-5") +
			`,{"object":"model","id":"m-2","created":1,"owned_by":"vllm"}],"has_more":false,"first_id":"m-3","last_id":"secret-3"}`,
	}).allow("m-*")
	page := func(more bool, ids ...string) string {
		var all []string
		for _, id := range ids {
			if id == "m-2" { // as vLLM tells
				all = append(all, `{"type":"model","id":"m-2","display_name":"m-2","created_at":"1970-01-01T00:00:00Z"}`)
				continue
			}
			all = append(all, model(id))
		}
		first, last := "null", "null"
		if len(ids) > 0 {
			first, last = `"`+ids[0]+`"`, `"`+ids[len(ids)-1]+`"`
		}
		return fmt.Sprintf(`{"data":[%s],"has_more":%t,"first_id":%s,"last_id":%s}`, strings.Join(all, ","), more, first, last)
	}
	for query, want := range map[string]string{
		"":                          page(false, "m-5", "m-4", "m-3", "m-2"),
		"?limit=2":                  page(true, "m-5", "m-4"),
		"?limit=2&beta=true":        page(true, "m-5", "m-4"),
		"?limit=2&after_id=m-4":     page(false, "m-3", "m-2"),
		"?limit=1&after_id=m-4":     page(true, "m-3"),
		"?after_id=m-2":             page(false),
		"?limit=2&before_id=m-2":    page(true, "m-4", "m-3"),
		"?limit=2&before_id=m-3":    page(false, "m-5", "m-4"),
		"?limit=9999&before_id=m-5": page(false),
	} {
		l.answers("list-models", "/v1/models"+query, "", 200, want)
	}
	l.answers("retrieve-model", "/v1/models/m-3", "", 200, model("m-3"))

	// What is hidden is not there: neither as a place nor as a model.
	wrong := func(why string) string {
		return `{"type":"error","error":{"type":"invalid_request_error","message":` + string(quoted(why)) + `},"request_id":"r-1"}`
	}
	for _, name := range []string{"secret-4", "no-such"} {
		why := `The page that is asked for begins or ends at "` + name + `", which is not in this list.`
		l.answers("list-models", "/v1/models?after_id="+name, "", 400, wrong(why))
		l.answers("list-models", "/v1/models?before_id="+name, "", 400, wrong(why))
		l.answers("retrieve-model", "/v1/models/"+name, "", 404, `{"type":"error","error":{"type":"not_found_error","message":"There is no model \"`+name+`\" here."},"request_id":"r-1"}`)
	}
	l.answers("list-models", "/v1/models?after_id=m-5&before_id=m-2", "", 400, wrong("after_id and before_id exclude each other."))
	for _, limit := range []string{"0", "-1", "x", "1e3"} {
		l.answers("list-models", "/v1/models?limit="+limit, "", 400, wrong("limit is no number from 1 on."))
	}
	if w := l.ask("list-models", "/v1/models?limit=0", ""); w.Header().Get("request-id") != "r-1" {
		t.Errorf("headers of an error: %v", w.Header())
	}

	l.endpoint.Models = []segment.Model{{Name: "m-1", Aliases: []string{"m-one", "other"}}}
	l.allow("m-*").answers("list-models", "/v1/models", "", 200, `{"data":[
		{"type":"model","id":"m-1","display_name":"m-1","created_at":"1970-01-01T00:00:00Z"},
		{"type":"model","id":"m-one","display_name":"m-one","created_at":"1970-01-01T00:00:00Z"}],"has_more":false,"first_id":"m-1","last_id":"m-one"}`)
}

func TestGemini(t *testing.T) {
	model := func(id string) string {
		return `{"name":"models/` + id + `","version":"001","displayName":"Gemini","inputTokenLimit":1048576,"supportedGenerationMethods":["generateContent"]}`
	}
	l := newListing(t, segment.Gemini, upstream{
		"/v1/models?pageSize=1000":                    `{"models":[` + model("g-1") + `,` + model("secret") + `],"nextPageToken":"A+b="}`,
		"/v1/models?pageSize=1000&pageToken=A%2Bb%3D": `{"models":[` + model("g-2") + `,{"name":"tunedModels/g-4"},{"name":"models/"},` + model("g-3") + `]}`,
		"/v1beta/models?pageSize=1000":                `{"models":[` + model("g-9") + `]}`,
	}).allow("g-*")
	for at, want := range map[string]string{
		"/v1/models":                          `{"models":[` + model("g-1") + `,` + model("g-2") + `,` + model("g-3") + `]}`,
		"/v1/models?pageSize=2":               `{"models":[` + model("g-1") + `,` + model("g-2") + `],"nextPageToken":"g-2"}`,
		"/v1/models?pageSize=2&pageToken=g-2": `{"models":[` + model("g-3") + `]}`,
		"/v1/models?pageToken=g-3":            `{"models":[]}`,
	} {
		l.answers("list-models-v1", at, "", 200, want)
	}
	l.answers("list-models-v1beta", "/v1beta/models", "", 200, `{"models":[`+model("g-9")+`]}`)
	l.answers("retrieve-model-v1beta", "/v1beta/models/g-9", "", 200, model("g-9"))
	l.answers("retrieve-model-v1", "/v1/models/g-9", "", 404, `{"error":{"code":404,"status":"NOT_FOUND","message":"There is no model \"g-9\" here. (request r-1)"}}`)
	if w := l.ask("list-models-v1", "/v1/models?pageToken=secret", ""); w.Code != 400 {
		t.Errorf("a hidden name as a token: %d %s", w.Code, w.Body)
	}
	l.endpoint.Models = []segment.Model{{Name: "g-7"}, {Name: "h"}}
	l.allow("g-*").answers("list-models-v1", "/v1/models", "", 200, `{"models":[{"name":"models/g-7","displayName":"g-7"}]}`)
}

func TestOpenAI(t *testing.T) {
	l := newListing(t, segment.OpenAI, upstream{"/v1/models": `{"object":"list","data":[{"id":"b","object":"model","created":1,"owned_by":"x"},
		{"id":"secret"},{"id":"b"},{"id":""},{"ID":"c"},{"id":"a","Id":"secret"},5,{"id":5},{}],"models":[{"name":"secret"}]}`}).
		grants(grant(segment.Allow, segment.OpenAI.Operations(), "*"), grant(segment.Deny, segment.OpenAI.Operations(), "secret"))
	l.answers("list-models", "/v1/models", "", 200, `{"object":"list","data":[{"id":"b","object":"model","created":0,"owned_by":"it"}]}`)
}

func TestQdrant(t *testing.T) {
	l := newListing(t, segment.Qdrant, upstream{
		"/collections": `{"result":{"collections":[{"name":"public-b"},{"name":"secret"},{"name":"public-a"}]},"status":"ok","time":0.000012}`}).allow("public-*")
	l.answers("list-collections", "/collections", "", 200,
		`{"result":{"collections":[{"name":"public-a"},{"name":"public-b"}]},"status":"ok","time":0}`)
	l.grants().answers("list-collections", "/collections", "", 200, `{"result":{"collections":[]},"status":"ok","time":0}`)
}

func TestMilvus(t *testing.T) {
	l := newListing(t, segment.Milvus, upstream{"/v2/vectordb/collections/list": `{"code":0,"data":["public_b","secret","public_a"]}`}).allow("public*")
	l.answers("list-collections", "/v2/vectordb/collections/list", `{}`, 200, `{"code":0,"data":["public_a","public_b"]}`)
	l = newListing(t, segment.Milvus, upstream{"/v2/vectordb/collections/list": `{"code":800,"message":"database not found"}`}).allow("*")
	l.answers("list-collections", "/v2/vectordb/collections/list", `{}`, 503, `{"code":503,"message":"the backend can't be reached (request r-1)"}`)
}

func TestWeaviate(t *testing.T) {
	l := newListing(t, segment.Weaviate, upstream{"/v1/schema": `{"classes":[
		{"class":"Secret","properties":[{"name":"owner","dataType":["Public"]}]},
		{"class":"Public","description":"d","vectorizer":"none","properties":[
			{"name":"title","dataType":["text"],"tokenization":"word"},
			{"name":"hidden","dataType":["Secret"]},
			{"name":"either","dataType":["Secret","Public"]},
			{"name":"shifty","dataType":["text"],"datatype":["Secret"]},
			{"name":"odd","dataType":"Secret"},
			{"name":"spelt","dataType":["secret class"]},
			{"name":"deep","dataType":["object"],"nestedProperties":[{"name":"n","dataType":["int[]"]},{"name":"r","dataType":["Secret"]}]},
			{"name":"broken","dataType":["object"],"nestedProperties":5}]},
		{"class":"Public2","properties":5},
		{"class":"Public3","Properties":[{"name":"hidden","dataType":["Secret"]}]},
		{"class":"Pub-lic"},{"class":"public"},{"class":"Public4","Class":"Secret"},
		{"class":"Pub","properties":null}]}`}).allow("Pub*", "public")
	l.answers("list-collections", "/v1/schema", "", 200, `{"classes":[
		{"class":"Pub","properties":[]},
		{"class":"Public","description":"d","vectorizer":"none","properties":[
			{"name":"title","dataType":["text"],"tokenization":"word"},
			{"name":"either","dataType":["Public"]},
			{"name":"deep","dataType":["object"],"nestedProperties":[{"name":"n","dataType":["int[]"]}]}]}]}`)
}

// What a server says besides a list that can be read is passed on to nobody.
func TestOddAnswers(t *testing.T) {
	for _, l := range []struct {
		protocol         segment.Protocol
		route, at, body  string
		there            string
		beyond, unlisted string
	}{
		{segment.OpenAI, "list-models", "/v1/models", "", "/v1/models", `{"data":{}}`, `{"data":["secret"]}`},
		{segment.Anthropic, "list-models", "/v1/models", "", "/v1/models?limit=1000", `{"data":[],"has_more":"secret"}`, `{"data":[{"id":["secret"]}]}`},
		{segment.Anthropic, "list-models", "/v1/models", "", "/v1/models?limit=1000", `{"data":[],"has_more":true,"last_id":"secret"}`, `{}`},
		{segment.Gemini, "list-models-v1", "/v1/models", "", "/v1/models?pageSize=1000", `{"models":"secret"}`, `{"models":[{"name":"secret"}]}`},
		{segment.Qdrant, "list-collections", "/collections", "", "/collections", `{"result":["secret"]}`, `{"status":{"error":"secret"}}`},
		{segment.Weaviate, "list-collections", "/v1/schema", "", "/v1/schema", `{"classes":"Secret"}`, `{"classes":[{"name":"Secret"}]}`},
		{segment.Milvus, "list-collections", "/v2/vectordb/collections/list", "{}", "/v2/vectordb/collections/list", `{"code":0,"data":[{"a":"secret"}]}`, `{"code":200,"secret":["secret"]}`},
		{segment.MCP, "list-tools", "/mcp", listTools, "/mcp tools/list", `{"jsonrpc":"2.0","id":2,"result":{"tools":[{"name":"secret"}]}}`,
			`{"jsonrpc":"2.0","id":1,"result":{"tools":[{"title":"secret"}],"secret":[1],"_meta":{"secret":1},"resultType":"complete"}}`},
	} {
		for _, answer := range []string{l.beyond, `[]`, `"secret"`, `{"secret"`, ``} {
			w := newListing(t, l.protocol, upstream{l.there: answer}).allow("*").ask(l.route, l.at, l.body)
			if w.Code != http.StatusServiceUnavailable || strings.Contains(w.Body.String(), "ecret") {
				t.Errorf("%s, told %s: %d %s", l.protocol, answer, w.Code, w.Body)
			}
		}
		if w := newListing(t, l.protocol, upstream{l.there: l.unlisted}).allow("*").ask(l.route, l.at, l.body); w.Code != 200 || strings.Contains(w.Body.String(), "ecret") {
			t.Errorf("%s, told %s: %d %s", l.protocol, l.unlisted, w.Code, w.Body)
		}
		if w := newListing(t, l.protocol, http.NotFoundHandler()).allow("*").ask(l.route, l.at, l.body); w.Code != http.StatusServiceUnavailable {
			t.Errorf("%s, not found: %d %s", l.protocol, w.Code, w.Body)
		}
	}
}

func TestListsEnd(t *testing.T) {
	endless := func(page string) http.HandlerFunc {
		n := 0
		return func(w http.ResponseWriter, _ *http.Request) { n++; fmt.Fprintf(w, page, n) }
	}
	many := strings.Repeat(`{"name":"models/m"},`, 50_000) + `{}`
	for what, page := range map[string]string{
		"pages":     `{"models":[],"nextPageToken":"%d"}`,
		"items":     `{"models":[` + many + `],"nextPageToken":"%d"}`,
		"bytes":     `{"models":[{"name":"models/m","x":"` + strings.Repeat("x", 8<<20) + `"}],"nextPageToken":"%d"}`,
		"one token": `{"models":[],"nextPageToken":"t","n":%d}`,
	} {
		if w := newListing(t, segment.Gemini, endless(page)).allow("*").ask("list-models-v1", "/v1/models", ""); w.Code != http.StatusServiceUnavailable {
			t.Errorf("without end of %s: %d", what, w.Code)
		}
	}
}

// A filtered list is exactly what the caller may see of what there is, whatever there is and whatever the grants are.
func TestFilteredListsAreTheAllowedSubsets(t *testing.T) {
	type list struct {
		protocol        segment.Protocol
		route, at, body string
		there           string                       // where the server has it
		told            func(names []string) string  // how
		read            func(answer []byte) []string // and how a client reads it
		kind            string                       // before the names in grants
		operation       segment.Operation            // which alone shows it; "": any
	}
	each := func(format string) func([]string) string {
		return func(names []string) string {
			all := make([]string, len(names))
			for i, n := range names {
				all[i] = strings.ReplaceAll(format, "NAME", n)
			}
			return strings.Join(all, ",")
		}
	}
	within := func(before, format, after string) func([]string) string {
		return func(names []string) string { return before + each(format)(names) + after }
	}
	named := func(keys ...string) func([]byte) []string {
		return func(answer []byte) []string { return namesIn(t, answer, keys...) }
	}
	mcp := func(l mcpList) list {
		return list{segment.MCP, "list-" + l.key, "/mcp", rpcFor(l.method), "/mcp " + l.method,
			within(`{"jsonrpc":"2.0","id":1,"result":{"`+l.key+`":[`, `{"`+l.naming.key+`":"NAME"}`, `]}}`),
			named("result", l.key, l.naming.key), l.kind, l.operation}
	}
	templates := mcp(mcpTemplates)
	templates.route = "list-templates"
	lists := []list{
		{segment.OpenAI, "list-models", "/v1/models", "", "/v1/models", within(`{"data":[`, `{"id":"NAME"}`, `]}`), named("data", "id"), "", ""},
		{segment.Anthropic, "list-models", "/v1/models?limit=1000", "", "/v1/models?limit=1000", within(`{"data":[`, `{"type":"model","id":"NAME"}`, `]}`), named("data", "id"), "", ""},
		{segment.Gemini, "list-models-v1", "/v1/models", "", "/v1/models?pageSize=1000", within(`{"models":[`, `{"name":"models/NAME"}`, `]}`), func(answer []byte) []string {
			names := namesIn(t, answer, "models", "name")
			for i, n := range names {
				names[i] = strings.TrimPrefix(n, "models/")
			}
			return names
		}, "", ""},
		{segment.Qdrant, "list-collections", "/collections", "", "/collections", within(`{"result":{"collections":[`, `{"name":"NAME"}`, `]}}`), named("result", "collections", "name"), "", ""},
		{segment.Qdrant, "grpc-list-collections", "/qdrant.Collections/List", "\x00\x00\x00\x00\x00", "/qdrant.Collections/List", func(names []string) string {
			var message []byte
			for _, n := range names {
				message = appendBytes(message, 1, appendBytes(nil, 1, []byte(n)))
			}
			return string(message)
		}, func(answer []byte) (names []string) {
			readFields(t, answer[5:], 1, func(col []byte) { readFields(t, col, 1, func(n []byte) { names = append(names, string(n)) }) })
			return names
		}, "", ""},
		{segment.Weaviate, "list-collections", "/v1/schema", "", "/v1/schema", within(`{"classes":[`, `{"class":"NAME","properties":[]}`, `]}`), named("classes", "class"), "", ""},
		{segment.Milvus, "list-collections", "/v2/vectordb/collections/list", "{}", "/v2/vectordb/collections/list", within(`{"code":0,"data":[`, `"NAME"`, `]}`), named("data"), "", ""},
		{segment.Milvus, "grpc-show-collections", "/milvus.proto.milvus.MilvusService/ShowCollections", "\x00\x00\x00\x00\x00", "/milvus.proto.milvus.MilvusService/ShowCollections", func(names []string) string {
			var message []byte
			for _, n := range names {
				message = appendBytes(message, shownNames, []byte(n))
			}
			return string(message)
		}, func(answer []byte) (names []string) {
			readFields(t, answer[5:], shownNames, func(n []byte) { names = append(names, string(n)) })
			return names
		}, "", ""},
		mcp(mcpTools), mcp(mcpPrompts), mcp(mcpResources), templates,
	}
	told := upstream{}
	behind := serving(t, told)
	name := rapid.StringMatching(`[AB][ab]{0,3}`)
	rapid.Check(t, func(rt *rapid.T) {
		one := rapid.SampledFrom(lists).Draw(rt, "list")
		names := rapid.SliceOfDistinct(name, func(s string) string { return s }).Draw(rt, "names")
		pattern := rapid.Custom(func(rt *rapid.T) segment.Pattern {
			switch p := segment.Pattern(one.kind + name.Draw(rt, "name")); rapid.IntRange(0, 3).Draw(rt, "shape") {
			case 0:
				return segment.Pattern(one.kind + "*")
			case 1:
				return p + "*"
			default:
				return p
			}
		})
		grants := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) segment.Grant {
			return grant(rapid.SampledFrom([]segment.Effect{segment.Allow, segment.Allow, segment.Deny}).Draw(rt, "effect"),
				rapid.SliceOfNDistinct(rapid.SampledFrom(one.protocol.Operations()), 1, -1, rapid.ID).Draw(rt, "operations"),
				rapid.SliceOfN(pattern, 1, 3).Draw(rt, "resources")...)
		}), 0, 5).Draw(rt, "grants")
		var want []string
		for _, n := range names {
			if naively(grants, one.protocol, one.operation, one.kind+n) {
				want = append(want, n)
			}
		}
		told[one.there] = one.told(names)
		l := &listing{t: t, catalog: &Catalog{Log: slog.New(slog.DiscardHandler)},
			endpoint: segment.Endpoint{Name: "it", Protocol: one.protocol, Backends: []segment.Backend{behind}, Database: segment.Database{Name: "default"}}}
		w := l.grants(grants...).ask(one.route, one.at, one.body)
		got := one.read(w.Body.Bytes())
		slices.Sort(got)
		slices.Sort(want)
		if w.Code != http.StatusOK || !slices.Equal(got, want) {
			rt.Fatalf("%s %s: %d, shows %q, and the caller may see %q", one.protocol, one.route, w.Code, got, want)
		}
	})
}

// naively decides as the documents say it: a Deny overrides, and whoever may do anything with a resource may discover it.
func naively(grants []segment.Grant, p segment.Protocol, only segment.Operation, resource string) bool {
	for _, op := range p.Operations() {
		allowed, denied := false, false
		for _, g := range grants {
			for _, to := range g.To {
				if slices.Contains(to.Operations, op) && slices.ContainsFunc(to.Resources, func(p segment.Pattern) bool { return p.Matches(resource) }) {
					allowed = allowed || g.Effect == segment.Allow
					denied = denied || g.Effect == segment.Deny
				}
			}
		}
		if (only == "" || only == op) && allowed && !denied {
			return true
		}
	}
	return false
}

// namesIn reads the strings at the end of a path of keys, through all arrays on the way.
func namesIn(t *testing.T, answer []byte, keys ...string) (names []string) {
	t.Helper()
	var all any
	if err := json.Unmarshal(answer, &all); err != nil {
		t.Fatalf("%s: %v", answer, err)
	}
	var walk func(any, []string)
	walk = func(v any, keys []string) {
		switch v := v.(type) {
		case []any:
			for _, one := range v {
				walk(one, keys)
			}
		case map[string]any:
			walk(v[keys[0]], keys[1:])
		case string:
			names = append(names, v)
		default:
			t.Fatalf("%s: %v at %q", answer, v, keys)
		}
	}
	walk(all, keys)
	return names
}
