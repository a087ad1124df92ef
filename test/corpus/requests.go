package corpus

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// Question is a request as clients of an API send it, and what it asks for. Both follow from a row of the protocol's table
// and from nothing else: whoever lowers the table is not asked.
type Question struct {
	Route   segment.Route
	Variant string // what is odd about it; "" if nothing is
	Path    string // with the query
	Header  map[string]string
	Body    string        // JSON, or one message in the frame of gRPC
	Asks    authz.Request // for whichever caller
	Refused bool          // it has to be answered with 400, because servers could read another name
}

// Questions are all requests of an endpoint's API that ask for an operation on a resource, in each way that its table has.
// Without a resource they ask for what needs a grant on everything, or for nothing that needs one. A name that cannot be
// written where a row has its names is not asked for there. id is the UUID of a collection.
func Questions(e *segment.Endpoint, op segment.Operation, resource string, id func(string) string) []Question {
	var all []Question
	for _, row := range e.Protocol.Routes() {
		if row.Operation != op || !served(e, row) {
			continue
		}
		w := writer{endpoint: e, row: row, id: id}
		switch named := row.Resource != segment.NoResource && row.Resource != segment.Everything; {
		case !named && resource == "":
			all = append(all, w.write("", ""))
		case named && resource == "":
			all = append(all, w.beyond()...)
		case named && w.expressible(resource):
			all = append(all, w.write(resource, ""))
			if row.SameAt != nil {
				w.more = keyed(row.SameAt, `"`+resource+`"`)[0].members
				all = append(all, w.write(resource, "named twice"))
			}
		}
	}
	return all
}

// served reports whether the endpoint has the row.
func served(e *segment.Endpoint, row segment.Route) bool {
	if row.Kind == segment.Unary || row.Kind == segment.Streaming {
		if !slices.ContainsFunc(e.Backends, func(b segment.Backend) bool { return b.GRPC != nil }) {
			return false
		}
	}
	return row.Database != segment.Everything || own(e) == ""
}

// own is the database that each request must name; "" if it need not.
func own(e *segment.Endpoint) string {
	switch {
	case e.Protocol == segment.Weaviate:
		return e.Database.Tenant
	case e.Protocol == segment.Milvus && e.Database.Name != "default":
		return e.Database.Name
	}
	return ""
}

// writer writes the requests of one row.
type writer struct {
	endpoint *segment.Endpoint
	row      segment.Route
	id       func(string) string
	more     string // members of the body
	query    string // parameters
	fields   fields // of the message
}

// kinds are what MCP resources begin with.
var kinds = map[string]string{"tools/call": "tool/", "resources/read": "resource/", "prompts/get": "prompt/"}

var (
	inSegment = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)
	inRest    = regexp.MustCompile(`^[A-Za-z0-9._:/@-]+$`)
	inPath    = regexp.MustCompile(`^(/[A-Za-z0-9_~:@!$&'()*+,=.-]*)+$`)
	aMethod   = regexp.MustCompile(`^[A-Za-z0-9_.]+/[A-Za-z0-9_]+$`)
	aClass    = regexp.MustCompile(`^[A-Z][_0-9A-Za-z]*$`)
	aHeader   = regexp.MustCompile(`^[!-~]([ -~]*[!-~])?$`)
	variable  = regexp.MustCompile(`\{([a-z]+)(=\*\*)?\}`)
)

// climbs reports whether a name is a path that leads elsewhere.
func climbs(name string) bool {
	path := "/" + strings.TrimPrefix(name, "/") + "/"
	return strings.Contains(path, "//") || strings.Contains(path, "/./") || strings.Contains(path, "/../")
}

// expressible reports whether the name can stand where the row has it, in whatever spelling.
func (w *writer) expressible(name string) bool {
	switch s := w.row.Resource; s {
	case segment.PathName, segment.PathID:
		if s == segment.PathID {
			return true // its UUID can
		}
		if strings.Contains(w.row.Path, "{name=**}") {
			return inRest.MatchString(name) && !climbs(name) && name[0] != '/'
		}
		return inSegment.MatchString(name) && !climbs(name)
	case segment.WholePath:
		if w.endpoint.Protocol == segment.GRPC {
			return aMethod.MatchString(name) && "/"+name != "/grpc.health.v1.Health/Check"
		}
		if slices.Contains(w.endpoint.Templates, name) {
			return true
		}
		for _, t := range w.endpoint.Templates {
			if regexp.MustCompile("^" + variable.ReplaceAllString(regexp.QuoteMeta(t), "x") + "$").MatchString(name) {
				return false
			}
		}
		return inPath.MatchString(name) && !climbs(name) && !strings.Contains(name, "./") && !strings.HasSuffix(name, ".") &&
			(name == "/" || !strings.HasSuffix(name, "/"))
	case segment.ToolName:
		rest, ok := strings.CutPrefix(name, kinds[w.row.MCP])
		return ok && aHeader.MatchString(rest)
	}
	return true
}

