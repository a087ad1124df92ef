package catalog

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

func (c *Catalog) chroma(w http.ResponseWriter, r *http.Request, q *question) {
	switch q.route {
	case "list-collections", "count-collections":
		c.listCollections(w, r, q)
	case "modify-collection":
		c.modifyCollection(w, r, q)
	default: // the gateway has decided about the only name that there is
		body, err := io.ReadAll(io.LimitReader(r.Body, envoy.MaxBodyBytes))
		if err != nil {
			c.unavailable(w, r, q, err)
			return
		}
		c.forward(w, r, q, body)
	}
}

// listCollections pages through what is left after filtering, so that limit and offset tell nothing either.
func (c *Catalog) listCollections(w http.ResponseWriter, r *http.Request, q *question) {
	all, err := storeOf(q.endpoint).listed(r.Context())
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	visible := []json.RawMessage{}
	for _, raw := range all {
		var col collection
		if json.Unmarshal(raw, &col) == nil && q.may(segment.Discover, col.Name) {
			visible = append(visible, raw)
		}
	}
	if q.route == "count-collections" {
		write(w, len(visible))
		return
	}
	visible = visible[min(number(r, "offset", 0), len(visible)):]
	write(w, visible[:min(number(r, "limit", len(visible)), len(visible))])
}

func number(r *http.Request, key string, otherwise int) int {
	if n, err := strconv.Atoi(r.URL.Query().Get(key)); err == nil && n >= 0 {
		return n
	}
	return otherwise
}

// modifyCollection may rename, and then the caller must have the new name too. What is passed on is what was judged,
// not what was sent.
func (c *Catalog) modifyCollection(w http.ResponseWriter, r *http.Request, q *question) {
	var change map[string]json.RawMessage
	if err := json.NewDecoder(io.LimitReader(r.Body, envoy.MaxBodyBytes)).Decode(&change); err != nil {
		c.refuse(w, r, q, http.StatusBadRequest, "The request has a body that is not a JSON object, so it can't be judged.")
		return
	}
	if raw, renames := change["new_name"]; renames && string(raw) != "null" {
		var name string
		if json.Unmarshal(raw, &name) != nil || !q.may(segment.Admin, name) {
			c.refuse(w, r, q, http.StatusForbidden, q.caller+" has no grant for Admin "+name)
			return
		}
	}
	body, err := json.Marshal(change)
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	c.forward(w, r, q, body)
}

// forward passes the request on, and lets the gateways learn what has become of it before the client does.
func (c *Catalog) forward(w http.ResponseWriter, r *http.Request, q *question, body []byte) {
	code, answer, err := storeOf(q.endpoint).do(r.Context(), r.Method, r.URL.RequestURI(), body)
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	if code < 300 {
		switch q.route {
		case "create-collection", "get-collection":
			var col collection
			if err := json.Unmarshal(answer, &col); err != nil || col.ID == "" {
				c.Log.Warn("store answers without a UUID", "endpoint", q.endpoint.Name, "error", err)
			} else if err := c.learn(r.Context(), q.endpoint.Name, col.ID, col.Name); err != nil {
				c.unavailable(w, r, q, err)
				return
			}
		default:
			c.refresh(r.Context(), q.endpoint)
		}
	}
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(answer)
}

func (c *Catalog) unavailable(w http.ResponseWriter, r *http.Request, q *question, err error) {
	c.Log.Warn("catalogue can't answer", "endpoint", q.endpoint.Name, "caller", q.caller, "error", err)
	c.refuse(w, r, q, http.StatusServiceUnavailable, "the backend can't be reached")
}

func (c *Catalog) refuse(w http.ResponseWriter, r *http.Request, q *question, code int, why string) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(envoy.ErrorReply(q.endpoint.Protocol, code, why, r.Header.Get("x-request-id")))
}
