package node

import (
	"bytes"
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
)

const (
	maxAudience     = 16
	maxAudienceName = 1024
)

// authorize returns which agent a call comes from, and its SVID. It asks anew at each call, whatever the connection
// was good for when it began. An SVID below an authority that is trusted no more proves nothing, since whoever stole its key
// can make any; its holder is told whom to trust, as everybody may be.
func (s *Server) authorize(ctx context.Context) (spiffeid.ID, []*x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return spiffeid.ID{}, nil, status.Error(codes.Unauthenticated, errNoAgent.Error())
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return spiffeid.ID{}, nil, status.Error(codes.Unauthenticated, errNoAgent.Error())
	}
	st := s.state.Load()
	if st.source.Own == nil {
		return spiffeid.ID{}, nil, status.Error(codes.Unavailable, "no bundle yet")
	}
	now := time.Now()
	svid := info.State.PeerCertificates
	id, err := identity.Verify(svid, st.source.Own.X509Bundle(), now)
	if err != nil {
		return spiffeid.ID{}, nil, nodepb.Disbelieve(err.Error(), st.bundles.own.document)
	}
	if !id.MemberOf(s.config.TrustDomain) || !nodepb.IsAgent(id) {
		return spiffeid.ID{}, nil, status.Errorf(codes.PermissionDenied, "%s is not an agent", id)
	}
	return id, svid, s.agents.authorize(id, svid[0], now)
}

// RenewAgent is nodepb's. The SVID before stays good until the new one is used: it may not have arrived.
func (s *Server) RenewAgent(ctx context.Context, req *nodepb.RenewAgentRequest) (*nodepb.RenewAgentResponse, error) {
	id, _, err := s.authorize(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkRequest(req.Csr); err != nil {
		return nil, err
	}
	next, err := s.certifyAgent(ctx, id, req.Csr)
	if err != nil {
		return nil, err
	}
	if err := s.agents.renew(id, next); err != nil {
		return nil, err
	}
	return &nodepb.RenewAgentResponse{Svid: svidMessage(next.chain)}, nil
}

// Watch is nodepb's.
func (s *Server) Watch(req *nodepb.WatchRequest, stream grpc.ServerStreamingServer[nodepb.WatchResponse]) error {
	ctx := stream.Context()
	id, svid, err := s.authorize(ctx)
	if err != nil {
		return err
	}
	end, err := s.agents.watch(id)
	if err != nil {
		return err
	}
	defer end()
	// There may be nothing to send for long: this says that the agent is accepted.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	entries, bundles, endpoints := req.EntriesDigest, req.BundlesDigest, req.EndpointsDigest
	var asked *identity.Authority // below which the SVID was asked to stand last
	expired := time.NewTimer(time.Until(svid[0].NotAfter))
	defer expired.Stop()
	for {
		// Before the agent is looked at: whatever changes from here on closes one of the three.
		st, changed := s.state.Load(), s.agents.changed(id)
		signer, signs := s.config.Certifier.X509Authority()
		if _, _, err := s.authorize(ctx); err != nil {
			return err
		}
		var resp nodepb.WatchResponse
		if signer != asked {
			asked, resp.Renew = signer, signer != nil && !below(svid, signer, time.Now())
		}
		// A control plane that has just begun, and knows nothing yet, must not be understood as having nothing.
		if st.assigned != nil && st.source.Own != nil {
			a := st.of(id)
			if !bytes.Equal(a.message.Digest, entries) {
				entries, resp.Entries = a.message.Digest, a.message
			}
			if b := st.bundles.of(a); !bytes.Equal(b.Digest, bundles) {
				bundles, resp.Bundles = b.Digest, b
			}
			if req.WantsEndpoints && !bytes.Equal(a.endpoints.Digest, endpoints) {
				endpoints, resp.Endpoints = a.endpoints.Digest, a.endpoints
			}
		}
		if resp.Entries != nil || resp.Bundles != nil || resp.Endpoints != nil || resp.Renew {
			if err := stream.Send(&resp); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-st.changed:
		case <-changed:
		case <-signs:
		case <-expired.C:
			return status.Error(codes.Unauthenticated, "the agent's SVID has ended")
		}
	}
}

// of returns what is assigned to an agent.
func (st *state) of(id spiffeid.ID) *assigned {
	if a := st.assigned[id]; a != nil {
		return a
	}
	return nothing()
}

// entry returns the agent's entry that is meant.
func (s *Server) entry(id spiffeid.ID, name string) (issuer.Entry, error) {
	st := s.state.Load()
	if st.assigned == nil {
		return issuer.Entry{}, status.Error(codes.Unavailable, "no entries yet")
	}
	e, ok := st.of(id).entries[name]
	if !ok {
		return issuer.Entry{}, status.Error(codes.NotFound, "the agent has no such entry")
	}
	return e, nil
}

// CertifyX509 is nodepb's.
func (s *Server) CertifyX509(ctx context.Context, req *nodepb.CertifyX509Request) (*nodepb.CertifyX509Response, error) {
	var chain []*x509.Certificate
	err := s.certify(ctx, req.EntryId, func(e issuer.Entry) (err error) {
		if err := checkRequest(req.Csr); err != nil {
			return err
		}
		key, err := issuer.RequestedKey(req.Csr)
		if err != nil {
			return err
		}
		chain, err = s.config.Certifier.CertifyX509(ctx, e, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &nodepb.CertifyX509Response{CertChain: chainMessage(chain)}, nil
}

// CertifyJWT is nodepb's.
func (s *Server) CertifyJWT(ctx context.Context, req *nodepb.CertifyJWTRequest) (*nodepb.CertifyJWTResponse, error) {
	if n := len(req.Audience); n == 0 || n > maxAudience {
		return nil, status.Errorf(codes.InvalidArgument, "between 1 and %d audiences are named, not %d", maxAudience, n)
	}
	for _, a := range req.Audience {
		if a == "" || len(a) > maxAudienceName {
			return nil, status.Errorf(codes.InvalidArgument, "an audience has %d bytes, not between 1 and %d", len(a), maxAudienceName)
		}
	}
	var token string
	err := s.certify(ctx, req.EntryId, func(e issuer.Entry) (err error) {
		token, err = s.config.Certifier.CertifyJWT(ctx, e, req.Audience)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &nodepb.CertifyJWTResponse{Token: token}, nil
}

// certify has the server's own entry signed, if it is the agent's before and after: what was taken away meanwhile is
// not handed out.
func (s *Server) certify(ctx context.Context, name string, sign func(issuer.Entry) error) error {
	id, _, err := s.authorize(ctx)
	if err != nil {
		return err
	}
	e, err := s.entry(id, name)
	if err != nil {
		return err
	}
	if err := sign(e); err != nil {
		return err
	}
	if err := s.agents.admissible(id); err != nil {
		return err
	}
	_, err = s.entry(id, name)
	return err
}
