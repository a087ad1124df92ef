package authz

import (
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"sallyport.dev/segment"
)

func TestTable(t *testing.T) {
	text := rapid.StringOfN(rapid.SampledFrom([]rune("ab/é")), 0, 4, -1)
	rapid.Check(t, func(t *rapid.T) {
		entries := map[segment.Pattern]int{}
		for i, s := range rapid.SliceOfN(text, 0, 12).Draw(t, "patterns") {
			if rapid.Bool().Draw(t, "prefix") {
				s += "*"
			}
			entries[segment.Pattern(s)] = i
		}
		table := NewTable(entries)
		name := text.Draw(t, "name") + rapid.SampledFrom([]string{"", "*"}).Draw(t, "star")

		best, found := segment.Pattern(""), false
		for p := range entries {
			switch {
			case !p.Matches(name):
			case !p.IsPrefix():
				best, found = p, true
			case !found, best.IsPrefix() && len(p) > len(best):
				best, found = p, true
			}
		}
		got, ok := table.Lookup(name)
		if ok != found || ok && got != entries[best] {
			t.Fatalf("%q falls to %d, %t; want %q", name, got, ok, best)
		}
		if !ok && got != 0 {
			t.Fatalf("nothing is %d", got)
		}
		var all []segment.Pattern
		for p, v := range table.All() {
			if entries[p] != v {
				t.Fatalf("%q is %d", p, v)
			}
			all = append(all, p)
		}
		if !slices.IsSorted(all) || len(all) != len(entries) || table.Len() != len(all) {
			t.Fatalf("all are %q", all)
		}
	})
}

func TestZeroTable(t *testing.T) {
	var none Table[int]
	if _, ok := none.Lookup(""); ok || none.Len() != 0 {
		t.Error("the zero table holds something")
	}
	var rights Rights
	if got := rights.Lookup(segment.Read, "x"); got != (Leaf{Rule: DefaultDeny}) {
		t.Errorf("no rights are %+v", got)
	}
}

// An edited table is the one that is made of all that it then holds, and the table before stays what it was.
func TestEditTable(t *testing.T) {
	pattern := rapid.Map(rapid.StringOfN(rapid.SampledFrom([]rune("ab*")), 0, 3, -1), func(s string) segment.Pattern { return segment.Pattern(s) })
	entries := rapid.MapOfN(pattern, rapid.Int(), 0, 8)
	rapid.Check(t, func(t *rapid.T) {
		first := entries.Draw(t, "entries")
		others, gone := entries.Draw(t, "others"), rapid.MapOfN(pattern, rapid.Just(true), 0, 8).Draw(t, "gone")
		table := NewTable(first)
		got := table.edit(others, gone)
		want := maps.Clone(first)
		maps.DeleteFunc(want, func(p segment.Pattern, _ int) bool { return gone[p] })
		maps.Copy(want, others)
		if !slices.Equal(got.entries, NewTable(want).entries) || !slices.Equal(got.lengths, NewTable(want).lengths) {
			t.Fatalf("%v becomes %v, not %v", first, got, want)
		}
		if !maps.Equal(maps.Collect(table.All()), first) {
			t.Fatalf("%v is %v now", first, table)
		}
		prefix := pattern.Draw(t, "prefix") + "*"
		below := slices.Collect(table.below(prefix))
		for p := range first {
			if slices.Contains(below, p) != prefix.Covers(p) {
				t.Fatalf("%q covers %q", prefix, below)
			}
		}
	})
}
