package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// What the mirror writes to Redis (all of it best effort):
//
//	rai:log:17   a stream of job 17's output. The id of an entry is "<end>-0", where end
//	             is the offset of raid's log after it, so that MINID trims by bytes and
//	             a resend is refused. Fields: s = out | err | raid, d = the bytes. The
//	             lines of raid's own end in a newline. The last entry is "<end>-1" with
//	             s = end and d = the job object: it sorts after all output, also after
//	             none. Offsets jump where something is not mirrored.
//	rai:events   a stream of state changes, the newest 10,000 or so. Fields: job state
//	             reason user team pool attempt t. An event may appear twice.
//	rai:probe    whether Redis takes writes
//
// Log streams expire: Keep after the last entry, and while a job runs not before a
// silence of runningKeep more.
const (
	logKey      = "rai:log:"
	eventsKey   = "rai:events"
	probeKey    = "rai:probe"
	eventsMax   = 10_000
	runningKeep = 6 * time.Hour

	entrySize  = 32 << 10
	pipeline   = 16
	flushEvery = 50 * time.Millisecond
	bulkSends  = 8 // at a time, of pipeline entries each: bounds memory
	eventsKept = 1024
	opTimeout  = time.Second
	regain     = time.Second // before a stream that vanished is written again
	maxBackoff = 30 * time.Second
)

// MirrorOptions of a mirror.
type MirrorOptions struct {
	URL    string        // redis://, rediss:// or unix://
	PerJob int64         // bytes of output kept in Redis for each job. Defaults to 1 MiB
	Keep   time.Duration // how long after its end. Defaults to 1 h
	Logf   func(format string, args ...any)
}

// A Mirror copies output and state changes to Redis. It follows as everybody else does,
// so a Redis that is absent, hung or full costs the mirror only; that is said once, and
// once when it is over. Output that Redis does not take in time is skipped, and the
// stream says so. All methods are safe for concurrent use, and but for Run none waits
// for anything.
type Mirror struct {
	MirrorOptions
	spools *Spools
	client *redis.Client
	bulk   chan []byte // buffers for sends of many entries: that many may be under way

	mu      sync.Mutex // guards the following
	watched map[int64]*watch
	fresh   []*watch      // for Run to start
	events  [][]any       // to be sent
	news    chan struct{} // of fresh and events: closed when there are some
	up      chan struct{} // closed while Redis takes writes
	down    chan struct{} // closed while it does not
	said    bool          // that it does not
	backoff time.Duration // before the next probe
}

// A watch is one job being mirrored.
type watch struct {
	id    int64
	begun bool          // there is output, or there never will be; guarded by Mirror.mu,
	runs  bool          // as is whether Run has started it
	final chan struct{} // closed once end is set
	end   []byte        // the job object
}

// NewMirror returns a mirror of the jobs in s. It does nothing before Run. The only
// error is a URL that makes no sense.
//
// It silences go-redis's own log for the whole process: that repeats on every retry
// what the mirror says once.
func NewMirror(o MirrorOptions, s *Spools) (*Mirror, error) {
	opt, err := redis.ParseURL(o.URL)
	if err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
	}
	opt.MaxRetries = -1
	opt.ContextTimeoutEnabled = true // else a hung Redis holds a call for seconds
	opt.DialTimeout, opt.ReadTimeout, opt.WriteTimeout, opt.PoolTimeout = opTimeout, opTimeout, opTimeout, opTimeout
	opt.DisableIdentity = true
	opt.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	opt.PoolSize = bulkSends
	redis.SetLogger(silence{})
	if o.PerJob <= 0 {
		o.PerJob = 1 << 20
	}
	if o.Keep <= 0 {
		o.Keep = time.Hour
	}
	m := &Mirror{
		MirrorOptions: o,
		spools:        s,
		client:        redis.NewClient(opt),
		bulk:          make(chan []byte, bulkSends),
		watched:       map[int64]*watch{},
		news:          make(chan struct{}),
		up:            make(chan struct{}),
		down:          make(chan struct{}),
	}
	for range bulkSends {
		m.bulk <- nil // made when first used
	}
	close(m.down) // until the first probe
	s.setBegun(m.begun)
	return m, nil
}

