package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
)

const (
	maxFlowLine     = 1 << 20
	maxFlowsAsked   = 10_000 // that a control plane answers with
	maxDifferent    = 10_000 // differences that are kept apart
	examplesInText  = 20
	noNameToReplay  = "the gateway knew no resource, and denies that whatever grants say"
	neverJudged     = "refused before any grant was asked"
	endpointGone    = "at an endpoint that NEW does not have"
	endpointNew     = "at an endpoint that OLD does not have"
	endpointUnknown = "at an endpoint that neither has"
)

// question is the request of a recorded flow, and whether it was allowed. Why says instead that it was not judged.
func question(f *telemetry.Flow) (r authz.Request, allowed bool, why string) {
	r = authz.Request{Endpoint: f.Endpoint, Operation: f.Operation, Resource: f.Resource}
	if !f.Caller.IsZero() {
		r.Caller = f.Caller.String()
	}
	switch f.Verdict {
	case telemetry.Allowed, telemetry.Failed, telemetry.Limited:
		return r, true, ""
	case telemetry.Denied:
		return r, false, ""
	}
	return r, false, neverJudged
}

// nameless reports whether a flow may have been denied because its resource could not be resolved. That looks like a
// request that names none, which a grant on everything allows. A connection has none to resolve, nor a method.
func nameless(f *telemetry.Flow) bool {
	return f.Verdict == telemetry.Denied && f.Rule == string(authz.DefaultDeny) && f.Resource == "" && f.Operation != segment.Enter && (f.Operation != segment.Connect || f.Method != "")
}

// eachFlow reads flows as `sallyport flows -o json` writes them, one a line.
func eachFlow(from io.Reader, name string, do func(*telemetry.Flow) error) error {
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, maxFlowLine)
	n := 0
	for lines.Scan() {
		n++
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var f telemetry.Flow
		err := json.Unmarshal(lines.Bytes(), &f)
		if err == nil {
			_, err = telemetry.ParseVerdict(string(f.Verdict))
		}
		if err != nil {
			return &failure{exitProblems, fmt.Errorf("%s:%d: is no flow: %w", name, n, err), "flows are the lines of `sallyport flows -o json`"}
		}
		if err := do(&f); err != nil {
			return err
		}
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return &failure{exitProblems, fmt.Errorf("%s:%d: is longer than %d bytes", name, n+1, maxFlowLine), "flows are the lines of `sallyport flows -o json`"}
	} else if err != nil {
		return fmt.Errorf("read flows: %w", err)
	}
	return nil
}

// replaying is what `diff` is told of the flows to decide again.
type replaying struct {
	since time.Duration
	file  string
}

func (r *replaying) add(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&r.since, "replay", 0, "decide the flows of the last `DURATION` again, as in 24h")
	cmd.Flags().StringVar(&r.file, "flows", "", "take them from `FILE` with lines of `sallyport flows -o json`, or from - (standard input), not from the running control plane")
}

func (r *replaying) wanted() bool { return r.since > 0 || r.file != "" }

func (r *replaying) check() error {
	if r.since < 0 {
		return usage("give a positive duration, as in 24h", "--replay is negative")
	}
	return nil
}

// replayed says how recorded flows are judged on both sides.
type replayed struct {
	Flows     int            `json:"flows"`
	Since     time.Time      `json:"since,omitzero"`
	Same      int            `json:"same"`
	Changed   int            `json:"changed"`
	Different []different    `json:"different"`       // the most frequent first
	Apart     map[string]int `json:"apart,omitempty"` // what cannot be compared, by why
	Notes     []string       `json:"notes,omitempty"`

	found  map[different]*different
	others int // that were not judged as OLD does
}

// different is all flows that are alike and change their verdict.
type different struct {
	authz.Request
	WasAllowed bool       `json:"was_allowed"`
	Was        authz.Rule `json:"was"`
	Is         authz.Rule `json:"is"`
	Count      int        `json:"count"`
	Last       time.Time  `json:"last"`
	ID         string     `json:"id,omitempty"` // of the last one
}

// run decides recorded flows by both policies.
func (r *replaying) run(cmd *cobra.Command, state string, old, new *authz.Policy) (*replayed, error) {
	out := &replayed{Different: []different{}, Apart: map[string]int{}, found: map[different]*different{}}
	if r.since > 0 {
		out.Since = time.Now().Add(-r.since).UTC()
	}
	from, name := io.NopCloser(cmd.InOrStdin()), "standard input"
	var err error
	switch r.file {
	case "":
		name = "flows"
		from, err = ask(cmd, state, func(c *operator.Client) (io.ReadCloser, error) {
			return c.Stream(cmd.Context(), "/flows", url.Values{"since": {out.Since.Format(time.RFC3339Nano)}, "limit": {strconv.Itoa(maxFlowsAsked)}})
		})
	case "-":
	default:
		name = r.file
		from, err = os.Open(r.file)
	}
	if err != nil {
		return nil, err
	}
	defer from.Close()
	err = eachFlow(from, name, func(f *telemetry.Flow) error {
		if !f.Time.Before(out.Since) {
			out.add(f, old, new)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, d := range out.found {
		out.Different = append(out.Different, *d)
	}
	slices.SortFunc(out.Different, func(a, b different) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Caller, b.Caller), cmp.Compare(a.Endpoint, b.Endpoint),
			cmp.Compare(a.Operation, b.Operation), cmp.Compare(a.Resource, b.Resource))
	})
	if r.file == "" && out.Flows >= maxFlowsAsked {
		out.Notes = append(out.Notes, fmt.Sprintf("only the newest %d flows were replayed", maxFlowsAsked))
	}
	if out.others > 0 {
		out.Notes = append(out.Notes, fmt.Sprintf("%s: the gateway did not judge by OLD then", count(out.others, "flow")))
	}
	return out, nil
}

