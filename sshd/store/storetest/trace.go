package storetest

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// traceCommands is how long the trace is.
const traceCommands = 12_000

// testTrace feeds the same commands to a core that lives from the first to the last
// and to one that is thrown away at random points and loaded from the store, which is
// closed and opened again. Both decide the same, byte for byte, and what the store has
// in the end is what the first one wrote.
func testTrace(t *testing.T, b *bench) {
	tr := &trace{bench: b, rnd: rand.New(rand.NewPCG(3, 4)), now: 1_700_000_000_000,
		plain: queue.New(tracePolicy), reborn: queue.New(tracePolicy),
		rows: map[string]queue.Write{}, runners: map[string]*traceRunner{}}
	for range traceCommands {
		tr.now += tr.rnd.Int64N(3000)
		tr.apply(tr.draw())
		switch n := tr.rnd.IntN(200); {
		case n == 0:
			tr.save()
			tr.restart()
		case n < 30:
			tr.save()
		}
	}
	tr.save()
	tr.compare()
	if len(tr.offers) < traceCommands/50 || tr.restarts < traceCommands/500 || tr.ended < traceCommands/50 {
		t.Errorf("%d offers, %d results, %d restarts: the trace is not worth much", len(tr.offers), tr.ended, tr.restarts)
	}
}

// tracePolicy has everything switched on.
var tracePolicy = queue.Policy{Lease: 30_000, Attempts: 3, Burst: 20_000, FirstGo: 60_000, MinGo: 5_000, Express: 120_000,
	User: queue.Caps{Running: 2, Queued: 6}, Team: queue.Caps{Running: 3, Daily: 500}, Weights: map[string]int64{"t2": 3}}

// A trace is two cores on the way through the same commands.
type trace struct {
	*bench
	rnd           *rand.Rand
	now           queue.Millis
	plain, reborn *queue.Core
	rows          map[string]queue.Write // what plain has written, by table and key
	runners       map[string]*traceRunner
	offers        []job.Lease
	restarts      int
	ended         int // jobs that have a result
}

// A traceRunner is a runner as it last described itself.
type traceRunner struct {
	queue.Runner
	connected, idle bool
	held            *job.Lease
}

// apply lets both cores have a command.
func (tr *trace) apply(cmd queue.Command) {
	tr.t.Helper()
	one, two := answer(tr.plain, tr.now, cmd), answer(tr.reborn, tr.now, cmd)
	if one.text != two.text {
		tr.t.Fatalf("%T %+v after %d restarts:\nplain:  %s\nreborn: %s", cmd, cmd, tr.restarts, one.text, two.text)
	}
	for _, o := range one.Offers {
		r := tr.runners[o.Runner]
		r.held, r.idle = &o.Lease, false
		tr.offers = append(tr.offers, o.Lease)
	}
	for _, s := range one.Stops {
		if r := tr.runners[s.Runner]; s.Stale && r.held != nil && *r.held == s.Lease {
			r.held = nil
		}
	}
	for _, rec := range one.Changed {
		if rec.State.Final() {
			tr.ended++
		}
	}
}

// An outcome is what came of one command, and all of it as text.
type outcome struct {
	queue.Effects
	text string
}

func answer(c *queue.Core, now queue.Millis, cmd queue.Command) outcome {
	reply, err := c.Apply(now, cmd)
	fx := c.Effects()
	text, jerr := json.Marshal([]any{reply, fmt.Sprint(err), fx})
	return outcome{fx, fmt.Sprint(string(text), jerr)}
}

// save commits what changed since the last time.
func (tr *trace) save() {
	tr.t.Helper()
	one, two := tr.plain.Flush(), tr.reborn.Flush()
	if a, b := lines(one), lines(two); a != b {
		tr.t.Fatalf("after %d restarts the rows differ:\nplain:  %s\nreborn: %s", tr.restarts, a, b)
	}
	tr.commit(two...)
	for _, w := range one {
		key := w.Table + "\x00" + w.Key
		if tr.rows[key] = w; w.Value == nil {
			delete(tr.rows, key)
		}
	}
}

func lines(writes []queue.Write) string {
	var b strings.Builder
	for _, w := range writes {
		fmt.Fprintf(&b, "%s %q %s %q %d\n", w.Table, w.Key, w.Value, w.Lists, w.Score)
	}
	return b.String()
}

