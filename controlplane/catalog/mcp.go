package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// The lists of the Model Context Protocol, 2026-07-28. A caller sees the tools that it may call, and the prompts and resources
// that it may read. Their descriptions are the server's, and may speak of others.

const (
	mcpVersion  = "2026-07-28"
	mcpReserved = "io.modelcontextprotocol/" // keys of _meta that the protocol itself has
)

// Codes of errors: JSON-RPC 2.0, section 5.1, and MCP.
const (
	rpcParse          = -32700
	rpcInvalidRequest = -32600
	rpcNoMethod       = -32601
	rpcInvalidParams  = -32602
	rpcInternal       = -32603
	mcpHeaderMismatch = -32020
)

// mcpList is one list of a server.
type mcpList struct {
	method string
	key    string // of the list in the result
	naming
}

var (
	mcpTools     = mcpList{"tools/list", "tools", naming{key: "name", operation: segment.Call, kind: "tool/"}}
	mcpPrompts   = mcpList{"prompts/list", "prompts", naming{key: "name", operation: segment.Read, kind: "prompt/"}}
	mcpResources = mcpList{"resources/list", "resources", naming{key: "uri", operation: segment.Read, kind: "resource/"}}
	// A template is a resource by its own text: nobody knows what URIs it stands for, but a grant that covers those from its
	// first variable on covers that, too.
	mcpTemplates = mcpList{"resources/templates/list", "resourceTemplates", naming{key: "uriTemplate", operation: segment.Read, kind: "resource/"}}
)

// rpcError is what a client is told, in the words of JSON-RPC.
type rpcError struct {
	refusal
	number int
}

func refuseRPC(status, number int, why string) error { return rpcError{refusal{status, why}, number} }

// inRPC answers with the whole list on one page.
func inRPC(list mcpList) answering {
	return func(c *Catalog, w http.ResponseWriter, r *http.Request, q *question) {
		id, params, err := list.asked(r)
		var result map[string]any
		if err == nil {
			result, err = list.answer(r.Context(), q, params)
		}
		message := map[string]any{"jsonrpc": "2.0", "id": id}
		status := http.StatusOK
		if err != nil {
			told, ok := errors.AsType[rpcError](err)
			if !ok {
				told = rpcError{c.refused(q, err), rpcInternal}
			}
			status = told.code
			message["error"] = map[string]any{"code": told.number, "message": told.why,
				"data": map[string]string{"request_id": r.Header.Get("x-request-id")}}
		} else {
			message["result"] = result
		}
		w.Header().Set("content-type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(message)
	}
}

// asked reads a request for the list: its id, which the answer has again, and its parameters.
func (l mcpList) asked(r *http.Request) (id json.RawMessage, params map[string]json.RawMessage, err error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, envoy.MaxBodyBytes))
	if err != nil {
		return nil, nil, err
	}
	var message struct {
		JSONRPC string                     `json:"jsonrpc"`
		ID      json.RawMessage            `json:"id"`
		Method  string                     `json:"method"`
		Params  map[string]json.RawMessage `json:"params"`
	}
	err = json.Unmarshal(body, &message)
	if _, malformed := errors.AsType[*json.SyntaxError](err); malformed || len(body) == 0 {
		return nil, nil, refuseRPC(http.StatusBadRequest, rpcParse, "The body is not JSON.")
	}
	if named := len(message.ID) > 0 && strings.ContainsRune(`"-0123456789`, rune(message.ID[0])); named {
		id = message.ID
	}
	switch {
	case err != nil || id == nil || message.JSONRPC != "2.0":
		return id, nil, refuseRPC(http.StatusBadRequest, rpcInvalidRequest, "The body is not a request of JSON-RPC 2.0 with an id.")
	case message.Method != l.method:
		return id, nil, refuseRPC(http.StatusBadRequest, mcpHeaderMismatch, "The header mcp-method and the body name different methods.")
	}
	var cursor *string
	if given := message.Params["cursor"]; given != nil && (json.Unmarshal(given, &cursor) != nil || cursor != nil) {
		return id, nil, refuseRPC(http.StatusBadRequest, rpcInvalidParams, "There is no such page: the whole list is on the first.")
	}
	return id, message.Params, nil
}

func (l mcpList) answer(ctx context.Context, q *question, params map[string]json.RawMessage) (map[string]any, error) {
	meta, err := mcpMeta(params["_meta"])
	if err != nil {
		return nil, err
	}
	var about map[string]json.RawMessage // what the server says of itself
	list, err := paged(ctx, func(ctx context.Context, cursor string) ([]json.RawMessage, string, error) {
		result, err := l.page(ctx, q.store, meta, cursor)
		if err != nil {
			return nil, "", err
		}
		about = result.Meta
		var page array
		if err := json.Unmarshal(result.all[l.key], &page); err != nil {
			return nil, "", fmt.Errorf("read answer to %s: %w", l.method, err)
		}
		return page, result.NextCursor, nil
	})
	if err != nil {
		return nil, err
	}
	for key := range about {
		if !strings.HasPrefix(key, mcpReserved) {
			delete(about, key) // whatever it is, it may be about what is hidden
		}
	}
	result := map[string]any{
		l.key:        objects(byName(q.visible(list, l.naming))),
		"resultType": "complete",
		"cacheScope": "private",
		"ttlMs":      0, // a grant may end at any moment
	}
	if len(about) > 0 {
		result["_meta"] = about
	}
	return result, nil
}

