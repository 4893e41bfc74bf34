package store

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/rai-project/raid/sshd/queue"
)

// Memory is a Store without a disk. It keeps every promise but durability, and of
// that it keeps what a test needs: Close ends one handle, Reopen gives the next.
type Memory struct {
	rows   *memory
	closed bool // guarded by rows.mu
}

// memory is what all handles of one store share.
type memory struct {
	mu     sync.RWMutex // protects the following, and the closed of each handle
	rev    Rev
	tables map[string]map[string]memoryRow
	lists  map[string][]entry // each ascending, so that a new best is an append
}

type memoryRow struct {
	value []byte
	lists []string
	score int64
}

// An entry is one row's place in one list.
type entry struct {
	score      int64
	table, key string
}

// compare orders entries from the last of a List to its first.
func (e entry) compare(f entry) int {
	return cmp.Or(cmp.Compare(e.score, f.score), strings.Compare(e.table, f.table), strings.Compare(e.key, f.key))
}

var _ Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{rows: &memory{tables: map[string]map[string]memoryRow{}, lists: map[string][]entry{}}}
}

// Reopen returns an open handle of the same rows, as a restart would find them.
func (m *Memory) Reopen() *Memory { return &Memory{rows: m.rows} }

// Load implements [Store]. fn may call the store: it runs on a snapshot.
func (m *Memory) Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	rows, rev, err := m.snapshot(ctx, tables)
	if err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	for _, r := range rows {
		if err := fn(r); err != nil {
			return 0, fmt.Errorf("load %s %q: %w", r.Table, r.Key, err)
		}
	}
	return rev, nil
}

func (m *Memory) snapshot(ctx context.Context, tables []string) (rows []queue.Row, rev Rev, err error) {
	m.rows.mu.RLock()
	defer m.rows.mu.RUnlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, 0, err
	}
	for _, name := range tables {
		for _, key := range slices.Sorted(maps.Keys(m.rows.tables[name])) {
			rows = append(rows, m.rows.rowLocked(name, key))
		}
	}
	return rows, m.rows.rev, nil
}

// Commit implements [Store].
func (m *Memory) Commit(ctx context.Context, prev Rev, writes []queue.Write) (Rev, error) {
	m.rows.mu.Lock()
	defer m.rows.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return 0, fmt.Errorf("commit: %w", err)
	}
	if m.rows.rev != prev {
		return 0, fmt.Errorf("commit on revision %d: %w", prev, ErrConflict)
	}
	for _, w := range writes {
		if _, had := m.rows.tables[w.Table][w.Key]; had && w.New {
			panic(fmt.Sprintf("store: %s %q is not new", w.Table, w.Key)) // our own mistake
		}
		m.rows.applyLocked(w)
	}
	m.rows.rev++
	return m.rows.rev, nil
}

// Get implements [Store].
func (m *Memory) Get(ctx context.Context, table, key string) ([]byte, error) {
	m.rows.mu.RLock()
	defer m.rows.mu.RUnlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, fmt.Errorf("get %s %q: %w", table, key, err)
	}
	r, ok := m.rows.tables[table][key]
	if !ok {
		return nil, fmt.Errorf("get %s %q: %w", table, key, ErrNotFound)
	}
	return clone(r.value), nil
}

// List implements [Store].
func (m *Memory) List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error) {
	m.rows.mu.RLock()
	defer m.rows.mu.RUnlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, fmt.Errorf("list %s: %w", list, err)
	}
	all := m.rows.lists[list]
	end := len(all)
	if before != 0 {
		end, _ = slices.BinarySearchFunc(all, before, func(e entry, s int64) int {
			return cmp.Or(cmp.Compare(e.score, s), 1) // the first of that score
		})
	}
	var rows []queue.Row
	for i := end - 1; i >= 0 && len(rows) < n; i-- {
		rows = append(rows, m.rows.rowLocked(all[i].table, all[i].key))
	}
	return rows, nil
}

// Ascend implements [Store].
func (m *Memory) Ascend(ctx context.Context, list string, after int64, n int) ([]queue.Row, error) {
	m.rows.mu.RLock()
	defer m.rows.mu.RUnlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, fmt.Errorf("ascend %s: %w", list, err)
	}
	all := m.rows.lists[list]
	first, _ := slices.BinarySearchFunc(all, after, func(e entry, s int64) int {
		return cmp.Or(cmp.Compare(e.score, s), -1) // behind the last of that score
	})
	var rows []queue.Row
	for i := first; i < len(all) && len(rows) < n; i++ {
		rows = append(rows, m.rows.rowLocked(all[i].table, all[i].key))
	}
	return rows, nil
}

// Close implements [Store].
func (m *Memory) Close() error {
	m.rows.mu.Lock()
	defer m.rows.mu.Unlock()
	m.closed = true
	return nil
}

func (m *Memory) usableLocked(ctx context.Context) error {
	if m.closed {
		return ErrClosed
	}
	return context.Cause(ctx)
}

func (m *memory) rowLocked(table, key string) queue.Row {
	return queue.Row{Table: table, Key: key, Value: clone(m.tables[table][key].value)}
}

func (m *memory) applyLocked(w queue.Write) {
	old, had := m.tables[w.Table][w.Key]
	for _, name := range old.lists {
		m.leaveLocked(name, entry{old.score, w.Table, w.Key})
	}
	if w.Value == nil {
		if had {
			delete(m.tables[w.Table], w.Key)
		}
		return
	}
	if m.tables[w.Table] == nil {
		m.tables[w.Table] = map[string]memoryRow{}
	}
	r := memoryRow{value: clone(w.Value), lists: slices.Clone(w.Lists), score: w.Score}
	for _, name := range r.lists {
		m.enterLocked(name, entry{w.Score, w.Table, w.Key})
	}
	m.tables[w.Table][w.Key] = r
}

func (m *memory) enterLocked(name string, e entry) {
	all := m.lists[name]
	if i, found := slices.BinarySearchFunc(all, e, entry.compare); !found {
		m.lists[name] = slices.Insert(all, i, e)
	}
}

func (m *memory) leaveLocked(name string, e entry) {
	all := m.lists[name]
	if i, found := slices.BinarySearchFunc(all, e, entry.compare); found {
		m.lists[name] = slices.Delete(all, i, i+1)
	}
}

// clone copies b and keeps an empty value apart from none: nil would delete.
func clone(b []byte) []byte { return append(make([]byte, 0, len(b)), b...) }
