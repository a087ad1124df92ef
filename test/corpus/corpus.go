// Package corpus reads decision tables: documents, and for each of many requests what is decided about it and by
// which rule.
//
// It is for tests, and for more than one: what the policy answers and what a real Envoy answers must be the same,
// so both are asked the same. It decides nothing itself.
//
// A table is a txtar archive with the files "documents.yaml" and "decisions", whose lines package decisiontable
// describes, and between them "shadow.yaml" if there is a shadow folder. Each line names the rule. A caller that begins
// with "/" is in example.org.
package corpus

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/authz/decisiontable"
	"sallyport.dev/segment"
)

// widest is the column that others are aligned with.
const widest = 50

// Case is some documents at one moment, and the requests that are made then.
type Case struct {
	Name      string // of the file; with the moment behind it, if the file has several
	Documents []byte // YAML
	Shadow    []byte // YAML of the shadow folder; nil: there is none
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
	documents := v1alpha1.Decode(c.Name, c.Documents)
	config, problems := v1alpha1.Assemble(documents, Options())
	if problems != nil {
		return segment.Config{}, problems
	}
	if c.Shadow != nil {
		config.ShadowFolder = true
		if config.Shadow, problems = v1alpha1.AssembleShadow(documents, v1alpha1.Decode(c.Name+"/shadow", c.Shadow), Options()); problems != nil {
			return segment.Config{}, problems
		}
	}
	return config, nil
}

var (
	limits  = regexp.MustCompile(`(?m)^  (notBefore|expires): .*\n`)
	windows = regexp.MustCompile(`(?m)^  windows:.*\n(  - .*\n)*`)
)

// Timeless are the documents and those of the shadow folder, in which each grant holds for ever if it holds at the
// moment of the case, and else never: for whoever has a clock that can't be set. Times must stand in lines of their own.
func (c *Case) Timeless() (documents, shadow []byte, err error) {
	config, err := c.Config()
	if err != nil {
		return nil, nil, err
	}
	timeless := func(text []byte, grants []segment.Grant) []byte {
		over := map[string]bool{}
		for i := range grants {
			if holds, _ := grants[i].Holds(c.Now); !holds {
				over[fmt.Sprintf("metadata: {name: %s}\nspec:\n", grants[i].Name)] = true
			}
		}
		text = windows.ReplaceAll(limits.ReplaceAll(text, nil), nil)
		parts := strings.SplitAfter(string(text), "---\n")
		for i, part := range parts {
			for name := range over {
				if strings.Contains(part, "kind: Grant\n") && strings.Contains(part, name) {
					parts[i] = strings.Replace(part, name, name+"  expires: '2001-01-01T00:00:00Z'\n", 1)
				}
			}
		}
		return []byte(strings.Join(parts, ""))
	}
	documents = timeless(c.Documents, config.Grants)
	if c.Shadow != nil {
		shadow = timeless(c.Shadow, config.Shadow)
	}
	return documents, shadow, nil
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
				row := decisiontable.Columns(cases[i].Lines[j].Request, Options().TrustDomain)
				for k, cell := range row {
					if n := utf8.RuneCountInString(cell); n <= widest {
						widths[k] = max(widths[k], n)
					}
				}
				rows = append(rows, append(row, decisiontable.Text(answer(&cases[i], &cases[i].Lines[j]))))
			}
		}
		var out strings.Builder
		decisions := &archive.Files[len(archive.Files)-1]
		for line := range strings.Lines(string(decisions.Data)) {
			if !decisiontable.IsRequest(line) {
				out.WriteString(line)
				continue
			}
			for k, w := range widths {
				out.WriteString(rows[0][k] + strings.Repeat(" ", max(0, w-utf8.RuneCountInString(rows[0][k]))+1))
			}
			out.WriteString("→ " + rows[0][4] + "\n")
			rows = rows[1:]
		}
		decisions.Data = []byte(out.String())
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

func read(file string, archive *txtar.Archive) ([]Case, error) {
	last := len(archive.Files) - 1
	if last < 1 || last > 2 || archive.Files[0].Name != "documents.yaml" || last == 2 && archive.Files[1].Name != "shadow.yaml" || archive.Files[last].Name != "decisions" {
		return nil, fmt.Errorf("%s: must have documents.yaml, perhaps shadow.yaml, and decisions, in this order", file)
	}
	name := strings.TrimSuffix(filepath.Base(file), ".txtar")
	fresh := Case{Name: name, Documents: archive.Files[0].Data, Now: time.Unix(1750000000, 0).UTC()}
	if last == 2 {
		fresh.Shadow = archive.Files[1].Data
	}
	n := strings.Count(string(archive.Comment), "\n") + 2 // the first line of the decisions
	for _, f := range archive.Files[:last] {
		n += strings.Count(string(f.Data), "\n") + 1
	}
	lines, problems := decisiontable.Parse(segment.Pos{File: file, Line: n}, string(archive.Files[last].Data), Options().TrustDomain)
	if problems != nil {
		return nil, problems
	}
	var cases []Case
	for _, line := range lines {
		if line.Wants == decisiontable.Verdict {
			return nil, fmt.Errorf("%s: must name the rule that decides", line.Pos)
		}
		c := fresh
		if !line.Now.IsZero() {
			c.Name, c.Now = name+"@"+line.Now.Format(time.RFC3339), line.Now
		}
		if len(cases) == 0 || cases[len(cases)-1].Name != c.Name {
			cases = append(cases, c)
		}
		newest := &cases[len(cases)-1]
		newest.Lines = append(newest.Lines, Line{Pos: line.Pos.String(), Request: line.Request, Want: line.Want})
	}
	return cases, nil
}
