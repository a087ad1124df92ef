package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// Sink is told of every new generation. It keeps no reference to what it may change.
type Sink interface {
	Publish(ctx context.Context, g *Generation) error
}

// State is what the pipeline has come to.
type State struct {
	Generation *Generation      // the last good one; nil: none yet
	Problems   segment.Problems // what is wrong with the newest documents; then Generation is an older one
	Failure    string           // a defect of ours that keeps the newest documents from being published
	// Shadow is what is wrong with the newest documents of the shadow folder; then Generation has its last good ones.
	Shadow segment.Problems
}

// Pipeline makes generations of documents. One goroutine, that of Run, owns everything.
type Pipeline struct {
	Options   v1alpha1.Options
	Documents <-chan v1alpha1.Snapshot // newest wins
	Shadow    <-chan v1alpha1.Snapshot // of the shadow folder, newest wins; nil: there is none
	Names     <-chan envoy.Names       // newest wins
	Keys      <-chan envoy.Keys        // newest wins
	Sinks     []Sink                   // told in this order
	Log       *slog.Logger

	state atomic.Pointer[State]
}

// State returns the present state. It is never nil.
func (p *Pipeline) State() *State {
	if s := p.state.Load(); s != nil {
		return s
	}
	return &State{}
}

// clockCheck is how often the clock is looked at while grants begin or end by it: a clock that jumps moves that too.
const clockCheck = 10 * time.Second

// Run makes generations until the context ends.
func (p *Pipeline) Run(ctx context.Context) error {
	var (
		assembler v1alpha1.Assembler
		enforced  [][]v1alpha1.Document // the newest good ones
		cfg       *segment.Config       // made of them; nil: none yet
		problems  segment.Problems
		tried     tried
		learned   envoy.Learned
		noticed   time.Time // when the source noticed the newest documents; zero: something else has changed
		made      time.Time // when the policy was last made
		next      time.Time // when time alone changes the policy; zero: never
	)
	clock := time.NewTicker(clockCheck)
	defer clock.Stop()
	due := time.NewTimer(clockCheck)
	defer due.Stop()
	for {
		noticed = time.Time{}
		select {
		case docs := <-p.Documents: // 1. someone edited something
			noticed = docs.Noticed
			var assembled segment.Config
			if assembled, problems = assembler.Assemble(docs.Files, p.Options); len(problems) > 0 {
				p.complain(problems, tried.problems)
				continue
			}
			enforced, cfg = docs.Files, &assembled
			p.try(&tried, cfg, enforced)
		case docs := <-p.Shadow: // 2. or something in the shadow folder
			noticed = docs.Noticed
			tried.documents, tried.read = slices.Concat(docs.Files...), true
			p.try(&tried, cfg, enforced)
		case learned.Names = <-p.Names: // 3. a store has other collections now
		case learned.Keys = <-p.Keys: // 4. tokens are signed with other keys now
		case <-due.C: // 5. a grant begins or ends
		case <-clock.C: // 6. or the clock has jumped to where it would have, or back
			if now := time.Now().Round(0); !now.Before(made) && (next.IsZero() || now.Before(next)) {
				continue
			}
		case <-ctx.Done():
			return nil
		}
		if cfg == nil {
			continue
		}
		made = time.Now().Round(0) // by the wall clock alone
		g, err := Regenerate(p.State().Generation, *cfg, learned, made)
		if err != nil {
			p.Log.Error("generation refused", "error", err)
			p.state.Store(&State{Generation: p.State().Generation, Problems: problems, Failure: err.Error(), Shadow: tried.problems})
			continue
		}
		if next = g.Policy.NextChange; !next.IsZero() {
			due.Reset(time.Until(next))
		}
		// Where nothing has changed that has an effect, nothing is pushed: only positions and the like are new.
		if last := p.State().Generation; last == nil || last.Digest != g.Digest {
			if err := p.publish(ctx, g, noticed); err != nil {
				return err
			}
		}
		p.state.Store(&State{Generation: g, Problems: problems, Shadow: tried.problems})
	}
}

// tried is the shadow folder.
type tried struct {
	documents []v1alpha1.Document // the newest
	read      bool                // whether there have been any
	grants    []segment.Grant     // of the last good ones
	good      bool                // whether there were good ones
	problems  segment.Problems    // with the newest
}

// try puts the shadow folder's grants beside the enforced ones. Whatever is wrong with it, it changes none of these.
func (p *Pipeline) try(t *tried, cfg *segment.Config, enforced [][]v1alpha1.Document) {
	if !t.read || cfg == nil {
		return
	}
	var grants []segment.Grant
	if grants, t.problems = v1alpha1.AssembleShadow(slices.Concat(enforced...), t.documents, p.Options); len(t.problems) == 0 {
		t.grants, t.good = grants, true
	}
	for _, problem := range t.problems {
		p.Log.Error("shadow document refused", "problem", problem.String())
	}
	cfg.Shadow, cfg.ShadowFolder = t.grants, t.good
}

func (p *Pipeline) publish(ctx context.Context, g *Generation, noticed time.Time) error {
	for _, sink := range p.Sinks {
		if err := sink.Publish(ctx, g); err != nil {
			return fmt.Errorf("publish generation %s: %w", g.Digest.Short(), err)
		}
	}
	log := p.Log.With("generation", g.Digest.Short(), "endpoints", len(g.Config.Endpoints), "workloads", len(g.Config.Workloads),
		"grants", len(g.Config.Grants))
	if g.Config.ShadowFolder {
		log = log.With("shadow", len(g.Config.Shadow))
	}
	if !noticed.IsZero() {
		log = log.With("after", time.Since(noticed).Round(time.Millisecond)) // the change of a file was noticed
	}
	log.Info("generation published")
	return nil
}

func (p *Pipeline) complain(problems, shadow segment.Problems) {
	last := p.State().Generation
	p.state.Store(&State{Generation: last, Problems: problems, Shadow: shadow})
	force := "nothing"
	if last != nil {
		force = last.Digest.Short()
	}
	for _, problem := range problems {
		p.Log.Error("document refused", "problem", problem.String(), "generation", force)
	}
}
