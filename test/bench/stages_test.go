package main

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// BenchmarkStages is for a profile of what `go run ./test/bench -only stages` shows.
func BenchmarkStages(b *testing.B) {
	for _, n := range []int{10, 10000} {
		text := ""
		{
			var all strings.Builder
			for _, part := range (&bench{backend: &backend{address: "127.0.0.1:1"}}).manyGrants(n) {
				all.WriteString("---\n" + strings.TrimPrefix(part, "---\n"))
			}
			text = all.String()
		}
		docs := v1alpha1.Decode("all", []byte(text))
		cfg, problems := v1alpha1.Assemble(docs, v1alpha1.Options{TrustDomain: trustDomain, Gateway: segment.Gateway{
			Name: "local", ID: spiffeid.RequireFromPath(trustDomain, "/gateway/local"), SVIDTTL: time.Hour}})
		if problems != nil {
			b.Fatal(problems)
		}
		policy := authz.Compile(&cfg, time.Now())
		resources := envoy.Lower(&cfg, policy, nil)
		for name, stage := range map[string]func(){
			"compile":  func() { authz.Compile(&cfg, time.Now()) },
			"lower":    func() { envoy.Lower(&cfg, policy, nil) },
			"check":    func() { _ = envoy.Check(resources) },
			"generate": func() { _, _ = controlplane.Generate(cfg, nil, time.Now()) },
		} {
			b.Run(name+"/"+strconv.Itoa(n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					stage()
				}
			})
		}
	}
}
