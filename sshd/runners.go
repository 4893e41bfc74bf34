package sshd

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
	"github.com/rai-project/raid/runner/job/tree"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/stream"
)

// runRunner is the runners' side of the table. Every command of an attempt is
// accepted only from the key that holds its lease, with its fence.
func runRunner(ctx context.Context, c *call) (int, error) {
	switch {
	case c.args[0] == "join" && len(c.args) == 1:
		return runJoin(ctx, c)
	case c.args[0] == "source" && len(c.args) == 3:
		return runRunnerSource(ctx, c)
	case c.args[0] == "attempt" && (len(c.args) == 3 || len(c.args) == 4 && c.args[3] == "share"):
		return runAttempt(ctx, c)
	}
	return 0, failf(job.ExitUsage, "usage: runner "+c.cmd.usage, "unknown words after runner")
}

// runJoin is a runner's standing conversation: it beats, raid calls.
func runJoin(ctx context.Context, c *call) (int, error) {
	lines := bufio.NewScanner(c)
	lines.Buffer(nil, 256<<10)
	var h job.Hello
	if err := nextLine(lines, &h); err != nil {
		return 0, err
	}
	if h.Protocol != job.Protocol {
		return 0, failf(job.ExitRefused, "install the same version on both machines",
			"runner speaks protocol %d, raid speaks %d", h.Protocol, job.Protocol)
	}
	link, err := c.s.brain.Join(ctx, queue.Runner{ID: c.Who.Fingerprint, Folder: h.Folder, Name: clean(h.Name), Pools: h.Pools,
		Engine: h.Engine, Arch: h.Arch, GPUs: h.GPUs, GPUArch: h.GPUArch, GPUMemoryMB: h.GPUMemoryMB,
		Images: h.Images, Builds: h.Builds, Express: h.Express, Weakness: h.Weakness}, h.Held)
	if errors.Is(err, queue.ErrTaken) {
		c.s.Log.Warn("two runners have the same key", "runner", h.Name, "from", c.From, "err", err)
		return 0, failf(job.ExitTryLater, "give each runner a key of its own: rai-keygen runner NAME", "%s", err)
	}
	if err != nil {
		return 0, err
	}
	defer link.Leave(context.WithoutCancel(ctx))
	c.s.Log.Info("runner joined", "runner", h.Name, "engine", h.Engine, "gpus", h.GPUs, "from", c.From)
	defer c.s.Log.Info("runner left", "runner", h.Name)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answers := make(chan job.Call)
	beat := c.watchful(h.Name, link.Beat)
	go func() { cancel(c.beats(ctx, lines, beat, answers)) }() // ends with stdin, which door closes after us
	out := json.NewEncoder(c)
	for {
		var call job.Call
		var ok bool
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case call, ok = <-link.Calls():
			if !ok {
				return 0, failf(job.ExitTryLater, "", "another connection of this runner took over")
			}
		case call = <-answers:
		}
		if call.Offer != nil { // a copy: the queue's own stays sealed
			o := *call.Offer
			if call.Offer = &o; c.s.unseal(&o) != nil {
				c.s.Log.Error("the credentials of a push cannot be decrypted", "job", o.Job)
			}
		}
		if err := out.Encode(call); err != nil {
			return 0, err
		}
	}
}

// watchful passes beats on and has the log tell when a runner falls ill or is well again.
func (c *call) watchful(name string, beat func(context.Context, job.Beat) error) func(context.Context, job.Beat) error {
	sick := ""
	return func(ctx context.Context, b job.Beat) error {
		if err := beat(ctx, b); err != nil {
			return err
		}
		switch {
		case b.Sick != "" && b.Sick != sick:
			c.s.Log.Warn("runner is sick and takes no job", "runner", name, "why", clean(b.Sick))
		case b.Sick == "" && sick != "":
			c.s.Log.Info("runner is well again", "runner", name)
		}
		sick = b.Sick
		return nil
	}
}

