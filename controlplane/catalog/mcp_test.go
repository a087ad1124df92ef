package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// rpcFor is a client's request for a list.
func rpcFor(method string) string {
	return `{"jsonrpc":"2.0","id":7,"method":"` + method + `","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`
}

var listTools = rpcFor("tools/list")

// mcpServer is the official SDK's server, with tools, prompts and resources of which each page holds two.
func mcpServer(options mcp.StreamableHTTPOptions, things bool) http.Handler {
	server := mcp.NewServer(&mcp.Implementation{Name: "tickets", Version: "1"}, &mcp.ServerOptions{PageSize: 2})
	call := func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return &mcp.CallToolResult{}, nil
	}
	read := func(context.Context, *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) { return nil, io.EOF }
	for _, name := range []string{"get_ticket", "drop_all", "list_tickets", "close_ticket", "admin"} {
		server.AddTool(&mcp.Tool{Name: name, Description: "a < b", InputSchema: json.RawMessage(
			`{"type":"object","properties":{"id":{"type":"integer","x-mcp-header":"my_id"}},"required":["id"]}`)}, call)
	}
	if !things {
		return mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &options)
	}
	for _, name := range []string{"summary", "secret", "reply"} {
		server.AddPrompt(&mcp.Prompt{Name: name}, func(context.Context, *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) { return nil, io.EOF })
	}
	for _, uri := range []string{"file:///docs/a.md", "file:///docs/a%20b.md", "file:///etc/passwd", "db://x"} {
		server.AddResource(&mcp.Resource{Name: "r", URI: uri}, read)
	}
	for _, uri := range []string{"file:///docs/{path}", "file:///{+path}", "db://{table}"} {
		server.AddResourceTemplate(&mcp.ResourceTemplate{Name: "t", URITemplate: uri}, read)
	}
	return mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &options)
}

// client is the official SDK's, behind what stands for a gateway: lists go to the catalogue, all else to the server.
func (l *listing) client(server http.Handler) *mcp.ClientSession {
	l.t.Helper()
	routes := map[string]string{"tools/list": "list-tools", "prompts/list": "list-prompts",
		"resources/list": "list-resources", "resources/templates/list": "list-templates"}
	gateway := overBoth(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		route, listed := routes[r.Header.Get("mcp-method")]
		if !listed {
			server.ServeHTTP(w, r)
			return
		}
		r.Header.Set(envoy.CallerHeader, reader)
		r.Header.Set(envoy.EndpointHeader, "it")
		r.Header.Set(envoy.RouteHeader, route)
		l.catalog.ServeHTTP(w, r)
	}))
	l.t.Cleanup(gateway.Close)
	session, err := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, nil).Connect(l.t.Context(),
		&mcp.StreamableClientTransport{Endpoint: gateway.URL + "/mcp"}, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = session.Close() })
	return session
}

