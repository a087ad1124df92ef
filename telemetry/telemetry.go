// Package telemetry is what Sallyport remembers of traffic: one Flow for each request that a gateway finished or
// refused, the Spans of distributed traces, and how both are filtered, joined and summed up.
//
// It is for the receivers that make these records, the store that keeps them, and the commands and the console that
// show them. It holds values only: no IO, no clock, no goroutine, no logging. It never decides anything: a verdict
// here is what a gateway reported, and nothing but a gateway's own access log makes one.
package telemetry

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// Verdict is what became of a request. The zero value is unknown and never counts as allowed.
type Verdict string

const (
	Allowed Verdict = "allowed" // a grant let it through and the backend answered
	Denied  Verdict = "denied"  // no grant allows it, or one denies it
	Refused Verdict = "refused" // it was not judged: a bad request, or a connection that did not get through TLS
	Failed  Verdict = "failed"  // a grant let it through, but the backend failed
	Limited Verdict = "limited" // a grant allows it, and its budget was used up, or could not be counted
)

// Verdicts are the known verdicts, the worst last.
func Verdicts() []Verdict { return []Verdict{Allowed, Failed, Limited, Refused, Denied} }

// ParseVerdict reads a verdict as users write it.
func ParseVerdict(s string) (Verdict, error) {
	for _, v := range Verdicts() {
		if string(v) == s {
			return v, nil
		}
	}
	return "", fmt.Errorf("read verdict: %q is none of allowed, failed, limited, refused, denied", s)
}

// Worst returns the worse of two verdicts; an unknown one gives way to any other.
func Worst(a, b Verdict) Verdict {
	if b.rank() > a.rank() {
		return b
	}
	return a
}

func (v Verdict) rank() int {
	for i, known := range Verdicts() {
		if v == known {
			return i + 1
		}
	}
	return 0
}

// TraceID and SpanID are W3C Trace Context identifiers (section 3.2.2): 32 and 16 lower-case hexadecimal digits, not
// all zero. The zero value is none.
type (
	TraceID string
	SpanID  string
)

// ParseTraceID reads 32 hexadecimal digits.
func ParseTraceID(s string) (TraceID, error) {
	id, err := parseHex(s, 16)
	return TraceID(id), err
}

// ParseSpanID reads 16 hexadecimal digits.
func ParseSpanID(s string) (SpanID, error) {
	id, err := parseHex(s, 8)
	return SpanID(id), err
}

func parseHex(s string, size int) (string, error) {
	s = strings.ToLower(s)
	if b, err := hex.DecodeString(s); err != nil || len(b) != size || strings.Trim(s, "0") == "" {
		return "", fmt.Errorf("read trace context: %q is not %d hexadecimal digits with one that is not zero", s, 2*size)
	}
	return s, nil
}
