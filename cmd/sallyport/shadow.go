package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/controlplane/filesource"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
)

func shadowCommand() *cobra.Command {
	var state, grant, caller, endpoint string
	var o output
	since := age(24 * time.Hour)
	cmd := &cobra.Command{
		Use:   "shadow",
		Short: "Show what the grants in shadow would have changed",
		Long: `Shadow shows which requests would have been answered otherwise if the grants in shadow mode, or the shadow folder,
had been in force: who asked for what, how often, and which grant is responsible on both sides. They decide together,
so a difference is one of all of them. Exit status 1 if there is a difference, or if nothing was judged in shadow,
which shows nothing.`,
		Example: `  sallyport shadow --since 24h
  sallyport shadow --grant no-payroll
  sallyport shadow promote no-payroll -f documents/`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := tried(cmd, state, url.Values{"since": {since.since()}, "grant": {grant}, "caller": {caller}, "endpoint": {endpoint}})
			if err != nil {
				return err
			}
			if err := o.print(cmd.OutOrStdout(), s, func() error { return writeShadow(cmd.OutOrStdout(), s, grant) }); err != nil {
				return err
			}
			if s.Different > 0 || s.Requests == 0 {
				return errProblems
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.Var(&since, "since", "how far back, as in 12h or 7d")
	flags.StringVar(&grant, "grant", "", "only what has to do with the grant `NAME`")
	flags.StringVar(&caller, "caller", "", "only requests of this SPIFFE `ID`, or of all that begin with what stands before a *")
	flags.StringVar(&endpoint, "endpoint", "", "only requests to the endpoint `NAME`")
	stateFlag(flags, &state)
	o.add(cmd, "text", "json", "yaml")
	cmd.AddCommand(promoteCommand())
	return cmd
}

func tried(cmd *cobra.Command, state string, q url.Values) (operator.Shadow, error) {
	return ask(cmd, state, func(c *operator.Client) (s operator.Shadow, err error) {
		return s, c.Get(cmd.Context(), "/shadow", q, &s)
	})
}

func writeShadow(w io.Writer, s operator.Shadow, grant string) error {
	about := ""
	if grant != "" {
		about = " of what concerns grant " + grant
	}
	writeRecords(w, "", s.Records)
	if s.Requests == 0 {
		fmt.Fprintf(w, "Nothing%s was judged in shadow since %s: that shows nothing.\n", about, stamp(s.Since))
		switch {
		case s.Folder:
			fmt.Fprintf(w, "A shadow folder is in place, with %s.\n", count(len(s.Grants), "grant"))
		case len(s.Grants) == 0:
			fmt.Fprintln(w, "No grant is in shadow mode now.")
		default:
			fmt.Fprintf(w, "In shadow mode now: %s.\n", few(s.Grants))
		}
		return nil
	}
	fmt.Fprintf(w, "%s judged in shadow since %s%s; %d would have been answered otherwise.\n",
		requests(s.Requests), stamp(s.Since), about, s.Different)
	if len(s.Differences) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WOULD BE\tCALLER\tENDPOINT\tOPERATION\tRESOURCE\tREQUESTS\tFIRST\tLAST\tNOW BY\tTHEN BY\tEXAMPLE")
	for _, d := range s.Differences {
		example := ""
		if n := len(d.Examples); n > 0 {
			example = "request " + shown(d.Examples[n-1].ID)
			if id := d.Examples[n-1].TraceID; id != "" {
				example = "trace " + string(id[:min(16, len(id))])
			}
		}
		caller := "-"
		if !d.Caller.IsZero() {
			caller = d.Caller.String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", d.Shadow, caller, shown(string(d.Endpoint)), shown(string(d.Operation)),
			shown(d.Resource), d.Count, stamp(d.First), stamp(d.Last), shown(d.Rule), shown(d.ShadowBy), example)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if s.MoreRequests > 0 {
		fmt.Fprintf(w, "and %s more, of at least %d kinds\n", requests(s.MoreRequests), s.More)
	}
	return nil
}

func few(names []segment.GrantName) string {
	texts := make([]string, 0, 5)
	for _, n := range names[:min(5, len(names))] {
		texts = append(texts, string(n))
	}
	if more := len(names) - len(texts); more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(texts, ", "), more)
	}
	return strings.Join(texts, ", ")
}

// promotion is the flags of `shadow promote`.
type promotion struct {
	deployment
	state, into, from string
	all, write, force bool
	since             age
}

func promoteCommand() *cobra.Command {
	p := promotion{since: age(24 * time.Hour)}
	cmd := &cobra.Command{
		Use:   "promote GRANT -f DIR",
		Short: "Put a grant in force that was tried in shadow",
		Long: `Promote changes the mode of a grant's document from Shadow to Enforce, and not another byte. With --all it puts all
documents of a shadow folder over those of the same kind and name. It first shows what shadow says would change then,
and the difference to the files. Only with --write does it write, each file in one step; and not if nothing was judged
in shadow, unless --force says that this is wanted.`,
		Example: `  sallyport shadow promote no-payroll -f documents/
  sallyport shadow promote no-payroll -f documents/ --write
  sallyport shadow promote --all --from draft/ -f documents/ --write`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case p.all && len(args) > 0:
				return usage("leave the name out, or --all", "--all and a grant do not go together")
			case p.all != (p.from != ""):
				return usage("`sallyport shadow promote --all --from SHADOWDIR -f DIR`", "--all and --from go together")
			case !p.all && len(args) != 1:
				return usage("`sallyport shadow promote GRANT -f DIR`", "promote takes one grant, not %d", len(args))
			case p.into == "":
				return usage("name the folder of the documents", "-f is missing")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			grant := strings.Join(args, "")
			var edits []edit
			var notes []string
			var err error
			if p.all {
				edits, notes, err = p.folder()
			} else {
				edits, err = p.single(grant)
			}
			if err != nil {
				return err
			}
			return p.apply(cmd, grant, edits, notes)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&p.into, "file", "f", "", "`DIR` of the documents in force")
	flags.BoolVar(&p.all, "all", false, "all documents of a shadow folder")
	flags.StringVar(&p.from, "from", "", "`DIR` of the shadow folder")
	flags.BoolVar(&p.write, "write", false, "change the files")
	flags.BoolVar(&p.force, "force", false, "also if nothing was judged in shadow")
	flags.Var(&p.since, "since", "how far back to look for what would change, as in 12h or 7d")
	stateFlag(flags, &p.state)
	p.add(flags)
	return cmd
}

// edit is a file and what it shall be. Old is empty for a file that is not there.
type edit struct {
	path, old, text string
	says            string
}

func (p *promotion) apply(cmd *cobra.Command, grant string, edits []edit, notes []string) error {
	out := cmd.OutOrStdout()
	for _, note := range notes {
		fmt.Fprintln(out, note)
	}
	if len(edits) == 0 {
		_, err := fmt.Fprintln(out, "Nothing is different.")
		return err
	}
	s, err := tried(cmd, p.state, url.Values{"since": {p.since.since()}, "grant": {grant}})
	switch {
	case err == nil:
		if err := writeShadow(out, s, grant); err != nil {
			return err
		}
		switch {
		case p.all && !s.Folder:
			fmt.Fprintln(out, "No shadow folder is in place: this is what grants in shadow mode would have changed.")
			s.Requests = 0
		case !p.all && len(s.Grants) > 1:
			fmt.Fprintf(out, "Judged together, and promoted alone: in shadow are %s.\n", few(s.Grants))
		}
	case !p.write || p.force:
		fmt.Fprintf(cmd.ErrOrStderr(), "sallyport: warning: nobody can say what would change: %v\n", err)
	default:
		return failed("ask where the control plane runs, or give --force", "nobody can say what would change: %w", err)
	}
	for _, e := range edits {
		_, changes, _ := bytes.Cut(diff.Diff(e.path, []byte(e.old), e.path, []byte(e.text)), []byte("\n")) // without the line "diff"
		fmt.Fprintf(out, "%s\n%s", e.says, changes)
	}
	if !p.write {
		_, err := fmt.Fprintln(out, "Nothing is written without --write.")
		return err
	}
	if s.Requests == 0 && !p.force {
		return &failure{exitProblems, errors.New("nothing was judged in shadow, so nobody knows what this would change"),
			"wait for requests, look further back with --since, or give --force"}
	}
	for _, e := range edits {
		if err := e.write(); err != nil {
			return failed("what was written before this file stays", "%w", err)
		}
		fmt.Fprintf(out, "wrote %s\n", e.path)
	}
	return nil
}

// single finds the one document of a grant, and changes its mode.
func (p *promotion) single(grant string) ([]edit, error) {
	docs, err := sound(p.into)
	if err != nil {
		return nil, err
	}
	var found *v1alpha1.Document
	var shadows []segment.GrantName
	for i := range docs {
		spec, ok := docs[i].Spec.(*v1alpha1.GrantSpec)
		if !ok {
			continue
		}
		if spec.Mode == segment.Shadow {
			shadows = append(shadows, segment.GrantName(docs[i].Metadata.Name))
		}
		if docs[i].Metadata.Name != grant {
			continue
		}
		if found != nil {
			return nil, &failure{exitProblems, fmt.Errorf("grant %s is written twice: %s and %s", grant, found.Pos(""), docs[i].Pos("")), "delete one of them"}
		}
		found = &docs[i]
	}
	switch {
	case found == nil && len(shadows) == 0:
		return nil, &failure{exitProblems, fmt.Errorf("there is no grant %s in %s", grant, p.into), "no grant there is in shadow mode"}
	case found == nil:
		return nil, &failure{exitProblems, fmt.Errorf("there is no grant %s in %s", grant, p.into), "in shadow mode there: " + few(shadows)}
	case found.Spec.(*v1alpha1.GrantSpec).Mode != segment.Shadow:
		return nil, &failure{exitProblems, fmt.Errorf("grant %s is not in shadow mode: %s", grant, found.Pos("spec.mode")), "it is in force as it is"}
	}
	path := found.Pos("").File
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("promote grant: %w", err)
	}
	changed, err := enforced(path, string(text), grant)
	if err != nil {
		return nil, &failure{exitProblems, err, "write mode: Enforce there yourself"}
	}
	return []edit{{path, string(text), changed, fmt.Sprintf("grant %s in %s:", grant, path)}}, nil
}

