package janitor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/stream"
)

// A world is a raid without its door: a store, files, one runner, and a janitor whose
// sweeps the test makes. It lives in a bubble of synctest. kill ends it as kill -9 would.
type world struct {
	t     testing.TB
	dir   string
	rows  *store.Memory
	plan  atomic.Pointer[func(store.Call) store.Failure] // nil: everything works
	free  func() (int64, int64, error)                   // nil: the disk's
	files time.Duration
	recs  time.Duration
	user  string // who submits; "": ada
	team  string // of whoever that is

	*Janitor
	stop func()
}

func newWorld(t testing.TB, files, recs time.Duration) *world {
	return newWorldIn(t, t.TempDir(), files, recs)
}

func newWorldIn(t testing.TB, dir string, files, recs time.Duration) *world {
	w := &world{t: t, dir: dir, rows: store.NewMemory(), files: files, recs: recs}
	w.start()
	return w
}

func (w *world) start() {
	st := store.Fault(w.rows, func(c store.Call) store.Failure {
		if plan := w.plan.Load(); plan != nil {
			return (*plan)(c)
		}
		return store.Works
	})
	b, err := brain.New(context.Background(), brain.Config{Store: st, Policy: queue.DefaultPolicy()})
	w.must(err)
	blobs, err := blob.Open(filepath.Join(w.dir, "blobs"), blob.Options{ReserveBytes: reserve})
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); b.Run(ctx) }()
	spools := stream.New(filepath.Join(w.dir, "spool"), w.t.Logf)
	w.Janitor = New(Config{Brain: b, Blobs: blobs, Spools: spools, Files: w.files, Records: w.recs, Upload: margin, Logf: w.t.Logf, Free: w.free})
	w.stop = func() { cancel(); <-ended; spools.Close() }
	if w.plan.Load() == nil {
		w.must(w.begin().birth(ctx)) // as the sweep does with which a janitor begins
	}
	_, err = b.Do(ctx, queue.Join{Runner: queue.Runner{ID: "r", Name: "r", Pools: []string{"p"}}})
	w.must(err)
}

const (
	reserve = 1 << 20
	margin  = 1 << 20
)

// fails has plan decide what fails from now on.
func (w *world) fails(plan func(store.Call) store.Failure) { w.plan.Store(&plan) }

// kill ends everything at once and starts it again with what was committed.
func (w *world) kill() {
	w.stop()
	w.plan.Store(nil)
	w.rows = w.rows.Reopen()
	w.start()
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) put(text string) string {
	u, err := w.Blobs.Create(0)
	w.must(err)
	_, err = io.WriteString(u, text)
	w.must(err)
	k, err := u.Commit(context.Background())
	w.must(err)
	return string(k)
}

// submit begins a submit; accept ends it. raid's own does both in one go.
func (w *world) submit(text string) (accept func() int64) {
	done := w.Arrive()
	return w.accept(w.put(text), done)
}

func (w *world) accept(source string, done func()) func() int64 {
	b := w.Brain
	return func() int64 {
		defer done()
		reply, err := b.Do(context.Background(), queue.Submit{Record: job.Record{Source: source,
			Job: job.Job{User: cmp.Or(w.user, "ada"), Team: w.team, Pool: "p", Kind: "run"}, Spec: job.Spec{Steps: []string{"true"}, Limits: job.Limits{Time: time.Hour}}}})
		if err != nil {
			return 0 // as if it had never come, or nobody knows
		}
		return reply.(*job.Record).ID
	}
}

// rerun begins a rerun of a finished job, or returns nil if its files are gone.
func (w *world) rerun(id int64) (accept func() int64) {
	done := w.Arrive()
	rec, err := w.Brain.Job(context.Background(), id)
	if err != nil || !rec.Expired.IsZero() {
		done()
		return nil
	}
	w.must(w.Blobs.Renew(context.Background(), blob.Key(rec.Source)))
	return w.accept(rec.Source, done)
}

// run starts what waits and returns a job that runs now, 0 for none.
func (w *world) run() int64 {
	w.Brain.Do(context.Background(), queue.Beat{Runner: "r", Idle: true})
	for _, rec := range w.Brain.Unfinished() {
		if rec.State == job.Running {
			return rec.ID
		}
	}
	return 0
}

