package federation

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"sallyport.dev/segment"
)

const (
	// How often keys are fetched when nobody says how often, which is what the specification recommends (SPIFFE
	// Federation, 4.1); and at most and at least, whatever anybody says.
	defaultHint            = 5 * time.Minute
	minRefresh, maxRefresh = time.Minute, 24 * time.Hour
	// How soon a failed fetch is tried again: at first, and after many failures.
	minRetry, maxRetry = 5 * time.Second, 10 * time.Minute
	// fetchTime is for all of a fetch, redirects and slow bodies included, and maxFetches are on their way at one time.
	fetchTime  = 30 * time.Second
	maxFetches = 8
)

// party is somebody whose keys are followed as a document D says, and the latest that is known of them. Only the
// engine's run calls it.
type party[D any] interface {
	// begin takes over the keys in the document, if they are not those that it last took over: then somebody has
	// written them because they are the latest.
	begin(D) error
	// ask prepares a fetch, by what is known now.
	ask(D) fetch
	// keep puts what was accepted at this time on the disk.
	keep(D, time.Time) error
}

// fetch asks for keys. It is called beside run, and touches nothing that is run's.
type fetch func(context.Context) (accept, error)

// accept takes over what was fetched and returns how long to wait before asking again, or refuses it. run calls it.
type accept func() (time.Duration, error)

// engine follows as many parties as there are documents: it decides when each is asked, and what becomes of the
// answer. run owns everything but wanted.
type engine[D comparable, P party[D]] struct {
	folder  folder
	log     *slog.Logger
	name    string         // of whom in the log
	id      func(D) string // who it is, for the folder, too: another's keys are never taken for its own
	who     func(D) string // for people
	restore func(D) P      // with what is on the disk
	publish func()         // something may have changed

	setting sync.Mutex
	wanted  chan []D // of size 1; newest wins

	relations map[string]*relation[D, P]
	results   chan result[D, P]
	fetching  int
	fetches   sync.WaitGroup
}

// relation is what there is with one party.
type relation[D comparable, P party[D]] struct {
	doc       D
	party     P
	next      time.Time
	failures  int
	err       error
	initially error              // what is wrong with the keys in the document
	attempt   int                // counts, so that the result of one that was given up is not taken for another's
	cancel    context.CancelFunc // of the fetch on its way; nil: none
}

// result is what has come of an attempt.
type result[D comparable, P party[D]] struct {
	relation *relation[D, P]
	attempt  int
	accept   accept
	err      error
}

// open opens the folder, and makes ready to follow nobody.
func (e *engine[D, P]) open(dir string) error {
	e.folder = folder(dir)
	e.wanted = make(chan []D, 1)
	e.relations = make(map[string]*relation[D, P])
	e.results = make(chan result[D, P])
	return e.folder.open()
}

// set says which documents there are from now on.
func (e *engine[D, P]) set(all []D) {
	e.setting.Lock()
	defer e.setting.Unlock()
	select {
	case <-e.wanted:
	default:
	}
	e.wanted <- all
}

// run follows until the context ends. It must run once only.
func (e *engine[D, P]) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer e.fetches.Wait()
	defer cancel()
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		select {
		case all := <-e.wanted: // 1. the documents have changed
			e.edit(all)
		case got := <-e.results: // 2. somebody has answered, or has not
			e.take(got)
		case <-wake.C: // 3. it is time
		case <-ctx.Done():
			return
		}
		e.begin(ctx)
		e.publish()
		if next := e.next(); !next.IsZero() {
			wake.Reset(time.Until(next))
		}
	}
}

// edit makes the relations those of the documents. What is known of others is dropped at once, here and on the disk.
func (e *engine[D, P]) edit(all []D) {
	now := time.Now()
	wanted := make(map[string]bool)
	for _, doc := range all {
		id := e.id(doc)
		wanted[id] = true
		n := e.relations[id]
		switch {
		case n == nil:
			n = &relation[D, P]{party: e.restore(doc), next: now}
			e.relations[id] = n
		case n.doc != doc:
			n.stop()
			n.next, n.failures, n.err = now, 0, nil
		}
		n.doc = doc
		n.initially = n.party.begin(doc)
	}
	for id, n := range e.relations {
		if !wanted[id] {
			n.stop()
			delete(e.relations, id)
			e.logOf(n.doc).Info("no longer followed")
		}
	}
	if err := e.folder.retain(wanted); err != nil {
		e.log.Warn("keys of others not removed", "error", err)
	}
}

func (e *engine[D, P]) logOf(doc D) *slog.Logger { return e.log.With(e.name, e.who(doc)) }

