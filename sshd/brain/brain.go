// Package brain is the one loop that joins the queue to its store.
//
// Everything that changes a job passes through it as a command: the core applies a
// batch of them, the store commits the rows, and only then do replies, offers and
// wake-ups leave. Nobody else writes. Reads of committed state need no loop.
//
// Promises: what was acknowledged is durable; readers never see what is not; an
// error of the store costs the batch, never the state, because the core is thrown
// away and loaded again. Non-goal: policy, which is package queue's.
package brain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// ErrUnavailable is returned while the store cannot commit. Nothing was changed, or
// it is not known; try again later.
var ErrUnavailable = errors.New("raid cannot save anything at the moment")

// ErrClosed is returned after Run has ended.
var ErrClosed = errors.New("raid is stopping")

// maxBatch bounds how many commands share one commit.
const maxBatch = 256

// Config says what a brain works with. Store and Policy are required.
type Config struct {
	Store  store.Store
	Policy queue.Policy
	Logf   func(format string, args ...any)
	// Changed is called after every commit with each job that changed, in order,
	// from the loop: it must not block.
	Changed func(job.Record)
}

// A Brain owns the core and is the only one who commits. Its methods other than
// Run are safe for concurrent use.
type Brain struct {
	Config
	inbox chan *request
	ended chan struct{} // closed when Run has returned

	// Owned by Run's goroutine.
	core  *queue.Core // nil after an error, until it is loaded again
	rev   store.Rev
	links map[string]*Link
	awake queue.Millis // when the loop was last seen to turn; 0 before it began

	mu    sync.RWMutex // protects the following, which is what was committed
	live  map[int64]job.Record
	bells map[int64]chan struct{} // closed when the job changes
	moved chan struct{}           // closed when any job changes
}

// A request is one thing somebody wants of the loop: exactly one of cmd, writes,
// view and link is set.
type request struct {
	cmd    queue.Command
	writes []queue.Write
	view   func(*queue.Core)
	link   *Link
	op     linkOp
	beat   job.Beat

	reply any
	err   error
	done  chan struct{}
}

// New loads the state and returns a brain that waits for Run.
func New(ctx context.Context, c Config) (*Brain, error) {
	b := &Brain{Config: c, inbox: make(chan *request, maxBatch), ended: make(chan struct{}),
		links: map[string]*Link{}, bells: map[int64]chan struct{}{}, moved: make(chan struct{})}
	if err := b.load(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

// Run serves until ctx ends or the store has another writer, which is fatal.
func (b *Brain) Run(ctx context.Context) error {
	defer b.close()
	for {
		batch, err := b.gather(ctx)
		if err != nil {
			return nil
		}
		if err := b.step(ctx, batch); err != nil {
			return err
		}
	}
}

// Next returns the id that the next job gets. It may be called before Run only.
func (b *Brain) Next() int64 { return b.core.Next() }

func (b *Brain) close() {
	close(b.ended)
	for _, l := range b.links {
		l.cut()
	}
}

// Do applies one command and returns its reply once it is durable.
func (b *Brain) Do(ctx context.Context, cmd queue.Command) (any, error) {
	return b.send(ctx, &request{cmd: cmd})
}

// Put commits rows that are not the queue's: people and keys.
func (b *Brain) Put(ctx context.Context, writes []queue.Write) error {
	_, err := b.send(ctx, &request{writes: writes})
	return err
}

// View calls fn in the loop with the committed core. fn must be quick and must not
// keep the core.
func (b *Brain) View(ctx context.Context, fn func(*queue.Core)) error {
	_, err := b.send(ctx, &request{view: fn})
	return err
}

func (b *Brain) send(ctx context.Context, r *request) (any, error) {
	r.done = make(chan struct{})
	select {
	case b.inbox <- r:
	case <-b.ended:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select { // once taken it is answered: giving up would hide an outcome
	case <-r.done:
		return r.reply, r.err
	case <-b.ended:
	}
	select {
	case <-r.done: // answered by the last turn
		return r.reply, r.err
	default:
		return nil, ErrClosed
	}
}

// Job returns a job, finished or not, as it was committed; queue.ErrNoJob if there
// is none.
func (b *Brain) Job(ctx context.Context, id int64) (job.Record, error) {
	if rec, ok := b.Live(id); ok {
		return rec, nil
	}
	val, err := b.Store.Get(ctx, queue.TablePast, queue.Key(id))
	if errors.Is(err, store.ErrNotFound) {
		if rec, ok := b.Live(id); ok { // it finished between the two looks, or was retried
			return rec, nil
		}
		return job.Record{}, queue.ErrNoJob
	}
	if err != nil {
		return job.Record{}, fmt.Errorf("read job %d: %w", id, err)
	}
	return decode(val)
}

// Live returns an unfinished job.
func (b *Brain) Live(id int64) (job.Record, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	rec, ok := b.live[id]
	return rec, ok
}

// Unfinished returns all unfinished jobs, in no order.
func (b *Brain) Unfinished() []job.Record {
	b.mu.RLock()
	defer b.mu.RUnlock()
	all := make([]job.Record, 0, len(b.live))
	for _, rec := range b.live {
		all = append(all, rec)
	}
	return all
}

// Past returns at most n finished jobs of a list, newest first, older than before
// (0: no bound).
func (b *Brain) Past(ctx context.Context, list string, before int64, n int) ([]job.Record, error) {
	rows, err := b.Store.List(ctx, list, before, n)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", list, err)
	}
	all := make([]job.Record, 0, len(rows))
	for _, row := range rows {
		rec, err := decode(row.Value)
		if err != nil {
			return nil, err
		}
		all = append(all, rec)
	}
	return all, nil
}

// Holds reports whether a runner holds the lease it shows.
func (b *Brain) Holds(runner string, l job.Lease) (job.Record, bool) {
	rec, ok := b.Live(l.Job)
	return rec, ok && rec.State != job.Queued && rec.Holder == runner && rec.Fence == l.Fence
}

// Bell returns a channel that is closed when the job changes next. Take the bell
// before looking at the job, or a change slips through between. A job that has ended
// will not change; its bell is nil.
func (b *Brain) Bell(id int64) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.live[id]; !ok {
		return nil
	}
	if b.bells[id] == nil {
		b.bells[id] = make(chan struct{})
	}
	return b.bells[id]
}

// Moved returns a channel that is closed when any job changes next.
func (b *Brain) Moved() <-chan struct{} {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.moved
}

// gather waits for the first request, or for a lease that may have run out, and
// takes what else is waiting.
func (b *Brain) gather(ctx context.Context) ([]*request, error) {
	var tick <-chan time.Time
	if t := b.timer(); t != nil {
		defer t.Stop()
		tick = t.C
	}
	var batch []*request
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-tick:
		batch = append(batch, &request{cmd: queue.Tick{}, done: make(chan struct{})})
	case r := <-b.inbox:
		batch = append(batch, r)
	}
	for len(batch) < maxBatch {
		select {
		case r := <-b.inbox:
			batch = append(batch, r)
		default:
			return batch, nil
		}
	}
	return batch, nil
}

// Leases run out by raid's clock, but only time counts in which raid could hear its
// runners. While there are leases the loop turns every listenEvery at least; a turn
// that comes deafAfter later says that the process, its disk or the machine stood
// still in between, or that the clock was set.
const (
	listenEvery = 2 * time.Second
	deafAfter   = 5 * time.Second
)

// listen notes that the loop turns, and starts all leases again if it did not.
func (b *Brain) listen(now queue.Millis) {
	gap := now - b.awake
	if b.awake != 0 && (gap < 0 || gap > deafAfter.Milliseconds()) {
		b.core.Apply(now, queue.Deaf{})
	}
	b.awake = now
}

// reloadEvery is how often a core that was lost to an error is loaded again when
// nobody asks for anything.
const reloadEvery = time.Second

