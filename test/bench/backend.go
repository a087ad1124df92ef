package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
)

// backend stands in for the model server and the vector store, and takes the telemetry of the Envoy that has no
// control plane. It answers at once: what is measured is the way to it.
type backend struct {
	address string
	http    *http.Server
	sink    *grpc.Server
}

const (
	collectionID   = "0f8b2ae6-52c7-4d0e-9f4a-1c8f25a7d3b1"
	collectionName = "handbook"
	collections    = "/api/v2/tenants/default_tenant/databases/default_database/collections"
)

// pause is between two events of a stream, so that each is a write, a read and a frame of its own, as the tokens of a
// model are. Without it the kernel puts many of them together.
const pause = time.Millisecond

const (
	completion = `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"small","choices":[{"index":0,"message":{"role":"assistant","content":"hello there"},"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}`
	event      = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"small","choices":[{"index":0,"delta":{"content":" hello"},"finish_reason":null}]}` + "\n\n"
	lastEvents = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"small","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":50,"total_tokens":60}}` + "\n\ndata: [DONE]\n\n"
)

func startBackend(sinkSocket string) (*backend, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	socket, err := net.Listen("unix", sinkSocket)
	if err != nil {
		return nil, err
	}
	b := &backend{address: listener.Addr().String(), http: &http.Server{Handler: http.HandlerFunc(answer)}, sink: grpc.NewServer()}
	alsv3.RegisterAccessLogServiceServer(b.sink, logSink{})
	collectorpb.RegisterTraceServiceServer(b.sink, &traceSink{})
	go b.http.Serve(listener) //nolint:errcheck // ends with close
	go b.sink.Serve(socket)   //nolint:errcheck // the same
	return b, nil
}

func (b *backend) close() {
	b.http.Close()
	b.sink.Stop()
}

func answer(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the gateway has gone
	}
	collection := fmt.Sprintf(`{"id":%q,"name":%q}`, collectionID, collectionName)
	switch {
	case r.URL.Path == collections && r.Method == http.MethodGet:
		fmt.Fprintf(w, "[%s]", collection)
	case strings.HasPrefix(r.URL.Path, collections):
		io.WriteString(w, collection)
	default:
		events := 0
		if head, found := bytes.CutPrefix(body, []byte(`{"stream":true,"n":`)); found {
			_, _ = fmt.Sscanf(string(head[:min(len(head), 8)]), "%d", &events) // none: not a stream
		}
		if events == 0 {
			w.Header().Set("content-type", "application/json")
			io.WriteString(w, completion)
			return
		}
		w.Header().Set("content-type", "text/event-stream")
		flush := w.(http.Flusher).Flush
		for range events {
			io.WriteString(w, event)
			flush()
			time.Sleep(pause)
		}
		io.WriteString(w, lastEvents)
	}
}

// logSink takes access logs and throws them away.
type logSink struct{}

func (logSink) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		if _, err := stream.Recv(); err != nil {
			if errors.Is(err, io.EOF) {
				return stream.SendAndClose(&alsv3.StreamAccessLogsResponse{})
			}
			return err
		}
	}
}

// traceSink does the same with spans.
type traceSink struct {
	collectorpb.UnimplementedTraceServiceServer
}

func (*traceSink) Export(context.Context, *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	return &collectorpb.ExportTraceServiceResponse{}, nil
}