// enforced changes the mode of one grant of a text, and nothing else of it.
func enforced(file, text, grant string) (string, error) {
	want := v1alpha1.Decode(file, []byte(text))
	at := slices.IndexFunc(want, func(d v1alpha1.Document) bool { return d.Kind == v1alpha1.KindGrant && d.Metadata.Name == grant })
	if at < 0 {
		return "", fmt.Errorf("%s: grant %s is gone", file, grant)
	}
	pos := want[at].Pos("spec.mode")
	offset := offsetOf(text, pos)
	rest := text[offset:]
	for _, quote := range []string{"", `"`, "'"} {
		if mode := quote + string(segment.Shadow) + quote; strings.HasPrefix(rest, mode) {
			changed := text[:offset] + quote + string(segment.Enforce) + quote + rest[len(mode):]
			spec := *want[at].Spec.(*v1alpha1.GrantSpec)
			spec.Mode, want[at].Spec = segment.Enforce, &spec
			if same(want, v1alpha1.Decode(file, []byte(changed))) { // whatever stands there, this is what it now says
				return changed, nil
			}
		}
	}
	return "", fmt.Errorf("%s: the mode is not written here in a way that can be changed alone", pos)
}

// offsetOf is where a position is in a text, whose columns count characters; the end, if it is nowhere.
func offsetOf(text string, pos segment.Pos) int {
	offset := 0
	for range pos.Line - 1 {
		i := strings.IndexByte(text[offset:], '\n')
		if i < 0 {
			return len(text)
		}
		offset += i + 1
	}
	column := 1
	for i := range text[offset:] {
		if column == pos.Column {
			return offset + i
		}
		column++
	}
	return len(text)
}

