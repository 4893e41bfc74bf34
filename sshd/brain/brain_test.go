package brain

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// start runs a brain over s for the length of the test.
func start(t *testing.T, s store.Store) *Brain {
	t.Helper()
	b, err := New(t.Context(), Config{Store: s, Policy: queue.DefaultPolicy(), Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
	return b
}

func submit(t *testing.T, b *Brain, user string) (int64, error) {
	t.Helper()
	reply, err := b.Do(t.Context(), queue.Submit{Record: job.Record{
		Job:  job.Job{User: user, Pool: "p", Kind: "run"},
		Spec: job.Spec{Steps: []string{"true"}, Limits: job.Limits{Time: time.Hour}}}})
	if err != nil {
		return 0, err
	}
	return reply.(*job.Record).ID, nil
}

func mustSubmit(t *testing.T, b *Brain) int64 {
	t.Helper()
	id, err := submit(t, b, "ada")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func join(t *testing.T, b *Brain, id string, held *job.Lease) *Link {
	t.Helper()
	l, err := b.Join(t.Context(), queue.Runner{ID: id, Name: id, Pools: []string{"p"}}, held)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestOfferAndFinish is a job's way through the loop, with the bells that wake people.
func TestOfferAndFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := start(t, store.NewMemory())
		l := join(t, b, "r1", nil)
		if err := l.Beat(t.Context(), job.Beat{Idle: true}); err != nil {
			t.Fatal(err)
		}
		id := mustSubmit(t, b)
		offer := (<-l.Calls()).Offer
		if offer == nil || offer.Job != id {
			t.Fatalf("call = %+v, want an offer of job %d", offer, id)
		}
		if _, ok := b.Holds("r1", offer.Lease); !ok {
			t.Error("Holds() = false for the lease just offered")
		}
		bell := b.Bell(id)
		if _, err := b.Do(t.Context(), queue.Finish{Runner: "r1", Lease: offer.Lease, Result: job.Result{Reason: job.ReasonExit}}); err != nil {
			t.Fatal(err)
		}
		<-bell
		rec, err := b.Job(t.Context(), id)
		if err != nil || rec.State != job.Succeeded {
			t.Fatalf("Job(%d) = %s, %v; want succeeded", id, rec.State, err)
		}
		past, err := b.Past(t.Context(), queue.ListUser("ada"), 0, 10)
		if err != nil || len(past) != 1 || past[0].ID != id {
			t.Errorf("Past(ada) = %v, %v; want the one job", past, err)
		}
		if _, err := b.Job(t.Context(), 99); !errors.Is(err, queue.ErrNoJob) {
			t.Errorf("Job(99) = %v, want ErrNoJob", err)
		}
	})
}

// TestLeaseRunsOut: the loop wakes by itself when a lease ends, and not before.
func TestLeaseRunsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := start(t, store.NewMemory())
		l := join(t, b, "r1", nil)
		l.Beat(t.Context(), job.Beat{Idle: true})
		id := mustSubmit(t, b)
		<-l.Calls()
		begun := time.Now()
		for {
			bell := b.Bell(id)
			if rec, _ := b.Job(t.Context(), id); rec.State == job.Queued {
				break
			}
			<-bell
		}
		if took, want := time.Since(begun), 30*time.Second; took != want {
			t.Errorf("the lease ended after %v, want %v", took, want)
		}
	})
}

// TestNewerLinkWins: the second connection of a runner cuts off the first, whose
// beats and farewell change nothing any more.
func TestNewerLinkWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := start(t, store.NewMemory())
		old := join(t, b, "r1", nil)
		fresh := join(t, b, "r1", nil)
		if _, open := <-old.Calls(); open {
			t.Error("the old link still gets calls")
		}
		if err := old.Beat(t.Context(), job.Beat{Idle: true}); !errors.Is(err, queue.ErrStale) {
			t.Errorf("old Beat() = %v, want ErrStale", err)
		}
		old.Leave(t.Context())
		if err := fresh.Beat(t.Context(), job.Beat{Idle: true}); err != nil {
			t.Fatal(err)
		}
		mustSubmit(t, b)
		if c := <-fresh.Calls(); c.Offer == nil {
			t.Errorf("call = %+v, want an offer", c)
		}
	})
}

// TestDeafRunner: a runner that reads nothing is cut off and stalls nobody.
func TestDeafRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := start(t, store.NewMemory())
		l := join(t, b, "r1", nil)
		stale := job.Lease{Job: 5, Fence: 5}
		for n := 0; ; n++ {
			if err := l.Beat(t.Context(), job.Beat{Held: &stale}); errors.Is(err, queue.ErrStale) {
				break
			}
			if n > 2*callRoom {
				t.Fatal("never cut off")
			}
		}
		l.Leave(t.Context())
		b.View(t.Context(), func(c *queue.Core) {
			if r := c.Runners()[0]; r.Connected {
				t.Error("still connected after Leave")
			}
		})
	})
}

