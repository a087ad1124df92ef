package real

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/telemetry"
)

// TestDenied shows every caller its 403 and why, whatever client it uses, and however much it sends.
func TestDenied(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "denied")
	folder := t.TempDir()
	u.writePEM(t, folder, "/stranger")
	_, port, _ := net.SplitHostPort(u.listen)
	python, _ := filepath.Abs(clientsPython) // which has what httpx needs for HTTP/2
	type run func(t *testing.T, number string, size int, expect bool) (status int, body string)
	script := func(program ...string) run {
		return func(t *testing.T, number string, size int, expect bool) (int, string) {
			args := append(program[1:len(program):len(program)], number, chatPath, hostOf("denied"), port, folder, fmt.Sprint(size), "")
			if expect {
				args[len(args)-1] = "yes"
			}
			return statusAndBody(t, program[0], args...)
		}
	}
	versions := map[string]version{"1": http1, "2": http2}
	clients := map[string]run{
		"Go": func(t *testing.T, number string, size int, expect bool) (int, string) {
			r := request{host: hostOf("denied"), path: chatPath, header: http.Header{}, body: strings.NewReader(bodyOf(size))}
			if expect {
				r.header.Set("Expect", "100-continue")
			}
			a := u.as(t, "/stranger", versions[number]).send(t, r)
			if a.err != nil {
				t.Fatal(a.err)
			}
			return a.status, a.body
		},
		"curl": func(t *testing.T, number string, size int, expect bool) (int, string) {
			file := filepath.Join(t.TempDir(), "body")
			if err := os.WriteFile(file, []byte(bodyOf(size)), 0o600); err != nil {
				t.Fatal(err)
			}
			args := []string{"-sS", "--resolve", hostOf("denied") + ":" + port + ":127.0.0.1", "--cacert", folder + "/ca.pem",
				"--cert", folder + "/svid.pem", "--key", folder + "/key.pem", "--data-binary", "@" + file, "-w", "%{stderr}%{http_code}",
				"https://" + hostOf("denied") + ":" + port + chatPath, map[string]string{"1": "--http1.1", "2": "--http2"}[number]}
			if expect {
				args = append(args, "-H", "Expect: 100-continue")
			}
			return statusAndBody(t, "curl", args...)
		},
		"node":  script("node", "testdata/denied.js"),
		"httpx": script(python, "testdata/denied.py"),
	}
	needs := map[string]string{"curl": "curl", "node": "node", "httpx": python}
	left, total := 0, 0
	for name, ask := range clients {
		if program := needs[name]; program != "" {
			if _, err := exec.LookPath(program); err != nil {
				t.Logf("%s is not here", name)
				left++
				continue
			}
		}
		for _, number := range []string{"1", "2"} {
			for _, size := range []int{0, 1 << 20, 12 << 20, envoy.MaxBodyBytes + 1<<20} {
				if (name == "curl" || name == "httpx") && number == "2" && size > envoy.MaxBodyBytes {
					continue // they drop an answer that comes before they have sent all, as they must not (RFC 9113, section 8.1)
				}
				for _, expect := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/HTTP %s/%d bytes/expect %v", name, number, size, expect), func(t *testing.T) {
						total++
						status, body := ask(t, number, size, expect)
						var p problem
						if size > envoy.MaxBodyBytes { // refused before it has all come
							if err := json.Unmarshal([]byte(body), &p); err != nil || status != http.StatusRequestEntityTooLarge || p.Error.Code != "request_too_large" {
								t.Errorf("got %d %s", status, body)
							}
							return
						}
						if err := json.Unmarshal([]byte(body), &p); err != nil || status != http.StatusForbidden {
							t.Fatalf("got %d %s", status, body)
						}
						if p.Error.Message != domain+"/stranger has no grant for Infer m" || p.Error.Code != "no_grant" || p.Error.Type != "permission_denied" {
							t.Errorf("got %s", body)
						}
						f := u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == p.Error.RequestID })[0]
						if f.Verdict != telemetry.Denied || f.Rule != "default-deny" || f.Resource != "m" || f.Operation != "Infer" || f.Status != 403 ||
							f.Endpoint != "denied" || f.Caller.String() != domain+"/stranger" || f.BytesIn != int64(len(bodyOf(size))) && name != "httpx" {
							t.Errorf("recorded as %+v", f)
						}
					})
				}
			}
		}
	}
	t.Logf("%d requests by %d clients; %d clients are not here", total, len(clients)-left, left)
	if got := b.taken(); len(got) > 0 {
		t.Errorf("the backend was asked %d times", len(got))
	}
}

// TestDeniedInOtherShapes answers in the words of the protocol, and tells nothing of what else there is.
func TestDeniedInOtherShapes(t *testing.T) {
	t.Parallel()
	u, _ := shared(t, "vectors")
	eventually(t, "collections known", func() bool {
		return u.as(t, "/vectors-admin", http2).post(t, "vectors", listPath+"/"+uuidOf("payroll")+"/query", `{}`).status == http.StatusOK
	})
	for _, path := range []string{listPath + "/" + uuidOf("handbook") + "/query", listPath + "/" + uuidOf("unheard of") + "/query"} {
		a := u.as(t, "/stranger", http2).post(t, "vectors", path, `{}`)
		var got struct{ Error, Message string }
		if err := json.Unmarshal([]byte(a.body), &got); err != nil || a.status != http.StatusForbidden || got.Error != "AuthError" ||
			!strings.Contains(got.Message, domain+"/stranger has no grant for Read") || !strings.Contains(got.Message, a.id()) {
			t.Errorf("%s: %v", path, a)
		}
	}
	denied := func(who, path string) string {
		a := u.as(t, who, http2).post(t, "vectors", path, `{}`)
		if a.status != http.StatusForbidden {
			t.Errorf("%s: %v", path, a)
		}
		return strings.NewReplacer(a.id(), "ID", "handbook", "NAME", "payroll", "NAME").Replace(a.body)
	}
	there, missing := denied("/stranger", listPath+"/"+uuidOf("payroll")+"/query"), denied("/stranger", listPath+"/"+uuidOf("missing")+"/query")
	if there != missing {
		t.Errorf("a stranger learns which UUIDs there are: %s, but %s", there, missing)
	}
}

func bodyOf(size int) string { return `{"model":"m","a":"` + strings.Repeat("x", size) + `"}` }

// statusAndBody runs a client. It prints the body, and the status before it or to stderr.
func statusAndBody(t *testing.T, program string, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", program, err, out.String(), errOut.String())
	}
	var status int
	if _, err := fmt.Sscan(errOut.String(), &status); err == nil {
		return status, out.String()
	}
	first, body, _ := strings.Cut(out.String(), " ")
	_, _ = fmt.Sscan(first, &status) // 0 is told as such
	return status, body
}

// writePEM writes an SVID as programs read it.
func (u *up) writePEM(t testing.TB, folder, who string) {
	t.Helper()
	cert := u.keys.sign(t, svid(who, time.Hour))
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"svid.pem": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: key},
		"ca.pem":   {Type: "CERTIFICATE", Bytes: u.keys.ca.Raw},
	} {
		if err := os.WriteFile(filepath.Join(folder, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
