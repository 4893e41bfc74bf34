package queue

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/rai-project/raid/runner/job"
)

// A node is a pool, a tenant or a user: the tree is pool → tenant → user → that
// user's jobs. Its virtual time counts GPU-milliseconds.
type node struct {
	key      string // "pool", "pool/tenant", "pool/tenant/user": its row in the store
	parent   *node
	children map[string]*node // nil for a user
	queue    []*entry         // a user's queued jobs, oldest first
	queued   int              // queued jobs below
	used     Millis           // F: charged so far
	start    Millis           // V of the level below: the largest F anything was dispatched at; never falls
	guess    Millis           // a user's running mean of job lengths; 0 before the first
}

// pool returns a pool's node, made when it is new.
func (c *Core) pool(name string) *node {
	p := c.pools[name]
	if p == nil {
		p = &node{key: name, children: map[string]*node{}}
		c.pools[name] = p
	}
	return p
}

func (n *node) child(name string, inner bool) *node {
	k := n.children[name]
	if k == nil {
		k = &node{key: n.key + "/" + name, parent: n, used: n.start}
		if inner {
			k.children = map[string]*node{}
		}
		n.children[name] = k
	}
	return k
}

func (c *Core) nodeOf(e *entry) *node {
	return c.pool(e.Pool).child(e.Tenant(), true).child(e.User, false)
}

// enqueue puts a job in its user's queue. Whoever turns eligible by it is lifted to
// V less the burst credit: idling banks nothing, and a debt is never forgiven.
func (c *Core) enqueue(e *entry) {
	for n := c.nodeOf(e); n.parent != nil; n = n.parent {
		if n.queued == 0 {
			n.used = max(n.used, n.parent.start-c.policy.Burst)
			c.charged[n] = true
		}
	}
	c.insert(e)
}

// insert puts a job in its place among its user's queued jobs.
func (c *Core) insert(e *entry) {
	u := c.nodeOf(e)
	i, _ := slices.BinarySearchFunc(u.queue, e.ID, func(q *entry, id int64) int { return cmp.Compare(q.ID, id) })
	u.queue = slices.Insert(u.queue, i, e)
	for n := u; n != nil; n = n.parent {
		n.queued++
	}
}

// dequeue takes a job out of its user's queue if it stands there.
func (c *Core) dequeue(e *entry) {
	u := c.nodeOf(e)
	i := slices.Index(u.queue, e)
	if i < 0 {
		return
	}
	u.queue = slices.Delete(u.queue, i, i+1)
	for n := u; n != nil; n = n.parent {
		n.queued--
	}
}

// dispatch gives idle runners work until nobody idle can take any of it.
func (c *Core) dispatch(now Millis) {
	for _, r := range c.idle() {
		for _, name := range r.Pools {
			if p := c.pools[name]; p != nil {
				if e := p.pick(r); e != nil {
					c.grant(e, r, now)
					break
				}
			}
		}
	}
}

