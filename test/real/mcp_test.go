package real

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

const (
	mcpVersion = "2026-07-28"
	mcpMeta    = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
	mcpGrants  = "tool/get_ticket, tool/slow, tool/grüße, prompt/summary, 'resource/file:///docs/*'" // what /app may use
)

// mcpDocuments are an endpoint of this name, the rights of /app at it, and all rights of /root.
func mcpDocuments(name, address string) string {
	return endpoint(name, "MCP", address) +
		grant(name+"-app", "/app", name, "Call, Read", mcpGrants) + grant(name+"-root", "/root", name, "Call, Read", "'*'")
}

// startRecordedMCP is an `up` with the endpoint "tools" before a server that takes whatever comes.
func startRecordedMCP(t *testing.T) *protocolsUp {
	b := newRecorder()
	t.Cleanup(func() {
		b.server.CloseClientConnections()
		b.server.Close()
	})
	return &protocolsUp{startUp(t, map[string]string{"all.yaml": mcpDocuments("tools", b.address())}), map[string]*recorder{"tools": b}}
}

// mcpHeaders are those of version 2026-07-28. Further ones follow by twos; one that is there is replaced, and "-" leaves it out.
func mcpHeaders(method, name string, more ...string) http.Header {
	h := http.Header{"Accept": {"application/json, text/event-stream"}, "Mcp-Protocol-Version": {mcpVersion}, "Mcp-Method": {method}}
	if name != "" {
		h.Set("mcp-name", name)
	}
	for i := 0; i < len(more); i += 2 {
		h.Del(more[i])
		if more[i+1] != "-" {
			h[http.CanonicalHeaderKey(more[i])] = strings.Split(more[i+1], "\n")
		}
	}
	return h
}

func mcpBody(method, params string) string {
	if params != "" {
		params += ","
	}
	return `{"jsonrpc":"2.0","id":7,"method":"` + method + `","params":{` + params + mcpMeta + `}}`
}

