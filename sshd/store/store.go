// Package store keeps what the queue decided: rows in tables, changed in batches
// that are atomic, durable and fenced by a revision.
//
// A store knows nothing of jobs. It promises three things, held for every backend
// by one suite (package storetest): a batch happens wholly or not at all; when
// Commit returns nil the batch survives a power cut; and a commit against another
// revision than the newest changes nothing and says so. Non-goals: scheduling,
// queries a list cannot answer, and more than one writer at a time.
//
// There is [NewMemory] for tests, whose rows outlive a Close so that a test can
// restart what it tests, [OpenSQLite], the default, and [OpenRedis], for several raids
// of one deployment: there is also who leads them, and where they are. [Fault] wraps any
// and fails on demand. Tables, keys, list names and values are plain bytes: nothing
// in them is special, and order is always the order of bytes.
package store

import (
	"context"
	"errors"

	"github.com/rai-project/raid/sshd/queue"
)

// Errors that Commit returns, wrapped.
var (
	// ErrConflict: somebody else committed since prev; nothing was changed.
	ErrConflict = errors.New("store: revision conflict")
	// ErrUnavailable: nothing was changed and it may work later (disk full, say).
	ErrUnavailable = errors.New("store: unavailable")
	// ErrAmbiguous: the batch may have been applied; load again to find out.
	ErrAmbiguous = errors.New("store: outcome unknown")
)

// ErrNotFound is returned by Get for a row that is not there.
var ErrNotFound = errors.New("store: no such row")

// ErrLocked is returned when another process has the store open.
var ErrLocked = errors.New("store: in use by another process")

// ErrClosed is returned by every method but Close once Close was called.
var ErrClosed = errors.New("store: closed")

// A Rev counts the commits of a store.
type Rev uint64

// A Store keeps rows. Reads are safe for concurrent use with each other and with
// one Commit at a time.
type Store interface {
	// Load calls fn with every row of the named tables, ordered by table (as named)
	// and key, and returns the revision they belong to. fn keeps the row.
	Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error)
	// Commit applies writes in order if the newest revision is prev, and returns
	// the new one. It returns after the batch is durable. The revision grows by one,
	// for an empty batch too; a new store stands at 0. Commit keeps nothing of writes.
	// ctx is heeded until the batch begins; a batch that has begun is finished.
	Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error)
	// Get returns one row's value, or ErrNotFound.
	Get(ctx context.Context, table, key string) ([]byte, error)
	// List returns at most n rows of a list, highest score first, whose score is
	// below before (0: no bound). Rows of one score come by table, then key, both
	// descending.
	List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error)
	// Ascend returns at most n rows of a list, lowest score first, whose score is above
	// after. Rows of one score come by table, then key, both ascending.
	Ascend(ctx context.Context, list string, after int64, n int) ([]queue.Row, error)
	// Close releases the store. No other method may be called after it. A second
	// Close does nothing.
	Close() error
}

// CheckFolder returns an error if dir lies on a network file system, where SQLite cannot
// keep its promises.
func CheckFolder(dir string) error { return refuseNetwork(dir) }
