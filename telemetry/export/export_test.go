package export

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// collector is a real OTLP receiver, by gRPC and by HTTP.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	mu    sync.Mutex
	names []string
}

func (c *collector) Export(_ context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				c.names = append(c.names, s.GetName())
			}
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var req collectorpb.ExportTraceServiceRequest
	if err == nil {
		err = proto.Unmarshal(body, &req)
	}
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("x-key") != "k" {
		http.Error(w, "bad", http.StatusBadRequest)
		return
	}
	_, _ = c.Export(r.Context(), &req)
}

func spans(names ...string) []*tracepb.ResourceSpans {
	ss := &tracepb.ScopeSpans{}
	for _, n := range names {
		ss.Spans = append(ss.Spans, &tracepb.Span{Name: n})
	}
	return []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{ss}}}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestOffWithoutVariables(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
	if e, err := FromEnvironment(quiet()); e != nil || err != nil {
		t.Errorf("%v, %v", e, err)
	}
}

func TestUnknownProtocol(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")
	if e, err := FromEnvironment(quiet()); e != nil || err == nil || !strings.Contains(err.Error(), "carrier-pigeon") {
		t.Errorf("%v, %v", e, err)
	}
}

func TestSendsAndSendsTheRestAtTheEnd(t *testing.T) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) {
			c := &collector{}
			if protocol == "grpc" {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				server := grpc.NewServer()
				collectorpb.RegisterTraceServiceServer(server, c)
				go func() { _ = server.Serve(l) }()
				defer server.Stop()
				t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+l.Addr().String())
			} else {
				server := httptest.NewServer(c)
				defer server.Close()
				t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
			}
			t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
			t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=k")
			e, err := FromEnvironment(quiet())
			if err != nil {
				t.Fatal(err)
			}
			e.Offer(spans("a", "b"))
			e.Offer(spans("c"))
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // at once: what waits is still sent
			if err := e.Run(ctx); err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(c.names, " "); got != "a b c" || e.Stats() != (Stats{Sent: 3}) {
				t.Errorf("%s, %+v", got, e.Stats())
			}
		})
	}
}

func TestNeverBlocks(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1") // nobody is there, and nobody runs
	e, err := FromEnvironment(quiet())
	if err != nil {
		t.Fatal(err)
	}
	for range queueRequests + 5 {
		e.Offer(spans("a"))
	}
	if got := e.Stats(); got.Dropped != 5 {
		t.Errorf("%+v", got)
	}
	e.queue = make(chan request, queueRequests)
	e.waiting.Store(0)
	big := spans(strings.Repeat("x", queueBytes/4))
	for range 10 {
		e.Offer(big)
	}
	if got := e.Stats(); got.Dropped != 5+7 {
		t.Errorf("%+v: too many bytes wait", got)
	}
}

func TestCollectorFails(t *testing.T) {
	var c collector
	server := httptest.NewServer(&c) // refuses what comes without its header
	defer server.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
	e, err := FromEnvironment(quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	e.Offer(spans("a"))
	for end := time.Now().Add(10 * time.Second); e.Stats().Dropped == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil || e.Stats() != (Stats{Dropped: 1}) {
		t.Errorf("%v, %+v", err, e.Stats())
	}
}
