package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	_ "time/tzdata" // windows of grants name time zones, which not every machine knows

	"github.com/spf13/cobra"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
)

func checkCommand() *cobra.Command {
	var d deployment
	var o output
	var strict bool
	cmd := &cobra.Command{
		Use:   "check DIR",
		Short: "Check documents: all problems at once",
		Long: `Check reads the documents of a folder or a file as ` + "`up`" + ` would, makes everything of them that it would make, and
shows all problems. It also warns of grants that are probably not meant so: that nobody answers for, that are very wide,
or that change no verdict. It changes nothing and asks nobody. Exit status 1 if there is a problem, or with --strict
a warning.`,
		Example: `  sallyport check documents/
  sallyport check --strict documents/ --shadow shadow/`,
		Args: oneDir,
		RunE: func(cmd *cobra.Command, args []string) error {
			now := time.Now()
			cfg, err := d.assemble(args[0])
			var problems segment.Problems
			if err != nil && !errors.As(err, &problems) {
				return err
			}
			var g *controlplane.Generation
			var warnings segment.Problems
			if problems == nil {
				if g, err = controlplane.Generate(cfg, envoy.Learned{}, now); err != nil {
					return failed("this is a defect of Sallyport: please report it with your documents", "%w", err)
				}
				warnings = authz.Warnings(&cfg, now)
			}
			if strict {
				problems, warnings = append(problems, warnings...), nil
			}
			if o.format != "text" {
				if err := o.print(cmd.OutOrStdout(), findings(problems, warnings), nil); err != nil {
					return err
				}
				if len(problems) > 0 {
					return errProblems
				}
				return nil
			}
			if len(problems) > 0 {
				return problems
			}
			for _, w := range warnings {
				fmt.Fprintf(cmd.ErrOrStderr(), "sallyport: warning: %s\n", w)
			}
			found := "no problems"
			if len(warnings) > 0 {
				found += ", " + count(len(warnings), "warning")
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, %s, %s: %s (generation %s)\n", args[0],
				count(len(cfg.Endpoints), "endpoint"), count(len(cfg.Workloads), "workload"), count(len(cfg.Grants), "grant"), found, g.Digest.Short())
			return err
		},
	}
	cmd.Flags().BoolVar(&strict, "strict", false, "take warnings as problems")
	d.add(cmd.Flags())
	o.add(cmd, "text", "json", "yaml")
	return cmd
}

// finding is a problem or a warning, as JSON.
type finding struct {
	segment.Problem
	Severity string `json:"severity"` // error or warning
}

func findings(problems, warnings segment.Problems) []finding {
	all := []finding{}
	for _, p := range problems {
		all = append(all, finding{p, "error"})
	}
	for _, w := range warnings {
		all = append(all, finding{w, "warning"})
	}
	return all
}

func count(n int, of string) string {
	if n == 1 {
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}

func oneDir(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usage("`"+cmd.CommandPath()+" DIR`, where DIR holds the documents", "%s takes one folder or file, not %d", cmd.Name(), len(args))
	}
	return nil
}

