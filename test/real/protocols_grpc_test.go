package real

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"pgregory.net/rapid"

	"sallyport.dev/telemetry"
)

// --- messages, by hand ---

type message []byte

// with adds a field: a string, a message or a number.
func (m message) with(number protowire.Number, value any) message {
	m = slices.Clip(m)
	switch v := value.(type) {
	case string:
		return protowire.AppendString(protowire.AppendTag(m, number, protowire.BytesType), v)
	case message:
		return protowire.AppendBytes(protowire.AppendTag(m, number, protowire.BytesType), v)
	case int:
		return protowire.AppendVarint(protowire.AppendTag(m, number, protowire.VarintType), uint64(v))
	}
	panic(fmt.Sprintf("field of type %T", value))
}

func field(number protowire.Number, value any) message { return message(nil).with(number, value) }

// frame is a message as gRPC sends it.
func (m message) frame() string {
	return "\x00" + string([]byte{byte(len(m) >> 24), byte(len(m) >> 16), byte(len(m) >> 8), byte(len(m))}) + string(m)
}

// raw passes messages on as they are.
type raw struct{}

func (raw) Name() string { return "proto" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*message))}, nil
}
func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*message) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = raw{}

// grpcAs is a real client.
func (u *up) grpcAs(t *testing.T, who, endpoint string) *grpc.ClientConn {
	t.Helper()
	return u.grpcWith(t, u.keys.sign(t, svid(who, time.Hour)), endpoint)
}

func (u *up) grpcWith(t *testing.T, cert tls.Certificate, endpoint string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+hostOf(endpoint), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{})),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: u.keys.pool, ServerName: hostOf(endpoint), Certificates: []tls.Certificate{cert}})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", u.listen)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func call(t *testing.T, conn *grpc.ClientConn, method string, m message) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out message
	return conn.Invoke(ctx, method, &m, &out)
}

// rpc sends bytes as a call of gRPC, whatever they are, and returns gRPC's status and message.
func (c *caller) rpc(endpoint, path, body string, header http.Header) (codes.Code, string) {
	code, said, _ := c.called(context.Background(), request{host: hostOf(endpoint), path: path, body: strings.NewReader(body), header: header})
	return code, said
}

// called is rpc with all that came as the answer.
func (c *caller) called(ctx context.Context, r request) (codes.Code, string, answer) {
	header := http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}
	maps.Copy(header, r.header)
	r.header = header
	req, err := r.build(ctx)
	if err != nil {
		return codes.Unknown, err.Error(), answer{err: err}
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return codes.Unavailable, err.Error(), answer{err: err}
	}
	a := read(resp)
	code, said := resp.Header.Get("Grpc-Status"), resp.Header.Get("Grpc-Message")
	if code == "" {
		code, said = resp.Trailer.Get("Grpc-Status"), resp.Trailer.Get("Grpc-Message")
	}
	if said, err = url.PathUnescape(said); err != nil {
		return codes.Unknown, err.Error(), a
	}
	var n int
	if _, err := fmt.Sscan(code, &n); err != nil {
		return codes.Unknown, fmt.Sprintf("no status of gRPC: %v", a), a
	}
	return codes.Code(n), said, a
}

// gRPC is a call and what must become of it.
type grpcRow struct {
	what, path string
	message    message
	frame      string // in place of the message
	header     http.Header
	want       codes.Code
	says       string
}

func (p *protocolsUp) calls(t *testing.T, endpoint string, rows []grpcRow) {
	t.Helper()
	app, root := p.as(t, "/app", http2), p.as(t, "/root", http2)
	b := p.servers[endpoint]
	for _, q := range rows {
		body := q.frame
		if body == "" {
			body = q.message.frame()
		}
		b.taken()
		code, said := app.rpc(endpoint, q.path, body, q.header)
		got := b.taken()
		switch {
		case code != q.want || !strings.Contains(said, q.says):
			t.Errorf("%s: %s: %s %q, want %s %q", endpoint, q.what, code, said, q.want, q.says)
		case q.want == codes.OK && (len(got) != 1 || got[0].body != body || got[0].path != q.path):
			t.Errorf("%s: %s: the backend got %+v", endpoint, q.what, got)
		case q.want != codes.OK && len(got) > 0:
			t.Errorf("%s: %s: the backend was asked: %+v", endpoint, q.what, got)
		}
		if strings.Contains(q.says, "everything") {
			if code, said := root.rpc(endpoint, q.path, body, q.header); code != codes.OK || len(b.taken()) != 1 {
				t.Errorf("%s: %s: with a grant on everything: %s %s", endpoint, q.what, code, said)
			}
		}
	}
}

