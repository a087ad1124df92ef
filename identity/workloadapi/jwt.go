package workloadapi

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
)

// FetchJWTSVID returns JWT-SVIDs for an audience: of the identity that is named, PermissionDenied if it is not the
// caller's, or of all that the caller has (Workload API, 6.2.1).
func (s *server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkHeader(ctx); err != nil {
		return nil, err
	}
	if err := identity.CheckAudience(req.Audience); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var only spiffeid.ID
	if req.SpiffeId != "" {
		var err error
		if only, err = spiffeid.FromString(req.SpiffeId); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	view, err := s.issuer.Entitled(ctx)
	if err != nil {
		return nil, err
	}
	resp := new(workload.JWTSVIDResponse)
	for _, e := range view.Entries {
		if !only.IsZero() && e.ID != only {
			continue
		}
		token, err := s.issuer.CertifyJWT(ctx, e, req.Audience)
		if err != nil {
			return nil, err
		}
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: e.ID.String(), Svid: token})
	}
	if len(resp.Svids) == 0 {
		return nil, status.Errorf(codes.PermissionDenied, "this process is not %s", only)
	}
	return resp, nil
}

// FetchJWTBundles sends the keys that the caller validates JWT-SVIDs with, at once and when they change (Workload API,
// 6.2.2). Only who is entitled to an SVID gets them.
func (s *server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return s.push(stream.Context(), jwtBundles, func(bundles map[string][]byte) error {
		return stream.Send(&workload.JWTBundlesResponse{Bundles: bundles})
	})
}

// ValidateJWTSVID says whose JWT-SVID a token is and what it claims, if the caller may take it for its audience;
// InvalidArgument and why, if not (Workload API, 6.2.3). It trusts those whose bundles the caller gets. Of a token from
// another trust domain, only the claims that SPIFFE speaks of are passed on: others would be taken for ours.
func (s *server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if err := checkHeader(ctx); err != nil {
		return nil, err
	}
	audience := []string{req.Audience}
	if err := identity.CheckAudience(audience); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if req.Svid == "" {
		return nil, status.Error(codes.InvalidArgument, "svid is missing")
	}
	view, err := s.issuer.Entitled(ctx)
	if err != nil {
		return nil, err
	}
	id, claims, err := identity.ValidateJWT(req.Svid, trusted(view.Bundles), audience, time.Now())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if id.TrustDomain() != view.Bundles.Own.TrustDomain() {
		maps.DeleteFunc(claims, func(name string, _ any) bool { return !slices.Contains([]string{"sub", "aud", "exp"}, name) })
	}
	if one, ok := claims["aud"].(string); ok {
		claims["aud"] = []any{one} // always a list, however the token writes it (RFC 7519 4.1.3)
	}
	fields, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "read claims: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: fields}, nil
}

// trusted are a caller's bundles as a source.
type trusted issuer.Bundles

func (t trusted) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	if td == t.Own.TrustDomain() {
		return t.Own.JWTBundle(), nil
	}
	if b := t.Federated[td]; b != nil {
		return b.JWTBundle(), nil
	}
	return nil, fmt.Errorf("no bundle of %s", td)
}

// jwtBundles are the keys of each bundle, as a JWK Set, by the ID of the trust domain.
func jwtBundles(b issuer.Bundles) (map[string][]byte, error) {
	bundles := make(map[string][]byte, len(b.Federated)+1)
	for td, federated := range b.Federated {
		jwks, err := identity.MarshalJWTBundle(federated.JWTBundle())
		if err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		bundles[td.IDString()] = jwks
	}
	jwks, err := identity.MarshalJWTBundle(b.Own.JWTBundle())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	bundles[b.Own.TrustDomain().IDString()] = jwks // last: nobody puts himself in its place
	return bundles, nil
}
