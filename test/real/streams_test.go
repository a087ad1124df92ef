package real

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"testing"
)

// TestStreams passes each event on at once, and all bytes as they are.
func TestStreams(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "streams")
	for _, v := range []version{http1, http2} {
		t.Run(string(v), func(t *testing.T) {
			resp := u.as(t, "/streams", v).open(t, "streams", "m")
			s, lines := b.begun(t), bufio.NewReader(resp.body)
			if got := resp.header.Get("content-type"); got != "text/event-stream" {
				t.Errorf("content type %q", got)
			}
			for i := range 5 { // the next is not written before this one has been read
				event := fmt.Sprintf("data: {\"n\": %d, \"text\":\"\u00e9\\u2028\"}\n\n", i)
				s.write(t, event)
				got := make([]byte, len(event))
				if _, err := io.ReadFull(lines, got); err != nil || string(got) != event {
					t.Fatalf("event %d: %q, %v", i, got, err)
				}
			}
			rest := ": ping\r\n\r\ndata:x\ndata:\xff\x00" + strings.Repeat("long ", 50000) + "\n\ndata: [DONE]\n\n"
			s.end(t, rest)
			if got, err := io.ReadAll(lines); err != nil || string(got) != rest {
				t.Errorf("the rest has %d bytes, want %d: %v", len(got), len(rest), err)
			}
			<-s.gone
		})
	}
}

// TestCallerLeavesStream tells the backend when the caller goes, so that it does not go on for nobody.
func TestCallerLeavesStream(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "leaving")
	for _, v := range []version{http1, http2} {
		resp := u.as(t, "/leaving", v).open(t, "leaving", "m")
		s := b.begun(t)
		s.write(t, "data: 1\n\n")
		resp.body.Close()
		<-s.gone
	}
}
