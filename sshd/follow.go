package sshd

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/door"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/stream"
)

// An event is one line of --json while a job is followed.
type event struct {
	Event    string    `json:"event"` // queued position started step out err raid artifact done
	Job      int64     `json:"job"`
	T        job.Time  `json:"t"`
	SHA256   string    `json:"source_sha256,omitempty"`
	Kind     string    `json:"kind,omitempty"`
	Position int       `json:"position,omitempty"`
	EarlyS   int64     `json:"eta_early_s,omitempty"` // the job starts between these
	LateS    int64     `json:"eta_late_s,omitempty"`
	Runner   string    `json:"runner,omitempty"`
	Attempt  int       `json:"attempt,omitempty"`
	Data     string    `json:"data,omitempty"`
	B64      []byte    `json:"b64,omitempty"` // data that is not UTF-8
	Step     *job.Step `json:"step,omitempty"`
}

// A done is the last event: it carries the whole job object beside its own names.
type done struct {
	Event string   `json:"event"`
	Job   int64    `json:"job"`
	T     job.Time `json:"t"`
	object
}

// object keeps the embedded job's name from hiding the id.
type object = job.Job

// A follower brings a job's life to one session: where it stands, what it prints,
// how it ended. It reads the spool at its own pace, so nobody waits for it.
type follower struct {
	*call
	id     int64
	owner  bool // leaving cancels
	status bool // say where the job stands, not only what it prints

	mu sync.Mutex // one event a line, from two goroutines
}

func runAttach(ctx context.Context, c *call) (int, error) {
	rec, err := c.job(ctx, c.args[0])
	if err != nil {
		return 0, err
	}
	f := &follower{call: c, id: rec.ID, status: true}
	return f.run(ctx)
}

func logsFlags(f *pflag.FlagSet) {
	f.BoolP("follow", "f", false, "go on until the job has ended")
	f.IntP("number", "n", -1, "only the last `LINES`")
}

func runLogs(ctx context.Context, c *call) (int, error) {
	rec, err := c.job(ctx, c.args[0])
	if err != nil {
		return 0, err
	}
	lines, err := c.flags.GetInt("number")
	if err != nil {
		return 0, err
	}
	open := c.s.spools.Follow
	if !c.on("follow") {
		open = c.s.spools.Replay
	}
	feed, err := c.feed(ctx, rec, open)
	if err != nil {
		return 0, err
	}
	defer feed.Close()
	if lines >= 0 {
		if err := feed.Tail(ctx, lines); err != nil {
			return 0, c.gone(ctx, rec.ID, err)
		}
	}
	return 0, (&follower{call: c, id: rec.ID}).print(ctx, feed)
}

// feed opens the output of a job. That of a finished one may go at any moment: it is
// looked at again once it is open, since from then on a removal shows in what is read.
func (c *call) feed(ctx context.Context, rec *job.Record, open func(id int64) *stream.Follower) (*stream.Follower, error) {
	if err := expired(rec); err != nil {
		return nil, err
	}
	if err := c.s.fetchLog(ctx, rec); err != nil {
		return nil, c.gone(ctx, rec.ID, err)
	}
	feed := open(rec.ID)
	c.s.settle(rec) // while it is open: its end is remembered, though the disk be too full to note it
	if !rec.State.Final() {
		return feed, nil
	}
	if err := c.kept(ctx, rec.ID); err != nil {
		feed.Close()
		return nil, err
	}
	return feed, nil
}

// settle tells the spools about a job that ended before this process began.
func (s *Server) settle(rec *job.Record) {
	if rec.State.Final() {
		if err := s.spools.Finish(rec.ID); err != nil {
			s.Log.Error("close the spool", "job", rec.ID, "err", err)
		}
	}
}

// run follows a job to its end and returns its exit status.
func (f *follower) run(ctx context.Context) (int, error) {
	if f.owner {
		var stop func()
		ctx, stop = f.obeyKeys(ctx)
		defer stop()
	}
	watching, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() { stop(); wg.Wait() }()
	rec, err := f.await(ctx)
	if err != nil {
		return 0, f.leave(ctx, err)
	}
	feed, err := f.feed(ctx, rec, f.s.spools.Follow)
	if err != nil {
		return 0, f.leave(ctx, err)
	}
	defer feed.Close()
	now := stage{rec.State, rec.Attempt}
	wg.Go(func() { f.watch(watching, now) })
	if err := f.print(ctx, feed); err != nil {
		return 0, f.leave(ctx, err)
	}
	stop()
	wg.Wait()
	return f.finish(ctx)
}

// await says where a queued job stands until it is not queued any more.
func (f *follower) await(ctx context.Context) (*job.Record, error) {
	var last standing
	for {
		bell, moved := f.s.brain.Bell(f.id), f.s.brain.Moved()
		rec, err := f.s.brain.Job(ctx, f.id)
		if err != nil || rec.State != job.Queued {
			if err == nil && !rec.State.Final() {
				f.started(rec)
			}
			return rec, err
		}
		if err := f.position(ctx, rec, &last); err != nil {
			return rec, err
		}
		if err := f.pause(ctx, bell, moved); err != nil {
			return rec, err
		}
	}
}

// A standing is what was last said of a queued job.
type standing struct {
	position int
	late     time.Duration // it would start after so long at the latest
	at       time.Time
}

// news reports whether it is worth another line: the place is another, or the job starts
// earlier or later than was to be expected by a quarter, and half a minute at least.
func (s standing) news(now standing) bool {
	expected := s.late - now.at.Sub(s.at)
	return now.position != s.position || (now.late-expected).Abs() > max(30*time.Second, expected.Abs()/4)
}

// positionEvery is the least time between two lines about a place in the queue.
const positionEvery = 2 * time.Second

// pause waits for news of a queued job: at once when the job itself moves, and not
// too often when only others do.
func (f *follower) pause(ctx context.Context, bell, moved <-chan struct{}) error {
	soon := time.NewTimer(positionEvery)
	defer soon.Stop()
	var others <-chan struct{}
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-bell:
			return nil
		case <-soon.C:
			others = moved
		case <-others:
			return nil
		}
	}
}

// position says a place in the queue, and when the job starts, when that is news.
func (f *follower) position(ctx context.Context, rec *job.Record, last *standing) error {
	why, err := f.s.reason(ctx, rec)
	now := standing{why.Position, time.Duration(why.LateS) * time.Second, time.Now()}
	if err != nil || why.Position == 0 || !last.news(now) {
		return err
	}
	first := last.position == 0
	*last = now
	f.event(event{Event: "position", Position: why.Position, EarlyS: why.EarlyS, LateS: why.LateS})
	if f.jsonOut() {
		return nil
	}
	f.say("%s", why.line())
	if first && (why.Runners == 0 || len(why.HeldBy) > 0) {
		for _, line := range why.Words[1:] {
			f.say("%s", line)
		}
	}
	return nil
}

func (f *follower) started(rec *job.Record) {
	f.event(event{Event: "started", Runner: rec.Runner, Attempt: rec.Attempt})
	if f.status && !f.jsonOut() {
		f.say("started on %s after %s", clean(rec.Runner), ms(rec.QueueWaitMS))
	}
}

// A stage is what a follower knows of a job that runs.
type stage struct {
	State   job.State
	Attempt int
}

// watch says when a running job changes hands, until ctx ends.
func (f *follower) watch(ctx context.Context, was stage) {
	for !was.State.Final() {
		bell := f.s.brain.Bell(f.id)
		rec, err := f.s.brain.Job(ctx, f.id)
		if err != nil {
			return
		}
		if now := (stage{rec.State, rec.Attempt}); now != was {
			f.changed(was, rec)
			was = now
			continue
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return
		}
	}
}

func (f *follower) changed(was stage, rec *job.Record) {
	switch {
	case f.jsonOut():
	case rec.State == job.Queued:
		f.say("%s; the job is first in line again (attempt %d of %d)", clean(rec.Note), rec.Attempt+1, f.s.Policy.Attempts)
	case rec.State == job.Cancelling:
		f.say("cancelling job %d", rec.ID)
	}
	switch {
	case rec.State.Final() || rec.State == job.Queued:
	case rec.Attempt != was.Attempt:
		f.started(rec)
	case was.State == job.Queued && !f.jsonOut():
		f.say("runner %s is back; the job goes on", clean(rec.Runner))
	}
}

// print copies output until the feed ends.
func (f *follower) print(ctx context.Context, feed *stream.Follower) error {
	show := f.chunk
	if f.jsonOut() {
		show = f.chunkEvent
	}
	for {
		c, err := feed.Next(ctx)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return f.gone(ctx, f.id, err)
		}
		if err := show(c); err != nil {
			return err
		}
	}
}

func (f *follower) chunk(c stream.Chunk) (err error) {
	switch c.Kind {
	case job.Out:
		_, err = f.Write(c.Data)
	case job.Err:
		_, err = f.Stderr().Write(c.Data)
	case job.Raid:
		f.say("%s", clean(string(c.Data)))
	case job.Gap:
		f.say("%s of output were dropped here", bytesWord(c.Dropped))
	case job.Mark:
		f.mark(c.Data)
	}
	return err
}