// same reports whether documents say the same, without a problem, in the same order.
func same(a, b []v1alpha1.Document) bool {
	return slices.EqualFunc(a, b, func(a, b v1alpha1.Document) bool { return equal(&a, &b) && len(a.Problems()) == 0 })
}

func equal(a, b *v1alpha1.Document) bool {
	return len(b.Problems()) == 0 && a.APIVersion == b.APIVersion && a.Kind == b.Kind &&
		reflect.DeepEqual(a.Metadata, b.Metadata) && reflect.DeepEqual(a.Spec, b.Spec)
}

// sound reads documents, and refuses them all if one cannot be read.
func sound(path string) ([]v1alpha1.Document, error) {
	docs := filesource.Read(path)
	var problems segment.Problems
	for i := range docs {
		problems = append(problems, docs[i].Problems()...)
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return docs, nil
}

// named is what makes two documents the same one.
type named struct {
	kind v1alpha1.Kind
	name string
}

func nameOf(d *v1alpha1.Document) named { return named{d.Kind, d.Metadata.Name} }

func (n named) String() string { return string(n.kind) + " " + n.name }

// folder puts the documents of the shadow folder over those of the same kind and name. A file of new documents only is
// added by its own name.
func (p *promotion) folder() (edits []edit, notes []string, err error) {
	options, err := p.options()
	if err != nil {
		return nil, nil, err
	}
	tried, err := sound(p.from)
	if err != nil {
		return nil, nil, err
	}
	now, err := sound(p.into)
	if err != nil {
		return nil, nil, err
	}
	texts := map[string]*edit{} // by path
	read := func(path string) (*edit, error) {
		if texts[path] == nil {
			text, err := os.ReadFile(path)
			if err != nil {
				return nil, fmt.Errorf("promote documents: %w", err)
			}
			texts[path] = &edit{path: path, old: string(text), text: string(text)}
		}
		return texts[path], nil
	}
	where := map[named]*v1alpha1.Document{}
	for i := range now {
		if where[nameOf(&now[i])] != nil {
			return nil, nil, twice(where[nameOf(&now[i])], &now[i])
		}
		where[nameOf(&now[i])] = &now[i]
		if _, err := read(now[i].Pos("").File); err != nil {
			return nil, nil, err
		}
	}
	byFile := map[string][]*v1alpha1.Document{}
	drafts := map[named]*v1alpha1.Document{}
	for i := range tried {
		if drafts[nameOf(&tried[i])] != nil {
			return nil, nil, twice(drafts[nameOf(&tried[i])], &tried[i])
		}
		drafts[nameOf(&tried[i])] = &tried[i]
		byFile[tried[i].Pos("").File] = append(byFile[tried[i].Pos("").File], &tried[i])
	}
	var refused []error
	refuse := func(d *v1alpha1.Document, why string) {
		refused = append(refused, fmt.Errorf("%s: %s %s", d.Pos(""), nameOf(d), why))
	}
	for _, file := range slices.Sorted(maps.Keys(byFile)) {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, nil, fmt.Errorf("promote documents: %w", err)
		}
		var fresh []*v1alpha1.Document
		for _, d := range byFile[file] {
			old := where[nameOf(d)]
			switch {
			case old == nil:
				fresh = append(fresh, d)
				continue
			case equal(old, d):
				continue
			}
			into, err := read(old.Pos("").File)
			if err != nil {
				return nil, nil, err
			}
			if into.text, err = replaced(into.text, string(text), nameOf(d), into.path, file); err != nil {
				refuse(d, err.Error())
				continue
			}
			into.says += fmt.Sprintf("%s of %s, from %s:\n", nameOf(d), into.path, file)
		}
		path := p.into
		if info, err := os.Stat(p.from); err == nil && info.IsDir() {
			below, err := filepath.Rel(p.from, file)
			if err != nil {
				return nil, nil, fmt.Errorf("promote documents: %w", err)
			}
			path = filepath.Join(p.into, below)
		}
		switch _, err := os.Lstat(path); {
		case len(fresh) == 0:
		case len(fresh) == len(byFile[file]) && errors.Is(err, fs.ErrNotExist):
			texts[path] = &edit{path: path, text: string(text), says: fmt.Sprintf("a new file %s, from %s:\n", path, file)}
		default:
			for _, d := range fresh {
				refuse(d, "is not in "+p.into+", and its file cannot be added as a whole")
			}
		}
	}
	if len(refused) > 0 {
		return nil, nil, &failure{exitProblems, fmt.Errorf("some documents have no place: %w", errors.Join(refused...)),
			"write them into a file of their own, or put them there yourself"}
	}
	var after []v1alpha1.Document
	for _, path := range slices.Sorted(maps.Keys(texts)) {
		e := texts[path]
		after = append(after, v1alpha1.Decode(path, []byte(e.text))...)
		if e.text != e.old {
			e.says = strings.TrimSuffix(e.says, "\n")
			edits = append(edits, *e)
		}
	}
	// What is written must be what was read, and make a whole.
	for i := range after {
		want := cmp.Or(drafts[nameOf(&after[i])], where[nameOf(&after[i])])
		if want == nil || !equal(want, &after[i]) {
			return nil, nil, failed("put it there yourself, and please report it", "%s: %s would not be as it was tried", after[i].Pos(""), nameOf(&after[i]))
		}
	}
	if _, problems := v1alpha1.Assemble(after, options); len(problems) > 0 {
		return nil, nil, problems
	}
	for i := range now {
		if d := &now[i]; d.Kind == v1alpha1.KindGrant && drafts[nameOf(d)] == nil {
			notes = append(notes, fmt.Sprintf("%s stays (%s): it is not in %s, so what was tried was without it", nameOf(d), d.Pos(""), p.from))
		}
	}
	return edits, notes, nil
}

