package catalog

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	"sallyport.dev/controlplane/envoy"
)

// gRPC over HTTP/2, as far as a call with one message each way needs it. The messages are few and small: they are read and
// written by the numbers of their fields.

const grpcContent = "application/grpc"

// overGRPC answers a call with a message.
func overGRPC(answer func(*http.Request, *question, []byte) ([]byte, error)) answering {
	return func(c *Catalog, w http.ResponseWriter, r *http.Request, q *question) {
		message, err := asked(r)
		if err == nil {
			message, err = answer(r, q, message)
		}
		w.Header().Set("content-type", grpcContent)
		if err != nil {
			told := c.refused(q, err)
			code := codes.Unavailable
			if told.code == http.StatusBadRequest {
				code = codes.InvalidArgument
			}
			w.Header().Set("grpc-status", strconv.Itoa(int(code)))
			w.Header().Set("grpc-message", url.PathEscape(told.why+" (request "+r.Header.Get("x-request-id")+")"))
			return
		}
		w.Header().Set("trailer", "grpc-status")
		_, _ = w.Write(framed(message))
		w.Header().Set("grpc-status", "0")
	}
}

// asked is the message of a caller.
func asked(r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, envoy.MaxBodyBytes))
	if err != nil {
		return nil, err
	}
	message, err := unframed(body)
	if err != nil {
		return nil, refusal{http.StatusBadRequest, err.Error()}
	}
	return message, nil
}

// rpc calls a method of a store that only lists.
func (s store) rpc(ctx context.Context, method string, message []byte) ([]byte, error) {
	a, err := s.do(ctx, call{method: http.MethodPost, at: method, body: framed(message), lists: true, grpc: true,
		header: map[string]string{"content-type": grpcContent, "te": "trailers"}})
	if err != nil {
		return nil, err
	}
	if status := cmp.Or(a.trailer.Get("grpc-status"), a.header.Get("grpc-status")); a.code != http.StatusOK || status != "0" {
		return nil, fmt.Errorf("call %s: status %d, grpc-status %q", method, a.code, status)
	}
	return unframed(a.body)
}

// framed is a Length-Prefixed-Message, not compressed.
func framed(message []byte) []byte {
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	return append(frame, message...)
}

func unframed(body []byte) ([]byte, error) {
	if len(body) < 5 || body[0] != 0 || uint64(binary.BigEndian.Uint32(body[1:])) != uint64(len(body)-5) {
		return nil, errors.New("the body is not exactly one message that is not compressed")
	}
	return body[5:], nil
}

// field is one of a message, as it is written.
type field struct {
	number protowire.Number
	kind   protowire.Type
	value  []byte // behind the tag
}

// fields calls back with each field of a message.
func fields(message []byte, each func(field) error) error {
	for len(message) > 0 {
		number, kind, tag := protowire.ConsumeTag(message)
		if tag < 0 {
			return fmt.Errorf("read message: %w", protowire.ParseError(tag))
		}
		n := protowire.ConsumeFieldValue(number, kind, message[tag:])
		if n < 0 {
			return fmt.Errorf("read message: %w", protowire.ParseError(n))
		}
		if err := each(field{number, kind, message[tag : tag+n]}); err != nil {
			return err
		}
		message = message[tag+n:]
	}
	return nil
}

// bytes is what a string or a message in a message holds.
func (f field) bytes() ([]byte, error) {
	if f.kind != protowire.BytesType {
		return nil, fmt.Errorf("read message: field %d has wire type %d", f.number, f.kind)
	}
	v, _ := protowire.ConsumeBytes(f.value)
	return v, nil
}

// varints are the numbers that a field holds: one, or any number of them if it is packed.
func (f field) varints() ([]uint64, error) {
	if f.kind == protowire.VarintType {
		v, _ := protowire.ConsumeVarint(f.value)
		return []uint64{v}, nil
	}
	packed, err := f.bytes()
	var all []uint64
	for len(packed) > 0 {
		v, n := protowire.ConsumeVarint(packed)
		if n < 0 {
			return nil, fmt.Errorf("read message: %w", protowire.ParseError(n))
		}
		all, packed = append(all, v), packed[n:]
	}
	return all, err
}

func appendBytes(b []byte, number protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, number, protowire.BytesType), value)
}
