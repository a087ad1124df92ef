package catalog

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"time"

	"sallyport.dev/segment"
)

// What is taken from a store at most.
const (
	maxAnswer = 64 << 20 // bytes, of an answer and of a list
	maxItems  = 100_000  // of a list
	maxPages  = 1000
)

var errTooMany = fmt.Errorf("the list has more than %d items, or than %d bytes", maxItems, maxAnswer)

// array is a JSON array of no more items than a list may have.
type array []json.RawMessage

// UnmarshalJSON reads no further than it must.
func (a *array) UnmarshalJSON(text []byte) error {
	*a = nil
	if string(text) == "null" {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if begin, err := d.Token(); err != nil || begin != json.Delim('[') {
		return errors.New("this is no array")
	}
	for d.More() {
		var one json.RawMessage
		if err := d.Decode(&one); err != nil {
			return err
		}
		if *a = append(*a, one); len(*a) > maxItems {
			return errTooMany
		}
	}
	return nil
}

// store is the server behind an endpoint, asked directly.
type store struct {
	endpoint  *segment.Endpoint
	transport func(b segment.Backend, overHTTP2 bool) (*http.Transport, error)
}

func (c *Catalog) storeOf(e *segment.Endpoint) store { return store{e, c.transportTo} }

// collection is what Chroma tells of a collection, as far as it matters here.
type collection struct {
	ID   string `json:"id"`
	Name string `json:"name"`

	raw json.RawMessage // all of it, if it is from a list
}

var (
	canonicalUUID  = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`) // RFC 9562, section 4
	collectionName = regexp.MustCompile(`^[a-zA-Z0-9._-]{1,512}$`)
)

// usable reports whether a gateway may be told of the collection: nothing else gets from a store into its configuration.
func (col collection) usable() bool {
	return canonicalUUID.MatchString(col.ID) && collectionName.MatchString(col.Name)
}

// database is the path below which the endpoint's collections are.
func (s store) database() string {
	return "/api/v2/tenants/" + url.PathEscape(s.endpoint.Database.Tenant) + "/databases/" + url.PathEscape(s.endpoint.Database.Name)
}

// listed are all collections that the endpoint's own database holds.
func (s store) listed(ctx context.Context) ([]collection, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	const page = 500
	var all []collection
	seen := map[string]bool{}
	for offset := 0; ; {
		var some array
		at := s.database() + "/collections?limit=" + strconv.Itoa(page) + "&offset=" + strconv.Itoa(offset)
		if err := s.get(ctx, at, &some); err != nil {
			return nil, err
		}
		before := len(all)
		for _, raw := range some {
			col := collection{raw: raw}
			if json.Unmarshal(raw, &col) != nil {
				col.ID = "" // not usable
			}
			if !seen[col.ID] { // a change meanwhile may have moved it to the next page
				seen[col.ID] = true
				all = append(all, col)
			}
		}
		switch offset += len(some); {
		case len(some) < page:
			return all, nil
		case len(all) == before:
			return nil, fmt.Errorf("list collections: nothing new from number %d on", offset-len(some))
		case len(all) > maxItems:
			return nil, errTooMany
		}
	}
}

// paged asks for a list page by page. ask returns what is on the page at a cursor, "" being the first, and the cursor of the
// next; "": there is none.
func paged(ctx context.Context, ask func(ctx context.Context, cursor string) ([]json.RawMessage, string, error)) ([]json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	var all []json.RawMessage
	size, cursor := 0, ""
	for range maxPages {
		page, next, err := ask(ctx, cursor)
		if err != nil {
			return nil, err
		}
		for _, raw := range page {
			size += len(raw)
		}
		all = append(all, page...)
		switch {
		case len(all) > maxItems || size > maxAnswer:
			return nil, errTooMany
		case next == "":
			return all, nil
		case next == cursor:
			return nil, fmt.Errorf("list: page %q is followed by itself", cursor)
		}
		cursor = next
	}
	return nil, fmt.Errorf("list: more than %d pages", maxPages)
}

// call is one request to a store.
type call struct {
	method, at string
	header     map[string]string // besides the content type, which is JSON if nothing else is said
	body       []byte
	// lists says that it changes nothing although its method could: another address may be asked after this one.
	lists bool
	grpc  bool // it goes where gRPC is spoken, over HTTP/2
}

// answer is what a store says to a call.
type answer struct {
	code            int
	header, trailer http.Header
	body            []byte
}

func (s store) get(ctx context.Context, at string, into any) error {
	return s.read(ctx, call{method: http.MethodGet, at: at}, into)
}

// read takes an answer that is JSON.
func (s store) read(ctx context.Context, what call, into any) error {
	a, err := s.do(ctx, what)
	if err != nil {
		return err
	}
	if a.code != http.StatusOK {
		return fmt.Errorf("ask for %s: status %d", what.at, a.code)
	}
	if err := json.Unmarshal(a.body, into); err != nil {
		return fmt.Errorf("read answer to %s: %w", what.at, err)
	}
	return nil
}

// do asks the backends in their order until one answers. What may change something is asked once: another address is
// tried only if no connection was made.
func (s store) do(ctx context.Context, what call) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	failures := []error{errors.New("no address answers")}
	for _, b := range s.endpoint.Backends {
		transport, err := s.transport(b, what.grpc)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		scheme, addresses := "http://", b.Addresses
		if b.TLS.Mode != segment.TLSNone {
			scheme = "https://"
		}
		if what.grpc {
			addresses = b.GRPC
		}
		for _, a := range addresses {
			target := scheme + net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) + what.at
			told, err := ask(ctx, transport, target, what)
			if err == nil {
				return told, nil
			}
			failures = append(failures, fmt.Errorf("ask backend %s: %w", b.Name, err))
			if ctx.Err() != nil || what.method != http.MethodGet && !what.lists && !neverConnected(err) {
				return nil, errors.Join(failures...)
			}
		}
	}
	return nil, errors.Join(failures...)
}

func neverConnected(err error) bool {
	var failed *net.OpError
	return errors.As(err, &failed) && failed.Op == "dial"
}

func ask(ctx context.Context, transport *http.Transport, target string, what call) (*answer, error) {
	req, err := http.NewRequestWithContext(ctx, what.method, target, bytes.NewReader(what.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("content-type", "application/json")
	for name, value := range what.header {
		req.Header.Set(name, value)
	}
	resp, err := transport.RoundTrip(req) // a redirect is an answer: nobody decided about where it leads
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(body) > maxAnswer {
		err = fmt.Errorf("more than %d bytes", maxAnswer)
	}
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	return &answer{resp.StatusCode, resp.Header, resp.Trailer, body}, nil
}

// way is how a backend is spoken to.
type way struct {
	tls       segment.BackendTLS
	overHTTP2 bool
}

// transportTo returns the way to a backend, made once per generation.
func (c *Catalog) transportTo(b segment.Backend, overHTTP2 bool) (*http.Transport, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	how := way{b.TLS, overHTTP2}
	if t := c.transports[how]; t != nil {
		return t, nil
	}
	t, err := newTransport(how)
	if err != nil {
		return nil, fmt.Errorf("ask backend %s: %w", b.Name, err)
	}
	if c.transports == nil {
		c.transports = map[way]*http.Transport{}
	}
	c.transports[how] = t
	return t, nil
}

func newTransport(how way) (*http.Transport, error) {
	t := &http.Transport{
		DialContext:       (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		DisableKeepAlives: true, // a connection that is just being closed would fail what must not be asked twice
		Protocols:         new(http.Protocols),
	}
	t.Protocols.SetHTTP1(!how.overHTTP2)
	t.Protocols.SetHTTP2(how.overHTTP2)
	t.Protocols.SetUnencryptedHTTP2(how.overHTTP2)
	switch how.tls.Mode {
	case segment.TLSNone:
		return t, nil
	case segment.TLSServer:
		pem, err := os.ReadFile(how.tls.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read CA: %w", err)
		}
		t.TLSClientConfig = &tls.Config{ServerName: how.tls.ServerName, MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA: no certificate in %s", how.tls.CAFile)
		}
		return t, nil
	}
	return nil, fmt.Errorf("the control plane does not speak TLS mode %s yet", how.tls.Mode)
}
