package store

import (
	"context"
	"database/sql"
	"encoding/binary"
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
			"page_size(8192)",              // bytes, of a new file: a record of a job fits well; 4096 is a fifth slower
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
	newest, err := d.changedLocked(ctx, "UPDATE meta SET rev = rev + 1 WHERE rev = ?", int64(prev))
	if err != nil {
		return err
	}
	if !newest {
		return ErrConflict
	}
	for _, w := range writes {
		if err := d.writeLocked(ctx, w); err != nil {
			return fmt.Errorf("%s %q: %w", w.Table, w.Key, err)
		}
	}
	return nil
}

// The statements of a write: ?1 table, ?2 key, ?3 value, ?4 places.
const (
	updateSQL = "UPDATE row SET value = ifnull(?3, x'') WHERE tbl = ?1 AND key = ?2 AND places = ifnull(?4, x'')"
	insertSQL = "INSERT INTO row (tbl, key, value, places) VALUES (?1, ?2, ifnull(?3, x''), ifnull(?4, x'')) ON CONFLICT DO NOTHING"
	moveSQL   = "UPDATE row SET value = ifnull(?3, x''), places = ifnull(?4, x'') WHERE tbl = ?1 AND key = ?2"
	deleteSQL = "DELETE FROM row WHERE tbl = ?1 AND key = ?2"
	leaveSQL  = "DELETE FROM list WHERE tbl = ?1 AND key = ?2"
)

// writeLocked applies one write. A row that exists and stays in its lists takes one
// statement and touches no page of a list: that is the common case, as a job changes
// often and its place in history never.
func (d *disk) writeLocked(ctx context.Context, w queue.Write) error {
	if w.Value == nil {
		return d.execAllLocked(ctx, []string{deleteSQL, leaveSQL}, []byte(w.Table), []byte(w.Key))
	}
	args := []any{[]byte(w.Table), []byte(w.Key), w.Value, places(w)}
	if stays, err := d.changedLocked(ctx, updateSQL, args...); err != nil || stays {
		return err
	}
	isNew, err := d.changedLocked(ctx, insertSQL, args...)
	if err != nil {
		return err
	}
	if !isNew {
		if err := d.execAllLocked(ctx, []string{moveSQL}, args...); err != nil {
			return err
		}
		if err := d.execAllLocked(ctx, []string{leaveSQL}, args[:2]...); err != nil {
			return err
		}
	}
	return d.enterLocked(ctx, w)
}

// enterLocked puts a row that stands in no list into those of w.
func (d *disk) enterLocked(ctx context.Context, w queue.Write) error {
	if len(w.Lists) == 0 {
		return nil
	}
	var text strings.Builder
	text.WriteString("INSERT OR IGNORE INTO list (tbl, key, score, name) VALUES ")
	args := []any{[]byte(w.Table), []byte(w.Key), w.Score}
	for i, name := range w.Lists {
		if i > 0 {
			text.WriteString(", ")
		}
		fmt.Fprintf(&text, "(?1, ?2, ?3, ?%d)", 4+i)
		args = append(args, []byte(name))
	}
	_, err := d.execLocked(ctx, text.String(), args...)
	return err
}

// places encodes the lists a row stands in, for comparison.
func places(w queue.Write) []byte {
	if len(w.Lists) == 0 {
		return []byte{}
	}
	b := binary.AppendVarint(nil, w.Score)
	for _, name := range w.Lists {
		b = append(binary.AppendUvarint(b, uint64(len(name))), name...)
	}
	return b
}

// changedLocked runs a statement and tells whether it changed a row.
func (d *disk) changedLocked(ctx context.Context, text string, args ...any) (bool, error) {
	res, err := d.execLocked(ctx, text, args...)
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	return n > 0, err
}

func (d *disk) execAllLocked(ctx context.Context, texts []string, args ...any) error {
	for _, text := range texts {
		if _, err := d.execLocked(ctx, text, args...); err != nil {
			return err
		}
	}
	return nil
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
func classify(err error, committing bool) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		if v := verdict(e.Code(), committing); v != nil {
			return fmt.Errorf("%w: %w", v, err)
		}
	}
	return err
}

// verdict returns ErrAmbiguous, ErrUnavailable, or nil for what changed nothing and
// will not pass by itself.
//
// A COMMIT that could not write its frames left no commit frame to recover: nothing
// changed. Whatever else fails in it may fail after them. The checkpoint that follows
// it cannot fail it: SQLite ignores its outcome.
func verdict(code int, committing bool) error {
	switch code & 0xff {
	case codes.SQLITE_FULL, codes.SQLITE_BUSY:
		return ErrUnavailable
	case codes.SQLITE_IOERR:
		if committing && code != codes.SQLITE_IOERR_WRITE {
			return ErrAmbiguous
		}
		return ErrUnavailable
	}
	if committing {
		return ErrAmbiguous
	}
	switch code & 0xff {
	case codes.SQLITE_LOCKED, codes.SQLITE_NOMEM, codes.SQLITE_READONLY, codes.SQLITE_CANTOPEN, codes.SQLITE_PROTOCOL:
		return ErrUnavailable
	}
	return nil
}
