package real

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// recorder is a server behind the gateway that keeps what it is asked, whatever the protocol: HTTP/1.1 with WebSockets, and
// gRPC over HTTP/2 in plain text. Whatever comes by gRPC is sent back.
type recorder struct {
	server *httptest.Server
	answer func(r *http.Request) string // of HTTP, with a status before it if that is not 200; nil: "{}"; "": 404
	reply  func(path string) message    // of gRPC; nil: what came
	mu     sync.Mutex
	got    []received
}

func newRecorder() *recorder {
	b := &recorder{}
	b.server = httptest.NewUnstartedServer(b)
	b.server.Config.Protocols = &http.Protocols{}
	b.server.Config.Protocols.SetHTTP1(true)
	b.server.Config.Protocols.SetUnencryptedHTTP2(true)
	b.server.Start()
	return b
}

func (b *recorder) address() string { return b.server.Listener.Addr().String() }

func (b *recorder) taken() []received {
	b.mu.Lock()
	defer b.mu.Unlock()
	got := b.got
	b.got = nil
	return got
}

func (b *recorder) keep(r *http.Request, body string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.got = append(b.got, received{r.Method, r.RequestURI, r.Header.Clone(), body})
}

func (b *recorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Header.Get("Upgrade") != "":
		b.keep(r, "")
		b.socket(w)
	case strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") && r.ProtoMajor == 2:
		b.echo(w, r)
	default:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		b.keep(r, string(body))
		w.Header().Set("content-type", "application/json")
		text := "{}"
		if b.answer != nil {
			text = b.answer(r)
		}
		status := http.StatusNotFound
		if n, _ := fmt.Sscanf(text, "%3d ", &status); n == 1 || text == "" {
			text = text[min(len(text), len("404 ")):]
			w.WriteHeader(status)
		}
		for flush := http.NewResponseController(w); text != ""; _ = flush.Flush() { // in pieces, which may come one by one
			n := min(len(text), 41)
			_, _ = io.WriteString(w, text[:n])
			text = text[n:]
		}
	}
}

// echo sends back each piece as it comes, so that streams go both ways, or replies.
func (b *recorder) echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("content-type", "application/grpc")
	w.Header().Set("trailer", "grpc-status")
	flush := http.NewResponseController(w)
	_ = flush.Flush()
	var all strings.Builder
	piece := make([]byte, 1<<16)
	for {
		n, err := r.Body.Read(piece)
		all.Write(piece[:n])
		if b.reply == nil {
			_, _ = w.Write(piece[:n])
		}
		_ = flush.Flush()
		if err != nil {
			break
		}
	}
	b.keep(r, all.String())
	if b.reply != nil {
		_, _ = io.WriteString(w, b.reply(r.URL.Path).frame())
	}
	w.Header().Set("grpc-status", "0")
}

// socket takes a WebSocket, and sends back whatever comes.
func (b *recorder) socket(w http.ResponseWriter) {
	conn, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n")
	_, _ = io.Copy(conn, buffered)
}

// protocolsUp is one `up` with an endpoint of each protocol, each with a server of its own behind it.
type protocolsUp struct {
	*up
	servers map[string]*recorder
}

// endpoints of protocolsUp: the protocol, and what else stands in the document.
var protocolEndpoints = map[string][2]string{
	"ai":       {"OpenAI", ""},
	"claude":   {"Anthropic", ""},
	"gemini":   {"Gemini", ""},
	"qdrant":   {"Qdrant", ""},
	"weaviate": {"Weaviate", ""},
	"tenant":   {"Weaviate", "database: {tenant: T1}"},
	"milvus":   {"Milvus", ""},
	"hr":       {"Milvus", "database: {name: hr}"},
	"web":      {"HTTP", "paths: ['/users/{id}', /users/me, '/slash/']"},
	"calls":    {"GRPC", ""},
}

