package real

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport.dev/telemetry"
)

// TestStartErrors says what is wrong and what to do, and leaves nothing running.
func TestStartErrors(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	fake := filepath.Join(t.TempDir(), "envoy")
	script := "#!/bin/sh\necho\necho \"$0  version: 0123456789abcdef/1.39.0/Clean/RELEASE/BoringSSL\"\n"
	if err := os.WriteFile(fake, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	something := filepath.Join(t.TempDir(), "something")
	if err := os.WriteFile(something, []byte("#!/bin/sh\necho hello\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, documents := oneChat(t)
	running := startUp(t, documents)
	t.Run("up", func(t *testing.T) {
		for _, c := range []struct {
			name string
			args []string
			code int
			says []string
		}{
			{"no documents", []string{"-f", "/nowhere/at/all"}, 3, []string{"read documents", "hint: make the folder"}},
			{"the same state", []string{"--state", running.state}, 3, []string{"another sallyport is running with state " + running.state, "hint: stop it"}},
			{"the same workload socket", []string{"--workload-socket", running.socket}, 3, []string{"another process is listening", "--workload-socket"}},
			{"the same port", []string{"--listen", running.listen}, 3, []string{"address already in use", "hint: name another address with --listen"}},
			{"no address", []string{"--listen", "somewhere"}, 2, []string{"--listen", "hint: give an IP address and a port"}},
			{"no port for spans", []string{"--otlp-listen", taken.Addr().String()}, 3, []string{"receive spans", "address already in use", "hint: name another with --otlp-listen"}},
			{"no Envoy", []string{"--envoy", "/nowhere/envoy"}, 3, []string{"no Envoy found: /nowhere/envoy does not exist", "hint: `make parts`"}},
			{"Envoy of another version", []string{"--envoy", fake}, 3, []string{"wrong Envoy version", "1.39.0", "not 1.40", "hint: `make parts`"}},
			{"something else as Envoy", []string{"--envoy", something}, 3, []string{"does not say that it is an Envoy"}},
			{"a folder as Envoy", []string{"--envoy", t.TempDir()}, 3, []string{"find Envoy 1.40"}},
			{"a short life", []string{"--svid-ttl", "19s"}, 2, []string{"--svid-ttl", "hint: SVIDs live for 20s"}},
			{"another trust domain", []string{"--trust-domain", "not a domain"}, 2, []string{"--trust-domain"}},
			{"a long path", []string{"--state", "/tmp/" + strings.Repeat("x", 120)}, 3, []string{"too long a path", "--state"}},
			{"an unknown flag", []string{"--no-such-flag"}, 2, []string{"unknown flag", "hint"}},
		} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				u := prepareUp(t, documents, c.args...)
				if err := u.launch(); err != nil {
					t.Fatal(err)
				}
				ended(t, u)
				said := u.log.String()
				if code := u.cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(said, "sallyport: error: ") {
					t.Errorf("exit code %d, want %d, and it says\n%s", code, c.code, said)
				}
				for _, want := range c.says {
					if !strings.Contains(said, want) {
						t.Errorf("%q is not in\n%s", want, said)
					}
				}
			})
		}
	})
	if a := running.as(t, "/app", http2).chat(t, "chat", "m"); a.status != http.StatusOK {
		t.Errorf("one of them has harmed the one that runs: %v", a)
	}
}

func ended(t *testing.T, u *up) {
	t.Helper()
	eventually(t, "end of `up`", func() bool {
		select {
		case <-u.exit:
			return true
		default:
			return false
		}
	})
}

