package queue

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/rai-project/raid/runner/job"
)

// A world is a core with the clock and the shorthand that tests need.
type world struct {
	t   testing.TB
	now Millis
	c   *Core
}

func newWorld(t testing.TB) *world {
	return &world{t: t, now: 1_700_000_000_000, c: New(DefaultPolicy())}
}

func (w *world) do(cmd Command) any {
	w.t.Helper()
	reply, err := w.c.Apply(w.now, cmd)
	if err != nil {
		w.t.Fatalf("%T: %v", cmd, err)
	}
	return reply
}

func (w *world) submit(user, team string) int64 {
	w.t.Helper()
	rec := job.Record{Job: job.Job{User: user, Team: team, Pool: "p", Kind: "run"},
		Spec: job.Spec{Steps: []string{"true"}, Limits: job.Limits{Time: time.Hour}}}
	return w.do(Submit{rec}).(*job.Record).ID
}

// join connects a runner that wants work.
func (w *world) join(id string) {
	w.t.Helper()
	w.do(Join{Runner: Runner{ID: id, Name: id, Pools: []string{"p"}, Engine: "fake", Arch: "amd64"}})
	w.do(Beat{Runner: id, Idle: true})
}

// offer returns the one offer made since the last call.
func (w *world) offer() Offer {
	w.t.Helper()
	fx := w.c.Effects()
	if len(fx.Offers) != 1 {
		w.t.Fatalf("%d offers, want 1", len(fx.Offers))
	}
	return fx.Offers[0]
}

func (w *world) finish(o Offer, res job.Result) *job.Record {
	w.t.Helper()
	return w.do(Finish{Runner: o.Runner, Lease: o.Lease, Result: res}).(*job.Record)
}

var passed = job.Result{Reason: job.ReasonExit}

func (w *world) state(id int64) job.State {
	rec, ok := w.c.Job(id)
	if !ok {
		return "gone"
	}
	return rec.State
}

func TestLifeOfAJob(t *testing.T) {
	w := newWorld(t)
	id := w.submit("ada", "")
	if got := w.state(id); got != job.Queued {
		t.Fatalf("state = %s, want queued", got)
	}
	w.c.Effects()
	w.now += 2500
	w.join("r1")
	o := w.offer()
	if o.Job != id || o.Attempt != 1 || o.Fence == 0 {
		t.Fatalf("offer = %+v, want job %d attempt 1 with a fence", o, id)
	}
	w.now += 1000
	rec := w.finish(o, job.Result{Reason: job.ReasonExit, Exit: 3})
	if rec.State != job.Failed || *rec.Exit != 3 || rec.QueueWaitMS != 2500 || rec.ChargedS != 1 {
		t.Errorf("finished as %s exit %d after %d ms, charged %v; want failed 3 2500 1", rec.State, *rec.Exit, rec.QueueWaitMS, rec.ChargedS)
	}
	if got := w.state(id); got != "gone" {
		t.Errorf("state = %s, want no unfinished job", got)
	}
}

// TestFences: after a job moved on, nothing its old runner says changes anything.
func TestFences(t *testing.T) {
	w := newWorld(t)
	id := w.submit("ada", "")
	w.c.Effects()
	w.join("r1")
	old := w.offer()
	w.now += DefaultPolicy().Lease
	w.do(Tick{})
	if got := w.state(id); got != job.Queued {
		t.Fatalf("state = %s after a lease without a word, want queued", got)
	}
	w.c.Effects()
	w.join("r2")
	fresh := w.offer()
	if fresh.Attempt != 2 || fresh.Fence <= old.Fence || fresh.Say == "" {
		t.Fatalf("second offer = %+v, want attempt 2, a higher fence and a reason", fresh)
	}
	for _, cmd := range []Command{
		Begin{Runner: "r1", Lease: old.Lease},
		Finish{Runner: "r1", Lease: old.Lease, Result: passed},
		Finish{Runner: "r1", Lease: fresh.Lease, Result: passed}, // the right fence, another's key
		Finish{Runner: "r2", Lease: old.Lease, Result: passed},   // the right key, a stale fence
	} {
		if _, err := w.c.Apply(w.now, cmd); !errors.Is(err, ErrStale) {
			t.Errorf("%T %+v: %v, want ErrStale", cmd, cmd, err)
		}
	}
	w.do(Beat{Runner: "r1", Held: &old.Lease})
	if fx := w.c.Effects(); len(fx.Stops) != 1 || !fx.Stops[0].Stale || fx.Stops[0].Runner != "r1" {
		t.Errorf("a stale beat was answered with %+v, want one stale stop", fx.Stops)
	}
	if rec := w.finish(fresh, passed); rec.State != job.Succeeded || rec.Attempt != 2 {
		t.Errorf("finished as %s on attempt %d, want succeeded on 2", rec.State, rec.Attempt)
	}
}

