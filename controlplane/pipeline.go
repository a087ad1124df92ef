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

// Run makes generations until the context ends.
func (p *Pipeline) Run(ctx context.Context) error {
	var (
		cfg    *segment.Config // of the newest good documents; nil: none yet
		names  envoy.Names
		expiry = time.NewTimer(0)
	)
	<-expiry.C
	for {
		select {
		case docs := <-p.Documents: // 1. someone edited something
			next, problems := v1alpha1.Assemble(docs.Documents, p.Options)
			if len(problems) > 0 {
				p.complain(problems)
				continue
			}
			cfg = &next
		case names = <-p.Names: // 2. a store has other collections now
		case <-expiry.C: // 3. a grant has expired
		case <-ctx.Done():
			return nil
		}
		if cfg == nil {
			continue
		}
		g, err := Generate(*cfg, names, time.Now())
		if err != nil {
			p.Log.Error("generation refused", "error", err)
			p.state.Store(&State{Generation: p.State().Generation, Failure: err.Error()})
			continue
		}
		if next := g.Policy.NextChange; !next.IsZero() {
			expiry.Reset(time.Until(next))
		} else {
			expiry.Stop()
		}
		if last := p.State().Generation; last != nil && last.Digest == g.Digest {
			g = last // nothing that has an effect has changed: nothing is pushed
		} else if err := p.publish(ctx, g); err != nil {
			return err
		}
		p.state.Store(&State{Generation: g})
	}
}

func (p *Pipeline) publish(ctx context.Context, g *Generation) error {
	for _, sink := range p.Sinks {
		if err := sink.Publish(ctx, g); err != nil {
			return fmt.Errorf("publish generation %s: %w", g.Digest.Short(), err)
		}
	}
	p.Log.Info("generation published", "generation", g.Digest.Short(), "endpoints", len(g.Config.Endpoints),
		"workloads", len(g.Config.Workloads), "grants", len(g.Config.Grants))
	return nil
}

func (p *Pipeline) complain(problems segment.Problems) {
	last := p.State().Generation
	p.state.Store(&State{Generation: last, Problems: problems})
	force := "nothing"
	if last != nil {
		force = string(last.Digest.Short())
	}
	for _, problem := range problems {
		p.Log.Error("document refused", "problem", problem.String(), "generation", force)
	}
}
