package queue

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// This file looks ahead: in what order jobs will start if everything runs as long as
// expected, and when. It changes nothing.

// A Forecast is where one waiting job stands.
type Forecast struct {
	Job      int64
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

// order returns the queued jobs of a pool as they would start: the fair order, not the
// order of arrival.
func (c *Core) order(p *node) []*entry {
	out := make([]*entry, 0, p.queued)
	f := c.ahead(p)
	for len(f.heap) > 0 {
		out = append(out, f.take())
	}
	return out
}

// Outlook says where every waiting job of a pool stands, in the order they start. It
// costs about as much as dispatching all of them.
func (c *Core) Outlook(now Millis, poolName string) []Forecast {
	p := c.pools[poolName]
	if p == nil {
		return nil
	}
	var aheadS int64
	all := make([]Forecast, 0, p.queued)
	slots, able := c.slots(now, poolName), map[*class][]int{}
	for i, e := range c.order(p) {
		u := c.nodeOf(e)
		f := Forecast{Job: e.ID, Position: i + 1, Of: p.queued, Running: p.running, AheadS: aheadS,
			TenantS: u.parent.used / 1e6, PoolS: p.start / 1e6, Held: held(p, u)}
		can, known := able[e.place.class]
		if !known {
			can = slots.able(&e.place.class.needs)
			able[e.place.class] = can
		}
		if f.Slots = len(can); f.Slots > 0 {
			f.Early = slots.use(can, slots.early, c.length(e, -1))
			f.Late = slots.use(can, slots.late, c.length(e, 1))
		}
		aheadS += c.estimate(e) * e.gpus() / 1000
		all = append(all, f)
	}
	return all
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

// slots are the runners of a pool that take jobs, and when each is free, from now: if
// jobs turn out short, and if they turn out long.
type slots struct {
	runners     []*Runner
	early, late []Millis
}

func (c *Core) slots(now Millis, pool string) *slots {
	s := &slots{}
	for _, id := range slices.Sorted(maps.Keys(c.runners)) {
		r := c.runners[id]
		if !r.Connected || r.Draining || r.Drained || r.Sick != "" || !slices.Contains(r.Pools, pool) {
			continue
		}
		s.runners = append(s.runners, r)
		s.early = append(s.early, c.left(r, now, -1))
		s.late = append(s.late, c.left(r, now, 1))
	}
	return s
}

// left is how long a runner is busy with what it runs.
func (c *Core) left(r *Runner, now, sign Millis) Millis {
	if a := c.active[r.Job]; a != nil {
		return max(c.length(a, sign)-(now-a.granted), 500)
	}
	return 0
}

// able returns the slots that can take jobs with those needs.
func (s *slots) able(n *needs) (can []int) {
	for i, r := range s.runners {
		if r.lacks(n) == "" {
			can = append(can, i)
		}
	}
	return can
}

// use runs a job on the slot that is free first and returns when it starts.
func (s *slots) use(can []int, free []Millis, length Millis) Millis {
	first := can[0]
	for _, i := range can[1:] {
		if free[i] < free[first] {
			first = i
		}
	}
	start := free[first]
	free[first] += length
	return start
}

// A future is a scratch copy of a pool's tree that is run to the end of its queues,
// whatever holds jobs back today.
type future struct {
	core  *Core
	heap  heap[*futureNode] // of tenants
	turns int64
}

// A futureNode is a tenant with its users, or a user with its jobs.
type futureNode struct {
	used   int64
	turn   int64
	weight int64
	users  heap[*futureNode]
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
				for _, s := range pl.jobs {
					fu.jobs = append(fu.jobs, s.item)
				}
			}
			slices.SortFunc(fu.jobs, func(a, b *entry) int { return a.rank(b) })
			ft.users.push(fu.standing(), fu)
		}
		f.heap.push(ft.standing(), ft)
	}
	return f
}

// take removes and returns the next job, and charges everybody on the way.
func (f *future) take() *entry {
	t := f.heap[0].item
	u := t.users[0].item
	e := u.jobs[0]
	u.jobs = u.jobs[1:]
	cost := f.core.estimate(e) * e.gpus() * 1000
	u.used += cost / u.weight
	t.used += cost / t.weight
	f.turns++
	u.turn, t.turn = f.turns, f.turns
	next(&t.users, u, len(u.jobs) == 0)
	next(&f.heap, t, len(t.users) == 0)
	return e
}

// next mends a heap after the first in it was charged, or has nothing left.
func next(h *heap[*futureNode], first *futureNode, empty bool) {
	if empty {
		h.remove(0)
	} else {
		h.move(0, first.standing())
	}
}

func (n *futureNode) standing() key { return key{n.used, n.turn} }

// movedTo is not for a future, where only the first of a heap changes.
func (n *futureNode) movedTo(int) {}
