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
	maxAnswer      = 64 << 20 // bytes
	maxCollections = 100_000
)

// store is the server behind an endpoint, asked directly.
type store struct {
	endpoint  *segment.Endpoint
	transport func(segment.Backend) (*http.Transport, error)
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
		var some []json.RawMessage
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
		case len(all) > maxCollections:
			return nil, fmt.Errorf("list collections: more than %d", maxCollections)
		}
	}
}

func (s store) get(ctx context.Context, at string, into any) error {
	code, body, err := s.do(ctx, http.MethodGet, at, nil)
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("get %s: status %d", at, code)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("read answer to %s: %w", at, err)
	}
	return nil
}

// do asks the backends in their order until one answers. What may change something is asked once: another address is
// tried only if no connection was made.
func (s store) do(ctx context.Context, method, at string, body []byte) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	var failures []error
	for _, b := range s.endpoint.Backends {
		transport, err := s.transport(b)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		scheme := "http://"
		if b.TLS.Mode != segment.TLSNone {
			scheme = "https://"
		}
		for _, a := range b.Addresses {
			target := scheme + net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) + at
			code, answer, err := ask(ctx, transport, method, target, body)
			if err == nil {
				return code, answer, nil
			}
			failures = append(failures, fmt.Errorf("ask backend %s: %w", b.Name, err))
			if ctx.Err() != nil || method != http.MethodGet && !neverConnected(err) {
				return 0, nil, errors.Join(failures...)
			}
		}
	}
	return 0, nil, errors.Join(failures...)
}

func neverConnected(err error) bool {
	var failed *net.OpError
	return errors.As(err, &failed) && failed.Op == "dial"
}

func ask(ctx context.Context, transport *http.Transport, method, target string, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("content-type", "application/json")
	resp, err := transport.RoundTrip(req) // a redirect is an answer: nobody decided about where it leads
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(answer) > maxAnswer {
		err = fmt.Errorf("more than %d bytes", maxAnswer)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("read answer: %w", err)
	}
	return resp.StatusCode, answer, nil
}

// transportTo returns the way to a backend, made once per generation.
func (c *Catalog) transportTo(b segment.Backend) (*http.Transport, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.transports[b.TLS]; t != nil {
		return t, nil
	}
	t, err := newTransport(b.TLS)
	if err != nil {
		return nil, fmt.Errorf("ask backend %s: %w", b.Name, err)
	}
	if c.transports == nil {
		c.transports = map[segment.BackendTLS]*http.Transport{}
	}
	c.transports[b.TLS] = t
	return t, nil
}

func newTransport(how segment.BackendTLS) (*http.Transport, error) {
	t := &http.Transport{
		DialContext:       (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		DisableKeepAlives: true, // a connection that is just being closed would fail what must not be asked twice
	}
	switch how.Mode {
	case segment.TLSNone:
		return t, nil
	case segment.TLSServer:
		pem, err := os.ReadFile(how.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read CA: %w", err)
		}
		t.TLSClientConfig = &tls.Config{ServerName: how.ServerName, MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA: no certificate in %s", how.CAFile)
		}
		return t, nil
	}
	return nil, fmt.Errorf("the control plane does not speak TLS mode %s yet", how.Mode)
}
