package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

const (
	lds  = resourcev3.ListenerType
	cds  = resourcev3.ClusterType
	rds  = resourcev3.RouteType
	ecds = resourcev3.ExtensionConfigType
)

// resourcesOf makes resources of "kind/name=content".
func resourcesOf(specs ...string) *envoy.Resources {
	r := &envoy.Resources{}
	for _, spec := range specs {
		kind, rest, _ := strings.Cut(spec, "/")
		name, content, _ := strings.Cut(rest, "=")
		switch kind {
		case "cds":
			r.Clusters = append(r.Clusters, &clusterv3.Cluster{Name: name, AltStatName: content})
		case "lds":
			r.Listeners = append(r.Listeners, &listenerv3.Listener{Name: name, StatPrefix: content})
		case "rds":
			r.Routes = append(r.Routes, &routev3.RouteConfiguration{Name: name, InternalOnlyHeaders: []string{content}})
		case "ecds":
			r.Extensions = append(r.Extensions, &corev3.TypedExtensionConfig{Name: name})
		}
	}
	return r
}

// plane is a control plane, and how gateways reach it.
type plane struct {
	*testing.T
	*Server
	conn *grpc.ClientConn
}

func newPlane(t *testing.T) *plane {
	s := New()
	g := grpc.NewServer()
	s.Register(t.Context(), g, nil)
	l := bufconn.Listen(1 << 20)
	go func() { _ = g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); g.Stop() })
	return &plane{t, s, conn}
}

func (p *plane) publish(generation string, specs ...string) {
	p.Helper()
	if err := p.Publish(p.Context(), "edge", generation, resourcesOf(specs...)); err != nil {
		p.Fatal(err)
	}
}

// status is the state of the only gateway, as soon as it is as wanted.
func (p *plane) status(wanted func(Status) bool) Status {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), 10*time.Second)
	defer cancel()
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		all := p.Status()
		if len(all) == 1 && wanted(all[0]) {
			return all[0]
		}
		select {
		case <-changed:
		case <-ctx.Done():
			p.Fatalf("it never comes to that: %+v", all)
		}
	}
}

// client is a gateway's end of one stream.
type client struct {
	*testing.T
	stream grpc.BidiStreamingClient[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
	cancel context.CancelFunc
	node   *corev3.Node // sent once
	has    map[string]map[string]string
}

func (p *plane) connect(name string) *client {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), 20*time.Second)
	p.Cleanup(cancel)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(p.conn).DeltaAggregatedResources(ctx)
	if err != nil {
		p.Fatal(err)
	}
	return &client{p.T, stream, cancel, &corev3.Node{Id: name}, map[string]map[string]string{}}
}

func (c *client) send(r *discoveryv3.DeltaDiscoveryRequest) {
	c.Helper()
	r.Node, c.node = c.node, nil
	if err := c.stream.Send(r); err != nil {
		c.Fatal(err)
	}
}

func (c *client) subscribe(url string, names ...string) {
	c.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: names})
}

// receive returns the next response and what it brings, sorted; "-" stands before what it removes.
func (c *client) receive() (*discoveryv3.DeltaDiscoveryResponse, []string) {
	c.Helper()
	r, err := c.stream.Recv()
	if err != nil {
		c.Fatal(err)
	}
	var names []string
	for _, x := range r.Resources {
		names = append(names, x.Name)
	}
	for _, name := range r.RemovedResources {
		names = append(names, "-"+name)
	}
	slices.Sort(names)
	return r, names
}

// take receives, demands that it is this, and acknowledges it.
func (c *client) take(url string, want ...string) {
	c.Helper()
	r, got := c.receive()
	if r.TypeUrl != url {
		c.Fatalf("got %s, not %s: %q", r.TypeUrl, url, got)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		c.Fatalf("%s: (-want +got)\n%s", url, diff)
	}
	if c.has[url] == nil {
		c.has[url] = map[string]string{}
	}
	for _, x := range r.Resources {
		c.has[url][x.Name] = x.Version
	}
	for _, name := range r.RemovedResources {
		delete(c.has[url], name)
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: r.Nonce})
}

