package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/rai-project/raid/"

// A rule says what the packages below a folder may import of ours. Package p is meant
// by "p", p and all below it by "p/...". The longest folder that fits counts.
var importLaw = []struct {
	under string
	may   []string
}{
	{"cmd", []string{"..."}},
	{"keys", []string{"keys/..."}}, // and nothing else of ours: who someone is depends on no service
	{"keys/dial", []string{"keys/..."}},
	{"runner", []string{"runner/...", "keys/..."}}, // never sshd
	{"runner/job", []string{"runner/job/..."}},     // the contract imports neither side
	{"sshd", []string{"sshd/...", "keys/...", "runner/job/..."}},
	{"contrib", nil},
}

// owners are the packages that a third-party library stands behind.
var owners = map[string][]string{
	"github.com/gliderlabs/ssh":           {"sshd/door"},
	"github.com/docker/docker":            {"runner/box/docker"},
	"github.com/containerd/errdefs":       {"runner/box/docker"}, // the errors of docker/docker
	"github.com/redis/go-redis":           {"sshd/stream", "sshd/store"},
	"modernc.org/sqlite":                  {"sshd/store"},
	"github.com/minio/minio-go":           {"sshd/blob"},
	"github.com/goccy/go-yaml":            {"runner/job", "keys/profile"},
	"github.com/pelletier/go-toml":        {"cmd/raid"},
	"github.com/charmbracelet/log":        {"cmd/raid", "sshd"},
	"github.com/charmbracelet/bubbletea":  {"sshd"},
	"github.com/spf13/cobra":              {"cmd/raid", "cmd/rai", "cmd/rai-keygen", "cmd/rai-crypto", "cmd/internal/cli"},
	"github.com/spf13/pflag":              {"sshd"},
	"github.com/anmitsu/go-shlex":         {"sshd"},
	"github.com/google/uuid":              {"cmd/raid"},
	"github.com/klauspost/compress":       {"runner/job/tree", "sshd/stream", "cmd/rai"},
	"github.com/sabhiram/go-gitignore":    {"cmd/rai"},
	"filippo.io/age":                      {"keys/secret"},
	"github.com/prometheus/client_golang": {"sshd/web"},
}

// anywhere are the modules of the Go project itself.
const anywhere = "golang.org/x/"

// topLevel is what may stand in the first folder, and nothing else.
var topLevel = []string{"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "cmd", "contrib", "go.mod", "go.sum", "keys", "runner", "sshd"}

// built are what the Makefile leaves there.
var built = []string{"bin"}

// TestImports holds the law: who may import whom, and which library stands behind
// which package. Tests may import what they like.
func TestImports(t *testing.T) {
	for file, f := range parseAll(t) {
		pkg := path.Dir(file)
		for _, spec := range f.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if why := forbidden(pkg, name); why != "" {
				t.Errorf("%s imports %s: %s", file, name, why)
			}
		}
	}
}

func TestForbidden(t *testing.T) {
	for _, tt := range []struct {
		pkg, name string
		bad       bool
	}{
		{"runner", module + "sshd", true},
		{"runner/box/bwrap", module + "sshd/queue", true},
		{"runner", module + "keys/dial", false},
		{"sshd", module + "runner", true},
		{"sshd", module + "runner/box", true},
		{"sshd/stream", module + "runner/job/spool", false},
		{"keys", module + "runner/job", true},
		{"runner/job", module + "keys", true},
		{"runner/job/spool", module + "runner/job", false},
		{"cmd/raid", module + "sshd", false},
		{"sshd", "github.com/pelletier/go-toml/v2", true},
		{"cmd/raid", "github.com/pelletier/go-toml/v2", false},
		{"runner", "github.com/charmbracelet/log", true},
		{"runner/job", "golang.org/x/sys/unix", false},
		{"runner/job", "net/http", false},
		{"sshd", "example.com/new", true},
	} {
		if why := forbidden(tt.pkg, tt.name); (why != "") != tt.bad {
			t.Errorf("forbidden(%q, %q) = %q, want bad = %v", tt.pkg, tt.name, why, tt.bad)
		}
	}
}

// forbidden says why pkg may not import name, or "".
func forbidden(pkg, name string) string {
	if ours, ok := strings.CutPrefix(name, module); ok {
		return forbiddenOfOurs(pkg, ours)
	}
	if first, _, _ := strings.Cut(name, "/"); !strings.Contains(first, ".") || strings.HasPrefix(name, anywhere) {
		return ""
	}
	for lib, pkgs := range owners {
		if name != lib && !strings.HasPrefix(name, lib+"/") {
			continue
		}
		if slices.Contains(pkgs, pkg) {
			return ""
		}
		return "it stands behind " + strings.Join(pkgs, ", ")
	}
	return "no package was agreed for it"
}

func forbiddenOfOurs(pkg, ours string) string {
	rule, may := "", []string(nil)
	for _, r := range importLaw {
		if below(pkg, r.under) && len(r.under) > len(rule) {
			rule, may = r.under, r.may
		}
	}
	for _, m := range may {
		if dir, ok := strings.CutSuffix(m, "..."); m == ours || ok && below(ours, strings.TrimSuffix(dir, "/")) {
			return ""
		}
	}
	return "of ours, " + rule + " may import only " + strings.Join(may, ", ")
}

func below(pkg, dir string) bool { return dir == "" || pkg == dir || strings.HasPrefix(pkg, dir+"/") }

// TestPackageDocs wants a manual for every package, once.
func TestPackageDocs(t *testing.T) {
	docs := map[string][]string{}
	for file, f := range parseAll(t) {
		dir := path.Dir(file)
		if docs[dir] == nil {
			docs[dir] = []string{}
		}
		if f.Doc != nil && !strings.HasPrefix(f.Doc.Text(), "go:build") {
			docs[dir] = append(docs[dir], file)
		}
	}
	for dir, files := range docs {
		if len(files) != 1 {
			t.Errorf("package %s has its doc in %q, want it once", dir, files)
		}
	}
}

// TestNoInit forbids init functions: what importing does would depend on order.
func TestNoInit(t *testing.T) {
	for file, f := range parseAll(t) {
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s has an init function", file)
			}
		}
	}
}

// TestTopLevel holds the first folder to what was agreed, and contrib free of Go.
func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(repoRoot())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if n := e.Name(); !strings.HasPrefix(n, ".") && !slices.Contains(topLevel, n) && !slices.Contains(built, n) {
			t.Errorf("%s does not belong at the top", n)
		}
	}
	err = filepath.WalkDir(filepath.Join(repoRoot(), "contrib"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, ".go") {
			t.Errorf("%s: contrib holds no Go", p)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// parseAll parses every file of Go that is no test, by its path from the root.
func parseAll(t *testing.T) map[string]*ast.File {
	t.Helper()
	all := map[string]*ast.File{}
	fset := token.NewFileSet()
	for _, top := range []string{"cmd", "keys", "runner", "sshd", "contrib"} {
		err := filepath.WalkDir(filepath.Join(repoRoot(), top), func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(repoRoot(), p)
			if err != nil {
				return err
			}
			if d.IsDir() && (d.Name() == "testdata" || isTestPackage(rel)) {
				return fs.SkipDir
			}
			if d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
				return nil
			}
			all[filepath.ToSlash(rel)], err = parser.ParseFile(fset, p, nil, parser.ParseComments|parser.SkipObjectResolution)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < 50 {
		t.Fatalf("found only %d files", len(all))
	}
	return all
}

// isTestPackage reports whether a folder holds a suite for tests of others.
func isTestPackage(rel string) bool { return strings.HasSuffix(rel, "test") }
