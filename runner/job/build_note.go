package job

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A BuildNote is a remark about a place in a build file.
type BuildNote struct {
	Line, Column int    // from 1, the column in characters
	Text         string // fit for a terminal
	Source       string // the line as it is
}

// Render shows the remark with its line and a caret. Control characters of the line
// are written out.
//
//	rai_build.yml:3:5: unknown key "netwrok" (did you mean "network"?)
//	   3 |   netwrok: false
//	     |   ^
func (n BuildNote) Render(name string) string {
	before, line := n.window()
	number := strconv.Itoa(n.Line)
	return fmt.Sprintf("%s:%d:%d: %s\n%4s | %s\n%4s | %s^", printable(name), n.Line, n.Column, n.Text,
		number, printable(line), strings.Repeat(" ", len(number)), strings.Repeat(" ", utf8.RuneCountInString(printable(before))))
}

// window cuts a long line to what is around the column, and returns the part before
// the column and the whole.
func (n BuildNote) window() (before, line string) {
	const reach = 100
	runes := []rune(n.Source)
	at := min(max(n.Column-1, 0), len(runes))
	lead, tail := "", ""
	if at > reach {
		runes, at, lead = runes[at-reach:], reach, "…"
	}
	if len(runes) > 2*reach {
		runes, tail = runes[:2*reach], "…"
	}
	return lead + string(runes[:at]), lead + string(runes) + tail
}

// A BuildError is why a build file cannot be used, where, and how to mend it.
type BuildError struct {
	BuildNote
	Hint string // or ""
}

func (e *BuildError) Error() string {
	return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Column, e.Text)
}

// Render shows the error as a note is shown, and the hint below it.
func (e *BuildError) Render(name string) string {
	s := e.BuildNote.Render(name)
	if e.Hint != "" {
		s += "\n" + e.Hint
	}
	return s
}

// shown quotes a stranger's word for a message.
func shown(s string) string {
	if r := []rune(s); len(r) > 60 {
		s = string(r[:60]) + "…"
	}
	return strconv.Quote(s)
}

// printable writes out what a terminal would obey. A tab becomes one space, which
// keeps carets in place.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\t':
			b.WriteByte(' ')
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}
