package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"sallyport.dev/identity/disk"
	"sallyport.dev/identity/issuer"
)

// Identity is what identities cost. Rates are per second on two cores, times in milliseconds.
type Identity struct {
	OpenSSL float64 `json:"openssl_signatures"` // of `openssl speed ecdsap256`; 0: there is no openssl
	Signed  float64 `json:"signatures"`         // by Go, and nothing else
	Issued  float64 `json:"svids"`              // certified by request
	P50     float64 `json:"fetch_p50_ms"`
	P99     float64 `json:"fetch_p99_ms"`
	Streams int     `json:"open_streams"` // meanwhile
	Pushed  float64 `json:"pushed_ms"`    // from a renamed file to the last of these streams
	Memory  float64 `json:"memory_mb"`    // of the process for them, with an SVID each
}

const (
	signers     = 2
	openStreams = 1000
)

func (b *bench) measureIdentity(ctx context.Context, r *Report) error {
	id := &Identity{Streams: openStreams}
	if err := id.rates(ctx, b.folder); err != nil {
		return err
	}
	documents := b.documents(1)
	workload := func(name string) string {
		return head + fmt.Sprintf("kind: Workload\nmetadata: {name: bench}\nspec: {spiffeID: 'spiffe://%s/%s', selectors: ['unix:uid:%d']}\n",
			trustDomain.Name(), name, os.Getuid())
	}
	const file = "workload.yaml"
	documents[file] = workload("first")
	s, err := b.sallyport(ctx, b.builds[0], documents)
	if err != nil {
		return err
	}
	socket := "unix://" + filepath.Join(filepath.Dir(s.folder), "workload.sock")
	before := residentMB(s.plane)

	// Streams, each waiting for a change.
	var holding, told sync.WaitGroup
	holding.Add(openStreams)
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var clients []*workloadapi.Client
	for range openStreams / 50 { // a connection takes a hundred streams at a time
		c, err := workloadapi.New(watching, workloadapi.WithAddr(socket))
		if err != nil {
			return err
		}
		defer c.Close()
		clients = append(clients, c)
	}
	next := spiffeid.RequireFromPath(trustDomain, "/second")
	told.Add(openStreams)
	for i := range openStreams {
		go func() { // ends with watching
			_ = clients[i%len(clients)].WatchX509Context(watching, &watcher{next: next, first: holding.Done, then: told.Done})
		}()
	}
	holding.Wait()
	id.Memory = residentMB(s.plane) - before

	var times []float64
	for range 300 {
		began := time.Now()
		if _, err := clients[0].FetchX509SVID(ctx); err != nil {
			return err
		}
		times = append(times, float64(time.Since(began))/1e6)
	}
	slices.Sort(times)
	id.P50, id.P99 = times[len(times)/2], times[len(times)*99/100]

	fresh := filepath.Join(s.folder, ".new")
	if err := os.WriteFile(fresh, []byte(workload("second")), 0o600); err != nil {
		return err
	}
	began := time.Now()
	if err := os.Rename(fresh, filepath.Join(s.folder, file)); err != nil {
		return err
	}
	told.Wait()
	id.Pushed = float64(time.Since(began)) / 1e6

	r.Identity = id
	fmt.Printf("\nidentity, on %d cores\n", signers)
	fmt.Printf("  signatures per second: openssl %.0f, Go %.0f (× %.2f); SVIDs certified by request %.0f (× %.2f of openssl, × %.2f of Go)\n",
		id.OpenSSL, id.Signed, id.Signed/id.OpenSSL, id.Issued, id.Issued/id.OpenSSL, id.Issued/id.Signed)
	fmt.Printf("  with %d open streams: fetch p50 %.1f ms, p99 %.1f ms; a changed document is pushed to the last of them after %.0f ms; %.0f MB more\n",
		id.Streams, id.P50, id.P99, id.Pushed, id.Memory)
	return nil
}

// rates measures what signing allows, and what is made of it.
func (id *Identity) rates(ctx context.Context, folder string) error {
	if out, err := exec.CommandContext(ctx, "openssl", "speed", "-seconds", "2", "-multi", strconv.Itoa(signers), "ecdsap256").Output(); err == nil {
		fields := strings.Fields(string(out[strings.LastIndex(string(out), "ecdsa"):]))
		if len(fields) > 1 {
			id.OpenSSL, _ = strconv.ParseFloat(fields[len(fields)-2], 64)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("bench"))
	if id.Signed, err = perSecond(func() error {
		_, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		return err
	}); err != nil {
		return err
	}
	dir := filepath.Join(folder, "rates")
	keeper, err := disk.OpenKeeper(ctx, disk.Config{Dir: dir, TrustDomain: trustDomain})
	if err != nil {
		return err
	}
	defer keeper.Close()
	local := &issuer.Local{}
	local.Set(keeper.Authorities())
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	entry := issuer.Entry{ID: caller, TTL: time.Hour}
	id.Issued, err = perSecond(func() error {
		_, err := local.CertifyX509(ctx, entry, request)
		return err
	})
	return err
}

// perSecond runs something in as many goroutines as there are signers.
func perSecond(run func() error) (float64, error) {
	const long = 2 * time.Second
	var done atomic.Int64
	errs := make(chan error, signers)
	began := time.Now()
	for range signers {
		go func() {
			for time.Since(began) < long {
				if err := run(); err != nil {
					errs <- err
					return
				}
				done.Add(1)
			}
			errs <- nil
		}()
	}
	for range signers {
		if err := <-errs; err != nil {
			return 0, err
		}
	}
	return float64(done.Load()) / time.Since(began).Seconds(), nil
}

// watcher is told of a first identity, and of the next.
type watcher struct {
	next        spiffeid.ID
	first, then func()
	begun       bool
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	if !w.begun {
		w.begun = true
		w.first()
	}
	if c.DefaultSVID().ID == w.next {
		w.then()
		w.then = func() {}
	}
}

func (w *watcher) OnX509ContextWatchError(error) {}

// residentMB is the memory of a process.
func residentMB(pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	pages, _ := strconv.ParseFloat(strings.Fields(string(text))[1], 64)
	return pages * float64(os.Getpagesize()) / (1 << 20)
}
