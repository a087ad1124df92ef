package main

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/controlplane/operator"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

// maxTokenTTL is what identity/node allows.
const maxTokenTTL = 30 * 24 * time.Hour

// joinToken is the answer to `token create`.
type joinToken struct {
	Token   string      `json:"token"`
	Agent   spiffeid.ID `json:"agent"`
	Expires time.Time   `json:"expires"`
}

// tokenInfo is a join token in a list.
type tokenInfo struct {
	Agent   spiffeid.ID `json:"agent"`
	Expires time.Time   `json:"expires"`
	Used    time.Time   `json:"used,omitzero"`
}

// agentInfo is an agent in a list.
type agentInfo struct {
	Agent    spiffeid.ID `json:"agent"`
	Attested string      `json:"attested,omitempty"`
	LastSeen time.Time   `json:"last_seen,omitzero"`
	Expires  time.Time   `json:"expires,omitzero"`
	Root     string      `json:"root,omitempty"` // below which its SVID stands, as `ca show` has it
	Revoked  bool        `json:"revoked,omitempty"`
}

// state is an agent's state in a word.
func (a *agentInfo) state(now time.Time) string {
	switch {
	case a.Revoked:
		return "revoked"
	case !now.Before(a.Expires):
		return "ended"
	}
	return "valid"
}

// actions are what operators may do with a running control plane.
func (p *plane) actions() map[string]func(url.Values) (any, error) {
	all := p.caActions()
	all["GET /policy"] = p.policyAction
	fleet := map[string]func(url.Values) (any, error){
		"POST /tokens": func(q url.Values) (any, error) {
			ttl, err := time.ParseDuration(q.Get("ttl"))
			if err != nil {
				return nil, fmt.Errorf("ttl: %w", err)
			}
			if p.agentListener == nil {
				return nil, errNoAgents // they would find nobody to show it to
			}
			id, err := agentID(p.options.TrustDomain, segment.NodeName(q.Get("node")))
			if err != nil {
				return nil, fmt.Errorf("node: %w", err)
			}
			if p.nodes.Revoked(id) {
				return nil, fmt.Errorf("%s is revoked, and no token changes that: give the machine another name", id)
			}
			token, err := p.nodes.Tokens().Create(q.Get("node"), ttl)
			if err != nil {
				return nil, err
			}
			return joinToken{string(token), id, time.Now().Add(ttl).UTC()}, nil
		},
		"GET /tokens": func(url.Values) (any, error) {
			list := []tokenInfo{}
			for _, t := range p.nodes.Tokens().List() {
				list = append(list, tokenInfo{t.Agent, t.Expires, t.Used})
			}
			return list, nil
		},
		"GET /agents": func(url.Values) (any, error) {
			list := []agentInfo{}
			for _, a := range p.nodes.Agents() {
				list = append(list, agentInfo{a.ID, a.Attested, a.LastSeen, a.Expires, a.Root, a.Revoked})
			}
			return list, nil
		},
		"POST /agents/revoke": func(q url.Values) (any, error) {
			id, err := agentID(p.options.TrustDomain, segment.NodeName(q.Get("node")))
			if whole, notWhole := spiffeid.FromString(q.Get("node")); notWhole == nil {
				id, err = whole, nil
			}
			if err != nil {
				return nil, fmt.Errorf("node: %w", err)
			}
			if !id.MemberOf(p.options.TrustDomain) || !nodepb.IsAgent(id) {
				return nil, fmt.Errorf("%s is no agent of %s", id, p.options.TrustDomain)
			}
			revoked := agentInfo{Agent: id, Revoked: true}
			for _, a := range p.nodes.Agents() {
				if a.ID == id {
					revoked.Attested = a.Attested
				}
			}
			err = p.nodes.Revoke(id)
			p.keepGateways() // the streams of its own end
			return revoked, err
		},
	}
	if p.nodes == nil {
		for pattern := range fleet {
			fleet[pattern] = func(url.Values) (any, error) { return nil, errNoAgents }
		}
	}
	maps.Copy(all, fleet)
	return all
}

var errNoAgents = errors.New("this control plane serves no agents")

// askOfAgents is ask, of a control plane that may serve no agents.
func askOfAgents[T any](cmd *cobra.Command, state string, call func(*operator.Client) (T, error)) (T, error) {
	answer, err := ask(cmd, state, call)
	var refused *operator.RefusedError
	switch {
	case !errors.As(err, &refused):
		return answer, err
	case refused.Failure.Error == errNoAgents.Error():
		return answer, failed("start it with --agent-listen ADDRESS:PORT, as in 0.0.0.0:9443; `sallyport controlplane` has it by default", "%w", err)
	}
	return answer, failed(cmp.Or(refused.Hint, "`sallyport agents` lists the agents of this control plane"), "%w", err)
}

// nodeName checks the name of a machine.
func nodeName(name string) error {
	_, err := spiffeid.FromSegments(spiffeid.RequireTrustDomainFromString("example.org"), strings.Split(name, "/")...)
	return err
}

func tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make join tokens, with which machines become nodes",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var state, name string
	var ttl time.Duration
	var o output
	create := &cobra.Command{
		Use:   "create --node NAME",
		Short: "Make a token that lets one machine become this node, once",
		Long: `Create prints a join token. Whoever has it may become the agent of the node, once and until it ends: hand it over as you
would a password, and start ` + "`sallyport agent`" + ` with it.`,
		Example: "  sallyport token create --node host-a --ttl 10m",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name == "" {
				return usage("name the machine, as documents do, with --node host-a", "--node is missing")
			}
			if err := nodeName(name); err != nil || strings.Contains(name, "/") {
				return usage("a name has letters, digits, dots, dashes and underscores, as in --node host-a", "--node: %q is no name of a machine", name)
			}
			if ttl <= 0 || ttl > maxTokenTTL {
				return usage("a token can be used for 720h at most", "--ttl: %s is out of range", ttl)
			}
			t, err := askOfAgents(cmd, state, func(c *operator.Client) (t joinToken, err error) {
				return t, c.Post(cmd.Context(), "/tokens", url.Values{"node": {name}, "ttl": {ttl.String()}}, &t)
			})
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), t, func() error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), t.Token)
				return err
			})
		},
	}
	create.Flags().StringVar(&name, "node", "", "`NAME` of the machine: its agent is then spiffe://TRUSTDOMAIN/agent/NAME (needed)")
	create.Flags().DurationVar(&ttl, "ttl", 10*time.Minute, "how long it can be used, a `DURATION` of 720h at most")
	stateFlag(create.Flags(), &state)
	o.add(create, "text", "json", "yaml")

	var listState string
	var listOutput output
	list := &cobra.Command{
		Use:   "list",
		Short: "List whom join tokens that have not ended are for, not what they are",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tokens, err := askOfAgents(cmd, listState, func(c *operator.Client) (t []tokenInfo, err error) {
				return t, c.Get(cmd.Context(), "/tokens", nil, &t)
			})
			if err != nil {
				return err
			}
			return listOutput.print(cmd.OutOrStdout(), tokens, func() error {
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "AGENT\tENDS\tUSED")
				for _, t := range tokens {
					fmt.Fprintf(w, "%s\t%s\t%s\n", t.Agent, moment(t.Expires), moment(t.Used))
				}
				return w.Flush()
			})
		},
	}
	stateFlag(list.Flags(), &listState)
	listOutput.add(list, "text", "json", "yaml")
	cmd.AddCommand(create, list)
	return cmd
}

func agentsCommand() *cobra.Command {
	var state string
	var o output
	cmd := &cobra.Command{
		Use:   "agents",
		Short: "List the agents of other machines",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			agents, err := askOfAgents(cmd, state, func(c *operator.Client) (a []agentInfo, err error) {
				return a, c.Get(cmd.Context(), "/agents", nil, &a)
			})
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), agents, func() error {
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "AGENT\tATTESTED BY\tLAST SEEN\tSVID ENDS\tROOT\tSTATE")
				for _, a := range agents {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", a.Agent, cmp.Or(a.Attested, "-"), moment(a.LastSeen), moment(a.Expires),
						cmp.Or(a.Root[:min(16, len(a.Root))], "-"), a.state(time.Now()))
				}
				return w.Flush()
			})
		},
	}
	stateFlag(cmd.Flags(), &state)
	o.add(cmd, "text", "json", "yaml")

	var revokeState string
	revoke := &cobra.Command{
		Use:   "revoke NODE",
		Short: "Take an agent's identity away, now and for ever",
		Long: `Revoke ends what the agent of a node may do: it gets nothing new for itself, its workloads and its gateway. What these
hold ends when it would have: at most one lifetime of an SVID later. Nothing takes it back: the machine needs a new name
in the documents, and a token for that.

NODE is the name that documents have, as host-a or x509pop/FINGERPRINT, or the whole SPIFFE ID of the agent.`,
		Example:           "  sallyport agents revoke host-a",
		ValidArgsFunction: cobra.NoFileCompletions,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("`sallyport agents revoke host-a`", "revoke takes the name of one node, not %d", len(args))
			}
			if id, err := spiffeid.FromString(args[0]); err == nil && nodepb.IsAgent(id) {
				return nil
			}
			if nodeName(args[0]) != nil {
				return usage("`sallyport agents` lists them; either the name or the whole SPIFFE ID will do", "%q is no name of a node", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := askOfAgents(cmd, revokeState, func(c *operator.Client) (a agentInfo, err error) {
				return a, c.Post(cmd.Context(), "/agents/revoke", url.Values{"node": args}, &a)
			})
			if err != nil {
				return err
			}
			never := ""
			if a.Attested == "" {
				never = ", and was never an agent here: is that its name?"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is revoked%s\n", a.Agent, never)
			return err
		},
	}
	stateFlag(revoke.Flags(), &revokeState)
	cmd.AddCommand(revoke)
	return cmd
}

// moment is a time as lists show it.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}

// readAuthorities reads certificates from a PEM file.
func readAuthorities(path string) ([]*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var all []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return all, nil
}
