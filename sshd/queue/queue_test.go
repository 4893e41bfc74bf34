package queue

import (
	"bytes"
	"errors"
	"fmt"
	"math"
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

// TestComesBack: a runner that was thought lost goes on with its job, on the same
// attempt, whatever raid hears of it first, unless somebody else was granted the job.
func TestComesBack(t *testing.T) {
	for name, word := range map[string]func(w *world, o Offer){
		"join": func(w *world, o Offer) {
			w.do(Join{Runner: Runner{ID: "r1", Name: "r1", Pools: []string{"p"}}, Held: &o.Lease})
		},
		"beat":  func(w *world, o Offer) { w.do(Beat{Runner: "r1", Held: &o.Lease}) },
		"claim": func(w *world, o Offer) { w.do(Claim{Runner: "r1", Lease: o.Lease}) },
		"begin": func(w *world, o Offer) { w.do(Begin{Runner: "r1", Lease: o.Lease}) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			id := w.submit("ada", "")
			w.c.Effects()
			w.join("r1")
			o := w.offer()
			w.now += DefaultPolicy().Lease + 10_000
			w.do(Tick{})
			if fx := w.c.Effects(); w.state(id) != job.Queued || len(fx.Stops) != 0 {
				t.Fatalf("%s, stops %v after a silence; want queued, and nobody stopped", w.state(id), fx.Stops)
			}
			w.reload()
			w.do(Join{Runner: Runner{ID: "r1", Name: "r1", Pools: []string{"p"}}})
			word(w, o)
			if fx := w.c.Effects(); w.state(id) != job.Running || len(fx.Stops) != 0 {
				t.Fatalf("%s, stops %v after its runner came back; want running", w.state(id), fx.Stops)
			}
			rec := w.finish(o, passed)
			if rec.State != job.Succeeded || rec.Attempt != 1 || rec.ChargedS != 40 {
				t.Errorf("%s on attempt %d, charged %v s; want succeeded on 1 for 40", rec.State, rec.Attempt, rec.ChargedS)
			}
		})
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

// TestOneKeyTwoFolders: of two runners with one key the second waits until the first has
// gone or is not heard of, but a runner that comes back to its folder is let in at once.
func TestOneKeyTwoFolders(t *testing.T) {
	w := newWorld(t)
	id := w.submit("ada", "")
	w.c.Effects()
	in := func(folder string, held *job.Lease) error {
		_, err := w.c.Apply(w.now, Join{Runner: Runner{ID: "r1", Folder: folder, Name: "r1", Pools: []string{"p"}}, Held: held})
		return err
	}
	if err := in("a", nil); err != nil {
		t.Fatal(err)
	}
	w.do(Beat{Runner: "r1", Idle: true})
	o := w.offer()
	w.now += 5000
	w.do(Beat{Runner: "r1", Held: &o.Lease})
	w.now += DefaultPolicy().Lease - 1
	if err := in("b", nil); !errors.Is(err, ErrTaken) {
		t.Fatalf("another folder: %v, want %v", err, ErrTaken)
	}
	if got := w.state(id); got != job.Running {
		t.Fatalf("state = %s, want running", got)
	}
	if err := in("a", &o.Lease); err != nil {
		t.Errorf("the same folder: %v", err)
	}
	if err := in("", &o.Lease); err != nil {
		t.Errorf("one that does not say: %v", err)
	}
	if err := in("a", &o.Lease); err != nil {
		t.Errorf("after one that does not say: %v", err)
	}
	w.do(Leave{Runner: "r1"})
	if err := in("b", nil); err != nil {
		t.Errorf("after the first had left: %v", err)
	}
	if got := w.state(id); got != job.Queued {
		t.Errorf("state = %s after its runner was replaced, want queued", got)
	}
	w.now += DefaultPolicy().Lease
	if err := in("a", nil); err != nil {
		t.Errorf("after silence: %v", err)
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
	order := w.c.Outlook(w.now, "p")
	if at := slices.IndexFunc(order, func(f Forecast) bool { return f.Job == late }); at > 1 {
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
		{Runner{Pools: []string{"p"}}, job.Spec{Image: "any"}, true},
		{Runner{Pools: []string{"p"}, Engine: "docker"}, job.Spec{Engine: "docker"}, true},
		{Runner{Pools: []string{"p"}, Engine: "bwrap"}, job.Spec{Engine: "docker"}, false},
		{Runner{Pools: []string{"p"}, GPUs: []string{"V100"}, GPUArch: "volta"}, job.Spec{GPUs: 1, GPUArch: "Volta", StrictArch: true}, true},
		{Runner{Pools: []string{"p"}, GPUs: []string{"V100"}, GPUArch: "volta"}, job.Spec{GPUs: 1, GPUArch: "pascal", StrictArch: true}, false},
		{Runner{Pools: []string{"p"}, GPUs: []string{"V100"}, GPUArch: "volta"}, job.Spec{GPUs: 1, GPUArch: "pascal"}, true},
		{Runner{Pools: []string{"p"}, GPUs: []string{"V100"}}, job.Spec{GPUs: 1, GPUArch: "volta", StrictArch: true}, false},
		{Runner{Pools: []string{"p"}, Arch: "amd64"}, job.Spec{GPUArch: "volta", StrictArch: true}, true},
		{Runner{Pools: []string{"p"}, Images: map[string]*job.Images{"p": {Roles: map[string][]string{"staff": {"a*"}}}}}, job.Spec{Image: "any", Role: "staff"}, true},
		{Runner{Pools: []string{"p"}, Images: map[string]*job.Images{"p": {Roles: map[string][]string{"staff": {"a*"}}}}}, job.Spec{Image: "any", Role: "student"}, false},
		{Runner{Pools: []string{"p", "q"}, Images: map[string]*job.Images{"q": {}}}, job.Spec{Image: "any"}, true}, // of p, where images mean nothing
		{Runner{Pools: []string{"p"}, Images: map[string]*job.Images{"p": {Default: "a"}}}, job.Spec{}, true},
		{Runner{Pools: []string{"p"}, Images: map[string]*job.Images{"p": {Default: "a"}}}, job.Spec{Image: "any"}, false},
		{Runner{Pools: []string{"p"}, Images: map[string]*job.Images{"p": {Allow: []string{"a*"}}}}, job.Spec{Image: "any"}, true},
		{Runner{Pools: []string{"p"}, Images: map[string]*job.Images{"p": {Allow: []string{"a*"}}}}, job.Spec{}, false},
	} {
		if got := New(DefaultPolicy()).Lacks(&tt.r, &job.Record{Job: job.Job{Pool: "p"}, Spec: tt.spec}); (got == "") != tt.can {
			t.Errorf("%+v lacks %q for %+v, want able: %v", tt.r, got, tt.spec, tt.can)
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
		if _, had := rows[key]; had && wr.New {
			panic("not new: " + key)
		}
		if wr.Value == nil {
			delete(rows, key)
		} else {
			rows[key] = wr.Row
		}
	}
}

func load(t testing.TB, now Millis, rows map[string]Row) *Core {
	t.Helper()
	c := New(drawn)
	for _, table := range Tables() {
		var keys []string
		for key, r := range rows {
			if r.Table == table {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
		for _, key := range keys {
			p, err := Parse(rows[key])
			if err != nil {
				t.Fatal(err)
			}
			c.Load(now, p)
		}
	}
	return c
}

// drawn is the policy of the random runs: everything is switched on.
var drawn = Policy{Lease: 30_000, Attempts: 3, Burst: 20_000, FirstGo: 60_000, MinGo: 5_000, Express: 120_000,
	User: Caps{Running: 1, Queued: 6}, Team: Caps{Running: 2, Daily: 30}, Weights: map[string]int64{"t2": 3}}

// TestReplay is the property everything rests on: a core that is thrown away and
// loaded from its rows at random points decides exactly as one that never was.
func TestReplay(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		now := Millis(1_700_000_000_000)
		plain, reborn := New(drawn), New(drawn)
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
			verify(rt, plain)
			verify(rt, reborn)
			verifyCaps(rt, plain, fx1.Offers)
			if rapid.IntRange(0, 4).Draw(rt, "reload") == 0 {
				reborn = revive(t, now, plain, rows)
			}
		}
	})
}

// A sick runner gets nothing, whatever else it says, until a beat says that it is well.
func TestSick(t *testing.T) {
	w := newWorld(t)
	w.join("r")
	w.do(Beat{Runner: "r", Idle: true, Sick: "Xid 79"})
	id := w.submit("ada", "t")
	if got := w.state(id); got != job.Queued {
		t.Errorf("job %d is %s on a sick runner, want queued", id, got)
	}
	w.do(Beat{Runner: "r", Idle: true})
	if got := w.state(id); got != job.Running {
		t.Errorf("job %d is %s once the runner is well, want running", id, got)
	}
}

// verify holds the core against an oracle that looks at every job: the heaps pick
// what a search of everything picks, nobody idle could have run something that waits,
// caps hold, and the counts are those of the jobs.
func verify(t interface{ Fatalf(string, ...any) }, c *Core) {
	for id, r := range c.runners {
		got, want := c.pick(r), oracle(c, r)
		if got != want {
			t.Fatalf("runner %s: the heaps pick %v, a search picks %v", id, name(got), name(want))
		}
		if r.Idle && r.Connected && !r.Draining && !r.Drained && want != nil {
			t.Fatalf("runner %s is idle though job %d waits: not work conserving", id, want.ID)
		}
	}
	queued, running, waiting := map[*node]int{}, map[*node]int{}, map[*class]int{}
	for _, e := range c.jobs {
		if e.place != nil {
			waiting[e.place.class]++
		}
		for n := c.nodeOf(e); n != nil; n = n.parent {
			if e.State == job.Queued {
				queued[n]++
			} else {
				running[n]++
			}
		}
	}
	verifyClasses(t, c, waiting)
	for _, p := range c.pools {
		for _, n := range append(p.sortedChildren(), p) {
			if n.queued != queued[n] || n.running != running[n] {
				t.Fatalf("%s counts %d queued, %d running; there are %d and %d", n.key, n.queued, n.running, queued[n], running[n])
			}
		}
	}
}

// verifyClasses: no class outlives its last job.
func verifyClasses(t interface{ Fatalf(string, ...any) }, c *Core, waiting map[*class]int) {
	for _, cl := range c.classes {
		if cl.jobs == 0 || cl.jobs != waiting[cl] {
			t.Fatalf("class %+v counts %d jobs, there are %d", cl.needs, cl.jobs, waiting[cl])
		}
	}
	for _, p := range c.pools {
		for _, n := range p.sortedChildren() {
			if len(n.places) > len(c.classes) {
				t.Fatalf("%s has %d places in %d classes", n.key, len(n.places), len(c.classes))
			}
		}
	}
}

// verifyCaps: nothing starts over a cap. A job that its runner came back with may
// have gone over it, but then nothing starts beside it.
func verifyCaps(t interface{ Fatalf(string, ...any) }, c *Core, offers []Offer) {
	for _, o := range offers {
		for n := c.nodeOf(c.jobs[o.Job]); n.parent != nil; n = n.parent {
			if n.caps.Running > 0 && n.running > n.caps.Running {
				t.Fatalf("%s runs %d after job %d started, its cap is %d", n.key, n.running, o.Job, n.caps.Running)
			}
		}
	}
}

func name(e *entry) string {
	if e == nil {
		return "nothing"
	}
	return fmt.Sprintf("job %d", e.ID)
}

// oracle is pick as one would write it without heaps.
func oracle(c *Core, r *Runner) *entry {
	for _, pool := range r.Pools {
		if p := c.pools[pool]; p == nil || p.paused {
			continue
		}
		var best *entry
		for _, id := range sortedIDs(c.jobs) {
			e := c.jobs[id]
			n := c.needs(&e.Record)
			u := c.nodeOf(e)
			if e.State != job.Queued || e.Pool != pool || r.lacks(&n) != "" || u.capped() || u.parent.capped() {
				continue
			}
			if best == nil || slowBefore(c, r, e, best) {
				best = e
			}
		}
		if best != nil {
			return best
		}
	}
	return nil
}

// slowBefore says which of two jobs a runner takes first: by tenant, then by user,
// then by the user's own order.
func slowBefore(c *Core, r *Runner, a, b *entry) bool {
	ua, ub := c.nodeOf(a), c.nodeOf(b)
	if ua == ub {
		return a.rank(b) < 0
	}
	if ua.parent == ub.parent {
		return ua.compare(ub) < 0
	}
	return ua.parent.compare(ub.parent) < 0
}

// revive loads a core and gives it what is not in rows: who is connected, and when
// runners were last heard of.
func revive(t *testing.T, now Millis, from *Core, rows map[string]Row) *Core {
	c := load(t, now, rows)
	for id, r := range from.runners {
		idle := r.Idle
		*c.runners[id] = *r
		c.runners[id].Idle = false
		c.setIdle(c.runners[id], idle)
	}
	for id, e := range from.jobs {
		c.jobs[id].heard = e.heard
	}
	return c
}

func dump(writes []Write) []byte {
	var b bytes.Buffer
	for _, w := range writes {
		fmt.Fprintf(&b, "%s %q %s %v %d %v\n", w.Table, w.Key, w.Value, w.Lists, w.Score, w.New)
	}
	return b.Bytes()
}

func drawCommand(rt *rapid.T, leases map[string]*job.Lease) Command {
	runner := rapid.SampledFrom([]string{"r1", "r2"}).Draw(rt, "runner")
	held := leases[runner]
	switch rapid.IntRange(0, 9).Draw(rt, "command") {
	case 0, 1, 2:
		return Submit{job.Record{Job: job.Job{Pool: "p", Kind: "run",
			User: rapid.SampledFrom([]string{"ada", "bob", "eve"}).Draw(rt, "user"),
			Team: rapid.SampledFrom([]string{"", "t1", "t2"}).Draw(rt, "team")},
			Spec: job.Spec{Limits: job.Limits{Time: rapid.SampledFrom([]time.Duration{time.Minute, time.Hour}).Draw(rt, "limit")},
				GPUs: rapid.IntRange(0, 1).Draw(rt, "gpus"), Priority: rapid.IntRange(0, 1).Draw(rt, "priority")}}}
	case 3:
		r := Runner{ID: runner, Name: runner, Pools: []string{"p"}, Express: runner == "r2"}
		if rapid.Bool().Draw(rt, "has gpu") {
			r.GPUs = []string{"V100"}
		}
		return Join{Runner: r, Held: held}
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
	case 8:
		return rapid.SampledFrom([]Command{Pause{"p", true}, Pause{"p", false}, Pause{"p", false},
			Drain{"r1", true}, Drain{"r1", false}, Drain{"r2", false}}).Draw(rt, "staff")
	case 7:
		return Cancel{Job: rapid.Int64Range(1, 10).Draw(rt, "job"), By: "ada"}
	}
	return Tick{}
}

func TestCaps(t *testing.T) {
	p := DefaultPolicy()
	p.User = Caps{Running: 1, Queued: 3, Daily: 5}
	w := newWorld(t)
	w.c = New(p)
	for range 3 {
		w.submit("ada", "")
	}
	full := Submit{job.Record{Job: job.Job{User: "ada", Pool: "p"}}}
	if _, err := w.c.Apply(w.now, full); !errors.Is(err, ErrFull) {
		t.Errorf("fourth waiting job: %v, want ErrFull", err)
	}
	w.join("r1")
	w.join("r2")
	first := w.c.Effects().Offers
	if len(first) != 1 {
		t.Fatalf("%d jobs of one user run, the cap is 1", len(first))
	}
	for n, o := 0, first[0]; n < 2; n++ {
		w.submit("ada", "")
		w.finish(o, passed)
		o = w.offer()
		if o.Runner == "r1" {
			w.do(Beat{Runner: "r2", Idle: true})
		} else {
			w.do(Beat{Runner: "r1", Idle: true})
		}
	}
	if _, err := w.c.Apply(w.now, full); !errors.Is(err, ErrDaily) {
		t.Errorf("sixth job of the day: %v, want ErrDaily", err)
	}
	w.now += 24 * 3600_000
	if _, err := w.c.Apply(w.now, full); errors.Is(err, ErrDaily) {
		t.Errorf("first job of the next day: %v", err)
	}
}

// TestNeedsAreFew: what one user's jobs ask for cannot make every decision long.
func TestNeedsAreFew(t *testing.T) {
	w := newWorld(t)
	asks := func(user string, gpus int, memoryMB int64) error {
		_, err := w.c.Apply(w.now, Submit{job.Record{Job: job.Job{User: user, Pool: "p"}, Spec: job.Spec{GPUs: gpus, GPUMemoryMB: memoryMB}}})
		return err
	}
	for n := range int64(maxNeeds) {
		if err := errors.Join(asks("eve", 1, n+1), asks("eve", 1, n+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := asks("eve", 1, maxNeeds+1); !errors.Is(err, ErrNeeds) {
		t.Errorf("one more: %v, want ErrNeeds", err)
	}
	if err := errors.Join(asks("eve", 1, 1), asks("ada", 1, maxNeeds+1)); err != nil {
		t.Errorf("the same again, and somebody else's: %v", err)
	}
	for id := range int64(2) {
		w.do(Cancel{Job: id + 1})
	}
	w.do(Cancel{Job: 2*maxNeeds + 1})
	if err := asks("eve", 1, maxNeeds+1); err != nil {
		t.Errorf("after one was cancelled: %v", err)
	}
	for n := range int64(2 * maxNeeds) {
		if err := asks("bob", 0, n); err != nil {
			t.Fatalf("memory of no GPU: %v", err)
		}
	}
}

// TestCapBanksNothing: time behind one's own cap is no credit (the bug that the first
// run of the research's property test found).
func TestCapBanksNothing(t *testing.T) {
	p := DefaultPolicy()
	p.Team.Running = 1
	w := newWorld(t)
	w.c = New(p)
	for range 50 {
		w.submit("ada", "capped")
		w.submit("bob", "b")
		w.submit("eve", "e")
	}
	w.join("r1")
	w.join("r2")
	w.join("r3")
	offers := w.c.Effects().Offers
	for range 30 { // capped's one job goes on and on
		w.now += 60_000
		for i, o := range offers {
			if o.Team != "capped" {
				w.finish(o, passed)
				w.do(Beat{Runner: o.Runner, Idle: true})
				offers[i] = w.offer()
			} else {
				w.do(Beat{Runner: o.Runner, Held: &o.Lease})
			}
		}
	}
	n := w.c.pool("p").children["capped"]
	if low := w.c.pool("p").start - p.Burst*1000; n.used < low {
		t.Errorf("capped team stands at %d, below %d", n.used, low)
	}
}

// TestCreditDoesNotStack: people who leave and come back all the time get the credit of
// a newcomer each time, but one below V, not below each other: who waits steadily gets
// their share all the same.
func TestCreditDoesNotStack(t *testing.T) {
	w := newWorld(t)
	for range 2000 {
		w.submit("steady", "steady")
	}
	w.c.Effects()
	w.join("r1")
	got := map[string]Millis{}
	const comers, length, rounds = 4, 30_000, 1500
	for i := range comers {
		w.submit(fmt.Sprint("comer", i), fmt.Sprint("comer", i))
	}
	for range rounds {
		o := w.offer()
		w.now += length
		got[o.Team] += length
		w.finish(o, passed)
		w.do(Beat{Runner: "r1", Idle: true})
		if o.Team != "steady" { // whose job just ended has left, and comes back when the next has started
			w.submit(o.User, o.Team)
		}
	}
	fair := Millis(rounds * length / (comers + 1))
	if got["steady"] < fair-10*length {
		t.Errorf("who waits all the time got %d s, a fair share is %d", got["steady"]/1000, fair/1000)
	}
}

func TestWeights(t *testing.T) {
	p := DefaultPolicy()
	p.Weights = map[string]int64{"double": 2}
	w := newWorld(t)
	w.c = New(p)
	for range 300 {
		w.submit("ada", "double")
		w.submit("bob", "single")
	}
	w.c.Effects()
	w.join("r1")
	got := map[string]int{}
	for range 300 {
		o := w.offer()
		got[o.Team]++
		w.now += 10_000
		w.finish(o, passed)
		w.do(Beat{Runner: "r1", Idle: true})
	}
	if d := got["double"] - 2*got["single"]; d < -3 || d > 3 {
		t.Errorf("weights 2 and 1 got %d and %d jobs", got["double"], got["single"])
	}
}

func TestPriorityIsOnesOwn(t *testing.T) {
	w := newWorld(t)
	low := w.submit("ada", "")
	high := w.do(Submit{job.Record{Job: job.Job{User: "ada", Pool: "p"}, Spec: job.Spec{Priority: 5, Limits: job.Limits{Time: time.Hour}}}}).(*job.Record).ID
	other := w.submit("bob", "")
	order := w.c.Outlook(w.now, "p")
	at := func(id int64) int { return slices.IndexFunc(order, func(f Forecast) bool { return f.Job == id }) }
	if at(high) > at(low) {
		t.Error("the job with the higher priority comes after its owner's other one")
	}
	if at(other) == 2 {
		t.Error("one's priority moved somebody else to the end")
	}
}

// TestOwnOrder: of one's own jobs, what failed without its fault goes first, then what
// one wants first, then what came first.
func TestOwnOrder(t *testing.T) {
	var all []*entry
	for i, j := range []struct{ attempt, priority int }{{1, 0}, {2, 0}, {1, -100}, {0, 100}, {0, 0}, {0, 0}, {0, -100}} {
		e := &entry{}
		e.ID, e.Attempt, e.Spec.Priority = int64(i+1), j.attempt, j.priority
		all = append(all, e)
	}
	for i, a := range all {
		for k, b := range all {
			if got := a.rank(b); got < 0 != (i < k) || got > 0 != (i > k) {
				t.Errorf("rank(%d, %d) = %d", i+1, k+1, got)
			}
		}
	}
}

// TestNoRowOfTheEnded: a job that came and went between two commits was never waiting.
func TestNoRowOfTheEnded(t *testing.T) {
	w := newWorld(t)
	w.do(Cancel{Job: w.submit("ada", "")})
	for _, row := range w.c.Flush() {
		if row.Table == TableJob {
			t.Errorf("row %s %s is written", row.Table, row.Key)
		}
	}
}

func TestExpressTakesShortJobsOnly(t *testing.T) {
	p := DefaultPolicy()
	p.Express = 120_000
	w := newWorld(t)
	w.c = New(p)
	w.submit("ada", "") // an hour
	w.do(Join{Runner: Runner{ID: "x", Name: "x", Pools: []string{"p"}, Express: true}})
	w.do(Beat{Runner: "x", Idle: true})
	if fx := w.c.Effects(); len(fx.Offers) != 0 {
		t.Fatal("an express slot took an hour's job")
	}
	w.do(Submit{job.Record{Job: job.Job{User: "bob", Pool: "p"}, Spec: job.Spec{Limits: job.Limits{Time: 2 * time.Minute}}}})
	if o := w.offer(); o.User != "bob" {
		t.Errorf("the express slot took a job of %s, want bob's short one", o.User)
	}
}

func TestPauseAndDrainAreRemembered(t *testing.T) {
	w := newWorld(t)
	w.join("r1")
	w.do(Pause{"p", true})
	w.do(Drain{"r1", true})
	w.submit("ada", "")
	w.reload()
	w.join("r1")
	w.do(Pause{"p", false})
	if fx := w.c.Effects(); len(fx.Offers) != 0 {
		t.Error("a drained runner got a job")
	}
	w.do(Drain{"r1", false})
	w.offer()
}

// TestOutlook: jobs start in the fair order, each on the slot that is free first of
// those that can take it, and what runs is not waiting.
func TestOutlook(t *testing.T) {
	w := newWorld(t)
	w.join("r1")
	var ids []int64
	for range 5 {
		ids = append(ids, w.submit("ada", ""))
	}
	w.now += 10_000
	all := w.c.Outlook(w.now, "p")
	if len(all) != 4 || all[0].Job != ids[1] {
		t.Fatalf("Outlook = %+v, want the four that wait", all)
	}
	if f := all[2]; f.Job != ids[3] || f.Position != 3 || f.Of != 4 || f.Slots != 1 || f.AheadS != 120 {
		t.Errorf("Outlook = %+v, want job %d third of four, 120 GPU-seconds ahead", f, ids[3])
	}
	if f := all[2]; f.Early != (30+2*30-10)*1000 || f.Late != (90+2*90-10)*1000 {
		t.Errorf("it starts in %d to %d ms, want 80 to 260 s", f.Early, f.Late)
	}

	gpu := job.Record{Job: job.Job{User: "bob", Pool: "p"}, Spec: job.Spec{GPUs: 1, Limits: job.Limits{Time: time.Hour}}}
	id := w.do(Submit{gpu}).(*job.Record).ID
	at := func() Forecast {
		all := w.c.Outlook(w.now, "p")
		return all[slices.IndexFunc(all, func(f Forecast) bool { return f.Job == id })]
	}
	if f := at(); f.Slots != 0 || f.Early != 0 {
		t.Errorf("without a GPU: %+v, want no slot", f)
	}
	w.do(Join{Runner: Runner{ID: "g", Name: "g", Pools: []string{"p"}, GPUs: []string{"V100"}}})
	if f := at(); f.Slots != 1 || f.Early != 0 {
		t.Errorf("with an idle GPU: %+v, want one slot, at once", f)
	}
}

// TestClockStepsBack: nobody waited less than no time, or is paid for what they used.
func TestClockStepsBack(t *testing.T) {
	w := newWorld(t)
	w.submit("ada", "")
	id := w.submit("ada", "")
	w.c.Effects()
	w.join("r1")
	o := w.offer()
	w.now -= 1000
	if rec := w.finish(o, passed); rec.QueueWaitMS < 0 || rec.ChargedS < 0 {
		t.Errorf("a job that ended before it began waited %d ms and was charged %v s", rec.QueueWaitMS, rec.ChargedS)
	}
	if rec := w.do(Cancel{Job: id}).(*job.Record); rec.QueueWaitMS < 0 {
		t.Errorf("a job that was cancelled before it came waited %d ms", rec.QueueWaitMS)
	}
}

// TestNothingIsChargedTwice: what a user and a team have used is what their jobs were
// charged, whoever was lost, came back, failed or was cancelled meanwhile.
func TestNothingIsChargedTwice(t *testing.T) {
	p := drawn
	p.Burst = 1 << 40 // nobody is lifted
	rapid.Check(t, func(rt *rapid.T) {
		now, c := Millis(1_700_000_000_000), New(p)
		leases, lost := map[string]*job.Lease{}, map[string]*job.Lease{}
		for _, user := range []string{"ada", "bob", "eve"} { // newcomers would start at V
			for _, team := range []string{"t1", "t2", "~" + user} {
				c.child(c.child(c.pool("p"), team), user)
			}
		}
		ended := map[string]int64{} // GPU-milliseconds by node
		for range rapid.IntRange(1, 80).Draw(rt, "commands") {
			now += rapid.Int64Range(0, 4000).Draw(rt, "passes")
			cmd := drawCommand(rt, leases)
			switch r := rapid.SampledFrom([]string{"r1", "r2"}).Draw(rt, "who"); rapid.IntRange(0, 9).Draw(rt, "what") {
			case 0: // nobody hears of anybody for a lease
				now += p.Lease
				cmd = Tick{}
			case 1, 2:
				if l := lost[r]; l != nil {
					cmd = rapid.SampledFrom([]Command{Claim{r, *l}, Begin{r, *l}, Beat{Runner: r, Held: l},
						Join{Runner: Runner{ID: r, Name: r, Pools: []string{"p"}}, Held: l},
						Finish{Runner: r, Lease: *l, Result: job.Result{Reason: job.ReasonExit}}}).Draw(rt, "comes back")
				}
			}
			c.Apply(now, cmd)
			fx := c.Effects()
			for _, o := range fx.Offers {
				leases[o.Runner], lost[o.Runner] = &o.Lease, &o.Lease
			}
			for _, rec := range fx.Changed {
				if rec.State.Final() {
					ended["p/"+rec.Tenant()] += int64(math.Round(rec.ChargedS * 1000))
					ended["p/"+rec.Tenant()+"/"+rec.User] += int64(math.Round(rec.ChargedS * 1000))
				}
			}
			c.Flush()
			charged := map[string]int64{}
			for _, e := range c.jobs {
				if e.State == job.Queued && e.charge != 0 {
					rt.Fatalf("%T: job %d waits and is charged %d", cmd, e.ID, e.charge)
				}
				for n := c.nodeOf(e); n.parent != nil; n = n.parent {
					charged[n.key] += e.charge
				}
			}
			for _, tenant := range c.pool("p").children {
				for _, n := range append(tenant.sortedChildren(), tenant) {
					if got, want := n.used*n.weight+n.rem, (charged[n.key]+ended[n.key])*1000; got != want {
						rt.Fatalf("%T: %s has used %d, its jobs were charged %d", cmd, n.key, got, want)
					}
				}
			}
		}
	})
}