// finish ends a running job with output and an archive, if it can be saved.
func (w *world) finish(id int64, archive string) {
	rec, ok := w.Brain.Live(id)
	if !ok || rec.State != job.Running {
		return
	}
	l, err := w.Spools.Attempt(id, rec.Attempt, 0)
	w.must(err)
	if !l.Sealed() { // the result of an earlier try could not be saved
		w.must(l.Append(job.AppendFrame(nil, job.Out, []byte("output\n"))))
		w.must(l.Seal())
	}
	defer w.Arrive()()
	_, err = w.Brain.Do(context.Background(), queue.Finish{Runner: "r", Lease: job.Lease{Job: id, Fence: rec.Fence},
		Result: job.Result{Reason: job.ReasonExit}, Archive: w.put(archive)})
	if err == nil {
		w.must(w.Spools.Finish(id))
	}
}

// complete submits a job and brings it to its end.
func (w *world) complete(text, archive string) int64 {
	id := w.submit(text)()
	if got := w.run(); got != id {
		w.t.Fatalf("job %d runs, want %d", got, id)
	}
	w.finish(id, archive)
	return id
}

// all returns every job there is, as the store has it.
func (w *world) all() (recs []job.Record) {
	for _, rec := range w.Brain.Unfinished() {
		recs = append(recs, *rec)
	}
	past, err := w.Brain.Past(context.Background(), queue.ListAll, 0, 1<<20)
	w.must(err)
	return append(recs, past...)
}

// wanted returns the blobs and the output that jobs refer to.
func (w *world) wanted() (blobs map[string]bool, output map[int64]bool) {
	blobs, output = map[string]bool{}, map[int64]bool{}
	for _, rec := range w.all() {
		if !rec.Expired.IsZero() {
			continue
		}
		for _, key := range []string{rec.Source, rec.Archive} {
			if key != "" {
				blobs[key] = true
			}
		}
		if rec.Archive != "" { // these have run to their end
			output[rec.ID] = true
		}
	}
	return blobs, output
}

func (w *world) there() (blobs map[string]bool, output map[int64]bool) {
	blobs, output = map[string]bool{}, map[int64]bool{}
	for info, err := range w.Blobs.List(context.Background()) {
		w.must(err)
		blobs[string(info.Key)] = true
	}
	for id, err := range w.Spools.List() {
		w.must(err)
		output[id] = true
	}
	return blobs, output
}

// check wants everything that is referred to on the disk.
func (w *world) check(when string) {
	w.t.Helper()
	blobs, output := w.wanted()
	haveBlobs, haveOutput := w.there()
	for k := range blobs {
		if !haveBlobs[k] {
			w.t.Fatalf("%s: blob %.20s is gone and a job refers to it", when, k)
		}
	}
	for id := range output {
		if !haveOutput[id] {
			w.t.Fatalf("%s: the output of job %d is gone and its record does not say so", when, id)
		}
	}
}

// checkClean wants nothing else there.
func (w *world) checkClean() {
	w.t.Helper()
	blobs, _ := w.wanted()
	haveBlobs, haveOutput := w.there()
	if !maps.Equal(blobs, haveBlobs) {
		w.t.Fatalf("%d blobs are left, want the %d that jobs refer to", len(haveBlobs), len(blobs))
	}
	kept := map[int64]bool{}
	for _, rec := range w.all() {
		kept[rec.ID] = rec.Expired.IsZero()
	}
	for id := range haveOutput {
		if !kept[id] {
			w.t.Fatalf("the output of job %d is left", id)
		}
	}
}

func (w *world) clean() Report {
	w.t.Helper()
	r, err := w.sweep(context.Background())
	w.must(err)
	w.check("after a sweep")
	return r
}

// What jobs refer to stays, whatever happens between and within sweeps: submits that
// take hours, reruns of what is about to go, results, commits that fail or that nobody
// knows the outcome of, a full disk, and death at any moment. In the end nothing is left
// that nobody refers to.
func TestNothingReferredToGoes(t *testing.T) {
	dir := t.TempDir() // one for all: the folder of blobs has 256 in it
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) { history(t, rt, dir) })
	})
}

