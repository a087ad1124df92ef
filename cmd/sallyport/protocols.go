package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sallyport.dev/segment"
)

func protocolsCommand() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "protocols [NAME]",
		Short: "Show what requests of an API ask for",
		Long: `Protocols lists the protocols that an endpoint can speak, and the operations that a grant can name there. With a name
it shows the table of the protocol: each request, the operation that it asks for, and where it names its resource. A
request that is in no row is denied. It asks nobody.`,
		Example: "  sallyport protocols\n  sallyport protocols Qdrant",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("`sallyport protocols` lists their names", "protocols takes one name, not %d", len(args))
			}
			return nil
		},
		ValidArgsFunction: cobra.FixedCompletions(protocolNames(), cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				all := make([]protocolTable, 0, len(segment.Protocols()))
				for _, p := range segment.Protocols() {
					all = append(all, protocolTable{Protocol: p, Operations: p.Operations()})
				}
				return o.print(cmd.OutOrStdout(), all, func() error { return writeProtocols(cmd.OutOrStdout(), all) })
			}
			i := slices.IndexFunc(segment.Protocols(), func(p segment.Protocol) bool { return strings.EqualFold(string(p), args[0]) })
			if i < 0 {
				return usage("protocols are "+strings.Join(protocolNames(), ", "), "unknown protocol %q", args[0])
			}
			t := tableOf(segment.Protocols()[i])
			return o.print(cmd.OutOrStdout(), t, func() error { return writeProtocol(cmd.OutOrStdout(), t) })
		},
	}
	o.add(cmd, "text", "json", "yaml")
	return cmd
}

func protocolNames() []string {
	var names []string
	for _, p := range segment.Protocols() {
		names = append(names, string(p))
	}
	return names
}

// protocolTable is a segment.Protocol as users see it.
type protocolTable struct {
	Protocol   segment.Protocol    `json:"protocol"`
	Operations []segment.Operation `json:"operations"` // that a grant can name
	Requests   []protocolRequest   `json:"requests,omitempty"`
}

type protocolRequest struct {
	Name      string            `json:"name"`
	Method    string            `json:"method,omitempty"`
	Path      string            `json:"path,omitempty"`
	MCP       string            `json:"mcpMethod,omitempty"`
	Kind      segment.Kind      `json:"kind,omitempty"`
	Operation segment.Operation `json:"operation"`
	Resource  segment.Source    `json:"resource,omitempty"`
	Database  segment.Source    `json:"database,omitempty"`
	Answer    segment.Answer    `json:"answeredBy,omitempty"`
	Unless    []string          `json:"needsEverythingIf,omitempty"` // in words
}

func tableOf(p segment.Protocol) protocolTable {
	t := protocolTable{Protocol: p, Operations: p.Operations()}
	for _, r := range p.Routes() {
		t.Requests = append(t.Requests, protocolRequest{Name: r.Name, Method: r.Method, Path: r.Path, MCP: r.MCP, Kind: r.Kind,
			Operation: r.Operation, Resource: r.Resource, Database: r.Database, Answer: r.Answer, Unless: needsEverything(r)})
	}
	return t
}

// needsEverything says what makes a request need a grant on everything although it may name a resource.
func needsEverything(r segment.Route) []string {
	var reasons []string
	if r.Also != nil {
		where := "anywhere in the body"
		if strings.HasPrefix(string(r.Resource), segment.InQuery) {
			where = "in the query"
		}
		reasons = append(reasons, strings.Join(r.Also, ", ")+" "+where)
	}
	for _, depth := range slices.Sorted(maps.Keys(r.AlsoAt)) {
		reasons = append(reasons, fmt.Sprintf("%s %s", strings.Join(r.AlsoAt[depth], ", "), atDepth(depth)))
	}
	for _, depth := range slices.Sorted(maps.Keys(r.SameAt)) {
		reasons = append(reasons, fmt.Sprintf("another %s %s", strings.Join(r.SameAt[depth], ", "), atDepth(depth)))
	}
	f, _ := r.Resource.Fields()
	for _, path := range f.Other {
		reasons = append(reasons, "field "+path.String())
	}
	for _, path := range f.Same {
		reasons = append(reasons, "another name in field "+path.String())
	}
	return reasons
}

func atDepth(n int) string {
	if n == 1 {
		return "at the top of the body"
	}
	return fmt.Sprintf("at depth %d of the body", n)
}

func writeProtocols(w io.Writer, all []protocolTable) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PROTOCOL\tOPERATIONS")
	for _, p := range all {
		fmt.Fprintf(t, "%s\t%s\n", p.Protocol, strings.Trim(fmt.Sprint(p.Operations), "[]"))
	}
	return t.Flush()
}

func writeProtocol(w io.Writer, p protocolTable) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tREQUEST\tOPERATION\tRESOURCE\tANSWERED BY")
	for _, r := range p.Requests {
		by := "backend"
		if r.Answer == segment.FromCatalog {
			by = "catalogue"
		}
		request := strings.TrimSpace(r.Method + " " + r.Path + " " + r.MCP)
		switch r.Kind {
		case segment.Unary:
			request = "gRPC " + strings.TrimPrefix(r.Path, "/")
		case segment.Streaming:
			request = "gRPC " + strings.TrimPrefix(r.Path, "/") + " (stream)"
		case segment.WebSocket:
			request += " (WebSocket)"
		}
		if request == "" {
			request = "a connection"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", r.Name, request, r.Operation, resourceWords(p.Protocol, r.Resource), by)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "Everything else is denied.")
	if slices.ContainsFunc(p.Requests, func(r protocolRequest) bool { return r.Resource == segment.Everything }) {
		fmt.Fprintln(w, `"*" needs a grant on all resources: on "*".`)
	}
	return writeNeeds(w, p)
}

// writeNeeds says of requests together what is the same of all.
func writeNeeds(w io.Writer, p protocolTable) error {
	names := map[string][]string{}
	var order []string
	for _, r := range p.Requests {
		if len(r.Unless) == 0 {
			continue
		}
		reasons := strings.Join(r.Unless, "; ")
		if names[reasons] == nil {
			order = append(order, reasons)
		}
		names[reasons] = append(names[reasons], r.Name)
	}
	if order == nil {
		return nil
	}
	if _, err := fmt.Fprintln(w, `These need a grant on "*" too, if they have`); err != nil {
		return err
	}
	for _, reasons := range order {
		if _, err := fmt.Fprintf(w, "  %s\n    in %s\n", reasons, strings.Join(names[reasons], ", ")); err != nil {
			return err
		}
	}
	return nil
}

// resourceWords says where a request names its resource.
func resourceWords(p segment.Protocol, s segment.Source) string {
	if f, ok := s.Fields(); ok {
		return "field " + f.Name.String()
	}
	place, key, _ := strings.Cut(string(s), ":")
	switch {
	case s == segment.NoResource:
		return "-"
	case s == segment.PathID:
		return "UUID in the path"
	case s == segment.PathName:
		return "name in the path"
	case s == segment.WholePath && p == segment.GRPC:
		return "the method"
	case s == segment.WholePath:
		return "the path"
	case s == segment.ToolName:
		return "header mcp-name"
	case place == "body" || place == "query":
		return fmt.Sprintf("%q in the %s", key, place)
	}
	return string(s)
}
