package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// holdCommand makes this program another process, and thereby another workload: `bench hold SOCKET NUMBER`.
const holdCommand = "hold"

// perConnection is how many streams share a connection; servers allow a hundred.
const perConnection = 50

// hold opens streams of the Workload API, and says when each of them has been told something, again and again.
func hold(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%s needs a socket and a number", holdCommand)
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	told := &counter{of: int64(n)}
	for i := 0; i < n; i += perConnection {
		client, err := workloadapi.New(ctx, workloadapi.WithAddr(args[0]))
		if err != nil {
			return err
		}
		defer client.Close()
		for range min(perConnection, n-i) {
			go func() { _ = client.WatchX509Context(ctx, told) }() // ends with the context
		}
	}
	<-ctx.Done()
	return nil
}

// counter counts what streams are told.
type counter struct {
	of    int64
	count atomic.Int64
}

func (c *counter) OnX509ContextUpdate(*workloadapi.X509Context) {
	if n := c.count.Add(1); n%c.of == 0 {
		fmt.Fprintln(os.Stderr, "told", n/c.of, time.Now().UnixNano())
	}
}

func (c *counter) OnX509ContextWatchError(err error) { fmt.Fprintln(os.Stderr, "failed", err) }

// holder is a process that holds streams open.
type holder struct {
	*process
	path string // of its program, which it is recognised by
}

// holderPath is where the program of holders is: a copy of this one.
func (b *bench) holderPath() (string, error) {
	own, err := os.Executable()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(own)
	if err != nil {
		return "", err
	}
	path := filepath.Join(b.folder, "holder")
	return path, os.WriteFile(path, text, 0o700)
}

// startHolder returns when every stream has an SVID.
func (b *bench) startHolder(path, socket string, streams int) (*holder, error) {
	p, err := startProcess(path, holdCommand, socket, strconv.Itoa(streams))
	if err != nil {
		return nil, err
	}
	b.started = append(b.started, p)
	h := &holder{p, path}
	_, err = h.told(1)
	return h, err
}

// told returns when every stream had been told something for the nth time.
func (h *holder) told(n int) (at time.Time, err error) {
	line := fmt.Sprintf("told %d ", n)
	if err := h.await("be "+line+"times", time.Minute, func() bool { return len(h.said(line))+len(h.said("failed")) > 0 }); err != nil {
		return at, err
	}
	if failures := h.said("failed"); len(failures) > 0 {
		return at, fmt.Errorf("a stream has %s", failures[0])
	}
	nanos, err := strconv.ParseInt(strings.TrimPrefix(h.said(line)[0], line), 10, 64)
	return time.Unix(0, nanos), err
}
