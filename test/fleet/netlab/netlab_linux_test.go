package netlab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// echo serves at the host, which says its name and then whatever it is told, and returns the address.
func echo(t *testing.T, h *Host) string {
	t.Helper()
	listener, err := h.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, h.Name+"\n") // who asks sees what is missing
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return listener.Addr().String()
}

// client is a connection to an echo.
type client struct {
	net.Conn
	read *bufio.Reader
	name string // what the other side says it is
}

func dial(t *testing.T, h *Host, address string, limit time.Duration) (*client, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	conn, err := h.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	c := &client{Conn: conn, read: bufio.NewReader(conn)}
	c.name, err = c.line(limit)
	return c, err
}

func (c *client) line(limit time.Duration) (string, error) {
	if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	line, err := c.read.ReadString('\n')
	return strings.TrimSpace(line), err
}

// ping returns how long an answer takes.
func (c *client) ping(t *testing.T) time.Duration {
	t.Helper()
	began := time.Now()
	if _, err := io.WriteString(c, "ping\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := c.line(time.Minute); err != nil || got != "ping" {
		t.Fatalf("echo of ping: %q, %v", got, err)
	}
	return time.Since(began)
}

func mustDial(t *testing.T, h *Host, address string) *client {
	t.Helper()
	c, err := dial(t, h, address, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDelay(t *testing.T) {
	l := New(t)
	a, b, c := l.Host("a"), l.Host("b"), l.Host("c")
	toB, toC := mustDial(t, a, echo(t, b)), mustDial(t, a, echo(t, c))
	const delay = 50 * time.Millisecond
	for _, step := range []struct {
		name        string
		set         func()
		least, most time.Duration // to b; most for the fastest of several
	}{
		{"none", func() {}, 0, delay},
		{"link", func() { l.Link(b, a, Link{Delay: delay}) }, 2 * delay, time.Minute},
		{"link and cable", func() { b.Cable(Link{Delay: delay}) }, 4 * delay, time.Minute},
		{"none again", func() { b.Cable(Link{}); l.Link(a, b, Link{}) }, 0, delay},
	} {
		step.set()
		fastest, other := time.Hour, time.Hour
		for range 5 {
			fastest, other = min(fastest, toB.ping(t)), min(other, toC.ping(t))
		}
		if fastest < step.least || fastest > step.most {
			t.Errorf("%s: round trip in %v, want %v to %v", step.name, fastest, step.least, step.most)
		}
		if other > delay {
			t.Errorf("%s: round trip to a host that it does not concern in %v", step.name, other)
		}
	}
}

// datagrams sends numbered datagrams from a to b, and returns the numbers in the order in which they came.
func datagrams(t *testing.T, a, b *Host, count int) (numbers []int) {
	t.Helper()
	var receiver net.PacketConn
	err := b.inside(func() (err error) {
		receiver, err = net.ListenPacket("udp4", b.Addr.String()+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer receiver.Close()
	sender, err := a.Dial(t.Context(), "udp", receiver.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	for i := range count {
		if _, err := fmt.Fprint(sender, i); err != nil {
			t.Fatal(err)
		}
	}
	buffer := make([]byte, mtu)
	for {
		if err := receiver.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, _, err := receiver.ReadFrom(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return numbers
		}
		if err != nil {
			t.Fatal(err)
		}
		number, err := strconv.Atoi(string(buffer[:n]))
		if err != nil {
			t.Fatal(err)
		}
		numbers = append(numbers, number)
	}
}

func TestOrder(t *testing.T) {
	for _, reorder := range []bool{false, true} {
		l := New(t)
		a, b := l.Host("a"), l.Host("b")
		l.Link(a, b, Link{Delay: time.Millisecond, Jitter: 100 * time.Millisecond, Reorder: reorder})
		got := datagrams(t, a, b, 100)
		overtaken := false
		for i, number := range got {
			overtaken = overtaken || i != number
		}
		if len(got) != 100 || overtaken != reorder {
			t.Errorf("reorder %v: came as %v", reorder, got)
		}
	}
}

func TestLoss(t *testing.T) {
	l := New(t)
	a, b := l.Host("a"), l.Host("b")
	address := echo(t, b)
	streams := make([]*client, 8)
	for i := range streams {
		streams[i] = mustDial(t, a, address)
	}
	l.Link(a, b, Link{Loss: 0.3})
	if got := len(datagrams(t, a, b, 200)); got < 110 || got > 170 {
		t.Errorf("%d of 200 datagrams came, want about 140", got)
	}
	// TCP waits twice as long each time, so that one stream may take minutes. Not all of them do.
	text := bytes.Repeat([]byte("0123456789abcdef"), 512)
	done := make(chan error, len(streams))
	for _, c := range streams {
		go c.Write(text) // what is missing is seen below
		go func() {
			got := make([]byte, len(text))
			_, err := io.ReadFull(c.read, got)
			if err == nil && !bytes.Equal(got, text) {
				err = errors.New("it is another text")
			}
			done <- err
		}()
	}
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("stream over a bad link: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("no stream over a bad link")
	}
	l.Link(a, b, Link{Loss: 1})
	if got := datagrams(t, a, b, 20); len(got) != 0 {
		t.Errorf("came although everything is lost: %v", got)
	}
}

func TestQueueIsBounded(t *testing.T) {
	l := New(t)
	a, b := l.Host("a"), l.Host("b")
	l.mu.Lock()
	l.links[pair(a, b)] = Link{Delay: time.Hour}
	l.mu.Unlock()
	packet := append([]byte{0x45, 11: 0}, append(a.Addr.AsSlice(), b.Addr.AsSlice()...)...)
	for range 2 * maxQueue {
		l.forward(a, packet)
	}
	if w := l.ways[[2]*Host{a, b}]; w.count != maxQueue || len(w.queue) != maxQueue {
		t.Errorf("%d packets under way, %d in the queue, want %d", w.count, len(w.queue), maxQueue)
	}
}

func TestCut(t *testing.T) {
	l := New(t)
	a, b, c := l.Host("a"), l.Host("b"), l.Host("c")
	atB, atC := echo(t, b), echo(t, c)
	for name, set := range map[string]func(Link){
		"link":  func(link Link) { l.Link(a, b, link) },
		"cable": func(link Link) { b.Cable(link) },
	} {
		before := mustDial(t, a, atB)
		set(Link{Cut: true})
		if _, err := dial(t, a, atB, 300*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: dial through a cut: %v", name, err)
		}
		if _, err := io.WriteString(before, "late\n"); err != nil {
			t.Fatal(err)
		}
		if got, err := before.line(300 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: answer through a cut: %q, %v", name, got, err)
		}
		mustDial(t, a, atC).ping(t)
		set(Link{})
		if got, err := before.line(time.Minute); err != nil || got != "late" {
			t.Errorf("%s: after the cut: %q, %v", name, got, err)
		}
		mustDial(t, a, atB).ping(t)
	}
	// What is under way is lost too.
	l.Link(a, b, Link{Delay: 200 * time.Millisecond})
	done := make(chan []int)
	go func() { done <- datagrams(t, a, b, 10) }()
	waitUntil(t, "datagrams under way", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.ways[[2]*Host{a, b}].count == 10
	})
	l.Link(a, b, Link{Cut: true})
	if got := <-done; len(got) != 0 {
		t.Errorf("came through a cut: %v", got)
	}
}

func TestLabsAreApart(t *testing.T) {
	for _, name := range []string{"one", "two"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := New(t)
			a, b := l.Host("a"), l.Host(name)
			address := echo(t, b)
			for range 10 {
				if c := mustDial(t, a, address); c.name != name {
					t.Errorf("lab %s: %s answered", name, c.name)
				}
				l.Link(a, b, Link{Cut: name == "one"})
				_, err := dial(t, a, address, 300*time.Millisecond)
				if (err != nil) != (name == "one") {
					t.Errorf("lab %s: %v", name, err)
				}
				l.Link(a, b, Link{})
			}
		})
	}
}

func TestCommand(t *testing.T) {
	h := New(t).Host("a")
	out, err := h.Command(t.Context(), "ip", "-4", "-oneline", "address").CombinedOutput()
	if err != nil || strings.Count(string(out), "inet") != 2 || !strings.Contains(string(out), "inet 10.77.0.1/16 ") {
		t.Errorf("addresses in a host: %v\n%s", err, out)
	}
	if err := h.Command(t.Context(), "no-such-program").Run(); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("no such program: %v", err)
	}
	if _, err := h.Dial(t.Context(), "tcp", "localhost:80"); err == nil {
		t.Error("dialled a name")
	}
}

// TestNothingStays ends labs in four ways, and looks for what is left of them.
func TestNothingStays(t *testing.T) {
	if how := os.Getenv("NETLAB_END"); how != "" {
		h := New(t).Host("a")
		cmd := h.Command(context.Background(), "sh", "-c", "sleep 1000 & wait")
		if how == "panic" || how == "kill" {
			cmd = h.Command(context.Background(), "sleep", "1000") // nobody is left who would end what it starts
		}
		if err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
		waitUntil(t, "program in its host", func() bool { return len(h.processes()) > 0 })
		fmt.Printf("namespace %s\n", h.id)
		switch how {
		case "fatal":
			t.Fatal("at the end of my wits")
		case "panic":
			go panic("on another goroutine")
			select {}
		case "kill":
			select {}
		}
		return
	}
	if testing.Short() {
		t.Skip("runs itself")
	}
	New(t) // or skip
	for _, how := range []string{"well", "fatal", "panic", "kill"} {
		t.Run(how, func(t *testing.T) {
			self := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNothingStays$", "-test.timeout=1m")
			self.Env = append(os.Environ(), "NETLAB_END="+how)
			out, err := self.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := self.Start(); err != nil {
				t.Fatal(err)
			}
			var id string
			for lines := bufio.NewScanner(out); id == "" && lines.Scan(); {
				id, _ = strings.CutPrefix(lines.Text(), "namespace ")
			}
			if !strings.HasPrefix(id, "net:[") {
				t.Fatalf("no namespace: %q", id)
			}
			if how == "kill" {
				if holders(id) == 0 {
					t.Error("nobody holds the namespace of a lab that runs")
				}
				if err := self.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			if err := self.Wait(); (err == nil) != (how == "well") {
				t.Errorf("it ended with %v", err)
			}
			waitUntil(t, "end of the namespace", func() bool { return holders(id) == 0 })
		})
	}
}

// holders counts what keeps a network namespace.
func holders(id string) (count int) {
	for _, pattern := range []string{"/proc/[0-9]*/task/*/ns/net", "/proc/[0-9]*/fd/*"} {
		links, _ := filepath.Glob(pattern) // the pattern is well-formed
		for _, link := range links {
			if target, err := os.Readlink(link); err == nil && target == id {
				count++
			}
		}
	}
	return count
}

func waitUntil(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}
