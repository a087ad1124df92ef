package v1alpha1

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"sallyport.dev/segment"
)

// MaxBytes is the size of the largest text that is decoded.
const MaxBytes = 16 << 20

// maxDocument is the size of the largest document, as in etcd: its nodes take a hundred times as much memory.
const maxDocument = 1 << 20

// Decode reads all documents of a YAML stream or a JSON object. The name is what positions call the text. What is
// wrong is in the Problems of the documents, and text that is no document at all is an unreadable one.
func Decode(name string, data []byte) []Document {
	return new(Memo).Decode(name, string(data))
}

// Memo decodes, and remembers the documents of each name: of a text that has not changed they are the same slice, and
// after a change in one of many documents only that one is decoded again, wherever in its text it now stands. The zero
// value is ready. It is not for several goroutines at once.
type Memo struct {
	texts  map[string]*remembered // by name
	turn   int                    // how often it has forgotten
	schema schema
}

// remembered is a text that was decoded.
type remembered struct {
	text  string
	docs  []Document
	parts map[string][]Document // their positions count from the beginning of the part
	turn  int                   // when it was last asked for
}

// Forget drops all names that were not decoded since the last Forget.
func (m *Memo) Forget() {
	maps.DeleteFunc(m.texts, func(_ string, r *remembered) bool { return r.turn < m.turn })
	m.turn++
}

// Decode is Decode, from memory where it can. Documents of equal text share their Spec, and of an equal name and text all: they
// must not be changed.
func (m *Memo) Decode(name, text string) []Document {
	last := m.texts[name]
	if last != nil && last.text == text {
		last.turn = m.turn
		return last.docs
	}
	if m.texts == nil {
		m.texts, m.schema = map[string]*remembered{}, schema{}
	}
	r := &remembered{text: text, turn: m.turn}
	r.decode(name, last, m.schema)
	m.texts[name] = r
	return r.docs
}

func (r *remembered) decode(name string, last *remembered, s schema) {
	text := r.text
	switch invalid := invalidUTF8(text); {
	case len(text) > MaxBytes:
		r.docs = []Document{Unreadable(segment.Problem{Code: "too-large", Pos: segment.Pos{File: name},
			Msg: fmt.Sprintf("is larger than %d MiB", MaxBytes>>20), Hint: "write several files"})}
		return
	case text == "":
		r.docs = []Document{Unreadable(segment.Problem{Code: "unfinished", Pos: segment.Pos{File: name},
			Msg: "is empty", Hint: "it may be half written; delete the file if nothing shall be in it"})}
		return
	case invalid >= 0:
		line := strings.LastIndexByte(text[:invalid], '\n') + 1
		r.docs = []Document{Unreadable(segment.Problem{Code: "not-utf8", Msg: "is not UTF-8",
			Pos:  segment.Pos{File: name, Line: strings.Count(text[:invalid], "\n") + 1, Column: utf8.RuneCountInString(text[line:invalid]) + 1},
			Hint: "save it as UTF-8"})}
		return
	}
	var known map[string][]Document
	if last != nil {
		known = last.parts
	}
	r.parts = make(map[string][]Document, len(known))
	above := 0
	for part := range parts(text) {
		docs, ok := r.parts[part]
		if !ok {
			if docs, ok = known[part]; !ok {
				docs = s.decode(part)
			}
			r.parts[part] = docs
		}
		for _, d := range docs {
			d.file, d.above = name, above
			r.docs = append(r.docs, d)
		}
		above += strings.Count(part, "\n")
	}
}

// parts cuts a YAML stream before each line that begins with the document marker. Such a line is one wherever it
// stands, also inside of scalars and flow collections (YAML 1.2.2, section 9.1.2), so no document is cut in two.
func parts(text string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for text != "" {
			end := len(text)
			for from := 0; ; {
				i := strings.Index(text[from:], "\n---")
				if i < 0 {
					break
				}
				from += i + 1
				if rest := text[from+3:]; rest == "" || strings.IndexByte(" \t\r\n", rest[0]) >= 0 {
					end = from
					break
				}
			}
			if !yield(text[:end]) {
				return
			}
			text = text[end:]
		}
	}
}

// decode reads the documents of a text: one, or more where a line ends in something other than "\n".
func (s schema) decode(text string) []Document {
	if len(text) > maxDocument {
		return []Document{Unreadable(segment.Problem{Code: "too-large", Pos: segment.Pos{Line: 1},
			Msg: fmt.Sprintf("is a document larger than %d MiB", maxDocument>>20), Hint: "write several documents"})}
	}
	var docs []Document
	closed := false // whether the last document ends in a bracket
	read := yaml.NewDecoder(strings.NewReader(text))
	for {
		var root yaml.Node
		err := next(read, &root)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return append(docs, Unreadable(syntaxProblem(err, text)))
		}
		n := root.Content[0]
		if n.Kind == yaml.ScalarNode && n.Value == "" && n.Style == 0 && n.Anchor == "" {
			continue // nothing between two markers
		}
		docs = append(docs, s.document(n))
		closed = n.Style&yaml.FlowStyle != 0
	}
	// Of a text that ends within a line nobody knows how the line would have gone on: a name could be cut, or the
	// "effect: Deny" that follows it.
	if !closed && !strings.HasSuffix(text, "\n") {
		p := segment.Problem{Code: "unfinished", Pos: segment.Pos{Line: strings.Count(text, "\n") + 1},
			Msg: "ends within a line", Hint: "it may be half written; end the last line with a line break"}
		if len(docs) == 0 {
			return []Document{Unreadable(p)}
		}
		last := &docs[len(docs)-1]
		last.problems = append(last.problems, p)
	}
	return docs
}

// next reads one document. The parser panics on some input that it did not expect; that is bad input to us.
func next(read *yaml.Decoder, n *yaml.Node) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("yaml: %v", r)
		}
	}()
	return read.Decode(n)
}

// syntaxProblem says where the parser stumbled. Its own messages name the line where the surrounding block begins,
// some of them off by one; so it reads again, a line at a time, and what it read last is what it did not understand.
func syntaxProblem(err error, text string) segment.Problem {
	lines := lineReader{text: text}
	for read, again := yaml.NewDecoder(&lines), error(nil); again == nil; {
		again = next(read, new(yaml.Node))
	}
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	if strings.HasPrefix(msg, "line ") {
		_, msg, _ = strings.Cut(msg, ": ")
	}
	p := segment.Problem{Code: "syntax", Pos: segment.Pos{Line: lines.read}, Msg: "is not YAML: " + msg,
		Hint: "the document is half written, or a line is not indented as its neighbours are"}
	if strings.HasPrefix(text, "%") {
		p.Hint = "leave out the line that begins with %"
	}
	return p
}

// lineReader reads a text line by line, and counts the lines that it began.
type lineReader struct {
	text string
	rest string // of the line
	read int
}

func (r *lineReader) Read(p []byte) (int, error) {
	if r.rest == "" {
		if r.text == "" {
			return 0, io.EOF
		}
		end := strings.IndexByte(r.text, '\n') + 1
		if end == 0 {
			end = len(r.text)
		}
		r.rest, r.text = r.text[:end], r.text[end:]
		r.read++
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// invalidUTF8 returns where the text stops being UTF-8, or -1.
func invalidUTF8(text string) int {
	if utf8.ValidString(text) {
		return -1
	}
	for i, r := range text {
		if _, size := utf8.DecodeRuneInString(text[i:]); r == utf8.RuneError && size == 1 {
			return i
		}
	}
	return -1
}
