package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// changing is the file whose grant comes and goes. It is never empty: somebody else is granted the same instead.
const changing = "changing.yaml"

var (
	granted = grant("changing", caller.String(), "chat", "Infer", "small")
	revoked = grant("changing", caller.String()+"-other", "chat", "Infer", "small")
)

// perFile is how many grants stand in one file.
const perFile = 100

// manyGrants is a grant for each of n callers.
func (b *bench) manyGrants(n int) map[string]string {
	docs := b.documents(1)
	for i := range n {
		file := fmt.Sprintf("grants-%d.yaml", i/perFile)
		docs[file] += "---\n" + grant(fmt.Sprintf("app-%d", i), fmt.Sprintf("spiffe://example.org/apps/app-%d", i), "chat", "Infer", "small")
	}
	return docs
}

// oneGroup is one grant: every one of n callers, and ours, may use every one of the models.
func (b *bench) oneGroup(n, models int) map[string]string {
	docs := b.documents(models)
	var callers strings.Builder
	for i := range n {
		fmt.Fprintf(&callers, "  - spiffeID: spiffe://example.org/apps/app-%d\n", i)
	}
	docs["group.yaml"] = head + "kind: Grant\nmetadata: {name: group}\nspec:\n  from:\n" + callers.String() +
		"  to: [{endpoint: chat, operations: [Infer], resources: [\"*\"]}]\n"
	return docs
}

