package stream

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/store"
)

// What the mirror writes to Redis (all of it best effort; contrib/docs/mirror.md is for
// those who read it):
//
//	rai:log:17   a stream of job 17's output. The id of an entry is "<end>-0", where end
//	             is the offset of raid's log after it, so that MINID trims by bytes.
//	             Fields: s = out | err | raid, d = the bytes. The lines of raid's own end
//	             in a newline. The last entry is "<end>-1" with s = end and d = the job
//	             object: it sorts after all output, also after none. Offsets jump where
//	             something is not mirrored.
//	rai:events   a stream of state changes, the newest 10,000 or so. Fields: job state
//	             reason user team pool attempt t. An event may appear twice.
//	rai:probe    whether Redis takes writes
//
// Log streams expire: Keep after the last entry, and while a job runs not before a
// silence of runningKeep more. No key has braces and each command has one key, so that
// a cluster does as well.
const (
	logKey      = "rai:log:"
	eventsKey   = "rai:events"
	probeKey    = "rai:probe"
	eventsMax   = 10_000
	runningKeep = 6 * time.Hour

	conns      = 8    // to Redis at most
	eventsKept = 1024 // that wait for Redis
	endedKept  = 1024 // ended jobs whose output waits for Redis
	endedAtime = 64   // of these at work together
)

// MirrorOptions of a mirror.
type MirrorOptions struct {
	URL    string        // as in store.RedisOptions: redis://, rediss:// or unix://
	PerJob int64         // bytes of output kept in Redis for each job. Defaults to 1 MiB
	Memory int64         // bytes that all of it may take there, or a quarter of Redis's maxmemory if that is less. 0: no bound but that
	Keep   time.Duration // how long after its end. Defaults to 1 h
	Logf   func(format string, args ...any)
}

// A Mirror copies output and state changes to Redis. It follows as everybody else does,
// so a Redis that is absent, hung or full costs the mirror only; that is said once, and
// once when it is over. Output that Redis does not take in time is skipped, and the
// stream says so. A job for which there is no room in Redis is not mirrored. All methods
// are safe for concurrent use, and but for Run none waits for anything.
type Mirror struct {
	MirrorOptions
	spools *Spools
	client redis.UniversalClient
	bulk   chan []byte   // buffers for sends of many entries: that many may be under way
	turn   chan struct{} // held by ended jobs at work

	mu      sync.Mutex // guards the following, and the fields of breaker and budget
	watched map[int64]*watch
	ready   []*watch      // for Run to start
	ends    []*watch      // that have ended, in that order; may have forgotten ones
	events  [][]any       // to be sent
	news    chan struct{} // of ready and events: closed when there are some
	count   counters
	breaker
	budget
}

// A watch is one job being mirrored. But for the channel all is guarded by Mirror.mu.
type watch struct {
	id        int64
	begun     bool          // there is output, or there never will be
	runs      bool          // Run has started it
	refused   bool          // there was no room for it
	forgotten bool          // it is in watched no more
	at        int64         // where its stream ends
	final     chan struct{} // closed once end is set
	end       []byte        // the job object; not written again
}

// NewMirror returns a mirror of the jobs in s. It does nothing before Run. The only
// error is a URL that makes no sense.
//
// It silences go-redis's own log for the whole process: that repeats on every retry
// what the mirror says once.
func NewMirror(o MirrorOptions, s *Spools) (*Mirror, error) {
	client, err := store.DialRedis(o.URL, callTimeout, conns)
	if err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
	}
	if o.PerJob <= 0 {
		o.PerJob = 1 << 20
	}
	if o.Keep <= 0 {
		o.Keep = time.Hour
	}
	m := &Mirror{
		MirrorOptions: o,
		spools:        s,
		client:        client,
		bulk:          make(chan []byte, conns),
		turn:          make(chan struct{}, endedAtime),
		watched:       map[int64]*watch{},
		news:          make(chan struct{}),
		breaker:       newBreaker(),
		budget:        budget{stakes: map[int64]stake{}},
	}
	for range conns {
		m.bulk <- nil // made when first used
	}
	s.setBegun(m.begun)
	return m, nil
}