// mark announces a step, and says how it went when that is not obvious.
func (f *follower) mark(data []byte) {
	var st job.Step
	if json.Unmarshal(data, &st) != nil {
		return // a box said it; nothing depends on it
	}
	switch {
	case st.Begin:
		f.say("[%d/%d] %s", st.N, st.Of, oneLine(st.Line))
	case st.Exit != 0:
		f.say("[%d/%d] exit status %d after %s", st.N, st.Of, st.Exit, ms(st.WallMS))
	}
}

func (f *follower) chunkEvent(c stream.Chunk) error {
	e := event{}
	switch c.Kind {
	case job.Out:
		e.Event = "out"
	case job.Err:
		e.Event = "err"
	case job.Raid:
		e.Event = "raid"
	case job.Gap:
		return f.event(event{Event: "raid", Data: bytesWord(c.Dropped) + " of output were dropped here"})
	case job.Mark:
		e.Event = "step"
		if json.Unmarshal(c.Data, &e.Step) != nil {
			return nil
		}
		return f.event(e)
	}
	if utf8.Valid(c.Data) {
		e.Data = string(c.Data)
	} else {
		e.B64 = c.Data
	}
	return f.event(e)
}

// event writes one event when the session wants them.
func (f *follower) event(e event) error {
	if !f.jsonOut() {
		return nil
	}
	e.Job = f.id
	if e.T.IsZero() {
		e.T = job.At(time.Now())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.emit(e)
}

func (f *follower) jsonOut() bool { return f.call.json() }

// finish says how it ended. These are the last lines of every job.
func (f *follower) finish(ctx context.Context) (int, error) {
	rec, err := f.ended(ctx)
	if err != nil {
		return 0, f.leave(ctx, err)
	}
	if f.jsonOut() {
		if rec.Archive != "" {
			f.event(event{Event: "artifact"})
		}
		return *rec.Exit, f.emit(done{"done", rec.ID, job.At(time.Now()), rec.Job})
	}
	if rec.Note != "" && rec.Reason != job.ReasonInfra {
		f.say("%s", clean(rec.Note))
	}
	if rec.Archive != "" {
		f.say("/build is kept: ssh … output %d | tar xf -", rec.ID)
	}
	if !rec.StartedAt.IsZero() {
		f.say("%s", timing(rec))
	}
	f.say("job %d %s", rec.ID, verdict(rec))
	return *rec.Exit, nil
}

// ended waits for the commit of the result: the output may be complete a moment
// before it.
func (f *follower) ended(ctx context.Context) (*job.Record, error) {
	for {
		bell := f.s.brain.Bell(f.id)
		rec, err := f.s.brain.Job(ctx, f.id)
		if err != nil || rec.State.Final() {
			return rec, err
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return rec, context.Cause(ctx)
		}
	}
}

func timing(rec *job.Record) string {
	s := "ran " + ms(rec.RunMS) + " · waited " + ms(rec.QueueWaitMS) + " · " + clean(rec.Runner)
	if rec.GPU != "" {
		s += " · " + clean(rec.GPU)
	}
	return s
}

var errKeys = errors.New("left by a key")

// obeyKeys lets signals and Ctrl-C on a terminal cancel the job: once to cancel and
// see how it ends, twice to leave. stop must be called.
func (f *follower) obeyKeys(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	if _, tty := f.PTY(); tty {
		f.WatchKeys()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-f.Signals():
			}
			if n > 0 {
				cancel(errKeys)
				return
			}
			if _, err := f.cancel(ctx, f.id); err != nil {
				f.s.Log.Error("cancel", "job", f.id, "err", err)
			}
		}
	})
	return ctx, func() { cancel(nil); wg.Wait() }
}

// leave is how a session ends before its job: a deliberate end of the session that
// submitted cancels, anything else lets the job run.
func (f *follower) leave(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	switch {
	case cause == nil:
		return err
	case errors.Is(cause, door.ErrShutdown):
		return failf(job.ExitTryLater, "follow it again with: ssh … attach "+strconv.FormatInt(f.id, 10), "raid is restarting; job %d goes on", f.id)
	case f.owner && (errors.Is(cause, door.ErrLeft) || errors.Is(cause, errKeys)):
		detached, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer stop()
		if _, err := f.cancel(detached, f.id); err != nil && !errors.Is(err, queue.ErrNoJob) {
			f.s.Log.Error("cancel", "job", f.id, "err", err)
		}
		return failf(job.ExitCancelled, "", "job %d is cancelled", f.id)
	}
	return cause
}