func (out *replayed) add(f *telemetry.Flow, old, new *authz.Policy) {
	out.Flows++
	r, allowed, why := question(f)
	was, is := authz.Decide(old, r), authz.Decide(new, r)
	hadIt, hasIt := old.Endpoints[r.Endpoint] != nil, new.Endpoints[r.Endpoint] != nil
	switch {
	case why != "":
	case !hadIt && !hasIt:
		why = endpointUnknown
	case !hadIt:
		why = endpointNew
	case !hasIt:
		why = endpointGone
	case nameless(f) && (was.Allowed || is.Allowed):
		why = noNameToReplay
	}
	if why != "" {
		out.Apart[why]++
		return
	}
	if was.Allowed != allowed {
		out.others++
	}
	if was.Allowed == is.Allowed {
		out.Same++
		return
	}
	out.Changed++
	key := different{Request: r, WasAllowed: was.Allowed, Was: was.Rule, Is: is.Rule}
	d := out.found[key]
	if d == nil {
		if len(out.found) == maxDifferent {
			return
		}
		one := key
		d = &one
		out.found[key] = d
	}
	d.Count++
	if !f.Time.Before(d.Last) {
		d.Last, d.ID = f.Time, f.ID
	}
}

func (out *replayed) write(w io.Writer) {
	fmt.Fprintf(w, "replayed %s", count(out.Flows, "flow"))
	if !out.Since.IsZero() {
		fmt.Fprintf(w, " since %s", out.Since.Format(time.RFC3339))
	}
	fmt.Fprintf(w, ": %d would be judged otherwise, %d as before\n", out.Changed, out.Same)
	for i, d := range out.Different {
		if i == examplesInText {
			fmt.Fprintf(w, "  and %d more\n", len(out.Different)-i)
			break
		}
		verdict := "- denied now: "
		if !d.WasAllowed {
			verdict = "+ allowed now:"
		}
		fmt.Fprintf(w, "  %s %s, %s at %s by %s (%s, was %s; last at %s)\n", verdict, count(d.Count, "flow"), doing(d.Request), d.Endpoint,
			orNobody(d.Caller), d.Is, d.Was, d.Last.Format(time.RFC3339))
	}
	for _, why := range slices.Sorted(maps.Keys(out.Apart)) {
		fmt.Fprintf(w, "  not compared: %s %s\n", count(out.Apart[why], "flow"), why)
	}
	for _, note := range out.Notes {
		fmt.Fprintf(w, "  note: %s\n", note)
	}
}

// doing is operation and resource; a name that comes from the network is quoted if it is not plain.
func doing(r authz.Request) string {
	text := plain(string(r.Operation)) + " " + plain(r.Resource)
	return cmp.Or(strings.TrimSpace(text), "something that is no part of the API")
}

func orNobody(caller string) string { return cmp.Or(plain(caller), "nobody") }

// plain makes any text safe to show on one line.
func plain(s string) string {
	if quoted := strconv.Quote(s); quoted != `"`+s+`"` {
		return quoted
	}
	return s
}

// decidedAgain is a recorded flow and what is decided about it.
type decidedAgain struct {
	Request    authz.Request     `json:"request"`
	Time       time.Time         `json:"time"`
	Logged     telemetry.Verdict `json:"logged"`
	LoggedRule authz.Rule        `json:"logged_rule"`
	Decided    telemetry.Verdict `json:"decided"`
	Rule       authz.Rule        `json:"rule"`
	Pos        segment.Pos       `json:"pos,omitzero"`
	// By which configuration; empty: unknown.
	LoggedGeneration string   `json:"logged_generation,omitempty"`
	Generation       string   `json:"generation,omitempty"`
	Same             bool     `json:"same"` // the verdict
	Notes            []string `json:"notes,omitempty"`
}