func TestRealMCPServer(t *testing.T) {
	for _, options := range []mcp.StreamableHTTPOptions{{Stateless: true}, {Stateless: true, JSONResponse: true}} {
		server := mcpServer(options, true)
		l := newListing(t, segment.MCP, server).grants(
			grant(segment.Allow, []segment.Operation{segment.Call}, "tool/*_ticket", "tool/get_*", "tool/list_tickets", "tool/admin", "prompt/*", "resource/*"),
			grant(segment.Deny, []segment.Operation{segment.Call}, "tool/admin"),
			grant(segment.Allow, []segment.Operation{segment.Read}, "prompt/summary", "resource/file:///docs/*", "resource/db://x", "tool/*"))
		session := l.client(server)
		ctx := t.Context()
		tools, err := session.ListTools(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, tool := range tools.Tools {
			names = append(names, tool.Name)
		}
		if want := []string{"get_ticket", "list_tickets"}; !slices.Equal(names, want) || tools.NextCursor != "" {
			t.Errorf("shows tools %v, then %q", names, tools.NextCursor)
		}
		if tools.CacheScope != "private" || tools.TTLMs != 0 {
			t.Errorf("may be kept: %+v", tools.Cacheable)
		}
		schema, err := json.Marshal(tools.Tools[0].InputSchema)
		if err != nil || string(schema) != `{"properties":{"id":{"type":"integer","x-mcp-header":"my_id"}},"required":["id"],"type":"object"}` || tools.Tools[0].Description != "a < b" {
			t.Errorf("%+v, %s, %v", tools.Tools[0], schema, err)
		}
		about, err := json.Marshal(tools.Meta["io.modelcontextprotocol/serverInfo"])
		if err != nil || !bytes.Contains(about, []byte(`"tickets"`)) {
			t.Errorf("of the server: %s, %v", about, err)
		}

		prompts, err := session.ListPrompts(ctx, nil)
		if err != nil || len(prompts.Prompts) != 1 || prompts.Prompts[0].Name != "summary" {
			t.Errorf("prompts: %+v, %v", prompts, err)
		}
		resources, err := session.ListResources(ctx, nil)
		names = nil
		for _, r := range resources.Resources {
			names = append(names, r.URI)
		}
		if want := []string{"db://x", "file:///docs/a%20b.md", "file:///docs/a.md"}; err != nil || !slices.Equal(names, want) {
			t.Errorf("resources: %v, %v", names, err)
		}
		templates, err := session.ListResourceTemplates(ctx, nil)
		if err != nil || len(templates.ResourceTemplates) != 1 || templates.ResourceTemplates[0].URITemplate != "file:///docs/{path}" {
			t.Errorf("templates: %+v, %v", templates, err)
		}

		if tools, err = session.ListTools(ctx, &mcp.ListToolsParams{Cursor: "x"}); err == nil {
			t.Errorf("a page that is not there: %+v", tools)
		}
		l.grants()
		if tools, err = session.ListTools(ctx, nil); err != nil || len(tools.Tools) != 0 {
			t.Errorf("without a grant: %+v, %v", tools, err)
		}
	}
}

func TestMCPServerWithoutPrompts(t *testing.T) {
	server := mcpServer(mcp.StreamableHTTPOptions{Stateless: true}, false)
	newListing(t, segment.MCP, server).allow("*").answers("list-prompts", "/mcp", rpcFor("prompts/list"), 200,
		`{"jsonrpc":"2.0","id":7,"result":{"prompts":[],"resultType":"complete","cacheScope":"private","ttlMs":0,"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"tickets","version":"1"}}}}`)
	older := mcpServer(mcp.StreamableHTTPOptions{}, false) // has sessions, and so no such version
	newListing(t, segment.MCP, older).allow("*").answers("list-tools", "/mcp", listTools, 503,
		`{"jsonrpc":"2.0","id":7,"error":{"code":-32603,"message":"the backend can't be reached","data":{"request_id":"r-1"}}}`)
	newListing(t, segment.MCP, server).allow("*").answers("list-tools", "/mcp", strings.Replace(listTools, "{}", "5", 1), 400,
		`{"jsonrpc":"2.0","id":7,"error":{"code":-32602,"message":"The server does not take what _meta says of the client.","data":{"request_id":"r-1"}}}`)
	newListing(t, segment.MCP, upstream{"/mcp prompts/list": `{"jsonrpc":"2.0","id":1,"error":{"code":-32601,"message":"secret"}}`}).allow("*").
		answers("list-prompts", "/mcp", rpcFor("prompts/list"), 404,
			`{"jsonrpc":"2.0","id":7,"error":{"code":-32601,"message":"The server has no prompts/list.","data":{"request_id":"r-1"}}}`)
}

func TestMCPRequests(t *testing.T) {
	l := newListing(t, segment.MCP, upstream{"/mcp tools/list": `{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"a"}],"resultType":"complete"}}`}).allow("tool/*")
	const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
	for _, c := range []struct {
		body   string
		status int
		number string // of the error
		id     string
	}{
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `}}`, 200, "", `1`},
		{`{"jsonrpc":"2.0","id":"x\u00e9","method":"tools/list","params":{` + meta + `,"cursor":null}}`, 200, "", `"x\u00e9"`},
		{`{"jsonrpc":"2.0","id":-1.50,"method":"tools/list","params":{` + meta + `}}`, 200, "", `-1.50`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `,"cursor":"x"}}`, 400, "-32602", `1`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `,"cursor":5}}`, 400, "-32602", `1`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, 400, "-32602", `1`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":5}}`, 400, "-32602", `1`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2025-11-25","io.modelcontextprotocol/clientCapabilities":{}}}}`, 400, "-32020", `1`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}`, 400, "-32602", `1`},
		{`{"jsonrpc":"2.0","id":"y","method":"prompts/list","params":{` + meta + `}}`, 400, "-32020", `"y"`},
		{`{"jsonrpc":"2.0","method":"tools/list","params":{` + meta + `}}`, 400, "-32600", `null`},
		{`{"jsonrpc":"2.0","id":null,"method":"tools/list","params":{` + meta + `}}`, 400, "-32600", `null`},
		{`{"jsonrpc":"2.0","id":{},"method":"tools/list","params":{` + meta + `}}`, 400, "-32600", `null`},
		{`{"jsonrpc":"1.0","id":1,"method":"tools/list","params":{` + meta + `}}`, 400, "-32600", `1`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":[]}`, 400, "-32600", `1`},
		{`[{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `}}]`, 400, "-32600", `null`},
		{`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `}} {}`, 400, "-32700", `null`},
		{`{`, 400, "-32700", `null`},
	} {
		w := l.ask("list-tools", "/mcp", c.body)
		var got struct {
			ID    json.RawMessage
			Error struct{ Code json.Number }
		}
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != c.status || string(got.Error.Code) != c.number || string(got.ID) != c.id {
			t.Errorf("%s: %d %s, %v", c.body, w.Code, w.Body, err)
		}
	}
}

