// Package corpus reads decision tables: documents, and for each of many requests what is decided about it and by
// which rule.
//
// It is for tests, and for more than one: what the policy answers and what a real Envoy answers must be the same,
// so both are asked the same. It decides nothing itself.
//
// A table is a txtar archive with the files "documents.yaml" and "decisions". A line of decisions is
//
//	caller endpoint operation resource → verdict rule
//	caller endpoint operation resource → verdict rule, shadow verdict rule
//
// where the shadow's answer is left out if it is the same. A caller that begins with "/" is in example.org. What
// has blanks in it, or is empty, is written in quotes, as in Go. "now: TIME" (RFC 3339) sets the clock for the
// lines below it; "#" begins a comment.
package corpus

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// widest is the column that others are aligned with.
const widest = 50

// Case is some documents at one moment, and the requests that are made then.
type Case struct {
	Name      string // of the file; with the moment behind it, if the file has several
	Documents []byte // YAML
	Now       time.Time
	Lines     []Line
}

// Line is one request and what must be decided about it.
type Line struct {
	Pos     string // "file:line"
	Request authz.Request
	Want    authz.Decision
}

// Options are what the documents of all cases are assembled with.
func Options() v1alpha1.Options {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	return v1alpha1.Options{TrustDomain: td, SVIDTTL: time.Hour, Gateway: &segment.Gateway{
		Name: "test", ID: spiffeid.RequireFromPath(td, "/gateway/test"), SVIDTTL: time.Hour,
	}}
}

// Config assembles the documents.
func (c *Case) Config() (segment.Config, error) {
	config, problems := v1alpha1.Assemble(v1alpha1.Decode(c.Name, c.Documents), Options())
	if problems != nil {
		return segment.Config{}, problems
	}
	return config, nil
}

// Load reads all tables of a folder, in the order of their names.
func Load(dir string) ([]Case, error) {
	var all []Case
	err := each(dir, func(file string, archive *txtar.Archive) error {
		cases, err := read(file, archive)
		all = append(all, cases...)
		return err
	})
	return all, err
}

// Update writes into all tables of a folder what answer says.
func Update(dir string, answer func(*Case, *Line) authz.Decision) error {
	return each(dir, func(file string, archive *txtar.Archive) error {
		cases, err := read(file, archive)
		if err != nil {
			return err
		}
		var rows [][]string
		var widths [4]int
		for i := range cases {
			for j := range cases[i].Lines {
				row := columns(cases[i].Lines[j].Request)
				for k, cell := range row {
					if n := utf8.RuneCountInString(cell); n <= widest {
						widths[k] = max(widths[k], n)
					}
				}
				rows = append(rows, append(row, answerText(answer(&cases[i], &cases[i].Lines[j]))))
			}
		}
		var out strings.Builder
		for line := range strings.Lines(string(archive.Files[1].Data)) {
			if !isRequest(line) {
				out.WriteString(line)
				continue
			}
			for k, w := range widths {
				out.WriteString(rows[0][k] + strings.Repeat(" ", max(0, w-utf8.RuneCountInString(rows[0][k]))+1))
			}
			out.WriteString("→ " + rows[0][4] + "\n")
			rows = rows[1:]
		}
		archive.Files[1].Data = []byte(out.String())
		return os.WriteFile(file, txtar.Format(archive), 0o644)
	})
}

func each(dir string, do func(file string, archive *txtar.Archive) error) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.txtar"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("read decision tables: there are none in %s", dir)
	}
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			return err
		}
		if err := do(file, archive); err != nil {
			return err
		}
	}
	return nil
}

func isRequest(line string) bool {
	line = strings.TrimSpace(line)
	return line != "" && line[0] != '#' && !strings.HasPrefix(line, "now:")
}

