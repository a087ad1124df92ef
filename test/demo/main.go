// Command demo runs a real RAG application through a real gateway and checks, on the wire, that every request was
// decided as the grants say. It is what `make demo` runs, and with -stay what `make up` runs.
//
// It exits with 0 only if everything was seen as expected: by the application, which got the status, and by the
// gateway, which reports verdict and grant.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
)

func main() {
	stay := flag.Bool("stay", false, "start everything, fill the collections, and stay until Ctrl-C")
	flag.Parse()
	runtime.LockOSThread() // children are told when the thread that started them ends: it is this one
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	d, err := newDemo()
	if err == nil {
		err = d.play(ctx, *stay)
		d.stop()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: error: %v\n", err)
		os.Exit(1)
	}
}

// saying shows progress on a terminal, and nothing in a pipe.
func saying(format string, args ...any) {
	if term.IsTerminal(int(os.Stderr.Fd())) {
		fmt.Fprintf(os.Stderr, "\r\033[K· "+format, args...)
	}
}

func (d *demo) play(ctx context.Context, stay bool) error {
	began := time.Now()
	saying("starting llama.cpp, Chroma and Sallyport with Envoy")
	documents, err := d.everything(ctx)
	if err != nil {
		return err
	}
	started := time.Since(began)

	saying("curator makes two collections, indexer fills one")
	var seen []attempt
	curated, err := d.whole(&seen, "curator", "curator.py")
	if err != nil {
		return err
	}
	payroll := ""
	for _, line := range curated {
		if line.Collection == "payroll" {
			payroll = line.ID
		}
	}
	if payroll == "" {
		return errors.New("curator made no collection payroll")
	}
	if _, err := d.whole(&seen, "indexer", "indexer.py", "index", "--root", d.root, "--cache", filepath.Join(d.work, "vectors.json")); err != nil {
		return err
	}
	if stay {
		return d.staying(ctx, started)
	}

	expired, err := d.brief()
	if err != nil {
		return err
	}
	// A stream of requests that goes on while the SVID under it is renewed.
	rotating, err := d.launch("rag-app", "rag_app.py", "watch", "--operation", "Infer", "--tokens", "4", "--pause", "0.2")
	if err != nil {
		return err
	}
	saying("rag-app answers a question, and tries what it may not")
	asked, err := d.whole(&seen, "rag-app", "rag_app.py", "ask")
	if err != nil {
		return err
	}
	if _, err := d.whole(&seen, "rag-app", "rag_app.py", "ask", "--no-stream", "How does a gateway decide?"); err != nil {
		return err
	}
	for _, probe := range [][]string{
		{"indexer", "indexer.py", "probe"},
		{"rag-app", "rag_app.py", "probe", "--payroll", payroll},
		{"intern", "intern.py"},
	} {
		if _, err := d.whole(&seen, probe[0], probe[1:]...); err != nil {
			return err
		}
	}
	saying("four callers without a valid identity knock")
	refused, err := d.strangers(expired)
	if err != nil {
		return err
	}
	saying("rag-app's grant is removed while it reads")
	removal, err := d.removeGrant(ctx, documents)
	if err != nil {
		return err
	}
	rotation, err := d.awaitRotation(ctx, rotating)
	if err != nil {
		return err
	}
	saying("reading what the gateway saw")
	r := report{attempts: seen, strangers: refused, removal: removal, rotation: rotation, began: began, started: started}
	for _, line := range asked {
		if line.Question != "" {
			r.question, r.answer, r.sources, r.trace = line.Question, line.Answer, line.Sources, line.TraceID
		}
	}
	if err := d.collect(ctx, &r); err != nil {
		return err
	}
	saying("")
	return r.print(os.Stdout, d)
}

// whole runs an application to its end and keeps what it attempted.
func (d *demo) whole(seen *[]attempt, name string, args ...string) ([]attempt, error) {
	a, err := d.launch(name, args...)
	if err != nil {
		return nil, err
	}
	lines, err := a.finish()
	for _, line := range lines {
		if line.What != "" {
			*seen = append(*seen, line)
		}
	}
	var exit interface{ ExitCode() int }
	if errors.As(err, &exit) && exit.ExitCode() == 1 && len(lines) > 0 {
		err = nil // something was not as it expected: the report shows what
	}
	return lines, err
}

