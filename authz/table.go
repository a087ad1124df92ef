package authz

import (
	"cmp"
	"iter"
	"slices"
	"strings"

	"sallyport.dev/segment"
)

// Table maps patterns to values. A name takes the value of the exact pattern, else of the longest prefix that
// covers it: the two look-ups that Envoy's exact_match_map and prefix_match_map do. The zero value is empty.
//
// Most tables have one entry and a few have a hundred thousand, of which one changes. So the entries are a sorted list: it is
// small, it is copied at once, and nothing needs to be sorted that is read in order.
type Table[V any] struct {
	entries []entry[V] // sorted by pattern
	lengths []int      // of the stems of the prefixes, longest first
}

type entry[V any] struct {
	pattern segment.Pattern
	value   V
}

// NewTable returns a table of the entries.
func NewTable[V any](entries map[segment.Pattern]V) Table[V] { return Table[V]{}.edit(entries, nil) }

// edit returns the table with other entries in it, and without those that are gone.
func (t Table[V]) edit(others map[segment.Pattern]V, gone map[segment.Pattern]bool) Table[V] {
	if len(others)+len(gone) == 0 {
		return t
	}
	edited := Table[V]{entries: make([]entry[V], 0, len(t.entries)+len(others)), lengths: t.lengths}
	keys, prefixes := make([]segment.Pattern, 0, len(others)+len(gone)), false
	for p := range others {
		keys, prefixes = append(keys, p), prefixes || p.IsPrefix()
	}
	for p := range gone {
		if _, other := others[p]; !other {
			keys, prefixes = append(keys, p), prefixes || p.IsPrefix()
		}
	}
	slices.Sort(keys)
	rest := t
	for _, p := range keys {
		n, found := rest.search(p)
		edited.entries = append(edited.entries, rest.entries[:n]...)
		if v, ok := others[p]; ok {
			edited.entries = append(edited.entries, entry[V]{p, v})
		}
		if found {
			n++
		}
		rest.entries = rest.entries[n:]
	}
	edited.entries = append(edited.entries, rest.entries...)
	if prefixes {
		edited.lengths = nil
		for _, e := range edited.entries {
			if n := len(e.pattern.Stem()); e.pattern.IsPrefix() && !slices.Contains(edited.lengths, n) {
				edited.lengths = append(edited.lengths, n)
			}
		}
		slices.SortFunc(edited.lengths, func(a, b int) int { return cmp.Compare(b, a) })
	}
	return edited
}

// search returns where the pattern is, or would be.
func (t Table[V]) search(p segment.Pattern) (int, bool) {
	return slices.BinarySearchFunc(t.entries, p, func(e entry[V], p segment.Pattern) int { return cmp.Compare(e.pattern, p) })
}

// at returns the value of exactly this pattern and whether there is one.
func (t Table[V]) at(p segment.Pattern) (V, bool) {
	if i, ok := t.search(p); ok {
		return t.entries[i].value, true
	}
	var none V
	return none, false
}

// Lookup returns the value for a name and whether there is one.
func (t Table[V]) Lookup(name string) (V, bool) {
	if v, ok := t.at(segment.Pattern(name)); ok && !segment.Pattern(name).IsPrefix() {
		return v, true
	}
	for _, n := range t.lengths {
		if n <= len(name) {
			if v, ok := t.at(segment.Pattern(name[:n] + "*")); ok {
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
		if v, ok := t.at(p); ok && !yield(v) {
			return
		}
		stem := p.Stem()
		for _, n := range t.lengths {
			if n < len(stem) || n == len(stem) && !p.IsPrefix() {
				if v, ok := t.at(segment.Pattern(stem[:n] + "*")); ok && !yield(v) {
					return
				}
			}
		}
	}
}

// below yields the patterns that the prefix covers, itself included.
func (t Table[V]) below(prefix segment.Pattern) iter.Seq[segment.Pattern] {
	return func(yield func(segment.Pattern) bool) {
		first, _ := t.search(segment.Pattern(prefix.Stem()))
		for _, e := range t.entries[first:] {
			if !strings.HasPrefix(string(e.pattern), prefix.Stem()) || prefix.Covers(e.pattern) && !yield(e.pattern) {
				return
			}
		}
	}
}

// Len returns the number of entries.
func (t Table[V]) Len() int { return len(t.entries) }

// All yields the entries sorted by pattern.
func (t Table[V]) All() iter.Seq2[segment.Pattern, V] {
	return func(yield func(segment.Pattern, V) bool) {
		for _, e := range t.entries {
			if !yield(e.pattern, e.value) {
				return
			}
		}
	}
}
