package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/gateway"
	"sallyport.dev/segment"
)

// edge is the flags of `sallyport gateway`.
type edge struct {
	name           string
	trustDomain    string
	controlPlane   string
	controlPlaneID string
	identity       string
	state          string
	budgets        budgetFlags
	envoy          string
	concurrency    int
	logFormat      string
}

func gatewayCommand() *cobra.Command {
	var e edge
	cmd := &cobra.Command{
		Use:   "gateway --name NAME --control-plane HOST:PORT",
		Short: "Run a gateway whose control plane is on another machine",
		Long: `Gateway keeps an Envoy running that takes its identity from the agent of this machine (or any SPIFFE provider
with SDS, like SPIRE's agent) and everything else from the control plane, which knows it by a Gateway document.
While the control plane is away it goes on with what it has.`,
		Example: "  sallyport gateway --name edge --control-plane plane.internal:9444",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return e.run(cmd.Context(), cmd.ErrOrStderr()) },
	}
	flags := cmd.Flags()
	flags.StringVar(&e.name, "name", "", "`NAME` of its Gateway document (needed)")
	flags.StringVar(&e.controlPlane, "control-plane", "", "`HOST:PORT` at which the control plane has its --gateway-listen (needed)")
	flags.StringVar(&e.controlPlaneID, "control-plane-id", "/controlplane", "`PATH` of the control plane's SPIFFE ID, if another provider issued it")
	flags.StringVar(&e.trustDomain, "trust-domain", "example.org", "trust domain `NAME`")
	flags.StringVar(&e.identity, "identity", "unix://"+defaultWorkloadSocket(), "`ADDRESS` of the SDS socket of this machine's agent, as in unix:///run/sallyport/workload.sock")
	flags.StringVar(&e.state, "state", filepath.Join(defaultState(), "gateway"), "`DIR` for what Envoy reads, and for the counters of budgets")
	e.budgets.add(flags)
	envoyFlags(flags, &e.envoy, &e.concurrency)
	logFlag(flags, &e.logFormat)
	return cmd
}

func (e *edge) run(ctx context.Context, errOut io.Writer) error {
	log, err := logger(e.logFormat, errOut)
	if err != nil {
		return err
	}
	td, err := spiffeid.TrustDomainFromString(e.trustDomain)
	if err != nil {
		return usage("a trust domain looks like example.org", "--trust-domain: %w", err)
	}
	if e.name == "" {
		return usage("give the name of its Gateway document, as in --name edge", "--name is missing")
	}
	own, err := spiffeid.FromSegments(td, "gateway", e.name)
	if err != nil {
		return usage("give the name of its Gateway document, as in --name edge", "--name: %w", err)
	}
	plane, err := spiffeid.FromPath(td, e.controlPlaneID)
	if err != nil {
		return usage("it is a path in the trust domain, as in --control-plane-id /controlplane", "--control-plane-id: %w", err)
	}
	address, err := addressFlag("--control-plane", e.controlPlane, "plane.internal:9444")
	if err != nil {
		return err
	}
	socket, err := providerSocket(e.identity)
	if err != nil {
		return err
	}
	binary, err := findEnvoy(ctx, e.envoy)
	if err != nil {
		return err
	}
	state, err := openState(e.state)
	if err != nil {
		return err
	}
	defer state.close()
	if c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket); err == nil {
		c.Close()
	} else { // Envoy is patient and says nothing
		log.Warn("no agent is there yet: the gateway serves nobody until it comes", "identity", e.identity, "error", err)
	}
	budgets, err := e.budgets.open(state, log)
	if err != nil {
		return err
	}
	admin := filepath.Join(state.run, "envoy.sock")
	supervisor := &gateway.Supervisor{
		Binary: binary, Folder: state.run, Concurrency: e.concurrency, Log: log,
		Bootstrap: envoy.Bootstrap(segment.GatewayName(e.name), envoy.Sockets{Identity: socket, Admin: admin, Budget: budgets.socket.Addr().String(),
			Remote: &envoy.Remote{Address: address, ID: plane, Own: own}}),
		Started: func(pid int) {
			log.Info("envoy started", "gateway", e.name, "caller", own.String(), "control_plane", e.controlPlane, "identity", e.identity, "pid", pid)
		},
	}
	running, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() {
		lastReports(admin)
		end()
	})()
	group, failing := errgroup.WithContext(running)
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	budgets.serve(serving, group)
	group.Go(func() error {
		defer stopServing()
		return supervisor.Run(failing)
	})
	err = group.Wait()
	log.Info("stopped")
	return err
}

// addressOf reads a host and a port.
func addressOf(s string) (segment.Address, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return segment.Address{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" {
		return segment.Address{}, fmt.Errorf("%q is no host and port", s)
	}
	return segment.Address{Host: host, Port: uint16(n)}, nil
}

// addressFlag reads the host and the port of a flag that must be given.
func addressFlag(flag, value, example string) (segment.Address, error) {
	if value == "" {
		return segment.Address{}, usage("as in "+flag+" "+example, "%s is missing", flag)
	}
	a, err := addressOf(value)
	if err != nil {
		return a, usage("as in "+flag+" "+example, "%s: %w", flag, err)
	}
	return a, nil
}
