package segment

import "slices"

// Protocol is the API that an endpoint speaks. The zero value is no protocol.
type Protocol string

const (
	OpenAI    Protocol = "OpenAI"    // the OpenAI HTTP API, as OpenAI, llama.cpp and vLLM serve it
	Anthropic Protocol = "Anthropic" // the Anthropic HTTP API
	Gemini    Protocol = "Gemini"    // the Gemini API: v1 and v1beta of generativelanguage.googleapis.com
	Chroma    Protocol = "Chroma"    // the Chroma v2 HTTP API
	Qdrant    Protocol = "Qdrant"    // the Qdrant HTTP and gRPC API
	Weaviate  Protocol = "Weaviate"  // the Weaviate v1 HTTP, GraphQL and gRPC API
	Milvus    Protocol = "Milvus"    // the Milvus gRPC API and the v2 HTTP API
	MCP       Protocol = "MCP"       // the Model Context Protocol 2026-07-28 over streamable HTTP
	HTTP      Protocol = "HTTP"      // any HTTP API: resources are paths
	GRPC      Protocol = "GRPC"      // any gRPC API: resources are methods
	TCP       Protocol = "TCP"       // connections, whatever they carry
)

// Protocols are the protocols that an endpoint can name.
func Protocols() []Protocol {
	return []Protocol{OpenAI, Anthropic, Gemini, Chroma, Qdrant, Weaviate, Milvus, MCP, HTTP, GRPC, TCP}
}

// Operations are the operations that the protocol's API knows, the only ones that a grant to it can name.
func (p Protocol) Operations() []Operation {
	switch p {
	case OpenAI, Gemini:
		return []Operation{Infer, Embed, Read, Write, Admin, Connect}
	case Anthropic:
		return []Operation{Infer, Read, Write, Admin}
	case Chroma, Qdrant, Weaviate, Milvus:
		return []Operation{Read, Write, Admin}
	case MCP:
		return []Operation{Call, Read}
	case HTTP:
		return []Operation{Read, Write}
	case GRPC:
		return []Operation{Call}
	case TCP:
		return []Operation{Connect}
	}
	return nil
}

// Routes is the protocol's table, from a file in protocols/. The first route that a request fits is its route.
// Callers don't change it.
func (p Protocol) Routes() []Route { return tables[p] }

// Route maps one request of an API onto what it asks for. A request that is in no route is denied.
type Route struct {
	Name   string // unique in the protocol, seen in logs
	Method string // "" for TCP, as Path
	// Path is an URI template of Envoy: literal text; {tenant} and {database}, which are the endpoint's own; {name}, where
	// the resource may be; other {variables}, which are free. Each is one segment or a part of one, and {variable=**} is all
	// the rest.
	Path      string
	Operation Operation
	Resource  Source
	Answer    Answer

	// Also are keys of JSON objects, at any depth of the body, that name further resources or state of others: a request
	// that has one of them needs a grant on everything, whatever the value is and whether or not it names a resource as
	// well. Letter case makes no difference, as for Go's encoding/json. If the resource is in the query, they are
	// parameters of the query too.
	Also []string
	// AlsoAt are such keys by the one depth at which they count. 1 is the object that the body is; each object and each
	// array in it is one deeper, so that tools[].model is at depth 3.
	AlsoAt map[int][]string
	// SameAt are keys, by depth as in AlsoAt, where the resource may be named again. If one of them has another value than
	// the name, and than the name behind the segment that stands before it in the path ("models/NAME"), the request needs
	// a grant on everything.
	SameAt map[int][]string
	// Database is where the request names the database (Milvus) or tenant (Weaviate) that it means. It must be the
	// endpoint's own, and there is no grant for another one. Absent or empty it is "default" in Milvus, where the header
	// dbname must say the same or nothing. An endpoint of Weaviate without a tenant takes all. NoResource: the request can
	// name none. Everything: it can, where nobody looks, so that an endpoint with a tenant must deny it.
	Database Source
	// Kind is what the request is, if it is not a plain HTTP one.
	Kind Kind
	// MCP is the value of the header mcp-method that the request must have; "" for other protocols.
	MCP string
}

// Kind is what a request is.
type Kind string

const (
	Plain     Kind = ""          // HTTP
	Unary     Kind = "grpc"      // gRPC with one message from the caller, which can be read
	Streaming Kind = "stream"    // gRPC with any number of messages from the caller, of which none is read
	WebSocket Kind = "websocket" // an upgrade; no message is read
)

// Answer says who answers a request that is allowed.
type Answer string

const (
	FromBackend Answer = ""        // the backend, directly
	FromCatalog Answer = "catalog" // the control plane's catalogue: lists filtered to the caller, names to UUIDs
)

// tables holds the routes of all protocols. A table that is wrong is a defect of this package, found when it is loaded.
var tables = readTables()

func readTables() map[Protocol][]Route {
	tables := map[Protocol][]Route{}
	for _, p := range Protocols() {
		routes, err := readTable(p)
		if err != nil {
			panic(err)
		}
		tables[p] = slices.Clip(routes)
	}
	return tables
}
