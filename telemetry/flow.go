package telemetry

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
)

// Flow is one finished request, or one refused connection, as a gateway saw it. It is a value: share it freely.
type Flow struct {
	// Seq is given by the store: unique there, and larger for what it received later. Zero outside a store.
	Seq int64 `json:"seq,omitempty"`
	// ID is the request id that the caller was told; a refused connection has the gateway's id of it, if any.
	ID        string        `json:"id,omitempty"`
	Time      time.Time     `json:"time"`                   // when it began
	Duration  time.Duration `json:"duration_ns"`            // to the last byte that the caller was sent
	FirstByte time.Duration `json:"first_byte_ns,omitzero"` // to the first byte of the backend's answer; 0: unknown

	Gateway   segment.GatewayName  `json:"gateway"`
	Caller    spiffeid.ID          `json:"caller"`                // from the verified certificate; zero: none
	Endpoint  segment.EndpointName `json:"endpoint,omitempty"`    // "": it was never known
	Operation segment.Operation    `json:"operation,omitempty"`   // "": it was never known
	Resource  string               `json:"resource,omitempty"`    // model, collection or tool; "": it has none
	Verdict   Verdict              `json:"verdict"`               //
	Rule      string               `json:"rule,omitempty"`        // what decided: "grant/NAME" or "default-deny"
	Shadow    Verdict              `json:"shadow,omitempty"`      // what the shadow grants would have said
	ShadowBy  string               `json:"shadow_rule,omitempty"` // and which of them

	Method string `json:"method,omitempty"` // "": a connection that did not come to a request
	Path   string `json:"path,omitempty"`   // without its query, which may hold secrets
	Status int    `json:"status,omitempty"` // HTTP status; 0: no answer was sent
	Detail string `json:"detail,omitempty"` // the gateway's reason: response code details, or why TLS failed

	// Tokens are what the backend reported; 0: it reported none, or nothing ran.
	InputTokens  int64 `json:"input_tokens,omitempty"`
	OutputTokens int64 `json:"output_tokens,omitempty"`
	BytesIn      int64 `json:"bytes_in"`  // of the request's body
	BytesOut     int64 `json:"bytes_out"` // of the answer's body

	TraceID    TraceID `json:"trace_id,omitempty"`
	SpanID     SpanID  `json:"span_id,omitempty"`    // the gateway's span of this request
	Generation string  `json:"generation,omitempty"` // the configuration that judged it
}

// End returns when the flow ended.
func (f Flow) End() time.Time { return f.Time.Add(f.Duration) }
