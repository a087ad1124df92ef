package authz_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
	"sallyport.dev/test/corpus"
)

// A policy that was written and read decides as before.
func TestPolicyAsJSON(t *testing.T) {
	requests := corpus.Requests()
	rapid.Check(t, func(t *rapid.T) {
		cfg := anyConfig(t)
		policy := authz.Compile(&cfg, moment(t))
		text, err := json.Marshal(policy)
		if err != nil {
			t.Fatal(err)
		}
		var read authz.Policy
		if err := json.Unmarshal(text, &read); err != nil {
			t.Fatal(err)
		}
		if !read.NextChange.Equal(policy.NextChange) || len(authz.Diff(policy, &read)) > 0 || len(authz.DiffShadow(policy, &read)) > 0 {
			t.Fatalf("another policy: %s", text)
		}
		for _, r := range requests {
			if diff := cmp.Diff(authz.Decide(policy, r), authz.Decide(&read, r)); diff != "" {
				t.Fatalf("%+v: (-written +read)\n%s", r, diff)
			}
		}
	})
	for _, text := range []string{`{"endpoints":{"e":null}}`, `{"endpoints":{"e":{"members":{"a":"x"},"classes":{}}}}`, `{"endpoints":{"e":{"members":{"a":"x"},"classes":{"x":null}}}}`,
		`{"endpoints":{"e":{"members":{"a":"x"},"classes":{"x":{"ID":"y"}}}}}`, `[]`} {
		var p authz.Policy
		if json.Unmarshal([]byte(text), &p) == nil {
			t.Errorf("reads %s", text)
		}
	}
}

// What follows from nothing else is listed by itself. Compile makes no such policy.
func TestDiffOfImpliedAlone(t *testing.T) {
	read := func(text string) *authz.Policy {
		var p authz.Policy
		if err := json.Unmarshal([]byte(text), &p); err != nil {
			t.Fatal(err)
		}
		return &p
	}
	const policy = `{"endpoints":{"e":{"members":{"spiffe://example.org/a":"x"},"classes":{"x":{"ID":"x","Enforced":{%s}}}}}}`
	const enter, discover, infer = `"Enter":{"":{"allowed":true,"rule":"grant/g"}}`, `"Discover":{"m":{"allowed":true,"rule":"grant/g"}}`, `"Infer":{"m":{"allowed":true,"rule":"grant/g"}}`
	none := read(`{}`)
	for rights, want := range map[string][]segment.Operation{
		enter: {segment.Enter}, discover + "," + enter: {segment.Discover}, infer + "," + discover + "," + enter: {segment.Infer},
	} {
		changes := authz.Diff(none, read(fmt.Sprintf(policy, rights)))
		if len(changes) != 1 || !changes[0].Gain || !slices.Equal(changes[0].Operations, want) {
			t.Errorf("%s: %+v", rights, changes)
		}
	}
}
