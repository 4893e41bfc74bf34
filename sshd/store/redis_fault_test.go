package store_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// numbered is a batch that tells of itself: a row of its own, a row that all share, a list.
func numbered(n int) []queue.Write {
	v := fmt.Append(nil, n)
	return []queue.Write{
		{Row: queue.Row{Table: "one", Key: "newest", Value: v}},
		{Row: queue.Row{Table: "many", Key: fmt.Sprintf("%09d", n), Value: v}, Lists: []string{"all"}, Score: int64(n), New: true},
	}
}

// An account is what a writer knows of its numbered batches.
type account struct {
	*store.Redis
	t    *testing.T
	rev  store.Rev
	next int // number of the next batch
	told int // batches that are certain: acknowledged, or found by a Load

	// With appendfsync everysec Redis holds what it has acknowledged back from its file for
	// two seconds when the disk does not follow, and a kill loses that.
	everysec bool
	acked    []time.Time // when the batch of that number was acknowledged
	killed   time.Time
}

// mayLose reports whether a kill may have taken batches from n on.
func (a *account) mayLose(n int) bool {
	const held = 3 * time.Second // and a moment
	return a.everysec && n < len(a.acked) && a.killed.Sub(a.acked[n]) < held
}

// commit commits the next batch and follows what becomes of it.
func (a *account) commit() error {
	rev, err := a.Commit(context.Background(), a.rev, numbered(a.next))
	switch {
	case err == nil && rev == a.rev+1:
		a.rev, a.next, a.told = rev, a.next+1, a.told+1
	case err == nil, errors.Is(err, store.ErrConflict):
		a.t.Fatalf("Commit on %d = %d, %v", a.rev, rev, err)
	case errors.Is(err, store.ErrAmbiguous), errors.Is(err, store.ErrUnavailable):
		a.reload(errors.Is(err, store.ErrAmbiguous))
	default:
		a.t.Fatalf("Commit on %d = %v", a.rev, err)
	}
	return err
}

// reload reads everything, until Redis can be read. Only what was ambiguous may be new.
func (a *account) reload(ambiguous bool) {
	a.t.Helper()
	for {
		n := 0
		rev, err := a.Load(soon(a.t), []string{"many"}, func(r queue.Row) error {
			if r.Key != fmt.Sprintf("%09d", n) {
				return fmt.Errorf("row %s in place %d", r.Key, n)
			}
			n++
			return nil
		})
		if errors.Is(err, store.ErrUnavailable) {
			pauseABit()
			continue
		}
		if err != nil || n < a.told && !a.mayLose(n) || n > a.told && !ambiguous || n > a.told+1 {
			a.t.Fatalf("Load = %d rows at %d, %v; %d are certain, ambiguous: %v", n, rev, err, a.told, ambiguous)
		}
		a.rev, a.next, a.told = rev, n, n
		return
	}
}

// TestRedisCut cuts connections in the middle of commits. No batch is lost that was
// acknowledged, none is there twice, and whatever a Commit says is true.
func TestRedisCut(t *testing.T) {
	s, name := startRedis(t), newName()
	rnd := rand.New(rand.NewPCG(5, 6))
	var mu sync.Mutex // guards rnd and fates
	fates := map[fate]int{}
	p := s.proxied(func(words []string) fate {
		mu.Lock()
		defer mu.Unlock()
		if !commits(words) && !settles(words) {
			return passes
		}
		f := fate(rnd.IntN(8))
		if f > late {
			f = passes
		}
		fates[f]++
		return f
	})
	a := &account{t: t, Redis: openURL(t, p.url(name))}
	errs := map[bool]int{}
	for i := range 300 {
		err := a.commit()
		errs[err == nil]++
		if i%3 == 0 {
			p.release()
		}
	}
	p.release()
	a.reload(false)
	mu.Lock()
	defer mu.Unlock()
	if fates[unheard] < 20 || fates[unsaid] < 20 || fates[late] < 20 || errs[true] < 250 {
		t.Errorf("fates %v, worked %d: the test is not worth much", fates, errs[true])
	}
}

