package docker

import (
	"bytes"
	"cmp"
	"fmt"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

// A dockerfile is a Dockerfile as this package understood it: one instruction a line,
// without comments, continued lines and variables in FROM. That, and never the text it
// came from, is what the engine gets, so that the two cannot read it differently.
type dockerfile struct {
	lines  []instruction
	images []string // that it begins with or copies from, each once
	notes  []string // what is odd but does no harm
}

// An instruction is one line.
type instruction struct {
	text string
	base string // the image that it names, "" for none: a stage may have the same name
	ours bool   // a label of ours: nobody wants to read it
}

// A dockerScan is a Dockerfile that is being read.
type dockerScan struct {
	dockerfile
	args   map[string]string // of the ARG lines before the first FROM
	stages []string          // their names in lower case, "" for one without
	line   int
	base   string // of the instruction that is being read
}

// maxInstructions bounds a Dockerfile; the engine has 127 layers at most.
const maxInstructions = 500

// readDockerfile reads a Dockerfile. It takes what the classic builder takes, but for
// what would have the engine itself reach out: FROM and COPY --from name images only in
// full, and ADD fetches nothing. The error is a [*box.RefusedError] for that and a
// [*box.BuildError] for what no builder takes. labels go behind every FROM.
func readDockerfile(text []byte, labels string) (*dockerfile, error) {
	s := &dockerScan{args: map[string]string{}}
	lines := strings.Split(string(bytes.TrimPrefix(text, []byte("\ufeff"))), "\n")
	if err := s.directives(lines); err != nil {
		return nil, err
	}
	for at := 0; at < len(lines); {
		var whole string
		s.line = at + 1
		whole, at = logicalLine(lines, at)
		if whole == "" {
			continue
		}
		if err := s.add(whole, labels); err != nil {
			return nil, err
		}
	}
	if len(s.stages) == 0 {
		return nil, s.bad("there is no FROM")
	}
	return &s.dockerfile, nil
}

var directive = regexp.MustCompile(`^\s*#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.+?)\s*$`)

// directives looks at the comments on top that mean something.
func (s *dockerScan) directives(lines []string) error {
	for i, line := range lines {
		m := directive.FindStringSubmatch(line)
		if m == nil {
			return nil
		}
		s.line = i + 1
		switch strings.ToLower(m[1]) {
		case "escape":
			if m[2] != `\` {
				return s.refuse(`escape can only be \ here`)
			}
		case "syntax": // would be a program from the network
			s.notes = append(s.notes, "# syntax= has no effect here: images are built by the engine's classic builder")
		}
	}
	return nil
}

// logicalLine joins the lines that belong together as the engine does, and returns where
// the next begins. Comments and empty lines are "".
func logicalLine(lines []string, at int) (whole string, next int) {
	for first := true; at < len(lines); first = false {
		line := strings.TrimSuffix(lines[at], "\r")
		at++
		if trimmed := strings.TrimSpace(line); trimmed == "" || trimmed[0] == '#' {
			if first {
				return "", at
			}
			continue
		}
		if first {
			line = strings.TrimLeftFunc(line, unicode.IsSpace)
		}
		rest := strings.TrimRight(line, " \t")
		if !strings.HasSuffix(rest, `\`) {
			return strings.TrimSpace(whole + line), at
		}
		whole += rest[:len(rest)-1]
	}
	return strings.TrimSpace(whole), at
}

// add takes one instruction.
func (s *dockerScan) add(whole, labels string) error {
	if i := strings.IndexFunc(whole, func(r rune) bool { return r != '\t' && unicode.IsControl(r) || r == unicode.ReplacementChar }); i >= 0 {
		return s.bad("there is a control character, or no UTF-8, in it")
	}
	if strings.HasSuffix(whole, `\`) || whole[0] == '#' {
		return s.bad("it ends in the middle of a line")
	}
	if len(s.lines) >= maxInstructions {
		return s.bad(fmt.Sprintf("more than %d instructions", maxInstructions))
	}
	s.base = ""
	word, rest := cutWord(whole)
	word = strings.ToUpper(word)
	if word != "ARG" && word != "FROM" && len(s.stages) == 0 {
		return s.bad(word + " before the first FROM")
	}
	if word != "FROM" {
		if word == "ARG" && len(s.stages) == 0 {
			s.arg(rest)
		}
		if err := s.check(word, rest); err != nil {
			return err
		}
		s.lines = append(s.lines, instruction{text: word + " " + rest, base: s.base})
		if word == "LABEL" { // it may have changed ours, by which containers are found
			s.lines = append(s.lines, instruction{text: "LABEL " + labels, ours: true})
		}
		return nil
	}
	from, err := s.from(rest)
	if err != nil {
		return err
	}
	s.lines = append(s.lines, instruction{text: from, base: s.base}, instruction{text: "LABEL " + labels, ours: true})
	return nil
}

func cutWord(s string) (word, rest string) {
	i := strings.IndexFunc(s, unicode.IsSpace)
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimSpace(s[i:])
}

// check looks for what would have the engine fetch something.
func (s *dockerScan) check(word, rest string) error {
	switch word {
	case "RUN", "CMD", "LABEL", "MAINTAINER", "EXPOSE", "ENV", "ENTRYPOINT", "VOLUME", "USER", "WORKDIR", "ARG", "STOPSIGNAL", "HEALTHCHECK", "SHELL":
		return nil
	case "ONBUILD":
		word, rest = cutWord(rest)
		if word = strings.ToUpper(word); word == "ONBUILD" || word == "FROM" {
			return s.bad("ONBUILD " + word)
		}
		return s.check(word, rest)
	case "ADD": // the engine would fetch an address with the network of the machine
		if strings.ContainsAny(rest, `$\`) || strings.Contains(rest, "://") {
			return s.refuse("ADD fetches nothing here, and takes no variables: bring the file along, and use COPY")
		}
		return s.copy(rest)
	case "COPY":
		return s.copy(rest)
	}
	return s.bad(fmt.Sprintf("%s is no instruction of the classic builder", shownWord(word)))
}

// copy finds the image that COPY --from names.
func (s *dockerScan) copy(rest string) error {
	for flag := range strings.FieldsSeq(rest) {
		if !strings.HasPrefix(flag, "--") || flag == "--" {
			return nil
		}
		if strings.ContainsAny(flag, `"'$\`) {
			return s.refuse("quotes and variables in " + shownWord(flag))
		}
		from, ok := strings.CutPrefix(strings.ToLower(flag), "--from=")
		if !ok {
			continue
		}
		if n, err := strconv.Atoi(from); err == nil && n >= 0 && n < len(s.stages)-1 || s.stage(from) {
			continue
		}
		if err := s.image(flag[len("--from="):]); err != nil {
			return err
		}
	}
	return nil
}

func (s *dockerScan) stage(name string) bool {
	for _, st := range s.stages {
		if st != "" && strings.EqualFold(st, name) {
			return true
		}
	}
	return false
}

// from reads what follows FROM and writes it without variables.
func (s *dockerScan) from(rest string) (line string, err error) {
	words := strings.Fields(rest)
	if len(words) > 0 && strings.HasPrefix(words[0], "--") {
		if err := s.platform(words[0]); err != nil {
			return "", err
		}
		words = words[1:]
	}
	named := len(words) == 3 && strings.EqualFold(words[1], "AS")
	if len(words) != 1 && !named {
		return "", s.bad("FROM looks like: FROM image, or FROM image AS name")
	}
	name, err := s.expand(words[0])
	if err != nil {
		return "", err
	}
	if name != "scratch" && !s.stage(name) {
		if err := s.image(name); err != nil {
			return "", err
		}
	}
	if !named {
		s.stages = append(s.stages, "")
		return "FROM " + name, nil
	}
	if !stageName.MatchString(words[2]) {
		return "", s.bad(shownWord(words[2]) + " is no name of a stage")
	}
	s.stages = append(s.stages, words[2])
	return "FROM " + name + " AS " + words[2], nil
}

var (
	stageName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]*$`)
	imageForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:@-]*$`)
	// imageID is how the engine would also find what has no name: layers of others.
	imageID = regexp.MustCompile(`^(?:sha256:)?[0-9a-f]{6,64}$`)
)

