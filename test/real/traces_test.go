package real

import (
	"crypto/rand"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"sallyport.dev/telemetry"
)

// TestTraces continues the caller's trace to the backend, and says in it who asked for what and what was decided.
func TestTraces(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "traces")
	const parent = "00f067aa0ba902b7"
	newID := func() string { return strings.ReplaceAll(uuidOf(rand.Text()), "-", "") }
	b.taken()
	ask := func(who, traceID, body string) answer {
		return u.as(t, who, http2).send(t, request{host: hostOf("traces"), path: chatPath, body: strings.NewReader(body),
			header: http.Header{"Traceparent": {"00-" + traceID + "-" + parent + "-01"}, "Tracestate": {"vendor=value"}}})
	}
	show := func(id string, spans int) telemetry.Trace {
		t.Helper()
		var trace telemetry.Trace
		eventually(t, "trace "+id, func() bool {
			out, _, code := u.ask(t, "traces", "show", id, "-o", "json")
			trace = telemetry.Trace{}
			return code == 0 && json.Unmarshal([]byte(out), &trace) == nil && len(trace.Spans) >= spans && len(trace.Flows) > 0
		})
		return trace
	}
	server := func(trace telemetry.Trace) telemetry.Span {
		t.Helper()
		for _, s := range trace.Spans {
			if s.Kind == telemetry.KindServer {
				return s
			}
		}
		t.Fatalf("no server span in %+v", trace)
		return telemetry.Span{}
	}
	want := func(s telemetry.Span, attributes map[string]string) {
		t.Helper()
		for key, value := range attributes {
			if got := s.Attributes.Text(key); got != value {
				t.Errorf("%s is %q, want %q", key, got, value)
			}
		}
	}

	allowed := newID()
	if a := ask("/traces", allowed, `{"model":"m"}`); a.status != http.StatusOK {
		t.Fatal(a)
	}
	got := b.taken()
	sent := strings.Split(got[0].header.Get("traceparent"), "-")
	if len(sent) != 4 || sent[1] != allowed || sent[2] == parent || sent[3] != "01" || got[0].header.Get("tracestate") != "vendor=value" {
		t.Errorf("the backend got traceparent %s and tracestate %s", sent, got[0].header.Get("tracestate"))
	}
	trace := show(allowed, 2)
	s := server(trace)
	if s.Parent != parent || string(s.TraceID) != allowed || s.Source != telemetry.FromGateway || s.Service != "sallyport-gateway" || s.End.Before(s.Start) {
		t.Errorf("the gateway's span is %+v", s)
	}
	want(s, map[string]string{
		telemetry.SallyportCaller: domain + "/traces", telemetry.SallyportEndpoint: "traces", telemetry.SallyportOperation: "Infer",
		telemetry.SallyportResource: "m", telemetry.SecurityRuleName: "grant/traces-all", telemetry.EventOutcome: "allowed",
		telemetry.GenAIOperationName: "chat", telemetry.GenAIProviderName: "openai", telemetry.GenAIRequestModel: "m",
		telemetry.GenAIInputTokens: "11", telemetry.GenAIOutputTokens: "7",
	})
	if f := trace.Flows[0]; string(f.SpanID) == "" || string(f.TraceID) != allowed || f.InputTokens != 11 || f.OutputTokens != 7 {
		t.Errorf("the flow is %+v", f)
	}
	var client bool
	for _, span := range trace.Spans {
		client = client || span.Kind == telemetry.KindClient && span.Parent == s.SpanID && string(span.SpanID) == sent[2]
	}
	if !client {
		t.Errorf("no span of the way to the backend: %+v", trace.Spans)
	}

	denied := newID()
	wantProblem(t, ask("/stranger", denied, `{"model":"m"}`), http.StatusForbidden, "no_grant")
	s = server(show(denied, 1))
	want(s, map[string]string{telemetry.SallyportCaller: domain + "/stranger", telemetry.SecurityRuleName: "default-deny",
		telemetry.EventOutcome: "denied", telemetry.GenAIRequestModel: "m", telemetry.GenAIInputTokens: ""})

	// Usage stands in the last event but one, in pieces if the network wants it so.
	for i, pieces := range [][]string{
		{"data: {\"choices\":[]}\n\n", "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":21,\"completion_tokens\":9}}\n\ndata: [DONE]\n\n"},
		{"data: {\"choices\":[],\"usage\":null}\n\n", "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":21,\"completion_tokens\":9}}\n\n", "data: [DONE]\n\n"},
		{"data: {\"choices\":[],\"usage\":{\"completion_tokens\":9,\"prompt_tokens\": 21,\"total_tokens\":30}}\n\n", "data: [DONE]\n\n"},
		{"data: {\"choices\":[],\"us", "age\":{\"prompt_tok", "ens\":21,\"completion_tokens\":", "9}}\n\n", "data: [DONE]\n\n"},
		strings.Split("data: {\"choices\":[],\"usage\":{\"prompt_tokens\":21,\"completion_tokens\":9}}\n\n", ""),
	} {
		resp := u.as(t, "/traces", http2).open(t, "traces", "m")
		stream := b.begun(t)
		for _, piece := range pieces { // each has come through before the next is sent, so they stay pieces
			stream.write(t, piece)
			if _, err := io.ReadFull(resp.body, make([]byte, len(piece))); err != nil {
				t.Fatal(err)
			}
		}
		stream.end(t, "")
		rest, err := io.ReadAll(resp.body)
		if f := u.flow(t, answer{header: resp.header}); err != nil || len(rest) > 0 || f.InputTokens != 21 || f.OutputTokens != 9 {
			t.Errorf("stream %d: %d and %d tokens, %q, %v", i, f.InputTokens, f.OutputTokens, rest, err)
		}
	}
	// What a caller says of its trace keeps its request neither from being recorded nor from being traced.
	unsampled := newID()
	for parent, traced := range map[string]bool{
		"00-" + unsampled + "-" + parent + "-00":               true,
		"00-nonsense-01":                                       false, // Envoy then traces nothing
		"00-" + strings.Repeat("0", 32) + "-" + parent + "-01": false,
	} {
		a := u.as(t, "/traces", http1).send(t, request{host: hostOf("traces"), path: chatPath, body: strings.NewReader(`{"model":"m"}`),
			header: http.Header{"Traceparent": {parent}}})
		f := u.flow(t, a)
		if a.status != http.StatusOK || f.Verdict != telemetry.Allowed || f.InputTokens != 11 || (f.TraceID != "") != traced {
			t.Errorf("%v, recorded as %+v", a, f)
		}
	}
	server(show(unsampled, 2))
}
