package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

// Tally counts the flows that match, those alike together, and hands out each tally, the largest first; what is not
// written yet comes in tallies of its own before them, so the same may come twice. With shadowed it counts only what
// shadow grants were asked about, too. The filter's Limit plays no part: it is for each to keep no more than it can.
// Nothing is written while each runs. With ErrMemoryOnly, what was handed out is not all.
func (s *Store) Tally(ctx context.Context, filter telemetry.FlowFilter, shadowed bool, each func(telemetry.Tally)) error {
	waiting, below := s.waitingFlows()
	for _, t := range tallied(waiting, filter, shadowed) {
		each(*t)
	}
	return s.read(ctx, func(db *database) error {
		where, args := where(filter, below)
		if shadowed {
			where += " AND json_extract(record, '$.shadow') IS NOT NULL"
		}
		// What a filter does not need stands in the record only. It is parsed once for all that is taken from it.
		return query(ctx, db, `SELECT caller, endpoint, verdict, said, count(*) AS n, min(time), max(time), min(id), max(id) FROM (
			SELECT caller, endpoint, verdict, time, id,
				json_extract(record, '$.operation', '$.resource', '$.rule', '$.shadow', '$.shadow_rule') AS said
			FROM flows WHERE `+where+`) GROUP BY caller, endpoint, verdict, said ORDER BY n DESC, max(id) DESC`, args,
			func(rows *sql.Rows) error {
				t, err := scanTally(rows)
				if err == nil {
					each(t)
				}
				return err
			})
	})
}

// tallied counts what is in memory.
func tallied(waiting []item[telemetry.Flow], filter telemetry.FlowFilter, shadowed bool) map[telemetry.Judged]*telemetry.Tally {
	tallies := map[telemetry.Judged]*telemetry.Tally{}
	for _, i := range waiting {
		f := i.value
		if !filter.Match(f) || shadowed && f.Shadow == "" {
			continue
		}
		t := tallies[f.Judged()]
		if t == nil {
			t = &telemetry.Tally{}
			tallies[f.Judged()] = t
		}
		t.Add(telemetry.Tally{Judged: f.Judged(), Count: 1, First: f.Time, Last: f.Time, FirstSeq: i.seq, LastSeq: i.seq})
	}
	return tallies
}

func scanTally(rows *sql.Rows) (t telemetry.Tally, err error) {
	var caller string
	var said sql.RawBytes
	var first, last int64
	if err := rows.Scan(&caller, &t.Endpoint, &t.Verdict, &said, &t.Count, &first, &last, &t.FirstSeq, &t.LastSeq); err != nil {
		return t, err
	}
	var fields [5]string // null is ""
	if err := json.Unmarshal(said, &fields); err != nil {
		return t, fmt.Errorf("%w %d: %w", errUnreadable, t.LastSeq, err)
	}
	t.Operation, t.Resource, t.Rule = segment.Operation(fields[0]), fields[1], fields[2]
	t.Shadow, t.ShadowBy = telemetry.Verdict(fields[3]), fields[4]
	if caller != "" {
		if t.Caller, err = spiffeid.FromString(caller); err != nil {
			return t, fmt.Errorf("%w %d: %w", errUnreadable, t.LastSeq, err)
		}
	}
	t.First, t.Last = time.Unix(0, first).UTC(), time.Unix(0, last).UTC()
	return t, nil
}

// Examples names the first and the last request that a tally counts, as far as the store still has them.
func (s *Store) Examples(ctx context.Context, t telemetry.Tally) ([]telemetry.Example, error) {
	var examples []telemetry.Example
	add := func(f telemetry.Flow) {
		examples = append(examples, telemetry.Example{ID: f.ID, TraceID: f.TraceID, Time: f.Time})
	}
	waiting, below := s.waitingFlows()
	err := s.read(ctx, func(db *database) error {
		return query(ctx, db, "SELECT record, id FROM flows WHERE id IN (?, ?) AND id < ? ORDER BY id", []any{t.FirstSeq, t.LastSeq, below},
			func(rows *sql.Rows) error {
				f, err := scanFlow(rows)
				if err == nil {
					add(f)
				}
				return err
			})
	})
	for _, i := range waiting {
		if i.seq == t.FirstSeq || i.seq == t.LastSeq {
			add(i.value)
		}
	}
	return examples, err
}

// Since returns when the oldest flow was received that the store still has; zero: it has none. All that it was told of
// and did not count as dropped since then it has, too.
func (s *Store) Since(ctx context.Context) (time.Time, error) {
	waiting, oldest := s.waitingFlows()
	err := s.read(ctx, func(db *database) error {
		var id sql.NullInt64
		if err := db.reader.QueryRowContext(ctx, "SELECT min(id) FROM flows").Scan(&id); err != nil {
			return err
		}
		if id.Valid {
			oldest = min(oldest, id.Int64)
		} else if len(waiting) == 0 {
			oldest = 0
		}
		return nil
	})
	if err != nil || oldest == 0 {
		return time.Time{}, err
	}
	return time.UnixMicro(oldest).UTC(), nil
}
