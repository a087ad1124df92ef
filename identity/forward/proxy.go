package forward

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strings"
)

// keyHeaders hold the keys that SDKs insist on. A caller is its SVID.
var keyHeaders = []string{"Authorization", "Proxy-Authorization", "X-Api-Key", "Api-Key", "X-Chroma-Token"}

// problem is what the forwarder itself says to an application.
type problem struct {
	status  int
	message string
	kind    string // OpenAI's error.type
	code    string
	hint    string
}

// write words it in the shape of OpenAI's errors. The hint is part of the message, which is all that SDKs show.
func (p problem) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.status)
	_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]string{ // nobody is left to be told
		"message": p.message + "; hint: " + p.hint, "type": p.kind, "code": p.code,
	}})
}

func (s *server) serve(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		panic(http.ErrAbortHandler)
	}
	defer s.running.Done()
	if why := s.foreign(r); why != "" {
		problem{http.StatusForbidden, why, "permission_denied", "not_an_application",
			"applications on this machine use http://127.0.0.1:PORT/ENDPOINT/v1; browsers are not served"}.write(w)
		return
	}
	name, path := split(r.URL)
	target, err := s.Gateway(name)
	if err == nil && len(target.Addresses) == 0 {
		err = ErrNoAddress
	}
	if err != nil {
		targetProblem(name, err).write(w)
		return
	}
	c := r.Context().Value(connKey{}).(*conn)
	err = c.refused
	if err == nil {
		err = c.process.Check()
	}
	if err != nil {
		w.Header().Set("Connection", "close") // it will not become anybody's
		problem{http.StatusServiceUnavailable, err.Error(), "api_error", "not_attested",
			"one process must hold a connection, and the agent must be allowed to see which; a Unix socket needs less"}.write(w)
		return
	}
	session, err := s.session(ctx, c.process)
	if err != nil {
		identityProblem(err).write(w)
		return
	}
	defer session.release()
	identity, err := session.current(r.Context())
	if err != nil {
		identityProblem(err).write(w)
		return
	}
	r.Header.Del("Upgrade") // what would follow is not HTTP
	(&httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL = &url.URL{Scheme: "https", Host: target.ServerName, Path: path.Path, RawPath: path.RawPath,
				RawQuery: p.In.URL.RawQuery, ForceQuery: p.In.URL.ForceQuery}
			p.Out.Host = target.ServerName
			for _, h := range keyHeaders {
				p.Out.Header.Del(h)
			}
		},
		Transport:     identity.transport(target),
		FlushInterval: -1, // each event when it comes
		ErrorLog:      slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			p := gatewayProblem(err)
			if identity.conns.isClosed() {
				p = identityProblem(errLost)
			}
			if r.Context().Err() == nil { // else it is the caller that is gone
				s.warn(p.code, "request not forwarded", "caller", identity.svid.ID.String(), "endpoint", name,
					"gateway", strings.Join(target.Addresses, " "), "error", err)
			}
			p.write(w)
		},
	}).ServeHTTP(w, r)
}

// foreign says why a request can't be that of an application that was pointed here. A web page can make a browser of
// this machine send requests to loopback, and by DNS also under a name of the page's own; the browser says so in
// headers that no page can leave out (Fetch Standard, 3.2 and Fetch Metadata, 2).
func (s *server) foreign(r *http.Request) string {
	if tcp, ok := s.Listener.Addr().(*net.TCPAddr); ok && !isLocal(r.Host, tcp.Port) {
		return fmt.Sprintf("%.100q is not the name of this machine and port", r.Host)
	}
	if site := r.Header.Get("Sec-Fetch-Site"); len(r.Header["Origin"]) > 0 || site != "" && site != "none" {
		return "the request was made by a web page"
	}
	return ""
}

// isLocal reports whether a Host header means loopback, and the port.
func isLocal(hostport string, port int) bool {
	host, p, err := net.SplitHostPort(hostport)
	if err != nil {
		host, p = strings.Trim(hostport, "[]"), "80"
	}
	if p != fmt.Sprint(port) {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback() || strings.EqualFold(host, "localhost")
}

// split returns the endpoint that a URL names, and what its path is at the gateway, escaped as it came.
func split(u *url.URL) (endpoint string, path url.URL) {
	escaped, ok := strings.CutPrefix(u.EscapedPath(), "/")
	if !ok {
		return "", url.URL{}
	}
	endpoint, rest, _ := strings.Cut(escaped, "/")
	rest = "/" + rest
	plain, err := url.PathUnescape(rest)
	if err != nil {
		return "", url.URL{}
	}
	return endpoint, url.URL{Path: plain, RawPath: rest}
}

// targetProblem says why an endpoint leads nowhere.
func targetProblem(name string, err error) problem {
	switch {
	case errors.Is(err, ErrNotTold):
		return problem{http.StatusServiceUnavailable, err.Error(), "api_error", "endpoints_unknown",
			"the control plane tells the agent: look at the agent's log"}
	case errors.Is(err, ErrNoAddress):
		return problem{http.StatusServiceUnavailable, fmt.Sprintf("endpoint %.100q: %s", name, err), "api_error", "gateway_unknown",
			"its Gateway document must have an address, as in address: edge.internal:8443"}
	}
	return problem{http.StatusNotFound, fmt.Sprintf("no endpoint %.100q", name), "invalid_request_error", "unknown_endpoint",
		"the base URL is http://127.0.0.1:PORT/ENDPOINT/v1, where ENDPOINT is the name of an Endpoint document at which a Grant names a workload of this machine"}
}

// identityProblem says why there is no identity.
func identityProblem(err error) problem {
	p := problem{http.StatusServiceUnavailable, err.Error(), "api_error", "no_identity",
		"a Workload document must name selectors that fit this process"}
	switch {
	case errors.Is(err, errLost):
		p.code, p.hint = "identity_lost", "it was taken back or replaced while the request was under way: try again"
	case !refused(err):
		p.code, p.hint = "identity_unavailable", "the agent cannot issue identities at the moment: look at its log"
	}
	return p
}

// gatewayProblem says why there is no answer.
func gatewayProblem(err error) problem {
	p := problem{http.StatusBadGateway, "the gateway gave no answer: " + err.Error(), "api_error", "gateway_error",
		"the request may have been carried out; look at the gateway's log"}
	var stranger *strangerError
	var alert tls.AlertError
	var op *net.OpError
	var unreached unreachedError
	switch {
	case errors.As(err, &stranger):
		p.message = "who answers at the gateway's address is not the gateway: " + err.Error()
		p.code, p.hint = "gateway_not_trusted", "the agent must be told the gateway's SPIFFE ID, and both must be of one trust domain or federated"
	case errors.As(err, &alert), errors.As(err, &op) && op.Op == "remote error":
		p.message = "the gateway does not accept this identity: " + err.Error()
		p.code, p.hint = "identity_not_accepted", "the gateway must trust the trust domain of the agent, and serve the endpoint"
	case errors.As(err, &unreached):
		p.status, p.message = http.StatusServiceUnavailable, "the gateway can't be reached: "+err.Error()
		p.code, p.hint = "gateway_unreachable", "is the gateway running, does its address lead there, and does it serve the endpoint?"
	}
	return p
}
