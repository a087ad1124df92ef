package attest

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/segment"
)

// short is what the names in testdata/places.txt stand for.
var short = strings.NewReplacer(
	"OTHER", strings.Repeat("9bca8d63d5fa6107", 4),
	"U_ID2", "561fd272_d131_47ef_a01b_46a997a778f3",
	"UID2", "561fd272-d131-47ef-a01b-46a997a778f3",
	"U_ID", "2c48913c_b29f_11e7_9350_020968147796",
	"UID", "2c48913c-b29f-11e7-9350-020968147796",
	"ID", strings.Repeat("0123456789abcdef", 4),
)

// selectors are those of a place, without the user's.
func (at place) selectors() []segment.Selector {
	return Process{Unit: at.unit, Container: at.container, PodUID: at.pod}.Selectors()[2:]
}

// places reads testdata/places.txt: what /proc/PID/cgroup holds, and the selectors that it leads to.
func places(t testing.TB) map[string]string {
	t.Helper()
	data, err := os.ReadFile("testdata/places.txt")
	if err != nil {
		t.Fatal(err)
	}
	table := make(map[string]string)
	var cgroup strings.Builder
	for line := range strings.Lines(string(data)) {
		selectors, end := strings.CutPrefix(line, "->")
		switch {
		case end:
			table[short.Replace(cgroup.String())] = short.Replace(strings.TrimSpace(selectors))
			cgroup.Reset()
		case line != "\n" && !strings.HasPrefix(line, "#"):
			cgroup.WriteString(line)
		}
	}
	return table
}

func TestPlaces(t *testing.T) {
	table := places(t)
	if len(table) < 80 {
		t.Fatalf("%d places", len(table))
	}
	var all []string
	for cgroup, want := range table {
		var got []string
		for _, s := range placeOf(cgroup).selectors() {
			got = append(got, s.String())
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%sgot  %s\nwant %s", cgroup, s, want)
		}
		all = append(all, got...)
	}
	// Whatever is found can be written in a document.
	slices.Sort(all)
	document := fmt.Sprintf(`{"apiVersion": "sallyport.dev/v1alpha1", "kind": "Workload", "metadata": {"name": "app"},
		"spec": {"spiffeID": "spiffe://example.org/app", "selectors": [%s]}}`, quoted(slices.Compact(all)))
	options := v1alpha1.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
	if _, problems := v1alpha1.Assemble(v1alpha1.Decode("app.json", []byte(document)), options); len(problems) != 0 {
		t.Error(problems)
	}
}

func quoted(texts []string) string {
	var b strings.Builder
	for i, s := range texts {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q", s)
	}
	return b.String()
}

// Whoever may make groups below his own finds no name for one that would make him another.
func TestPlacesBelowOwn(t *testing.T) {
	names := strings.Fields(short.Replace(`
		system.slice user.slice kubepods.slice kubepods-podU_ID.slice kubepods-burstable-podU_ID2.slice init.scope
		rag.service user@1000.service docker-ID.scope crio-OTHER.scope cri-containerd-ID.scope libpod-OTHER.scope
		docker ID OTHER libpod-ID crio-ID kubepods kubelet burstable podUID podUID2 default libpod_parent
		kubepods-podU_ID.slice:cri-containerd:ID system.slice:docker:OTHER containerd.service a _ .x a.slice (deleted)`))
	below := rapid.SliceOfN(rapid.SampledFrom(names), 0, 6)
	table := places(t)
	rapid.Check(t, func(t *rapid.T) {
		own := rapid.SampledFrom([]string{
			"0::/user.slice/user-1000.slice/user@1000.service",
			"0::/user.slice/user-1000.slice/session-2.scope",
			"0::/system.slice/batch.service",
			"0::/docker/OTHER",
			"0::/kubepods/podUID/ID",
			"0::/kubepods.slice/kubepods-podU_ID.slice/cri-containerd-ID.scope",
			"0::/system.slice/docker-ID.scope",
			"0::/lxc.payload.c1",
			"0::/machine.slice/machine-c1.scope",
			"12:memory:/docker/ID\n1:name=systemd:/docker/ID",
			"1:name=systemd:/user.slice/user-1000.slice/session-2.scope\n0::/user.slice/user-1000.slice/session-2.scope",
		}).Draw(t, "own")
		want := placeOf(short.Replace(own))
		var lines []string
		for line := range strings.SplitSeq(short.Replace(own), "\n") { // it may go to different places in each tree
			lines = append(lines, strings.Join(append([]string{line}, below.Draw(t, "below")...), "/"))
		}
		if got := placeOf(strings.Join(lines, "\n")); got != want {
			t.Errorf("%q is %+v, want %+v", lines, got, want)
		}
	})
	for cgroup := range table {
		at := placeOf(cgroup)
		below := strings.ReplaceAll(cgroup, "\n", "/system.slice/rag.service\n")
		if got := placeOf(below); at.container != "" && !strings.Contains(cgroup, ":/\n") && got != at {
			t.Errorf("%s is %+v, want %+v", below, got, at)
		}
	}
}

func FuzzPlaceOf(f *testing.F) {
	for cgroup := range places(f) {
		f.Add(cgroup)
	}
	unit := regexp.MustCompile(`^[A-Za-z0-9:_.\\-][A-Za-z0-9:_.\\@-]{0,246}\.(service|scope|socket|mount|swap)$`)
	container := regexp.MustCompile(`^[0-9a-f]{64}$`)
	pod := regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	f.Fuzz(func(t *testing.T, cgroup string) {
		at := placeOf(cgroup)
		if at.unit != "" && !unit.MatchString(at.unit) || at.container != "" && !container.MatchString(at.container) ||
			at.pod != "" && (at.container == "" || !pod.MatchString(at.pod)) {
			t.Fatalf("%+v", at)
		}
		if !strings.Contains(cgroup, at.unit) && !strings.Contains(cgroup, "_"+at.unit) || !strings.Contains(cgroup, at.container) {
			t.Fatalf("%+v is not in it", at)
		}
		if strings.Contains(cgroup, "/..") && strings.Contains("\n"+cgroup+"/", "/../") && at != (place{}) {
			t.Fatalf("%+v outside of the namespace", at)
		}
	})
}