// bad are messages for a method that reads field 1, which every decoder or some would read in another way.
func bad(path string) []grpcRow {
	docs, secret := field(1, "docs"), field(1, "secret")
	rows := []grpcRow{
		{what: "the name twice", message: slices.Concat(docs, secret)},
		{what: "the name and nothing", message: slices.Concat(docs, field(1, ""))},
		{what: "the name as a number", message: slices.Concat(docs, field(1, 7))},
		{what: "the name as fixed64, with the real one behind", message: append(message("\x09\x04docs\x62\x09\x00"), secret...)},
		{what: "the name as fixed32", message: append(message("\x0d\x04doc"), secret...)},
		{what: "a group", message: append(message("\x0b\x0c"), docs...)},
		{what: "the end of a group", message: slices.Concat(docs, message("\x0c"))},
		{what: "wire type 6", message: slices.Concat(docs, message("\x16"))},
		{what: "wire type 7", message: slices.Concat(docs, message("\x17"))},
		{what: "field 0", message: slices.Concat(docs, message("\x00\x00"))},
		{what: "a field that is cut", message: slices.Concat(docs, message("\x12\x05ab"))},
		{what: "a length beyond the end", message: message("\x0a\x7fdocs")},
		{what: "a length without an end", message: message("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01docs")},
		{what: "a tag without an end", message: slices.Concat(docs, message("\x80"))},
		{what: "a number without an end", message: slices.Concat(docs, message("\x10\x80"))},
		{what: "no name", message: field(2, "docs")},
		{what: "an empty name", message: field(1, "")},
		{what: "an empty message", message: message{}},
		{what: "a name with a slash", message: field(1, "docs/x")},
		{what: "a name that is not UTF-8", message: field(1, "docs\xff")},
		{what: "a name with NUL", message: field(1, "docs\x00")},
		{what: "nothing", frame: " "},
		{what: "a frame that is cut", frame: docs.frame()[:8]},
		{what: "a frame that is too short", frame: docs.frame() + "x"},
		{what: "two messages", frame: docs.frame() + secret.frame()},
		{what: "a compressed message", frame: "\x01" + docs.frame()[1:]},
		{what: "a message with another flag", frame: "\x02" + docs.frame()[1:]},
		{what: "an encoding", message: docs, header: http.Header{"Content-Encoding": {"gzip"}}},
	}
	for i := range rows {
		rows[i].path, rows[i].want, rows[i].says = path, codes.InvalidArgument, "The request has "
	}
	return rows
}