func twice(a, b *v1alpha1.Document) error {
	return &failure{exitProblems, fmt.Errorf("%s is written twice: %s and %s", nameOf(a), a.Pos(""), b.Pos("")), "delete one of them"}
}

// replaced puts a document of one YAML stream in the place of the one of the same name in another. The marker line
// before it stays; comments that stand with it come from where it comes from.
func replaced(into, from string, name named, path, source string) (string, error) {
	if (filepath.Ext(path) == ".json") != (filepath.Ext(source) == ".json") {
		return "", fmt.Errorf("is JSON in one of %s and %s", path, source)
	}
	targets, sources := stream(into), stream(from)
	i, j := place(targets, name), place(sources, name)
	if i < 0 || j < 0 {
		return "", fmt.Errorf("cannot be told from what stands beside it in %s", path)
	}
	marker, _ := unmarked(targets[i])
	_, body := unmarked(sources[j])
	if !strings.HasSuffix(body, "\n") {
		body += "\n"
	}
	targets[i] = marker + body
	return strings.Join(targets, ""), nil
}

// stream cuts a YAML stream before each document marker (YAML 1.2.2, section 9.1.2), as v1alpha1 does.
func stream(text string) (parts []string) {
	begin := 0
	for line := 0; line < len(text); {
		end := len(text)
		if i := strings.IndexByte(text[line:], '\n'); i >= 0 {
			end = line + i + 1
		}
		if line > begin && isMarker(text[line:end]) {
			parts = append(parts, text[begin:line])
			begin = line
		}
		line = end
	}
	return append(parts, text[begin:])
}

