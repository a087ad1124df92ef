package telemetry

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

var ids = cmpopts.EquateComparable(spiffeid.ID{})

func TestWorst(t *testing.T) {
	for _, test := range []struct{ a, b, want Verdict }{
		{"", Allowed, Allowed}, {Allowed, "", Allowed}, {Allowed, Failed, Failed}, {Refused, Failed, Refused},
		{Denied, Refused, Denied}, {"nonsense", Allowed, Allowed}, {"", "", ""},
	} {
		if got := Worst(test.a, test.b); got != test.want {
			t.Errorf("Worst(%q, %q) = %q, want %q", test.a, test.b, got, test.want)
		}
	}
}

func TestParseVerdict(t *testing.T) {
	for _, v := range Verdicts() {
		if got, err := ParseVerdict(string(v)); got != v || err != nil {
			t.Errorf("%s: got %q, %v", v, got, err)
		}
	}
	if v, err := ParseVerdict("Allowed"); err == nil || v != "" {
		t.Errorf("got %q, %v for another spelling", v, err)
	}
}

func TestParseIDs(t *testing.T) {
	const good = "4bf92f3577b34da6a3ce929d0e0e4736"
	for in, ok := range map[string]bool{good: true, "4BF92F3577B34DA6A3CE929D0E0E4736": true, good[1:]: false, good + "00": false,
		"": false, "00000000000000000000000000000000": false, "zbf92f3577b34da6a3ce929d0e0e4736": false} {
		id, err := ParseTraceID(in)
		if (err == nil) != ok || (ok && id != good) || (!ok && id != "") {
			t.Errorf("ParseTraceID(%q) = %q, %v", in, id, err)
		}
	}
	if id, err := ParseSpanID("00f067aa0ba902b7"); err != nil || id != "00f067aa0ba902b7" {
		t.Errorf("got %q, %v", id, err)
	}
}

// The JSON names are a contract with whoever reads `-o json`.
func TestFlowJSON(t *testing.T) {
	flow := Flow{
		Seq: 7, ID: "r-1", Time: at(0), Duration: 1500 * time.Millisecond, FirstByte: 80 * time.Millisecond, Gateway: "gw",
		Caller: spiffeid.RequireFromString("spiffe://example.org/rag-app"), Endpoint: "chat", Operation: segment.Infer,
		Resource: "smollm2", Verdict: Denied, Rule: "default-deny", Shadow: Allowed, ShadowBy: "grant/tried-out",
		Method: "POST", Path: "/v1/chat/completions", Status: 403, Detail: "rbac", InputTokens: 3, OutputTokens: 4,
		BytesIn: 5, BytesOut: 6, TraceID: "4bf92f3577b34da6a3ce929d0e0e4736", SpanID: "00f067aa0ba902b7", Generation: "g1",
	}
	got, err := json.Marshal(flow)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"seq":7,"id":"r-1","time":"2026-01-02T03:04:05Z","duration_ns":1500000000,"first_byte_ns":80000000,` +
		`"gateway":"gw","caller":"spiffe://example.org/rag-app","endpoint":"chat","operation":"Infer","resource":"smollm2",` +
		`"verdict":"denied","rule":"default-deny","shadow":"allowed","shadow_rule":"grant/tried-out","method":"POST",` +
		`"path":"/v1/chat/completions","status":403,"detail":"rbac","input_tokens":3,"output_tokens":4,"bytes_in":5,` +
		`"bytes_out":6,"trace_id":"4bf92f3577b34da6a3ce929d0e0e4736","span_id":"00f067aa0ba902b7","generation":"g1"}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, f := range []Flow{flow, {}} {
		var back Flow
		data, _ := json.Marshal(f)
		if err := json.Unmarshal(data, &back); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(f, back, ids); diff != "" {
			t.Error(diff)
		}
	}
}

func TestAttributesKeepTheirTypes(t *testing.T) {
	want := Attributes{"text": "x", "yes": true, "int": int64(9007199254740993), "float": 0.5,
		"list": []any{int64(1), "b"}, "map": map[string]any{"n": int64(2)}}
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Attributes
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, v := range []any{int64(12), 12.0, "12"} {
		if n := (Attributes{"n": v}).Int("n"); n != 12 {
			t.Errorf("Int of %T: %d", v, n)
		}
	}
	if got.Text("int") != "9007199254740993" || got.Text("none") != "" || got.Int("text") != 0 {
		t.Errorf("got %q, %q, %d", got.Text("int"), got.Text("none"), got.Int("text"))
	}
}

func TestFilterMatch(t *testing.T) {
	flow := Flow{Caller: spiffeid.RequireFromString("spiffe://example.org/rag-app"), Endpoint: "chat", Verdict: Allowed, Time: at(10)}
	for _, test := range []struct {
		name string
		f    FlowFilter
		want bool
	}{
		{"zero", FlowFilter{}, true},
		{"caller", FlowFilter{Caller: "spiffe://example.org/rag-app"}, true},
		{"other caller", FlowFilter{Caller: "spiffe://example.org/rag"}, false},
		{"callers below", FlowFilter{Caller: "spiffe://example.org/*"}, true},
		{"endpoint", FlowFilter{Endpoint: "chat"}, true},
		{"other endpoint", FlowFilter{Endpoint: "docs"}, false},
		{"verdict", FlowFilter{Verdict: Allowed}, true},
		{"other verdict", FlowFilter{Verdict: Denied}, false},
		{"since is included", FlowFilter{Since: at(10)}, true},
		{"too old", FlowFilter{Since: at(11)}, false},
		{"one of two", FlowFilter{Endpoint: "chat", Verdict: Denied}, false},
	} {
		if got := test.f.Match(flow); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
	if (FlowFilter{}).Rows() != 100 || (FlowFilter{Limit: 3}).Rows() != 3 || (FlowFilter{Limit: 1 << 30}).Rows() != 10_000 {
		t.Error("limit is not bounded")
	}
}

func TestSummary(t *testing.T) {
	rag, intern := spiffeid.RequireFromString("spiffe://example.org/rag-app"), spiffeid.RequireFromString("spiffe://example.org/intern")
	got := Trace{ID: "t", Spans: []Span{
		{SpanID: "b", Parent: "a", Name: "search", Start: at(1), End: at(3)},
		{SpanID: "a", Name: "answer", Start: at(0), End: at(20), Attributes: Attributes{EventOutcome: "allowed"}},
	}, Flows: []Flow{
		{Time: at(4), Duration: 20 * time.Millisecond, Caller: intern, Endpoint: "docs", Verdict: Denied},
		{Time: at(1), Caller: rag, Endpoint: "docs", Verdict: Allowed, InputTokens: 2},
		{Time: at(2), Caller: rag, Endpoint: "chat", Verdict: Allowed, InputTokens: 3, OutputTokens: 5},
	}}.Summary()
	want := Summary{TraceID: "t", Start: at(0), Duration: 24 * time.Millisecond, Root: "answer", Caller: rag,
		Endpoints: []segment.EndpointName{"chat", "docs"}, Verdict: Denied, Spans: 2, Flows: 3, InputTokens: 5, OutputTokens: 5}
	if diff := cmp.Diff(want, got, ids); diff != "" {
		t.Error(diff)
	}
}
