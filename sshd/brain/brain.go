// Package brain is the one loop that joins the queue to its store.
//
// Everything that changes a job passes through it as a command: the core applies a
// batch of them, the store commits the rows, and only then do replies, offers and
// wake-ups leave. Nobody else writes. Reads of committed state need no loop.
//
// While one batch is being committed the next is applied already, so that the disk and
// the core both work; what it does is told only after its own commit.
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
	"sync"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// ErrUnavailable is returned while the store cannot commit. Nothing was changed; but if
// it wraps store.ErrAmbiguous, that is not known. Try again later.
var ErrUnavailable = errors.New("raid cannot save anything at the moment")

// ErrClosed is returned after Run has ended.
var ErrClosed = errors.New("raid is stopping")

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
	core   *queue.Core // nil after an error, until it is loaded again
	lost   error       // somebody else writes to the store
	hung   time.Time   // when a try to load the core failed that took long
	rev    store.Rev
	links  map[string]*Link
	next   *batch       // applied to the core, or to be; not sent to the store yet
	flying *batch       // being committed; nil for none
	awake  queue.Millis // when the loop was last seen to turn; 0 before it began
	tick   *time.Timer  // when to turn though nobody asks for anything

	mu    sync.RWMutex            // protects the following, which is what was committed
	live  map[int64]*job.Record   // never changed, but replaced
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
		links: map[string]*Link{}, next: &batch{}, tick: time.NewTimer(0), bells: map[int64]chan struct{}{}, moved: make(chan struct{})}
	if err := b.load(ctx); err != nil {
		return nil, err
	}
	return b, nil
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

// Put commits rows that the core does not read: people, keys, history.
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
// is none. The record is the caller's own.
func (b *Brain) Job(ctx context.Context, id int64) (*job.Record, error) {
	if rec := b.unfinished(id); rec != nil {
		return rec, nil
	}
	rec, err := b.past(ctx, id)
	if errors.Is(err, queue.ErrNoJob) {
		if rec := b.unfinished(id); rec != nil { // it finished between the two looks, or was retried
			return rec, nil
		}
	}
	return rec, err
}

// past returns a finished job.
func (b *Brain) past(ctx context.Context, id int64) (*job.Record, error) {
	val, err := b.Store.Get(ctx, queue.TablePast, queue.Key(id))
	if errors.Is(err, store.ErrNotFound) {
		return nil, queue.ErrNoJob
	}
	if err != nil {
		return nil, fmt.Errorf("read job %d: %w", id, err)
	}
	rec, err := decode(val)
	if err != nil {
		return nil, err
	}
	return &rec, nil
}

// unfinished returns a copy of an unfinished job, nil if there is none.
func (b *Brain) unfinished(id int64) *job.Record {
	b.mu.RLock()
	defer b.mu.RUnlock()
	rec, ok := b.live[id]
	if !ok {
		return nil
	}
	own := *rec
	return &own
}

// Live returns an unfinished job.
func (b *Brain) Live(id int64) (job.Record, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	rec, ok := b.live[id]
	if !ok {
		return job.Record{}, false
	}
	return *rec, true
}

// Unfinished returns all unfinished jobs, in no order. The records are everybody's: the
// caller does not change them.
func (b *Brain) Unfinished() []*job.Record {
	b.mu.RLock()
	defer b.mu.RUnlock()
	all := make([]*job.Record, 0, len(b.live))
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
	return decodeAll(rows)
}

// Holds reports whether a runner holds the lease it shows. The job may be queued again
// by then, as its runner was thought lost: a queue.Claim brings it back.
func (b *Brain) Holds(runner string, l job.Lease) (job.Record, bool) {
	rec, ok := b.Live(l.Job)
	return rec, ok && rec.Holder == runner && rec.Fence == l.Fence
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
