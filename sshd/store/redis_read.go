package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/sshd/queue"
)

// This file reads a store in Redis.
//
// Redis does one thing at a time, so a table is read in portions, or it would keep everybody
// waiting. Order is kept in a sorted set beside the rows: a portion begins where the one
// before ended, which means the same on any server, as the cursor of an HSCAN would not
// after a fail-over. What was committed in between is read again, as often as needed, with
// the help of the log; the last look brings all of it to one revision.

// The size of a portion. Bytes count after each fifty rows.
const (
	portionRows  = 1000
	portionBytes = 1 << 20
)

// loadTries is how often a Load begins anew because Redis forgot what changed meanwhile.
const loadTries = 5

// Load implements [Store].
func (r *Redis) Load(ctx context.Context, tables []string, fn func(queue.Row) error) (Rev, error) {
	if err := r.known(ctx); err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	for range loadTries {
		s, err := r.snapshot(ctx, tables)
		if err != nil {
			return 0, fmt.Errorf("load: %w", err)
		}
		if s == nil {
			continue
		}
		if err := r.StillWriter(ctx); err != nil {
			return 0, fmt.Errorf("load: %w", err)
		}
		for _, row := range s.ordered(tables) {
			if err := fn(row); err != nil {
				return 0, fmt.Errorf("load %s %q: %w", row.Table, row.Key, err)
			}
		}
		return s.rev()
	}
	return 0, fmt.Errorf("load: %w: rows change faster than they can be read", ErrUnavailable)
}

// known makes sure that the last commit's outcome is.
func (r *Redis) known(ctx context.Context) error {
	if r.open.Load() == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.usable(ctx); err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	if _, err := r.settleLocked(short); err != nil {
		return unsettled(err)
	}
	return nil
}

// StillWriter returns ErrConflict if this handle was the writer and somebody else has
// claimed since: what it would load is not its own work.
func (r *Redis) StillWriter(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.epoch == "" {
		return nil
	}
	epoch, err := r.get(ctx, func(ctx context.Context) ([]byte, error) { return r.client.HGet(ctx, r.space.meta(), "epoch").Bytes() })
	if err != nil && !errors.Is(err, redis.Nil) {
		return err
	}
	if string(epoch) != r.epoch {
		return fmt.Errorf("%w: another writer has claimed the store", ErrConflict)
	}
	return nil
}

// A mark is a revision, and what tells it from the same number of another history.
type mark struct{ rev, nonce string }

// A snapshot is rows as they were at a mark or later.
type snapshot struct {
	mark
	tables  map[string][]queue.Row // in order, as first read
	changed map[rowID]queue.Row    // read again; without a value: gone
}

// snapshot reads tables, or returns nil if it has to begin anew.
func (r *Redis) snapshot(ctx context.Context, tables []string) (*snapshot, error) {
	s := &snapshot{tables: map[string][]queue.Row{}, changed: map[rowID]queue.Row{}}
	newest, err := r.firstLook(ctx, s, tables)
	if err != nil {
		return nil, err
	}
	for s.mark != newest {
		before := s.mark
		rev, err := r.lookAgain(ctx, s)
		if err != nil || s.mark.rev == "" {
			return nil, err
		}
		if s.mark.rev == rev {
			break
		}
		if s.mark == before { // the log does not go as far as the revision
			return nil, nil
		}
	}
	return s, nil
}

// firstLook reads every table once. It returns the mark of the last portion; s has that of
// the first.
func (r *Redis) firstLook(ctx context.Context, s *snapshot, tables []string) (last mark, err error) {
	if len(tables) == 0 {
		tables = []string{""} // for the revision
	}
	for _, table := range tables {
		if s.tables[table] != nil {
			continue
		}
		rows := []queue.Row{}
		for from, more := "-", true; more; {
			out, err := r.read(ctx, loadScript, []string{r.space.meta(), r.space.key(table), r.space.row(table)},
				from, portionRows, portionBytes)
			if err != nil {
				return last, fmt.Errorf("table %s: %w", table, err)
			}
			last = mark{text(out[0]), text(out[1])}
			if s.mark == (mark{}) {
				s.mark = last
			}
			more = text(out[2]) == "1"
			for i := 3; i+1 < len(out); i += 2 {
				from = "(" + text(out[i])
				if v, ok := out[i+1].(string); ok {
					rows = append(rows, queue.Row{Table: table, Key: text(out[i]), Value: []byte(v)})
				}
			}
		}
		s.tables[table] = rows
	}
	return last, nil
}

// lookAgain reads what changed since s's mark, which it moves on, and returns the newest
// revision. The mark has none if that cannot be known.
func (r *Redis) lookAgain(ctx context.Context, s *snapshot) (rev string, err error) {
	keys, args := []string{r.space.meta(), r.space.log()}, []any{s.mark.rev, s.mark.nonce}
	for table := range s.tables {
		keys, args = append(keys, r.space.row(table)), append(args, table)
	}
	out, err := r.read(ctx, sinceScript, keys, args...)
	if err != nil {
		return "", err
	}
	if s.mark.rev = text(out[0]); s.mark.rev == "" {
		return "", nil
	}
	s.mark.nonce = text(out[1])
	for i := 3; i+2 < len(out); i += 3 {
		row := queue.Row{Table: text(out[i]), Key: text(out[i+1])}
		if v, ok := out[i+2].(string); ok {
			row.Value = []byte(v)
		}
		s.changed[rowID{row.Table, row.Key}] = row
	}
	return text(out[2]), nil
}

