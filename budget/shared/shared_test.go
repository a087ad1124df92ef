package shared_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sallyport.dev/budget"
	"sallyport.dev/budget/shared"
	"sallyport.dev/segment"
)

// server is a Redis that can be stopped and started again. It listens at a Unix socket.
type server struct {
	t      *testing.T
	binary string
	socket string
	cmd    *exec.Cmd
}

func newServer(t *testing.T) *server {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	for _, path := range []string{"../../.parts/bin/redis-server", os.Getenv("REDIS_SERVER")} { // the last that is there
		if _, e := os.Stat(path); e == nil {
			binary, err = path, nil
		}
	}
	if err != nil {
		t.Fatalf("these tests need redis-server (`make clients`, or set $REDIS_SERVER): %v", err)
	}
	dir, err := os.MkdirTemp("/tmp", "sp")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, binary: binary, socket: filepath.Join(dir, "redis.sock")}
	t.Cleanup(func() {
		s.stop()
		os.RemoveAll(dir)
	})
	s.start()
	return s
}

func (s *server) start() {
	s.t.Helper()
	s.cmd = exec.Command(s.binary, "--port", "0", "--unixsocket", s.socket, "--save", "", "--dir", filepath.Dir(s.socket), "--maxmemory-policy", "noeviction")
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for tick := time.Tick(10 * time.Millisecond); ; <-tick {
		if c, err := net.Dial("unix", s.socket); err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal("redis-server does not listen")
		}
	}
}

func (s *server) stop() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// open returns the counters of another gateway.
func (s *server) open() *shared.Counters {
	s.t.Helper()
	c, err := shared.Open("unix://" + s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

func charge(grant string, unit budget.Unit, most, amount int64) budget.Charge {
	return budget.Charge{Account: budget.Account{Grant: "g", Caller: grant, Unit: unit, Per: segment.Month}, Max: most, Amount: amount}
}

// Gateways that ask at the same time give exactly what there is.
func TestGateways(t *testing.T) {
	s := newServer(t)
	granted := make(chan int64, 8)
	now := time.Now()
	for i := range 8 {
		c := s.open()
		go func() {
			var n int64
			for range 100 {
				answer, err := c.Reserve(context.Background(), now, []budget.Charge{
					charge("x", budget.Requests, 500, 1), charge("x", budget.Tokens, 3_000_000, int64(i))})
				if err == nil && answer.Allowed {
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
	if n != 500 {
		t.Errorf("%d were granted of 500", n)
	}
	all, err := s.open().Balances(t.Context(), now)
	if err != nil || len(all) != 2 || all[0].Used != 500 || all[0].Max != 500 || all[1].Held != all[1].Used {
		t.Errorf("%v %v", all, err)
	}
}

// The scripts do what a Ledger does.
func TestAgrees(t *testing.T) {
	s := newServer(t)
	c := s.open()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		ledger := budget.NewLedger(100)
		now := time.Now()
		var open []budget.Settlement
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			if len(open) > 0 && rapid.Bool().Draw(t, "settle") {
				settlement := open[0]
				open = open[1:]
				settlement.Used = rapid.Int64Range(0, 60).Draw(t, "used")
				if err := c.Settle(t.Context(), now, settlement); err != nil {
					t.Fatal(err)
				}
				if _, err := ledger.Settle(now, settlement); err != nil {
					t.Fatal(err)
				}
				continue
			}
			charges := []budget.Charge{charge(fmt.Sprint(run), budget.Requests, 10, 1), charge(fmt.Sprint(run), budget.Tokens, 100, rapid.Int64Range(-3, 50).Draw(t, "amount"))}
			want, err := ledger.Reserve(now, charges)
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.Reserve(t.Context(), now, charges)
			if err != nil || got.Allowed != want.Allowed || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("got %v, want %v (%v)", got, want, err)
			}
			if got.Allowed {
				open = append(open, budget.Settlement{Account: charges[1].Account, Window: got.Balances[1].Window, Reserved: max(0, charges[1].Amount)})
			}
		}
	})
}

// What was used beyond in a window that is over counts in this one, and nothing is given back there.
func TestWindowIsOver(t *testing.T) {
	c := newServer(t).open()
	now := time.Now()
	account := charge("x", budget.Tokens, 100, 10)
	before, _ := account.Per.Window(now)
	before, _ = account.Per.Window(before.Add(-time.Hour))
	for _, used := range []int64{0, 10, 13} {
		if err := c.Settle(t.Context(), now, budget.Settlement{Account: account.Account, Window: before, Reserved: 10, Used: used}); err != nil {
			t.Fatal(err)
		}
	}
	answer, err := c.Reserve(t.Context(), now, []budget.Charge{account})
	if err != nil || answer.Balances[0].Used != 13 {
		t.Errorf("%v %v", answer, err)
	}
}

// Whoever is away, or can't be believed, gives nothing.
func TestAway(t *testing.T) {
	s := newServer(t)
	c := s.open()
	charges := []budget.Charge{charge("x", budget.Requests, 2, 1)}
	if _, err := c.Reserve(t.Context(), time.Now(), charges); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []time.Duration{-time.Minute, time.Minute, 40 * 24 * time.Hour} {
		if answer, err := c.Reserve(t.Context(), time.Now().Add(wrong), charges); err == nil || answer.Allowed {
			t.Errorf("a clock that is wrong by %v: %v", wrong, answer)
		}
	}
	_ = s.cmd.Process.Signal(os.Interrupt) // ends by itself
	_ = s.cmd.Wait()
	began := time.Now()
	answer, err := c.Reserve(t.Context(), time.Now(), charges)
	if err == nil || answer.Allowed || time.Since(began) > 2*time.Second {
		t.Errorf("stopped: %v after %v", answer, time.Since(began))
	}
	if err := c.Settle(t.Context(), time.Now(), budget.Settlement{}); err == nil {
		t.Error("settled where nobody is")
	}
	if _, err := c.Balances(t.Context(), time.Now()); err == nil {
		t.Error("balances of nobody")
	}
	s.start()
	if _, err := c.Reserve(t.Context(), time.Now(), charges); err != nil {
		t.Errorf("there again: %v", err)
	}
}

// A Redis that takes questions and does not answer holds nobody up.
func TestHangs(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := shared.Open("unix://" + socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	began := time.Now()
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if answer, err := c.Reserve(context.Background(), time.Now(), []budget.Charge{charge("x", budget.Requests, 2, 1)}); err == nil || answer.Allowed {
				t.Error(answer)
			}
		})
	}
	all.Wait()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("50 questions took %v", took)
	}
}

func TestURL(t *testing.T) {
	for _, url := range []string{"", "nonsense", "http://user:secret@host", "redis://user:secret@host:port", "redis://user:secret@host/x", "redis://user:se%zzcret@host"} {
		if _, err := shared.Open(url); err == nil || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "se%zz") {
			t.Errorf("%q: %v", url, err)
		}
	}
}
