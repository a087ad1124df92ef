package real

import (
	"bufio"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// runningStream is a stream that must not be disturbed.
type runningStream struct {
	stream *stream
	lines  *bufio.Reader
}

func (c *caller) stream(t testing.TB, endpoint string, b *backend) runningStream {
	t.Helper()
	resp := c.open(t, endpoint, "m")
	r := runningStream{b.begun(t), bufio.NewReader(resp.body)}
	r.goesOn(t)
	return r
}

func (r runningStream) goesOn(t testing.TB) {
	t.Helper()
	const event = "data: more\n"
	r.stream.write(t, event)
	if got, err := r.lines.ReadString('\n'); err != nil || got != event {
		t.Fatalf("the stream has been disturbed: %q, %v", got, err)
	}
}

// TestGrantTakenAndGiven edits grants and endpoints under load: what is changed changes at once, and nothing else.
func TestGrantTakenAndGiven(t *testing.T) {
	t.Parallel()
	b := ownBackend(t)
	given := grant("a", "/app", "a", "Infer", "m")
	u := startUp(t, map[string]string{
		"endpoints.yaml": openAI("a", b) + openAI("b", b),
		"a.yaml":         given,
		"b.yaml":         grant("b", "/app", "b", "Infer", "m"),
	})
	for _, v := range []version{http1, http2} {
		t.Run(string(v), func(t *testing.T) {
			who, other := u.as(t, "/app", v), u.as(t, "/app", v)
			stays := other.stream(t, "b", b)
			if a := who.chat(t, "a", "m"); a.status != http.StatusOK {
				t.Fatal(a)
			}
			until := func(what string, status int) {
				t.Helper()
				began := time.Now()
				eventually(t, what, func() bool { return who.chat(t, "a", "m").status == status })
				t.Logf("%s %s after the edit", what, time.Since(began).Round(time.Millisecond))
				stays.goesOn(t)
			}
			if err := os.Remove(filepath.Join(u.docs, "a.yaml")); err != nil {
				t.Fatal(err)
			}
			until("denied", http.StatusForbidden)
			u.write(t, "a.yaml", given)
			until("allowed again", http.StatusOK)
			u.write(t, "a.yaml", given+grant("no", "/app", "a", "Infer", "m")+"  effect: Deny\n")
			until("denied by a Deny", http.StatusForbidden)
			u.write(t, "a.yaml", given)
			until("allowed once more", http.StatusOK)

			// An endpoint comes and goes; nothing of this concerns the others.
			u.write(t, "c.yaml", openAI("c", b)+grant("c", "/app", "c", "Infer", "m"))
			third := u.as(t, "/app", v)
			eventually(t, "new endpoint", func() bool { return third.chat(t, "c", "m").status == http.StatusOK })
			if err := os.Remove(filepath.Join(u.docs, "c.yaml")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "end of the new endpoint", func() bool {
				third.client.CloseIdleConnections()
				return third.chat(t, "c", "m").err != nil
			})
			until("still allowed", http.StatusOK)
			if n := len(who.dialed); n != 1 {
				t.Errorf("it took %d connections, not the one that was there before", n)
			}
			stays.stream.end(t, "")
		})
	}
}
