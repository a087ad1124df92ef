// Command bench measures what Sallyport costs and how fast it obeys, beside an Envoy configured by hand for the least
// that would do, and beside no gateway at all.
//
// It is for whoever changes the data path or the compiler, and for docs/performance.md. Everything runs on this
// machine in one interleaved run (A B C A B C …), so that what the machine does meanwhile hits all alike: trust the
// ratios, not the times. It measures CPU by what the kernel counts for the processes, never by their own word, and
// it never touches anything outside of a folder of its own.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"sallyport.dev/controlplane/gateway"
)

type options struct {
	threads int           // worker threads of every Envoy
	rounds  int           // samples of each subject
	sample  time.Duration // of load
	changes int           // of a grant, each way
	sizes   []int         // numbers of grants

	envoy  string
	builds []build
	loads  string // part of the names of those to run; "": all
	only   string // part of the run; "": all of it
	folder string
}

// build is a sallyport to measure.
type build struct{ name, path string }

// Report is everything that was measured. Times are in microseconds of CPU per request, and as said.
type Report struct {
	Loads    []*Result `json:"loads"`
	Grants   []*Result `json:"grants"`
	Changes  []*Change `json:"changes"`
	Stages   []*Stages `json:"stages"`
	Catalog  []*Result `json:"catalog"`
	Identity *Identity `json:"identity"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	do := run
	if len(os.Args) > 1 && os.Args[1] == holdCommand {
		do = func(ctx context.Context) error { return hold(ctx, os.Args[2:]) }
	}
	if err := do(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench: error:", err)
		os.Exit(3)
	}
}

func run(ctx context.Context) error {
	var o options
	asked := false
	short := flag.Bool("short", false, "less of everything: for a look, not for a claim")
	out := flag.String("o", "", "write everything that was measured to this file, as JSON")
	flag.IntVar(&o.threads, "envoy-threads", 1, "worker threads of every Envoy")
	flag.IntVar(&o.rounds, "rounds", 15, "samples of each")
	flag.DurationVar(&o.sample, "sample", 400*time.Millisecond, "length of a sample")
	flag.StringVar(&o.envoy, "envoy", os.Getenv("ENVOY"), "path of Envoy; empty: from PATH or .parts/bin")
	flag.StringVar(&o.loads, "loads", "", "only loads whose name contains this")
	flag.StringVar(&o.only, "only", "", "only this part: loads, grants, stages, catalog or identity")
	flag.Func("build", "NAME=PATH of a sallyport to measure, instead of one built from this tree; may be repeated", func(s string) error {
		name, path, ok := strings.Cut(s, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=PATH", s)
		}
		o.builds = append(o.builds, build{name, path})
		return nil
	})
	o.sizes = []int{10, 1000, 10000, 100000}
	flag.Func("grants", "number of grants to measure with, instead of 10, 1000, 10000 and 100000; may be repeated", func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("%q is not a number of grants", s)
		}
		if !asked {
			o.sizes, asked = nil, true
		}
		o.sizes = append(o.sizes, n)
		return nil
	})
	flag.Parse()
	o.changes = 7
	if *short {
		o.rounds, o.sample, o.changes = 4, 250*time.Millisecond, 3
	}

	var err error
	if o.folder, err = os.MkdirTemp("", "bench"); err != nil {
		return err
	}
	defer os.RemoveAll(o.folder)
	if o.envoy, err = gateway.Find(ctx, o.envoy, ".parts/bin"); err != nil {
		return fmt.Errorf("find Envoy %s: %w; `make parts` fetches it", gateway.Version, err)
	}
	if o.builds == nil {
		path := filepath.Join(o.folder, "sallyport")
		if text, err := exec.CommandContext(ctx, "go", "build", "-o", path, "sallyport.dev/cmd/sallyport").CombinedOutput(); err != nil {
			return fmt.Errorf("build sallyport: %w\n%s", err, text)
		}
		o.builds = []build{{"sallyport", path}}
	}

	b := &bench{options: o}
	defer b.close()
	report, err := b.all(ctx)
	if err != nil {
		return err
	}
	if *out == "" {
		return nil
	}
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, append(text, '\n'), 0o644)
}

// bench is one run.
type bench struct {
	options
	backend *backend
	started []*process
}

func (b *bench) close() {
	for _, p := range b.started {
		p.stop()
	}
	if b.backend != nil {
		b.backend.close()
	}
}

func (b *bench) all(ctx context.Context) (*Report, error) {
	var err error
	if b.backend, err = startBackend(filepath.Join(b.folder, "sink.sock")); err != nil {
		return nil, err
	}
	r := &Report{}
	for _, part := range []struct {
		name string
		run  func(context.Context, *Report) error
	}{{"loads", b.measureLoads}, {"catalog", b.measureCatalog}, {"grants", b.measureGrants}, {"stages", b.measureStages}, {"identity", b.measureIdentity}} {
		if b.only != "" && b.only != part.name {
			continue
		}
		if err := part.run(ctx, r); err != nil {
			return nil, fmt.Errorf("measure %s: %w", part.name, err)
		}
	}
	return r, nil
}
