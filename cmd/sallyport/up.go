package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/gateway"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/controlplane/xds"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/sds"
	"sallyport.dev/identity/workloadapi"
	"sallyport.dev/segment"
)

// up is the flags of the command.
type up struct {
	planeFlags
	budgets     budgetFlags
	workload    string
	envoy       string
	concurrency int
}

func upCommand() *cobra.Command {
	var u up
	cmd := &cobra.Command{
		Use:   "up -f DIR",
		Short: "Run control plane, identity provider and gateway on this machine",
		Long: `Up does everything in one process, with Envoy as a child: it reads the documents of a folder and follows every
change, issues SPIFFE identities over the Workload API, programs the gateway, and records what passes it. It
ends with Ctrl-C. What it must keep is in the state folder: the same CA and the same records after a restart.

Envoy ` + gateway.Version + ` is taken from --envoy or $ENVOY, else from PATH, else from .parts/bin.`,
		Example: "  sallyport up -f documents/",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return u.run(cmd.Context(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	u.planeFlags.add(flags)
	u.deployment.add(flags)
	u.budgets.add(flags)
	flags.StringVar(&u.workload, "workload-socket", defaultWorkloadSocket(), "`PATH` of the Unix socket of the SPIFFE Workload API and SDS")
	envoyFlags(flags, &u.envoy, &u.concurrency)
	return cmd
}

func (u *up) run(ctx context.Context, errOut io.Writer) error {
	options, err := u.options()
	if err != nil {
		return err
	}
	log, err := logger(u.logFormat, errOut)
	if err != nil {
		return err
	}
	binary, err := findEnvoy(ctx, u.envoy)
	if err != nil {
		return err
	}
	if err := free(u.deployment.listen); err != nil {
		return err
	}
	p, err := newPlane(ctx, u.planeFlags, options, log)
	if err != nil {
		return err
	}
	defer p.state.close()
	own := *options.Gateway
	first := firstSink(make(chan struct{}))
	// Whom the gateway is must be known before it is told anything.
	p.pipeline.Sinks = append(p.pipeline.Sinks, first)
	var identitySocket net.Listener // nil: the provider's
	if p.provider == nil {
		p.pipeline.Sinks = slices.Insert(p.pipeline.Sinks, 0, controlplane.Sink(entries{p.identities, binary, own}))
		if identitySocket, err = listenUnix(u.workload, 0o777, 0o755, "name another path with --workload-socket"); err != nil {
			return err
		}
	} else if u.workload, err = providerSocket(u.identity); err != nil {
		return err
	}
	controlSocket, err := p.state.listen("control.sock")
	if err != nil {
		return err
	}
	catalogSocket, err := p.state.listen("catalog.sock")
	if err != nil {
		return err
	}
	budgets, err := u.budgets.open(p.state, log)
	if err != nil {
		return err
	}
	envoySocket := filepath.Join(p.state.run, "envoy.sock")
	supervisor := &gateway.Supervisor{
		Binary: binary, Folder: p.state.run, Concurrency: u.concurrency, Log: log,
		Bootstrap: envoy.Bootstrap(own.Name, envoy.Sockets{
			Control: controlSocket.Addr().String(), Identity: u.workload,
			Catalog: catalogSocket.Addr().String(), Budget: budgets.socket.Addr().String(), Admin: envoySocket}),
	}
	about := operator.About{Listen: u.deployment.listen, Workload: u.workload, OTLP: u.otlp}
	return p.run(ctx, about, func(group *errgroup.Group, ctx, serving context.Context, stopServing func()) error {
		if identitySocket != nil {
			identityServer := grpc.NewServer(openToAll(attest.NewCredentials())...)
			workloadapi.Register(identityServer, p.identities)
			sds.Register(identityServer, p.identities, log)
			serveGRPC(serving, group, identityServer, identitySocket)
		}

		control := grpc.NewServer(grpc.MaxRecvMsgSize(64<<20), xds.Endable())
		p.gateways.Register(serving, control, nil)
		p.reports(control)
		serveGRPC(serving, group, control, controlSocket)
		serveHTTP(serving, group, askedBy(own.Name, p.lists), catalogSocket)
		budgets.serve(serving, group)

		group.Go(func() error {
			defer stopServing()
			select {
			case <-first: // Envoy may ask for its identity only when there is one
				running, end := context.WithCancel(context.WithoutCancel(ctx))
				defer end()
				defer context.AfterFunc(ctx, func() {
					lastReports(envoySocket)
					end()
				})()
				return supervisor.Run(running)
			case <-ctx.Done():
				return nil
			}
		})
		group.Go(func() error { return announce(ctx, p, u) })
		return nil
	})
}

// askedBy notes in whose name the catalogue is asked.
func askedBy(name segment.GatewayName, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), asking{}, name)))
	})
}

// announce says when the first generation is in force and callers are answered. Envoy takes a listener a moment before
// it accepts connections.
func announce(ctx context.Context, p *plane, u *up) error {
	own := p.options.Gateway
	if err := p.gateways.WaitInForce(ctx, own.Name); err != nil {
		return nil //nolint:nilerr // it was told to end before
	}
	for tick := time.Tick(10 * time.Millisecond); p.pipeline.State().Generation.Resources[own.Name].Listeners != nil; {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", own.Listen.String())
		if err == nil {
			c.Close()
			break
		}
		select {
		case <-tick:
		case <-ctx.Done():
			return nil
		}
	}
	p.log.Info("ready", "gateway", own.Name, "listen", u.deployment.listen, "trust_domain", p.options.TrustDomain,
		"workload_socket", u.workload, "state", u.state)
	return nil
}

func findEnvoy(ctx context.Context, asked string) (string, error) {
	path, err := gateway.Find(ctx, asked, ".parts/bin")
	if err != nil {
		return "", failed("`make parts` fetches the right one; name another with --envoy or $ENVOY", "find Envoy %s: %w", gateway.Version, err)
	}
	if path, err = filepath.EvalSymlinks(path); err == nil {
		path, err = filepath.Abs(path)
	}
	return path, err
}

// free reports whether the address can be bound, before anything is started.
func free(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return failed("name another address with --listen, or stop the program that has this one", "listen for callers: %w", err)
	}
	return l.Close()
}

// entries is the sink that tells the issuer who may hold which identity on this machine.
type entries struct {
	issuer  *issuer.Issuer
	binary  string // the Envoy that may be the gateway
	gateway segment.Gateway
}

func (s entries) Publish(_ context.Context, g *controlplane.Generation) error {
	all := []issuer.Entry{gatewayEntry(g, &s.gateway)}
	all[0].Selectors = []segment.Selector{
		{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())},
		{Type: "unix", Value: "path:" + s.binary},
	}
	for i := range g.Config.Workloads {
		if w := &g.Config.Workloads[i]; len(w.Nodes) == 0 {
			all = append(all, workloadEntry(w, s.gateway.SVIDTTL))
		}
	}
	s.issuer.Set(all)
	return nil
}

// firstSink is closed with the first generation.
type firstSink chan struct{}

func (s firstSink) Publish(context.Context, *controlplane.Generation) error {
	select {
	case <-s:
	default:
		close(s)
	}
	return nil
}
