package authz

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport.dev/segment"
)

// A policy goes over the operator socket as JSON, so that it can be compared with another and asked elsewhere. What is
// read decides as what was written; but Recompile takes nothing over from it.

type policyText struct {
	Endpoints  map[segment.EndpointName]*endpointText `json:"endpoints"`
	NextChange time.Time                              `json:"next_change,omitzero"`
}

type endpointText struct {
	Members  Table[string]     `json:"members"` // IDs of classes
	Classes  map[string]*Class `json:"classes"`
	Shadowed bool              `json:"shadowed,omitempty"`
}

// MarshalJSON writes the tables.
func (p *Policy) MarshalJSON() ([]byte, error) {
	text := policyText{make(map[segment.EndpointName]*endpointText, len(p.Endpoints)), p.NextChange}
	for name, e := range p.Endpoints {
		members, classes := make(map[segment.Pattern]string, e.Members.Len()), make(map[string]*Class, len(e.Classes))
		for caller, class := range e.Members.All() {
			members[caller], classes[class.ID] = class.ID, class
		}
		text.Endpoints[name] = &endpointText{NewTable(members), classes, e.Shadowed}
	}
	return json.Marshal(text)
}

// UnmarshalJSON reads what MarshalJSON writes, or nothing.
func (p *Policy) UnmarshalJSON(data []byte) error {
	var text policyText
	if err := json.Unmarshal(data, &text); err != nil {
		return fmt.Errorf("read policy: %w", err)
	}
	read := Policy{Endpoints: make(map[segment.EndpointName]*Endpoint, len(text.Endpoints)), NextChange: text.NextChange}
	for name, t := range text.Endpoints {
		if t == nil {
			return fmt.Errorf("read policy: endpoint %q has none", name)
		}
		e := &Endpoint{Shadowed: t.Shadowed}
		members := make(map[segment.Pattern]*Class, t.Members.Len())
		for caller, id := range t.Members.All() {
			class := t.Classes[id]
			if class == nil || class.ID != id {
				return fmt.Errorf("read policy: endpoint %q has no class %q", name, id)
			}
			members[caller] = class
		}
		e.Members = NewTable(members)
		for _, id := range slices.Sorted(maps.Keys(t.Classes)) {
			e.Classes = append(e.Classes, t.Classes[id])
		}
		read.Endpoints[name] = e
	}
	*p = read
	return nil
}

// MarshalJSON writes the entries as an object.
func (t Table[V]) MarshalJSON() ([]byte, error) { return json.Marshal(maps.Collect(t.All())) }

// UnmarshalJSON reads an object of entries.
func (t *Table[V]) UnmarshalJSON(data []byte) error {
	var entries map[segment.Pattern]V
	if err := json.Unmarshal(data, &entries); err != nil {
		return fmt.Errorf("read table: %w", err)
	}
	*t = NewTable(entries)
	return nil
}
