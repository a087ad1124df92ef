package sds_test

import (
	"context"
	"log/slog"
	"testing"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/sds"
)

func TestDistrustReachesStreams(t *testing.T) {
	open := func(ctx context.Context, cc *grpc.ClientConn) (func() (identitytest.Sent, error), error) {
		stream, err := secretservice.NewSecretDiscoveryServiceClient(cc).StreamSecrets(ctx)
		if err != nil {
			return nil, err
		}
		err = stream.Send(&discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}, TypeUrl: typeURL})
		return func() (sent identitytest.Sent, err error) {
			resp, err := stream.Recv()
			if err != nil {
				return sent, err
			}
			for _, packed := range resp.Resources {
				switch v := unpack(t, packed).Type.(type) {
				case *tls.Secret_TlsCertificate:
					svid, err := x509svid.Parse(v.TlsCertificate.CertificateChain.GetInlineBytes(), v.TlsCertificate.PrivateKey.GetInlineBytes())
					if err != nil {
						return sent, err
					}
					sent.Chain = svid.Certificates
				case *tls.Secret_ValidationContext:
					if sent.Trusted, err = x509bundle.Parse(identitytest.TrustDomain, v.ValidationContext.TrustedCa.GetInlineBytes()); err != nil {
						return sent, err
					}
				}
			}
			return sent, nil
		}, err
	}
	register := func(s *grpc.Server, i *issuer.Issuer) { sds.Register(s, i, slog.Default()) }
	identitytest.Distrust{Register: register, Open: open}.Run(t)
}
