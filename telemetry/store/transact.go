package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// How much one turn of pruning does, so that writing never waits long for it.
const (
	pruneRows  = 500 // in one transaction
	pruneSteps = 8
)

// write stores a batch, all of it or nothing.
func (d *database) write(ctx context.Context, b *batch) error {
	err := d.transact(ctx, func(tx *sql.Tx) error {
		w := writer{ctx: ctx, tx: tx}
		w.table(flows, "INSERT OR IGNORE INTO flows (id, trace_id, record, time, verdict, endpoint, caller) VALUES (?, ?, ?, ?, ?, ?, ?)")
		for _, i := range b.flows {
			f := i.value
			w.row(f, i.seq, f.TraceID, unixNano(f.Time), f.Verdict, f.Endpoint, f.Caller.String())
		}
		w.end()
		for n, items := range b.spans {
			k := gatewaySpans + kind(n)
			w.table(k, "INSERT OR IGNORE INTO "+tables[k]+" (id, trace_id, record) VALUES (?, ?, ?)")
			for _, i := range items {
				w.row(i.value, i.seq, i.value.TraceID)
			}
			w.end()
		}
		b.skipped = w.skipped
		return w.err
	})
	if err != nil {
		return fmt.Errorf("write telemetry: %w", err)
	}
	return nil
}

// writer inserts rows; after an error it does nothing more.
type writer struct {
	ctx         context.Context
	tx          *sql.Tx
	kind        kind
	insert      *sql.Stmt
	rows, bytes int64
	skipped     [kinds]uint64
	err         error
}

func (w *writer) table(k kind, insert string) {
	w.kind, w.rows, w.bytes = k, 0, 0
	if w.err == nil {
		w.insert, w.err = w.tx.PrepareContext(w.ctx, insert)
	}
}

// row inserts a record as JSON after its id and trace, and before what else its table has. One that is not valid is
// left out and counted, or it would stand in the way of all others for ever.
func (w *writer) row(record any, id int64, trace any, columns ...any) {
	if w.err != nil {
		return
	}
	text, err := json.Marshal(record)
	if err != nil {
		w.skipped[w.kind]++
		return
	}
	result, err := w.insert.ExecContext(w.ctx, append([]any{id, trace, string(text)}, columns...)...)
	if err != nil {
		w.err = err
		return
	}
	if n, _ := result.RowsAffected(); n == 0 {
		w.skipped[w.kind]++ // its id is taken: only a clock that went back while the file could not be read does that
		return
	}
	w.rows++
	w.bytes += int64(len(text))
}

func (w *writer) end() {
	if w.err == nil && w.rows > 0 {
		w.err = hold(w.ctx, w.tx, w.kind, w.rows, w.bytes)
	}
	if w.insert != nil {
		w.err = errors.Join(w.err, w.insert.Close())
		w.insert = nil
	}
}

// hold changes what a kind is known to have.
func hold(ctx context.Context, tx *sql.Tx, k kind, rows, bytes int64) error {
	_, err := tx.ExecContext(ctx, "UPDATE held SET rows = rows + ?, bytes = bytes + ? WHERE kind = ?", rows, bytes, k)
	return err
}

// prune forgets in small steps: what was received before the id, and then, while more than seven eighths of the file
// are in use, the oldest of the kind that is furthest above its share. more says that it did not come to an end.
func (d *database) prune(ctx context.Context, before int64) (more bool, err error) {
	for range pruneSteps {
		k, id, ok, err := d.victim(ctx, before)
		if err != nil {
			return false, fmt.Errorf("prune telemetry: %w", err)
		}
		if !ok {
			return false, d.shrink(ctx)
		}
		if err := d.forget(ctx, k, id); err != nil {
			return false, fmt.Errorf("prune telemetry: %w", err)
		}
	}
	return true, nil
}

// victim returns the kind to forget something of, and the id below which.
func (d *database) victim(ctx context.Context, before int64) (k kind, id int64, ok bool, err error) {
	for k, table := range tables {
		var oldest sql.NullInt64
		if err := d.writer.QueryRowContext(ctx, "SELECT min(id) FROM "+table).Scan(&oldest); err != nil {
			return 0, 0, false, err
		}
		if oldest.Valid && oldest.Int64 < before {
			return kind(k), before, true, nil
		}
	}
	pages, free, err := d.pages(ctx)
	if err != nil || pages-free <= d.maxPages/8*7 {
		return 0, 0, false, err
	}
	held, err := d.held(ctx, d.writer)
	if err != nil {
		return 0, 0, false, err
	}
	for other := range kinds {
		if held[other].bytes/shares[other] > held[k].bytes/shares[k] {
			k = other
		}
	}
	return k, 1<<63 - 1, held[k].rows > 0, nil
}

// forget deletes the oldest rows of a kind below the id.
func (d *database) forget(ctx context.Context, k kind, id int64) error {
	oldest := fmt.Sprintf("FROM %s WHERE id < ? ORDER BY id LIMIT %d", tables[k], pruneRows)
	return d.transact(ctx, func(tx *sql.Tx) error {
		var rows, bytes, last int64
		if err := tx.QueryRowContext(ctx, "SELECT count(*), coalesce(sum(octet_length(record)), 0), coalesce(max(id), 0) FROM (SELECT id, record "+oldest+")", id).
			Scan(&rows, &bytes, &last); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM "+tables[k]+" WHERE id <= ?", last); err != nil {
			return err
		}
		return hold(ctx, tx, k, -rows, -bytes)
	})
}

// shrink gives pages back when the bound was larger once.
func (d *database) shrink(ctx context.Context) error {
	pages, _, err := d.pages(ctx)
	if err == nil && pages > d.maxPages {
		_, err = d.writer.ExecContext(ctx, fmt.Sprintf("PRAGMA incremental_vacuum(%d)", min(pages-d.maxPages, 4096)))
	}
	if err != nil {
		return fmt.Errorf("shrink telemetry store: %w", err)
	}
	return nil
}

// pages returns how many pages the file has, and how many of them are free.
func (d *database) pages(ctx context.Context) (all, free int64, err error) {
	err = d.writer.QueryRowContext(ctx, "SELECT page_count, freelist_count FROM pragma_page_count, pragma_freelist_count").Scan(&all, &free)
	return all, free, err
}

type holding struct{ rows, bytes int64 }

func (d *database) held(ctx context.Context, from *sql.DB) (held [kinds]holding, err error) {
	rows, err := from.QueryContext(ctx, "SELECT kind, rows, bytes FROM held WHERE kind < ?", kinds)
	if err != nil {
		return held, err
	}
	defer rows.Close()
	for rows.Next() {
		var k kind
		var h holding
		if err := rows.Scan(&k, &h.rows, &h.bytes); err != nil {
			return held, err
		}
		held[k] = h
	}
	return held, rows.Err()
}

func (d *database) transact(ctx context.Context, do func(*sql.Tx) error) error {
	tx, err := d.writer.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := do(tx); err != nil {
		_ = tx.Rollback() // the first error is the one to tell
		return err
	}
	if err := tx.Commit(); err != nil {
		_, _ = d.writer.ExecContext(ctx, "ROLLBACK") // SQLite may keep a transaction open that it could not commit
		return err
	}
	return nil
}

// unixNano returns 0 for the zero time.
func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}
