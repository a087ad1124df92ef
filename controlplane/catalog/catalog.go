// Package catalog answers the few requests that a gateway can't answer from its tables: lists, filtered to what the
// caller may use, and whatever makes, names or removes a collection, because the gateways must learn its UUID.
//
// It is for gateways only: they have authenticated the caller, decided the request and say on whose behalf they ask,
// and the catalogue must listen where only they can reach it. It never tells of a resource that the caller has no
// right to.
package catalog

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"sync"
	"time"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// Catalog knows what the endpoints hold. It is a sink of the pipeline and a source of names to it.
type Catalog struct {
	// Learned is told all names whenever one has changed. It must not block.
	Learned func(envoy.Names)
	// InForce returns once the gateways have taken the generation that was published last.
	InForce func(context.Context) error
	// Every is how often stores are asked what they hold, for changes that did not come through a gateway.
	Every time.Duration
	Log   *slog.Logger

	mu         sync.Mutex
	generation *controlplane.Generation // nil: none yet
	published  chan struct{}            // closed when the generation changes
	names      envoy.Names
	learned    int                           // counts what was learned, so that an older list does not undo it
	silent     map[segment.EndpointName]bool // stores that did not answer, so that it is logged once
}

// How long a client waits for the gateways to know a new collection, and a store for an answer.
const (
	settleTime = 3 * time.Second
	storeTime  = 10 * time.Second
)

// Publish takes a new generation over.
func (c *Catalog) Publish(_ context.Context, g *controlplane.Generation) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.generation = g
	if c.published != nil {
		close(c.published)
	}
	c.published = make(chan struct{})
	return nil
}

// current returns the generation and a channel that is closed when there is another one.
func (c *Catalog) current() (*controlplane.Generation, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.published == nil {
		c.published = make(chan struct{})
	}
	return c.generation, c.published
}

// Run keeps the names fresh until the context ends.
func (c *Catalog) Run(ctx context.Context) error {
	tick := time.NewTicker(c.Every)
	defer tick.Stop()
	for {
		g, published := c.current()
		if g != nil {
			for i := range g.Config.Endpoints {
				if e := &g.Config.Endpoints[i]; e.Protocol == segment.Chroma {
					c.refresh(ctx, e)
				}
			}
		}
		select {
		case <-published:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// refresh asks a store for its collections. When it does not answer, what was known stays: a UUID never changes hands.
func (c *Catalog) refresh(ctx context.Context, e *segment.Endpoint) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	c.mu.Lock()
	before := c.learned
	c.mu.Unlock()
	collections, err := storeOf(e).collections(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.learned != before {
		return // the list may be older than what has been learned: the next one is not
	}
	if c.silent == nil {
		c.silent = map[segment.EndpointName]bool{}
	}
	if err != nil {
		if !c.silent[e.Name] && ctx.Err() != context.Canceled {
			c.Log.Warn("store does not tell its collections", "endpoint", e.Name, "error", err)
		}
		c.silent[e.Name] = true
		return
	}
	c.silent[e.Name] = false
	names := make(map[string]string, len(collections))
	for _, col := range collections {
		names[col.ID] = col.Name
	}
	c.set(e.Name, names)
}

// set replaces what is known of an endpoint. The caller holds the lock.
func (c *Catalog) set(endpoint segment.EndpointName, names map[string]string) {
	if maps.Equal(c.names[endpoint], names) {
		return
	}
	next := maps.Clone(c.names) // others may still read the old one
	if next == nil {
		next = envoy.Names{}
	}
	next[endpoint] = names
	c.names = next
	c.Learned(next)
}

// learn adds one collection and returns when the gateways know it.
func (c *Catalog) learn(ctx context.Context, endpoint segment.EndpointName, id, name string) error {
	c.mu.Lock()
	if c.names[endpoint][id] != name {
		names := maps.Clone(c.names[endpoint])
		if names == nil {
			names = map[string]string{}
		}
		names[id] = name
		c.learned++
		c.set(endpoint, names)
	}
	c.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for {
		g, published := c.current()
		if g.Names[endpoint][id] == name {
			return c.InForce(ctx)
		}
		select {
		case <-published:
		case <-ctx.Done():
			return fmt.Errorf("wait for the gateways to know collection %q: %w", name, ctx.Err())
		}
	}
}

// question is a request that a gateway has let through.
type question struct {
	caller     string
	endpoint   *segment.Endpoint
	route      string
	generation *controlplane.Generation
}

// may decides about a resource that the gateway did not see.
func (q *question) may(op segment.Operation, resource string) bool {
	return authz.Decide(q.generation.Policy, authz.Request{
		Caller: q.caller, Endpoint: q.endpoint.Name, Operation: op, Resource: resource}).Allowed
}

// ServeHTTP answers gateways.
func (c *Catalog) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := &question{caller: r.Header.Get(envoy.CallerHeader), route: r.Header.Get(envoy.RouteHeader)}
	q.generation, _ = c.current()
	if q.generation != nil {
		for i := range q.generation.Config.Endpoints {
			if e := &q.generation.Config.Endpoints[i]; string(e.Name) == r.Header.Get(envoy.EndpointHeader) {
				q.endpoint = e
			}
		}
	}
	if q.endpoint == nil || q.caller == "" {
		http.Error(w, "no gateway asks like this", http.StatusForbidden)
		return
	}
	switch q.endpoint.Protocol {
	case segment.OpenAI:
		c.openAI(w, r, q)
	case segment.Chroma:
		c.chroma(w, r, q)
	}
}
