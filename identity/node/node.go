// Package node attests the agents on other machines and gives each the identities of its workloads, and no others. Who
// asks is told the endpoints of its workloads, too.
//
// It is for a control plane whose workloads are on many machines; identity/agent is the other end, nodepb what they
// speak. A machine becomes an agent by a join token or by a certificate of an authority that the operator named, gets
// an X.509-SVID of its own and asks with that for all else. What an entry says is the control plane's word: of what an
// agent sends, the server believes the keys that it proves to have, and nothing else. It never sees a private key but
// its own, keeps join tokens only as hashes, and gives an agent that has no assignment, or is not known, or is revoked,
// nothing.
//
// The shapes are those of SPIRE's Agent, Entry and SVID APIs.
package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

const (
	maxConnections = 4096
	maxStreams     = 64       // calls at a time on one connection
	maxMessage     = 64 << 10 // a chain of certificates is the largest that an agent sends
	maxHeaders     = 16 << 10
)

// Config is what a server is made of.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Certifier   Certifier
	// Dir keeps what must outlast the process: join tokens (as hashes) and agents. It is made with mode 0700 where there
	// is none, and must be one process's at a time.
	Dir string
	// X509POP are the authorities whose certificates attest machines. Whoever holds one is an agent: they should certify
	// nothing else. Without any, nobody is attested in that way.
	X509POP []*x509.Certificate
	// Certificate is the control plane's own X.509-SVID, /controlplane. It is asked at each handshake.
	Certificate func() (*tls.Certificate, error)
	// TTL is the lifetime of the X.509-SVIDs of agents; an hour if it is zero.
	TTL time.Duration
	Log *slog.Logger
}

// Certifier signs for the server, and says what it signs with: an *issuer.Local.
type Certifier interface {
	issuer.Certifier
	// X509Authority returns what signs X.509-SVIDs now, nil if nothing does, and a channel that is closed when that may be
	// another.
	X509Authority() (a *identity.Authority, changed <-chan struct{})
}

// Assignment is an entry and the agents on whose machines it holds.
type Assignment struct {
	issuer.Entry
	Agents []spiffeid.ID
}

// Endpoint is one that an agent is told, and where its workloads reach it.
type Endpoint struct {
	Name     segment.EndpointName
	Hostname string    // what SNI and Host say
	Gateways []Gateway // in the order in which to try them; none: nobody has said where those that there are can be reached
}

// Gateway is one that serves an endpoint.
type Gateway struct {
	ID      spiffeid.ID
	Address string // host:port
}

// Server is the control plane's end. It is safe for concurrent use.
type Server struct {
	nodepb.UnimplementedNodeServer
	config  Config
	roots   *x509.CertPool
	tokens  *Tokens
	agents  *agents
	limiter limiter

	mu    sync.Mutex // for writers
	state atomic.Pointer[state]
}

// state is what is in force. It is immutable, but for changed, which is closed when it no longer is.
type state struct {
	assigned map[spiffeid.ID]*assigned // by agent; nil: not known yet, and nobody is told anything
	source   issuer.Bundles
	bundles  bundles
	changed  chan struct{}
}

// Open reads what the folder keeps. The server entitles nobody until Set and SetBundles.
func Open(c Config) (*Server, error) {
	if c.TTL == 0 {
		c.TTL = time.Hour
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open state of agents: %w", err)
	}
	tokens, err := openTokens(filepath.Join(c.Dir, "join-tokens.json"), c.TrustDomain)
	if err != nil {
		return nil, err
	}
	agents, err := openAgents(filepath.Join(c.Dir, "agents.json"))
	if err != nil {
		return nil, err
	}
	s := &Server{config: c, tokens: tokens, agents: agents}
	if len(c.X509POP) > 0 {
		s.roots = x509.NewCertPool()
		for _, ca := range c.X509POP {
			s.roots.AddCert(ca)
		}
	}
	s.state.Store(&state{changed: make(chan struct{})})
	return s, nil
}

