package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

const (
	maxNames  = 10 // of one list that people read; JSON has all
	maxCauses = 5
)

func (out *comparison) print(w io.Writer, o *output, allowGains bool) error {
	switch o.format {
	case "markdown":
		_, err := io.WriteString(w, out.markdown())
		return err
	case "sarif":
		text, err := json.MarshalIndent(out.sarif(allowGains), "", "  ")
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		_, err = w.Write(append(text, '\n'))
		return err
	}
	return o.print(w, out, func() error { return out.write(w) })
}

func (out *comparison) summary() string {
	if out.Gains+out.Losses == 0 {
		return "nobody gains or loses access"
	}
	return fmt.Sprintf("%s, %s", plural(out.Gains, "gain", "gains"), plural(out.Losses, "loss", "losses"))
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// moments are the changes in the order of their moments; the zero time is now.
func (out *comparison) moments() []later {
	all := out.Later
	if len(out.Changes) > 0 {
		all = append([]later{{Changes: out.Changes}}, all...)
	}
	return all
}

func (out *comparison) write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "from %s to %s, at %s: %s\n", out.Old, out.New, out.At.Format(time.RFC3339), out.summary())
	for _, m := range out.moments() {
		if !m.At.IsZero() {
			fmt.Fprintf(&b, "\nfrom %s on:\n", m.At.UTC().Format(time.RFC3339))
		}
		callers := ""
		for _, ch := range m.Changes {
			if text := setText(ch.Callers, plain); text != callers {
				callers = text
				fmt.Fprintf(&b, "\n%s\n", callers)
			}
			fmt.Fprintf(&b, "  %s\n", changeText(&ch, plain))
			for i, why := range ch.Causes {
				if i == maxCauses {
					fmt.Fprintf(&b, "      and for %s\n", plural(len(ch.Causes)-i, "more reason", "more reasons"))
					break
				}
				fmt.Fprintf(&b, "      %s\n", out.causeText(&why, plain))
			}
		}
	}
	if len(out.Notes) > 0 {
		b.WriteByte('\n')
	}
	for _, note := range out.Notes {
		fmt.Fprintf(&b, "note: %s\n", note)
	}
	if out.Replay != nil {
		b.WriteByte('\n')
		out.Replay.write(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// changeText is a change without its callers.
func changeText(ch *authz.Change, name func(string) string) string {
	can := "- may no longer"
	switch {
	case ch.Budget && ch.Gain:
		can = "+ has another budget, or none, for"
	case ch.Budget:
		can = "- has a smaller budget for"
	case ch.Gain:
		can = "+ may now"
	}
	text := fmt.Sprintf("%s %s at %s", can, listed(ch.Operations, name), name(string(ch.Endpoint)))
	if slices.Contains(ch.Operations, segment.Enter) {
		return text
	}
	return text + ": " + setText(ch.Resources, name)
}

func setText(s authz.Set, name func(string) string) string {
	text := listed(s.Of, name)
	if len(s.Except) > 0 {
		text += ", except " + listed(s.Except, name)
	}
	if len(s.Already) > 0 {
		text += " (already: " + listed(s.Already, name) + ")"
	}
	return text
}

func listed[T ~string](names []T, name func(string) string) string {
	var text []string
	for i, n := range names {
		if i == maxNames {
			return strings.Join(text, ", ") + fmt.Sprintf(" and %d more", len(names)-i)
		}
		if n == "" {
			text = append(text, "requests for everything")
			continue
		}
		text = append(text, name(string(n)))
	}
	return strings.Join(text, ", ")
}

// causeText says which grants decide, with their places.
func (out *comparison) causeText(why *authz.Cause, name func(string) string) string {
	text := fmt.Sprintf("by %s%s, was %s%s", ruleText(why.Is, out.NewGrants, name), within(why.IsBudget, name),
		ruleText(why.Was, out.OldGrants, name), within(why.WasBudget, name))
	var of []string
	if why.Callers != nil {
		of = append(of, setText(*why.Callers, name))
	}
	if why.Resources != nil {
		of = append(of, setText(*why.Resources, name))
	}
	if of != nil {
		text += ", for " + strings.Join(of, " and ")
	}
	return text
}

func within(b segment.Budget, name func(string) string) string {
	if b.IsZero() {
		return ""
	}
	return " within " + name(b.String())
}

func ruleText(rule authz.Rule, places map[authz.Rule]segment.Pos, name func(string) string) string {
	text := name(string(rule))
	if at := places[rule].String(); at != "" {
		text += " (" + name(at) + ")"
	}
	return text
}

// markdown is a comment for a pull request.
func (out *comparison) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "### Access: %s\n", out.summary())
	for _, m := range out.moments() {
		if !m.At.IsZero() {
			fmt.Fprintf(&b, "\n**From %s on:**\n", m.At.UTC().Format(time.RFC3339))
		}
		b.WriteString("\n| | who | may | at | what | because |\n|---|---|---|---|---|---|\n")
		for i, ch := range m.Changes {
			if i == maxRows {
				fmt.Fprintf(&b, "\nand %d more\n", len(m.Changes)-i)
				break
			}
			can := "➖ no longer"
			switch {
			case ch.Budget && ch.Gain:
				can = "➕ another budget, or none"
			case ch.Budget:
				can = "➖ a smaller budget"
			case ch.Gain:
				can = "➕ now"
			}
			var because []string
			for i, why := range ch.Causes {
				if i == maxCauses {
					because = append(because, fmt.Sprintf("and %d more", len(ch.Causes)-i))
					break
				}
				because = append(because, out.causeText(&why, code))
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", can, setText(ch.Callers, code), listed(ch.Operations, code),
				code(string(ch.Endpoint)), cmp.Or(setText(ch.Resources, code), "–"), strings.Join(because, "<br>"))
		}
	}
	for i, note := range out.Notes {
		if i == 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "- Note: %s\n", escaped(note))
	}
	if r := out.Replay; r != nil {
		fmt.Fprintf(&b, "\nOf %s that were recorded, **%d** would be judged otherwise.\n", count(r.Flows, "flow"), r.Changed)
		if len(r.Different) > 0 {
			b.WriteString("\n| | flows | who | may | at | by | was |\n|---|---|---|---|---|---|---|\n")
		}
		for i, d := range r.Different {
			if i == examplesInText {
				fmt.Fprintf(&b, "\nand %d more\n", len(r.Different)-i)
				break
			}
			can := "➕ allowed"
			if d.WasAllowed {
				can = "➖ denied"
			}
			fmt.Fprintf(&b, "| %s | %d | %s | %s | %s | %s | %s |\n", can, d.Count, code(d.Caller), code(strings.TrimSpace(string(d.Operation)+" "+d.Resource)),
				code(string(d.Endpoint)), code(string(d.Is)), code(string(d.Was)))
		}
	}
	return b.String()
}

