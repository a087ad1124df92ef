package real

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/test/corpus"
)

const tables = "../../authz/testdata/decisions"

// carried is how requests of each protocol come.
var carried = func() map[segment.Protocol][]string {
	all := map[segment.Protocol][]string{}
	for _, p := range segment.Protocols() {
		all[p] = []string{string(http1), string(http2)}
	}
	for _, p := range []segment.Protocol{segment.Qdrant, segment.Weaviate, segment.Milvus} {
		all[p] = append(all[p], "gRPC")
	}
	all[segment.GRPC], all[segment.TCP] = []string{"gRPC"}, []string{"TCP"}
	return all
}()

// How much TestCorpus asks: generated cases beside the tables, and in all of them together.
const (
	generatedCases = 3
	fewest         = 2000
)

// TestCorpus asks the real Envoy every question of the decision tables and of some that are generated, one after the other in
// one `up`, and wants the verdict and the rule that the policy gives. Each question goes there as the requests that ask it by
// the protocol's table, over HTTP/1.1, HTTP/2 and gRPC. All rows of all tables have their turn.
func TestCorpus(t *testing.T) {
	t.Parallel()
	cases, err := corpus.Load(tables)
	if err != nil {
		t.Fatal(err)
	}
	for seed := range generatedCases {
		c, err := corpus.Generated(seed + 1)
		if err != nil {
			t.Fatal(err)
		}
		cases = append(cases, c)
	}
	q := newInquiry(t, cases)
	texts := map[string]string{} // of each case: moments of one table at which the same grants hold are loaded once
	for _, c := range cases {
		documents, shadow, err := c.Timeless() // Envoy's clock is the real one
		if err != nil {
			t.Fatal(err)
		}
		texts[c.Name] = string(documents) + separator + string(shadow)
	}
	slices.SortStableFunc(cases, func(a, b corpus.Case) int { return strings.Compare(texts[b.Name], texts[a.Name]) }) // nothing at all comes last: it is there at first
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) { q.ask(t, &c, texts[c.Name]) })
	}

	total := 0
	for _, n := range q.asked {
		total += n
	}
	t.Logf("%d decisions: %v", total, q.asked)
	if total < fewest {
		t.Errorf("only %d decisions could be asked for", total)
	}
	for _, p := range segment.Protocols() {
		for _, how := range carried[p] {
			if q.asked[string(p)+" "+how] < 25 {
				t.Errorf("%s: only %d decisions over %s", p, q.asked[string(p)+" "+how], how)
			}
		}
		for _, r := range p.Routes() {
			if q.rows[string(p)+" "+r.Name] == 0 {
				t.Errorf("%s: nobody has asked %s", p, r.Name)
			}
		}
	}
}

// inquiry is an `up` and what was asked of it.
type inquiry struct {
	u, beside *up    // beside: for cases with a shadow folder
	folder    string // of that one
	backend   *recorder
	names     []string       // all collections that there are
	loaded    map[*up]string // what it was given last
	loads     int
	callers   map[*up]map[string]*caller
	asked     map[string]int // requests, by protocol and how they were sent
	rows      map[string]int // requests, by protocol and row
	variants  map[string]int
	deleted   int // collections, of which there are not many: it takes time until they are known again
}

// newInquiry needs to know all cases that will be asked, for the collections in them.
func newInquiry(t testing.TB, cases []corpus.Case) *inquiry {
	t.Helper()
	q := &inquiry{folder: t.TempDir(), backend: newRecorder(), loaded: map[*up]string{}, asked: map[string]int{}, rows: map[string]int{}, variants: map[string]int{}}
	t.Cleanup(func() {
		q.backend.server.CloseClientConnections()
		q.backend.server.Close()
	})
	for _, c := range cases {
		for _, l := range c.Lines {
			if !slices.Contains(q.names, l.Request.Resource) {
				q.names = append(q.names, l.Request.Resource)
			}
		}
	}
	q.backend.answer = func(r *http.Request) string {
		if r.Method == http.MethodGet && r.URL.Path == listPath {
			return listOf(q.names)
		}
		if strings.HasSuffix(r.Header.Get("mcp-method"), "/list") {
			return `{"jsonrpc":"2.0","id":1,"result":{"tools":[],"prompts":[],"resources":[],"resourceTemplates":[]}}`
		}
		return "{}"
	}
	q.u = startUp(t, nil, "--poll", "100ms")
	if slices.ContainsFunc(cases, func(c corpus.Case) bool { return c.Shadow != nil }) {
		q.beside = startUp(t, nil, "--poll", "100ms", "--shadow", q.folder)
	}
	q.callers = map[*up]map[string]*caller{q.u: {}, q.beside: {}}
	return q
}

