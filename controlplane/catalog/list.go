package catalog

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"unicode/utf8"

	"sallyport.dev/segment"
)

// naming says what the things in a list are called, and what a caller must have to see one.
type naming struct {
	key       string // of the name in each object
	before    string // what stands before each name there
	operation segment.Operation
	kind      string // what stands before the name in grants
}

// item is one thing in a list.
type item struct {
	name string
	told map[string]json.RawMessage // all that its store tells of it; nil: nothing
}

// visible are the things in a list that the caller may see, in its order. What is told of them is what was judged, not what
// was sent: left out is what is no object, has no name, has one that readers could take for another, or one that was there.
func (q *question) visible(list []json.RawMessage, n naming) []item {
	var all []item
	seen := map[string]bool{}
	for _, raw := range list {
		var told map[string]json.RawMessage
		var text string
		if json.Unmarshal(raw, &told) != nil || !certain(told, n.key) || json.Unmarshal(told[n.key], &text) != nil {
			continue
		}
		name, ok := strings.CutPrefix(text, n.before)
		if !ok || seen[name] || !q.sees(name, n) {
			continue
		}
		seen[name] = true
		told[n.key] = quoted(text)
		all = append(all, item{name, told})
	}
	return all
}

// sees reports whether the caller may see what has this name.
func (q *question) sees(name string, n naming) bool {
	return name != "" && utf8.ValidString(name) && q.may(n.operation, n.kind+name)
}

// visibleNames are those of the names that the caller may see, sorted.
func (q *question) visibleNames(names []string, n naming) []string {
	visible := []string{}
	for _, name := range names {
		if q.sees(name, n) {
			visible = append(visible, name)
		}
	}
	slices.Sort(visible)
	return slices.Compact(visible)
}

// certain reports whether an object has the key, and no other that some reader takes for it.
func certain(object map[string]json.RawMessage, key string) bool {
	_, ok := object[key]
	for k := range object {
		ok = ok && (k == key || !strings.EqualFold(k, key))
	}
	return ok
}

func quoted(s string) json.RawMessage {
	raw, err := json.Marshal(s)
	if err != nil {
		panic("encode string: " + err.Error()) // every string can be
	}
	return raw
}

// byName sorts what has no order of its own.
func byName(items []item) []item {
	slices.SortFunc(items, func(a, b item) int { return cmp.Compare(a.name, b.name) })
	return items
}

// objects are what is told of the things in a list.
func objects(items []item) []map[string]json.RawMessage {
	all := make([]map[string]json.RawMessage, len(items))
	for i, one := range items {
		all[i] = one.told
	}
	return all
}
