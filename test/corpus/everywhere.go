package corpus

import (
	"fmt"
	"strings"
	"time"

	"pgregory.net/rapid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// place is an endpoint of one protocol, and names there that collide.
type place struct {
	name      string
	protocol  segment.Protocol
	more      string // of its document
	resources []string
	patterns  []string // that grants can have besides these names
}

// The places are as many as there are protocols, and some more where the endpoint's database counts.
func places() []place {
	plain, families := []string{"a", "ab", "abc", "b"}, []string{"a*", "ab*", "*"}
	classes, kins := []string{"A", "Ab", "Abc", "B"}, []string{"A*", "Ab*", "*"}
	return []place{
		{"openai", segment.OpenAI, "", append(plain[:3:3], "org/a"), append(families, "org/*")},
		{"anthropic", segment.Anthropic, "", plain, families},
		{"gemini", segment.Gemini, "", plain, families},
		{"chroma", segment.Chroma, "", plain, families},
		{"qdrant", segment.Qdrant, "", plain, families},
		{"weaviate", segment.Weaviate, "", classes, kins},
		{"tenant", segment.Weaviate, ", database: {tenant: T1}", classes, kins},
		{"milvus", segment.Milvus, "", plain, families},
		{"hr", segment.Milvus, ", database: {name: hr}", plain, families},
		{"mcp", segment.MCP, "", []string{"tool/a", "tool/ab", "prompt/a", "resource/file:///a", "resource/file:///a/b"}, []string{"tool/*", "tool/a*", "resource/file:///a/*", "*"}},
		{"http", segment.HTTP, ", paths: ['/t/{id}', '/t/{id}/x']", []string{"/a", "/a/b", "/ab", "/t/{id}", "/t/{id}/x", "/"}, []string{"/a*", "/a/*", "/t/*", "*"}},
		{"grpc", segment.GRPC, "", []string{"p.A/M", "p.A/N", "p.Ab/M", "q.B/M"}, []string{"p.A/*", "p.*", "*"}},
		{"tcp", segment.TCP, "", nil, []string{"*"}},
	}
}

// everywhere are documents: an endpoint of each protocol, and one more where the database counts.
func everywhere() []string {
	var docs []string
	for i, p := range places() {
		grpc := ""
		if p.protocol == segment.Qdrant || p.protocol == segment.Weaviate {
			grpc = fmt.Sprintf(", grpcAddresses: ['127.0.0.1:%d']", 8001+i)
		}
		docs = append(docs, fmt.Sprintf(head+"{hostnames: [%s.internal], protocol: %s, backends: [{name: local, addresses: ['127.0.0.1:%d']%s, tls: {mode: None}}]%s}\n",
			"Endpoint", p.name, p.name, p.protocol, 8001+i, grpc, p.more))
	}
	return docs
}

// grantAt is a random grant on some of what a place has. A Deny leaves callers alone that no random grant names: a test may
// need one who gets through.
func grantAt(name string, at place) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		effect := rapid.SampledFrom([]string{"Allow", "Allow", "Allow", "Deny"}).Draw(t, "effect")
		mode := rapid.SampledFrom([]string{"Enforce", "Enforce", "Enforce", "Shadow"}).Draw(t, "mode")
		var operations []string
		for _, o := range at.protocol.Operations() {
			operations = append(operations, string(o))
		}
		from := []string{}
		for _, c := range some(callers).Draw(t, "callers") {
			switch {
			case c != "/*":
				from = append(from, fmt.Sprintf("{spiffeID: 'spiffe://example.org%s'}", c))
			case effect == "Allow":
				from = append(from, "{trustDomain: example.org}")
			default:
				from = append(from, "{spiffeID: 'spiffe://example.org/a'}")
			}
		}
		return fmt.Sprintf(head+"{effect: %s, mode: %s, from: [%s], to: [{endpoint: %s, operations: [%s], resources: ['%s']}]}\n", "Grant", name, effect, mode,
			strings.Join(from, ", "), at.name, strings.Join(some(operations).Draw(t, "operations"), ", "),
			strings.Join(some(append(at.resources[:len(at.resources):len(at.resources)], at.patterns...)).Draw(t, "resources"), "', '"))
	})
}

// Generated is a case made of a number: random grants on an endpoint of each protocol, and at each of them some requests for
// each operation, with what the policy decides about them. The same number makes the same case.
func Generated(seed int) (Case, error) {
	all := places()
	c := rapid.Custom(func(t *rapid.T) Case {
		docs := everywhere()
		for _, p := range all {
			for i := range rapid.IntRange(1, 9).Draw(t, "grants") {
				docs = append(docs, grantAt(fmt.Sprintf("%s-%d", p.name, i), p).Draw(t, "grant"))
			}
		}
		c := Case{Name: fmt.Sprintf("generated-%d", seed), Documents: []byte(strings.Join(docs, "")), Now: time.Unix(1750000000, 0).UTC()}
		for _, p := range all {
			for _, o := range append(p.protocol.Operations(), segment.Discover, segment.Enter) {
				names := []string{""}
				switch few := len(p.protocol.Routes()) < 15; {
				case o == segment.Enter && few:
					names = []string{"", "", "", "", "", ""}
				case o == segment.Connect && few:
					names = make([]string, 10)
				case o != segment.Enter && few:
					names = append(append(names, p.resources...), p.resources...)
				case o != segment.Enter:
					names = append(names, "", rapid.SampledFrom(p.resources).Draw(t, "resource"), rapid.SampledFrom(p.resources).Draw(t, "resource"))
				}
				for _, name := range names {
					caller := rapid.SampledFrom(append([]string{"/c", "/t/c", "/t/u/c"}, paths...)).Draw(t, "caller")
					c.Lines = append(c.Lines, Line{Pos: fmt.Sprintf("%s, line %d", c.Name, len(c.Lines)+1), Request: authz.Request{
						Caller: "spiffe://example.org" + caller, Endpoint: segment.EndpointName(p.name), Operation: o, Resource: name}})
				}
			}
		}
		return c
	}).Example(seed)
	config, err := c.Config()
	if err != nil {
		return Case{}, fmt.Errorf("%s: %w\n%s", c.Name, err, c.Documents)
	}
	policy := authz.Compile(&config, c.Now)
	for i := range c.Lines {
		c.Lines[i].Want = authz.Decide(policy, c.Lines[i].Request)
	}
	return c, nil
}
