package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// load is requests of one kind, on so many connections at once.
type load struct {
	name        string
	connections int
	method      string
	host, path  string
	body        []byte
}

// chat asks the model: a body of about so many bytes, answered at once or by so many events.
func chat(size, events int) load {
	head := `{"model":"small","messages":[{"role":"user","content":"`
	if events > 0 {
		head = fmt.Sprintf(`{"stream":true,"n":%d,`, events) + head[1:]
	}
	const tail = `"}]}`
	words := strings.Repeat(`lorem ipsum dolor\n`, max(size-len(head)-len(tail), 0)/19)
	return load{connections: 16, method: http.MethodPost, host: chatHost, path: "/v1/chat/completions", body: []byte(head + words + tail)}
}

func (l load) on(connections int) load { l.connections = connections; return l }
func (l load) called(name string) load { l.name = name; return l }

// once makes one request and reads the answer to its end.
func (l load) once(ctx context.Context, s *subject) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, l.method, s.url+l.path, bytes.NewReader(l.body))
	if err != nil {
		return 0, err
	}
	req.Host = l.host
	req.Header.Set("content-type", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

// sample is what one stretch of load cost.
type sample struct {
	requests  int
	envoy     float64 // CPU per request, in microseconds
	plane     float64
	latencies []time.Duration
}

// run keeps the connections busy for a while. Every answer must be 200.
func (l load) run(ctx context.Context, s *subject, length time.Duration) (*sample, error) {
	var (
		out     sample
		failure error
		mu      sync.Mutex
		all     sync.WaitGroup
	)
	envoy, plane := cpu(s.envoy), cpu(s.plane)
	end := time.Now().Add(length)
	for range l.connections {
		all.Go(func() {
			var latencies []time.Duration
			var err error
			for err == nil && time.Now().Before(end) {
				began := time.Now()
				var status int
				if status, err = l.once(ctx, s); err == nil && status != http.StatusOK {
					err = fmt.Errorf("%s answers %s with status %d", s.name, l.name, status)
				}
				latencies = append(latencies, time.Since(began))
			}
			mu.Lock()
			defer mu.Unlock()
			out.latencies = append(out.latencies, latencies...)
			if err != nil {
				failure = err
			}
		})
	}
	all.Wait()
	if failure != nil {
		return nil, failure
	}
	out.requests = len(out.latencies)
	out.envoy = micros(cpu(s.envoy)-envoy) / float64(out.requests)
	out.plane = micros(cpu(s.plane)-plane) / float64(out.requests)
	slices.Sort(out.latencies)
	return &out, nil
}

// Result is what one subject did under one load: medians of all samples.
type Result struct {
	Load     string  `json:"load"`
	Subject  string  `json:"subject"`
	Requests int     `json:"requests"`
	Envoy    float64 `json:"envoy_cpu_us"`
	EnvoyMin float64 `json:"envoy_cpu_us_min"`
	// Ratio is to the first subject that has an Envoy, sample by sample, and so is the range of its middle half.
	Ratio     float64    `json:"ratio"`
	RatioHalf [2]float64 `json:"ratio_quartiles"`
	// RatioMin is the ratio of the least of both: what a busy machine spoils less.
	RatioMin float64 `json:"ratio_of_least"`
	// RatioWatched is the same to the SAN rule with telemetry, where there is one.
	RatioWatched float64 `json:"ratio_with_telemetry,omitempty"`
	Plane        float64 `json:"plane_cpu_us"`
	P50          float64 `json:"p50_us"`
	P99          float64 `json:"p99_us"`
	Resident     int64   `json:"envoy_rss_bytes"`

	samples []*sample
}

// interleave puts all subjects under the load, one after the other, again and again.
func (b *bench) interleave(ctx context.Context, l load, subjects []*subject) ([]*Result, error) {
	for _, s := range subjects {
		s.client.CloseIdleConnections() // which a gateway may be about to close, too
	}
	results := make([]*Result, len(subjects))
	for i, s := range subjects {
		results[i] = &Result{Load: l.name, Subject: s.name}
		if _, err := l.run(ctx, s, b.sample/4); err != nil { // opens the connections
			return nil, err
		}
	}
	for range b.rounds {
		for i, s := range subjects {
			one, err := l.run(ctx, s, b.sample)
			if err != nil {
				return nil, err
			}
			results[i].samples = append(results[i].samples, one)
		}
	}
	base := slices.IndexFunc(subjects, func(s *subject) bool { return s.envoy != 0 })
	watched := slices.IndexFunc(subjects, func(s *subject) bool { return s.name == withTelemetry })
	for i, r := range results {
		r.sum(results[max(base, 0)])
		if watched >= 0 {
			r.RatioWatched = median(r.ratios(results[watched]))
		}
		r.Resident = resident(subjects[i].envoy)
	}
	return results, nil
}

// ratios are to another result, sample by sample.
func (r *Result) ratios(base *Result) []float64 {
	ratios := make([]float64, len(r.samples))
	for i, s := range r.samples {
		ratios[i] = s.envoy / base.samples[i].envoy
	}
	return ratios
}

func (r *Result) sum(base *Result) {
	var envoy, plane, p50, p99 []float64
	for _, s := range r.samples {
		r.Requests += s.requests
		envoy = append(envoy, s.envoy)
		plane = append(plane, s.plane)
		p50 = append(p50, micros(s.latencies[len(s.latencies)/2]))
		p99 = append(p99, micros(s.latencies[len(s.latencies)*99/100]))
	}
	r.Envoy, r.EnvoyMin, r.Plane, r.P50, r.P99 = median(envoy), slices.Min(envoy), median(plane), median(p50), median(p99)
	r.RatioMin = r.EnvoyMin / slices.MinFunc(base.samples, func(a, b *sample) int { return cmp.Compare(a.envoy, b.envoy) }).envoy
	ratios := r.ratios(base)
	r.Ratio = median(ratios)
	r.RatioHalf = [2]float64{ratios[len(ratios)/4], ratios[len(ratios)*3/4]} // sorted by now
}

// median sorts the values.
func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
