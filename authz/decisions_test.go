package authz_test

import (
	"flag"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sallyport.dev/authz"
	"sallyport.dev/test/corpus"
)

var update = flag.Bool("update", false, "write what is decided into the decision tables")

const tables = "testdata/decisions"

func policyOf(t *testing.T, c *corpus.Case) *authz.Policy {
	config, err := c.Config()
	if err != nil {
		t.Fatal(err)
	}
	return authz.Compile(&config, c.Now)
}

func TestDecisions(t *testing.T) {
	if *update {
		err := corpus.Update(tables, func(c *corpus.Case, l *corpus.Line) authz.Decision {
			return authz.Decide(policyOf(t, c), l.Request)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	cases, err := corpus.Load(tables)
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			policy := policyOf(t, &c)
			for _, line := range c.Lines {
				lines++
				got := authz.Decide(policy, line.Request)
				got.Budget = line.Want.Budget // which goes with the rule
				if diff := cmp.Diff(line.Want, got); diff != "" {
					t.Errorf("%s: (-want +got)\n%s", line.Pos, diff)
				}
			}
			// At any time, its timeless documents decide as they do at its own.
			timeless := c
			timeless.Now = c.Now.AddDate(70, 0, 0)
			var err error
			if timeless.Documents, timeless.Shadow, err = c.Timeless(); err != nil {
				t.Fatal(err)
			}
			if policy = policyOf(t, &timeless); !policy.NextChange.IsZero() {
				t.Errorf("it has times: it changes at %s", policy.NextChange)
			}
			for _, line := range c.Lines {
				got := authz.Decide(policy, line.Request)
				got.Budget = line.Want.Budget // which goes with the rule
				if diff := cmp.Diff(line.Want, got); diff != "" {
					t.Errorf("%s, at any time: (-want +got)\n%s", line.Pos, diff)
				}
			}
		})
	}
	if lines < 200 {
		t.Errorf("only %d decisions", lines)
	}
}