// ask loads a case and asks all that stands in it.
func (q *inquiry) ask(t *testing.T, c *corpus.Case, text string) {
	t.Helper()
	config, err := c.Config()
	if err != nil {
		t.Fatal(err)
	}
	u := q.u
	if c.Shadow != nil {
		u = q.beside
	}
	if q.loaded[u] != text {
		q.load(t, u, text, &config)
		q.loaded[u] = text
	}
	policy := authz.Compile(&config, c.Now)
	var judged []judgement
	for _, l := range c.Lines {
		for _, j := range q.line(t, u, config.Endpoint(l.Request.Endpoint), &l) {
			if j.line != nil {
				judged = append(judged, j)
			}
		}
	}
	u.compare(t, policy, judged)
}

// separator stands between the documents of a case and those of its shadow folder.
const separator = "---\n# shadow\n"

var backendAddress = regexp.MustCompile(`127\.0\.0\.1:\d+`)

// load makes the documents of a case the only ones, and returns when all of them are in force: a caller of this
// load only, with a grant to everything, gets through everywhere.
func (q *inquiry) load(t *testing.T, u *up, text string, config *segment.Config) {
	t.Helper()
	q.loads++
	n := q.loads
	text, tried, _ := strings.Cut(backendAddress.ReplaceAllString(text, q.backend.address()), separator)
	beside := tried != ""
	canary := fmt.Sprintf("/canary/%d", n)
	for _, e := range config.Endpoints {
		text += grant("canary-"+string(e.Name), canary, string(e.Name), string(passing(e.Protocol)), "'*'")
		tried += grant(fmt.Sprintf("tried-%d-%s", n, e.Name), canary, string(e.Name), string(passing(e.Protocol)), "'*'")
	}
	if beside {
		write(t, u.dir, q.folder, "case.yaml", tried)
	}
	before := u.status(t)
	u.write(t, "case.yaml", text)
	eventually(t, "new generation in force", func() bool {
		st := u.status(t)
		if len(st.Problems) > 0 {
			t.Fatal(st.Problems)
		}
		return st.Generation.Digest != before.Generation.Digest && st.Gateways[0].InForce == string(st.Generation.Digest)
	})
	u.canary = u.as(t, canary, http2)
	for i := range config.Endpoints {
		e := &config.Endpoints[i]
		through := corpus.Questions(e, passing(e.Protocol), q.anyName(e), uuidOf)[0]
		eventually(t, "way through "+string(e.Name), func() bool {
			a := send(t, u.canary, e, &through)
			if a.status != http.StatusOK || !beside {
				return a.status == http.StatusOK
			}
			return u.flow(t, a).ShadowBy == fmt.Sprintf("grant/tried-%d-%s", n, e.Name)
		})
	}
}

// passing is an operation of the protocol which no table denies to everybody.
func passing(p segment.Protocol) segment.Operation {
	if p == segment.Chroma {
		return segment.Write
	}
	return p.Operations()[0]
}

// anyName is a resource that the endpoint has.
func (q *inquiry) anyName(e *segment.Endpoint) string {
	switch e.Protocol {
	case segment.Weaviate:
		return "A"
	case segment.HTTP:
		return "/a"
	case segment.GRPC:
		return "p.A/M"
	case segment.MCP:
		return "tool/a"
	case segment.TCP:
		return ""
	case segment.OpenAI:
		if len(e.Models) > 0 {
			return e.Models[0].Name
		}
	}
	i := slices.IndexFunc(q.names, inUUIDs.MatchString)
	return q.names[max(i, 0)]
}

// known waits until requests find a collection by its UUID again.
func (u *up) known(t *testing.T, e *segment.Endpoint, name string) {
	t.Helper()
	ask := request{method: http.MethodPost, host: e.Hostnames[0], path: listPath + "/" + uuidOf(name) + "/upsert"}
	eventually(t, name+" known again", func() bool { return u.canary.send(t, ask).status == http.StatusOK })
}