func TestMCPRows(t *testing.T) {
	t.Parallel()
	p := startRecordedMCP(t)
	call := mcpBody("tools/call", `"name":"get_ticket","arguments":{"name":"x","method":["}",{"a":"\u00e9\\"}],"n":-1.5e3}`)
	named := func(name string) string { return mcpBody("tools/call", `"name":"`+name+`"`) }
	encoded := func(name string) string { return "=?base64?" + base64.StdEncoding.EncodeToString([]byte(name)) + "?=" }
	rpc := func(what string, header http.Header, body string, want int, says string) row {
		return row{what: what, path: "/mcp", header: header, body: body, want: want, says: says}
	}
	headers := mcpHeaders("tools/call", "get_ticket")
	const mismatch, invalid, unsupported, parse, params = `"code":-32020`, `"code":-32600`, `"code":-32022`, `"code":-32700`, `"code":-32602`
	p.asks(t, "tools", []row{
		rpc("a call", headers, call, 200, ""),
		rpc("a call with space", headers, " \n"+strings.ReplaceAll(call, ":", " :\t"), 200, ""),
		rpc("its name in base64", mcpHeaders("tools/call", encoded("get_ticket")), call, 200, ""),
		rpc("a name that must be in base64", mcpHeaders("tools/call", encoded("grüße")), named("grüße"), 200, ""),
		rpc("the same, as it is", mcpHeaders("tools/call", "grüße"), named("grüße"), 200, ""),
		rpc("an old session's header", mcpHeaders("tools/call", "get_ticket", "mcp-session-id", "s", "last-event-id", "1"), call, 200, ""),
		rpc("another tool", mcpHeaders("tools/call", "drop_all"), named("drop_all"), 403,
			`"id":7,"jsonrpc":"2.0"}`),
		rpc("another tool, in numbers", mcpHeaders("tools/call", "drop_all"), named("drop_all"), 403, `{"error":{"code":-32010,`),
		rpc("another tool, in words", mcpHeaders("tools/call", "drop_all"), named("drop_all"), 403, `has no grant for Call tool/drop_all"`),
		rpc("a tool of another kind", mcpHeaders("tools/call", "prompt/summary"), named("prompt/summary"), 403, "Call tool/prompt/summary"),
		rpc("a prompt", mcpHeaders("prompts/get", "summary"), mcpBody("prompts/get", `"name":"summary"`), 200, ""),
		rpc("another prompt", mcpHeaders("prompts/get", "get_ticket"), mcpBody("prompts/get", `"name":"get_ticket"`), 403, "Read prompt/get_ticket"),
		rpc("a resource", mcpHeaders("resources/read", "file:///docs/a.md"), mcpBody("resources/read", `"uri":"file:///docs/a.md"`), 200, ""),
		rpc("a resource with an escape", mcpHeaders("resources/read", "file:///docs/a%20b"), mcpBody("resources/read", `"uri":"file:///docs/a%20b"`), 200, ""),
		rpc("another resource", mcpHeaders("resources/read", "file:///etc/passwd"), mcpBody("resources/read", `"uri":"file:///etc/passwd"`), 403, "Read resource/file:///etc/passwd"),
		rpc("another scheme", mcpHeaders("resources/read", "http:///docs/a.md"), mcpBody("resources/read", `"uri":"http:///docs/a.md"`), 403, "Read resource/http"),

		// A header that lies.
		rpc("a lying name", mcpHeaders("tools/call", "get_ticket"), named("drop_all"), 400, mismatch),
		rpc("a lying name in base64", mcpHeaders("tools/call", encoded("get_ticket")), named("drop_all"), 400, mismatch),
		rpc("base64 that is not canonical", mcpHeaders("tools/call", "=?base64?Z2V0X3RpY2tldB==?="), named("get_ticket"), 400, mismatch),
		rpc("base64 as a name", mcpHeaders("tools/call", encoded("get_ticket")), named(encoded("get_ticket")), 400, mismatch),
		rpc("a name in other letters", mcpHeaders("tools/call", "GET_TICKET"), named("get_ticket"), 400, mismatch),
		rpc("no name", mcpHeaders("tools/call", ""), call, 400, mismatch),
		rpc("two names", mcpHeaders("tools/call", "", "mcp-name", "get_ticket\ndrop_all"), call, 400, mismatch),
		rpc("two names, alike", mcpHeaders("tools/call", "", "mcp-name", "get_ticket\nget_ticket"), call, 400, mismatch),
		rpc("two names as one", mcpHeaders("tools/call", "get_ticket,drop_all"), call, 400, mismatch),
		rpc("a lying method", mcpHeaders("tools/list", ""), call, 400, mismatch),
		rpc("another lying method", mcpHeaders("server/discover", ""), call, 400, mismatch),
		rpc("a lying method to the backend", mcpHeaders("prompts/get", "get_ticket"), call, 400, mismatch),
		rpc("no method", mcpHeaders("", "get_ticket", "mcp-method", "-"), call, 400, mismatch),
		rpc("two methods", mcpHeaders("", "get_ticket", "mcp-method", "tools/list\ntools/call"), call, 400, mismatch),
		rpc("a method in other letters", mcpHeaders("Tools/Call", "get_ticket"), call, 400, mismatch),
		rpc("two versions", mcpHeaders("tools/call", "get_ticket", "mcp-protocol-version", "2026-07-28\n2025-06-18"), call, 400, mismatch),
		rpc("a lying version", headers, strings.Replace(call, mcpVersion, "2025-06-18", 1), 400, mismatch),

		// Sessions of older versions, and what else is not in this one.
		rpc("no version", mcpHeaders("tools/call", "get_ticket", "mcp-protocol-version", "-"), call, 400, unsupported),
		rpc("an older version", mcpHeaders("tools/call", "get_ticket", "mcp-protocol-version", "2025-06-18"), call, 400,
			`"supported":["2026-07-28"]`),
		rpc("what is asked for instead", mcpHeaders("tools/call", "get_ticket", "mcp-protocol-version", "2025-06-18"), call, 400, `"requested":"2025-06-18"`),
		rpc("a newer version", mcpHeaders("tools/call", "get_ticket", "mcp-protocol-version", "2027-01-01"), call, 400, unsupported),
		rpc("a session begins", http.Header{}, `{"jsonrpc":"2.0","id":"a","method":"initialize","params":{"protocolVersion":"2025-06-18"}}`, 400, `"id":"a"`),
		rpc("a session in this version", mcpHeaders("initialize", ""), mcpBody("initialize", ""), 404, `"code":-32601`),
		rpc("a ping", mcpHeaders("ping", ""), mcpBody("ping", ""), 404, `"id":7,`),
		rpc("a notification", mcpHeaders("notifications/initialized", ""), `{"jsonrpc":"2.0","method":"notifications/initialized"}`, 400, invalid),
		rpc("a call that wants no answer", headers, strings.Replace(call, `"id":7,`, "", 1), 400, invalid),
		rpc("a call without an id", headers, strings.Replace(call, `"id":7`, `"id":null`, 1), 400, `"id":null`),
		rpc("a batch", headers, "["+call+"]", 400, invalid),
		rpc("a batch in an old session", http.Header{}, "["+call+","+named("drop_all")+"]", 400, invalid),
		{what: "a stream", method: "GET", path: "/mcp", header: mcpHeaders("tools/call", "get_ticket"), want: 405, says: `"id":null,"jsonrpc":"2.0"}`},
		{what: "the end of a session", method: "DELETE", path: "/mcp", header: mcpHeaders("", "", "mcp-session-id", "s"), want: 405, says: invalid},
		{what: "a PUT", method: "PUT", path: "/mcp", header: headers, body: call, want: 405, says: invalid},
		{what: "another path", path: "/mcp/x", header: headers, body: call, want: 403, says: `"id":null,"jsonrpc":"2.0"}`},
		{what: "another path with a slash", path: "/mcp/", header: headers, body: call, want: 403, says: "not part of the API here"},
		{what: "a query", path: "/mcp?x=1", header: headers, body: call, want: 200},

		// What two parsers could read differently.
		rpc("a second name", headers, mcpBody("tools/call", `"name":"drop_all","name":"get_ticket"`), 400, params),
		rpc("a second name behind", headers, mcpBody("tools/call", `"name":"get_ticket","arguments":{},"name":"drop_all"`), 400, params),
		rpc("a second name in other letters", headers, mcpBody("tools/call", `"name":"get_ticket","Name":"drop_all"`), 400, params),
		rpc("a second name, escaped", headers, mcpBody("tools/call", `"name":"get_ticket","n\u0061me":"drop_all"`), 400, params),
		rpc("an escaped name", headers, named(`get\u005fticket`), 400, params),
		rpc("a second method", headers, strings.Replace(call, `"id":7,`, `"id":7,"method":"tools/list",`, 1), 400, invalid),
		rpc("a second method in other letters", headers, strings.Replace(call, `"id":7,`, `"id":7,"Method":"tools/list",`, 1), 400, invalid),
		rpc("a second method, escaped", headers, strings.Replace(call, `"id":7,`, `"id":7,"m\u0065thod":"tools/list",`, 1), 400, parse),
		rpc("an escaped method", headers, strings.Replace(call, `tools/call`, `tools\/call`, 1), 400, invalid),
		rpc("second params", headers, strings.Replace(call, `"id":7,`, `"id":7,"params":{"name":"drop_all"},`, 1), 400, invalid),
		rpc("second params with a long s", headers, strings.Replace(call, `"id":7,`, `"id":7,"paramſ":{"name":"drop_all"},`, 1), 400, invalid),
		rpc("a second id", headers, strings.Replace(call, `"id":7,`, `"id":7,"ID":8,`, 1), 400, invalid),
		rpc("a second version", headers, strings.Replace(call, mcpMeta, mcpMeta[:len(mcpMeta)-1]+`,"io.modelcontextprotocol\/protocolVersion":"2025-06-18"}`, 1), 400, params),
		rpc("second meta", headers, strings.Replace(call, mcpMeta, mcpMeta+`,"_META":{}`, 1), 400, params),
		rpc("no meta", headers, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"get_ticket"}}`, 400, params),
		rpc("meta that is no object", headers, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"get_ticket","_meta":[]}}`, 400, params),
		rpc("meta without a version", headers, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"get_ticket","_meta":{}}}`, 400, params),
		rpc("no params", headers, `{"jsonrpc":"2.0","id":7,"method":"tools/call"}`, 400, params),
		rpc("params that are a list", headers, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":["get_ticket"]}`, 400, params),
		rpc("a name that is a number", headers, mcpBody("tools/call", `"name":7`), 400, params),
		rpc("a name that is empty", mcpHeaders("tools/call", "", "mcp-name", ""), named(""), 400, params),
		rpc("a name with a zero byte", headers, named("get_ticket\x00"), 400, parse),
		rpc("no name in the body", headers, mcpBody("tools/call", `"uri":"get_ticket"`), 400, params),
		rpc("a name in the arguments only", headers, mcpBody("tools/call", `"arguments":{"name":"get_ticket"}`), 400, params),
		rpc("two bodies", headers, call+named("drop_all"), 400, parse),
		rpc("half a body", headers, call[:len(call)-1], 400, parse),
		rpc("no body", headers, "", 400, parse),
		rpc("a text", headers, `"tools/call"`, 400, parse),
		rpc("a mark of byte order", headers, "\ufeff"+call, 400, parse),
		rpc("a body in another charset", mcpHeaders("tools/call", "get_ticket", "content-type", "application/json; charset=utf-7"), call, 400, parse),
		rpc("a body that is zipped", mcpHeaders("tools/call", "get_ticket", "content-encoding", "gzip"), call, 400, parse),
		rpc("too deep", headers, mcpBody("tools/call", `"name":"get_ticket","a":`+strings.Repeat("[", 99)+strings.Repeat("]", 99)), 400, parse),

		// Other spellings of a URI.
		rpc("climbing", mcpHeaders("resources/read", "file:///docs/../etc/passwd"), mcpBody("resources/read", `"uri":"file:///docs/../etc/passwd"`), 400, params),
		rpc("climbing at the end", mcpHeaders("resources/read", "file:///docs/.."), mcpBody("resources/read", `"uri":"file:///docs/.."`), 400, params),
		rpc("climbing, escaped", mcpHeaders("resources/read", "file:///docs/%2e%2E/a"), mcpBody("resources/read", `"uri":"file:///docs/%2e%2E/a"`), 400, params),
		rpc("an escape that is none", mcpHeaders("resources/read", "file:///docs/%zz"), mcpBody("resources/read", `"uri":"file:///docs/%zz"`), 400, params),
		rpc("a scheme in other letters", mcpHeaders("resources/read", "FILE:///docs/a.md"), mcpBody("resources/read", `"uri":"FILE:///docs/a.md"`), 400, params),
		rpc("no scheme", mcpHeaders("resources/read", "docs"), mcpBody("resources/read", `"uri":"docs"`), 400, params),

		// What names nothing, or where nobody looks.
		rpc("discover", mcpHeaders("server/discover", ""), mcpBody("server/discover", ""), 200, ""),
		rpc("complete", mcpHeaders("completion/complete", ""), mcpBody("completion/complete", `"ref":{"type":"ref/prompt","name":"summary"}`), 403, "Read on everything here"),
		rpc("listen", mcpHeaders("subscriptions/listen", ""), mcpBody("subscriptions/listen", `"notifications":{}`), 403, "Read on everything here, which listen needs"),
		rpc("a task", mcpHeaders("tasks/get", "get_ticket"), mcpBody("tasks/get", `"taskId":"get_ticket"`), 403, "Call on everything here"),
	})
	p.servers["tools"].taken()
	p.as(t, "/app", http2).send(t, request{host: hostOf("tools"), path: "/mcp", body: strings.NewReader(call),
		header: mcpHeaders("tools/call", "get_ticket", "mcp-session-id", "s", "last-event-id", "1")})
	if got := p.servers["tools"].taken(); len(got) != 1 || got[0].header.Get("mcp-session-id")+got[0].header.Get("last-event-id") != "" || got[0].header.Get("mcp-name") != "get_ticket" {
		t.Errorf("the server got %+v", got)
	}
}