// beats passes heartbeats on and answers each one that counted.
func (c *call) beats(ctx context.Context, lines *bufio.Scanner, beat func(context.Context, job.Beat) error, answers chan<- job.Call) error {
	for {
		var b job.Beat
		if err := nextLine(lines, &b); err != nil {
			return err
		}
		if err := beat(ctx, b); err != nil {
			return err
		}
		select {
		case answers <- job.Call{Beat: true}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func nextLine(lines *bufio.Scanner, v any) error {
	if !lines.Scan() {
		if err := lines.Err(); err != nil {
			return err
		}
		return io.EOF
	}
	if err := json.Unmarshal(lines.Bytes(), v); err != nil {
		return failf(job.ExitInput, "", "not a line of the runner protocol: %s", err)
	}
	return nil
}

// lease returns the job whose lease the caller shows.
func (c *call) lease() (job.Lease, job.Record, error) {
	id, err1 := strconv.ParseInt(c.args[1], 10, 64)
	fence, err2 := strconv.ParseUint(c.args[2], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return job.Lease{}, job.Record{}, failf(job.ExitUsage, "", "a lease is two numbers")
	}
	l := job.Lease{Job: id, Fence: fence}
	rec, ok := c.s.brain.Holds(c.Who.Fingerprint, l)
	if !ok {
		return l, rec, errStale
	}
	return l, rec, nil
}

// errStale ends a session of a runner that has lost its lease.
var errStale error = &failure{code: job.ExitRefused, text: "stale fence"}

// runRunnerSource sends the checked tar of a leased job.
func runRunnerSource(ctx context.Context, c *call) (int, error) {
	_, rec, err := c.lease()
	if err != nil {
		return 0, err
	}
	f, err := c.s.blobs.Open(ctx, blob.Key(rec.Source))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	return 0, tree.Normalise(c, f, size, tree.Limits{}) // it was checked when it came
}

// A reception takes one attempt's frames.
type reception struct {
	*call
	lease    job.Lease
	rec      job.Record
	in       *intake
	log      *spool.Log
	shared   bool // the log's files are the runner's
	archive  *os.File
	archived int64
	heard    time.Time // when the queue was last told that the runner is there
}

// An intake is what all sessions of one attempt share. A runner opens a new one while
// bytes of the old one are still on their way, and only the newest may add to what is
// here, or output would come twice.
type intake struct {
	users  int        // guarded by Server.intaking
	mu     sync.Mutex // held while something is taken in; guards newest
	newest *reception
}

// errOvertaken ends the older of two sessions of an attempt.
var errOvertaken error = &failure{code: job.ExitTryLater, text: "a newer session of this attempt took over"}

// intake returns the intake of an attempt; done must be called.
func (s *Server) intake(l job.Lease) (in *intake, done func()) {
	s.intaking.Lock()
	defer s.intaking.Unlock()
	if s.intakes == nil {
		s.intakes = map[job.Lease]*intake{}
	}
	if in = s.intakes[l]; in == nil {
		in = &intake{}
		s.intakes[l] = in
	}
	in.users++
	return in, func() {
		s.intaking.Lock()
		defer s.intaking.Unlock()
		if in.users--; in.users == 0 {
			delete(s.intakes, l)
		}
	}
}

// newest calls fn while no other session of the attempt can take anything in.
func (r *reception) newest(fn func() error) error {
	r.in.mu.Lock()
	defer r.in.mu.Unlock()
	if r.in.newest != r {
		return errOvertaken
	}
	return fn()
}

// runAttempt receives everything that comes back of one attempt.
func runAttempt(ctx context.Context, c *call) (int, error) {
	l, rec, err := c.lease()
	if err != nil {
		io.WriteString(c, "stale\n")
		return 0, err
	}
	in, done := c.s.intake(l)
	defer done()
	r := &reception{call: c, lease: l, rec: rec, in: in}
	if err = r.hear(ctx); err == nil {
		err = r.take(ctx)
	}
	switch {
	case errors.Is(err, errOvertaken):
		return 0, err
	case r.superseded(err):
		io.WriteString(c, "stale\n")
		os.Remove(c.s.incoming(l))
		return 0, errStale
	case err != nil:
		r.forget(err)
		return 0, err
	}
	_, err = io.WriteString(c, "done\n")
	return 0, err
}

// forget drops a log whose folder somebody removed, or nothing could be added to it
// ever again. The runner has it all and will send it once more.
func (r *reception) forget(err error) {
	dir := filepath.Join(r.s.Dir, "spool", strconv.FormatInt(r.rec.ID, 10), strconv.Itoa(r.rec.Attempt))
	if _, gone := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || !errors.Is(gone, fs.ErrNotExist) {
		return
	}
	r.s.Log.Error("output has vanished and is received again", "job", r.rec.ID, "folder", dir)
	if err := r.s.spools.Remove(r.rec.ID); err != nil {
		r.s.Log.Error("forget the output", "job", r.rec.ID, "err", err)
	}
}

// superseded reports whether err means that another attempt owns the job.
func (r *reception) superseded(err error) bool {
	if errors.Is(err, errStale) || errors.Is(err, queue.ErrStale) || errors.Is(err, stream.ErrOver) {
		return true
	}
	_, ok := r.s.brain.Holds(r.Who.Fingerprint, r.lease)
	return err != nil && !ok
}

// open finds what is already here of the attempt. Whatever fails, close must follow.
func (r *reception) open() (err error) {
	if r.log, err = r.s.spools.Attempt(r.rec.ID, r.rec.Attempt, r.rec.Spec.Limits.Log()); err != nil {
		return err
	}
	if len(r.args) == 4 && !r.log.Sealed() {
		r.share()
	}
	if err := os.MkdirAll(filepath.Join(r.s.Dir, "incoming"), 0o700); err != nil {
		return err
	}
	r.archive, err = os.OpenFile(r.s.incoming(r.lease), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	return err
}

// share shows the files of a runner that works in our own state folder, instead of
// having them sent. Where they are follows from its key and its lease.
func (r *reception) share() {
	dir, ok := r.s.locals.Load(r.Who.Fingerprint)
	if !ok {
		return
	}
	if err := r.log.Share(job.LogDir(dir.(string), r.lease)); err != nil {
		r.s.Log.Info("a local runner's output has to be sent", "job", r.lease.Job, "err", err)
		return
	}
	r.shared = true
}

// take says what is here, receives the rest and commits the result.
func (r *reception) take(ctx context.Context) error {
	r.in.mu.Lock()
	r.in.newest = r
	r.in.mu.Unlock()
	defer func() { r.archive.Close() }() // a nil one says so, and nobody listens
	var have int64
	err := r.newest(func() (err error) {
		have, err = r.have()
		return err
	})
	if err != nil {
		return err
	}
	word := "have"
	if r.shared {
		word = "share"
	}
	if _, err := fmt.Fprintf(r, "%s %d\n", word, have); err != nil {
		return err
	}
	res, err := r.frames(ctx)
	if err != nil {
		return err
	}
	return r.newest(func() error { return r.finish(ctx, res) })
}

// have opens what is here and returns how much that is: first the log counts, then
// the archive.
func (r *reception) have() (int64, error) {
	if err := r.open(); err != nil {
		return 0, err
	}
	if !r.log.Sealed() { // a power cut may have cost the log more than the archive
		if err := r.archive.Truncate(0); err != nil {
			return 0, err
		}
	}
	var err error
	r.archived, err = r.archive.Seek(0, io.SeekEnd)
	return r.log.Size() + r.archived, err
}

// hearEvery is how often output counts as a word from the runner.
const hearEvery = 5 * time.Second

// hear tells the queue that the runner is there, for one whose heartbeats are lost is
// not lost itself while its output comes. The error is that of a lease that is over.
func (r *reception) hear(ctx context.Context) error {
	rec, ok := r.s.brain.Holds(r.Who.Fingerprint, r.lease)
	if !ok {
		return errStale
	}
	if rec.State != job.Queued && time.Since(r.heard) < hearEvery {
		return nil
	}
	r.heard = time.Now()
	_, err := r.s.brain.Do(ctx, queue.Claim{Runner: r.Who.Fingerprint, Lease: r.lease})
	if rec.State != job.Queued && errors.Is(err, brain.ErrUnavailable) {
		return nil
	}
	return err
}

// ackEvery is how many bytes are taken between two acknowledgements.
const ackEvery = 1 << 20

// frames takes frames until the result.
func (r *reception) frames(ctx context.Context) (res job.Result, err error) {
	in := job.NewSplitter(r)
	var acked, got int64
	for {
		run, err := in.Next()
		if err != nil {
			return res, err
		}
		if err := r.hear(ctx); err != nil {
			return res, err
		}
		if run.Kind == job.Final {
			return res, json.Unmarshal(run.Payload, &res)
		}
		err = r.newest(func() error {
			if run.Log != nil {
				return r.log.Append(run.Log)
			}
			return r.beside(run)
		})
		if err != nil {
			return res, err
		}
		got += int64(len(run.Log) + len(run.Payload))
		if got-acked >= ackEvery {
			acked = got
			if _, err := fmt.Fprintf(r, "ack %d\n", r.log.Size()); err != nil {
				return res, err
			}
		}
	}
}

// beside takes what travels beside the log.
func (r *reception) beside(run job.Run) error {
	switch run.Kind {
	case job.Begun:
		_, err := r.s.brain.Do(context.Background(), queue.Begin{Runner: r.Who.Fingerprint, Lease: r.lease})
		return err
	case job.Grown:
		if !r.shared || len(run.Payload) != 8 {
			break
		}
		return r.log.Grow(int64(binary.BigEndian.Uint64(run.Payload)))
	case job.Sealed:
		return r.log.Seal()
	case job.File:
		r.archived += int64(len(run.Payload))
		if max := r.rec.Spec.Limits.Tar(); !r.log.Sealed() || max > 0 && r.archived > max {
			return fmt.Errorf("%w: /build before the end of the log, or without end", job.ErrFrame)
		}
		_, err := r.archive.Write(run.Payload)
		return err
	}
	return fmt.Errorf("%w: kind %q from a runner", job.ErrFrame, byte(run.Kind))
}

// finish makes output and archive durable, then commits the result. Where blobs are
// shared and their store is down, that fails: the runner keeps everything and comes again
// until it works. To commit without them and bring them later would have the runner
// forget what then only this machine has, and no job that waits could get its source
// anyway.
func (r *reception) finish(ctx context.Context, res job.Result) error {
	if err := r.log.Seal(); err != nil {
		return err
	}
	if why := nonsense(&res); why != "" {
		r.s.Log.Error("a runner's result makes no sense", "job", r.rec.ID, "runner", r.rec.Runner, "why", why)
		res = job.Result{Reason: job.ReasonInfra, Exit: job.ExitInfra, Note: "the runner sent a result that makes no sense"}
	}
	defer r.s.janitor.Arrive()()
	end := queue.Finish{Runner: r.Who.Fingerprint, Lease: r.lease}
	if err := r.keepAll(ctx, &res, &end); err != nil {
		return err
	}
	end.Result = res
	r.s.janitor.Check()
	_, err := r.s.brain.Do(context.WithoutCancel(ctx), end)
	return err // [Server.changed] ends the output
}

// keepAll keeps /build and, where it is to be, the output, at once: each may have to go a
// long way.
func (r *reception) keepAll(ctx context.Context, res *job.Result, end *queue.Finish) error {
	var logErr error
	var wg sync.WaitGroup
	if res.Reason != job.ReasonInfra { // else there will be more of it
		wg.Go(func() { end.Log, end.LogBytes, logErr = r.s.packLog(ctx, r.rec.ID) })
	}
	key, err := r.keep(ctx, res)
	wg.Wait()
	end.Archive = string(key)
	return cmp.Or(err, logErr) // one is as good a reason as both
}

// nonsense says what is wrong with a result, "" for nothing. It is shown to people and
// made an exit status.
func nonsense(res *job.Result) string {
	switch res.Reason {
	case job.ReasonExit, job.ReasonSignal, job.ReasonTimeout, job.ReasonOOM, job.ReasonOutputLimit,
		job.ReasonDiskLimit, job.ReasonKilled, job.ReasonCancelled, job.ReasonInfra:
	default:
		return "its reason is " + quote(string(res.Reason))
	}
	switch {
	case res.Exit < 0 || res.Exit > 255 || res.Exit == 0 && res.Reason != job.ReasonExit:
		return fmt.Sprintf("its exit status is %d", res.Exit)
	case len(res.Note)+len(res.Signal) > 64<<10:
		return fmt.Sprintf("its note has %d bytes", len(res.Note)+len(res.Signal))
	}
	return ""
}

// keep checks /build as if a student had sent it, because one did, and stores it.
func (r *reception) keep(ctx context.Context, res *job.Result) (key blob.Key, err error) {
	path := r.s.incoming(r.lease)
	defer func() {
		if err == nil { // else it is here when the runner comes again
			os.Remove(path) // gone already when it was adopted
		}
	}()
	if fi, err := r.archive.Stat(); err != nil || fi.Size() == 0 || res.Reason == job.ReasonInfra {
		return "", err
	}
	if _, err := r.archive.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	_, err = tree.Check(r.archive, "", tree.Limits{})
	var no *tree.RefusedError
	if errors.As(err, &no) {
		res.Note = "/build did not come back: " + no.Error()
		return "", nil
	}
	if err != nil {
		return "", err
	}
	key, _, err = r.s.blobs.Adopt(ctx, path, 0)
	return key, err
}
