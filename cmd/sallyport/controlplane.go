package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/controlplane/operator"
)

func controlplaneCommand() *cobra.Command {
	f := planeFlags{agentListen: "0.0.0.0:9443", gatewayListen: "0.0.0.0:9444"}
	cmd := &cobra.Command{
		Use:   "controlplane -f DIR",
		Short: "Run a control plane for gateways and workloads on other machines",
		Long: `Controlplane does what ` + "`sallyport up`" + ` does but for the gateway: it reads documents, issues identities to the agents of
other machines, and programs gateways there. Each machine runs one ` + "`sallyport agent`" + `, and ` + "`sallyport gateway`" + ` where
a Gateway document says so. All links are mTLS with SPIFFE IDs on both sides.`,
		Example: `  sallyport controlplane -f documents/
  sallyport ca export > bundle.pem             # for the agents: whom to believe
  sallyport token create --node host-a > token # for one machine, once`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.identity != "" && !cmd.Flags().Changed("agent-listen") {
				f.agentListen = "" // the provider has agents of its own
			}
			return runControlplane(cmd.Context(), f, cmd.ErrOrStderr())
		},
	}
	f.add(cmd.Flags())
	f.addIdentity(cmd.Flags())
	return cmd
}

func runControlplane(ctx context.Context, f planeFlags, errOut io.Writer) error {
	options, err := f.identityOptions()
	if err != nil {
		return err
	}
	log, err := logger(f.logFormat, errOut)
	if err != nil {
		return err
	}
	for _, l := range [][2]string{{"--agent-listen", f.agentListen}, {"--gateway-listen", f.gatewayListen}} {
		if _, err := addressOf(l[1]); l[1] != "" && err != nil {
			return usage("give an address and a port, as in 0.0.0.0:9443, or none with "+l[0]+"=", "%s: %w", l[0], err)
		}
	}
	p, err := newPlane(ctx, f, options, log)
	if err != nil {
		return err
	}
	defer p.state.close()
	about := operator.About{OTLP: f.otlp, AgentListen: f.agentListen, GatewayListen: f.gatewayListen}
	return p.run(ctx, about, func(group *errgroup.Group, ctx, _ context.Context, stopServing func()) error {
		group.Go(func() error {
			<-ctx.Done()
			stopServing()
			return nil
		})
		log.Info("ready", "agents", f.agentListen, "gateways", f.gatewayListen, "trust_domain", options.TrustDomain, "state", f.state)
		return nil
	})
}