func isMarker(line string) bool {
	rest, ok := strings.CutPrefix(line, "---")
	return ok && (rest == "" || strings.ContainsRune(" \t\r\n", rune(rest[0])))
}

// unmarked parts a document from the marker line above it, if nothing of the document stands there.
func unmarked(part string) (marker, body string) {
	line, rest, _ := strings.Cut(part, "\n")
	if behind := strings.TrimSpace(strings.TrimPrefix(line, "---")); isMarker(line) && (behind == "" || behind[0] == '#') {
		return line + "\n", rest
	}
	return "", part
}

// place finds the one part that is nothing but the document.
func place(parts []string, name named) int {
	return slices.IndexFunc(parts, func(part string) bool {
		docs := v1alpha1.Decode("", []byte(part))
		return len(docs) == 1 && nameOf(&docs[0]) == name
	})
}

// write puts the new text in the file's place in one step, if the file still is what it was.
func (e edit) write() (err error) {
	path := e.path
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // the link stays one
	}
	mode, owner := fs.FileMode(0o644), (*syscall.Stat_t)(nil)
	switch now, err := os.ReadFile(path); {
	case errors.Is(err, fs.ErrNotExist) && e.old == "":
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // documents hold no secrets, and the control plane may be another user
			return fmt.Errorf("write %s: %w", e.path, err)
		}
	case err != nil:
		return fmt.Errorf("write %s: %w", e.path, err)
	case !bytes.Equal(now, []byte(e.old)):
		return fmt.Errorf("write %s: it has changed meanwhile", e.path)
	default:
		info, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("write %s: %w", e.path, err)
		}
		mode = info.Mode().Perm()
		owner, _ = info.Sys().(*syscall.Stat_t)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".sallyport-*") // a name that is no document's
	if err != nil {
		return fmt.Errorf("write %s: %w", e.path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", e.path, err), os.Remove(f.Name()))
		}
	}()
	_, err = f.WriteString(e.text)
	err = errors.Join(err, f.Chmod(mode))
	if owner != nil && err == nil { // or whoever could read it no longer can
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
