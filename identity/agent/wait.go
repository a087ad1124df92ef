package agent

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	firstWait = time.Second
	lastWait  = 30 * time.Second
	// longestTimer is how long one timer is trusted: they stand still while a machine sleeps, its clock does not.
	longestTimer = 15 * time.Second
)

// backoff is how long to wait before the next attempt: longer each time.
type backoff struct{ last time.Duration }

func newBackoff() *backoff { return &backoff{} }

// next returns the next wait. Chance keeps agents apart that lost the control plane at the same time.
func (b *backoff) next() time.Duration {
	b.last = min(max(2*b.last, firstWait), lastWait)
	return b.last - chance(b.last/2)
}

// chance returns a random time below d.
func chance(d time.Duration) time.Duration {
	return time.Duration(rand.Int64N(int64(max(d, 1)))) //nolint:gosec // nobody gains by guessing it
}

// sleep waits by the clock on the wall.
func sleep(ctx context.Context, d time.Duration) error {
	until := time.Now().Round(0).Add(d)
	for left := d; left > 0; left = time.Until(until) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(left, longestTimer)):
		}
	}
	return ctx.Err()
}
