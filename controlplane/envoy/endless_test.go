package envoy

import (
	"strings"
	"testing"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	bufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/buffer/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/test/corpus"
)

// endlessly are resources with an endpoint that has WebSockets and one that has streams of gRPC.
func endlessly(t testing.TB) *Resources {
	cfg := corpus.Assemble(t, []string{`---
apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: chat}
spec:
  hostnames: [chat.internal]
  protocol: OpenAI
  backends: [{name: local, addresses: ['127.0.0.1:8001'], tls: {mode: None}}]
`, `---
apiVersion: sallyport.dev/v1alpha1
kind: Endpoint
metadata: {name: vectors}
spec:
  hostnames: [vectors.internal]
  protocol: Weaviate
  backends: [{name: local, addresses: ['127.0.0.1:8002'], grpcAddresses: ['127.0.0.1:8003'], tls: {mode: None}}]
`})
	_, r := lowered(&cfg, time.Unix(0, 0), "written out")
	return r
}

// row returns a route by its name.
func (v victim) row(name string) *routev3.Route {
	for _, table := range v.Routes {
		for _, r := range table.VirtualHosts[0].Routes {
			if r.Name == name {
				return r
			}
		}
	}
	v.Fatal("no route " + name)
	return nil
}

// look changes what the script is told of a route.
func (v victim) look(name, from string) {
	edit(v, v.row(name).TypedPerFilterConfig[extractFilter], func(l *luav3.LuaPerRoute) {
		l.GetFilterContext().Fields["from"] = structpb.NewStringValue(from)
	})
}

const (
	socketRow = "realtime"          // GET, query:model
	streamRow = "grpc-batch-stream" // a stream of gRPC
	unaryRow  = "grpc-search"
)

var endlessMutations = []mutation{
	{"a body that passes while it is looked for", func(v victim) { v.route().TypedPerFilterConfig[bodyFilter] = pack(bufferOff()) }},
	{"a message that passes while it is looked for", func(v victim) { v.row(unaryRow).TypedPerFilterConfig[bodyFilter] = pack(bufferOff()) }},
	{"a body that passes where nothing looks", func(v victim) {
		v.row("list-files").TypedPerFilterConfig[bodyFilter] = pack(bufferOff())
	}},
	{"bodies that pass at a whole endpoint", func(v victim) {
		v.Routes[0].VirtualHosts[0].TypedPerFilterConfig = map[string]*anypb.Any{bodyFilter: pack(bufferOff())}
	}},
	{"bodies that pass behind every route", func(v victim) {
		v.Routes[0].TypedPerFilterConfig = map[string]*anypb.Any{bodyFilter: pack(bufferOff())}
	}},
	{"a larger body", func(v victim) {
		v.row(socketRow).TypedPerFilterConfig[bodyFilter] = pack(&bufferv3.BufferPerRoute{Override: &bufferv3.BufferPerRoute_Buffer{
			Buffer: &bufferv3.Buffer{MaxRequestBytes: wrapperspb.UInt32(1 << 30)}}})
	}},
	{"a WebSocket that waits for its end", func(v victim) { delete(v.row(socketRow).TypedPerFilterConfig, bodyFilter) }},
	{"a stream that waits for its end", func(v victim) { delete(v.row(streamRow).TypedPerFilterConfig, bodyFilter) }},
	{"a stream that is looked into", func(v victim) { v.look(streamRow, "message endless") }},
	{"a WebSocket that is looked into", func(v victim) { v.look(socketRow, "query body endless") }},
	{"a stream whose end nobody writes", func(v victim) { v.look(streamRow, "nothing") }},
	{"a WebSocket whose end nobody writes", func(v victim) { v.look(socketRow, "query") }},
	{"a stream that is no gRPC", func(v victim) {
		m := v.row(streamRow).Match
		m.Headers = m.Headers[:1]
	}},
	{"a stream of another kind", func(v victim) {
		m := v.row(streamRow).Match
		m.Headers[1].GetStringMatch().GetSafeRegex().Regex = "application/.*"
	}},
	{"a stream of another kind on purpose", func(v victim) { v.row(streamRow).Match.Headers[1].InvertMatch = true }},
	{"what is elsewhere, without a kind", func(v victim) { v.row("elsewhere-grpc").Match.Headers = nil }},
	{"a stream without an end", func(v victim) { v.row(streamRow).GetRoute().MaxStreamDuration = nil }},
	{"a stream that the caller ends", func(v victim) {
		v.row(streamRow).GetRoute().MaxStreamDuration.GrpcTimeoutHeaderMax = nil
	}},
	{"a WebSocket without an end", func(v victim) { v.row(socketRow).GetRoute().MaxStreamDuration.MaxStreamDuration = nil }},
	{"a WebSocket of any length", func(v victim) {
		v.row(socketRow).GetRoute().MaxStreamDuration.MaxStreamDuration = durationpb.New(0)
	}},
	{"a WebSocket that goes on for longer", func(v victim) {
		v.row(socketRow).GetRoute().MaxStreamDuration.GrpcTimeoutHeaderOffset = durationpb.New(-time.Hour)
	}},
	{"an upgrade of another row", func(v victim) {
		v.route().GetRoute().UpgradeConfigs = []*routev3.RouteAction_UpgradeConfig{{UpgradeType: upgradeType}}
	}},
	{"an upgrade to anything", func(v victim) { v.row(socketRow).GetRoute().UpgradeConfigs[0].UpgradeType = "CONNECT" }},
	{"an upgrade to two", func(v victim) {
		r := v.row(socketRow).GetRoute()
		r.UpgradeConfigs = append(r.UpgradeConfigs, &routev3.RouteAction_UpgradeConfig{UpgradeType: "tcp"})
	}},
	{"an upgrade to a tunnel", func(v victim) {
		v.row(socketRow).GetRoute().UpgradeConfigs[0].ConnectConfig = &routev3.RouteAction_UpgradeConfig_ConnectConfig{}
	}},
}

func TestCheckRefusesEndless(t *testing.T) {
	if err := Check(endlessly(t)); err != nil {
		t.Fatal(err)
	}
	for _, m := range endlessMutations {
		t.Run(m.name, func(t *testing.T) {
			r := endlessly(t)
			m.change(victim{t, r})
			err := Check(r)
			if err == nil {
				t.Fatal("passes")
			}
			t.Log(strings.ReplaceAll(err.Error(), "\n", "; "))
		})
	}
}
