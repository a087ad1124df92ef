package provider_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport.dev/identity/internal/identitytest"
)

// TestSPIRE asks a real SPIRE agent, with a real server behind it.
func TestSPIRE(t *testing.T) {
	server, err := exec.LookPath("spire-server")
	if err != nil {
		t.Skip("not tried: there is no spire-server on PATH")
	}
	agent, err := exec.LookPath("spire-agent")
	if err != nil {
		t.Skip("not tried: there is no spire-agent on PATH")
	}
	dir, err := os.MkdirTemp("", "spire") // short: the paths of sockets are bounded
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	admin, socket := filepath.Join(dir, "server.sock"), filepath.Join(dir, "agent.sock")

	background(t, server, "run", "-config", file(t, filepath.Join(dir, "server.conf"), fmt.Sprintf(`
server {
  bind_address = "127.0.0.1"
  bind_port = "%d"
  socket_path = "%s"
  trust_domain = "example.org"
  data_dir = "%s"
  default_x509_svid_ttl = "1m"
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type = "sqlite3"
      connection_string = "%s"
    }
  }
  NodeAttestor "join_token" {
    plugin_data {}
  }
  KeyManager "memory" {
    plugin_data {}
  }
}
`, port, admin, dir, filepath.Join(dir, "server.sqlite3"))))
	eventually(t, func() error { return exec.Command(server, "healthcheck", "-socketPath", admin).Run() })

	out, err := exec.Command(server, "token", "generate", "-socketPath", admin, "-spiffeID", "spiffe://example.org/agent").CombinedOutput()
	_, token, ok := strings.Cut(string(out), "Token: ")
	if err != nil || !ok {
		t.Fatalf("generate token: %v: %s", err, out)
	}
	background(t, agent, "run", "-joinToken", strings.Fields(token)[0],
		"-config", file(t, filepath.Join(dir, "agent.conf"), fmt.Sprintf(`
agent {
  data_dir = "%s"
  server_address = "127.0.0.1"
  server_port = "%d"
  socket_path = "%s"
  trust_domain = "example.org"
  insecure_bootstrap = true
}
plugins {
  NodeAttestor "join_token" {
    plugin_data {}
  }
  KeyManager "memory" {
    plugin_data {}
  }
  WorkloadAttestor "unix" {
    plugin_data {}
  }
}
`, filepath.Join(dir, "agent"), port, socket)))

	s := run(t, socket) // before there is an entry, and maybe before there is a socket
	if out, err := exec.Command(server, "entry", "create", "-socketPath", admin, "-parentID", "spiffe://example.org/agent",
		"-spiffeID", "spiffe://example.org/app", "-selector", identitytest.Me().String()).CombinedOutput(); err != nil {
		t.Fatalf("create entry: %v: %s", err, out)
	}
	if err := s.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	svid, err := s.GetX509SVID()
	if err != nil || svid.ID.String() != "spiffe://example.org/app" {
		t.Errorf("got %v, %v", svid, err)
	}
	_, _, changed := s.X509()
	<-changed // rotated at half a minute
}

func file(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// background runs a program until the test ends.
func background(t *testing.T, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	})
}

// eventually tries until it works: a program that starts does not say when it has.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	for tick := time.Tick(100 * time.Millisecond); ; {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-tick:
		case <-t.Context().Done():
			t.Fatal(err)
		}
	}
}