// TestMCPDenials wants the id of a request in the answer to it, as it was given.
func TestMCPDenials(t *testing.T) {
	t.Parallel()
	p := startRecordedMCP(t)
	app := p.as(t, "/app", http2)
	for id, want := range map[string]string{
		`7`: `7`, `0`: `0`, `-1`: `-1`, `999999999999999`: `999999999999999`, `"a b"`: `"a b"`, `""`: `""`, `"%REQ(:path)%"`: `"%REQ(:path)%"`,
		`"ü<>"`: `"ü<>"`, `9007199254740993`: `null`, `1.5`: `null`, `1e3`: `null`, `"\u0041"`: `null`, `"` + strings.Repeat("x", 1025) + `"`: `null`,
	} {
		body := strings.Replace(mcpBody("tools/call", `"name":"drop_all"`), `"id":7`, `"id":`+id, 1)
		a := app.send(t, request{host: hostOf("tools"), path: "/mcp", body: strings.NewReader(body), header: mcpHeaders("tools/call", "drop_all")})
		var got struct {
			JSONRPC string
			ID      json.RawMessage
			Error   struct {
				Code    int
				Message string
				Data    struct {
					RequestID string `json:"request_id"`
				}
			}
		}
		said := "has no grant for Call tool/drop_all"
		if want == "null" {
			said = "has no grant for Call"
		}
		if err := json.Unmarshal([]byte(a.body), &got); err != nil || a.status != 403 || string(got.ID) != want || got.JSONRPC != "2.0" ||
			got.Error.Code != -32010 || !strings.Contains(got.Error.Message, said) || got.Error.Data.RequestID != a.id() {
			t.Errorf("id %s: %v, want %s", id, a, want)
		}
	}
}