// restart loses everything that is not in the store. What the other core knows beside
// its rows is brought to the same: nobody was heard of, and all runners come again.
func (tr *trace) restart() {
	tr.t.Helper()
	tr.restarts++
	tr.reopen()
	tr.reborn = queue.New(tracePolicy)
	if _, err := tr.Load(tr.t.Context(), queue.Tables(), tr.take); err != nil {
		tr.t.Fatal(err)
	}
	tr.plain.Apply(tr.now, queue.Deaf{})
	names := slices.Sorted(maps.Keys(tr.runners))
	for _, id := range names {
		if r := tr.runners[id]; r.connected {
			tr.plain.Apply(tr.now, queue.Beat{Runner: id})
		}
	}
	for _, id := range names {
		if r := tr.runners[id]; r.connected {
			tr.apply(queue.Join{Runner: r.Runner, Held: r.held})
			tr.apply(queue.Beat{Runner: id, Held: r.held, Idle: r.idle})
		}
	}
}

func (tr *trace) take(r queue.Row) error {
	p, err := queue.Parse(r)
	if err == nil {
		tr.reborn.Load(tr.now, p)
	}
	return err
}

// compare holds the store against the rows that the core without restarts wrote.
func (tr *trace) compare() {
	tr.t.Helper()
	tables := append(queue.Tables(), queue.TablePast)
	var want, past []queue.Row
	for _, table := range tables {
		for _, key := range slices.Sorted(maps.Keys(tr.rows)) {
			if w := tr.rows[key]; w.Table == table {
				want = append(want, w.Row)
				if table == queue.TablePast {
					past = append(past, w.Row)
				}
			}
		}
	}
	equal(tr.t, "Load after the trace", tr.load(tables...), show(want))
	slices.Reverse(past)
	equal(tr.t, "List after the trace", tr.list(queue.ListAll, 0, len(past)+1), show(past))
}

// draw makes one command up. It depends on nothing but the seed and what both cores
// have answered.
func (tr *trace) draw() queue.Command {
	id := fmt.Sprint("r", tr.rnd.IntN(4))
	r := tr.runners[id]
	if r == nil || !r.connected {
		return tr.drawJoin(id)
	}
	switch n := tr.rnd.IntN(100); {
	case n < 25:
		return tr.drawSubmit()
	case n < 45 && r.held != nil:
		l := *r.held
		r.held = nil
		return queue.Finish{Runner: id, Lease: l, Result: job.Result{Note: "trace",
			Reason: pick(tr.rnd, job.ReasonExit, job.ReasonExit, job.ReasonExit, job.ReasonInfra, job.ReasonCancelled)}}
	case n < 70:
		r.idle = r.held == nil
		return queue.Beat{Runner: id, Held: r.held, Idle: r.idle}
	case n < 75 && r.held != nil:
		return queue.Begin{Runner: id, Lease: *r.held}
	case n < 80 && r.held != nil:
		return queue.Claim{Runner: id, Lease: *r.held}
	case n < 83 && len(tr.offers) > 0: // by anybody, long ago or not
		return queue.Claim{Runner: id, Lease: tr.offers[tr.rnd.IntN(len(tr.offers))]}
	case n < 88:
		return queue.Cancel{Job: 1 + tr.rnd.Int64N(tr.plain.Next()), By: "somebody"}
	case n < 90:
		r.connected, r.idle = false, false
		return queue.Leave{Runner: id}
	case n < 92:
		return queue.Drain{Name: id, On: tr.rnd.IntN(3) == 0}
	case n < 94:
		return queue.Pause{Pool: "p", On: tr.rnd.IntN(3) == 0}
	case n == 94:
		tr.now += 40_000 // longer than a lease
	}
	return queue.Tick{}
}

func (tr *trace) drawJoin(id string) queue.Command {
	r := &traceRunner{connected: true, Runner: queue.Runner{ID: id, Name: id, Pools: []string{"p", "q"}, Express: id == "r3"}}
	if tr.rnd.IntN(2) == 0 {
		r.GPUs = []string{"V100"}
	}
	if old := tr.runners[id]; old != nil && tr.rnd.IntN(3) > 0 { // else it was restarted
		r.held = old.held
	}
	tr.runners[id] = r
	return queue.Join{Runner: r.Runner, Held: r.held}
}

func (tr *trace) drawSubmit() queue.Command {
	limit := pick(tr.rnd, time.Minute, time.Hour)
	return queue.Submit{Record: job.Record{
		Job: job.Job{User: pick(tr.rnd, "ada", "bob", "eve", "joe"), Team: pick(tr.rnd, "", "t1", "t2"),
			Pool: pick(tr.rnd, "p", "p", "q"), Kind: "run", Name: strings.Repeat("x", tr.rnd.IntN(9))},
		Spec: job.Spec{Limits: job.Limits{Time: limit}, GPUs: tr.rnd.IntN(2), Priority: tr.rnd.IntN(3)}}}
}

func pick[T any](rnd *rand.Rand, of ...T) T { return of[rnd.IntN(len(of))] }
