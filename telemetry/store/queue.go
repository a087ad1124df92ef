package store

import "sallyport.dev/telemetry"

// item is a record on its way to the file.
type item[T any] struct {
	seq   int64
	bytes int64
	value T
}

// queue holds records by seq, at most max bytes of them. Items are never changed in place, so a slice of them stays
// good when the queue moves on.
type queue[T any] struct {
	items   []item[T]
	bytes   int64
	max     int64
	dropped uint64
}

// push appends a record and lets the oldest go while there are too many bytes.
func (q *queue[T]) push(seq int64, v T, bytes int64) {
	q.items = append(q.items, item[T]{seq, bytes, v})
	q.bytes += bytes
	for q.bytes > q.max && len(q.items) > 1 {
		q.bytes -= q.items[0].bytes
		q.items = q.items[1:]
		q.dropped++
	}
}

// batch returns the oldest records, at most rows of them and, beyond the first, at most bytes.
func (q *queue[T]) batch(rows int, bytes int64) []item[T] {
	n := 0
	for n < min(rows, len(q.items)) {
		if bytes -= q.items[n].bytes; bytes < 0 && n > 0 {
			break
		}
		n++
	}
	return q.items[:n:n]
}

// written lets go of all records up to the last of a batch.
func (q *queue[T]) written(batch []item[T]) {
	if len(batch) == 0 {
		return
	}
	last := batch[len(batch)-1].seq
	for len(q.items) > 0 && q.items[0].seq <= last {
		q.bytes -= q.items[0].bytes
		q.items = q.items[1:]
	}
	if len(q.items) == 0 {
		q.items = nil // and the memory behind it
	}
}

// sizeOfFlow is about what a flow takes in memory and in the file.
func sizeOfFlow(f telemetry.Flow) int64 {
	return int64(600 + len(f.Path) + len(f.Detail) + len(f.Resource))
}

func sizeOfSpan(s telemetry.Span) int64 {
	return int64(400+len(s.Name)+len(s.Message)+len(s.Service)) + sizeOfValue(map[string]any(s.Attributes))
}

func sizeOfValue(v any) int64 {
	n := int64(16)
	switch v := v.(type) {
	case string:
		n += int64(len(v))
	case []any:
		for _, e := range v {
			n += sizeOfValue(e)
		}
	case map[string]any:
		for k, e := range v {
			n += int64(len(k)) + 16 + sizeOfValue(e)
		}
	}
	return n
}