func (b *bench) measureGrants(ctx context.Context, r *Report) error {
	var subjects []*subject
	add := func(name string, documents map[string]string) error {
		for _, with := range b.builds {
			s, err := b.sallyport(ctx, with, documents)
			if err != nil {
				return err
			}
			s.name = strings.TrimPrefix(with.name+", ", "sallyport, ") + name
			subjects = append(subjects, s)
		}
		return nil
	}
	for _, n := range b.sizes {
		if err := add(fmt.Sprintf("%d grants", n), b.manyGrants(n)); err != nil {
			return err
		}
	}
	largest := min(slices.Max(b.sizes), 10_000) // a document may be 1 MiB
	if err := add(fmt.Sprintf("1 grant, %d × 50", largest), b.oneGroup(largest, 50)); err != nil {
		return err
	}
	if err := add("1 grant, 1000 × 1000", b.oneGroup(1000, 1000)); err != nil {
		return err
	}
	results, err := b.interleave(ctx, chat(300, 0).called("300 B, 16 connections"), subjects)
	if err != nil {
		return err
	}
	r.Grants = results
	printResults("300 B with many grants; × is to the first", results)

	fmt.Println("\nfrom the renamed file to the first answer that is different, in ms: median (all)")
	for _, s := range subjects {
		c, err := b.change(ctx, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		r.Changes = append(r.Changes, c)
		fmt.Printf("%24s  denied %4.0f %v, of this until published %.0f; allowed %4.0f %v\n", s.name, c.Denied, c.AllDenied, c.Published, c.Allowed, c.AllAllowed)
	}
	return nil
}

// Change is how long a changed grant took, in milliseconds.
type Change struct {
	Subject    string    `json:"subject"`
	Denied     float64   `json:"denied_ms"`
	AllDenied  []float64 `json:"all_denied_ms"`
	Published  float64   `json:"published_ms"` // of a revoked grant, by the control plane's log
	Allowed    float64   `json:"allowed_ms"`
	AllAllowed []float64 `json:"all_allowed_ms"`
}

// change takes the grant and gives it back, while the caller asks on one connection.
func (b *bench) change(ctx context.Context, s *subject) (*Change, error) {
	c := &Change{Subject: s.name}
	var published []float64
	for range b.changes {
		denied, at, err := b.save(ctx, s, revoked, http.StatusForbidden)
		if err != nil {
			return nil, err
		}
		allowed, _, err := b.save(ctx, s, granted, http.StatusOK)
		if err != nil {
			return nil, err
		}
		c.AllDenied, c.AllAllowed, published = append(c.AllDenied, denied), append(c.AllAllowed, allowed), append(published, at)
	}
	c.Denied, c.Allowed, c.Published = median(c.AllDenied), median(c.AllAllowed), median(published)
	return c, nil
}

// save renames a new file over the changing one, and returns the milliseconds until a request had the status, and
// until the control plane had published.
func (b *bench) save(ctx context.Context, s *subject, text string, until int) (seen, published float64, err error) {
	fresh := filepath.Join(s.folder, ".new")
	if err := os.WriteFile(fresh, []byte(text), 0o600); err != nil {
		return 0, 0, err
	}
	const line = `"generation published"`
	before := len(s.up.said(line))
	began := time.Now()
	if err := os.Rename(fresh, filepath.Join(s.folder, changing)); err != nil {
		return 0, 0, err
	}
	ask := chat(300, 0)
	for {
		status, err := ask.once(ctx, s)
		if err != nil {
			return 0, 0, err
		}
		if status == until {
			break
		}
		if time.Since(began) > 20*time.Second {
			return 0, 0, fmt.Errorf("status %d after %s, not %d", status, time.Since(began), until)
		}
		time.Sleep(time.Millisecond)
	}
	seen = millis(time.Since(began))
	if err := s.up.await("log", 5*time.Second, func() bool { return len(s.up.said(line)) > before }); err != nil {
		return 0, 0, err
	}
	var logged struct{ Time time.Time }
	if err := json.Unmarshal([]byte(s.up.said(line)[before]), &logged); err != nil {
		return 0, 0, err
	}
	return seen, millis(logged.Time.Sub(began)), nil
}

// Stages is where the time between a saved file and a published generation goes, in milliseconds, and what is sent then.
type Stages struct {
	Grants   string  `json:"grants"`
	Decode   float64 `json:"decode_ms"` // the file that has changed
	Assemble float64 `json:"assemble_ms"`
	Compile  float64 `json:"compile_ms"`
	Lower    float64 `json:"lower_ms"`
	Check    float64 `json:"check_ms"`
	All      float64 `json:"regenerate_ms"` // compiled, lowered, checked, digested
	First    float64 `json:"generate_ms"`   // the same, when nothing is there that could be taken over
	Whole    int     `json:"whole_bytes"`   // of all resources
	Sent     int     `json:"sent_bytes"`    // of those that are other ones when the grant has changed
}

// measureStages runs the pipeline's stages in this process.
func (b *bench) measureStages(_ context.Context, r *Report) error {
	fmt.Println("\nstages of a changed grant, in ms: least of several")
	for _, n := range b.sizes {
		if err := b.stages(r, fmt.Sprintf("%d grants", n), b.manyGrants(n)); err != nil {
			return err
		}
	}
	return b.stages(r, "1 grant, 1000 × 1000", b.oneGroup(1000, 1000))
}

func (b *bench) stages(r *Report, name string, documents map[string]string) error {
	o := v1alpha1.Options{TrustDomain: trustDomain, SVIDTTL: time.Hour, Gateway: &segment.Gateway{
		Name: "local", ID: spiffeid.RequireFromPath(trustDomain, "/gateway/local"), SVIDTTL: time.Hour}}
	st := &Stages{Grants: name}
	var memo v1alpha1.Memo
	read := func(text string) (files [][]v1alpha1.Document) {
		documents[changing] = text
		for _, name := range slices.Sorted(maps.Keys(documents)) {
			files = append(files, memo.Decode(name, documents[name]))
		}
		memo.Forget()
		return files
	}
	// The two states that the changing grant goes back and forth between.
	files := [2][][]v1alpha1.Document{read(granted), read(revoked)}
	var cfgs [2]segment.Config
	var assembler v1alpha1.Assembler
	for i := range files {
		var problems segment.Problems
		if cfgs[i], problems = assembler.Assemble(files[i], o); len(problems) > 0 {
			return problems
		}
	}
	var last [2]*controlplane.Generation
	var err error
	if last[0], err = controlplane.Generate(cfgs[0], envoy.Learned{}, time.Now()); err != nil {
		return err
	}
	if last[1], err = controlplane.Regenerate(last[0], cfgs[1], envoy.Learned{}, time.Now()); err != nil {
		return err
	}
	turn := 0
	st.Decode = least(func() { turn++; read([]string{granted, revoked}[turn%2]) })
	st.Assemble = least(func() { turn++; _, _ = assembler.Assemble(files[turn%2], o) })
	policy := authz.Recompile(last[1].Policy, &cfgs[0], time.Now())
	only, earlier := cfgs[0].For(cfgs[0].Gateways[0]), last[1].Resources["local"]
	st.Compile = least(func() { authz.Recompile(last[1].Policy, &cfgs[0], time.Now()) })
	resources := envoy.Lower(&only, policy, envoy.Learned{}, earlier)
	st.Lower = least(func() { envoy.Lower(&only, policy, envoy.Learned{}, earlier) })
	st.Check = least(func() { _ = envoy.Check(resources, earlier) })
	st.First = least(func() { _, _ = controlplane.Generate(cfgs[0], envoy.Learned{}, time.Now()) })
	st.All = least(func() { _, _ = controlplane.Regenerate(last[1], cfgs[0], envoy.Learned{}, time.Now()) })
	sent := map[string]bool{}
	for field, m := range earlier.All() {
		sent[field+earlier.Version(m)] = true
	}
	for field, m := range resources.All() {
		st.Whole += proto.Size(m)
		if !sent[field+resources.Version(m)] {
			st.Sent += proto.Size(m)
		}
	}
	r.Stages = append(r.Stages, st)
	fmt.Printf("%20s  decode %.1f  assemble %.1f  compile %.1f  lower %.1f  check %.1f  compile, lower, check and digest %.1f, at the first time %.1f; sends %d of %d bytes (%.3f %%)\n",
		name, st.Decode, st.Assemble, st.Compile, st.Lower, st.Check, st.All, st.First, st.Sent, st.Whole, 100*float64(st.Sent)/float64(st.Whole))
	return nil
}

// least is the shortest of several runs, in milliseconds.
func least(run func()) float64 {
	run()
	shortest := time.Hour
	for range 7 {
		runtime.GC()
		began := time.Now()
		run()
		shortest = min(shortest, time.Since(began))
	}
	return millis(shortest)
}

func millis(d time.Duration) float64 { return float64(d.Round(100*time.Microsecond)) / 1e6 }
