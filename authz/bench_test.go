package authz_test

import (
	"fmt"
	"testing"
	"time"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// many is a configuration of n grants: each to a caller of its own, or all to one family of callers.
func many(b *testing.B, n int, oneGroup bool) *segment.Config {
	cfg := &segment.Config{Endpoints: []segment.Endpoint{{Name: "docs", Protocol: segment.Chroma}}}
	for i := range n {
		from := fmt.Sprintf("spiffe://example.org/w/%d", i)
		if oneGroup {
			from = "spiffe://example.org/w/*"
		}
		caller, err := segment.ParseCaller(from)
		if err != nil {
			b.Fatal(err)
		}
		cfg.Grants = append(cfg.Grants, segment.Grant{
			Name: segment.GrantName(fmt.Sprintf("g%05d", i)), Effect: segment.Allow, Mode: segment.Enforce, From: []segment.Caller{caller},
			To: []segment.Target{{Endpoint: "docs", Operations: []segment.Operation{segment.Read, segment.Write},
				Resources: []segment.Pattern{segment.Pattern(fmt.Sprintf("c%d", i)), segment.Pattern(fmt.Sprintf("p%d-*", i%100))}}},
		})
	}
	return cfg
}

func BenchmarkCompile(b *testing.B) {
	for _, c := range []struct {
		name     string
		oneGroup bool
	}{{"callers", false}, {"group", true}} {
		cfg := many(b, 10_000, c.oneGroup)
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				authz.Compile(cfg, time.Time{})
			}
		})
	}
}

func BenchmarkDecide(b *testing.B) {
	policy := authz.Compile(many(b, 10_000, false), time.Time{})
	for _, resource := range []string{"c5000", "p0-x", "nothing"} {
		r := authz.Request{Caller: "spiffe://example.org/w/5000", Endpoint: "docs", Operation: segment.Read, Resource: resource}
		b.Run(resource, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				authz.Decide(policy, r)
			}
		})
	}
}
