package filesource

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport.dev/api/v1alpha1"
)

func workload(name string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: Workload
metadata: {name: %s}
spec:
  spiffeID: spiffe://example.org/%[1]s
  selectors: ["unix:uid:1"]
`, name)
}

// summary is what a test needs to know of documents: their names, or the code of what is wrong with them.
func summary(docs []v1alpha1.Document) string {
	var all []string
	for _, d := range docs {
		if ps := d.Problems(); ps != nil {
			all = append(all, filepath.Base(ps[0].Pos.File)+"!"+ps[0].Code)
			continue
		}
		all = append(all, d.Metadata.Name)
	}
	return strings.Join(all, " ")
}

// must fails the test if any of the errors is one.
func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// write writes a file and the folders that it needs, in place.
func write(t testing.TB, text string, path ...string) {
	t.Helper()
	file := filepath.Join(path...)
	must(t, os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644))
}

// replace renames a new file over another.
func replace(t testing.TB, text string, path ...string) {
	t.Helper()
	file := filepath.Join(path...)
	write(t, text, file+".new")
	must(t, os.Rename(file+".new", file))
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b.yaml", "a.yml", "c.json", "sub/d.yaml", "yaml.yaml/e.yaml",
		".hidden.yaml", ".git/f.yaml", "..data/g.yaml", "h.yaml~", "#i.yaml#", "j.yaml.swp", "k.txt", "sub/deeper/l.yaml", "yaml"} {
		write(t, workload(strings.Map(func(r rune) rune {
			if r < 'a' || r > 'z' {
				return '-'
			}
			return r
		}, name)), dir, name)
	}
	must(t, os.Symlink(filepath.Join(dir, "b.yaml"), filepath.Join(dir, "m.yaml")),
		os.Symlink(filepath.Join(dir, "..data"), filepath.Join(dir, "n")))
	want := "a-yml b-yaml c-json b-yaml --data-g-yaml sub-d-yaml yaml-yaml-e-yaml"
	if got := summary(Read(dir)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := summary(Read(filepath.Join(dir, "k.txt"))); got != "k-txt" {
		t.Errorf("a single file: %s", got)
	}
}

func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o644), os.Symlink("nowhere", filepath.Join(dir, "link.yaml")))
	write(t, "", dir, "empty.yaml")
	write(t, workload("good"), dir, "good.yaml")
	write(t, strings.Repeat("#", v1alpha1.MaxBytes)+"#", dir, "large.yaml")
	want := "empty.yaml!unfinished good large.yaml!too-large link.yaml!unreadable pipe.yaml!unreadable"
	docs := Read(dir)
	if got := summary(docs); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := summary(Read(filepath.Join(dir, "no"))); got != "no!unreadable" {
		t.Errorf("no folder: %s", got)
	}
	for i := range 4 {
		write(t, strings.Repeat("\xff", v1alpha1.MaxBytes), dir, fmt.Sprintf("z%d.yaml", i))
	}
	if got := summary(Read(dir)); !strings.HasSuffix(got, " z0.yaml!not-utf8 z1.yaml!not-utf8 z2.yaml!too-large") {
		t.Errorf("all files together: %s", got)
	}
}

// What cannot be looked at may have been a folder of documents that deny: it is not left out, whatever its name.
func TestUnreadableFolder(t *testing.T) {
	dir := t.TempDir()
	write(t, workload("good"), dir, "good.yaml")
	for from, to := range map[string]string{"team": "unmounted", "loop": "loop", "notes.txt": "nowhere",
		".#good.yaml": "somebody@host.1234", "..data": "nowhere"} {
		must(t, os.Symlink(to, filepath.Join(dir, from)))
	}
	if got, want := summary(Read(dir)), "good loop!unreadable notes.txt!unreadable team!unreadable"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	write(t, workload("deny"), dir, "unmounted", "deny.yaml")
	if got, want := summary(Read(dir)), "good loop!unreadable notes.txt!unreadable deny deny"; got != want {
		t.Errorf("mounted: got  %s\nwant %s", got, want)
	}
}

// A folder is unreadable to users who may not enter it.
func TestForbiddenFolder(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may look anywhere")
	}
	dir, hidden := t.TempDir(), filepath.Join(t.TempDir(), "hidden")
	write(t, workload("deny"), hidden, "team", "deny.yaml")
	must(t, os.Symlink(filepath.Join(hidden, "team"), filepath.Join(dir, "team")), os.Chmod(hidden, 0))
	t.Cleanup(func() { must(t, os.Chmod(hidden, 0o755)) })
	if got := summary(Read(dir)); got != "team!unreadable" {
		t.Error(got)
	}
}

// follow runs a source and returns a function that waits until its newest snapshot is as wanted.
func follow(t testing.TB, path string) (wait func(want string) v1alpha1.Snapshot) {
	return followEach(t, path, time.Hour)
}

func followEach(t testing.TB, path string, round time.Duration) (wait func(want string) v1alpha1.Snapshot) {
	ctx, cancel := context.WithCancel(context.Background())
	out, done := make(chan v1alpha1.Snapshot), make(chan error)
	go func() { done <- Source{Path: path, Log: slog.New(slog.DiscardHandler), blindly: round}.Run(ctx, out) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func(want string) v1alpha1.Snapshot {
		t.Helper()
		var seen []string
		for deadline := time.After(10 * time.Second); ; {
			select {
			case s := <-out:
				if got := summary(slices.Concat(s.Files...)); got == want {
					return s
				} else if !slices.Contains(seen, got) {
					seen = append(seen, got)
				}
			case <-deadline:
				t.Fatalf("never %q, only %q", want, seen)
			}
		}
	}
}

func TestFollowFolder(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "documents")
	must(t, os.Mkdir(dir, 0o755))
	wait := follow(t, dir)
	wait("")
	before := time.Now()
	write(t, workload("a"), dir, "a.yaml")
	if s := wait("a"); s.Noticed.Before(before) || s.Noticed.After(time.Now()) {
		t.Errorf("noticed at %v, written at %v", s.Noticed, before)
	}
	replace(t, workload("b"), dir, "a.yaml")
	wait("b")

	f, err := os.OpenFile(filepath.Join(dir, "a.yaml"), os.O_WRONLY|os.O_TRUNC, 0)
	must(t, err)
	wait("a.yaml!unfinished")
	text := workload("c")
	_, err = f.WriteString(text[:len(text)-4])
	must(t, err)
	wait("a.yaml!syntax")
	_, err = f.WriteString(text[len(text)-4:])
	must(t, err, f.Close())
	wait("c")

	write(t, workload("d"), dir, "sub/d.yaml")
	wait("c d")
	write(t, workload("e"), dir, "sub/d.yaml")
	wait("c e")
	must(t, os.Remove(filepath.Join(dir, "a.yaml")))
	wait("e")
	must(t, os.RemoveAll(dir))
	wait("documents!unreadable")
	write(t, workload("f"), dir, "a.yaml")
	wait("f")
	write(t, workload("g"), dir, "a.yaml")
	wait("g")

	// Another folder by the same name.
	write(t, workload("h"), dir+".new", "a.yaml")
	must(t, os.Rename(dir, dir+".old"), os.Rename(dir+".new", dir))
	wait("h")
	write(t, workload("i"), dir, "a.yaml")
	wait("i")
}

// As kubelet does it: all files of a mounted ConfigMap lead through one link, which is replaced.
func TestFollowConfigMap(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, workload("a"), dir, "..1/a.yaml")
	write(t, workload("b"), dir, "..2/a.yaml")
	must(t, os.Symlink("..1", filepath.Join(dir, "..data")), os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")))
	folder, single := follow(t, dir), follow(t, filepath.Join(dir, "a.yaml"))
	folder("a")
	single("a")
	must(t, os.Symlink("..2", filepath.Join(dir, "..tmp")), os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")))
	folder("b")
	single("b")
}

func TestFollowLinkToFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, workload("a"), dir, "1/a.yaml")
	write(t, workload("b"), dir, "2/a.yaml")
	current := filepath.Join(dir, "current")
	must(t, os.Symlink("1", current))
	wait := follow(t, current)
	wait("a")
	must(t, os.Symlink("2", current+".new"), os.Rename(current+".new", current))
	wait("b")
	write(t, workload("c"), dir, "2/a.yaml")
	wait("c")
}

func TestFollowFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "not", "there", "grants")
	wait := followEach(t, file, 2*quiet)
	wait("grants!unreadable")
	write(t, workload("a"), file) // its folders are new as well: only the next round can tell
	wait("a")
	replace(t, workload("b"), file)
	wait("b")
	must(t, os.Remove(file))
	wait("grants!unreadable")
}

// A file that moves while others are read is in one place or the other.
func TestMoveWhileRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range 1000 {
		write(t, "# nothing\n", dir, fmt.Sprintf("m%03d.yaml", i))
	}
	names := []string{"a.yaml", "z.yaml"}
	write(t, workload("a"), dir, names[0])
	snapshots := make(chan v1alpha1.Snapshot)
	go func() { _ = Source{Path: dir, Log: slog.New(slog.DiscardHandler)}.Run(t.Context(), snapshots) }()
	for i := range 15 {
		write(t, fmt.Sprintln("#", i), dir, "m500.yaml") // which has all be read
		time.Sleep(quiet + time.Duration(i)*time.Millisecond)
		must(t, os.Rename(filepath.Join(dir, names[0]), filepath.Join(dir, names[1])))
		slices.Reverse(names)
		for still := time.After(2 * patience); still != nil; {
			select {
			case s := <-snapshots:
				if got := summary(slices.Concat(s.Files...)); got != "a" {
					t.Fatalf("move %d: got %.80q", i, got)
				}
			case <-still:
				still = nil
			}
		}
	}
}

// A writer who never stops must not keep the changes of others waiting.
func TestRestlessWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	log, err := os.Create(filepath.Join(dir, "log.yaml"))
	must(t, err)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for tick := time.NewTicker(quiet / 10); ; {
			select {
			case <-tick.C:
				_, _ = log.WriteString("# still here\n")
			case <-stop:
				return
			}
		}
	}()
	defer func() { close(stop); <-stopped; log.Close() }()
	wait := follow(t, dir)
	wait("")
	write(t, workload("a"), dir, "a.yaml")
	wait("a")
}

// Documents that did not change are the same values, not only equal ones.
func TestOnlyWhatChangedIsDecoded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, workload("a")+"---\n"+workload("b"), dir, "a.yaml")
	wait := follow(t, dir)
	before := wait("a b").Files[0]
	write(t, workload("c")+"---\n"+workload("b"), dir, "a.yaml")
	after := wait("c b").Files[0]
	if before[1].Spec != after[1].Spec || before[0].Spec == after[0].Spec {
		t.Error("decoded what had not changed")
	}
	if diff := cmp.Diff(after[1].Problems(), before[1].Problems()); diff != "" {
		t.Error(diff)
	}
}

// A file whose stamp is as it was is not read again; one that was written just before it was read is, and so is one that was
// written since, however soon, with the same size and a time of its own making.
func TestStamps(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	old := time.Unix(1_000_000_000, 0)
	edit := func(text string) {
		write(t, text, path)
		must(t, os.Chtimes(path, old, old))
	}
	var r reader
	reads := func(all bool) string {
		r.read(dir, func(string) {}, all)
		return r.files[0].text
	}
	for i := range 200 { // many of them within a tick
		text := fmt.Sprintf("text: %03d\n", i)
		edit(text)
		if got := reads(false); got != text {
			t.Fatalf("reads %q, and there is %q", got, text)
		}
		if r.texts[path].stamp != (stamp{}) {
			t.Fatal("a stamp counts that may be that of what is written next")
		}
	}
	// As if it had been there for long when it was read: its stamp counts, and only that is looked at.
	info, err := os.Stat(path)
	must(t, err)
	r.texts[path] = known{"remembered\n", stampOf(info)}
	if got := reads(false); got != "remembered\n" {
		t.Errorf("reads %q again", got)
	}
	if got := reads(true); got != "text: 199\n" {
		t.Errorf("does not read all: %q", got)
	}
	r.texts[path] = known{"remembered\n", stampOf(info)}
	for later := info; stampOf(later) == stampOf(info); { // until there is another tick
		edit("text: 200\n")
		later, err = os.Stat(path)
		must(t, err)
	}
	if got := reads(false); got != "text: 200\n" {
		t.Errorf("reads %q, and there is another", got)
	}
	now := time.Unix(1000, 0)
	for changed, counts := range map[int64]bool{990: true, 999: false, 1000: false, 1001: false} {
		if (stamp{inode: 1, changed: syscall.Timespec{Sec: changed}}).settled(now) != counts {
			t.Errorf("a stamp of %d at 1000: %t", changed, !counts)
		}
	}
	if (stamp{}).settled(now) {
		t.Error("no stamp counts")
	}
}

// From a renamed file to the snapshot, in a file of 10,000 documents of which one changes. 20 ms of it are waiting
// for the writer to be done.
func BenchmarkChange(b *testing.B) {
	dir := b.TempDir()
	var rest strings.Builder
	for i := range 10_000 {
		rest.WriteString("---\n" + workload(fmt.Sprintf("w-%d", i)))
	}
	replace(b, workload("first")+rest.String(), dir, "a.yaml")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	out := make(chan v1alpha1.Snapshot)
	go Source{Path: dir, Log: slog.New(slog.DiscardHandler)}.Run(ctx, out)
	<-out
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		text := workload(fmt.Sprintf("first-%d", i)) + rest.String()
		b.StartTimer()
		replace(b, text, dir, "a.yaml")
		if s := <-out; s.Files[0][0].Metadata.Name != fmt.Sprintf("first-%d", i) {
			b.Fatal("an old snapshot")
		}
	}
}

// Documents of a shadow folder that are read with the others would be enforced.
func TestApart(t *testing.T) {
	dir := t.TempDir()
	write(t, "# nothing\n", dir, "documents", "a.yaml")
	write(t, "# nothing\n", dir, "documents", "shadow", "a.yaml")
	write(t, "# nothing\n", dir, "documents-2", "a.yaml")
	must(t, os.Symlink("documents/shadow", filepath.Join(dir, "link")), os.Symlink("documents-2", filepath.Join(dir, "other")))
	t.Chdir(dir)
	for _, c := range []struct {
		a, b  string
		apart bool
	}{
		{"documents", "documents-2", true}, {"documents", "other", true}, {"documents", "nowhere", true}, {"documents/a.yaml", "documents/shadow", true},
		{"documents/a.yaml", "documents/b.yaml", true}, {"documents", filepath.Join(dir, "documents-2"), true},
		{"documents", "documents", false}, {"documents", "documents/", false}, {"documents", "documents/shadow", false}, {"documents", "link", false},
		{"documents", "documents/nowhere", false}, {"documents", filepath.Join(dir, "documents/shadow"), false}, {"documents", ".", false},
		{"documents/../documents-2", "other", false}, {"documents", "documents/a.yaml", false}, {"/", "documents", false}, {"documents", "..", false},
	} {
		if ab, ba := Apart(c.a, c.b), Apart(c.b, c.a); (ab == nil) != c.apart || (ba == nil) != c.apart {
			t.Errorf("%s and %s: %v, %v", c.a, c.b, ab, ba)
		}
	}
}
