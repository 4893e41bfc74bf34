package queue

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/rai-project/raid/runner/job"
)

// A Command is something that happened. The reply's type is said by each command.
type Command interface {
	apply(c *Core, now Millis) (reply any, err error)
}

// Submit queues a job. Record must carry User, Team, Pool, Kind, Spec and Source;
// the reply is the *job.Record with its id. The error is ErrFull or ErrDaily when a
// cap of the user or the team is reached, and ErrNeeds when the user's waiting jobs ask
// for maxNeeds different things of a runner already.
type Submit struct{ Record job.Record }

func (s Submit) apply(c *Core, now Millis) (any, error) {
	e := &entry{Record: s.Record}
	u := c.nodeOf(e)
	for n := u; n.parent != nil; n = n.parent {
		if err := n.admit(now); err != nil {
			return nil, err
		}
	}
	if !u.mayNeed(c.needs(&e.Record)) {
		return nil, fmt.Errorf("%w: %d is the most", ErrNeeds, maxNeeds)
	}
	for n := u; n.parent != nil; n = n.parent {
		n.day, n.today = day(now), n.submitted(now)+1
		c.write(n)
	}
	e.ID, e.State, e.Attempt = c.next, job.Queued, 0
	e.QueuedAt = at(now)
	c.next++
	c.meta = true
	c.jobs[e.ID] = e
	c.enqueue(e)
	return c.changed(e), nil
}

// admit checks the caps on waiting jobs and on jobs a day.
func (n *node) admit(now Millis) error {
	switch {
	case n.caps.Queued > 0 && n.queued >= n.caps.Queued:
		return fmt.Errorf("%w: %d is the most", ErrFull, n.caps.Queued)
	case n.caps.Daily > 0 && n.submitted(now) >= n.caps.Daily:
		return fmt.Errorf("%w: %d is the most", ErrDaily, n.caps.Daily)
	}
	return nil
}

// submitted is how many jobs were submitted on the day of now.
func (n *node) submitted(now Millis) int {
	if day(now) != n.day {
		return 0
	}
	return n.today
}

// Cancel ends a job: at once when it is queued, through its runner when it runs.
// The reply is the *job.Record as it is then.
type Cancel struct {
	Job int64
	By  string // who, for the record
}

func (x Cancel) apply(c *Core, now Millis) (any, error) {
	e := c.jobs[x.Job]
	if e == nil {
		return nil, ErrNoJob
	}
	switch e.State {
	case job.Queued:
		e.CancelBy = x.By
		c.finish(e, now, job.Result{Reason: job.ReasonCancelled, Exit: job.ExitCancelled})
	case job.Running:
		e.CancelBy = x.By
		e.State = job.Cancelling
		c.changed(e)
		c.out.Stops = append(c.out.Stops, Stop{Runner: e.Holder, Lease: e.Lease()})
	}
	return e.record(), nil
}

// Join says that a runner is connected. A lease it was thought to hold and does not
// claim is over: the process that held it is gone. The error is ErrTaken if another was
// heard of within a lease that works in another folder: one of two with the same key would
// take the other's job away, and so would the other. The reply is nil.
type Join struct {
	Runner Runner
	Held   *job.Lease
	Told   *job.Lease // the newest offer on this connection, which it may not have read yet
}

func (j Join) apply(c *Core, now Millis) (any, error) {
	r := c.runners[j.Runner.ID]
	if r == nil {
		r = &Runner{}
		c.runners[j.Runner.ID] = r
	}
	if r.Connected && now-r.Seen < c.policy.Lease && r.Folder != "" && j.Runner.Folder != "" && r.Folder != j.Runner.Folder {
		return nil, fmt.Errorf("%w: %s", ErrTaken, r.Name)
	}
	c.setIdle(r, false)
	running, drained := r.Job, r.Drained
	*r = j.Runner
	r.Seen, r.Connected, r.Job, r.Drained = now, true, running, drained
	c.met[r] = true
	if e := c.jobs[r.Job]; e != nil && !e.is(j.Held) && !e.is(j.Told) {
		c.forfeit(e)
		c.retry(e, now, fmt.Sprintf("runner %s was restarted", e.Runner))
	}
	c.claim(r, j.Held, now)
	return nil, nil
}

// Beat renews what a runner holds and says whether it wants work. The reply is nil.
type Beat struct {
	Runner         string
	Held           *job.Lease
	Idle, Draining bool
	Sick           string
}

func (b Beat) apply(c *Core, now Millis) (any, error) {
	r := c.runners[b.Runner]
	if r == nil || !r.Connected {
		return nil, ErrStale
	}
	r.Seen, r.Draining, r.Sick = now, b.Draining, b.Sick
	c.claim(r, b.Held, now)
	c.setIdle(r, b.Idle && b.Sick == "" && b.Held == nil && r.Job == 0)
	return nil, nil
}

