package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/catalog"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/filesource"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/controlplane/xds"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/disk"
	"sallyport.dev/identity/federation"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node"
	"sallyport.dev/identity/provider"
	"sallyport.dev/segment"
	"sallyport.dev/telemetry"
	"sallyport.dev/telemetry/export"
	"sallyport.dev/telemetry/ingest"
	"sallyport.dev/telemetry/store"
)

// planeFlags are what every control plane is told.
type planeFlags struct {
	deployment
	documents string
	state     string
	otlp      string
	logFormat string
	poll      time.Duration

	agentListen   string // empty: nowhere
	gatewayListen string
	x509pop       string // path of the authorities that attest machines; empty: none
	identity      string // of whose Workload API we are a workload, and issue nothing; empty: we issue
	ca            caFlags
	federation    federationFlags
}

func (f *planeFlags) add(flags *pflag.FlagSet) {
	flags.StringVarP(&f.documents, "file", "f", "", "`DIR` or file with the documents (needed)")
	stateFlag(flags, &f.state)
	flags.StringVar(&f.otlp, "otlp-listen", "127.0.0.1:4317", "`ADDRESS` and port on which applications send spans (OTLP/gRPC); empty: nowhere")
	flags.DurationVar(&f.poll, "poll", 2*time.Second, "ask vector stores what they hold once every `DURATION`")
	flags.StringVar(&f.agentListen, "agent-listen", f.agentListen, "`ADDRESS` and port on which agents of other machines are attested; empty: nowhere")
	flags.StringVar(&f.gatewayListen, "gateway-listen", f.gatewayListen, "`ADDRESS` and port on which gateways of other machines are programmed; empty: nowhere")
	flags.StringVar(&f.x509pop, "x509pop-ca", "", "`PATH` of the authorities (PEM) whose certificates attest machines")
	flags.StringVar(&f.identity, "identity", "", "`PROVIDER` that issues all identities instead of us: spire:unix:///PATH of its Workload API")
	f.ca.add(flags)
	f.federation.add(flags)
	logFlag(flags, &f.logFormat)
}

func logFlag(flags *pflag.FlagSet, into *string) {
	flags.StringVar(into, "log-format", "text", "`FORMAT`: text or json")
}

func logger(format string, w io.Writer) (*slog.Logger, error) {
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, nil)), nil
	}
	return nil, usage("use --log-format text or --log-format json", "unknown log format %q", format)
}

// plane is a control plane. Its commands make it with newPlane, give it sinks, start its servers and run it.
type plane struct {
	planeFlags
	options v1alpha1.Options
	log     *slog.Logger
	state   *stateFolder

	keeper       *disk.Keeper
	local        *issuer.Local // signs with what the keeper has
	own          *ownSVID
	identities   *issuer.Issuer
	trusting     sync.Mutex
	bundles      bundles
	follower     *federation.Follower
	provider     *provider.Source // nil: we are the provider; else all of the above is nil
	tokenIssuers *federation.Issuers
	tokenKeys    *tokenKeys
	gateways     *xds.Server
	lists        *catalog.Catalog
	records      *store.Store
	forward      *export.Exporter // nil: spans stay here
	documents    chan v1alpha1.Snapshot
	tried        chan v1alpha1.Snapshot // of the shadow folder; nil: there is none
	pipeline     *controlplane.Pipeline

	otlpListener   net.Listener // nil: none
	operatorSocket net.Listener

	// For other machines; nil: none.
	nodes           *node.Server
	agentListener   net.Listener
	gatewayListener net.Listener
	bundleListener  net.Listener
	bundleServer    *http.Server
}

// newPlane opens what a control plane needs, and starts nothing.
func newPlane(ctx context.Context, f planeFlags, options v1alpha1.Options, log *slog.Logger) (*plane, error) {
	if f.documents == "" {
		return nil, usage("name the folder that holds the documents with -f DIR", "-f is missing")
	}
	if _, err := os.Stat(f.documents); err != nil {
		return nil, failed("make the folder first; it may be empty, and then everything is denied", "read documents: %w", err)
	}
	if f.shadow != "" {
		if err := apart(f.documents, f.shadow); err != nil {
			return nil, err
		}
	}
	if err := f.federation.check(); err != nil {
		return nil, err
	}
	state, err := openState(f.state)
	if err != nil {
		return nil, err
	}
	p := &plane{planeFlags: f, options: options, log: log, state: state}
	if err := p.open(ctx); err != nil {
		state.close()
		return nil, err
	}
	return p, nil
}

