// Package export forwards the spans of gateways to an OpenTelemetry collector.
//
// It is for users who have a Tempo, Jaeger or ClickHouse of their own, and is set up as all OpenTelemetry software is,
// by the OTEL_EXPORTER_OTLP_* variables of the environment (OpenTelemetry specification, "OpenTelemetry Protocol
// Exporter"). It forwards what it was given as it was given, and never holds anybody up: what the collector does not
// take in time is dropped and counted.
package export

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

const (
	queueRequests = 1024     // that wait for the collector
	queueBytes    = 16 << 20 // of them
	stopWithin    = 5 * time.Second
)

// Exporter sends spans to one collector.
type Exporter struct {
	client otlptrace.Client
	log    *slog.Logger
	queue  chan request

	waiting atomic.Int64 // bytes
	sent    atomic.Uint64
	dropped atomic.Uint64
}

type request struct {
	spans []*tracepb.ResourceSpans
	count uint64 // of spans
	bytes int64
}

// FromEnvironment returns an exporter to the collector that OTEL_EXPORTER_OTLP_ENDPOINT or
// OTEL_EXPORTER_OTLP_TRACES_ENDPOINT names, and nil when neither is set.
func FromEnvironment(log *slog.Logger) (*Exporter, error) {
	if cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT")) == "" {
		return nil, nil
	}
	e := &Exporter{log: log, queue: make(chan request, queueRequests)}
	// The clients read the rest of the environment themselves.
	switch p := cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"), "http/protobuf"); p {
	case "grpc":
		e.client = otlptracegrpc.NewClient()
	case "http/protobuf":
		e.client = otlptracehttp.NewClient()
	default:
		return nil, fmt.Errorf("set up OTLP export: OTEL_EXPORTER_OTLP_PROTOCOL is %q, not grpc or http/protobuf", p)
	}
	return e, nil
}

// Offer takes spans to be sent, or drops them when too many wait. It never blocks. The spans must not be changed later.
func (e *Exporter) Offer(spans []*tracepb.ResourceSpans) {
	r := request{spans: spans}
	for _, rs := range spans {
		r.bytes += int64(proto.Size(rs))
		for _, ss := range rs.GetScopeSpans() {
			r.count += uint64(len(ss.GetSpans()))
		}
	}
	if e.waiting.Add(r.bytes) <= queueBytes {
		select {
		case e.queue <- r:
			return
		default:
		}
	}
	e.waiting.Add(-r.bytes)
	e.dropped.Add(r.count)
}

// Stats count spans since the start.
type Stats struct {
	Sent    uint64 `json:"sent"`
	Dropped uint64 `json:"dropped"` // the collector did not take them, or not in time
}

// Stats returns the counts so far.
func (e *Exporter) Stats() Stats { return Stats{Sent: e.sent.Load(), Dropped: e.dropped.Load()} }

// Run sends what is offered until ctx ends, and then what waits, for at most five seconds. A collector that fails is
// no reason to return: only a configuration that cannot work is an error.
func (e *Exporter) Run(ctx context.Context) error {
	if err := e.client.Start(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("start OTLP export: %w", err)
	}
	failing := false
	send := func(ctx context.Context, r request) {
		err := e.client.UploadTraces(ctx, r.spans)
		e.waiting.Add(-r.bytes)
		if err != nil {
			e.dropped.Add(r.count)
		} else {
			e.sent.Add(r.count)
		}
		switch {
		case err != nil && !failing:
			e.log.Warn("OTLP export fails, spans are dropped", "error", err)
		case err == nil && failing:
			e.log.Info("OTLP export works again")
		}
		failing = err != nil
	}
	for ctx.Err() == nil {
		select {
		case r := <-e.queue:
			send(ctx, r)
		case <-ctx.Done():
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
	defer cancel()
	for {
		select {
		case r := <-e.queue:
			send(last, r)
		default:
			_ = e.client.Stop(last) // nothing waits any more
			return nil
		}
	}
}
