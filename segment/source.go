package segment

import (
	"strconv"
	"strings"
)

// Source says where a request names its resource: a constant, or a prefix of those below and what follows it.
type Source string

const (
	NoResource Source = ""           // nowhere: the operation is Enter
	Everything Source = "*"          // nowhere, or where nobody looks: it needs a grant on everything
	BodyModel  Source = "body:model" // the string at this key of the JSON object in the body
	BodyName   Source = "body:name"
	PathName   Source = "path:name" // the name in the {variable} of the path
	PathID     Source = "path:id"   // the UUID in the {variable}, which must be known to belong to a name
	WholePath  Source = "path"      // HTTP: the path itself, or the template that it fits; GRPC: without the slash before it
	ToolName   Source = "mcp:name"  // the header mcp-name, with the kind of what it names before it: tool/, prompt/, resource/

	// InBody is another key of the JSON object in the body. For a database, further keys that must say the same may
	// follow: "body:dbName=newDbName".
	InBody = "body:"
	// InQuery is a parameter of the query.
	InQuery = "query:"
	// InGRPC is a string in the Protocol Buffers message, by the numbers of its fields: see Fields.
	InGRPC = "grpc:"
)

// Fields is what a Source that begins with "grpc:" says. After the colon stands the place of the name; then, each with
// "=" before it, places where it may stand again; then, each with "!" before it, what makes the name worthless.
// "grpc:1=2.1!14" is the string in field 1, unless field 14 is there or field 1 in field 2 says something else.
//
// A place is the numbers of fields, from the message inwards: "1.4" is field 4 of the messages in field 1, in all of them
// if field 1 is repeated, and whether they are messages or bytes to the schema. A number with a "*" stands for any number
// of such messages in one another, none too: "2.1*.8" is field 8 of the messages in field 2, and of those in field 1 of
// these, however deep.
type Fields struct {
	// Name is where the name is. All strings there must be equal, else the request needs a grant on everything.
	Name FieldPath
	// Same is where the name may stand again. A string there that is neither empty nor the name needs a grant on everything.
	Same []FieldPath
	// Other is what names something else as well, or counts in place of the name. Where such a field is there, whatever it
	// holds, and with or without a name, the request needs a grant on everything.
	Other []FieldPath
}

// FieldPath leads from a message to a field of it or of a message in it.
type FieldPath []Field

// String writes it as a Source does.
func (p FieldPath) String() string {
	var steps []string
	for _, f := range p {
		step := strconv.Itoa(f.Number)
		if f.Nested {
			step += "*"
		}
		steps = append(steps, step)
	}
	return strings.Join(steps, ".")
}

// Field is one step.
type Field struct {
	Number int  // as in the .proto file
	Nested bool // any number of such steps, none too
}

// Fields takes a Source that begins with "grpc:" apart, and reports whether it is one.
func (s Source) Fields() (f Fields, ok bool) {
	text, ok := strings.CutPrefix(string(s), InGRPC)
	if !ok {
		return Fields{}, false
	}
	place, rest := cutPlace(text)
	f.Name, ok = fieldPath(place)
	for ok && rest != "" {
		sign := rest[0]
		place, rest = cutPlace(rest[1:])
		var path FieldPath
		if path, ok = fieldPath(place); sign == '=' {
			f.Same = append(f.Same, path)
		} else {
			f.Other = append(f.Other, path)
		}
	}
	return f, ok
}

func cutPlace(text string) (place, rest string) {
	if i := strings.IndexAny(text, "=!"); i >= 0 {
		return text[:i], text[i:]
	}
	return text, ""
}

// lastField is the greatest number that a field of Protocol Buffers can have.
const lastField = 1<<29 - 1

func fieldPath(place string) (FieldPath, bool) {
	var path FieldPath
	for step := range strings.SplitSeq(place, ".") {
		digits, nested := strings.CutSuffix(step, "*")
		n, err := strconv.Atoi(digits)
		if err != nil || strconv.Itoa(n) != digits || n < 1 || n > lastField {
			return nil, false
		}
		path = append(path, Field{Number: n, Nested: nested})
	}
	return path, !path[len(path)-1].Nested // that is where something stands
}

// Keys are the keys of a Source that begins with "body:": the one that counts, and those that must say the same.
func (s Source) Keys() []string {
	keys, ok := strings.CutPrefix(string(s), InBody)
	if !ok {
		return nil
	}
	return strings.Split(keys, "=")
}
