package real

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestShards lets grants become so many that they are kept apart in several resources, then more, then few again.
// Meanwhile nobody is denied who is granted, nobody is granted who is denied, and the last word is obeyed.
func TestShards(t *testing.T) {
	t.Parallel()
	b := ownBackend(t)
	grants := func(from, to int) string {
		var all strings.Builder
		for i := from; i < to; i++ {
			all.WriteString(grant(fmt.Sprintf("g%d", i), fmt.Sprintf("/app-%d", i), "a", "Infer", "m"))
		}
		return all.String()
	}
	family := grant("family", "/family/*", "a", "Infer", "m")
	u := startUp(t, map[string]string{
		"endpoints.yaml": openAI("a", b),
		"grants.yaml":    grants(0, 100) + family,
	})

	want := map[string]int{
		"/app-7":      http.StatusOK, // in each part that there ever is
		"/app-50":     http.StatusOK,
		"/family/x":   http.StatusOK,
		"/famil":      http.StatusForbidden,
		"/app":        http.StatusForbidden,
		"/app-7/x":    http.StatusForbidden,
		"/app-900000": http.StatusForbidden,
		"/zero":       http.StatusForbidden,
	}
	streaming := u.as(t, "/app-3", http1).stream(t, "a", b) // is never cut, wherever the shards go
	stop := make(chan struct{})
	var asking sync.WaitGroup
	for who, status := range want {
		c := u.as(t, who, http2)
		asking.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					t.Logf("%s asked %d times", who, n)
					return
				default:
				}
				if a := c.chat(t, "a", "m"); a.status != status {
					t.Errorf("%s: %v, not %d", who, a, status)
					return
				}
			}
		})
	}
	shards := func() (n int) {
		var all struct {
			Extensions []struct{ Name string }
		}
		if err := u.operator.Get(t.Context(), "/render", nil, &all); err != nil {
			t.Fatal(err)
		}
		for _, x := range all.Extensions {
			if strings.HasPrefix(x.Name, "authz/a/rights/") {
				n++
			}
		}
		return n
	}
	counts := map[int]bool{}
	for _, n := range []int{100, 900, 1900, 1200, 600, 2500, 100} {
		text := grants(0, n) + family
		if n > 1000 {
			text += grants(10_000, 10_000+n) // others that are alike
		}
		last := fmt.Sprintf("/app-%d", n-1)
		u.write(t, "grants.yaml", text)
		now := u.as(t, last, http1)
		eventually(t, "answer for "+last, func() bool { return now.chat(t, "a", "m").status == http.StatusOK })
		counts[shards()] = true
		// Taken from one of many.
		u.write(t, "grants.yaml", strings.Replace(text, grant(fmt.Sprintf("g%d", n-1), last, "a", "Infer", "m"), "", 1))
		began := time.Now()
		eventually(t, "denial of "+last, func() bool { return now.chat(t, "a", "m").status == http.StatusForbidden })
		streaming.goesOn(t)
		t.Logf("%d grants in %d shards: denied %s after the edit", n, shards(), time.Since(began).Round(time.Millisecond))
	}
	streaming.stream.end(t, "")
	close(stop)
	asking.Wait()
	if got := slices.Sorted(maps.Keys(counts)); len(got) < 3 || got[0] != 0 {
		t.Errorf("all of this happened in %v shards", got)
	}
}
