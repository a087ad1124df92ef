package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sallyport.dev/telemetry"
)

// report is everything that was seen, by the applications and by the gateway.
type report struct {
	attempts  []attempt
	strangers []stranger
	removal   removed
	rotation  rotated
	began     time.Time
	started   time.Duration // how long that took

	question, answer string
	sources          []string
	trace            telemetry.TraceID
	tree             string

	flows []telemetry.Flow
}

// collect reads what the gateway reported, once it has reported all: logs come in batches.
func (d *demo) collect(ctx context.Context, r *report) error {
	return d.await(ctx, "sallyport", func() bool {
		out, err := exec.CommandContext(ctx, d.sallyport(), "flows", "--state", d.state, "-o", "json", "-n", "10000").Output()
		if err != nil {
			return false
		}
		r.flows = nil
		lines := bufio.NewScanner(bytes.NewReader(out))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var f telemetry.Flow
			if json.Unmarshal(lines.Bytes(), &f) == nil {
				r.flows = append(r.flows, f)
			}
		}
		for _, a := range append(slices.Clone(r.attempts), r.removal.first) {
			if r.flowOf(a) == nil {
				return false
			}
		}
		knocks := 0
		for _, f := range r.flows {
			if f.Verdict == telemetry.Refused && f.Method == "" && f.Caller.IsZero() && !f.Time.Before(r.began) {
				knocks++
			}
		}
		if knocks < len(r.strangers) {
			return false
		}
		tree, err := exec.CommandContext(ctx, d.sallyport(), "traces", "show", string(r.trace), "--state", d.state).Output()
		r.tree = string(tree)
		return err == nil && strings.Contains(r.tree, "rag.answer") && strings.Contains(r.tree, "smollm2")
	})
}

// flowOf finds what the gateway says of the last request of an attempt.
func (r *report) flowOf(a attempt) *telemetry.Flow {
	request, _, _ := strings.Cut(a.Request, "?")
	for i := range r.flows {
		f := &r.flows[i]
		if f.TraceID == a.TraceID && f.Method+" "+f.Path == request && f.Status == a.GotStatus {
			return f
		}
	}
	return nil
}

// wrong says what was not as it had to be about one attempt; "" if all was.
func wrong(a attempt, f *telemetry.Flow) string {
	want := map[string]telemetry.Verdict{"allow": telemetry.Allowed, "deny": telemetry.Denied}[a.Expect]
	switch {
	case !a.OK:
		return fmt.Sprintf("expected %s, and the application got status %d: %s", a.Expect, a.GotStatus, a.ErrorBody)
	case f.Verdict != want:
		return fmt.Sprintf("expected %s, and the gateway says %s", a.Expect, f.Verdict)
	case short(f.Caller.String()) != a.Caller:
		return fmt.Sprintf("the gateway saw %s", f.Caller)
	case want == telemetry.Allowed && !strings.HasPrefix(f.Rule, "grant/"):
		return "no grant is named"
	}
	return ""
}

// line is what the gateway reported of one kind of request: all of it is the same but the numbers, which are summed up.
type line struct {
	telemetry.Flow
	what  string
	times int
}

func (r *report) lines() []*line {
	var all []*line
	for _, a := range r.attempts {
		f := r.flowOf(a)
		words := slices.DeleteFunc(strings.Fields(a.What), func(w string) bool { return strings.Trim(w, "0123456789") == "" })
		what := strings.Join(words, " ") // "write 8 sections" is the same as "write 2 sections"
		i := slices.IndexFunc(all, func(l *line) bool {
			return l.what == what && l.Caller == f.Caller && l.Endpoint == f.Endpoint && l.Operation == f.Operation &&
				l.Resource == f.Resource && l.Verdict == f.Verdict && l.Rule == f.Rule && l.Status == f.Status
		})
		if i < 0 {
			i = len(all)
			all = append(all, &line{Flow: *f, what: what})
		} else {
			all[i].Duration += f.Duration
			all[i].InputTokens += f.InputTokens
			all[i].OutputTokens += f.OutputTokens
		}
		all[i].times++
	}
	return all
}

// print writes two screens, and returns an error if anything was not as it had to be.
func (r *report) print(out io.Writer, d *demo) error {
	var problems []string
	fmt.Fprintf(out, "A real RAG application, through the gateway (everything was ready after %.1f s)\n\n", r.started.Seconds())
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CALLER\tENDPOINT\tOPERATION\tRESOURCE\tVERDICT\tBY\tSTATUS\tLATENCY\tTOKENS\tWHAT IT TRIED")
	for _, a := range r.attempts {
		if why := wrong(a, r.flowOf(a)); why != "" {
			problems = append(problems, fmt.Sprintf("%s, %s: %s", a.Caller, a.What, why))
		}
	}
	for _, l := range r.lines() {
		verdict := "✓ allowed"
		if l.Verdict != telemetry.Allowed {
			verdict = "✗ " + string(l.Verdict)
		}
		tokens, what := "", l.what
		if l.InputTokens+l.OutputTokens > 0 {
			tokens = fmt.Sprintf("%d+%d", l.InputTokens, l.OutputTokens)
		}
		if l.times > 1 {
			what += fmt.Sprintf(" (%d times)", l.times)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", short(l.Caller.String()), l.Endpoint, or(string(l.Operation), "-"),
			or(l.Resource, "-"), verdict, strings.TrimPrefix(l.Rule, "grant/"), l.Status, milliseconds(l.Duration), tokens, what)
	}
	for _, s := range r.strangers {
		verdict := "✗ refused"
		if s.through {
			verdict += " !"
			problems = append(problems, fmt.Sprintf("a caller with %s got through TLS: %s", s.who, s.why))
		}
		fmt.Fprintf(t, "?\t-\t-\t-\t%s\tTLS\t-\t\t\t%s: %s\n", verdict, s.who, s.why)
	}
	if err := t.Flush(); err != nil {
		return err
	}

	fmt.Fprintf(out, "\n%q\n  %s\n  from %s\n\n%s", r.question, strings.Join(strings.Fields(r.answer), " "), strings.Join(r.sources, " and "), r.tree)

	fmt.Fprintf(out, "\nGrant removed:  first request denied %s after the file was saved (%d had been answered); by %s\n",
		milliseconds(r.removal.after), r.removal.answered, r.flowOf(r.removal.first).Rule)
	fmt.Fprintf(out, "SVID renewed:   %d streamed answers across %d renewal, %d failed\n", r.rotation.requests, r.rotation.rotations, r.rotation.failed)
	if r.rotation.failed > 0 {
		problems = append(problems, fmt.Sprintf("%d requests failed while the SVID was renewed", r.rotation.failed))
	}
	if r.removal.after > 5*time.Second {
		problems = append(problems, "the removed grant took longer than 5 s to bite")
	}
	if len(problems) > 0 {
		fmt.Fprintln(out)
		return errors.New("not everything was as it had to be:\n  " + strings.Join(problems, "\n  "))
	}
	fmt.Fprintf(out, `
All %d verdicts were as the grants say, seen by the application and by the gateway. To look further, while
`+"`make up`"+` runs:
  export SALLYPORT_STATE=%s PATH=%s:$PATH
  sallyport flows --follow     sallyport traces     sallyport explain --caller rag-app     sallyport status
`, len(r.attempts)+len(r.strangers)+1, d.state, filepath.Join(d.parts, "bin"))
	return nil
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func milliseconds(t time.Duration) string {
	if t < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(t)/1e6)
	}
	return fmt.Sprintf("%d ms", t.Milliseconds())
}
