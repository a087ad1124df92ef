package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"
)

// Supervisor keeps one Envoy running.
type Supervisor struct {
	Binary      string
	Bootstrap   *bootstrapv3.Bootstrap
	Folder      string // where the bootstrap file is written
	Concurrency int    // worker threads; 0: one for each core
	Log         *slog.Logger
	// Started, if set, is told the process ID of every Envoy that is started.
	Started func(pid int)
}

const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 10 * time.Second
	stable       = 30 * time.Second // an Envoy that has run so long begins with the first backoff again
	patience     = 5 * time.Second  // between SIGTERM and SIGKILL
)

// Run starts Envoy, and starts it again whenever it ends, until the context ends.
func (s *Supervisor) Run(ctx context.Context) error {
	// The kernel sends the child its parent-death signal when the *thread* that started it ends, so this goroutine
	// keeps its thread. It is never unlocked: the thread ends with the goroutine.
	runtime.LockOSThread()
	config := filepath.Join(s.Folder, "envoy.json")
	text, err := protojson.Marshal(s.Bootstrap)
	if err != nil {
		return fmt.Errorf("encode bootstrap: %w", err)
	}
	if err := os.WriteFile(config, text, 0o600); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	backoff := firstBackoff
	for {
		began := time.Now()
		err := s.once(ctx, config)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was told to end
		}
		if time.Since(began) > stable {
			backoff = firstBackoff
		}
		s.Log.Error("envoy ended, starting it again", "error", err, "after", time.Since(began).Round(time.Millisecond), "backoff", backoff)
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
			return nil
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// drainTime is how long a connection lives on in a filter chain that another has replaced: it is told to close with its
// next answer, and a stream goes on until then.
const drainTime = 10 * time.Minute

func (s *Supervisor) once(ctx context.Context, config string) error {
	args := []string{"--config-path", config, "--disable-hot-restart", "--log-level", "warning",
		"--log-format", "%L\t%n\t%v", "--drain-strategy", "immediate", "--drain-time-s", strconv.Itoa(int(drainTime.Seconds()))}
	if s.Concurrency > 0 {
		args = append(args, "--concurrency", strconv.Itoa(s.Concurrency))
	}
	cmd := exec.Command(s.Binary, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true} // a Ctrl-C is for us, and we tell it
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return fmt.Errorf("start envoy: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start envoy: %w", err)
	}
	if s.Started != nil {
		s.Started(cmd.Process.Pid)
	}
	ended := make(chan struct{})
	go func() { // ends with the child
		s.relay(ctx, stderr)
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
		select {
		case <-ended:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			<-ended
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 {
		return fmt.Errorf("envoy exited with status %d", exit.ExitCode())
	}
	if err == nil {
		return errors.New("envoy exited")
	}
	return fmt.Errorf("envoy: %w", err)
}

// relay turns Envoy's log lines into ours. What it has to say while it is being stopped interests nobody.
func (s *Supervisor) relay(ctx context.Context, from io.Reader) {
	lines := bufio.NewReaderSize(from, 1<<16)
	for {
		line, err := lines.ReadString('\n')
		if line = strings.TrimSpace(line); line != "" {
			level, component, message := slog.LevelWarn, "", line
			if f := strings.SplitN(line, "\t", 3); len(f) == 3 {
				component, message = f[1], f[2]
				switch f[0] {
				case "E", "C":
					level = slog.LevelError
				case "I":
					level = slog.LevelInfo
				case "D", "T":
					level = slog.LevelDebug
				}
			}
			if ctx.Err() != nil {
				level = slog.LevelDebug
			}
			s.Log.Log(context.WithoutCancel(ctx), level, "envoy", "component", component, "message", message)
		}
		if err != nil {
			return
		}
	}
}
