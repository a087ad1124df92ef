package ingest

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"sallyport.dev/telemetry"
)

var (
	kinds = [...]telemetry.SpanKind{
		tracepb.Span_SPAN_KIND_INTERNAL: telemetry.KindInternal,
		tracepb.Span_SPAN_KIND_SERVER:   telemetry.KindServer,
		tracepb.Span_SPAN_KIND_CLIENT:   telemetry.KindClient,
		tracepb.Span_SPAN_KIND_PRODUCER: telemetry.KindProducer,
		tracepb.Span_SPAN_KIND_CONSUMER: telemetry.KindConsumer,
	}
	errNoID = errors.New("read span: trace id or span id is missing or not of its size")
)

// SpanOf reads one span. cut reports that something of it was too big to keep. The error says why it is no span.
// Events and links are not kept.
func SpanOf(in *tracepb.Span, resource *resourcepb.Resource, from telemetry.Source) (s telemetry.Span, cut bool, err error) {
	trace, err1 := telemetry.ParseTraceID(hex.EncodeToString(in.GetTraceId()))
	id, err2 := telemetry.ParseSpanID(hex.EncodeToString(in.GetSpanId()))
	if err1 != nil || err2 != nil {
		return telemetry.Span{}, false, errNoID
	}
	parent, _ := telemetry.ParseSpanID(hex.EncodeToString(in.GetParentSpanId()))
	b := budget{left: maxAttrs}
	s = telemetry.Span{
		TraceID: trace, SpanID: id, Parent: parent, Source: from,
		Name:       b.text(in.GetName(), maxName),
		Start:      nanos(in.GetStartTimeUnixNano()),
		End:        nanos(in.GetEndTimeUnixNano()),
		Message:    b.text(in.GetStatus().GetMessage(), maxText),
		Attributes: b.attributes(in.GetAttributes(), 0),
	}
	if rule, _, counted := strings.Cut(s.Attributes.Text(telemetry.SecurityRuleName), " "); counted && from == telemetry.FromGateway {
		s.Attributes[telemetry.SecurityRuleName] = rule // without its budget
	}
	if k := int(in.GetKind()); k >= 0 && k < len(kinds) {
		s.Kind = kinds[k]
	}
	switch in.GetStatus().GetCode() {
	case tracepb.Status_STATUS_CODE_OK:
		s.Status = telemetry.StatusOK
	case tracepb.Status_STATUS_CODE_ERROR:
		s.Status = telemetry.StatusError
	}
	for _, a := range resource.GetAttributes() {
		if a.GetKey() == telemetry.ServiceName {
			s.Service = b.text(a.GetValue().GetStringValue(), maxName)
		}
	}
	return s, b.cut || in.GetDroppedAttributesCount() > 0, nil
}

// nanos returns the zero time for none and for what int64 nanoseconds cannot tell.
func nanos(n uint64) time.Time {
	if n == 0 || n > math.MaxInt64 {
		return time.Time{}
	}
	return time.Unix(0, int64(n)).UTC()
}

// budget is how much of a span may still be kept.
type budget struct {
	left int // bytes
	cut  bool
}

func (b *budget) text(s string, most int) string {
	kept := clip(s, max(0, min(most, b.left)))
	b.left -= len(kept)
	b.cut = b.cut || len(kept) < len(s)
	return kept
}

func (b *budget) attributes(in []*commonpb.KeyValue, depth int) map[string]any {
	if len(in) == 0 && depth == 0 {
		return nil
	}
	out := make(map[string]any, min(len(in), maxKeys))
	for _, kv := range in {
		if len(out) == maxKeys || b.left <= 0 {
			b.cut = true
			break
		}
		out[b.text(kv.GetKey(), maxName)] = b.value(kv.GetValue(), depth)
	}
	return out
}

// value returns only what JSON can say, and what telemetry.Attributes promises.
func (b *budget) value(in *commonpb.AnyValue, depth int) any {
	b.left -= 8
	switch v := in.GetValue().(type) {
	case *commonpb.AnyValue_StringValue:
		return b.text(v.StringValue, maxValue)
	case *commonpb.AnyValue_BoolValue:
		return v.BoolValue
	case *commonpb.AnyValue_IntValue:
		return v.IntValue
	case *commonpb.AnyValue_DoubleValue:
		switch {
		case math.IsNaN(v.DoubleValue):
			return "NaN"
		case math.IsInf(v.DoubleValue, 1):
			return "Infinity"
		case math.IsInf(v.DoubleValue, -1):
			return "-Infinity"
		}
		return v.DoubleValue
	case *commonpb.AnyValue_BytesValue:
		return b.text(base64.StdEncoding.EncodeToString(v.BytesValue[:min(len(v.BytesValue), maxValue)]), maxValue)
	case *commonpb.AnyValue_ArrayValue:
		out := []any{}
		for _, e := range v.ArrayValue.GetValues() {
			if len(out) == maxKeys || b.left <= 0 || depth == maxDepth {
				b.cut = true
				break
			}
			out = append(out, b.value(e, depth+1))
		}
		return out
	case *commonpb.AnyValue_KvlistValue:
		if depth == maxDepth {
			b.cut = true
			return ""
		}
		return b.attributes(v.KvlistValue.GetValues(), depth+1)
	}
	return "" // an empty value
}
