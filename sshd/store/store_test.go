package store_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		m := store.NewMemory()
		return func() (store.Store, error) { return m.Reopen(), nil }
	})
}

func TestSQLite(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		dir := t.TempDir()
		return func() (store.Store, error) { return store.OpenSQLite(context.Background(), dir, nil) }
	})
}

// TestSQLiteFolded: it makes no difference when rows follow the log.
func TestSQLiteFolded(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		dir := t.TempDir()
		return func() (store.Store, error) {
			s, err := store.OpenSQLite(context.Background(), dir, nil)
			return folding{s}, err
		}
	})
}

// folding brings the rows up to date before every third commit, so that about half of
// what is read stands in rows and the rest in the log.
type folding struct{ store.Store }

func (f folding) Commit(ctx context.Context, prev store.Rev, writes []queue.Write) (store.Rev, error) {
	if prev%3 == 0 {
		if err := store.Fold(f.Store); err != nil {
			return 0, err
		}
	}
	return f.Store.Commit(ctx, prev, writes)
}

// TestSQLiteKilled: nor does it make one whether a store was closed or its process killed.
func TestSQLiteKilled(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		dir := t.TempDir()
		return func() (store.Store, error) {
			s, err := store.OpenSQLite(context.Background(), dir, nil)
			k := &killed{Store: s, dir: dir, next: t.TempDir()}
			dir = k.next
			return k, err
		}
	})
}

// killed leaves to the next folder what a kill would have left, and not what Close does.
type killed struct {
	store.Store
	dir, next string
	once      sync.Once
	err       error
}

func (k *killed) Close() error {
	k.once.Do(func() { store.Still(k.Store, func() { k.err = os.CopyFS(k.next, os.DirFS(k.dir)) }) })
	return errors.Join(k.err, k.Store.Close())
}

// FuzzBatch: whatever stands in the log, it is read as it was written or refused.
func FuzzBatch(f *testing.F) {
	f.Add([]byte{})
	f.Add(store.AppendBatch(nil, []queue.Write{{Row: queue.Row{Table: "t", Key: "k", Value: []byte("v")}, Lists: []string{"a", "b"}, Score: -7},
		{Row: queue.Row{Table: "t", Key: "gone"}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		writes, err := store.ParseBatch(b)
		if err != nil {
			return
		}
		again, err := store.ParseBatch(store.AppendBatch(nil, writes))
		if err != nil || !reflect.DeepEqual(again, writes) {
			t.Errorf("ParseBatch(%q) = %v; written and read again: %v, %v", b, writes, again, err)
		}
	})
}

// FuzzPlace: a place in a list of Redis is read as it was written, and the order of places
// is that of scores, tables and keys.
func FuzzPlace(f *testing.F) {
	f.Add(int64(-1), "t", "k", int64(1)<<53, "t\x00", "")
	f.Add(int64(5), "t\x00\xff", "\x00\x00", int64(5), "t\x00", "\xff\x00")
	f.Add(int64(5), "a\x00b", "c", int64(5), "a", "\x00b\x00\x00c")
	f.Fuzz(func(t *testing.T, score int64, table, key string, score2 int64, table2, key2 string) {
		p, q := store.PlaceText(score, table, key), store.PlaceText(score2, table2, key2)
		if gotTable, gotKey, ok := store.ParsePlace(p); gotTable != table || gotKey != key || !ok {
			t.Errorf("ParsePlace(%q) = %q, %q, %v, want %q, %q", p, gotTable, gotKey, ok, table, key)
		}
		want := cmp.Or(cmp.Compare(score, score2), cmp.Compare(table, table2), cmp.Compare(key, key2))
		if got := strings.Compare(p, q); got != want {
			t.Errorf("%q and %q compare %d, want %d", p, q, got, want)
		}
	})
}

// A store whose plan fails nothing, and delays nothing for long, is a store.
func TestFaultless(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		m := store.NewMemory()
		return func() (store.Store, error) {
			s := store.Fault(m.Reopen(), func(store.Call) store.Failure { return store.Works })
			return store.Delay(s, func(store.Op) time.Duration { return 0 }), nil
		}
	})
}

