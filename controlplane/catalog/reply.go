package catalog

import (
	"encoding/json"
	"errors"
	"net/http"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// refusal is an error that the client is told.
type refusal struct {
	code int // HTTP status
	why  string
}

func (e refusal) Error() string { return e.why }

// refused is what a client is told of an error: what is wrong about its request, else nothing but that there is no answer.
func (c *Catalog) refused(q *question, err error) refusal {
	if told, ok := errors.AsType[refusal](err); ok {
		return told
	}
	c.Log.Warn("catalogue can't answer", "endpoint", q.endpoint.Name, "caller", q.caller, "error", err)
	return refusal{http.StatusServiceUnavailable, "the backend can't be reached"}
}

// inJSON answers by a JSON body.
func inJSON(answer func(*http.Request, *question) (any, error)) answering {
	return func(c *Catalog, w http.ResponseWriter, r *http.Request, q *question) {
		told, err := answer(r, q)
		if err != nil {
			c.unavailable(w, r, q, err)
			return
		}
		write(w, told)
	}
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("content-type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the gateway has gone: nobody to tell
}

func reply(w http.ResponseWriter, a *answer) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(a.code)
	_, _ = w.Write(a.body)
}

func (c *Catalog) unavailable(w http.ResponseWriter, r *http.Request, q *question, err error) {
	told := c.refused(q, err)
	c.refuse(w, r, q, told.code, told.why)
}

func (c *Catalog) refuse(w http.ResponseWriter, r *http.Request, q *question, code int, why string) {
	id := r.Header.Get("x-request-id")
	w.Header().Set("content-type", "application/json")
	if q.endpoint.Protocol == segment.Anthropic { // where its SDKs look for it
		w.Header().Set("request-id", id)
	}
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(envoy.ErrorReply(q.endpoint.Protocol, code, why, id))
}