// idle returns the runners that wait for work, in the order of their ids.
func (c *Core) idle() []*Runner {
	var all []*Runner
	for _, r := range c.runners {
		if r.Connected && r.Idle && !r.Draining && r.Job == 0 {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b *Runner) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// pick returns the job r runs next: down the tree by the smallest virtual time,
// ties to the oldest job, past everybody who has nothing r can run.
func (n *node) pick(r *Runner) *entry {
	if n.children == nil {
		for _, e := range n.queue {
			if r.CanRun(&e.Record) {
				return e
			}
		}
		return nil
	}
	var best *entry
	var least Millis
	for _, k := range n.children {
		if k.queued == 0 || best != nil && k.used > least {
			continue
		}
		e := k.pick(r)
		if e != nil && (best == nil || k.used < least || e.ID < best.ID) {
			best, least = e, k.used
		}
	}
	return best
}

// CanRun reports whether a runner has what a job needs.
func (r *Runner) CanRun(rec *job.Record) bool { return r.Lacks(rec) == "" }

// Lacks says in words what a runner lacks for a job, "" for nothing.
func (r *Runner) Lacks(rec *job.Record) string {
	switch s := &rec.Spec; {
	case !slices.Contains(r.Pools, rec.Pool):
		return "is not in pool " + rec.Pool
	case s.CPUArch != "" && s.CPUArch != r.Arch:
		return fmt.Sprintf("is %s, not %s", r.Arch, s.CPUArch)
	case s.GPUs > 0 && len(r.GPUs) == 0:
		return "has no GPU"
	}
	return ""
}

// grant leases a job to a runner and charges the estimate.
func (c *Core) grant(e *entry, r *Runner, now Millis) {
	c.dequeue(e)
	c.fence++
	c.meta = true
	e.State, e.Fence, e.Holder, e.Runner, e.Engine = job.Running, c.fence, r.ID, r.Name, r.Engine
	e.Attempt++
	e.Spec.GPUs = min(e.Spec.GPUs, len(r.GPUs))
	e.StartedAt = at(now)
	e.QueueWaitMS = max(0, now-e.QueuedAt.UnixMilli())
	e.heard, e.granted, e.charge = now, now, 0
	r.Idle, r.Job = false, e.ID
	u := c.nodeOf(e)
	for n := u; n.parent != nil; n = n.parent {
		if n.used > n.parent.start {
			n.parent.start = n.used
			c.charged[n.parent] = true
		}
	}
	c.charge(e, min(max(cmp.Or(u.guess, c.policy.FirstGo), c.policy.MinGo), e.Spec.Limits.Time.Milliseconds())*e.gpus())
	c.changed(e)
	c.out.Offers = append(c.out.Offers, Offer{Runner: r.ID, Offer: e.offer()})
}

func (e *entry) offer() job.Offer {
	o := job.Offer{Lease: e.lease(), Attempt: e.Attempt, User: e.User, Team: e.Team,
		Pool: e.Pool, Spec: e.Spec, Source: e.Source != ""}
	if e.Attempt > 1 {
		o.Say = fmt.Sprintf("attempt %d: %s", e.Attempt, e.Note)
	}
	return o
}

func (e *entry) gpus() Millis { return int64(max(e.Spec.GPUs, 1)) }

// charge sets what an attempt has been charged, on its user and all above.
func (c *Core) charge(e *entry, total Millis) {
	for n := c.nodeOf(e); n.parent != nil; n = n.parent {
		n.used += total - e.charge
		c.charged[n] = true
	}
	e.charge = total
	e.ChargedS = float64(total) / 1000
}

// topUp charges a job that outlives its estimate.
func (c *Core) topUp(e *entry, now Millis) {
	if act := (now - e.granted) * e.gpus(); act > e.charge {
		c.charge(e, act)
	}
}

// settle charges what an attempt really used and learns from it. A job its owner
// cancelled costs at least MinGo, or submit-and-cancel would be a free lottery.
func (c *Core) settle(e *entry, now Millis, cancelled bool) {
	if e.StartedAt.IsZero() || e.Holder == "" {
		return
	}
	took := max(0, now-e.granted)
	u := c.nodeOf(e)
	if u.guess == 0 {
		u.guess = max(took, 1)
	} else {
		u.guess = (3*u.guess + took) / 4
	}
	if cancelled {
		took = max(took, c.policy.MinGo)
	}
	c.charge(e, took*e.gpus())
}

// refund gives back what an attempt was charged: nobody pays for raid's failures.
func (c *Core) refund(e *entry) { c.charge(e, 0); e.granted = 0; e.Holder = "" }

// Order returns the queued jobs of a pool as they would start if everything ran as
// long as expected: the fair order, not the order of arrival.
func (c *Core) Order(poolName string) []job.Record {
	p := c.pools[poolName]
	if p == nil {
		return nil
	}
	s := newForecast(p, c.policy)
	order := make([]job.Record, 0, p.queued)
	for e := s.next(); e != nil; e = s.next() {
		order = append(order, e.Record)
	}
	return order
}

// A forecast is a scratch copy of a tree that is run to the end of its queues.
type forecast struct {
	children []*forecast
	queue    []*entry
	used     Millis
	guess    Millis
	key      string
}

func newForecast(n *node, p Policy) *forecast {
	f := &forecast{queue: n.queue, used: n.used, guess: max(cmp.Or(n.guess, p.FirstGo), p.MinGo), key: n.key}
	for _, k := range n.children {
		if k.queued > 0 {
			f.children = append(f.children, newForecast(k, p))
		}
	}
	slices.SortFunc(f.children, func(a, b *forecast) int { return cmp.Compare(a.key, b.key) })
	return f
}

func (f *forecast) head() *entry {
	if len(f.queue) > 0 {
		return f.queue[0]
	}
	var best *entry
	var least Millis
	for _, k := range f.children {
		if e := k.head(); e != nil && (best == nil || k.used < least || k.used == least && e.ID < best.ID) {
			best, least = e, k.used
		}
	}
	return best
}

func (f *forecast) next() *entry {
	e := f.head()
	if e != nil {
		f.take(e)
	}
	return e
}

// take removes e and charges everybody on the way; it returns the charge, or 0 when
// e is not below f.
func (f *forecast) take(e *entry) Millis {
	if len(f.queue) > 0 && f.queue[0] == e {
		f.queue = f.queue[1:]
		f.used += f.guess * e.gpus()
		return f.guess * e.gpus()
	}
	for _, k := range f.children {
		if k.head() == e {
			cost := k.take(e)
			f.used += cost
			return cost
		}
	}
	return 0
}

func at(ms Millis) job.Time { return job.At(time.UnixMilli(ms)) }
