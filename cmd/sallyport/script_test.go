package main

import (
	"errors"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport.dev/controlplane/gateway"
)

var update = flag.Bool("update", false, "write what commands print into the scripts")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sallyport": func() { os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

// TestScripts runs every command as a user would. Whatever has a gateway has a real Envoy.
func TestScripts(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	envoy, err := gateway.Find(t.Context(), os.Getenv("ENVOY"), filepath.Join(root, ".parts/bin"))
	if err != nil {
		t.Fatalf("these tests run a real Envoy: %v; `make parts` fetches it", err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			short, err := os.MkdirTemp("", "sp") // sockets have short paths
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(short) })
			env.Setenv("ENVOY", envoy)
			binary, err := filepath.EvalSymlinks(envoy) // as a process has it
			if err != nil {
				return err
			}
			env.Setenv("ENVOY_FILE", binary)
			env.Setenv("EXAMPLES", filepath.Join(root, "examples"))
			env.Setenv("SALLYPORT_STATE", filepath.Join(short, "state"))
			env.Setenv("WORKLOAD", filepath.Join(short, "w", "workload.sock"))
			env.Setenv("SHORT", short)
			for _, name := range []string{"LISTEN", "LISTEN2", "OTLP", "AGENTS", "GATEWAYS", "CONNECT"} {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					return err
				}
				env.Setenv(name, l.Addr().String())
				l.Close()
			}
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")) // with -race each command would take a second to end
			env.Setenv("UID", strconv.Itoa(os.Getuid()))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"wait-for": waitFor,
			"fails":    fails,
		},
	})
}

// fails runs a command that ends with an exit code, and with one error and one hint: fails 2 sallyport agent
func fails(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || neg {
		ts.Fatalf("usage: fails CODE COMMAND...")
	}
	err := ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || strconv.Itoa(exit.ExitCode()) != args[0] {
		ts.Fatalf("ended with %v, not with exit status %s", err, args[0])
	}
	said := ts.ReadFile("stderr")
	lines := strings.Split(strings.TrimSuffix(said, "\n"), "\n")
	n := len(lines)
	if n < 2 || strings.Count("\n"+said, "\nsallyport: error: ") != 1 || !strings.HasPrefix(lines[n-2], "sallyport: error: ") ||
		!strings.HasPrefix(lines[n-1], "hint: ") {
		ts.Fatalf("it does not end with one error and one hint")
	}
}

// waitFor repeats a command until its output contains a text, or with ! no longer does: wait-for TEXT sallyport status
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: wait-for TEXT COMMAND...")
	}
	out := ""
	for begun := time.Now(); time.Since(begun) < 30*time.Second; {
		_ = ts.Exec(args[1], args[2:]...) // its exit status is part of what is waited for
		out = ts.ReadFile("stdout") + ts.ReadFile("stderr")
		if strings.Contains(out, args[0]) != neg {
			return
		}
	}
	ts.Fatalf("never saw %q; at last:\n%s", args[0], out)
}
