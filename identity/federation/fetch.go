package federation

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
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"sallyport.dev/segment"
)

const (
	maxRedirects = 3
	maxHeader    = 64 << 10
)

// fetcher gets documents from where they are published. How long that may take is the context's to say.
type fetcher struct {
	// dial replaces the network in tests.
	dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// bundle gets the bundle of a trust domain, once (SPIFFE Federation, 5.2.1.4 and 5.2.2.4). The verifier is the bundle
// that an endpoint of the profile https_spiffe is verified with.
func (f fetcher) bundle(ctx context.Context, t segment.TrustDomain, verifier x509bundle.Source) (*spiffebundle.Bundle, error) {
	config, err := endpointTLS(t.Endpoint, verifier)
	if err != nil {
		return nil, err
	}
	document, err := f.get(ctx, t.Endpoint.URL, config)
	if err != nil {
		return nil, fmt.Errorf("fetch bundle: %w", err)
	}
	return decodeBundle(t.Domain, document)
}

// keys gets the keys of an issuer, once.
func (f fetcher) keys(ctx context.Context, t segment.TokenIssuer) (jwks, error) {
	config, err := webTLS(t.CAFile)
	if err != nil {
		return jwks{}, err
	}
	uri := t.JWKSURI
	if uri == "" {
		if uri, err = f.discover(ctx, t.Issuer, config); err != nil {
			return jwks{}, fmt.Errorf("discover keys: %w", err)
		}
	}
	document, err := f.get(ctx, uri, config)
	if err != nil {
		return jwks{}, fmt.Errorf("fetch keys: %w", err)
	}
	return parseKeys(document)
}

// discover asks an issuer where its keys are (OpenID Connect Discovery 1.0, 4). That may be on another host, as it is
// with large providers: the issuer's own host has said so.
func (f fetcher) discover(ctx context.Context, issuer string, config *tls.Config) (string, error) {
	if strings.ContainsAny(issuer, "?#") { // OpenID Connect Core 1.0, 2
		return "", errors.New("an issuer has neither query nor fragment")
	}
	document, err := f.get(ctx, strings.TrimSuffix(issuer, "/")+discovery, config)
	if err != nil {
		return "", err
	}
	// Not a struct, whose names would stand for others in capitals, too.
	var metadata map[string]json.RawMessage
	var said, uri string
	if err := json.Unmarshal(document, &metadata); err != nil {
		return "", errors.New("the answer is not a discovery document")
	}
	if err := json.Unmarshal(metadata["issuer"], &said); err != nil || said != issuer {
		return "", fmt.Errorf("the answer is of another issuer, %q", said)
	}
	if err := json.Unmarshal(metadata["jwks_uri"], &uri); err != nil || uri == "" {
		return "", errors.New("the answer does not say where")
	}
	return uri, nil
}

// get gets a document of at most segment.MaxBundle bytes over https.
func (f fetcher) get(ctx context.Context, address string, config *tls.Config) ([]byte, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	if err := mayAsk(u, u); err != nil {
		return nil, err
	}
	// A connection and its session belong to one fetch: the next is verified with what is known then.
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment, // it sees TLS only
		DialContext:            f.dial,
		TLSClientConfig:        config,
		DisableKeepAlives:      true,
		DisableCompression:     true, // what is counted is what is read
		MaxResponseHeaderBytes: maxHeader,
	}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("it redirects more than %d times", maxRedirects)
		}
		return mayAsk(r.URL, u)
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %d", u.Host, answer.StatusCode)
	}
	document, err := io.ReadAll(io.LimitReader(answer.Body, segment.MaxBundle+1))
	if err != nil {
		return nil, err
	}
	if len(document) > segment.MaxBundle {
		return nil, fmt.Errorf("the answer is larger than %d MiB", segment.MaxBundle>>20)
	}
	return document, nil
}

// withoutKeys is a bundle that revokes all keys that there were. Keys must be there, and are none that we know.
type withoutKeys struct {
	Keys     []json.RawMessage `json:"keys"`
	Sequence *uint64           `json:"spiffe_sequence,omitempty"`
}

// decodeBundle reads what an endpoint has answered. Other than in a document, the bundle may be empty: then its trust
// domain has revoked all keys (SPIFFE Trust Domain and Bundle, 4.1.3). A document that does not speak of keys at all says
// no such thing.
func decodeBundle(td spiffeid.TrustDomain, document []byte) (*spiffebundle.Bundle, error) {
	b, err := segment.ParseBundle(td, document)
	if !errors.Is(err, segment.ErrEmptyBundle) {
		return b, err
	}
	var empty withoutKeys
	if json.Unmarshal(document, &empty) != nil || empty.Keys == nil {
		return nil, err
	}
	b = spiffebundle.New(td)
	if empty.Sequence != nil {
		b.SetSequenceNumber(*empty.Sequence)
	}
	return b, nil
}

// encodeBundle is its reverse. The library would write an empty bundle without keys.
func encodeBundle(b *spiffebundle.Bundle) ([]byte, error) {
	if !b.Empty() {
		return b.Marshal()
	}
	return json.Marshal(withoutKeys{Keys: []json.RawMessage{}, Sequence: floorOf(b)})
}

// mayAsk reports why a URL is not asked when another was to be. The specification lets clients follow redirects to
// other hosts, and lets them refuse (SPIFFE Federation, 7.5.1): one host was named, and that is the one to be trusted.
func mayAsk(u, named *url.URL) error {
	switch {
	case u.Scheme != "https":
		return errors.New("not over https")
	case u.User != nil:
		return errors.New("there is a user in the URL")
	case u.Host != named.Host:
		return fmt.Errorf("it redirects to another host, %q", u.Host)
	}
	return nil
}

// endpointTLS is how a bundle endpoint is verified.
func endpointTLS(e segment.BundleEndpoint, verifier x509bundle.Source) (*tls.Config, error) {
	switch e.Profile {
	case segment.HTTPSWeb:
		return webTLS(e.CAFile)
	case segment.HTTPSSPIFFE:
		if verifier == nil || e.ID.IsZero() {
			return nil, errors.New("verify endpoint: no bundle of its trust domain yet")
		}
		return tlsconfig.TLSClientConfig(verifier, tlsconfig.AuthorizeID(e.ID)), nil
	}
	return nil, fmt.Errorf("verify endpoint: there is no profile %q", e.Profile)
}

// webTLS is how a web server is verified: by the authorities in a PEM file, or without one by those of the system.
func webTLS(caFile string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile == "" {
		return config, nil
	}
	pem, err := readFile(caFile, segment.MaxBundle)
	if err != nil {
		return nil, fmt.Errorf("read CA file: %w", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read CA file: there is no certificate in %s", caFile)
	}
	return config, nil
}

// readFile reads a file of at most so many bytes.
func readFile(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path) // to open a pipe could take for ever
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d MiB", path, limit>>20)
	}
	return bytes.TrimSpace(data), nil
}
