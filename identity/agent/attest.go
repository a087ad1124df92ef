package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/node/nodepb"
)

// attest makes the machine an agent: its SVID is on the disk then. It tries until the control plane has said yes or no.
func (a *Agent) attest(ctx context.Context, why error) error {
	if a.config.X509POP == nil && a.token == "" {
		return fmt.Errorf("attest agent: %w; there is no machine's certificate, and a join token serves only once: start the agent with a new one", why)
	}
	wait := newBackoff()
	for {
		svid, bundle, err := a.attestOnce(ctx)
		if err == nil {
			err = a.saveSVID(svid)
		}
		switch {
		case err == nil:
			a.svid, a.token = svid, ""
			if a.known.own == nil {
				a.own.Store(bundle)
			}
			a.config.Log.Info("agent attested", "agent", svid.ID.String(), "until", end(svid))
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case nodepb.Reason(err) == nodepb.AgentRevoked:
			return ErrRevoked
		case status.Code(err) == codes.PermissionDenied || status.Code(err) == codes.InvalidArgument:
			return fmt.Errorf("attest agent: the control plane refuses: %s", status.Convert(err).Message())
		}
		a.failed("agent not attested", err)
		if err := sleep(ctx, wait.next()); err != nil {
			return err
		}
	}
}

func (a *Agent) attestOnce(ctx context.Context) (*x509svid.SVID, *spiffebundle.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	key, csr, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	params := &nodepb.AttestAgentRequest_Params{Csr: csr}
	var prove func(challenge []byte) (*nodepb.AttestAgentRequest_ChallengeResponse, error)
	if a.config.X509POP == nil {
		params.Data = &nodepb.AttestAgentRequest_Params_JoinToken{JoinToken: string(a.token)}
	} else {
		machine, err := a.config.X509POP()
		if err != nil {
			return nil, nil, fmt.Errorf("read the machine's certificate: %w", err)
		}
		params.Data = &nodepb.AttestAgentRequest_Params_X509Pop{
			X509Pop: &nodepb.AttestAgentRequest_X509POP{Certificates: machine.Certificate},
		}
		prove = func(challenge []byte) (*nodepb.AttestAgentRequest_ChallengeResponse, error) {
			return proof(machine.PrivateKey, challenge, csr)
		}
	}
	l, err := a.connect(nil)
	if err != nil {
		return nil, nil, err
	}
	defer l.conn.Close()
	stream, err := l.client.AttestAgent(ctx)
	if err != nil {
		return nil, nil, err
	}
	// An error of Send is io.EOF: Recv says what it was.
	_ = stream.Send(&nodepb.AttestAgentRequest{Step: &nodepb.AttestAgentRequest_Params_{Params: params}})
	resp, err := stream.Recv()
	if err != nil {
		return nil, nil, err
	}
	if challenge := resp.GetChallenge(); challenge != nil && prove != nil {
		answer, err := prove(challenge)
		if err != nil {
			return nil, nil, err
		}
		_ = stream.Send(&nodepb.AttestAgentRequest{Step: &nodepb.AttestAgentRequest_ChallengeResponse_{ChallengeResponse: answer}})
		if resp, err = stream.Recv(); err != nil {
			return nil, nil, err
		}
	}
	result := resp.GetResult()
	if result == nil {
		return nil, nil, errors.New("the control plane asks for something else than attestation")
	}
	bundle, err := spiffebundle.Parse(a.config.TrustDomain, result.Bundle)
	if err != nil {
		return nil, nil, fmt.Errorf("read bundle: %w", err)
	}
	svid, err := a.accept(result.Svid.GetCertChain(), key, bundle)
	return svid, bundle, err
}

func (a *Agent) renewOnce(ctx context.Context, l *link, id spiffeid.ID) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	key, csr, err := newKey()
	if err != nil {
		return nil, err
	}
	resp, err := l.client.RenewAgent(ctx, &nodepb.RenewAgentRequest{Csr: csr})
	if err != nil {
		return nil, err
	}
	svid, err := a.accept(resp.Svid.GetCertChain(), key, a.own.Load())
	if err != nil {
		return nil, err
	}
	if svid.ID != id {
		return nil, fmt.Errorf("the control plane answered with the SVID of %s", svid.ID)
	}
	return svid, a.saveSVID(svid)
}

// accept makes the agent's SVID of a chain that is one.
func (a *Agent) accept(der [][]byte, key *ecdsa.PrivateKey, bundle *spiffebundle.Bundle) (*x509svid.SVID, error) {
	chain, id, err := parseChain(der, key.Public(), bundle)
	if err != nil {
		return nil, err
	}
	if !id.MemberOf(a.config.TrustDomain) || !nodepb.IsAgent(id) {
		return nil, fmt.Errorf("the control plane answered with the SVID of %s, which is not an agent of %s", id, a.config.TrustDomain)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, nil
}

// parseChain reads a chain that must be an X.509-SVID for the key.
func parseChain(der [][]byte, key crypto.PublicKey, bundle *spiffebundle.Bundle) ([]*x509.Certificate, spiffeid.ID, error) {
	if len(der) == 0 || len(der) > maxChain {
		return nil, spiffeid.ID{}, fmt.Errorf("the control plane answered with %d certificates", len(der))
	}
	chain := make([]*x509.Certificate, len(der))
	for i, raw := range der {
		c, err := x509.ParseCertificate(raw)
		if err != nil {
			return nil, spiffeid.ID{}, fmt.Errorf("the control plane answered with no certificate: %w", err)
		}
		chain[i] = c
	}
	pub, ok := key.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(chain[0].PublicKey) {
		return nil, spiffeid.ID{}, errors.New("the control plane answered with a certificate for another key")
	}
	id, err := identity.Verify(chain, bundle.X509Bundle(), time.Now())
	return chain, id, err
}

func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make request: %w", err)
	}
	return key, csr, nil
}

// proof signs a challenge with the machine's key.
func proof(key crypto.PrivateKey, challenge, csr []byte) (*nodepb.AttestAgentRequest_ChallengeResponse, error) {
	if len(challenge) != nodepb.NonceSize {
		return nil, fmt.Errorf("the challenge has %d bytes", len(challenge))
	}
	nonce := make([]byte, nodepb.NonceSize)
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("make nonce: %w", err)
	}
	message := nodepb.ProofOfPossession(challenge, nonce, csr)
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("sign challenge: a key of type %T cannot sign", key)
	}
	signed, options := message, crypto.SignerOpts(crypto.Hash(0))
	switch signer.Public().(type) {
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		digest := sha256.Sum256(message)
		signed, options = digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	default:
		digest := sha256.Sum256(message)
		signed, options = digest[:], crypto.SHA256
	}
	signature, err := signer.Sign(rand.Reader, signed, options)
	if err != nil {
		return nil, fmt.Errorf("sign challenge: %w", err)
	}
	return &nodepb.AttestAgentRequest_ChallengeResponse{Nonce: nonce, Signature: signature}, nil
}