func TestQdrantGRPC(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "qdrant")
	const query, batch = "/qdrant.Points/Query", "/qdrant.Points/QueryBatch"
	docs := field(1, "docs")
	lookup := field(1, "secret")
	p.calls(t, "qdrant", bad(query))
	p.calls(t, "qdrant", []grpcRow{
		{what: "query", path: query, message: docs.with(2, field(3, "x")).with(10, 5)},
		{what: "query, the name last", path: query, message: field(10, 5).with(1, "docs")},
		{what: "query, +proto", path: query, message: docs, header: http.Header{"Content-Type": {"application/grpc+proto"}}},
		{what: "another", path: query, message: lookup, want: codes.PermissionDenied, says: domain + "/app has no grant for Read secret (request "},
		{what: "lookup_from", path: query, message: docs.with(14, lookup), want: codes.PermissionDenied, says: "Read on everything here, which field 14 of the message asks for"},
		{what: "lookup_from in a prefetch", path: query, message: docs.with(2, field(8, lookup)), want: codes.PermissionDenied, says: "on everything here"},
		{what: "lookup_from in a prefetch of a prefetch", path: query, message: docs.with(2, field(1, field(1, field(8, lookup)))), want: codes.PermissionDenied, says: "on everything here"},
		{what: "a prefetch as a number", path: query, message: docs.with(2, 1), want: codes.InvalidArgument},
		{what: "with_lookup", path: "/qdrant.Points/QueryGroups", message: docs.with(15, lookup), want: codes.PermissionDenied, says: "on everything here"},
		{what: "a batch", path: batch, message: docs.with(2, docs).with(2, field(3, 1))},
		{what: "a batch with another", path: batch, message: docs.with(2, docs).with(2, lookup), want: codes.PermissionDenied, says: "on everything here, which another name in field 2.1"},
		{what: "a batch with another first", path: batch, message: field(2, lookup).with(1, "docs"), want: codes.PermissionDenied, says: "on everything here"},
		{what: "a batch with lookup_from", path: batch, message: docs.with(2, docs.with(14, lookup)), want: codes.PermissionDenied, says: "on everything here"},
		{what: "aliases", path: "/qdrant.Collections/UpdateAliases", message: docs, want: codes.PermissionDenied, says: "on everything here"},
		{what: "health", path: "/qdrant.Qdrant/HealthCheck", message: message{}},
		{what: "what servers say to one another", path: "/qdrant.PointsInternal/Upsert", message: docs, want: codes.PermissionDenied, says: "not part of the API here"},
		{what: "another case", path: "/qdrant.points/Query", message: docs, want: codes.PermissionDenied, says: "not part of the API here"},
		{what: "JSON", path: query, message: docs, header: http.Header{"Content-Type": {"application/grpc+json"}}, want: codes.PermissionDenied},
		{what: "with a parameter", path: query, message: docs, header: http.Header{"Content-Type": {"application/grpc; charset=x"}}, want: codes.PermissionDenied},
		{what: "17 MiB", path: query, message: docs.with(3, strings.Repeat("x", 17<<20)), want: codes.ResourceExhausted, says: "larger than this gateway reads"},
		{what: "15 MiB", path: query, message: docs.with(3, strings.Repeat("x", 15<<20))},
	})
	// Not gRPC: a path like any other, in no table.
	for _, content := range []string{"application/json", "application/grpc-web", "application/grpc-web+proto", "application/proto"} {
		a := p.as(t, "/root", http2).send(t, request{host: hostOf("qdrant"), path: query, body: strings.NewReader(docs.frame()), header: http.Header{"Content-Type": {content}}})
		if got := p.servers["qdrant"].taken(); len(got) > 0 || a.status == 200 && a.header.Get("grpc-status") == "" {
			t.Errorf("%s: %v, and the backend got %+v", content, a, got)
		}
	}
	t.Run("client", func(t *testing.T) {
		conn := p.grpcAs(t, "/app", "qdrant")
		if err := call(t, conn, query, docs); err != nil {
			t.Error(err)
		}
		err := call(t, conn, query, lookup)
		if s := status.Convert(err); s.Code() != codes.PermissionDenied || !strings.HasPrefix(s.Message(), domain+"/app has no grant for Read secret (request ") {
			t.Error(err)
		}
		f := p.flows(t, 1, func(f telemetry.Flow) bool { return f.Resource == "secret" && f.Verdict == telemetry.Denied })[0]
		if f.Status != http.StatusForbidden || f.Operation != "Read" {
			t.Errorf("recorded as %+v", f)
		}
	})
	// REST goes on by HTTP/1.1, also for a client that speaks HTTP/2.
	if a := p.as(t, "/app", http2).post(t, "qdrant", "/collections/docs/points/query", `{}`); a.status != 200 {
		t.Error(a)
	}
}