// removed says what happened when a grant was taken away under a running application.
type removed struct {
	before, after time.Duration // from saving the file: to the last request that was answered, and the first that was denied
	answered      int
	first         attempt // the first denied
}

func (d *demo) removeGrant(ctx context.Context, documents string) (removed, error) {
	a, err := d.launch("rag-app", "rag_app.py", "watch", "--operation", "Read", "--pause", "0.005")
	if err != nil {
		return removed{}, err
	}
	defer func() {
		_ = a.cmd.Process.Signal(syscall.SIGTERM)
		_, _ = a.finish() // it ends with 1, because it was denied
	}()
	var out removed
	var saved time.Time
	deadline := time.After(30 * time.Second)
	for {
		select {
		case line, ok := <-a.lines:
			switch {
			case !ok:
				return out, fmt.Errorf("rag-app ended before its grant did: %s", a.errs)
			case line.GotStatus == 403:
				out.after = at(line).Add(time.Duration(line.MS * 1e6)).Sub(saved)
				out.first = line
				return out, nil
			case line.OK:
				out.answered++
				out.before = at(line).Sub(saved)
			default:
				return out, fmt.Errorf("rag-app got status %d", line.GotStatus)
			}
			if out.answered == 20 && saved.IsZero() {
				if err := os.Remove(filepath.Join(documents, "grant-rag-reads.yaml")); err != nil {
					return out, err
				}
				saved = time.Now()
			}
		case <-deadline:
			return out, errors.New("the removed grant did not bite within 30 s")
		case <-ctx.Done():
			return out, ctx.Err()
		}
	}
}

func at(a attempt) time.Time { return time.UnixMicro(int64(a.TS * 1e6)) }

// rotated says how an application fared whose SVID was renewed under it.
type rotated struct{ requests, failed, rotations int }

func (d *demo) awaitRotation(ctx context.Context, a *app) (rotated, error) {
	var out rotated
	deadline := time.After(90 * time.Second)
	after := 0
	for after < 10 { // some requests behind the rotation too
		select {
		case line, ok := <-a.lines:
			if !ok {
				return out, fmt.Errorf("rag-app ended before its SVID was renewed: %s", a.errs)
			}
			out.requests++
			if !line.OK {
				out.failed++
			}
			if out.rotations = line.Rotations; line.Rotations > 0 {
				after++
			} else {
				saying("waiting for the one-minute SVID to be renewed: %d requests so far", out.requests)
			}
		case <-deadline:
			return out, errors.New("the SVID was not renewed within 90 s")
		case <-ctx.Done():
			return out, ctx.Err()
		}
	}
	_ = a.cmd.Process.Signal(syscall.SIGTERM)
	rest, err := a.finish()
	for _, line := range rest {
		out.requests++
		if !line.OK {
			out.failed++
		}
	}
	return out, err
}

// staying leaves everything running and says how to use it.
func (d *demo) staying(ctx context.Context, started time.Duration) error {
	saying("")
	fmt.Printf("Everything runs (started in %.1f s). Ctrl-C ends it.\n\n", started.Seconds())
	fmt.Printf("  documents   %s\n", filepath.Join(d.work, "documents"))
	fmt.Printf("  logs        %s\n\nAsk a question, in another terminal:\n\n", filepath.Join(d.work, "*.log"))
	fmt.Printf("  cd %s\n", filepath.Join(d.root, "examples/rag"))
	for _, e := range d.environment() {
		fmt.Printf("  export %s\n", e)
	}
	fmt.Printf("  %s rag_app.py ask \"What is a grant?\"\n\nLook at it:\n\n", filepath.Join(d.parts, "apps/rag-app/bin/python"))
	fmt.Printf("  export SALLYPORT_STATE=%s PATH=%s:$PATH\n", d.state, filepath.Join(d.parts, "bin"))
	fmt.Print("  sallyport status\n  sallyport flows --follow\n  sallyport traces\n  sallyport explain --caller rag-app\n")
	<-ctx.Done()
	return nil
}

func short(id string) string {
	if i := strings.LastIndexByte(id, '/'); i >= 0 {
		return id[i+1:]
	}
	return id
}
