package ingest

import (
	"context"
	"math"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"sallyport.dev/telemetry"
)

// kept is what a service handed on.
type kept struct {
	mu        sync.Mutex
	flows     []telemetry.Flow
	spans     []telemetry.Span
	forwarded int
}

func (k *kept) Add(f telemetry.Flow) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.flows = append(k.flows, f)
}

func (k *kept) AddSpans(s []telemetry.Span) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.spans = append(k.spans, s...)
}

func (k *kept) Offer(rs []*tracepb.ResourceSpans) { k.forwarded += len(rs) }

// serve runs services on a Unix socket and returns a connection to them.
func serve(t *testing.T, register ...func(grpc.ServiceRegistrar)) *grpc.ClientConn {
	t.Helper()
	socket := t.TempDir() + "/s"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	for _, r := range register {
		r(server)
	}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestAccessLogStream(t *testing.T) {
	k := &kept{}
	log := NewAccessLog(k)
	stream, err := alsv3.NewAccessLogServiceClient(serve(t, log.Register)).StreamAccessLogs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	http := func(id string, kind accesslogv3.AccessLogType) *accesslogv3.HTTPAccessLogEntry {
		return &accesslogv3.HTTPAccessLogEntry{Request: &accesslogv3.HTTPRequestProperties{RequestId: id},
			CommonProperties: &accesslogv3.AccessLogCommon{AccessLogType: kind}}
	}
	send := func(node string, m *alsv3.StreamAccessLogsMessage) {
		t.Helper()
		if node != "" {
			m.Identifier = &alsv3.StreamAccessLogsMessage_Identifier{Node: &corev3.Node{Id: node}}
		}
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	send("gw-1", &alsv3.StreamAccessLogsMessage{LogEntries: &alsv3.StreamAccessLogsMessage_HttpLogs{
		HttpLogs: &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: []*accesslogv3.HTTPAccessLogEntry{
			http("begun", accesslogv3.AccessLogType_DownstreamStart), http("one", accesslogv3.AccessLogType_DownstreamEnd), nil}}}})
	send("gw-2", &alsv3.StreamAccessLogsMessage{LogEntries: &alsv3.StreamAccessLogsMessage_TcpLogs{ // a second name is not taken
		TcpLogs: &alsv3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: []*accesslogv3.TCPAccessLogEntry{
			{}, {CommonProperties: &accesslogv3.AccessLogCommon{DownstreamTransportFailureReason: "no"}},
			{CommonProperties: &accesslogv3.AccessLogCommon{CustomTags: map[string]string{tagEndpoint: "pg"}}},
			{CommonProperties: &accesslogv3.AccessLogCommon{CustomTags: map[string]string{tagEndpoint: "pg"}, DownstreamTransportFailureReason: "no"}}}}}})
	send("", &alsv3.StreamAccessLogsMessage{})
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range k.flows {
		got = append(got, string(f.Gateway)+" "+f.ID+" "+string(f.Verdict)+" "+f.Detail)
		if time.Since(f.Time) > time.Minute {
			t.Errorf("a flow without a time is of %s", f.Time)
		}
	}
	if diff := cmp.Diff([]string{"gw-1 one refused ", "gw-1  refused ", "gw-1  refused no", "gw-1  refused it has sent nothing"}, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(AccessLogStats{Received: 7, Skipped: 3}, log.Stats()); diff != "" {
		t.Error(diff)
	}
}

func text(key, value string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: value}}}
}

func of(v any) *commonpb.AnyValue {
	switch v := v.(type) {
	case float64:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_DoubleValue{DoubleValue: v}}
	case int:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: int64(v)}}
	case bool:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: v}}
	case []*commonpb.AnyValue:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: &commonpb.ArrayValue{Values: v}}}
	case []*commonpb.KeyValue:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_KvlistValue{KvlistValue: &commonpb.KeyValueList{Values: v}}}
	case []byte:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_BytesValue{BytesValue: v}}
	}
	return nil
}

func protoSpan(n byte) *tracepb.Span {
	return &tracepb.Span{
		TraceId: []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, n}, SpanId: []byte{0, 0, 0, 0, 0, 0, 0, n}, ParentSpanId: []byte{0, 0, 0, 0, 0, 0, 0, 9},
		Name: "chat smollm2", Kind: tracepb.Span_SPAN_KIND_CLIENT, StartTimeUnixNano: 1_800_000_000_000_000_000, EndTimeUnixNano: 1_800_000_001_000_000_000,
		Status: &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: "gave up"},
	}
}

