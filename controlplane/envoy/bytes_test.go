package envoy

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

// granting is a configuration with these grants at the endpoint "open".
func granting(t *testing.T, grants ...segment.Grant) segment.Config {
	cfg := corpus.Assemble(t, corpus.Endpoints())
	cfg.Grants = grants
	return cfg.For(cfg.Gateways[0])
}

func toInfer(t *testing.T, name string, callers, models []string) segment.Grant {
	g := segment.Grant{Name: segment.GrantName(name), Effect: segment.Allow, Mode: segment.Enforce,
		To: []segment.Target{{Endpoint: "open", Operations: []segment.Operation{segment.Infer}}}}
	for _, c := range callers {
		caller, err := segment.ParseCaller("spiffe://example.org/" + c)
		if err != nil {
			t.Fatal(err)
		}
		g.From = append(g.From, caller)
	}
	for _, m := range models {
		g.To[0].Resources = append(g.To[0].Resources, segment.Pattern(m))
	}
	return g
}

// numbered are names that sort as they are numbered.
func numbered(prefix string, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("%s-%05d", prefix, i)
	}
	return names
}

// size is the bytes of all resources, and of those that the gateway does not have in this version.
func size(r, had *Resources) (all, sent int) {
	versions := map[string]bool{}
	if had != nil {
		for field, m := range had.All() {
			versions[field+had.Version(m)] = true
		}
	}
	for field, m := range r.All() {
		n := proto.Size(m)
		if all += n; !versions[field+r.Version(m)] {
			sent += n
		}
	}
	return all, sent
}

// Of twenty thousand grants one changes, and well below a hundredth of all bytes is another then. What is sent does not grow
// with the grants, so of a hundred thousand it is a fifth of that part.
func TestFewBytesForOneGrant(t *testing.T) {
	grants := make([]segment.Grant, 20_000)
	for i, name := range numbered("app", len(grants)) {
		grants[i] = toInfer(t, name, []string{name}, []string{"small"})
	}
	cfg := granting(t, grants...)
	policy := authz.Compile(&cfg, time.Unix(0, 0))
	before := Lower(&cfg, policy, Learned{})
	for _, at := range []int{0, 12_345, len(grants) - 1} {
		for _, models := range [][]string{{"small", "large"}, {"other"}} {
			grants := slices.Clone(grants)
			grants[at] = toInfer(t, string(grants[at].Name), []string{string(grants[at].Name)}, models)
			cfg := granting(t, grants...)
			after := Lower(&cfg, authz.Recompile(policy, &cfg, time.Unix(0, 0)), Learned{}, before)
			if err := Check(after, before); err != nil {
				t.Fatal(err)
			}
			all, sent := size(after, before)
			if t.Logf("%d of %d bytes", sent, all); sent == 0 || sent > all/100 {
				t.Errorf("grant %d gives %q: %d of %d bytes are sent", at, models, sent, all)
			}
		}
	}
}

// Callers in one group and the models that they may use add up, and do not multiply out.
func TestGroupsDoNotMultiply(t *testing.T) {
	bytes := func(callers, models int) int {
		cfg := granting(t, toInfer(t, "group", numbered("app", callers), numbered("model", models)))
		all, _ := size(Lower(&cfg, authz.Compile(&cfg, time.Unix(0, 0)), Learned{}), nil)
		nobody := granting(t)
		without, _ := size(Lower(&nobody, authz.Compile(&nobody, time.Unix(0, 0)), Learned{}), nil)
		return all - without
	}
	half, whole := bytes(500, 500), bytes(1000, 1000)
	// Written out they would be two million leaves.
	t.Logf("500 × 500: %d bytes, 1,000 × 1,000: %d bytes", half, whole)
	if whole > 600_000 {
		t.Errorf("1,000 callers × 1,000 models are %d bytes", whole)
	}
	if whole > half*21/10 {
		t.Errorf("twice as many of both are %d bytes, and were %d", whole, half)
	}
}
