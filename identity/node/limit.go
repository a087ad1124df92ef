package node

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc/peer"
)

// How often one address may try to become an agent: a burst, and then so many each second.
const (
	attemptBurst  = 20
	attemptRate   = 2
	maxAddresses  = 4096 // that are told apart; all others share one limit
	refilledAfter = attemptBurst / attemptRate * time.Second
)

// limiter bounds attempts by the addresses that they come from. Its zero value is ready.
type limiter struct {
	mu      sync.Mutex
	buckets map[netip.Prefix]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

// allow takes an attempt, if there is one left.
func (l *limiter) allow(from netip.Prefix, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.buckets == nil {
		l.buckets = map[netip.Prefix]bucket{}
	}
	b, ok := l.buckets[from]
	if !ok && len(l.buckets) >= maxAddresses {
		for other, b := range l.buckets {
			if now.Sub(b.at) >= refilledAfter {
				delete(l.buckets, other)
			}
		}
		if len(l.buckets) >= maxAddresses {
			from = netip.Prefix{}
			b, ok = l.buckets[from]
		}
	}
	if !ok {
		b = bucket{attemptBurst, now}
	}
	b.left = min(attemptBurst, b.left+max(0, now.Sub(b.at).Seconds())*attemptRate)
	b.at = now
	allowed := b.left >= 1
	if allowed {
		b.left--
	}
	l.buckets[from] = b
	return allowed
}

// address is where a call comes from: for IPv6 the network, of which one machine may have all.
func address(ctx context.Context) netip.Prefix {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Prefix{}
	}
	tcp, ok := p.Addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	prefix, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}

// limitListener closes connections at once that are too many.
type limitListener struct {
	net.Listener
	free chan struct{}
}

func newLimitListener(l net.Listener, n int) *limitListener {
	return &limitListener{l, make(chan struct{}, n)}
}

func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.free <- struct{}{}:
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.free })}, nil
		default:
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
