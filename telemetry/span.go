package telemetry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
)

// Source is who reported a span. The zero value is nobody, and is trusted with nothing.
type Source string

const (
	FromGateway     Source = "gateway"     // an authenticated gateway
	FromApplication Source = "application" // anybody on this machine: to be shown, never to be believed
)

// SpanKind is the role of a span (OpenTelemetry trace specification, SpanKind). The zero value is unspecified.
type SpanKind string

const (
	KindInternal SpanKind = "internal"
	KindServer   SpanKind = "server"
	KindClient   SpanKind = "client"
	KindProducer SpanKind = "producer"
	KindConsumer SpanKind = "consumer"
)

// SpanStatus is how a span ended. The zero value is unset.
type SpanStatus string

const (
	StatusOK    SpanStatus = "ok"
	StatusError SpanStatus = "error"
)

// Span is one step of a trace. Its attributes must not be changed once it has been handed on.
type Span struct {
	TraceID    TraceID    `json:"trace_id"`
	SpanID     SpanID     `json:"span_id"`
	Parent     SpanID     `json:"parent_id,omitempty"`
	Name       string     `json:"name"`
	Kind       SpanKind   `json:"kind,omitempty"`
	Start      time.Time  `json:"start"`
	End        time.Time  `json:"end"`
	Service    string     `json:"service,omitempty"` // service.name of the resource
	Status     SpanStatus `json:"status,omitempty"`
	Message    string     `json:"message,omitempty"` // what the status says of an error
	Attributes Attributes `json:"attributes,omitempty"`
	Source     Source     `json:"source"`
}

// Duration returns how long the span took, never less than zero.
func (s Span) Duration() time.Duration { return max(0, s.End.Sub(s.Start)) }

// Attributes are the attributes of a span: string, bool, int64, float64, and []any and map[string]any of these.
// They keep these types through JSON, except that a float64 with no fraction comes back as int64.
type Attributes map[string]any

// Text returns an attribute as text; "" when it is absent.
func (a Attributes) Text(key string) string {
	switch v := a[key].(type) {
	case nil:
		return ""
	case string:
		return v
	default:
		return fmt.Sprint(v)
	}
}

// Int returns a whole number, also one that was reported as text or as a float; 0 when it is absent or is none.
func (a Attributes) Int(key string) int64 {
	switch v := a[key].(type) {
	case int64:
		return v
	case float64:
		return int64(v)
	case string:
		n, _ := json.Number(v).Int64()
		return n
	}
	return 0
}

// UnmarshalJSON reads attributes and keeps whole numbers whole.
func (a *Attributes) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var raw map[string]any
	if err := dec.Decode(&raw); err != nil {
		return err
	}
	*a = raw
	for k, v := range raw {
		raw[k] = numbers(v)
	}
	return nil
}

func numbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, _ := v.Float64()
		return f
	case []any:
		for i := range v {
			v[i] = numbers(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = numbers(v[k])
		}
	}
	return v
}