// mcpMeta is what a server is told of a client: what it says of itself, and nothing by which it asks for more than an answer.
func mcpMeta(given json.RawMessage) (map[string]json.RawMessage, error) {
	var told map[string]json.RawMessage
	if given != nil && json.Unmarshal(given, &told) != nil {
		return nil, refuseRPC(http.StatusBadRequest, rpcInvalidParams, "_meta is no object.")
	}
	meta := map[string]json.RawMessage{}
	for _, name := range []string{"protocolVersion", "clientCapabilities", "clientInfo"} {
		key := mcpReserved + name
		switch value := told[key]; {
		case value != nil:
			meta[key] = value
		case name != "clientInfo":
			return nil, refuseRPC(http.StatusBadRequest, rpcInvalidParams, "_meta has no "+key+".")
		}
	}
	if string(meta[mcpReserved+"protocolVersion"]) != `"`+mcpVersion+`"` {
		return nil, refuseRPC(http.StatusBadRequest, mcpHeaderMismatch, "The header mcp-protocol-version and _meta name different versions.")
	}
	return meta, nil
}

// mcpResult is a page of a list.
type mcpResult struct {
	ResultType string                     `json:"resultType"`
	NextCursor string                     `json:"nextCursor"`
	Meta       map[string]json.RawMessage `json:"_meta"`
	all        map[string]json.RawMessage
}

// page asks the server for one page.
func (l mcpList) page(ctx context.Context, s store, meta map[string]json.RawMessage, cursor string) (*mcpResult, error) {
	params := map[string]any{"_meta": meta}
	if cursor != "" {
		params["cursor"] = cursor
	}
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": l.method, "params": params})
	if err != nil {
		return nil, err
	}
	a, err := s.do(ctx, call{method: http.MethodPost, at: "/mcp", body: body, lists: true, header: map[string]string{
		"accept": "application/json, text/event-stream", "mcp-protocol-version": mcpVersion, "mcp-method": l.method}})
	if err != nil {
		return nil, err
	}
	message, err := a.mcpMessage()
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask for %s: status %d: %w", l.method, a.code, err)
	case message.Error != nil && message.Error.Code == rpcNoMethod:
		return nil, refuseRPC(http.StatusNotFound, rpcNoMethod, "The server has no "+l.method+".")
	case message.Error != nil && message.Error.Code == rpcInvalidParams && cursor == "":
		return nil, refuseRPC(http.StatusBadRequest, rpcInvalidParams, "The server does not take what _meta says of the client.")
	case message.Error != nil || a.code != http.StatusOK:
		return nil, fmt.Errorf("ask for %s: status %d, error %+v", l.method, a.code, message.Error)
	}
	var result mcpResult
	if err := errors.Join(json.Unmarshal(message.Result, &result), json.Unmarshal(message.Result, &result.all)); err != nil {
		return nil, fmt.Errorf("read answer to %s: %w", l.method, err)
	}
	if result.ResultType != "complete" && result.ResultType != "" {
		return nil, fmt.Errorf("ask for %s: the result is %q", l.method, result.ResultType)
	}
	return &result, nil
}

// mcpMessage is an answer of a server.
type mcpMessage struct {
	ID     json.RawMessage `json:"id"`
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Code int `json:"code"`
	} `json:"error"`
}

// mcpMessage finds what answers request 1, in a body that is JSON or a stream of events, as the HTML standard has them
// (server-sent events, section 9.2.6).
func (a *answer) mcpMessage() (*mcpMessage, error) {
	kind, _, err := mime.ParseMediaType(a.header.Get("content-type"))
	if err != nil {
		return nil, err
	}
	switch kind {
	case "application/json":
		return mcpMessageIn(a.body)
	case "text/event-stream":
		lines := bytes.ReplaceAll(bytes.ReplaceAll(a.body, []byte("\r\n"), []byte("\n")), []byte("\r"), []byte("\n"))
		for event := range bytes.SplitSeq(lines, []byte("\n\n")) {
			var data []byte
			for line := range bytes.SplitSeq(event, []byte("\n")) {
				if text, ok := bytes.CutPrefix(line, []byte("data:")); ok {
					data = append(append(data, text...), '\n')
				}
			}
			if message, err := mcpMessageIn(data); err == nil {
				return message, nil
			}
		}
		return nil, errors.New("no event is the answer")
	}
	return nil, fmt.Errorf("the answer is %s", kind)
}

func mcpMessageIn(text []byte) (*mcpMessage, error) {
	var message mcpMessage
	if err := json.Unmarshal(text, &message); err != nil {
		return nil, err
	}
	if string(message.ID) != "1" || (message.Result == nil) == (message.Error == nil) {
		return nil, errors.New("this is not the answer")
	}
	return &message, nil
}
