package ingest

import (
	"context"
	"fmt"
	"sync/atomic"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"

	"sallyport.dev/telemetry"
)

// Spans takes what was received. AddSpans must not block.
type Spans interface{ AddSpans([]telemetry.Span) }

// Forwarder passes on what was received, as it was received. Offer must not block.
type Forwarder interface {
	Offer([]*tracepb.ResourceSpans)
}

// TracesConfig says who sends to a Traces service and where spans go.
type TracesConfig struct {
	// Source marks every span. A server that admits anybody must use FromApplication.
	Source  telemetry.Source
	Spans   Spans
	Forward Forwarder // nil: nowhere
}

// Traces is opentelemetry.proto.collector.trace.v1.TraceService for one kind of sender.
type Traces struct {
	collectorpb.UnimplementedTraceServiceServer
	cfg      TracesConfig
	received atomic.Uint64
	rejected atomic.Uint64
	cut      atomic.Uint64
}

// NewTraces returns a service that hands every span on.
func NewTraces(cfg TracesConfig) *Traces { return &Traces{cfg: cfg} }

// Register adds the service to a server.
func (t *Traces) Register(s grpc.ServiceRegistrar) { collectorpb.RegisterTraceServiceServer(s, t) }

// TracesStats count spans since the start.
type TracesStats struct {
	Received uint64 `json:"received"`
	Rejected uint64 `json:"rejected"` // of these, without a valid id or more than a request may hold
	Cut      uint64 `json:"cut"`      // of these, kept in part, being too big
}

// Stats returns the counts so far.
func (t *Traces) Stats() TracesStats {
	return TracesStats{Received: t.received.Load(), Rejected: t.rejected.Load(), Cut: t.cut.Load()}
}

// Export takes the spans of one request, at most 4096. The sender learns of those that were rejected by the partial
// success of OTLP (section "Partial Success").
func (t *Traces) Export(_ context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	var spans []telemetry.Span
	var rejected, cut int64
	var why error
	for _, rs := range req.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			for _, in := range ss.GetSpans() {
				if len(spans) == maxSpans {
					rejected++
					why = fmt.Errorf("take spans: more than %d in one request", maxSpans)
					continue
				}
				span, wasCut, err := SpanOf(in, rs.GetResource(), t.cfg.Source)
				if err != nil {
					rejected++
					why = err
					continue
				}
				if wasCut {
					cut++
				}
				spans = append(spans, span)
			}
		}
	}
	t.received.Add(uint64(len(spans)) + uint64(rejected))
	t.rejected.Add(uint64(rejected))
	t.cut.Add(uint64(cut))
	t.cfg.Spans.AddSpans(spans)
	if t.cfg.Forward != nil {
		t.cfg.Forward.Offer(req.GetResourceSpans())
	}
	resp := &collectorpb.ExportTraceServiceResponse{}
	if why != nil {
		resp.PartialSuccess = &collectorpb.ExportTracePartialSuccess{RejectedSpans: rejected, ErrorMessage: why.Error()}
	}
	return resp, nil
}