// startProtocols gives /app what grants name, and /root everything.
func startProtocols(t *testing.T, endpoints ...string) *protocolsUp {
	t.Helper()
	p := &protocolsUp{servers: map[string]*recorder{}}
	var text string
	for _, name := range endpoints {
		b := newRecorder()
		t.Cleanup(func() {
			b.server.CloseClientConnections()
			b.server.Close()
		})
		p.servers[name] = b
		protocol, more := protocolEndpoints[name][0], protocolEndpoints[name][1]
		grpc := ""
		if protocol == "Qdrant" || protocol == "Weaviate" {
			grpc = fmt.Sprintf(", grpcAddresses: ['%s']", b.address())
		}
		text += fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Endpoint\nmetadata: {name: %s}\nspec:\n  hostnames: [%s]\n  protocol: %s\n  backends: [{name: local, addresses: ['%s']%s, tls: {mode: None}}]\n",
			name, hostOf(name), protocol, b.address(), grpc)
		if more != "" {
			text += "  " + more + "\n"
		}
		operations := map[string]string{"OpenAI": "Infer, Embed, Read, Write, Connect", "Anthropic": "Infer, Read", "Gemini": "Infer, Embed, Read, Connect", "HTTP": "Read, Write", "GRPC": "Call"}[protocol]
		if operations == "" {
			operations = "Read, Write, Admin"
		}
		resources := map[string]string{"OpenAI": "m", "Anthropic": "m", "Gemini": "m", "Weaviate": "Docs", "HTTP": "'/open/*', '/users/{id}', '/exact', '/slash/', '/'", "GRPC": "pkg.Echo/Unary, 'pkg.Streams/*'"}[protocol]
		if resources == "" {
			resources = "docs"
		}
		text += grant(name+"-app", "/app", name, operations, resources) + grant(name+"-root", "/root", name, operations, "'*'")
	}
	p.up = startUp(t, map[string]string{"all.yaml": text})
	return p
}

// row is a request and what must become of it.
type row struct {
	what   string
	method string // POST, or GET without a body
	path   string
	body   string
	header http.Header
	want   int    // 200, 400, 403
	says   string // in the answer, unless it is 200
}

// asks sends them all as /app, and those that are denied for want of a grant on everything as /root, too.
func (p *protocolsUp) asks(t *testing.T, endpoint string, questions []row) {
	t.Helper()
	for _, v := range []version{http1, http2} {
		app, root := p.as(t, "/app", v), p.as(t, "/root", v)
		for _, q := range questions {
			r := request{method: q.method, host: hostOf(endpoint), path: q.path, header: http.Header{"Content-Type": {"application/json"}}}
			if r.method == "" {
				r.method = http.MethodPost
			}
			for k, values := range q.header {
				r.header[k] = values
			}
			send := func(who *caller) answer {
				if r.method == http.MethodPost || q.body != "" {
					r.body = strings.NewReader(q.body)
				}
				return who.send(t, r)
			}
			b := p.servers[endpoint]
			b.taken()
			a := send(app)
			got := b.taken()
			switch {
			case a.err != nil || a.status != q.want:
				t.Errorf("%s %s: %s: %v, want %d", v, endpoint, q.what, a, q.want)
			case q.want == http.StatusOK && (len(got) != 1 || got[0].body != q.body || got[0].method != r.method):
				t.Errorf("%s %s: %s: the backend got %+v", v, endpoint, q.what, got)
			case q.want != http.StatusOK && len(got) > 0:
				t.Errorf("%s %s: %s: the backend was asked: %+v", v, endpoint, q.what, got)
			case q.want != http.StatusOK && !strings.Contains(a.body, q.says):
				t.Errorf("%s %s: %s: the answer does not say %q: %s", v, endpoint, q.what, q.says, a.body)
			}
			if q.want == http.StatusForbidden && strings.Contains(q.says, "everything") {
				if a := send(root); a.status != http.StatusOK || len(b.taken()) != 1 {
					t.Errorf("%s %s: %s: with a grant on everything: %v", v, endpoint, q.what, a)
				}
			}
		}
	}
}

const escapedQuote = `\"`

func TestOpenAIRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "ai")
	p.asks(t, "ai", []row{
		{what: "chat", path: chatPath, body: `{"model":"m","messages":[]}`, want: 200},
		{what: "another model", path: chatPath, body: `{"model":"o","messages":[]}`, want: 403, says: "has no grant for Infer o"},
		{what: "responses", path: "/v1/responses", body: `{"model":"m","input":"x","tools":[{"type":"function","parameters":{"properties":{"model":{}}}}]}`, want: 200},
		{what: "somebody's state", path: "/v1/responses", body: `{"model":"m","previous_response_id":"r"}`, want: 403, says: "has no grant for Infer on everything here, which " + escapedQuote + "previous_response_id" + escapedQuote + " in the body asks for"},
		{what: "fallbacks", path: chatPath, body: `{"model":"m","models":["o"]}`, want: 403, says: escapedQuote + "models" + escapedQuote},
		{what: "fallbacks in other letters", path: chatPath, body: `{"model":"m","MODELS":["o"]}`, want: 403, says: "on everything here"},
		{what: "fallbacks with a long s", path: chatPath, body: `{"model":"m","modelſ":["o"]}`, want: 403, says: "on everything here"},
		{what: "a file deep in a message", path: chatPath, body: `{"model":"m","messages":[{"content":[{"file":{"file_id":"f"}}]}]}`, want: 403, says: "on everything here"},
		{what: "the same, escaped", path: chatPath, body: `{"model":"m","messages":[{"content":[{"file":{"f\u0069le_id":"f"}}]}]}`, want: 403, says: "on everything here"},
		{what: "models of a tool", path: "/v1/responses", body: `{"model":"m","tools":[{"model":"o"}]}`, want: 403, says: "on everything here"},
		{what: "a form", path: "/v1/audio/transcriptions", header: http.Header{"Content-Type": {"multipart/form-data; boundary=x"}}, body: "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--x--\r\n",
			want: 403, says: "has no grant for Infer on everything here, which transcriptions needs: it names its models where this gateway does not look"},
		{what: "files", method: "GET", path: "/v1/files", want: 403, says: "Read on everything here"},
		{what: "administration", method: "GET", path: "/v1/organization/users", want: 403, says: "not part of the API here"},
		{what: "realtime, not upgraded", method: "GET", path: "/v1/realtime?model=m", want: 200},
	})
}

func TestAnthropicRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "claude")
	p.asks(t, "claude", []row{
		{what: "messages", path: "/v1/messages?beta=true", body: `{"model":"m","messages":[]}`, want: 200},
		{what: "another model", path: "/v1/messages", body: `{"model":"o"}`, want: 403, says: `"type":"permission_error"`},
		{what: "an adviser", path: "/v1/messages", body: `{"model":"m","tools":[{"type":"advisor_20260301","model":"o"}]}`, want: 403, says: "on everything here"},
		{what: "servers", path: "/v1/messages", body: `{"model":"m","mcp_servers":[]}`, want: 403, says: "on everything here"},
		{what: "a batch", path: "/v1/messages/batches", body: `{"requests":[{"params":{"model":"m"}}]}`, want: 403, says: "on everything here"},
		{what: "two models", path: "/v1/messages", body: `{"model":"m","model":"o"}`, want: 400, says: `"type":"invalid_request_error"`},
	})
	a := p.as(t, "/app", http2).post(t, "claude", "/v1/messages", `{"model":"o"}`)
	if id := a.header.Get("request-id"); id == "" || id != a.id() || !strings.Contains(a.body, `"request_id":"`+id+`"`) {
		t.Errorf("request-id %q: %v", id, a)
	}
}

func TestGeminiRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "gemini")
	p.asks(t, "gemini", []row{
		{what: "generate", path: "/v1beta/models/m:generateContent", body: `{"contents":[]}`, want: 200},
		{what: "stream", path: "/v1/models/m:streamGenerateContent?alt=sse", body: `{"contents":[]}`, want: 200},
		{what: "another model", path: "/v1/models/o:generateContent", body: `{}`, want: 403, says: `"status":"PERMISSION_DENIED"`},
		{what: "another model, with its number", path: "/v1/models/o:generateContent", body: `{}`, want: 403, says: `"code":403`},
		{what: "two verbs", path: "/v1/models/m:countTokens:generateContent", body: `{}`, want: 403},
		{what: "a colon that is escaped", path: "/v1/models/m%3AgenerateContent", body: `{}`, want: 403},
		{what: "a slash in the name", path: "/v1/models/a/m:generateContent", body: `{}`, want: 403},
		{what: "climbing", path: "/v1/models/m/../o:generateContent", body: `{}`, want: 403, says: "Infer o"},
		{what: "climbing behind a parameter", path: "/v1/models/m/..;x/o:generateContent", body: `{}`, want: 403, says: "Infer o"},
		{what: "a parameter", path: "/v1/models/m;x:generateContent", body: `{}`, want: 403},
		{what: "embeddings", path: "/v1/models/m:batchEmbedContents", body: `{"requests":[{"model":"models/m"},{"model":"models/m"}]}`, want: 200},
		{what: "embeddings of another", path: "/v1/models/m:batchEmbedContents", body: `{"requests":[{"model":"models/m"},{"model":"models/o"}]}`, want: 403, says: "Embed on everything here, which another " + escapedQuote + "model" + escapedQuote},
		{what: "embeddings of no text", path: "/v1/models/m:batchEmbedContents", body: `{"requests":[{"model":7}]}`, want: 403, says: "on everything here"},
		{what: "another in the body", path: "/v1/models/m:generateContent", body: `{"model":"models/o"}`, want: 403, says: "on everything here"},
		{what: "somebody's cache", path: "/v1/models/m:generateContent", body: `{"cachedContent":"cachedContents/x"}`, want: 403, says: "on everything here"},
		{what: "somebody's file", path: "/v1/models/m:generateContent", body: `{"contents":[{"parts":[{"file_data":{"file_uri":"x"}}]}]}`, want: 403, says: "on everything here"},
	})
}

func TestQdrantRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "qdrant")
	p.asks(t, "qdrant", []row{
		{what: "query", path: "/collections/docs/points/query", body: `{"query":[0.1],"prefetch":[{"query":[0.2]}]}`, want: 200},
		{what: "upsert", method: "PUT", path: "/collections/docs/points", body: `{"points":[{"id":1,"payload":{"lookup_from":1}}]}`, want: 200},
		{what: "create", method: "PUT", path: "/collections/docs", body: `{"vectors":{}}`, want: 200},
		{what: "get", method: "GET", path: "/collections/docs", want: 200},
		{what: "a point", method: "GET", path: "/collections/docs/points/1", want: 200},
		{what: "another", path: "/collections/secret/points/query", body: `{}`, want: 403, says: `{"status":{"error":"` + domain + `/app has no grant for Read secret`},
		{what: "another, behind a slash", path: "/collections//secret/points/query", body: `{}`, want: 403, says: "Read secret"},
		{what: "another, by ..;", path: "/collections/docs/..;/secret/points/query", body: `{}`, want: 403, says: "Read secret"},
		{what: "another, with an escape", path: "/collections/%73ecret/points/query", body: `{}`, want: 403, says: "Read secret"},
		{what: "an escape that stays", path: "/collections/docs%2e%252e/points/query", body: `{}`, want: 403},
		{what: "an escaped slash", path: "/collections/docs%2F..%2Fsecret/points/query", body: `{}`, want: 400},
		{what: "a parameter", path: "/collections/docs;x/points/query", body: `{}`, want: 403},
		{what: "lookup_from", path: "/collections/docs/points/query", body: `{"lookup_from":{"collection":"secret"}}`, want: 403, says: "has no grant for Read on everything here, which " + escapedQuote + "lookup_from" + escapedQuote + " in the body asks for"},
		{what: "lookup_from in a prefetch", path: "/collections/docs/points/query", body: `{"prefetch":[{"prefetch":[{"lookup_from":{"collection":"secret"}}]}]}`, want: 403, says: "on everything here"},
		{what: "lookup_from, escaped", path: "/collections/docs/points/query", body: `{"prefetch":[{"\u006cookup_from":{"collection":"secret"}}]}`, want: 403, says: "on everything here"},
		{what: "with_lookup", path: "/collections/docs/points/query/groups", body: `{"with_lookup":"secret"}`, want: 403, says: "on everything here"},
		{what: "with_lookup in a batch", path: "/collections/docs/points/query/batch", body: `{"searches":[{"with_lookup":{"collection":"secret"}}]}`, want: 403, says: "on everything here"},
		{what: "a query that is no JSON", path: "/collections/docs/points/query", body: `{`, want: 400},
		{what: "aliases", path: "/collections/aliases", body: `{"actions":[]}`, want: 403, says: "on everything here"},
		{what: "metrics", method: "GET", path: "/metrics", want: 403, says: "Admin on everything here"},
		{what: "a page for people", method: "GET", path: "/dashboard", want: 403, says: "not part of the API here"},
		{what: "ready", method: "GET", path: "/readyz", want: 200},
		{what: "another method", method: "GET", path: "/collections/docs/points", want: 403, says: "not part of the API here"},
	})
}

func TestWeaviateRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "weaviate", "tenant")
	const id = "/00000000-0000-0000-0000-000000000001"
	p.asks(t, "weaviate", []row{
		{what: "insert", path: "/v1/objects", body: `{"class":"Docs","properties":{"class":"x"},"tenant":"any"}`, want: 200},
		{what: "insert elsewhere", path: "/v1/objects", body: `{"class":"Secret"}`, want: 403, says: `{"error":[{"message":"` + domain + `/app has no grant for Write Secret`},
		{what: "the class twice", path: "/v1/objects", body: `{"class":"Docs","class":"Secret"}`, want: 400},
		{what: "the class twice, in another case", path: "/v1/objects", body: `{"class":"Docs","Class":"Secret"}`, want: 400},
		{what: "the class twice, with a long s", path: "/v1/objects", body: `{"class":"Docs","claſs":"Secret"}`, want: 400},
		{what: "another spelling of a name", path: "/v1/objects", body: `{"class":"docs"}`, want: 400},
		{what: "another spelling in the path", method: "GET", path: "/v1/objects/docs" + id, want: 400},
		{what: "get", method: "GET", path: "/v1/objects/Docs" + id, want: 200},
		{what: "get without a class", method: "GET", path: "/v1/objects" + id, want: 403, says: "not part of the API here"},
		{what: "replace", method: "PUT", path: "/v1/objects/Docs" + id, body: `{"class":"Docs"}`, want: 200},
		{what: "replace another", method: "PUT", path: "/v1/objects/Docs" + id, body: `{"class":"Secret"}`, want: 403, says: "on everything here"},
		{what: "a reference", method: "PATCH", path: "/v1/objects/Docs" + id, body: `{"properties":{"r":[{"beacon":"weaviate://localhost/Secret/1"}]}}`, want: 403, says: "on everything here"},
		{what: "list", method: "GET", path: "/v1/objects?limit=1&class=Docs", want: 200},
		{what: "list of all", method: "GET", path: "/v1/objects", want: 400},
		{what: "list of another", method: "GET", path: "/v1/objects?class=Secret", want: 403, says: "Read Secret"},
		{what: "two lists", method: "GET", path: "/v1/objects?class=Docs&class=Secret", want: 400},
		{what: "two lists, spelled in another way", method: "GET", path: "/v1/objects?class=Docs&%63lass=Secret", want: 400},
		{what: "two lists, in another case", method: "GET", path: "/v1/objects?class=Docs&Class=Secret", want: 400},
		{what: "two lists, as an array", method: "GET", path: "/v1/objects?class=Docs&class[]=Secret", want: 400},
		{what: "two lists, behind a semicolon", method: "GET", path: "/v1/objects?class=Docs;class=Secret", want: 400},
		{what: "an escape in the name", method: "GET", path: "/v1/objects?class=Doc%73", want: 400},
		{what: "GraphQL", path: "/v1/graphql", body: `{"query":"{Get{Docs{x}}}"}`, want: 403, says: "on everything here"},
	})
	p.asks(t, "tenant", []row{
		{what: "insert", path: "/v1/objects", body: `{"class":"Docs","tenant":"T1"}`, want: 200},
		{what: "insert elsewhere", path: "/v1/objects", body: `{"class":"Docs","tenant":"T2"}`, want: 400, says: "another database"},
		{what: "insert nowhere", path: "/v1/objects", body: `{"class":"Docs"}`, want: 400, says: "another database"},
		{what: "get", method: "GET", path: "/v1/objects/Docs" + id + "?tenant=T1", want: 200},
		{what: "get elsewhere", method: "GET", path: "/v1/objects/Docs" + id + "?tenant=T2", want: 400, says: "another database"},
		{what: "get from two", method: "GET", path: "/v1/objects/Docs" + id + "?tenant=T1&tenant=T2", want: 400, says: "another database"},
		{what: "get from one that is escaped", method: "GET", path: "/v1/objects/Docs" + id + "?tenant=T1&t%65nant=T2", want: 400},
		{what: "what names tenants where nobody looks", path: "/v1/graphql", body: `{}`, want: 403, says: "not part of the API here"},
	})
}

func TestMilvusRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "milvus", "hr")
	const search, rename = "/v2/vectordb/entities/search", "/v2/vectordb/collections/rename"
	p.asks(t, "milvus", []row{
		{what: "search", path: search, body: `{"collectionName":"docs","data":[[0.1]]}`, want: 200},
		{what: "search in its database", path: search, body: `{"dbName":"default","collectionName":"docs"}`, want: 200},
		{what: "search in no database", path: search, body: `{"dbName":null,"collectionName":"docs"}`, want: 200},
		{what: "another", path: search, body: `{"collectionName":"secret"}`, want: 403, says: `"code":403`},
		{what: "another key", path: search, body: `{"collectionname":"secret"}`, want: 400, says: "in place of"},
		{what: "another key beside", path: search, body: `{"collectionName":"docs","COLLECTIONNAME":"secret"}`, want: 400},
		{what: "another database", path: search, body: `{"collectionName":"docs","dbName":"hr"}`, want: 400, says: "another database"},
		{what: "another database in other letters", path: search, body: `{"collectionName":"docs","dbName":"default","DBNAME":"hr"}`, want: 400, says: "another database"},
		{what: "another database in a header", path: search, header: http.Header{"Dbname": {"hr"}}, body: `{"collectionName":"docs"}`, want: 400, says: "another database"},
		{what: "rename", path: rename, body: `{"collectionName":"docs","newCollectionName":"x"}`, want: 403, says: "on everything here"},
		{what: "rename into another database", path: rename, body: `{"collectionName":"docs","newDbName":"hr"}`, want: 400, says: "another database"},
		{what: "the old API", path: "/v1/vector/search", body: `{"collectionName":"docs"}`, want: 403, says: "not part of the API here"},
	})
	p.asks(t, "hr", []row{
		{what: "search", path: search, body: `{"collectionName":"docs","dbName":"hr"}`, want: 200},
		{what: "search by the header", path: search, header: http.Header{"Dbname": {"hr"}}, body: `{"collectionName":"docs"}`, want: 200},
		{what: "search in the default database", path: search, body: `{"collectionName":"docs"}`, want: 400, says: "another database"},
		{what: "search there in the end", path: search, body: `{"collectionName":"docs","dbName":"hr","dbname":""}`, want: 400, says: "another database"},
	})
	if a := p.as(t, "/app", http1).send(t, request{host: hostOf("milvus"), path: search, body: strings.NewReader(`{"collectionName":"docs"}`),
		header: http.Header{"Db-Name": {"hr"}}}); a.status != 200 || p.servers["milvus"].taken()[0].header.Get("db-name") != "" {
		t.Errorf("a database in another header: %v", a)
	}
}

func TestHTTPRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "web")
	get := func(what, path string, want int, says string) row {
		return row{what: what, method: "GET", path: path, want: want, says: says}
	}
	p.asks(t, "web", []row{
		get("below", "/open/a/b?x=%2e%2e", 200, ""),
		{what: "a post", path: "/open/a", body: "whatever", want: 200},
		get("exact", "/exact", 200, ""),
		get("the root", "/", 200, ""),
		get("a template", "/users/7", 200, ""),
		get("a template more literal than another", "/users/me", 403, "Read /users/me"),
		get("a template with a slash", "/slash/", 200, ""),
		get("another", "/admin", 403, `"detail":"`+domain+`/app has no grant for Read /admin"`),
		get("behind another", "/exact/", 400, `"status":400`),
		get("with a parameter", "/open/a;x", 400, "different ways"),
		get("with a parameter on the exact one", "/exact;x", 400, "different ways"),
		get("climbing", "/open/../admin", 403, "Read /admin"),
		get("climbing, escaped", "/open/%2e%2e/admin", 403, "Read /admin"),
		get("climbing, with a parameter", "/open/..;/admin", 403, "Read /admin"),
		get("climbing, escaped twice", "/open/%252e%252e/admin", 400, "different ways"),
		get("a parameter that is escaped", "/open/..%3b/admin", 400, "different ways"),
		get("an escaped slash", "/open%2F..%2Fadmin", 400, ""),
		get("an escaped backslash", "/open/..%5Cadmin", 400, ""),
		get("a backslash", `/open/..\admin`, 403, "Read /admin"),
		get("two slashes", "/open/..//admin", 403, "Read /admin"),
		get("a dot at the end", "/exact.", 400, "dot"),
		get("a dot at the end of a segment", "/open./a", 400, "dot"),
		get("a slash at the end", "/open/a/", 400, "slash"),
		get("other letters", "/EXACT", 403, "Read /EXACT"),
		get("an escape in a template", "/users/a%20b", 400, "different ways"),
		get("an unreserved escape", "/%65xact", 200, ""),
		{what: "another method", method: "TRACE", path: "/open/a", want: 403, says: "not part of the API here"},
	})
	a := p.as(t, "/app", http2).send(t, request{method: "GET", host: hostOf("web"), path: "/admin"})
	if got := a.header.Get("content-type"); got != "application/problem+json" {
		t.Errorf("content type %q: %v", got, a)
	}
}

