package catalog

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/segment"
)

// readFields calls back with what the length-delimited fields of a number hold.
func readFields(t *testing.T, message []byte, number protowire.Number, each func([]byte)) {
	t.Helper()
	err := fields(message, func(f field) error {
		if f.number == number {
			v, err := f.bytes()
			each(v)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// raw lets gRPC pass messages as they are.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                       { return "proto" }

// store is a server of gRPC that has one answer to everything.
func grpcStore(answer func(method string, message []byte) ([]byte, error)) http.Handler {
	return grpc.NewServer(grpc.ForceServerCodec(raw{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		var message []byte
		if err := stream.RecvMsg(&message); err != nil {
			return err
		}
		out, err := answer(method, message)
		if err != nil {
			return err
		}
		return stream.SendMsg(&out)
	}))
}

// call calls the catalogue by gRPC, through what a gateway adds.
func (l *listing) call(route, method string, message []byte) ([]byte, error) {
	l.t.Helper()
	gateway := overBoth(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set(envoy.CallerHeader, reader)
		r.Header.Set(envoy.EndpointHeader, "it")
		r.Header.Set(envoy.RouteHeader, route)
		r.Header.Set("x-request-id", "r-1")
		l.catalog.ServeHTTP(w, r)
	}))
	l.t.Cleanup(gateway.Close)
	conn, err := grpc.NewClient(gateway.Listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	var out []byte
	err = conn.Invoke(l.t.Context(), method, &message, &out, grpc.ForceCodec(raw{}))
	return out, err
}

const (
	qdrantListMethod = "/qdrant.Collections/List"
	milvusShowMethod = "/milvus.proto.milvus.MilvusService/ShowCollections"
)

func TestQdrantOverGRPC(t *testing.T) {
	var list []byte
	for _, name := range []string{"public-b", "secret", "public-a"} {
		list = appendBytes(list, 1, appendBytes(nil, 1, []byte(name)))
	}
	list = protowire.AppendFixed64(protowire.AppendTag(list, 2, protowire.Fixed64Type), 1) // time
	l := newListing(t, segment.Qdrant, grpcStore(func(method string, _ []byte) ([]byte, error) {
		if method != qdrantListMethod {
			return nil, status.Error(codes.Unimplemented, method)
		}
		return list, nil
	})).allow("public-*")
	got, err := l.call("grpc-list-collections", qdrantListMethod, nil)
	want := appendBytes(appendBytes(nil, 1, appendBytes(nil, 1, []byte("public-a"))), 1, appendBytes(nil, 1, []byte("public-b")))
	if err != nil || string(got) != string(want) {
		t.Errorf("%q, %v", got, err)
	}
	if got, err = l.grants().call("grpc-list-collections", qdrantListMethod, nil); err != nil || len(got) != 0 {
		t.Errorf("without a grant: %q, %v", got, err)
	}
}

func TestMilvusOverGRPC(t *testing.T) {
	names := []string{"public_b", "secret", "public_a", "public_c"}
	var asked []byte
	answer := func(status []byte) []byte {
		list := appendBytes(nil, shownStatus, status)
		var ids, made []byte
		for i, name := range names {
			list = appendBytes(list, shownNames, []byte(name))
			ids = protowire.AppendVarint(ids, uint64(100+i))
			made = protowire.AppendVarint(protowire.AppendTag(made, 5, protowire.VarintType), uint64(200+i)) // not packed
		}
		list = append(appendBytes(list, 3, ids), made...)
		return appendBytes(list, 6, []byte{1, 2}) // of whom?
	}
	status := []byte(nil)
	l := newListing(t, segment.Milvus, grpcStore(func(_ string, message []byte) ([]byte, error) {
		asked = message
		return answer(status), nil
	})).allow("public*")
	read := func(message []byte) string {
		var got []string
		readFields(t, message, 2, func(name []byte) { got = append(got, string(name)) })
		for n := protowire.Number(3); n <= 8; n++ {
			readFields(t, message, n, func(packed []byte) {
				all, err := field{n, protowire.BytesType, protowire.AppendBytes(nil, packed)}.varints()
				got = append(got, fmt.Sprint(n, all, err))
			})
		}
		return strings.Join(got, " ")
	}
	got, err := l.call("grpc-show-collections", milvusShowMethod, nil)
	if want := "public_a public_b public_c 3 [102 100 103] <nil> 5 [202 200 203] <nil>"; err != nil || read(got) != want {
		t.Errorf("%s, %v", read(got), err)
	}
	if want := "\x12\x07default\x20\x00"; string(asked) != want {
		t.Errorf("asked for %q", asked)
	}

	// Of some names, of what is loaded: what is hidden is not there.
	got, err = l.call("grpc-show-collections", milvusShowMethod, []byte("\x12\x07default\x20\x01\x2a\x08public_a\x2a\x06secret\x2a\x04none"))
	if want := "public_a 3 [102] <nil> 5 [202] <nil>"; err != nil || read(got) != want || string(asked) != "\x12\x07default\x20\x01" {
		t.Errorf("%s, %v, asked for %q", read(got), err, asked)
	}

	for _, failure := range [][]byte{{0x08, 1}, {0x18, 0xe4, 0}, {0x18, 0x80}, {0xff}} {
		status = failure
		if _, err := l.call("grpc-show-collections", milvusShowMethod, nil); code(err) != codes.Unavailable {
			t.Errorf("status %v: %v", failure, err)
		}
	}
}

func code(err error) codes.Code { return status.Code(err) }

func TestOddGRPC(t *testing.T) {
	for what, answer := range map[string]func(string, []byte) ([]byte, error){
		"an error":       func(string, []byte) ([]byte, error) { return nil, status.Error(codes.PermissionDenied, "secret") },
		"no message":     func(string, []byte) ([]byte, error) { return []byte("\x0a\x06sec"), nil },
		"no collection":  func(string, []byte) ([]byte, error) { return []byte("\x0a\x03sec"), nil },
		"a number":       func(string, []byte) ([]byte, error) { return []byte("\x08\x01"), nil },
		"a group":        func(string, []byte) ([]byte, error) { return []byte("\x0b\x0a\x06secret"), nil },
		"a named number": func(string, []byte) ([]byte, error) { return []byte("\x0a\x02\x08\x01"), nil },
	} {
		_, err := newListing(t, segment.Qdrant, grpcStore(answer)).allow("*").call("grpc-list-collections", qdrantListMethod, nil)
		if code(err) != codes.Unavailable || status.Convert(err).Message() != "the backend can't be reached (request r-1)" {
			t.Errorf("%s: %v", what, err)
		}
	}
	l := newListing(t, segment.Qdrant, http.NotFoundHandler()).allow("*")
	if _, err := l.call("grpc-list-collections", qdrantListMethod, nil); code(err) != codes.Unavailable {
		t.Errorf("no gRPC: %v", err)
	}
	l.endpoint.Backends[0].GRPC = nil
	if _, err := l.allow("*").call("grpc-list-collections", qdrantListMethod, nil); code(err) != codes.Unavailable {
		t.Errorf("no address: %v", err)
	}
	if _, err := l.call("grpc-show-collections", milvusShowMethod, nil); err == nil {
		t.Error("another protocol's route is answered")
	}
	m := newListing(t, segment.Milvus, grpcStore(func(string, []byte) ([]byte, error) { return nil, errors.New("asked") })).allow("*")
	for _, message := range []string{"\xff", "\x22\x01", "\x2a\x05x", "\x28\x01"} {
		if _, err := m.call("grpc-show-collections", milvusShowMethod, []byte(message)); code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", message, err)
		}
	}
	for _, frame := range []string{"\x00", "\x01\x00\x00\x00\x00", "\x00\x00\x00\x00\x01", "\x00\x00\x00\x00\x00\x00", "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"} {
		if w := m.ask("grpc-show-collections", milvusShowMethod, frame); w.Header().Get("grpc-status") != "3" || w.Code != http.StatusOK {
			t.Errorf("%q: %d %v", frame, w.Code, w.Header())
		}
	}
}
