package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// applicationID marks a SQLite file as raid's: "raid" in ASCII. See file(1).
const applicationID = 0x72616964

// migrations returns what makes each version of the schema of the one before it.
// Those that were ever released never change; a new one is appended.
//
// Tables have a rowid where a row of a job is too big for an index page, and would
// spill into a page of its own, and none where it is small. Names and keys are blobs,
// as any byte may stand in them; the view rows shows them as text.
func migrations() []string {
	return []string{`
CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), rev INTEGER NOT NULL, settled INTEGER NOT NULL) STRICT;
INSERT INTO meta VALUES (1, 0, 0);
CREATE TABLE row (tbl BLOB NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, places BLOB NOT NULL,
	UNIQUE (tbl, key)) STRICT;
CREATE TABLE list (name BLOB NOT NULL, score INTEGER NOT NULL, tbl BLOB NOT NULL, key BLOB NOT NULL,
	PRIMARY KEY (name, score, tbl, key)) STRICT, WITHOUT ROWID;
CREATE INDEX list_row ON list (tbl, key);
CREATE VIEW rows AS SELECT CAST(tbl AS TEXT) AS tbl, CAST(key AS TEXT) AS key, CAST(value AS TEXT) AS value FROM row;
`, `
-- A row's places say where it stands in lists, so that no index has to. Commits go to
-- the log; row and list follow (see tail.go).
DROP INDEX list_row;
CREATE TABLE log (rev INTEGER PRIMARY KEY, batch BLOB NOT NULL) STRICT;
`}
}

// migrate brings the file to the newest schema, or refuses a file that is another
// program's or a newer raid's. Each version is one transaction.
func migrate(ctx context.Context, c *sql.Conn) error {
	var app, version, objects int
	err := errors.Join(
		c.QueryRowContext(ctx, "PRAGMA application_id").Scan(&app),
		c.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version),
		c.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_schema").Scan(&objects))
	if err != nil {
		return err
	}
	steps := migrations()
	switch {
	case app != applicationID && objects > 0:
		return errors.New("raid.db is not a database of raid")
	case version > len(steps):
		return fmt.Errorf("schema version %d is newer than this raid, which knows %d", version, len(steps))
	}
	for v := version; v < len(steps); v++ {
		if err := script(ctx, c, fmt.Sprintf(`
CREATE TABLE IF NOT EXISTS migration (version INTEGER PRIMARY KEY, at TEXT NOT NULL);
INSERT INTO migration VALUES (%d, strftime('%%Y-%%m-%%dT%%H:%%M:%%SZ', 'now'));
PRAGMA application_id = %d;
PRAGMA user_version = %d;`, v+1, applicationID, v+1)+steps[v]); err != nil {
			return fmt.Errorf("schema version %d: %w", v+1, err)
		}
	}
	return nil
}

// makeViews makes the views that are missing or differ.
func makeViews(ctx context.Context, c *sql.Conn, views []View) error {
	for _, v := range views {
		text, err := v.sql()
		if err != nil {
			return err
		}
		var old string
		err = c.QueryRowContext(ctx, "SELECT sql FROM sqlite_schema WHERE type = 'view' AND name = ?", v.Name).Scan(&old)
		if old == text {
			continue
		}
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("view %s: %w", v.Name, err)
		}
		if err := script(ctx, c, `DROP VIEW IF EXISTS "`+v.Name+`";`+text); err != nil {
			return fmt.Errorf("view %s: %w", v.Name, err)
		}
	}
	return nil
}

// script runs statements in one transaction.
func script(ctx context.Context, c *sql.Conn, text string) error {
	tx, err := c.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, text); err != nil {
		return err
	}
	return tx.Commit()
}

var plainName = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// sql returns the statement that makes v. Names go into it as they are, so they may
// only be plain ones.
func (v View) sql() (string, error) {
	columns := []string{"CAST(key AS TEXT) AS key"}
	for _, c := range append([]string{v.Name}, v.Columns...) {
		if !plainName.MatchString(c) {
			return "", fmt.Errorf("view %q: %q is no plain name", v.Name, c)
		}
	}
	for _, c := range v.Columns {
		columns = append(columns, fmt.Sprintf(`json ->> '$.%s' AS "%s"`, c, c))
	}
	var tables []string
	for _, t := range v.Tables {
		tables = append(tables, fmt.Sprintf("x'%x'", t))
	}
	return fmt.Sprintf(`CREATE VIEW "%s" AS SELECT %s FROM (SELECT key, CAST(value AS TEXT) AS json FROM row WHERE tbl IN (%s)) WHERE json_valid(json)`,
		v.Name, strings.Join(columns, ", "), strings.Join(tables, ", ")), nil
}