func history(t *testing.T, rt *rapid.T, dir string) {
	w := newWorldIn(t, dir, 5*time.Hour, 20*time.Hour)
	defer func() { w.stop() }()
	blobs, output := w.there()
	for k := range blobs {
		w.must(w.Blobs.Remove(context.Background(), blob.Key(k)))
	}
	for id := range output {
		w.must(w.Spools.Remove(id))
	}
	var under []func() int64 // submits under way
	var steps []func(context.Context) error
	text := func() string { return rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(rt, "text") }
	low := false
	w.free = func() (int64, int64, error) {
		if low {
			return 0, 1 << 40, nil
		}
		return 1 << 39, 1 << 40, nil
	}
	w.Free = w.free
	ops := map[string]func(){
		"submit": func() { under = append(under, w.submit(text())) },
		"accept": func() {
			if len(under) > 0 {
				i := rapid.IntRange(0, len(under)-1).Draw(rt, "which")
				under[i]()
				under = slices.Delete(under, i, i+1)
			}
		},
		"run":    func() { w.run() },
		"finish": func() { w.finish(w.run(), text()) },
		"rerun": func() {
			if past, err := w.Brain.Past(t.Context(), queue.ListAll, 0, 99); err == nil && len(past) > 0 {
				if accept := w.rerun(rapid.SampledFrom(past).Draw(rt, "job").ID); accept != nil {
					under = append(under, accept)
				}
			}
		},
		"wait":  func() { time.Sleep(time.Duration(rapid.IntRange(1, 180).Draw(rt, "minutes")) * time.Minute) },
		"full":  func() { low = !low },
		"begin": func() { steps = w.begin().steps() },
		"step": func() { // one step of a sweep that other things come between
			if len(steps) > 0 {
				if err := steps[0](t.Context()); err != nil {
					steps = nil
					return
				}
				steps = steps[1:]
			}
		},
		"fault": func() {
			f := rapid.SampledFrom([]store.Failure{store.Unavailable, store.AmbiguousApplied, store.AmbiguousLost}).Draw(rt, "fault")
			n := rapid.IntRange(1, 4).Draw(rt, "calls")
			w.fails(func(c store.Call) store.Failure {
				if n--; n >= 0 && c.Op == store.OpCommit {
					return f
				}
				return store.Works
			})
		},
		"kill": func() {
			w.kill()
			under, steps = nil, nil
		},
	}
	names := slices.Sorted(maps.Keys(ops))
	names = append(names, "step", "step", "step", "finish", "submit", "accept", "wait")
	for range rapid.IntRange(1, 50).Draw(rt, "length") {
		op := rapid.SampledFrom(names).Draw(rt, "op")
		ops[op]()
		w.Brain.Present(t.Context()) // a core that was lost is loaded again
		w.Brain.Present(t.Context())
		w.check(op)
	}
	w.plan.Store(nil)
	low = false
	time.Sleep(newest + time.Minute)
	under = nil
	w.kill()
	time.Sleep(newest + time.Minute)
	w.clean()
	w.checkClean()
}

// A submit may take as long as it likes.
func TestSlowSubmit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, time.Hour, 0)
		defer func() { w.stop() }()
		accept, other := w.submit("slow"), w.submit("never")
		time.Sleep(30 * time.Hour)
		if r := w.clean(); r.Unclaimed != int64(len("slow")+len("never")) {
			t.Errorf("sweep while submits are under way = %+v, want their uploads unclaimed", r)
		}
		accept()
		w.check("accepted")
		w.clean()
		w.fails(func(store.Call) store.Failure { return store.Unavailable })
		other()
		w.plan.Store(nil)
		time.Sleep(2 * time.Hour)
		if r := w.clean(); r.Unclaimed != 0 || r.Freed != int64(len("never")) {
			t.Errorf("sweep after one failed = %+v, want its upload gone", r)
		}
	})
}

