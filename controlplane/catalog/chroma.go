package catalog

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"path"
	"strconv"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// listChroma pages through what is left after filtering, so that limit and offset tell nothing either.
func listChroma(r *http.Request, q *question) (any, error) {
	visible, err := visibleChroma(r, q)
	if err != nil {
		return nil, err
	}
	visible = visible[min(number(r, "offset", 0), len(visible)):]
	return visible[:min(number(r, "limit", len(visible)), len(visible))], nil
}

func countChroma(r *http.Request, q *question) (any, error) {
	visible, err := visibleChroma(r, q)
	return len(visible), err
}

func visibleChroma(r *http.Request, q *question) ([]json.RawMessage, error) {
	all, err := q.store.listed(r.Context())
	visible := []json.RawMessage{}
	for _, col := range all {
		if col.usable() && q.may(segment.Discover, col.Name) {
			visible = append(visible, col.raw)
		}
	}
	return visible, err
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
	raw, renames := change["new_name"]
	renames = renames && string(raw) != "null"
	col := collection{ID: path.Base(r.URL.Path)}
	if renames && (json.Unmarshal(raw, &col.Name) != nil || !q.may(segment.Admin, col.Name)) {
		c.refuse(w, r, q, http.StatusForbidden, q.caller+" has no grant for Admin "+col.Name)
		return
	}
	body, err := json.Marshal(change)
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	c.mutate(w, r, q, body, []string{col.ID}, func() {
		switch {
		case !renames:
		case col.usable():
			c.rename(q.endpoint.Name, col)
		default:
			c.forget(q.endpoint.Name, col.ID)
		}
	})
}

// deleteCollection forgets what had the name before: what gets it meanwhile is another collection.
func (c *Catalog) deleteCollection(w http.ResponseWriter, r *http.Request, q *question) {
	ids := c.called(q.endpoint.Name, path.Base(r.URL.Path))
	c.mutate(w, r, q, nil, ids, func() { c.forget(q.endpoint.Name, ids...) })
}

// mutate passes a change of collections on. The client hears of it when the gateways know: until then the UUIDs have
// their old names, and the grants of those.
func (c *Catalog) mutate(w http.ResponseWriter, r *http.Request, q *question, body []byte, ids []string, done func()) {
	a, err := c.change(r, q, body, ids, done)
	if err == nil && a.code < 300 {
		err = c.settle(r.Context(), q.endpoint.Name, ids...)
	}
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	reply(w, a)
}

// change makes one change of an endpoint's collections at a time, so that what is known last is what happened last.
func (c *Catalog) change(r *http.Request, q *question, body []byte, ids []string, done func()) (*answer, error) {
	c.mu.Lock()
	changing := &c.about(q.endpoint.Name).changing
	c.mu.Unlock()
	changing.Lock()
	defer changing.Unlock()
	if err := r.Context().Err(); err != nil {
		return nil, err // waited for too long
	}
	// A client that hangs up must not keep the outcome from being known.
	a, err := q.store.do(context.WithoutCancel(r.Context()), call{method: r.Method, at: r.URL.RequestURI(), body: body})
	switch {
	case err != nil || a.code >= 500: // it may have happened or not: nobody's until a list tells
		c.forget(q.endpoint.Name, ids...)
	case a.code < 300:
		done()
	}
	return a, err
}

// tellCollection passes a request on that the gateway has decided, and lets the gateways learn the UUID in the answer
// before the client does. If they don't in time, that UUID is denied for a moment longer, which harms nobody.
func (c *Catalog) tellCollection(w http.ResponseWriter, r *http.Request, q *question) {
	body, err := io.ReadAll(io.LimitReader(r.Body, envoy.MaxBodyBytes))
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	before := c.changes(q.endpoint.Name)
	a, err := q.store.do(r.Context(), call{method: r.Method, at: r.URL.RequestURI(), body: body})
	if err != nil {
		c.unavailable(w, r, q, err)
		return
	}
	if a.code < 300 {
		var col collection
		if err := json.Unmarshal(a.body, &col); err != nil || !col.usable() {
			c.Log.Warn("store answers without a UUID and a name", "endpoint", q.endpoint.Name, "error", err)
		} else {
			c.learn(q.endpoint.Name, before, col)
			if err := c.settle(r.Context(), q.endpoint.Name, col.ID); err != nil {
				c.Log.Warn("gateways don't know a collection yet", "endpoint", q.endpoint.Name, "error", err)
			}
		}
	}
	reply(w, a)
}
