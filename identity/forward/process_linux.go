package forward

import (
	"context"
	"syscall"

	"sallyport.dev/identity/attest"
	"sallyport.dev/segment"
)

// key tells apart all processes that live at one moment, and what each was when it connected.
type key struct {
	pid, uid, gid int
	dev, ino      uint64 // of the program
}

func keyOf(p *attest.Held) key {
	k := key{pid: p.PID, uid: p.UID, gid: p.GID}
	if p.Program != nil {
		s := p.Program.Sys().(*syscall.Stat_t) // what every FileInfo of package os holds on Linux
		k.dev, k.ino = s.Dev, s.Ino
	}
	return k
}

type processKey struct{}

// Selectors is an issuer's Config.Attest that knows the processes for which a Forwarder asks, and asks package attest
// about all others. Of ours it knows the same as of those.
func Selectors(ctx context.Context, kinds []string) ([]segment.Selector, error) {
	p, ok := ctx.Value(processKey{}).(*attest.Held)
	if !ok {
		return attest.Selectors(ctx, kinds)
	}
	seen, err := p.Look(ctx, kinds)
	if err != nil {
		return nil, err
	}
	return seen.Selectors(), nil
}
