package envoy

import (
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/segment"
)

// Extraction is the one stage that looks into requests. All that it has to say it leaves in dynamic metadata:
//
//	name      what the request asks for: a model, a collection, a path
//	id        or the UUID of it, which the names filter turns into a name
//	beyond    or what makes it ask for everything, in words; then there is no name, and only a grant on everything has it
//	named     what it names nevertheless, for the choice of a backend and for whoever reads the log
//	resolved  "=", once everything about the request has been judged and the name is known
//	refused   or why it can't be judged
//	rpc_id, rpc_error   what an answer in JSON-RPC repeats of the request, and what it says of it instead of all else (mcp.go)
//	caller, ends   at endpoints that take tokens: who asks, and until when that holds, in seconds (tokens.go)
//	max_output, answers   how many tokens an answer may have, if the request says so in a way that nobody reads otherwise; and how
//	          many answers it asks for, if that is known
//	input_tokens, output_tokens   usage, as the answer tells it
//	events, smallest_event   if tokens are counted: of an answer that is a stream
//
// The script of an endpoint is put together from pieces: what its routes have no use for is not there. Whoever replaces the
// stage replaces this file and the scripts; all that follows reads the same.

//go:embed extract.lua
var extractScript string

//go:embed usage.lua
var usageScript string

// reader is a piece of the script that finds names in requests of some kind, and the names of its functions there.
type reader struct {
	functions []string
	script    *string
}

var (
	//go:embed json.lua
	jsonScript string
	//go:embed path.lua
	pathScript string
	//go:embed query.lua
	queryScript string
	//go:embed grpc.lua
	grpcScript string
	//go:embed mcp.lua
	mcpScript string

	readers = []reader{
		{[]string{"body", wordRPC}, &jsonScript},
		{[]string{"path", "id", "whole", "method"}, &pathScript},
		{[]string{"query"}, &queryScript},
		{[]string{"message"}, &grpcScript},
		{[]string{wordRPC}, &mcpScript}, // with that for JSON
	}
)

// Words that are no functions: a database must be named; the request need not end before its answer does.
const (
	wordOwned   = "owned"
	wordEndless = "endless"
)

// bodyReaders are the functions that wait for the end of the body.
var bodyReaders = []string{"body", "message", wordRPC}

// extractor is the filter.
func extractor(e *segment.Endpoint) proto.Message {
	used := map[string]bool{}
	for _, r := range rows(e) {
		for _, word := range extraction(e, r).words {
			used[word] = true
		}
	}
	var script strings.Builder
	fmt.Fprintf(&script, "local TOLD, NAMES, DATABASE, IMPLIED, HEADER = %t, %s\n", e.Tokens != nil, databaseOf(e))
	script.WriteString(callerScript + extractScript)
	for _, r := range readers {
		if slices.ContainsFunc(r.functions, func(f string) bool { return used[f] }) {
			script.WriteString(*r.script)
		}
	}
	if u := usageOf(e.Protocol); u.key != "" {
		fmt.Fprintf(&script, "local USAGE, INPUTS, OUTPUTS, MORE_INPUTS, MORE_OUTPUTS = %s, {%s}, {%s}, {%s}, {%s}\n", luaQuoted(u.key),
			luaQuoted(u.inputs...), luaQuoted(u.outputs...), luaQuoted(u.moreInputs...), luaQuoted(u.moreOutputs...))
		script.WriteString(usageScript)
	}
	return &luav3.Lua{DefaultSourceCode: inline(script.String())}
}

// luaQuoted writes keys of JSON as Lua reads them, with their quotes.
func luaQuoted(keys ...string) string {
	quoted := make([]string, len(keys))
	for i, key := range keys {
		quoted[i] = `'"` + key + `"'`
	}
	return strings.Join(quoted, ", ")
}

// ownDatabase is the only one that requests may name, where they can name one outside the path; "" if there is none.
func ownDatabase(e *segment.Endpoint) string {
	switch e.Protocol {
	case segment.Milvus:
		return e.Database.Name
	case segment.Weaviate:
		return e.Database.Tenant
	}
	return ""
}

