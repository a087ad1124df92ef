package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/telemetry"
	"sallyport.dev/telemetry/store"
	"sallyport.dev/telemetry/view"
)

func statusCommand() *cobra.Command {
	var state string
	var o output
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what is in force, gateway by gateway",
		Long: `Status shows the generation that the documents have become and, for each gateway, whether it has taken it: what is
still on its way and what it has refused, and why. Exit status 1 if documents have problems or a gateway has
refused something.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := ask(cmd, state, func(c *operator.Client) (st operator.Status, err error) {
				return st, c.Get(cmd.Context(), "/status", nil, &st)
			})
			if err != nil {
				return err
			}
			if err := o.print(cmd.OutOrStdout(), st, func() error { return writeStatus(cmd.OutOrStdout(), st) }); err != nil {
				return err
			}
			if len(st.Problems) > 0 || st.Failure != "" {
				return errProblems
			}
			for _, g := range st.Gateways {
				if len(g.Rejected) > 0 {
					return errProblems
				}
			}
			return nil
		},
	}
	stateFlag(cmd.Flags(), &state)
	o.add(cmd, "text", "json", "yaml")
	return cmd
}

func writeStatus(w io.Writer, st operator.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "sallyport\t%s, up %s\n", st.Version, time.Since(st.Started).Round(time.Second))
	fmt.Fprintf(t, "trust domain\t%s\n", st.TrustDomain)
	for _, l := range []struct{ name, form, value string }{
		{"callers", "https on %s", st.Listen},
		{"identities", "unix://%s", st.Workload},
		{"agents", "mTLS on %s", st.AgentListen},
		{"gateways", "mTLS on %s", st.GatewayListen},
		{"bundle", "https on %s, " + string(st.BundleProfile), st.BundleEndpoint},
		{"issuer", "%s", st.OIDCIssuer},
	} {
		if l.value != "" {
			fmt.Fprintf(t, "%s\t"+l.form+"\n", l.name, l.value)
		}
	}
	if g := st.Generation; g != nil {
		fmt.Fprintf(t, "generation\t%s: %s, %s, %s, made %s\n", g.Digest.Short(), count(g.Endpoints, "endpoint"),
			count(g.Workloads, "workload"), count(g.Grants, "grant"), g.Made.Format(time.DateTime))
	} else {
		fmt.Fprintf(t, "generation\tnone yet: everything is denied\n")
	}
	if g := st.Generation; g != nil && g.Warnings > 0 {
		fmt.Fprintf(t, "\t  %s of its grants: see `sallyport check DIR`\n", count(g.Warnings, "warning"))
	}
	for _, g := range st.Gateways {
		fmt.Fprintf(t, "gateway %s\t%s\n", g.Gateway, gatewayState(g.Connected, g.InForce == g.Target, len(g.Rejected), len(g.Pending)))
		for _, name := range g.Pending[:min(5, len(g.Pending))] {
			fmt.Fprintf(t, "\t  not yet taken: %s\n", name)
		}
		for _, r := range g.Rejected {
			fmt.Fprintf(t, "\t  refused %s %s: %s\n", r.Type, strings.Join(r.Resources, ", "), r.Error)
		}
	}
	for _, f := range st.Federation {
		fmt.Fprintf(t, "federated %s\t%s, next %s\n", f.TrustDomain,
			known(f.Roots+f.JWTKeys > 0, count(f.Roots, "root")+", "+count(f.JWTKeys, "JWT key"), "nobody is trusted", f.LastSuccess), moment(f.Next))
		if f.Error != "" {
			fmt.Fprintf(t, "\t  failed: %s\n", f.Error)
		}
	}
	for _, i := range st.Issuers {
		fmt.Fprintf(t, "tokens of %s\t%s, next %s\n", i.Name, known(i.Keys > 0, count(i.Keys, "key"), "none can be verified", i.LastSuccess), moment(i.Next))
		if i.Error != "" {
			fmt.Fprintf(t, "\t  failed: %s\n", i.Error)
		}
	}
	tel := st.Telemetry
	fmt.Fprintf(t, "telemetry\t%s, %s, %s, %d dropped\n", count(held(tel.Flows), "flow"), count(held(tel.Spans), "span"),
		count(held(tel.Applications), "application span"), tel.Flows.Dropped+tel.Spans.Dropped+tel.Applications.Dropped)
	if tel.Problem != "" {
		fmt.Fprintf(t, "\t  not written: %s\n", tel.Problem)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, p := range st.Problems {
		fmt.Fprintf(w, "problem: %s\n", p)
	}
	if len(st.Problems) > 0 {
		fmt.Fprintln(w, "The newest documents are not in force; the last good generation is.")
	}
	for _, p := range st.Shadow {
		fmt.Fprintf(w, "problem in the shadow folder: %s\n", p)
	}
	if len(st.Shadow) > 0 {
		fmt.Fprintln(w, "Its newest documents are not tried; the last good ones are.")
	}
	if st.Failure != "" {
		fmt.Fprintf(w, "failure: %s\n", st.Failure)
	}
	return nil
}

// known says which keys of others there are, or what it means that there are none, and since when that is known.
func known(any bool, keys, none string, fetched time.Time) string {
	if !any {
		keys = none
	}
	if fetched.IsZero() {
		return keys + ", never fetched"
	}
	return keys + ", fetched " + moment(fetched)
}

func held(c store.Count) int { return int(c.Rows) + c.Waiting }

func gatewayState(connected, whole bool, rejected, pending int) string {
	switch {
	case !connected:
		return "not connected"
	case rejected > 0:
		return "connected, refuses what it was sent"
	case !whole:
		return fmt.Sprintf("connected, %s on the way", count(pending, "resource"))
	}
	return "connected, in force"
}

// filter is the flags that select flows.
type filter struct {
	caller, endpoint, verdict string
	since                     time.Duration
	limit                     int
}

func (f *filter) add(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&f.caller, "caller", "", "SPIFFE `ID`, or its beginning and a *")
	cmd.Flags().StringVar(&f.endpoint, "endpoint", "", "`NAME` of an endpoint")
	cmd.Flags().StringVar(&f.verdict, "verdict", "", "`VERDICT`: allowed, denied, limited, refused or failed")
	cmd.Flags().DurationVar(&f.since, "since", 0, "how far back, a `DURATION` as in 10m")
	cmd.Flags().IntVarP(&f.limit, "limit", "n", 0, "at most `N` "+what+"; 0: 100")
	_ = cmd.RegisterFlagCompletionFunc("verdict", cobra.FixedCompletions([]string{"allowed", "denied", "limited", "refused", "failed"}, cobra.ShellCompDirectiveNoFileComp))
}

func (f *filter) query() (url.Values, error) {
	q := url.Values{}
	set := func(key, value string) {
		if value != "" {
			q.Set(key, value)
		}
	}
	if f.verdict != "" {
		if _, err := telemetry.ParseVerdict(f.verdict); err != nil {
			return nil, usage("verdicts are allowed, denied, limited, refused and failed", "--verdict: %w", err)
		}
	}
	if f.since < 0 || f.limit < 0 {
		return nil, usage("give --since and --limit as positive values", "--since or --limit is negative")
	}
	set("caller", f.caller)
	set("endpoint", f.endpoint)
	set("verdict", f.verdict)
	if f.since > 0 {
		set("since", time.Now().Add(-f.since).Format(time.RFC3339Nano))
	}
	if f.limit > 0 {
		set("limit", strconv.Itoa(f.limit))
	}
	return q, nil
}

func flowsCommand() *cobra.Command {
	var state string
	var f filter
	var o output
	var follow bool
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List what passed the gateway and what did not, live with --follow",
		Example: `  sallyport flows --follow
  sallyport flows --verdict denied --since 1h
  sallyport flows --caller 'spiffe://example.org/team/*' -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := f.query()
			if err != nil {
				return err
			}
			if follow {
				q.Set("follow", "true")
			}
			body, err := ask(cmd, state, func(c *operator.Client) (io.ReadCloser, error) {
				return c.Stream(cmd.Context(), "/flows", q)
			})
			if err != nil {
				return err
			}
			defer body.Close()
			err = writeFlows(cmd.OutOrStdout(), body, o.format == "json")
			if cmd.Context().Err() != nil {
				return nil // Ctrl-C is how following ends
			}
			return err
		},
	}
	f.add(cmd, "flows")
	o.add(cmd, "text", "json") // one flow a line
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with every flow as it comes")
	stateFlag(cmd.Flags(), &state)
	return cmd
}

