package main

import (
	"errors"
	"net"
	"testing"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

func TestBounded(t *testing.T) {
	b := bounded{insecure.NewCredentials(), make(chan struct{}, 2)}
	handshake := func(c credentials.TransportCredentials) (net.Conn, error) {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { theirs.Close() })
		held, _, err := c.ServerHandshake(ours)
		return held, err
	}
	first, err := handshake(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := handshake(b.Clone()); err != nil {
		t.Fatal(err)
	}
	if _, err := handshake(b); err == nil {
		t.Error("a third connection was taken")
	}
	first.Close()
	first.Close() // gives back one slot, not two
	if _, err := handshake(b); err != nil {
		t.Errorf("the slot of a closed connection was not given back: %v", err)
	}
	if _, err := handshake(b); err == nil {
		t.Error("closing twice gave back two slots")
	}

	b = bounded{refusing{insecure.NewCredentials()}, make(chan struct{}, 1)}
	for range 2 {
		if _, err := handshake(b); !errors.Is(err, errRefused) {
			t.Errorf("a refused connection kept its slot: %v", err)
		}
	}
}

var errRefused = errors.New("refused")

type refusing struct {
	credentials.TransportCredentials
}

func (refusing) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errRefused
}
