package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"sallyport.dev/telemetry"
)

var (
	// ErrMemoryOnly comes with an answer that is made from memory alone, because the file cannot be read.
	ErrMemoryOnly = errors.New("the telemetry file cannot be read: this is what is in memory")
	// ErrNoTrace says that no trace has the id or begins with the prefix.
	ErrNoTrace = errors.New("no such trace")
	// ErrAmbiguous says that more than one trace begins with the prefix.
	ErrAmbiguous = errors.New("more than one trace begins with this: give more of its id")
)

// Bounds on one trace: whoever knows its id can add to it.
const (
	maxTraceRows  = 5000     // of a kind
	maxTraceBytes = 16 << 20 // of a kind
)

// Flows returns the newest flows that match, the newest first. With ErrMemoryOnly, and only then, there are flows and
// an error.
func (s *Store) Flows(ctx context.Context, filter telemetry.FlowFilter) ([]telemetry.Flow, error) {
	waiting, below := s.waitingFlows()
	found := []telemetry.Flow{}
	for _, i := range waiting {
		if filter.Match(i.value) {
			found = append(found, i.value)
		}
	}
	err := s.read(ctx, func(db *database) error {
		where, args := where(filter, below)
		return query(ctx, db, fmt.Sprintf("SELECT record, id FROM flows WHERE %s ORDER BY time DESC LIMIT %d", where, filter.Rows()), args,
			func(rows *sql.Rows) error {
				f, err := scanFlow(rows)
				found = append(found, f)
				return err
			})
	})
	slices.SortFunc(found, func(a, b telemetry.Flow) int { return cmp.Or(b.Time.Compare(a.Time), cmp.Compare(b.Seq, a.Seq)) })
	return found[:min(len(found), filter.Rows())], err
}

// Traces returns the traces of which a flow matches, those with the newest such flow first. Errors are as of Flows.
func (s *Store) Traces(ctx context.Context, filter telemetry.FlowFilter) ([]telemetry.Summary, error) {
	type seen struct {
		id   telemetry.TraceID
		last int64
	}
	var order []seen
	known := map[telemetry.TraceID]bool{}
	waiting, below := s.waitingFlows()
	for _, i := range waiting {
		if f := i.value; f.TraceID != "" && filter.Match(f) {
			order = append(order, seen{f.TraceID, unixNano(f.Time)})
		}
	}
	err := s.read(ctx, func(db *database) error {
		where, args := where(filter, below)
		return query(ctx, db, "SELECT trace_id, time FROM flows WHERE trace_id <> '' AND "+where+" ORDER BY time DESC", args,
			func(rows *sql.Rows) error {
				var t seen
				if err := rows.Scan(&t.id, &t.last); err != nil {
					return err
				}
				if known[t.id] {
					return nil
				}
				known[t.id] = true
				order = append(order, t)
				if len(known) == filter.Rows() {
					return errEnough
				}
				return nil
			})
	})
	slices.SortStableFunc(order, func(a, b seen) int { return cmp.Compare(b.last, a.last) })
	clear(known)
	list := []telemetry.Summary{}
	for _, t := range order {
		if known[t.id] || len(list) == filter.Rows() {
			continue
		}
		known[t.id] = true
		trace, e := s.trace(ctx, t.id)
		err = cmp.Or(err, e)
		list = append(list, trace.Summary())
	}
	return list, err
}