func writeFlows(w io.Writer, from io.Reader, asJSON bool) error {
	if asJSON {
		_, err := io.Copy(w, from)
		return err
	}
	table := view.NewFlows(w, colours(w))
	lines := bufio.NewReader(from)
	var waiting []telemetry.Flow
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var f telemetry.Flow
			if err := json.Unmarshal(line, &f); err != nil {
				return fmt.Errorf("read flow: %w", err)
			}
			waiting = append(waiting, f)
		}
		if err != nil || lines.Buffered() == 0 { // all that there is now: columns fit it
			if werr := table.Write(waiting...); werr != nil {
				return werr
			}
			waiting = nil
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read flows: %w", err)
		}
	}
}

func tracesCommand() *cobra.Command {
	var state string
	var f filter
	var o output
	cmd := &cobra.Command{
		Use:   "traces",
		Short: "List traces; show one as a tree",
		Example: `  sallyport traces --verdict denied
  sallyport traces show 4bf92f35`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := f.query()
			if err != nil {
				return err
			}
			traces, err := ask(cmd, state, func(c *operator.Client) (t []telemetry.Summary, err error) {
				return t, c.Get(cmd.Context(), "/traces", q, &t)
			})
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), traces, func() error { return view.Traces(cmd.OutOrStdout(), traces, colours(cmd.OutOrStdout())) })
		},
	}
	f.add(cmd, "traces")
	show := &cobra.Command{
		Use:   "show ID",
		Short: "Show one trace as a tree",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("`sallyport traces show ID`, with the id of a trace or its beginning", "show takes one id, not %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			trace, err := ask(cmd, state, func(c *operator.Client) (t telemetry.Trace, err error) {
				return t, c.Get(cmd.Context(), "/traces/"+url.PathEscape(args[0]), nil, &t)
			})
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), trace, func() error { return view.Trace(cmd.OutOrStdout(), trace, colours(cmd.OutOrStdout())) })
		},
	}
	o.add(cmd, "text", "json", "yaml")
	o.add(show, "text", "json", "yaml")
	stateFlag(cmd.PersistentFlags(), &state)
	cmd.AddCommand(show)
	return cmd
}
