// Package decisiontable reads decision tables: lines of requests, and for each of them what must be decided and by
// which rule.
//
// It is for `sallyport test`, which holds users' documents to tables of their own, and for our own corpus. It decides
// nothing, and reads no file: text is a parameter. A line is
//
//	caller endpoint operation resource → verdict
//	caller endpoint operation resource → verdict rule
//	caller endpoint operation resource → verdict rule, shadow verdict rule
//
// where verdict is "allow" or "deny", and "->" may stand for the arrow. Without a rule any will do, and whatever the
// shadow says; with a rule, the shadow's answer is left out if it is the same. A caller that begins with "/" is in the
// trust domain. What has blanks in it, or is empty, is written in quotes, as in Go. "now: TIME" (RFC 3339) sets the
// clock for the lines below it; "#" begins a comment, on a line of its own.
package decisiontable

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// Line is one request and what must be decided about it.
type Line struct {
	Pos     segment.Pos
	Now     time.Time // when it is asked; zero: the table does not say
	Request authz.Request
	Want    authz.Decision
	// Wants says how much of Want is meant.
	Wants Wants
}

// Wants is how much a line says about the decision.
type Wants int

const (
	Nothing    Wants = iota // not even a verdict: one that is yet to be written
	Verdict                 // whether it is allowed
	Everything              // by which rule, and what the shadow says, too
)

// Holds reports whether a decision is what the line wants.
func (l *Line) Holds(d authz.Decision) bool {
	switch l.Wants {
	case Verdict:
		return d.Allowed == l.Want.Allowed
	case Everything:
		d.Budget = l.Want.Budget // which goes with the rule
		return d == l.Want
	}
	return false
}

// Expected is what the line wants, as tables write it.
func (l *Line) Expected() string {
	if l.Wants == Verdict {
		return verdict(l.Want.Allowed)
	}
	return Text(l.Want)
}

// Text writes a decision as tables do.
func Text(d authz.Decision) string {
	text := verdict(d.Allowed) + " " + string(d.Rule)
	if d.ShadowAllowed != d.Allowed || d.ShadowRule != d.Rule {
		text += ", shadow " + verdict(d.ShadowAllowed) + " " + string(d.ShadowRule)
	}
	return text
}

func verdict(allowed bool) string {
	if allowed {
		return "allow"
	}
	return "deny"
}

// Parse reads a table, whose first line stands at pos. All that is wrong with it is reported at once.
func Parse(pos segment.Pos, text string, td spiffeid.TrustDomain) ([]Line, segment.Problems) {
	var lines []Line
	var problems segment.Problems
	var now time.Time
	wrong := func(code string, err error, hint string) {
		problems = append(problems, segment.Problem{Code: code, Pos: pos, Msg: err.Error(), Hint: hint})
	}
	for line := range strings.Lines(text) {
		if at, ok := strings.CutPrefix(strings.TrimSpace(line), "now:"); ok {
			var err error
			if now, err = time.Parse(time.RFC3339, strings.TrimSpace(at)); err != nil {
				wrong("bad-time", fmt.Errorf("now: %q is no time", strings.TrimSpace(at)), "write it as 2026-01-02T15:04:05Z")
			}
		} else if IsRequest(line) {
			if l, err := parse(line, td); err != nil {
				wrong("bad-line", err, "write: caller endpoint operation resource → verdict rule")
			} else {
				l.Pos, l.Now = pos, now
				lines = append(lines, l)
			}
		}
		pos.Line++
	}
	return lines, problems
}

// IsRequest reports whether a line of a table is one with a request.
func IsRequest(line string) bool {
	line = strings.TrimSpace(line)
	return line != "" && line[0] != '#' && !strings.HasPrefix(line, "now:")
}

func parse(text string, td spiffeid.TrustDomain) (Line, error) {
	fields, err := split(text)
	if err != nil {
		return Line{}, err
	}
	if len(fields) < 5 || fields[4] != "→" && fields[4] != "->" {
		return Line{}, fmt.Errorf("a request has a caller, an endpoint, an operation and a resource, and then an arrow")
	}
	if strings.HasPrefix(fields[0], "/") {
		fields[0] = td.IDString() + fields[0]
	}
	line := Line{Request: authz.Request{
		Caller: fields[0], Endpoint: segment.EndpointName(fields[1]),
		Operation: segment.Operation(fields[2]), Resource: fields[3],
	}}
	want := fields[5:]
	verdicts := []int{0}
	switch {
	case len(want) == 0:
		return line, nil
	case len(want) == 1:
		line.Wants = Verdict
	case len(want) == 2:
		line.Wants = Everything
		line.Want.Rule, line.Want.ShadowRule = authz.Rule(want[1]), authz.Rule(want[1])
	case len(want) == 5 && want[2] == "shadow":
		line.Wants, verdicts = Everything, []int{0, 3}
		line.Want.Rule, line.Want.ShadowRule = authz.Rule(strings.TrimSuffix(want[1], ",")), authz.Rule(want[4])
	default:
		return Line{}, fmt.Errorf("must have a verdict and a rule, and perhaps those of the shadow, and not %q", want)
	}
	for _, i := range verdicts {
		if want[i] != "allow" && want[i] != "deny" {
			return Line{}, fmt.Errorf("%q is no verdict: it must be allow or deny", want[i])
		}
	}
	line.Want.Allowed = want[0] == "allow"
	line.Want.ShadowAllowed = want[verdicts[len(verdicts)-1]] == "allow"
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
			plain, err := strconv.Unquote(quoted)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", text, err)
			}
			fields, text = append(fields, plain), text[len(quoted):]
			continue
		}
		end := strings.IndexAny(text, " \t")
		if end < 0 {
			end = len(text)
		}
		fields, text = append(fields, text[:end]), text[end:]
	}
	return fields, nil
}

// Columns are the request's four columns of a line. A caller in the trust domain is its path.
func Columns(r authz.Request, td spiffeid.TrustDomain) []string {
	caller := r.Caller
	if path, ok := strings.CutPrefix(caller, td.IDString()+"/"); ok {
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
