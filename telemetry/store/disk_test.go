package store

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"sallyport.dev/telemetry"
)

// logged is a log that a test can read while it is written.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logged) count(text string) int {
	return strings.Count(l.String(), text)
}

// A disk without room: records stay in memory and can be read, what was written can be read too, one line is logged,
// and everything is written when there is room again.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		// fill makes the next write fail for want of room, until release.
		prepare func(t *testing.T) (dir string)
		fill    func(t *testing.T, s *Store, dir string) (release func())
	}{
		{"file system", smallDisk, func(t *testing.T, _ *Store, dir string) func() {
			filler := filepath.Join(dir, "filler")
			f, err := os.Create(filler)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for size := 1 << 20; size > 0; { // to the last byte
				if _, err := f.Write(make([]byte, size)); err != nil {
					size /= 2
				}
			}
			return func() {
				if err := os.Remove(filler); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"SQLite", func(t *testing.T) string { return t.TempDir() }, func(t *testing.T, s *Store, _ string) func() {
			bound := func(pages string) {
				if _, err := s.db.writer.ExecContext(t.Context(), "PRAGMA max_page_count = "+pages); err != nil {
					t.Fatal(err)
				}
			}
			bound("1") // SQLite takes it for as many as there are
			return func() { bound("100000") }
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := test.prepare(t)
			log := &logged{}
			s, _ := start(t, Config{Path: filepath.Join(dir, "telemetry.db"), Log: slog.New(slog.NewTextHandler(log, nil))})
			for n := range 100 {
				s.Add(flowOf(n))
			}
			written(t, s)
			release := test.fill(t, s, dir)
			n := 100
			for ; s.Stats(t.Context()).Problem == ""; n++ {
				s.Add(flowOf(n))
			}
			for end := n + 500; n < end; n++ {
				s.Add(flowOf(n))
			}
			list, err := s.Flows(t.Context(), telemetry.FlowFilter{Limit: 10_000})
			if err != nil || len(list) != min(n, 10_000) || list[0].ID != fmt.Sprint("r-", n-1) {
				t.Fatalf("%d of %d flows, %v", len(list), n, err)
			}
			release()
			written(t, s)
			if got := s.Stats(t.Context()).Flows; got.Rows != int64(n) || got.Dropped != 0 {
				t.Errorf("%+v, want %d rows", got, n)
			}
			until(t, "the log says so", func() bool { return log.count("writes again") > 0 })
			if fails, again := log.count("cannot write"), log.count("writes again"); fails != 1 || again != 1 {
				t.Errorf("logged %d failures and %d recoveries, want one of each", fails, again)
			}
		})
	}
}

// smallDisk is a file system of 8 MiB.
func smallDisk(t *testing.T) string {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("cannot mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// killedPath tells the test binary to be the process that TestKill kills.
const killedPath = "SALLYPORT_TEST_STORE"

func TestMain(m *testing.M) {
	if path := os.Getenv(killedPath); path != "" {
		writeUntilKilled(path)
	}
	os.Exit(m.Run())
}

// writeUntilKilled prints how many flows are in the file, again and again.
func writeUntilKilled(path string) {
	s := New(Config{Path: path})
	go func() { _ = s.Run(context.Background()) }()
	for n := 0; ; n++ {
		s.Add(flowOf(n))
		if n%100 == 0 {
			fmt.Println(s.Stats(context.Background()).Flows.Rows)
		}
	}
}

func TestKill(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "telemetry.db")
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killedPath+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var told, last int64
		for lines := bufio.NewScanner(out); lines.Scan(); {
			n, err := strconv.ParseInt(lines.Text(), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			if told = max(told, n); last == 0 && n > 0 {
				last = n
			}
			if last > 0 && n > last+500 { // in the middle of its writing
				break
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()

		log := &logged{}
		s, stop := start(t, Config{Path: path, Log: slog.New(slog.NewTextHandler(log, nil))})
		s.Add(flowOf(1_000_000 + round))
		written(t, s)
		if got := s.Stats(t.Context()).Flows.Rows; got < told+1 {
			t.Errorf("round %d: %d flows are left of %d that were written", round, got, told)
		}
		var whole string
		if err := s.db.reader.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&whole); err != nil || whole != "ok" {
			t.Errorf("round %d: %s, %v", round, whole, err)
		}
		var rows, held int64
		if err := s.db.reader.QueryRowContext(t.Context(), "SELECT (SELECT count(*) FROM flows), (SELECT rows FROM held WHERE kind = 0)").
			Scan(&rows, &held); err != nil || rows != held {
			t.Errorf("round %d: %d rows, %d counted, %v", round, rows, held, err)
		}
		stop()
		if log.count("broken") != 0 {
			t.Errorf("round %d: %s", round, log)
		}
	}
}

// Failures are told once, and so is the end of them.
func TestReport(t *testing.T) {
	log := &logged{}
	s := New(Config{Log: slog.New(slog.NewTextHandler(log, nil))})
	for range 2 {
		for _, err := range []error{nil, nil, errors.New("no room"), errors.New("no room"), errors.New("no disk"), nil} {
			s.report(err)
		}
	}
	if log.count("cannot write") != 2 || log.count("writes again") != 2 || s.Stats(t.Context()).Problem == "no disk" {
		t.Errorf("logged: %s", log)
	}
}

// While a batch is in the file and still in memory, it is seen once.
func TestBetweenCommitAndLettingGo(t *testing.T) {
	s := New(Config{Path: filepath.Join(t.TempDir(), "telemetry.db")})
	defer s.close()
	db, err := s.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	once := func(when string) {
		t.Helper()
		list, err := s.Flows(t.Context(), telemetry.FlowFilter{})
		if err != nil || len(list) != 1 {
			t.Errorf("%s: %d flows, %v", when, len(list), err)
		}
		traces, err := s.Traces(t.Context(), telemetry.FlowFilter{})
		if err != nil || len(traces) != 1 || traces[0].Flows != 1 || traces[0].Spans != 1 {
			t.Errorf("%s: %+v, %v", when, traces, err)
		}
	}
	s.Add(flowOf(0))
	s.AddSpans([]telemetry.Span{spanOf(0, 0, telemetry.FromGateway)})
	once("in memory")
	b := s.batch()
	if err := db.write(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	once("in both")
	s.written(&b)
	once("in the file")
}
