package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// ErrNotEmpty: the store that was to be filled has rows.
var ErrNotEmpty = errors.New("it is not empty")

// A Count is how many rows of a table there are.
type Count struct {
	Table    string
	From, To int
}

// copyRows is how many rows are committed together.
const copyRows = 500

// Copy writes all rows of the tables from one store to another, an empty one, and then
// counts both. Nobody may write to either meanwhile. The last thing it writes is the row of
// queue.TableMeta; until then a mark tells that the store is filled by half, see Whole. told,
// which may be nil, hears how many rows were copied. The counts are returned with any error.
func Copy(ctx context.Context, from, to store.Store, tables []string, told func(rows int)) ([]Count, error) {
	counts := make([]Count, len(tables))
	if err := known(ctx, from, tables); err != nil {
		return counts, err
	}
	rev, err := count(ctx, to, tables, func(i int) { counts[i].To++ })
	if err != nil {
		return counts, fmt.Errorf("look at the target: %w", err)
	}
	for i, t := range tables {
		counts[i].Table = t
		if counts[i].To > 0 || Whole(ctx, to) != nil {
			return counts, fmt.Errorf("the target: %w", ErrNotEmpty)
		}
	}
	c := &copying{to: to, rev: rev, told: told, wait: []queue.Write{{Row: mark([]byte("{}"))}}, last: []queue.Write{{Row: mark(nil)}}}
	// One Load: its rows are of one moment.
	if _, err := from.Load(ctx, tables, func(r queue.Row) error { return c.add(ctx, r) }); err != nil {
		return counts, fmt.Errorf("copy: %w", err)
	}
	if err := c.finish(ctx); err != nil {
		return counts, fmt.Errorf("copy: %w", err)
	}
	return counts, compare(ctx, from, to, tables, counts)
}

// known returns an error for a store with rows that would not be copied, if it can tell.
func known(ctx context.Context, s store.Store, tables []string) error {
	l, ok := s.(store.Lister)
	if !ok {
		return nil
	}
	found, err := l.ListTables(ctx)
	for _, t := range found {
		if !slices.Contains(tables, t) && t != mark(nil).Table {
			return fmt.Errorf("the source has rows of %q, which this raid does not know: it is of a newer one", t)
		}
	}
	return err
}

// A copying is one Copy.
type copying struct {
	to   store.Store
	rev  store.Rev
	told func(int)
	wait []queue.Write // to be committed
	last []queue.Write // after all others
	n    int
}

func (c *copying) add(ctx context.Context, r queue.Row) error {
	w, err := queue.Again(r)
	switch {
	case err != nil:
		return err
	case r.Table == queue.TableMeta:
		c.last = append(c.last, w)
		return nil
	}
	if c.wait = append(c.wait, w); len(c.wait) < copyRows {
		return nil
	}
	return c.commit(ctx)
}

func (c *copying) finish(ctx context.Context) error {
	if err := c.commit(ctx); err != nil {
		return err
	}
	c.wait = c.last
	return c.commit(ctx)
}

func (c *copying) commit(ctx context.Context) error {
	rev, err := c.to.Commit(ctx, c.rev, c.wait)
	if err != nil {
		return err
	}
	c.n += len(c.wait)
	c.rev, c.wait = rev, c.wait[:0]
	if c.told != nil {
		c.told(c.n)
	}
	return nil
}

// compare counts both again, as they are now.
func compare(ctx context.Context, from, to store.Store, tables []string, counts []Count) error {
	for i := range counts {
		counts[i].From, counts[i].To = 0, 0
	}
	_, err := count(ctx, from, tables, func(i int) { counts[i].From++ })
	if err == nil {
		_, err = count(ctx, to, tables, func(i int) { counts[i].To++ })
	}
	if err != nil {
		return fmt.Errorf("count: %w", err)
	}
	for _, c := range counts {
		if c.From != c.To {
			return fmt.Errorf("table %s has %d rows in the source and %d in the target", c.Table, c.From, c.To)
		}
	}
	return sameHistory(ctx, from, to)
}

// count calls add with the index of each row's table.
func count(ctx context.Context, s store.Store, tables []string, add func(int)) (store.Rev, error) {
	index := map[string]int{}
	for i, t := range tables {
		index[t] = i
	}
	return s.Load(ctx, tables, func(r queue.Row) error {
		add(index[r.Table])
		return nil
	})
}

// sameHistory compares the list of all finished jobs, which is no table.
func sameHistory(ctx context.Context, from, to store.Store) error {
	const page = 1000
	for at := int64(0); ; {
		a, err := from.Ascend(ctx, queue.ListAll, at, page)
		if err != nil {
			return err
		}
		b, err := to.Ascend(ctx, queue.ListAll, at, page)
		if err != nil {
			return err
		}
		if len(a) != len(b) {
			return fmt.Errorf("history after job %d has %d jobs in the source and %d in the target", at, len(a), len(b))
		}
		for i := range a {
			if a[i].Key != b[i].Key || string(a[i].Value) != string(b[i].Value) {
				return fmt.Errorf("job %s in history differs", a[i].Key)
			}
		}
		if len(a) < page {
			return nil
		}
		w, err := queue.Again(a[len(a)-1])
		if err != nil {
			return err
		}
		at = w.Score
	}
}

// mark is the row of a store that is being filled.
func mark(value []byte) queue.Row {
	return queue.Row{Table: "copy", Key: "unfinished", Value: value}
}

// Whole returns an error for a store that Copy has filled by half.
func Whole(ctx context.Context, s store.Store) error {
	_, err := s.Get(ctx, mark(nil).Table, mark(nil).Key)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil
	case err == nil:
		err = errors.New("this store is filled by half: a migration into it did not end")
	}
	return err
}
