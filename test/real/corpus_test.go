package real

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/test/corpus"
)

const tables = "../../authz/testdata/decisions"

// TestCorpus asks the real Envoy every question of the decision tables, one table after the other in one `up`, and
// wants the verdict and the rule that the policy gives.
func TestCorpus(t *testing.T) {
	t.Parallel()
	cases, err := corpus.Load(tables)
	if err != nil {
		t.Fatal(err)
	}
	b := ownBackend(t)
	for _, c := range cases {
		for _, l := range c.Lines {
			if !slices.Contains(b.collections, l.Request.Resource) {
				b.collections = append(b.collections, l.Request.Resource)
			}
		}
	}
	u := startUp(t, nil, "--poll", "100ms")
	folder := t.TempDir()
	beside := startUp(t, nil, "--poll", "100ms", "--shadow", folder) // for tables with a shadow folder
	callers := map[*up]map[string]*caller{u: {}, beside: {}}
	asked := 0
	texts := map[string]string{} // of each case: moments of one table at which the same grants hold are loaded once
	for _, c := range cases {
		documents, shadow, err := c.Timeless() // Envoy's clock is the real one
		if err != nil {
			t.Fatal(err)
		}
		texts[c.Name] = string(documents) + separator + string(shadow)
	}
	slices.SortStableFunc(cases, func(a, b corpus.Case) int { return strings.Compare(texts[b.Name], texts[a.Name]) }) // nothing at all comes last: it is there at first
	loaded := map[*up]string{}
	for n, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			config, err := c.Config()
			if err != nil {
				t.Fatal(err)
			}
			hosts := map[segment.EndpointName]*segment.Endpoint{}
			for i := range config.Endpoints {
				hosts[config.Endpoints[i].Name] = &config.Endpoints[i]
			}
			u := u
			if c.Shadow != nil {
				u = beside
			}
			if text := texts[c.Name]; loaded[u] != text {
				u.load(t, n, text, folder, &config, b)
				loaded[u] = text
			}
			policy := authz.Compile(&config, c.Now)
			var judged []judgement
			for _, l := range c.Lines {
				if j, ok := ask(t, u, callers[u], hosts[l.Request.Endpoint], &l); ok {
					asked++
					if j.line != nil {
						judged = append(judged, j)
					}
					if l.Request.Operation == segment.Admin && j.status == http.StatusOK { // it is deleted, which the store does not mean
						u.known(t, hosts[l.Request.Endpoint], l.Request.Resource)
					}
				}
			}
			u.compare(t, policy, judged)
		})
	}
	t.Logf("%d questions asked", asked)
	if asked < 150 {
		t.Errorf("only %d questions could be asked", asked)
	}
}

// separator stands between the documents of a case and those of its shadow folder.
const separator = "---\n# shadow\n"

var backendAddress = regexp.MustCompile(`127\.0\.0\.1:\d+`)

