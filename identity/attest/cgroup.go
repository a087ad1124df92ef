package attest

import (
	"slices"
	"strings"
)

// place is where a process is among the control groups (cgroups(7)), as far as it cannot have chosen that itself.
//
// Whoever may make groups below one, because it was delegated to him (a container, a user's own systemd, a service with
// Delegate=yes), may call them what he likes. So a path is read from its root, where only root makes groups, and no
// further than the first name that says something. What is below that is anybody's.
type place struct {
	unit      string // of the system's systemd
	container string // its ID, 64 digits
	pod       string // the UID of the container's Kubernetes pod
}

// placeOf reads /proc/PID/cgroup, which has a path for every tree of groups: one of version 2, several of version 1, or
// both. It returns nothing at all if the trees disagree about the container, or if one of the paths begins outside of
// the cgroup namespace that it was read in ("/../").
func placeOf(text string) place {
	var at place
	var units []string
	for line := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
		number, rest, _ := strings.Cut(line, ":")
		controllers, path, _ := strings.Cut(rest, ":")
		path, rooted := strings.CutPrefix(path, "/")
		if !rooted {
			return place{}
		}
		if path == "" {
			continue // the root of a tree that is not in use
		}
		names := strings.Split(path, "/")
		if slices.ContainsFunc(names, func(s string) bool { return s == "" || s == "." || s == ".." }) {
			return place{}
		}
		if container, pod := containerOf(names); container != "" {
			if at.container != "" && (at.container != container || at.pod != pod) {
				return place{}
			}
			at.container, at.pod = container, pod
		}
		if number == "0" && controllers == "" || controllers == "name=systemd" { // systemd's own trees
			units = append(units, unitOf(names))
		}
	}
	// They disagree about a container whose runtime puts it into one of them only, and leaves it in its own unit in the
	// other. Containers that it puts below its own unit (containerd.service) are not that unit either.
	if units = slices.Compact(units); len(units) == 1 && strings.Contains(units[0], at.container) {
		at.unit = units[0]
	}
	return at
}

// unitOf returns the unit that a path leads through, as systemd's sd_pid_get_unit(3) does: the first one below the
// slices. So what a user's own systemd runs is user@UID.service.
func unitOf(names []string) string {
	names = names[countSlices(names):]
	if len(names) == 0 {
		return ""
	}
	unit := strings.TrimPrefix(names[0], "_") // systemd's escape for names that the kernel reserves
	if kind := unitKind(unit); kind == "" || kind == "slice" {
		return ""
	}
	return unit
}

// countSlices returns how many of the first names are slices of systemd.
func countSlices(names []string) int {
	for i, name := range names {
		if unitKind(strings.TrimPrefix(name, "_")) != "slice" || strings.Contains(name, "@") {
			return i
		}
	}
	return len(names)
}

// unitKind returns the suffix of a unit's name (systemd.unit(5)), if it is one of those that have processes.
func unitKind(unit string) string {
	dot := strings.LastIndexByte(unit, '.')
	at := strings.IndexByte(unit, '@')
	if len(unit) > 255 || dot <= 0 || at == 0 || at == dot-1 { // foo@.service is a template
		return ""
	}
	if strings.ContainsFunc(unit, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(`:-_.\@`, r)
	}) {
		return ""
	}
	switch kind := unit[dot+1:]; kind {
	case "service", "scope", "slice", "socket", "mount", "swap":
		return kind
	}
	return ""
}

// containerOf returns the outermost container on a path, and its pod, where container runtimes that run as root put
// theirs. It knows none below user.slice, where the users' own runtimes are.
func containerOf(names []string) (container, pod string) {
	// By systemd: /system.slice/docker-ID.scope, /kubepods.slice/kubepods-podUID.slice/crio-ID.scope
	n := countSlices(names)
	parents, rest := names[:n], names[n:]
	if len(rest) == 0 || n > 0 && parents[0] == "user.slice" {
		return "", ""
	}
	if scope, ok := strings.CutSuffix(rest[0], ".scope"); ok {
		dash := strings.LastIndexByte(scope, '-')
		if dash < 0 || !isRuntime(scope[:dash]) || !isContainer(scope[dash+1:]) {
			return "", ""
		}
		if n > 0 && slices.Equal(parents, sliceChain(parents[n-1])) {
			pod = podOfSlice(parents[n-1])
		}
		return scope[dash+1:], pod
	}
	// What was meant for systemd, by a containerd that was not told to use it: below its unit in one tree of version 1
	// and in that of version 2, at the root of the other trees.
	if n == 1 && len(rest) > 1 && parents[0] == "system.slice" && rest[0] == "containerd.service" {
		rest, n = rest[1:], 0
	}
	if parts := strings.Split(rest[0], ":"); n == 0 && len(parts) == 3 {
		if strings.HasSuffix(parts[0], ".slice") && isRuntime(parts[1]) && isContainer(parts[2]) {
			return parts[2], podOfSlice(parts[0])
		}
		return "", ""
	}
	// Without systemd: /docker/ID, /kubepods/burstable/podUID/ID
	if len(parents) > 0 || len(rest) < 2 {
		return "", ""
	}
	switch root := rest[0]; {
	case root == "docker", root == "default" /* nerdctl */ :
		container = rest[1]
	case root == "libpod_parent":
		container = strings.TrimPrefix(rest[1], "libpod-")
	case root == "kubepods", root == "kubelet" && rest[1] == "kubepods":
		container, pod = containerOfPod(rest[1:])
	}
	if !isContainer(container) {
		return "", ""
	}
	return container, pod
}

// containerOfPod reads what the kubelet's own cgroup driver makes: [kubepods/][burstable/]podUID/ID.
func containerOfPod(names []string) (container, pod string) {
	for _, level := range []string{"kubepods", "burstable", "besteffort"} {
		if len(names) > 0 && names[0] == level {
			names = names[1:]
		}
	}
	if len(names) < 2 {
		return "", ""
	}
	uid, ok := strings.CutPrefix(names[0], "pod")
	if !ok {
		return "", ""
	}
	return strings.TrimPrefix(names[1], "crio-"), podUID(uid)
}

// podOfSlice returns the UID in the name of a pod's slice, "kubepods-burstable-podUID.slice".
func podOfSlice(slice string) string {
	parent, uid, _ := strings.Cut(strings.TrimSuffix(slice, ".slice"), "-pod")
	switch strings.TrimPrefix(parent, "kubelet-") {
	case "kubepods", "kubepods-burstable", "kubepods-besteffort":
		return podUID(strings.ReplaceAll(uid, "_", "-")) // to systemd a dash would be one more slice
	}
	return ""
}

// sliceChain returns the slices that lead to a slice: a.slice, a-b.slice, a-b-c.slice.
func sliceChain(slice string) []string {
	var chain []string
	name := strings.TrimSuffix(slice, ".slice")
	for i, r := range name {
		if r == '-' {
			chain = append(chain, name[:i]+".slice")
		}
	}
	return append(chain, slice)
}

func isRuntime(name string) bool {
	switch name {
	case "docker", "cri-containerd", "crio", "libpod", "nerdctl":
		return true
	}
	return false
}

func isContainer(id string) bool { return len(id) == 64 && isHex(id) }

// podUID returns a UUID as it came, and nothing else. Static pods have none.
func podUID(s string) string {
	parts := strings.Split(s, "-")
	if len(s) != 36 || len(parts) != 5 || !isHex(strings.Join(parts, "")) {
		return ""
	}
	for i, n := range []int{8, 4, 4, 4, 12} {
		if len(parts[i]) != n {
			return ""
		}
	}
	return s
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }
