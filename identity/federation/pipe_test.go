package federation

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// wire is a connection in memory. Unlike net.Pipe it has room for what nobody reads yet, as a socket has: TLS writes a
// last alert without caring whether somebody reads.
type wire struct {
	mu      sync.Mutex
	changed chan struct{} // closed at each change
	waiting [2][]byte     // for each end
	closed  [2]bool
}

// room is how much waits in one direction.
const room = 64 << 10

func newWire() (a, b net.Conn) {
	w := &wire{changed: make(chan struct{})}
	return &end{wire: w}, &end{wire: w, side: 1}
}

// end is one end of a wire.
type end struct {
	*wire
	side        int
	read, write time.Time // deadlines; zero: none
}

func (w *wire) change() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// until tries again whenever something has changed, until it has done it or the deadline is over.
func (e *end) until(deadline *time.Time, try func() (bool, int, error)) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		var late <-chan time.Time
		if !deadline.IsZero() {
			left := time.Until(*deadline)
			if left <= 0 {
				return 0, os.ErrDeadlineExceeded
			}
			late = time.After(left)
		}
		if e.closed[e.side] {
			return 0, net.ErrClosed
		}
		if done, n, err := try(); done {
			e.change()
			return n, err
		}
		changed := e.changed
		e.mu.Unlock()
		select {
		case <-changed:
		case <-late:
		}
		e.mu.Lock()
	}
}

func (e *end) Read(p []byte) (int, error) {
	return e.until(&e.read, func() (bool, int, error) {
		if len(e.waiting[e.side]) > 0 || len(p) == 0 {
			n := copy(p, e.waiting[e.side])
			e.waiting[e.side] = e.waiting[e.side][n:]
			return true, n, nil
		}
		return e.closed[1-e.side], 0, io.EOF
	})
}

func (e *end) Write(p []byte) (int, error) {
	return e.until(&e.write, func() (bool, int, error) {
		if e.closed[1-e.side] {
			return true, 0, io.ErrClosedPipe
		}
		if len(e.waiting[1-e.side]) > room {
			return false, 0, nil
		}
		e.waiting[1-e.side] = append(e.waiting[1-e.side], p...)
		return true, len(p), nil
	})
}

func (e *end) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed[e.side] = true
	e.change()
	return nil
}

func (e *end) set(deadlines ...*time.Time) func(time.Time) error {
	return func(t time.Time) error {
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, d := range deadlines {
			*d = t
		}
		e.change()
		return nil
	}
}

func (e *end) SetDeadline(t time.Time) error      { return e.set(&e.read, &e.write)(t) }
func (e *end) SetReadDeadline(t time.Time) error  { return e.set(&e.read)(t) }
func (e *end) SetWriteDeadline(t time.Time) error { return e.set(&e.write)(t) }
func (e *end) LocalAddr() net.Addr                { return &net.TCPAddr{} }
func (e *end) RemoteAddr() net.Addr               { return &net.TCPAddr{} }
