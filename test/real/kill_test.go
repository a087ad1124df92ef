package real

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport.dev/telemetry"
)

func oneChat(t testing.TB) (*backend, map[string]string) {
	b := ownBackend(t)
	return b, map[string]string{"all.yaml": openAI("chat", b) + grant("all", "/app", "chat", "Infer, Embed", "m")}
}

// gone reports whether a process runs no more. Whoever it was left to may still have to take note of that.
func gone(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(text), ") ")
	return err != nil || strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

func inForce(t testing.TB, u *up, who *caller) {
	t.Helper()
	eventually(t, "way through", func() bool {
		who.client.CloseIdleConnections()
		return who.chat(t, "chat", "m").status == http.StatusOK
	})
	eventually(t, "generation in force", func() bool {
		st := u.status(t)
		return st.Gateways[0].Connected && st.Gateways[0].InForce == st.Gateways[0].Target
	})
}

// TestEnvoyKilled starts Envoy again, with everything that it had.
func TestEnvoyKilled(t *testing.T) {
	t.Parallel()
	b, documents := oneChat(t)
	u := startUp(t, documents)
	who := u.as(t, "/app", http2)
	before := u.flow(t, who.chat(t, "chat", "m"))
	for range 2 {
		resp := who.open(t, "chat", "m")
		s := b.begun(t)
		s.write(t, "data: 1\n\n")
		pid := u.envoy(t)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-s.gone // the backend is told
		if _, err := io.ReadAll(resp.body); err == nil {
			t.Error("the caller takes the stream for whole")
		}
		inForce(t, u, who)
		if now := u.envoy(t); now == pid {
			t.Errorf("Envoy is still process %d", pid)
		}
		denied := u.as(t, "/nobody", http2).chat(t, "chat", "m")
		wantProblem(t, denied, http.StatusForbidden, "no_grant")
	}
	u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == before.ID })
	select {
	case <-u.exit:
		t.Error("`up` has ended")
	default:
	}
}

// TestUpKilled leaves nothing behind but the state, and goes on with it: identities from before are still good.
func TestUpKilled(t *testing.T) {
	t.Parallel()
	b, documents := oneChat(t)
	u := startUp(t, documents)
	ca, err := os.ReadFile(filepath.Join(u.state, "ca", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	who := u.as(t, "/app", http2)
	for range 2 {
		before := u.flow(t, who.chat(t, "chat", "m"))
		u.onDisk(t, before)
		who.open(t, "chat", "m")
		s := b.begun(t)
		s.write(t, "data: 1\n\n")
		pid := u.envoy(t)
		began := time.Now()
		u.kill()
		eventually(t, "end of Envoy", func() bool { return gone(pid) })
		if took := time.Since(began); took > time.Second {
			t.Errorf("Envoy outlived `up` for %s", took)
		}
		<-s.gone

		u.mustLaunch(t) // with the sockets, the lock and the port that a killed process leaves
		now, err := os.ReadFile(filepath.Join(u.state, "ca", "ca.pem"))
		if err != nil || string(now) != string(ca) {
			t.Errorf("there is another authority: %v", err)
		}
		inForce(t, u, who)
		u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == before.ID })
	}
}

// onDisk waits until a flow is written: a killed process keeps nothing else.
func (u *up) onDisk(t testing.TB, f telemetry.Flow) {
	t.Helper()
	eventually(t, "flow on disk", func() bool {
		return u.status(t).Telemetry.Flows.Waiting == 0 && u.status(t).Telemetry.Flows.Rows > 0
	})
	u.flows(t, 1, func(g telemetry.Flow) bool { return g.ID == f.ID })
}

// TestUpTerminated ends in good order, soon, also under load, and loses no record.
func TestUpTerminated(t *testing.T) {
	t.Parallel()
	for name, signal := range map[string]os.Signal{"SIGTERM": syscall.SIGTERM, "SIGINT": os.Interrupt} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, documents := oneChat(t)
			u := startUp(t, documents)
			who := u.as(t, "/app", http2)
			who.open(t, "chat", "m")
			b.begun(t).write(t, "data: 1\n\n")
			var ids []string
			for range 20 {
				ids = append(ids, who.chat(t, "chat", "m").id())
			}
			seen := u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == ids[len(ids)-1] }) // Envoy has told of it
			pid, began := u.envoy(t), time.Now()
			if err := u.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			<-u.exit
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %s to end", took)
			}
			if code := u.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if !gone(pid) {
				t.Error("Envoy is still there")
			}
			if _, err := os.Stat(u.socket); err == nil {
				t.Error("the workload socket is still there")
			}
			u.mustLaunch(t)
			found := u.flows(t, len(ids), func(f telemetry.Flow) bool {
				for _, id := range ids {
					if f.ID == id {
						return true
					}
				}
				return false
			})
			t.Logf("%d flows before, %d after", len(seen), len(found))
		})
	}
}

// TestControlPlaneStopped goes on with the last policy while the control plane does not answer.
func TestControlPlaneStopped(t *testing.T) {
	t.Parallel()
	_, documents := oneChat(t)
	u := startUp(t, documents)
	who, nobody := u.as(t, "/app", http2), u.as(t, "/nobody", http2)
	if err := u.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for range 20 {
		who.client.CloseIdleConnections()
		a := who.chat(t, "chat", "m")
		if a.status != http.StatusOK {
			t.Errorf("with the control plane stopped: %v", a)
		}
		ids = append(ids, a.id())
		wantProblem(t, nobody.chat(t, "chat", "m"), http.StatusForbidden, "no_grant")
	}
	if err := u.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == ids[len(ids)-1] })
}

// TestFullDisk keeps the data path going when nothing can be recorded any more.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can mount a small file system")
	}
	_, documents := oneChat(t)
	u := prepareUp(t, documents)
	if err := os.Mkdir(u.state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", u.state, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a small file system here: %v", err)
	}
	unmount := func() {
		if u.cmd != nil {
			u.kill()
		}
		if err := syscall.Unmount(u.state, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(unmount)
	u.mustLaunch(t)
	who := u.as(t, "/app", http2)
	inForce(t, u, who)
	fill, err := os.Create(filepath.Join(u.state, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 4096)
	for err == nil {
		_, err = fill.Write(zeros)
	}
	fill.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 500 {
		if a := who.chat(t, "chat", "m"); a.status != http.StatusOK {
			t.Fatalf("request %d with a full disk: %v", i, a)
		}
		if i%100 == 0 {
			wantProblem(t, u.as(t, "/nobody", http2).chat(t, "chat", "m"), http.StatusForbidden, "no_grant")
		}
	}
	u.write(t, "all.yaml", documents["all.yaml"]+grant("more", "/nobody", "chat", "Infer", "m")) // and policy still changes
	eventually(t, "changed policy", func() bool { return u.as(t, "/nobody", http2).chat(t, "chat", "m").status == http.StatusOK })
	stats := u.status(t).Telemetry
	t.Logf("%+v", stats)
	select {
	case <-u.exit:
		t.Error("`up` has ended")
	default:
	}
	if err := os.Remove(filepath.Join(u.state, "fill")); err != nil {
		t.Fatal(err)
	}
	last := who.chat(t, "chat", "m")
	u.flow(t, last)
}

func kill(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of the process", func() bool { return gone(pid) })
}