// goMCP is a server by the official SDK for Go, which counts the tools that it runs.
type goMCP struct {
	address string
	mu      sync.Mutex
	ran     []string
}

func (g *goMCP) taken() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	ran := g.ran
	g.ran = nil
	return ran
}

func newGoMCP(t *testing.T, options mcp.StreamableHTTPOptions) *goMCP {
	g := &goMCP{}
	server := mcp.NewServer(&mcp.Implementation{Name: "tickets", Version: "1"}, nil)
	for _, name := range []string{"get_ticket", "drop_all", "slow"} {
		server.AddTool(&mcp.Tool{Name: name, InputSchema: json.RawMessage(`{"type":"object"}`)}, func(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			g.mu.Lock()
			g.ran = append(g.ran, name)
			g.mu.Unlock()
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: name + " ran"}}}, nil
		})
	}
	for _, name := range []string{"summary", "secret"} {
		server.AddPrompt(&mcp.Prompt{Name: name}, func(context.Context, *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			return &mcp.GetPromptResult{Messages: []*mcp.PromptMessage{{Role: "user", Content: &mcp.TextContent{Text: name}}}}, nil
		})
	}
	for _, uri := range []string{"file:///docs/a.md", "file:///docs/a?b=<1>&c=2", "file:///etc/passwd"} {
		server.AddResource(&mcp.Resource{Name: "r", URI: uri}, func(_ context.Context, r *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
			return &mcp.ReadResourceResult{Contents: []*mcp.ResourceContents{{URI: r.Params.URI, Text: "read"}}}, nil
		})
	}
	options.DisableLocalhostProtection = true // the gateway passes on the host that its callers ask for
	s := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &options))
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	g.address = s.Listener.Addr().String()
	return g
}

