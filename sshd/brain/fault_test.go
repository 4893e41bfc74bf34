package brain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// TestRandomFaults lets people and runners do what they like over a store that fails
// in every way it can, and holds the brain against a core that is never thrown away
// and is given the commands that took effect.
func TestRandomFaults(t *testing.T) {
	for seed := range uint64(16) {
		synctest.Test(t, func(t *testing.T) {
			d := newDuel(t, seed)
			for range 100 {
				most := 3 * time.Second
				if d.rnd.IntN(20) == 0 { // now and then raid stands still, or nobody beats
					most = time.Minute
				}
				<-time.After(time.Duration(d.rnd.Int64N(int64(most))))
				d.turn()
			}
			d.settle()
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// A duel is a brain with a faulty store, and what it should be.
type duel struct {
	t     *testing.T
	rnd   *rand.Rand
	inner *store.Memory // what the faulty store really keeps
	brain *Brain
	fate  store.Failure // of the next commit
	blind bool          // the next load fails
	tried bool          // a commit was asked for

	core    *queue.Core          // the reference
	rows    map[string]queue.Row // and what it wrote
	checked map[string][]byte    // rows that agreed with the news
	told    []job.Record         // what Changed was called with in this turn
	last    map[int64]job.Record // the newest of it for each job
	runners []*actor
	acked   map[string]int64 // jobs by name
	unsure  map[string]bool  // submits that were answered with ErrUnavailable
	n       int              // jobs submitted
}

// An actor is a runner: what it knows and what its connection has brought.
type actor struct {
	id   string
	link *Link
	late *Link // whose join failed, and that has to be taken back
	held *job.Lease
}

// An errand is one request and what to do with its answer.
type errand struct {
	*request
	after func()
}

func newDuel(t *testing.T, seed uint64) *duel {
	d := &duel{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), inner: store.NewMemory(), core: queue.New(duelPolicy),
		rows: map[string]queue.Row{}, checked: map[string][]byte{}, last: map[int64]job.Record{}, acked: map[string]int64{}, unsure: map[string]bool{}}
	faulty := store.Fault(d.inner, func(c store.Call) store.Failure {
		switch {
		case c.Op == store.OpCommit:
			d.tried = true
			return d.fate
		case c.Op == store.OpLoad && d.blind:
			return store.Unavailable
		}
		return store.Works
	})
	var err error
	d.brain, err = New(t.Context(), Config{Store: faulty, Policy: duelPolicy, Changed: d.changed})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		d.runners = append(d.runners, &actor{id: fmt.Sprint("r", i)})
	}
	return d
}

var duelPolicy = queue.Policy{Lease: 30_000, Attempts: 3, Burst: 20_000, FirstGo: 60_000, MinGo: 5_000,
	User: queue.Caps{Running: 2, Queued: 8}, Team: queue.Caps{Daily: 400}}

// changed checks that the news of a job come in an order that makes sense, the last
// of them once.
func (d *duel) changed(rec job.Record) {
	d.told = append(d.told, rec)
	old, known := d.last[rec.ID]
	if known && (old.State.Final() || rec.Attempt < old.Attempt) {
		d.t.Errorf("job %d was %s, attempt %d, and now is %s, attempt %d", rec.ID, old.State, old.Attempt, rec.State, rec.Attempt)
	}
	d.last[rec.ID] = rec
}

// turn is one batch of requests, with whatever goes wrong.
func (d *duel) turn() {
	d.fate, d.blind = store.Works, d.rnd.IntN(3) == 0
	if d.rnd.IntN(4) == 0 {
		d.fate = store.Unavailable + store.Failure(d.rnd.IntN(3))
	}
	var batch []errand
	for range d.rnd.IntN(4) {
		batch = append(batch, d.person())
	}
	for _, i := range d.rnd.Perm(len(d.runners))[:d.rnd.IntN(len(d.runners)+1)] {
		batch = append(batch, d.runner(d.runners[i]))
	}
	d.run(append(batch, errand{request: &request{cmd: queue.Tick{}}, after: func() {}}))
}

// person does something that people do.
func (d *duel) person() errand {
	switch n := d.rnd.IntN(10); {
	case n < 6:
		return d.submit()
	case n < 8 && len(d.acked) > 0:
		ids := slices.Sorted(maps.Values(d.acked))
		return errand{&request{cmd: queue.Cancel{Job: ids[d.rnd.IntN(len(ids))], By: "ada"}}, func() {}}
	case n < 9:
		return errand{&request{cmd: queue.Pause{Pool: "p", On: d.rnd.IntN(4) == 0}}, func() {}}
	}
	row := queue.Row{Table: "user", Key: fmt.Sprint(d.rnd.IntN(5)), Value: fmt.Append(nil, d.rnd.Uint64())}
	return errand{&request{writes: []queue.Write{{Row: row}}}, func() {}}
}

func (d *duel) submit() errand {
	d.n++
	name := fmt.Sprint("job", d.n)
	r := &request{cmd: queue.Submit{Record: job.Record{
		Job:  job.Job{User: fmt.Sprint("u", d.rnd.IntN(4)), Pool: "p", Kind: "run", Name: name},
		Spec: job.Spec{Limits: job.Limits{Time: time.Hour}}}}}
	return errand{r, func() {
		if errors.Is(r.err, ErrUnavailable) {
			d.unsure[name] = true
		} else if r.err == nil {
			d.acked[name] = r.reply.(*job.Record).ID
		}
	}}
}

// runner does something that a runner does.
func (d *duel) runner(a *actor) errand {
	a.listen(d.t)
	r := &request{link: a.link}
	n := d.rnd.IntN(20)
	switch {
	case a.late != nil:
		l := a.late
		r.link, r.op, a.late = l, linkLeave, nil
		return errand{r, func() { d.left(l) }}
	case a.link == nil || n == 0: // it comes, or comes once more
		if a.link != nil && n == 0 && d.rnd.IntN(2) == 0 { // another process
			a.held = nil
		}
		l := &Link{brain: d.brain, runner: queue.Runner{ID: a.id, Name: a.id, Pools: []string{"p"}}, held: a.held, calls: make(chan job.Call, callRoom)}
		r.link = l
		return errand{r, func() {
			if a.link = l; r.err != nil {
				a.link, a.late = nil, l
			}
		}}
	case n == 1:
		r.op = linkLeave
		l := a.link
		return errand{r, func() { a.link = nil; d.left(l) }}
	case a.held != nil && n < 12:
		return d.work(a, n)
	}
	r.op, r.beat = linkBeat, job.Beat{Held: a.held, Idle: a.held == nil}
	return errand{r, func() {
		if errors.Is(r.err, queue.ErrStale) {
			a.link = nil
		}
	}}
}

// left checks that a connection that has ended is forgotten, whatever the store did: a
// load would offer it jobs.
func (d *duel) left(l *Link) {
	if d.brain.links[l.runner.ID] == l {
		d.t.Fatalf("%s has left and is still there", l.runner.ID)
	}
}

// work is what a runner does with its job.
func (d *duel) work(a *actor, n int) errand {
	r := &request{cmd: queue.Finish{Runner: a.id, Lease: *a.held, Result: job.Result{Reason: job.ReasonExit}}}
	switch {
	case n < 4:
		r.cmd = queue.Begin{Runner: a.id, Lease: *a.held}
	case n < 6:
		r.cmd = queue.Claim{Runner: a.id, Lease: *a.held}
	case n < 7:
		r.cmd = queue.Finish{Runner: a.id, Lease: *a.held, Result: job.Result{Reason: job.ReasonInfra, Note: "no engine"}}
	}
	_, final := r.cmd.(queue.Finish)
	return errand{r, func() {
		if errors.Is(r.err, queue.ErrStale) || r.err == nil && final {
			a.held = nil
		}
	}}
}

// listen reads what raid has said to a runner.
func (a *actor) listen(t *testing.T) {
	for a.link != nil {
		select {
		case c, open := <-a.link.calls:
			switch {
			case !open:
				a.link = nil
			case c.Offer != nil:
				if a.held != nil {
					t.Errorf("%s was offered job %d while it has job %d", a.id, c.Offer.Job, a.held.Job)
				}
				a.held = &c.Offer.Lease
			case c.Stale != nil && a.held != nil && *a.held == *c.Stale:
				a.held = nil
			}
		default:
			return
		}
	}
}

func (d *duel) now() queue.Millis { return time.Now().UnixMilli() }

// run has the brain carry out a batch and then holds everything against the reference.
func (d *duel) run(batch []errand) {
	before := d.snapshot()
	var requests []*request
	for _, e := range batch {
		e.request.done = make(chan struct{})
		requests = append(requests, e.request)
	}
	d.tried, d.told = false, nil
	d.step(requests)
	blind := before.lost && d.blind
	failed := blind || d.tried && d.fate != store.Works
	switch {
	case blind || d.tried && (d.fate == store.Unavailable || d.fate == store.AmbiguousLost):
	default:
		d.follow(before, requests, failed)
	}
	for _, e := range batch {
		if failed != errors.Is(e.err, ErrUnavailable) {
			d.t.Fatalf("fate %d, blind %v: %T was answered %v", d.fate, blind, e.cmd, e.err)
		}
		e.after()
	}
	d.compare(failed)
}

// step carries out one batch, as the loop does when nothing is being committed.
func (d *duel) step(requests []*request) {
	b := d.brain
	for _, r := range requests {
		b.add(d.t.Context(), r)
	}
	err := b.launch(d.t.Context())
	if b.flying != nil {
		<-b.flying.landed
		err = b.land()
	}
	if err != nil {
		d.t.Fatalf("the loop would end: %v", err)
	}
}

// A snapshot is what the brain was before a step, as far as its store does not say.
type snapshot struct {
	lost  bool // the core has to be loaded
	awake queue.Millis
	links map[string]*Link
	was   map[*Link]Link
	calls map[*Link]int
}

func (d *duel) snapshot() snapshot {
	s := snapshot{lost: d.brain.core == nil, awake: d.brain.awake, links: maps.Clone(d.brain.links), was: map[*Link]Link{}, calls: map[*Link]int{}}
	for _, l := range s.links {
		s.was[l], s.calls[l] = *l, len(l.calls)
	}
	return s
}

// follow lets the reference have what took effect. silent says that nobody was told.
func (d *duel) follow(before snapshot, requests []*request, silent bool) {
	now := d.now()
	if before.lost {
		d.reconnect(now, before)
	}
	if gap := now - before.awake; before.awake != 0 && gap > deafAfter.Milliseconds() {
		d.core.Apply(now, queue.Deaf{})
	}
	deaf := map[*Link]bool{}
	for l, was := range before.was {
		deaf[l] = was.deaf
	}
	links := maps.Clone(before.links)
	for _, r := range requests {
		cmd, err := linkCommand(links, deaf, r)
		var reply any
		if cmd != nil {
			reply, err = d.core.Apply(now, cmd)
			if r.link != nil {
				reply = nil
			}
		}
		for _, w := range r.writes {
			d.rows[w.Table+" "+w.Key] = w.Row
		}
		if !silent && (text(reply) != text(r.reply) || fmt.Sprint(err) != fmt.Sprint(r.err)) {
			d.t.Fatalf("%T: the brain says %s, %v; the core says %s, %v", cmd, text(r.reply), r.err, text(reply), err)
		}
	}
	for _, w := range d.core.Flush() {
		if d.rows[w.Table+" "+w.Key] = w.Row; w.Value == nil {
			delete(d.rows, w.Table+" "+w.Key)
		}
	}
	d.effects(before, d.core.Effects(), silent)
}

// linkCommand is what a request comes to: a link counts until a newer one of its
// runner has come, or it was cut off.
func linkCommand(links map[string]*Link, deaf map[*Link]bool, r *request) (queue.Command, error) {
	l := r.link
	if l == nil {
		return r.cmd, nil
	}
	id := l.runner.ID
	switch {
	case r.op == linkJoin:
		deaf[links[id]] = true
		links[id] = l
		return queue.Join{Runner: l.runner, Held: l.held}, nil
	case r.op == linkLeave && links[id] != l:
		return nil, nil
	case r.op == linkLeave:
		delete(links, id)
		return queue.Leave{Runner: id}, nil
	case links[id] != l || deaf[l]:
		return nil, queue.ErrStale
	}
	return queue.Beat{Runner: id, Held: r.beat.Held, Idle: r.beat.Idle}, nil
}

// reconnect brings the reference to where a core is that was just loaded: leases count
// anew, and only those runners are there whose links are.
func (d *duel) reconnect(now queue.Millis, before snapshot) {
	d.core.Apply(now, queue.Deaf{})
	for _, r := range d.core.Runners() {
		if r.Connected {
			d.core.Apply(now, queue.Beat{Runner: r.ID})
		}
		if l := before.links[r.ID]; l == nil || before.was[l].deaf {
			d.core.Apply(now, queue.Leave{Runner: r.ID})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(before.links)) {
		l := before.was[before.links[id]]
		l.again(d.core, now)
	}
}

// effects checks that exactly what the core says was sent and told, after a commit
// and only then.
func (d *duel) effects(before snapshot, fx queue.Effects, silent bool) {
	told := d.told
	if before.lost { // first what the load found to have changed
		told = told[max(0, len(told)-len(fx.Changed)):]
	}
	if !silent && len(told)+len(fx.Changed) > 0 && text(told) != text(fx.Changed) {
		d.t.Fatalf("Changed was called with %s\nwant %s", text(told), text(fx.Changed))
	}
	want := map[string]int{}
	for _, o := range fx.Offers {
		want[o.Runner]++
	}
	for _, s := range fx.Stops {
		want[s.Runner]++
	}
	for id, l := range d.brain.links {
		if l.deaf {
			continue
		}
		if got := len(l.calls) - before.calls[l]; silent && got != 0 || !silent && got != want[id] {
			d.t.Fatalf("%s was called %d times, want %d of %s", id, got, want[id], text(fx))
		}
	}
}

// seen is when a runner was last there. It is written with the next change of it, and
// a load forgets what was not.
var seen = regexp.MustCompile(`"seen":\d+`)

func unseen(r queue.Row) []byte {
	if r.Table != queue.TableRunner {
		return r.Value
	}
	return seen.ReplaceAll(r.Value, nil)
}

// compare holds the store against the reference's rows, and the news against both.
func (d *duel) compare(failed bool) {
	var got, want strings.Builder
	tables := append(queue.Tables(), queue.TablePast, "user")
	if _, err := d.inner.Load(d.t.Context(), tables, func(r queue.Row) error {
		fmt.Fprintf(&got, "%s %s %s\n", r.Table, r.Key, unseen(r))
		return nil
	}); err != nil {
		d.t.Fatal(err)
	}
	for _, table := range tables {
		for _, key := range slices.Sorted(maps.Keys(d.rows)) {
			if r := d.rows[key]; r.Table == table {
				fmt.Fprintf(&want, "%s %s %s\n", r.Table, r.Key, unseen(r))
			}
		}
	}
	if got.String() != want.String() {
		d.t.Fatalf("fate %d: the store has\n%s\nwant\n%s", d.fate, got.String(), want.String())
	}
	if failed {
		return // what was told is behind until the next load
	}
	for key, r := range d.rows {
		if r.Table != queue.TableJob && r.Table != queue.TablePast || bytes.Equal(d.checked[key], r.Value) {
			continue
		}
		d.checked[key] = r.Value
		rec, err := decode(r.Value)
		if last := d.last[rec.ID]; err != nil || last.State != rec.State || last.Attempt != rec.Attempt {
			d.t.Fatalf("job %d is %s, attempt %d; the last news was %s, attempt %d", rec.ID, rec.State, rec.Attempt, last.State, last.Attempt)
		}
		delete(d.unsure, rec.Name)
	}
}

// settle ends the faults and sees every job to its end.
func (d *duel) settle() {
	d.fate, d.blind = store.Works, false
	d.run([]errand{{&request{cmd: queue.Pause{Pool: "p"}}, func() {}}})
	for round := 0; len(d.brain.live) > 0; round++ {
		if round > 10_000 {
			d.t.Fatalf("%d jobs never end", len(d.brain.live))
		}
		<-time.After(time.Second)
		for _, a := range d.runners {
			d.run([]errand{d.runner(a)})
		}
	}
	for name, id := range d.acked {
		rec, err := d.brain.Job(d.t.Context(), id)
		if err != nil || rec.Name != name || !rec.State.Final() {
			d.t.Errorf("job %d, acknowledged as %s, is %s, %s, %v", id, name, rec.Name, rec.State, err)
		}
	}
	names := map[string]bool{}
	all, err := d.brain.Past(d.t.Context(), queue.ListAll, 0, 1<<20)
	for _, rec := range all {
		if _, ok := d.acked[rec.Name]; names[rec.Name] || !ok && d.unsure[rec.Name] {
			d.t.Errorf("job %d, %s, is there twice, or by half", rec.ID, rec.Name)
		}
		names[rec.Name] = true
	}
	if err != nil || len(names) < len(d.acked) {
		d.t.Errorf("%d jobs, %v; %d were acknowledged", len(names), err, len(d.acked))
	}
}

func text(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// TestFaultsAtOnce is the same with everybody at once and the loop turning: what people
// were told about their jobs is so in the end, whatever the store did and how long it
// took for it.
func TestFaultsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(5, 6)) // used by the loop only
		calm := make(chan struct{})
		faulty := store.Fault(store.NewMemory(), func(c store.Call) store.Failure {
			select {
			case <-calm:
				return store.Works
			default:
			}
			if n := rnd.IntN(8); n <= int(store.AmbiguousLost) && (c.Op == store.OpCommit || c.Op == store.OpLoad && c.N > 1) {
				return store.Failure(n)
			}
			return store.Works
		})
		b := start(t, store.Delay(faulty, func(op store.Op) time.Duration {
			return time.Duration(rand.Int64N(int64(200 * time.Millisecond)))
		}))
		work, stop := context.WithCancel(t.Context())
		var people, runners sync.WaitGroup
		for i := range 3 {
			runners.Go(func() { serve(work, b, fmt.Sprint("r", i)) })
		}
		var mu sync.Mutex
		acked, unsure := map[string]int64{}, map[string]bool{}
		for i := range 24 { // enough for commits that overlap with the next batch
			people.Go(func() {
				for n := range 20 {
					user := fmt.Sprintf("u%d.%d", i, n)
					id, err := submit(t, b, user)
					mu.Lock()
					if err == nil {
						acked[user] = id
					} else if unsure[user] = true; !errors.Is(err, ErrUnavailable) {
						t.Errorf("submit: %v", err)
					}
					mu.Unlock()
				}
			})
		}
		people.Wait()
		close(calm)
		for moved := b.Moved(); len(b.Unfinished()) > 0; moved = b.Moved() {
			select {
			case <-moved:
			case <-time.After(time.Minute): // everything had finished before the bell was taken
			}
		}
		stop()
		runners.Wait()
		told(t, b, acked, unsure)
	})
}

