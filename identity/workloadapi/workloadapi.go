// Package workloadapi serves the X.509 part of the SPIFFE Workload API.
//
// It is for workloads on the same machine, with any SPIFFE library. It makes a workload's private key, sends it once
// over the local socket, and keeps it only as long as the stream is open. It never writes or logs a key, and never
// says to a caller what others are entitled to. JWT-SVIDs are not served yet: Unimplemented.
//
// The specifications are SPIFFE's Workload API and Workload Endpoint; sections are named where they are implemented.
package workloadapi

import (
	"context"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
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

// FetchX509SVID sends the caller's SVIDs at once, when its entries change, and when one is half through its life
// (Workload API, 4.3 and 5.2.1). It ends with PermissionDenied when the caller is no longer entitled to any.
func (s *server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	ctx := stream.Context()
	if err := checkHeader(ctx); err != nil {
		return err
	}
	var wallet issuer.Wallet
	var bundle *x509bundle.Bundle
	for {
		view, err := s.issuer.Entitled(ctx)
		if err != nil {
			return err
		}
		changed, err := wallet.Renew(ctx, s.issuer, view.Entries)
		if err != nil {
			return err
		}
		if changed || !view.Bundle.Equal(bundle) {
			bundle = view.Bundle
			resp, err := svidResponse(&wallet, bundle)
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

// FetchX509Bundles sends the bundle that the caller verifies others with, at once and when it changes (Workload API,
// 5.2.2). Only who is entitled to an SVID gets it.
func (s *server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	ctx := stream.Context()
	if err := checkHeader(ctx); err != nil {
		return err
	}
	var bundle *x509bundle.Bundle
	for {
		view, err := s.issuer.Entitled(ctx)
		if err != nil {
			return err
		}
		if !view.Bundle.Equal(bundle) {
			bundle = view.Bundle
			if err := stream.Send(&workload.X509BundlesResponse{
				Bundles: map[string][]byte{bundle.TrustDomain().IDString(): marshalBundle(bundle)},
			}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-view.Changed:
		}
	}
}

// checkHeader refuses calls that a tricked program could have been made to send (Workload Endpoint, 3).
func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing: send metadata workload.spiffe.io: true")
	}
	return nil
}

func svidResponse(w *issuer.Wallet, bundle *x509bundle.Bundle) (*workload.X509SVIDResponse, error) {
	resp := new(workload.X509SVIDResponse)
	for _, svid := range w.SVIDs() {
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			return nil, fmt.Errorf("send SVID of %s: %w", svid.ID, err)
		}
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId:    svid.ID.String(),
			X509Svid:    chain,
			X509SvidKey: key,
			Bundle:      marshalBundle(bundle),
		})
	}
	return resp, nil
}

// marshalBundle is the bundle's certificates, one after the other in DER.
func marshalBundle(b *x509bundle.Bundle) []byte {
	var der []byte
	for _, c := range b.X509Authorities() {
		der = append(der, c.Raw...)
	}
	return der
}
