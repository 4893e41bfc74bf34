package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
)

// SnapshotSQLite writes the store of DIR/raid.db, as it is at one moment, to a new file,
// 0600, which is the raid.db of another folder then. Another process may have the store
// open and write to it meanwhile: it does not wait. What stands only in the log of the
// file is in the snapshot, too. With an error there is no file.
func SnapshotSQLite(ctx context.Context, dir, path string) (err error) {
	from := filepath.Join(dir, "raid.db")
	if _, err := os.Stat(from); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	// SQLite writes into an empty file as into none; this one has its mode.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer f.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("snapshot of %s: %w", from, errors.Join(err, os.Remove(path)))
		}
	}()
	// Not mode=ro: SQLite could not read a log that a killed raid left.
	db, err := sql.Open("sqlite", dsn(from, url.Values{"mode": {"rw"}}))
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	var app int
	if err := db.QueryRowContext(ctx, "PRAGMA application_id").Scan(&app); err != nil {
		return err
	}
	if app != applicationID {
		return fmt.Errorf("%w: it is no database of raid", fs.ErrInvalid)
	}
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", path); err != nil {
		return err
	}
	return f.Sync()
}

// A Lister is a store that knows which tables it has rows of.
type Lister interface {
	// ListTables returns their names, in order.
	ListTables(ctx context.Context) ([]string, error)
}

// ListTables implements [Lister].
func (d *disk) ListTables(ctx context.Context) ([]string, error) {
	found, err := d.listTables(ctx)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", d.reading(err))
	}
	return found, nil
}

func (d *disk) listTables(ctx context.Context) ([]string, error) {
	tx, fresh, _, err := d.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback()
	rows, err := tx.QueryContext(ctx, "SELECT DISTINCT tbl FROM row")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	names := map[string]bool{}
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		names[name] = true
	}
	for _, w := range fresh {
		names[w.Table] = true // it may be gone; then there is nothing to copy
	}
	return slices.Sorted(maps.Keys(names)), rows.Err()
}
