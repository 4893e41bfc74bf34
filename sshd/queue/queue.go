// Package queue is the scheduler: a deterministic state machine that says which job
// runs next on which runner, and why.
//
// A [Core] is fed commands, one at a time, each with the time it happened at. It
// answers with replies, with offers and stops for runners, and with the rows that
// changed. It does no I/O, asks no clock, draws no random numbers, and depends on
// no map order, so the same commands give the same rows on every machine and with
// every store. Whoever owns a Core commits [Core.Flush] before any reply leaves.
//
// Fairness is between tenants (a team, or a user without one) and then between the
// users of a tenant, in GPU-seconds: each node of the tree carries a virtual time,
// the charge it has used; the smallest runs next. A dispatch is charged an estimate
// at once, topped up while it runs and settled when it ends (start-time fair
// queueing with unknown lengths: Goyal, Vin and Cheng 1996; Sheng et al., OSDI '24).
//
// Promises: a job is in exactly one state; a lease is held by one key at a time and
// every write without its fence is refused; a job nobody acknowledged is never run,
// and one that was acknowledged is never lost by anything that happens here.
// Non-goals: preemption, and knowing how long a job will take.
package queue

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/rai-project/raid/runner/job"
)

// Millis is a time or a span in milliseconds. Times are since the Unix epoch.
type Millis = int64

// A Policy holds what staff may choose. Its zero value is not useful; start from
// [DefaultPolicy].
type Policy struct {
	Lease    Millis           // silence after which a runner has lost its job
	Attempts int              // how often a job may be tried when it is not its own fault
	Burst    Millis           // GPU-milliseconds of credit a returning tenant gets
	FirstGo  Millis           // estimate for the first job of a pool
	MinGo    Millis           // least estimate, and least charge of a job its owner cancelled
	Express  Millis           // time limit of the jobs that express slots take; 0: there are none
	User     Caps             // of every user
	Team     Caps             // of every team, and of a user without one
	Weights  map[string]int64 // share of a tenant, by job.Job.Tenant, 1 to 1000; 1 if not there
}

// DefaultPolicy is what raid ships with.
func DefaultPolicy() Policy {
	return Policy{Lease: 30_000, Attempts: 3, Burst: 60_000, FirstGo: 60_000, MinGo: 5_000}
}

// Errors that Apply returns, wrapped.
var (
	ErrNoJob = errors.New("no such job")
	ErrStale = errors.New("stale fence")
	ErrFull  = errors.New("too many jobs are waiting")
	ErrDaily = errors.New("too many jobs today")
	ErrTaken = errors.New("another runner with this key is connected")
	ErrNeeds = errors.New("too many different demands are waiting")
)

// A Core is the scheduler's whole state. It is not safe for concurrent use.
type Core struct {
	policy  Policy
	next    int64 // id of the next job
	fence   uint64
	turns   int64
	jobs    map[int64]*entry // unfinished jobs
	active  map[int64]*entry // of them, those that run
	pools   map[string]*node
	classes map[needs]*class   // that jobs wait in
	runners map[string]*Runner // by the fingerprint of their key
	idlers  []*Runner          // connected and waiting for work, in the order they are served

	changes
	out Effects
}

// An entry is an unfinished job with what the core needs beside its record. That comes
// first, with the id and the state: a job that starts was not looked at for long, and
// each part of it has to be fetched from memory.
type entry struct {
	user    *node
	place   *place // where it waits, nil when it does not
	index   int    // in place's heap
	heard   Millis // when its runner was last heard of; running jobs only
	granted Millis
	charge  Millis // GPU-milliseconds charged for this attempt so far
	written bool   // it has a row
	dirty   bool   // and that is not what it should be
	job.Record
}