func TestMCPInGo(t *testing.T) {
	t.Parallel()
	events, whole := newGoMCP(t, mcp.StreamableHTTPOptions{Stateless: true}), newGoMCP(t, mcp.StreamableHTTPOptions{Stateless: true, JSONResponse: true})
	u := startUp(t, map[string]string{"all.yaml": mcpDocuments("events", events.address) + mcpDocuments("whole", whole.address)})
	for endpoint, server := range map[string]*goMCP{"events": events, "whole": whole} {
		for _, v := range []version{http1, http2} {
			ctx := t.Context()
			session, err := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, nil).Connect(ctx,
				&mcp.StreamableClientTransport{Endpoint: "https://" + hostOf(endpoint) + "/mcp", HTTPClient: u.as(t, "/app", v).client, MaxRetries: -1}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := session.InitializeResult().ProtocolVersion; got != mcpVersion {
				t.Errorf("%s %s: speaks %s", v, endpoint, got)
			}
			tools, err := session.ListTools(ctx, nil)
			if err != nil || len(tools.Tools) != 2 || tools.Tools[0].Name != "get_ticket" || tools.Tools[1].Name != "slow" {
				t.Errorf("%s %s: tools %+v, %v", v, endpoint, tools, err)
			}
			prompts, err := session.ListPrompts(ctx, nil)
			if err != nil || len(prompts.Prompts) != 1 || prompts.Prompts[0].Name != "summary" {
				t.Errorf("%s %s: prompts %+v, %v", v, endpoint, prompts, err)
			}
			resources, err := session.ListResources(ctx, nil)
			if err != nil || len(resources.Resources) != 2 || resources.Resources[0].URI == "file:///etc/passwd" || resources.Resources[1].URI == "file:///etc/passwd" {
				t.Errorf("%s %s: resources %+v, %v", v, endpoint, resources, err)
			}
			denied := func(what string, err error) {
				t.Helper()
				if err == nil || !strings.Contains(err.Error(), "has no grant for "+what) {
					t.Errorf("%s %s: %s: %v", v, endpoint, what, err)
				}
			}
			_, err = session.CallTool(ctx, &mcp.CallToolParams{Name: "drop_all"})
			denied("Call tool/drop_all", err)
			_, err = session.GetPrompt(ctx, &mcp.GetPromptParams{Name: "secret"})
			denied("Read prompt/secret", err)
			_, err = session.ReadResource(ctx, &mcp.ReadResourceParams{URI: "file:///etc/passwd"})
			denied("Read resource/file:///etc/passwd", err)
			_, err = session.Complete(ctx, &mcp.CompleteParams{Ref: &mcp.CompleteReference{Type: "ref/prompt", Name: "summary"}, Argument: mcp.CompleteParamsArgument{Name: "x", Value: "y"}})
			denied("Read on everything here", err)

			// And the client goes on.
			result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "get_ticket", Arguments: map[string]any{"name": "drop_all"}})
			if err != nil || result.IsError || result.Content[0].(*mcp.TextContent).Text != "get_ticket ran" {
				t.Errorf("%s %s: %+v, %v", v, endpoint, result, err)
			}
			for _, uri := range []string{"file:///docs/a.md", "file:///docs/a?b=<1>&c=2"} {
				if read, err := session.ReadResource(ctx, &mcp.ReadResourceParams{URI: uri}); err != nil || read.Contents[0].Text != "read" {
					t.Errorf("%s %s: %s: %+v, %v", v, endpoint, uri, read, err)
				}
			}
			if prompt, err := session.GetPrompt(ctx, &mcp.GetPromptParams{Name: "summary"}); err != nil || len(prompt.Messages) != 1 {
				t.Errorf("%s %s: %+v, %v", v, endpoint, prompt, err)
			}
			if err := session.Close(); err != nil {
				t.Error(err)
			}
			if ran := server.taken(); len(ran) != 1 || ran[0] != "get_ticket" {
				t.Errorf("%s %s: ran %v", v, endpoint, ran)
			}
		}
	}
}

