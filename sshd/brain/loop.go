package brain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// maxBatch bounds how many requests share one commit.
const maxBatch = 256

// A batch is the requests of one commit. Requests are applied to the core as they are
// added. The core is ahead of the store then, so nothing more is applied while a batch
// with a view in it is being committed: the view then sees the core.
type batch struct {
	requests []*request
	writes   []queue.Write
	effects  queue.Effects
	views    bool

	since  time.Time     // the commit began
	landed chan struct{} // closed when the following are set
	rev    store.Rev
	err    error
}

// full reports whether nothing may be added.
func (t *batch) full() bool { return len(t.requests) >= maxBatch }

// fail answers everything with err.
func (t *batch) fail(err error) {
	for _, r := range t.requests {
		r.reply, r.err = nil, err
		close(r.done)
	}
}

// Run serves until ctx ends or the store has another writer, which is fatal.
func (b *Brain) Run(ctx context.Context) error {
	defer b.close()
	b.wind()
	for {
		if err := b.turn(ctx); err != nil {
			if b.flying != nil {
				<-b.flying.landed
				b.land()
			}
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// turn does the next thing: takes a request, lets time pass, or lands a commit. What
// has come together is sent to the store as soon as that is free.
func (b *Brain) turn(ctx context.Context) error {
	inbox, tick, landed := b.inbox, b.tick.C, (<-chan struct{})(nil)
	if b.flying != nil {
		landed = b.flying.landed
	}
	if b.next.full() || b.flying != nil && b.flying.views {
		inbox, tick = nil, nil
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-landed:
		if err := b.land(); err != nil {
			return err
		}
	case <-tick:
		b.add(ctx, &request{cmd: queue.Tick{}, done: make(chan struct{})})
	case r := <-inbox:
		b.add(ctx, r)
	}
	if b.flying == nil && b.lost == nil {
		b.takeWaiting(ctx)
		err := b.launch(ctx)
		return cmp.Or(err, b.lost)
	}
	return b.lost
}

// takeWaiting adds what is waiting already.
func (b *Brain) takeWaiting(ctx context.Context) {
	for !b.next.full() {
		select {
		case r := <-b.inbox:
			b.add(ctx, r)
		default:
			return
		}
	}
}

// add applies a request and puts it into the next batch.
func (b *Brain) add(ctx context.Context, r *request) {
	b.next.requests = append(b.next.requests, r)
	if b.core == nil {
		if err := b.reload(ctx); err != nil {
			b.dropLinks(b.next)
			b.next.fail(err)
			b.next = &batch{}
			return
		}
	}
	now := time.Now().UnixMilli()
	if b.flying == nil {
		b.listen(now)
	}
	switch {
	case r.link != nil:
		r.err = b.applyLink(now, r)
	case r.view != nil:
		b.next.views = true
	case r.cmd == nil:
		b.next.writes = append(b.next.writes, r.writes...)
	case r.cmd == (queue.Tick{}) && b.stuck():
	default:
		r.reply, r.err = b.core.Apply(now, r.cmd)
	}
}

// reload loads a core that was lost, unless that has just failed after a long time: a store
// that hangs would make everybody wait in turn.
func (b *Brain) reload(ctx context.Context) error {
	began := time.Now()
	if began.Sub(b.hung) < reloadEvery {
		return ErrUnavailable
	}
	err := b.load(ctx)
	if err == nil {
		return nil
	}
	if now := time.Now(); now.Sub(began) >= reloadEvery {
		b.hung = now
	}
	b.logf("load the queue: %v", err)
	if errors.Is(err, store.ErrConflict) {
		b.lost = foreign(err)
	}
	b.wind()
	return ErrUnavailable
}

// small is how many rows a commit may have for which another goroutine is not worth
// its while.
const small = 32

// launch sends the next batch to the store.
func (b *Brain) launch(ctx context.Context) error {
	t := b.next
	if len(t.requests) == 0 {
		return nil
	}
	b.next = &batch{}
	t.writes = append(t.writes, b.core.Flush()...)
	t.effects = b.core.Effects()
	t.since, t.landed = time.Now(), make(chan struct{})
	b.flying = t
	switch {
	case len(t.writes) == 0:
		t.rev = b.rev
		close(t.landed)
		return b.land()
	case len(t.writes) <= small:
		b.commit(ctx, t)
		return b.land()
	}
	go b.commit(ctx, t) // whoever ends the loop waits for it
	return nil
}

func (b *Brain) commit(ctx context.Context, t *batch) {
	defer close(t.landed)
	t.rev, t.err = b.Store.Commit(ctx, b.rev, t.writes)
}

// land answers a batch whose commit has ended. An error of the store costs it and the
// next one, which was applied to a core that is not true.
func (b *Brain) land() error {
	defer b.wind()
	t := b.flying
	b.flying = nil
	if t.err == nil {
		b.rev = t.rev
		b.publish(t.effects)
		for _, r := range t.requests {
			if r.view != nil {
				r.view(b.core)
			}
			close(r.done)
		}
		b.listen(time.Now().UnixMilli())
		return nil
	}
	b.core = nil // whatever is true now is in the store
	t.fail(fmt.Errorf("%w: %w", ErrUnavailable, t.err))
	b.next.fail(fmt.Errorf("%w: %v", ErrUnavailable, t.err)) // it was never sent, whatever became of t
	b.next = &batch{}
	if errors.Is(t.err, store.ErrConflict) {
		return foreign(t.err)
	}
	b.logf("commit: %v", t.err)
	return nil
}

func foreign(err error) error { return fmt.Errorf("somebody else writes to this store: %w", err) }

// Leases run out by raid's clock, but only time counts in which raid could hear its
// runners. While there are leases the loop turns every listenEvery at least; a turn
// that comes deafAfter later says that the process, its disk or the machine stood
// still in between, or that the clock was set.
const (
	listenEvery = 2 * time.Second
	deafAfter   = 5 * time.Second
)

// listen notes that the loop turns and commits, and starts all leases again if it did
// not.
func (b *Brain) listen(now queue.Millis) {
	gap := now - b.awake
	if b.core != nil && b.awake != 0 && (gap < 0 || gap > deafAfter.Milliseconds()) {
		b.core.Apply(now, queue.Deaf{})
	}
	b.awake = now
}

// reloadEvery is how often a core that was lost to an error is loaded again when
// nobody asks for anything.
const reloadEvery = time.Second

// stuck reports whether the store has not answered for long. Beats may be waiting then.
func (b *Brain) stuck() bool { return b.flying != nil && time.Since(b.flying.since) > deafAfter }

// wind sets when to turn though nobody asks for anything: when a lease may have run
// out, in time to have listened, or to load the core again.
func (b *Brain) wind() {
	if b.core == nil {
		b.tick.Reset(reloadEvery)
	} else if when, ok := b.core.NextTick(); ok {
		b.tick.Reset(min(max(time.Until(time.UnixMilli(when)), time.Millisecond), listenEvery))
	} else {
		b.tick.Stop()
	}
}

// publish makes committed changes visible and hands out offers and stops.
func (b *Brain) publish(fx queue.Effects) {
	if len(fx.Changed) > 0 {
		b.mu.Lock()
		for _, rec := range fx.Changed {
			if rec.State.Final() {
				delete(b.live, rec.ID)
			} else {
				b.live[rec.ID] = rec
			}
			if bell := b.bells[rec.ID]; bell != nil {
				close(bell)
				delete(b.bells, rec.ID)
			}
		}
		close(b.moved)
		b.moved = make(chan struct{})
		b.mu.Unlock()
		for _, rec := range fx.Changed {
			if b.Changed != nil {
				b.Changed(*rec)
			}
		}
	}
	for _, o := range fx.Offers {
		b.call(o.Runner, job.Call{Offer: &o.Offer})
	}
	for _, s := range fx.Stops {
		c := job.Call{Cancel: &s.Lease}
		if s.Stale {
			c = job.Call{Stale: &s.Lease}
		}
		b.call(s.Runner, c)
	}
}
