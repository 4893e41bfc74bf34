package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/rai-project/raid/sshd/queue"
)

// This file reads a SQLite store: the rows of the file, and before them the tail, which is
// newer.

// Load implements [Store].
func (d *disk) Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	rev, err := d.load(ctx, tables, fn)
	if err != nil {
		return 0, fmt.Errorf("load: %w", d.reading(err))
	}
	return rev, nil
}

func (d *disk) load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	tx, fresh, rev, err := d.snapshot(ctx)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	for _, table := range tables {
		if err := loadTable(ctx, tx, table, fresh, fn); err != nil {
			return 0, fmt.Errorf("table %s: %w", table, err)
		}
	}
	return rev, nil
}

// snapshot returns the rows of the file and the writes of the tail as they are at one
// moment. The caller ends the transaction.
func (d *disk) snapshot(ctx context.Context) (tx *sql.Tx, fresh []queue.Write, rev Rev, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.usableLocked(ctx); err != nil {
		return nil, nil, 0, err
	}
	if tx, err = d.readers.BeginTx(ctx, nil); err != nil {
		return nil, nil, 0, err
	}
	// The transaction sees what is there at its first statement.
	if err := tx.QueryRowContext(ctx, "SELECT rev FROM meta").Scan(&rev); err != nil {
		tx.Rollback()
		return nil, nil, 0, err
	}
	fresh, _ = d.tail.writes(func(queue.Write) bool { return true })
	return tx, fresh, d.rev, nil
}

// loadTable merges a table's rows with the fresh writes, which are in order.
func loadTable(ctx context.Context, tx *sql.Tx, table string, fresh []queue.Write, fn func(queue.Row) error) error {
	from, _ := slices.BinarySearchFunc(fresh, rowID{table, ""}, func(w queue.Write, id rowID) int {
		return rowID{w.Table, w.Key}.compare(id)
	})
	fresh = fresh[from:]
	// take passes on what is fresh up to a key, and tells whether that was the key's own.
	take := func(key string, all bool) (found bool, err error) {
		for len(fresh) > 0 && fresh[0].Table == table && (all || fresh[0].Key <= key) {
			w := fresh[0]
			fresh = fresh[1:]
			found = !all && w.Key == key
			if w.Value != nil {
				if err := fn(queue.Row{Table: table, Key: w.Key, Value: clone(w.Value)}); err != nil {
					return found, err
				}
			}
		}
		return found, nil
	}
	rows, err := tx.QueryContext(ctx, "SELECT key, value FROM row WHERE tbl = ? ORDER BY key", []byte(table))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		r := queue.Row{Table: table}
		if err := rows.Scan(&r.Key, &r.Value); err != nil {
			return err
		}
		found, err := take(r.Key, false)
		if err == nil && !found {
			err = fn(present(r))
		}
		if err != nil {
			return err
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	_, err = take("", true)
	return err
}

// Get implements [Store].
func (d *disk) Get(ctx context.Context, table, key string) ([]byte, error) {
	w, fresh := d.tail.get(table, key)
	switch {
	case d.closed.Load():
		return nil, fmt.Errorf("get %s %q: %w", table, key, ErrClosed)
	case fresh && context.Cause(ctx) != nil:
		return nil, fmt.Errorf("get %s %q: %w", table, key, context.Cause(ctx))
	case fresh && w.Value == nil:
		return nil, fmt.Errorf("get %s %q: %w", table, key, ErrNotFound)
	case fresh:
		return clone(w.Value), nil
	}
	var r queue.Row
	err := d.get.QueryRowContext(ctx, []byte(table), []byte(key)).Scan(&r.Value)
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get %s %q: %w", table, key, d.reading(err))
	}
	return present(r).Value, nil
}

// List implements [Store].
func (d *disk) List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error) {
	if before == math.MinInt64 {
		n = 0
	}
	last := before - 1
	if before == 0 {
		last = math.MaxInt64
	}
	found, err := d.query(ctx, d.list, down, list, last, n)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", list, d.reading(err))
	}
	return found, nil
}

// Ascend implements [Store].
func (d *disk) Ascend(ctx context.Context, list string, after int64, n int) ([]queue.Row, error) {
	found, err := d.query(ctx, d.ascend, up, list, after, n)
	if err != nil {
		return nil, fmt.Errorf("ascend %s: %w", list, d.reading(err))
	}
	return found, nil
}

// The ways through a list, by what entry.compare says of one and the one after it:
// down from bound on, up from behind it.
const (
	down = 1
	up   = -1
)

// query merges what is fresh in a list with the rows of the file. The tail comes
// first: what is folded in between is then seen twice, and not missed.
func (d *disk) query(ctx context.Context, stmt *sql.Stmt, way int, list string, bound int64, n int) (found []queue.Row, err error) {
	if n <= 0 {
		return nil, context.Cause(ctx)
	}
	fresh, here := d.tail.writes(func(w queue.Write) bool {
		return w.Value != nil && (w.Score <= bound) == (way == down) && slices.Contains(w.Lists, list)
	})
	slices.SortFunc(fresh, func(a, b queue.Write) int { return way * placeOf(b).compare(placeOf(a)) })
	rows, err := stmt.QueryContext(ctx, []byte(list), bound)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for len(found) < n && rows.Next() {
		var r queue.Row
		var at entry
		if err := rows.Scan(&r.Table, &r.Key, &at.score, &r.Value); err != nil {
			return nil, err
		}
		if here[rowID{r.Table, r.Key}] {
			continue
		}
		at.table, at.key = r.Table, r.Key
		for len(fresh) > 0 && len(found) < n && way*placeOf(fresh[0]).compare(at) > 0 {
			found, fresh = append(found, copyRow(fresh[0])), fresh[1:]
		}
		if len(found) < n {
			found = append(found, present(r))
		}
	}
	for ; len(found) < n && len(fresh) > 0; fresh = fresh[1:] {
		found = append(found, copyRow(fresh[0]))
	}
	return found, rows.Err()
}

func copyRow(w queue.Write) queue.Row {
	return queue.Row{Table: w.Table, Key: w.Key, Value: clone(w.Value)}
}

// placeOf is where a write stands in each of its lists.
func placeOf(w queue.Write) entry { return entry{w.Score, w.Table, w.Key} }

// present gives an empty value back as empty: the driver makes nil of it, and nil
// written back would delete the row.
func present(r queue.Row) queue.Row {
	if r.Value == nil {
		r.Value = []byte{}
	}
	return r
}
