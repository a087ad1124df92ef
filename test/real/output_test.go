package real

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// output keeps what a process writes, and lets others wait for it.
type output struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
	ended   bool
}

func newOutput() *output { return &output{changed: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.text.Write(p)
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// line waits for a line that holds the text.
func (o *output) line(ctx context.Context, with string) (string, error) {
	for {
		o.mu.Lock()
		text, changed, ended := o.text.String(), o.changed, o.ended
		o.mu.Unlock()
		for line := range strings.Lines(text) {
			if strings.Contains(line, with) {
				return line, nil
			}
		}
		if ended {
			return "", errors.New("the process has ended")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("no line with %q: %w", with, ctx.Err())
		}
	}
}
