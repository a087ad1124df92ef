package sds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strconv"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// typeURL is of the one resource type that SDS has.
const typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

type server struct {
	issuer Issuer
	log    *slog.Logger
}

// FetchSecrets answers once.
func (s *server) FetchSecrets(ctx context.Context, req *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	c := newCaller(s.issuer)
	secrets, err := c.secrets(ctx, req.ResourceNames)
	if err != nil {
		return nil, err
	}
	return response(secrets), nil
}

// StreamSecrets is state of the world: each request names everything that is wanted.
func (s *server) StreamSecrets(stream secretservice.SecretDiscoveryService_StreamSecretsServer) error {
	var nonce int
	return serve(stream.Context(), s.issuer, wire[*discovery.DiscoveryRequest]{
		recv: stream.Recv,
		accept: func(req *discovery.DiscoveryRequest, sent map[string]string) error {
			if req.ResponseNonce != "" && req.ResponseNonce != strconv.Itoa(nonce) {
				return nil // an answer to an earlier response: the one to the last is on its way
			}
			s.refused(stream.Context(), req.ErrorDetail)
			maps.DeleteFunc(sent, func(name, _ string) bool { return !slices.Contains(req.ResourceNames, name) })
			for _, name := range req.ResourceNames {
				if _, ok := sent[name]; !ok {
					sent[name] = ""
				}
			}
			return checkType(req.TypeUrl)
		},
		send: func(secrets []secret) error {
			nonce++
			resp := response(secrets)
			resp.Nonce = strconv.Itoa(nonce)
			return stream.Send(resp)
		},
	})
}

// DeltaSecrets is incremental: each request names what is wanted from now on, and what no longer is.
func (s *server) DeltaSecrets(stream secretservice.SecretDiscoveryService_DeltaSecretsServer) error {
	var nonce int
	return serve(stream.Context(), s.issuer, wire[*discovery.DeltaDiscoveryRequest]{
		recv: stream.Recv,
		accept: func(req *discovery.DeltaDiscoveryRequest, sent map[string]string) error {
			s.refused(stream.Context(), req.ErrorDetail)
			for _, name := range req.ResourceNamesUnsubscribe {
				delete(sent, name)
			}
			for _, name := range req.ResourceNamesSubscribe {
				sent[name] = "" // also if it was sent: who asks again wants it again
			}
			return checkType(req.TypeUrl)
		},
		send: func(secrets []secret) error {
			nonce++
			resp := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: strconv.Itoa(nonce)}
			for _, s := range secrets {
				resp.Resources = append(resp.Resources, &discovery.Resource{Name: s.name, Version: s.version, Resource: s.any})
			}
			return stream.Send(resp)
		},
	})
}

// wire is in what form requests come and responses go.
type wire[Request any] struct {
	recv func() (Request, error)
	// accept notes in sent, which has for each name that is wanted the version last sent, what a request says.
	accept func(req Request, sent map[string]string) error
	send   func([]secret) error
}

// serve sends each secret that is wanted when it is first asked for, when the caller's entries change, and when it is
// due for replacement; never one that is as it was.
func serve[Request any](ctx context.Context, i Issuer, w wire[Request]) error {
	requests, ended := make(chan Request), make(chan error, 1)
	go func() {
		for {
			req, err := w.recv() // returns when serve has
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()
	c := newCaller(i)
	sent := make(map[string]string)
	for {
		select {
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case req := <-requests:
			if err := w.accept(req, sent); err != nil {
				return err
			}
		case <-c.view.Changed:
		case <-c.wallet.Due():
		}
		secrets, err := c.secrets(ctx, slices.Sorted(maps.Keys(sent)))
		if err != nil {
			return err
		}
		secrets = slices.DeleteFunc(secrets, func(s secret) bool { return sent[s.name] == s.version })
		if len(secrets) == 0 {
			continue
		}
		if err := w.send(secrets); err != nil {
			return err
		}
		for _, s := range secrets {
			sent[s.name] = s.version
		}
	}
}

// response is named by the digests of what it holds.
func response(secrets []secret) *discovery.DiscoveryResponse {
	resp := &discovery.DiscoveryResponse{TypeUrl: typeURL, Resources: make([]*anypb.Any, len(secrets))}
	for i, s := range secrets {
		resp.Resources[i] = s.any
		resp.VersionInfo += s.version
	}
	return resp
}

// refused logs that an Envoy cannot use what it was sent. It goes on with what it had.
func (s *server) refused(ctx context.Context, why *status.Status) {
	if why != nil {
		s.log.WarnContext(ctx, "secret refused", "error", why.Message)
	}
}

func checkType(url string) error {
	if url != "" && url != typeURL {
		return grpcstatus.Errorf(codes.InvalidArgument, "no resources of type %q here", url)
	}
	return nil
}