func explainCommand() *cobra.Command {
	var d deployment
	var o output
	var from, state string
	var r authz.Request
	var endpoint, operation, replay string
	cmd := &cobra.Command{
		Use:   "explain --caller ID [--endpoint E --operation O --resource R]",
		Short: "Say what a caller may do, and why",
		Long: `Explain decides a request as the gateway would and names the grants that decide and those that nearly do. With
only --caller it lists everything that the caller may do. It asks the running ` + "`up`" + `, or with -f reads documents.
Exit status 1 if the request is denied. With --replay it decides again what was logged, at the time of the flow: then
exit status 1 means that the verdict is another.`,
		Example: `  sallyport explain --caller spiffe://example.org/rag-app
  sallyport explain --caller spiffe://example.org/rag-app --endpoint chat --operation Infer --resource smollm2
  sallyport explain -f documents/ --caller spiffe://example.org/intern
  sallyport flows -o json --since 1h | sallyport explain -f documents/ --replay -`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r.Endpoint, r.Operation = segment.EndpointName(endpoint), segment.Operation(operation)
			if replay != "" {
				if r != (authz.Request{}) {
					return usage("leave --caller, --endpoint, --operation and --resource out: the line says them", "--replay takes the request from the line")
				}
				return replayLines(cmd, &d, &o, replay, from, state)
			}
			if r.Caller == "" {
				return usage("name a SPIFFE ID, as in --caller spiffe://example.org/rag-app", "--caller is missing")
			}
			everything := endpoint == "" && operation == "" && r.Resource == ""
			if !everything {
				if err := wholeRequest(r); err != nil {
					return err
				}
			}
			var err error
			if r.Caller, err = wholeID(cmd, &d, from, state, r.Caller); err != nil {
				return err
			}
			if everything {
				rights, err := rightsOf(cmd, &d, from, state, r.Caller)
				if err != nil {
					return err
				}
				return o.print(cmd.OutOrStdout(), rights, func() error { return writeRights(cmd.OutOrStdout(), r.Caller, rights) })
			}
			ex, err := explanation(cmd, &d, from, state, r)
			if err != nil {
				return err
			}
			if err := o.print(cmd.OutOrStdout(), ex, func() error { return writeExplanation(cmd.OutOrStdout(), ex) }); err != nil {
				return err
			}
			if !ex.Decision.Allowed {
				return errProblems
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&r.Caller, "caller", "", "SPIFFE `ID` of the caller, or its path in the trust domain")
	cmd.Flags().StringVar(&endpoint, "endpoint", "", "`NAME` of the endpoint that it asks")
	cmd.Flags().StringVar(&operation, "operation", "", "`NAME` of what it wants to do, as in Infer")
	cmd.Flags().StringVar(&r.Resource, "resource", "", "`NAME` of the model or collection; none for Enter and for a TCP connection")
	cmd.Flags().StringVarP(&from, "file", "f", "", "read documents from `DIR` instead of asking the running control plane")
	cmd.Flags().StringVar(&replay, "replay", "", "decide again a `LINE` that sallyport flows -o json has written, or all lines of standard input if it is -")
	stateFlag(cmd.Flags(), &state)
	d.add(cmd.Flags())
	o.add(cmd, "text", "json", "yaml")
	return cmd
}

// wholeRequest refuses a request with a part too few, or one too many.
func wholeRequest(r authz.Request) error {
	all := append(segment.Operations(), segment.Discover, segment.Enter)
	switch {
	case r.Endpoint == "" || r.Operation == "" || r.Resource == "" && r.Operation != segment.Enter && r.Operation != segment.Connect:
		return usage("give all three of --endpoint, --operation and --resource, or none; only Enter and TCP connections have no resource", "part of the request is missing")
	case r.Resource != "" && r.Operation == segment.Enter:
		return usage("leave --resource out: Enter is what a client asks before it names one", "Enter has no resource")
	case !slices.Contains(all, r.Operation):
		return usage(fmt.Sprintf("operations are %v", all), "unknown operation %q", r.Operation)
	}
	return nil
}

// wholeID makes a SPIFFE ID of a path: in the trust domain of whoever is asked.
func wholeID(cmd *cobra.Command, d *deployment, from, state, caller string) (string, error) {
	if strings.HasPrefix(caller, "spiffe://") {
		return caller, nil
	}
	trustDomain := d.trustDomain
	if from == "" {
		st, err := ask(cmd, state, func(c *operator.Client) (st operator.Status, err error) {
			return st, c.Get(cmd.Context(), "/status", nil, &st)
		})
		if err != nil {
			return "", err
		}
		trustDomain = st.TrustDomain.Name()
	}
	return "spiffe://" + trustDomain + "/" + strings.TrimPrefix(caller, "/"), nil
}

func explanation(cmd *cobra.Command, d *deployment, from, state string, r authz.Request) (authz.Explanation, error) {
	if from == "" {
		return ask(cmd, state, func(c *operator.Client) (ex authz.Explanation, err error) {
			return ex, c.Get(cmd.Context(), "/explain", url.Values{"caller": {r.Caller}, "endpoint": {string(r.Endpoint)},
				"operation": {string(r.Operation)}, "resource": {r.Resource}}, &ex)
		})
	}
	cfg, err := d.assemble(from)
	if err != nil {
		return authz.Explanation{}, err
	}
	now := time.Now()
	return authz.Explain(authz.Compile(&cfg, now), &cfg, r, now), nil
}

func rightsOf(cmd *cobra.Command, d *deployment, from, state, caller string) ([]authz.Right, error) {
	if from == "" {
		return ask(cmd, state, func(c *operator.Client) (rights []authz.Right, err error) {
			return rights, c.Get(cmd.Context(), "/rights", url.Values{"caller": {caller}}, &rights)
		})
	}
	cfg, err := d.assemble(from)
	if err != nil {
		return nil, err
	}
	return authz.RightsOf(authz.Compile(&cfg, time.Now()), caller), nil
}

func writeExplanation(w io.Writer, ex authz.Explanation) error {
	verdict := "denied"
	if ex.Decision.Allowed {
		verdict = "allowed"
	}
	r := ex.Request
	what := strings.TrimSpace(string(r.Operation) + " " + r.Resource) // Enter has no resource
	fmt.Fprintf(w, "%s: %s at %s, for %s\n  decided by %s\n", verdict, what, r.Endpoint, r.Caller, ex.Decision.Rule)
	if b := ex.Decision.Budget; !b.IsZero() {
		whose := "of the caller's own"
		if b.Shared {
			whose = "of all callers of the grant together"
		}
		fmt.Fprintf(w, "  counted against a budget %s: %s\n", whose, b)
	}
	if ex.Decision.ShadowAllowed != ex.Decision.Allowed || ex.Decision.ShadowRule != ex.Decision.Rule {
		shadow := "deny"
		if ex.Decision.ShadowAllowed {
			shadow = "allow"
		}
		fmt.Fprintf(w, "  with what is tried in shadow enforced, %s would %s it\n", ex.Decision.ShadowRule, shadow)
	}
	for _, reason := range ex.Deciding {
		fmt.Fprintf(w, "  grant %s %s (%s)\n", reason.Grant, reason.Says, reason.Pos)
	}
	for _, note := range ex.Notes {
		fmt.Fprintf(w, "  note: %s\n", note)
	}
	if !ex.Decision.Allowed && len(ex.Near) > 0 {
		fmt.Fprintln(w, "near misses:")
		for _, reason := range ex.Near[:min(10, len(ex.Near))] {
			fmt.Fprintf(w, "  grant %s %s (%s)\n", reason.Grant, reason.Says, reason.Pos)
		}
	}
	return nil
}

func writeRights(w io.Writer, caller string, rights []authz.Right) error {
	if len(rights) == 0 {
		_, err := fmt.Fprintf(w, "%s may do nothing: no grant names it\n", caller)
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ENDPOINT\tOPERATION\tRESOURCE\tVERDICT\tBY")
	for _, r := range rights {
		verdict, rule := "denied", string(r.Rule)
		if r.Allowed {
			verdict = "allowed"
		}
		rule += within(r.Budget, plain)
		if r.Shadow != r.Leaf {
			rule += fmt.Sprintf(" (shadow: allowed=%t by %s)", r.Shadow.Allowed, r.Shadow.Rule)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", r.Endpoint, r.Operation, r.Resource, verdict, rule)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, "Everything else is denied.")
	return err
}

func renderCommand() *cobra.Command {
	var d deployment
	var o output
	var from, state, gateway string
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Show the Envoy resources that the documents become",
		Long:  "Render shows what the gateway is sent, as YAML. It asks the running `up`, or with -f reads documents.",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := rendered(cmd, &d, from, state, gateway)
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), text, nil)
		},
	}
	cmd.Flags().StringVar(&gateway, "gateway", "", "`NAME` of the gateway, if there are several")
	cmd.Flags().StringVarP(&from, "file", "f", "", "read documents from `DIR` instead of asking the running control plane")
	o.add(cmd, "yaml", "json")
	stateFlag(cmd.Flags(), &state)
	d.add(cmd.Flags())
	return cmd
}

func rendered(cmd *cobra.Command, d *deployment, from, state, gateway string) (json.RawMessage, error) {
	if from == "" {
		return ask(cmd, state, func(c *operator.Client) (text json.RawMessage, err error) {
			return text, c.Get(cmd.Context(), "/render", url.Values{"gateway": {gateway}}, &text)
		})
	}
	cfg, err := d.assemble(from)
	if err != nil {
		return nil, err
	}
	g, err := controlplane.Generate(cfg, envoy.Learned{}, time.Now())
	if err != nil {
		return nil, err
	}
	resources, failure := operator.ResourcesOf(g, segment.GatewayName(gateway))
	if failure != nil {
		return nil, usage(failure.Hint, "%s", failure.Error)
	}
	return envoy.Render(resources)
}
