package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
)

const head = "apiVersion: sallyport.dev/v1alpha1\n"

// documents are one model endpoint and one collection, and the grants that the caller needs.
func (b *bench) documents(models int) map[string]string {
	names := make([]string, models)
	for i := range names {
		names[i] = fmt.Sprintf("{name: model-%d}", i)
	}
	names[0] = "{name: small}"
	return map[string]string{
		"endpoints.yaml": head + fmt.Sprintf(`kind: Endpoint
metadata: {name: chat}
spec:
  hostnames: [%s]
  protocol: OpenAI
  backends:
  - {name: model, addresses: [%q], tls: {mode: None}}
  models: [%s]
---
`+head+`kind: Endpoint
metadata: {name: docs}
spec:
  hostnames: [%s]
  protocol: Chroma
  backends:
  - {name: store, addresses: [%q], tls: {mode: None}}
`, chatHost, b.backend.address, strings.Join(names, ", "), docsHost, b.backend.address),
		"docs.yaml": grant("docs", caller.String(), "docs", "Read", collectionName),
		changing:    granted,
	}
}

func grant(name, from, endpoint, operation, resource string) string {
	return head + fmt.Sprintf("kind: Grant\nmetadata: {name: %s}\nspec:\n  from: [{spiffeID: %q}]\n  to: [{endpoint: %s, operations: [%s], resources: [%q]}]\n",
		name, from, endpoint, operation, resource)
}

func (b *bench) measureLoads(ctx context.Context, r *Report) error {
	least, err := b.san(false)
	if err != nil {
		return err
	}
	watched, err := b.san(true)
	if err != nil {
		return err
	}
	deciding, err := b.bare(b.documents(1), false)
	if err != nil {
		return err
	}
	counting, err := b.bare(b.documents(1), true)
	if err != nil {
		return err
	}
	subjects := []*subject{b.direct(), least, deciding, counting, watched}
	for _, with := range b.builds {
		s, err := b.sallyport(ctx, with, b.documents(1))
		if err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	fmt.Println("CPU of Envoy per request in µs; × is to the SAN rule, sample by sample, with the middle half of the samples; × telemetry is to the SAN rule with it")
	for _, l := range []load{
		chat(300, 0).called("300 B, 16 connections"),
		chat(1000, 0).called("1 KB, 16 connections"),
		chat(16<<10, 0).on(1).called("16 KB, 1 connection"),
		chat(64<<10, 0).called("64 KB, 16 connections"),
		chat(300, 50).called("stream of 50 events, 16 connections"),
		chat(300, 200).called("stream of 200 events, 16 connections"),
	} {
		if !strings.Contains(l.name, b.loads) {
			continue
		}
		results, err := b.interleave(ctx, l, subjects)
		if err != nil {
			return err
		}
		r.Loads = append(r.Loads, results...)
		printResults(l.name, results)
	}
	return nil
}

// measureCatalog compares the requests that the control plane answers, and those of which it counts what they use, with one
// that goes to the backend alone.
func (b *bench) measureCatalog(ctx context.Context, r *Report) error {
	s, err := b.sallyport(ctx, b.builds[0], b.documents(1))
	if err != nil {
		return err
	}
	docs := *s
	if docs.client, err = b.docsClient(s); err != nil {
		return err
	}
	documents := b.documents(1)
	documents[changing] = granted + "  budget: {requests: {max: 1000000000, per: Month}, tokens: {max: 1000000000000, per: Month}}\n"
	counted, err := b.sallyport(ctx, b.builds[0], documents)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		load load
		on   *subject
	}{
		{chat(300, 0).called("chat, for comparison"), s},
		{chat(300, 0).called("chat, within a budget"), counted},
		{load{name: "GET /v1/models", connections: 16, method: http.MethodGet, host: chatHost, path: "/v1/models"}, s},
		{load{name: "GET a collection by name", connections: 16, method: http.MethodGet, host: docsHost, path: collections + "/" + collectionName}, &docs},
	} {
		results, err := b.interleave(ctx, c.load, []*subject{c.on})
		if err != nil {
			return err
		}
		r.Catalog = append(r.Catalog, results...)
	}
	for _, c := range r.Catalog {
		c.Subject, c.Ratio = c.Load, c.Envoy/r.Catalog[0].Envoy
	}
	printResults("what takes a hop more", r.Catalog)
	return nil
}

func printResults(title string, results []*Result) {
	fmt.Printf("\n%s\n", title)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tEnvoy µs\tleast\t×\thalf of all\t× of least\t× telemetry\tplane µs\tp50 µs\tp99 µs\tRSS MB\trequests\t")
	for _, r := range results {
		fmt.Fprintf(w, "%s\t%.0f\t%.0f\t%.2f\t%.2f–%.2f\t%.2f\t%.2f\t%.0f\t%.0f\t%.0f\t%.0f\t%d\t\n", r.Subject, r.Envoy, r.EnvoyMin, r.Ratio,
			r.RatioHalf[0], r.RatioHalf[1], r.RatioMin, r.RatioWatched, r.Plane, r.P50, r.P99, float64(r.Resident)/1e6, r.Requests)
	}
	w.Flush()
}
