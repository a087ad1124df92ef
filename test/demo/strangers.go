package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/identity/disk"
)

// stranger is a caller that must not get through TLS, and what became of it.
type stranger struct {
	who     string
	through bool   // it got an answer
	why     string // the TLS alert, if not
}

const trustDomain = "example.org"

// brief makes a certificate of the demo's own CA that is soon expired: nothing but its date will be wrong with it.
func (d *demo) brief() ([]tls.Certificate, error) {
	own, err := disk.Open(filepath.Join(d.state, "ca"), spiffeid.RequireTrustDomainFromString(trustDomain), time.Now())
	if err != nil {
		return nil, err
	}
	return signed(own, "spiffe://example.org/rag-app", identity.MinTTL)
}

// strangers knock without a valid identity.
func (d *demo) strangers(expired []tls.Certificate) ([]stranger, error) {
	now := time.Now()
	if now.Before(expired[0].Leaf.NotAfter) {
		return nil, errors.New("the certificate that should have expired has not")
	}
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	other, err := authority(spiffeid.RequireTrustDomainFromString("elsewhere.org"), now)
	if err != nil {
		return nil, err
	}
	forger, err := authority(td, now) // the same name, and a key of its own
	if err != nil {
		return nil, err
	}
	elsewhere, err := signed(other, "spiffe://elsewhere.org/rag-app", time.Minute)
	if err != nil {
		return nil, err
	}
	forged, err := signed(forger, "spiffe://example.org/rag-app", time.Minute)
	if err != nil {
		return nil, err
	}
	var out []stranger
	for _, s := range []struct {
		who  string
		with []tls.Certificate
	}{
		{"no certificate", nil},
		{"an expired certificate", expired},
		{"another trust domain", elsewhere},
		{"a forged rag-app, self-signed", forged},
	} {
		config := &tls.Config{
			InsecureSkipVerify: true, // a stranger does not care who answers
			ServerName:         "chat.models.internal",
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // whatever the server asks for
				if s.with == nil {
					return &tls.Certificate{}, nil
				}
				return &s.with[0], nil
			},
		}
		result := stranger{who: s.who}
		if result.through, err = d.knock(config); err == nil {
			return nil, fmt.Errorf("knock with %s: the connection ended without an answer or an alert", s.who)
		}
		result.why = err.Error()[strings.LastIndex(err.Error(), ": ")+2:] // the alert, without where it was noticed
		out = append(out, result)
	}
	return out, nil
}

// knock asks for the models, and reports whether a byte came back, and what ended the connection. In TLS 1.3 a client
// hears what the server thinks of its certificate only when it reads.
func (d *demo) knock(config *tls.Config) (through bool, err error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", d.listen, config)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return false, err
	}
	_, _ = io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: chat.models.internal\r\n\r\n") // refused or not: the answer tells
	n, err := conn.Read(make([]byte, 1))
	if n > 0 {
		return true, errors.New("answered: got through")
	}
	return false, err
}

func authority(td spiffeid.TrustDomain, now time.Time) (*identity.Authority, error) {
	template, err := identity.CATemplate(td, time.Hour, now, rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return identity.SelfSign(template, key)
}

func signed(by *identity.Authority, id string, ttl time.Duration) ([]tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template, err := by.SVIDTemplate(identity.Request{ID: parsed, TTL: ttl}, now, rand.Reader)
	if err != nil {
		return nil, err
	}
	chain, err := by.Sign(template, key.Public(), now)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	cert := tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return []tls.Certificate{cert}, nil
}
