// Package workloadapi serves the SPIFFE Workload API: the profiles for X.509-SVIDs and JWT-SVIDs.
//
// It is for workloads on the same machine, with any SPIFFE library. It makes a workload's private key, sends it once
// over the local socket, and keeps it only as long as the stream is open. It never writes or logs a key or a token,
// keeps no token, and never says to a caller what others are entitled to. WIT-SVIDs are not served: Unimplemented, as
// the specification wants it (Workload API, 7).
//
// The specifications are SPIFFE's Workload API and Workload Endpoint; sections are named where they are implemented.
package workloadapi

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/issuer"
)

// Issuer says what callers are entitled to and signs for them: an *issuer.Issuer. Its errors are the statuses that
// callers get.
type Issuer interface {
	issuer.Signer
	CertifyJWT(ctx context.Context, e issuer.Entry, audience []string) (string, error)
	Entitled(context.Context) (issuer.View, error)
}

// Register makes a gRPC server serve the Workload API. The server's streams stay open: end them with Stop, not
// GracefulStop.
func Register(s grpc.ServiceRegistrar, i Issuer) {
	workload.RegisterSpiffeWorkloadAPIServer(s, &server{issuer: i})
}

type server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	issuer Issuer
}

// FetchX509SVID sends the caller's SVIDs and the bundles that it verifies others with: at once, when its entries or
// these bundles change, and when an SVID is half through its life (Workload API, 4.3, 4.6 and 5.2.1). What stands below an
// authority that leaves the bundle comes anew together with that bundle. It ends with PermissionDenied when the caller is no
// longer entitled to any.
func (s *server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	ctx := stream.Context()
	if err := checkHeader(ctx); err != nil {
		return err
	}
	var wallet issuer.Wallet
	var sent map[string][]byte
	for {
		view, err := s.issuer.Entitled(ctx)
		if err != nil {
			return err
		}
		changed, err := wallet.Renew(ctx, s.issuer, view.Entries, view.Bundles.Own)
		if err != nil {
			return err
		}
		if bundles := x509Bundles(view.Bundles); changed || !equal(bundles, sent) {
			sent = bundles
			resp, err := svidResponse(&wallet, bundles)
			if err != nil {
				return err
			}
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-view.Changed:
		case <-wallet.Due():
		}
	}
}

// FetchX509Bundles sends the bundles that the caller verifies others with, at once and when they change (Workload API,
// 5.2.2). Only who is entitled to an SVID gets them.
func (s *server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	encode := func(b issuer.Bundles) (map[string][]byte, error) { return x509Bundles(b), nil }
	return s.push(stream.Context(), encode, func(bundles map[string][]byte) error {
		return stream.Send(&workload.X509BundlesResponse{Bundles: bundles})
	})
}

// push sends what encode makes of the caller's bundles, at once and when that changes.
func (s *server) push(ctx context.Context, encode func(issuer.Bundles) (map[string][]byte, error), send func(map[string][]byte) error) error {
	if err := checkHeader(ctx); err != nil {
		return err
	}
	var sent map[string][]byte
	for {
		view, err := s.issuer.Entitled(ctx)
		if err != nil {
			return err
		}
		bundles, err := encode(view.Bundles)
		if err != nil {
			return err
		}
		if !equal(bundles, sent) {
			if err := send(bundles); err != nil {
				return err
			}
			sent = bundles
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-view.Changed:
		}
	}
}

// equal reports whether nothing has to be sent again. What was sent is never empty.
func equal(a, b map[string][]byte) bool { return maps.EqualFunc(a, b, bytes.Equal) }

// checkHeader refuses calls that a tricked program could have been made to send (Workload Endpoint, 3).
func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing: send metadata workload.spiffe.io: true")
	}
	return nil
}

// svidResponse has all that the wallet holds, and takes the bundles, of the SVIDs' trust domain and of others.
func svidResponse(w *issuer.Wallet, bundles map[string][]byte) (*workload.X509SVIDResponse, error) {
	resp := &workload.X509SVIDResponse{FederatedBundles: maps.Clone(bundles)}
	for _, svid := range w.SVIDs() {
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			return nil, fmt.Errorf("send SVID of %s: %w", svid.ID, err)
		}
		own := svid.ID.TrustDomain().IDString()
		delete(resp.FederatedBundles, own)
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId:    svid.ID.String(),
			X509Svid:    chain,
			X509SvidKey: key,
			Bundle:      bundles[own],
		})
	}
	return resp, nil
}

// x509Bundles are the certificates of each bundle, one after the other in DER, by the ID of the trust domain. A foreign
// trust domain without any is left out, which says the same: nobody there is trusted (Workload API, 4.4).
func x509Bundles(b issuer.Bundles) map[string][]byte {
	bundles := make(map[string][]byte, len(b.Federated)+1)
	for td, federated := range b.Federated {
		if der := marshalX509(federated); len(der) > 0 {
			bundles[td.IDString()] = der
		}
	}
	bundles[b.Own.TrustDomain().IDString()] = marshalX509(b.Own) // last: nobody puts himself in its place
	return bundles
}

func marshalX509(b *spiffebundle.Bundle) []byte {
	var der []byte
	for _, c := range b.X509Authorities() {
		der = append(der, c.Raw...)
	}
	return der
}