// A database that was lost must not take with it what lies elsewhere; rubbish of the new one
// goes all the same.
func TestDatabaseLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		w.complete("source", "build")
		backup := w.rows
		time.Sleep(time.Hour)
		w.stop()
		w.rows = store.NewMemory()
		w.start()
		w.submit("never")
		w.stop()
		w.start() // which knows since when
		time.Sleep(30 * time.Hour)
		if r := w.clean(); r.Freed != int64(len("never")) {
			t.Errorf("a new database's sweep = %+v, want the upload gone that nobody submitted", r)
		}
		if blobs, _ := w.there(); len(blobs) != 2 {
			t.Errorf("%d blobs are left, want the 2 of before", len(blobs))
		}
		w.stop()
		w.rows = backup
		w.start()
		w.check("put back")
	})
}

// A job may run, or wait, for longer than files are kept, while later ones come and go.
func TestSlowJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 10*time.Hour, 0)
		defer func() { w.stop() }()
		slow := w.submit("slow")()
		time.Sleep(time.Minute)
		w.Brain.Do(t.Context(), queue.Pause{Pool: "p", On: true})
		later := w.submit("later")()
		w.Brain.Do(t.Context(), queue.Cancel{Job: later})
		time.Sleep(30 * time.Hour)
		w.clean()
		w.Brain.Do(t.Context(), queue.Pause{Pool: "p"})
		w.run()
		w.finish(slow, "build")
		time.Sleep(2 * time.Hour)
		w.clean()
		time.Sleep(10 * time.Hour)
		if r := w.clean(); r.Expired != 1 {
			t.Errorf("sweep = %+v, want the files of the slow job gone", r)
		}
		w.checkClean()
	})
}

// While nothing can be committed nothing is removed.
func TestCommitFails(t *testing.T) {
	for _, f := range []store.Failure{store.Unavailable, store.AmbiguousLost, store.AmbiguousApplied} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 0, 0)
			defer func() { w.stop() }()
			w.complete("source", "build")
			time.Sleep(2 * time.Hour)
			w.Free = func() (int64, int64, error) { return 0, 1 << 30, nil }
			w.fails(func(c store.Call) store.Failure {
				if c.Op == store.OpCommit {
					return f
				}
				return store.Works
			})
			if _, err := w.sweep(t.Context()); err == nil {
				t.Error("sweep = nil, want an error")
			}
			if blobs, output := w.there(); len(blobs) != 2 || len(output) != 1 {
				t.Errorf("left: %v, %v, want all", blobs, output)
			}
			w.kill() // and the next one goes on, wherever this one was
			w.Free = func() (int64, int64, error) { return 0, 1 << 30, nil }
			w.clean()
			w.checkClean()
			if blobs, _ := w.there(); len(blobs) != 0 {
				t.Errorf("left: %v, want none", blobs)
			}
		})
	}
}

func TestFilesExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 48*time.Hour, 96*time.Hour)
		defer func() { w.stop() }()
		one := w.complete("shared", "build 1")
		two := w.complete("other", "build 2")
		time.Sleep(47 * time.Hour)
		three := w.rerun(one)()
		if r := w.clean(); r.Expired != 0 || r.Jobs != 3 {
			t.Errorf("sweep before the time = %+v, want nothing removed of 3 jobs", r)
		}
		time.Sleep(2 * time.Hour)
		r := w.clean()
		if r.Expired != 2 || r.Freed < int64(len("other")+len("build 1")+len("build 2")) {
			t.Errorf("sweep after the time = %+v, want 2 jobs without files", r)
		}
		blobs, output := w.there()
		if len(blobs) != 1 || len(output) != 0 {
			t.Errorf("left: %v, %v, want the upload that job %d shares", blobs, output, three)
		}
		rec, err := w.Brain.Job(t.Context(), two)
		if err != nil || rec.Expired.IsZero() || rec.Reason != job.ReasonExit {
			t.Errorf("job %d = %+v, %v, want its result, and since when its files are gone", two, rec, err)
		}
		time.Sleep(48 * time.Hour)
		if r := w.clean(); r.Forgotten != 2 {
			t.Errorf("sweep after the records' time = %+v, want 2 forgotten", r)
		}
		if _, err := w.Brain.Job(t.Context(), one); !errors.Is(err, queue.ErrNoJob) {
			t.Errorf("job %d = %v, want none", one, err)
		}
		w.run()
		w.finish(three, "build 3")
		if id := w.complete("new", ""); id != three+1 {
			t.Errorf("the next job is %d, want %d", id, three+1)
		}
		w.kill()
		if id := w.submit("newer")(); id != three+2 {
			t.Errorf("the next job after a restart is %d, want %d", id, three+2)
		}
	})
}