// milvusDefault is the database that Milvus takes a request for that names none, and milvusDatabaseHeader is where it looks
// for a name if there is none in the message.
const (
	milvusDefault        = "default"
	milvusDatabaseHeader = "dbname"
)

// databaseOf writes the values of NAMES, DATABASE, IMPLIED and HEADER.
func databaseOf(e *segment.Endpoint) string {
	const classes = "^[A-Z][_0-9A-Za-z]*$" // Weaviate takes "secret" for "Secret"
	switch own := ownDatabase(e); {
	case e.Protocol == segment.Milvus:
		return fmt.Sprintf("nil, %q, %t, %q", own, own == milvusDefault, milvusDatabaseHeader)
	case e.Protocol == segment.Weaviate && own == "":
		return fmt.Sprintf("%q, nil, false, nil", classes)
	case e.Protocol == segment.Weaviate:
		return fmt.Sprintf("%q, %q, false, nil", classes, own)
	}
	return "nil, nil, false, nil"
}

// lookout tells the filter where a request of one route has its resource.
type lookout struct {
	// words are functions of the script, in their order: what finds the name, then what looks for more.
	words  []string
	fields map[string]*structpb.Value // what they ask the route
}

func (l *lookout) set(key, value string) { l.fields[key] = structpb.NewStringValue(value) }

func (l *lookout) context() *structpb.Struct {
	if l.words != nil {
		l.set("from", strings.Join(l.words, " "))
	}
	return &structpb.Struct{Fields: l.fields}
}

func extraction(e *segment.Endpoint, r segment.Route) *lookout {
	l := &lookout{fields: map[string]*structpb.Value{}}
	var keys, parameters, fields []string
	if r.MCP != "" {
		l.rpc(r)
		return l
	}
	switch s := r.Resource; {
	case s == segment.NoResource, s == segment.Everything:
		l.words = []string{"nothing"}
	case s == segment.PathName:
		l.words = []string{"path"}
		l.segment(ownPath(e, r.Path), r.SameAt != nil)
	case s == segment.PathID:
		l.words = []string{"id"}
		l.segment(ownPath(e, r.Path), false)
	case s == segment.WholePath && e.Protocol == segment.GRPC:
		l.words = []string{"method"}
	case s == segment.WholePath:
		l.words = []string{"whole"}
		if slices.Contains(e.Templates, r.Path) {
			l.set("name", r.Path)
		}
	case s.Keys() != nil:
		keys = append(keys, "name="+s.Keys()[0])
	case strings.HasPrefix(string(s), segment.InQuery):
		parameters = append(parameters, "name="+strings.TrimPrefix(string(s), segment.InQuery))
	case strings.HasPrefix(string(s), segment.InGRPC):
		f, _ := s.Fields()
		fields = append(fields, "name="+places(f.Name), fieldsAs("same", f.Same), fieldsAs("other", f.Other))
	default:
		return l // a source that nobody reads: nothing is resolved
	}
	if ownDatabase(e) != "" {
		switch s := r.Database; {
		case s.Keys() != nil:
			keys = append(keys, "own="+strings.Join(s.Keys(), ","))
		case strings.HasPrefix(string(s), segment.InQuery):
			parameters = append(parameters, "own="+strings.TrimPrefix(string(s), segment.InQuery))
		case strings.HasPrefix(string(s), segment.InGRPC):
			f, _ := s.Fields()
			fields = append(fields, fieldsAs("own", append([]segment.FieldPath{f.Name}, f.Same...)))
		}
		if len(keys)+len(parameters)+len(fields) > 0 && r.Database != segment.NoResource {
			l.words = append(l.words, wordOwned)
		}
	}
	if strings.HasPrefix(string(r.Resource), segment.InQuery) {
		parameters = append(parameters, keysAs("also", 0, r.Also))
	} else {
		keys = append(keys, keysAs("also", 0, r.Also))
	}
	for _, depth := range slices.Sorted(maps.Keys(r.AlsoAt)) {
		keys = append(keys, keysAs("also", depth, r.AlsoAt[depth]))
	}
	for _, depth := range slices.Sorted(maps.Keys(r.SameAt)) {
		keys = append(keys, keysAs("same", depth, r.SameAt[depth]))
	}
	keys = append(keys, bounds(e.Protocol, r)...)
	for _, more := range []struct {
		word, key string
		what      []string
	}{{"query", "query", parameters}, {"body", "keys", keys}, {"message", "fields", fields}} {
		if text := strings.Join(slices.DeleteFunc(more.what, func(s string) bool { return s == "" }), " "); text != "" {
			l.words = append(l.words, more.word)
			l.set(more.key, text)
		}
	}
	if endless(r) {
		l.words = append(l.words, wordEndless)
	}
	if counts(e.Protocol, r) {
		l.fields["usage"] = structpb.NewBoolValue(true)
	}
	return l
}

