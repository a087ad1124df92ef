package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

func serveGRPC(ctx context.Context, group *errgroup.Group, s *grpc.Server, l net.Listener) {
	group.Go(func() error {
		if err := s.Serve(l); err != nil && ctx.Err() == nil {
			return fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		s.Stop() // streams here never end by themselves
		return nil
	})
}

func serveHTTP(ctx context.Context, group *errgroup.Group, h http.Handler, l net.Listener) {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true) // for gateways, whose callers may speak gRPC
	s := &http.Server{Handler: h, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	group.Go(func() error {
		if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return s.Close()
	})
}

// lastReports has Envoy, by its administration, accept no more connections, and gives it the time to report what it has
// served: an Envoy that is told to end throws away the flows that it has not sent yet. It sends them every 200 ms.
func lastReports(socket string) {
	reported := time.After(500 * time.Millisecond)
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	if resp, err := client.Post("http://envoy/drain_listeners", "", nil); err == nil { // else it is not running, or ends with its door open
		resp.Body.Close()
	}
	<-reported
}

// maxConnections bounds the descriptors that local processes can make us hold: each connection takes two.
const maxConnections = 4096

// openToAll are the options of a server whose socket every local process may open.
func openToAll(creds credentials.TransportCredentials) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(bounded{creds, make(chan struct{}, maxConnections)}),
		grpc.MaxConcurrentStreams(100),
		grpc.ConnectionTimeout(10 * time.Second), // until a connection speaks HTTP/2
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Minute}),
	}
}

// bounded refuses connections while there are as many as it has slots. It is no listener, because attestation wants
// the connection that was accepted, not one around it.
type bounded struct {
	credentials.TransportCredentials
	slots chan struct{}
}

func (b bounded) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	select {
	case b.slots <- struct{}{}:
	default:
		return nil, nil, errors.New("accept connection: there are too many")
	}
	release := sync.OnceFunc(func() { <-b.slots })
	c, info, err := b.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		release()
		return nil, nil, err
	}
	return slotConn{c, release}, info, nil
}

// Clone keeps the bound, which the embedded one's would lose.
func (b bounded) Clone() credentials.TransportCredentials { return b }

// slotConn gives its slot back when it is closed.
type slotConn struct {
	net.Conn
	release func()
}

func (c slotConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