func openURL(t *testing.T, url string) *store.Redis {
	t.Helper()
	r, err := store.OpenRedis(soon(t), store.RedisOptions{URL: url})
	if err == nil {
		t.Cleanup(func() { r.Close() })
		err = r.Claim(soon(t), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestRedisLate: what was found not to be there never will be, however late it arrives: here
// just before it is made again.
func TestRedisLate(t *testing.T) {
	s, name := startRedis(t), newName()
	var armed atomic.Bool
	var released atomic.Int64
	var p *redisProxy
	p = s.proxied(func(words []string) fate {
		switch {
		case !commits(words):
			return passes
		case armed.CompareAndSwap(true, false):
			return late
		}
		released.Add(int64(p.release()))
		return passes
	})
	r := openURL(t, p.url(name))
	for rev := range store.Rev(2) { // the first brings the script, by which the second goes
		armed.Store(rev == 1)
		if got, err := r.Commit(t.Context(), rev, numbered(int(rev))); got != rev+1 || err != nil {
			t.Fatalf("Commit on %d = %d, %v", rev, got, err)
		}
	}
	if released.Load() != 1 {
		t.Fatalf("%d commands were late, want 1", released.Load())
	}
	if rev, err := r.Commit(t.Context(), 2, numbered(2)); rev != 3 || err != nil {
		t.Fatalf("Commit after a late one = %d, %v", rev, err)
	}
}

// TestRedisHangs: a Redis that stands still holds nobody for long, and afterwards everything
// goes on.
func TestRedisHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a while")
	}
	s, name := startRedis(t), newName()
	a := &account{t: t, Redis: s.writer(name)}
	for range 3 {
		if err := a.commit(); err != nil {
			t.Fatal(err)
		}
	}
	s.signal(syscall.SIGSTOP)
	defer s.signal(syscall.SIGCONT)
	start := time.Now()
	rev, err := a.Commit(t.Context(), a.rev, numbered(a.next))
	if took := time.Since(start); took > 20*time.Second || !errors.Is(err, store.ErrAmbiguous) {
		t.Errorf("Commit to a Redis that hangs = %d, %v after %v, want ErrAmbiguous in 20 s", rev, err, took)
	}
	start = time.Now()
	_, err = a.Load(t.Context(), []string{"many"}, func(queue.Row) error { return nil })
	if took := time.Since(start); took > 20*time.Second || !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Load from a Redis that hangs = %v after %v, want ErrUnavailable in 20 s", err, took)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := a.Get(short, "one", "newest"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Get with a deadline = %v, want that", err)
	}
	s.signal(syscall.SIGCONT)
	a.reload(true)
	for range 3 {
		if err := a.commit(); err != nil {
			t.Fatal(err)
		}
	}
	a.reload(false)
}

// TestRedisKill kills Redis under commits, again and again. It is back at once, so that a
// commit that was under way is found or made again; or later, when that was given up.
func TestRedisKill(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a while")
	}
	for _, fsync := range []string{"always", "everysec"} {
		t.Run(fsync, func(t *testing.T) {
			s, name := startRedis(t, "--appendfsync", fsync), newName()
			a := &account{t: t, Redis: s.writer(name), everysec: fsync == "everysec"}
			for i := range 8 {
				var killer sync.WaitGroup
				killer.Go(func() {
					time.Sleep(time.Duration(20+rand.IntN(60)) * time.Millisecond) // anywhere in a commit
					s.kill()
					a.killed = time.Now()
					if i > 0 {
						s.start()
					}
				})
				long := time.Now().Add(300 * time.Millisecond)
				for time.Now().Before(long) {
					rev, err := a.Commit(context.Background(), a.rev, numbered(a.next))
					if err == nil {
						a.rev, a.next, a.told = rev, a.next+1, a.told+1
						a.acked = append(a.acked[:min(len(a.acked), a.told-1)], time.Now())
						for len(a.acked) < a.told { // found by a Load
							a.acked = append(a.acked, time.Now())
						}
						continue
					}
					if killer.Wait(); i == 0 {
						s.start()
					}
					a.reload(errors.Is(err, store.ErrAmbiguous))
					break
				}
				killer.Wait()
			}
			if a.told < 50 {
				t.Errorf("only %d batches: the test is not worth much", a.told)
			}
			a.reload(false)
		})
	}
}

// TestRedisRefuses: what Redis refuses is ErrUnavailable with Redis' own word for it, and
// changes nothing.
func TestRedisRefuses(t *testing.T) {
	s := startRedis(t)
	db := s.client()
	set := func(name, value string) func() error {
		return func() error { return db.ConfigSet(context.Background(), name, value).Err() }
	}
	for _, tt := range []struct {
		word      string
		break_    func() error
		mend      func() error
		unclaimed bool
	}{
		{"OOM", set("maxmemory", "1"), set("maxmemory", "0"), false},
		{"NOREPLICAS", set("min-replicas-to-write", "1"), set("min-replicas-to-write", "0"), false},
		{"READONLY", func() error { return db.ReplicaOf(context.Background(), "127.0.0.1", "1").Err() },
			func() error { return db.ReplicaOf(context.Background(), "no", "one").Err() }, false},
	} {
		t.Run(tt.word, func(t *testing.T) {
			a := &account{t: t, Redis: s.writer(newName())}
			if err := a.commit(); err != nil {
				t.Fatal(err)
			}
			if err := tt.break_(); err != nil {
				t.Fatal(err)
			}
			_, err := a.Commit(t.Context(), a.rev, append(numbered(a.next), queue.Write{Row: queue.Row{Table: "one", Key: "newest"}}))
			if merr := tt.mend(); merr != nil {
				t.Fatal(merr)
			}
			if !errors.Is(err, store.ErrUnavailable) || !contains(err, tt.word) {
				t.Errorf("Commit = %v, want ErrUnavailable, %s", err, tt.word)
			}
			a.reload(false)
			if v, err := a.Get(t.Context(), "one", "newest"); string(v) != "0" || err != nil {
				t.Errorf("Get = %q, %v, want 0: nothing was changed", v, err)
			}
			if err := a.commit(); err != nil {
				t.Error(err)
			}
		})
	}
}

func contains(err error, word string) bool { return err != nil && strings.Contains(err.Error(), word) }

// pauseABit is for what nothing tells of.
func pauseABit() { time.Sleep(20 * time.Millisecond) }