// Trace returns what is known of the one trace whose id is, or begins with, the prefix: of each
// kind, at most 5,000 records that are written. Its errors are ErrNoTrace, ErrAmbiguous, and those of Flows.
func (s *Store) Trace(ctx context.Context, prefix string) (telemetry.Trace, error) {
	prefix = strings.ToLower(prefix)
	if prefix == "" || strings.Trim(prefix, "0123456789abcdef") != "" {
		return telemetry.Trace{}, fmt.Errorf("find trace %q: %w", prefix, ErrNoTrace)
	}
	ids := map[telemetry.TraceID]bool{}
	s.mu.Lock()
	waiting, spans := s.flows.items, s.spans
	s.mu.Unlock()
	for _, i := range waiting {
		ids[i.value.TraceID] = true
	}
	for _, q := range spans {
		for _, i := range q.items {
			ids[i.value.TraceID] = true
		}
	}
	for id := range ids {
		if !strings.HasPrefix(string(id), prefix) {
			delete(ids, id)
		}
	}
	err := s.read(ctx, func(db *database) error {
		for _, table := range tables {
			if err := query(ctx, db, "SELECT DISTINCT trace_id FROM "+table+" WHERE trace_id >= ? AND trace_id < ? LIMIT 2", []any{prefix, prefix + "g"},
				func(rows *sql.Rows) error {
					var id telemetry.TraceID
					err := rows.Scan(&id)
					ids[id] = true
					return err
				}); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case len(ids) == 0:
		return telemetry.Trace{}, cmp.Or(err, fmt.Errorf("find trace %q: %w", prefix, ErrNoTrace))
	case len(ids) > 1:
		return telemetry.Trace{}, fmt.Errorf("find trace %q: %w", prefix, ErrAmbiguous)
	}
	for id := range ids {
		trace, e := s.trace(ctx, id)
		return trace, cmp.Or(e, err)
	}
	panic("unreachable: there is one id")
}

// trace collects a trace by its whole id.
func (s *Store) trace(ctx context.Context, id telemetry.TraceID) (telemetry.Trace, error) {
	t := telemetry.Trace{ID: id, Spans: []telemetry.Span{}, Flows: []telemetry.Flow{}}
	s.mu.Lock()
	waiting, spans := s.flows.items, s.spans
	s.mu.Unlock()
	var below [kinds]int64
	below[flows] = first(waiting)
	for _, i := range waiting {
		if i.value.TraceID == id {
			t.Flows = append(t.Flows, i.value)
		}
	}
	for n, q := range spans {
		below[gatewaySpans+kind(n)] = first(q.items)
		for _, i := range q.items {
			if i.value.TraceID == id {
				t.Spans = append(t.Spans, i.value)
			}
		}
	}
	err := s.read(ctx, func(db *database) error {
		for k, table := range tables {
			left := maxTraceBytes
			text := fmt.Sprintf("SELECT record, id FROM %s WHERE trace_id = ? AND id < ? ORDER BY id LIMIT %d", table, maxTraceRows)
			if err := query(ctx, db, text, []any{id, below[k]}, func(rows *sql.Rows) error {
				if kind(k) == flows {
					f, err := scanFlow(rows)
					t.Flows = append(t.Flows, f)
					return err
				}
				var span telemetry.Span
				n, _, err := scan(rows, &span)
				t.Spans = append(t.Spans, span)
				if left -= n; left < 0 && err == nil {
					return errEnough
				}
				return err
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return t, err
}

// Stats returns the counts of this moment.
func (s *Store) Stats(ctx context.Context) Stats {
	var out Stats
	counts := [kinds]*Count{flows: &out.Flows, gatewaySpans: &out.Spans, applicationSpans: &out.Applications}
	s.mu.Lock()
	out.Flows.Waiting, out.Flows.Dropped = len(s.flows.items), s.flows.dropped
	for n, q := range s.spans {
		c := counts[gatewaySpans+kind(n)]
		c.Waiting, c.Dropped = len(q.items), q.dropped
	}
	s.mu.Unlock()
	for k, c := range counts {
		c.Dropped += s.skipped[k].Load()
	}
	err := s.read(ctx, func(db *database) error {
		held, err := db.held(ctx, db.reader)
		for k, c := range counts {
			c.Rows = held[k].rows
		}
		if err != nil {
			return err
		}
		return db.reader.QueryRowContext(ctx, "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").Scan(&out.Bytes)
	})
	if err != nil {
		out.Problem = err.Error()
	}
	if why := s.problem.Load(); why != nil {
		out.Problem = *why
	}
	return out
}

// waitingFlows returns the flows that are not in the file yet; all flows with a Seq below are, if they still exist.
func (s *Store) waitingFlows() (waiting []item[telemetry.Flow], below int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows.items, first(s.flows.items)
}

func first[T any](items []item[T]) int64 {
	if len(items) == 0 {
		return math.MaxInt64
	}
	return items[0].seq
}

// where writes the filter as SQL; telemetry.FlowFilter.Match says the same in Go.
func where(f telemetry.FlowFilter, below int64) (string, []any) {
	terms, args := []string{"id < ?"}, []any{below}
	add := func(term string, values ...any) {
		terms = append(terms, term)
		args = append(args, values...)
	}
	switch {
	case f.Caller.IsPrefix():
		add("substr(caller, 1, ?) = ?", len([]rune(f.Caller.Stem())), f.Caller.Stem())
	case f.Caller != "":
		add("caller = ?", f.Caller)
	}
	if f.Endpoint != "" {
		add("endpoint = ?", f.Endpoint)
	}
	if f.Verdict != "" {
		add("verdict = ?", f.Verdict)
	}
	if !f.Since.IsZero() {
		add("time >= ?", f.Since.UnixNano())
	}
	return strings.Join(terms, " AND "), args
}

// errEnough ends a query early.
var errEnough = errors.New("enough")

// read asks the file. Whatever goes wrong there is ErrMemoryOnly, except that nobody waits for the answer any more.
func (s *Store) read(ctx context.Context, ask func(*database) error) error {
	s.files.RLock()
	defer s.files.RUnlock()
	if s.db == nil {
		return ErrMemoryOnly
	}
	err := ask(s.db)
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	if isBroken(err) {
		s.suspect.Store(true)
		s.signal()
	}
	return fmt.Errorf("%w: %w", ErrMemoryOnly, err)
}

func query(ctx context.Context, db *database, text string, args []any, each func(*sql.Rows) error) error {
	rows, err := db.reader.QueryContext(ctx, text, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		switch err := each(rows); {
		case errors.Is(err, errEnough):
			return nil
		case err != nil:
			return err
		}
	}
	return rows.Err()
}

// scan reads a record and its id, and returns the size of it.
func scan(rows *sql.Rows, record any) (size int, id int64, err error) {
	var text sql.RawBytes
	if err := rows.Scan(&text, &id); err != nil {
		return 0, 0, err
	}
	if err := json.Unmarshal(text, record); err != nil {
		return 0, 0, fmt.Errorf("%w %d: %w", errUnreadable, id, err)
	}
	return len(text), id, nil
}

func scanFlow(rows *sql.Rows) (f telemetry.Flow, err error) {
	_, f.Seq, err = scan(rows, &f)
	return f, err
}
