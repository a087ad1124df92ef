package filesource

import (
	"cmp"
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"sallyport.dev/api/v1alpha1"
)

const (
	// quiet is how long nothing must have changed before the files are read: most writers are done by then.
	quiet = 20 * time.Millisecond
	// patience is how long a writer who never stops can keep the others waiting.
	patience = 200 * time.Millisecond
	// round is how often the files are read although no change was reported: file systems over a network report
	// none, and neither does a file behind a link that leads elsewhere.
	round = 2 * time.Second
)

// Source follows a folder or a file. The folder may vanish and come back.
type Source struct {
	Path string
	Log  *slog.Logger

	blindly time.Duration // instead of round, if not zero: a test that shows that changes are noticed makes it long
}

// Run sends a snapshot of the files at once, and another after each change of their content, until ctx is done. A
// snapshot that nobody received is dropped for a newer one, so whoever receives from an unbuffered channel always
// gets the newest. It returns nil, or why there is no way to tell where the files are.
func (s Source) Run(ctx context.Context, out chan<- v1alpha1.Snapshot) error {
	root, err := filepath.Abs(s.Path)
	if err != nil {
		return err
	}
	watch := newWatch(root, s.Log)
	defer watch.close()
	tick := time.NewTicker(cmp.Or(s.blindly, round))
	defer tick.Stop()

	var (
		reader  reader
		all     bool                     // read files also if they look as before
		edited  bool                     // what was read is not what was handed out
		newest  v1alpha1.Snapshot        // to be sent
		send    chan<- v1alpha1.Snapshot // out, while there is one to be sent
		noticed = time.Now()             // the first change that was not read yet; zero: there is none
		settled = time.After(0)          // when to read
	)
	change := func() {
		now := time.Now()
		if noticed.IsZero() {
			noticed = now
		}
		settled = time.After(min(quiet, time.Until(noticed.Add(patience))))
	}
	for {
		select {
		case <-ctx.Done():
			return nil

		case event := <-watch.events: // 1. something changed
			if watch.concerns(event) {
				change()
			}

		case err := <-watch.errors: // 2. too much changed
			s.Log.Warn("lost track of changed files", "path", s.Path, "error", err)
			change()

		case <-tick.C: // 3. perhaps something changed
			all = true
			if noticed.IsZero() {
				change()
			}

		case <-settled: // 4. nothing changed any more
			settled = nil
			watch.renew()
			edited = reader.read(s.Path, watch.add, all) || edited
			all = false
			// A file that moves while files are read may be in neither place, and a Deny with it: what counts is what is found
			// twice.
			if reader.read(s.Path, watch.add, all) {
				edited = true
				if time.Since(noticed) < patience {
					change()
					continue
				}
			}
			if edited {
				if send != nil {
					noticed = newest.Noticed // that one was never received
				}
				newest, send = v1alpha1.Snapshot{Files: reader.decode(), Noticed: noticed}, out
			}
			noticed, edited = time.Time{}, false

		case send <- newest: // 5. somebody wants to know
			newest, send = v1alpha1.Snapshot{}, nil
		}
	}
}

// watch reports changes in folders. The zero value reports none.
type watch struct {
	root    string // the absolute path of the folder or file that is followed
	log     *slog.Logger
	watcher *fsnotify.Watcher
	events  <-chan fsnotify.Event
	errors  <-chan error
}

func newWatch(root string, log *slog.Logger) watch {
	w := watch{root: root, log: log}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("changed files are noticed late", "path", root, "error", err)
		return w
	}
	w.watcher, w.events, w.errors = watcher, watcher.Events, watcher.Errors
	return w
}

func (w watch) close() {
	if w.watcher != nil {
		w.watcher.Close()
	}
}

// renew forgets all folders: by the same names there may be others now, and to add a name again promises nothing.
func (w watch) renew() {
	if w.watcher == nil {
		return
	}
	for _, folder := range w.watcher.WatchList() {
		_ = w.watcher.Remove(folder) // it may have gone by itself
	}
}

// add watches a folder. One that is not there is noticed by the folder above it, or on the next round.
func (w watch) add(folder string) {
	if w.watcher == nil {
		return
	}
	if absolute, err := filepath.Abs(folder); err == nil {
		_ = w.watcher.Add(absolute)
	}
}

// concerns reports whether an event can have changed what is read. Of the folder around the root that is the root
// itself, and the "..data" that it may lead through; the rest belongs to others.
func (w watch) concerns(e fsnotify.Event) bool {
	return e.Name == w.root || filepath.Dir(e.Name) != filepath.Dir(w.root) || strings.HasPrefix(filepath.Base(e.Name), "..")
}