// TestUsage reads what answers say of tokens, whatever the API calls them.
func TestUsage(t *testing.T) {
	t.Parallel()
	answers := map[string]string{
		"/v1/chat/completions": `{"choices":[{"message":{"content":"\"usage\":{\"prompt_tokens\":99}"}}],"usage":{"prompt_tokens":11,"completion_tokens":7}}`,
		"/v1/responses": "data: {\"response\":{\"usage\":null}}\n\ndata: {\"response\":{\"tools\":[{\"default\":{\"usage\":{\"input_tokens\":0,\"output_tokens\":0}}}],\"usage\":" +
			"{\"input_tokens\":11,\"input_tokens_details\":{\"cached_tokens\":5},\"output_tokens\":7},\"metadata\":{\"usage\":\"x\",\"input_tokens\":\"x\",\"output_tokens\":\"x\"}}}\n\n", // as the caller had said
		"/v1/embeddings":                     `{"data":[],"usage":{"prompt_tokens":11,"total_tokens":11}}`,
		"/v1/messages":                       "data: {\"message\":{\"usage\":{\"input_tokens\":6,\"cache_creation_input_tokens\":2,\"cache_read_input_tokens\":3,\"output_tokens\":1}}}\n\n" + strings.Repeat("data: {}\n\n", 400) + "data: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":7}}\n\ndata: {}\n\n",
		"/v1/models/m:generateContent":       `{"usageMetadata":{"promptTokenCount":9,"toolUsePromptTokenCount":2,"candidatesTokenCount":4,"thoughtsTokenCount":3,"totalTokenCount":18}}`,
		"/v1/models/m:streamGenerateContent": "data: {\"usageMetadata\":{\"promptTokenCount\":11}}\n\ndata: {\"usageMetadata\":{\"promptTokenCount\":11,\"thoughtsTokenCount\":7}}\n\n",
	}
	p := startProtocols(t, "ai", "claude", "gemini")
	for _, b := range p.servers {
		b.answer = func(r *http.Request) string { return answers[r.URL.Path] }
	}
	for _, q := range []struct {
		endpoint, path, body string
		out                  int64
	}{
		{"ai", "/v1/chat/completions", `{"model":"m"}`, 7}, {"ai", "/v1/responses", `{"model":"m"}`, 7}, {"ai", "/v1/embeddings", `{"model":"m"}`, 0},
		{"ai", "/v1/messages", `{"model":"m"}`, 7}, {"claude", "/v1/messages", `{"model":"m"}`, 7},
		{"gemini", "/v1/models/m:generateContent", `{}`, 7}, {"gemini", "/v1/models/m:streamGenerateContent", `{}`, 7},
	} {
		a := p.as(t, "/app", http2).post(t, q.endpoint, q.path, q.body)
		if a.status != http.StatusOK || a.body != answers[q.path] {
			t.Fatalf("%s: %v", q.path, a)
		}
		if f := p.flow(t, a); f.InputTokens != 11 || f.OutputTokens != q.out || f.Resource != "m" {
			t.Errorf("%s %s: recorded as %+v", q.endpoint, q.path, f)
		}
	}
}

// --- WebSockets ---

// upgrade asks for a WebSocket, and returns the connection if it becomes one.
func (c *caller) upgrade(t *testing.T, host, path, more string) (net.Conn, *bufio.Reader, answer) {
	t.Helper()
	conn, err := c.dial(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n%s\r\n",
		path, host, base64.StdEncoding.EncodeToString(make([]byte, 16)), more)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return conn, r, answer{err: err}
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return conn, r, answer{status: resp.StatusCode, header: resp.Header}
	}
	return conn, r, read(resp)
}