// ordered returns the rows of the named tables as they are after all looks.
func (s *snapshot) ordered(tables []string) []queue.Row {
	if len(tables) == 1 && len(s.changed) == 0 {
		return s.tables[tables[0]]
	}
	var all []queue.Row
	for _, table := range tables {
		begin := len(all)
		for _, row := range s.tables[table] {
			if _, again := s.changed[rowID{table, row.Key}]; !again {
				all = append(all, row)
			}
		}
		for id, row := range s.changed {
			if id.table == table && row.Value != nil {
				all = append(all, row)
			}
		}
		if len(s.changed) > 0 {
			slices.SortFunc(all[begin:], func(a, b queue.Row) int { return strings.Compare(a.Key, b.Key) })
		}
	}
	return all
}

// rev returns the revision.
func (s *snapshot) rev() (Rev, error) {
	n, err := strconv.ParseUint(s.mark.rev, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("load: the revision in redis is %q", s.mark.rev)
	}
	return Rev(n), nil
}

// Get implements [Store].
func (r *Redis) Get(ctx context.Context, table, key string) ([]byte, error) {
	v, err := r.get(ctx, func(ctx context.Context) ([]byte, error) { return r.client.HGet(ctx, r.space.row(table), key).Bytes() })
	if errors.Is(err, redis.Nil) {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get %s %q: %w", table, key, err)
	}
	if v == nil {
		v = []byte{}
	}
	return v, nil
}

// get runs a command that reads, bounded by opTime; redis.Nil passes.
func (r *Redis) get(ctx context.Context, call func(context.Context) ([]byte, error)) ([]byte, error) {
	if err := r.usable(ctx); err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	v, err := call(short)
	if err != nil && !errors.Is(err, redis.Nil) {
		err = r.failed(ctx, err)
	}
	return v, err
}

// List implements [Store]. Beyond the first thousand rows, or megabyte, it is no snapshot.
func (r *Redis) List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error) {
	from := "+"
	if before != 0 {
		from = "(" + scoreText(before)
	}
	rows, err := r.walk(ctx, list, "down", from, n)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", list, err)
	}
	return rows, nil
}

// Ascend implements [Store]. Beyond the first thousand rows, or megabyte, it is no snapshot.
func (r *Redis) Ascend(ctx context.Context, list string, after int64, n int) ([]queue.Row, error) {
	if after == math.MaxInt64 {
		n = 0
	}
	rows, err := r.walk(ctx, list, "up", "["+scoreText(after+1), n)
	if err != nil {
		return nil, fmt.Errorf("ascend %s: %w", list, err)
	}
	return rows, nil
}

// walk reads a list in portions.
func (r *Redis) walk(ctx context.Context, list, way, from string, n int) (rows []queue.Row, err error) {
	if n <= 0 {
		return nil, r.usable(ctx)
	}
	for more := true; more && len(rows) < n; {
		out, err := r.read(ctx, listScript, []string{r.space.list(list)}, r.space.row(""), way, from,
			min(n-len(rows), portionRows), portionBytes)
		if err != nil {
			return nil, err
		}
		more = text(out[0]) == "1"
		for i := 1; i+1 < len(out); i += 2 {
			place := text(out[i])
			from = "(" + place
			table, key, ok := parsePlace(place)
			v, there := out[i+1].(string)
			if ok && there {
				rows = append(rows, queue.Row{Table: table, Key: key, Value: []byte(v)})
			}
		}
		more = more || len(out)/2 == portionRows
	}
	return rows, nil
}

// awaitSlice is how long Redis is asked to wait for something: an end of ctx is seen then.
const awaitSlice = 500 * time.Millisecond

// Await returns the newest revision as soon as it is above after. Who reads without
// writing learns so that there is something new. ErrUnavailable when Redis is away.
func (r *Redis) Await(ctx context.Context, after Rev) (Rev, error) {
	for {
		v, err := r.get(ctx, func(ctx context.Context) ([]byte, error) { return r.client.HGet(ctx, r.space.meta(), "rev").Bytes() })
		if err != nil && !errors.Is(err, redis.Nil) {
			return 0, fmt.Errorf("await: %w", err)
		}
		if rev, _ := strconv.ParseUint(string(v), 10, 64); Rev(rev) > after {
			return Rev(rev), nil
		}
		if err := r.ring(ctx, r.space.log(), strconv.FormatUint(uint64(after), 10)+"-0", awaitSlice); err != nil {
			return 0, fmt.Errorf("await: %w", err)
		}
	}
}

// ring waits until there is something in a stream after an entry, for a while at most.
func (r *Redis) ring(ctx context.Context, stream, after string, d time.Duration) error {
	_, err := r.get(ctx, func(ctx context.Context) ([]byte, error) {
		return nil, r.client.XRead(ctx, &redis.XReadArgs{Streams: []string{stream, after}, Count: 1, Block: max(d, time.Millisecond)}).Err()
	})
	if errors.Is(err, redis.Nil) {
		return nil
	}
	return err
}
