package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/rai-project/raid/sshd/queue"
	"modernc.org/sqlite"
	codes "modernc.org/sqlite/lib"
)

// A View lets people read rows with SQL: its rows are those of Tables whose value
// is JSON, its columns are key and the named fields of that JSON.
//
//	sqlite3 DIR/raid.db "SELECT user, count(*) FROM jobs GROUP BY user"
type View struct {
	Name    string
	Tables  []string
	Columns []string // [a-z0-9_]+
}

// disk is the Store in one SQLite file. One connection writes; a pool of others
// reads what was last committed, never waiting for the writer nor making it wait.
type disk struct {
	lock    io.Closer
	readers *sql.DB
	get     *sql.Stmt
	list    *sql.Stmt
	closed  atomic.Bool

	mu        sync.Mutex // protects the following; held for a whole commit
	db        *sql.DB    // of writer
	writer    *sql.Conn
	stmts     map[string]*sql.Stmt // of writer, by text
	unsettled bool                 // the last commit's outcome is unknown: see settle
}

var _ Store = (*disk)(nil)

// OpenSQLite opens the store in DIR/raid.db and makes it if need be, 0600. dir must
// exist on a local file system. It is taken with Lock until Close; the error wraps
// ErrLocked when another process has it. Staff may read the file with sqlite3 at any
// time: there is a view rows of everything, and the given views, which are made anew
// whenever they differ from those in the file.
func OpenSQLite(ctx context.Context, dir string, views ...View) (Store, error) {
	if err := refuseNetwork(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	lock, err := Lock(dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	d := &disk{lock: lock, stmts: map[string]*sql.Stmt{}}
	if err := d.open(ctx, filepath.Join(dir, "raid.db"), views); err != nil {
		d.Close()
		return nil, fmt.Errorf("open store %s: %w", dir, classify(err, false))
	}
	return d, nil
}

func (d *disk) open(ctx context.Context, path string, views []View) error {
	// fsync also writes the time stamps, through the journal: fdatasync halves a
	// commit and loses nothing. SQLite itself is built so by every distribution. An
	// error means that this system has no such call.
	_, _ = sqlite.Fdatasync(true)
	if err := makeFile(path); err != nil {
		return err
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if err := d.openWriter(ctx, path, views); err != nil {
		return err
	}
	return d.openReaders(ctx, path)
}

// makeFile makes the file before SQLite does, for the mode; the log and its index
// inherit it.
func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Chmod(0o600)
}

func (d *disk) openWriter(ctx context.Context, path string, views []View) (err error) {
	d.db, err = sql.Open("sqlite", dsn(path, url.Values{
		"_journal_mode": {"WAL"},
		"_synchronous":  {"FULL"},
		"_defensive":    {"1"},
		"_pragma": {
			"wal_autocheckpoint(1000)",     // pages
			"journal_size_limit(67108864)", // bytes the log is cut to after a checkpoint
			"cache_size(-65536)",           // KiB
		},
	}))
	if err != nil {
		return err
	}
	d.db.SetMaxOpenConns(1)
	if d.writer, err = d.db.Conn(ctx); err != nil {
		return err
	}
	var mode string
	if err := d.writer.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode); err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("no write-ahead log on this file system (journal mode %s)", mode)
	}
	if err := migrate(ctx, d.writer); err != nil {
		return err
	}
	return makeViews(ctx, d.writer, views)
}

func (d *disk) openReaders(ctx context.Context, path string) (err error) {
	d.readers, err = sql.Open("sqlite", dsn(path, url.Values{"mode": {"ro"}, "_query_only": {"1"}}))
	if err != nil {
		return err
	}
	n := max(4, runtime.NumCPU())
	d.readers.SetMaxOpenConns(n)
	d.readers.SetMaxIdleConns(n)
	d.get, err = d.readers.PrepareContext(ctx, "SELECT value FROM row WHERE tbl = ? AND key = ?")
	if err != nil {
		return err
	}
	d.list, err = d.readers.PrepareContext(ctx, `SELECT tbl, key, value FROM list CROSS JOIN row USING (tbl, key)
		WHERE name = ? AND score <= ? ORDER BY score DESC, tbl DESC, key DESC LIMIT ?`)
	return err
}

func dsn(path string, q url.Values) string {
	q.Set("_busy_timeout", "5000") // ms; only staff with a shell can be in the way
	q.Set("_dqs", "0")
	u := url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}
	return u.String()
}