// TestMCPSessions has a server that takes older versions, too, and then runs whatever the body names.
func TestMCPSessions(t *testing.T) {
	t.Parallel()
	server := newGoMCP(t, mcp.StreamableHTTPOptions{Stateless: true})
	u := startUp(t, map[string]string{"all.yaml": mcpDocuments("tools", server.address)})
	app := u.as(t, "/app", http2)
	lie := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"drop_all","arguments":{}}}`
	for _, version := range []string{"-", "2025-11-25", "2025-06-18", "2025-03-26"} {
		header := mcpHeaders("tools/call", "get_ticket", "mcp-protocol-version", version, "content-type", "application/json")
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+server.address+"/mcp", strings.NewReader(lie))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if a, ran := read(resp), server.taken(); len(ran) != 1 || ran[0] != "drop_all" {
			t.Fatalf("version %s, past the gateway: %v ran %v: then this test shows nothing", version, a, ran)
		}
		a := app.send(t, request{host: hostOf("tools"), path: "/mcp", body: strings.NewReader(lie), header: header})
		if ran := server.taken(); a.status != http.StatusBadRequest || len(ran) != 0 || !strings.Contains(a.body, `"code":-32022`) {
			t.Errorf("version %s: %v, ran %v", version, a, ran)
		}
	}
	a := app.send(t, request{host: hostOf("tools"), path: "/mcp", body: strings.NewReader(mcpBody("tools/call", `"name":"drop_all"`)), header: mcpHeaders("tools/call", "get_ticket", "content-type", "application/json")})
	if ran := server.taken(); a.status != http.StatusBadRequest || len(ran) != 0 {
		t.Errorf("a lying header: %v, ran %v", a, ran)
	}
	f := u.flow(t, a)
	if f.Verdict != telemetry.Refused || !strings.Contains(f.Detail, `another name in its body than in the header "mcp-name"`) {
		t.Errorf("a lying header is recorded as %+v", f)
	}
	a = app.send(t, request{host: hostOf("tools"), path: "/mcp", body: strings.NewReader(mcpBody("tools/call", `"name":"drop_all"`)), header: mcpHeaders("tools/call", "drop_all")})
	if f := u.flow(t, a); f.Verdict != telemetry.Denied || f.Operation != segment.Call || f.Resource != "tool/drop_all" {
		t.Errorf("a denied call is recorded as %+v", f)
	}
}

func TestMCPInPython(t *testing.T) {
	t.Parallel()
	const python = "../../.parts/venv/bin/python"
	u := startUp(t, map[string]string{"all.yaml": mcpDocuments("tools", startPart(t, "", python, "testdata/mcp_server.py", hostOf("tools")))})
	folder := t.TempDir()
	ask := func(who string) string {
		u.writePEM(t, folder, who)
		ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, python, "testdata/mcp_client.py", hostOf("tools"), u.listen, folder).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	denied := func(what string) string { return "-32010 " + domain + "/app has no grant for " + what }
	want := `version: 2026-07-28
tools: get_ticket grüße slow
prompts: summary
resources: file:///docs/a.md
templates: file:///docs/{name}.txt
get_ticket: ticket 3
grüße: hallo
slow: done
progress: 1.0
drop_all: ` + denied("Call tool/drop_all") + `
summary: sum up x
secret: ` + denied("Read prompt/secret") + `
file:///docs/a.md: a
file:///docs/b.txt: b
file:///etc/passwd: ` + denied("Read resource/file:///etc/passwd") + `
file:///docs/../etc/passwd: -32602 The request has a uri that nothing here has.
`
	if diff := cmp.Diff(want, ask("/app")); diff != "" {
		t.Errorf("as /app (-want +got):\n%s", diff)
	}
	if got := ask("/root"); !strings.Contains(got, "tools: drop_all get_ticket grüße slow\n") || !strings.Contains(got, "\ndrop_all: dropped\n") || !strings.Contains(got, "\nfile:///etc/passwd: root\n") {
		t.Errorf("as /root:\n%s", got)
	}
}
