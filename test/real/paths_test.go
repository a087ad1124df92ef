package real

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"sallyport.dev/telemetry"
)

// shape is a request line, and what the backend is asked then. Empty: nothing, whatever the caller may do.
type shape struct{ method, path, reaches string }

const chatPath = "/v1/chat/completions"

var openAIShapes = []shape{
	{"POST", chatPath, chatPath},
	{"POST", chatPath + "?a=/../b&model=x", chatPath + "?a=/../b&model=x"}, // a query is not part of the path
	{"POST", "/v1/./chat/completions", chatPath},                           // one reading, and the backend gets it
	{"POST", "/v1/x/../chat/completions", chatPath},
	{"POST", "//v1//chat/completions", chatPath},
	{"POST", chatPath + "/", ""},
	{"POST", chatPath + "//", ""},
	{"POST", chatPath + "/.", ""},
	{"POST", chatPath + "/x", ""},
	{"POST", chatPath + ";a=b", ""},
	{"POST", "/v1;a=b/chat/completions", ""},
	{"POST", "/V1/chat/completions", ""},
	{"POST", "/v1/Chat/completions", ""},
	{"POST", "/v1/ch%61t/completions", chatPath},
	{"POST", "/v1/ch%2561t/completions", ""},
	{"POST", "/v1%2fchat/completions", ""},
	{"POST", "/v1%2Fchat%2Fcompletions", ""},
	{"POST", "/v1%5cchat/completions", ""},
	{"POST", "/v1\\chat\\completions", chatPath},
	{"POST", "/v1/chat/completions%00", ""},
	{"POST", "/v1/chat/completions%20", ""},
	{"POST", "/v1/chat/completions%", ""},
	{"POST", "/v1/chat/completions%zz", ""},
	{"POST", "/v1/%2e%2e/v1/chat/completions", chatPath},
	{"POST", "/../v1/chat/completions", chatPath},
	{"POST", "/v1/chat/completions/../../../secret", ""},
	{"POST", "/v1/chat/completions/..", ""},
	{"POST", "/", ""},
	{"POST", "*", ""},
	{"POST", "v1/chat/completions", ""},
	{"POST", "/v1/chat", ""},
	{"POST", "/chat/completions", ""},
	{"POST", "/api/v1/chat/completions", ""},
	{"POST", "/v1/messages", "/v1/messages"},
	{"POST", "/v1/responses", "/v1/responses"},
	{"POST", "/completion", "/completion"},
	{"POST", "/infill", "/infill"},
	{"POST", "/tokenize", "/tokenize"},
	{"POST", "/v1/models", ""},
	{"GET", "/props", ""},
	{"GET", "/slots", ""},
	{"GET", "/metrics", ""},
	{"GET", "/health", "/health"},
	{"POST", "/invocations", ""},
	{"POST", "/v1/load_lora_adapter", ""},
	{"POST", "/v1/realtime/client_secrets", ""},
	{"POST", "/slots/0", ""},
	{"GET", "/", ""},
	{"GET", chatPath, ""},
	{"PUT", chatPath, ""},
	{"PATCH", chatPath, ""},
	{"DELETE", chatPath, ""},
	{"DELETE", "/v1/models/m", ""},
	{"HEAD", chatPath, ""},
	{"HEAD", "/v1/models", ""},
	{"OPTIONS", chatPath, ""},
	{"TRACE", chatPath, ""},
	{"post", chatPath, ""},
	{"POSTS", chatPath, ""},
}

