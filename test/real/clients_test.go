package real

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// clientsPython is an environment of its own: what the clients need is large, and at odds with what the demo needs.
const clientsPython = "../../.parts/clients/bin/python"

const (
	point = "6a4f1bd4-7b0a-4f44-9b6d-3a5e7b0a4f44" // an object
	app   = domain + "/app has no grant for "
)

// TestClients sends the official Python clients through the gateway, over mTLS, as a caller who is granted one model or one
// collection. The servers behind it give answers as the real ones do; Milvus is a real one, Milvus Lite.
func TestClients(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command(clientsPython, "-c", "import pymilvus, weaviate, qdrant_client, anthropic, google.genai").CombinedOutput(); err != nil {
		t.Fatalf("this test needs the clients (`make clients`): %v\n%s", err, out)
	}
	p := startProtocols(t, "claude", "gemini", "qdrant", "weaviate", "milvus")
	for name, answers := range recorded {
		p.servers[name].answer = func(r *http.Request) string {
			at := r.Method + " " + r.URL.Path
			if r.Header.Get("X-Stainless-Helper-Method") == "stream" { // so the client of Anthropic says
				at += " stream"
			}
			return answers[at]
		}
	}
	p.servers["qdrant"].reply = func(path string) message {
		switch path {
		case "/qdrant.Points/Query": // QueryResponse{result: {id: {num: 7}}}
			return field(1, field(1, field(1, 7)))
		case "/qdrant.Points/Upsert": // PointsOperationResponse{result: {status: Completed}}
			return field(1, field(2, 2))
		case "/qdrant.Collections/CollectionExists": // CollectionExistsResponse{result: {exists: true}}
			return field(1, field(1, 1))
		case "/qdrant.Collections/List": // ListCollectionsResponse
			return field(1, field(1, "docs")).with(1, field(1, "secret"))
		}
		return nil
	}
	p.servers["weaviate"].reply = func(path string) message {
		if path == "/weaviate.v1.Weaviate/Search" { // SearchReply{results: {metadata: {id_as_bytes}}}
			id, _ := hex.DecodeString(strings.ReplaceAll(point, "-", ""))
			return field(2, field(2, field(20, string(id))))
		}
		return nil
	}
	lite := startPart(t, "", filepath.Dir(clientsPython)+"/milvus-lite", "server", "--data-dir", t.TempDir(), "--host", "127.0.0.1", "--port")
	before := p.status(t)
	p.write(t, "lite.yaml", endpoint("lite", "Milvus", lite)+grant("lite-app", "/app", "lite", "Read, Write, Admin", "docs"))
	eventually(t, "Milvus Lite in force", func() bool {
		st := p.status(t)
		return len(st.Problems) == 0 && st.Generation.Digest != before.Generation.Digest && st.Gateways[0].InForce == string(st.Generation.Digest)
	})
	folder := t.TempDir()
	p.writePEM(t, folder, "/app")
	for client, endpoint := range map[string]string{"anthropic": "claude", "google-genai": "gemini", "qdrant-client": "qdrant", "weaviate-client": "weaviate", "pymilvus": "lite"} {
		t.Run(client, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, clientsPython, "testdata/clients.py", client, hostOf(endpoint), p.listen, folder)
			cmd.WaitDelay = time.Second
			var errOut bytes.Buffer
			cmd.Stderr = &errOut
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s%s", err, out, errOut.String())
			}
			said := map[string]string{}
			for line := range strings.Lines(string(out)) {
				step, what, _ := strings.Cut(strings.TrimSpace(line), ": ")
				said[step] = what
			}
			for step, want := range wanted[client] {
				got := said[step]
				delete(said, step)
				if exception, words, raised := strings.Cut(want, "…"); !raised && got != want || !strings.HasPrefix(got, exception) || !strings.Contains(got, words) {
					t.Errorf("%s: %q, want %q", step, got, want)
				}
			}
			for step, got := range said {
				t.Errorf("%s: %q, and nothing was wanted", step, got)
			}
		})
	}
}