// A Runner is one slot, as its last hello described it.
type Runner struct {
	ID          string                 `json:"id"` // fingerprint of its key
	Folder      string                 `json:"-"`  // the id of its state folder, "" if it does not say
	Name        string                 `json:"name"`
	Pools       []string               `json:"pools"`
	Engine      string                 `json:"engine"`
	Arch        string                 `json:"arch"`
	GPUs        []string               `json:"gpus,omitempty"`          // models
	GPUArch     string                 `json:"gpu_arch,omitempty"`      // of all of them
	GPUMemoryMB int64                  `json:"gpu_memory_mb,omitempty"` // of the smallest
	Images      map[string]*job.Images `json:"pool_images,omitempty"`   // that it takes, by pool; none: any
	Builds      *job.Builds            `json:"builds,omitempty"`        // nil: it builds no images
	Express     bool                   `json:"express,omitempty"`       // takes short jobs only
	Weakness    string                 `json:"weakness,omitempty"`
	Seen        Millis                 `json:"seen"`
	Drained     bool                   `json:"drained,omitempty"` // staff said: nothing new
	Connected   bool                   `json:"-"`
	Idle        bool                   `json:"-"`
	Draining    bool                   `json:"-"` // it said so itself
	Sick        string                 `json:"-"` // why it takes nothing, as it said
	Job         int64                  `json:"-"` // the job it runs, 0 for none
}

// Effects are what happened beside the rows. They are carried out after the commit.
type Effects struct {
	Offers  []Offer
	Stops   []Stop
	Changed []*job.Record // every job that changed its state, as it was then; nobody may write to it
}

// An Offer goes to the runner that holds the new lease.
type Offer struct {
	Runner string
	job.Offer
}

// A Stop tells a runner to end what it runs.
type Stop struct {
	Runner string
	Lease  job.Lease
	Stale  bool // forget the result too
}

// New returns an empty core.
func New(p Policy) *Core {
	return &Core{
		policy: p, next: 1,
		jobs: map[int64]*entry{}, active: map[int64]*entry{}, pools: map[string]*node{}, classes: map[needs]*class{}, runners: map[string]*Runner{},
		changes: changes{met: map[*Runner]bool{}},
	}
}

// Apply lets cmd happen at now and starts whatever can start because of it. An
// error means that nothing changed. Times must not run backwards by more than a
// lease; small steps back are harmless.
func (c *Core) Apply(now Millis, cmd Command) (reply any, err error) {
	if reply, err = cmd.apply(c, now); err == nil {
		c.dispatch(now)
	}
	return reply, err
}

// NextTick returns when the next Tick can change something; ok is false for never.
func (c *Core) NextTick() (when Millis, ok bool) {
	for _, e := range c.active {
		if t := e.heard + c.policy.Lease; !ok || t < when {
			when, ok = t, true
		}
	}
	return when, ok
}

// held returns the job whose lease the runner shows. A job that was queued again
// because nobody heard of that runner, and that nobody else has taken since, is its
// own again: nothing was done twice, and what it did is not lost.
func (c *Core) held(now Millis, runner string, l job.Lease) (*entry, error) {
	e := c.jobs[l.Job]
	if e == nil || !e.heldBy(runner, l.Fence) {
		return nil, fmt.Errorf("job %d fence %d: %w", l.Job, l.Fence, ErrStale)
	}
	if e.State == job.Queued {
		c.restore(e, now)
	}
	return e, nil
}

// forfeit ends a lease for good: its runner is told so, and cannot come back to it.
func (c *Core) forfeit(e *entry) {
	if e.Holder == "" {
		return
	}
	c.out.Stops = append(c.out.Stops, Stop{Runner: e.Holder, Lease: e.Lease(), Stale: true})
	c.release(e)
	e.vacate()
}

// vacate forgets who held the lease.
func (e *entry) vacate() { e.Holder, e.Fence, e.granted = "", 0, 0 }

// release takes the lease from the runner that holds it.
func (c *Core) release(e *entry) {
	if c.active[e.ID] == nil {
		return
	}
	delete(c.active, e.ID)
	c.count(c.nodeOf(e), 0, -1)
	settlePlaces(c.nodeOf(e))
	if r := c.runners[e.Holder]; r != nil && r.Job == e.ID {
		r.Job = 0
	}
}

// retry queues a job again that failed without its own fault, unless it was tried
// often enough or somebody cancelled it meanwhile. Whoever still holds its lease may
// come back to it until somebody else is granted it.
func (c *Core) retry(e *entry, now Millis, why string) {
	c.charge(e, 0) // nobody pays for raid's failures
	end := job.Result{Reason: job.ReasonCancelled, Exit: job.ExitCancelled}
	if e.State != job.Cancelling {
		end = job.Result{Reason: job.ReasonInfra, Exit: job.ExitInfra,
			Note: fmt.Sprintf("given up after %d attempts: %s", e.Attempt, why)}
		if e.Attempt < c.policy.Attempts {
			e.State, e.Note, e.Runner, e.StartedAt = job.Queued, why, "", job.Time{}
			c.enqueue(e)
			c.changed(e)
			return
		}
	}
	c.forfeit(e)
	c.finish(e, now, end)
}

