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
	"slices"
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
	known      map[segment.EndpointName]*known
	transports map[way]*http.Transport // of this generation
}

// known is what is remembered of an endpoint besides its names. All but changing is guarded by Catalog.mu.
type known struct {
	changes  int        // of what is known: what was asked before the last one may be older, and must not undo it
	silent   bool       // the store did not answer, which is logged once
	strange  bool       // the store told of collections that can't be used, which is logged once
	changing sync.Mutex // held while a store is told to change a collection
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
	c.transports = nil // CA files are read anew
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
	before := c.changes(e.Name)
	all, err := c.storeOf(e).listed(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.about(e.Name)
	if k.changes != before {
		return // the list may be older than what is known: the next one is not
	}
	if err != nil {
		if !k.silent && ctx.Err() == nil {
			c.Log.Warn("store does not tell its collections", "endpoint", e.Name, "error", err)
		}
		k.silent = true
		return
	}
	k.silent = false
	names := make(map[string]string, len(all))
	for _, col := range all {
		if col.usable() {
			names[col.ID] = col.Name
		}
	}
	if strange := len(all) - len(names); strange > 0 && !k.strange {
		c.Log.Warn("store has collections whose UUID or name is none: nobody can use them", "endpoint", e.Name, "collections", strange)
	}
	k.strange = len(names) < len(all)
	if !maps.Equal(c.names[e.Name], names) {
		c.set(e.Name, names)
	}
}

// about returns what is remembered of an endpoint. The caller holds the lock.
func (c *Catalog) about(endpoint segment.EndpointName) *known {
	if c.known == nil {
		c.known = map[segment.EndpointName]*known{}
	}
	if c.known[endpoint] == nil {
		c.known[endpoint] = &known{}
	}
	return c.known[endpoint]
}

// changes counts what has changed at an endpoint. Read it before a store is asked.
func (c *Catalog) changes(endpoint segment.EndpointName) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.about(endpoint).changes
}

// set replaces what is known of an endpoint. The caller holds the lock.
func (c *Catalog) set(endpoint segment.EndpointName, names map[string]string) {
	c.about(endpoint).changes++
	if maps.Equal(c.names[endpoint], names) {
		return // and still what was asked before may be older
	}
	next := maps.Clone(c.names) // others may still read the old one
	if next == nil {
		next = envoy.Names{}
	}
	next[endpoint] = names
	c.names = next
	c.Learned(next)
}

// learn adds a collection that a store has told of when `before` changes were known. If it is known by another name
// and anything has changed since, what is known is kept.
func (c *Catalog) learn(endpoint segment.EndpointName, before int, col collection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	name, told := c.names[endpoint][col.ID]
	if name == col.Name || told && c.about(endpoint).changes != before {
		return
	}
	c.set(endpoint, c.with(endpoint, col))
}

// rename says what a collection is called from now on.
func (c *Catalog) rename(endpoint segment.EndpointName, col collection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set(endpoint, c.with(endpoint, col))
}

// with returns what is known of an endpoint and one collection more. The caller holds the lock.
func (c *Catalog) with(endpoint segment.EndpointName, col collection) map[string]string {
	names := map[string]string{col.ID: col.Name}
	for id, name := range c.names[endpoint] {
		if id != col.ID {
			names[id] = name
		}
	}
	return names
}

// forget makes UUIDs nobody's, so that their use is denied.
func (c *Catalog) forget(endpoint segment.EndpointName, ids ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := maps.Clone(c.names[endpoint])
	for _, id := range ids {
		delete(names, id)
	}
	c.set(endpoint, names)
}

// called returns the UUIDs that are known by a name.
func (c *Catalog) called(endpoint segment.EndpointName, name string) (ids []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, n := range c.names[endpoint] {
		if n == name {
			ids = append(ids, id)
		}
	}
	return ids
}

// settle returns nil once the gateways know of these UUIDs what the catalogue knows.
func (c *Catalog) settle(ctx context.Context, endpoint segment.EndpointName, ids ...string) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for {
		c.mu.Lock()
		names := c.names[endpoint]
		c.mu.Unlock()
		g, published := c.current()
		if !slices.ContainsFunc(ids, func(id string) bool { return g.Learned.Names[endpoint][id] != names[id] }) {
			return c.InForce(ctx)
		}
		select {
		case <-published:
		case <-ctx.Done():
			return fmt.Errorf("wait for the gateways to know collections %q: %w", ids, ctx.Err())
		}
	}
}

// question is a request that a gateway has let through.
type question struct {
	caller     string
	endpoint   *segment.Endpoint
	route      string
	generation *controlplane.Generation
	store      store // behind the endpoint
}

// may decides about a resource that the gateway did not see.
func (q *question) may(op segment.Operation, resource string) bool {
	return authz.Decide(q.generation.Policy, authz.Request{
		Caller: q.caller, Endpoint: q.endpoint.Name, Operation: op, Resource: resource}).Allowed
}

// answering is how a route is answered.
type answering func(*Catalog, http.ResponseWriter, *http.Request, *question)

// answers says how each route is. What is not here is answered by nobody.
var answers = map[segment.Protocol]map[string]answering{
	segment.OpenAI: {
		"list-models":    inJSON(listOpenAI),
		"retrieve-model": inJSON(retrieveOpenAI),
	},
	segment.Anthropic: {
		"list-models":    inJSON(listAnthropic),
		"retrieve-model": inJSON(retrieveAnthropic),
	},
	segment.Gemini: {
		"list-models-v1":        inJSON(listGemini),
		"list-models-v1beta":    inJSON(listGemini),
		"retrieve-model-v1":     inJSON(retrieveGemini),
		"retrieve-model-v1beta": inJSON(retrieveGemini),
	},
	segment.Chroma: {
		"list-collections":  inJSON(listChroma),
		"count-collections": inJSON(countChroma),
		"create-collection": (*Catalog).tellCollection,
		"get-collection":    (*Catalog).tellCollection,
		"modify-collection": (*Catalog).modifyCollection,
		"delete-collection": (*Catalog).deleteCollection,
	},
	segment.Qdrant: {
		"list-collections":      inJSON(listQdrant),
		"grpc-list-collections": overGRPC(listQdrantOverGRPC),
	},
	segment.Weaviate: {
		"list-collections": inJSON(listWeaviate),
	},
	segment.Milvus: {
		"list-collections":      inJSON(listMilvus),
		"grpc-show-collections": overGRPC(listMilvusOverGRPC),
	},
	segment.MCP: {
		"list-tools":     inRPC(mcpTools),
		"list-prompts":   inRPC(mcpPrompts),
		"list-resources": inRPC(mcpResources),
		"list-templates": inRPC(mcpTemplates),
	},
}

// ServeHTTP answers gateways.
func (c *Catalog) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := &question{caller: r.Header.Get(envoy.CallerHeader), route: r.Header.Get(envoy.RouteHeader)}
	q.generation, _ = c.current()
	if q.generation != nil {
		q.endpoint = q.generation.Config.Endpoint(segment.EndpointName(r.Header.Get(envoy.EndpointHeader)))
	}
	var answer answering
	if q.endpoint != nil && q.caller != "" {
		q.store = c.storeOf(q.endpoint)
		answer = answers[q.endpoint.Protocol][q.route]
	}
	if answer == nil {
		http.Error(w, "no gateway asks like this", http.StatusForbidden)
		return
	}
	answer(c, w, r, q)
}