// TestBeatKeepsLease: a lease that is renewed never ends, a restart of raid starts
// its clock again, and a restarted runner loses it at once.
func TestBeatKeepsLease(t *testing.T) {
	w := newWorld(t)
	id := w.submit("ada", "")
	w.c.Effects()
	w.join("r1")
	o := w.offer()
	for range 20 {
		w.now += 5000
		w.do(Beat{Runner: "r1", Held: &o.Lease})
		w.do(Tick{})
	}
	if got := w.state(id); got != job.Running {
		t.Fatalf("state = %s after 100 s of beats, want running", got)
	}
	w.reload()
	w.now += DefaultPolicy().Lease - 1
	w.do(Tick{})
	if got := w.state(id); got != job.Running {
		t.Fatalf("state = %s a moment before raid itself was up for a lease, want running", got)
	}
	w.do(Join{Runner: Runner{ID: "r1", Name: "r1", Pools: []string{"p"}}})
	if got := w.state(id); got != job.Queued {
		t.Errorf("state = %s after its runner came back without it, want queued", got)
	}
}

func TestGivesUpAfterAttempts(t *testing.T) {
	w := newWorld(t)
	w.submit("ada", "")
	w.c.Effects()
	w.join("r1")
	for n := 1; ; n++ {
		rec := w.finish(w.offer(), job.Result{Reason: job.ReasonInfra, Note: "no engine"})
		if rec.ChargedS != 0 {
			t.Errorf("attempt %d charged %v s, want a full refund", n, rec.ChargedS)
		}
		if rec.State == job.Queued {
			w.do(Beat{Runner: "r1", Idle: true})
			continue
		}
		if n != 3 || rec.Reason != job.ReasonInfra || *rec.Exit != job.ExitInfra {
			t.Errorf("gave up after attempt %d as %s %d, want 3 infra 125", n, rec.Reason, *rec.Exit)
		}
		return
	}
}

func TestCancel(t *testing.T) {
	w := newWorld(t)
	first, second := w.submit("ada", ""), w.submit("ada", "")
	w.c.Effects()
	w.join("r1")
	o := w.offer()
	if rec := w.do(Cancel{Job: second, By: "ada"}).(*job.Record); rec.State != job.Cancelled || *rec.Exit != job.ExitCancelled {
		t.Errorf("a queued job is %s, want cancelled at once", rec.State)
	}
	if rec := w.do(Cancel{Job: first, By: "bob"}).(*job.Record); rec.State != job.Cancelling {
		t.Errorf("a running job is %s, want cancelling", rec.State)
	}
	if fx := w.c.Effects(); len(fx.Stops) != 1 || fx.Stops[0].Stale {
		t.Fatalf("stops = %+v, want one that asks for the end", fx.Stops)
	}
	rec := w.finish(o, job.Result{Reason: job.ReasonCancelled, Exit: job.ExitCancelled})
	if rec.State != job.Cancelled || rec.CancelBy != "bob" {
		t.Errorf("ended %s by %q, want cancelled by bob", rec.State, rec.CancelBy)
	}
	if rec.ChargedS != 5 {
		t.Errorf("charged %v s, want the least charge of 5", rec.ChargedS)
	}
	if _, err := w.c.Apply(w.now, Cancel{Job: 99}); !errors.Is(err, ErrNoJob) {
		t.Errorf("Cancel(99) = %v, want ErrNoJob", err)
	}
}

