package v1alpha1

import (
	"time"

	"cmp"
	"strconv"
	"strings"

	"sallyport.dev/segment"
)

// Document is one document and where its fields stand. A document that could not be read is a Document all the
// same, so that it cannot be left out by mistake: Assemble makes no configuration of it.
type Document struct {
	APIVersion APIVersion `json:"apiVersion"`
	Kind       Kind       `json:"kind"`
	Metadata   Metadata   `json:"metadata"`
	Spec       any        `json:"spec"` // *EndpointSpec and so on; nil: the document is unreadable

	file     string
	above    int              // lines of the file above the text that all positions below count from
	marks    []mark           // in document order; the first is the document itself
	problems segment.Problems // without file
}

// Unreadable is what stands for documents that could not be read, for the reason that p gives.
func Unreadable(p segment.Problem) Document {
	file := p.Pos.File
	p.Pos.File = ""
	return Document{file: file, problems: segment.Problems{p}}
}

// Problems are what Decode found wrong. A document with problems holds what could be read nevertheless.
func (d *Document) Problems() segment.Problems {
	var ps segment.Problems
	for _, p := range d.problems {
		p.Pos = d.at(p.Pos)
		ps = append(ps, p)
	}
	return ps
}

// Pos returns where the field with that path stands ("spec.to[0].endpoint"); for one that is not written, where
// the nearest field around it stands; for "" where the document begins.
func (d *Document) Pos(path string) segment.Pos {
	var at mark
	if len(d.marks) > 0 {
		at = d.marks[0]
	}
	i, end := 1, len(d.marks)
	for name, index := range steps(path) {
		for i < end && (d.marks[i].name != name || d.marks[i].index != index) {
			i = int(d.marks[i].end)
		}
		if i >= end {
			break
		}
		at, end = d.marks[i], int(d.marks[i].end)
		i++
	}
	return d.at(segment.Pos{Line: int(at.line), Column: int(at.column)})
}

func (d *Document) at(p segment.Pos) segment.Pos {
	p.File = d.file
	if p.Line > 0 {
		p.Line += d.above
	}
	return p
}

// mark is where one field stands: a scalar itself, the key of a mapping or list. Marks are a tree, written flat.
type mark struct {
	name         string // of a field; "" for an item
	index        int32  // of an item
	end          int32  // the first mark that is not below this one
	line, column int32
}

// steps yields the steps of a field path: a name and 0, or "" and an index.
func steps(path string) func(yield func(string, int32) bool) {
	return func(yield func(string, int32) bool) {
		for path != "" {
			if rest, ok := strings.CutPrefix(path, "["); ok {
				number, after, _ := strings.Cut(rest, "]")
				index, err := strconv.ParseInt(number, 10, 32)
				if err != nil || !yield("", int32(index)) {
					return
				}
				path = strings.TrimPrefix(after, ".")
				continue
			}
			end := strings.IndexAny(path, ".[")
			if end < 0 {
				end = len(path)
			}
			if !yield(path[:end], 0) {
				return
			}
			path = strings.TrimPrefix(path[end:], ".")
		}
	}
}

// byPosition orders documents as they stand, so that what is said of them does not depend on who read them first.
func byPosition(a, b *Document) int {
	p, q := a.Pos(""), b.Pos("")
	return cmp.Or(cmp.Compare(p.File, q.File), cmp.Compare(p.Line, q.Line), cmp.Compare(p.Column, q.Column),
		cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Metadata.Name, b.Metadata.Name))
}

// Snapshot is all documents of a source as they stood at one moment. It is immutable.
type Snapshot struct {
	Files   [][]Document // the documents of each file; of a file that has not changed it is the same slice as before
	Noticed time.Time    // when the first of the changes was noticed that made it differ from the one before
}
