package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
)

// How machines are attested.
const (
	byJoinToken = "join_token"
	byX509POP   = "x509pop"
)

const (
	attestTime = 10 * time.Second // to wait for each message of a client that nobody knows yet
	maxChain   = 5
	maxRequest = 4 << 10 // of a CSR: room for RSA with 4096 bits
	maxRSA     = 4096
	minRSA     = 2048
	maxToken   = 256
)

type attestStream = grpc.BidiStreamingServer[nodepb.AttestAgentRequest, nodepb.AttestAgentResponse]

// AttestAgent is nodepb's. What it refuses is logged; the client is not told which part of it was wrong where that
// would help somebody who guesses.
func (s *Server) AttestAgent(stream attestStream) error {
	err := s.attest(stream)
	if err != nil {
		from := ""
		if p, ok := peer.FromContext(stream.Context()); ok {
			from = p.Addr.String()
		}
		s.config.Log.Warn("agent not attested", "from", from, "error", err)
	}
	return err
}

func (s *Server) attest(stream attestStream) error {
	if !s.limiter.allow(address(stream.Context()), time.Now()) {
		return status.Error(codes.ResourceExhausted, "too many attempts; try again later")
	}
	if s.state.Load().source.Own == nil {
		return status.Error(codes.Unavailable, "no bundle yet")
	}
	req, err := receive(stream)
	if err != nil {
		return err
	}
	params := req.GetParams()
	if err := checkRequest(params.GetCsr()); err != nil {
		return err
	}
	var chain []*x509.Certificate
	admit := func(how string) func(spiffeid.ID) error {
		return func(id spiffeid.ID) (err error) {
			chain, err = s.admit(stream.Context(), id, how, params.Csr)
			return err
		}
	}
	switch data := params.Data.(type) {
	case *nodepb.AttestAgentRequest_Params_JoinToken:
		err = s.attestJoinToken(data.JoinToken, admit(byJoinToken))
	case *nodepb.AttestAgentRequest_Params_X509Pop:
		err = s.attestX509POP(stream, data.X509Pop, params.Csr, admit(byX509POP))
	default:
		err = status.Error(codes.InvalidArgument, "neither a join token nor x509pop")
	}
	if err != nil {
		return err
	}
	return stream.Send(&nodepb.AttestAgentResponse{Step: &nodepb.AttestAgentResponse_Result_{Result: &nodepb.AttestAgentResponse_Result{
		Svid: svidMessage(chain), Bundle: s.state.Load().bundles.own.document,
	}}})
}

// receive waits for a message, but not for ever: a client that nobody knows yet holds nothing for long.
func receive(stream attestStream) (*nodepb.AttestAgentRequest, error) {
	type received struct {
		req *nodepb.AttestAgentRequest
		err error
	}
	got := make(chan received, 1)
	go func() {
		req, err := stream.Recv() // returns when the handler has
		got <- received{req, err}
	}()
	select {
	case r := <-got:
		return r.req, r.err
	case <-time.After(attestTime):
		return nil, status.Errorf(codes.DeadlineExceeded, "nothing was said for %s", attestTime)
	}
}

func (s *Server) attestJoinToken(presented string, admit func(spiffeid.ID) error) error {
	if len(presented) > maxToken {
		return status.Error(codes.InvalidArgument, "the join token is too long")
	}
	err := s.tokens.use(nodepb.Token(presented), time.Now(), admit)
	var reused reusedError
	switch {
	case errors.As(err, &reused):
		s.config.Log.Error("join token used again: one of two who had it should not have", "agent", reused.agent.String())
		return status.Error(codes.PermissionDenied, err.Error())
	case errors.Is(err, errTokenRefused):
		return status.Error(codes.PermissionDenied, err.Error())
	case err != nil && status.Code(err) == codes.Unknown:
		return status.Errorf(codes.Unavailable, "use join token: %v", err)
	}
	return err
}

// attestX509POP attests a machine by a certificate of one of the authorities, whose key it proves to have now. The
// agent is named by the certificate.
func (s *Server) attestX509POP(stream attestStream, data *nodepb.AttestAgentRequest_X509POP, csr []byte, admit func(spiffeid.ID) error) error {
	if s.roots == nil {
		return status.Error(codes.PermissionDenied, "x509pop is not accepted here")
	}
	leaf, err := s.verifyMachine(data.GetCertificates(), time.Now())
	if err != nil {
		return status.Errorf(codes.PermissionDenied, "x509pop: %v", err)
	}
	id, err := nodepb.Agent(s.config.TrustDomain, byX509POP, digestOf(leaf))
	if err != nil {
		return status.Errorf(codes.Internal, "x509pop: %v", err)
	}
	if err := s.agents.admissible(id); err != nil {
		return err
	}
	nonce := make([]byte, nodepb.NonceSize)
	if _, err := rand.Read(nonce); err != nil {
		return status.Errorf(codes.Internal, "x509pop: %v", err)
	}
	if err := stream.Send(&nodepb.AttestAgentResponse{Step: &nodepb.AttestAgentResponse_Challenge{Challenge: nonce}}); err != nil {
		return err
	}
	req, err := receive(stream)
	if err != nil {
		return err
	}
	answer := req.GetChallengeResponse()
	if len(answer.GetNonce()) != nodepb.NonceSize {
		return status.Errorf(codes.InvalidArgument, "x509pop: the nonce has not %d bytes", nodepb.NonceSize)
	}
	algorithm, err := proofAlgorithm(leaf)
	if err != nil {
		return status.Errorf(codes.PermissionDenied, "x509pop: %v", err)
	}
	if err := leaf.CheckSignature(algorithm, nodepb.ProofOfPossession(nonce, answer.Nonce, csr), answer.Signature); err != nil {
		return status.Errorf(codes.PermissionDenied, "x509pop: the machine does not have the certificate's key: %v", err)
	}
	return admit(id)
}

