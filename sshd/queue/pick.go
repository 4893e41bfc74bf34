package queue

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rai-project/raid/runner/job"
)

// This file is the order jobs start in. Jobs of a pool that need the same of a runner
// form a class; a class keeps its tenants, each tenant its users, each user their jobs
// in heaps, so that a decision costs the logarithm of what waits. A runner looks at
// the head of every class it can serve, and there are few classes.

// needs is what a job asks of a runner.
type needs struct {
	pool, arch, model string
	image, role       string // role only with an image, which it may decide on
	engine, gpuArch   string
	gpu, short, build bool
	registry          string // to push to, "" for none
	memoryMB          int64
}

func (c *Core) needs(rec *job.Record) needs {
	s := &rec.Spec
	n := needs{pool: rec.Pool, arch: s.CPUArch, image: s.Image, engine: s.Engine, gpu: s.GPUs > 0,
		short: c.policy.Express > 0 && s.Limits.Time > 0 && s.Limits.Time.Milliseconds() <= c.policy.Express}
	if s.Image != "" {
		n.role = s.Role
	}
	if n.gpu {
		n.model, n.memoryMB = strings.ToLower(s.GPUModel), s.GPUMemoryMB
		if s.StrictArch {
			n.gpuArch = strings.ToLower(s.GPUArch)
		}
	}
	if s.Build != nil {
		n.build = true
		if s.Build.Push != nil {
			n.registry = s.Build.Push.Registry
		}
	}
	return n
}

// maxNeeds is how many different needs the waiting jobs of one user may have. Every
// runner that looks for work looks at every class, so with thousands of their own one
// user could keep all others waiting.
const maxNeeds = 32

// mayNeed reports whether a job with those needs may wait among a user's others.
func (n *node) mayNeed(want needs) bool {
	used := 0
	for _, p := range n.places {
		if len(p.jobs) > 0 {
			used++
			if p.class.needs == want {
				return true
			}
		}
	}
	return used < maxNeeds
}

// A class is the jobs of one pool with the same needs. It lives while one waits: needs
// are anything that a build file asks for.
type class struct {
	needs   needs
	tenants heap[*place]
	places  []*place // of all nodes
	jobs    int      // that wait
}

// A place is a node's stand in one class: a tenant's holds places of users, a user's
// holds jobs. It is in the heap above exactly while its node is eligible and there is
// something in it.
type place struct {
	node  *node
	class *class
	up    *place // the tenant's, nil for a tenant
	users heap[*place]
	jobs  heap[*entry]
	index int // in the heap above; -1 outside
}

func (p *place) movedTo(i int) { p.index = i }

// head is the job that starts when the class's turn comes; there must be one.
func (cl *class) head() *entry { return cl.tenants[0].item.users[0].item.jobs[0].item }

func (p *place) above() *heap[*place] {
	if p.up != nil {
		return &p.up.users
	}
	return &p.class.tenants
}

// settle puts p where it belongs after its jobs or its node's numbers changed.
func (p *place) settle() {
	in := p.node.eligible() && len(p.users)+len(p.jobs) > 0
	switch h := p.above(); {
	case in && p.index < 0:
		h.push(p.node.standing(), p)
	case in:
		h.move(p.index, p.node.standing())
	case p.index >= 0:
		h.remove(p.index)
	}
}

// placeOf returns a node's place in a class, made when it is new.
func placeOf(n *node, cl *class) *place {
	for _, p := range n.places {
		if p.class == cl {
			return p
		}
	}
	p := &place{node: n, class: cl, index: -1}
	if n.parent.parent != nil {
		p.up = placeOf(n.parent, cl)
	}
	n.places = append(n.places, p)
	cl.places = append(cl.places, p)
	return p
}

// classOf returns the class of a job, made when it is new.
func (c *Core) classOf(e *entry) *class {
	want := c.needs(&e.Record)
	cl := c.classes[want]
	if cl == nil {
		cl = &class{needs: want}
		c.classes[want] = cl
	}
	return cl
}

// dropClass forgets a class that nothing waits in.
func (c *Core) dropClass(cl *class) {
	delete(c.classes, cl.needs)
	for _, p := range cl.places {
		p.node.places = slices.DeleteFunc(p.node.places, func(q *place) bool { return q == p })
	}
}

// enqueue puts a job that turned eligible in its user's queue.
func (c *Core) enqueue(e *entry) {
	u := c.nodeOf(e)
	c.count(u, 1, 0)
	c.insert(e)
	settlePlaces(u)
}

// insert puts a job among its user's queued jobs, without counting it.
func (c *Core) insert(e *entry) {
	e.place = placeOf(c.nodeOf(e), c.classOf(e))
	e.place.class.jobs++
	e.place.jobs.push(e.standing(), e)
}

// dequeue takes a job out of its user's queue if it stands there.
func (c *Core) dequeue(e *entry) {
	if e.place == nil {
		return
	}
	cl := e.place.class
	e.place.jobs.remove(e.index)
	e.place = nil
	c.count(c.nodeOf(e), -1, 0)
	settlePlaces(c.nodeOf(e))
	if cl.jobs--; cl.jobs == 0 {
		c.dropClass(cl)
	}
}

// dispatch gives idle runners work until nobody idle can take any of it.
func (c *Core) dispatch(now Millis) {
	if len(c.idlers) == 0 || c.nothingWaits() {
		return
	}
	for _, r := range slices.Clone(c.idlers) { // a grant takes its runner out
		if r.Draining || r.Drained {
			continue
		}
		if e := c.pick(r); e != nil {
			c.grant(e, r, now)
		}
	}
}

