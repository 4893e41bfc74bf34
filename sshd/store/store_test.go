package store_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

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
		return func() (store.Store, error) { return store.OpenSQLite(context.Background(), dir) }
	})
}

// A store whose plan fails nothing is a store.
func TestFaultless(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() (store.Store, error) {
		m := store.NewMemory()
		return func() (store.Store, error) {
			return store.Fault(m.Reopen(), func(store.Call) store.Failure { return store.Works }), nil
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

// The benchmarks write what raid writes: records of 1.2 KB that stand in two lists.
func BenchmarkCommit1(b *testing.B)   { benchmark(b, 1) }
func BenchmarkCommit256(b *testing.B) { benchmark(b, 256) }

func benchmark(b *testing.B, n int) {
	b.Run("memory", func(b *testing.B) { benchmarkCommit(b, store.NewMemory(), n) })
	b.Run("sqlite", func(b *testing.B) {
		s, err := store.OpenSQLite(b.Context(), b.TempDir())
		if err != nil {
			b.Fatal(err)
		}
		benchmarkCommit(b, s, n)
	})
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