// maxRows keeps a comment below what GitHub takes.
const maxRows = 100

// code is a name in a table of GitHub's Markdown, whatever is in it.
func code(s string) string {
	if s == "" {
		return "–"
	}
	return "<code>" + escaped(s) + "</code>"
}

// escaped is text that Markdown and HTML leave alone: all that could mean something to them is a character reference.
func escaped(s string) string {
	var b strings.Builder
	for _, r := range plain(s) {
		if r == ' ' || r == '/' || r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "&#%d;", r)
		}
	}
	return b.String()
}

// The parts of SARIF 2.1.0 that we write (sections 3.13 to 3.54).
type (
	sarifLog struct {
		Schema  string     `json:"$schema"`
		Version string     `json:"version"`
		Runs    []sarifRun `json:"runs"`
	}
	sarifRun struct {
		Tool struct {
			Driver sarifDriver `json:"driver"`
		} `json:"tool"`
		ColumnKind string        `json:"columnKind"`
		Results    []sarifResult `json:"results"`
	}
	sarifDriver struct {
		Name    string      `json:"name"`
		Version string      `json:"version"`
		Rules   []sarifRule `json:"rules"`
	}
	sarifRule struct {
		ID               string    `json:"id"`
		ShortDescription sarifText `json:"shortDescription"`
	}
	sarifText struct {
		Text string `json:"text"`
	}
	sarifResult struct {
		RuleID              string            `json:"ruleId"`
		RuleIndex           int               `json:"ruleIndex"`
		Level               string            `json:"level"`
		Message             sarifText         `json:"message"`
		Locations           []sarifLocation   `json:"locations,omitempty"`
		PartialFingerprints map[string]string `json:"partialFingerprints"`
	}
	sarifLocation struct {
		PhysicalLocation struct {
			ArtifactLocation struct {
				URI string `json:"uri"`
			} `json:"artifactLocation"`
			Region *sarifRegion `json:"region,omitempty"`
		} `json:"physicalLocation"`
	}
	sarifRegion struct {
		StartLine   int `json:"startLine"`
		StartColumn int `json:"startColumn,omitempty"`
	}
)