type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

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
	m.fresh = append(m.fresh, w)
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
	defer m.mu.Unlock()
	if len(m.events) == eventsKept {
		m.events = m.events[1:]
	}
	m.events = append(m.events, e)
	m.ringLocked()
	if !j.State.Final() {
		return
	}
	if w := m.watchLocked(j.ID); w.end == nil {
		// The types of a Job always marshal.
		w.end, _ = json.Marshal(j)
		close(w.final)
		if !w.begun {
			w.begun = true
			m.startLocked(w)
		}
	}
}

// Run mirrors until ctx ends and everything it started has ended. It is called once.
func (m *Mirror) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer m.client.Close()
	defer wg.Wait()
	wg.Go(func() { m.probe(ctx) })
	wg.Go(func() { m.sendEvents(ctx) })
	for ctx.Err() == nil {
		m.mu.Lock()
		fresh, news := m.fresh, m.news
		m.fresh = nil
		m.mu.Unlock()
		for _, w := range fresh {
			if m.ready(w) {
				wg.Go(func() { m.mirror(ctx, w) })
			}
		}
		if len(fresh) == 0 {
			wait(ctx, news)
		}
	}
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

// probe is the breaker: while Redis is away nobody else calls it, and this after 1 to
// 30 s.
func (m *Mirror) probe(ctx context.Context) {
	for {
		m.mu.Lock()
		down := m.down
		m.mu.Unlock()
		if !wait(ctx, down) {
			return
		}
		m.mu.Lock()
		backoff := m.backoff
		m.mu.Unlock()
		if !pause(ctx, backoff) {
			return
		}
		// A real write: a full or read-only Redis still answers PING.
		err := m.send(ctx, func(p redis.Pipeliner) {
			p.XAdd(ctx, &redis.XAddArgs{Stream: probeKey, MaxLen: 1, Values: []any{"t", time.Now().Unix()}})
			p.Expire(ctx, probeKey, m.Keep)
		})
		if err == nil {
			m.open()
		} else {
			m.trip(ctx, err, true)
		}
	}
}

// open lets everybody call Redis again.
func (m *Mirror) open() {
	m.mu.Lock()
	back := m.said
	m.said = false
	m.down = make(chan struct{})
	close(m.up)
	m.mu.Unlock()
	if back {
		m.Logf("mirror: redis is back")
	}
}

