// Package attest finds out which process is at the other end of a Unix socket.
//
// It is for a gRPC server that hands out identities by who asks (SPIFFE Workload Endpoint, 5): NewCredentials looks
// at the process when it connects, Selectors says in each call what is true of it. A server that finds its callers in
// another way holds them itself: Hold, HoldPID. It believes only the kernel, and nothing that the process says. A process
// that is gone, whose PID another one may have by now, has no selectors, and neither has one that runs another program
// than when it connected, or whose program could be read then or now but not both times. One whose program could never
// be read has those of its user and groups only, and of its control group, and may have changed its program: to read
// that of another user's process takes root (or CAP_SYS_PTRACE). It is for Linux only.
//
// What it cannot do: tell apart processes that may debug each other. Whoever runs as the same user as a workload, or
// as root, can be that workload.
package attest

import (
	"strconv"
	"strings"

	"sallyport.dev/segment"
)

// Process is what the kernel says of a process. What is not asked for, or not known, is empty.
type Process struct {
	PID, UID, GID int    // when it connected
	User, Group   string // the names of UID and GID, if they have one
	Supplementary []Group
	// Path is the program that it runs. It is empty if that may not be read, and if the path leads to another file
	// by now or for us: the program was deleted or replaced, or the process sees another file system.
	Path   string
	SHA256 string // of the program, in hex; empty if not readable, or larger than 512 MiB
	// Unit is the unit of the system's systemd that it belongs to. What a user's own systemd runs is user@UID.service.
	Unit      string
	Container string // the ID of the container that it runs in, 64 hexadecimal digits; not of a rootless one
	PodUID    string // of the Kubernetes pod that the container belongs to
}

// Group is a group that a process has the rights of.
type Group struct {
	GID  int
	Name string
}

// Selectors returns the process's selectors, as SPIRE's workload attestors name them; unit and container are named
// here.
func (p Process) Selectors() []segment.Selector {
	var selectors []segment.Selector
	add := func(kind, value string) {
		if value != "" {
			plugin, fact, _ := strings.Cut(kind, ":")
			selectors = append(selectors, segment.Selector{Type: plugin, Value: fact + ":" + value})
		}
	}
	add("unix:uid", strconv.Itoa(p.UID))
	add("unix:user", p.User)
	add("unix:gid", strconv.Itoa(p.GID))
	add("unix:group", p.Group)
	for _, g := range p.Supplementary {
		add("unix:supplementary_gid", strconv.Itoa(g.GID))
		add("unix:supplementary_group", g.Name)
	}
	add("unix:path", p.Path)
	add("unix:sha256", p.SHA256)
	add("systemd:unit", p.Unit)
	add("container:id", p.Container)
	add("k8s:pod-uid", p.PodUID)
	return selectors
}

// wants is what to find out that costs something.
type wants struct {
	group, supplementary, names bool // names of supplementary groups
	hash                        bool
	place                       bool
}

// wantsOf returns what selectors of some kinds need.
func wantsOf(kinds []string) wants {
	var w wants
	for _, kind := range kinds {
		switch kind {
		case "unix:group":
			w.group = true
		case "unix:supplementary_gid":
			w.supplementary = true
		case "unix:supplementary_group":
			w.supplementary, w.names = true, true
		case "unix:sha256":
			w.hash = true
		case "systemd:unit", "container:id", "k8s:pod-uid":
			w.place = true
		}
	}
	return w
}