// TestCancelledWhileRunnerIsGone: a cancelled job ends even if nobody answers.
func TestCancelledWhileRunnerIsGone(t *testing.T) {
	w := newWorld(t)
	id := w.submit("ada", "")
	w.join("r1")
	w.do(Leave{"r1"})
	w.do(Cancel{Job: id})
	w.now += DefaultPolicy().Lease
	w.do(Tick{})
	if got := w.state(id); got != "gone" {
		t.Errorf("state = %s, want ended", got)
	}
}

// TestTurns: a team with one job does not wait behind a team with fifty.
func TestTurns(t *testing.T) {
	w := newWorld(t)
	for range 50 {
		w.submit("hog", "hogs")
	}
	late := w.submit("ada", "quiet")
	order := w.c.Order("p")
	if at := slices.IndexFunc(order, func(r job.Record) bool { return r.ID == late }); at > 1 {
		t.Errorf("the late job is number %d in the fair order, want 1 or 2", at+1)
	}
	w.c.Effects()
	w.join("r1")
	for n := 1; n <= 2; n++ {
		o := w.offer()
		if o.Job == late {
			return
		}
		w.now += 10_000
		w.finish(o, passed)
		w.do(Beat{Runner: "r1", Idle: true})
	}
	t.Error("the late job was not among the first two")
}

// TestShares: two teams that always want more get the same GPU time, whatever the
// length of their jobs.
func TestShares(t *testing.T) {
	w := newWorld(t)
	length := map[string]Millis{"short": 7_000, "long": 300_000}
	got := map[string]Millis{}
	for team := range length {
		for range 2000 {
			w.submit("u-"+team, team)
		}
	}
	w.c.Effects()
	w.join("r1")
	for w.now-1_700_000_000_000 < 20_000_000 {
		o := w.offer()
		w.now += length[o.Team]
		got[o.Team] += length[o.Team]
		w.finish(o, passed)
		w.do(Beat{Runner: "r1", Idle: true})
	}
	if d := got["long"] - got["short"]; d < -600_000 || d > 600_000 {
		t.Errorf("short got %d ms, long %d ms; they may differ by two long jobs", got["short"], got["long"])
	}
}

func TestLabels(t *testing.T) {
	for _, tt := range []struct {
		r    Runner
		spec job.Spec
		can  bool
	}{
		{Runner{Pools: []string{"p"}, Arch: "amd64"}, job.Spec{}, true},
		{Runner{Pools: []string{"q"}, Arch: "amd64"}, job.Spec{}, false},
		{Runner{Pools: []string{"p"}, Arch: "amd64"}, job.Spec{CPUArch: "ppc64le"}, false},
		{Runner{Pools: []string{"p"}, Arch: "amd64"}, job.Spec{GPUs: 1}, false},
		{Runner{Pools: []string{"p"}, GPUs: []string{"V100"}}, job.Spec{GPUs: 2}, true},
	} {
		if got := tt.r.CanRun(&job.Record{Job: job.Job{Pool: "p"}, Spec: tt.spec}); got != tt.can {
			t.Errorf("%+v CanRun %+v = %v, want %v", tt.r, tt.spec, got, tt.can)
		}
	}
}

// reload throws the core away and loads it from the rows it has written.
func (w *world) reload() {
	w.t.Helper()
	rows := map[string]Row{}
	keep(rows, w.c.Flush())
	w.c = load(w.t, w.now, rows)
}

func keep(rows map[string]Row, writes []Write) {
	for _, wr := range writes {
		key := wr.Table + "\x00" + wr.Key
		if wr.Value == nil {
			delete(rows, key)
		} else {
			rows[key] = wr.Row
		}
	}
}