// Files go with the record when that goes first, and for ever is for ever.
func TestKeep(t *testing.T) {
	for _, tt := range []struct {
		files, records time.Duration
		blobs, recs    int
	}{
		{0, 0, 2, 1},
		{0, time.Hour, 0, 0},
		{time.Hour, 0, 0, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, tt.files, tt.records)
			defer w.stop()
			w.complete("source", "build")
			time.Sleep(10_000 * time.Hour)
			w.clean()
			if blobs, _ := w.there(); len(blobs) != tt.blobs || len(w.all()) != tt.recs {
				t.Errorf("keep files %v, records %v: left %d blobs and %d records, want %d and %d",
					tt.files, tt.records, len(blobs), len(w.all()), tt.blobs, tt.recs)
			}
			w.checkClean()
		})
	}
}

// A disk of which files take what they weigh.
func (w *world) disk(total int64) {
	w.free = func() (int64, int64, error) {
		used := int64(0)
		for info, err := range w.Blobs.List(context.Background()) {
			w.must(err)
			used += info.Size
		}
		return total - used, total, nil
	}
	w.Free = w.free
}

func TestTrim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		w.disk(40 << 20)
		mib := func(n int, text string) string { return strings.Repeat(text, n<<20) }
		w.complete(mib(4, "a"), "")
		time.Sleep(time.Hour + time.Minute)
		w.complete(mib(4, "b"), "")
		shared := w.complete(mib(4, "c"), mib(4, "d"))
		time.Sleep(time.Hour + time.Minute)
		w.complete(mib(4, "e"), "") // of the last hour
		if r := w.clean(); r.Expired != 0 {
			t.Errorf("sweep of a disk with room = %+v, want nothing removed", r)
		}
		w.complete(mib(18, "f"), "") // 38 of 40 MiB, and 1 MiB is reserved, 1 MiB the margin
		if r := w.clean(); r.Expired != 0 || r.DaysLeft == nil || *r.DaysLeft != 0 {
			t.Errorf("sweep of a disk that has just enough room = %+v, want nothing removed and 0 days left", r)
		}
		waiting := w.rerun(shared)()
		w.put("x") // no job's: an upload under way
		if r := w.clean(); r.Expired != 1 || r.Free < 4<<20 {
			t.Errorf("sweep = %+v, want the oldest job's files gone and no more", r)
		}
		w.disk(29 << 20)
		if r := w.clean(); r.Expired != 2 || r.short {
			t.Errorf("sweep of a smaller disk = %+v, want those of the next two gone", r)
		}
		w.disk(20 << 20)
		r := w.clean()
		if !r.short || r.Expired != 0 {
			t.Errorf("sweep of a disk that is too small = %+v, want the newest hour's and the waiting job's files kept", r)
		}
		if _, ok := w.Brain.Live(waiting); !ok {
			t.Error("the job that waits is gone")
		}
	})
}

// What the oldest job shares with one that stays is not removed with it.
func TestTrimShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		w.complete("shared", strings.Repeat("a", 3<<20))
		w.complete("shared", strings.Repeat("b", 3<<20))
		w.complete("shared", strings.Repeat("c", 3<<20))
		time.Sleep(2 * time.Hour)
		w.disk(10 << 20)
		if r := w.clean(); r.Expired != 1 || r.Jobs != 2 {
			t.Errorf("sweep = %+v, want the files of one job gone", r)
		}
		w.checkClean()
	})
}

// A sweep for room finds what is old behind more than a page of what is not.
func TestTrimPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		for i := range page + 50 {
			w.complete(fmt.Sprint(i), "")
		}
		time.Sleep(2 * time.Hour)
		w.free = func() (int64, int64, error) { return 0, 1 << 30, nil }
		w.Free = w.free
		if r := w.clean(); r.Expired != page+50 || r.Jobs != 0 {
			t.Errorf("sweep of a full disk = %+v, want the files of all %d jobs gone", r, page+50)
		}
		w.checkClean()
		if r := w.clean(); r.Expired != 0 || w.low != page+51 {
			t.Errorf("the next one = %+v from job %d, want nothing to do from %d", r, w.low, page+51)
		}
	})
}

