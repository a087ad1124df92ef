package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/spf13/cobra"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/catalog"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/filesource"
	"sallyport.dev/controlplane/gateway"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/controlplane/xds"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/disk"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/sds"
	"sallyport.dev/identity/workloadapi"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/telemetry/export"
	"sallyport.dev/telemetry/ingest"
	"sallyport.dev/telemetry/store"
)

// up is the flags of the command.
type up struct {
	deployment
	documents   string
	state       string
	workload    string
	otlp        string
	envoy       string
	concurrency int
	logFormat   string
	poll        time.Duration
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
	flags.StringVarP(&u.documents, "file", "f", "", "`DIR` or file with the documents (needed)")
	stateFlag(flags, &u.state)
	flags.StringVar(&u.workload, "workload-socket", defaultWorkloadSocket(), "`PATH` of the Unix socket of the SPIFFE Workload API and SDS")
	flags.StringVar(&u.otlp, "otlp-listen", "127.0.0.1:4317", "`ADDRESS` and port on which applications send spans (OTLP/gRPC); empty: nowhere")
	flags.StringVar(&u.envoy, "envoy", os.Getenv("ENVOY"), "`PATH` of Envoy")
	flags.IntVar(&u.concurrency, "envoy-threads", 0, "`N` worker threads of Envoy; 0: one for each core")
	flags.DurationVar(&u.poll, "poll", 2*time.Second, "ask vector stores what they hold once every `DURATION`")
	flags.StringVar(&u.logFormat, "log-format", "text", "`FORMAT`: text or json")
	u.add(flags)
	return cmd
}

func (u *up) run(ctx context.Context, errOut io.Writer) error {
	if u.documents == "" {
		return usage("`sallyport up -f DIR`, where DIR holds the documents", "-f is missing")
	}
	if _, err := os.Stat(u.documents); err != nil {
		return failed("make the folder first; it may be empty, and then everything is denied", "read documents: %w", err)
	}
	options, err := u.options()
	if err != nil {
		return err
	}
	log, err := u.logger(errOut)
	if err != nil {
		return err
	}
	binary, err := findEnvoy(ctx, u.envoy)
	if err != nil {
		return err
	}
	if err := free(u.listen); err != nil {
		return err
	}
	state, err := openState(u.state)
	if err != nil {
		return err
	}
	defer state.close()
	authority, err := disk.Open(filepath.Join(state.dir, "ca"), options.TrustDomain, time.Now())
	if err != nil {
		return err
	}

	// --- the parts ---

	records := store.New(store.Config{Path: filepath.Join(state.dir, "telemetry.db"), Log: log})
	forward, err := export.FromEnvironment(log)
	if err != nil {
		return failed("see the OTEL_EXPORTER_OTLP_* variables in the OpenTelemetry specification", "export traces: %w", err)
	}
	traces := ingest.TracesConfig{Source: telemetry.FromGateway, Spans: records}
	if forward != nil {
		traces.Forward = forward
	}
	identities := issuer.New(issuer.Config{Authority: authority, Attest: attest.Selectors})
	gateways := xds.New()
	names := make(chan envoy.Names, 1)
	lists := &catalog.Catalog{
		Learned: func(n envoy.Names) { newest(names, n) },
		InForce: func(ctx context.Context) error { return gateways.WaitInForce(ctx, options.Gateway.Name) },
		Every:   u.poll,
		Log:     log,
	}
	documents := make(chan v1alpha1.Snapshot)
	first := firstSink(make(chan struct{}))
	pipeline := &controlplane.Pipeline{
		Options: options, Documents: documents, Names: names, Log: log,
		Sinks: []controlplane.Sink{
			entries{identities, binary, options.Gateway},
			published{gateways, options.Gateway.Name},
			lists,
			first,
		},
	}

	// --- the sockets ---

	identitySocket, err := listenUnix(u.workload, 0o777, 0o755, "name another path with --workload-socket")
	if err != nil {
		return err
	}
	controlSocket, err := state.listen("control.sock")
	if err != nil {
		return err
	}
	catalogSocket, err := state.listen("catalog.sock")
	if err != nil {
		return err
	}
	operatorSocket, err := state.listen("operator.sock")
	if err != nil {
		return err
	}
	var otlpListener net.Listener
	if u.otlp != "" {
		if otlpListener, err = net.Listen("tcp", u.otlp); err != nil {
			return failed("name another with --otlp-listen, or none with --otlp-listen=", "receive spans: %w", err)
		}
	}

	// --- the servers ---

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	// At the end Envoy goes first: what it serves and reports until then needs the servers. They end with serving, and
	// the store after them.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	identityServer := grpc.NewServer(openToAll(attest.NewCredentials())...)
	workloadapi.Register(identityServer, identities)
	sds.Register(identityServer, identities, log)
	serveGRPC(serving, group, identityServer, identitySocket)

	control := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	gateways.Register(serving, control)
	accesslogv3.RegisterAccessLogServiceServer(control, ingest.NewAccessLog(stamped{records, gateways}))
	collectorpb.RegisterTraceServiceServer(control, ingest.NewTraces(traces))
	serveGRPC(serving, group, control, controlSocket)

	if otlpListener != nil {
		applications := grpc.NewServer()
		collectorpb.RegisterTraceServiceServer(applications, ingest.NewTraces(ingest.TracesConfig{
			Source: telemetry.FromApplication, Spans: records}))
		serveGRPC(serving, group, applications, otlpListener)
	}
	serveHTTP(serving, group, lists, catalogSocket)
	serveHTTP(serving, group, (&operator.Server{
		About: operator.About{Version: version(), Started: time.Now(), TrustDomain: options.TrustDomain,
			Listen: u.listen, Workload: u.workload, OTLP: u.otlp},
		Pipeline: pipeline, Gateways: gateways, Store: records,
	}).Handler(), operatorSocket)

	group.Go(func() error { return filesource.Source{Path: u.documents, Log: log}.Run(ctx, documents) })
	group.Go(func() error { return pipeline.Run(ctx) })
	group.Go(func() error { return lists.Run(serving) })
	if forward != nil {
		group.Go(func() error { return forward.Run(serving) })
	}

	storeCtx, storeStop := context.WithCancel(context.WithoutCancel(ctx))
	storeDone := make(chan struct{})
	go func() {
		defer close(storeDone)
		_ = records.Run(storeCtx) // always nil: a disk that fails is no reason to end
	}()

	envoySocket := filepath.Join(state.run, "envoy.sock")
	supervisor := &gateway.Supervisor{
		Binary: binary, Folder: state.run, Concurrency: u.concurrency, Log: log,
		Bootstrap: envoy.Bootstrap(options.Gateway.Name, envoy.Sockets{
			Control: controlSocket.Addr().String(), Identity: u.workload,
			Catalog: catalogSocket.Addr().String(), Admin: envoySocket}),
	}
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
	group.Go(func() error { return announce(ctx, log, gateways, pipeline, u) })

	err = group.Wait()
	storeStop()
	<-storeDone
	log.Info("stopped")
	return err
}

