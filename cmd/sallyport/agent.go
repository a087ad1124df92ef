package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"sallyport.dev/identity/agent"
	"sallyport.dev/identity/attest"
	"sallyport.dev/identity/forward"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/identity/sds"
	"sallyport.dev/identity/workloadapi"
)

// host is the flags of `sallyport agent`.
type host struct {
	controlPlane string
	trustDomain  string
	trustBundle  string
	tokenFile    string
	x509Cert     string
	x509Key      string
	state        string
	workload     string
	logFormat    string
	connect      string
	gateway      string
	gatewayName  string
	endpoints    map[string]string
}

func agentCommand() *cobra.Command {
	var h host
	cmd := &cobra.Command{
		Use:   "agent --control-plane HOST:PORT",
		Short: "Give the workloads of this machine their identities",
		Long: `Agent is attested by the control plane, once with a join token or by a certificate of the machine, and serves the SPIFFE
Workload API and SDS to the workloads that documents say may run here. Keys are made on this machine and never leave it.
While the control plane is away it goes on with what it has, and renews as soon as it can.

With --connect, applications that know nothing of TLS reach endpoints by plain HTTP on this machine, each as the workload
that it is. The control plane says where: at which endpoints a grant names a workload of this machine, and where their
gateways are. --gateway, --gateway-name and --endpoint say it instead.

The join token is read from --join-token-file, or from $SALLYPORT_JOIN_TOKEN.`,
		Example: `  sallyport agent --control-plane plane.internal:9443 --trust-bundle bundle.pem --join-token-file token
  sallyport agent --control-plane plane.internal:9443 --trust-bundle bundle.pem --join-token-file token --connect 127.0.0.1:8080
  curl http://127.0.0.1:8080/chat/v1/models`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return h.run(cmd.Context(), cmd.ErrOrStderr()) },
	}
	flags := cmd.Flags()
	flags.StringVar(&h.controlPlane, "control-plane", "", "`HOST:PORT` at which the control plane has its --agent-listen (needed)")
	flags.StringVar(&h.trustDomain, "trust-domain", "example.org", "trust domain `NAME`")
	flags.StringVar(&h.trustBundle, "trust-bundle", "", "`PATH` of the trust domain's bundle, as `sallyport ca export` prints it: whom to believe at first")
	flags.StringVar(&h.tokenFile, "join-token-file", "", "`PATH` of a file with a join token of `sallyport token create`")
	flags.StringVar(&h.x509Cert, "x509pop-cert", "", "`PATH` of this machine's certificate chain (PEM), instead of a join token")
	flags.StringVar(&h.x509Key, "x509pop-key", "", "`PATH` of its private key (PEM)")
	flags.StringVar(&h.state, "state", filepath.Join(defaultState(), "agent"), "`DIR` with the agent's key and what it knows")
	flags.StringVar(&h.workload, "workload-socket", defaultWorkloadSocket(), "`PATH` of the Unix socket of the SPIFFE Workload API and SDS")
	flags.StringVar(&h.connect, "connect", "", "`ADDRESS` on which applications that know nothing of TLS reach endpoints: 127.0.0.1:PORT, or unix:///PATH; empty: none")
	flags.StringVar(&h.gateway, "gateway", "", "`HOST:PORT` of the gateway that --connect leads to, instead of those that the control plane says")
	flags.StringVar(&h.gatewayName, "gateway-name", "", "`NAME` of that gateway: whom it must prove to be")
	flags.StringToStringVar(&h.endpoints, "endpoint", nil, "`NAME=HOSTNAME` of an endpoint at --gateway that --connect serves below /NAME, beside those that the control plane says; may be repeated")
	flags.Lookup("endpoint").DefValue = "" // help would show [] as a default
	logFlag(flags, &h.logFormat)
	return cmd
}

