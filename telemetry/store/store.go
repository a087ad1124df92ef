// Package store keeps flows and spans: the newest in memory, all of them in one embedded SQLite file, bounded in size
// and age.
//
// It is for the process that receives telemetry and answers questions about it. Traffic never waits for it: Add and
// AddSpans touch memory only, whatever the disk does. When the file cannot be written the store goes on with what its
// memory holds, tries again and again, and tells so once; when the file is broken, or of another version, it is put
// aside and a new one begun; what was put aside is never deleted, and does not count towards the bounds.
// It loses records only in ways that it counts. It is no audit log: it forgets what is old.
package store

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"sallyport.dev/telemetry"
)

// Config says where and how much. Only Path is needed.
type Config struct {
	Path       string        // the database file; all whose names begin with its name are the store's own
	MaxBytes   int64         // size of the file; 0: 512 MiB; at least 4 MiB
	MaxAge     time.Duration // since a record was received; 0: 7 days
	QueueBytes int64         // memory for records that are not written yet; 0: 32 MiB
	Log        *slog.Logger  // nil: nowhere
}

// How eager the writer is.
const (
	flushEvery = 100 * time.Millisecond // the longest that a record waits while the disk is well
	batchRows  = 1000                   // or so many records
	retryEvery = 2 * time.Second        // after a failure
	pruneEvery = time.Minute            // while nothing happens
	stopWithin = 15 * time.Second       // for the last write
)

// kind is a table, and a share of the store of its own, so that none can push out another: anybody on the machine may
// send application spans, as many as they like.
type kind int

const (
	flows kind = iota
	gatewaySpans
	applicationSpans
	kinds
	spanKinds = kinds - gatewaySpans
)

// Store is made by New and run by Run. All methods may be called at any time from anywhere.
type Store struct {
	cfg  Config
	log  *slog.Logger
	wake chan struct{} // something to write, or a full batch of it

	// files is held for reading while db is asked, and for writing while Run, which alone changes it, does so: a reader
	// that closed a file after it had been put aside would delete the write-ahead log of the new one.
	files sync.RWMutex
	db    *database // nil: not open

	// suspect is set by readers that met a broken page.
	suspect atomic.Bool
	problem atomic.Pointer[string]
	skipped [kinds]atomic.Uint64 // could not be stored, being no valid record

	mu        sync.Mutex
	seq       int64 // of the record received last; also when that was, in microseconds, give or take
	flows     queue[telemetry.Flow]
	spans     [spanKinds]queue[telemetry.Span] // those of kind k at k-gatewaySpans
	followers map[*Subscription]struct{}
}

// New returns a store that keeps records in memory until Run opens the file.
func New(cfg Config) *Store {
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 512 << 20
	}
	cfg.MaxBytes = max(cfg.MaxBytes, 4<<20)
	if cfg.MaxAge == 0 {
		cfg.MaxAge = 7 * 24 * time.Hour
	}
	if cfg.QueueBytes == 0 {
		cfg.QueueBytes = 32 << 20
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{cfg: cfg, log: cfg.Log, wake: make(chan struct{}, 1), followers: map[*Subscription]struct{}{}}
	s.flows.max = cfg.QueueBytes / 2
	for n := range s.spans {
		s.spans[n].max = cfg.QueueBytes / 4
	}
	return s
}

// Add keeps a flow, gives it its Seq and tells those who follow. It never blocks; when memory is full the oldest flow
// that is not written yet gives way, and is counted.
func (s *Store) Add(f telemetry.Flow) {
	s.mu.Lock()
	f.Seq = s.next()
	before := s.waitingNow()
	s.flows.push(f.Seq, f, sizeOfFlow(f))
	for sub := range s.followers {
		if !sub.offer(f) {
			s.unfollow(sub)
		}
	}
	s.nudge(before)
	s.mu.Unlock()
}

// AddSpans keeps spans, each in the share of its Source. It never blocks. The caller must not use their attributes again.
func (s *Store) AddSpans(spans []telemetry.Span) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.waitingNow()
	for _, span := range spans {
		k := applicationSpans
		if span.Source == telemetry.FromGateway {
			k = gatewaySpans
		}
		s.spans[k-gatewaySpans].push(s.next(), span, sizeOfSpan(span))
	}
	s.nudge(before)
}

// next returns a number larger than all before, in this run and earlier ones: the clock, unless it stands or goes back.
func (s *Store) next() int64 {
	s.seq = max(s.seq+1, time.Now().UnixMicro())
	return s.seq
}

// nudge wakes the writer for the first records after before, which were none, and for a full batch.
func (s *Store) nudge(before int) {
	if before == 0 || s.waitingNow() >= batchRows {
		s.signal()
	}
}

func (s *Store) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// waitingNow is how many records are not written yet; s.mu is held.
func (s *Store) waitingNow() int {
	n := len(s.flows.items)
	for _, q := range s.spans {
		n += len(q.items)
	}
	return n
}

// Stats say what the store holds and what it lost since it was made.
type Stats struct {
	Flows        Count  `json:"flows"`
	Spans        Count  `json:"spans"`             // from gateways
	Applications Count  `json:"application_spans"` // from anybody
	Bytes        int64  `json:"bytes"`             // of the file, without its write-ahead log
	Problem      string `json:"problem,omitempty"` // why nothing is written just now; "": all is well
}

// Count is one kind of record.
type Count struct {
	Rows    int64  `json:"rows"`    // in the file
	Waiting int    `json:"waiting"` // in memory, not written yet
	Dropped uint64 `json:"dropped"` // lost before they were written: no room in memory, or not a valid record
}
