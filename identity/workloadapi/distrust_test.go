package workloadapi_test

import (
	"context"
	"crypto/x509"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	served "sallyport.dev/identity/workloadapi"
)

func TestDistrustReachesStreams(t *testing.T) {
	open := func(ctx context.Context, cc *grpc.ClientConn) (func() (identitytest.Sent, error), error) {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
		stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		return func() (sent identitytest.Sent, err error) {
			resp, err := stream.Recv()
			if err != nil {
				return sent, err
			}
			if sent.Chain, err = x509.ParseCertificates(resp.Svids[0].X509Svid); err != nil {
				return sent, err
			}
			roots, err := x509.ParseCertificates(resp.Svids[0].Bundle)
			sent.Trusted = x509bundle.FromX509Authorities(identitytest.TrustDomain, roots)
			return sent, err
		}, err
	}
	register := func(s *grpc.Server, i *issuer.Issuer) { served.Register(s, i) }
	identitytest.Distrust{Register: register, Open: open, Always: true}.Run(t)
}
