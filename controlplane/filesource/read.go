// Package filesource reads documents from files, and again whenever these change.
//
// It is for the pipeline, which follows a folder with Source, and for commands that work offline, with Read. It
// takes *.yaml, *.yml and *.json of the folder itself and of its immediate subfolders, and a single file by any
// name. Names that begin with a dot are left alone: the swap files of editors, and the folders behind a mounted
// Kubernetes ConfigMap, whose files are symbolic links that are followed. It never leaves out what it cannot read:
// an unreadable file is an unreadable document, of which v1alpha1.Assemble makes no configuration. So is anything by
// any other name that it cannot look at, like a link that leads nowhere: it could be a subfolder of documents that
// deny. It never writes.
//
// A file is best changed by renaming a new one over it. One that is written in place is read when it has been
// quiet for a moment; should that be too soon, v1alpha1 refuses a text that is empty or ends within a line.
package filesource

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/segment"
)

const (
	maxFiles = 10_000
	maxBytes = 64 << 20 // of all files together
)

// Read returns the documents of a folder or of a file. What is wrong with them is in the documents.
func Read(path string) []v1alpha1.Document {
	var r reader
	r.read(path, func(string) {}, true)
	return slices.Concat(r.decode()...)
}

// Apart refuses two paths of which one is read with the other, or may be: the documents of a shadow folder among those
// that are enforced would be enforced as well. What is not there is taken as it is written.
func Apart(a, b string) error {
	real := [2]string{a, b}
	for i, path := range real {
		absolute, err := filepath.Abs(path)
		if err != nil {
			return err
		}
		real[i] = absolute
		if resolved, err := filepath.EvalSymlinks(absolute); err == nil {
			real[i] = resolved
		}
	}
	for i := range real {
		inside, err := filepath.Rel(real[i], real[1-i])
		if err == nil && inside != ".." && !strings.HasPrefix(inside, "../") {
			return fmt.Errorf("%s is in %s", [2]string{a, b}[1-i], [2]string{a, b}[i])
		}
	}
	return nil
}

// file is what was found at a path: a text, or why there is none.
type file struct {
	path string
	text string
	bad  segment.Problem // of code "", if there is a text
}

// reader reads files again and again. The zero value has read nothing yet.
type reader struct {
	files   []file           // of the last time
	texts   map[string]known // by path
	memo    v1alpha1.Memo
	scratch bytes.Buffer
}

// known is a text and what the file system said of the file before it was read.
type known struct {
	text  string
	stamp stamp
}

// stamp is another one whenever a file has been written or another takes its place: what is written changes ctime, which
// unlike mtime nobody can set. But its clock ticks every few milliseconds only, and a file that is written twice within a tick
// is not told from one that was written once. So a stamp counts only if it had been there for a while when the text was read
// (settledAfter): whatever is written later gets another tick.
type stamp struct {
	device, inode uint64
	size          int64
	changed       syscall.Timespec
}

// settledAfter is much longer than a tick of any file system that is not far away. For what those tell, all files are read
// every now and then whatever their stamps (see round).
const settledAfter = 2 * time.Second

// stampOf is the stamp of a regular file; the zero value is no stamp.
func stampOf(info fs.FileInfo) stamp {
	if s, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() {
		return stamp{s.Dev, s.Ino, s.Size, s.Ctim}
	}
	return stamp{}
}

func (s stamp) settled(now time.Time) bool {
	return s != stamp{} && time.Unix(s.changed.Unix()).Before(now.Add(-settledAfter))
}

func (r *reader) decode() [][]v1alpha1.Document {
	docs := make([][]v1alpha1.Document, 0, len(r.files))
	for _, f := range r.files {
		if f.bad.Code != "" {
			docs = append(docs, []v1alpha1.Document{v1alpha1.Unreadable(f.bad)})
			continue
		}
		docs = append(docs, r.memo.Decode(f.path, f.text))
	}
	r.memo.Forget()
	return docs
}

// read reads all files, sorts them by path, and reports whether they are other files than the last time. It calls watch with
// a folder before it looks into it, so that whoever watches it from then on misses nothing. Files whose stamp says that they
// are as they were are only read if it shall be all.
func (r *reader) read(path string, watch func(folder string), all bool) (changed bool) {
	last := r.files
	r.files = r.found(path, watch, all)
	return last == nil || !slices.Equal(last, r.files)
}

