// Package nodepb is the protocol between the control plane and the agents on other machines: its messages, which are
// generated from node.proto, and what both ends must hold equal.
//
// It is for identity/node and identity/agent. It decides nothing and does no IO.
package nodepb

import (
	"crypto/sha256"
	"log/slog"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// NonceSize is the size of both nonces of a challenge.
const NonceSize = 32

// Reasons why a caller is no agent. They stand in the status, for the agent to know what can help.
const (
	AgentRevoked = "AGENT_REVOKED" // nothing can
	MustReattest = "AGENT_MUST_REATTEST"
)

// errorDomain is whose the reasons are.
const errorDomain = "node.sallyport.dev"

// The SPIFFE IDs that no workload has: ControlPlane and all below agentPath.
const (
	controlPlanePath = "/controlplane"
	agentPath        = "/agent"
)

// ControlPlane is whom the agents of a trust domain expect.
func ControlPlane(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, controlPlanePath) // a constant, and valid
}

// Agent returns the SPIFFE ID of the agent at a path below that of all agents.
func Agent(td spiffeid.TrustDomain, segments ...string) (spiffeid.ID, error) {
	return spiffeid.FromPath(td, agentPath+"/"+strings.Join(segments, "/"))
}

// IsAgent reports whether an ID can only be an agent's.
func IsAgent(id spiffeid.ID) bool { return strings.HasPrefix(id.Path(), agentPath+"/") }

// Reserved reports whether an ID may never be a workload's.
func Reserved(id spiffeid.ID) bool {
	return id.Path() == controlPlanePath || id.Path() == agentPath || IsAgent(id)
}

// ProofOfPossession is what the holder of a machine's key signs: both nonces, so that neither end alone chooses it, and
// the request, so that the proof serves for no other key. Its beginning keeps it apart from whatever else the key signs.
func ProofOfPossession(challenge, response, csr []byte) []byte {
	request := sha256.Sum256(csr)
	message := []byte("sallyport node attestation x509pop v1\x00")
	message = append(message, challenge...)
	message = append(message, response...)
	return append(message, request[:]...)
}

// Token lets whoever has it become an agent, once. It prints as [redacted]: convert it to a string to hand it out.
type Token string

func (Token) String() string { return "[redacted]" }

// GoString hides the token from %#v.
func (Token) GoString() string { return "[redacted]" }

// LogValue hides the token from logs.
func (Token) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// Refuse returns the status of a caller that is no agent, with the reason.
func Refuse(reason, msg string) error {
	s, err := status.New(codes.PermissionDenied, msg).WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: errorDomain})
	if err != nil {
		return status.Error(codes.PermissionDenied, msg)
	}
	return s.Err()
}

// Disbelieve returns the status of a caller whose SVID is not believed, with the bundle that says whose would be.
func Disbelieve(msg string, bundle []byte) error {
	s, err := status.New(codes.Unauthenticated, msg).WithDetails(&Refusal{Bundle: bundle})
	if err != nil {
		return status.Error(codes.Unauthenticated, msg)
	}
	return s.Err()
}

// Trusted returns the bundle in a status; nil if there is none.
func Trusted(err error) []byte {
	for _, d := range status.Convert(err).Details() {
		if refusal, ok := d.(*Refusal); ok {
			return refusal.Bundle
		}
	}
	return nil
}

// Reason returns the reason in a status; "" if there is none.
func Reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == errorDomain {
			return info.Reason
		}
	}
	return ""
}