// Watch has a job mirrored until its last entry is written, which takes its final
// Event. Watching it again is nothing new. A job costs little until it has output.
func (m *Mirror) Watch(id int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watchLocked(id)
}

func (m *Mirror) watchLocked(id int64) *watch {
	w := m.watched[id]
	if w == nil {
		w = &watch{id: id, final: make(chan struct{})}
		m.watched[id] = w
		m.startLocked(w)
	}
	return w
}

func (m *Mirror) startLocked(w *watch) {
	m.ready = append(m.ready, w)
	m.ringLocked()
}

func (m *Mirror) ringLocked() {
	close(m.news)
	m.news = make(chan struct{})
}

// begun is told by the spools that a job has output.
func (m *Mirror) begun(id int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if w := m.watched[id]; w != nil && !w.begun {
		w.begun = true
		m.startLocked(w)
	}
}

// Event has a state change mirrored. A final state is also what the job's log stream
// ends with, and watches the job.
func (m *Mirror) Event(j job.Job) {
	e := []any{"job", j.ID, "state", string(j.State), "reason", string(j.Reason), "user", j.User, "team", j.Team,
		"pool", j.Pool, "attempt", j.Attempt, "t", job.At(time.Now()).String()}
	m.mu.Lock()
	if len(m.events) == eventsKept {
		m.events = m.events[1:]
		m.count.eventsLost++
	}
	m.events = append(m.events, e)
	m.ringLocked()
	m.mu.Unlock()
	if j.State.Final() {
		m.Ended(j)
	}
}

// Ended has the log stream of a job that has ended completed, if it is not yet: raid may
// have been killed before it was. There is no event of it.
func (m *Mirror) Ended(j job.Job) {
	m.mu.Lock()
	defer m.mu.Unlock()
	w := m.watchLocked(j.ID)
	if w.end != nil {
		return
	}
	// The types of a Job always marshal.
	w.end, _ = json.Marshal(j)
	close(w.final)
	if !w.begun || w.refused { // one that was refused gets another chance
		w.begun = true
		m.startLocked(w)
	}
	m.ends = append(m.ends, w)
	m.thinLocked()
}

// thinLocked gives up the oldest of the ended jobs that wait for Redis when they are too
// many: memory must not depend on how long it is away.
func (m *Mirror) thinLocked() {
	if len(m.ends) <= endedKept {
		return
	}
	m.ends = slices.DeleteFunc(m.ends, func(w *watch) bool { return w.forgotten })
	many := len(m.ends) - endedKept
	m.ends = slices.DeleteFunc(m.ends, func(w *watch) bool {
		if many <= 0 || w.runs {
			return false
		}
		many--
		m.count.skipped++
		m.forgetLocked(w)
		return true
	})
}

func (m *Mirror) forgetLocked(w *watch) {
	if s, ok := m.stakes[w.id]; ok && s.until.IsZero() { // it is not complete, but what there is stays
		m.stakeLocked(w.id, stake{s.bytes, time.Now().Add(m.Keep + runningKeep)})
	}
	w.forgotten = true
	delete(m.watched, w.id)
}

// Run mirrors until ctx ends and everything it started has ended. It is called once.
func (m *Mirror) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer m.client.Close()
	defer wg.Wait()
	wg.Go(func() { m.probe(ctx) })
	wg.Go(func() { m.sendEvents(ctx) })
	for m.awaitUp(ctx) {
		m.mu.Lock()
		ready, news := m.ready, m.news
		m.ready = nil
		m.mu.Unlock()
		for _, w := range ready {
			if m.start(w) {
				wg.Go(func() { m.mirror(ctx, w) })
			}
		}
		if len(ready) == 0 {
			wait(ctx, news)
		}
	}
}

// start reports whether a job is to be mirrored now. If not, begun or Event will put it
// to Run again.
func (m *Mirror) start(w *watch) bool {
	has := m.spools.has(w.id)
	m.mu.Lock()
	defer m.mu.Unlock()
	w.begun = w.begun || has
	if !w.begun || w.runs || w.forgotten {
		return false
	}
	w.runs = true
	return true
}

// wait returns when c is closed, or false when ctx ends.
func wait(ctx context.Context, c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-ctx.Done():
		return false
	}
}

// pause waits for d, or false when ctx ends.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
