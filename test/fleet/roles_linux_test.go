package fleet

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// roleVariable makes this test program one of the programs that run on the machines.
const roleVariable = "SALLYPORT_FLEET_ROLE"

// connected is the name of what an application reaches by its agent.
const connected = "connect"

// answer is one line of an application's output.
type answer struct {
	Gateway string    `json:"gateway"`
	At      time.Time `json:"at"`
	Status  int       `json:"status"` // 0: none came
	Error   string    `json:"error,omitempty"`
	Serial  string    `json:"serial"` // of the SVID that it has
}

// play runs a role. Its arguments stand in the variable, behind its name.
func play(role string) int {
	args := strings.Fields(role)
	err := errors.New("no such role")
	switch args[0] {
	case "backend":
		err = backend(args[1], args[2])
	case "app", "thief":
		err = application(args[0] == "thief", args[1], args[2], args[3:])
	case "unmodified":
		err = unmodified(args[1], args[2])
	}
	fmt.Fprintln(os.Stderr, args[0], "ended:", err)
	return 1
}

// identities are those that an agent gives at a socket.
func identities(socket string) (*workloadapi.X509Source, error) {
	return workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
}

// backend is a model server that speaks to the gateways only.
func backend(socket, address string) error {
	source, err := identities(socket)
	if err != nil {
		return err
	}
	gateways := tlsconfig.AdaptMatcher(func(id spiffeid.ID) error {
		if !strings.HasPrefix(id.Path(), "/gateway/") {
			return fmt.Errorf("%s is no gateway", id)
		}
		return nil
	})
	server := http.Server{
		Addr: address,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header().Set("content-type", "application/json")
			_, _ = io.WriteString(w, `{"object":"chat.completion","usage":{"prompt_tokens":1,"completion_tokens":2}}`)
		}),
		TLSConfig:         tlsconfig.MTLSServerConfig(source, source, gateways),
		ReadHeaderTimeout: time.Minute,
	}
	return server.ListenAndServeTLS("", "")
}

// application asks through each gateway in turn, for ever, and says what came of it. A thief keeps the first SVID and makes
// a connection for each request.
func application(thief bool, socket, host string, gateways []string) error {
	source, err := identities(socket)
	if err != nil {
		return err
	}
	shows := x509svid.Source(source)
	if thief {
		if shows, err = source.GetX509SVID(); err != nil {
			return err
		}
	}
	clients := map[string]*http.Client{}
	for _, gateway := range gateways {
		name, address, _ := strings.Cut(gateway, "=")
		config := tlsconfig.MTLSClientConfig(shows, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/gateway/"+name)))
		config.ServerName = host
		clients[name] = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: thief,
			DialTLSContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return (&tls.Dialer{Config: config}).DialContext(ctx, network, address)
			},
		}}
	}
	out := json.NewEncoder(os.Stdout)
	for tick := time.Tick(100 * time.Millisecond); ; <-tick {
		for name, client := range clients {
			a := answer{Gateway: name, At: time.Now()}
			if svid, err := shows.GetX509SVID(); err == nil {
				a.Serial = svid.Certificates[0].SerialNumber.Text(16)
			}
			a.ask(client, "https://"+host)
			if err := out.Encode(a); err != nil {
				return err
			}
		}
	}
}

// ask notes what comes of one request.
func (a *answer) ask(client *http.Client, base string) {
	resp, err := client.Post(base+"/v1/chat/completions", "application/json", strings.NewReader(`{"model":"m"}`))
	if err != nil {
		a.Error = err.Error()
		return
	}
	defer resp.Body.Close()
	a.Status = resp.StatusCode
	if body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10)); err != nil || a.Status != http.StatusOK {
		a.Error = fmt.Sprintf("%s, %v", body, err)
	}
}

// unmodified is an application that knows nothing of TLS: it asks an agent's --connect, for ever.
func unmodified(socket, endpoint string) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	out := json.NewEncoder(os.Stdout)
	for tick := time.Tick(100 * time.Millisecond); ; <-tick {
		a := answer{Gateway: connected, At: time.Now()}
		a.ask(client, "http://localhost/"+endpoint)
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}
