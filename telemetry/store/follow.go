package store

import (
	"context"
	"sync/atomic"

	"sallyport.dev/telemetry"
)

// followBuffer is how many flows a follower may be behind.
const followBuffer = 1024

// Subscription is a live view of flows as they are received.
type Subscription struct {
	filter telemetry.FlowFilter
	flows  chan telemetry.Flow
	lost   atomic.Uint64
}

// Flows returns the flows; it is closed when the subscription's context ends.
func (s *Subscription) Flows() <-chan telemetry.Flow { return s.flows }

// Lost returns how many flows were not delivered, because the reader was too slow.
func (s *Subscription) Lost() uint64 { return s.lost.Load() }

// offer never blocks.
func (s *Subscription) offer(f telemetry.Flow) {
	if !s.filter.Match(f) {
		return
	}
	select {
	case s.flows <- f:
	default:
		s.lost.Add(1)
	}
}

// Follow delivers every flow that is received from now on and matches, until ctx ends. To see older flows too without
// a gap, follow first and then ask for Flows: those with the same Seq are the same.
func (s *Store) Follow(ctx context.Context, filter telemetry.FlowFilter) *Subscription {
	sub := &Subscription{filter: filter, flows: make(chan telemetry.Flow, followBuffer)}
	s.mu.Lock()
	s.followers[sub] = struct{}{}
	s.mu.Unlock()
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.followers, sub)
		close(sub.flows)
	})
	return sub
}
