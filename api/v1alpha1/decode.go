package v1alpha1

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"

	"sallyport.dev/segment"
)

const (
	maxText     = 2048     // bytes of one text; annotations may be longer
	maxBundle   = 64 << 10 // bytes of a bundle that stands in a document
	maxProblems = 100      // that are reported of one document
)

// decoder fills one document from its nodes. It walks the types, not the input, so its depth is that of the types.
type decoder struct {
	schema   schema
	marks    []mark
	path     []int32 // the marks from the document down to the field that the decoder is in
	problems segment.Problems
}

func (s schema) document(n *yaml.Node) Document {
	d := decoder{schema: s}
	var doc Document
	switch kindOf(n) {
	case KindEndpoint:
		doc.Spec = new(EndpointSpec)
	case KindGateway:
		doc.Spec = new(GatewaySpec)
	case KindWorkload:
		doc.Spec = new(WorkloadSpec)
	case KindGrant:
		doc.Spec = new(GrantSpec)
	case KindTrustDomain:
		doc.Spec = new(TrustDomainSpec)
	case KindTokenIssuer:
		doc.Spec = new(TokenIssuerSpec)
	}
	d.enter(mark{}, n)
	d.value(n, reflect.ValueOf(&doc).Elem())
	d.leave()
	doc.marks, doc.problems = slices.Clip(d.marks), d.problems
	return doc
}

// kindOf looks ahead: the kind says how to read the rest.
func kindOf(n *yaml.Node) Kind {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "kind" {
			return Kind(n.Content[i+1].Value)
		}
	}
	return ""
}

func (d *decoder) enter(m mark, at *yaml.Node) {
	m.line, m.column = int32(at.Line), int32(at.Column)
	d.path = append(d.path, int32(len(d.marks)))
	d.marks = append(d.marks, m)
}

func (d *decoder) leave() {
	d.marks[d.path[len(d.path)-1]].end = int32(len(d.marks))
	d.path = d.path[:len(d.path)-1]
}

// here is the mark of the field that the decoder is in.
func (d *decoder) here() mark { return d.marks[d.path[len(d.path)-1]] }

// report says what is wrong with the field that the decoder is in, at the node.
func (d *decoder) report(n *yaml.Node, code, msg, hint string) {
	d.reportField(n, "", code, msg, hint)
}

// reportField says what is wrong with a field of the one that the decoder is in.
func (d *decoder) reportField(n *yaml.Node, name, code, msg, hint string) {
	if len(d.problems) == maxProblems {
		return
	}
	var path strings.Builder
	for i, at := range d.path[1:] {
		switch m := d.marks[at]; {
		case m.name == "":
			fmt.Fprintf(&path, "[%d]", m.index)
		case i == 0:
			path.WriteString(m.name)
		case strings.ContainsAny(m.name, ".[]"):
			fmt.Fprintf(&path, "[%q]", m.name)
		default:
			path.WriteString("." + m.name)
		}
	}
	if name != "" && path.Len() > 0 {
		name = "." + name
	}
	d.problems = append(d.problems, segment.Problem{Code: code, Pos: segment.Pos{Line: n.Line, Column: n.Column},
		Field: path.String() + name, Msg: msg, Hint: hint})
}

// plain reports whether the node is written out, and says so if it is not.
func (d *decoder) plain(n *yaml.Node) bool {
	if n.Kind == yaml.AliasNode || n.Anchor != "" || n.Style&yaml.TaggedStyle != 0 || n.Tag == "!!merge" {
		d.report(n, "alias", "anchors, aliases, tags and merge keys are not read here", "write the value out")
		return false
	}
	return true
}