// refused reports whether a name must not be read where the row has it.
func (w *writer) refused(name string) bool {
	s := string(w.row.Resource)
	switch {
	case strings.HasPrefix(s, segment.InBody):
		return name == "" || fmt.Sprintf("%q", name) != `"`+name+`"` || climbs(name) || strings.HasPrefix(name, "/")
	case strings.HasPrefix(s, segment.InQuery):
		return !inRest.MatchString(name) || climbs(name) || w.class(name)
	case strings.HasPrefix(s, segment.InGRPC):
		return !inSegment.MatchString(name) || w.class(name)
	}
	return w.class(name)
}

func (w *writer) class(name string) bool {
	return w.endpoint.Protocol == segment.Weaviate && name != "" && !aClass.MatchString(name)
}

// sample is a name that can stand anywhere.
func (w *writer) sample() string {
	switch w.endpoint.Protocol {
	case segment.Weaviate:
		return "A"
	case segment.HTTP:
		return "/a"
	case segment.GRPC:
		return "p.A/M"
	}
	return kinds[w.row.MCP] + "a"
}

// beyond are the requests that name one resource and something else, so that they need a grant on everything.
func (w *writer) beyond() []Question {
	var all []Question
	name := w.sample()
	add := func(variant string) {
		q := w.write(name, variant)
		q.Asks.Resource = ""
		all = append(all, q)
	}
	row := w.row
	for i, key := range row.Also {
		if strings.HasPrefix(string(row.Resource), segment.InQuery) {
			w.query = key + "=x"
			add(key + " in the query")
			w.query = ""
			continue
		}
		w.more = members(1+2*(i%3), swap(key, i), `"x"`)
		add(key)
	}
	w.more = ""
	for i, k := range keyed(row.AlsoAt, `[]`) {
		w.more = k.members
		add(fmt.Sprintf("%s at depth %d", swap(k.key, i), k.depth))
	}
	for _, k := range keyed(row.SameAt, `"another"`) {
		w.more = k.members
		add(fmt.Sprintf("another %s at depth %d", k.key, k.depth))
	}
	w.more = ""
	if f, ok := row.Resource.Fields(); ok {
		for i, place := range slices.Concat(f.Other, f.Same) {
			w.fields = fields{}
			w.fields.put(place, "another", i%2)
			add("field " + place.String())
		}
		w.fields = nil
	}
	return all
}

// swap writes every second key as only those decoders find it that don't look at letter case.
func swap(key string, i int) string {
	if i%2 == 1 {
		return strings.ToUpper(key[:1]) + key[1:]
	}
	return key
}

// at is a key at a depth, in an object that is a member of the body.
type at struct {
	depth   int
	key     string
	members string
}

func keyed(keys map[int][]string, value string) []at {
	var all []at
	for _, depth := range slices.Sorted(maps.Keys(keys)) {
		for _, key := range keys[depth] {
			all = append(all, at{depth, key, members(depth, key, value)})
		}
	}
	return all
}

// members is a key at a depth, counted as segment.Route does: objects and arrays in one another.
func members(depth int, key, value string) string {
	text := fmt.Sprintf(`%q:%s`, key, value)
	for level := depth - 1; level > 0; level-- {
		if text[0] == '"' {
			text = "{" + text + "}"
		}
		if level%2 == 1 {
			text = `"in":` + text
		} else {
			text = "[" + text + "]"
		}
	}
	return text
}