func (p *plane) open(ctx context.Context) error {
	p.tokenKeys = newTokenKeys()
	err := p.openTokenIssuers()
	if err != nil {
		return err
	}
	sinks := []controlplane.Sink{issuing{p.tokenIssuers}, published{p}}
	if p.identity != "" {
		err = p.openProvider()
	} else if err = p.openIssuer(ctx); err == nil {
		sinks = append([]controlplane.Sink{federated{p.follower}}, sinks...)
	}
	if err != nil {
		return err
	}
	p.records = store.New(store.Config{Path: filepath.Join(p.state.dir, "telemetry.db"), Log: p.log})
	if p.forward, err = export.FromEnvironment(p.log); err != nil {
		return failed("see the OTEL_EXPORTER_OTLP_* variables in the OpenTelemetry specification", "export traces: %w", err)
	}
	p.gateways = xds.New()
	names := make(chan envoy.Names, 1)
	p.lists = &catalog.Catalog{
		Learned: func(n envoy.Names) { newest(names, n) },
		InForce: p.inForce,
		Every:   p.poll,
		Log:     p.log,
	}
	p.documents = make(chan v1alpha1.Snapshot)
	if p.shadow != "" {
		p.tried = make(chan v1alpha1.Snapshot)
	}
	p.pipeline = &controlplane.Pipeline{
		Options: p.options, Documents: p.documents, Shadow: p.tried, Names: names, Keys: p.tokenKeys.changed, Log: p.log,
	}
	p.pipeline.Sinks = append(sinks, p.lists)
	if p.operatorSocket, err = p.state.listen("operator.sock"); err != nil {
		return err
	}
	if p.otlp != "" {
		if p.otlpListener, err = net.Listen("tcp", p.otlp); err != nil {
			return failed("name another with --otlp-listen, or none with --otlp-listen=", "receive spans: %w", err)
		}
	}
	if err := p.openBundleEndpoint(); err != nil {
		return err
	}
	return p.openFleet()
}

// openIssuer makes us the identity provider.
func (p *plane) openIssuer(ctx context.Context) error {
	p.local = &issuer.Local{Issuer: p.federation.issuer}
	p.own = p.newOwnSVID()
	p.identities = issuer.New(issuer.Config{Certifier: p.local, Attest: attest.Selectors})
	if err := p.openAuthority(ctx); err != nil {
		return err
	}
	p.own.Renew(ctx) // so that whoever comes first finds one
	var err error
	p.follower, err = federation.New(federation.Config{
		TrustDomain: p.options.TrustDomain, Own: func() *spiffebundle.Bundle { return p.bundles.now().Own },
		Dir: filepath.Join(p.state.dir, "federation"), Log: p.log,
		Publish: func(b federation.Bundles) { p.trust(func(to *issuer.Bundles) { to.Federated = b }) },
	})
	return err
}

// asking is the gateway in whose name a request to the catalogue comes.
type asking struct{}

// inForce waits for the gateway that asks to have taken what was published last.
func (p *plane) inForce(ctx context.Context) error {
	name, _ := ctx.Value(asking{}).(segment.GatewayName)
	return p.gateways.WaitInForce(ctx, name)
}

// reports are the services that gateways report to.
func (p *plane) reports(s *grpc.Server) {
	traces := ingest.TracesConfig{Source: telemetry.FromGateway, Spans: p.records}
	if p.forward != nil {
		traces.Forward = p.forward
	}
	ingest.NewAccessLog(stamped{p.records, p.gateways}).Register(s)
	collectorpb.RegisterTraceServiceServer(s, ingest.NewTraces(traces))
}