// setIdle keeps the list of runners that wait for work. Express slots come first, or
// they would leave the short jobs to the others.
func (c *Core) setIdle(r *Runner, idle bool) {
	if r.Idle == idle {
		return
	}
	r.Idle = idle
	i, _ := slices.BinarySearchFunc(c.idlers, r, func(a, b *Runner) int {
		return cmp.Or(-cmp.Compare(b2i(a.Express), b2i(b.Express)), cmp.Compare(a.ID, b.ID))
	})
	if idle {
		c.idlers = slices.Insert(c.idlers, i, r)
	} else {
		c.idlers = slices.Delete(c.idlers, i, i+1)
	}
}

// claim renews the lease a runner shows, or tells it that the lease is stale.
func (c *Core) claim(r *Runner, held *job.Lease, now Millis) {
	if held == nil {
		return
	}
	e, err := c.held(now, r.ID, *held)
	if err != nil {
		c.out.Stops = append(c.out.Stops, Stop{Runner: r.ID, Lease: *held, Stale: true})
		return
	}
	r.Job = e.ID
	e.heard = now
	c.topUp(e, now)
	if e.State == job.Cancelling { // it may have missed the first word
		c.out.Stops = append(c.out.Stops, Stop{Runner: r.ID, Lease: *held})
	}
}

// Leave says that a runner's connection ended. Its lease goes on. The reply is nil.
type Leave struct{ Runner string }

func (l Leave) apply(c *Core, now Millis) (any, error) {
	if r := c.runners[l.Runner]; r != nil {
		c.setIdle(r, false)
		r.Connected, r.Seen = false, now
		c.met[r] = true
	}
	return nil, nil
}

// Drain tells a runner to take nothing new, or lifts that. It is remembered. The
// reply is how many runners have that name.
type Drain struct {
	Name string
	On   bool
}

func (d Drain) apply(c *Core, _ Millis) (any, error) {
	n := 0
	for _, r := range c.runners {
		if r.Name == d.Name {
			r.Drained = d.On
			c.met[r] = true
			n++
		}
	}
	return n, nil
}

// Pause lets nothing start in a pool, or lifts that. It is remembered. The reply is nil.
type Pause struct {
	Pool string
	On   bool
}

func (p Pause) apply(c *Core, _ Millis) (any, error) {
	n := c.pool(p.Pool)
	n.paused = p.On
	c.write(n)
	return nil, nil
}

// Claim says that a runner still works on a lease, by whatever way raid heard of it.
// The error is ErrStale when it has none. The reply is nil.
type Claim struct {
	Runner string
	Lease  job.Lease
}

func (x Claim) apply(c *Core, now Millis) (any, error) {
	e, err := c.held(now, x.Runner, x.Lease)
	if err == nil {
		e.heard = now
	}
	return nil, err
}

// Begin says that the first step of an attempt has started: from now on the death
// of its box is the job's own verdict. The reply is nil.
type Begin struct {
	Runner string
	Lease  job.Lease
}

func (b Begin) apply(c *Core, now Millis) (any, error) {
	e, err := c.held(now, b.Runner, b.Lease)
	if err != nil {
		return nil, err
	}
	if !e.Begun {
		e.Begun, e.heard = true, now
		c.changed(e)
	}
	return nil, nil
}

// Finish delivers the result of an attempt. The reply is the *job.Record: final, or
// queued again when the failure was not the job's.
type Finish struct {
	Runner  string
	Lease   job.Lease
	Result  job.Result
	Archive string // blob of /build, "" for none

	Log      string // blob of the output, "" for none
	LogBytes int64
}

func (f Finish) apply(c *Core, now Millis) (any, error) {
	e, err := c.held(now, f.Runner, f.Lease)
	if err != nil {
		return nil, err
	}
	c.release(e)
	if f.Result.Reason == job.ReasonInfra {
		e.vacate()
		c.retry(e, now, f.Result.Note)
	} else {
		e.Archive, e.Log, e.LogBytes = f.Archive, f.Log, f.LogBytes
		c.finish(e, now, f.Result)
	}
	return e.record(), nil
}

// Tick lets time pass: leases that were not renewed are taken back. The reply is nil.
type Tick struct{}

func (Tick) apply(c *Core, now Millis) (any, error) {
	for _, id := range sortedIDs(c.active) {
		if e := c.active[id]; now-e.heard >= c.policy.Lease {
			c.release(e)
			c.retry(e, now, fmt.Sprintf("runner %s was lost", e.Runner))
		}
	}
	return nil, nil
}

// Deaf says that raid could hear nobody until now: it was stopped, its disk stood
// still, or the clock was set. The silence of runners counts anew. The reply is nil.
type Deaf struct{}

func (Deaf) apply(c *Core, now Millis) (any, error) {
	for _, e := range c.active {
		e.heard = now
	}
	return nil, nil
}
