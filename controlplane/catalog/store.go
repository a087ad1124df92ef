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
	"strconv"
	"time"

	"sallyport.dev/segment"
)

// maxAnswer bounds what is read from a store, in bytes.
const maxAnswer = 64 << 20

// store is the server behind an endpoint, asked directly.
type store struct{ endpoint *segment.Endpoint }

func storeOf(e *segment.Endpoint) store { return store{e} }

// collection is what Chroma tells of a collection, as far as it matters here.
type collection struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// database is the path below which the endpoint's collections are.
func (s store) database() string {
	return "/api/v2/tenants/" + url.PathEscape(s.endpoint.Database.Tenant) + "/databases/" + url.PathEscape(s.endpoint.Database.Name)
}

// collections are all that the endpoint's own database holds.
func (s store) collections(ctx context.Context) ([]collection, error) {
	raw, err := s.listed(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]collection, len(raw))
	for i, r := range raw {
		if err := json.Unmarshal(r, &all[i]); err != nil {
			return nil, fmt.Errorf("read collection: %w", err)
		}
	}
	return all, nil
}

// listed are the same as the store writes them.
func (s store) listed(ctx context.Context) ([]json.RawMessage, error) {
	const page = 500
	var all []json.RawMessage
	for {
		var some []json.RawMessage
		at := s.database() + "/collections?limit=" + strconv.Itoa(page) + "&offset=" + strconv.Itoa(len(all))
		if err := s.get(ctx, at, &some); err != nil {
			return nil, err
		}
		all = append(all, some...)
		if len(some) < page {
			return all, nil
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

// do asks the backends in their order until one answers.
func (s store) do(ctx context.Context, method, at string, body []byte) (int, []byte, error) {
	var failures []error
	for _, b := range s.endpoint.Backends {
		transport, scheme, err := transportTo(b)
		if err != nil {
			return 0, nil, err
		}
		defer transport.CloseIdleConnections()
		client := http.Client{Transport: transport, Timeout: storeTime}
		for _, a := range b.Addresses {
			target := scheme + "://" + net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) + at
			req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
			if err != nil {
				return 0, nil, fmt.Errorf("ask backend %s: %w", b.Name, err)
			}
			req.Header.Set("content-type", "application/json")
			resp, err := client.Do(req)
			if err != nil {
				failures = append(failures, err)
				continue
			}
			answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
			resp.Body.Close()
			if err != nil {
				return 0, nil, fmt.Errorf("read answer of backend %s: %w", b.Name, err)
			}
			return resp.StatusCode, answer, nil
		}
	}
	return 0, nil, fmt.Errorf("ask backends: %w", errors.Join(failures...))
}

func transportTo(b segment.Backend) (*http.Transport, string, error) {
	t := &http.Transport{DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext}
	switch b.TLS.Mode {
	case segment.TLSNone:
		return t, "http", nil
	case segment.TLSServer:
		pem, err := os.ReadFile(b.TLS.CAFile)
		if err != nil {
			return nil, "", fmt.Errorf("read CA of backend %s: %w", b.Name, err)
		}
		t.TLSClientConfig = &tls.Config{ServerName: b.TLS.ServerName, MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, "", fmt.Errorf("read CA of backend %s: no certificate in %s", b.Name, b.TLS.CAFile)
		}
		return t, "https", nil
	}
	return nil, "", fmt.Errorf("ask backend %s: the control plane does not speak TLS mode %s yet", b.Name, b.TLS.Mode)
}