func load(t testing.TB, now Millis, rows map[string]Row) *Core {
	t.Helper()
	c := New(DefaultPolicy())
	for _, table := range Tables() {
		var keys []string
		for key, r := range rows {
			if r.Table == table {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
		for _, key := range keys {
			if err := c.LoadRow(now, rows[key]); err != nil {
				t.Fatal(err)
			}
		}
	}
	return c
}

// TestReplay is the property everything rests on: a core that is thrown away and
// loaded from its rows at random points decides exactly as one that never was.
func TestReplay(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		now := Millis(1_700_000_000_000)
		plain, reborn := New(DefaultPolicy()), New(DefaultPolicy())
		rows := map[string]Row{}
		leases := map[string]*job.Lease{}
		for range rapid.IntRange(1, 60).Draw(rt, "commands") {
			now += rapid.Int64Range(0, 4000).Draw(rt, "passes")
			cmd := drawCommand(rt, leases)
			_, err1 := plain.Apply(now, cmd)
			_, err2 := reborn.Apply(now, cmd)
			if fmt.Sprint(err1) != fmt.Sprint(err2) {
				rt.Fatalf("%T: %v and %v", cmd, err1, err2)
			}
			fx1, fx2 := plain.Effects(), reborn.Effects()
			if a, b := encode(fx1), encode(fx2); !bytes.Equal(a, b) {
				rt.Fatalf("%T: effects differ:\n%s\n%s", cmd, a, b)
			}
			for _, o := range fx1.Offers {
				leases[o.Runner] = &o.Lease
			}
			w1, w2 := plain.Flush(), reborn.Flush()
			if a, b := dump(w1), dump(w2); !bytes.Equal(a, b) {
				rt.Fatalf("%T: rows differ:\n%s\n%s", cmd, a, b)
			}
			keep(rows, w2)
			if rapid.IntRange(0, 4).Draw(rt, "reload") == 0 {
				reborn = revive(t, now, plain, rows)
			}
		}
	})
}

// revive loads a core and gives it what is not in rows: who is connected, and when
// runners were last heard of.
func revive(t *testing.T, now Millis, from *Core, rows map[string]Row) *Core {
	c := load(t, now, rows)
	for id, r := range from.runners {
		*c.runners[id] = *r
	}
	for id, e := range from.jobs {
		c.jobs[id].heard = e.heard
	}
	return c
}

func dump(writes []Write) []byte {
	var b bytes.Buffer
	for _, w := range writes {
		fmt.Fprintf(&b, "%s %q %s %v %d\n", w.Table, w.Key, w.Value, w.Lists, w.Score)
	}
	return b.Bytes()
}

func drawCommand(rt *rapid.T, leases map[string]*job.Lease) Command {
	runner := rapid.SampledFrom([]string{"r1", "r2"}).Draw(rt, "runner")
	held := leases[runner]
	switch rapid.IntRange(0, 8).Draw(rt, "command") {
	case 0, 1, 2:
		return Submit{job.Record{Job: job.Job{Pool: "p", Kind: "run",
			User: rapid.SampledFrom([]string{"ada", "bob", "eve"}).Draw(rt, "user"),
			Team: rapid.SampledFrom([]string{"", "t1", "t2"}).Draw(rt, "team")},
			Spec: job.Spec{Limits: job.Limits{Time: time.Hour}}}}
	case 3:
		return Join{Runner: Runner{ID: runner, Name: runner, Pools: []string{"p"}}, Held: held}
	case 4:
		return Beat{Runner: runner, Held: held}
	case 5:
		leases[runner] = nil
		return Beat{Runner: runner, Idle: true}
	case 6:
		if held != nil {
			leases[runner] = nil
			return Finish{Runner: runner, Lease: *held, Result: job.Result{
				Reason: rapid.SampledFrom([]job.Reason{job.ReasonExit, job.ReasonInfra, job.ReasonCancelled}).Draw(rt, "reason")}}
		}
		return Leave{Runner: runner}
	case 7:
		return Cancel{Job: rapid.Int64Range(1, 10).Draw(rt, "job"), By: "ada"}
	}
	return Tick{}
}
