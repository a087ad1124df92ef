package envoy

import (
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/segment"
)

// All requests of MCP have one path. Which row one fits, its header mcp-method says, and mcp.lua sees to it that its body
// says the same.

const (
	mcpPath         = "/mcp"
	mcpMethodHeader = "mcp-method"
	wordRPC         = "rpc" // the function of mcp.lua
)

// mcpHeaders belong to sessions of older versions.
var mcpHeaders = []string{"mcp-session-id", "last-event-id"}

// named is where the parameters of a method have a name, and what stands before it in grants.
type named struct{ param, kind string }

var mcpNames = map[string]named{
	"tools/call":     {"name", "tool/"},
	"prompts/get":    {"name", "prompt/"},
	"resources/read": {"uri", "resource/"},
}

// rpc looks where a request of MCP has its name. Other requests of it are looked at, too: their headers must be true.
func (l *lookout) rpc(r segment.Route) {
	n, ok := mcpNames[r.MCP]
	if r.Resource == segment.ToolName && !ok {
		return // nobody knows where: nothing is resolved
	}
	l.words = []string{wordRPC}
	l.set("method", r.MCP)
	if r.Resource == segment.ToolName {
		l.set("param", n.param)
		l.set("kind", n.kind)
	}
}

func mcpMethod(method string) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{Name: mcpMethodHeader, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: exact(method)}}
}

// elsewhereOverMCP is every other request to the same path. The script says what is wrong with it.
func elsewhereOverMCP() *routev3.Route {
	out := elsewhere()
	out.Name += "-mcp"
	out.Match.PathSpecifier = &routev3.RouteMatch_Path{Path: mcpPath}
	l := lookout{words: []string{wordRPC}, fields: map[string]*structpb.Value{}}
	out.TypedPerFilterConfig = map[string]*anypb.Any{extractFilter: pack(&luav3.LuaPerRoute{FilterContext: l.context()})}
	return out
}

// rpcError answers in the words of JSON-RPC 2.0, section 5. The id is null unless it is known.
func (r *reply) rpcError(message, requestID string) map[string]any {
	code := -32603 // internal error
	switch r.status {
	case 400:
		code = -32600 // invalid request
	case 401, 403, 429:
		code = -32010 // of those that are left to implementations
	case 404:
		code = -32601 // method not found
	}
	return rpcReply(map[string]any{"code": code, "message": message, "data": map[string]any{"request_id": requestID}}, nil)
}

func rpcReply(told, id any) map[string]any {
	return map[string]any{"jsonrpc": "2.0", "id": id, "error": told}
}

// rpcTold answers a request whose id is known.
func (r *reply) rpcTold(e *segment.Endpoint) *hcmv3.ResponseMapper {
	told := r.rpcError(r.said(e), requestID)
	told["id"] = metadataOf(rpcID)
	return inJSON(told, true, whenAll(r.when(), whenFound(metadataSpace, rpcID)))
}

// rpcUntold answers every other. An id that is null is left out with all that is missing, unless "-" stands for that: so it
// does not say what may be missing.
func (r *reply) rpcUntold(e *segment.Endpoint) *hcmv3.ResponseMapper {
	said, _, _ := strings.Cut(r.said(e), "%DYNAMIC_METADATA")
	return inJSON(r.rpcError(said, requestID), false, r.when())
}

// rpcRefusals are the answers whose error mcp.lua has written.
func rpcRefusals() *hcmv3.ResponseMapper {
	return inJSON(rpcReply(metadataOf(rpcRefused), metadataOf(rpcID)), false, whenFound(metadataSpace, rpcRefused)) // missing is null
}

// What mcp.lua leaves in dynamic metadata.
const (
	rpcID      = "rpc_id"
	rpcRefused = "rpc_error"
)

// rpc demands that what is chosen by mcp-method goes on only if the script has seen that the body says the same.
func (c *checker) rpc(x *routev3.Route, words []string, context *structpb.Struct) {
	chosen := false
	for _, h := range x.GetMatch().GetHeaders() {
		chosen = chosen || h.Name == mcpMethodHeader
	}
	read := len(words) > 0 && words[0] == wordRPC
	if !chosen && !read || x.GetDirectResponse() != nil {
		return
	}
	method := context.GetFields()["method"].GetStringValue()
	matched := false
	for _, h := range x.GetMatch().GetHeaders() {
		matched = matched || method != "" && proto.Equal(h, mcpMethod(method))
	}
	if !read || len(words) != 1 || !matched || x.GetMatch().GetPath() != mcpPath {
		c.wrong("route %s takes requests of MCP by a header that need not be true", x.Name)
	}
	fields, n := context.GetFields(), mcpNames[method]
	if fields["param"].GetStringValue() != n.param || fields["kind"].GetStringValue() != n.kind {
		c.wrong("route %s does not name what %s is about", x.Name, method)
	}
}
