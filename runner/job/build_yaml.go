package job

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds on what a stranger's file may cost. The parser's time grows with the square
// of the nesting: 64 KiB of "[" take it 18 s and 6 GB.
const (
	maxTokens  = 10_000
	maxNesting = 32
	maxVisits  = 10_000 // nodes looked at, aliases followed
	maxNotes   = 20
)

// A yamlFile is a build file that is being read.
type yamlFile struct {
	lines   []string
	notes   []BuildNote
	anchors map[string]ast.Node
	visits  int
}

// readYAML parses text, which must be one document, and returns its top, nil if
// there is none.
func readYAML(text []byte) (*yamlFile, ast.Node, error) {
	f := &yamlFile{anchors: make(map[string]ast.Node), lines: []string{""}}
	if len(text) > MaxBuildFile {
		return nil, nil, f.at(1, 1, "", "the file is larger than %d KiB", MaxBuildFile>>10)
	}
	s := strings.TrimPrefix(string(text), "\ufeff")
	s = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(s)
	f.lines = strings.Split(s, "\n")
	if err := f.checkText(text); err != nil {
		return nil, nil, err
	}
	s = tabs.ReplaceAllStringFunc(s, func(t string) string { return strings.ReplaceAll(t, "\t", " ") })
	tokens := lexer.Tokenize(s)
	if err := f.checkTokens(tokens); err != nil {
		return nil, nil, err
	}
	keepTabs(tokens)
	joinLines(tokens)
	file, err := parse(tokens)
	if err != nil {
		return nil, nil, f.syntax(err)
	}
	root, err := f.document(file)
	if err != nil {
		return nil, nil, err
	}
	return f, root, nil
}

// tabs matches those that YAML allows and the parser does not: in lines that hold nothing
// else, and after the dash of a list.
var tabs = regexp.MustCompile(`(?m)^[ \t]+$|^ *-[ \t]+`)

// keepTabs gives words without quotes the tabs back that the lexer drops: it makes one word
// of "make<tab>test" (goccy/go-yaml v1.19.2).
func keepTabs(tokens token.Tokens) {
	block := false // the text of a | or > comes next
	for _, t := range tokens {
		switch t.Type {
		case token.LiteralType, token.FoldedType:
			block = true
		case token.StringType:
			if !block && strings.Contains(t.Origin, "\t") {
				t.Value = foldLines(t.Origin)
			}
			block = false
		}
	}
}