// Who needs room is answered when there is some; many who ask at once have one sweep.
func TestMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		w.disk(8 << 20)
		w.complete(strings.Repeat("a", 7<<20), "")
		time.Sleep(2 * time.Hour)
		var sweeps atomic.Int32
		w.Swept = func(Report) { sweeps.Add(1) }
		ctx, stop := context.WithCancel(t.Context())
		go w.Run(ctx)
		synctest.Wait()
		if free, _, _ := w.free(); free < 7<<20 || sweeps.Load() != 1 {
			t.Errorf("after the start: %d bytes free, %d sweeps, want the old upload gone in 1", free, sweeps.Load())
		}
		w.complete(strings.Repeat("b", 7<<20), "") // too new to go
		for range 5 {
			w.MakeRoom() // the first finds nothing, the others know
			w.Check()
		}
		synctest.Wait()
		if sweeps.Load() != 2 {
			t.Errorf("%d sweeps after five uploads that found no room, want 2", sweeps.Load())
		}
		time.Sleep(resign)
		w.Check()
		synctest.Wait()
		if sweeps.Load() != 3 {
			t.Errorf("%d sweeps a minute later, want 3", sweeps.Load())
		}
		time.Sleep(every + time.Minute)
		if free, _, _ := w.free(); free < 7<<20 {
			t.Errorf("an hour later %d bytes are free, want the upload gone", free)
		}
		stop()
		synctest.Wait()
		w.MakeRoom() // of an upload that is ending: returns
		if _, err := w.Sweep(context.Background()); !errors.Is(err, brain.ErrClosed) {
			t.Errorf("Sweep after the end = %v, want brain.ErrClosed", err)
		}
	})
}

func TestPace(t *testing.T) {
	const gib = 1 << 30
	for _, tt := range []struct {
		what   string
		keep   int // days
		held   []held
		room   int64
		perDay int64
		days   int
		left   int // -1: never
	}{
		{"nothing", 30, nil, gib, 0, 1, -1},
		{"no room", 30, nil, 0, 0, 1, 0},
		{"the first day", 0, []held{{size: gib, n: 1}}, 10 * gib, gib, 1, 10},
		{"for ever", 0, []held{{size: 7 * gib, n: 1, came: 6 * day}, {size: gib, n: 1, came: 100 * day, goes: 99 * day}}, 10 * gib, gib, 7, 10},
		{"as much goes as comes", 30, []held{{size: 7 * gib, came: 3 * day}, {size: 100 * gib, came: 30 * day, goes: 29*day + 1}}, 31 * gib, gib, 7, -1},
		{"before anything goes", 30, []held{{size: 7 * gib, came: 3 * day}, {size: gib, came: 20 * day, goes: 20 * day}}, 5 * gib, gib, 7, 5},
		{"not before much goes", 30, []held{{size: 7 * gib, came: 3 * day}, {size: 100 * gib, came: 20 * day, goes: 26 * day}}, 5 * gib, gib, 7, -1},
		{"one day too late", 10, []held{{size: 7 * gib, came: 6 * day}}, 9 * gib, gib, 7, 9},
		{"kept for an hour", 1, []held{{size: gib, came: 1}}, 100 * gib, gib, 1, -1},
	} {
		p := pace{keep: tt.keep * day, leaves: map[int]int64{}}
		for _, h := range tt.held {
			p.add(h)
		}
		perDay, days := p.rate()
		if perDay/gib != tt.perDay/gib && perDay != tt.perDay || days != tt.days {
			t.Errorf("%s: rate = %d, %d, want %d, %d", tt.what, perDay, days, tt.perDay, tt.days)
		}
		left, ok := p.left(tt.room, tt.perDay)
		if !ok {
			left = -1
		}
		if left != tt.left {
			t.Errorf("%s: left = %d, want %d", tt.what, left, tt.left)
		}
	}
}

