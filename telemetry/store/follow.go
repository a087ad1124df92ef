package store

import (
	"context"

	"sallyport.dev/telemetry"
)

// followBuffer is how many flows a follower may be behind.
const followBuffer = 1024

// Subscription is a live view of flows as they are received. It has no gaps: it ends before one.
type Subscription struct {
	filter telemetry.FlowFilter
	flows  chan telemetry.Flow
}

// Flows returns the flows. It is closed when the context given to Follow ends, and before that only when the reader
// was more than 1,024 flows behind: then those follow still, and none of the flows after them.
func (s *Subscription) Flows() <-chan telemetry.Flow { return s.flows }

// offer never blocks. It reports whether nothing was lost.
func (s *Subscription) offer(f telemetry.Flow) bool {
	if !s.filter.Match(f) {
		return true
	}
	select {
	case s.flows <- f:
		return true
	default:
		return false
	}
}

// Follow delivers every flow that is received from now on and matches, until ctx ends or the reader is too far behind.
// To see older flows too without a gap, follow first and then ask for Flows: those with the same Seq are the same.
func (s *Store) Follow(ctx context.Context, filter telemetry.FlowFilter) *Subscription {
	sub := &Subscription{filter: filter, flows: make(chan telemetry.Flow, followBuffer)}
	s.mu.Lock()
	s.followers[sub] = struct{}{}
	s.mu.Unlock()
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.unfollow(sub)
	})
	return sub
}

// unfollow ends a subscription, if it has not ended; s.mu is held.
func (s *Store) unfollow(sub *Subscription) {
	if _, ok := s.followers[sub]; ok {
		delete(s.followers, sub)
		close(sub.flows)
	}
}
