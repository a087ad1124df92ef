package real

import (
	"net"
	"net/http"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// startPart starts a server that takes a port of 127.0.0.1 as its last argument, and returns its address once a path of it
// answers; or, without one, once it accepts connections. It ends with the test.
func startPart(t testing.TB, ready, name string, args ...string) string {
	t.Helper()
	address := freeAddress()
	_, port, _ := net.SplitHostPort(address)
	cmd := exec.Command(name, append(args, port)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log := newOutput()
	cmd.Stdout, cmd.Stderr = log, log
	if err := start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its log says why
		log.end()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended already
		<-ended
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, log)
		}
	})
	up := func() bool {
		if ready == "" {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				conn.Close()
			}
			return err == nil
		}
		resp, err := http.Get("http://" + address + ready)
		if err == nil {
			resp.Body.Close()
		}
		return err == nil && resp.StatusCode == http.StatusOK
	}
	for deadline := time.Now().Add(2 * patience); !up(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-ended:
			t.Fatalf("%s has ended:\n%s", name, log)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not ready:\n%s", name, log)
		}
	}
	return address
}