func (d *decoder) value(n *yaml.Node, v reflect.Value) {
	if !d.plain(n) {
		return
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		d.report(n, "empty-value", "is empty", "write a value, or leave the field out if it is optional")
		return
	}
	switch v.Kind() {
	case reflect.Interface: // the spec; of what kind is unknown if there is none
		if !v.IsNil() {
			d.value(n, v.Elem().Elem())
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			d.moment(n, v)
		} else if d.is(n, yaml.MappingNode) {
			d.object(n, v)
		}
	case reflect.Map:
		if d.is(n, yaml.MappingNode) {
			d.labels(n, v)
		}
	case reflect.Slice:
		if d.is(n, yaml.SequenceNode) {
			d.items(n, v)
		}
	case reflect.Int64:
		d.number(n, v)
	case reflect.String:
		if d.is(n, yaml.ScalarNode) {
			d.text(n, v)
		}
	}
}

// is reports whether the node is of that kind, and says so if it is not. A date is text to us, as it is in JSON.
func (d *decoder) is(n *yaml.Node, kind yaml.Kind) bool {
	if n.Kind == kind && (kind != yaml.ScalarNode || n.Tag == "!!str" || n.Tag == "!!timestamp") {
		return true
	}
	hint := ""
	switch {
	case kind == yaml.ScalarNode && n.Kind == yaml.ScalarNode:
		hint = fmt.Sprintf("write it in quotes: %q", n.Value)
	case kind == yaml.SequenceNode && n.Kind == yaml.ScalarNode:
		hint = fmt.Sprintf("write it in brackets: [%s]", n.Value)
	case kind == yaml.SequenceNode:
		hint = "begin each item with \"- \""
	}
	d.report(n, "wrong-type", fmt.Sprintf("must be %s, and is %s", typeName(kind, "!!str"), typeName(n.Kind, n.Tag)), hint)
	return false
}

func typeName(kind yaml.Kind, tag string) string {
	switch kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch tag {
	case "!!int", "!!float":
		return "a number"
	case "!!bool":
		return "true or false"
	case "!!binary":
		return "binary"
	}
	return "text"
}

func (d *decoder) object(n *yaml.Node, v reflect.Value) {
	shape := d.schema.of(v.Type())
	var written uint // bit i: field i was there
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if !d.plain(key) {
			continue
		}
		at := slices.IndexFunc(shape.fields, func(f field) bool { return f.name == key.Value })
		if at < 0 || key.Kind != yaml.ScalarNode {
			d.unknown(key, shape)
			continue
		}
		f := shape.fields[at]
		if written&(1<<at) != 0 {
			d.reportField(key, f.name, "duplicate-key", "is written twice", "keep one of the two")
			continue
		}
		written |= 1 << at
		d.field(key, value, v.Field(f.index))
	}
	for i, f := range shape.fields {
		if f.required && written&(1<<i) == 0 {
			at := &yaml.Node{Line: int(d.here().line), Column: int(d.here().column)}
			hint := ""
			if allowed := d.schema.of(v.Field(f.index).Type()).allowed; allowed != nil {
				hint = "write one of: " + strings.Join(allowed, ", ")
			}
			d.reportField(at, f.name, "missing-field", "is missing", hint)
		}
	}
}

func (d *decoder) field(key, value *yaml.Node, v reflect.Value) {
	at := key
	if value.Kind == yaml.ScalarNode && value.Tag != "!!null" {
		at = value
	}
	d.enter(mark{name: key.Value}, at)
	d.value(value, v)
	d.leave()
}

func (d *decoder) unknown(key *yaml.Node, shape *shape) {
	hint := didYouMean(key.Value, shape.names())
	if hint == "" {
		hint = "fields here: " + strings.Join(shape.names(), ", ")
	}
	d.reportField(key, clip(key.Value), "unknown-field", "there is no such field", hint)
}

func (d *decoder) labels(n *yaml.Node, v reflect.Value) {
	m := make(map[string]string, len(n.Content)/2)
	long := d.here().name == "annotations"
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if !d.plain(key) {
			continue
		}
		if key.Kind != yaml.ScalarNode || key.Tag != "!!str" || key.Value == "" || len(key.Value) > maxText {
			d.report(key, "wrong-type", "only text can stand before a colon here", "write it in quotes")
			continue
		}
		if _, ok := m[key.Value]; ok {
			d.reportField(key, clip(key.Value), "duplicate-key", "is written twice", "keep one of the two")
			continue
		}
		var text labelValue
		d.field(key, value, reflect.ValueOf(&text).Elem())
		if len(text) > maxText && !long {
			d.reportField(key, clip(key.Value), "too-large", fmt.Sprintf("is longer than %d bytes", maxText), "")
		}
		m[key.Value] = string(text)
	}
	if len(m) == 0 {
		d.report(n, "empty-value", "is empty", "write a value, or leave the field out if it is optional")
	}
	v.Set(reflect.ValueOf(m))
}

