package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/term"
	"sigs.k8s.io/yaml"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane/filesource"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
)

// deployment is what a configuration has that stands in no document. `up` serves it; `check`, `explain -f` and
// `render -f` must be told the same to say the same.
type deployment struct {
	trustDomain string
	listen      string
	svidTTL     time.Duration
	shadow      string // the shadow folder; empty: none
}

func (d *deployment) add(flags *pflag.FlagSet) {
	d.addIdentity(flags)
	flags.StringVar(&d.listen, "listen", "127.0.0.1:8443", "`ADDRESS` and port on which the gateway accepts callers (mTLS)")
}

func (d *deployment) addIdentity(flags *pflag.FlagSet) {
	flags.StringVar(&d.trustDomain, "trust-domain", "example.org", "trust domain `NAME` of all identities that are issued")
	flags.StringVar(&d.shadow, "shadow", "", "`DIR` with documents that are tried beside the others: what their grants would decide, in place of those, is recorded")
	flags.DurationVar(&d.svidTTL, "svid-ttl", time.Hour, "lifetime of X.509-SVIDs; they are renewed at half of it")
}

// minTTL leaves room for renewal, for the age of connections, and for clocks that disagree a little.
const minTTL = 20 * time.Second

// identityOptions are those without a gateway of this process.
func (d *deployment) identityOptions() (v1alpha1.Options, error) {
	td, err := spiffeid.TrustDomainFromString(d.trustDomain)
	if err != nil {
		return v1alpha1.Options{}, usage("a trust domain looks like example.org", "--trust-domain: %w", err)
	}
	if d.svidTTL < minTTL || d.svidTTL > 30*24*time.Hour {
		return v1alpha1.Options{}, usage("SVIDs live for 20s to 720h", "--svid-ttl: %s is out of range", d.svidTTL)
	}
	return v1alpha1.Options{TrustDomain: td, SVIDTTL: d.svidTTL}, nil
}

func (d *deployment) options() (v1alpha1.Options, error) {
	options, err := d.identityOptions()
	if err != nil {
		return options, err
	}
	addr, err := netip.ParseAddrPort(d.listen)
	if err != nil {
		return v1alpha1.Options{}, usage("give an IP address and a port, as in 0.0.0.0:8443", "--listen: %w", err)
	}
	if addr.Port() == 0 {
		return v1alpha1.Options{}, usage("name a port, as in 127.0.0.1:8443: callers must know it", "--listen: port 0 is none")
	}
	id, err := spiffeid.FromSegments(options.TrustDomain, "gateway", "local")
	if err != nil {
		return v1alpha1.Options{}, fmt.Errorf("name the gateway: %w", err)
	}
	options.Gateway = &segment.Gateway{Name: "local", ID: id, Listen: addr, SVIDTTL: d.svidTTL}
	return options, nil
}

// assemble reads a folder of documents, all of it or none.
func (d *deployment) assemble(path string) (segment.Config, error) {
	options, err := d.options()
	if err != nil {
		return segment.Config{}, err
	}
	cfg, problems := v1alpha1.Assemble(filesource.Read(path), options)
	if len(problems) > 0 {
		return segment.Config{}, problems
	}
	if d.shadow == "" {
		return cfg, nil
	}
	if err := apart(path, d.shadow); err != nil {
		return segment.Config{}, err
	}
	if cfg.Shadow, problems = v1alpha1.AssembleShadow(filesource.Read(path), filesource.Read(d.shadow), options); len(problems) > 0 {
		return segment.Config{}, problems
	}
	cfg.ShadowFolder = true
	return cfg, nil
}

// apart refuses a shadow folder that is among the documents, or they in it.
func apart(documents, shadow string) error {
	if err := filesource.Apart(documents, shadow); err != nil {
		return usage("put the shadow folder beside the documents, or what it tries would be enforced", "--shadow: %w", err)
	}
	return nil
}

// envoyFlags adds what a gateway's Envoy is started with.
func envoyFlags(flags *pflag.FlagSet, path *string, threads *int) {
	flags.StringVar(path, "envoy", os.Getenv("ENVOY"), "`PATH` of Envoy")
	flags.IntVar(threads, "envoy-threads", 0, "`N` worker threads of Envoy; 0: one for each core")
}

// stateFlag adds the flag --state.
func stateFlag(flags *pflag.FlagSet, into *string) {
	flags.StringVar(into, "state", defaultState(), "`DIR` with the CA, the telemetry and the sockets of the control plane")
}

func defaultState() string {
	if dir := os.Getenv("SALLYPORT_STATE"); dir != "" {
		return dir
	}
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "sallyport")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ".sallyport"
	}
	return filepath.Join(home, ".local", "state", "sallyport")
}

// defaultWorkloadSocket is where workloads of every user find the Workload API: outside the state folder, which is
// closed to them.
func defaultWorkloadSocket() string {
	if os.Getuid() == 0 {
		return "/run/sallyport/workload.sock"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "sallyport", "workload.sock")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("sallyport-%d", os.Getuid()), "workload.sock")
}

func operatorSocket(state string) string { return filepath.Join(state, "run", "operator.sock") }

// ask calls a running control plane, shows what it warns of, and turns the errors of a missing one into words.
func ask[T any](cmd *cobra.Command, state string, call func(*operator.Client) (T, error)) (T, error) {
	client := operator.NewClient(operatorSocket(state))
	client.Warn = func(warning string) { fmt.Fprintf(cmd.ErrOrStderr(), "sallyport: warning: %s\n", warning) }
	answer, err := call(client)
	if notRunning(err) {
		return answer, failed("start it with `sallyport up -f DIR` or `sallyport controlplane -f DIR`, or name its state folder with --state",
			"no control plane is running with state %s", state)
	}
	if errors.Is(err, fs.ErrPermission) {
		return answer, failed("only the user that runs it may ask it", "the control plane in %s belongs to somebody else", state)
	}
	return answer, err
}

func notRunning(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// output is the flag -o, which takes one of the formats that the command has.
type output struct {
	format  string
	formats []string
}

// add adds the flag; the first format is the default.
func (o *output) add(cmd *cobra.Command, formats ...string) {
	o.format, o.formats = formats[0], formats
	cmd.Flags().VarP(o, "output", "o", "`FORMAT`: "+strings.Join(formats, ", "))
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
}

// String, Set and Type make it a pflag.Value.
func (o *output) String() string { return o.format }

func (o *output) Type() string { return "string" }

func (o *output) Set(format string) error {
	if !slices.Contains(o.formats, format) {
		return fmt.Errorf("formats are %s", strings.Join(o.formats, ", "))
	}
	o.format = format
	return nil
}

// print writes a value as JSON or YAML, or as text in the way given.
func (o *output) print(w io.Writer, value any, text func() error) error {
	if o.format == "text" {
		return text()
	}
	out, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	out = append(out, '\n')
	if o.format == "yaml" {
		if out, err = yaml.JSONToYAML(out); err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
	}
	_, err = w.Write(out)
	return err
}

// colours reports whether a writer is a terminal that wants colours (https://no-color.org).
func colours(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}