// TestStoreFails: whatever the store does, an acknowledged job is there afterwards,
// a refused one may only be there if its outcome was unknown, and the loop goes on.
func TestStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := store.NewMemory()
		plan := []store.Failure{store.Works, store.Unavailable, store.AmbiguousApplied, store.AmbiguousLost, store.Works}
		commits := 0
		b := start(t, store.Fault(memory, func(c store.Call) store.Failure {
			if c.Op != store.OpCommit {
				return store.Works
			}
			commits++
			return plan[commits%len(plan)]
		}))
		l, err := b.Join(t.Context(), queue.Runner{ID: "r1", Name: "r1", Pools: []string{"p"}}, nil)
		for err != nil {
			l, err = b.Join(t.Context(), queue.Runner{ID: "r1", Name: "r1", Pools: []string{"p"}}, nil)
		}
		acked := map[int64]bool{}
		refused := 0
		for i := range 200 {
			id, err := submit(t, b, fmt.Sprint("user", i))
			switch {
			case err == nil && acked[id]:
				t.Fatalf("id %d was given twice", id)
			case err == nil:
				acked[id] = true
			case errors.Is(err, ErrUnavailable):
				refused++
			default:
				t.Fatalf("submit: %v, want ErrUnavailable", err)
			}
		}
		if len(acked) == 0 || refused == 0 {
			t.Fatalf("%d acked, %d refused: the plan did not happen", len(acked), refused)
		}
		for id := range acked {
			if _, err := b.Job(t.Context(), id); err != nil {
				t.Errorf("acknowledged job %d: %v", id, err)
			}
		}
		for { // the runner that joined before is still known
			if err := l.Beat(t.Context(), job.Beat{Idle: true}); err == nil {
				break
			}
		}
		select {
		case c := <-l.Calls():
			if c.Offer == nil {
				t.Errorf("call = %+v, want an offer", c)
			}
		case <-time.After(time.Minute):
			t.Error("no offer after the store came back")
		}
	})
}

// TestAnotherWriter: a second writer of the same store ends Run with an error.
func TestAnotherWriter(t *testing.T) {
	memory := store.NewMemory()
	b, err := New(t.Context(), Config{Store: memory, Policy: queue.DefaultPolicy()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := memory.Commit(t.Context(), 0, []queue.Write{{Row: queue.Row{Table: "x", Key: "y", Value: []byte("z")}}}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- b.Run(t.Context()) }()
	if _, err := submit(t, b, "ada"); err == nil {
		t.Error("submit succeeded against a newer revision")
	}
	if err := <-ended; !errors.Is(err, store.ErrConflict) {
		t.Errorf("Run() = %v, want ErrConflict", err)
	}
	if _, err := submit(t, b, "ada"); !errors.Is(err, ErrClosed) {
		t.Errorf("submit after the end = %v, want ErrClosed", err)
	}
}

// TestManyAtOnce: concurrent submits share commits and each gets its own id.
func TestManyAtOnce(t *testing.T) {
	b := start(t, store.NewMemory())
	var mu sync.Mutex
	seen := map[int64]bool{}
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for range 20 {
				id, err := submit(t, b, "ada")
				mu.Lock()
				if err != nil || seen[id] {
					t.Errorf("id %d, %v; want a new one", id, err)
				}
				seen[id] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) != 64*20 {
		t.Errorf("%d ids, want %d", len(seen), 64*20)
	}
}

// TestDeafTimeDoesNotCount: only silence that raid could hear ends a lease. A process
// that was stopped and one whose disk stood still look the same from the inside.
func TestDeafTimeDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Int64 // how long the next commit takes
		b := start(t, store.Delay(store.NewMemory(), func(op store.Op) time.Duration {
			if op != store.OpCommit {
				return 0
			}
			return time.Duration(slow.Swap(0))
		}))
		l := join(t, b, "r1", nil)
		l.Beat(t.Context(), job.Beat{Idle: true})
		id := mustSubmit(t, b)
		lease := (<-l.Calls()).Offer.Lease
		l.Leave(t.Context()) // it comes back as soon as raid answers again
		slow.Store(int64(5 * time.Minute))
		mustSubmit(t, b)
		<-time.After(20 * time.Second)
		join(t, b, "r1", &lease)
		if rec, err := b.Job(t.Context(), id); err != nil || rec.Attempt != 1 || rec.State != job.Running {
			t.Errorf("job = %s, attempt %d, %v, want it running at the first", rec.State, rec.Attempt, err)
		}
	})
}

