// Package operator is what a running control plane tells its operators: HTTP with JSON over a Unix socket that only
// its own user can open.
//
// It is for the commands `status`, `explain`, `render`, `flows`, `traces`, `shadow` and `suggest`, which are its only client. It changes
// nothing itself: documents are changed where they are kept. What other parts let operators do stands in Actions.
package operator

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/xds"
	"sallyport.dev/identity/federation"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/telemetry/store"
)

// Server answers operators. All fields but Actions are needed.
type Server struct {
	About    About
	Pipeline interface{ State() *controlplane.State }
	Gateways interface{ Status() []xds.Status }
	// Federation is the other trust domains.
	Federation interface{ Status() []federation.Status }
	// Issuers are those whose tokens endpoints take.
	Issuers interface {
		Status() []federation.IssuerStatus
	}
	Store *store.Store
	// Actions are the operations of other parts, by the pattern of their requests ("POST /tokens"). What one returns is
	// the answer as JSON. Its errors are shown as they are, with a hint where they are a *RefusedError.
	Actions map[string]func(url.Values) (any, error)
}

// About is what does not change while a control plane runs.
type About struct {
	Version       string               `json:"version"`
	Started       time.Time            `json:"started"`
	TrustDomain   spiffeid.TrustDomain `json:"trust_domain"`
	Listen        string               `json:"listen"`                   // where gateways accept callers
	Workload      string               `json:"workload_socket"`          // SPIFFE Workload API
	OTLP          string               `json:"otlp"`                     // where applications send spans
	AgentListen   string               `json:"agent_listen,omitempty"`   // where agents of other machines come; empty: nowhere
	GatewayListen string               `json:"gateway_listen,omitempty"` // and gateways
	// Where other trust domains fetch the bundle, empty: nowhere; how it shows itself there; and the issuer of JWT-SVIDs.
	BundleEndpoint string                  `json:"bundle_endpoint,omitempty"`
	BundleProfile  segment.EndpointProfile `json:"bundle_profile,omitempty"`
	OIDCIssuer     string                  `json:"oidc_issuer,omitempty"`
}

// Status is the state of everything.
type Status struct {
	About
	Generation *Generation      `json:"generation"` // null: none yet, and everything is denied
	Problems   segment.Problems `json:"problems,omitempty"`
	Shadow     segment.Problems `json:"shadow_problems,omitempty"` // of the shadow folder, whose last good documents are tried on
	Failure    string           `json:"failure,omitempty"`
	Gateways   []xds.Status     `json:"gateways"`
	// Federation is what is known of other trust domains.
	Federation []federation.Status `json:"federation,omitempty"`
	// Issuers is what is known of those whose tokens endpoints take.
	Issuers   []federation.IssuerStatus `json:"issuers,omitempty"`
	Telemetry store.Stats               `json:"telemetry"`
}

// Generation is a generation in numbers.
type Generation struct {
	Digest    controlplane.Digest `json:"digest"`
	Made      time.Time           `json:"made"`
	Endpoints int                 `json:"endpoints"`
	Workloads int                 `json:"workloads"`
	Grants    int                 `json:"grants"`
	Warnings  int                 `json:"warnings"` // that check has of the grants
}

// Warning is the header of an answer that is not whole. Its value says why.
const Warning = "x-sallyport-warning"

// Failure is the body of every answer that is an error.
type Failure struct {
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
}

// Handler returns the API.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", s.status)
	mux.HandleFunc("GET /explain", s.explain)
	mux.HandleFunc("GET /rights", s.rights)
	mux.HandleFunc("GET /render", s.render)
	mux.HandleFunc("GET /flows", s.flows)
	mux.HandleFunc("GET /traces", s.traces)
	mux.HandleFunc("GET /traces/{id}", s.trace)
	mux.HandleFunc("GET /shadow", s.shadow)
	mux.HandleFunc("GET /suggest", s.suggest)
	mux.HandleFunc("GET /unused", s.unused)
	for pattern, action := range s.Actions {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := action(r.URL.Query())
			if err != nil {
				failure := Failure{Error: err.Error()}
				var refused *RefusedError
				if errors.As(err, &refused) {
					failure = refused.Failure
				}
				fail(w, http.StatusBadRequest, failure)
				return
			}
			answer(w, v)
		})
	}
	return mux
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	state := s.Pipeline.State()
	out := Status{About: s.About, Problems: state.Problems, Shadow: state.Shadow, Failure: state.Failure,
		Gateways: s.Gateways.Status(), Federation: s.Federation.Status(), Issuers: s.Issuers.Status(), Telemetry: s.Store.Stats(r.Context())}
	if g := state.Generation; g != nil {
		out.Generation = &Generation{g.Digest, g.Made, len(g.Config.Endpoints), len(g.Config.Workloads), len(g.Config.Grants), len(authz.Warnings(&g.Config, g.Made))}
	}
	answer(w, out)
}

// generation returns the one in force, or tells that there is none.
func (s *Server) generation(w http.ResponseWriter) *controlplane.Generation {
	g := s.Pipeline.State().Generation
	if g == nil {
		fail(w, http.StatusConflict, Failure{"no generation has been published yet, so everything is denied", "see `sallyport status`"})
	}
	return g
}

func (s *Server) explain(w http.ResponseWriter, r *http.Request) {
	if g := s.generation(w); g != nil {
		q := r.URL.Query()
		answer(w, authz.Explain(g.Policy, &g.Config, authz.Request{
			Caller: q.Get("caller"), Endpoint: segment.EndpointName(q.Get("endpoint")),
			Operation: segment.Operation(q.Get("operation")), Resource: q.Get("resource")}, time.Now()))
	}
}

