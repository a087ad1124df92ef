//go:build !linux

package attest

import (
	"context"
	"errors"
	"net"
	"runtime"

	"google.golang.org/grpc/credentials"

	"sallyport.dev/segment"
)

var errPlatform = errors.New("attest caller: recognising local processes needs Linux, not " + runtime.GOOS)

// NewCredentials returns credentials that refuse every connection: recognising processes needs Linux.
func NewCredentials() credentials.TransportCredentials { return refuse{} }

// Caller fails: recognising processes needs Linux.
func Caller(context.Context, bool) (Process, error) { return Process{}, errPlatform }

// Selectors fails: recognising processes needs Linux.
func Selectors(context.Context, bool) ([]segment.Selector, error) { return nil, errPlatform }

type refuse struct{}

func (refuse) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errPlatform
}

func (refuse) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errPlatform
}

func (refuse) Info() credentials.ProtocolInfo          { return credentials.ProtocolInfo{} }
func (refuse) Clone() credentials.TransportCredentials { return refuse{} }
func (refuse) OverrideServerName(string) error         { return nil }