func (b *Brain) timer() *time.Timer {
	if b.core == nil {
		return time.NewTimer(reloadEvery)
	}
	if when, ok := b.core.NextTick(); ok {
		return time.NewTimer(min(max(time.Until(time.UnixMilli(when)), time.Millisecond), listenEvery))
	}
	return nil
}

// step carries out one batch: apply, commit, publish, reply.
func (b *Brain) step(ctx context.Context, batch []*request) error {
	defer func() {
		for _, r := range batch {
			close(r.done)
		}
	}()
	if b.core == nil {
		if err := b.load(ctx); err != nil {
			b.logf("load the queue: %v", err)
			fail(batch, ErrUnavailable)
			return nil
		}
	}
	writes := b.apply(batch)
	if len(writes) > 0 {
		rev, err := b.Store.Commit(ctx, b.rev, writes)
		if err != nil {
			b.core = nil // whatever is true now is in the store
			fail(batch, fmt.Errorf("%w: %v", ErrUnavailable, err))
			if errors.Is(err, store.ErrConflict) {
				return fmt.Errorf("somebody else writes to this state folder: %w", err)
			}
			b.logf("commit: %v", err)
			return nil
		}
		b.rev = rev
	}
	b.publish(b.core.Effects())
	for _, r := range batch {
		if r.view != nil {
			r.view(b.core)
		}
	}
	return nil
}

func (b *Brain) apply(batch []*request) []queue.Write {
	now := time.Now().UnixMilli()
	b.listen(now)
	var writes []queue.Write
	for _, r := range batch {
		switch {
		case r.cmd != nil:
			r.reply, r.err = b.core.Apply(now, r.cmd)
		case r.link != nil:
			r.err = b.applyLink(now, r)
		default:
			writes = append(writes, r.writes...)
		}
	}
	return append(writes, b.core.Flush()...)
}

func fail(batch []*request, err error) {
	for _, r := range batch {
		r.reply, r.err = nil, err
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
				b.Changed(rec)
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

// load reads the committed state and puts the connected runners back into it.
func (b *Brain) load(ctx context.Context) error {
	now := time.Now().UnixMilli()
	core := queue.New(b.Policy)
	rev, err := b.Store.Load(ctx, queue.Tables(), func(row queue.Row) error { return core.LoadRow(now, row) })
	if err != nil {
		return err
	}
	b.core, b.rev = core, rev
	live := map[int64]job.Record{}
	for _, rec := range core.Jobs() {
		live[rec.ID] = rec
	}
	b.mu.Lock()
	for id, bell := range b.bells { // whoever waits must look again
		close(bell)
		delete(b.bells, id)
	}
	close(b.moved)
	b.moved = make(chan struct{})
	was := b.live
	b.live = live
	b.mu.Unlock()
	for _, l := range b.links {
		l.again(core, now)
	}
	b.catchUp(ctx, was, live)
	return nil
}

// catchUp tells of changes that were committed although the store said otherwise.
func (b *Brain) catchUp(ctx context.Context, was, is map[int64]job.Record) {
	if was == nil || b.Changed == nil {
		return // at the start nothing is a change
	}
	for _, id := range slices.Sorted(maps.Keys(was)) {
		if _, ok := is[id]; ok {
			continue
		}
		rec, err := b.Job(ctx, id)
		if err != nil {
			b.logf("how job %d ended: %v", id, err)
			continue
		}
		b.Changed(rec)
	}
	for _, id := range slices.Sorted(maps.Keys(is)) {
		old, now := was[id], is[id]
		if old.State != now.State || old.Attempt != now.Attempt {
			b.Changed(now)
		}
	}
}

func (b *Brain) logf(format string, args ...any) {
	if b.Logf != nil {
		b.Logf(format, args...)
	}
}

func decode(val []byte) (job.Record, error) {
	var rec job.Record
	if err := json.Unmarshal(val, &rec); err != nil {
		return rec, fmt.Errorf("decode job: %w", err)
	}
	return rec, nil
}