// trip keeps everybody from calling Redis. Only the first to see a trouble counts, and
// the probe that sees it last.
func (m *Mirror) trip(ctx context.Context, err error, probing bool) {
	if ctx.Err() != nil {
		return
	}
	m.mu.Lock()
	first := !m.said
	m.said = true
	wasUp := closed(m.up)
	if wasUp {
		m.up = make(chan struct{})
		close(m.down)
	}
	if wasUp || probing {
		m.backoff = min(max(2*m.backoff, time.Second), maxBackoff)
	}
	m.mu.Unlock()
	if first {
		m.Logf("mirror: redis: %v; jobs go on without it", err)
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

// worked makes the next trouble start with a short back-off again.
func (m *Mirror) worked() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.backoff = 0
}

// send sends commands together. That an entry is there already is what a resend is
// told, and no error.
func (m *Mirror) send(ctx context.Context, fill func(redis.Pipeliner)) error {
	p := m.client.Pipeline()
	fill(p)
	cmds, err := p.Exec(ctx)
	for _, c := range cmds {
		if e := c.Err(); e != nil && !strings.Contains(e.Error(), "equal or smaller") {
			return e
		}
		err = nil
	}
	return err
}

// awaitUp waits until Redis takes writes, or false when ctx ends.
func (m *Mirror) awaitUp(ctx context.Context) bool {
	m.mu.Lock()
	up := m.up
	m.mu.Unlock()
	return wait(ctx, up)
}

// sendEvents sends what Event queued, in order.
func (m *Mirror) sendEvents(ctx context.Context) {
	said := false
	for m.awaitUp(ctx) {
		m.mu.Lock()
		n := min(len(m.events), pipeline)
		some, news := m.events[:n:n], m.news
		m.mu.Unlock()
		if n == 0 {
			if !wait(ctx, news) {
				return
			}
			continue
		}
		err := m.send(ctx, func(p redis.Pipeliner) {
			for _, e := range some {
				p.XAdd(ctx, &redis.XAddArgs{Stream: eventsKey, MaxLen: eventsMax, Approx: true, Values: e})
			}
		})
		if err != nil && trouble(err) {
			m.trip(ctx, err, false)
			continue
		}
		if err != nil && !said {
			said = true
			m.Logf("mirror: events are lost: %v", err)
		}
		m.worked()
		m.sent(some)
	}
}

// sent takes events out of the queue, which may have lost its oldest meanwhile.
func (m *Mirror) sent(some [][]any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range some {
		if len(m.events) > 0 && &m.events[0][0] == &e[0] {
			m.events = m.events[1:]
		}
	}
}

// trouble tells a Redis that cannot take writes now from one that refused a command
// for what it was.
func trouble(err error) bool {
	var reply redis.Error
	if !errors.As(err, &reply) {
		return true // the connection, or time
	}
	for _, p := range []string{"OOM", "LOADING", "READONLY", "MISCONF", "MASTERDOWN", "NOAUTH", "NOPERM", "WRONGPASS",
		"BUSY", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "UNKILLABLE", "ERR max number of clients"} {
		if strings.HasPrefix(reply.Error(), p) {
			return true
		}
	}
	return false
}

// ready reports whether a job has anything to mirror. If not, begun or Event will put it
// to Run again.
func (m *Mirror) ready(w *watch) bool {
	has := m.spools.has(w.id)
	m.mu.Lock()
	defer m.mu.Unlock()
	start := (has || w.begun) && !w.runs
	w.begun, w.runs = w.begun || has, w.runs || start
	return start
}

// mirror copies one job's output, over as many troubles as there are.
func (m *Mirror) mirror(ctx context.Context, w *watch) {
	defer func() {
		m.mu.Lock()
		delete(m.watched, w.id)
		m.mu.Unlock()
	}()
	f := m.spools.Follow(w.id)
	defer f.Close()
	for m.awaitUp(ctx) {
		err := m.copy(ctx, w, f)
		switch {
		case err == nil || ctx.Err() != nil:
			return
		case errors.Is(err, redis.Nil):
			// The stream was there and is not: expired, evicted, or Redis began anew.
			// It is written again, but not as fast as Redis may throw it away.
			pause(ctx, regain)
			continue
		case errors.Is(err, errOutput) || !trouble(err):
			m.Logf("mirror: the rest of job %d is not mirrored: %v", w.id, err)
			return
		}
		f.rest() // holds nothing while Redis is away
		m.trip(ctx, err, false)
	}
}

var (
	// errOutput marks what went wrong on raid's side.
	errOutput = errors.New("read output")
	// errEnd is the end of a job's output. It is not io.EOF, for that is also what a
	// connection to a Redis says that has just died.
	errEnd = errors.New("end of output")
)

// copy mirrors a job from where its stream ends to its last entry.
func (m *Mirror) copy(ctx context.Context, w *watch, f *Follower) error {
	key := logKey + strconv.FormatInt(w.id, 10)
	off, over, err := m.resume(ctx, key, f)
	if err != nil || over {
		return err
	}
	f.Skip(off)
	b := batch{end: off, exists: off > 0}
	for {
		err := m.flush(ctx, key, f, &b)
		if err == errEnd {
			break
		}
		if err != nil {
			return err
		}
	}
	if !wait(ctx, w.final) {
		return ctx.Err()
	}
	return m.send(ctx, func(p redis.Pipeliner) {
		p.XAdd(ctx, &redis.XAddArgs{Stream: key, NoMkStream: b.exists, ID: fmt.Sprintf("%d-1", b.end), Values: []any{"s", "end", "d", w.end}})
		p.Expire(ctx, key, m.Keep)
	})
}

// resume returns where the stream ends, and whether it has its last entry. A stream that
// has more than raid has is of another job with this number, or of a log that was lost
// since: it goes.
func (m *Mirror) resume(ctx context.Context, key string, f *Follower) (off int64, over bool, err error) {
	last, err := m.client.XRevRangeN(ctx, key, "+", "-", 1).Result()
	if err != nil || len(last) == 0 {
		return 0, false, err
	}
	at, _, _ := strings.Cut(last[0].ID, "-")
	off, err = strconv.ParseInt(at, 10, 64)
	behind, done := f.behind(off)
	over = last[0].Values["s"] == "end"
	if err != nil || behind < 0 || over && (!done || behind > 0) {
		return 0, false, m.client.Del(ctx, key).Err()
	}
	return off, over, nil
}

// flush waits for output and sends it: the first byte at once, then 32 KiB or what came
// in 50 ms, and as much as one pipeline takes when there is no end of it.
func (m *Mirror) flush(ctx context.Context, key string, f *Follower, b *batch) error {
	b.reset()
	m.catchUp(f, b)
	c, err := f.Next(ctx)
	if err != nil {
		return outputError(ctx, err)
	}
	b.add(c)
	next, cancel := context.WithDeadline(ctx, b.sent.Add(flushEvery))
	defer cancel()
	for err == nil && b.size() < entrySize && len(b.entries) < pipeline {
		if c, err = f.Next(next); err == nil {
			b.add(c)
		}
	}
	if err == nil {
		select {
		case buf := <-m.bulk:
			own := b.data
			b.data = append(buf[:0], own...)
			defer func() { m.bulk <- b.data; b.data = own }()
		case <-ctx.Done():
			return ctx.Err()
		}
		b.fill(f)
	}
	if len(b.entries) == 0 {
		return nil // marks only
	}
	b.sent = time.Now()
	if err := m.send(ctx, func(p redis.Pipeliner) { m.commands(ctx, p, key, b) }); err != nil {
		return err
	}
	b.exists = true
	m.worked()
	return nil
}

// outputError keeps the end of the output and of ctx apart from faults.
func outputError(ctx context.Context, err error) error {
	switch {
	case err == io.EOF:
		return errEnd
	case ctx.Err() != nil:
		return err
	}
	return fmt.Errorf("%w: %w", errOutput, err)
}

// catchUp skips what Redis would only trim again, when it is far behind.
func (m *Mirror) catchUp(f *Follower, b *batch) {
	behind, _ := f.behind(b.end)
	if behind <= 4*m.PerJob {
		return
	}
	skip := behind - m.PerJob
	b.end += skip
	f.Skip(b.end)
	b.put("raid", fmt.Appendf(nil, "%d bytes of log were not mirrored\n", skip), b.end)
}

// commands adds the entries, but not to a stream that vanished: that would have only the
// rest.
func (m *Mirror) commands(ctx context.Context, p redis.Pipeliner, key string, b *batch) {
	for i, e := range b.entries {
		a := &redis.XAddArgs{Stream: key, ID: fmt.Sprintf("%d-0", e.end), Values: []any{"s", e.s, "d", b.data[e.from:e.to]}}
		a.NoMkStream = b.exists || i > 0
		if e.end > m.PerJob {
			a.MinID, a.Approx = strconv.FormatInt(e.end-m.PerJob, 10), true
		}
		p.XAdd(ctx, a)
	}
	p.Expire(ctx, key, m.Keep+runningKeep)
}

// A batch is what one send carries.
type batch struct {
	entries []entry
	data    []byte    // of all entries
	end     int64     // offset after all that was added, mirrored or not
	exists  bool      // the stream does
	sent    time.Time // when the last one was
}

type entry struct {
	s        string
	from, to int // of data
	end      int64
}

func (b *batch) reset() { b.entries, b.data = b.entries[:0], b.data[:0] }

func (b *batch) size() int { return len(b.data) }

// add takes a copy of c.
func (b *batch) add(c Chunk) {
	b.end = c.End
	switch c.Kind {
	case job.Out:
		b.put("out", c.Data, c.End)
	case job.Err:
		b.put("err", c.Data, c.End)
	case job.Raid:
		b.put("raid", append(c.Data[:len(c.Data):len(c.Data)], '\n'), c.End)
	case job.Gap:
		b.put("raid", fmt.Appendf(nil, "%d bytes of log were dropped\n", c.Dropped), c.End)
	}
}

// put adds bytes to the last entry, or a new one.
func (b *batch) put(s string, data []byte, end int64) {
	if len(data) == 0 {
		return
	}
	b.data = append(b.data, data...)
	n := len(b.entries)
	if n > 0 && b.entries[n-1].s == s && len(b.data)-b.entries[n-1].from <= entrySize {
		b.entries[n-1].to, b.entries[n-1].end = len(b.data), end
		return
	}
	b.entries = append(b.entries, entry{s, len(b.data) - len(data), len(b.data), end})
}

// fill adds what f has, without waiting, up to a whole pipeline.
func (b *batch) fill(f *Follower) {
	stop := ended()
	for len(b.entries) < pipeline && b.size() < pipeline*entrySize {
		c, err := f.Next(stop)
		if err != nil {
			return // Next will say so again
		}
		b.add(c)
	}
}