// announce says when the first generation is in force and callers are answered. Envoy takes a listener a moment before
// it accepts connections.
func announce(ctx context.Context, log *slog.Logger, gateways *xds.Server, pipeline *controlplane.Pipeline, u *up) error {
	options := pipeline.Options
	if err := gateways.WaitInForce(ctx, options.Gateway.Name); err != nil {
		return nil //nolint:nilerr // it was told to end before
	}
	for tick := time.Tick(10 * time.Millisecond); pipeline.State().Generation.Resources.Listeners != nil; {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", options.Gateway.Listen.String())
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
	log.Info("ready", "gateway", options.Gateway.Name, "listen", u.listen, "trust_domain", options.TrustDomain,
		"workload_socket", u.workload, "state", u.state)
	return nil
}

func (u *up) logger(w io.Writer) (*slog.Logger, error) {
	switch u.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, nil)), nil
	}
	return nil, usage("use --log-format text or --log-format json", "unknown log format %q", u.logFormat)
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

// newest replaces whatever a channel of size 1 holds.
func newest[T any](c chan T, v T) {
	for {
		select {
		case c <- v:
			return
		default:
		}
		select {
		case <-c:
		default:
		}
	}
}

// entries is the sink that tells the issuer who may hold which identity.
type entries struct {
	issuer  *issuer.Issuer
	binary  string // the Envoy that may be the gateway
	gateway segment.Gateway
}

func (s entries) Publish(_ context.Context, g *controlplane.Generation) error {
	var hosts []string
	for _, e := range g.Config.Endpoints {
		hosts = append(hosts, e.Hostnames...)
	}
	all := []issuer.Entry{{
		ID: s.gateway.ID,
		Selectors: []segment.Selector{
			{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())},
			{Type: "unix", Value: "path:" + s.binary},
		},
		DNSNames: hosts,
		TTL:      s.gateway.SVIDTTL,
	}}
	for _, w := range g.Config.Workloads {
		all = append(all, issuer.Entry{ID: w.ID, Selectors: w.Selectors, TTL: s.gateway.SVIDTTL})
	}
	s.issuer.Set(all)
	return nil
}

// published is the sink that tells the gateway.
type published struct {
	gateways *xds.Server
	gateway  segment.GatewayName
}

func (s published) Publish(ctx context.Context, g *controlplane.Generation) error {
	return s.gateways.Publish(ctx, s.gateway, string(g.Digest), g.Resources)
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

// stamped adds to a flow the generation that its gateway had in force when it was reported.
type stamped struct {
	to       *store.Store
	gateways *xds.Server
}

func (s stamped) Add(f telemetry.Flow) {
	f.Generation = controlplane.Digest(s.gateways.InForce(f.Gateway)).Short()
	s.to.Add(f)
}
