package catalog

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"path"
	"strings"
)

// geminiModels is what stands before the names of models, of which there are also other kinds.
const geminiModels = "models/"

// listGemini pages by pageSize and pageToken through what is left after filtering. A token is the last name that was shown.
func listGemini(r *http.Request, q *question) (any, error) {
	all, err := listedGemini(r, q)
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r, "pageSize", 50)
	if err != nil {
		return nil, err
	}
	from := 0
	if token := r.URL.Query().Get("pageToken"); token != "" {
		if from, err = place(all, token); err != nil {
			return nil, err
		}
		from++
	}
	page := struct {
		Models        []any  `json:"models"`
		NextPageToken string `json:"nextPageToken,omitempty"`
	}{Models: []any{}}
	to := min(len(all), from+size)
	for _, m := range all[from:to] {
		page.Models = append(page.Models, geminiModel(m))
	}
	if to < len(all) {
		page.NextPageToken = all[to-1].name
	}
	return page, nil
}

func retrieveGemini(r *http.Request, q *question) (any, error) {
	all, err := listedGemini(r, q)
	if err != nil {
		return nil, err
	}
	m, err := called(all, path.Base(r.URL.Path))
	return geminiModel(m), err
}

// listedGemini asks in the version of the API that the client asks in.
func listedGemini(r *http.Request, q *question) ([]item, error) {
	version := "v1"
	if strings.HasSuffix(q.route, "-v1beta") {
		version = "v1beta"
	}
	return q.models(r, modelsAt("name", geminiModels), func(ctx context.Context, cursor string) ([]json.RawMessage, string, error) {
		var told struct {
			Models        array  `json:"models"`
			NextPageToken string `json:"nextPageToken"`
		}
		at := "/" + version + "/models?pageSize=1000"
		if cursor != "" {
			at += "&pageToken=" + url.QueryEscape(cursor)
		}
		err := q.store.get(ctx, at, &told)
		return told.Models, told.NextPageToken, err
	})
}

func geminiModel(m item) any {
	if m.told != nil {
		return m.told
	}
	return map[string]string{"name": geminiModels + m.name, "displayName": m.name}
}
