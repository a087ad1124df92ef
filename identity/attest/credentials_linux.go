package attest

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"sallyport.dev/segment"
)

// NewCredentials returns what a gRPC server on a Unix socket needs to know its callers. Connections whose process
// cannot be held on to are refused.
func NewCredentials() credentials.TransportCredentials {
	return serverCredentials{hashes: NewHashes()}
}

// Caller returns the process whose call the context belongs to, as it is now. What costs something is found out only if
// selectors of these kinds ("unix:sha256") need it.
func Caller(ctx context.Context, kinds []string) (Process, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Process{}, errors.New("attest caller: not a call")
	}
	info, ok := p.AuthInfo.(authInfo)
	if !ok {
		return Process{}, errors.New("attest caller: its connection was not attested")
	}
	return info.process.Look(ctx, kinds)
}

// Selectors is Caller's selectors.
func Selectors(ctx context.Context, kinds []string) ([]segment.Selector, error) {
	p, err := Caller(ctx, kinds)
	if err != nil {
		return nil, err
	}
	return p.Selectors(), nil
}

// serverCredentials attest each connection when it is accepted.
type serverCredentials struct{ hashes *Hashes }

func (c serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uc, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("attest connection: not on a Unix socket")
	}
	p, err := Hold(uc, c.hashes)
	if err != nil {
		return nil, nil, fmt.Errorf("attest connection: %w", err)
	}
	return conn{uc, p}, authInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, // it never leaves the machine
		process:        p,
	}, nil
}

func (serverCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("attest connection: for servers only")
}

func (serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: authInfo{}.AuthType()}
}

func (c serverCredentials) Clone() credentials.TransportCredentials { return c }

func (serverCredentials) OverrideServerName(string) error { return nil }

// authInfo carries the process to the calls of its connection.
type authInfo struct {
	credentials.CommonAuthInfo
	process *Held
}

func (authInfo) AuthType() string { return "unix-peer" }

// conn lets go of the process when it is closed.
type conn struct {
	*net.UnixConn
	process *Held
}

func (c conn) Close() error {
	return errors.Join(c.UnixConn.Close(), c.process.Close())
}
