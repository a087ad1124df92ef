package main

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/authz/decisiontable"
	"sallyport.dev/segment"
)

func testCommand() *cobra.Command {
	var d deployment
	var o output
	var tables, at string
	cmd := &cobra.Command{
		Use:   "test DIR",
		Short: "Hold documents to your own decision tables",
		Long: `Test decides every request of your decision tables by the documents of a folder or a file, and shows those that are
decided otherwise than the table says, and why. Tables are files *.decisions, in the folder of the documents and its
immediate subfolders or where --tables says. A line is

  caller endpoint operation resource → verdict rule

as in "/rag-app chat Infer llama → allow grant/rag-asks"; leave the rule out if any will do. It asks nobody. Exit
status 1 if a line fails, if a table cannot be read or names what does not exist, and if there is none.`,
		Example: "  sallyport test documents/\n  sallyport test documents/ --tables tests/",
		Args:    oneDir,
		RunE: func(cmd *cobra.Command, args []string) error {
			now, err := momentOf(at)
			if err != nil {
				return err
			}
			cfg, err := d.assemble(args[0])
			if err != nil {
				return err
			}
			if tables == "" {
				tables = args[0]
			}
			options, err := d.options()
			if err != nil {
				return err
			}
			lines, err := readTables(tables, &cfg, options.TrustDomain)
			if err != nil {
				return err
			}
			result := decideLines(lines, &cfg, now)
			if o.format == "junit" {
				err = result.junit(cmd.OutOrStdout(), lines)
			} else {
				err = o.print(cmd.OutOrStdout(), result, func() error { return result.write(cmd.OutOrStdout(), options.TrustDomain) })
			}
			if err == nil && len(result.Failures) > 0 {
				err = errProblems
			}
			return err
		},
	}
	cmd.Flags().StringVar(&tables, "tables", "", "read decision tables from `DIR` or a file, not from beside the documents")
	cmd.Flags().StringVar(&at, "at", "", "the `TIME` (RFC 3339) of lines whose table does not say; empty: now")
	d.add(cmd.Flags())
	o.add(cmd, "text", "json", "junit")
	return cmd
}

const (
	maxTables     = 1000
	maxTableBytes = 4 << 20
)

// readTables reads all tables, whose lines must be about what the configuration has.
func readTables(path string, cfg *segment.Config, td spiffeid.TrustDomain) ([]decisiontable.Line, error) {
	files, err := tableFiles(path)
	if err != nil {
		return nil, failed("name the folder that holds *.decisions with --tables", "read decision tables: %w", err)
	}
	var lines []decisiontable.Line
	var problems segment.Problems
	for _, file := range files {
		text, err := readTable(file)
		if err != nil {
			problems = append(problems, segment.Problem{Code: "unreadable", Pos: segment.Pos{File: file}, Msg: "cannot be read: " + err.Error()})
			continue
		}
		of, wrong := decisiontable.Parse(segment.Pos{File: file, Line: 1}, text, td)
		if len(of)+len(wrong) == 0 {
			wrong = segment.Problems{{Code: "empty-table", Pos: segment.Pos{File: file}, Msg: "has no request", Hint: "write: caller endpoint operation resource → verdict rule"}}
		}
		for i := range of {
			wrong = append(wrong, strange(&of[i], cfg)...)
		}
		wrong.Sort()
		lines, problems = append(lines, of...), append(problems, wrong...)
	}
	switch {
	case problems != nil:
		return nil, problems
	case len(lines) == 0:
		return nil, &failure{exitProblems, fmt.Errorf("read decision tables: there are none in %s", path), "write NAME.decisions there, or name another folder with --tables"}
	}
	return lines, nil
}

// tableFiles are the tables of a folder and of its immediate subfolders, like documents; or one file by any name.
func tableFiles(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		if filepath.Ext(path) != ".decisions" { // a file with documents
			path = filepath.Dir(path)
		} else {
			return []string{path}, nil
		}
	}
	var files []string
	folders := []string{path}
	for i := 0; i < len(folders); i++ {
		found, err := os.ReadDir(folders[i])
		if err != nil {
			return nil, err
		}
		for _, entry := range found {
			name := filepath.Join(folders[i], entry.Name())
			switch {
			case strings.HasPrefix(entry.Name(), "."):
			case entry.IsDir() && i == 0:
				folders = append(folders, name)
			case !entry.IsDir() && filepath.Ext(name) == ".decisions":
				files = append(files, name)
			}
		}
	}
	if len(files) > maxTables {
		return nil, fmt.Errorf("there are more than %d in %s", maxTables, path)
	}
	slices.Sort(files)
	return files, nil
}

func readTable(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxTableBytes+1))
	if err == nil && len(text) > maxTableBytes {
		err = fmt.Errorf("it is larger than %d MiB", maxTableBytes>>20)
	}
	return string(text), err
}