func TestWeaviateGRPC(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "weaviate", "tenant")
	const w = "/weaviate.v1.Weaviate/"
	object := func(name string) message { return field(1, "id").with(4, name) }
	docs := field(1, "Docs")
	p.calls(t, "weaviate", []grpcRow{
		{what: "search", path: w + "Search", message: docs.with(10, "any")},
		{what: "search in another", path: w + "Search", message: field(1, "Secret"), want: codes.PermissionDenied, says: "Read Secret"},
		{what: "search in another case", path: w + "Search", message: field(1, "docs"), want: codes.InvalidArgument},
		{what: "search through references", path: w + "Search", message: docs.with(40, field(3, field(3, field(2, "x")))), want: codes.PermissionDenied, says: "on everything here"},
		{what: "objects", path: w + "BatchObjects", message: field(1, object("Docs")).with(1, object("Docs"))},
		{what: "objects of two", path: w + "BatchObjects", message: field(1, object("Docs")).with(1, object("Secret")), want: codes.PermissionDenied, says: "on everything here, which another name in field 1.4"},
		{what: "objects, one of no class", path: w + "BatchObjects", message: field(1, object("Docs")).with(1, field(1, "id")), want: codes.PermissionDenied, says: "on everything here"},
		{what: "an object of two", path: w + "BatchObjects", message: field(1, object("Docs").with(4, "Secret")), want: codes.InvalidArgument},
		{what: "no objects", path: w + "BatchObjects", message: message{}, want: codes.InvalidArgument},
		{what: "references", path: w + "BatchReferences", message: docs, want: codes.PermissionDenied, says: "on everything here"},
		{what: "a stream", path: w + "BatchStream", message: docs, want: codes.PermissionDenied, says: "Write on everything here, which grpc-batch-stream needs"},
	})
	p.calls(t, "tenant", []grpcRow{
		{what: "search", path: w + "Search", message: docs.with(10, "T1")},
		{what: "search elsewhere", path: w + "Search", message: docs.with(10, "T2"), want: codes.InvalidArgument, says: "another database"},
		{what: "search nowhere", path: w + "Search", message: docs, want: codes.InvalidArgument, says: "another database"},
		{what: "search elsewhere in the end", path: w + "Search", message: docs.with(10, "T1").with(10, ""), want: codes.InvalidArgument, says: "another database"},
		{what: "objects", path: w + "BatchObjects", message: field(1, object("Docs").with(5, "T1"))},
		{what: "objects, one of no tenant", path: w + "BatchObjects", message: field(1, object("Docs").with(5, "T1")).with(1, object("Docs")), want: codes.InvalidArgument, says: "another database"},
		{what: "a stream", path: w + "BatchStream", message: docs, want: codes.PermissionDenied, says: "not part of the API here"},
	})
}

func TestMilvusGRPC(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "milvus", "hr")
	const m = "/milvus.proto.milvus.MilvusService/"
	docs := field(3, "docs")
	p.calls(t, "milvus", []grpcRow{
		{what: "connect", path: m + "Connect", message: message{}},
		{what: "search", path: m + "Search", message: docs},
		{what: "search in the default database", path: m + "Search", message: docs.with(2, "default")},
		{what: "search in another", path: m + "Search", message: field(3, "secret"), want: codes.PermissionDenied, says: "Read secret"},
		{what: "search in another database", path: m + "Search", message: docs.with(2, "hr"), want: codes.InvalidArgument, says: "another database"},
		{what: "search in another database by the header", path: m + "Search", message: docs, header: http.Header{"Dbname": {"hr"}}, want: codes.InvalidArgument, says: "another database"},
		{what: "a number in place of a name", path: m + "DescribeCollection", message: field(4, 7), want: codes.PermissionDenied, says: "on everything here"},
		{what: "a number beside a name", path: m + "DescribeCollection", message: docs.with(4, 7), want: codes.PermissionDenied, says: "on everything here"},
		{what: "an empty name and a number", path: m + "DescribeCollection", message: field(3, "").with(4, 7), want: codes.PermissionDenied, says: "on everything here"},
		{what: "rename", path: m + "RenameCollection", message: docs.with(4, "x"), want: codes.PermissionDenied, says: "on everything here"},
		{what: "rename into another database", path: m + "RenameCollection", message: docs.with(5, "hr"), want: codes.InvalidArgument, says: "another database"},
		{what: "replication", path: m + "ReplicateMessage", message: docs, want: codes.PermissionDenied, says: "not part of the API here"},
	})
	p.calls(t, "hr", []grpcRow{
		{what: "search", path: m + "Search", message: docs.with(2, "hr")},
		{what: "search by the header", path: m + "Search", message: docs, header: http.Header{"Dbname": {"hr"}}},
		{what: "search in the default database", path: m + "Search", message: docs, want: codes.InvalidArgument, says: "another database"},
	})
	conn := p.grpcAs(t, "/app", "milvus")
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "dbname", ""), patience)
	defer cancel()
	var out message
	if err := conn.Invoke(ctx, m+"Search", &docs, &out); err != nil || !bytes.Equal(out, docs) {
		t.Errorf("a client: %q, %v", out, err)
	}
}