// Load implements [Store].
func (d *disk) Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	rev, err := d.load(ctx, tables, fn)
	if err != nil {
		return 0, fmt.Errorf("load: %w", d.reading(err))
	}
	return rev, nil
}

func (d *disk) load(ctx context.Context, tables []string, fn func(queue.Row) error) (rev Rev, err error) {
	if err := d.settled(ctx); err != nil {
		return 0, err
	}
	tx, err := d.readers.BeginTx(ctx, nil) // one snapshot of all tables
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	if err := tx.QueryRowContext(ctx, "SELECT rev FROM meta").Scan(&rev); err != nil {
		return 0, err
	}
	for _, table := range tables {
		if err := loadTable(ctx, tx, table, fn); err != nil {
			return 0, fmt.Errorf("table %s: %w", table, err)
		}
	}
	return rev, nil
}

func loadTable(ctx context.Context, tx *sql.Tx, table string, fn func(queue.Row) error) error {
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
		if err := fn(present(r)); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Commit implements [Store].
func (d *disk) Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.settleLocked(ctx); err != nil {
		return 0, fmt.Errorf("commit: %w", err)
	}
	// Interrupted halfway through its COMMIT, nobody could say what became of it.
	ctx = context.WithoutCancel(ctx)
	if err := d.transactLocked(ctx, func() error { return d.applyLocked(ctx, prev, writes) }); err != nil {
		return 0, fmt.Errorf("commit on revision %d: %w", prev, err)
	}
	return prev + 1, nil
}

// transactLocked runs fn in a transaction. What it returns is classified.
func (d *disk) transactLocked(ctx context.Context, fn func() error) error {
	if _, err := d.execLocked(ctx, "BEGIN IMMEDIATE"); err != nil {
		return classify(err, false)
	}
	if err := fn(); err != nil {
		d.rollbackLocked(ctx)
		return classify(err, false)
	}
	if _, err := d.execLocked(ctx, "COMMIT"); err != nil {
		d.rollbackLocked(ctx)
		err = classify(err, true)
		d.unsettled = errors.Is(err, ErrAmbiguous)
		return err
	}
	return nil
}

// rollbackLocked ends a transaction that failed. Its own error says only that
// SQLite had done so itself, as it does for a full disk.
func (d *disk) rollbackLocked(ctx context.Context) {
	_, _ = d.execLocked(ctx, "ROLLBACK")
}

func (d *disk) applyLocked(ctx context.Context, prev Rev, writes []queue.Write) error {
	res, err := d.execLocked(ctx, "UPDATE meta SET rev = rev + 1 WHERE rev = ?", int64(prev))
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n != 1 {
		return errors.Join(ErrConflict, err)
	}
	for _, w := range writes {
		if err := d.writeLocked(ctx, w); err != nil {
			return fmt.Errorf("%s %q: %w", w.Table, w.Key, err)
		}
	}
	return nil
}

func (d *disk) writeLocked(ctx context.Context, w queue.Write) error {
	table, key := []byte(w.Table), []byte(w.Key)
	if w.Value == nil {
		w.Lists = nil
		if _, err := d.execLocked(ctx, "DELETE FROM row WHERE tbl = ? AND key = ?", table, key); err != nil {
			return err
		}
	} else if _, err := d.execLocked(ctx, `INSERT INTO row (tbl, key, value) VALUES (?, ?, ifnull(?, x''))
		ON CONFLICT DO UPDATE SET value = excluded.value`, table, key, w.Value); err != nil {
		return err
	}
	return d.enlistLocked(ctx, table, key, w)
}

// enlistLocked makes w.Lists the lists of a row. It touches no page when they are so
// already, which is the common case: a job changes often, its place in history never.
func (d *disk) enlistLocked(ctx context.Context, table, key []byte, w queue.Write) error {
	if len(w.Lists) == 0 {
		_, err := d.execLocked(ctx, "DELETE FROM list WHERE tbl = ?1 AND key = ?2", table, key)
		return err
	}
	leave, enter := listSQL(len(w.Lists))
	args := []any{table, key, w.Score}
	for _, name := range w.Lists {
		args = append(args, []byte(name))
	}
	if _, err := d.execLocked(ctx, leave, args...); err != nil {
		return err
	}
	_, err := d.execLocked(ctx, enter, args...)
	return err
}