// TestReloadKeepsOffers: an error of the store between an offer and the beat that
// answers it costs no attempt.
func TestReloadKeepsOffers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fail atomic.Bool
		b := start(t, store.Fault(store.NewMemory(), func(c store.Call) store.Failure {
			if c.Op == store.OpCommit && fail.Swap(false) {
				return store.Unavailable
			}
			return store.Works
		}))
		l := join(t, b, "r1", nil)
		l.Beat(t.Context(), job.Beat{Idle: true})
		id := mustSubmit(t, b)
		fail.Store(true)
		if _, err := submit(t, b, "bob"); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("submit = %v, want ErrUnavailable", err)
		}
		mustSubmit(t, b) // loads
		lease := (<-l.Calls()).Offer.Lease
		if err := l.Beat(t.Context(), job.Beat{Held: &lease}); err != nil {
			t.Fatal(err)
		}
		if rec, err := b.Job(t.Context(), id); err != nil || rec.Attempt != 1 || rec.State != job.Running {
			t.Errorf("job = %s, attempt %d, %v, want it running at the first", rec.State, rec.Attempt, err)
		}
	})
}

// TestLostReply: a result whose commit seemed to fail is heard of when it turns out
// to be there.
func TestLostReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lose, blind atomic.Bool
		s := store.Fault(store.NewMemory(), func(c store.Call) store.Failure {
			switch {
			case c.Op == store.OpCommit && lose.Swap(false):
				return store.AmbiguousApplied
			case c.Op == store.OpGet && blind.Swap(false): // the first look at how it ended
				return store.Unavailable
			}
			return store.Works
		})
		states := make(chan job.State, 100)
		b, err := New(t.Context(), Config{Store: s, Policy: queue.DefaultPolicy(), Changed: func(r job.Record) { states <- r.State }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- b.Run(ctx) }()
		defer func() { stop(); <-ended }()
		l := join(t, b, "r1", nil)
		l.Beat(t.Context(), job.Beat{Idle: true})
		mustSubmit(t, b)
		lease := (<-l.Calls()).Offer.Lease
		lose.Store(true)
		blind.Store(true)
		_, err = b.Do(t.Context(), queue.Finish{Runner: "r1", Lease: lease, Result: job.Result{Reason: job.ReasonExit}})
		if !errors.Is(err, ErrUnavailable) {
			t.Fatalf("Finish = %v, want ErrUnavailable", err)
		}
		for s := range states {
			if s.Final() {
				return // else the bubble is deadlocked, and says so
			}
		}
	})
}

// TestViewSeesWhatIsCommitted: a lease that runs out while a view waits for its commit
// has not run out for the view.
func TestViewSeesWhatIsCommitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Int64 // how long the next commit takes
		b := start(t, store.Delay(store.NewMemory(), func(op store.Op) time.Duration {
			if op != store.OpCommit {
				return 0
			}
			return time.Duration(slow.Load())
		}))
		l := join(t, b, "r1", nil)
		l.Beat(t.Context(), job.Beat{Idle: true})
		id := mustSubmit(t, b)
		<-l.Calls()
		<-time.After(27 * time.Second)
		slow.Store(int64(time.Second))
		var wg sync.WaitGroup
		wg.Go(func() { b.Put(t.Context(), rowsOf(1)) })
		synctest.Wait()
		slow.Store(int64(4 * time.Second))
		wg.Go(func() { b.Put(t.Context(), rowsOf(small+1)) })
		synctest.Wait() // in one batch with it
		b.View(t.Context(), func(q *queue.Core) {
			now, _ := q.Job(id)
			if told, _ := b.Live(id); now.State != told.State {
				t.Errorf("a view sees job %d %s, and it is %s", id, now.State, told.State)
			}
		})
		wg.Wait()
	})
}

// rowsOf returns n rows that are nobody's.
func rowsOf(n int) []queue.Write {
	rows := make([]queue.Write, n)
	for i := range rows {
		rows[i] = queue.Write{Row: queue.Row{Table: "test", Key: queue.Key(int64(i)), Value: []byte("{}")}}
	}
	return rows
}

// TestViewsShareACommit: who looks before each submit, as every session does, does not
// make each submit a commit of its own.
func TestViewsShareACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var commits atomic.Int64
		b := start(t, store.Delay(store.NewMemory(), func(op store.Op) time.Duration {
			if op == store.OpCommit {
				commits.Add(1)
			}
			return time.Second
		}))
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				b.View(t.Context(), func(*queue.Core) {})
				mustSubmit(t, b)
			})
			wg.Go(func() { mustSubmit(t, b) })
		}
		wg.Wait()
		if n := commits.Load(); n > 6 {
			t.Errorf("40 submits and 20 views at once took %d commits", n)
		}
	})
}
