package catalog

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"path"
)

// anthropicVersion is the header without which Anthropic's API takes no request.
const anthropicVersion = "2023-06-01"

// listAnthropic pages by limit, after_id and before_id through what is left after filtering. Other parameters filter, and do
// nothing here.
func listAnthropic(r *http.Request, q *question) (any, error) {
	all, err := anthropicModels(r, q)
	if err != nil {
		return nil, err
	}
	limit, err := pageSize(r, "limit", 20)
	if err != nil {
		return nil, err
	}
	from, to := 0, len(all)
	after, before := r.URL.Query().Get("after_id"), r.URL.Query().Get("before_id")
	switch {
	case after != "" && before != "":
		return nil, refusal{http.StatusBadRequest, "after_id and before_id exclude each other."}
	case before != "":
		to, err = place(all, before)
		from = max(from, to-limit)
	case after != "":
		from, err = place(all, after)
		from++
	}
	if err != nil {
		return nil, err
	}
	to = min(to, from+limit)
	page := struct {
		Data    []any   `json:"data"`
		HasMore bool    `json:"has_more"`
		FirstID *string `json:"first_id"`
		LastID  *string `json:"last_id"`
	}{Data: []any{}, HasMore: to < len(all)}
	if before != "" {
		page.HasMore = from > 0
	}
	for _, m := range all[from:to] {
		page.Data = append(page.Data, anthropicModel(m))
	}
	if from < to {
		page.FirstID, page.LastID = &all[from].name, &all[to-1].name
	}
	return page, nil
}

func retrieveAnthropic(r *http.Request, q *question) (any, error) {
	all, err := anthropicModels(r, q)
	if err != nil {
		return nil, err
	}
	m, err := called(all, path.Base(r.URL.Path))
	return anthropicModel(m), err
}

func anthropicModels(r *http.Request, q *question) ([]item, error) {
	return q.models(r, modelsAt("id", ""), func(ctx context.Context, cursor string) ([]json.RawMessage, string, error) {
		var told struct {
			Data    array  `json:"data"`
			HasMore bool   `json:"has_more"`
			LastID  string `json:"last_id"`
		}
		at := "/v1/models?limit=1000"
		if cursor != "" {
			at += "&after_id=" + url.QueryEscape(cursor)
		}
		err := q.store.read(ctx, call{method: http.MethodGet, at: at, header: map[string]string{"anthropic-version": anthropicVersion}}, &told)
		if !told.HasMore {
			told.LastID = ""
		}
		return told.Data, told.LastID, err
	})
}

// anthropicModel is the object of the models API. Servers that speak OpenAI's as well tell of models in its words.
func anthropicModel(m item) any {
	if string(m.told["type"]) == `"model"` {
		return m.told
	}
	return map[string]string{"type": "model", "id": m.name, "display_name": m.name, "created_at": "1970-01-01T00:00:00Z"}
}