// listSQL returns the statements that take a row, ?1 and ?2, out of all lists but n
// named ones, ?4 and on, with score ?3, and that put it into these.
func listSQL(n int) (leave, enter string) {
	var names, values strings.Builder
	for i := range n {
		fmt.Fprintf(&names, ", ?%d", 4+i)
		fmt.Fprintf(&values, ", (?%d, ?3, ?1, ?2)", 4+i)
	}
	leave = "DELETE FROM list WHERE tbl = ?1 AND key = ?2 AND (score <> ?3 OR name NOT IN (" + names.String()[2:] + "))"
	enter = "INSERT OR IGNORE INTO list (name, score, tbl, key) VALUES " + values.String()[2:]
	return leave, enter
}

// execLocked runs a statement on the writer, prepared at its first use.
func (d *disk) execLocked(ctx context.Context, text string, args ...any) (sql.Result, error) {
	s := d.stmts[text]
	if s == nil {
		var err error
		if s, err = d.writer.PrepareContext(ctx, text); err != nil {
			return nil, err
		}
		d.stmts[text] = s
	}
	return s.ExecContext(ctx, args...)
}

// Get implements [Store].
func (d *disk) Get(ctx context.Context, table, key string) ([]byte, error) {
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
	found, err := d.query(ctx, list, before, n)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", list, d.reading(err))
	}
	return found, nil
}

func (d *disk) query(ctx context.Context, list string, before int64, n int) (found []queue.Row, err error) {
	if before == math.MinInt64 {
		return nil, nil
	}
	last := before - 1
	if before == 0 {
		last = math.MaxInt64
	}
	rows, err := d.list.QueryContext(ctx, []byte(list), last, max(n, 0)) // a negative LIMIT is none
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var r queue.Row
		if err := rows.Scan(&r.Table, &r.Key, &r.Value); err != nil {
			return nil, err
		}
		found = append(found, present(r))
	}
	return found, rows.Err()
}

// present gives an empty value back as empty: the driver makes nil of it, and nil
// written back would delete the row.
func present(r queue.Row) queue.Row {
	if r.Value == nil {
		r.Value = []byte{}
	}
	return r
}

// Close implements [Store]. It waits for a commit under way. The readers go first:
// the last connection, which must be able to write, empties the log into the file.
func (d *disk) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	if d.readers != nil {
		errs = append(errs, d.readers.Close())
	}
	for _, s := range d.stmts {
		errs = append(errs, s.Close())
	}
	if d.writer != nil {
		errs = append(errs, d.writer.Close())
	}
	if d.db != nil {
		errs = append(errs, d.db.Close())
	}
	if err := errors.Join(append(errs, d.lock.Close())...); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// settled makes sure that what readers see is what a restart would find.
func (d *disk) settled(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.settleLocked(ctx)
}

// settleLocked makes an unknown outcome known. When the sync of a COMMIT failed,
// SQLite has taken the transaction back in memory, but its frames stand in the log
// behind the last good ones, and a recovery after a crash would find them whole and
// apply them. The next transaction overwrites them, so one is made that changes
// nothing anybody reads: after it, what was taken back stays so.
func (d *disk) settleLocked(ctx context.Context) error {
	if d.closed.Load() {
		return ErrClosed
	}
	if err := context.Cause(ctx); err != nil || !d.unsettled {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	err := d.transactLocked(ctx, func() error {
		_, err := d.execLocked(ctx, "UPDATE meta SET settled = settled + 1")
		return err
	})
	d.unsettled = err != nil
	if err != nil {
		return fmt.Errorf("%w: settle the last commit: %v", ErrUnavailable, err)
	}
	return nil
}

// reading classifies the error of a read, which a Close may have caused.
func (d *disk) reading(err error) error {
	if d.closed.Load() {
		return ErrClosed
	}
	return classify(err, false)
}

// classify wraps an error of SQLite in the one of this package that tells what
// became of the batch. committing says that COMMIT returned it. Other errors, those
// of this package among them, pass.
//
// A COMMIT that could not write its frames left no commit frame to recover: nothing
// changed. Whatever else fails in it fails after them.
func classify(err error, committing bool) error {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return err
	}
	unchanged, passing := !committing, false
	switch e.Code() & 0xff {
	case codes.SQLITE_FULL, codes.SQLITE_BUSY:
		unchanged, passing = true, true
	case codes.SQLITE_IOERR:
		unchanged, passing = unchanged || e.Code() == codes.SQLITE_IOERR_WRITE, true
	case codes.SQLITE_LOCKED, codes.SQLITE_NOMEM, codes.SQLITE_READONLY, codes.SQLITE_CANTOPEN, codes.SQLITE_PROTOCOL:
		passing = true
	}
	switch {
	case !unchanged:
		return fmt.Errorf("%w: %w", ErrAmbiguous, err)
	case passing:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}
