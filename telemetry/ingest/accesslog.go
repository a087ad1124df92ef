package ingest

import (
	"errors"
	"io"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"

	"sallyport.dev/telemetry"
)

// Flows takes what gateways report. Add must not block: a gateway waits for it.
type Flows interface{ Add(telemetry.Flow) }

// AccessLog is envoy.service.accesslog.v3.AccessLogService for gateways. Its server must admit gateways only: what
// comes in here is believed.
type AccessLog struct {
	flows    Flows
	received atomic.Uint64
	skipped  atomic.Uint64
}

// NewAccessLog returns a service that hands every flow on.
func NewAccessLog(flows Flows) *AccessLog { return &AccessLog{flows: flows} }

// Register adds the service to a server.
func (a *AccessLog) Register(s grpc.ServiceRegistrar) { alsv3.RegisterAccessLogServiceServer(s, a) }

// AccessLogStats count log entries since the start.
type AccessLogStats struct {
	Received uint64 `json:"received"`
	Skipped  uint64 `json:"skipped"` // of these, entries that are no flow: healthy connections and requests under way
}

// Stats returns the counts so far.
func (a *AccessLog) Stats() AccessLogStats {
	return AccessLogStats{Received: a.received.Load(), Skipped: a.skipped.Load()}
}

// StreamAccessLogs receives the log of one gateway until it ends the stream.
func (a *AccessLog) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	var node *corev3.Node // in the first message only
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&alsv3.StreamAccessLogsResponse{})
		}
		if err != nil {
			return err
		}
		if n := m.GetIdentifier().GetNode(); n != nil && node == nil {
			node = n
		}
		for _, e := range m.GetHttpLogs().GetLogEntry() {
			a.add(FlowOf(e, node), finished(e.GetCommonProperties()))
		}
		for _, e := range m.GetTcpLogs().GetLogEntry() {
			if tag(e.GetCommonProperties(), tagEndpoint) != "" { // of the endpoint itself, and not of the listener
				a.add(ConnectionOf(e, node))
			} else {
				a.add(RefusedOf(e, node))
			}
		}
	}
}

func (a *AccessLog) add(f telemetry.Flow, isFlow bool) {
	a.received.Add(1)
	if !isFlow {
		a.skipped.Add(1)
		return
	}
	if f.Time.IsZero() {
		f.Time = time.Now().UTC().Add(-f.Duration)
	}
	a.flows.Add(f)
}

// finished tells the one entry at the end of a request from those that a gateway may write while it runs.
func finished(common *accesslogv3.AccessLogCommon) bool {
	t := common.GetAccessLogType()
	return t == accesslogv3.AccessLogType_NotSet || t == accesslogv3.AccessLogType_DownstreamEnd
}
