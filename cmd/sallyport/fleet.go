package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/controlplane/xds"
	"sallyport.dev/identity"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

// door is where gateways on other machines come in: ADS, reports and the catalogue on one port, over mTLS with SPIFFE IDs
// on both sides. Who a gateway is says its certificate and nothing else.
type door struct {
	plane       *plane
	certificate func() (*tls.Certificate, error)           // of the control plane
	bundles     func() x509bundle.Source                   // whom to believe
	refused     func(gateway *segment.Gateway) (why error) // although it is in a document
}

// guest is a gateway that has come in, until its certificate ends.
type guest struct {
	*segment.Gateway
	until time.Time
}

// gateway returns the gateway that a connection is: one of the generation in force, whose certificate is valid now.
func (d *door) gateway(state *tls.ConnectionState) (*guest, error) {
	if state == nil || len(state.PeerCertificates) == 0 {
		return nil, errors.New("a gateway needs a client certificate")
	}
	id, err := identity.Verify(state.PeerCertificates, d.bundles(), time.Now())
	if err != nil {
		return nil, err
	}
	if g := d.plane.pipeline.State().Generation; g != nil {
		for i := range g.Config.Gateways {
			if gateway := &g.Config.Gateways[i]; gateway.ID == id && gateway.Node != "" {
				return &guest{gateway, state.PeerCertificates[0].NotAfter}, d.refused(gateway)
			}
		}
	}
	return nil, fmt.Errorf("%s is no gateway here", id)
}

func (d *door) caller(ctx context.Context) (*guest, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			return d.gateway(&info.State)
		}
	}
	return nil, errors.New("a gateway comes over TLS")
}

func (d *door) name(ctx context.Context) (segment.GatewayName, error) {
	g, err := d.caller(ctx)
	if err != nil {
		return "", err
	}
	return g.Name, nil
}

// serve serves until the context ends.
func (d *door) serve(ctx context.Context, group *errgroup.Group, l net.Listener) {
	rpc := grpc.NewServer(grpc.MaxRecvMsgSize(64<<20), xds.Endable(),
		grpc.ChainStreamInterceptor(d.stream), grpc.ChainUnaryInterceptor(d.unary))
	d.plane.gateways.Register(ctx, rpc, d.name)
	d.plane.reports(rpc)
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asksList := r.Header.Get(envoy.EndpointHeader) != "" // on behalf of a caller, who may speak gRPC
			if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("content-type"), "application/grpc") && !asksList {
				rpc.ServeHTTP(w, r)
			} else {
				d.catalog(w, r)
			}
		}),
		TLSConfig: &tls.Config{
			MinVersion:             tls.VersionTLS13,
			ClientAuth:             tls.RequireAnyClientCert, // whose it is is looked at with each call, by what is true then
			SessionTicketsDisabled: true,
			NextProtos:             []string{"h2"},
			GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return d.certificate() },
			VerifyPeerCertificate:  d.handshake,
		},
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          log.New(refusals{d.plane.log}, "", 0),
	}
	group.Go(func() error {
		if err := server.ServeTLS(l, "", ""); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve gateways: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		rpc.Stop()
		return server.Close()
	})
}

// handshake turns away whoever is nobody here, before it can send anything.
func (d *door) handshake(raw [][]byte, _ [][]*x509.Certificate) error {
	state := &tls.ConnectionState{}
	for _, der := range raw {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		state.PeerCertificates = append(state.PeerCertificates, c)
	}
	_, err := d.gateway(state)
	return err
}

// stream lets gateways only call, and believes none that reports as another.
func (d *door) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	g, err := d.caller(ss.Context())
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	// What begins on a certificate ends with it; Envoy comes again with the next, and is sent only what is new.
	ctx, cancel := context.WithDeadline(ss.Context(), g.until)
	defer cancel()
	return next(srv, &reportsAs{ServerStream: ss, ctx: ctx, door: d, name: g.Name})
}

func (d *door) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if _, err := d.name(ctx); err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	return next(ctx, req)
}

// reportsAs is a stream of a gateway, which may go on only while it is one, and refuses access logs in another's name.
type reportsAs struct {
	grpc.ServerStream
	ctx   context.Context //nolint:containedctx // it is the stream's own
	door  *door
	name  segment.GatewayName
	named bool // it has said who it is
}

func (s *reportsAs) Context() context.Context { return s.ctx }

