package issuer

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxRequest is more than a request with a key of any size that makes sense has.
const maxRequest = 16 << 10

// Key is a public key whose private key is held by whoever asks for a certificate. There is no other way to make one than
// with the private key, or with a request that it signed, so that whoever certifies need not ask for a proof. Its zero
// value is no key. It never gives the private key away.
type Key struct {
	public  crypto.PublicKey
	signer  crypto.Signer // nil: there is a request
	request []byte
}

// HeldKey is a key that is in this process.
func HeldKey(signer crypto.Signer) Key { return Key{public: signer.Public(), signer: signer} }

// RequestedKey is the key of a request (PKCS #10, DER) that came from another process. Of the request it believes the
// key, if that signed it, and nothing else. What it refuses is the gRPC status InvalidArgument.
func RequestedKey(request []byte) (Key, error) {
	if len(request) > maxRequest {
		return Key{}, status.Errorf(codes.InvalidArgument, "read request: it has more than %d bytes", maxRequest)
	}
	parsed, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return Key{}, status.Errorf(codes.InvalidArgument, "read request: %v", err)
	}
	if err := parsed.CheckSignature(); err != nil {
		return Key{}, status.Errorf(codes.InvalidArgument, "read request: it is not signed by its key: %v", err)
	}
	return Key{public: parsed.PublicKey, request: request}, nil
}

// Public returns the public key; nil of the zero value.
func (k Key) Public() crypto.PublicKey { return k.public }

// Request returns a request that the key signed, for an authority in another process. It names nobody: whom the
// certificate is for is told beside it.
func (k Key) Request() ([]byte, error) {
	if k.signer == nil {
		return k.request, nil
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k.signer)
	if err != nil {
		return nil, fmt.Errorf("request certificate: %w", err)
	}
	return request, nil
}
