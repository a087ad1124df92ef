package segment

import (
	"embed"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// The tables are texts, so that whoever must judge them can read them without Go. A line is a route:
//
//	name method path operation resource [flag…]
//
// "#" begins a comment, at the beginning of a line or behind a space. A resource is a Source, or "-" for none. Flags are
// the other fields of a Route: catalog; grpc, stream or websocket; also=KEY,KEY, and also3=KEY,KEY for the keys at depth 3;
// same1=KEY,KEY; db=SOURCE; mcp=METHOD.
//
// A line "$NAME = text" lets $NAME stand for the text in the lines below. "(a|b)" in a path stands for one route with each
// of them, whose names end in "-a" and "-b".
//
//go:embed protocols/*.txt
var tableFiles embed.FS

func readTable(p Protocol) ([]Route, error) {
	file := "protocols/" + strings.ToLower(string(p)) + ".txt"
	text, err := tableFiles.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the table of %s: %w", p, err)
	}
	routes, err := parseTable(p, string(text))
	if err != nil {
		return nil, fmt.Errorf("read %s:%w", file, err)
	}
	return routes, nil
}

var (
	definition = regexp.MustCompile(`^\$([A-Z]+)\s*=\s*(\S.*)$`)
	reference  = regexp.MustCompile(`\$[A-Z]*`)
	choice     = regexp.MustCompile(`^(.*)\(([a-z0-9|]+)\)(.*)$`)
)

func parseTable(p Protocol, text string) ([]Route, error) {
	var routes []Route
	names := map[string]bool{}
	defined := map[string]string{}
	for i, line := range strings.Split(text, "\n") {
		if line, _, _ = strings.Cut(" "+line, " #"); strings.TrimSpace(line) == "" {
			continue
		}
		line = strings.TrimSpace(line)
		unknown := ""
		line = reference.ReplaceAllStringFunc(line, func(ref string) string {
			if text, ok := defined[ref]; ok {
				return text
			}
			unknown = ref
			return ref
		})
		if d := definition.FindStringSubmatch(line); d != nil && unknown == "$"+d[1] {
			defined[unknown] = strings.TrimSpace(d[2])
			continue
		}
		if unknown != "" {
			return nil, fmt.Errorf("%d: %s is not defined, or defined twice", i+1, unknown)
		}
		for _, columns := range alternatives(strings.Fields(line)) {
			r, err := parseRoute(columns)
			if err == nil {
				err = r.check(p)
			}
			if err == nil && names[r.Name] {
				err = fmt.Errorf("another row has this name")
			}
			if err != nil {
				return nil, fmt.Errorf("%d: %s: %w", i+1, columns[0], err)
			}
			names[r.Name] = true
			routes = append(routes, r)
		}
	}
	return routes, nil
}

// alternatives is the row once for each alternative in its path.
func alternatives(columns []string) [][]string {
	if len(columns) < 3 || !strings.Contains(columns[2], "(") {
		return [][]string{columns}
	}
	c := choice.FindStringSubmatch(columns[2])
	if c == nil {
		return [][]string{columns}
	}
	var rows [][]string
	for one := range strings.SplitSeq(c[2], "|") {
		row := slices.Clone(columns)
		row[0], row[2] = row[0]+"-"+one, c[1]+one+c[3]
		rows = append(rows, row)
	}
	return rows
}

func parseRoute(columns []string) (Route, error) {
	if len(columns) < 5 {
		return Route{}, fmt.Errorf("%d columns of at least 5", len(columns))
	}
	for i, c := range columns {
		if c == "-" {
			columns[i] = ""
		}
	}
	r := Route{Name: columns[0], Method: columns[1], Path: columns[2], Operation: Operation(columns[3]), Resource: Source(columns[4])}
	for _, flag := range columns[5:] {
		if err := r.flag(flag); err != nil {
			return Route{}, err
		}
	}
	return r, nil
}

// flag sets what a flag stands for. None may be there twice.
func (r *Route) flag(flag string) error {
	key, value, valued := strings.Cut(flag, "=")
	name := strings.TrimRight(key, "0123456789")
	keys := strings.Split(value, ",")
	again := false
	switch {
	case key == "catalog" && !valued:
		again, r.Answer = r.Answer != "", FromCatalog
	case (key == string(Unary) || key == string(Streaming) || key == string(WebSocket)) && !valued:
		again, r.Kind = r.Kind != Plain, Kind(key)
	case value == "":
		return fmt.Errorf("unknown flag %q", flag)
	case key == "mcp":
		again, r.MCP = r.MCP != "", value
	case key == "db":
		again, r.Database = r.Database != "", Source(value)
	case !validKeys(keys):
		return fmt.Errorf("%q has no list of keys", flag)
	case key == "also":
		again, r.Also = r.Also != nil, keys
	case name == "also":
		return atDepth(&r.AlsoAt, key[len(name):], keys)
	case name == "same":
		return atDepth(&r.SameAt, key[len(name):], keys)
	default:
		return fmt.Errorf("unknown flag %q", flag)
	}
	if again {
		return fmt.Errorf("%q is the second of its kind", flag)
	}
	return nil
}

