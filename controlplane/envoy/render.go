package envoy

import (
	"encoding/json"
	"fmt"
	"iter"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// Render writes the resources as JSON, one list for each discovery service, in Envoy's own field names.
func Render(r *Resources) (json.RawMessage, error) {
	out := map[string][]json.RawMessage{}
	for field, m := range r.All() {
		text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return nil, fmt.Errorf("render %s: %w", field, err)
		}
		out[field] = append(out[field], text)
	}
	return json.Marshal(out)
}

// All yields the resources and the field that each stands in.
func (r *Resources) All() iter.Seq2[string, proto.Message] {
	return func(yield func(string, proto.Message) bool) {
		_ = yieldAll("listeners", r.Listeners, yield) && yieldAll("routes", r.Routes, yield) &&
			yieldAll("extensions", r.Extensions, yield) && yieldAll("clusters", r.Clusters, yield) &&
			yieldAll("assignments", r.Assignments, yield)
	}
}

func yieldAll[M proto.Message](field string, messages []M, yield func(string, proto.Message) bool) bool {
	for _, m := range messages {
		if !yield(field, m) {
			return false
		}
	}
	return true
}