func (c *client) refuse(url, why string, want ...string) {
	c.Helper()
	r, got := c.receive()
	if diff := cmp.Diff(want, got); diff != "" || r.TypeUrl != url {
		c.Fatalf("%s, not %s: (-want +got)\n%s", r.TypeUrl, url, diff)
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: 13, Message: why}})
}

func (p *plane) inForce(generation string) {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), 10*time.Second)
	defer cancel()
	if err := p.WaitInForce(ctx, "edge"); err != nil {
		p.Fatalf("%v: %+v", err, p.Status())
	}
	if got := p.InForce("edge"); got != generation {
		p.Fatalf("in force is %q, not %q", got, generation)
	}
}

func TestOnlyWhatChangesIsSent(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1", "cds/b=1", "lds/mtls=1")
	if st := p.status(func(Status) bool { return true }); st.Connected || st.InForce != "" || st.Target != "g1" || len(st.Pending) != 3 {
		t.Errorf("before anybody connects: %+v", st)
	}
	c := p.connect("edge")
	c.subscribe(cds)
	c.take(cds, "a", "b")
	st := p.status(func(s Status) bool { return len(s.Pending) == 1 })
	if diff := cmp.Diff(Status{Gateway: "edge", Connected: true, Target: "g1", Pending: []string{"mtls"}}, st); diff != "" {
		t.Errorf("half of it is there: (-want +got)\n%s", diff)
	}
	c.subscribe(lds)
	c.take(lds, "mtls")
	p.inForce("g1")

	p.publish("g2", "cds/a=1", "cds/b=2", "lds/mtls=1")
	c.take(cds, "b")
	p.inForce("g2")

	p.publish("g3", "cds/a=1", "cds/c=1", "lds/mtls=1") // an endpoint goes, another comes
	c.take(cds, "-b", "c")
	p.inForce("g3")

	p.publish("g4", "cds/a=1", "cds/c=1", "lds/mtls=1") // another name for the same
	p.inForce("g4")
	p.publish("g5", "cds/a=1", "cds/c=1", "lds/mtls=2")
	c.take(lds, "mtls") // and nothing in between
	p.inForce("g5")
}

// Subscriptions by name, as Envoy has for routes and extensions: a filter chain that goes takes its own with it.
func TestUnsubscribe(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "rds/endpoint/chat=1", "rds/endpoint/docs=1", "lds/mtls=1")
	c := p.connect("edge")
	c.subscribe(lds)
	c.take(lds, "mtls")
	c.subscribe(rds, "endpoint/chat", "endpoint/docs")
	c.take(rds, "endpoint/chat", "endpoint/docs")
	p.inForce("g1")

	p.publish("g2", "rds/endpoint/chat=1", "lds/mtls=2")
	seen := map[string]bool{}
	for range 2 { // the order of types is theirs
		r, names := c.receive()
		seen[strings.Join(names, " ")] = true
		c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
	}
	if !seen["mtls"] || !seen["-endpoint/docs"] {
		t.Errorf("got %v", seen)
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: rds, ResourceNamesUnsubscribe: []string{"endpoint/docs"}})
	p.inForce("g2")
}

