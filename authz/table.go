package authz

import (
	"cmp"
	"iter"
	"maps"
	"slices"

	"sallyport.dev/segment"
)

// Table maps patterns to values. A name takes the value of the exact pattern, else of the longest prefix that
// covers it: the two look-ups that Envoy's exact_match_map and prefix_match_map do. The zero value is empty.
type Table[V any] struct {
	entries map[segment.Pattern]V
	lengths []int // of the stems of the prefixes, longest first
}

// NewTable returns a table that owns the entries.
func NewTable[V any](entries map[segment.Pattern]V) Table[V] {
	t := Table[V]{entries: entries}
	for p := range entries {
		if n := len(p.Stem()); p.IsPrefix() && !slices.Contains(t.lengths, n) {
			t.lengths = append(t.lengths, n)
		}
	}
	slices.SortFunc(t.lengths, func(a, b int) int { return cmp.Compare(b, a) })
	return t
}

// Lookup returns the value for a name and whether there is one.
func (t Table[V]) Lookup(name string) (V, bool) {
	if v, ok := t.entries[segment.Pattern(name)]; ok && !segment.Pattern(name).IsPrefix() {
		return v, true
	}
	for _, n := range t.lengths {
		if n <= len(name) {
			if v, ok := t.entries[segment.Pattern(name[:n]+"*")]; ok {
				return v, true
			}
		}
	}
	var none V
	return none, false
}

// covering yields the values of all entries that cover the pattern.
func (t Table[V]) covering(p segment.Pattern) iter.Seq[V] {
	return func(yield func(V) bool) {
		if v, ok := t.entries[p]; ok && !yield(v) {
			return
		}
		stem := p.Stem()
		for _, n := range t.lengths {
			if n < len(stem) || n == len(stem) && !p.IsPrefix() {
				if v, ok := t.entries[segment.Pattern(stem[:n]+"*")]; ok && !yield(v) {
					return
				}
			}
		}
	}
}

// Len returns the number of entries.
func (t Table[V]) Len() int { return len(t.entries) }

// All yields the entries sorted by pattern.
func (t Table[V]) All() iter.Seq2[segment.Pattern, V] {
	return func(yield func(segment.Pattern, V) bool) {
		if len(t.entries) == 1 { // by far the most frequent
			for p, v := range t.entries {
				yield(p, v)
			}
			return
		}
		for _, p := range slices.Sorted(maps.Keys(t.entries)) {
			if !yield(p, t.entries[p]) {
				return
			}
		}
	}
}