// restore gives a job back to the runner it was thought to be lost with.
func (c *Core) restore(e *entry, now Millis) {
	c.dequeue(e)
	e.State, e.StartedAt, e.Note = job.Running, at(e.granted), ""
	if r := c.runners[e.Holder]; r != nil {
		c.setIdle(r, false)
		e.Runner, r.Job = r.Name, e.ID
	}
	e.heard = now
	c.active[e.ID] = e
	u := c.nodeOf(e)
	c.started(u)
	c.count(u, 0, 1)
	c.charge(e, max(c.estimate(e), now-e.granted)*e.gpus())
	c.changed(e)
}

// finish gives a job its one result.
func (c *Core) finish(e *entry, now Millis, res job.Result) {
	c.dequeue(e)
	c.settle(e, now, res.Reason == job.ReasonCancelled)
	exit := res.Exit
	e.State, e.Reason, e.Exit, e.Signal = verdict(res), res.Reason, &exit, res.Signal
	e.Note, e.Steps, e.Begun = res.Note, res.Steps, res.Begun
	e.PrepareMS, e.RunMS, e.CollectMS, e.OutBytes = res.PrepareMS, res.RunMS, res.CollectMS, res.OutBytes
	e.Image, e.ImageDigest = cmp.Or(res.Image, e.Image), res.ImageDigest
	e.Engine, e.GPU, e.GPUDriver, e.Weakness = cmp.Or(res.Engine, e.Engine), res.GPU, res.GPUDriver, res.Weakness
	e.GPUUUID, e.GPUMemoryMB = res.GPUUUID, res.GPUMemoryMB
	e.FinishedAt, e.Sealed = at(now), "" // no secret outlives what it was for
	if e.StartedAt.IsZero() {
		e.QueueWaitMS = max(0, now-e.QueuedAt.UnixMilli())
	}
	delete(c.jobs, e.ID)
	c.ended = append(c.ended, e)
	c.out.Changed = append(c.out.Changed, e.record())
}

// verdict is the state a result leads to. A job that was being cancelled and ended
// by itself first keeps what the box said.
func verdict(res job.Result) job.State {
	switch {
	case res.Reason == job.ReasonCancelled:
		return job.Cancelled
	case res.Reason == job.ReasonExit && res.Exit == 0:
		return job.Succeeded
	}
	return job.Failed
}

// changed notes that a job changed its state, and returns its record.
func (c *Core) changed(e *entry) *job.Record {
	c.writeJob(e)
	r := e.record()
	c.out.Changed = append(c.out.Changed, r)
	return r
}

// record is what others may keep of a job: a copy, unless it has ended, when its record
// never changes again.
func (e *entry) record() *job.Record {
	if e.State.Final() {
		return &e.Record
	}
	r := e.Record
	return &r
}

// Effects returns what happened since the last call, beside the rows.
func (c *Core) Effects() Effects {
	out := c.out
	c.out = Effects{}
	return out
}

// Job returns an unfinished job.
func (c *Core) Job(id int64) (job.Record, bool) {
	if e := c.jobs[id]; e != nil {
		return e.Record, true
	}
	return job.Record{}, false
}

// Jobs calls yield with every unfinished job, in no order. The records are the core's.
func (c *Core) Jobs(yield func(*job.Record) bool) {
	for _, e := range c.jobs {
		if !yield(&e.Record) {
			return
		}
	}
}

// Len returns how many unfinished jobs there are.
func (c *Core) Len() int { return len(c.jobs) }

// Runners returns every runner seen, by name.
func (c *Core) Runners() []Runner {
	var all []Runner
	for _, r := range c.runners {
		all = append(all, *r)
	}
	slices.SortFunc(all, func(a, b Runner) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return all
}

func sortedIDs(jobs map[int64]*entry) []int64 {
	ids := make([]int64, 0, len(jobs))
	for id := range jobs {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Next returns the id that the next job gets.
func (c *Core) Next() int64 { return c.next }

// is reports whether l is the lease of e.
func (e *entry) is(l *job.Lease) bool { return l != nil && *l == e.Lease() }

func (e *entry) heldBy(runner string, fence uint64) bool {
	return e.Holder == runner && e.Fence == fence
}
