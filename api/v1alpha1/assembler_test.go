package v1alpha1

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// Whatever was assembled before, the configuration is the one that is assembled from nothing, positions and problems and all.
func TestAssembler(t *testing.T) {
	good, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.SplitAfter(string(good), "\n---\n")
	grant := rapid.Custom(func(t *rapid.T) string {
		return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: g%d}\nspec: {from: [{spiffeID: 'spiffe://example.org/%s'}], to: [{endpoint: %s, operations: [Infer], resources: ['*']}]}\n",
			rapid.IntRange(0, 12).Draw(t, "name"), rapid.SampledFrom([]string{"a", "b"}).Draw(t, "caller"),
			rapid.SampledFrom([]string{"x0", "x0", "x1", "x1", "x1", "nowhere"}).Draw(t, "endpoint"))
	})
	endpoint := func(i int, model string) string {
		return fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: Endpoint\nmetadata: {name: x%d}\nspec: {hostnames: [x%[1]d.x], protocol: OpenAI, backends: [{name: b, addresses: ['127.0.0.1:1'], tls: {mode: None}}], models: [{name: %s}]}\n", i, model)
	}
	taken, made, o := 0, 0, testOptions()
	rapid.Check(t, func(t *rapid.T) {
		var memo Memo
		var assembler Assembler
		files := [][]string{{endpoint(0, "m"), endpoint(1, "m")}, {}, {}, {}}
		if rapid.Bool().Draw(t, "good") {
			files = append(files, parts)
		}
		for range rapid.IntRange(2, 8).Draw(t, "edits") {
			file := &files[rapid.IntRange(1, 3).Draw(t, "file")]
			switch rapid.IntRange(0, 9).Draw(t, "edit") {
			case 0: // a comment moves all that follows
				*file = append([]string{"# a comment\n"}, *file...)
			case 1:
				files[0] = []string{endpoint(0, rapid.SampledFrom([]string{"m", "n"}).Draw(t, "model")), endpoint(1, "m")}
			case 2:
				slices.Reverse(files[0])
			case 3:
				*file = append(slices.Clone(*file), anything(2).Draw(t, "anything")...)
			case 4, 5:
				*file = (*file)[min(len(*file), 1):]
			case 6:
				*file = slices.Insert(slices.Clone(*file), len(*file)/2, grant.Draw(t, "grant"))
			default:
				*file = append(slices.Clone(*file), grant.Draw(t, "grant"))
			}
			var docs [][]Document
			for i, f := range files {
				if text := strings.Join(f, ""); text != "" {
					docs = append(docs, memo.Decode(fmt.Sprint("f", i), text))
				}
			}
			memo.Forget()
			if rapid.IntRange(0, 9).Draw(t, "twice") == 0 {
				docs = append(docs, docs[0]) // which nobody does
			}
			if rapid.Bool().Draw(t, "shuffled") {
				docs = rapid.Permutation(docs).Draw(t, "order")
			}
			known := assembler.known
			got, problems := assembler.Assemble(docs, o)
			want, wanted := Assemble(slices.Concat(docs...), o)
			if diff := cmp.Diff(want, got, same()...); diff != "" {
				t.Fatalf("another configuration (-from nothing +again):\n%s", diff)
			}
			if diff := cmp.Diff(wanted, problems); diff != "" {
				t.Fatalf("other problems (-from nothing +again):\n%s", diff)
			}
			if made++; known != nil && known == assembler.known && len(problems) == 0 {
				taken++
			}
		}
	})
	if taken < made/10 {
		t.Errorf("only %d of %d took anything over: the test shows little", taken, made)
	}
}