// load makes the documents of a case the only ones, and returns when all of them are in force: a caller of this
// load only, with a grant to everything, gets through everywhere.
func (u *up) load(t *testing.T, n int, text, shadowFolder string, config *segment.Config, b *backend) {
	t.Helper()
	text, tried, _ := strings.Cut(backendAddress.ReplaceAllString(text, b.address()), separator)
	beside := tried != ""
	canary := fmt.Sprintf("/canary/%d", n)
	for _, e := range config.Endpoints {
		operations := map[segment.Protocol]string{segment.OpenAI: "Infer", segment.Chroma: "Write"}[e.Protocol] // which no table denies to everybody
		text += grant("canary-"+string(e.Name), canary, string(e.Name), operations, "'*'")
		tried += grant(fmt.Sprintf("tried-%d-%s", n, e.Name), canary, string(e.Name), operations, "'*'")
	}
	if beside {
		write(t, u.dir, shadowFolder, "case.yaml", tried)
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
	who := u.as(t, canary, http2)
	u.canary = who
	for _, e := range config.Endpoints {
		ask := request{method: http.MethodGet, host: e.Hostnames[0], path: "/v1/models"}
		if e.Protocol == segment.Chroma {
			ask.method, ask.path = http.MethodPost, listPath+"/"+uuidOf(b.collections[0])+"/upsert"
		}
		eventually(t, "way through "+string(e.Name), func() bool {
			a := who.send(t, ask)
			if a.status != http.StatusOK || !beside {
				return a.status == http.StatusOK
			}
			return u.flow(t, a).ShadowBy == fmt.Sprintf("grant/tried-%d-%s", n, e.Name)
		})
	}
}

// known waits until requests find a collection by its UUID again.
func (u *up) known(t *testing.T, e *segment.Endpoint, name string) {
	t.Helper()
	if e.Protocol != segment.Chroma {
		return
	}
	ask := request{method: http.MethodPost, host: e.Hostnames[0], path: listPath + "/" + uuidOf(name) + "/upsert"}
	eventually(t, name+" known again", func() bool { return u.canary.send(t, ask).status == http.StatusOK })
}

// judgement is an answer that must have left a flow. Without a line there is nothing more to check.
type judgement struct {
	line *corpus.Line
	answer
}

// ask asks one question, if it can be asked at all. What needs no flow is checked here.
func ask(t *testing.T, u *up, callers map[string]*caller, e *segment.Endpoint, l *corpus.Line) (j judgement, asked bool) {
	r := l.Request
	who := callers[r.Caller]
	if who == nil {
		who = u.with(t, http2, u.keys.sign(t, svid(r.Caller, time.Hour)))
		callers[r.Caller] = who
	}
	ask, ok := request{method: http.MethodGet, host: "missing.internal", path: "/v1/models"}, true
	if e != nil {
		ask, ok = question(e, r)
	}
	if !ok {
		return judgement{}, false
	}
	a := who.send(t, ask)
	_, err := spiffeid.FromString(r.Caller)
	switch {
	case e == nil, !strings.HasPrefix(r.Caller, domain+"/"): // no such server name, or not a member: no connection
		if a.err == nil && (e == nil || e.Tokens == nil || a.status != http.StatusUnauthorized) { // with tokens, TLS lets everybody in
			t.Errorf("%s: %+v got through TLS: %v", l.Pos, r, a)
		}
		return judgement{}, true
	case a.err != nil:
		if err == nil || l.Want.Allowed { // whoever has no SPIFFE ID may be kept out by TLS already
			t.Errorf("%s: %+v: %v", l.Pos, r, a)
		}
		return judgement{}, true
	case ask.body != nil && !plain(r.Resource): // never judged, because other parsers might read another name
		if a.status != http.StatusBadRequest {
			t.Errorf("%s: %+v got %v, want 400", l.Pos, r, a)
		}
		return judgement{}, true
	case e.Protocol == segment.Chroma && r.Operation != segment.Enter && !expressible[e.Protocol].MatchString(r.Resource):
		if a.status != http.StatusForbidden { // no collection is called like this, so its UUID is nobody's
			t.Errorf("%s: %+v got %v, want 403", l.Pos, r, a)
		}
		return judgement{}, true
	}
	return judgement{l, a}, true
}

// compare checks what was answered and recorded.
func (u *up) compare(t *testing.T, policy *authz.Policy, judged []judgement) {
	t.Helper()
	want := map[bool]telemetry.Verdict{true: telemetry.Allowed, false: telemetry.Denied}
	status := map[bool]int{true: http.StatusOK, false: http.StatusForbidden}
	ids := map[string]bool{}
	for _, j := range judged {
		ids[j.id()] = true
	}
	recorded := map[string]telemetry.Flow{}
	for _, f := range u.flows(t, len(judged), func(f telemetry.Flow) bool { return ids[f.ID] }) {
		recorded[f.ID] = f
	}
	for _, j := range judged {
		l, r, got := j.line, j.line.Request, recorded[j.id()]
		if j.status != status[l.Want.Allowed] || got.Verdict != want[l.Want.Allowed] || got.Rule != string(l.Want.Rule) {
			t.Errorf("%s: %+v: got %v with %s by %s, want %+v", l.Pos, r, j.answer, got.Verdict, got.Rule, l.Want)
		}
		if policy.Endpoints[r.Endpoint].Shadowed && (got.Shadow != want[l.Want.ShadowAllowed] || got.ShadowBy != string(l.Want.ShadowRule)) {
			t.Errorf("%s: %+v: got shadow %s by %s, want %+v", l.Pos, r, got.Shadow, got.ShadowBy, l.Want)
		}
	}
}

// plain reports whether a name can stand in a body as it is.
func plain(name string) bool {
	return name != "" && fmt.Sprintf("%q", name) == `"`+name+`"`
}

// expressible are the names that can stand in a path. Every other is denied by default.
var expressible = map[segment.Protocol]*regexp.Regexp{
	segment.OpenAI: regexp.MustCompile(`^[A-Za-z0-9._:/@-]+$`),
	segment.Chroma: regexp.MustCompile(`^[A-Za-z0-9._-]+$`),
}

// question is the HTTP request that asks for an operation on a resource, if there is one.
func question(e *segment.Endpoint, r authz.Request) (request, bool) {
	ask := request{host: e.Hostnames[0], method: http.MethodPost}
	model := func(path string) (request, bool) {
		ask.path, ask.body = path, strings.NewReader(`{"model":`+quoted(r.Resource)+`,"messages":[]}`)
		return ask, e.Protocol == segment.OpenAI
	}
	named := func(method, path string) (request, bool) {
		ask.method, ask.path = method, path+"/"+url.PathEscape(r.Resource)
		return ask, expressible[e.Protocol].MatchString(r.Resource)
	}
	switch {
	case r.Operation == segment.Infer:
		return model("/v1/chat/completions")
	case r.Operation == segment.Embed:
		return model("/v1/embeddings")
	case r.Operation == segment.Discover && e.Protocol == segment.OpenAI:
		return named(http.MethodGet, "/v1/models")
	case r.Operation == segment.Enter && e.Protocol == segment.OpenAI:
		ask.method, ask.path = http.MethodGet, "/v1/models"
		return ask, r.Resource == ""
	case e.Protocol != segment.Chroma:
		return ask, false
	}
	switch r.Operation {
	case segment.Read:
		ask.path, ask.body = listPath+"/"+uuidOf(r.Resource)+"/query", nil
		return ask, true
	case segment.Write:
		ask.path = listPath + "/" + uuidOf(r.Resource) + "/upsert"
		return ask, true
	case segment.Admin:
		return named(http.MethodDelete, listPath)
	case segment.Discover:
		return named(http.MethodGet, listPath)
	case segment.Enter:
		ask.method, ask.path = http.MethodGet, "/api/v2/heartbeat"
		return ask, r.Resource == ""
	}
	return ask, false
}

// quoted writes a JSON string with no more escapes than must be.
func quoted(s string) string {
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`, "\n", `\n`, "\x00", `\u0000`).Replace(s) + `"`
}
