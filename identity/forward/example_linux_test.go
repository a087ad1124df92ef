package forward

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
)

// TestUnmodifiedApp runs the example, with the official client, against a gateway that streams.
func TestUnmodifiedApp(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	python := filepath.Join(root, ".parts/venv/bin/python")
	if _, err := os.Stat(python); err != nil {
		t.Skip("`make parts` installs the official client")
	}
	w := newWorld(t, "tcp")
	run := func() (string, error) {
		cmd := exec.CommandContext(t.Context(), python, filepath.Join(root, "examples/unmodified-app/ask.py"), "Who", "am", "I?")
		cmd.Env = append(os.Environ(), "OPENAI_BASE_URL="+w.base+"/chat/v1", "OPENAI_API_KEY=secret")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run(); err == nil || !strings.Contains(out, "hint: a Workload document") || !strings.Contains(out, identitytest.Me().String()) {
		t.Errorf("without an identity: %v, %s", err, out)
	}
	w.issuer.Set([]issuer.Entry{identitytest.Entry("ask", identitytest.Me())})
	w.handle(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the key was passed on")
		}
		rw.Header().Set("Content-Type", "text/event-stream")
		for _, word := range []string{"You ", "are ", r.TLS.PeerCertificates[0].URIs[0].String()} {
			fmt.Fprintf(rw, "data: {\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"content\":%q}}]}\n\n", word)
			rw.(http.Flusher).Flush()
		}
		fmt.Fprint(rw, "data: [DONE]\n\n")
	})
	if out, err := run(); err != nil || out != "You are spiffe://example.org/ask\n" {
		t.Errorf("got %v, %s", err, out)
	}
}
