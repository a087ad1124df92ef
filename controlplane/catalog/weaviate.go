package catalog

import (
	"encoding/json"
	"net/http"
	"regexp"

	"sallyport.dev/segment"
)

// className is how Weaviate spells the name of a class; it has no other spelling for the same one.
var className = regexp.MustCompile(`^[A-Z][_0-9A-Za-z]*$`)

var classes = naming{key: "class", operation: segment.Discover}

// listWeaviate answers with the schema. A class tells of other classes where it refers to them: those that the caller may not
// see are left out there, too.
func listWeaviate(r *http.Request, q *question) (any, error) {
	var told struct{ Classes array }
	if err := q.store.get(r.Context(), "/v1/schema", &told); err != nil {
		return nil, err
	}
	schema := struct {
		Classes []map[string]json.RawMessage `json:"classes"`
	}{Classes: []map[string]json.RawMessage{}}
	for _, class := range byName(q.visible(told.Classes, classes)) {
		if className.MatchString(class.name) && q.onlyVisible(class.told, "properties") {
			schema.Classes = append(schema.Classes, class.told)
		}
	}
	return schema, nil
}

// onlyVisible leaves the properties at a key of an object that do not refer to anything else than what the caller may see. It
// reports false if these can't be told.
func (q *question) onlyVisible(object map[string]json.RawMessage, key string) bool {
	var properties []map[string]json.RawMessage
	switch {
	case object[key] == nil:
		object[key] = json.RawMessage("[]")
		return certain(object, key)
	case !certain(object, key) || json.Unmarshal(object[key], &properties) != nil:
		return false
	}
	visible := []map[string]json.RawMessage{}
	for _, p := range properties {
		if q.typesOf(p) && (p["nestedProperties"] == nil || q.onlyVisible(p, "nestedProperties")) {
			visible = append(visible, p)
		}
	}
	raw, err := json.Marshal(visible)
	object[key] = raw
	return err == nil
}

// typesOf leaves the types of a property that the caller may see, and reports whether there are any. A type with a capital
// letter is a class.
func (q *question) typesOf(property map[string]json.RawMessage) bool {
	var types, visible []string
	if !certain(property, "dataType") || json.Unmarshal(property["dataType"], &types) != nil {
		return false
	}
	for _, t := range types {
		if primitive.MatchString(t) || className.MatchString(t) && q.sees(t, classes) {
			visible = append(visible, t)
		}
	}
	raw, err := json.Marshal(visible)
	property["dataType"] = raw
	return err == nil && visible != nil
}

// primitive is a type that is no class: text, int[], geoCoordinates.
var primitive = regexp.MustCompile(`^[a-z][A-Za-z]*(\[\])?$`)
