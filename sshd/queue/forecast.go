package queue

import (
	"cmp"
	"container/heap"
	"fmt"
	"slices"

	"github.com/rai-project/raid/runner/job"
)

// This file looks ahead: in what order jobs will start if everything runs as long as
// expected, and when. It changes nothing.

// A Forecast is where one waiting job stands.
type Forecast struct {
	Position int      // 1 is next
	Of       int      // jobs waiting in the pool
	AheadS   int64    // GPU-seconds that are expected to run before it
	Early    Millis   // it starts after so long, if jobs turn out short
	Late     Millis   // and after so long if they turn out long
	Slots    int      // connected runners that can take it; with 0 nobody can tell when
	Running  int      // jobs of the pool that run
	TenantS  int64    // virtual time of its tenant, GPU-seconds by weight
	PoolS    int64    // virtual time of the pool: who is below it is owed, who is above has had more
	Held     []string // what holds it back although it may be its turn
}

// Order returns the queued jobs of a pool as they would start: the fair order, not
// the order of arrival.
func (c *Core) Order(poolName string) []job.Record {
	p := c.pools[poolName]
	if p == nil {
		return nil
	}
	all := make([]job.Record, 0, p.queued)
	for _, e := range c.order(p) {
		all = append(all, e.Record)
	}
	return all
}

func (c *Core) order(p *node) []*entry {
	out := make([]*entry, 0, p.queued)
	f := c.ahead(p)
	for len(f.heap) > 0 {
		out = append(out, f.take())
	}
	return out
}

// Forecast says where a waiting job stands; ok is false for one that does not wait.
func (c *Core) Forecast(now Millis, id int64) (f Forecast, ok bool) {
	e := c.jobs[id]
	if e == nil || e.State != job.Queued {
		return f, false
	}
	p, u := c.pools[e.Pool], c.nodeOf(e)
	f = Forecast{Of: p.queued, Running: p.running, TenantS: u.parent.used / 1e6, PoolS: p.start / 1e6, Held: held(p, u)}
	early, late := c.slots(now, e, -1), c.slots(now, e, 1)
	for i, o := range c.order(p) {
		if o == e {
			f.Position = i + 1
			break
		}
		f.AheadS += c.estimate(o) * o.gpus() / 1000
		if len(early) > 0 {
			early.use(c.length(o, -1))
			late.use(c.length(o, 1))
		}
	}
	if f.Slots = len(early); f.Slots > 0 {
		f.Early, f.Late = early[0], late[0]
	}
	return f, true
}

// held says what keeps everything of a user from starting.
func held(p, u *node) (why []string) {
	if p.paused {
		why = append(why, "staff have paused pool "+p.key)
	}
	if u.capped() {
		why = append(why, fmt.Sprintf("one user may run %s at once", jobs(u.caps.Running)))
	}
	if u.parent.capped() {
		why = append(why, fmt.Sprintf("one team may run %s at once", jobs(u.parent.caps.Running)))
	}
	return why
}

func jobs(n int) string {
	if n == 1 {
		return "1 job"
	}
	return fmt.Sprintf("%d jobs", n)
}

// length is how long a job may run: its estimate, less or more the usual error.
func (c *Core) length(e *entry, sign Millis) Millis {
	u := c.nodeOf(e)
	off := cmp.Or(u.spread, u.parent.parent.spread, c.policy.FirstGo/2)
	limit := max(e.Spec.Limits.Time.Milliseconds(), 1)
	return min(max(c.estimate(e)+sign*off, 1000), limit)
}

// freeAt is a heap of when each slot is free, from now.
type freeAt []Millis

// slots returns when the runners that could take e are free.
func (c *Core) slots(now Millis, e *entry, sign Millis) freeAt {
	n := c.needs(&e.Record)
	var free freeAt
	for _, id := range slices.Sorted(runnerIDs(c.runners)) {
		r := c.runners[id]
		if !r.Connected || r.Draining || r.Drained || !slices.Contains(r.Pools, e.Pool) || r.lacks(&n) != "" {
			continue
		}
		left := Millis(0)
		if a := c.active[r.Job]; a != nil {
			left = max(c.length(a, sign)-(now-a.granted), 500)
		}
		free = append(free, left)
	}
	heap.Init(&free)
	return free
}

// use runs one job on the slot that is free first.
func (h *freeAt) use(length Millis) {
	(*h)[0] += length
	heap.Fix(h, 0)
}

func (h freeAt) Len() int           { return len(h) }
func (h freeAt) Less(i, j int) bool { return h[i] < h[j] }
func (h freeAt) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *freeAt) Push(x any)        { *h = append(*h, x.(Millis)) }
func (h *freeAt) Pop() any          { panic("queue: slots never go") }

func runnerIDs(m map[string]*Runner) func(func(string) bool) {
	return func(yield func(string) bool) {
		for id := range m {
			if !yield(id) {
				return
			}
		}
	}
}

// A future is a scratch copy of a pool's tree that is run to the end of its queues,
// whatever holds jobs back today.
type future struct {
	core  *Core
	heap  futures // of tenants
	turns int64
}

// A futureNode is a tenant with its users, or a user with its jobs.
type futureNode struct {
	used   int64
	turn   int64
	weight int64
	users  futures
	jobs   []*entry // in order
}

func (c *Core) ahead(p *node) *future {
	f := &future{core: c, turns: c.turns}
	for _, t := range p.sortedChildren() {
		if t.queued == 0 {
			continue
		}
		ft := &futureNode{used: t.used, turn: t.turn, weight: t.weight}
		for _, u := range t.sortedChildren() {
			if u.queued == 0 {
				continue
			}
			fu := &futureNode{used: u.used, turn: u.turn, weight: u.weight}
			for _, pl := range u.places {
				fu.jobs = append(fu.jobs, pl.jobs...)
			}
			slices.SortFunc(fu.jobs, func(a, b *entry) int { return a.rank(b) })
			ft.users = append(ft.users, fu)
		}
		heap.Init(&ft.users)
		f.heap = append(f.heap, ft)
	}
	heap.Init(&f.heap)
	return f
}

// take removes and returns the next job, and charges everybody on the way.
func (f *future) take() *entry {
	t := f.heap[0]
	u := t.users[0]
	e := u.jobs[0]
	u.jobs = u.jobs[1:]
	cost := f.core.estimate(e) * e.gpus() * 1000
	u.used += cost / u.weight
	t.used += cost / t.weight
	f.turns++
	u.turn, t.turn = f.turns, f.turns
	if len(u.jobs) == 0 {
		heap.Pop(&t.users)
	} else {
		heap.Fix(&t.users, 0)
	}
	if len(t.users) == 0 {
		heap.Pop(&f.heap)
	} else {
		heap.Fix(&f.heap, 0)
	}
	return e
}

// futures is a heap by virtual time.
type futures []*futureNode

func (h futures) Len() int { return len(h) }
func (h futures) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(h[i].used, h[j].used), cmp.Compare(h[i].turn, h[j].turn)) < 0
}
func (h futures) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *futures) Push(x any)   { *h = append(*h, x.(*futureNode)) }
func (h *futures) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}
