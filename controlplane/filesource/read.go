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
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/segment"
)

const (
	maxFiles = 10_000
	maxBytes = 64 << 20 // of all files together
)

// Read returns the documents of a folder or of a file. What is wrong with them is in the documents.
func Read(path string) []v1alpha1.Document {
	return decode(new(v1alpha1.Memo), read(path, func(string) {}))
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

func decode(memo *v1alpha1.Memo, files []file) []v1alpha1.Document {
	var docs []v1alpha1.Document
	for _, f := range files {
		if f.bad.Code != "" {
			docs = append(docs, v1alpha1.Unreadable(f.bad))
			continue
		}
		docs = append(docs, memo.Decode(f.path, f.text)...)
	}
	memo.Forget()
	return docs
}

// read returns all files, sorted by path. It calls watch with a folder before it looks into it, so that whoever
// watches it from then on misses nothing.
func read(path string, watch func(folder string)) []file {
	watch(filepath.Dir(path))
	info, err := os.Stat(path)
	if err != nil {
		return []file{unreadable(path, err)}
	}
	if !info.IsDir() {
		return readFiles([]string{path})
	}
	var paths []string
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
					paths = append(paths, filepath.Join(name, n))
				}
			}
		case isDocument(name):
			paths = append(paths, name)
		case err != nil && !deleted(name):
			bad = append(bad, unreadable(name, err))
		}
	}
	files := append(readFiles(paths), bad...)
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.path, b.path) })
	return files
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

func readFiles(paths []string) []file {
	if len(paths) > maxFiles {
		return []file{{path: paths[maxFiles], bad: tooLarge(paths[maxFiles], fmt.Sprintf("is the file after the first %d", maxFiles))}}
	}
	files := make([]file, 0, len(paths))
	left := maxBytes
	for _, path := range paths {
		text, err := readFile(path)
		if err != nil && len(paths) > 1 && deleted(path) {
			continue
		}
		if err != nil {
			files = append(files, unreadable(path, err))
			continue
		}
		if left -= len(text); left < 0 {
			return append(files, file{path: path, bad: tooLarge(path, fmt.Sprintf("makes all files together larger than %d MiB", maxBytes>>20))})
		}
		files = append(files, file{path: path, text: text})
	}
	return files
}

// readFile returns the text of a regular file, as much of it as Decode needs to see that it is too large. Anything
// else, like a pipe, it leaves without waiting.
func readFile(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", errors.New("it is not a regular file")
	}
	var text strings.Builder
	text.Grow(int(min(info.Size(), v1alpha1.MaxBytes) + 1))
	_, err = io.Copy(&text, io.LimitReader(f, v1alpha1.MaxBytes+1))
	return text.String(), err
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
