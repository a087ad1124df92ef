// Package real tests the whole program from outside: `sallyport up` as a process of its own, its real Envoy, and
// callers and backends that behave well and badly.
//
// It is for what no smaller test can show: that Envoy does what was lowered for it, and that nothing is left open
// when something is killed, late, wrong or missing. It needs Envoy and fails where there is none.
package real

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"sallyport.dev/controlplane/gateway"
)

// What all tests share: the program, its Envoy, and one `up` for those that need none of their own.
var (
	program string
	binary  string
	common  commonUp
)

func TestMain(m *testing.M) {
	if os.Getenv(churnVariable) != "" {
		churn()
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("/tmp", "sp")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	binary, err = gateway.Find(ctx, os.Getenv("ENVOY"), "../../.parts/bin")
	if err != nil {
		return fail(fmt.Errorf("these tests need Envoy %s (`make parts`, or set $ENVOY): %w", gateway.Version, err))
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return fail(err)
	}
	program = filepath.Join(dir, "sallyport")
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "sallyport.dev/cmd/sallyport")
	if out, err := build.CombinedOutput(); err != nil {
		return fail(fmt.Errorf("build sallyport: %w\n%s", err, out))
	}
	go starter()
	defer common.stop()
	return m.Run()
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "FAIL:", err)
	return 1
}

var toStart = make(chan func())

// starter starts processes that die with this one: the kernel kills them when the thread ends that started them, so
// one thread starts them all and never ends.
func starter() {
	runtime.LockOSThread()
	for f := range toStart {
		f()
	}
}

func start(cmd *exec.Cmd) error {
	done := make(chan error)
	toStart <- func() { done <- cmd.Start() }
	return <-done
}
