package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport.dev/telemetry"
)

// Run opens the file, writes what comes and forgets what is old, until ctx ends; then it writes what is left. A disk
// that fails is no reason to return: the error is always nil.
func (s *Store) Run(ctx context.Context) error {
	defer s.close()
	next := time.NewTimer(0)
	defer next.Stop()
	armed := true // next will come soon
	for {
		select {
		case <-ctx.Done():
			s.stop()
			return nil
		case <-s.wake:
			if s.problem.Load() != nil {
				continue // the retry will take it
			}
			if s.waiting() < batchRows {
				if !armed {
					next.Reset(flushEvery)
					armed = true
				}
				continue
			}
		case <-next.C:
		}
		more, err := s.turn(ctx)
		s.report(err)
		armed = err != nil || more
		switch {
		case err != nil:
			next.Reset(retryEvery)
		case more:
			next.Reset(flushEvery)
		default:
			next.Reset(pruneEvery)
		}
	}
}

// turn writes everything that waits and forgets some of what is old; more says that there is more of that.
func (s *Store) turn(ctx context.Context) (more bool, err error) {
	if s.suspect.Swap(false) {
		s.putAside(errors.New("a reader met a broken page"))
	}
	db, err := s.open(ctx)
	if err != nil {
		return false, err
	}
	if err = s.flush(ctx, db); err == nil {
		more, err = db.prune(ctx, time.Now().Add(-s.cfg.MaxAge).UnixMicro())
	}
	switch {
	case isBroken(err):
		s.putAside(err)
		return true, nil // with a new file
	case err != nil && !isFull(err):
		s.close() // and open it again: the disk may have gone and come back
	}
	return more, err
}

// open returns the database, and puts a file aside that is none.
func (s *Store) open(ctx context.Context) (*database, error) {
	if s.db != nil {
		return s.db, nil
	}
	db, err := openDatabase(ctx, s.cfg.Path, s.cfg.MaxBytes)
	if isBroken(err) {
		s.putAside(err)
		db, err = openDatabase(ctx, s.cfg.Path, s.cfg.MaxBytes)
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.seq = max(s.seq, db.lastSeq)
	s.mu.Unlock()
	s.files.Lock()
	s.db = db
	s.files.Unlock()
	return db, nil
}

// flush writes batch after batch until nothing waits.
func (s *Store) flush(ctx context.Context, db *database) error {
	for {
		b := s.batch()
		if b.rows() == 0 {
			return nil
		}
		err := db.write(ctx, &b)
		if isFull(err) { // forget something; it does if the bound is ours, and does nothing if the disk is full
			if _, err = db.prune(ctx, 0); err == nil {
				err = db.write(ctx, &b)
			}
		}
		if err != nil {
			return err
		}
		s.written(&b)
	}
}

// batch is what one transaction writes.
type batch struct {
	flows   []item[telemetry.Flow]
	spans   [spanKinds][]item[telemetry.Span]
	skipped [kinds]uint64 // set by the write
}

func (b *batch) rows() int {
	n := len(b.flows)
	for _, items := range b.spans {
		n += len(items)
	}
	return n
}

func (s *Store) batch() (b batch) {
	bytes := min(4<<20, s.cfg.MaxBytes/128) // so that a batch fits below the bound, where pruning leaves an eighth free
	s.mu.Lock()
	defer s.mu.Unlock()
	b.flows = s.flows.batch(batchRows, bytes)
	for k := range s.spans {
		b.spans[k] = s.spans[k].batch(batchRows, bytes)
	}
	return b
}

// written lets go of what is in the file now. Until then readers see it in memory, and afterwards in the file.
func (s *Store) written(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows.written(b.flows)
	for k := range s.spans {
		s.spans[k].written(b.spans[k])
	}
	for k, n := range b.skipped {
		s.skipped[k].Add(n)
	}
}

func (s *Store) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waitingNow()
}

// stop writes what is left, if the disk lets it.
func (s *Store) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	db, err := s.open(ctx)
	if err == nil {
		err = s.flush(ctx, db)
	}
	s.report(err)
	if n := s.waiting(); n > 0 {
		s.log.Error("telemetry is lost: the store stopped before it could be written", "path", s.cfg.Path, "records", n)
	}
}

// report tells of the first of several failures, and of the end of them.
func (s *Store) report(err error) {
	before := s.problem.Load()
	switch {
	case err != nil:
		text := err.Error()
		s.problem.Store(&text)
		if before == nil {
			s.log.Error("telemetry store cannot write, new records stay in memory", "path", s.cfg.Path, "error", err)
		}
	case before != nil:
		s.problem.Store(nil)
		s.log.Info("telemetry store writes again", "path", s.cfg.Path)
	}
}

// putAside moves a file away that is broken or of another version.
func (s *Store) putAside(cause error) {
	s.close()
	aside, err := putAside(s.cfg.Path)
	if err != nil {
		cause = fmt.Errorf("%w; %w", cause, err)
	}
	message := "telemetry store is broken, a new one is begun"
	if errors.Is(cause, errOtherVersion) {
		message = "telemetry store is of another version, a new one is begun"
	}
	s.log.Error(message, "path", s.cfg.Path, "moved_to", aside, "error", cause)
}

func (s *Store) close() {
	s.files.Lock()
	defer s.files.Unlock()
	if s.db != nil {
		s.db.close()
		s.db = nil
	}
}
