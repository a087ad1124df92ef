// Package svidfile keeps an X.509-SVID, its key and its bundle in a folder, for programs that read files.
//
// It is for applications that cannot speak the Workload API. The three files change together: each generation is a
// folder of its own, and the names that programs open lead through one link, "current", which is renamed over. Opening
// a file always gives a whole one; a program that opens DIR/current once and the files in it has a pair that fits,
// because a generation is kept until the one after the next is written. It never logs a key, and never takes away what
// it wrote: an SVID that is not renewed ends by itself.
package svidfile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// The names of the files, all PEM: the chain with the SVID first, its PKCS #8 key, and whom to trust in the SVID's
// own trust domain.
const (
	SVIDFile   = "svid.pem"
	KeyFile    = "svid_key.pem"
	BundleFile = "bundle.pem"
)

const (
	current    = "current"     // link to the generation in force
	generation = "generation-" // and a random end: a folder with the three files
)

// Config says what to fetch and where to put it.
type Config struct {
	Addr string      // of the Workload API: unix:///path
	ID   spiffeid.ID // which of the caller's SVIDs; the zero value is the first
	Dir  string      // made with mode 0700 where there is none
	Log  *slog.Logger
}

// Fetch writes the SVID once, and returns it.
func Fetch(ctx context.Context, c Config) (*x509svid.SVID, error) {
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(c.Addr))
	if err != nil {
		return nil, fmt.Errorf("fetch SVID: %w", err)
	}
	return c.write(got)
}

// Watch writes the SVID whenever there is another, until the context ends or a file cannot be written. While there is
// no provider or no identity, what was written stays.
func Watch(ctx context.Context, c Config) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := workloadapi.WatchX509Context(ctx, &watcher{c, cancel}, workloadapi.WithAddr(c.Addr))
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return fmt.Errorf("watch SVID: %w", err)
}

type watcher struct {
	config Config
	end    context.CancelCauseFunc
}

func (w *watcher) OnX509ContextUpdate(got *workloadapi.X509Context) {
	svid, err := w.config.write(got)
	switch {
	case errors.Is(err, errNotEntitled):
		w.config.Log.Warn("identity not available", "caller", w.config.ID.String(), "error", err)
	case err != nil:
		w.end(err)
	default:
		w.config.Log.Info("identity written", "caller", svid.ID.String(), "until", svid.Certificates[0].NotAfter)
	}
}

func (w *watcher) OnX509ContextWatchError(err error) {
	w.config.Log.Warn("identity not available", "caller", w.config.ID.String(), "error", err)
}

var errNotEntitled = errors.New("the Workload API has no such identity for this process")

// write puts the wanted one of what was got into the folder.
func (c Config) write(got *workloadapi.X509Context) (*x509svid.SVID, error) {
	var svid *x509svid.SVID
	for _, s := range got.SVIDs {
		if svid == nil && (c.ID.IsZero() || s.ID == c.ID) {
			svid = s
		}
	}
	if svid == nil {
		return nil, fmt.Errorf("fetch SVID %s: %w", c.ID, errNotEntitled)
	}
	bundle, err := got.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, fmt.Errorf("fetch SVID: %w", err)
	}
	return svid, Write(c.Dir, svid, bundle)
}

// Write puts an SVID, its key and a bundle into a folder, all or nothing. It must not run twice at a time on one
// folder.
func Write(dir string, svid *x509svid.SVID, bundle *x509bundle.Bundle) error {
	if err := write(dir, svid, bundle); err != nil {
		return fmt.Errorf("write SVID: %w", err)
	}
	return nil
}

func write(dir string, svid *x509svid.SVID, bundle *x509bundle.Bundle) (err error) {
	chain, key, err := svid.Marshal()
	if err != nil {
		return err
	}
	ca, err := bundle.Marshal()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	old, err := os.Readlink(filepath.Join(dir, current))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fresh, err := os.MkdirTemp(dir, generation) // mode 0700
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(fresh)
		}
	}()
	for name, data := range map[string][]byte{SVIDFile: chain, KeyFile: key, BundleFile: ca} {
		if err := os.WriteFile(filepath.Join(fresh, name), data, 0o600); err != nil {
			return err
		}
		if err := link(dir, filepath.Join(current, name), name); err != nil {
			return err
		}
	}
	if err := link(dir, filepath.Base(fresh), current); err != nil {
		return err
	}
	return clean(dir, filepath.Base(fresh), old)
}

// link makes dir/name a link to the target, in place of what it was.
func link(dir, target, name string) error {
	path := filepath.Join(dir, name)
	if now, err := os.Readlink(path); err == nil && now == target {
		return nil
	}
	temp := filepath.Join(dir, ".new-"+name)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, temp); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// clean removes the generations that are neither in force nor the one before.
func clean(dir, now, before string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), generation) && e.Name() != now && e.Name() != before {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
