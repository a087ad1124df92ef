package issuer

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
)

// jwtTTL is the lifetime of JWT-SVIDs. They can't be taken back, so it is short.
const jwtTTL = 5 * time.Minute

// Local certifies with authorities that are in this process. It certifies nothing until Set. That an authority cannot
// sign is the gRPC status Unavailable; that it must not sign what is asked for, InvalidArgument.
type Local struct {
	// Issuer is the URL that JWT-SVIDs name as their issuer, for those who verify them as OpenID Connect tokens; "": they
	// name none. It is set before the first call, and not changed.
	Issuer string

	signs atomic.Pointer[signing] // ask load
}

// signing is what signs. It is immutable, but for changed, which is closed when it no longer is.
type signing struct {
	identity.Authorities
	changed chan struct{}
}

func (l *Local) load() *signing {
	if l.signs.Load() == nil {
		l.signs.CompareAndSwap(nil, &signing{changed: make(chan struct{})})
	}
	return l.signs.Load()
}

// Set puts authorities in the place of those before.
func (l *Local) Set(a identity.Authorities) {
	l.load()
	close(l.signs.Swap(&signing{a, make(chan struct{})}).changed)
}

// X509Authority returns what signs X.509-SVIDs now, nil if nothing does, and a channel that is closed when that may be
// another.
func (l *Local) X509Authority() (a *identity.Authority, changed <-chan struct{}) {
	s := l.load()
	return s.X509, s.changed
}

// CertifyX509 is a Certifier's.
func (l *Local) CertifyX509(_ context.Context, e Entry, k Key) ([]*x509.Certificate, error) {
	a := l.load()
	if a.X509 == nil {
		return nil, status.Error(codes.Unavailable, "issue SVID: no authority yet")
	}
	if k.Public() == nil {
		return nil, status.Error(codes.InvalidArgument, "issue SVID: no key")
	}
	now := time.Now()
	template, err := a.X509.SVIDTemplate(identity.Request{ID: e.ID, DNSNames: e.DNSNames, TTL: e.TTL}, now, rand.Reader)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "issue SVID: %v", err)
	}
	chain, err := a.X509.Sign(template, k.Public(), now)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "issue SVID: %v", err)
	}
	return chain, nil
}

// CertifyJWT is a Certifier's.
func (l *Local) CertifyJWT(_ context.Context, e Entry, audience []string) (string, error) {
	a := l.load()
	if a.JWT == nil {
		return "", status.Error(codes.Unavailable, "issue JWT-SVID: no key yet")
	}
	if err := identity.CheckAudience(audience); err != nil {
		return "", status.Errorf(codes.InvalidArgument, "issue JWT-SVID: %v", err)
	}
	token, err := a.JWT.Sign(identity.JWTRequest{ID: e.ID, Audience: audience, TTL: min(jwtTTL, e.TTL), Issuer: l.Issuer}, time.Now())
	if err != nil {
		return "", status.Errorf(codes.Unavailable, "issue JWT-SVID: %v", err)
	}
	return token, nil
}
