package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/identity/disk"
)

func caCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Show, export, rotate and distrust the authorities that issue identities",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(caShowCommand(), caExportCommand(), caRotateCommand(), caDistrustCommand())
	return cmd
}

// caState is where the authorities are, and how to read them if no control plane is running.
type caState struct {
	state string
	ca    caFlags
}

func (c *caState) add(cmd *cobra.Command) {
	stateFlag(cmd.Flags(), &c.state)
	cmd.Flags().StringVar(&c.ca.keyFile, "ca-key-file", "", "`PATH` of the key of an encrypted state, if no control plane is running; or $SALLYPORT_CA_KEY holds it")
}

// askOrRead asks a running control plane or, if none is running, reads the folder.
func askOrRead[T any](cmd *cobra.Command, c *caState, call func(*operator.Client) (T, error), read func(dir string, key disk.Key) (T, error)) (T, error) {
	answer, err := call(operator.NewClient(operatorSocket(c.state)))
	if !notRunning(err) {
		return ask(cmd, c.state, func(*operator.Client) (T, error) { return answer, err })
	}
	key, err := c.ca.key()
	if err != nil {
		return answer, err
	}
	answer, err = read(filepath.Join(c.state, "ca"), key)
	if errors.Is(err, fs.ErrNotExist) {
		return answer, failed("start it with `sallyport up -f DIR` or `sallyport controlplane -f DIR`, or name its state folder with --state",
			"no control plane is running with state %s, and none has been", c.state)
	}
	return answer, err
}

func caShowCommand() *cobra.Command {
	var c caState
	var o output
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show what signs, what is about to, and until when what came before is trusted",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := askOrRead(cmd, &c, func(client *operator.Client) (d disk.Description, err error) {
				return d, client.Get(cmd.Context(), "/ca", nil, &d)
			}, func(dir string, key disk.Key) (disk.Description, error) {
				d, _, err := disk.Read(dir, key, time.Now())
				return d, err
			})
			if err != nil {
				return err
			}
			if err := o.print(cmd.OutOrStdout(), d, func() error { return writeCA(cmd.OutOrStdout(), d) }); err != nil {
				return err
			}
			if d.Problem != "" {
				return errProblems
			}
			return nil
		},
	}
	c.add(cmd)
	o.add(cmd, "text", "json", "yaml")
	return cmd
}

func writeCA(w io.Writer, d disk.Description) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "trust domain\t%s\n", d.TrustDomain)
	root, kept := "its own", "in plain text"
	if d.Upstream {
		root = "an upstream authority's"
	}
	if d.Encrypted {
		kept = "encrypted"
	}
	fmt.Fprintf(t, "root\t%s\n", root)
	fmt.Fprintf(t, "keys\tkept %s\n", kept)
	fmt.Fprintf(t, "bundle\tnumber %d\n", d.Sequence)
	slot := func(kind string, s disk.Slot) {
		says := "signs, until " + s.NotAfter.Format(time.RFC3339)
		switch {
		case s.State == disk.Distrusted:
			says = "nobody is to trust it, although the upstream authority may"
		case s.State == disk.Prepared:
			says = "trusted since " + s.Prepared.Format(time.RFC3339) + ", to sign next"
		case s.State == disk.Old && s.SignedUntil.IsZero():
			says = "trusted, and has signed nothing"
		case s.State == disk.Old:
			says = "trusted until what it signed has ended, at " + s.SignedUntil.Format(time.RFC3339)
		case s.Leaving:
			says += ", or its successor's turn"
		}
		fmt.Fprintf(t, "%s\t%s  %s\n", kind, s.ID[:min(16, len(s.ID))], says)
	}
	for _, s := range d.Roots {
		slot("root "+string(s.State), s)
	}
	if d.Intermediate != nil {
		slot("intermediate", *d.Intermediate)
	}
	for _, s := range d.JWT {
		slot("JWT key "+string(s.State), s)
	}
	if !d.Next.IsZero() {
		fmt.Fprintf(t, "next change\t%s\n", d.Next.Format(time.RFC3339))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if d.Problem != "" {
		fmt.Fprintf(w, "problem: %s\n", d.Problem)
	}
	return nil
}

