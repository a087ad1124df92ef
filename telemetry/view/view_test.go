package view

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/telemetry"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func at(ms int) time.Time {
	return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(ms) * time.Millisecond)
}

var (
	rag    = spiffeid.RequireFromString("spiffe://example.org/rag-app")
	intern = spiffeid.RequireFromString("spiffe://example.org/people/intern")
)

const traceID = "4bf92f3577b34da6a3ce929d0e0e4736"

func flows() []telemetry.Flow {
	return []telemetry.Flow{
		{Time: at(10), Duration: 4 * time.Millisecond, Caller: rag, Endpoint: "docs", Operation: "Read", Resource: "handbook",
			Verdict: telemetry.Allowed, Rule: "grant/rag-reads-docs", Shadow: telemetry.Denied, ShadowBy: "default-deny", Status: 200,
			Method: "POST", TraceID: traceID, SpanID: "b7ad6b7169203331"},
		{Time: at(20), Duration: 1234 * time.Millisecond, FirstByte: 80 * time.Millisecond, Caller: rag, Endpoint: "chat", Operation: "Infer",
			Resource: "smollm2", Verdict: telemetry.Allowed, Rule: "grant/rag-asks", Status: 200, InputTokens: 312, OutputTokens: 48,
			Method: "POST", TraceID: traceID, SpanID: "00f067aa0ba902b7"},
		{Time: at(1300), Duration: 400 * time.Microsecond, Caller: intern, Endpoint: "chat", Operation: "Infer", Resource: "smollm2",
			Verdict: telemetry.Denied, Rule: "default-deny", Shadow: telemetry.Allowed, ShadowBy: "grant/tried-out", Status: 403, Method: "POST"},
		{Time: at(1400), Duration: 3 * time.Millisecond, Verdict: telemetry.Refused, Detail: "certificate verify failed (server name \x1b[2Jchat)"},
		{Time: at(1500), Duration: 65 * time.Second, Caller: rag, Endpoint: "chat", Operation: "Infer", Resource: strings.Repeat("m", 60),
			Verdict: telemetry.Failed, Rule: "grant/rag-asks", Status: 503, Detail: "upstream_reset_before_response_started{connection_failure}",
			Method: "POST", Path: "/v1/chat/completions", TraceID: traceID},
	}
}

func trace() telemetry.Trace {
	attrs := func(kv ...any) telemetry.Attributes {
		a := telemetry.Attributes{}
		for i := 0; i < len(kv); i += 2 {
			a[kv[i].(string)] = kv[i+1]
		}
		return a
	}
	return telemetry.Trace{ID: traceID, Flows: []telemetry.Flow{flows()[0], flows()[1], flows()[4]}, Spans: []telemetry.Span{
		{SpanID: "a", Name: "answer a question", Service: "rag-app", Start: at(0), End: at(1300), Source: telemetry.FromApplication,
			Attributes: attrs(telemetry.EventOutcome, "allowed", telemetry.SecurityRuleName, "grant/forged")},
		{SpanID: "b", Parent: "a", Name: "search", Service: "rag-app", Start: at(5), End: at(18), Source: telemetry.FromApplication,
			Attributes: attrs(telemetry.DBCollectionName, "handbook")},
		{SpanID: "b7ad6b7169203331", Parent: "b", Name: "ingress", Service: "gateway", Start: at(10), End: at(14), Source: telemetry.FromGateway},
		{SpanID: "c", Parent: "a", Name: "ask\x1b]0;owned\x07", Service: "rag-app", Start: at(19), End: at(1290), Source: telemetry.FromApplication},
		{SpanID: "00f067aa0ba902b7", Parent: "c", Name: "ingress", Service: "gateway", Start: at(20), End: at(1254), Source: telemetry.FromGateway},
		{SpanID: "e", Parent: "00f067aa0ba902b7", Name: "router chat egress", Service: "gateway", Start: at(21), End: at(1250),
			Source: telemetry.FromGateway, Attributes: attrs(telemetry.GenAIRequestModel, "smollm2", telemetry.GenAIOutputTokens, int64(48))},
		{SpanID: "f", Parent: "lost", Name: "retry", Service: "rag-app", Start: at(1260), End: at(1270), Source: telemetry.FromApplication,
			Status: telemetry.StatusError, Message: "gave up"},
		{SpanID: "g", Parent: "f", Name: "denied elsewhere", Service: "gateway", Start: at(1261), End: at(1262), Source: telemetry.FromGateway,
			Attributes: attrs(telemetry.EventOutcome, "denied", telemetry.SecurityRuleName, "default-deny")},
	}}
}

func TestFlows(t *testing.T) {
	for name, colours := range map[string]bool{"flows.txt": false, "flows-colours.txt": true} {
		var b bytes.Buffer
		if err := NewFlows(&b, colours).Write(flows()...); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.String())
	}
}

// Following, rows come one by one: one heading, and columns that only grow.
func TestFlowsOneByOne(t *testing.T) {
	var b bytes.Buffer
	table := NewFlows(&b, false)
	if err := table.Write(); err != nil || b.Len() != 0 {
		t.Errorf("wrote %q for nothing, %v", &b, err)
	}
	for _, f := range flows() {
		if err := table.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "flows-one-by-one.txt", b.String())
}

func TestTrace(t *testing.T) {
	var b bytes.Buffer
	if err := Trace(&b, trace(), false); err != nil {
		t.Fatal(err)
	}
	golden(t, "trace.txt", b.String())
	if strings.Contains(b.String(), "forged") {
		t.Error("shows a verdict that an application claims")
	}
}

func TestTraces(t *testing.T) {
	var b bytes.Buffer
	if err := Traces(&b, []telemetry.Summary{trace().Summary(), {TraceID: "0af7651916cd43dd8448eb211c80319c", Start: at(0)}}, false); err != nil {
		t.Fatal(err)
	}
	golden(t, "traces.txt", b.String())
}

func TestNothingTakesHoldOfTheTerminal(t *testing.T) {
	for _, in := range []string{"\x1b[2J", "a\nb", "\u202eabc", "\x9b31m", "a\rb", "\u2028"} {
		for _, r := range clean(in, 100) {
			if r < ' ' || r == 0x7f || r == 0x9b || r == 0x202e || r == 0x2028 {
				t.Errorf("%q lets %q through", in, r)
			}
		}
	}
	if got := clean("äöü", 2); got != "äö…" {
		t.Errorf("got %q", got)
	}
}

func TestTook(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0.0ms", 400 * time.Microsecond: "0.4ms", 12 * time.Millisecond: "12ms",
		999 * time.Millisecond: "999ms", 1234 * time.Millisecond: "1.23s", 65 * time.Second: "1m5s"} {
		if got := took(d); got != want {
			t.Errorf("%d: got %s, want %s", d, got, want)
		}
	}
}

// Anybody can send a chain of spans as deep as they like: the text must not grow with its square.
func TestDeepTree(t *testing.T) {
	var spans []telemetry.Span
	for n := range 5000 {
		spans = append(spans, telemetry.Span{SpanID: telemetry.SpanID(fmt.Sprint(n + 1)), Parent: telemetry.SpanID(fmt.Sprint(n)), Start: at(n)})
	}
	var b bytes.Buffer
	if err := Trace(&b, telemetry.Trace{ID: traceID, Spans: spans}, false); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(b.String(), "\n"); lines != 5002 || b.Len() > 5000*400 {
		t.Errorf("%d lines, %d bytes", lines, b.Len())
	}
}