func atDepth(at *map[int][]string, digits string, keys []string) error {
	depth, err := strconv.Atoi(digits)
	if err != nil || depth < 1 || depth > 9 || strconv.Itoa(depth) != digits || (*at)[depth] != nil {
		return fmt.Errorf("%q is no depth from 1 to 9, or there twice", digits)
	}
	if *at == nil {
		*at = map[int][]string{}
	}
	(*at)[depth] = keys
	return nil
}

var (
	rowName  = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
	jsonKey  = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]*$`)
	template = regexp.MustCompile(`^(/|(/([A-Za-z0-9._:-]+|\{[a-z]+\}(:[A-Za-z]+)?))+(/\{[a-z]+=\*\*\})?|/\{[a-z]+=\*\*\})$`)
	methods  = []string{"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"}
)

func validKeys(keys []string) bool {
	return !slices.ContainsFunc(keys, func(k string) bool { return !jsonKey.MatchString(k) })
}

// check reports what makes no sense about the route, in a table of the protocol.
func (r *Route) check(p Protocol) error {
	grpc := r.Kind == Unary || r.Kind == Streaming
	implied := r.Operation == Discover || r.Operation == Enter
	body := r.Method == "POST" || r.Method == "PUT" || r.Method == "PATCH"
	_, query := strings.CutPrefix(string(r.Resource), InQuery)
	switch {
	case !rowName.MatchString(r.Name):
		return fmt.Errorf("a name is lower-case words with dashes")
	case (r.Method == "") != (p == TCP) || (r.Path == "") != (p == TCP):
		return fmt.Errorf("TCP has no method and no path, all others have both")
	case p != TCP && !slices.Contains(methods, r.Method):
		return fmt.Errorf("the method is none of %v", methods)
	case p != TCP && !template.MatchString(r.Path):
		return fmt.Errorf("the path %q is no template", r.Path)
	case !implied && !slices.Contains(p.Operations(), r.Operation):
		return fmt.Errorf("%s has no operation %q", p, r.Operation)
	case (r.Operation == Enter) != (r.Resource == NoResource):
		return fmt.Errorf("a row has no resource if its operation is Enter, and only then")
	case (r.MCP != "") != (p == MCP):
		return fmt.Errorf("an MCP method belongs to MCP, where all rows have one")
	case grpc && (r.Method != "POST" || strings.Count(r.Path, "/") != 2):
		return fmt.Errorf("a call of gRPC is POST /SERVICE/METHOD")
	case r.Kind == WebSocket && r.Method != "GET":
		return fmt.Errorf("a WebSocket begins with GET (RFC 6455, section 4.1)")
	case r.Database != NoResource && p != Milvus && p != Weaviate:
		return fmt.Errorf("%s has no database that a request can name outside the path", p)
	case (grpc || !body) && (r.Also != nil && !query || r.AlsoAt != nil || r.SameAt != nil):
		return fmt.Errorf("keys of a JSON body that is not there")
	case r.Resource == Everything && (r.Also != nil || r.AlsoAt != nil || r.SameAt != nil):
		return fmt.Errorf("keys that change nothing: everything is needed already")
	case slices.Contains(r.SameAt[1], strings.TrimPrefix(string(r.Resource), InBody)):
		return fmt.Errorf("a key that must say the same as itself")
	}
	if err := r.checkSource(p, r.Resource, false); err != nil {
		return err
	}
	if r.Database != NoResource && r.Database != Everything {
		return r.checkSource(p, r.Database, true)
	}
	return nil
}

// checkSource reports why requests of the route can't have a name there, of a resource or of a database.
func (r *Route) checkSource(p Protocol, s Source, database bool) error {
	grpc := r.Kind == Unary
	key := string(s[strings.Index(string(s), ":")+1:])
	ok := false
	switch {
	case s == NoResource, s == Everything:
		ok = true
	case strings.HasPrefix(string(s), InGRPC):
		f, valid := s.Fields()
		ok = valid && grpc && (!database || f.Other == nil)
	case strings.HasPrefix(string(s), InBody):
		keys := s.Keys()
		ok = r.Kind == Plain && r.Method != "GET" && r.Method != "HEAD" && validKeys(keys) && (database || len(keys) == 1)
	case strings.HasPrefix(string(s), InQuery):
		ok = r.Kind != Unary && r.Kind != Streaming && validKeys([]string{key})
	case database:
	case s == PathName, s == PathID:
		ok = strings.Count(r.Path, "{name}")+strings.Count(r.Path, "{name=**}") == 1
	case s == WholePath:
		ok = p == HTTP || p == GRPC
	case s == ToolName:
		ok = p == MCP
	}
	if !ok {
		return fmt.Errorf("no name can be at %q of this request", s)
	}
	return nil
}
