package envoy

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"sigs.k8s.io/yaml"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/test/corpus"
)

var update = flag.Bool("update", false, "write what is rendered into the golden files")

// Each file of testdata/golden is some documents and parts of what they become, each under the path that it has in
// the rendered resources: "clusters[name=endpoint/chat/one].transport_socket". Where the name of the file is
// that of a form, rights are lowered in this form although they are few.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/golden/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no golden files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			cfg, problems := v1alpha1.Assemble(v1alpha1.Decode(file, archive.Files[0].Data), corpus.Options())
			if problems != nil {
				t.Fatal(problems)
			}
			form := strings.TrimSuffix(filepath.Base(file), ".txtar")
			if forms[form] == (limits{}) {
				form = "written out"
			}
			_, r := lowered(&cfg, time.Unix(0, 0), form)
			if err := Check(r); err != nil {
				t.Fatal(err)
			}
			rendered, err := Render(r)
			if err != nil {
				t.Fatal(err)
			}
			var all any
			if err := json.Unmarshal(rendered, &all); err != nil {
				t.Fatal(err)
			}
			for i := range archive.Files[1:] {
				part := &archive.Files[i+1]
				found, err := pick(all, part.Name)
				if err != nil {
					t.Fatalf("%s: %v", part.Name, err)
				}
				got, err := yaml.Marshal(found)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(part.Data), string(got)); diff != "" && !*update {
					t.Errorf("%s (-want +got):\n%s", part.Name, diff)
				}
				part.Data = got
			}
			text := txtar.Format(archive)
			if n := strings.Count(string(text), "\n"); n > 150 {
				t.Errorf("%d lines: nobody reads that", n)
			}
			if *update {
				if err := os.WriteFile(file, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

var stepOf = regexp.MustCompile(`^\.?([a-z0-9_]+|\[[^\]]+\])`)

// pick follows a path: a field, "[3]", "[field=value]" or "[key]" of a map.
func pick(v any, path string) (any, error) {
	for path != "" {
		m := stepOf.FindStringSubmatch(path)
		if m == nil {
			return nil, fmt.Errorf("read path at %s", path)
		}
		path = path[len(m[0]):]
		key := strings.Trim(m[1], "[]")
		switch at := v.(type) {
		case map[string]any:
			v = at[key]
		case []any:
			i, err := strconv.Atoi(key)
			if err != nil {
				field, value, _ := strings.Cut(key, "=")
				i = slices.IndexFunc(at, func(item any) bool { o, ok := item.(map[string]any); return ok && o[field] == value })
			}
			if i < 0 || i >= len(at) {
				return nil, fmt.Errorf("there is no [%s]", key)
			}
			v = at[i]
		}
		if v == nil {
			return nil, fmt.Errorf("there is no %s", m[1])
		}
	}
	return v, nil
}