func (n *relation[D, P]) stop() {
	if n.cancel != nil {
		n.cancel()
		n.cancel = nil
	}
	n.attempt++
}

// hurry ends the wait for another attempt.
func (n *relation[D, P]) hurry() {
	if n.failures > 0 && n.cancel == nil {
		n.next = time.Now()
	}
}

// problem is why the latest is not known; "": it is.
func (n *relation[D, P]) problem() string {
	if err := errors.Join(n.err, n.initially); err != nil {
		return clip(err.Error())
	}
	return ""
}

// sorted is the relations in the order of their ids.
func (e *engine[D, P]) sorted() []*relation[D, P] {
	all := make([]*relation[D, P], 0, len(e.relations))
	for _, id := range slices.Sorted(maps.Keys(e.relations)) {
		all = append(all, e.relations[id])
	}
	return all
}

// next is when a fetch is to be begun; zero: not before something else happens.
func (e *engine[D, P]) next() time.Time {
	var first time.Time
	if e.fetching < maxFetches {
		for _, n := range e.relations {
			if n.cancel == nil && (first.IsZero() || n.next.Before(first)) {
				first = n.next
			}
		}
	}
	return first
}

// begin begins the fetches that are due, those first that have waited longest.
func (e *engine[D, P]) begin(ctx context.Context) {
	now := time.Now()
	waiting := e.sorted()
	slices.SortStableFunc(waiting, func(a, b *relation[D, P]) int { return a.next.Compare(b.next) })
	for _, n := range waiting {
		if n.cancel != nil || n.next.After(now) || e.fetching >= maxFetches {
			continue
		}
		n.initially = n.party.begin(n.doc)
		fetching, cancel := context.WithTimeout(ctx, fetchTime)
		n.attempt++
		n.cancel = cancel
		e.fetching++
		attempt, ask := n.attempt, n.party.ask(n.doc)
		e.fetches.Go(func() {
			defer cancel()
			got, err := ask(fetching)
			select {
			case e.results <- result[D, P]{n, attempt, got, err}:
			case <-ctx.Done():
			}
		})
	}
}

// take judges what has come of an attempt.
func (e *engine[D, P]) take(got result[D, P]) {
	e.fetching--
	n := got.relation
	if n.attempt != got.attempt {
		return // it was given up
	}
	n.stop()
	var wait time.Duration
	if n.err = got.err; n.err == nil {
		wait, n.err = got.accept()
	}
	now := time.Now()
	if n.err != nil {
		n.failures++
		n.next = now.Add(retryAfter(n.failures, rand.Float64())) //nolint:gosec // it keeps clients apart, and hides nothing
		e.logOf(n.doc).Warn("keys not fetched, the last good ones stay", "error", clip(n.err.Error()), "next", n.next)
		return
	}
	n.failures, n.next = 0, now.Add(wait)
	if n.err = n.party.keep(n.doc, now); n.err != nil {
		e.logOf(n.doc).Warn("keys not kept for a restart", "error", n.err)
	}
}

// refreshAfter is how long keys are not asked for again: as the document says, or else as they do themselves; 0: they
// don't.
func refreshAfter(document, hint time.Duration) time.Duration {
	return min(max(cmp.Or(document, hint, defaultHint), minRefresh), maxRefresh)
}

// retryAfter is how long it takes to the next attempt after so many failures; chance, from 0 to 1, keeps those apart
// who failed together.
func retryAfter(failures int, chance float64) time.Duration {
	wait := maxRetry
	if failures < 16 {
		wait = min(minRetry<<(failures-1), maxRetry)
	}
	return wait/2 + time.Duration(chance*float64(wait/2))
}

// begun is what is remembered of a party, whatever its keys look like.
type begun struct {
	initial string    // digest of the keys in the document that were last taken over; "": none
	fetched time.Time // zero: never
}

// with has the keys in a document, a text or a file, taken over if they are not those that were last. Those that
// were there and nobody has ever fetched go with them: then there is nothing to take, nil.
func (b *begun) with(text, path string, take func([]byte) error) error {
	document := []byte(text)
	switch {
	case path != "":
		var err error
		if document, err = readFile(path, segment.MaxBundle); err != nil {
			return err
		}
	case text == "":
		if b.initial == "" || !b.fetched.IsZero() {
			return nil
		}
		b.initial = ""
		return take(nil)
	}
	sum := digest(document)
	if sum == b.initial {
		return nil
	}
	if err := take(document); err != nil {
		return err
	}
	b.initial = sum
	return nil
}

// clip shortens what a stranger may have had a hand in.
func clip(s string) string {
	const most = 400
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