// The report says what there is, by what it is and when it came.
func TestReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		w.Database = filepath.Join(w.dir, "db")
		w.must(os.WriteFile(w.Database, bytes.Repeat([]byte("x"), 100), 0o600))
		w.must(os.WriteFile(w.Database+"-wal", bytes.Repeat([]byte("x"), 50), 0o600))
		w.free = func() (int64, int64, error) { return 1 << 30, 1 << 40, nil }
		w.Free = w.free
		w.complete(strings.Repeat("a", 1000), "out")
		time.Sleep(20 * 24 * time.Hour)
		w.complete(strings.Repeat("b", 70_000), "build")
		w.put("loose")
		r := w.clean()
		if r.Uploads != 71_000 || r.Outputs != 8 || r.Database != 150 || r.Unclaimed != 5 || r.Jobs != 2 || r.Logs == 0 {
			t.Errorf("report = %+v", r)
		}
		if r.OverDays != 7 || r.PerDay < 10_000 || r.PerDay > 20_000 {
			t.Errorf("report says %d a day over %d days, want a seventh of what came lately", r.PerDay, r.OverDays)
		}
	})
}

// elsewhere is a folder that passes for a store which is not on this disk.
type elsewhere struct {
	blob.Store
	down bool
}

func (e *elsewhere) Shared() bool { return true }

func (e *elsewhere) Tidy(ctx context.Context) error {
	if e.down {
		return blob.ErrUnavailable
	}
	return e.Store.Tidy(ctx)
}

// Where blobs lie elsewhere they take nothing of this disk. When it is full the copies of
// logs go, then the files of jobs whose log is nowhere else; and a store that is away
// keeps nobody from looking after the disk.
func TestElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0, 0)
		defer func() { w.stop() }()
		e := &elsewhere{Store: w.Blobs}
		w.Blobs = e
		kept := w.complete(strings.Repeat("a", 3<<20), "b")
		rec, err := w.Brain.Job(context.Background(), kept)
		w.must(err)
		rec.Log = w.put("the log")
		w.must(w.Brain.Rewrite(context.Background(), []job.Record{*rec}))
		only := w.complete("c", "d")
		w.put("nobody's")
		time.Sleep(2 * time.Hour)
		w.Free = func() (int64, int64, error) { return 1 << 30, 1 << 31, nil }
		if r := w.clean(); r.Freed == 0 || !r.Elsewhere || r.Away || r.Expired != 0 || r.PerDay > 1<<20 || r.Uploads < 3<<20 {
			t.Errorf("sweep = %+v, want what is nobody's gone, and a rate without uploads", r)
		}
		if _, err := w.Blobs.Stat(context.Background(), blob.Key(rec.Log)); err != nil {
			t.Errorf("the log of a job: %v", err)
		}
		free := int64(2<<20 - 4096)
		w.Free = func() (int64, int64, error) { return free, 1 << 31, nil }
		e.down = true
		w.put("nobody's again")
		time.Sleep(2 * time.Hour)
		r, err := w.sweep(context.Background())
		if err != nil || !r.Away || r.Expired != 1 {
			t.Errorf("sweep with the store away = %+v, %v, want both logs gone from here, and one job's files for good", r, err)
		}
		if n := slices.Collect(maps.Keys(second(w.there()))); len(n) != 0 {
			t.Errorf("output of jobs %v is left", n)
		}
		for id, want := range map[int64]bool{kept: false, only: true} {
			if rec, err := w.Brain.Job(context.Background(), id); err != nil || rec.Expired.IsZero() == want {
				t.Errorf("job %d expired %v, %v, want it: %v", id, rec.Expired, err, want)
			}
		}
		e.down, free = false, 1<<30
		if r, err := w.sweep(context.Background()); err != nil || r.Away || r.Freed == 0 {
			t.Errorf("sweep with the store back = %+v, %v, want what was left gone", r, err)
		}
		blobs, _ := w.there()
		if want := []string{rec.Source, rec.Archive, rec.Log}; len(blobs) != 3 || !blobs[want[0]] || !blobs[want[1]] || !blobs[want[2]] {
			t.Errorf("blobs = %v, want %q", blobs, want)
		}
	})
}

func second[A, B any](_ A, b B) B { return b }
