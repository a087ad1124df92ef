package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/identity/disk"
)

// TestCA runs the commands on a keeper behind an operator's socket, and on what it leaves.
func TestCA(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	state, err := os.MkdirTemp("", "sp") // sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(state)
	keyFile := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(keyFile, []byte(strings.Repeat("k", 40)), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (int, string, string) {
		t.Helper()
		var out, errOut bytes.Buffer
		cmd := caCommand()
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs(args)
		cmd.SetOut(&out)
		cmd.SetErr(&errOut)
		code := 0
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			code = report(&errOut, err)
		}
		return code, out.String(), errOut.String()
	}
	fails := func(code int, says string, args ...string) {
		t.Helper()
		got, out, errOut := run(args...)
		if got != code || out != "" || !strings.Contains(errOut, says) || !strings.Contains(errOut, "hint: ") {
			t.Errorf("%q: exit %d, %s%s", args, got, out, errOut)
		}
	}
	works := func(args ...string) string {
		t.Helper()
		code, out, errOut := run(args...)
		if code != 0 || errOut != "" || strings.Contains(out, "PRIVATE") {
			t.Fatalf("%q: exit %d, %s%s", args, code, out, errOut)
		}
		return out
	}
	fails(exitFailed, "and none has been", "show", "--state", state)
	fails(exitFailed, "and none has been", "export", "--state", state)
	fails(exitFailed, "no control plane is running", "rotate", "--state", state)
	fails(exitUsage, "unknown format", "export", "--format", "xml", "--state", state)
	fails(exitUsage, "rotate takes x509, jwt or all", "rotate", "root", "--state", state)
	fails(exitFailed, "no control plane is running", "distrust", "ab", "--state", state)
	fails(exitUsage, "distrust takes one authority", "distrust", "ab", "cd", "--state", state)

	key, err := disk.ReadKey(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	k, err := disk.OpenKeeper(t.Context(), disk.Config{Dir: filepath.Join(state, "ca"), TrustDomain: td, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(state, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", operatorSocket(state))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: (&operator.Server{Actions: k.Actions()}).Handler()}
	go func() { _ = server.Serve(l) }()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()

	both := func(format string, args ...string) {
		t.Helper()
		out := works(append([]string{"export", "--format", format, "--state", state}, args...)...)
		want := k.Authorities().Bundle
		switch format {
		case disk.PEM:
			if roots := x509.NewCertPool(); !roots.AppendCertsFromPEM([]byte(out)) || strings.Count(out, "BEGIN") != len(want.X509Authorities()) {
				t.Errorf("exported %s", out)
			}
		case disk.SPIFFE:
			if b, err := spiffebundle.Parse(td, []byte(out)); err != nil || !b.Equal(want) {
				t.Errorf("exported %s, %v", out, err)
			}
		}
	}
	both(disk.PEM)
	both(disk.SPIFFE)
	if out := works("show", "--state", state); !strings.Contains(out, "kept encrypted") || !strings.Contains(out, "root active") || strings.Contains(out, "prepared") {
		t.Errorf("shows\n%s", out)
	}
	if out := works("rotate", "jwt", "--state", state); strings.Contains(out, "root prepared") || !strings.Contains(out, "JWT key prepared") {
		t.Errorf("rotated\n%s", out)
	}
	var d disk.Description
	if err := json.Unmarshal([]byte(works("rotate", "--now", "-o", "json", "--state", state)), &d); err != nil ||
		len(d.Roots) != 2 || d.Roots[0].State != disk.Old || d.Roots[1].State != disk.Active {
		t.Errorf("%+v, %v", d, err)
	}
	both(disk.PEM)
	fails(exitFailed, "it is what signs now", "distrust", d.Roots[1].ID, "--state", state)
	fails(exitFailed, "an intermediate is trusted because", "distrust", d.Intermediate.ID, "--state", state)
	if out := works("distrust", d.JWT[0].ID[:20], "--state", state); strings.Contains(out, d.JWT[0].ID[:16]) || !strings.Contains(out, "root old") {
		t.Errorf("distrusted\n%s", out)
	}
	both(disk.SPIFFE)

	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	server.Close()
	k.Close()
	fails(exitProblems, "the authority is encrypted, and no key is given", "show", "--state", state)
	both(disk.SPIFFE, "--ca-key-file", keyFile)
	if out := works("show", "--state", state, "--ca-key-file", keyFile); !strings.Contains(out, "root old") {
		t.Errorf("shows\n%s", out)
	}
	t.Setenv("SALLYPORT_CA_KEY", strings.Repeat("k", 40))
	both(disk.PEM)
}
