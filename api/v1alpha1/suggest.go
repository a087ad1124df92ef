package v1alpha1

import (
	"fmt"
	"slices"
	"strings"
)

// didYouMean returns a hint with the candidate that differs from name by a slip of the hand, or "".
func didYouMean(name string, candidates []string) string {
	// One slip for each three letters, so that two different short names are not taken for each other.
	best, least := "", max(1, len(name)/3)+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(name), strings.ToLower(c), least); d < least || d == least && best != "" && c < best {
			best, least = c, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", best)
}

// distance is the number of letters to insert, delete, replace or swap with their neighbour to turn a into b
// (optimal string alignment), or any number above limit if there are more than that.
func distance(a, b string, limit int) int {
	if max(len(a), len(b))-min(len(a), len(b)) > limit {
		return limit + 1
	}
	before, above, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range above {
		above[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			replaced := above[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(above[j+1]+1, row[j]+1, replaced)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		if slices.Min(row) > limit {
			return limit + 1
		}
		before, above, row = above, row, before
	}
	return above[len(b)]
}

// list writes alternatives as a reader expects them: "None, Server, Mutual".
func list[T ~string](values []T) string { return strings.Join(texts(values), ", ") }

func texts[T ~string](values []T) []string {
	all := make([]string, len(values))
	for i, v := range values {
		all[i] = string(v)
	}
	return all
}
