package catalog

import (
	"net/http"

	"sallyport.dev/segment"
)

// stored names collections.
var stored = naming{key: "name", operation: segment.Discover}

func listQdrant(r *http.Request, q *question) (any, error) {
	var told struct {
		Result struct{ Collections array }
	}
	if err := q.store.get(r.Context(), "/collections", &told); err != nil {
		return nil, err
	}
	collections := []map[string]string{}
	for _, col := range byName(q.visible(told.Result.Collections, stored)) {
		collections = append(collections, map[string]string{"name": col.name})
	}
	// How long it took is not told: it would depend on what is hidden.
	return map[string]any{"result": map[string]any{"collections": collections}, "status": "ok", "time": 0}, nil
}

// listQdrantOverGRPC answers with a qdrant.ListCollectionsResponse: in field 1 are the collections, in field 1 of each its name.
func listQdrantOverGRPC(r *http.Request, q *question, _ []byte) ([]byte, error) {
	told, err := q.store.rpc(r.Context(), "/qdrant.Collections/List", nil)
	if err != nil {
		return nil, err
	}
	var names []string
	err = fields(told, func(f field) error {
		if f.number != 1 {
			return nil
		}
		col, err := f.bytes()
		if err != nil {
			return err
		}
		return fields(col, func(f field) error {
			if f.number != 1 {
				return nil
			}
			name, err := f.bytes()
			if names = append(names, string(name)); len(names) > maxItems {
				err = errTooMany
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	var list []byte
	for _, name := range q.visibleNames(names, stored) {
		list = appendBytes(list, 1, appendBytes(nil, 1, []byte(name)))
	}
	return list, nil
}