func caExportCommand() *cobra.Command {
	var c caState
	format := disk.PEM
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Print whom members of the trust domain trust",
		Long: `Export prints the bundle: as PEM, for programs that know X.509 alone, or as SPIFFE bundle (JSON), which also has the
keys of JWT-SVIDs, for other trust domains. It changes with every rotation: whoever can should follow it instead.`,
		Example: "  sallyport ca export --format spiffe >example.org.json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != disk.PEM && format != disk.SPIFFE {
				return usage("formats are pem and spiffe", "--format: unknown format %q", format)
			}
			text, err := askOrRead(cmd, &c, func(client *operator.Client) (text string, err error) {
				q := url.Values{"format": {format}}
				if format == disk.PEM {
					return text, client.Get(cmd.Context(), "/ca/bundle", q, &text)
				}
				var bundle json.RawMessage
				err = client.Get(cmd.Context(), "/ca/bundle", q, &bundle)
				return string(bundle), err
			}, func(dir string, key disk.Key) (string, error) {
				_, bundle, err := disk.Read(dir, key, time.Now())
				if err != nil {
					return "", err
				}
				data, err := disk.Export(bundle, format)
				return string(data), err
			})
			if err != nil {
				return err
			}
			if format == disk.SPIFFE {
				text += "\n"
			}
			_, err = io.WriteString(cmd.OutOrStdout(), text)
			return err
		},
	}
	c.add(cmd)
	cmd.Flags().StringVar(&format, "format", disk.PEM, "`FORMAT`: pem or spiffe")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{disk.PEM, disk.SPIFFE}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func caRotateCommand() *cobra.Command {
	var state string
	var now bool
	var o output
	kinds := []string{string(disk.X509), string(disk.JWT), string(disk.All)}
	cmd := &cobra.Command{
		Use:   "rotate [x509|jwt|all]",
		Short: "Replace what signs before its time",
		Long: `Rotate makes the next authority at once: the root or, below an upstream authority, what stands below it (x509), the key of
JWT-SVIDs (jwt), or both. It is trusted from then on, and signs when everybody has had the time to learn of it. What
came before is trusted until all that it signed has ended. Time does all of this by itself, long before anything ends.

With --now it signs at once. Whoever does not follow the bundle by the second refuses what it signs until he has it.
A stolen key is not ended by that: see ` + "`sallyport ca distrust`" + `.`,
		ValidArgs: kinds,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 && !slices.Contains(kinds, args[0]) {
				return usage("`sallyport ca rotate`, with x509, jwt or all", "rotate takes x509, jwt or all, not %q", args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			what := string(disk.All)
			if len(args) > 0 {
				what = args[0]
			}
			d, err := ask(cmd, state, func(client *operator.Client) (d disk.Description, err error) {
				return d, client.Post(cmd.Context(), "/ca/rotate", url.Values{"what": {what}, "now": {strconv.FormatBool(now)}}, &d)
			})
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), d, func() error { return writeCA(cmd.OutOrStdout(), d) })
		},
	}
	cmd.Flags().BoolVar(&now, "now", false, "have it sign at once, before everybody can know it")
	stateFlag(cmd.Flags(), &state)
	o.add(cmd, "text", "json", "yaml")
	return cmd
}

func caDistrustCommand() *cobra.Command {
	var state string
	var o output
	cmd := &cobra.Command{
		Use:   "distrust AUTHORITY",
		Short: "End the trust in a stolen root or JWT key, and in all that it signed",
		Long: `Distrust takes a root or a key of JWT-SVIDs out of the bundle, now and for good. AUTHORITY is its ID, or how that begins,
as ` + "`sallyport ca show`" + ` has it. What signs now is refused: ` + "`sallyport ca rotate --now`" + ` first. A thief of the state folder has
what is prepared too: distrust that before, and another is made.

Workloads, agents and gateways are told at once, and accept from then on nothing that it signed; those who hold such an
SVID are sent another with it. Wait before that until connected agents have renewed their own, a few seconds after the
rotation: ` + "`sallyport agents`" + ` shows the root of each. An agent that has not must be attested again, and one that was away
all the time since before the rotation must be begun anew. Connections that are open end as they would.

Below an upstream authority its root can be distrusted, once another signs, and stays so whatever that authority says.
What stands below a root cannot be: it is trusted as long as the root is.`,
		Example: "  sallyport ca rotate --now\n  sallyport ca show\n  sallyport ca distrust 4bf92f3577b34da6",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usage("give the ID of one root or JWT key; `sallyport ca show` lists them", "distrust takes one authority, not %q", args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := ask(cmd, state, func(client *operator.Client) (d disk.Description, err error) {
				return d, client.Get(cmd.Context(), "/ca", nil, &d)
			})
			if err != nil {
				return err
			}
			one, err := d.Find(args[0])
			if err != nil {
				return failed("`sallyport ca show` lists the IDs; give more of one", "distrust authority: %w", err)
			}
			after, err := ask(cmd, state, func(client *operator.Client) (after disk.Description, err error) {
				return after, client.Post(cmd.Context(), "/ca/distrust", url.Values{"id": {one.ID}}, &after)
			})
			if refused := new(operator.RefusedError); errors.As(err, &refused) && one.State == disk.Active {
				hint := "`sallyport ca rotate --now` first, and then distrust the root or JWT key that signed before"
				if d.Upstream {
					hint = "have the upstream authority sign below another root; " + hint
				}
				return failed(hint, "%w", err)
			}
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), after, func() error { return writeCA(cmd.OutOrStdout(), after) })
		},
	}
	stateFlag(cmd.Flags(), &state)
	o.add(cmd, "text", "json", "yaml")
	return cmd
}
