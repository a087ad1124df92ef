// Package ingest receives what gateways and applications report, by gRPC, and turns it into flows and spans: access
// logs from Envoy gateways (envoy.service.accesslog.v3) and spans by OTLP (opentelemetry.proto.collector.trace.v1).
//
// It is for the control plane, which registers these services on its servers. What is too much is cut or left out, and
// counted: a sender can neither grow a record without bound nor make one disappear unseen. It never lets an application
// say anything about a request that a gateway judged: flows come from gateways' access logs only, and each span keeps
// the mark of the service that received it.
package ingest

import (
	"strings"
	"unicode/utf8"
)

// Bounds on one record. Envoy itself lets request headers grow to 60 KiB.
const (
	maxName  = 256      // bytes of names: spans, services, attributes
	maxText  = 1 << 10  // bytes of any other text of a flow or span
	maxValue = 4 << 10  // bytes of one text in an attribute
	maxAttrs = 64 << 10 // bytes of all attributes of a span
	maxKeys  = 128      // attributes of a span
	maxDepth = 4        // lists and maps inside each other in an attribute
	maxSpans = 4096     // spans of one request
)

// clip cuts text to at most n bytes, between characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return strings.Clone(s[:n]) // not the whole text kept alive
}