// extensionsFor are the extensions of an endpoint that the callers of these numbers have a grant for: some hundred
// callers are kept together, more in shards.
func extensionsFor(from, to int) *envoy.Resources {
	cfg := segment.Config{Endpoints: []segment.Endpoint{{Name: "chat", Protocol: segment.OpenAI}}}
	for i := from; i < to; i++ {
		cfg.Grants = append(cfg.Grants, segment.Grant{
			Name: segment.GrantName(fmt.Sprintf("g%04d", i)), Effect: segment.Allow, Mode: segment.Enforce,
			From: []segment.Caller{segment.CallerID(spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/app-%04d", i)))},
			To:   []segment.Target{{Endpoint: "chat", Operations: []segment.Operation{segment.Infer}, Resources: []segment.Pattern{"m"}}},
		})
	}
	r := envoy.Lower(&cfg, authz.Compile(&cfg, time.Unix(0, 0)), envoy.Learned{})
	r.Listeners, r.Routes, r.Clusters, r.Assignments = nil, nil, nil, nil
	return r
}

// namesOf are the extensions' names, sorted.
func namesOf(r *envoy.Resources) (names []string) {
	for _, x := range r.Extensions {
		names = append(names, x.Name)
	}
	return names
}

func shardsOf(r *envoy.Resources) []string {
	return slices.DeleteFunc(namesOf(r), func(name string) bool { return !strings.HasPrefix(name, wholeRights+"/") })
}

const wholeRights = "authz/chat/rights"

func (p *plane) publishFor(gateway segment.GatewayName, generation string, r *envoy.Resources) {
	p.Helper()
	if err := p.Publish(p.Context(), gateway, generation, r); err != nil {
		p.Fatal(err)
	}
}

// leave unsubscribes extensions, and waits until that has been heard.
func (p *plane) leave(c *client, gateway segment.GatewayName, names ...string) {
	p.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ecds, ResourceNamesUnsubscribe: names})
	for late := time.After(10 * time.Second); ; {
		p.mu.Lock()
		_, there := p.gateways[gateway].taken[ecds][names[0]]
		changed := p.changed
		p.mu.Unlock()
		if !there {
			return
		}
		select {
		case <-changed:
		case <-late:
			p.Fatal("is not heard")
		}
	}
}

// Connections that began under another filter chain need its shards: they follow every generation until the gateway
// has connects the gateway edge, and returns it when it has taken the extensions as generation g1.
func (p *plane) has(r *envoy.Resources) *client {
	p.Helper()
	p.publishFor("edge", "g1", r)
	c := p.connect("edge")
	c.subscribe(ecds, namesOf(r)...)
	c.take(ecds, namesOf(r)...)
	p.inForce("g1")
	return c
}

// lets go of them.
func TestRetained(t *testing.T) {
	p := newPlane(t)
	many := extensionsFor(0, 900)
	shards := shardsOf(many)
	if len(shards) < 3 {
		t.Fatalf("the base of this test is in %q", namesOf(many))
	}
	p.publishFor("edge", "g1", many)
	c := p.connect("edge")
	c.subscribe(ecds, namesOf(many)...)
	c.take(ecds, namesOf(many)...)
	p.inForce("g1")

	few := extensionsFor(850, 1100)
	p.publishFor("edge", "g2", few)
	c.take(ecds, shards...) // in none of them is what was there
	if st := p.status(func(s Status) bool { return len(s.Pending) == 1 }); st.Pending[0] != wholeRights || st.InForce != "g1" {
		t.Errorf("before the new filter chain is there: %+v", st)
	}
	for _, name := range shards {
		if want := few.Version(few.Retained(name, nil).Extension); c.has[ecds][name] != want {
			t.Errorf("%s is another: %s, not %s", name, c.has[ecds][name], want)
		}
	}
	c.subscribe(ecds, wholeRights)
	c.take(ecds, wholeRights)
	p.inForce("g2")

	p.publishFor("edge", "g3", extensionsFor(849, 1100)) // still there, and this is in one of them
	changed, names := c.receive()
	if len(names) != 2 || names[0] != wholeRights || !slices.Contains(shards, names[1]) {
		t.Errorf("one caller more changes %q", names)
	}
	if st := p.Status()[0]; st.InForce != "g2" || !slices.Equal(st.Pending, names) {
		t.Errorf("before it has taken them: %+v", st)
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ecds, ResponseNonce: changed.Nonce})
	p.inForce("g3")

	p.leave(c, "edge", shards...)
	p.publishFor("edge", "g4", extensionsFor(848, 1100))
	c.take(ecds, wholeRights)
	p.inForce("g4")
}