func TestGRPCRows(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "calls")
	p.calls(t, "calls", []grpcRow{
		{what: "a method", path: "/pkg.Echo/Unary", message: field(1, "x")},
		{what: "a compressed message, which nobody reads", path: "/pkg.Echo/Unary", frame: "\x01" + field(1, "x").frame()[1:]},
		{what: "another method", path: "/pkg.Echo/Other", message: field(1, "x"), want: codes.PermissionDenied, says: "Call pkg.Echo/Other"},
		{what: "a method of another case", path: "/pkg.Echo/unary", message: field(1, "x"), want: codes.PermissionDenied, says: "Call pkg.Echo/unary"},
		{what: "a service", path: "/pkg.Streams/Any", message: message{}},
		{what: "another service that begins like it", path: "/pkg.Streams2/Any", message: message{}, want: codes.PermissionDenied},
		{what: "three segments", path: "/pkg.Echo/Unary/x", message: message{}, want: codes.PermissionDenied, says: "not part of the API here"},
		{what: "climbing", path: "/pkg.Streams/../pkg.Echo/Other", message: message{}, want: codes.PermissionDenied, says: "Call pkg.Echo/Other"},
		{what: "an escape", path: "/pkg.Streams/A%20", message: message{}, want: codes.PermissionDenied},
		{what: "health", path: "/grpc.health.v1.Health/Check", message: message{}},
	})
	a := p.as(t, "/app", http2).send(t, request{host: hostOf("calls"), path: "/pkg.Echo/Unary", body: strings.NewReader("{}"), header: http.Header{"Content-Type": {"application/json"}}})
	if a.status != http.StatusForbidden || len(p.servers["calls"].taken()) > 0 {
		t.Errorf("JSON: %v", a)
	}
}

// TestGRPCStreams lets messages go both ways before either side has ended, denies a stream at once, and ends one with the
// certificate that it began on.
func TestGRPCStreams(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "calls")
	open := func(conn *grpc.ClientConn, method string) grpc.ClientStream {
		s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	send := func(s grpc.ClientStream, text string) (message, error) {
		m := field(1, text)
		if err := s.SendMsg(&m); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		var out message
		err := s.RecvMsg(&out)
		return out, err
	}
	s := open(p.grpcAs(t, "/app", "calls"), "/pkg.Streams/Both")
	for i := range 3 {
		if got, err := send(s, fmt.Sprint(i)); err != nil || !bytes.Equal(got, field(1, fmt.Sprint(i))) {
			t.Fatalf("%q, %v", got, err)
		}
	}
	_ = s.CloseSend()
	var out message
	if err := s.RecvMsg(&out); !errors.Is(err, io.EOF) {
		t.Errorf("the end is %v", err)
	}
	for _, method := range []string{"/pkg.Echo/Both", "/a/b/c"} {
		if _, err := send(open(p.grpcAs(t, "/app", "calls"), method), "x"); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", method, err)
		}
	}
	for name, limit := range map[string]time.Duration{"no deadline": 0, "a later deadline": time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cert, end := p.endsIn(t, "/app", 4*time.Second)
			ctx := t.Context()
			if limit > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, limit)
				defer cancel()
			}
			s, err := p.grpcWith(t, cert, "calls").NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/pkg.Streams/Both")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := send(s, "x"); err != nil {
				t.Fatal(err)
			}
			var out message
			err = s.RecvMsg(&out)
			if late := time.Since(end); err == nil || late < -time.Second || late > time.Second {
				t.Errorf("ended %s behind the end of its certificate: %v", late, err)
			}
		})
	}
}

