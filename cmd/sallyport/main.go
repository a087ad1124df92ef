// Command sallyport is a sidecar-free mTLS segmentation gateway for GenAI endpoints: the control plane, the gateway
// that it supervises, and the tools to ask them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
)

// Exit codes, the same for every command.
const (
	exitProblems = 1 // in the input: documents, or a question that was answered with no
	exitUsage    = 2 // flags or arguments
	exitFailed   = 3 // while running
)

// failure is an error with what the user can do about it, and the exit code.
type failure struct {
	code int
	err  error
	hint string
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func failed(hint, format string, args ...any) error {
	return &failure{exitFailed, fmt.Errorf(format, args...), hint}
}

func usage(hint, format string, args ...any) error {
	return &failure{exitUsage, fmt.Errorf(format, args...), hint}
}

// errProblems ends a command whose input has problems that it has already shown.
var errProblems = errors.New("the input has problems")

func main() {
	os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr))
}

// Main runs the command line and returns its exit code.
func Main(args []string, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	return report(errOut, err)
}

// report writes an error in the one form that all have, and returns the exit code.
func report(w io.Writer, err error) int {
	if errors.Is(err, errProblems) {
		return exitProblems
	}
	code, hint := exitFailed, ""
	var f *failure
	var refused *operator.RefusedError
	var problems segment.Problems
	switch {
	case errors.As(err, &f):
		code, hint = f.code, f.hint
	case errors.As(err, &refused):
		hint = refused.Hint
	case errors.As(err, &problems):
		code = exitProblems
		for _, p := range problems {
			fmt.Fprintf(w, "sallyport: error: %s\n", p)
		}
		return code
	}
	fmt.Fprintf(w, "sallyport: error: %v\n", err)
	if hint != "" {
		fmt.Fprintf(w, "hint: %s\n", hint)
	}
	return code
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "sallyport",
		Short: "mTLS segmentation gateway for GenAI endpoints",
		Long: `Sallyport puts an Envoy gateway in front of model servers and vector stores, gives every workload a SPIFFE
identity, and lets a caller reach exactly the models and collections that a grant names. Every request leaves
a trace that says who asked, for what, and which grant let it through or that none did.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("`sallyport --help` lists the commands", "unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("`"+cmd.CommandPath()+" --help` lists the flags", "%w", err)
	})
	root.AddCommand(upCommand(), controlplaneCommand(), agentCommand(), gatewayCommand(), tokenCommand(), agentsCommand(), caCommand(), checkCommand(), testCommand(), diffCommand(), explainCommand(), renderCommand(), protocolsCommand(), statusCommand(), flowsCommand(),
		tracesCommand(), budgetsCommand(), shadowCommand(), suggestCommand(), svidCommand(), versionCommand())
	return root
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("`"+cmd.CommandPath()+" --help` shows what it takes", "unexpected argument %q", args[0])
	}
	return nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "sallyport", version())
			return err
		},
	}
}

// version is that of the module or, in a build from a checkout, of the commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "devel"
}