func TestFault(t *testing.T) {
	tests := []struct {
		failure store.Failure
		want    error
		rev     store.Rev
	}{
		{store.Works, nil, 1},
		{store.Unavailable, store.ErrUnavailable, 0},
		{store.AmbiguousApplied, store.ErrAmbiguous, 1},
		{store.AmbiguousLost, store.ErrAmbiguous, 0},
	}
	none := func(queue.Row) error { return nil }
	for _, tt := range tests {
		s := store.Fault(store.NewMemory(), func(c store.Call) store.Failure {
			if c.Op == store.OpCommit && c.N == 1 || c.Op == store.OpLoad && c.N == 2 {
				return tt.failure
			}
			return store.Works
		})
		if _, err := s.Commit(t.Context(), 0, nil); !errors.Is(err, tt.want) {
			t.Errorf("failure %d: Commit = %v, want %v", tt.failure, err, tt.want)
		}
		if rev, err := s.Load(t.Context(), nil, none); rev != tt.rev || err != nil {
			t.Errorf("failure %d: Load = %d, %v, want %d", tt.failure, rev, err, tt.rev)
		}
		if _, err := s.Load(t.Context(), nil, none); (tt.failure != store.Works) != errors.Is(err, store.ErrUnavailable) {
			t.Errorf("failure %d: second Load = %v", tt.failure, err)
		}
		if _, err := s.Commit(t.Context(), tt.rev, nil); err != nil {
			t.Errorf("failure %d: second Commit = %v", tt.failure, err)
		}
	}
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := store.Delay(store.NewMemory(), func(op store.Op) time.Duration {
			if op == store.OpCommit {
				return time.Minute
			}
			return 0
		})
		began := time.Now()
		if _, err := s.Commit(t.Context(), 0, nil); err != nil || time.Since(began) != time.Minute {
			t.Errorf("Commit = %v after %v, want a minute", err, time.Since(began))
		}
		hurry, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Commit(hurry, 1, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Commit beyond its deadline = %v", err)
		}
		if rev, err := s.Load(t.Context(), nil, nil); rev != 1 || err != nil {
			t.Errorf("Load = %d, %v, want 1", rev, err)
		}
	})
}

// The benchmarks write what raid writes: records of 1.2 KB that stand in two lists.
func BenchmarkCommit1(b *testing.B)   { benchmark(b, 1) }
func BenchmarkCommit256(b *testing.B) { benchmark(b, 256) }

func benchmark(b *testing.B, n int) {
	b.Run("memory", func(b *testing.B) { benchmarkCommit(b, store.NewMemory(), n) })
	b.Run("sqlite", func(b *testing.B) {
		s, err := store.OpenSQLite(b.Context(), b.TempDir(), nil)
		if err != nil {
			b.Fatal(err)
		}
		benchmarkCommit(b, s, n)
	})
	for _, fsync := range []string{"everysec", "always"} {
		b.Run("redis/"+fsync, func(b *testing.B) {
			benchmarkCommit(b, startRedis(b, "--appendfsync", fsync).writer(newName()), n)
		})
	}
}

// BenchmarkLoad reads 100,000 rows of 1.2 KB.
func BenchmarkLoad(b *testing.B) {
	b.Run("sqlite", func(b *testing.B) {
		s, err := store.OpenSQLite(b.Context(), b.TempDir(), nil)
		if err != nil {
			b.Fatal(err)
		}
		benchmarkLoad(b, s)
	})
	b.Run("redis", func(b *testing.B) { benchmarkLoad(b, startRedis(b).writer(newName())) })
}

func benchmarkLoad(b *testing.B, s store.Store) {
	defer s.Close()
	value := make([]byte, 1200)
	const rows, part = 100_000, 1000
	for i := range store.Rev(rows / part) {
		var batch []queue.Write
		for j := range part {
			batch = append(batch, queue.Write{Row: queue.Row{Table: "job", Key: fmt.Sprintf("%016d", int(i)*part+j), Value: value}, New: true})
		}
		if _, err := s.Commit(b.Context(), i, batch); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		n := 0
		if _, err := s.Load(b.Context(), []string{"job"}, func(queue.Row) error { n++; return nil }); err != nil || n != rows {
			b.Fatalf("Load = %d rows, %v", n, err)
		}
	}
}

// benchmarkCommit writes each row three times, as a job that is queued, started and
// finished; it enters its lists with the first.
func benchmarkCommit(b *testing.B, s store.Store, n int) {
	defer s.Close()
	value := make([]byte, 1200)
	batch := make([]queue.Write, n)
	var rev store.Rev
	for b.Loop() {
		for i := range batch {
			id := (int(rev)/3)*n + i
			batch[i] = queue.Write{Row: queue.Row{Table: "job", Key: fmt.Sprint(id), Value: value},
				Lists: []string{"all", fmt.Sprint("user:", id%200)}, Score: int64(id)}
		}
		next, err := s.Commit(context.Background(), rev, batch)
		if err != nil {
			b.Fatal(err)
		}
		rev = next
	}
	b.ReportMetric(float64(b.N*n)/b.Elapsed().Seconds(), "writes/s")
}
