package operator

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"sallyport.dev/authz/learn"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// How much is held against the policy, and told, at once.
const (
	maxJudged      = 100_000 // different requests
	maxSuggested   = 20_000  // of them, what grants are suggested for
	maxDifferences = 100
)

// Records says what there is to answer from.
type Records struct {
	Since    time.Time `json:"since,omitzero"`    // what was asked for; zero: everything
	Recorded time.Time `json:"recorded,omitzero"` // since when there are records of flows; zero: there are none
	Dropped  uint64    `json:"dropped"`           // flows that were lost since the control plane started
}

// Shadow is what the shadow grants would have changed.
type Shadow struct {
	Records
	Grants       []segment.GrantName `json:"grants"`           // that are in shadow mode now
	Folder       bool                `json:"folder,omitempty"` // a whole folder of documents is, which Grants are of
	Requests     int64               `json:"requests"`         // that were judged in shadow
	Different    int64               `json:"different"`        // of them, how many would have been answered otherwise
	Differences  []Difference        `json:"differences"`
	More         int                 `json:"more,omitempty"` // further differences, or more
	MoreRequests int64               `json:"more_requests,omitempty"`
}

// Difference is what would have been answered otherwise, with the first and the last request of it.
type Difference struct {
	telemetry.Tally
	Examples []telemetry.Example `json:"examples,omitempty"`
}

// Suggestion is grants that would have been enough.
type Suggestion struct {
	Records
	Requests int64 `json:"requests"`       // that were looked at
	More     int   `json:"more,omitempty"` // further different requests, too many to look at
	learn.Suggestion
}

// Unused is what no request used.
type Unused struct {
	Records
	Requests int64 `json:"requests"` // that were let through
	learn.Idle
}

func (s *Server) records(ctx context.Context, since time.Time) (Records, error) {
	recorded, err := s.Store.Since(ctx)
	return Records{since, recorded, s.Store.Stats(ctx).Flows.Dropped}, err
}

// asked reads what a question of this file is about, or tells what is wrong with it.
func asked(w http.ResponseWriter, r *http.Request) (telemetry.FlowFilter, bool) {
	filter, err := filterOf(r)
	if err != nil {
		fail(w, http.StatusBadRequest, Failure{err.Error(), "since is a time by RFC 3339"})
	}
	return filter, err == nil
}

func (s *Server) shadow(w http.ResponseWriter, r *http.Request) {
	filter, ok := asked(w, r)
	if !ok {
		return
	}
	name := segment.GrantName(r.URL.Query().Get("grant"))
	out := Shadow{Grants: []segment.GrantName{}, Differences: []Difference{}}
	var grant *segment.Grant // nil: it is not in shadow now
	if g := s.Pipeline.State().Generation; g != nil {
		out.Folder = g.Config.ShadowFolder
		grants := g.Config.Grants
		if out.Folder {
			grants = g.Config.Shadow
		}
		for i := range grants {
			if out.Folder || grants[i].Mode == segment.Shadow {
				out.Grants = append(out.Grants, grants[i].Name)
				if grants[i].Name == name {
					grant = &grants[i]
				}
			}
		}
	}
	var trial learn.Trial
	err := s.Store.Tally(r.Context(), filter, true, func(t telemetry.Tally) {
		if name == "" || learn.Concerns(name, grant, t.Judged) {
			trial.Add(t)
		}
	})
	if err == nil {
		out.Records, err = s.records(r.Context(), filter.Since)
	}
	out.Requests, out.Different = trial.Requests, trial.Different
	out.MoreRequests = trial.Different
	all := trial.Differences()
	for _, t := range all[:min(maxDifferences, len(all))] {
		examples, e := s.Store.Examples(r.Context(), t)
		if e != nil && err == nil {
			err = e
		}
		out.Differences = append(out.Differences, Difference{t, examples})
		out.MoreRequests -= t.Count
	}
	out.More = len(all) - len(out.Differences)
	if err = warned(w, err); err != nil {
		fail(w, http.StatusInternalServerError, Failure{Error: err.Error()})
		return
	}
	answer(w, out)
}

// judged collects different requests.
type judged struct {
	max      int
	tallies  map[telemetry.Judged]*telemetry.Tally
	requests int64
	more     int
}