// joinLines takes away the backslash at a line's end where YAML has made one line of two:
// the shell would have, and now would take it for a quoted blank.
func joinLines(tokens token.Tokens) {
	for _, t := range tokens {
		if t.Type != token.StringType && t.Type != token.SingleQuoteType || !strings.Contains(t.Origin, "\\\n") {
			continue
		}
		before := ""
		for line := range strings.Lines(t.Origin) {
			line = strings.Trim(line, " \t\n'")
			if begun, ok := strings.CutSuffix(before, `\`); ok && line != "" {
				t.Value = strings.Replace(t.Value, before+" "+line, begun+line, 1)
			}
			before = line
		}
	}
}

// foldLines joins the lines of a word without quotes: a blank for one line's end, and a
// line's end for each empty line.
func foldLines(text string) string {
	var b strings.Builder
	empty := 0
	for i, line := range strings.Split(strings.TrimSpace(text), "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "":
			empty++
			continue
		case empty > 0:
			b.WriteString(strings.Repeat("\n", empty))
		case i > 0:
			b.WriteByte(' ')
		}
		empty = 0
		b.WriteString(line)
	}
	return b.String()
}

// parse never panics: no file of a stranger's may end raid.
func parse(tokens token.Tokens) (file *ast.File, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("this is no YAML: %v", p)
		}
	}()
	return parser.Parse(tokens, 0)
}

func (f *yamlFile) checkText(text []byte) error {
	if bytes.HasPrefix(text, []byte("\xff\xfe")) || bytes.HasPrefix(text, []byte("\xfe\xff")) {
		return f.at(1, 1, "save it as UTF-8", "the file is UTF-16")
	}
	for i, line := range f.lines {
		column := 0
		for at, r := range line {
			column++
			if r == utf8.RuneError && !strings.HasPrefix(line[at:], "\ufffd") {
				return f.at(i+1, column, "save it as UTF-8", "this is not UTF-8")
			}
			if r < ' ' && r != '\t' || r == 0x7f {
				return f.at(i+1, column, "", "control character %s", strconv.QuoteRune(r))
			}
		}
	}
	return nil
}

func (f *yamlFile) checkTokens(tokens token.Tokens) error {
	flow, chain, line := 0, 0, 0
	for i, t := range tokens {
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow = max(flow-1, 0)
		case token.SequenceEntryType, token.MappingKeyType, token.AnchorType, token.TagType:
			if t.Position.Line != line {
				line, chain = t.Position.Line, 0
			}
			chain++
		}
		if flow > maxNesting || chain > maxNesting || i >= maxTokens {
			return f.at(t.Position.Line, t.Position.Column, "", "the file is too deeply nested, or too long")
		}
	}
	return nil
}

// document returns the top of the only document.
func (f *yamlFile) document(file *ast.File) (root ast.Node, err error) {
	for _, doc := range file.Docs {
		switch body := doc.Body.(type) {
		case nil:
		case *ast.DirectiveNode: // %YAML 1.2
		case *ast.CommentGroupNode:
		default:
			if root != nil {
				return nil, f.fail(body, "remove what follows the second ---", "there is more than one document in the file")
			}
			root = body
		}
	}
	if root != nil {
		ast.Walk(anchorFinder{f}, root)
	}
	return root, nil
}

type anchorFinder struct{ f *yamlFile }

func (a anchorFinder) Visit(n ast.Node) ast.Visitor {
	if anchor, ok := n.(*ast.AnchorNode); ok && anchor.Name != nil && anchor.Value != nil {
		a.f.anchors[anchor.Name.GetToken().Value] = anchor.Value
	}
	return a
}

// syntaxError is what the parser returns.
type syntaxError interface {
	error
	GetToken() *token.Token
	GetMessage() string
}

// syntax turns the parser's error into one that says what to do.
func (f *yamlFile) syntax(err error) error {
	se, ok := errors.AsType[syntaxError](err)
	if !ok || se.GetToken() == nil {
		return f.at(1, 1, "", "%s", printable(err.Error()))
	}
	line, column := f.clamp(se.GetToken().Position.Line, se.GetToken().Position.Column)
	if l, c, ok := f.indentNear(line, '\t'); ok {
		return f.at(l, c, "put spaces in the place of the tab", "tabs are not allowed for indentation; use spaces")
	}
	if l, c, ok := f.indentNear(line, '\u00a0'); ok { // copied out of a web page
		return f.at(l, c, "type the spaces anew", "this is no ordinary space")
	}
	src := f.lines[line-1]
	message := se.GetMessage()
	if message == "mapping value is not allowed in this context" {
		if before, _, ok := strings.Cut(string([]rune(src)[column-1:]), ": "); ok {
			column += utf8.RuneCountInString(before)
		}
		message = `": " in a value that is not quoted`
	}
	return f.at(line, column, quoteHint(src), "%s", printable(message))
}

// indentNear finds a blank that indents line or the ones beside it.
func (f *yamlFile) indentNear(line int, blank rune) (l, column int, found bool) {
	for l = max(line-1, 1); l <= min(line+1, len(f.lines)); l++ {
		src := f.lines[l-1]
		indent := src[:len(src)-len(strings.TrimLeft(src, " \t-\u00a0"))]
		if before, _, ok := strings.Cut(indent, string(blank)); ok && strings.TrimSpace(src) != "" {
			return l, utf8.RuneCountInString(before) + 1, true
		}
	}
	return 0, 0, false
}

// quoteHint says how to quote the command or value in a line, if there is one.
func quoteHint(src string) string {
	body := strings.TrimSpace(src)
	lead, value := "- ", strings.TrimPrefix(body, "- ")
	if value == body {
		key, rest, ok := strings.Cut(body, ": ")
		if !ok {
			return ""
		}
		lead, value = key+": ", rest
	}
	value, _, _ = strings.Cut(value, " #")
	value = strings.TrimSpace(value)
	if value == "" || len(value) > 500 || value[0] == '\'' {
		return ""
	}
	return printable("quote it:  " + lead + "'" + strings.ReplaceAll(value, "'", "''") + "'")
}

// unquoted makes err, about a command, one that shows how to quote it.
func (f *yamlFile) unquoted(n ast.Node, err error) error {
	be, ok := errors.AsType[*BuildError](err)
	if !ok {
		return err
	}
	hint := quoteHint(f.lines[be.Line-1])
	switch v := n.(type) {
	case *ast.MappingNode:
		if len(v.Values) > 0 {
			n = v.Values[0]
		}
		be = f.fail(n, "", `": " makes a mapping of this command`)
	case *ast.MappingValueNode:
		be = f.fail(n, "", `": " makes a mapping of this command`)
	}
	if hint != "" {
		be.Hint = hint
	}
	return be
}

type fields map[string]func(ast.Node) error

// mapping reads n, the mapping at path, by known. Unknown keys get a note, keys
// without a value are as good as absent.
func (f *yamlFile) mapping(n ast.Node, path string, known fields) error {
	pairs, err := f.pairs(n, path)
	if err != nil {
		return err
	}
	for _, kv := range pairs {
		key := keyText(kv.Key)
		read, ok := known[key]
		if !ok {
			f.note(kv.Key, "unknown key %s%s", shown(key), suggest(key, path, known))
			continue
		}
		v, err := f.resolve(kv.Value)
		if err != nil {
			return err
		}
		if v == nil || v.Type() == ast.NullType {
			continue
		}
		if err := read(v); err != nil {
			return err
		}
	}
	return nil
}

// pairs returns the keys and values of n, those of merge keys first so that its own
// have the last word.
func (f *yamlFile) pairs(n ast.Node, path string) ([]*ast.MappingValueNode, error) {
	n, err := f.resolve(n)
	if err != nil {
		return nil, err
	}
	var all []*ast.MappingValueNode
	switch m := n.(type) {
	case *ast.MappingNode:
		all = m.Values
	case *ast.MappingValueNode:
		all = []*ast.MappingValueNode{m}
	default:
		where := path
		if where == "" {
			where = "the file"
		}
		return nil, f.fail(n, "write it as:\n  key: value", "%s has to be a mapping of keys to values", where)
	}
	var merged, own []*ast.MappingValueNode
	for _, kv := range all {
		if _, ok := kv.Key.(*ast.MergeKeyNode); !ok {
			own = append(own, kv)
			continue
		}
		more, err := f.pairs(kv.Value, path)
		if err != nil {
			return nil, err
		}
		merged = append(merged, more...)
		if len(merged) > maxVisits {
			return nil, f.fail(kv.Key, "", "too many keys are merged here")
		}
	}
	return append(merged, own...), nil
}

func keyText(k ast.MapKeyNode) string {
	if s, ok := k.(*ast.StringNode); ok {
		return s.Value
	}
	return k.GetToken().Value
}

// resolve follows aliases and drops anchors and the tags of plain strings.
func (f *yamlFile) resolve(n ast.Node) (ast.Node, error) {
	for {
		if f.visits++; f.visits > maxVisits {
			return nil, f.fail(n, "", "the aliases in the file expand to too much")
		}
		switch v := n.(type) {
		case *ast.AnchorNode:
			n = v.Value
		case *ast.AliasNode:
			name := v.Value.GetToken().Value
			target, ok := f.anchors[name]
			if !ok {
				return nil, f.fail(n, `quote it if the "*" is meant`, "there is no anchor %s", shown("&"+name))
			}
			n = target
		case *ast.TagNode:
			if tag := v.Start.Value; tag != "!!str" && tag != "!!map" && tag != "!!seq" && tag != "!!int" && tag != "!!bool" {
				return nil, f.fail(n, `quote it if the "!" is meant`, "unknown tag %s", shown(tag))
			}
			n = v.Value
		default:
			return n, nil
		}
	}
}

// scalar returns the text of n, numbers and booleans as they are written. want says
// what was expected, for the error.
func (f *yamlFile) scalar(n ast.Node, want string) (string, error) {
	switch v := n.(type) {
	case nil, *ast.NullNode:
		return "", nil
	case *ast.StringNode:
		return v.Value, nil
	case *ast.LiteralNode:
		return v.Value.Value, nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return v.GetToken().Value, nil
	case *ast.SequenceNode:
		return "", f.fail(n, "", "this is a list, where %s belongs", want)
	}
	return "", f.fail(n, "", "this is a mapping, where %s belongs", want)
}

// text reads a string without control characters into to.
func (f *yamlFile) text(to *string) func(ast.Node) error {
	return func(n ast.Node) error {
		s, err := f.scalar(n, "a word")
		if err != nil {
			return err
		}
		if s = strings.TrimSpace(s); strings.ContainsFunc(s, unicode.IsControl) {
			return f.fail(n, "", "%s holds a control character", shown(s))
		}
		*to = s
		return nil
	}
}

// yes reads a boolean and sets to if it is true: network may be said in two places.
func (f *yamlFile) yes(to *bool) func(ast.Node) error {
	return func(n ast.Node) error {
		s, err := f.scalar(n, "true or false")
		if err != nil {
			return err
		}
		switch strings.ToLower(s) {
		case "true", "yes", "on", "y":
			*to = true
		case "false", "no", "off", "n", "":
		default:
			return f.fail(n, "write true or false", "%s is neither true nor false", shown(s))
		}
		return nil
	}
}

// wish is yes for what old files may hold without meaning: whatever else is written
// there is no error.
func (f *yamlFile) wish(to *bool) func(ast.Node) error {
	return func(n ast.Node) error {
		if f.yes(to)(n) != nil {
			*to = false
		}
		return nil
	}
}

// whole reads an integer into to.
func (f *yamlFile) whole(to *int) func(ast.Node) error {
	return func(n ast.Node) error {
		s, err := f.scalar(n, "a whole number")
		if err != nil {
			return err
		}
		s = strings.TrimSuffix(strings.TrimSpace(s), ".0") // as RAI's library did
		i, err := strconv.ParseInt(s, 0, 64)
		if err != nil || i > math.MaxInt32 || i < math.MinInt32 {
			return f.fail(n, "", "%s is not a whole number", shown(s))
		}
		*to = int(i)
		return nil
	}
}

// nothing reads what RAI's files say to no effect.
func (f *yamlFile) nothing(ast.Node) error { return nil }

// suggest names the known key that was meant, if one is near.
func suggest(key, path string, known fields) string {
	best, least := "", 3
	for k := range known {
		if d := distance(strings.ToLower(key), k); d < least || d == least && k < best {
			best, least = k, d
		}
	}
	if best != "" && least < len(key) {
		return fmt.Sprintf(" (did you mean %q?)", best)
	}
	home := map[string]string{"image": "rai", "version": "rai", "cpu": "resources", "gpu": "resources", "limits": "resources",
		"network": "resources", "time": "resources.limits", "memory": "resources.limits", "count": "resources.gpu",
		"build": "commands", "build_image": "commands", "rai": "", "resources": "", "commands": ""}
	if p, ok := home[key]; ok && p != path {
		return fmt.Sprintf(" here (it belongs in %s)", cmp.Or(p, "the first column"))
	}
	return ""
}

// distance is how many letters have to be changed, added, removed or swapped with
// their neighbour to make b of a. Long words are far from everything.
func distance(a, b string) int {
	if len(a) > 40 {
		return len(a)
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			rows[i][j] = min(change, rows[i-1][j]+1, rows[i][j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// fail returns an error about n, nil for the file as a whole.
func (f *yamlFile) fail(n ast.Node, hint, format string, args ...any) *BuildError {
	line, column := f.place(n)
	return f.at(line, column, hint, format, args...)
}

func (f *yamlFile) at(line, column int, hint, format string, args ...any) *BuildError {
	line, column = f.clamp(line, column)
	note := BuildNote{Line: line, Column: column, Text: fmt.Sprintf(format, args...), Source: f.lines[line-1]}
	return &BuildError{note, hint}
}

func (f *yamlFile) note(n ast.Node, format string, args ...any) {
	if len(f.notes) < maxNotes {
		f.notes = append(f.notes, f.fail(n, "", format, args...).BuildNote)
	}
}

// sorted returns the notes in the order of the file.
func (f *yamlFile) sorted() []BuildNote {
	slices.SortStableFunc(f.notes, func(a, b BuildNote) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return f.notes
}

// place returns where n is. A mapping's own token is a colon, its tokens that of no
// line for some folded strings; both are put right as far as can be.
func (f *yamlFile) place(n ast.Node) (line, column int) {
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
		n = m.Values[0].Key
	}
	if n == nil || n.GetToken() == nil || n.GetToken().Position == nil {
		return 1, 1
	}
	p := n.GetToken().Position
	return p.Line, p.Column
}

// clamp moves a place into the text.
func (f *yamlFile) clamp(line, column int) (int, int) {
	line = min(max(line, 1), len(f.lines))
	return line, min(max(column, 1), utf8.RuneCountInString(f.lines[line-1])+1)
}
