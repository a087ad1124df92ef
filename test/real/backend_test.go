package real

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// backend is a server behind the gateway that keeps what it is asked. It speaks as much of the OpenAI and Chroma
// APIs as is needed here.
type backend struct {
	server      *httptest.Server
	collections []string     // what it holds, as Chroma; not to be changed once it is asked
	streams     chan *stream // every stream that was begun; the test says what is sent
	mu          sync.Mutex
	got         []received
}

// received is a request as it came.
type received struct {
	method, path string
	header       http.Header
	body         string
}

func newBackend() *backend {
	b := &backend{streams: make(chan *stream, 64)}
	b.server = httptest.NewServer(b)
	return b
}

// ownBackend ends with the test.
func ownBackend(t testing.TB) *backend {
	b := newBackend()
	t.Cleanup(func() {
		b.server.CloseClientConnections()
		b.server.Close()
	})
	return b
}

func (b *backend) address() string { return b.server.Listener.Addr().String() }

// taken returns what was asked since it was called last, except what the catalogue asks by itself.
func (b *backend) taken() []received {
	b.mu.Lock()
	defer b.mu.Unlock()
	got := b.got
	b.got = nil
	return got
}

const listPath = "/api/v2/tenants/default_tenant/databases/default_database/collections"

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if r.Method == http.MethodGet && r.URL.Path == listPath {
		b.list(w)
		return
	}
	b.mu.Lock()
	b.got = append(b.got, received{r.Method, r.RequestURI, r.Header.Clone(), string(body)})
	b.mu.Unlock()
	var asked struct {
		Model  string
		Stream bool
	}
	_ = json.Unmarshal(body, &asked)
	if asked.Stream {
		s := &stream{writer: w, orders: make(chan order), gone: make(chan struct{})}
		b.streams <- s
		s.serve(r)
		return
	}
	w.Header().Set("content-type", "application/json")
	fmt.Fprintf(w, `{"object":"chat.completion","model":%q,"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}`, asked.Model)
}

// uuidOf is the UUID of a collection here.
func uuidOf(name string) string {
	h := fmt.Sprintf("%x", sha256.Sum256([]byte(name)))
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:32]}, "-")
}

func (b *backend) list(w http.ResponseWriter) {
	w.Header().Set("content-type", "application/json")
	_, _ = io.WriteString(w, listOf(b.collections))
}

// listOf is what Chroma tells of its collections.
func listOf(names []string) string {
	all := []map[string]string{}
	for _, name := range names {
		all = append(all, map[string]string{"id": uuidOf(name), "name": name})
	}
	text, _ := json.Marshal(all)
	return string(text)
}

// stream is an answer that the test writes.
type stream struct {
	writer http.ResponseWriter
	orders chan order
	gone   chan struct{} // closed when the gateway has gone or the test has ended the answer
}

type order struct {
	text string
	end  bool
	done chan struct{}
}

func (s *stream) serve(r *http.Request) {
	defer close(s.gone)
	s.writer.Header().Set("content-type", "text/event-stream")
	flush := http.NewResponseController(s.writer)
	_ = flush.Flush()
	for {
		select {
		case o := <-s.orders:
			_, _ = io.WriteString(s.writer, o.text)
			_ = flush.Flush()
			close(o.done)
			if o.end {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// write sends a piece of the answer.
func (s *stream) write(t testing.TB, text string) { t.Helper(); s.order(t, order{text: text}) }

// end sends the last piece.
func (s *stream) end(t testing.TB, text string) { t.Helper(); s.order(t, order{text: text, end: true}) }

func (s *stream) order(t testing.TB, o order) {
	t.Helper()
	o.done = make(chan struct{})
	select {
	case s.orders <- o:
		<-o.done
	case <-s.gone:
		t.Fatal("the gateway has left the stream")
	case <-time.After(patience):
		t.Fatal("the backend does not take orders")
	}
}

// begun waits for the stream that a request has begun.
func (b *backend) begun(t testing.TB) *stream {
	t.Helper()
	select {
	case s := <-b.streams:
		return s
	case <-time.After(patience):
		t.Fatal("no stream has reached the backend")
		return nil
	}
}
