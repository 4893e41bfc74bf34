package main

import (
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
)

// An ignorer decides by .gitignore and .raiignore what is left out. Rules are as
// gitignore(5) has them: the last rule that fits wins, those of a deeper folder before
// those above, and nothing comes back below a folder that is left out. In one folder
// .raiignore comes after .gitignore, so it can take back ("!data.bin") what git need
// not keep but the job needs. Rules above the packed folder, git's exclude file and a
// person's global rules do not count: the folder alone decides, on every machine alike.
type ignorer struct {
	root    string
	rules   map[string][]rule // by folder, "." for the root
	skipped int
	first   string
}

// A rule is one line of an ignore file.
type rule struct {
	re      *regexp.Regexp // over the path below the file's folder
	negate  bool
	dirOnly bool
}

func newIgnorer(root string) *ignorer {
	return &ignorer{root: root, rules: map[string][]rule{}}
}

// skip reports whether rel, a path below the root with slashes, is left out.
func (g *ignorer) skip(rel string, dir bool) bool {
	for folder := path.Dir(rel); ; folder = path.Dir(folder) {
		below := rel
		if folder != "." {
			below = strings.TrimPrefix(rel, folder+"/")
		}
		if hit, skip := match(g.in(folder), below, dir); hit {
			if skip {
				if g.skipped++; g.skipped == 1 {
					g.first = rel
				}
			}
			return skip
		}
		if folder == "." {
			return false
		}
	}
}

func match(rules []rule, below string, dir bool) (hit, skip bool) {
	for i := len(rules) - 1; i >= 0; i-- {
		if r := rules[i]; (dir || !r.dirOnly) && r.re.MatchString(below) {
			return true, !r.negate
		}
	}
	return false, false
}

// in returns the rules of one folder.
func (g *ignorer) in(folder string) []rule {
	rules, ok := g.rules[folder]
	if !ok {
		for _, n := range []string{".gitignore", ".raiignore"} {
			rules = append(rules, readRules(filepath.Join(g.root, filepath.FromSlash(folder), n))...)
		}
		g.rules[folder] = rules
	}
	return rules
}

// readRules reads an ignore file. One that is not there, or is a link (git does not
// follow those either), has no rules.
func readRules(file string) []rule {
	if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil
	}
	return parseRules(string(text))
}

func parseRules(text string) []rule {
	var rules []rule
	for line := range strings.Lines(strings.TrimPrefix(text, "\ufeff")) {
		if r, ok := parseRule(strings.TrimRight(line, "\r\n")); ok {
			rules = append(rules, r)
		}
	}
	return rules
}

// parseRule reads one line, gitignore(5), "PATTERN FORMAT".
func parseRule(line string) (rule, bool) {
	for strings.HasSuffix(line, " ") && !strings.HasSuffix(line, `\ `) {
		line = line[:len(line)-1]
	}
	if line == "" || line[0] == '#' {
		return rule{}, false
	}
	var r rule
	if line, r.negate = strings.CutPrefix(line, "!"); line == "" {
		return rule{}, false
	}
	line, r.dirOnly = strings.CutSuffix(line, "/")
	anchored := strings.Contains(line, "/")
	line = strings.TrimPrefix(line, "/")
	if line == "" {
		return rule{}, false
	}
	expr := glob(line)
	if !anchored {
		expr = "(?:.*/)?" + expr
	}
	re, err := regexp.Compile("(?s)^" + expr + "$")
	r.re = re
	return r, err == nil
}

// glob turns a pattern into a regular expression.
func glob(p string) string {
	var b strings.Builder
	for i := 0; i < len(p); {
		rest := p[i:]
		atStart := i == 0 || p[i-1] == '/'
		switch {
		case atStart && strings.HasPrefix(rest, "**/"):
			b.WriteString("(?:.*/)?")
			i += 3
		case atStart && rest == "**":
			b.WriteString(".+")
			i += 2
		case rest[0] == '*':
			b.WriteString("[^/]*")
			i++
		case rest[0] == '?':
			b.WriteString("[^/]")
			i++
		case rest[0] == '[':
			expr, n := class(rest)
			b.WriteString(expr)
			i += n
		case rest[0] == '\\' && len(rest) > 1:
			b.WriteString(regexp.QuoteMeta(rest[1:2]))
			i += 2
		default:
			b.WriteString(regexp.QuoteMeta(rest[:1]))
			i++
		}
	}
	return b.String()
}

// class reads a bracket expression at the start of p and returns how long it is. One
// that never ends matches nothing, as in git.
func class(p string) (string, int) {
	i, expr := 1, "["
	if i < len(p) && (p[i] == '!' || p[i] == '^') {
		expr += "^/"
		i++
	}
	for first := true; i < len(p); first = false {
		switch c := p[i]; {
		case c == ']' && !first:
			return expr + "]", i + 1
		case c == '[' && strings.HasPrefix(p[i:], "[:") && strings.Contains(p[i:], ":]"):
			n := strings.Index(p[i:], ":]") + 2
			expr += p[i : i+n]
			i += n
			continue
		case c == '\\' && i+1 < len(p):
			i++
			expr += regexp.QuoteMeta(p[i : i+1])
		case c == '-':
			expr += "-"
		default:
			expr += regexp.QuoteMeta(p[i : i+1])
		}
		i++
	}
	return `[^\s\S]`, len(p)
}