func TestWebSocket(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "ai", "gemini")
	app := p.as(t, "/app", http1)
	talk := func(conn net.Conn, r io.Reader) error {
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(conn, "hello"); err != nil {
			return err
		}
		_, err := io.ReadFull(r, make([]byte, 5))
		return err
	}
	conn, r, a := app.upgrade(t, hostOf("ai"), "/v1/realtime?model=m", "")
	if a.status != http.StatusSwitchingProtocols {
		t.Fatal(a)
	}
	for range 2 {
		if err := talk(conn, r); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.servers["ai"].taken(); len(got) != 1 || got[0].header.Get("grpc-timeout") != "" || got[0].path != "/v1/realtime?model=m" {
		t.Errorf("the backend got %+v", got)
	}
	for what, q := range map[string]struct {
		endpoint, path, header string
		want                   int
	}{
		"another model":            {"ai", "/v1/realtime?model=o", "", 403},
		"no model":                 {"ai", "/v1/realtime", "", 400},
		"two models":               {"ai", "/v1/realtime?model=m&model=o", "", 400},
		"somebody's call":          {"ai", "/v1/realtime?model=m&call_id=c", "", 403},
		"somebody's call, escaped": {"ai", "/v1/realtime?model=m&c%61ll_id=c", "", 403},
		"transcription":            {"ai", "/v1/realtime?intent=transcription", "", 403},
		"each message its model":   {"ai", "/v1/responses", "", 403},
		"a row that is none":       {"ai", "/v1/files", "", 403},
		"no row":                   {"ai", "/x", "", 403},
		"a live session":           {"gemini", "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent", "", 403},
	} {
		if _, _, a := app.upgrade(t, hostOf(q.endpoint), q.path, q.header); a.status != q.want {
			t.Errorf("%s: %v, want %d", what, a, q.want)
		}
	}
	for _, name := range []string{"ai", "gemini"} {
		if got := p.servers[name].taken(); len(got) > 0 {
			t.Errorf("the backend was asked: %+v", got)
		}
	}
	if _, _, a := p.as(t, "/root", http1).upgrade(t, hostOf("gemini"), "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent", ""); a.status != http.StatusSwitchingProtocols {
		t.Errorf("with a grant on everything: %v", a)
	}
	// What is upgraded on a row that is no WebSocket is not.
	if _, _, a := p.as(t, "/root", http1).upgrade(t, hostOf("ai"), "/v1/files", ""); a.status != http.StatusForbidden || len(p.servers["ai"].taken()) > 0 {
		t.Errorf("an upgrade of files: %v", a)
	}
	// No time at all is not all the time.
	for _, timeout := range []string{"0S", "1n", "00000000m"} {
		if conn, r, a := app.upgrade(t, hostOf("ai"), "/v1/realtime?model=m", "Grpc-Timeout: "+timeout+"\r\n"); a.status == http.StatusSwitchingProtocols {
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v", timeout, err)
			}
		}
	}
	t.Run("ends", func(t *testing.T) {
		cert, end := p.endsIn(t, "/app", 4*time.Second)
		conn, r, a := p.with(t, http1, cert).upgrade(t, hostOf("ai"), "/v1/realtime?model=m", "Grpc-Timeout: 1H\r\n")
		if a.status != http.StatusSwitchingProtocols {
			t.Fatal(a)
		}
		if err := talk(conn, r); err != nil {
			t.Fatal(err)
		}
		_, err := r.ReadByte()
		if late := time.Since(end); err == nil || late < -time.Second || late > 3*time.Second { // it is cut, and closed a second later
			t.Errorf("cut %s behind the end of its certificate: %v", late, err)
		}
	})
}

// TestMessagesAsDecodersReadThem sends what no encoder writes: whatever is let through is read by Go's protobuf as a message
// about what was granted, and about nothing else.
func TestMessagesAsDecodersReadThem(t *testing.T) {
	t.Parallel()
	p := startProtocols(t, "qdrant")
	app := p.as(t, "/app", http2)
	rapid.Check(t, func(t *rapid.T) {
		for range 20 {
			readAlike(t, app)
		}
	})
}

const deepest = 3

