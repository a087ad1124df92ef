package local_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport.dev/budget"
	"sallyport.dev/budget/local"
	"sallyport.dev/segment"
)

var now = time.Date(2026, time.November, 23, 20, 3, 17, 0, time.UTC)

func open(t *testing.T, path string) *local.Counters {
	t.Helper()
	c, err := local.Open(path, now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func charge(caller string, most, amount int64) []budget.Charge {
	return []budget.Charge{{Account: budget.Account{Grant: "g", Caller: caller, Unit: budget.Tokens, Per: segment.Day}, Max: most, Amount: amount}}
}

func reserve(t *testing.T, c *local.Counters, charges []budget.Charge) budget.Answer {
	t.Helper()
	answer, err := c.Reserve(t.Context(), now, charges)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func used(t *testing.T, c *local.Counters) int64 {
	t.Helper()
	all, err := c.Balances(t.Context(), now)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		return 0
	}
	return all[0].Used
}

// The process that is killed is this test's own program: it reserves until it dies, and says so after each.
func TestKilled(t *testing.T) {
	const variable = "SALLYPORT_TEST_BUDGETS"
	if path := os.Getenv(variable); path != "" {
		c := open(t, path)
		for {
			if !reserve(t, c, charge("a", segment.MaxLimit, 1)).Allowed {
				t.Fatal("not allowed")
			}
			fmt.Println("granted")
		}
	}
	path := filepath.Join(t.TempDir(), "budgets")
	var before int64
	for range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), variable+"="+path)
		out := &counting{enough: make(chan struct{})}
		cmd.Stdout = out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-out.enough
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		after := used(t, open(t, path))
		if after < before+out.n || after > before+out.n+100 { // it may have been killed before it could say so
			t.Errorf("%d were granted, %d are counted", out.n, after-before)
		}
		before = after
	}
}

// counting counts the lines of the child.
type counting struct {
	n      int64
	enough chan struct{}
	once   sync.Once
}

func (c *counting) Write(text []byte) (int, error) {
	c.n += int64(bytes.Count(text, []byte("granted\n")))
	if c.n > 200 {
		c.once.Do(func() { close(c.enough) })
	}
	return len(text), nil
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "budgets")
	c := open(t, path)
	reserve(t, c, charge("a", 100, 60))
	first := reserve(t, c, charge("a", 100, 30))
	if reserve(t, c, charge("a", 100, 11)).Allowed {
		t.Error("more than there is")
	}
	if err := c.Settle(t.Context(), now, budget.Settlement{Account: first.Balances[0].Account, Window: first.Balances[0].Window, Reserved: 30, Used: 10}); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	damaged := func(i int) []byte {
		bad := bytes.Clone(lines[i])
		bad[len(bad)/2] ^= 1
		return bytes.Join([][]byte{bytes.Join(lines[:i], nil), bad, bytes.Join(lines[i+1:], nil)}, nil)
	}
	for name, want := range map[string]struct {
		text []byte
		used int64
	}{
		"whole":                  {text, 70},
		"the end is missing":     {text[:len(text)-5], 90},
		"a line is broken":       {damaged(2), 70},
		"the last one is broken": {damaged(3), 90},
		"a very long line":       {append(bytes.Repeat([]byte("x"), 1<<20), append([]byte("\n"), 0)...), -1},
		"long between":           {bytes.Replace(text, lines[1], append(bytes.Repeat([]byte("x"), 10_000), '\n'), 1), 70},
		"empty":                  {nil, 0},
		"hardly begun":           {text[:5], 0},
		"something else":         {[]byte("#!/bin/sh\nexit\n"), -1},
		"another version":        {bytes.Replace(text, []byte("budgets 1"), []byte("budgets 2"), 1), -1},
	} {
		path := filepath.Join(t.TempDir(), "budgets")
		if err := os.WriteFile(path, want.text, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := local.Open(path, now, slog.New(slog.DiscardHandler))
		if (err != nil) != (want.used < 0) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil && used(t, c) != want.used {
			t.Errorf("%s: %d used, want %d", name, used(t, c), want.used)
		}
		if again, err := os.ReadFile(path); want.used < 0 && (err != nil || !bytes.Equal(again, want.text)) {
			t.Errorf("%s: a file that is not ours was changed", name)
		}
	}
}

// A file that can't be written to gives nothing.
func TestNoDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "budgets")
	c := open(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Run(ctx); err != nil { // closes the file
		t.Fatal(err)
	}
	if answer, err := c.Reserve(t.Context(), now, charge("a", 100, 1)); err == nil || answer.Allowed {
		t.Errorf("%v %v", answer, err)
	}
	if used(t, c) != 0 {
		t.Error("what was not given is counted")
	}
	if _, err := local.Open("/dev/full/budgets", now, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("opened where there is no folder")
	}
}

// The file does not grow without bound, and what is over is forgotten.
func TestShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "budgets")
	synctest.Test(t, func(t *testing.T) {
		c, err := local.Open(path, time.Now(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		var largest int64
		for i := range 40_000 {
			answer, err := c.Reserve(ctx, time.Now(), charge(fmt.Sprint(i%50), segment.MaxLimit, 1))
			if err != nil || !answer.Allowed {
				t.Fatal(answer, err)
			}
			if i%1000 == 0 {
				time.Sleep(time.Second) // of the bubble's clock: Run's next tick
				synctest.Wait()
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				largest = max(largest, info.Size())
			}
		}
		if largest > 6<<20 {
			t.Errorf("%d bytes", largest)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		all, err := local.ReadFile(path, time.Now())
		if err != nil || len(all) != 50 || all[0].Used != 800 {
			t.Errorf("%v %v", all, err)
		}
		if all, err := local.ReadFile(path, time.Now().AddDate(0, 0, 1)); err != nil || len(all) != 0 {
			t.Errorf("the next day: %v %v", all, err)
		}
	})
}

// Everybody at once gets no more than there is.
func TestTogether(t *testing.T) {
	c := open(t, filepath.Join(t.TempDir(), "budgets"))
	granted := make(chan int64, 8)
	for range 8 {
		go func() {
			var n int64
			for range 200 {
				if answer, err := c.Reserve(context.Background(), now, charge("", 1000, 1)); err == nil && answer.Allowed {
					n++
				}
			}
			granted <- n
		}()
	}
	var n int64
	for range 8 {
		n += <-granted
	}
	if n != 1000 {
		t.Errorf("%d granted", n)
	}
}