// TestBrokenDocuments keeps the last good generation, and tells what is wrong and where.
func TestBrokenDocuments(t *testing.T) {
	t.Parallel()
	_, documents := oneChat(t)
	good := documents["all.yaml"]
	broken := grant("second", "/nobody", "chatt", "Infer", "m")
	u := prepareUp(t, map[string]string{"all.yaml": good, "second.yaml": broken})
	if err := u.launch(); err != nil {
		t.Fatal(err)
	}
	wrong := func() {
		t.Helper()
		var out string
		eventually(t, "problem in the status", func() bool {
			text, _, code := u.ask(t, "status")
			out = text
			return code == 1
		})
		at := filepath.Join(u.docs, "second.yaml") + ":"
		if !strings.Contains(out, "problem: "+at) || !strings.Contains(out, `"chatt"`) || !strings.Contains(out, "did you mean") {
			t.Errorf("status says\n%s", out)
		}
	}
	// At the start: nothing is in force, so nothing is open.
	wrong()
	if conn, err := net.Dial("tcp", u.listen); err == nil {
		conn.Close()
		t.Error("the gateway listens without a generation")
	}
	u.write(t, "second.yaml", grant("second", "/second", "chat", "Infer", "m"))
	if err := u.ready(); err != nil {
		t.Fatal(err)
	}
	fine := func() {
		t.Helper()
		for _, who := range []string{"/app", "/second"} {
			if a := u.as(t, who, http2).chat(t, "chat", "m"); a.status != http.StatusOK {
				t.Errorf("%s: %v", who, a)
			}
		}
	}
	fine()
	if out, _, code := u.ask(t, "status"); code != 0 {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	// While it runs: the last good one stays.
	u.write(t, "second.yaml", broken)
	wrong()
	fine()
	wantProblem(t, u.as(t, "/nobody", http2).chat(t, "chat", "m"), http.StatusForbidden, "no_grant")
	// Also over a restart of Envoy, which must get the same again.
	pid := u.envoy(t)
	kill(t, pid)
	eventually(t, "way through", func() bool { return u.as(t, "/app", http2).chat(t, "chat", "m").status == http.StatusOK })
	fine()
	u.write(t, "second.yaml", grant("second", "/second", "chat", "Infer", "m"))
	eventually(t, "healthy status", func() bool { _, _, code := u.ask(t, "status"); return code == 0 })
}

// TestBackendDown answers in the protocol's shape, and records whose fault it was.
func TestBackendDown(t *testing.T) {
	t.Parallel()
	closed := freeAddress()
	b := newBackend()
	dying := b.address()
	u := startUp(t, map[string]string{"all.yaml": endpoint("chat", "OpenAI", closed) + endpoint("docs", "Chroma", closed) + endpoint("dying", "OpenAI", dying) +
		grant("chat", "/app", "chat", "Infer", "'*'") + grant("docs", "/app", "docs", "Read", "'*'") + grant("dying", "/app", "dying", "Infer", "'*'")})
	for _, v := range []version{http1, http2} {
		who := u.as(t, "/app", v)
		failed := func(a answer) {
			t.Helper()
			if f := u.flow(t, a); f.Verdict != telemetry.Failed || !strings.HasPrefix(f.Rule, "grant/") || f.Status != 503 {
				t.Errorf("recorded as %+v", f)
			}
		}
		a := who.chat(t, "chat", "m")
		wantProblem(t, a, http.StatusServiceUnavailable, "backend_unavailable")
		failed(a)
		a = who.send(t, request{method: "GET", host: hostOf("chat"), path: "/v1/models"}) // by the catalogue
		wantProblem(t, a, http.StatusServiceUnavailable, "backend_unavailable")
		failed(a)
		for _, path := range []string{"/api/v2/heartbeat", listPath} {
			a = who.send(t, request{method: "GET", host: hostOf("docs"), path: path})
			var got struct{ Error, Message string }
			if err := json.Unmarshal([]byte(a.body), &got); err != nil || a.status != http.StatusServiceUnavailable || got.Error != "InternalError" {
				t.Errorf("%s: %v", path, a)
			}
			failed(a)
		}
		// Who is not allowed learns nothing of the backend either.
		wantProblem(t, u.as(t, "/nobody", v).chat(t, "chat", "m"), http.StatusForbidden, "no_grant")
	}
	who := u.as(t, "/app", http1)
	if a := who.chat(t, "dying", "m"); a.status != http.StatusOK {
		t.Fatal(a)
	}
	b.server.CloseClientConnections()
	b.server.Close()
	eventually(t, "answer without the backend", func() bool { return who.chat(t, "dying", "m").status == http.StatusServiceUnavailable })
	l, err := net.Listen("tcp", dying) // and it is found when it is back
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: b}
	defer server.Close()
	go server.Serve(l)
	eventually(t, "answer of the backend", func() bool { return who.chat(t, "dying", "m").status == http.StatusOK })
}

// TestListenerRefused shows in the status what Envoy has refused, and why.
func TestListenerRefused(t *testing.T) {
	t.Parallel()
	_, documents := oneChat(t)
	u := startUp(t, nil) // no endpoint, so no listener yet
	taken, err := net.Listen("tcp", u.listen)
	if err != nil {
		t.Fatal(err)
	}
	u.write(t, "all.yaml", documents["all.yaml"])
	var out string
	eventually(t, "refusal in the status", func() bool {
		text, _, code := u.ask(t, "status")
		out = text
		return code == 1
	})
	if !strings.Contains(out, "refuses") || !strings.Contains(out, "Listener mtls") || !strings.Contains(strings.ToLower(out), "address already in use") {
		t.Errorf("status says\n%s", out)
	}
	t.Log(out)
	taken.Close()
	u.write(t, "more.yaml", grant("more", "/more", "chat", "Infer", "m"))
	eventually(t, "way through", func() bool { return u.as(t, "/more", http2).chat(t, "chat", "m").status == http.StatusOK })
	if out, _, code := u.ask(t, "status"); code != 0 {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}