func (h *host) run(ctx context.Context, errOut io.Writer) error {
	log, err := logger(h.logFormat, errOut)
	if err != nil {
		return err
	}
	c, err := h.config()
	if err != nil {
		return err
	}
	c.Log = log
	ways, err := h.ways()
	if err != nil {
		return err
	}
	if ways != nil {
		c.Endpoints = ways.tell
	}
	state, err := openState(h.state)
	if err != nil {
		return err
	}
	defer state.close()
	c.Dir = filepath.Join(state.dir, "agent")
	a := agent.New(c)
	identities := issuer.New(issuer.Config{Certifier: a, Attest: forward.Selectors})
	forwarder := &forward.Forwarder{Source: identities, Gateway: ways.to, Log: log}
	if ways != nil {
		if forwarder.Listener, err = h.listen(ctx); err != nil {
			return err
		}
	}
	socket, err := listenUnix(h.workload, 0o777, 0o755, "name another path with --workload-socket")
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	server := grpc.NewServer(openToAll(attest.NewCredentials())...)
	workloadapi.Register(server, identities)
	sds.Register(server, identities, log)
	serveGRPC(ctx, group, server, socket)
	group.Go(func() error { return h.ended(a.Run(ctx, identities)) })
	if ways != nil {
		group.Go(func() error { return forwarder.Run(ctx) })
	}
	log.Info("agent started", "control_plane", h.controlPlane, "trust_domain", h.trustDomain, "workload_socket", h.workload, "state", h.state)
	err = group.Wait()
	log.Info("stopped")
	return err
}

// ended adds to what the agent ended with what can be done about it.
func (h *host) ended(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, agent.ErrRevoked):
		return failed("ask whoever runs the control plane; `sallyport agents` lists the revoked ones there", "%w", err)
	case strings.HasPrefix(err.Error(), "attest agent: "):
		hint := "`sallyport token create --node NAME`, where the control plane runs, makes a new token: give it with --join-token-file"
		if h.x509Cert != "" {
			hint = "the control plane's --x509pop-ca must have the authority of this machine's certificate"
		}
		if _, missing := os.Stat(h.tokenFile); h.tokenFile != "" && missing != nil {
			hint += "; there is no file " + h.tokenFile
		}
		return failed(hint, "%w", err)
	case h.trustBundle == "" && strings.Contains(err.Error(), "there is no bundle"):
		return failed("give what `sallyport ca export` prints where the control plane runs, with --trust-bundle", "%w", err)
	}
	return err
}

// ways are where --connect leads to.
type ways struct {
	gateway *forward.Target           // what --gateway says, without an endpoint; nil: what the control plane says
	named   map[string]forward.Target // by the names of endpoints: what --endpoint says
	told    atomic.Pointer[map[string]forward.Target]
}

// tell takes over what the control plane says.
func (w *ways) tell(endpoints []agent.Endpoint) {
	told := make(map[string]forward.Target, len(endpoints))
	for _, e := range endpoints {
		t := forward.Target{ServerName: e.Hostname}
		for _, g := range e.Gateways {
			t.Addresses, t.IDs = append(t.Addresses, g.Address), append(t.IDs, g.ID)
		}
		if w.gateway != nil {
			t.Addresses, t.IDs = w.gateway.Addresses, w.gateway.IDs
		}
		told[string(e.Name)] = t
	}
	w.told.Store(&told)
}

// to is a Forwarder's Gateway.
func (w *ways) to(endpoint string) (forward.Target, error) {
	if t, ok := w.named[endpoint]; ok {
		return t, nil
	}
	told := w.told.Load()
	if told == nil {
		return forward.Target{}, forward.ErrNotTold
	}
	t, ok := (*told)[endpoint]
	switch {
	case !ok:
		return forward.Target{}, forward.ErrNoEndpoint
	case len(t.Addresses) == 0:
		return forward.Target{}, forward.ErrNoAddress
	}
	return t, nil
}

