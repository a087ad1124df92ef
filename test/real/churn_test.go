package real

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/gateway"
)

// churnVariable makes the test program a supervisor of an Envoy whose threads come and go.
const churnVariable = "SALLYPORT_TEST_CHURN"

// TestSupervisorKeepsEnvoy shows that Envoy does not die with some thread of its parent: the kernel sends the signal
// of a parent's death when the thread ends that started the child.
func TestSupervisorKeepsEnvoy(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("/tmp", "sp")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), churnVariable+"="+dir, "ENVOY="+binary)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), `{"starts":1,`) {
		t.Errorf("Envoy did not stay:\n%s", out)
	}
}

// churn supervises an Envoy, ends thousands of threads, and prints how often Envoy was started.
func churn() {
	dir := os.Getenv(churnVariable)
	sockets := envoy.Sockets{Control: filepath.Join(dir, "c"), Identity: filepath.Join(dir, "i"), Catalog: filepath.Join(dir, "k"), Budget: filepath.Join(dir, "b"), Admin: filepath.Join(dir, "a")}
	started := make(chan int, 100)
	s := gateway.Supervisor{Binary: os.Getenv("ENVOY"), Bootstrap: envoy.Bootstrap("churn", sockets), Folder: dir, Concurrency: 1,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Started: func(pid int) { started <- pid }}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	first := <-started
	starts, ended := 1, 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		const many = 64 // more than there are idle threads, so that all of them are taken
		release := make(chan struct{})
		var locked, left sync.WaitGroup
		for range many {
			locked.Add(1)
			left.Go(func() {
				runtime.LockOSThread() // and never unlocked: the thread ends here
				locked.Done()
				<-release
			})
		}
		locked.Wait()
		close(release)
		left.Wait()
		ended += many
	}
	for len(started) > 0 {
		<-started
		starts++
	}
	_, err := os.Stat(fmt.Sprintf("/proc/%d", first))
	cancel()
	if runErr := <-done; err == nil {
		err = runErr
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(struct {
		Starts int `json:"starts"`
		Ended  int `json:"threads_ended"`
	}{starts, ended})
}
