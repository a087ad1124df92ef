package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
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
		client := http.Client{Transport: &http.Transport{TLSClientConfig: config}, Timeout: 10 * time.Second}
		resp, err := client.Get("https://" + d.listen + "/v1/models")
		result := stranger{who: s.who, through: err == nil}
		if err == nil {
			resp.Body.Close()
			result.why = resp.Status
		} else {
			result.why = err.Error()[strings.LastIndex(err.Error(), ": ")+2:] // the alert, without where it was noticed
		}
		out = append(out, result)
	}
	return out, nil
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
