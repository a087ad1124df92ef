// Package attest finds out which process is at the other end of a Unix socket.
//
// It is for a gRPC server that hands out identities by who asks (SPIFFE Workload Endpoint, 5): NewCredentials looks
// at the process when it connects, Selectors says in each call what is true of it. It believes only the kernel, and
// nothing that the process says. A process that is gone, whose PID another one may have by now, has no selectors, and
// neither has one that runs another program than when it connected, or whose program could be read then or now but
// not both times. One whose program could never be read has those of its user and group only, and may have changed
// its program: to read that of another user's process takes root (or CAP_SYS_PTRACE). It is for Linux only.
//
// What it cannot do: tell apart processes that may debug each other. Whoever runs as the same user as a workload, or
// as root, can be that workload.
package attest

import (
	"strconv"

	"sallyport.dev/segment"
)

// Process is what the kernel says of a process.
type Process struct {
	PID, UID, GID int    // when it connected
	User          string // the name of UID, if it has one
	// Path is the program that it runs. It is empty if that may not be read, and if the path leads to another file
	// by now or for us: the program was deleted or replaced, or the process sees another file system.
	Path   string
	SHA256 string // of the program, in hex; empty if not asked for, not readable, or larger than 512 MiB
}

// Selectors returns the process's selectors, as SPIRE's unix workload attestor names them.
func (p Process) Selectors() []segment.Selector {
	var selectors []segment.Selector
	add := func(name, value string) {
		if value != "" {
			selectors = append(selectors, segment.Selector{Type: "unix", Value: name + ":" + value})
		}
	}
	add("uid", strconv.Itoa(p.UID))
	add("user", p.User)
	add("gid", strconv.Itoa(p.GID))
	add("path", p.Path)
	add("sha256", p.SHA256)
	return selectors
}
