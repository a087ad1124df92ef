package main

import (
	"flag"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport.dev/controlplane/gateway"
)

var update = flag.Bool("update", false, "write what commands print into the scripts")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sallyport": func() { os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

// TestScripts runs every command as a user would. Scripts whose name begins with "up" start the whole program with a
// real Envoy.
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
			env.Setenv("EXAMPLES", filepath.Join(root, "examples"))
			env.Setenv("SALLYPORT_STATE", filepath.Join(short, "state"))
			env.Setenv("WORKLOAD", filepath.Join(short, "w", "workload.sock"))
			for _, name := range []string{"LISTEN", "LISTEN2", "OTLP"} {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					return err
				}
				env.Setenv(name, l.Addr().String())
				l.Close()
			}
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("UID", strconv.Itoa(os.Getuid()))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"wait-for": waitFor,
		},
	})
}

// waitFor repeats a command until its output contains a text, or with ! no longer does: wait-for TEXT sallyport status
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: wait-for TEXT COMMAND...")
	}
	out := ""
	for range 300 { // each of them takes tens of milliseconds
		_ = ts.Exec(args[1], args[2:]...) // its exit status is part of what is waited for
		out = ts.ReadFile("stdout") + ts.ReadFile("stderr")
		if strings.Contains(out, args[0]) != neg {
			return
		}
	}
	ts.Fatalf("never saw %q; at last:\n%s", args[0], out)
}
