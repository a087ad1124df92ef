package catalog

import (
	"encoding/json"
	"net/http"
	"strings"

	"sallyport.dev/segment"
)

// model is the object of the OpenAI models API.
type model struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func modelCalled(name string, q *question) model {
	return model{ID: name, Object: "model", OwnedBy: string(q.endpoint.Name)}
}

func (c *Catalog) openAI(w http.ResponseWriter, r *http.Request, q *question) {
	if q.route == "retrieve-model" { // decided by the gateway
		write(w, modelCalled(strings.TrimPrefix(r.URL.Path, "/v1/models/"), q))
		return
	}
	names, err := c.models(r, q.endpoint)
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	list := struct {
		Object string  `json:"object"`
		Data   []model `json:"data"`
	}{Object: "list", Data: []model{}}
	for _, name := range names {
		if q.may(segment.Discover, name) {
			list.Data = append(list.Data, modelCalled(name, q))
		}
	}
	write(w, list)
}

// models are the names that the endpoint declares or, where it declares none, those that its server tells.
func (c *Catalog) models(r *http.Request, e *segment.Endpoint) ([]string, error) {
	names := e.ModelNames()
	if names != nil {
		return names, nil
	}
	var told struct{ Data []model }
	if err := c.storeOf(e).get(r.Context(), "/v1/models", &told); err != nil {
		return nil, err
	}
	for _, m := range told.Data {
		names = append(names, m.ID)
	}
	return names, nil
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("content-type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the gateway has gone: nobody to tell
}
