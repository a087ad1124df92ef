// Package view writes flows and traces as text for people at a terminal: a table of flows, a list of traces, and one
// trace as a tree.
//
// It is for the command line. It never lets what it shows take hold of the terminal: everything that came over the
// network is stripped of control characters. And it never shows a verdict that an application claims.
package view

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/telemetry"
)

// Colours of a terminal (ECMA-48, SGR).
const (
	red    = "\x1b[31m"
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	dim    = "\x1b[2m"
	reset  = "\x1b[0m"
)

// cell is text and the colour that it has if colours are wanted.
type cell struct{ text, colour string }

func (c cell) width() int { return utf8.RuneCountInString(c.text) }

// paint returns the text, padded to a width.
func (c cell) paint(width int, colours bool) string {
	pad := strings.Repeat(" ", max(0, width-c.width()))
	if !colours || c.colour == "" || c.text == "" {
		return c.text + pad
	}
	return c.colour + c.text + reset + pad
}

// Table writes rows below a heading, in columns that are as wide as what they have held so far. The last column is not
// padded. Write may be called again and again with more rows, as they come.
type Table struct {
	out     io.Writer
	colours bool
	heading []string
	widths  []int
	begun   bool
}

func (t *Table) write(rows [][]cell) error {
	var b strings.Builder
	if t.widths == nil {
		t.widths = make([]int, len(t.heading))
		for i, h := range t.heading {
			t.widths[i] = utf8.RuneCountInString(h)
		}
	}
	for _, row := range rows {
		for i, c := range row {
			t.widths[i] = max(t.widths[i], c.width())
		}
	}
	if !t.begun && len(rows) > 0 {
		t.begun = true
		head := make([]cell, len(t.heading))
		for i, h := range t.heading {
			head[i] = cell{h, dim}
		}
		rows = append([][]cell{head}, rows...)
	}
	for _, row := range rows {
		var line strings.Builder
		for i, c := range row {
			if i == len(row)-1 {
				line.WriteString(c.paint(0, t.colours))
				break
			}
			line.WriteString(c.paint(t.widths[i]+2, t.colours))
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(t.out, b.String())
	return err
}

// clean makes text from the network safe to show, on one line and at most so long.
func clean(s string, most int) string {
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > most {
			return b.String() + "…"
		}
		if !unicode.IsPrint(r) {
			r = '\uFFFD'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// or returns "-" for nothing.
func or(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// caller returns the path of a SPIFFE ID, which is how people call a workload.
func caller(id spiffeid.ID) string {
	if id.IsZero() {
		return "-"
	}
	if path := strings.TrimPrefix(id.Path(), "/"); path != "" {
		return clean(path, 48)
	}
	return id.String()
}

func verdict(v telemetry.Verdict) cell {
	switch v {
	case telemetry.Allowed:
		return cell{"✓ allow", green}
	case telemetry.Denied:
		return cell{"✗ deny", red}
	case telemetry.Refused:
		return cell{"✗ refused", red}
	case telemetry.Failed:
		return cell{"! failed", yellow}
	case telemetry.Limited:
		return cell{"! limited", yellow}
	}
	return cell{"? unknown", yellow}
}

// took writes a duration in three digits or so.
func took(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1fms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.2fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

func tokens(in, out int64) string {
	if in == 0 && out == 0 {
		return "-"
	}
	return fmt.Sprintf("%d→%d", in, out)
}
