package catalog

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"

	"sallyport.dev/segment"
)

// teller tells the page of a list that is at a cursor, and the cursor of the next: see paged.
type teller func(ctx context.Context, cursor string) ([]json.RawMessage, string, error)

// models are those that the caller may discover of those that the endpoint declares or, where it declares none, that its
// server tells, in that order.
func (q *question) models(r *http.Request, n naming, tell teller) ([]item, error) {
	names := q.endpoint.ModelNames()
	if names == nil {
		list, err := paged(r.Context(), tell)
		return q.visible(list, n), err
	}
	var all []item
	for _, name := range names {
		if q.sees(name, n) {
			all = append(all, item{name: name})
		}
	}
	return all, nil
}

// place is where in a list a name is that a client has given for a page to begin or to end at. It must be one that the client
// has been shown.
func place(all []item, name string) (int, error) {
	i := slices.IndexFunc(all, func(one item) bool { return one.name == name })
	if i < 0 {
		return 0, refusal{http.StatusBadRequest, "The page that is asked for begins or ends at " + strconv.Quote(name) + ", which is not in this list."}
	}
	return i, nil
}

// pageSize is how many items a client wants, or what it gets if it does not say.
func pageSize(r *http.Request, key string, otherwise int) (int, error) {
	text := r.URL.Query().Get(key)
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return 0, refusal{http.StatusBadRequest, key + " is no number from 1 on."}
	}
	return min(n, 1000), nil
}

// called is the model of a name, if the caller may discover it and it is there.
func called(all []item, name string) (item, error) {
	for _, one := range all {
		if one.name == name {
			return one, nil
		}
	}
	return item{}, refusal{http.StatusNotFound, "There is no model " + strconv.Quote(name) + " here."}
}

// modelsAt names models by a key of theirs.
func modelsAt(key, before string) naming {
	return naming{key: key, before: before, operation: segment.Discover}
}
