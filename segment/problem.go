package segment

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Pos is where something stands that a user wrote. Line and Column count from 1; zero is unknown.
type Pos struct {
	File   string `json:"file,omitempty"` // path, or namespace/name of a Kubernetes object
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
}

// String returns "file:line:column", as far as it is known.
func (p Pos) String() string {
	switch {
	case p.Line == 0:
		return p.File
	case p.Column == 0:
		return fmt.Sprintf("%s:%d", p.File, p.Line)
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// Problem is one thing that a user got wrong. All problems of an input are reported at once.
type Problem struct {
	Code  string `json:"code"`            // stable, lower case with dashes: "unknown-field"
	Pos   Pos    `json:"pos"`             // where
	Field string `json:"field,omitempty"` // path below the document: "spec.to[0].endpoint"
	Msg   string `json:"message"`         // what is wrong
	Hint  string `json:"hint,omitempty"`  // what to do about it
}

func (p Problem) String() string {
	var b strings.Builder
	if at := p.Pos.String(); at != "" {
		b.WriteString(at + ": ")
	}
	if p.Field != "" {
		b.WriteString(p.Field + ": ")
	}
	b.WriteString(p.Msg)
	if p.Hint != "" {
		b.WriteString("\n    hint: " + p.Hint)
	}
	return b.String()
}

// Problems is a non-empty list of problems as an error.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Sort orders problems by where they stand.
func (ps Problems) Sort() {
	slices.SortFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Pos.File, b.Pos.File), cmp.Compare(a.Pos.Line, b.Pos.Line),
			cmp.Compare(a.Pos.Column, b.Pos.Column), cmp.Compare(a.Field, b.Field), cmp.Compare(a.Msg, b.Msg))
	})
}