func (j *judged) add(t telemetry.Tally) {
	// What the shadow said plays no part in what the policy is held against, and would only make more of the same.
	t.Shadow, t.ShadowBy = "", ""
	j.requests += t.Count
	if known := j.tallies[t.Judged]; known != nil {
		known.Add(t)
	} else if len(j.tallies) < j.max {
		j.tallies[t.Judged] = &t
	} else {
		j.more++
	}
}

func (j *judged) list() []telemetry.Tally {
	list := make([]telemetry.Tally, 0, len(j.tallies))
	for _, t := range j.tallies {
		list = append(list, *t)
	}
	return list
}

// collect asks the store for each of the verdicts.
func (s *Server) collect(ctx context.Context, filter telemetry.FlowFilter, most int, verdicts ...telemetry.Verdict) (judged, error) {
	j := judged{max: most, tallies: map[telemetry.Judged]*telemetry.Tally{}}
	for _, filter.Verdict = range verdicts {
		if err := s.Store.Tally(ctx, filter, false, j.add); err != nil {
			return j, err
		}
	}
	return j, nil
}

func (s *Server) suggest(w http.ResponseWriter, r *http.Request) {
	filter, ok := asked(w, r)
	if !ok {
		return
	}
	g := s.generation(w)
	if g == nil {
		return
	}
	verdicts := []telemetry.Verdict{telemetry.Allowed, telemetry.Failed, telemetry.Limited}
	if r.URL.Query().Get("denied") == "true" {
		verdicts = append(verdicts, telemetry.Denied)
	}
	var prefixes []segment.Pattern
	for _, p := range r.URL.Query()["prefix"] {
		prefixes = append(prefixes, segment.Pattern(p))
	}
	seen, err := s.collect(r.Context(), filter, maxSuggested, verdicts...)
	out := Suggestion{Requests: seen.requests, More: seen.more, Suggestion: learn.Suggest(&g.Config, seen.list(), prefixes)}
	if err == nil {
		out.Records, err = s.records(r.Context(), filter.Since)
	}
	if err = warned(w, err); err != nil {
		fail(w, http.StatusInternalServerError, Failure{Error: err.Error()})
		return
	}
	answer(w, out)
}

// unused answers only where it knows all that was let through: what is not recorded would look unused.
func (s *Server) unused(w http.ResponseWriter, r *http.Request) {
	filter, ok := asked(w, r)
	if !ok {
		return
	}
	if filter.Since.IsZero() || filter.Caller != "" {
		fail(w, http.StatusBadRequest, Failure{"unused takes a time and no caller", "what one caller does not use, another may"})
		return
	}
	g := s.generation(w)
	if g == nil {
		return
	}
	seen, err := s.collect(r.Context(), filter, maxJudged, telemetry.Allowed, telemetry.Failed, telemetry.Limited)
	if err == nil && seen.more > 0 {
		fail(w, http.StatusConflict, Failure{fmt.Sprintf("there are more than %d different requests, and nothing can be said without looking at all", maxJudged),
			"ask about a shorter time, or about one --endpoint"})
		return
	}
	out := Unused{Requests: seen.requests}
	if err == nil { // after looking: what was forgotten meanwhile counts as not known
		out.Records, err = s.records(r.Context(), filter.Since)
	}
	if err != nil {
		fail(w, http.StatusInternalServerError, Failure{err.Error(), "nothing is called unused that may only not be known"})
		return
	}
	switch now := time.Now(); {
	case out.Recorded.IsZero():
		fail(w, http.StatusConflict, Failure{"no flow is recorded, so nobody knows what is unused", "ask again when there was traffic"})
	case out.Recorded.After(filter.Since):
		fail(w, http.StatusConflict, Failure{
			fmt.Sprintf("the records go back to %s, which is less than what was asked for: nobody knows what was used before", out.Recorded.Format(time.RFC3339)),
			fmt.Sprintf("ask about a shorter time, as in --unused %s", now.Sub(out.Recorded).Truncate(scale(now.Sub(out.Recorded))))})
	default:
		out.Idle = learn.Unused(&g.Config, seen.list(), filter.Endpoint)
		answer(w, out)
	}
}

// scale is the unit that people would tell a duration in.
func scale(d time.Duration) time.Duration {
	switch {
	case d > 2*time.Hour:
		return time.Hour
	case d > 2*time.Minute:
		return time.Minute
	}
	return time.Second
}