func TestSpanOf(t *testing.T) {
	in := protoSpan(1)
	in.Attributes = []*commonpb.KeyValue{text(telemetry.GenAIRequestModel, "smollm2"), {Key: "n", Value: of(12)}, {Key: "yes", Value: of(true)},
		{Key: "f", Value: of(0.5)}, {Key: "nan", Value: of(math.NaN())}, {Key: "bytes", Value: of([]byte("ab"))}, {Key: "none"},
		{Key: "list", Value: of([]*commonpb.AnyValue{of(1), of(2)})}, {Key: "map", Value: of([]*commonpb.KeyValue{text("a", "b")})}}
	resource := &resourcepb.Resource{Attributes: []*commonpb.KeyValue{text("service.name", "rag-app")}}
	got, cut, err := SpanOf(in, resource, telemetry.FromApplication)
	want := telemetry.Span{
		TraceID: "0102030405060708090a0b0c0d0e0f01", SpanID: "0000000000000001", Parent: "0000000000000009", Name: "chat smollm2",
		Kind: telemetry.KindClient, Start: time.Unix(1_800_000_000, 0).UTC(), End: time.Unix(1_800_000_001, 0).UTC(), Service: "rag-app",
		Status: telemetry.StatusError, Message: "gave up", Source: telemetry.FromApplication,
		Attributes: telemetry.Attributes{"gen_ai.request.model": "smollm2", "n": int64(12), "yes": true, "f": 0.5, "nan": "NaN", "bytes": "YWI=",
			"none": "", "list": []any{int64(1), int64(2)}, "map": map[string]any{"a": "b"}},
	}
	if diff := cmp.Diff(want, got); diff != "" || cut || err != nil {
		t.Error(diff, cut, err)
	}
}

func TestSpansAreBounded(t *testing.T) {
	deep := of(1)
	for range 100 {
		deep = of([]*commonpb.AnyValue{deep})
	}
	long := strings.Repeat("é", 50_000)
	for name, attrs := range map[string][]*commonpb.KeyValue{
		"long":  {text("k", long)},
		"key":   {text(long, "v")},
		"deep":  {{Key: "k", Value: deep}},
		"wide":  {{Key: "k", Value: of(make([]*commonpb.AnyValue, 100_000))}},
		"many":  manyAttributes(10_000, "v"),
		"total": manyAttributes(100, long[:4000]),
		"bytes": {{Key: "k", Value: of(make([]byte, 1<<20))}},
	} {
		in := protoSpan(1)
		in.Attributes = attrs
		got, cut, err := SpanOf(in, nil, telemetry.FromApplication)
		size := 0
		for k, v := range got.Attributes {
			size += len(k) + weight(v)
		}
		if err != nil || !cut || size > maxAttrs+maxKeys*16 {
			t.Errorf("%s: %d bytes, cut %v, %v", name, size, cut, err)
		}
	}
}

func manyAttributes(n int, value string) (out []*commonpb.KeyValue) {
	for i := range n {
		out = append(out, text(strings.Repeat("k", 1+i%200)+string(rune('a'+i%26)), value))
	}
	return out
}

func weight(v any) int {
	switch v := v.(type) {
	case string:
		return len(v)
	case []any:
		n := 0
		for _, e := range v {
			n += weight(e)
		}
		return n
	}
	return 8
}

func TestExport(t *testing.T) {
	k := &kept{}
	traces := NewTraces(TracesConfig{Source: telemetry.FromApplication, Spans: k, Forward: k})
	client := collectorpb.NewTraceServiceClient(serve(t, traces.Register))
	export := func(spans ...*tracepb.Span) *collectorpb.ExportTracePartialSuccess {
		t.Helper()
		resp, err := client.Export(context.Background(), &collectorpb.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{
			{ScopeSpans: []*tracepb.ScopeSpans{{Spans: spans}}}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetPartialSuccess()
	}
	if p := export(protoSpan(1), protoSpan(2)); p != nil {
		t.Errorf("all were good: %v", p)
	}
	noID := protoSpan(1)
	noID.SpanId = nil
	if p := export(noID, protoSpan(3)); p.GetRejectedSpans() != 1 || p.GetErrorMessage() == "" {
		t.Errorf("one was bad: %v", p)
	}
	if p := export(make([]*tracepb.Span, 10)...); p.GetRejectedSpans() != 10 {
		t.Errorf("none was good: %v", p)
	}
	many := make([]*tracepb.Span, maxSpans+7)
	for i := range many {
		many[i] = protoSpan(1)
	}
	if p := export(many...); p.GetRejectedSpans() != 7 {
		t.Errorf("too many: %v", p)
	}
	for _, s := range k.spans {
		if s.Source != telemetry.FromApplication {
			t.Fatalf("a span from %s", s.Source)
		}
	}
	if len(k.spans) != 3+maxSpans || k.forwarded != 4 {
		t.Errorf("%d spans, %d forwarded", len(k.spans), k.forwarded)
	}
	if diff := cmp.Diff(TracesStats{Received: 3 + 1 + 10 + maxSpans + 7, Rejected: 18}, traces.Stats()); diff != "" {
		t.Error(diff)
	}
}
