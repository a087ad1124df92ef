package envoy

import (
	"strings"
	"testing"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

func overMCP(t testing.TB) *Resources {
	cfg := corpus.Assemble(t, []string{`---
apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: tools}
spec:
  hostnames: [tools.internal]
  protocol: MCP
  backends: [{name: local, addresses: ['127.0.0.1:8001'], tls: {mode: None}}]
`})
	_, r := lowered(&cfg, time.Unix(0, 0), "written out")
	return r
}

// context changes what the script is told of a route.
func (v victim) context(name string, change func(map[string]*structpb.Value)) {
	edit(v, v.row(name).TypedPerFilterConfig[extractFilter], func(l *luav3.LuaPerRoute) { change(l.GetFilterContext().Fields) })
}

var mcpMutations = []mutation{
	{"a body that nobody reads", func(v victim) { v.look("call-tool", "nothing") }},
	{"a body that nobody is told of", func(v victim) { delete(v.row("call-tool").TypedPerFilterConfig, extractFilter) }},
	{"a body that does not end", func(v victim) { v.look("call-tool", "rpc endless") }},
	{"a name from elsewhere", func(v victim) { v.look("call-tool", "rpc path") }},
	{"another method in the body than in the header", func(v victim) {
		v.context("call-tool", func(f map[string]*structpb.Value) { f["method"] = structpb.NewStringValue("tools/list") })
	}},
	{"no method in the body", func(v victim) {
		v.context("call-tool", func(f map[string]*structpb.Value) { delete(f, "method") })
	}},
	{"any method in the header", func(v victim) { m := v.row("call-tool").Match; m.Headers = m.Headers[:1] }},
	{"all methods in the header but one", func(v victim) { v.row("list-tools").Match.Headers[1].InvertMatch = true }},
	{"a method in the header as a prefix", func(v victim) {
		v.row("call-tool").Match.Headers[1].HeaderMatchSpecifier = &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}
	}},
	{"another path", func(v victim) {
		v.row("call-tool").Match.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
	}},
	{"a name that is another parameter", func(v victim) {
		v.context("call-tool", func(f map[string]*structpb.Value) { f["param"] = structpb.NewStringValue("title") })
	}},
	{"a call that needs no name", func(v victim) {
		v.context("call-tool", func(f map[string]*structpb.Value) { delete(f, "param") })
	}},
	{"a tool as a prompt", func(v victim) {
		v.context("call-tool", func(f map[string]*structpb.Value) { f["kind"] = structpb.NewStringValue("prompt/") })
	}},
	{"what is elsewhere goes to the backend", func(v victim) { v.row("elsewhere-mcp").Action = v.row("discover").Action }},
}

func TestCheckRefusesMCP(t *testing.T) {
	if err := Check(overMCP(t)); err != nil {
		t.Fatal(err)
	}
	for _, m := range mcpMutations {
		t.Run(m.name, func(t *testing.T) {
			r := overMCP(t)
			m.change(victim{t, r})
			err := Check(r)
			if err == nil {
				t.Fatal("passes")
			}
			t.Log(strings.ReplaceAll(err.Error(), "\n", "; "))
		})
	}
}

// Every row of MCP whose resource is in the request has a place where the script finds it.
func TestMCPNames(t *testing.T) {
	used := 0
	for _, r := range segment.MCP.Routes() {
		if r.Path != mcpPath || r.Method != "POST" {
			t.Errorf("%s is %s %s", r.Name, r.Method, r.Path)
		}
		if _, ok := mcpNames[r.MCP]; ok != (r.Resource == segment.ToolName) {
			t.Errorf("%s: a name is found: %t", r.Name, ok)
		} else if ok {
			used++
		}
	}
	if used != len(mcpNames) {
		t.Errorf("%d of %d names are used", used, len(mcpNames))
	}
}