// What a server is told of a client is what this version needs, and nothing by which it would do more than answer.
func TestWhatMCPServersAreTold(t *testing.T) {
	told, accept := "", ""
	l := newListing(t, segment.MCP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		told, accept = string(body), r.Header.Get("accept")
		w.Header().Set("content-type", "application/json")
		fmt.Fprint(w, `{"jsonrpc":"2.0","id":1,"result":{"tools":[],"resultType":"complete"}}`)
	})).allow("tool/*")
	l.ask("list-tools", "/mcp", `{"jsonrpc":"2.0","id":9,"method":"tools/list","params":{"x":1,"_meta":{"progressToken":1,"io.modelcontextprotocol/logLevel":"debug",
		"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{}}}}}`)
	if want := `{"id":1,"jsonrpc":"2.0","method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/clientCapabilities":{"elicitation":{}},"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}`; told != want || accept != "application/json, text/event-stream" {
		t.Errorf("%s\naccept: %s", told, accept)
	}
}

func TestMCPEvents(t *testing.T) {
	const answer = `{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"a"}]}}`
	progress := "event: message\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{}}\n\n"
	for events, ok := range map[string]bool{
		"data: " + answer + "\n\n": true,
		"data:" + answer:           true,
		": hello\r\nid: 1\r\nevent: message\r\ndata: " + answer + "\r\n\r\n": true,
		"data: " + answer + "\r\r":                                                           true,
		progress + "data: " + answer + "\n\n":                                                true,
		"data: " + strings.Replace(answer, ",", ",\ndata:", 1) + "\n\n":                      true,
		"data: {\"id\":1,\"method\":\"sampling/createMessage\"}\n\ndata: " + answer + "\n\n": true,
		progress:                          false,
		"":                                false,
		"data: " + answer[:len(answer)-1]: false,
		strings.Replace("data: "+answer+"\n\n", `"id":1`, `"id":"1"`, 1): false,
		answer: false,
	} {
		l := newListing(t, segment.MCP, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("content-type", "text/event-stream; charset=utf-8")
			_, _ = io.WriteString(w, events)
		})).allow("tool/*")
		if w := l.ask("list-tools", "/mcp", listTools); (w.Code == 200) != ok || ok != strings.Contains(w.Body.String(), `"name":"a"`) {
			t.Errorf("%q: %d %s", events, w.Code, w.Body)
		}
	}
}