// judgement is an answer that must have left a flow. Without a line there is nothing more to check.
type judgement struct {
	line     *corpus.Line
	question *corpus.Question
	answer
	flow *telemetry.Flow // nil: the one that has the answer's ID
}

// inUUIDs are the names of collections that have a UUID. Every other is denied by default.
var inUUIDs = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// line asks what stands in one line, by those requests that were asked least.
func (q *inquiry) line(t *testing.T, u *up, e *segment.Endpoint, l *corpus.Line) (all []judgement) {
	t.Helper()
	r := l.Request
	_, noID := spiffeid.FromString(r.Caller)
	outside := e == nil || !strings.HasPrefix(r.Caller, domain+"/") // no such server name, or not a member: no connection
	if outside {
		a := q.caller(t, u, r.Caller, http2).send(t, request{method: http.MethodGet, host: "missing.internal", path: "/v1/models"})
		if e != nil {
			a = q.caller(t, u, r.Caller, http2).send(t, request{method: http.MethodGet, host: e.Hostnames[0], path: "/v1/models"})
		}
		if a.err == nil && (e == nil || e.Tokens == nil || a.status != http.StatusUnauthorized) { // with tokens, TLS lets everybody in
			t.Errorf("%s: %+v got through TLS: %v", l.Pos, r, a)
		}
		return nil
	}
	questions := corpus.Questions(e, r.Operation, r.Resource, uuidOf)
	key := func(x *corpus.Question) string { return string(e.Protocol) + " " + x.Route.Name + " " + x.Variant }
	slices.SortStableFunc(questions, func(a, b corpus.Question) int { return cmp.Compare(q.variants[key(&a)], q.variants[key(&b)]) })
	for _, x := range questions[:min(len(questions), max(3, len(questions)/3))] {
		removes := e.Protocol == segment.Chroma && x.Route.Answer == segment.FromCatalog && x.Route.Operation == segment.Admin && l.Want.Allowed
		if removes {
			if q.deleted++; q.deleted > 12 {
				continue
			}
		}
		version := []version{http2, http1}[q.variants[key(&x)]%2]
		how := string(version)
		switch x.Route.Kind {
		case segment.Unary, segment.Streaming:
			version, how = http2, "gRPC"
		case segment.WebSocket:
			version, how = http1, "WebSocket"
		}
		if e.Protocol == segment.TCP {
			how = "TCP"
		}
		q.variants[key(&x)]++
		q.rows[string(e.Protocol)+" "+x.Route.Name]++
		q.asked[string(e.Protocol)+" "+how]++

		q.backend.taken()
		begin := time.Now()
		a := send(t, q.caller(t, u, r.Caller, version), e, &x)
		got := slices.DeleteFunc(q.backend.taken(), func(r received) bool { return strings.HasPrefix(r.path, listPath+"?limit=") }) // the catalogue asks by itself
		switch {
		case a.err != nil:
			if noID == nil || l.Want.Allowed { // whoever has no SPIFFE ID may be kept out by TLS already
				t.Errorf("%s: %+v by %s %s: %v", l.Pos, r, x.Route.Name, x.Variant, a)
			}
			continue
		case x.Refused: // never judged, because other parsers might read another name
			if a.status != http.StatusBadRequest || len(got) > 0 {
				t.Errorf("%s: %+v by %s %s got %v, want 400", l.Pos, r, x.Route.Name, x.Variant, a)
			}
			continue
		case e.Protocol == segment.Chroma && r.Resource != "" && !inUUIDs.MatchString(r.Resource):
			if a.status != http.StatusForbidden || len(got) > 0 { // no collection is called like this, so its UUID is nobody's
				t.Errorf("%s: %+v by %s got %v, want 403", l.Pos, r, x.Route.Name, a)
			}
			continue
		case e.Protocol == segment.TCP:
			flow := u.flows(t, 1, func(f telemetry.Flow) bool {
				return f.Endpoint == e.Name && f.Caller.String() == r.Caller && !f.Time.Before(begin.Truncate(time.Millisecond))
			})[0]
			all = append(all, judgement{l, &x, a, &flow})
			continue
		case x.Route.Answer == segment.FromBackend && l.Want.Allowed != (len(got) == 1 && got[0].method == x.Route.Method && got[0].path == x.Path):
			t.Errorf("%s: %+v by %s %s: want %+v, and the backend was asked %+v", l.Pos, r, x.Route.Name, x.Variant, l.Want, got)
		}
		if removes { // the store does not mean it
			u.known(t, e, r.Resource)
		}
		all = append(all, judgement{l, &x, a, nil})
	}
	return all
}