// told checks that what is there is what people were told, each about one job.
func told(t *testing.T, b *Brain, acked map[string]int64, unsure map[string]bool) {
	t.Helper()
	all, err := b.Past(t.Context(), queue.ListAll, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int64{}
	for _, rec := range all {
		if old, ok := seen[rec.User]; ok {
			t.Errorf("%s has jobs %d and %d, and asked for one", rec.User, old, rec.ID)
		}
		seen[rec.User] = rec.ID
	}
	for user, id := range acked {
		if seen[user] != id {
			t.Errorf("%s was told job %d, and has %d", user, id, seen[user])
		}
		delete(seen, user)
	}
	for user, id := range seen {
		if !unsure[user] {
			t.Errorf("nobody asked for job %d of %s", id, user)
		}
	}
	if len(acked) < 50 || len(unsure) < 50 {
		t.Errorf("%d acknowledged, %d not: the plan did not happen", len(acked), len(unsure))
	}
}

// serve is a runner that never gives up, until ctx ends.
func serve(ctx context.Context, b *Brain, id string) {
	var held *job.Lease
	for ctx.Err() == nil {
		l, err := b.Join(ctx, queue.Runner{ID: id, Name: id, Pools: []string{"p"}}, held)
		if err != nil {
			<-time.After(time.Second)
			continue
		}
		for open := true; open && ctx.Err() == nil; {
			if l.Beat(ctx, job.Beat{Held: held, Idle: held == nil}) != nil {
				break
			}
			var c job.Call
			select {
			case c, open = <-l.Calls():
			case <-time.After(time.Second):
			}
			switch {
			case c.Offer != nil:
				held = &c.Offer.Lease
			case c.Stale != nil && held != nil && *held == *c.Stale:
				held = nil
			case held != nil:
				_, err := b.Do(ctx, queue.Finish{Runner: id, Lease: *held, Result: job.Result{Reason: job.ReasonExit}})
				if err == nil || errors.Is(err, queue.ErrStale) {
					held = nil
				}
			}
		}
		l.Leave(context.WithoutCancel(ctx))
	}
}