// write writes the request about a name.
func (w *writer) write(name, variant string) Question {
	e, row := w.endpoint, w.row
	q := Question{Route: row, Variant: variant, Header: map[string]string{}, Asks: authz.Request{Endpoint: e.Name, Operation: row.Operation, Resource: name},
		Refused: name != "" && w.refused(name)}
	var parameters, object []string
	if w.query != "" {
		parameters = append(parameters, w.query)
	}
	message := fields{}
	message.merge(w.fields)

	// The database that it must name.
	if database := own(e); database != "" {
		switch s := string(row.Database); {
		case strings.HasPrefix(s, segment.InBody):
			object = append(object, fmt.Sprintf("%q:%q", row.Database.Keys()[0], database))
		case strings.HasPrefix(s, segment.InQuery):
			parameters = append(parameters, strings.TrimPrefix(s, segment.InQuery)+"="+database)
		case strings.HasPrefix(s, segment.InGRPC):
			f, _ := row.Database.Fields()
			message.put(f.Name, database, 0)
		}
	}

	path := row.Path
	inThePath := name
	if name == "" {
		inThePath = "x1"
	}
	switch s := string(row.Resource); {
	case row.Resource == segment.PathID:
		inThePath = w.id(name)
	case row.Resource == segment.WholePath && e.Protocol == segment.GRPC:
		path = "/" + name
	case row.Resource == segment.WholePath:
		path = name
	case row.Resource == segment.ToolName:
		q.Header["mcp-name"] = strings.TrimPrefix(name, kinds[row.MCP])
	case strings.HasPrefix(s, segment.InQuery):
		parameters = append(parameters, strings.TrimPrefix(s, segment.InQuery)+"="+escapeQuery(name))
	case strings.HasPrefix(s, segment.InBody):
		member := fmt.Sprintf("%q:%s", row.Resource.Keys()[0], Quoted(name))
		if len(row.Name)%2 == 0 { // it may stand anywhere
			object = append(object, member)
		} else {
			object = append([]string{member}, object...)
		}
	case strings.HasPrefix(s, segment.InGRPC):
		f, _ := row.Resource.Fields()
		message.put(f.Name, name, 0)
	}
	q.Path = variable.ReplaceAllStringFunc(path, func(v string) string {
		switch key := variable.FindStringSubmatch(v); {
		case key[1] == "tenant":
			return e.Database.Tenant
		case key[1] == "database":
			return e.Database.Name
		case key[1] == "name":
			return inThePath
		case key[2] != "":
			return "x1/y1"
		}
		return "x1"
	})
	if parameters != nil {
		q.Path += "?" + strings.Join(parameters, "&")
	}

	switch {
	case row.MCP != "":
		q.Header["mcp-protocol-version"], q.Header["mcp-method"] = "2026-07-28", row.MCP
		params := `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"corpus","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}`
		if named := q.Header["mcp-name"]; named != "" {
			key := "name"
			if row.MCP == "resources/read" {
				key = "uri"
			}
			params = fmt.Sprintf(`%q:%s,`, key, Quoted(named)) + params
		}
		q.Body = fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":{%s}}`, row.MCP, params)
		q.Header["accept"], q.Header["content-type"] = "application/json, text/event-stream", "application/json"
	case row.Kind == segment.Unary || row.Kind == segment.Streaming:
		q.Body = frame(message.encode())
		q.Header["content-type"], q.Header["te"] = "application/grpc", "trailers"
	case row.Method == "POST" || row.Method == "PUT" || row.Method == "PATCH" || object != nil:
		if w.more != "" {
			object = append(object, w.more)
		}
		q.Body = "{" + strings.Join(append(object, `"messages":[]`), ",") + "}"
		q.Header["content-type"] = "application/json"
	}
	return q
}

// Quoted writes a JSON string with no more escapes than must be.
func Quoted(s string) string {
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`, "\n", `\n`, "\x00", `\u0000`).Replace(s) + `"`
}

// escapeQuery escapes what would end a parameter or the request line.
func escapeQuery(s string) string {
	var out strings.Builder
	for _, b := range []byte(s) {
		if b <= ' ' || b >= 0x7f || strings.IndexByte(`&=#+;%?"<>`, b) >= 0 {
			fmt.Fprintf(&out, "%%%02X", b)
		} else {
			out.WriteByte(b)
		}
	}
	return out.String()
}

// fields are those of a message, by number: texts and messages.
type fields map[int]any

// put sets a text at a place. What stands for any number of messages in one another stands for `nested` of them.
func (f fields) put(place segment.FieldPath, text string, nested int) {
	step := place[0]
	switch {
	case len(place) == 1:
		f[step.Number] = text
	case step.Nested && nested == 0:
		f.put(place[1:], text, 0)
	default:
		into, ok := f[step.Number].(fields)
		if !ok {
			into = fields{}
			f[step.Number] = into
		}
		into.put(place[1:], text, nested)
	}
}

// merge takes over a copy of what others are.
func (f fields) merge(others fields) {
	for number, value := range others {
		if of, ok := value.(fields); ok {
			into := fields{}
			into.merge(of)
			value = into
		}
		f[number] = value
	}
}

func (f fields) encode() []byte {
	var m []byte
	for _, number := range slices.Sorted(maps.Keys(f)) {
		m = protowire.AppendTag(m, protowire.Number(number), protowire.BytesType)
		switch v := f[number].(type) {
		case string:
			m = protowire.AppendString(m, v)
		case fields:
			m = protowire.AppendBytes(m, v.encode())
		}
	}
	return m
}

// frame is a message as gRPC sends it.
func frame(m []byte) string {
	return string([]byte{0, byte(len(m) >> 24), byte(len(m) >> 16), byte(len(m) >> 8), byte(len(m))}) + string(m)
}