// caller is one who asks again and again.
func (q *inquiry) caller(t *testing.T, u *up, id string, v version) *caller {
	t.Helper()
	key := id + " " + string(v)
	if q.callers[u][key] == nil {
		q.callers[u][key] = u.with(t, v, u.keys.sign(t, svid(id, time.Hour)))
	}
	return q.callers[u][key]
}

// send sends a question. What it asked of gRPC or a WebSocket has the status that HTTP has for it.
func send(t *testing.T, who *caller, e *segment.Endpoint, x *corpus.Question) answer {
	t.Helper()
	r := request{method: x.Route.Method, host: e.Hostnames[0], path: x.Path, header: http.Header{}}
	for name, value := range x.Header {
		r.header.Set(name, value)
	}
	if x.Body != "" {
		r.body = strings.NewReader(x.Body)
	}
	if e.Protocol == segment.TCP {
		return who.through(t, e.Hostnames[0])
	}
	switch x.Route.Kind {
	case segment.WebSocket:
		conn, _, a := who.upgrade(t, e.Hostnames[0], x.Path, "")
		conn.Close()
		if a.status == http.StatusSwitchingProtocols {
			a.status = http.StatusOK
		}
		return a
	case segment.Unary, segment.Streaming:
		code, said, a := who.called(t.Context(), r)
		if a.err == nil && a.status == http.StatusOK {
			a.status, a.body = ofGRPC[code], said
		}
		return a
	}
	return who.send(t, r)
}

// through sends a request over a connection that is let through or not. A backend that answers is there, and none is denied.
func (c *caller) through(t *testing.T, host string) answer {
	t.Helper()
	plain := *c
	plain.config = c.config.Clone()
	plain.config.NextProtos = nil
	a := plain.raw(t, host, "GET /through HTTP/1.1\r\nHost: any\r\nConnection: close\r\n\r\n")
	if errors.Is(a.err, io.ErrUnexpectedEOF) || errors.Is(a.err, io.EOF) || errors.Is(a.err, syscall.ECONNRESET) {
		return answer{status: http.StatusForbidden}
	}
	return a
}

var ofGRPC = map[codes.Code]int{codes.OK: 200, codes.InvalidArgument: 400, codes.Unauthenticated: 401, codes.PermissionDenied: 403}

// compare checks what was answered and recorded.
func (u *up) compare(t *testing.T, policy *authz.Policy, judged []judgement) {
	t.Helper()
	want := map[bool]telemetry.Verdict{true: telemetry.Allowed, false: telemetry.Denied}
	status := map[bool]int{true: http.StatusOK, false: http.StatusForbidden}
	ids := map[string]bool{}
	for _, j := range judged {
		if j.flow == nil {
			ids[j.id()] = true
		}
	}
	recorded := map[string]telemetry.Flow{}
	for _, f := range u.flows(t, len(ids), func(f telemetry.Flow) bool { return ids[f.ID] }) {
		recorded[f.ID] = f
	}
	for _, j := range judged {
		l, r, got := j.line, j.line.Request, recorded[j.id()]
		if j.flow != nil {
			got = *j.flow
		}
		as := strings.TrimSpace(j.question.Route.Name + " " + j.question.Variant)
		answered := j.status == status[l.Want.Allowed]
		if j.question.Route.Answer == segment.FromCatalog && l.Want.Allowed { // it may have found nothing
			answered = j.status != 0
		}
		if !answered || got.Verdict != want[l.Want.Allowed] || got.Rule != string(l.Want.Rule) || got.Operation != r.Operation {
			t.Errorf("%s: %+v by %s: got %v with %s %s by %s, want %+v", l.Pos, r, as, j.answer, got.Operation, got.Verdict, got.Rule, l.Want)
		}
		if policy.Endpoints[r.Endpoint].Shadowed && (got.Shadow != want[l.Want.ShadowAllowed] || got.ShadowBy != string(l.Want.ShadowRule)) {
			t.Errorf("%s: %+v by %s: got shadow %s by %s, want %+v", l.Pos, r, as, got.Shadow, got.ShadowBy, l.Want)
		}
	}
}