// verifyMachine checks a machine's certificate by RFC 5280 path validation. It must be for signatures and, if it says
// for whom it is, for clients.
func (s *Server) verifyMachine(der [][]byte, now time.Time) (*x509.Certificate, error) {
	if len(der) == 0 || len(der) > maxChain {
		return nil, fmt.Errorf("a chain has between 1 and %d certificates, not %d", maxChain, len(der))
	}
	intermediates := x509.NewCertPool()
	var leaf *x509.Certificate
	for i, raw := range der {
		c, err := x509.ParseCertificate(raw)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if err := checkKey(c.PublicKey); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if i == 0 {
			leaf = c
			continue
		}
		intermediates.AddCert(c)
	}
	switch {
	case leaf.IsCA:
		return nil, errors.New("the certificate is an authority's")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return nil, errors.New("the certificate is not for signatures")
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: s.roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return leaf, err
}

func proofAlgorithm(leaf *x509.Certificate) (x509.SignatureAlgorithm, error) {
	switch leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return x509.ECDSAWithSHA256, nil
	case *rsa.PublicKey:
		return x509.SHA256WithRSAPSS, nil
	case ed25519.PublicKey:
		return x509.PureEd25519, nil
	}
	return 0, fmt.Errorf("no proof with a key of type %T", leaf.PublicKey)
}

// checkKey refuses keys that are too weak, or that would take long to check a signature with.
func checkKey(pub any) error {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		if key.Curve.Params().BitSize < 256 {
			return errors.New("the ECDSA key is too short")
		}
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < minRSA || n > maxRSA {
			return fmt.Errorf("the RSA key has %d bits, not between %d and %d", n, minRSA, maxRSA)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("the key is of type %T", pub)
	}
	return nil
}

// checkRequest refuses requests that need not be looked at by whoever signs.
func checkRequest(csr []byte) error {
	if len(csr) == 0 || len(csr) > maxRequest {
		return status.Errorf(codes.InvalidArgument, "the request has %d bytes, not between 1 and %d", len(csr), maxRequest)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "read request: %v", err)
	}
	if err := checkKey(request.PublicKey); err != nil {
		return status.Errorf(codes.InvalidArgument, "read request: %v", err)
	}
	return nil
}

// admit makes an agent's SVID and keeps that it is one.
func (s *Server) admit(ctx context.Context, id spiffeid.ID, how string, csr []byte) ([]*x509.Certificate, error) {
	if err := s.agents.admissible(id); err != nil {
		return nil, err
	}
	svid, err := s.certifyAgent(ctx, id, csr)
	if err != nil {
		return nil, err
	}
	if err := s.agents.admit(id, how, svid, time.Now()); err != nil {
		return nil, err
	}
	s.config.Log.Info("agent attested", "agent", id.String(), "by", how)
	return svid.chain, nil
}

// signed is an agent's SVID that was just made.
type signed struct {
	chain []*x509.Certificate
	root  string // what it stands below; "": not known
}

func (s *Server) certifyAgent(ctx context.Context, id spiffeid.ID, csr []byte) (signed, error) {
	key, err := issuer.RequestedKey(csr)
	if err != nil {
		return signed{}, err
	}
	chain, err := s.config.Certifier.CertifyX509(ctx, issuer.Entry{ID: id, TTL: s.config.TTL}, key)
	if err != nil {
		return signed{}, err
	}
	svid := signed{chain: chain}
	if a, _ := s.config.Certifier.X509Authority(); a != nil && below(chain, a, time.Now()) { // no other has signed meanwhile
		svid.root = digestOf(a.Root())
	}
	return svid, nil
}

// below reports whether an SVID stands below the same root as an authority.
func below(chain []*x509.Certificate, a *identity.Authority, now time.Time) bool {
	_, err := identity.Verify(chain, a.Bundle(), now)
	return err == nil
}

func svidMessage(chain []*x509.Certificate) *nodepb.X509SVID {
	return &nodepb.X509SVID{SpiffeId: chain[0].URIs[0].String(), CertChain: chainMessage(chain)}
}

func chainMessage(chain []*x509.Certificate) [][]byte {
	der := make([][]byte, len(chain))
	for i, c := range chain {
		der[i] = c.Raw
	}
	return der
}
