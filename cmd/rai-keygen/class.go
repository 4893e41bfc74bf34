package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"

	"github.com/rai-project/raid/keys"
)

// A row is one person of a class list.
type row struct {
	keys.Enrollment
	line int
}

// columns of a class list, as RAI had them. There is no header line.
const columns = "lastname, firstname, username, email, role, affiliation"

// errHeader marks a note, not a failure: the first line names the columns.
var errHeader = errors.New("this line names the columns; skipped")

// maxRows bounds a class list.
const maxRows = 100_000

// readClass reads a class list: exactly the six columns, user names in lower case,
// names in title case. A bad row is reported with its line number and the rest goes
// on; so bad holds one error for each row that is not in rows.
func readClass(r io.Reader) (rows []row, bad []error) {
	br := bufio.NewReader(r)
	if b, err := br.Peek(3); err == nil && bytes.Equal(b, []byte("\ufeff")) {
		br.Discard(3) // Excel begins its files so
	}
	in := csv.NewReader(br)
	in.FieldsPerRecord = -1
	in.TrimLeadingSpace = true
	seen := map[string]int{}
	for first := true; len(rows)+len(bad) < maxRows; first = false {
		fields, err := in.Read()
		if err == io.EOF {
			return rows, bad
		}
		var p *csv.ParseError
		if errors.As(err, &p) {
			bad = append(bad, fmt.Errorf("%d: %w", p.StartLine, p.Err))
			continue
		}
		if err != nil {
			return rows, append(bad, fmt.Errorf("0: %w", err))
		}
		line, _ := in.FieldPos(0)
		e, err := readRow(fields, first)
		if err == nil && seen[e.User] != 0 {
			err = fmt.Errorf("%q stands in line %d already", e.User, seen[e.User])
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("%d: %w", line, err))
			continue
		}
		seen[e.User] = line
		rows = append(rows, row{e, line})
	}
	return rows, append(bad, fmt.Errorf("0: more than %d rows", maxRows))
}

// readRow reads the fields of one line. raid checks what they hold.
func readRow(fields []string, first bool) (keys.Enrollment, error) {
	for i := range fields {
		fields[i] = strings.TrimSpace(fields[i])
	}
	if first && isHeader(fields) {
		return keys.Enrollment{}, errHeader
	}
	if len(fields) != 6 {
		hint := ""
		if len(fields) == 1 && strings.Count(fields[0], ";") == 5 {
			hint = "; separate them by commas, not semicolons"
		}
		return keys.Enrollment{}, fmt.Errorf("%d columns, not the six: %s%s", len(fields), columns, hint)
	}
	e := keys.Enrollment{
		Last: title(fields[0]), First: title(fields[1]), User: strings.ToLower(fields[2]),
		Email: fields[3], Role: keys.Role(strings.ToLower(fields[4])), Affiliation: fields[5],
	}
	for _, f := range []struct{ name, value string }{{"username", e.User}, {"email", e.Email}, {"role", string(e.Role)}} {
		if f.value == "" {
			return e, fmt.Errorf("empty %s", f.name)
		}
	}
	if !keys.ValidName(e.User) {
		return e, fmt.Errorf("bad user name %q", e.User)
	}
	return e, nil
}

// isHeader recognises a line of column names: no address, and words we know.
func isHeader(fields []string) bool {
	hits := 0
	for _, f := range fields {
		f = strings.NewReplacer(" ", "", "_", "", "-", "").Replace(strings.ToLower(f))
		if strings.Contains(f, "@") {
			return false
		}
		switch f {
		case "lastname", "firstname", "username", "email", "role", "affiliation", "userid", "netid":
			hits++
		}
	}
	return hits >= 3
}

// title gives each part of a name a capital. A name in mixed case is somebody's own
// spelling (McDonald, van der Berg) and keeps the rest of it.
func title(s string) string {
	if s == strings.ToUpper(s) {
		s = strings.ToLower(s)
	} else if s != strings.ToLower(s) {
		return s
	}
	begin := true
	return strings.Map(func(r rune) rune {
		if begin {
			r = unicode.ToTitle(r)
		}
		begin = !unicode.IsLetter(r) && !unicode.IsMark(r)
		return r
	}, s)
}
