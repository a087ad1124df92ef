package controlplane_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/filesource"
	"sallyport.dev/segment"
)

// many is a folder of n grants, one for each of so many applications at twenty endpoints, so many in a file.
func many(b *testing.B, n, perFile int) (folder string, change func()) {
	folder = b.TempDir()
	var texts []string
	var text strings.Builder
	flush := func(name string) {
		if err := os.WriteFile(filepath.Join(folder, name+".yaml"), []byte(text.String()), 0o600); err != nil {
			b.Fatal(err)
		}
		texts = append(texts, text.String())
		text.Reset()
	}
	for i := range 20 {
		fmt.Fprintf(&text, "---\napiVersion: sallyport.dev/v1alpha1\nkind: Endpoint\nmetadata: {name: e%d}\nspec: {hostnames: [e%[1]d.internal], protocol: OpenAI, backends: [{name: one, addresses: ['127.0.0.1:8001'], tls: {mode: None}}]}\n", i)
	}
	flush("endpoints")
	for i := range n {
		fmt.Fprintf(&text, "---\napiVersion: sallyport.dev/v1alpha1\nkind: Grant\nmetadata: {name: app-%d}\nspec:\n  owner: team-%d\n  from:\n  - spiffeID: spiffe://example.org/ns/team-%[2]d/app-%[1]d\n  to:\n  - endpoint: e%[3]d\n    operations: [Infer]\n    resources: [small]\n", i, i%200, i%20)
		if i%perFile == perFile-1 || i == n-1 {
			flush(fmt.Sprintf("grants-%d", i/perFile))
		}
	}
	file, turn := 1+len(texts)/2, 0
	old, fresh := texts[file], strings.Replace(texts[file], "resources: [small]", "resources: [large]", 1)
	return folder, func() {
		turn++
		if err := os.WriteFile(filepath.Join(folder, ".new"), []byte([]string{old, fresh}[turn%2]), 0o600); err != nil {
			b.Fatal(err)
		}
		if err := os.Rename(filepath.Join(folder, ".new"), filepath.Join(folder, fmt.Sprintf("grants-%d.yaml", file-1))); err != nil {
			b.Fatal(err)
		}
	}
}

type told chan *controlplane.Generation

func (t told) Publish(_ context.Context, g *controlplane.Generation) error {
	t <- g
	return nil
}

// How long it takes from the rename of a file, of whose grants one has changed, to the generation.
func BenchmarkChange(b *testing.B) {
	for _, c := range []struct{ grants, perFile int }{{100_000, 100}, {100_000, 20_000}, {100_000, 10}} {
		b.Run(fmt.Sprintf("%d grants, %d to a file", c.grants, c.perFile), func(b *testing.B) {
			folder, change := many(b, c.grants, c.perFile)
			log := slog.New(slog.NewTextHandler(io.Discard, nil))
			docs, out := make(chan v1alpha1.Snapshot), make(told)
			td := spiffeid.RequireTrustDomainFromString("example.org")
			p := controlplane.Pipeline{Documents: docs, Log: log, Sinks: []controlplane.Sink{out}, Options: v1alpha1.Options{TrustDomain: td, SVIDTTL: time.Hour,
				Gateway: &segment.Gateway{Name: "local", ID: spiffeid.RequireFromPath(td, "/gateway/local"), SVIDTTL: time.Hour}}}
			source := filesource.Source{Path: folder, Log: log}
			ctx, stop := context.WithCancel(b.Context())
			defer stop()
			go source.Run(ctx, docs)
			go p.Run(ctx)
			<-out
			for b.Loop() {
				change()
				<-out
			}
		})
	}
}