// Tokens returns the server's join tokens.
func (s *Server) Tokens() *Tokens { return s.tokens }

// Set puts assignments in force in place of those before, and so the endpoints that each agent is told. Entries that name
// what only agents and the control plane may be, or another trust domain, are left out and logged.
func (s *Server) Set(assignments []Assignment, endpoints map[spiffeid.ID][]Endpoint) {
	all := make(map[spiffeid.ID]*assigned)
	of := func(agent spiffeid.ID) *assigned {
		if all[agent] == nil {
			all[agent] = newAssigned()
		}
		return all[agent]
	}
	for _, a := range assignments {
		if nodepb.Reserved(a.ID) || !a.ID.MemberOf(s.config.TrustDomain) {
			s.config.Log.Error("entry not assigned: no workload may be this", "caller", a.ID.String())
			continue
		}
		for _, id := range a.Agents {
			of(id).add(a.Entry)
		}
	}
	for id, known := range endpoints {
		of(id).tell(known)
	}
	for _, a := range all {
		a.seal()
	}
	s.change(func(st *state) { st.assigned = all })
}

// SetBundles does the same for the bundles.
func (s *Server) SetBundles(b issuer.Bundles) {
	marshaled, err := marshalBundles(b)
	if err != nil {
		s.config.Log.Error("bundles not sent to agents", "error", err)
		return
	}
	s.change(func(st *state) { st.source, st.bundles = b, marshaled })
}

// change replaces the state and wakes everybody who follows it; each looks for himself whether anything is different.
func (s *Server) change(edit func(*state)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.state.Load()
	next := *before
	edit(&next)
	next.changed = make(chan struct{})
	s.state.Store(&next)
	close(before.changed)
}

// AgentInfo is what is known of an agent.
type AgentInfo struct {
	ID       spiffeid.ID
	Attested string    // how: "join_token" or "x509pop"; empty if it never was
	LastSeen time.Time // now, while it is connected
	Expires  time.Time // the end of its X.509-SVID
	// Root is what the SVID that it uses stands below: the SHA-256 of that certificate, in hexadecimal; "" if that is not
	// known. Once it is distrusted, the agent must be attested again.
	Root    string
	Revoked bool
}

// Agents lists the agents that were attested or revoked, by their IDs.
func (s *Server) Agents() []AgentInfo { return s.agents.list(time.Now()) }

// Revoke ends what an agent may do, now and for ever: its streams, its SVID's use here, and unused join tokens for it.
// What its workloads hold ends when it would have. An agent that is not known yet is not attested later. On an error,
// the agent is revoked for as long as this process runs.
func (s *Server) Revoke(id spiffeid.ID) error {
	if !id.MemberOf(s.config.TrustDomain) || !nodepb.IsAgent(id) {
		return fmt.Errorf("revoke agent: %q is none of %s", id, s.config.TrustDomain)
	}
	err := errors.Join(s.agents.revoke(id, time.Now()), s.tokens.drop(id))
	s.config.Log.Warn("agent revoked", "agent", id.String(), "error", err)
	if err != nil {
		return fmt.Errorf("revoke agent: %w", err)
	}
	return nil
}

// Revoked reports whether an agent was revoked.
func (s *Server) Revoked(id spiffeid.ID) bool { return s.agents.admissible(id) != nil }

// Run serves agents on a listener, which it closes, until the context ends.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(s.tlsConfig())),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: time.Minute, Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	nodepb.RegisterNodeServer(server, s)
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	group.Go(func() {
		<-ctx.Done()
		server.Stop() // its streams stay open: they would not end by themselves
	})
	if err := server.Serve(newLimitListener(l, maxConnections)); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve agents: %w", err)
	}
	return nil
}

// tlsConfig asks every client for a certificate and believes none: who it is of is decided at each call, by what is
// true then. The handshake proves that the client has the certificate's key.
func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.config.Certificate() },
	}
}
