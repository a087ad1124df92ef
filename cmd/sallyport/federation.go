package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"golang.org/x/sync/errgroup"

	"sallyport.dev/controlplane"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/identity/federation"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

// federationFlags are how others learn our keys: other trust domains, and whoever verifies JWT-SVIDs as OpenID Connect
// tokens.
type federationFlags struct {
	endpoint  string // empty: nowhere
	cert, key string // of a web server; empty: the control plane's X.509-SVID
	issuer    string // empty: JWT-SVIDs name none
}

func (f *federationFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.endpoint, "bundle-endpoint", "", "`ADDRESS` and port on which other trust domains fetch our bundle (SPIFFE Federation); empty: nowhere")
	flags.StringVar(&f.cert, "bundle-endpoint-cert", "", "`PATH` of a web certificate (PEM) for it (https_web); without, it shows the control plane's X.509-SVID (https_spiffe)")
	flags.StringVar(&f.key, "bundle-endpoint-key", "", "`PATH` of the certificate's private key (PEM)")
	flags.StringVar(&f.issuer, "oidc-issuer", "", "https `URL` at which OpenID Connect discovery finds the bundle endpoint, and which JWT-SVIDs then name as their issuer")
}

func (f *federationFlags) check() error {
	switch {
	case f.endpoint == "" && (f.cert != "" || f.key != ""):
		return usage("name its address with --bundle-endpoint", "--bundle-endpoint-cert and --bundle-endpoint-key: there is no bundle endpoint")
	case f.endpoint == "" && f.issuer != "":
		return usage("name the address of the documents that verifiers look for with --bundle-endpoint", "--oidc-issuer: there is no bundle endpoint")
	case (f.cert == "") != (f.key == ""):
		return usage("give both, or none", "--bundle-endpoint-cert and --bundle-endpoint-key belong together")
	}
	if _, err := federation.NewHandler(federation.HandlerConfig{Issuer: f.issuer}); err != nil {
		return usage("as in https://identity.example.org, letter by letter as verifiers are told", "--oidc-issuer: %w", err)
	}
	return nil
}

// profile is how the bundle endpoint shows itself.
func (f *federationFlags) profile() segment.EndpointProfile {
	switch {
	case f.endpoint == "":
		return ""
	case f.cert != "":
		return segment.HTTPSWeb
	}
	return segment.HTTPSSPIFFE
}

// about adds what operators want to know of it.
func (f *federationFlags) about(to *operator.About) {
	to.BundleEndpoint, to.BundleProfile, to.OIDCIssuer = f.endpoint, f.profile(), f.issuer
}

// openBundleEndpoint opens where others fetch our bundle.
func (p *plane) openBundleEndpoint() error {
	f := p.federation
	if f.endpoint == "" {
		return nil
	}
	handler, err := federation.NewHandler(federation.HandlerConfig{
		Bundle: func() *spiffebundle.Bundle { return p.bundles.now().Own }, Issuer: f.issuer})
	if err != nil {
		return err
	}
	config := federation.SPIFFETLS(p.own)
	if f.profile() == segment.HTTPSWeb {
		if config, err = federation.WebTLS(f.cert, f.key, p.log); err != nil {
			return failed("give PEM files that belong together with --bundle-endpoint-cert and --bundle-endpoint-key", "serve the bundle: %w", err)
		}
	}
	if p.bundleListener, err = net.Listen("tcp", f.endpoint); err != nil {
		return failed("name another with --bundle-endpoint", "serve the bundle: %w", err)
	}
	p.bundleServer = bundleServer(handler, config, p.log)
	return nil
}

// maxBundleConnections bounds what strangers can make us hold: everybody may ask for the bundle.
const maxBundleConnections = 1024

func bundleServer(h http.Handler, config *tls.Config, log *slog.Logger) *http.Server {
	var open atomic.Int64
	return &http.Server{
		Handler:           h,
		TLSConfig:         config,
		ReadHeaderTimeout: 10 * time.Second, // the handshake's, too
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // the noise of strangers
		ConnState: func(c net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				if open.Add(1) > maxBundleConnections {
					c.Close()
				}
			case http.StateClosed:
				open.Add(-1)
			}
		},
	}
}

func (p *plane) serveBundleEndpoint(ctx context.Context, group *errgroup.Group) {
	if p.bundleServer == nil {
		return
	}
	group.Go(func() error {
		if err := p.bundleServer.ServeTLS(p.bundleListener, "", ""); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the bundle: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return p.bundleServer.Close()
	})
}

// federated is the sink that says which trust domains are followed.
type federated struct{ follower *federation.Follower }

func (s federated) Publish(_ context.Context, g *controlplane.Generation) error {
	s.follower.Set(g.Config.Federated)
	return nil
}

// ownSVID is the control plane's own X.509-SVID, for what it serves to other machines.
type ownSVID struct {
	issuer.Self
	changed chan struct{} // of size 1: there are other authorities
}

func (p *plane) newOwnSVID() *ownSVID {
	return &ownSVID{
		Self: issuer.Self{
			Signer: p.local, Entry: issuer.Entry{ID: nodepb.ControlPlane(p.options.TrustDomain), TTL: p.options.SVIDTTL},
			Bundle: func() *spiffebundle.Bundle { return p.bundles.now().Own }, Log: p.log,
		},
		changed: make(chan struct{}, 1),
	}
}

// Run keeps it until the context ends.
func (o *ownSVID) Run(ctx context.Context) error {
	for {
		select {
		case <-o.Renew(ctx):
		case <-o.changed:
		case <-ctx.Done():
			return nil
		}
	}
}