// What is wanted no more while the gateway has not taken it is not waited for.
func TestRetainedUntilUnsubscribed(t *testing.T) {
	p := newPlane(t)
	many, few := extensionsFor(0, 900), extensionsFor(850, 1100)
	c := p.has(many)
	p.publishFor("edge", "g2", few)
	c.refuse(ecds, "no", shardsOf(many)...)
	p.status(func(s Status) bool { return len(s.Rejected) > 0 && len(s.Pending) == len(shardsOf(many))+1 })
	p.leave(c, "edge", shardsOf(many)...)
	if st := p.status(func(s Status) bool { return len(s.Pending) == 1 }); st.Pending[0] != wholeRights {
		t.Errorf("%+v", st)
	}
	c.subscribe(ecds, wholeRights)
	c.take(ecds, wholeRights)
	p.inForce("g2")

	p.publishFor("edge", "g3", many) // cuts that were left are made once more
	c.take(ecds, wholeRights)
	c.subscribe(ecds, shardsOf(many)...)
	c.take(ecds, shardsOf(many)...)
	p.inForce("g3")
}

// A gateway says which shards its connections need when it comes back, also to a control plane that has never had them.
func TestReconnectWithRetained(t *testing.T) {
	p := newPlane(t)
	many, few := extensionsFor(0, 900), extensionsFor(850, 1100)
	c := p.has(many)
	c.cancel()
	p.status(func(s Status) bool { return !s.Connected })

	for name, other := range map[string]*plane{"the same": p, "another": newPlane(t)} {
		other.publishFor("edge", "g2", few)
		again := other.connect("edge")
		again.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ecds, ResourceNamesSubscribe: namesOf(many), InitialResourceVersions: maps.Clone(c.has[ecds])})
		again.take(ecds, shardsOf(many)...)
		if st := other.status(func(s Status) bool { return len(s.Pending) == 1 }); st.Pending[0] != wholeRights {
			t.Errorf("%s: %+v", name, st)
		}
		again.subscribe(ecds, wholeRights)
		again.take(ecds, wholeRights)
		other.inForce("g2")
	}
}

// What one gateway needs is not another's business.
func TestRetainedForOne(t *testing.T) {
	p := newPlane(t)
	many, few := extensionsFor(0, 900), extensionsFor(850, 1100)
	clients := map[segment.GatewayName]*client{}
	for _, name := range []segment.GatewayName{"edge", "other"} {
		p.publishFor(name, "g1", many)
		c := p.connect(string(name))
		c.subscribe(ecds, namesOf(many)...)
		c.take(ecds, namesOf(many)...)
		clients[name] = c
	}
	for name, c := range clients {
		if err := p.WaitInForce(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		p.publishFor(name, "g2", few)
		c.take(ecds, shardsOf(many)...)
		c.subscribe(ecds, wholeRights)
		c.take(ecds, wholeRights)
	}
	p.leave(clients["edge"], "edge", shardsOf(many)...)
	p.inForce("g2")
	for name, c := range clients {
		p.publishFor(name, "g3", extensionsFor(849, 1100))
		if name == "edge" {
			c.take(ecds, wholeRights)
		} else {
			c.take(ecds, wholeRights, "authz/chat/rights/all/spiffe://example.org/app-08")
		}
	}
	p.inForce("g3")
}

func TestUnknownGateway(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1")
	for _, name := range []string{"other", "", "Edge"} {
		c := p.connect(name)
		c.subscribe(cds)
		if r, err := c.stream.Recv(); grpcstatus.Code(err) != codes.PermissionDenied {
			t.Errorf("%q: %v, %v", name, r, err)
		}
	}
	if st := p.Status(); len(st) != 1 || st[0].Connected {
		t.Errorf("%+v", st)
	}
}

// A stream has one node: what it says later is not heard.
func TestNodeStays(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1")
	if err := p.Publish(t.Context(), "other", "g1", resourcesOf("lds/secret=1")); err != nil {
		t.Fatal(err)
	}
	c := p.connect("edge")
	c.subscribe(cds)
	c.take(cds, "a")
	c.node = &corev3.Node{Id: "other"}
	c.subscribe(lds)
	if r, err := c.stream.Recv(); err == nil {
		t.Errorf("is sent what another gateway is for: %v", r)
	}
}

func TestStateOfTheWorldIsRefused(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1")
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(p.conn).StreamAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); grpcstatus.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
}