func chromaShapes() []shape {
	id, other := uuidOf("handbook"), uuidOf("payroll")
	at := func(id string) string { return listPath + "/" + id }
	return []shape{
		{"POST", at(id) + "/query", at(id) + "/query"},
		{"GET", at(id) + "/count?read_level=x", at(id) + "/count?read_level=x"},
		{"POST", strings.Replace(at(id), "/collections", "/./collections", 1) + "/get", at(id) + "/get"},
		{"POST", at(other) + "/query", ""},
		{"POST", at(id) + "/add", ""},
		{"POST", at(id) + "/upsert", ""},
		{"POST", at(id) + "/delete", ""},
		{"POST", at(id) + "/fork", ""},
		{"POST", at(id) + "/functions/attach", ""},
		{"POST", at(id) + "/Query", ""},
		{"POST", at(id) + "/query/", ""},
		{"POST", at(id) + ";x/query", ""},
		{"POST", at(id) + "/query;x", ""},
		{"POST", at(strings.ToUpper(id)) + "/query", ""},
		{"POST", at(strings.ReplaceAll(id, "-", "")) + "/query", ""},
		{"POST", at("{"+id+"}") + "/query", ""},
		{"POST", at("%7B"+id+"%7D") + "/query", ""},
		{"POST", at("urn:uuid:"+id) + "/query", ""},
		{"POST", at(id+"%20") + "/query", ""},
		{"POST", at("%3"+id[:1]+id[1:]) + "/query", ""},
		{"POST", at(id+other) + "/query", ""},
		{"POST", at("handbook") + "/query", ""},
		{"POST", at("") + "/query", ""},
		{"POST", at(id+"/../"+other) + "/query", ""},
		{"POST", at(other+"/../"+other) + "/query", ""},
		{"POST", at(id+"%2f..%2f"+other) + "/query", ""},
		{"POST", strings.Replace(at(id), "default_tenant", "other_tenant", 1) + "/query", ""},
		{"POST", strings.Replace(at(id), "default_database", "other", 1) + "/query", ""},
		{"POST", strings.Replace(at(id), "default_tenant", "%64efault_tenant", 1) + "/query", at(id) + "/query"},
		{"POST", strings.Replace(at(id), "default_tenant", "default_tenant;x", 1) + "/query", ""},
		{"POST", strings.Replace(at(id), "/api/v2", "/api/v1", 1) + "/query", ""},
		{"GET", at("payroll"), ""},
		{"DELETE", at("handbook"), ""},
		{"PUT", at(id), ""},
		{"POST", listPath, ""},
		{"GET", at("by-id") + "/" + id, at("by-id") + "/" + id},
		{"GET", at("by-id") + "/" + other, ""},
		{"GET", "/api/v2/collections/default_tenant:default_database:handbook", ""},
		{"GET", "/api/v2/tenants/other_tenant", ""},
		{"POST", "/api/v2/tenants", ""},
		{"POST", "/api/v2/reset", ""},
		{"GET", "/docs", ""},
		{"GET", "/openapi.json", ""},
		{"GET", "/api/v2/heartbeat", "/api/v2/heartbeat"},
		{"POST", "/api/v2/heartbeat", ""},
	}
}

// TestPaths lets only the requests of the table through, each in one spelling.
func TestPaths(t *testing.T) {
	t.Parallel()
	t.Run("OpenAI", func(t *testing.T) { testPaths(t, "paths", openAIShapes) })
	t.Run("Chroma", func(t *testing.T) { testPaths(t, "vectors", chromaShapes()) })
}

func testPaths(t *testing.T, endpoint string, shapes []shape) {
	u, b := shared(t, endpoint)
	who := u.as(t, "/"+endpoint, http2)
	eventually(t, "collections known", func() bool {
		return endpoint == "paths" || who.send(t, request{host: hostOf(endpoint), path: shapes[0].path}).status == http.StatusOK
	})
	b.taken()
	for _, s := range shapes {
		for _, v := range []version{http1, http2} {
			var a answer
			if v == http1 {
				a = u.as(t, "/"+endpoint, http1).raw(t, hostOf(endpoint), fmt.Sprintf(
					"%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{\"model\":\"m\"}", s.method, s.path, hostOf(endpoint)))
			} else {
				if !strings.HasPrefix(s.path, "/") || strings.HasPrefix(s.path, "//") || s.method == "post" {
					continue // Go's client does not send it like this
				}
				a = who.send(t, request{method: s.method, host: hostOf(endpoint), path: s.path, body: strings.NewReader(`{"model":"m"}`)})
			}
			var reached []string
			for _, r := range b.taken() {
				reached = append(reached, r.method+" "+r.path)
			}
			switch {
			case s.reaches == "":
				if len(reached) > 0 || a.err == nil && a.status < 400 {
					t.Errorf("%s: %s %s: %v, and the backend was asked %q", v, s.method, s.path, a, reached)
				}
				if a.err == nil && a.status != http.StatusForbidden && a.status != http.StatusBadRequest {
					t.Errorf("%s: %s %s: %v", v, s.method, s.path, a)
				}
			case a.status != http.StatusOK || !slices.Equal(reached, []string{s.method + " " + s.reaches}):
				t.Errorf("%s: %s %s: %v, and the backend was asked %q, want %q", v, s.method, s.path, a, reached, s.reaches)
			}
		}
	}
	if a := who.send(t, request{host: hostOf(endpoint), path: "/elsewhere"}); a.status != http.StatusForbidden {
		t.Error(a)
	} else if f := u.flow(t, a); f.Verdict != telemetry.Denied || f.Rule != "default-deny" || f.Operation != "" || f.Path != "/elsewhere" {
		t.Errorf("recorded as %+v", f)
	}
}

