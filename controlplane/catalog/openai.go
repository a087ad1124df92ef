package catalog

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
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

// retrieveOpenAI tells of a model that the gateway has decided about.
func retrieveOpenAI(r *http.Request, q *question) (any, error) {
	return modelCalled(strings.TrimPrefix(r.URL.Path, "/v1/models/"), q), nil
}

func listOpenAI(r *http.Request, q *question) (any, error) {
	models, err := q.models(r, modelsAt("id", ""), func(ctx context.Context, _ string) ([]json.RawMessage, string, error) {
		var told struct{ Data array }
		err := q.store.get(ctx, "/v1/models", &told)
		return told.Data, "", err
	})
	list := struct {
		Object string  `json:"object"`
		Data   []model `json:"data"`
	}{Object: "list", Data: []model{}}
	for _, m := range models {
		list.Data = append(list.Data, modelCalled(m.name, q))
	}
	return list, err
}
