package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
)

const (
	callTime   = 10 * time.Second
	maxChain   = 10
	maxMessage = 32 << 20 // all entries of a machine, and all bundles
)

// link is a connection with one SVID.
type link struct {
	conn   *grpc.ClientConn
	client nodepb.NodeClient
	svid   *x509svid.SVID // nil: none
	hurry  func()         // has the SVID renewed before its time
	calls  sync.WaitGroup // in which the link is not closed
}

// connect returns a link that presents the SVID, or none. It connects when it is used.
func (a *Agent) connect(svid *x509svid.SVID) (*link, error) {
	conn, err := grpc.NewClient("passthrough:///"+a.config.Addr,
		grpc.WithTransportCredentials(credentials.NewTLS(a.tlsConfig(svid))),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return a.config.Dial(ctx, addr) }),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: firstWait, Multiplier: 1.6, Jitter: 0.2, MaxDelay: callTime},
			MinConnectTimeout: callTime,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: callTime}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to control plane: %w", err)
	}
	return &link{conn: conn, client: nodepb.NewNodeClient(conn), svid: svid, hurry: func() {}}, nil
}

// tlsConfig accepts the trust domain's control plane and nobody else.
func (a *Agent) tlsConfig(svid *x509svid.SVID) *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection checks the SPIFFE ID, not a host name
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := identity.Verify(state.PeerCertificates, a.own.Load().X509Bundle(), time.Now())
			if err != nil {
				return err
			}
			if want := nodepb.ControlPlane(a.config.TrustDomain); id != want {
				return fmt.Errorf("verify control plane: it is %s, not %s", id, want)
			}
			return nil
		},
	}
	if svid != nil {
		cert := tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
		for _, one := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, one.Raw)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c
}

// use makes calls go over another link, or nil. The one before is closed when its calls have ended.
func (a *Agent) use(l *link, retiring *sync.WaitGroup) {
	a.mu.Lock()
	before := a.link
	a.link = l
	a.mu.Unlock()
	if before != nil {
		retiring.Go(func() {
			before.calls.Wait()
			before.conn.Close()
		})
	}
}

// call makes a call to the control plane, for at most callTime. What it answers is not the fault of whoever asked,
// unless it says so, and may be otherwise soon: the agent's own standing is session's to mend.
func (a *Agent) call(ctx context.Context, do func(context.Context, nodepb.NodeClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	select {
	case a.calls <- struct{}{}:
		defer func() { <-a.calls }()
	case <-ctx.Done():
		return status.Error(codes.Unavailable, "too many calls to the control plane")
	}
	a.mu.Lock()
	l := a.link
	if l == nil {
		a.mu.Unlock()
		return status.Error(codes.Unavailable, "no connection to the control plane")
	}
	l.calls.Add(1)
	a.mu.Unlock()
	defer l.calls.Done()
	err := do(ctx, l.client)
	if err == nil || status.Code(err) == codes.InvalidArgument {
		return err
	}
	return status.Errorf(codes.Unavailable, "ask control plane: %s", status.Convert(err).Message())
}

// errOtherEntries says that an entry is changing.
var errOtherEntries = status.Error(codes.Unavailable, "the control plane has other entries now")

// CertifyX509 is a Certifier's. That the control plane is away is the gRPC status Unavailable.
func (a *Agent) CertifyX509(ctx context.Context, e issuer.Entry, k issuer.Key) ([]*x509.Certificate, error) {
	name, ok := a.name(e)
	if !ok {
		return nil, errOtherEntries
	}
	csr, err := k.Request()
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	err = a.call(ctx, func(ctx context.Context, c nodepb.NodeClient) error {
		resp, err := c.CertifyX509(ctx, &nodepb.CertifyX509Request{EntryId: name, Csr: csr})
		if err != nil {
			return err
		}
		certified, id, err := parseChain(resp.CertChain, k.Public(), a.own.Load())
		if err != nil {
			return err
		}
		if id != e.ID {
			return fmt.Errorf("the control plane answered with the SVID of %s", id)
		}
		chain = certified
		return nil
	})
	return chain, err
}

// CertifyJWT is a Certifier's, and like CertifyX509.
func (a *Agent) CertifyJWT(ctx context.Context, e issuer.Entry, audience []string) (string, error) {
	name, ok := a.name(e)
	if !ok {
		return "", errOtherEntries
	}
	var token string
	err := a.call(ctx, func(ctx context.Context, c nodepb.NodeClient) error {
		resp, err := c.CertifyJWT(ctx, &nodepb.CertifyJWTRequest{EntryId: name, Audience: audience})
		if err == nil && resp.Token == "" {
			err = errors.New("the control plane answered with nothing")
		}
		token = resp.GetToken()
		return err
	})
	return token, err
}

// name returns what the control plane calls an entry.
func (a *Agent) name(e issuer.Entry) (string, bool) {
	names := a.names.Load()
	if names == nil {
		return "", false
	}
	name, ok := (*names)[says(e)]
	return name, ok
}

// says is everything that an entry says.
func says(e issuer.Entry) string {
	return fmt.Sprintf("%s %q %q %d %q %t", e.ID, e.Selectors, e.DNSNames, e.TTL, e.FederatesWith, e.FederatesAll)
}
