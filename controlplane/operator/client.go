package operator

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// Client asks a running control plane.
type Client struct {
	Warn func(string) // is told why an answer is not whole; nil: nobody is
	http http.Client
}

// NewClient returns a client of the control plane at a Unix socket. It does not connect yet.
func NewClient(socket string) *Client {
	return &Client{http: http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}}
}

// RefusedError is an answer of the control plane that is an error.
type RefusedError struct{ Failure }

func (e *RefusedError) Error() string { return e.Failure.Error }

// Get asks for a path and decodes the answer.
func (c *Client) Get(ctx context.Context, path string, query url.Values, into any) error {
	return c.decoded(ctx, http.MethodGet, path, query, into)
}

// Post has something changed and decodes the answer.
func (c *Client) Post(ctx context.Context, path string, query url.Values, into any) error {
	return c.decoded(ctx, http.MethodPost, path, query, into)
}

func (c *Client) decoded(ctx context.Context, method, path string, query url.Values, into any) error {
	body, err := c.ask(ctx, method, path, query)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("read answer of the control plane: %w", err)
	}
	return nil
}

// Stream asks for a path and returns the answer as it comes. The caller closes it.
func (c *Client) Stream(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	return c.ask(ctx, http.MethodGet, path, query)
}

func (c *Client) ask(ctx context.Context, method, path string, query url.Values) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://sallyport"+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, fmt.Errorf("ask the control plane: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the control plane: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		refused := &RefusedError{}
		if json.NewDecoder(resp.Body).Decode(&refused.Failure) != nil {
			refused.Failure.Error = resp.Status
		}
		return nil, refused
	}
	if warning := resp.Header.Get(Warning); warning != "" && c.Warn != nil {
		c.Warn(warning)
	}
	return resp.Body, nil
}
