package authz_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// Whatever resource is named with it, Enter is explained as it is decided: about none.
func TestExplainEnter(t *testing.T) {
	cfg := segment.Config{
		Endpoints: []segment.Endpoint{{Name: "chat", Protocol: segment.OpenAI}},
		Grants: []segment.Grant{{Name: "g", Effect: segment.Allow, Mode: segment.Enforce,
			From: []segment.Caller{segment.CallerID(spiffeid.RequireFromString("spiffe://example.org/app"))},
			To:   []segment.Target{{Endpoint: "chat", Operations: []segment.Operation{segment.Infer}, Resources: []segment.Pattern{"small"}}}}},
	}
	now := time.Now()
	for _, resource := range []string{"", "small", "large"} {
		ex := authz.Explain(authz.Compile(&cfg, now), &cfg, authz.Request{Caller: "spiffe://example.org/app", Endpoint: "chat",
			Operation: segment.Enter, Resource: resource}, now)
		if !ex.Decision.Allowed || ex.Request.Resource != "" || len(ex.Deciding) != 1 {
			t.Errorf("with resource %q: %+v", resource, ex)
		}
	}
}