func (c *Core) nothingWaits() bool {
	for _, p := range c.pools {
		if p.queued > 0 {
			return false
		}
	}
	return true
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// pick returns the job r runs next, nil for none: in the first of its pools that has
// any, by the smallest virtual time of tenant and then user.
func (c *Core) pick(r *Runner) *entry {
	for _, pool := range r.Pools {
		if p := c.pools[pool]; p == nil || p.queued == 0 || p.paused {
			continue
		}
		var best *entry
		for _, cl := range c.classes {
			if cl.needs.pool != pool || len(cl.tenants) == 0 || r.lacks(&cl.needs) != "" {
				continue
			}
			if e := cl.head(); best == nil || before(e, best) {
				best = e
			}
		}
		if best != nil {
			return best
		}
	}
	return nil
}

// before reports whether a starts before b, which may stand in another class.
func before(a, b *entry) bool {
	ua, ub := a.place.node, b.place.node
	switch {
	case ua == ub:
		return a.rank(b) < 0
	case ua.parent == ub.parent:
		return ua.compare(ub) < 0
	}
	return ua.parent.compare(ub.parent) < 0
}

// standing orders the jobs of one user: one that failed without its fault first, then as
// the user wants, then first come first served.
func (e *entry) standing() key {
	first := -int64(e.Spec.Priority)
	if e.Attempt > 0 {
		first -= triedBefore
	}
	return key{first, e.ID}
}

// triedBefore outweighs every priority, of which the largest is a hundred.
const triedBefore = 1 << 32

func (e *entry) movedTo(i int) { e.index = i }

func (e *entry) rank(o *entry) int { return e.standing().compare(o.standing()) }

// Lacks says in words what a runner lacks for a job, "" for nothing.
func (c *Core) Lacks(r *Runner, rec *job.Record) string {
	n := c.needs(rec)
	if !slices.Contains(r.Pools, rec.Pool) {
		return "is not in pool " + rec.Pool
	}
	return r.lacks(&n)
}

func (r *Runner) lacks(n *needs) string {
	switch {
	case r.Express && !n.short:
		return "takes short jobs only"
	case n.arch != "" && n.arch != r.Arch:
		return fmt.Sprintf("is %s, not %s", r.Arch, n.arch)
	case n.engine != "" && n.engine != r.Engine:
		return fmt.Sprintf("makes boxes with %s, not %s", r.Engine, n.engine)
	case n.gpu && len(r.GPUs) == 0:
		return "has no GPU"
	case n.gpu && n.memoryMB > 0 && r.GPUMemoryMB < n.memoryMB:
		return fmt.Sprintf("has %d MiB of GPU memory, not %d", r.GPUMemoryMB, n.memoryMB)
	case n.gpu && n.model != "" && !slices.ContainsFunc(r.GPUs, func(m string) bool { return strings.Contains(strings.ToLower(m), n.model) }):
		return "has no " + n.model
	case n.gpuArch != "" && r.GPUArch == "":
		return "does not know the architecture of its GPU, and it must be " + n.gpuArch
	case n.gpuArch != "" && n.gpuArch != r.GPUArch:
		return fmt.Sprintf("has a GPU of architecture %s, not %s", r.GPUArch, n.gpuArch)
	case n.build && r.Builds == nil:
		return "does not build images"
	case n.build && !r.Builds.Push(n.registry):
		return "does not push images to " + n.registry
	case n.build: // it needs no other image
	case !r.Images[n.pool].Take(n.image, n.role) && n.image == "":
		return "has no default image"
	case !r.Images[n.pool].Take(n.image, n.role):
		return fmt.Sprintf("does not take the image %q", n.image)
	}
	return ""
}

// grant leases a job to a runner and charges the estimate.
func (c *Core) grant(e *entry, r *Runner, now Millis) {
	c.dequeue(e)
	if e.Holder != r.ID {
		c.forfeit(e) // by whoever was lost with it
	}
	c.fence++
	c.meta = true
	e.Begun = false
	e.State, e.Fence, e.Holder, e.Runner, e.Engine = job.Running, c.fence, r.ID, r.Name, r.Engine
	e.Attempt++
	e.Spec.GPUs = min(e.Spec.GPUs, len(r.GPUs))
	e.StartedAt = at(now)
	e.QueueWaitMS = max(0, now-e.QueuedAt.UnixMilli())
	e.heard, e.granted, e.charge = now, now, 0
	c.setIdle(r, false)
	r.Job = e.ID
	c.active[e.ID] = e
	u := c.nodeOf(e)
	c.started(u)
	c.count(u, 0, 1)
	c.charge(e, c.estimate(e)*e.gpus())
	c.changed(e)
	c.out.Offers = append(c.out.Offers, Offer{Runner: r.ID, Offer: e.offer()})
}

func (e *entry) offer() job.Offer {
	o := job.Offer{Lease: e.Lease(), Attempt: e.Attempt, User: e.User, Team: e.Team,
		Pool: e.Pool, Spec: e.Spec, Source: e.Source != "", Sealed: e.Sealed}
	if e.Attempt > 1 {
		o.Say = fmt.Sprintf("attempt %d: %s", e.Attempt, e.Note)
	}
	return o
}

// day is the number of a UTC day.
func day(now Millis) int64 { return now / (24 * time.Hour).Milliseconds() }
