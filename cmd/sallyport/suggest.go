package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz/learn"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
)

// age is a flag that takes a duration as time.ParseDuration reads it, or days: "30d".
type age time.Duration

func (a *age) String() string {
	if d := time.Duration(*a); d > 0 && d%(24*time.Hour) == 0 {
		return strconv.Itoa(int(d/(24*time.Hour))) + "d"
	}
	return time.Duration(*a).String()
}

// Set makes age a pflag.Value, with String and Type.
func (a *age) Set(text string) error {
	d, err := time.ParseDuration(text)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n uint64
		n, err = strconv.ParseUint(days, 10, 16)
		d = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || d <= 0 {
		return fmt.Errorf("%q is no duration like 12h or 30d", text)
	}
	*a = age(d)
	return nil
}

// Type says what help calls it.
func (a *age) Type() string { return "duration" }

// since is the moment so long ago, as the control plane reads it.
func (a *age) since() string { return time.Now().Add(-time.Duration(*a)).Format(time.RFC3339Nano) }

func suggestCommand() *cobra.Command {
	var state string
	var o output
	var caller, endpoint string
	var prefixes []string
	var denied bool
	since, unused := age(7*24*time.Hour), age(0)
	cmd := &cobra.Command{
		Use:   "suggest",
		Short: "Write the grants that recorded requests needed, or name those that nobody uses",
		Long: `Suggest writes least-privilege grants: what each caller did at each endpoint in the time given by --since, and
nothing beyond. Operations stand with resources only where each was seen on each. What no grant can say exactly is
left out, and named at the end. Read it before you apply it: what was not done in that time is not granted.

With --unused it names grants, and parts of them, that no recorded request used in that time. A request uses all
grants that cover it, so what is named can be taken away together. Exit status 1 if there is something, 3 if the
records do not go back so far.`,
		Example: `  sallyport suggest --since 7d > suggested.yaml
  sallyport suggest --caller spiffe://example.org/rag-app --endpoint docs
  sallyport suggest --prefix 'tenant-1-*'
  sallyport suggest --unused 5d`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("unused") {
				for _, other := range []string{"since", "caller", "denied", "prefix"} {
					if cmd.Flags().Changed(other) {
						return usage("leave --"+other+" out; --endpoint narrows it down", "--unused and --%s do not go together", other)
					}
				}
				return showUnused(cmd, state, o, url.Values{"since": {unused.since()}, "endpoint": {endpoint}})
			}
			for _, p := range prefixes {
				if !segment.Pattern(p).IsPrefix() || strings.Contains(segment.Pattern(p).Stem(), "*") {
					return usage("write the beginning of names and a *, as in 'tenant-1-*'", "--prefix: %q is no pattern", p)
				}
			}
			q := url.Values{"since": {since.since()}, "caller": {caller}, "endpoint": {endpoint}, "prefix": prefixes, "denied": {strconv.FormatBool(denied)}}
			s, err := ask(cmd, state, func(c *operator.Client) (s operator.Suggestion, err error) {
				return s, c.Get(cmd.Context(), "/suggest", q, &s)
			})
			if err != nil {
				return err
			}
			if o.format == "json" {
				err = o.print(cmd.OutOrStdout(), s, nil)
			} else {
				err = writeSuggestion(cmd.OutOrStdout(), s)
			}
			if err == nil && len(s.Grants) == 0 {
				return &failure{exitProblems, fmt.Errorf("no request was recorded in that time that a grant could be written for"),
					"look further back with --since, or see `sallyport flows`"}
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.Var(&since, "since", "how far back, as in 12h or 7d")
	flags.StringVar(&caller, "caller", "", "only what this SPIFFE `ID` did, or all that begin with what stands before a *")
	flags.StringVar(&endpoint, "endpoint", "", "only what was done at the endpoint `NAME`")
	flags.BoolVar(&denied, "denied", false, "also grant what was denied because no grant allowed it")
	flags.StringArrayVar(&prefixes, "prefix", nil, "write the `PATTERN` for resources that it covers, as in 'tenant-1-*'; any number of times")
	flags.Var(&unused, "unused", "name what no request used for so long, as in 30d")
	stateFlag(flags, &state)
	o.add(cmd, "yaml", "json")
	return cmd
}

// maxLeft is how many lines of what was left out are written.
const maxLeft = 50

// writeSuggestion writes documents. All text that came over the network is quoted.
func writeSuggestion(w io.Writer, s operator.Suggestion) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Grants for what was recorded since %s: %s.\n", stamp(s.Since), requests(s.Requests))
	writeRecords(&b, "# ", s.Records)
	if s.More > 0 {
		fmt.Fprintf(&b, "# Not looked at: %d more that were different. Narrow it down with --caller, --endpoint or --since.\n", s.More)
	}
	for _, g := range s.Grants {
		fmt.Fprintf(&b, "---\n# %s at %s: %s, %s to %s\n", called(g), g.Endpoint, requests(g.Count), stamp(g.First), stamp(g.Last))
		fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nmetadata:\n  name: %s\nspec:\n  from:\n  - spiffeID: %s\n  to:\n", v1alpha1.Version, v1alpha1.KindGrant, g.Name, g.Caller)
		for _, to := range g.To {
			fmt.Fprintf(&b, "  - endpoint: %s\n    operations: [%s]\n    resources:\n", g.Endpoint, joined(to.Operations))
			for _, r := range to.Resources {
				fmt.Fprintf(&b, "    - %s # %s, last %s%s\n", scalar(string(r.Pattern)), requests(r.Count), stamp(r.Last), evidence(r))
			}
		}
	}
	if len(s.Left) > 0 {
		b.WriteString("# Nothing was written for:\n")
	}
	for i, l := range s.Left {
		if i == maxLeft {
			fmt.Fprintf(&b, "# and %d more; -o json has all\n", len(s.Left)-i)
			break
		}
		who := "an unknown caller"
		if !l.Caller.IsZero() {
			who = l.Caller.String()
		}
		fmt.Fprintf(&b, "# - %s %s at %s, by %s: %s, last %s: %s\n", shown(string(l.Operation)), shown(l.Resource), shown(string(l.Endpoint)), who,
			requests(l.Count), stamp(l.Last), l.Why)
	}
	// What cannot be read back must not be applied, whoever has found a way to make it so.
	if len(s.Grants) > 0 {
		docs := v1alpha1.Decode("suggestion", []byte(b.String()))
		var problems segment.Problems
		for i := range docs {
			problems = append(problems, docs[i].Problems()...)
		}
		if len(problems) > 0 || len(docs) != len(s.Grants) {
			return failed("narrow it down with --caller or --endpoint, and please report it", "the suggestion is no valid document: %w", problems)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func called(g learn.Proposal) string {
	if g.Workload != "" {
		return "workload " + string(g.Workload)
	}
	return g.Caller.String()
}

// evidence says what a pattern stands for.
func evidence(r learn.Seen) string {
	if len(r.Names) == 0 {
		return ""
	}
	names := make([]string, len(r.Names))
	for i, n := range r.Names {
		if names[i] = shown(n); n == "" {
			names[i] = "nothing by name"
		}
	}
	text := fmt.Sprintf("; seen: %s", strings.Join(names, ", "))
	if more := r.Different - len(names); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

func joined(operations []segment.Operation) string {
	texts := make([]string, len(operations))
	for i, op := range operations {
		texts[i] = string(op)
	}
	return strings.Join(texts, ", ")
}

// scalar writes a text for YAML: in double quotes, as JSON, unless it is a plain word that can mean nothing else.
func scalar(text string) string {
	word := func(c rune) bool {
		return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.ContainsRune("-_./", c)
	}
	plain := text != "" && unicode.IsLetter(rune(text[0])) && !strings.ContainsFunc(text, func(c rune) bool { return !word(c) })
	switch strings.ToLower(text) {
	case "null", "true", "false", "yes", "no", "on", "off", "y", "n":
		plain = false
	}
	if plain {
		return text
	}
	quoted, _ := json.Marshal(text) // of a string it never fails
	return string(quoted)
}

// shown makes text from the network fit for a terminal and for a comment: on one line, and not too long.
func shown(text string) string {
	if runes := []rune(text); len(runes) > 64 {
		text = string(runes[:64]) + "…"
	}
	if text == "" {
		return "-"
	}
	if strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsGraphic(c) || unicode.IsSpace(c) || c == '"' }) {
		return strconv.QuoteToGraphic(text)
	}
	return text
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func requests(n int64) string { return count(int(n), "request") }

// writeRecords says how far what is recorded can be trusted to be all.
func writeRecords(w io.Writer, before string, r operator.Records) {
	switch {
	case r.Recorded.IsZero():
		fmt.Fprintf(w, "%sno flow is recorded\n", before)
	case r.Recorded.After(r.Since):
		fmt.Fprintf(w, "%sthe records go back to %s only\n", before, stamp(r.Recorded))
	}
	if r.Dropped > 0 {
		fmt.Fprintf(w, "%s%d flows were lost since the control plane started: what only they did is not known\n", before, r.Dropped)
	}
}

func showUnused(cmd *cobra.Command, state string, o output, q url.Values) error {
	u, err := ask(cmd, state, func(c *operator.Client) (u operator.Unused, err error) {
		return u, c.Get(cmd.Context(), "/unused", q, &u)
	})
	if err != nil {
		return err
	}
	if o.format == "json" {
		err = o.print(cmd.OutOrStdout(), u, nil)
	} else {
		writeUnused(cmd.OutOrStdout(), u)
	}
	if err == nil && len(u.Parts) > 0 {
		return errProblems
	}
	return err
}

func writeUnused(w io.Writer, u operator.Unused) {
	fmt.Fprintf(w, "%s looked at, that allow and are in force; %s let through since %s\n", count(u.Grants, "grant"), requests(u.Requests), stamp(u.Since))
	writeRecords(w, "", u.Records)
	if len(u.Parts) == 0 {
		fmt.Fprintln(w, "Every part of them was used.")
		return
	}
	fmt.Fprintln(w, "Nobody used:")
	for _, p := range u.Parts {
		var about []string
		for _, part := range []struct{ word, value string }{
			{"for ", p.Caller}, {"", string(p.Operation)}, {"on ", string(p.Resource)}, {"at ", string(p.Endpoint)}} {
			if part.value != "" {
				about = append(about, part.word+shown(part.value))
			}
		}
		if about == nil {
			about = []string{"all of it"}
		}
		fmt.Fprintf(w, "  grant %s: %s (%s)", p.Grant, strings.Join(about, " "), p.Pos)
		if p.Formerly > 0 {
			fmt.Fprintf(w, "; %s let through by it, which it no longer covers", requests(p.Formerly))
		}
		fmt.Fprintln(w)
	}
	if u.More > 0 {
		fmt.Fprintf(w, "  and %d more parts of one caller, operation and resource each\n", u.More)
	}
}