func (s *Server) rights(w http.ResponseWriter, r *http.Request) {
	if g := s.generation(w); g != nil {
		answer(w, authz.RightsOf(g.Policy, r.URL.Query().Get("caller")))
	}
}

func (s *Server) render(w http.ResponseWriter, r *http.Request) {
	if g := s.generation(w); g != nil {
		resources, failure := ResourcesOf(g, segment.GatewayName(r.URL.Query().Get("gateway")))
		if failure != nil {
			fail(w, http.StatusNotFound, *failure)
			return
		}
		text, err := envoy.Render(resources)
		if err != nil {
			fail(w, http.StatusInternalServerError, Failure{Error: err.Error()})
			return
		}
		answer(w, text)
	}
}

// ResourcesOf returns what a gateway is sent; without a name, of the only one that there is.
func ResourcesOf(g *controlplane.Generation, name segment.GatewayName) (*envoy.Resources, *Failure) {
	var names []string
	for n, r := range g.Resources {
		if n == name || name == "" && len(g.Resources) == 1 {
			return r, nil
		}
		names = append(names, string(n))
	}
	slices.Sort(names)
	switch {
	case len(names) == 0:
		return nil, &Failure{"there is no gateway", "write a Gateway document"}
	case name == "":
		return nil, &Failure{"there are several gateways", "name one with --gateway: " + strings.Join(names, ", ")}
	}
	return nil, &Failure{fmt.Sprintf("no gateway is called %q", name), "there are: " + strings.Join(names, ", ")}
}

func (s *Server) flows(w http.ResponseWriter, r *http.Request) {
	filter, err := filterOf(r)
	if err != nil {
		fail(w, http.StatusBadRequest, Failure{err.Error(),
			"verdict is allowed, denied, refused or failed, since a time by RFC 3339, limit a number"})
		return
	}
	follow := r.URL.Query().Get("follow") == "true"
	var live *store.Subscription
	if follow {
		live = s.Store.Follow(r.Context(), filter) // before asking for the past, so that nothing falls in between
	}
	past, err := s.Store.Flows(r.Context(), filter)
	if err = warned(w, err); err != nil {
		fail(w, http.StatusInternalServerError, Failure{Error: err.Error()})
		return
	}
	w.Header().Set("content-type", "application/x-ndjson")
	out := json.NewEncoder(w)
	var newest int64
	for i := len(past) - 1; i >= 0; i-- { // the oldest first, as they will go on
		newest = max(newest, past[i].Seq)
		_ = out.Encode(past[i])
	}
	if !follow {
		return
	}
	flush := http.NewResponseController(w)
	_ = flush.Flush()
	for f := range live.Flows() {
		if f.Seq <= newest {
			continue
		}
		if out.Encode(f) != nil || flush.Flush() != nil {
			return
		}
	}
	if r.Context().Err() == nil { // the store gave this reader up, who was too slow: no clean end, as flows are missing
		panic(http.ErrAbortHandler)
	}
}

func (s *Server) traces(w http.ResponseWriter, r *http.Request) {
	filter, err := filterOf(r)
	if err != nil {
		fail(w, http.StatusBadRequest, Failure{err.Error(),
			"verdict is allowed, denied, refused or failed, since a time by RFC 3339, limit a number"})
		return
	}
	traces, err := s.Store.Traces(r.Context(), filter)
	if err = warned(w, err); err != nil {
		fail(w, http.StatusInternalServerError, Failure{Error: err.Error()})
		return
	}
	answer(w, traces)
}

func (s *Server) trace(w http.ResponseWriter, r *http.Request) {
	trace, err := s.Store.Trace(r.Context(), r.PathValue("id"))
	switch err = warned(w, err); {
	case errors.Is(err, store.ErrNoTrace):
		fail(w, http.StatusNotFound, Failure{"no trace begins with " + r.PathValue("id"), "list them with `sallyport traces`"})
	case errors.Is(err, store.ErrAmbiguous):
		fail(w, http.StatusConflict, Failure{"several traces begin with " + r.PathValue("id"), "give more of the id"})
	case err != nil:
		fail(w, http.StatusInternalServerError, Failure{Error: err.Error()})
	default:
		answer(w, trace)
	}
}

// warned makes of an error that comes with an answer from memory alone a warning, and returns every other.
func warned(w http.ResponseWriter, err error) error {
	if !errors.Is(err, store.ErrMemoryOnly) {
		return err
	}
	w.Header().Set(Warning, err.Error())
	return nil
}

func filterOf(r *http.Request) (telemetry.FlowFilter, error) {
	q := r.URL.Query()
	f := telemetry.FlowFilter{Caller: segment.Pattern(q.Get("caller")), Endpoint: segment.EndpointName(q.Get("endpoint"))}
	var err error
	if v := q.Get("verdict"); v != "" {
		if f.Verdict, err = telemetry.ParseVerdict(v); err != nil {
			return f, fmt.Errorf("verdict: %w", err)
		}
	}
	if v := q.Get("since"); v != "" {
		if f.Since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			return f, fmt.Errorf("since: %w", err)
		}
	}
	if v := q.Get("limit"); v != "" {
		if f.Limit, err = strconv.Atoi(v); err != nil {
			return f, fmt.Errorf("limit: %w", err)
		}
	}
	return f, nil
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("content-type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the operator has gone: nobody to tell
}

func fail(w http.ResponseWriter, code int, f Failure) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(f)
}