func TestRejection(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1", "cds/b=1", "lds/mtls=1")
	c := p.connect("edge")
	c.subscribe(cds)
	c.take(cds, "a", "b")
	c.subscribe(lds)
	c.take(lds, "mtls")
	p.inForce("g1")

	p.publish("g2", "cds/a=2", "cds/b=bad", "lds/mtls=1")
	c.refuse(cds, "b is bad", "a", "b")
	st := p.status(func(s Status) bool { return len(s.Rejected) > 0 })
	if st.InForce != "g1" || st.Target != "g2" || !slices.Equal(st.Pending, []string{"a", "b"}) {
		t.Errorf("%+v", st)
	}
	if r := st.Rejected[0]; r.Type != "Cluster" || r.Error != "b is bad" || r.Time.IsZero() || strings.Join(slices.Sorted(slices.Values(r.Resources)), " ") != "a b" {
		t.Errorf("%+v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.WaitInForce(ctx, "edge"); !errors.Is(err, context.Canceled) {
		t.Errorf("waits with %v", err)
	}

	// What has nothing to do with it does not hide it.
	p.publish("g3", "cds/a=2", "cds/b=bad", "lds/mtls=2")
	seen := map[string]bool{}
	for range 2 {
		r, names := c.receive()
		answer := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
		if r.TypeUrl == cds {
			answer.ErrorDetail = &status.Status{Message: "b is still bad"}
		}
		seen[strings.Join(names, " ")] = true
		c.send(answer)
	}
	if !seen["a b"] || !seen["mtls"] {
		t.Errorf("what was refused is tried again with every generation: %v", seen)
	}
	st = p.status(func(s Status) bool { return len(s.Rejected) > 0 && len(s.Pending) == 2 })
	if st.InForce != "g1" || st.Rejected[0].Error != "b is still bad" {
		t.Errorf("%+v", st)
	}

	// What was refused together is sent together, though only one of them was bad.
	p.publish("g4", "cds/a=2", "cds/b=2", "lds/mtls=2")
	c.take(cds, "a", "b")
	p.inForce("g4")
	if st := p.Status()[0]; len(st.Rejected) > 0 || len(st.Pending) > 0 {
		t.Errorf("%+v", st)
	}

	// And it is over.
	p.publish("g5", "cds/a=2", "cds/b=2", "lds/mtls=3")
	c.take(lds, "mtls")
	p.inForce("g5")
}

// Back to what was in force before, after a generation that was refused.
func TestRejectedAndTakenBack(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1", "cds/b=1")
	c := p.connect("edge")
	c.subscribe(cds)
	c.take(cds, "a", "b")
	p.inForce("g1")
	p.publish("g2", "cds/a=bad", "cds/b=1")
	c.refuse(cds, "no", "a")
	p.status(func(s Status) bool { return len(s.Rejected) > 0 })
	p.publish("g1", "cds/a=1", "cds/b=1")
	c.take(cds, "a")
	p.inForce("g1")
}

func TestReconnect(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1", "cds/b=1", "lds/mtls=1")
	c := p.connect("edge")
	c.subscribe(cds)
	c.take(cds, "a", "b")
	c.subscribe(lds)
	c.take(lds, "mtls")
	p.inForce("g1")
	c.cancel()
	p.status(func(s Status) bool { return !s.Connected })

	// While it is away nothing is in force that it has not said it has.
	p.publish("g2", "cds/a=1", "cds/b=2", "lds/mtls=1")
	if st := p.Status()[0]; st.InForce != "g1" || st.Connected {
		t.Errorf("%+v", st)
	}
	again := p.connect("edge")
	again.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: cds, InitialResourceVersions: maps.Clone(c.has[cds])})
	again.take(cds, "b")
	again.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: lds, InitialResourceVersions: maps.Clone(c.has[lds])})
	again.take(lds) // there is an answer, with nothing in it
	p.inForce("g2")
	p.publish("g3", "cds/a=1", "cds/b=2", "lds/mtls=2")
	again.take(lds, "mtls")
	p.inForce("g3")
	again.cancel()
	p.status(func(s Status) bool { return !s.Connected })

	// One that was started anew has nothing.
	fresh := p.connect("edge")
	fresh.subscribe(cds)
	fresh.take(cds, "a", "b")
	if st := p.status(func(s Status) bool { return len(s.Pending) == 1 }); st.Pending[0] != "mtls" {
		t.Errorf("%+v", st)
	}
	fresh.subscribe(lds)
	fresh.take(lds, "mtls")
	p.inForce("g3")
}