func (s *reportsAs) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if name, err := s.door.name(s.ServerStream.Context()); err != nil || name != s.name {
		return status.Errorf(codes.PermissionDenied, "gateway %s is no longer one: %v", s.name, err)
	}
	if logs, ok := m.(*accesslogv3.StreamAccessLogsMessage); ok {
		if id := logs.Identifier.GetNode().GetId(); id != string(s.name) && (logs.Identifier != nil || !s.named) {
			return status.Errorf(codes.PermissionDenied, "gateway %s reports as %q", s.name, id)
		}
		s.named = true
	}
	return nil
}

// catalog answers for the endpoints that the gateway serves.
func (d *door) catalog(w http.ResponseWriter, r *http.Request) {
	g, err := d.gateway(r.TLS)
	if err != nil || !g.Serves(segment.EndpointName(r.Header.Get(envoy.EndpointHeader))) {
		http.Error(w, "not for this gateway", http.StatusForbidden)
		return
	}
	askedBy(g.Name, d.plane.lists).ServeHTTP(w, r)
}

// refusals logs what the HTTP server says of failed handshakes: who tries and may not is worth knowing.
type refusals struct{ log *slog.Logger }

func (l refusals) Write(text []byte) (int, error) {
	l.log.Warn("gateway refused", "error", strings.TrimSpace(string(text)))
	return len(text), nil
}

// openFleet opens what other machines come to.
func (p *plane) openFleet() error {
	if p.agentListen == "" && p.gatewayListen == "" {
		return nil
	}
	if err := p.openNodes(); err != nil {
		return err
	}
	for _, l := range []struct {
		address, flag string
		into          *net.Listener
	}{{p.agentListen, "--agent-listen", &p.agentListener}, {p.gatewayListen, "--gateway-listen", &p.gatewayListener}} {
		if l.address == "" {
			continue
		}
		var err error
		if *l.into, err = net.Listen("tcp", l.address); err != nil {
			return failed("name another with "+l.flag, "listen for other machines: %w", err)
		}
	}
	return nil
}

// openNodes is for the agents of other machines, unless they are the identity provider's.
func (p *plane) openNodes() error {
	if p.provider != nil {
		return nil
	}
	c := node.Config{TrustDomain: p.options.TrustDomain, Certifier: p.local, Dir: filepath.Join(p.state.dir, "agents"),
		Certificate: p.certificate, TTL: p.options.SVIDTTL, Log: p.log}
	var err error
	if p.x509pop != "" {
		if c.X509POP, err = readAuthorities(p.x509pop); err != nil {
			return failed("give a PEM file with the authorities of your machines' certificates", "--x509pop-ca %s: %w", p.x509pop, err)
		}
	}
	if p.nodes, err = node.Open(c); err != nil {
		return err
	}
	p.nodes.SetBundles(p.bundles.now())
	p.pipeline.Sinks = append([]controlplane.Sink{assignments{p}}, p.pipeline.Sinks...)
	return nil
}

func (p *plane) serveFleet(ctx context.Context, group *errgroup.Group) {
	if p.agentListener != nil {
		group.Go(func() error { return p.nodes.Run(ctx, p.agentListener) })
	}
	if p.gatewayListener != nil {
		d := &door{
			plane:       p,
			certificate: p.certificate,
			bundles:     p.believes,
			refused:     p.admissible,
		}
		d.serve(ctx, group, p.gatewayListener)
	}
}

// admissible says why a gateway is refused although a document names it; nil: it is not.
func (p *plane) admissible(g *segment.Gateway) error {
	if g.Node == "" || p.nodes == nil {
		return nil
	}
	id, err := agentID(p.options.TrustDomain, g.Node)
	if err == nil && p.nodes.Revoked(id) {
		err = fmt.Errorf("the agent of gateway %s is revoked", g.Name)
	}
	return err
}

// assignments is the sink that tells who may hold which identity on other machines.
type assignments struct{ plane *plane }

func (s assignments) Publish(_ context.Context, g *controlplane.Generation) error {
	var all []node.Assignment
	for i := range g.Config.Gateways {
		if gateway := &g.Config.Gateways[i]; gateway.Node != "" {
			all = append(all, s.assign(gatewayEntry(g, gateway), gateway.Node))
		}
	}
	for i := range g.Config.Workloads {
		switch w := &g.Config.Workloads[i]; {
		case len(w.Nodes) > 0:
			all = append(all, s.assign(workloadEntry(w, s.plane.options.SVIDTTL), w.Nodes...))
		case s.plane.options.Gateway == nil: // no Workload API on this machine either
			s.plane.log.Warn("nobody can hold this identity: the document names no nodes", "workload", w.Name, "caller", w.ID.String())
		}
	}
	s.plane.nodes.Set(all, s.endpoints(g))
	return nil
}

