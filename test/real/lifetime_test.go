package real

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"sallyport.dev/telemetry"
)

// endsIn signs an SVID that is good for about so long, and says until when.
func (u *up) endsIn(t *testing.T, who string, d time.Duration) (tls.Certificate, time.Time) {
	t.Helper()
	cert := u.keys.sign(t, svid(who, d))
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert, leaf.NotAfter
}

// TestConnectionOutlivesNoCertificate ends requests, streams and connections with the certificate that opened them.
func TestConnectionOutlivesNoCertificate(t *testing.T) {
	t.Parallel()
	one, two := ownBackend(t), ownBackend(t)
	u := startUp(t, map[string]string{"all.yaml": openAI("chat", one) + openAI("two", two) +
		grant("one", "/app", "chat", "Infer", "m") + grant("two", "/app", "two", "Infer", "m")}, "--svid-ttl", "1h")
	for _, v := range []version{http1, http2} {
		t.Run("request/"+string(v), func(t *testing.T) {
			t.Parallel()
			cert, end := u.endsIn(t, "/app", 3*time.Second)
			who := u.with(t, v, cert)
			if a := who.chat(t, "chat", "m"); a.status != http.StatusOK {
				t.Fatal(a)
			}
			<-time.After(time.Until(end) + 10*time.Millisecond)
			a := who.chat(t, "chat", "m")
			p := wantProblem(t, a, http.StatusUnauthorized, "unauthenticated")
			if n := len(who.dialed); n != 1 {
				t.Errorf("asked over %d connections: %v", n, p)
			}
			if f := u.flow(t, a); f.Verdict != telemetry.Refused || f.Status != http.StatusUnauthorized {
				t.Errorf("recorded as %+v", f)
			}
			who.client.CloseIdleConnections()
			if a := who.chat(t, "chat", "m"); a.err == nil {
				t.Errorf("a new connection on it: %v", a)
			}
		})
		t.Run("stream/"+string(v), func(t *testing.T) {
			t.Parallel()
			cert, end := u.endsIn(t, "/app", 3*time.Second)
			b, name := one, "chat"
			if v == http2 {
				b, name = two, "two"
			}
			resp := u.with(t, v, cert).open(t, name, "m")
			s := b.begun(t)
			s.write(t, "data: 1\n\n")
			<-s.gone
			late := time.Since(end)
			if late < -500*time.Millisecond || late > time.Second {
				t.Errorf("the stream was cut %s behind the end of its certificate", late)
			}
			if _, err := io.ReadAll(resp.body); err == nil {
				t.Error("the caller takes the stream for whole")
			}
			id := resp.header.Get("x-request-id")
			f := u.flows(t, 1, func(f telemetry.Flow) bool { return f.ID == id })[0]
			t.Logf("cut %s behind the end, recorded as %s: %s", late.Round(time.Millisecond), f.Verdict, f.Detail)
		})
	}
}

// TestConnectionAge makes connections end while the certificate that opened them is still good, and no request is
// lost to it.
func TestConnectionAge(t *testing.T) {
	t.Parallel()
	b := ownBackend(t)
	u := startUp(t, map[string]string{"all.yaml": openAI("chat", b) + grant("all", "/app", "chat", "Infer", "m")}, "--svid-ttl", "20s")
	const age = 4 * time.Second // a fifth
	for _, v := range []version{http1, http2} {
		t.Run("busy/"+string(v), func(t *testing.T) {
			t.Parallel()
			who, began, asked := u.as(t, "/app", v), time.Now(), 0
			eventually(t, "second connection", func() bool {
				if a := who.chat(t, "chat", "m"); a.status != http.StatusOK {
					t.Fatalf("lost a request: %v", a)
				}
				asked++
				return len(who.dialed) > 1
			})
			if took := time.Since(began); took < age-100*time.Millisecond || took > age+3*time.Second {
				t.Errorf("the connection lasted %s and %d requests, want about %s", took, asked, age)
			}
		})
		t.Run("idle/"+string(v), func(t *testing.T) {
			t.Parallel()
			who := u.as(t, "/app", v)
			conn, err := who.dial(t.Context(), hostOf("chat"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetReadDeadline(time.Now().Add(2*age + 2*time.Second))
			if _, err := io.Copy(io.Discard, conn); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("an idle connection is still open after %s", 2*age)
			}
		})
	}
}
