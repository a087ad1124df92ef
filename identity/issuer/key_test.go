package issuer_test

import (
	"bytes"
	"crypto/x509"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/issuer"
)

func TestRequestedKeyWantsProof(t *testing.T) {
	key := newKey(t)
	good := csr(t, key)
	if k, err := issuer.RequestedKey(good); err != nil || !key.PublicKey.Equal(k.Public()) {
		t.Errorf("got %v, %v", k.Public(), err)
	}
	forged := slices.Clone(good)
	forged[len(forged)-1] ^= 1
	another := slices.Clone(good)
	at := bytes.Index(another, key.PublicKey.X.Bytes()) //nolint:staticcheck // the bytes are looked for, not the number
	copy(another[at:], newKey(t).PublicKey.X.Bytes())   //nolint:staticcheck // the same
	for name, request := range map[string][]byte{
		"nothing": nil, "no request": []byte("x"), "too large": csr(t, key, strings.Split(strings.Repeat("a", 6000), "")...),
		"another's signature": forged, "another's key": another, "more": append(good, 0),
	} {
		if k, err := issuer.RequestedKey(request); status.Code(err) != codes.InvalidArgument || k.Public() != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What goes to another machine proves that the key is held, and is the same request on the way.
func TestKeyRequests(t *testing.T) {
	key := newKey(t)
	request, err := issuer.HeldKey(key).Request()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificateRequest(request)
	if err != nil || len(parsed.URIs)+len(parsed.DNSNames)+len(parsed.Subject.Names) > 0 {
		t.Errorf("it names somebody: %+v, %v", parsed, err)
	}
	passed, err := issuer.RequestedKey(request)
	if err != nil || !key.PublicKey.Equal(passed.Public()) {
		t.Fatalf("got %v, %v", passed.Public(), err)
	}
	if again, err := passed.Request(); err != nil || !bytes.Equal(again, request) {
		t.Errorf("passed on as another, %v", err)
	}
}
