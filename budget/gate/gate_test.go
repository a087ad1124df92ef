package gate_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/budget"
	"sallyport.dev/budget/gate"
)

// What Envoy really asks and reports is tested in test/real. Here is what it never should.

// counters say what the test wants to hear.
type counters struct {
	answer budget.Answer
	err    error
}

func (c *counters) Reserve(context.Context, time.Time, []budget.Charge) (budget.Answer, error) {
	return c.answer, c.err
}

func (c *counters) Settle(context.Context, time.Time, budget.Settlement) error { return c.err }

func ask(t *testing.T, g *gate.Gate, rule, caller string) int {
	t.Helper()
	rbac, err := structpb.NewStruct(map[string]any{"enforced_effective_policy_id": rule})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := g.Check(t.Context(), &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:          &authv3.AttributeContext_Peer{Principal: caller},
		MetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.rbac": rbac}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if answer.GetStatus().GetCode() == 0 {
		return 200
	}
	return int(answer.GetDeniedResponse().GetStatus().GetCode())
}

func TestUnreadable(t *testing.T) {
	g := gate.New(&counters{answer: budget.Answer{Allowed: true}}, slog.New(slog.DiscardHandler))
	const who = "spiffe://example.org/app"
	for _, c := range []struct {
		rule, caller string
		want         int
	}{
		{"grant/few requests=3/Month", who, 200}, {"grant/few requests=3/Month", "", 500}, {"grant/few requests=many", who, 500},
		{"grant/few", who, 500}, {"default-deny", who, 500}, {"", who, 500}, {"grant/ requests=3/Month", who, 500},
	} {
		if got := ask(t, g, c.rule, c.caller); got != c.want {
			t.Errorf("%q by %q: %d", c.rule, c.caller, got)
		}
	}
	if answer, err := g.Check(t.Context(), nil); err != nil || answer.GetStatus().GetCode() == 0 {
		t.Errorf("nothing: %v %v", answer, err)
	}
}

// While nothing can be counted each grant's own word counts, whatever the counters answer beside their error.
func TestAway(t *testing.T) {
	var log bytes.Buffer
	c := &counters{budget.Answer{Allowed: true}, io.ErrUnexpectedEOF}
	g := gate.New(c, slog.New(slog.NewTextHandler(&log, nil)))
	for range 3 {
		if shut, open := ask(t, g, "grant/few requests=3/Month", "spiffe://a/b"), ask(t, g, "grant/few requests=3/Month open", "spiffe://a/b"); shut != 503 || open != 200 {
			t.Errorf("%d and %d", shut, open)
		}
	}
	c.err = nil
	if got := ask(t, g, "grant/few requests=3/Month", "spiffe://a/b"); got != 200 {
		t.Error(got)
	}
	if n := strings.Count(log.String(), "\n"); n != 2 || !strings.Contains(log.String(), "budgets are counted again") {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
	if s := g.Stats(); s != (gate.Stats{Allowed: 1, Uncounted: 3, Failed: 3}) {
		t.Errorf("%+v", s)
	}
}
