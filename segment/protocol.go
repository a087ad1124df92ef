package segment

// Protocol is the API that an endpoint speaks. The zero value is no protocol.
type Protocol string

const (
	OpenAI Protocol = "OpenAI" // the OpenAI HTTP API, as OpenAI, llama.cpp and vLLM serve it
	Chroma Protocol = "Chroma" // the Chroma v2 HTTP API
)

// Protocols are the protocols that an endpoint can name.
func Protocols() []Protocol { return []Protocol{OpenAI, Chroma} }

// Operations are the operations that the protocol's API knows, the only ones that a grant to it can name.
func (p Protocol) Operations() []Operation {
	switch p {
	case OpenAI:
		return []Operation{Infer, Embed}
	case Chroma:
		return []Operation{Read, Write, Admin}
	}
	return nil
}

// Route maps one request of an API onto what it asks for. A request that is in no route is denied.
type Route struct {
	Name      string // unique in the protocol, seen in logs
	Method    string
	Path      string // literal segments; {tenant} and {database} are the endpoint's own; other {variables} are free
	Operation Operation
	Resource  Source
	Answer    Answer
}

// Source says where a request names its resource.
type Source string

const (
	NoResource Source = ""           // nowhere: the operation is Enter
	BodyModel  Source = "body:model" // the string at this key of the JSON object in the body
	BodyName   Source = "body:name"
	PathName   Source = "path:name" // the name in the {variable} of the path
	PathID     Source = "path:id"   // the UUID in the {variable}, which must be known to belong to a name
)

// Answer says who answers a request that is allowed.
type Answer string

const (
	FromBackend Answer = ""        // the backend, directly
	FromCatalog Answer = "catalog" // the control plane's catalogue: lists filtered to the caller, names to UUIDs
)

// Routes is the protocol's table. The most frequent requests stand first.
func (p Protocol) Routes() []Route {
	switch p {
	case OpenAI:
		return openAIRoutes
	case Chroma:
		return chromaRoutes
	}
	return nil
}

var openAIRoutes = []Route{
	{"chat-completions", "POST", "/v1/chat/completions", Infer, BodyModel, FromBackend},
	{"completions", "POST", "/v1/completions", Infer, BodyModel, FromBackend},
	{"embeddings", "POST", "/v1/embeddings", Embed, BodyModel, FromBackend},
	{"list-models", "GET", "/v1/models", Enter, NoResource, FromCatalog},
	{"retrieve-model", "GET", "/v1/models/{name=**}", Discover, PathName, FromCatalog},
}

const (
	chromaDatabase   = "/api/v2/tenants/{tenant}/databases/{database}"
	chromaCollection = chromaDatabase + "/collections/{name}"
)

// Chroma finds a collection by UUID alone and does not check that the tenant and database in the path own it, so
// UUIDs count only when the catalogue has found them in the endpoint's own database. GET and DELETE take a
// collection's name where PUT takes its UUID.
var chromaRoutes = []Route{
	{"query", "POST", chromaCollection + "/query", Read, PathID, FromBackend},
	{"get", "POST", chromaCollection + "/get", Read, PathID, FromBackend},
	{"search", "POST", chromaCollection + "/search", Read, PathID, FromBackend},
	{"count", "GET", chromaCollection + "/count", Read, PathID, FromBackend},
	{"indexing-status", "GET", chromaCollection + "/indexing_status", Read, PathID, FromBackend},
	{"add", "POST", chromaCollection + "/add", Write, PathID, FromBackend},
	{"upsert", "POST", chromaCollection + "/upsert", Write, PathID, FromBackend},
	{"update", "POST", chromaCollection + "/update", Write, PathID, FromBackend},
	{"delete", "POST", chromaCollection + "/delete", Write, PathID, FromBackend},
	{"list-collections", "GET", chromaDatabase + "/collections", Enter, NoResource, FromCatalog},
	{"count-collections", "GET", chromaDatabase + "/collections_count", Enter, NoResource, FromCatalog},
	{"create-collection", "POST", chromaDatabase + "/collections", Admin, BodyName, FromCatalog},
	{"get-collection", "GET", chromaCollection, Discover, PathName, FromCatalog},
	{"delete-collection", "DELETE", chromaCollection, Admin, PathName, FromCatalog},
	{"modify-collection", "PUT", chromaCollection, Admin, PathID, FromCatalog},
	{"identity", "GET", "/api/v2/auth/identity", Enter, NoResource, FromBackend},
	{"tenant", "GET", "/api/v2/tenants/{tenant}", Enter, NoResource, FromBackend},
	{"database", "GET", chromaDatabase, Enter, NoResource, FromBackend},
	{"pre-flight-checks", "GET", "/api/v2/pre-flight-checks", Enter, NoResource, FromBackend},
	{"heartbeat", "GET", "/api/v2/heartbeat", Enter, NoResource, FromBackend},
	{"version", "GET", "/api/v2/version", Enter, NoResource, FromBackend},
}