var sarifRules = []sarifRule{
	{"access-gained", sarifText{"A grant gives callers access that they did not have."}},
	{"deny-lifted", sarifText{"Callers gain access because a Deny is gone or narrower."}},
	{"access-gained-later", sarifText{"Callers gain access at a later moment."}},
	{"budget-raised", sarifText{"Callers may use more of what they have access to."}},
}

// sarif has a result for each gain and each grant of NEW that is responsible for it.
func (out *comparison) sarif(allowGains bool) sarifLog {
	run := sarifRun{ColumnKind: "unicodeCodePoints", Results: []sarifResult{}}
	run.Tool.Driver = sarifDriver{"sallyport", version(), sarifRules}
	for _, m := range out.moments() {
		for _, ch := range m.Changes {
			if !ch.Gain {
				continue
			}
			for _, why := range ch.Causes {
				rule := 0
				switch {
				case !m.At.IsZero():
					rule = 2
				case ch.Budget:
					rule = 3
				case why.Was != authz.DefaultDeny:
					rule = 1
				}
				part := ch
				if why.Callers != nil {
					part.Callers = *why.Callers
				}
				if why.Resources != nil {
					part.Resources = *why.Resources
				}
				text := setText(part.Callers, plain) + strings.TrimPrefix(changeText(&part, plain), "+") +
					fmt.Sprintf(" (by %s%s, was %s%s)", why.Is, within(why.IsBudget, plain), ruleText(why.Was, out.OldGrants, plain), within(why.WasBudget, plain))
				if rule == 2 {
					text = "From " + m.At.UTC().Format(time.RFC3339) + " on, " + text
				}
				result := sarifResult{RuleID: sarifRules[rule].ID, RuleIndex: rule, Level: "error", Message: sarifText{text}}
				if allowGains {
					result.Level = "warning"
				}
				if pos, ok := out.NewGrants[why.Is]; ok && pos.File != "" {
					result.Locations = []sarifLocation{locationOf(pos)}
				}
				sum := sha256.Sum256(fmt.Appendf(nil, "%s %q %q %q %q %q", result.RuleID, part.Callers, part.Endpoint, part.Operations, part.Resources, why.Is))
				result.PartialFingerprints = map[string]string{"sallyport/v1": hex.EncodeToString(sum[:16])}
				run.Results = append(run.Results, result)
			}
		}
	}
	return sarifLog{"https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json", "2.1.0", []sarifRun{run}}
}

// locationOf is where a grant stands (section 3.29). Paths stay relative as they were given, which is relative to the
// repository for who runs it there.
func locationOf(pos segment.Pos) (l sarifLocation) {
	path := filepath.ToSlash(filepath.Clean(pos.File))
	u := url.URL{Path: path}
	if strings.HasPrefix(path, "/") {
		u.Scheme = "file"
	}
	l.PhysicalLocation.ArtifactLocation.URI = u.String()
	if pos.Line > 0 {
		l.PhysicalLocation.Region = &sarifRegion{pos.Line, pos.Column}
	}
	return l
}
