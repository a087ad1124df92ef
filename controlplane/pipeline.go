package controlplane

import (
	"context"
	"fmt"
	"log/slog"
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
}

// Pipeline makes generations of documents. One goroutine, that of Run, owns everything.
type Pipeline struct {
	Options   v1alpha1.Options
	Documents <-chan v1alpha1.Snapshot // newest wins
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

// clockCheck is how often the clock is looked at while a grant has an end: a clock that jumps moves that end too.
const clockCheck = 10 * time.Second

// Run makes generations until the context ends.
func (p *Pipeline) Run(ctx context.Context) error {
	var (
		cfg      *segment.Config // of the newest good documents; nil: none yet
		problems segment.Problems
		learned  envoy.Learned
		noticed  time.Time // when the source noticed the newest documents; zero: something else has changed
		next     time.Time // when time alone changes the policy; zero: never
	)
	clock := time.NewTicker(clockCheck)
	defer clock.Stop()
	expiry := time.NewTimer(clockCheck)
	defer expiry.Stop()
	for {
		noticed = time.Time{}
		select {
		case docs := <-p.Documents: // 1. someone edited something
			noticed = docs.Noticed
			var assembled segment.Config
			if assembled, problems = v1alpha1.Assemble(docs.Documents, p.Options); len(problems) > 0 {
				p.complain(problems)
				continue
			}
			cfg = &assembled
		case learned.Names = <-p.Names: // 2. a store has other collections now
		case learned.Keys = <-p.Keys: // 3. tokens are signed with other keys now
		case <-expiry.C: // 4. a grant has expired
		case <-clock.C: // 5. or the clock has jumped past its end
			if next.IsZero() || time.Now().Before(next) {
				continue
			}
		case <-ctx.Done():
			return nil
		}
		if cfg == nil {
			continue
		}
		g, err := Regenerate(p.State().Generation, *cfg, learned, time.Now())
		if err != nil {
			p.Log.Error("generation refused", "error", err)
			p.state.Store(&State{Generation: p.State().Generation, Problems: problems, Failure: err.Error()})
			continue
		}
		if next = g.Policy.NextChange; !next.IsZero() {
			expiry.Reset(time.Until(next))
		}
		// Where nothing has changed that has an effect, nothing is pushed: only positions and the like are new.
		if last := p.State().Generation; last == nil || last.Digest != g.Digest {
			if err := p.publish(ctx, g, noticed); err != nil {
				return err
			}
		}
		p.state.Store(&State{Generation: g, Problems: problems})
	}
}

func (p *Pipeline) publish(ctx context.Context, g *Generation, noticed time.Time) error {
	for _, sink := range p.Sinks {
		if err := sink.Publish(ctx, g); err != nil {
			return fmt.Errorf("publish generation %s: %w", g.Digest.Short(), err)
		}
	}
	log := p.Log.With("generation", g.Digest.Short(), "endpoints", len(g.Config.Endpoints), "workloads", len(g.Config.Workloads),
		"grants", len(g.Config.Grants))
	if !noticed.IsZero() {
		log = log.With("after", time.Since(noticed).Round(time.Millisecond)) // the change of a file was noticed
	}
	log.Info("generation published")
	return nil
}

func (p *Pipeline) complain(problems segment.Problems) {
	last := p.State().Generation
	p.state.Store(&State{Generation: last, Problems: problems})
	force := "nothing"
	if last != nil {
		force = last.Digest.Short()
	}
	for _, problem := range problems {
		p.Log.Error("document refused", "problem", problem.String(), "generation", force)
	}
}
