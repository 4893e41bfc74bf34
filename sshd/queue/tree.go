package queue

import (
	"cmp"
	"slices"
	"time"

	"github.com/rai-project/raid/runner/job"
)

// A node is a pool, a tenant or a user: the tree is pool → tenant → user → that
// user's jobs. Its virtual time counts micro-GPU-seconds per unit of weight, in
// integers, so that no machine rounds differently.
type node struct {
	used    int64 // F: what it was charged, by weight
	turn    int64 // when it last turned eligible or started a job: breaks ties, so there are none
	queued  int   // queued jobs below
	running int   // running jobs below
	caps    Caps
	paused  bool // pools only: nothing starts
	dirty   bool // its row is not what it should be

	parent *node
	weight int64    // 1 to 1000; a share of 2 gets twice as much
	rem    int64    // what the division by weight left over
	start  int64    // V of the level below: the largest F anything was dispatched at; never falls
	places []*place // where it stands in the order, one for each class of jobs

	guess  Millis // running mean of the length of jobs; 0 before the first. Users and pools
	spread Millis // running mean of how far they were from it
	day    int64  // days since the epoch
	today  int    // jobs submitted on that day

	key      string           // "pool", "pool/tenant", "pool/tenant/user": its row in the store
	children map[string]*node // nil for a user
}

// Caps bound what one user or one team has at once. Zero is no bound.
type Caps struct {
	Running int // jobs at once
	Queued  int // jobs waiting
	Daily   int // jobs submitted in a day, UTC
}

// pool returns a pool's node, made when it is new.
func (c *Core) pool(name string) *node {
	p := c.pools[name]
	if p == nil {
		p = &node{key: name, children: map[string]*node{}, weight: 1}
		c.pools[name] = p
	}
	return p
}

// child returns the node below n of that name, made when it is new. A newcomer
// starts at V: not at 0, which would let it run alone, nor at the largest F.
func (c *Core) child(n *node, name string) *node {
	k := n.children[name]
	if k != nil {
		return k
	}
	k = &node{key: n.key + "/" + name, parent: n, used: n.start, weight: 1, caps: c.policy.User}
	if n.parent == nil {
		k.children = map[string]*node{}
		k.caps = c.policy.Team
		k.weight = min(max(cmp.Or(c.policy.Weights[name], 1), 1), 1000)
	}
	n.children[name] = k
	return k
}

// nodeOf returns the node of a job's user.
func (c *Core) nodeOf(e *entry) *node {
	if e.user == nil {
		e.user = c.child(c.child(c.pool(e.Pool), e.Tenant()), e.User)
	}
	return e.user
}

// eligible reports whether anything below n may start now, as far as n is concerned.
func (n *node) eligible() bool {
	return n.queued > 0 && !n.capped() && !n.paused
}

func (n *node) capped() bool { return n.caps.Running > 0 && n.running >= n.caps.Running }

// lift brings a node that turns eligible up to V less the burst credit: waiting
// without a job, or behind one's own cap, banks nothing, and no debt is forgiven.
func (c *Core) lift(n *node) {
	if n.parent == nil {
		return
	}
	n.used = max(n.used, n.parent.start-c.policy.Burst*1000/n.weight)
	c.goBehind(n)
}

// goBehind makes n the last among those with the same virtual time.
func (c *Core) goBehind(n *node) {
	c.turns++
	n.turn = c.turns
	c.meta = true
	c.write(n)
}

// standing orders the nodes of one level: who was charged least goes first.
func (n *node) standing() key { return key{n.used, n.turn} }

func (n *node) compare(o *node) int { return n.standing().compare(o.standing()) }

// count changes how many jobs wait and run below u, all the way up, and lifts whom
// that makes eligible.
func (c *Core) count(u *node, queued, running int) {
	for n := u; n != nil; n = n.parent {
		was := n.eligible()
		n.queued += queued
		n.running += running
		if !was && n.eligible() {
			c.lift(n)
		}
	}
}

// settlePlaces mends the order after the numbers of u or of nodes above it changed.
func settlePlaces(u *node) {
	for n := u; n.parent != nil; n = n.parent {
		for _, p := range n.places {
			p.settle()
		}
	}
}

// charge sets what an attempt has been charged, on its user and its tenant.
func (c *Core) charge(e *entry, total Millis) {
	u := c.nodeOf(e)
	for n := u; n.parent != nil; n = n.parent {
		n.pay(total - e.charge)
		c.write(n)
	}
	e.charge = total
	e.ChargedS = float64(total) / 1000
	c.writeJob(e) // with its nodes, or a reload would charge the difference twice
	settlePlaces(u)
}

// pay adds a cost in GPU-milliseconds, which may be a refund.
func (n *node) pay(cost Millis) {
	x := cost*1000 + n.rem
	q := x / n.weight
	if x%n.weight < 0 {
		q--
	}
	n.used += q
	n.rem = x - q*n.weight
}

// started moves V up to where the job was dispatched: the largest start tag, which
// is persisted and never falls (with the smallest F in its place, users who come and
// go undercut each other and their credits add up).
func (c *Core) started(u *node) {
	for n := u; n.parent != nil; n = n.parent {
		if n.used > n.parent.start {
			n.parent.start = n.used
			c.write(n.parent)
		}
		c.goBehind(n)
	}
}

// estimate is what a job is charged when it starts: its user's mean so far, else the
// pool's, within the limits.
func (c *Core) estimate(e *entry) Millis {
	u := c.nodeOf(e)
	g := cmp.Or(u.guess, u.parent.parent.guess, c.policy.FirstGo)
	return min(max(g, c.policy.MinGo), max(e.Spec.Limits.Time.Milliseconds(), 1))
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
	u.learn(took)
	u.parent.parent.learn(took)
	c.write(u.parent.parent)
	if cancelled {
		took = max(took, c.policy.MinGo)
	}
	c.charge(e, took*e.gpus())
}

// learn moves the running means by an eighth: by a quarter the estimates of jobs of
// very different lengths are so noisy that one tenant gets further ahead of another.
func (n *node) learn(took Millis) {
	took = max(took, 1)
	if n.guess == 0 {
		n.guess, n.spread = took, took/2
		return
	}
	off := took - n.guess
	n.spread = (3*n.spread + max(off, -off)) / 4
	n.guess = max((7*n.guess+took)/8, 1)
}

func (e *entry) gpus() Millis { return int64(max(e.Spec.GPUs, 1)) }

func at(ms Millis) job.Time { return job.At(time.UnixMilli(ms)) }

// sortedChildren returns the nodes below n by name.
func (n *node) sortedChildren() []*node {
	all := make([]*node, 0, len(n.children))
	for _, k := range n.children {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b *node) int { return cmp.Compare(a.key, b.key) })
	return all
}