func (r *reader) found(path string, watch func(folder string), all bool) []file {
	watch(filepath.Dir(path))
	info, err := os.Stat(path)
	if err != nil {
		return []file{unreadable(path, err)}
	}
	if !info.IsDir() {
		return r.readFiles([]candidate{{path, info}}, all)
	}
	var paths []candidate
	names, err := entries(path, watch)
	if err != nil {
		return []file{unreadable(path, err)}
	}
	var bad []file
	for _, name := range names {
		name = filepath.Join(path, name)
		switch info, err := os.Stat(name); {
		case err == nil && info.IsDir():
			below, err := entries(name, watch)
			if err != nil {
				bad = append(bad, unreadable(name, err))
			}
			for _, n := range below {
				if isDocument(n) {
					paths = append(paths, candidate{filepath.Join(name, n), nil})
				}
			}
		case isDocument(name):
			paths = append(paths, candidate{name, info})
		case err != nil && !deleted(name):
			bad = append(bad, unreadable(name, err))
		}
	}
	files := append(r.readFiles(paths, all), bad...)
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.path, b.path) })
	return files
}

// candidate is a file to read, and what it looked like a moment ago; nil: nobody has looked.
type candidate struct {
	path string
	info fs.FileInfo
}

// entries returns the names in a folder, without hidden ones.
func entries(folder string, watch func(string)) ([]string, error) {
	watch(folder)
	found, err := os.ReadDir(folder)
	var names []string
	for _, e := range found {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// deleted reports whether a name is gone since its folder was read. A link that leads nowhere is still there.
func deleted(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func isDocument(name string) bool {
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

func (r *reader) readFiles(paths []candidate, all bool) []file {
	if len(paths) > maxFiles {
		return []file{{path: paths[maxFiles].path, bad: tooLarge(paths[maxFiles].path, fmt.Sprintf("is the file after the first %d", maxFiles))}}
	}
	files := make([]file, 0, len(paths))
	texts := make(map[string]known, len(paths))
	left := maxBytes
	for _, c := range paths {
		path := c.path
		it, err := r.readFile(c, all)
		if err != nil && len(paths) > 1 && deleted(path) {
			continue
		}
		if err != nil {
			files = append(files, unreadable(path, err))
			continue
		}
		if left -= len(it.text); left < 0 {
			return append(files, file{path: path, bad: tooLarge(path, fmt.Sprintf("makes all files together larger than %d MiB", maxBytes>>20))})
		}
		texts[path] = it
		files = append(files, file{path: path, text: it.text})
	}
	r.texts = texts
	return files
}

// readFile returns the text of a regular file, as much of it as Decode needs to see that it is too large. Anything
// else, like a pipe, it leaves without waiting. A text that is as it was is the same string.
func (r *reader) readFile(c candidate, all bool) (known, error) {
	last, ok := r.texts[c.path]
	if ok && !all && last.stamp != (stamp{}) {
		info := c.info
		if info == nil {
			info, _ = os.Stat(c.path)
		}
		if info != nil && stampOf(info) == last.stamp {
			return last, nil
		}
	}
	f, err := os.OpenFile(c.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return known{}, err
	}
	defer f.Close()
	now := time.Now()
	info, err := f.Stat()
	if err != nil {
		return known{}, err
	}
	if !info.Mode().IsRegular() {
		return known{}, errors.New("it is not a regular file")
	}
	r.scratch.Reset()
	r.scratch.Grow(int(min(info.Size(), v1alpha1.MaxBytes)) + bytes.MinRead)
	if _, err := r.scratch.ReadFrom(io.LimitReader(f, v1alpha1.MaxBytes+1)); err != nil {
		return known{}, err
	}
	it := known{text: last.text}
	if !ok || !bytes.Equal(r.scratch.Bytes(), []byte(last.text)) {
		it.text = r.scratch.String()
	}
	if s := stampOf(info); s.settled(now) {
		it.stamp = s
	}
	return it, nil
}

func tooLarge(path, msg string) segment.Problem {
	return segment.Problem{Code: "too-large", Pos: segment.Pos{File: path}, Msg: msg, Hint: "delete what is not needed"}
}

func unreadable(path string, err error) file {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err // the position names the path already
	}
	hint := "let sallyport read it"
	if errors.Is(err, fs.ErrNotExist) {
		hint = "make it, or name another with -f or --shadow"
	}
	return file{path: path, bad: segment.Problem{Code: "unreadable", Pos: segment.Pos{File: path}, Msg: "cannot be read: " + err.Error(), Hint: hint}}
}