func read(file string, archive *txtar.Archive) ([]Case, error) {
	if len(archive.Files) != 2 || archive.Files[0].Name != "documents.yaml" || archive.Files[1].Name != "decisions" {
		return nil, fmt.Errorf("%s: must have documents.yaml and decisions, in this order", file)
	}
	name := strings.TrimSuffix(filepath.Base(file), ".txtar")
	fresh := Case{Name: name, Documents: archive.Files[0].Data, Now: time.Unix(1750000000, 0).UTC()}
	cases := []Case{fresh}
	n := strings.Count(string(archive.Comment), "\n") + strings.Count(string(archive.Files[0].Data), "\n") + 2
	for text := range strings.Lines(string(archive.Files[1].Data)) {
		n++
		pos := fmt.Sprintf("%s:%d", file, n)
		if at, ok := strings.CutPrefix(strings.TrimSpace(text), "now:"); ok {
			now, err := time.Parse(time.RFC3339, strings.TrimSpace(at))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", pos, err)
			}
			if len(cases[len(cases)-1].Lines) == 0 {
				cases = cases[:len(cases)-1]
			}
			fresh.Name, fresh.Now = name+"@"+now.Format(time.RFC3339), now
			cases = append(cases, fresh)
			continue
		}
		if !isRequest(text) {
			continue
		}
		line, err := parseLine(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", pos, err)
		}
		line.Pos = pos
		last := &cases[len(cases)-1]
		last.Lines = append(last.Lines, line)
	}
	return cases, nil
}

func parseLine(text string) (Line, error) {
	fields, err := split(text)
	if err != nil {
		return Line{}, err
	}
	if len(fields) < 5 || fields[4] != "→" {
		return Line{}, fmt.Errorf("must be: caller endpoint operation resource → verdict rule")
	}
	if strings.HasPrefix(fields[0], "/") {
		fields[0] = Options().TrustDomain.IDString() + fields[0]
	}
	line := Line{Request: authz.Request{
		Caller: fields[0], Endpoint: segment.EndpointName(fields[1]),
		Operation: segment.Operation(fields[2]), Resource: fields[3],
	}}
	switch want := fields[5:]; {
	case len(want) == 0: // one that is new, before Update
	case len(want) == 2:
		line.Want = authz.Decision{Allowed: want[0] == "allow", Rule: authz.Rule(want[1])}
		line.Want.ShadowAllowed, line.Want.ShadowRule = line.Want.Allowed, line.Want.Rule
	case len(want) == 5 && want[2] == "shadow":
		line.Want = authz.Decision{
			Allowed: want[0] == "allow", Rule: authz.Rule(strings.TrimSuffix(want[1], ",")),
			ShadowAllowed: want[3] == "allow", ShadowRule: authz.Rule(want[4]),
		}
	default:
		return Line{}, fmt.Errorf("must have a verdict and a rule, and perhaps those of the shadow: %q", want)
	}
	return line, nil
}

// split returns the fields of a line. One in quotes may hold anything.
func split(text string) ([]string, error) {
	var fields []string
	for text = strings.TrimSpace(text); text != ""; text = strings.TrimSpace(text) {
		if text[0] == '"' {
			quoted, err := strconv.QuotedPrefix(text)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", text, err)
			}
			plain, _ := strconv.Unquote(quoted)
			fields, text = append(fields, plain), text[len(quoted):]
			continue
		}
		field, rest, _ := strings.Cut(text, " ")
		fields, text = append(fields, field), rest
	}
	return fields, nil
}

func columns(r authz.Request) []string {
	caller := r.Caller
	if path, ok := strings.CutPrefix(caller, Options().TrustDomain.IDString()+"/"); ok {
		caller = "/" + path
	}
	return []string{quote(caller), quote(string(r.Endpoint)), quote(string(r.Operation)), quote(r.Resource)}
}

func quote(s string) string {
	if s == "" || strings.ContainsAny(s, " \t\"#→") || strconv.Quote(s) != `"`+s+`"` {
		return strconv.Quote(s)
	}
	return s
}

func answerText(d authz.Decision) string {
	verdict := map[bool]string{true: "allow", false: "deny"}
	text := verdict[d.Allowed] + " " + string(d.Rule)
	if d.ShadowAllowed != d.Allowed || d.ShadowRule != d.Rule {
		text += ", shadow " + verdict[d.ShadowAllowed] + " " + string(d.ShadowRule)
	}
	return text
}