// run serves until the context ends. Then what start has started ends first: what a gateway serves and reports until
// then needs the servers, whose context is serving. The store ends last.
func (p *plane) run(ctx context.Context, about operator.About, start func(group *errgroup.Group, ctx, serving context.Context, stopServing func()) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()

	about.Version, about.Started, about.TrustDomain = version(), time.Now(), p.options.TrustDomain
	about.AgentListen, about.GatewayListen = p.agentListen, p.gatewayListen
	p.federation.about(&about)
	serveHTTP(serving, group, (&operator.Server{
		About: about, Pipeline: p.pipeline, Gateways: p.gateways, Federation: p.federatedWith(), Issuers: p.tokenIssuers, Store: p.records, Actions: p.actions(),
	}).Handler(), p.operatorSocket)
	p.serveIdentity(serving, group)
	if p.otlpListener != nil {
		applications := grpc.NewServer()
		collectorpb.RegisterTraceServiceServer(applications, ingest.NewTraces(ingest.TracesConfig{
			Source: telemetry.FromApplication, Spans: p.records}))
		serveGRPC(serving, group, applications, p.otlpListener)
	}
	p.serveBundleEndpoint(serving, group)
	p.serveFleet(serving, group)
	storeCtx, storeStop := context.WithCancel(context.WithoutCancel(ctx))
	storeDone := make(chan struct{})
	go func() {
		defer close(storeDone)
		_ = p.records.Run(storeCtx) // always nil: a disk that fails is no reason to end
	}()
	err := start(group, ctx, serving, stopServing)
	if err == nil {
		group.Go(func() error { return filesource.Source{Path: p.planeFlags.documents, Log: p.log}.Run(ctx, p.documents) })
		if p.tried != nil {
			group.Go(func() error { return filesource.Source{Path: p.shadow, Log: p.log}.Run(ctx, p.tried) })
		}
		group.Go(func() error { return p.pipeline.Run(ctx) })
		group.Go(func() error { return p.lists.Run(serving) })
		if p.forward != nil {
			group.Go(func() error { return p.forward.Run(serving) })
		}
		err = group.Wait()
	} else {
		stop()
		stopServing()
		_ = group.Wait() // the first error is the one that counts
	}
	storeStop()
	<-storeDone
	p.log.Info("stopped")
	return err
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

// published is the sink that tells the gateways.
type published struct{ plane *plane }

func (s published) Publish(ctx context.Context, g *controlplane.Generation) error {
	for name, r := range g.Resources {
		if err := s.plane.gateways.Publish(ctx, name, string(g.Digest), r); err != nil {
			return fmt.Errorf("tell gateway %s: %w", name, err)
		}
	}
	s.plane.keep(g)
	return nil
}

// keep ends the streams of gateways that no document names, or whose agent is revoked.
func (p *plane) keep(g *controlplane.Generation) {
	p.gateways.Keep(func(name segment.GatewayName) bool {
		i := slices.IndexFunc(g.Config.Gateways, func(known segment.Gateway) bool { return known.Name == name })
		return i >= 0 && p.admissible(&g.Config.Gateways[i]) == nil
	})
}

func (p *plane) keepGateways() {
	if g := p.pipeline.State().Generation; g != nil {
		p.keep(g)
	}
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

// gatewayEntry is the identity of a gateway: as a server it has the names of its endpoints, and it knows the bundles of
// all trust domains whose members may come.
func gatewayEntry(g *controlplane.Generation, gateway *segment.Gateway) issuer.Entry {
	e := issuer.Entry{ID: gateway.ID, Selectors: gateway.Selectors, TTL: gateway.SVIDTTL, FederatesAll: true}
	for i := range g.Config.Endpoints {
		if end := &g.Config.Endpoints[i]; gateway.Serves(end.Name) {
			e.DNSNames = append(e.DNSNames, end.Hostnames...)
		}
	}
	return e
}

// workloadEntry is the identity of a workload.
func workloadEntry(w *segment.Workload, ttl time.Duration) issuer.Entry {
	return issuer.Entry{ID: w.ID, Selectors: w.Selectors, TTL: ttl, FederatesWith: w.FederatesWith}
}
