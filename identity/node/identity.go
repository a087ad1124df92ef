package node

import (
	"crypto/tls"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Certificate returns the control plane's own X.509-SVID, which Run keeps, for what else serves other machines.
func (s *Server) Certificate() (*tls.Certificate, error) {
	svid := s.svid.Load()
	if svid == nil {
		return nil, errors.New("the control plane has no identity yet")
	}
	return certificate(svid), nil
}

// Revoked reports whether an agent was revoked.
func (s *Server) Revoked(id spiffeid.ID) bool { return s.agents.admissible(id) != nil }
