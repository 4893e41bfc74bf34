package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
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
//
// A commit is one row of the table log, so that it costs one statement and the pages
// of its own bytes, however many rows it changes, wherever they stand. The rows
// follow in bulk when there is a quiet moment, or a good many have come together, the
// newest state of each once. Until then the tail knows them, and readers look there
// first. After a crash the tail is read from the log again.
type disk struct {
	lock    io.Closer
	logf    func(format string, args ...any)
	tail    tail
	wake    chan struct{} // holds a word while the tail has grown
	stop    chan struct{} // closed by Close
	folding sync.WaitGroup
	readers *sql.DB
	get     *sql.Stmt
	list    *sql.Stmt
	ascend  *sql.Stmt
	closed  atomic.Bool

	mu        sync.Mutex // protects the following; held for a whole commit
	db        *sql.DB    // of writer
	writer    *sql.Conn
	stmts     map[string]*sql.Stmt // of writer, by text
	unsettled bool                 // the last commit's outcome is unknown: see settle
	rev       Rev
}

var _ Store = (*disk)(nil)

// OpenSQLite opens the store in DIR/raid.db and makes it if need be, 0600. dir must
// exist on a local file system. It is taken with Lock until Close; the error wraps
// ErrLocked when another process has it. Staff may read the file with sqlite3 at any
// time, and see what was committed up to a second ago: there is a view rows of
// everything, and the given views, which are made anew whenever they differ from those
// in the file. logf, which may be nil, hears of troubles that cost nothing yet.
func OpenSQLite(ctx context.Context, dir string, logf func(format string, args ...any), views ...View) (Store, error) {
	if err := refuseNetwork(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	lock, err := Lock(dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if logf == nil {
		logf = func(string, ...any) {}
	}
	d := &disk{lock: lock, logf: logf, wake: make(chan struct{}, 1), stop: make(chan struct{}), stmts: map[string]*sql.Stmt{}}
	if err := d.open(ctx, filepath.Join(dir, "raid.db"), views); err != nil {
		d.Close()
		return nil, fmt.Errorf("open store %s: %w", dir, classify(err, false))
	}
	d.folding.Go(d.keepFolding)
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
	if err := d.readLog(ctx); err != nil {
		return err
	}
	return d.openReaders(ctx, path)
}

// readLog takes back what was committed and not folded.
func (d *disk) readLog(ctx context.Context) error {
	if err := d.writer.QueryRowContext(ctx, "SELECT rev FROM meta").Scan(&d.rev); err != nil {
		return err
	}
	rows, err := d.writer.QueryContext(ctx, "SELECT rev, batch FROM log ORDER BY rev")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var b []byte
		if err := rows.Scan(&d.rev, &b); err != nil {
			return err
		}
		writes, err := parseBatch(b)
		if err != nil {
			return err
		}
		d.tail.add(writes, len(b))
	}
	return rows.Err()
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
	d.list, err = d.readers.PrepareContext(ctx, `SELECT tbl, key, score, value FROM list CROSS JOIN row USING (tbl, key)
		WHERE name = ? AND score <= ? ORDER BY score DESC, tbl DESC, key DESC`)
	if err != nil {
		return err
	}
	d.ascend, err = d.readers.PrepareContext(ctx, `SELECT tbl, key, score, value FROM list CROSS JOIN row USING (tbl, key)
		WHERE name = ? AND score > ? ORDER BY score, tbl, key`)
	return err
}

func dsn(path string, q url.Values) string {
	q.Set("_busy_timeout", "5000") // ms; only staff with a shell can be in the way
	q.Set("_dqs", "0")
	u := url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}
	return u.String()
}

// Commit implements [Store].
func (d *disk) Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.usableLocked(ctx); err != nil {
		return 0, fmt.Errorf("commit: %w", err)
	}
	if prev != d.rev {
		return 0, fmt.Errorf("commit on revision %d: %w", prev, ErrConflict)
	}
	if _, bytes := d.tail.size(); bytes > mostBytes {
		return 0, fmt.Errorf("commit: %w: the log of raid.db has %d MiB that its rows could not follow", ErrUnavailable, bytes>>20)
	}
	batch := appendBatch([]byte{}, writes)
	kept, err := parseBatch(batch) // of our own bytes: nothing of writes is kept
	if err != nil {
		return 0, fmt.Errorf("commit on revision %d: %w", prev, err)
	}
	// Interrupted halfway through its COMMIT, nobody could say what became of it.
	ctx = context.WithoutCancel(ctx)
	err = d.transactLocked(ctx, func() error {
		_, err := d.execLocked(ctx, "INSERT INTO log (rev, batch) VALUES (?, ?)", int64(prev+1), batch)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("commit on revision %d: %w", prev, err)
	}
	d.rev++
	d.tail.add(kept, len(batch))
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return d.rev, nil
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

// changedLocked runs a statement and tells whether it changed a row.
func (d *disk) changedLocked(ctx context.Context, text string, args ...any) (bool, error) {
	res, err := d.execLocked(ctx, text, args...)
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	return n > 0, err
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

// Close implements [Store]. It waits for a commit under way. The readers go first:
// the last connection, which must be able to write, empties the log into the file.
func (d *disk) Close() error {
	d.mu.Lock()
	was := d.closed.Swap(true)
	d.mu.Unlock()
	if was {
		return nil
	}
	close(d.stop)
	d.folding.Wait()
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

// usableLocked makes sure that what readers see is what a restart would find.
func (d *disk) usableLocked(ctx context.Context) error {
	if d.closed.Load() {
		return ErrClosed
	}
	return d.settleLocked(ctx)
}

// settleLocked makes an unknown outcome known. When the sync of a COMMIT failed,
// SQLite has taken the transaction back in memory, but its frames stand in the log
// behind the last good ones, and a recovery after a crash would find them whole and
// apply them. The next transaction overwrites them, so one is made that changes
// nothing anybody reads: after it, what was taken back stays so.
func (d *disk) settleLocked(ctx context.Context) error {
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