// A gateway that comes back before its old stream is known to have ended, with nothing.
func TestReconnectBeforeTheOldStreamEnds(t *testing.T) {
	p := newPlane(t)
	p.publish("g1", "cds/a=1", "lds/mtls=1")
	old := p.connect("edge")
	old.subscribe(cds)
	old.take(cds, "a")
	old.subscribe(lds)
	old.take(lds, "mtls")
	p.inForce("g1")

	fresh := p.connect("edge")
	fresh.subscribe(cds)
	fresh.take(cds, "a")
	p.publish("g2", "cds/a=1", "lds/mtls=1")
	st := p.status(func(s Status) bool { return len(s.Pending) <= 1 })
	if !slices.Equal(st.Pending, []string{"mtls"}) || st.InForce == "g2" {
		t.Errorf("the new one has no listener yet: %+v", st)
	}
	old.cancel()
	fresh.subscribe(lds)
	fresh.take(lds, "mtls")
	p.inForce("g2")
	if !p.Status()[0].Connected {
		t.Error("the end of the old stream is taken for the end of the new one")
	}
}

func TestNobodyIsInForce(t *testing.T) {
	p := newPlane(t)
	if got := p.InForce("edge"); got != "" || len(p.Status()) != 0 {
		t.Errorf("%q, %v", got, p.Status())
	}
	p.publish("g1")
	if got := p.InForce("edge"); got != "" {
		t.Errorf("in force is %q at a gateway that has never been seen", got)
	}
}

// One that was started anew has no connections that need what the old one needed.
func TestRetainedIsForgotten(t *testing.T) {
	p := newPlane(t)
	many, few := extensionsFor(0, 900), extensionsFor(850, 1100)
	c := p.has(many)
	p.publishFor("edge", "g2", few)
	c.take(ecds, shardsOf(many)...)
	c.cancel()
	p.status(func(s Status) bool { return !s.Connected })
	fresh := p.connect("edge")
	fresh.subscribe(ecds, namesOf(few)...)
	fresh.take(ecds, namesOf(few)...)
	p.inForce("g2")
}

// A gateway acknowledges also what it has left meanwhile, and does not have it then.
func TestUnsubscribeBeforeTheAnswer(t *testing.T) {
	p := newPlane(t)
	many, few := extensionsFor(0, 900), extensionsFor(850, 1100)
	c := p.has(many)
	p.publishFor("edge", "g2", few)
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ecds, ResourceNamesUnsubscribe: shardsOf(many)})
	c.take(ecds, shardsOf(many)...)
	c.subscribe(ecds, wholeRights)
	c.take(ecds, wholeRights)
	p.inForce("g2")
	p.publishFor("edge", "g3", extensionsFor(849, 1100))
	c.take(ecds, wholeRights)
	p.inForce("g3")
}

// What has been sent may be in use before the gateway has said so.
func TestRetainedBeforeTheAnswer(t *testing.T) {
	p := newPlane(t)
	many, few := extensionsFor(0, 900), extensionsFor(850, 1100)
	p.publishFor("edge", "g1", many)
	c := p.connect("edge")
	c.subscribe(ecds, namesOf(many)...)
	r, _ := c.receive()
	p.publishFor("edge", "g2", few)
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ecds, ResponseNonce: r.Nonce})
	c.take(ecds, shardsOf(many)...)
	c.subscribe(ecds, wholeRights)
	c.take(ecds, wholeRights)
	p.inForce("g2")
}