func readAlike(t *rapid.T, app *caller) {
	docs := field(1, "docs")
	m := fragments(t, deepest)
	if rapid.Bool().Draw(t, "first") {
		m = slices.Concat(docs, m)
	} else {
		m = slices.Concat(m, docs)
	}
	switch rapid.IntRange(0, 7).Draw(t, "damage") {
	case 1:
		m = m[:rapid.IntRange(0, len(m)).Draw(t, "end")]
	case 2:
		if len(m) > 0 {
			m[rapid.IntRange(0, len(m)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
		}
	}
	for path, decoder := range decoders {
		code, said := app.rpc("qdrant", path, m.frame(), nil)
		if code != codes.OK && code != codes.PermissionDenied && code != codes.InvalidArgument {
			t.Fatalf("%s %x: %s %s", path, m, code, said)
		}
		read := dynamicpb.NewMessage(decoder)
		err := proto.Unmarshal(m, read)
		if code == codes.OK && err == nil && !about(read, "docs", true) {
			t.Fatalf("%s %x is allowed, and is %v", path, m, read)
		}
		if code == codes.InvalidArgument && err == nil && strict(m, decoder) {
			t.Fatalf("%s %x is refused (%s), and is %v", path, m, said, read)
		}
	}
}

// fragments are fields as they may come, and as they may not.
func fragments(t *rapid.T, depth int) message {
	m := message{}
	for range rapid.IntRange(0, 3).Draw(t, "fields") {
		numbers := []int{1, 1, 2, 8, 14, 1000}
		if depth == deepest { // where a name stands already
			numbers = []int{2, 2, 2, 2, 14, 1000, 1}
		}
		number := protowire.Number(rapid.SampledFrom(numbers).Draw(t, "number"))
		kinds := []string{"docs", "name", "message", "message", "message"}
		if rapid.IntRange(0, 9).Draw(t, "odd") == 0 {
			kinds = []string{"number", "fixed32", "fixed64", "group"}
		}
		switch rapid.SampledFrom(kinds).Draw(t, "kind") {
		case "docs":
			m = m.with(number, "docs")
		case "name":
			m = m.with(number, rapid.SampledFrom([]string{"secret", "secret", "", "\xff"}).Draw(t, "name"))
		case "message":
			if depth > 0 {
				m = m.with(number, fragments(t, depth-1))
			}
		case "number":
			m = m.with(number, rapid.IntRange(0, 1<<40).Draw(t, "value"))
		case "fixed32":
			m = protowire.AppendFixed32(protowire.AppendTag(m, number, protowire.Fixed32Type), rapid.Uint32().Draw(t, "value"))
		case "fixed64":
			m = protowire.AppendFixed64(protowire.AppendTag(m, number, protowire.Fixed64Type), rapid.Uint64().Draw(t, "value"))
		case "group":
			m = protowire.AppendTag(append(protowire.AppendTag(m, number, protowire.StartGroupType), fragments(t, 0)...), number, protowire.EndGroupType)
		}
	}
	return m
}

// decoders are QueryPoints and QueryBatchPoints of Qdrant, as far as they name collections.
var decoders = func() map[string]protoreflect.MessageDescriptor {
	one := func(name string, number int32, repeated bool, of string) *descriptorpb.FieldDescriptorProto {
		f := &descriptorpb.FieldDescriptorProto{Name: &name, Number: &number, Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum(), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum()}
		if of != "" {
			f.Type, f.TypeName = descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum(), new("."+of)
		}
		if repeated {
			f.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
		}
		return f
	}
	made := func(name string, fields ...*descriptorpb.FieldDescriptorProto) *descriptorpb.DescriptorProto {
		return &descriptorpb.DescriptorProto{Name: &name, Field: fields}
	}
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{Name: new("q.proto"), Syntax: new("proto3"), MessageType: []*descriptorpb.DescriptorProto{
		made("Lookup", one("lookup_name", 1, false, "")),
		made("Prefetch", one("prefetch", 1, true, "Prefetch"), one("lookup", 8, false, "Lookup")),
		made("Query", one("name", 1, false, ""), one("prefetch", 2, true, "Prefetch"), one("lookup", 14, false, "Lookup")),
		made("Batch", one("name", 1, false, ""), one("query", 2, true, "Query")),
	}}, nil)
	if err != nil {
		panic(err)
	}
	return map[string]protoreflect.MessageDescriptor{
		"/qdrant.Points/Query":      file.Messages().ByName("Query"),
		"/qdrant.Points/QueryBatch": file.Messages().ByName("Batch"),
	}
}()

// about reports whether the message names this collection and no other. Those of a batch need not name any.
func about(m protoreflect.Message, name string, needed bool) bool {
	ok := true
	if f := m.Descriptor().Fields().ByName("name"); f != nil {
		got := m.Get(f).String()
		ok = got == name || got == "" && !needed
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Name() == "lookup":
			ok = false
		case f.IsList():
			for i := range v.List().Len() {
				ok = ok && about(v.List().Get(i).Message(), name, false)
			}
		}
		return ok
	})
	return ok
}

// known reports whether the message has no field but those that are described.
func known(m protoreflect.Message) bool {
	ok := len(m.GetUnknown()) == 0
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList():
			for i := range v.List().Len() {
				ok = ok && known(v.List().Get(i).Message())
			}
		case f.Message() != nil:
			ok = ok && known(v.Message())
		}
		return ok
	})
	return ok
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// strict reports whether the message is as an encoder writes it, with a name that can be one.
func strict(m message, of protoreflect.MessageDescriptor) bool {
	read := dynamicpb.NewMessage(of)
	if proto.Unmarshal(m, read) != nil {
		return false
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(read)
	name := read.Get(of.Fields().ByName("name")).String()
	return err == nil && bytes.Equal(again, m) && known(read) && plainName.MatchString(name)
}
