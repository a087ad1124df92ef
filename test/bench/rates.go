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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/identity/disk"
	"sallyport.dev/identity/issuer"
)

// Rate is how often something can be done in a second with as many cores as there are signers. Like `openssl speed` does,
// it divides by the CPU time that was taken, so that what else runs on the machine counts for less.
type Rate struct {
	Of        string  `json:"of"`
	PerSecond float64 `json:"per_second"`
	OfOpenSSL float64 `json:"of_openssl"` // in parts of `openssl speed ecdsap256`, round by round; 0: there is no openssl
	OfGo      float64 `json:"of_go"`      // in parts of Go's signatures: what part of it is signing
	Cores     float64 `json:"cores"`      // that were busy

	rates, ofOpenSSL, ofGo, cores []float64
}

const (
	signers    = 2
	rateRounds = 7
	rateSample = 600 * time.Millisecond

	openSSLSeconds = "1"
)

// measureRates compares signing with what is made of it, in turn.
func (b *bench) measureRates(ctx context.Context, s *subject) ([]*Rate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte("bench"))
	keeper, err := disk.OpenKeeper(ctx, disk.Config{Dir: filepath.Join(b.folder, "rates"), TrustDomain: trustDomain})
	if err != nil {
		return nil, err
	}
	defer keeper.Close()
	local := &issuer.Local{}
	local.Set(keeper.Authorities())
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	entry := issuer.Entry{ID: caller, TTL: time.Hour}
	certify := func(k issuer.Key) error {
		_, err := local.CertifyX509(ctx, entry, k)
		return err
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.workloadAPI()))
	if err != nil {
		return nil, err
	}
	defer client.Close()

	subjects := []struct {
		name string
		once func() error
	}{
		{"signatures, by Go", func() error {
			_, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
			return err
		}},
		{"SVIDs for given keys", func() error { return certify(issuer.HeldKey(key)) }},
		{"SVIDs by request, which is verified", func() error {
			k, err := issuer.RequestedKey(request)
			if err != nil {
				return err
			}
			return certify(k)
		}},
		{"SVIDs with new keys", func() error {
			var w issuer.Wallet
			_, err := w.Renew(ctx, local, []issuer.Entry{entry}, nil)
			return err
		}},
		{"SVIDs with new keys, over the Workload API", func() error {
			_, err := client.FetchX509SVID(ctx)
			return err
		}},
	}
	rates := []*Rate{{Of: "signatures, by openssl speed"}}
	for _, what := range subjects {
		rates = append(rates, &Rate{Of: what.name})
	}
	for range rateRounds {
		openSSL, err := openSSLRate(ctx)
		if err != nil {
			return nil, err
		}
		var signed float64
		rates[0].add(openSSL, signers, openSSL, 0)
		for i, what := range subjects {
			rate, cores, err := perSecond(s.plane, what.once)
			if err != nil {
				return nil, err
			}
			if i == 0 {
				signed = rate
			}
			rates[i+1].add(rate, cores, openSSL, signed)
		}
	}
	fmt.Printf("\nper second of CPU, on %d cores; × is in parts of openssl's signatures, round by round, with the least and the most\n", signers)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\ta second\t× of openssl\tleast–most\tof it Go's signing\tcores busy\t")
	for _, r := range rates {
		r.PerSecond, r.Cores = median(r.rates), median(r.cores)
		r.OfOpenSSL, r.OfGo = median(r.ofOpenSSL), median(r.ofGo)
		fmt.Fprintf(w, "%s\t%.0f\t%.2f\t%.2f–%.2f\t", r.Of, r.PerSecond, r.OfOpenSSL, r.ofOpenSSL[0], r.ofOpenSSL[len(r.ofOpenSSL)-1])
		if r.OfGo > 0 {
			fmt.Fprintf(w, "%.2f\t%.1f", r.OfGo, r.Cores)
		} else {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprintln(w, "\t")
	}
	w.Flush()
	return rates, nil
}

func (r *Rate) add(rate, cores, openSSL, signed float64) {
	r.rates, r.cores = append(r.rates, rate), append(r.cores, cores)
	r.ofOpenSSL, r.ofGo = append(r.ofOpenSSL, part(rate, openSSL)), append(r.ofGo, part(rate, signed))
}

// part is one in parts of another; 0 if that is not known.
func part(of, whole float64) float64 {
	if whole == 0 {
		return 0
	}
	return of / whole
}

// openSSLRate is how often OpenSSL signs in a second, with a process for each signer at once; 0 if there is none. Its own
// -multi divides by the time on the wall.
func openSSLRate(ctx context.Context) (float64, error) {
	path, err := exec.LookPath("openssl")
	if err != nil {
		return 0, nil //nolint:nilerr // the rest can be measured without
	}
	var sum float64
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	for range signers {
		group.Go(func() error {
			out, err := exec.CommandContext(ctx, path, "speed", "-seconds", openSSLSeconds, "ecdsap256").Output()
			if err != nil {
				return fmt.Errorf("measure openssl: %w", err)
			}
			// " 256 bits ecdsa (nistp256)   0.0000s   0.0001s  43126.7  15621.8": the last are signatures and verifications
			_, line, _ := strings.Cut(string(out), "ecdsa (nistp256)")
			fields := strings.Fields(line)
			if len(fields) < 4 {
				return fmt.Errorf("measure openssl: it says %q", out)
			}
			rate, err := strconv.ParseFloat(fields[2], 64)
			mu.Lock()
			defer mu.Unlock()
			sum += rate
			return err
		})
	}
	return sum, group.Wait()
}

// perSecond does something in as many goroutines as keep the cores busy. The CPU time is ours and that of a process that
// we ask.
func perSecond(asked int, once func() error) (rate, cores float64, err error) {
	var (
		all  sync.WaitGroup
		mu   sync.Mutex
		done int
	)
	began, spent := time.Now(), ownCPU()+cpu(asked)
	for range 4 * signers { // of a pair that waits for another process, one must be at work
		all.Go(func() {
			n := 0
			for time.Since(began) < rateSample {
				if failed := once(); failed != nil {
					mu.Lock()
					defer mu.Unlock()
					err = failed
					return
				}
				n++
			}
			mu.Lock()
			defer mu.Unlock()
			done += n
		})
	}
	all.Wait()
	took := (ownCPU() + cpu(asked) - spent).Seconds()
	return float64(done) * signers / took, took / time.Since(began).Seconds(), err
}

// ownCPU is the CPU time of this process.
func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