// image notes an image that has to be here, and to be allowed, before the build.
func (s *dockerScan) image(name string) error {
	if !imageForm.MatchString(name) || len(name) > 512 {
		return s.bad(shownWord(name) + " is no name of an image")
	}
	if imageID.MatchString(name) || strings.HasPrefix(name, builtPrefix) {
		return s.refuse("an image has to be named, not " + shownWord(name))
	}
	if s.base = name; !slices.Contains(s.images, name) {
		s.images = append(s.images, name)
	}
	return nil
}

// platform takes the platform that the engine has anyway.
func (s *dockerScan) platform(flag string) error {
	p := strings.TrimPrefix(flag, "--platform=")
	switch strings.Trim(p, "{}") {
	case "linux/" + runtime.GOARCH, "$BUILDPLATFORM", "$TARGETPLATFORM", "${BUILDPLATFORM", "${TARGETPLATFORM":
		return nil
	}
	return s.refuse(shownWord(flag) + ": images are for linux/" + runtime.GOARCH + " here")
}

// arg remembers a variable for FROM. One that it cannot make out is left unknown.
func (s *dockerScan) arg(rest string) {
	for word := range strings.FieldsSeq(rest) {
		name, value, _ := strings.Cut(word, "=")
		if n := len(value); n > 1 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		delete(s.args, name)
		if v, err := s.expand(value); err == nil && !strings.ContainsAny(v, `"'\`) {
			s.args[name] = v
		}
	}
}

var variable = regexp.MustCompile(`\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^${}]*))?\})`)

// expand puts in the variables that ARG set before the first FROM.
func (s *dockerScan) expand(text string) (string, error) {
	var unknown string
	out := variable.ReplaceAllStringFunc(text, func(v string) string {
		m := variable.FindStringSubmatch(v)
		value, ok := s.args[m[1]+m[2]]
		if !ok && m[3] == "" {
			unknown = v
		}
		if value == "" {
			value = m[3]
		}
		return value
	})
	if unknown != "" || strings.Contains(out, "$") {
		return "", s.refuse(fmt.Sprintf("%s cannot be made out: write the image's name, or an ARG with a plain value before the first FROM", shownWord(text)))
	}
	return out, nil
}

func (s *dockerScan) bad(why string) error {
	return &box.BuildError{Reason: job.ReasonExit, Exit: 1, Why: fmt.Sprintf("Dockerfile, line %d: %s", s.line, why)}
}

func (s *dockerScan) refuse(why string) error {
	return &box.RefusedError{Why: fmt.Sprintf("Dockerfile, line %d: %s", s.line, why)}
}

func shownWord(w string) string {
	if len(w) > 60 {
		w = strings.ToValidUTF8(w[:60], "") + "…"
	}
	return strconv.Quote(w)
}

// render is what the engine gets: with the images by their ids, so that a name that
// moves after it was checked changes nothing.
func (d *dockerfile) render(ids map[string]string) string {
	var b strings.Builder
	for _, l := range d.lines {
		words := strings.SplitN(l.text, " ", 3)
		switch words[0] {
		case "FROM":
			words[1] = cmp.Or(ids[l.base], words[1])
		case "COPY":
			if id := ids[l.base]; id != "" && words[1] == "--from="+l.base {
				words[1] = "--from=" + id
			}
		}
		b.WriteString(strings.Join(words, " ") + "\n")
	}
	return b.String()
}

// checkTriggers looks at what an image adds to the Dockerfiles that begin with it.
func checkTriggers(name string, triggers []string) error {
	for _, t := range triggers {
		s := &dockerScan{stages: []string{""}}
		word, rest := cutWord(strings.TrimSpace(t))
		if err := s.check(strings.ToUpper(word), rest); err != nil || len(s.images) > 0 {
			return &box.RefusedError{Why: fmt.Sprintf("the image %q has an ONBUILD that fetches something: %s", name, shownWord(t))}
		}
	}
	return nil
}

// An ignoreFile is a .dockerignore: patterns, of which the last that fits decides.
type ignoreFile []struct {
	pattern *regexp.Regexp
	keep    bool // it began with !
}

func readIgnore(text []byte) (f ignoreFile) {
	for line := range strings.Lines(string(bytes.TrimPrefix(text, []byte("\ufeff")))) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		line, keep := strings.CutPrefix(line, "!")
		line = strings.Trim(path.Clean(strings.TrimSpace(line)), "/")
		if re, err := regexp.Compile(ignoreRegexp(line)); err == nil && line != "." && line != "" {
			f = append(f, struct {
				pattern *regexp.Regexp
				keep    bool
			}{re, keep})
		}
	}
	return f
}

// ignoreRegexp writes a pattern of Docker's as a regular expression that also fits all
// that is below what it names.
func ignoreRegexp(p string) string {
	b := strings.Builder{}
	b.WriteString("^")
	for i := 0; i < len(p); i++ {
		switch c := p[i]; {
		case strings.HasPrefix(p[i:], "**/"):
			b.WriteString("(?:.*/)?")
			i += 2
		case strings.HasPrefix(p[i:], "**"):
			b.WriteString(".*")
			i++
		case c == '*':
			b.WriteString("[^/]*")
		case c == '?':
			b.WriteString("[^/]")
		case c == '[' || c == ']':
			b.WriteByte(c)
		case c == '\\' && i+1 < len(p):
			i++
			b.WriteString(regexp.QuoteMeta(p[i : i+1]))
		default:
			b.WriteString(regexp.QuoteMeta(string(c)))
		}
	}
	return b.String() + "(?:/.*)?$"
}

func (f ignoreFile) ignores(name string) bool {
	out := false
	for _, p := range f {
		if p.pattern.MatchString(name) {
			out = !p.keep
		}
	}
	return out
}