// endpoints are those that each agent is told, so that it can lead applications there: where some workload of its machine
// may do something, and no others. What only grants in Shadow mode give is among them, or nobody would see that it is
// asked for.
func (s assignments) endpoints(g *controlplane.Generation) map[spiffeid.ID][]node.Endpoint {
	known := map[segment.NodeName]map[segment.EndpointName]bool{}
	for i := range g.Config.Workloads {
		w := &g.Config.Workloads[i]
		for j := range g.Config.Endpoints {
			name := g.Config.Endpoints[j].Name
			d := authz.Decide(g.Policy, authz.Request{Caller: w.ID.String(), Endpoint: name, Operation: segment.Enter})
			for _, n := range w.Nodes {
				if known[n] == nil {
					known[n] = map[segment.EndpointName]bool{}
				}
				known[n][name] = known[n][name] || d.Allowed || d.ShadowAllowed
			}
		}
	}
	told := make(map[spiffeid.ID][]node.Endpoint, len(known))
	for name, endpoints := range known {
		id, err := agentID(s.plane.options.TrustDomain, name)
		if err != nil {
			continue // Assemble has refused it
		}
		gateways := s.plane.gatewaysFrom(name, g)
		for i := range g.Config.Endpoints {
			end := &g.Config.Endpoints[i]
			if !endpoints[end.Name] {
				continue
			}
			e := node.Endpoint{Name: end.Name, Hostname: end.Hostnames[0]}
			for _, gateway := range gateways {
				if gateway.Serves(end.Name) {
					e.Gateways = append(e.Gateways, node.Gateway{ID: gateway.ID, Address: gateway.address})
				}
			}
			told[id] = append(told[id], e)
		}
	}
	return told
}

// reached is a gateway, and where callers on some machine reach it.
type reached struct {
	*segment.Gateway
	address string
}

// gatewaysFrom are those that a node's machine can reach: its own first, and the others such that not all machines begin
// with the same.
func (p *plane) gatewaysFrom(n segment.NodeName, g *controlplane.Generation) []reached {
	var all []reached
	for i := range g.Config.Gateways {
		gateway := &g.Config.Gateways[i]
		if address := addressFrom(n, gateway); address != "" && p.admissible(gateway) == nil {
			all = append(all, reached{gateway, address})
		}
	}
	place := func(r reached) string {
		if r.Node == n {
			return ""
		}
		sum := sha256.Sum256(fmt.Appendf(nil, "%q %q", r.Name, n))
		return string(sum[:])
	}
	slices.SortFunc(all, func(a, b reached) int {
		return cmp.Or(cmp.Compare(place(a), place(b)), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// addressFrom is where callers on a node's machine reach a gateway; "": nobody has said. By loopback they reach only that
// of their own machine.
func addressFrom(n segment.NodeName, g *segment.Gateway) string {
	if g.Address != (segment.Address{}) {
		return net.JoinHostPort(g.Address.Host, strconv.Itoa(int(g.Address.Port)))
	}
	ip, own := g.Listen.Addr().Unmap(), g.Node == n
	switch {
	case !ip.IsValid() || !own && (ip.IsUnspecified() || ip.IsLoopback()):
		return ""
	case ip == netip.IPv4Unspecified():
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case ip == netip.IPv6Unspecified():
		ip = netip.IPv6Loopback()
	}
	return netip.AddrPortFrom(ip, g.Listen.Port()).String()
}

func (s assignments) assign(e issuer.Entry, nodes ...segment.NodeName) node.Assignment {
	a := node.Assignment{Entry: e}
	for _, name := range nodes {
		if id, err := agentID(s.plane.options.TrustDomain, name); err == nil { // else Assemble has refused it
			a.Agents = append(a.Agents, id)
		}
	}
	return a
}

// agentID is the agent of a node, by the name that documents give it.
func agentID(td spiffeid.TrustDomain, name segment.NodeName) (spiffeid.ID, error) {
	return nodepb.Agent(td, string(name))
}