// replayLines decides recorded flows again, at the moment that they were decided at: a line, or all lines of standard
// input if it is "-".
func replayLines(cmd *cobra.Command, d *deployment, o *output, line, from, state string) error {
	judge := byPlane(cmd, state)
	if from != "" {
		var err error
		if judge, err = byDocuments(d, from); err != nil {
			return err
		}
	}
	text, name := io.Reader(strings.NewReader(line)), "--replay"
	if line == "-" {
		text, name = cmd.InOrStdin(), "standard input"
	}
	all, differs := []decidedAgain{}, false
	err := eachFlow(text, name, func(f *telemetry.Flow) error {
		r, _, why := question(f)
		if why != "" {
			return &failure{exitProblems, fmt.Errorf("%s: the flow of %s was %s", name, f.Time.Format(time.RFC3339), why), "only verdicts can be replayed"}
		}
		if len(all) == maxFlowsAsked {
			return &failure{exitProblems, fmt.Errorf("%s: has more than %d flows", name, maxFlowsAsked), "give fewer at once"}
		}
		in, err := judge(f.Time)
		if err != nil {
			return err
		}
		again := decideAgain(f, r, in)
		differs = differs || !again.Same
		all = append(all, again)
		return nil
	})
	if err == nil && len(all) == 0 {
		err = &failure{exitProblems, fmt.Errorf("%s: there is no flow", name), "flows are the lines of `sallyport flows -o json`"}
	}
	if err != nil {
		return err
	}
	if err := o.print(cmd.OutOrStdout(), all, func() error { return writeDecidedAgain(cmd.OutOrStdout(), all) }); err != nil {
		return err
	}
	if differs {
		return errProblems
	}
	return nil
}

func decideAgain(f *telemetry.Flow, r authz.Request, in *policyInForce) decidedAgain {
	d := authz.Decide(in.Policy, r)
	again := decidedAgain{Request: r, Time: f.Time, Logged: f.Verdict, LoggedRule: authz.Rule(f.Rule), Decided: telemetry.Denied, Rule: d.Rule,
		Pos: in.Grants[d.Rule], LoggedGeneration: f.Generation, Generation: in.Generation}
	if d.Allowed {
		again.Decided = telemetry.Allowed
	}
	note := func(format string, args ...any) { again.Notes = append(again.Notes, fmt.Sprintf(format, args...)) }
	again.Same = d.Allowed == (f.Verdict != telemetry.Denied)
	switch {
	case in.Policy.Endpoints[r.Endpoint] == nil:
		note("there is no endpoint %s", cmp.Or(plain(string(r.Endpoint)), "in the line"))
	case !again.Same && nameless(f):
		note("%s: this may be why it was denied", noNameToReplay)
	case f.Verdict == telemetry.Limited:
		note("a grant allowed it, and its budget did not: %s", cmp.Or(plain(f.Detail), "nobody says why"))
	case again.Same && again.Rule != again.LoggedRule:
		note("another grant decides")
	}
	if f.Generation != "" && in.Generation != "" && f.Generation != in.Generation {
		note("the line was judged by generation %s, and this is %s", plain(f.Generation), in.Generation)
	}
	return again
}

// byDocuments judges by documents. Their generation is that of a gateway which has been told no keys and no names of
// collections.
func byDocuments(d *deployment, from string) (func(time.Time) (*policyInForce, error), error) {
	cfg, err := d.assemble(from)
	if err != nil {
		return nil, err
	}
	return kept(func(at time.Time) (*policyInForce, error) {
		g, err := controlplane.Generate(cfg, envoy.Learned{}, at)
		if err != nil {
			return nil, failed("this is a defect of Sallyport: please report it with your documents", "%w", err)
		}
		return &policyInForce{g.Policy, g.Digest.Short(), factsOf(&cfg)}, nil
	}), nil
}

// byPlane judges by what the control plane has in force.
func byPlane(cmd *cobra.Command, state string) func(time.Time) (*policyInForce, error) {
	return kept(func(at time.Time) (*policyInForce, error) {
		in, err := askPolicy(cmd, state, at)
		return &in, err
	})
}

// kept keeps a policy for as long as time does not change it.
func kept(judge func(time.Time) (*policyInForce, error)) func(time.Time) (*policyInForce, error) {
	var last *policyInForce
	var since time.Time
	return func(at time.Time) (*policyInForce, error) {
		if last != nil && !at.Before(since) && (last.Policy.NextChange.IsZero() || at.Before(last.Policy.NextChange)) {
			return last, nil
		}
		in, err := judge(at)
		if err == nil {
			last, since = in, at
		}
		return in, err
	}
}

func writeDecidedAgain(w io.Writer, all []decidedAgain) error {
	by := func(generation string) string {
		if generation == "" {
			return ""
		}
		return ", generation " + plain(generation)
	}
	for _, a := range all {
		verdict := "same verdict"
		if !a.Same {
			verdict = "another verdict"
		}
		place := ""
		if at := a.Pos.String(); at != "" {
			place = " (" + at + ")"
		}
		fmt.Fprintf(w, "%s: %s at %s, by %s at %s\n  logged:  %s by %s%s\n  decided: %s by %s%s%s\n", verdict, doing(a.Request),
			cmp.Or(plain(string(a.Request.Endpoint)), "no endpoint"), orNobody(a.Request.Caller), a.Time.Format(time.RFC3339),
			a.Logged, cmp.Or(plain(string(a.LoggedRule)), "nothing"), by(a.LoggedGeneration), a.Decided, a.Rule, place, by(a.Generation))
		for _, note := range a.Notes {
			fmt.Fprintf(w, "  note: %s\n", note)
		}
	}
	return nil
}
