// Package test holds what needs more than one package.
package test

import (
	_ "embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

const module = "sallyport.dev/"

//go:embed arrows.txt
var arrows string

// TestArrows reads the source files itself and does not ask the go command, so that it sees all operating systems at
// once, and so that go test knows which files its cached result depends on.
func TestArrows(t *testing.T) {
	for _, violation := range violations(os.DirFS(".."), arrows) {
		t.Error(violation)
	}
}

// arrow is a line of arrows.txt.
type arrow struct {
	level   int
	kind    string
	imports map[string]bool // true: it is marked
	all     bool
}

// violations returns what is wrong with the packages of a module by the list of its arrows, or with the list.
func violations(tree fs.FS, list string) []string {
	packages, err := parse(tree)
	if err != nil {
		return []string{err.Error()}
	}
	all, wrong := read(list)
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, name := range slices.Sorted(maps.Keys(packages)) {
		from, ok := all[name]
		if !ok {
			complain("%s: no line in test/arrows.txt", name)
			continue
		}
		ours, uses := imports(packages[name])
		for _, imported := range ours {
			to, listed := all[imported]
			mark, allowed := from.imports[imported]
			switch {
			case !listed: // has been complained of, or does not compile
			case to.kind == "test":
				complain("%s: imports %s, which is for tests", name, imported)
			case from.all:
			case !allowed:
				complain("%s: imports %s, which test/arrows.txt does not let it", name, imported)
			case to.level > from.level:
				complain("%s: imports %s, which is of a higher level", name, imported)
			case (from.kind == "pure" || from.kind == "live") && to.kind != "pure":
				complain("%s: is %s and imports %s, which is not pure", name, from.kind, imported)
			case mark != (from.kind == "edge" && to.kind == "edge"):
				complain("%s: %s must have the mark ! if both are edges, and only then", name, imported)
			}
		}
		for _, listed := range slices.Sorted(maps.Keys(from.imports)) {
			if !slices.Contains(ours, listed) {
				complain("%s: may import %s in test/arrows.txt, and does not", name, listed)
			}
		}
		for _, use := range uses {
			if forbidden(from.kind, use) {
				complain("%s: is %s and uses %s", name, from.kind, use)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if packages[name] == nil {
			complain("%s: is in test/arrows.txt and has no Go files", name)
		}
	}
	return wrong
}

// read reads the list.
func read(list string) (all map[string]arrow, wrong []string) {
	all = map[string]arrow{}
	for i, line := range strings.Split(list, "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		columns := strings.Split(line, "|")
		head := strings.Fields(columns[0])
		if len(columns) != 3 || len(head) != 3 || strings.TrimSpace(columns[2]) == "" {
			wrong = append(wrong, fmt.Sprintf("arrows.txt:%d: is not: level kind package | imports | reason", i+1))
			continue
		}
		level, err := strconv.Atoi(head[0])
		if err != nil || !slices.Contains([]string{"pure", "live", "edge", "main", "test"}, head[1]) {
			wrong = append(wrong, fmt.Sprintf("arrows.txt:%d: no such level or kind", i+1))
		}
		a := arrow{level: level, kind: head[1], imports: map[string]bool{}}
		for _, name := range strings.Fields(columns[1]) {
			switch name {
			case "*":
				a.all = true
			case "-":
			default:
				bare, mark := strings.CutSuffix(name, "!")
				a.imports[bare] = mark
			}
		}
		all[head[2]] = a
	}
	return all, wrong
}

// parse returns the files of every package but those of tests, by the package's name in the module.
func parse(tree fs.FS) (map[string][]*ast.File, error) {
	packages := map[string][]*ast.File{}
	err := fs.WalkDir(tree, ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, err := fs.Stat(tree, path.Join(file, "go.mod"))
			if file != "." && (err == nil || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".")) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		text, err := fs.ReadFile(tree, file)
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, text, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		packages[path.Dir(file)] = append(packages[path.Dir(file)], parsed)
		return nil
	})
	return packages, err
}

// imports returns which packages of the module the files import, and what they use of others, as path.Name; a goroutine
// that is started is "go".
func imports(files []*ast.File) (ours, uses []string) {
	for _, file := range files {
		paths := map[string]string{} // by the name in this file
		for _, spec := range file.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value) // the parser has seen that it is quoted
			if name, ok := strings.CutPrefix(imported, module); ok {
				ours = append(ours, name)
			}
			name := path.Base(strings.TrimSuffix(imported, "/v2")) // math/rand/v2
			if spec.Name != nil {
				name = spec.Name.Name
			}
			paths[name] = imported
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				uses = append(uses, "go")
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && paths[x.Name] != "" {
					uses = append(uses, paths[x.Name]+"."+n.Sel.Name)
				}
			}
			return true
		})
	}
	slices.Sort(ours)
	slices.Sort(uses)
	return slices.Compact(ours), slices.Compact(uses)
}