// recorded are answers of the APIs, as those who made them describe them.
var recorded = map[string]map[string]string{
	"claude": {
		"POST /v1/messages": `{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[{"type":"text","text":"hello"}],"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":11,"output_tokens":7}}`,
		"POST /v1/messages stream": `event: message_start
data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":11,"output_tokens":1}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"hello"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":7}}

event: message_stop
data: {"type":"message_stop"}

`,
		"POST /v1/messages/count_tokens": `{"input_tokens":11}`,
		"GET /v1/models":                 `{"data":[{"type":"model","id":"m","display_name":"M","created_at":"2026-01-01T00:00:00Z"},{"type":"model","id":"o","display_name":"O","created_at":"2026-01-01T00:00:00Z"}],"has_more":false,"first_id":"m","last_id":"o"}`,
	},
	"gemini": {
		"POST /v1/models/m:generateContent":       generated,
		"POST /v1/models/m:streamGenerateContent": "data: " + generated + "\n\n",
		"POST /v1/models/m:batchEmbedContents":    `{"embeddings":[{"values":[0.5]},{"values":[0.25]}]}`,
		"GET /v1/models":                          `{"models":[{"name":"models/m"},{"name":"models/o"}]}`,
	},
	"qdrant": {
		"POST /collections/docs/points/query": `{"result":{"points":[{"id":7,"version":1,"score":0.5}]},"status":"ok","time":0.1}`,
		"PUT /collections/docs/points":        `{"result":{"operation_id":1,"status":"completed"},"status":"ok","time":0.1}`,
		"GET /collections/docs/exists":        `{"result":{"exists":true},"status":"ok","time":0.1}`,
		"GET /collections":                    `{"result":{"collections":[{"name":"docs"},{"name":"secret"}]},"status":"ok","time":0.1}`,
	},
	"weaviate": {
		"GET /v1/meta":                   `{"version":"1.35.2","hostname":"http://[::]:8080","modules":{}}`,
		"GET /v1/schema/Docs":            class,
		"GET /v1/schema":                 `{"classes":[` + class + `,` + strings.ReplaceAll(class, "Docs", "Secret") + `]}`,
		"HEAD /v1/objects/Docs/" + point: "204 ",
		"POST /v1/objects":               `{"class":"Docs","id":"` + point + `","properties":{"a":1}}`,
	},
}

const (
	generated = `{"candidates":[{"content":{"role":"model","parts":[{"text":"hello"}]},"finishReason":"STOP","index":0}],"usageMetadata":{"promptTokenCount":11,"candidatesTokenCount":7,"totalTokenCount":18}}`
	class     = `{"class":"Docs","vectorizer":"none","vectorIndexType":"hnsw","properties":[],"invertedIndexConfig":{"bm25":{"b":0.75,"k1":1.2},"stopwords":{"preset":"en"}},"replicationConfig":{"factor":1},"shardingConfig":{},"multiTenancyConfig":{"enabled":false},"vectorIndexConfig":{}}`
)

// wanted is what each step of a client says. An exception comes before "…", and some of its words behind it.
var wanted = map[string]map[string]string{
	"anthropic": {
		"m": "hello", "stream m": "hello", "count m": "11", "list": "['m']",
		"o":     "PermissionDeniedError Error code: 403…" + app + "Infer o'",
		"batch": "PermissionDeniedError Error code: 403…" + app + "Infer on everything here, which create-batch needs",
	},
	"google-genai": {
		"m": "hello", "stream m": "hello", "embed m": "[[0.5], [0.25]]", "list": "['models/m']",
		"o":       "ClientError 403 PERMISSION_DENIED.…" + app + "Infer o (",
		"embed o": "ClientError 403 PERMISSION_DENIED.…" + app + "Embed o (",
		"files":   "ClientError 403 PERMISSION_DENIED.…" + app + "Read on everything here, which list-files-v1 needs",
	},
	"qdrant-client": {
		"REST docs": "[7]", "REST upsert": "completed", "REST exists": "True", "REST list": "['docs']",
		"REST secret": "UnexpectedResponse Unexpected Response: 403 (Forbidden)…" + app + "Read secret (",
		"REST lookup": "UnexpectedResponse Unexpected Response: 403 (Forbidden)…" + app + "Read on everything here, which",
		"gRPC docs":   "[7]", "gRPC upsert": "completed", "gRPC exists": "True", "gRPC list": "['docs']",
		"gRPC secret": "_InactiveRpcError …StatusCode.PERMISSION_DENIED details = \"" + app + "Read secret (",
		"gRPC lookup": "_InactiveRpcError …StatusCode.PERMISSION_DENIED details = \"" + app + "Read on everything here, which field 14 of the message asks for",
	},
	"weaviate-client": {
		"search Docs": "['" + point + "']", "exists Docs": "True", "get Docs": "True", "insert Docs": point, "insert many Docs": "False", "list": "['Docs']",
		"search Secret":      "InsufficientPermissionsError …" + app + "Read Secret (",
		"exists Secret":      "InsufficientPermissionsError …" + app + "Discover Secret (",
		"get Secret":         "InsufficientPermissionsError …403",
		"insert Secret":      "InsufficientPermissionsError …" + app + "Write Secret (",
		"insert many Secret": "InsufficientPermissionsError …" + app + "Write Secret (",
		"GraphQL":            "InsufficientPermissionsError …" + app + "Read on everything here, which graphql needs",
	},
	"pymilvus": {
		"create docs": "None", "insert docs": "1", "search docs": "[1]", "list": "['docs']", "drop docs": "None",
		"create secret": "_MultiThreadedRendezvous …StatusCode.PERMISSION_DENIED details = \"" + app + "Admin secret (",
		"insert secret": "_InactiveRpcError …StatusCode.PERMISSION_DENIED details = \"" + app + "Discover secret (",
		"search secret": "_InactiveRpcError …StatusCode.PERMISSION_DENIED details = \"" + app + "Read secret (",
		"drop secret":   "_InactiveRpcError …StatusCode.PERMISSION_DENIED details = \"" + app + "Admin secret (",
	},
}