// labelValue is the only text that may be empty; with bundleText, the only one of several lines or long.
type labelValue string

func (d *decoder) items(n *yaml.Node, v reflect.Value) {
	if len(n.Content) == 0 {
		d.report(n, "empty-value", "is empty", "write an item, or leave the field out if it is optional")
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.enter(mark{index: int32(i)}, item)
		d.value(item, v.Index(i))
		d.leave()
	}
}

func (d *decoder) text(n *yaml.Node, v reflect.Value) {
	enum := d.schema.of(v.Type()).allowed
	switch {
	case v.Type() == reflect.TypeFor[labelValue]():
	case v.Type() == reflect.TypeFor[bundleText]():
		if len(n.Value) > maxBundle {
			d.report(n, "too-large", fmt.Sprintf("is longer than %d KiB", maxBundle>>10), fmt.Sprintf("write it to a file, and the file's path in %sFile", d.here().name))
			return
		}
		if strings.TrimSpace(n.Value) == "" {
			d.report(n, "empty-value", "is empty", "write a value, or leave the field out if it is optional")
			return
		}
	case len(n.Value) > maxText:
		d.report(n, "too-large", fmt.Sprintf("is longer than %d bytes", maxText), "")
		return
	case strings.TrimSpace(n.Value) == "":
		d.report(n, "empty-value", "is empty", "write a value, or leave the field out if it is optional")
		return
	case strings.ContainsFunc(n.Value, func(r rune) bool { return !unicode.IsPrint(r) }):
		d.report(n, "bad-value", fmt.Sprintf("has a character in it that cannot be seen: %+q", clip(n.Value)), "")
		return
	case enum != nil && !slices.Contains(enum, n.Value):
		code := "bad-value"
		if v.Type() == reflect.TypeFor[Kind]() {
			code = "unknown-kind"
		}
		d.report(n, code, fmt.Sprintf("is %q, and must be one of: %s", clip(n.Value), strings.Join(enum, ", ")),
			didYouMean(n.Value, enum))
		return
	}
	v.SetString(n.Value)
}

// number reads a count, which people write in decimal digits.
func (d *decoder) number(n *yaml.Node, v reflect.Value) {
	count, err := strconv.ParseInt(n.Value, 10, 64)
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" {
		d.report(n, "wrong-type", fmt.Sprintf("must be a number, and is %s", typeName(n.Kind, n.Tag)), "write it in digits, without quotes")
	} else if err != nil || count < 1 || count > segment.MaxLimit || strconv.FormatInt(count, 10) != n.Value {
		d.report(n, "bad-value", fmt.Sprintf("is %s, and must be a whole number from 1 to %d", clip(n.Value), segment.MaxLimit), "")
	}
	v.SetInt(count)
}

func (d *decoder) moment(n *yaml.Node, v reflect.Value) {
	if !d.is(n, yaml.ScalarNode) {
		return
	}
	t, err := time.Parse(time.RFC3339, n.Value)
	if err != nil || t.Unix() <= 0 { // the zero time would mean "never"
		d.report(n, "bad-value", fmt.Sprintf("is %q, and must be a time of RFC 3339 after 1970", clip(n.Value)),
			`write it like "2027-01-01T00:00:00Z"`)
		return
	}
	v.Set(reflect.ValueOf(t.UTC()))
}

// clip shortens what a user wrote so that it can be shown.
func clip(s string) string {
	if len(s) <= 80 {
		return s
	}
	return strings.ToValidUTF8(s[:80], "") + "…"
}