// inputOutput is what neither pure nor live packages use: whole packages and single names.
var inputOutput = []string{
	"database/sql", "golang.org/x/sys/unix", "google.golang.org/grpc", "net", "net/http", "os", "os/exec", "os/signal",
	"os/user", "path/filepath", "plugin", "syscall", "unsafe",
}

// impure is what pure packages do not use either: they give the same answer to the same question, at once, and tell
// nobody. crypto/rand is missing here because a signature takes randomness, and is as good with any.
var impure = []string{
	"context", "log", "log/slog", "math/rand", "math/rand/v2", "runtime", "runtime/debug", "sync", "sync/atomic", "go",
	"time.After", "time.AfterFunc", "time.NewTicker", "time.NewTimer", "time.Now", "time.Since", "time.Sleep", "time.Tick",
	"time.Until",
}

// exempt is what only works on text, in the packages above.
var exempt = []string{"net.SplitHostPort", "net.JoinHostPort"}

func forbidden(kind, use string) bool {
	in := func(list []string) bool {
		owner := use[:max(strings.LastIndex(use, "."), 0)]
		return !slices.Contains(exempt, use) && (slices.Contains(list, use) || slices.Contains(list, owner))
	}
	switch kind {
	case "pure":
		return in(inputOutput) || in(impure)
	case "live":
		return in(inputOutput)
	}
	return false
}

func TestViolationsAreFound(t *testing.T) {
	for _, c := range []struct{ name, list, code, want string }{
		{"no line", "", "a/a.go: package a", "a: no line in test/arrows.txt"},
		{"no package", "0 pure a | - | why", "", "a: is in test/arrows.txt and has no Go files"},
		{"no reason", "0 pure a | - |", "", "arrows.txt:1: is not: level kind package | imports | reason"},
		{"no kind", "0 odd a | - | why", "a/a.go: package a", "arrows.txt:1: no such level or kind"},
		{"good", "0 pure a | - | why\n1 edge b | a | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`", ""},
		{"not allowed", "0 pure a | - | why\n1 edge b | - | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`",
			"b: imports a, which test/arrows.txt does not let it"},
		{"not needed", "0 pure a | - | why\n1 edge b | a | why", "a/a.go: package a\nb/b.go: package b",
			"b: may import a in test/arrows.txt, and does not"},
		{"upwards", "2 pure a | - | why\n1 edge b | a | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`", "b: imports a, which is of a higher level"},
		{"for tests", "0 test a | - | why\n1 main b | * | why",
			"a/a.go: package a\nb/b.go: package main; import _ `sallyport.dev/a`", "b: imports a, which is for tests"},
		{"in a test", "0 test a | - | why\n1 main b | * | why",
			"a/a.go: package a\nb/b.go: package main\nb/b_test.go: package main; import _ `sallyport.dev/a`", ""},
		{"pure to edge", "0 edge a | - | why\n1 pure b | a | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`", "b: is pure and imports a, which is not pure"},
		{"live to live", "0 live a | - | why\n1 live b | a | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`", "b: is live and imports a, which is not pure"},
		{"edge to edge", "0 edge a | - | why\n1 edge b | a | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`",
			"b: a must have the mark ! if both are edges, and only then"},
		{"marked", "0 edge a | - | why\n1 edge b | a! | why",
			"a/a.go: package a\nb/b.go: package b; import _ `sallyport.dev/a`", ""},
		{"clock", "0 pure a | - | why", "a/a.go: package a; import t `time`; var x = t.Now", "a: is pure and uses time.Now"},
		{"clock of one that is live", "0 live a | - | why", "a/a.go: package a; import `time`; var x = time.Now", ""},
		{"file", "0 live a | - | why", "a/a.go: package a; import `os`; var x = os.Open", "a: is live and uses os.Open"},
		{"socket", "0 pure a | - | why", "a/a.go: package a; import `net`; var x = net.Dial", "a: is pure and uses net.Dial"},
		{"text", "0 pure a | - | why", "a/a.go: package a; import `net`; var x = net.SplitHostPort", ""},
		{"goroutine", "0 pure a | - | why", "a/a.go: package a; func f() { go f() }", "a: is pure and uses go"},
		{"chance", "0 pure a | - | why", "a/a.go: package a; import `math/rand/v2`; var x = rand.N(1)",
			"a: is pure and uses math/rand/v2.N"},
		{"other systems", "0 pure a | - | why", "a/a_plan9.go: package a; import `os`; var x = os.Open",
			"a: is pure and uses os.Open"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tree := fstest.MapFS{".": {Mode: fs.ModeDir}}
			for file := range strings.Lines(c.code) {
				name, text, _ := strings.Cut(file, ": ")
				tree[name] = &fstest.MapFile{Data: []byte(text)}
			}
			if got := strings.Join(violations(tree, c.list), "\n"); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