// strange says what a line names that there is not. A request for it is denied whatever the grants say, so the line
// would test nothing.
func strange(l *decisiontable.Line, cfg *segment.Config) segment.Problems {
	problem := func(code, msg, hint string) segment.Problems {
		return segment.Problems{{Code: code, Pos: l.Pos, Msg: msg, Hint: hint}}
	}
	r := l.Request
	e := cfg.Endpoint(r.Endpoint)
	if e == nil {
		var names []string
		for i := range cfg.Endpoints {
			names = append(names, string(cfg.Endpoints[i].Name))
		}
		hint := "there is no endpoint at all"
		if names != nil {
			hint = "there are: " + listed(names, plain)
		}
		return problem("unknown-endpoint", fmt.Sprintf("there is no endpoint %q", r.Endpoint), hint)
	}
	operations := append(slices.Clone(e.Protocol.Operations()), segment.Discover, segment.Enter)
	switch {
	case l.Wants == decisiontable.Nothing:
		return problem("no-verdict", "says nothing behind the arrow", "write allow or deny, and the rule that decides")
	case !slices.Contains(operations, r.Operation):
		return problem("unknown-operation", fmt.Sprintf("endpoint %q speaks %s, which has no operation %q", r.Endpoint, e.Protocol, r.Operation), fmt.Sprintf("it has %v", operations))
	case r.Operation == segment.Enter && r.Resource != "":
		return problem("bad-line", "Enter has no resource", `write "" in its place`)
	}
	if _, err := spiffeid.FromString(r.Caller); err != nil {
		return problem("bad-spiffe-id", fmt.Sprintf("caller %q: %s", r.Caller, err), "write a SPIFFE ID, or its path in the trust domain")
	}
	return nil
}

// testResult is the answer of test.
type testResult struct {
	Lines    int           `json:"lines"`
	Failures []testFailure `json:"failures"`
}

type testFailure struct {
	Pos         segment.Pos       `json:"pos"`
	At          time.Time         `json:"at"`
	Want        string            `json:"want"`
	Got         string            `json:"got"`
	Explanation authz.Explanation `json:"explanation"`
}

func decideLines(lines []decisiontable.Line, cfg *segment.Config, now time.Time) testResult {
	result := testResult{Lines: len(lines), Failures: []testFailure{}}
	var policy *authz.Policy
	var of time.Time
	for i := range lines {
		l := &lines[i]
		at := cmp.Or(l.Now, now)
		if policy == nil || !at.Equal(of) {
			policy, of = authz.Recompile(policy, cfg, at), at
		}
		if got := authz.Decide(policy, l.Request); !l.Holds(got) {
			result.Failures = append(result.Failures, testFailure{l.Pos, at, l.Expected(), decisiontable.Text(got), authz.Explain(policy, cfg, l.Request, at)})
		}
	}
	return result
}

func (r *testResult) write(w io.Writer, td spiffeid.TrustDomain) error {
	for _, f := range r.Failures {
		fmt.Fprintf(w, "%s: %s\n  must be %s\n  and is  %s\n", f.Pos, strings.Join(decisiontable.Columns(f.Explanation.Request, td), " "), f.Want, f.Got)
		for _, reason := range f.why() {
			fmt.Fprintf(w, "    %s\n", reason)
		}
	}
	var err error
	if n := len(r.Failures); n > 0 {
		_, err = fmt.Fprintf(w, "FAIL: %d of %s\n", n, count(r.Lines, "decision"))
	} else {
		_, err = fmt.Fprintf(w, "ok: %s\n", count(r.Lines, "decision"))
	}
	return err
}

// why are the grants that decide, or else those that nearly do.
func (f *testFailure) why() []string {
	reasons, ex := []string{}, &f.Explanation
	all := ex.Deciding
	if len(all) == 0 {
		all = ex.Near
	}
	for i, reason := range all {
		if i == maxCauses {
			reasons = append(reasons, fmt.Sprintf("and %d more", len(all)-i))
			break
		}
		reasons = append(reasons, fmt.Sprintf("grant %s %s (%s)", reason.Grant, reason.Says, reason.Pos))
	}
	for _, note := range ex.Notes {
		reasons = append(reasons, "note: "+note)
	}
	return reasons
}

// junit writes what CI systems read: a suite for each table and a case for each line.
func (r *testResult) junit(w io.Writer, lines []decisiontable.Line) error {
	type failing struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
	type testcase struct {
		Name    string   `xml:"name,attr"`
		Class   string   `xml:"classname,attr"`
		File    string   `xml:"file,attr"`
		Line    int      `xml:"line,attr"`
		Failure *failing `xml:"failure"`
	}
	type suite struct {
		Name     string     `xml:"name,attr"`
		Tests    int        `xml:"tests,attr"`
		Failures int        `xml:"failures,attr"`
		Cases    []testcase `xml:"testcase"`
	}
	all := struct {
		XMLName  xml.Name `xml:"testsuites"`
		Tests    int      `xml:"tests,attr"`
		Failures int      `xml:"failures,attr"`
		Suites   []suite  `xml:"testsuite"`
	}{Tests: r.Lines, Failures: len(r.Failures)}
	left := r.Failures // in the order of the lines
	for i := range lines {
		l := &lines[i]
		if n := len(all.Suites); n == 0 || all.Suites[n-1].Name != l.Pos.File {
			all.Suites = append(all.Suites, suite{Name: l.Pos.File})
		}
		in := &all.Suites[len(all.Suites)-1]
		in.Tests++
		c := testcase{Name: fmt.Sprintf("%d: %s", l.Pos.Line, strings.Join(decisiontable.Columns(l.Request, spiffeid.TrustDomain{}), " ")),
			Class: l.Pos.File, File: l.Pos.File, Line: l.Pos.Line}
		if len(left) > 0 && left[0].Pos == l.Pos {
			in.Failures++
			c.Failure = &failing{"must be " + left[0].Want + ", is " + left[0].Got, strings.Join(left[0].why(), "\n")}
			left = left[1:]
		}
		in.Cases = append(in.Cases, c)
	}
	text, err := xml.MarshalIndent(all, "", "  ")
	if err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	_, err = fmt.Fprintf(w, "%s%s\n", xml.Header, text)
	return err
}