// TestHeaders passes on nothing that a caller says of itself in the words of a gateway, and lets it change nothing.
func TestHeaders(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "headers")
	const mark = "sent-by-the-caller"
	hostile := http.Header{}
	for _, name := range []string{
		"X-Sallyport-Caller", "X-Sallyport-Endpoint", "X-Sallyport-Route", "X-Forwarded-Client-Cert", "Authorization", "X-Api-Key", "Api-Key",
		"X-Chroma-Token", "Proxy-Authorization", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "X-Request-Id", "X-Envoy-Original-Path", "X-Envoy-Internal",
		"X-Envoy-External-Address", "X-Envoy-Upstream-Alt-Stat-Name", "X-Envoy-Decorator-Operation", "X-Envoy-Retry-On",
		"X-Envoy-Force-Trace", "X-Envoy-Original-Host", "X-Envoy-Ip-Tags", "Forwarded", "X-Envoy-Downstream-Service-Cluster",
		"X-Http-Method-Override", "X-Http-Method", "X-Method-Override", "X-Original-Url", "X-Rewrite-Url", "X-Accel-Redirect",
		"X-Forwarded-Path", "X-Forwarded-Prefix", "X-Forwarded-Uri", "X-Forwarded-Port", "X-Envoy-Livenesscheck", "X-Envoy-Degraded",
		"X-Envoy-Immediate-Health-Check-Fail", "X-Envoy-Attempt-Count", "X-Envoy-Original-Method", "X-Envoy-Peer-Metadata",
	} {
		hostile[name] = []string{mark}
	}
	for name, value := range map[string]string{
		"X-Envoy-Max-Retries": "9", "X-Envoy-Upstream-Rq-Timeout-Ms": "1", "X-Envoy-Upstream-Rq-Per-Try-Timeout-Ms": "1",
		"X-Envoy-Expected-Rq-Timeout-Ms": "1", "X-Envoy-Hedge-On-Per-Try-Timeout": "true", "X-Envoy-Upstream-Stream-Duration-Ms": "1",
	} {
		hostile[name] = []string{value}
	}
	for _, v := range []version{http1, http2} {
		who := u.as(t, "/headers", v)
		a := who.send(t, request{host: hostOf("headers"), path: chatPath, body: strings.NewReader(`{"model":"m"}`), header: hostile})
		got := b.taken()
		if a.status != http.StatusOK || len(got) != 1 {
			t.Fatalf("%s: %v, and the backend was asked %d times", v, a, len(got))
		}
		for name, values := range got[0].header {
			if strings.Contains(strings.Join(values, ","), mark) {
				t.Errorf("%s: the backend got %s: %s", v, name, values)
			}
			if lower := strings.ToLower(name); strings.HasPrefix(lower, "x-envoy") && lower != "x-envoy-external-address" {
				t.Errorf("%s: the backend got %s: %s", v, name, values)
			}
		}
		if xfcc := got[0].header.Get("X-Forwarded-Client-Cert"); !strings.Contains(xfcc, "URI="+domain+"/headers") {
			t.Errorf("%s: the backend is told that the caller is %q", v, xfcc)
		}
		if f := u.flow(t, a); f.Caller.String() != domain+"/headers" || f.Verdict != telemetry.Allowed {
			t.Errorf("%s: recorded as %+v", v, f)
		}
		// Whoever is not granted anything does not become somebody by saying so.
		hostile.Set("X-Forwarded-Client-Cert", "URI="+domain+"/headers")
		hostile.Set("X-Sallyport-Caller", domain+"/headers")
		a = u.as(t, "/nobody", v).send(t, request{host: hostOf("headers"), path: chatPath, body: strings.NewReader(`{"model":"m"}`), header: hostile})
		wantProblem(t, a, http.StatusForbidden, "no_grant")
		a = u.as(t, "/nobody", v).send(t, request{method: "GET", host: hostOf("headers"), path: "/v1/models", header: hostile})
		wantProblem(t, a, http.StatusForbidden, "no_grant")
		hostile.Set("X-Forwarded-Client-Cert", mark)
		hostile.Set("X-Sallyport-Caller", mark)
	}
}
