package v1alpha1

import (
	"cmp"
	"maps"
	"slices"

	"sallyport.dev/segment"
)

// Assembler is Assemble for one who does it again whenever a file changes. What it makes is the same; it is sooner made
// where nothing but grants has changed, because the grants of files that are the same slices as before are taken over. The
// zero value is ready. It is not for several goroutines at once.
type Assembler struct {
	files  [][]Document // of the last good configuration; nil: there is none
	config segment.Config
	known  *assembler // all that its grants were resolved with
}

// Assemble makes a configuration of the documents of all files, as Assemble does.
func (a *Assembler) Assemble(files [][]Document, o Options) (segment.Config, segment.Problems) {
	if a.files != nil && a.known.Options == o && a.edit(files) {
		a.files = files
		return a.config, nil
	}
	known := newAssembler(o)
	config, problems := known.assemble(slices.Concat(files...))
	if len(problems) == 0 {
		known.names, known.ids, known.hosts = nil, nil, nil // which no grant needs
		*a = Assembler{files, config, known}
	}
	return config, problems
}

// edit makes the configuration of other files out of the last one, if they differ in nothing but good grants.
func (a *Assembler) edit(files [][]Document) bool {
	gone, come := difference(a.files, files)
	before := make(map[any]*Document, len(gone)) // documents that may only have moved, by their Spec
	for _, d := range gone {
		before[d.Spec] = d
	}
	edited := make([]segment.Grant, 0, len(come))
	for _, d := range come {
		was := before[d.Spec]
		if was != nil && was.file == d.file {
			delete(before, d.Spec) // one that is there twice has moved once
		} else {
			was = nil
		}
		spec, ok := d.Spec.(*GrantSpec)
		switch {
		case !ok && was == nil, len(d.problems) > 0:
			return false
		case !ok: // where else it stands makes no difference
		case was != nil:
			i, _ := search(a.config.Grants, segment.GrantName(d.Metadata.Name))
			g := a.config.Grants[i]
			g.Pos = d.Pos("")
			edited = append(edited, g)
		case d.Metadata.Name == "" || !isLabel(d.Metadata.Name):
			return false
		default:
			edited = append(edited, a.known.grant(d, spec))
			if len(a.known.problems) > 0 {
				a.known.problems, a.known.searched = nil, 0
				return false
			}
		}
	}
	for _, d := range before {
		if _, ok := d.Spec.(*GrantSpec); !ok {
			return false
		}
	}
	return a.replace(gone, edited)
}

// replace puts edited grants in the place of those that are gone. A name that there are two of is somebody else's to report.
func (a *Assembler) replace(gone []*Document, edited []segment.Grant) bool {
	if len(gone)+len(edited) == 0 {
		return true
	}
	changes := make(map[segment.GrantName]*segment.Grant, len(gone)+len(edited)) // nil: only gone
	for _, d := range gone {
		if _, ok := d.Spec.(*GrantSpec); ok {
			changes[segment.GrantName(d.Metadata.Name)] = nil
		}
	}
	for i := range edited {
		g := &edited[i]
		if it, ok := changes[g.Name]; it != nil {
			return false
		} else if _, there := search(a.config.Grants, g.Name); there && !ok {
			return false
		}
		changes[g.Name] = g
	}
	var grants []segment.Grant
	if n := len(a.config.Grants) + len(edited) - len(gone); n > 0 {
		grants = make([]segment.Grant, 0, n)
	}
	rest := a.config.Grants
	for _, name := range slices.Sorted(maps.Keys(changes)) {
		i, there := search(rest, name)
		grants = append(grants, rest[:i]...)
		if g := changes[name]; g != nil {
			grants = append(grants, *g)
		}
		if there {
			i++
		}
		rest = rest[i:]
	}
	a.config.Grants = append(grants, rest...)
	return true
}

// search returns where the grant of this name is, or would be.
func search(grants []segment.Grant, name segment.GrantName) (int, bool) {
	return slices.BinarySearchFunc(grants, name, func(g segment.Grant, name segment.GrantName) int { return cmp.Compare(g.Name, name) })
}

// difference returns the documents that are only in the one or only in the other, or stand elsewhere there. It may return
// more: a document that is in both.
func difference(last, files [][]Document) (gone, come []*Document) {
	type slice struct {
		first *Document
		n     int
	}
	same := make(map[slice]bool, len(last)) // files that are the same slices
	for _, docs := range last {
		if len(docs) > 0 {
			same[slice{&docs[0], len(docs)}] = false
		}
	}
	changed := map[string][]Document{} // by file
	for _, docs := range files {
		if len(docs) == 0 {
			continue
		}
		it := slice{&docs[0], len(docs)}
		if twice, ok := same[it]; ok && !twice {
			same[it] = true
			continue
		}
		if changed[docs[0].file] == nil {
			changed[docs[0].file] = docs
		} else {
			come = appendAll(come, docs)
		}
	}
	for _, docs := range last {
		if len(docs) == 0 || same[slice{&docs[0], len(docs)}] {
			continue
		}
		edited := changed[docs[0].file]
		delete(changed, docs[0].file)
		for len(docs) > 0 && len(edited) > 0 && docs[0].stands(&edited[0]) {
			docs, edited = docs[1:], edited[1:]
		}
		for len(docs) > 0 && len(edited) > 0 && docs[len(docs)-1].stands(&edited[len(edited)-1]) {
			docs, edited = docs[:len(docs)-1], edited[:len(edited)-1]
		}
		gone, come = appendAll(gone, docs), appendAll(come, edited)
	}
	for _, docs := range changed {
		come = appendAll(come, docs)
	}
	return gone, come
}

func appendAll(to []*Document, docs []Document) []*Document {
	for i := range docs {
		to = append(to, &docs[i])
	}
	return to
}

// stands reports whether both are the same document, at the same place.
func (d *Document) stands(other *Document) bool {
	return d.Spec != nil && d.Spec == other.Spec && d.file == other.file && d.above == other.above
}