// ways reads what the flags say of them; nil if --connect is not asked for.
func (h *host) ways() (*ways, error) {
	if h.connect == "" {
		if h.gateway != "" || h.gatewayName != "" || len(h.endpoints) > 0 {
			return nil, usage("--gateway, --gateway-name and --endpoint say where it leads to, as in --connect 127.0.0.1:8080", "--connect is missing")
		}
		return nil, nil
	}
	w := &ways{named: map[string]forward.Target{}}
	if h.gateway == "" && h.gatewayName == "" && len(h.endpoints) == 0 {
		return w, nil
	}
	if _, err := addressFlag("--gateway", h.gateway, "edge.internal:8443"); err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(h.trustDomain)
	if err != nil {
		return nil, usage("a trust domain looks like example.org", "--trust-domain: %w", err)
	}
	if h.gatewayName == "" {
		return nil, usage("give the name of its Gateway document, as in --gateway-name edge", "--gateway-name is missing")
	}
	id, err := spiffeid.FromSegments(td, "gateway", h.gatewayName)
	if err != nil {
		return nil, usage("give the name of its Gateway document, as in --gateway-name edge", "--gateway-name: %w", err)
	}
	w.gateway = &forward.Target{Addresses: []string{h.gateway}, IDs: []spiffeid.ID{id}}
	for name, host := range h.endpoints {
		t := *w.gateway
		t.ServerName = host
		w.named[name] = t
	}
	return w, nil
}

// listen opens what --connect names.
func (h *host) listen(ctx context.Context) (net.Listener, error) {
	if path, ok := strings.CutPrefix(h.connect, "unix://"); ok {
		return listenUnix(path, 0o777, 0o755, "name another path with --connect")
	}
	l, err := forward.Listen(ctx, h.connect)
	var system *net.OpError
	switch {
	case errors.As(err, &system):
		return nil, failed("name another port with --connect", "%w", err)
	case err != nil:
		return nil, usage("as in --connect 127.0.0.1:8080, or --connect unix:///run/sallyport/connect.sock", "--connect: %w", err)
	}
	return l, nil
}

// config reads what the flags name.
func (h *host) config() (c agent.Config, err error) {
	if _, err := addressFlag("--control-plane", h.controlPlane, "plane.internal:9443"); err != nil {
		return c, err
	}
	c.Addr = h.controlPlane
	if c.TrustDomain, err = spiffeid.TrustDomainFromString(h.trustDomain); err != nil {
		return c, usage("a trust domain looks like example.org", "--trust-domain: %w", err)
	}
	if h.trustBundle != "" {
		if c.TrustBundle, err = readBundle(c.TrustDomain, h.trustBundle); err != nil {
			return c, failed("`sallyport ca export` on the control plane's machine prints it", "--trust-bundle %s: %w", h.trustBundle, err)
		}
	}
	token := os.Getenv("SALLYPORT_JOIN_TOKEN")
	if h.tokenFile != "" {
		text, err := os.ReadFile(h.tokenFile)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // used once, it may be gone
			return c, failed("--join-token-file names a file that the agent's user can read", "read join token: %w", err)
		}
		token = string(text)
	}
	c.JoinToken = nodepb.Token(strings.TrimSpace(token))
	if (h.x509Cert == "") != (h.x509Key == "") {
		return c, usage("the certificate and its key belong together", "--x509pop-cert or --x509pop-key is missing")
	}
	if h.x509Cert != "" {
		c.X509POP = func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(h.x509Cert, h.x509Key)
			return &pair, err
		}
		if _, err := c.X509POP(); err != nil {
			return c, failed("both are PEM files that the agent's user can read, and they belong together", "--x509pop-cert and --x509pop-key: %w", err)
		}
	}
	return c, nil
}

// readBundle reads a bundle in either of the forms that `ca export` prints.
func readBundle(td spiffeid.TrustDomain, path string) (*spiffebundle.Bundle, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(strings.TrimSpace(string(text)), "{") {
		return spiffebundle.Parse(td, text)
	}
	b, err := x509bundle.Parse(td, text)
	if err != nil {
		return nil, err
	}
	if b.Empty() {
		return nil, fmt.Errorf("there is no certificate in it")
	}
	return spiffebundle.FromX509Bundle(b), nil
}