// endless reports whether the request need not end before its answer does, so that it can't be read first.
func endless(r segment.Route) bool { return r.Kind == segment.Streaming || r.Kind == segment.WebSocket }

// segment says which one of the path has the name, counted from 1 behind the first slash, whether the rest of the path
// belongs to it, and what stands behind it and, where it matters, before it.
func (l *lookout) segment(path string, before bool) {
	segments := strings.Split(path, "/")
	i := slices.IndexFunc(segments, func(s string) bool { return strings.HasPrefix(s, "{name") })
	l.fields["segment"] = structpb.NewNumberValue(float64(i))
	_, verb, _ := strings.Cut(segments[i], "}")
	if strings.Contains(segments[i], "=**}") {
		l.fields["rest"] = structpb.NewBoolValue(true)
	}
	if verb != "" {
		l.set("verb", verb)
	}
	if before {
		l.set("before", segments[i-1]+"/")
	}
}

func keysAs(what string, depth int, keys []string) string {
	if keys == nil {
		return ""
	}
	if depth > 0 {
		what += strconv.Itoa(depth)
	}
	return what + "=" + strings.Join(keys, ",")
}

func fieldsAs(what string, paths []segment.FieldPath) string {
	if paths == nil {
		return ""
	}
	texts := make([]string, len(paths))
	for i, p := range paths {
		texts[i] = places(p)
	}
	return what + "=" + strings.Join(texts, ",")
}

// places writes the path as segment.Fields does.
func places(p segment.FieldPath) string {
	steps := make([]string, len(p))
	for i, f := range p {
		steps[i] = strconv.Itoa(f.Number)
		if f.Nested {
			steps[i] += "*"
		}
	}
	return strings.Join(steps, ".")
}

func addressesByID(p segment.Protocol) bool {
	return slices.ContainsFunc(p.Routes(), func(r segment.Route) bool { return r.Resource == segment.PathID })
}

// metadataOf is what the scripts have left at a key.
func metadataOf(key string) string { return "%DYNAMIC_METADATA(" + metadataSpace + ":" + key + ")%" }

// judged takes over what extraction found.
func judged(e *segment.Endpoint) []state {
	states := []state{
		{stateName, metadataOf("name")},
		{stateResolved, metadataOf("resolved")},
	}
	if len(modelPools(e)) > 1 {
		states = append(states, state{stateServed, metadataOf("name") + metadataOf("named")})
	}
	if e.Tokens != nil {
		states = append(states, state{stateCaller, metadataOf("caller")})
	}
	if addressesByID(e.Protocol) {
		states = append(states, state{stateID, metadataOf("id")})
	}
	return states
}

// question puts it all together, and lets the route be chosen again where the model chooses the backend.
func question(e *segment.Endpoint) *setstatev3.Config {
	const request = "%METADATA(ROUTE:sallyport:operation)%%FILTER_STATE(sallyport.resolved:PLAIN)%%FILTER_STATE(sallyport.name:PLAIN)%"
	config := setState(
		state{stateRequest, request},
		state{stateQuestion, "%FILTER_STATE(sallyport.resolved:PLAIN)%%FILTER_STATE(sallyport.class:PLAIN)%|" + request},
	)
	config.ClearRouteCache = len(modelPools(e)) > 1
	return config
}
