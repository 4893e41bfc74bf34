package sshd

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
	"github.com/rai-project/raid/runner/job/tree"
	"github.com/rai-project/raid/sshd/blob"
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
	link, err := c.s.brain.Join(ctx, queue.Runner{ID: c.Who.Fingerprint, Name: clean(h.Name), Pools: h.Pools,
		Engine: h.Engine, Arch: h.Arch, GPUs: h.GPUs, GPUMemoryMB: h.GPUMemoryMB,
		Express: h.Express, Weakness: h.Weakness}, h.Held)
	if err != nil {
		return 0, err
	}
	defer link.Leave(context.WithoutCancel(ctx))
	c.s.Log.Info("runner joined", "runner", h.Name, "engine", h.Engine, "gpus", h.GPUs, "from", c.From)
	defer c.s.Log.Info("runner left", "runner", h.Name)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answers := make(chan job.Call)
	read := make(chan struct{})
	go func() { // ends with the session's stdin, which door closes with the channel
		defer close(read)
		cancel(c.beats(ctx, lines, link.Beat, answers))
	}()
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
		if err := out.Encode(call); err != nil {
			return 0, err
		}
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
func runRunnerSource(_ context.Context, c *call) (int, error) {
	_, rec, err := c.lease()
	if err != nil {
		return 0, err
	}
	f, err := c.s.blobs.Open(blob.Key(rec.Source))
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
	lease   job.Lease
	log     *spool.Log
	shared  bool // the log's files are the runner's
	archive *os.File
}

// runAttempt receives everything that comes back of one attempt.
func runAttempt(ctx context.Context, c *call) (int, error) {
	l, rec, err := c.lease()
	if err != nil {
		io.WriteString(c, "stale\n")
		return 0, err
	}
	r := &reception{call: c, lease: l}
	err = r.open(&rec)
	if err == nil {
		defer r.archive.Close()
		err = r.take(ctx)
	}
	if r.superseded(err) {
		io.WriteString(c, "stale\n")
		os.Remove(c.s.incoming(l))
		return 0, errStale
	}
	if err != nil {
		return 0, err
	}
	_, err = io.WriteString(c, "done\n")
	return 0, err
}

// superseded reports whether err means that another attempt owns the job.
func (r *reception) superseded(err error) bool {
	if errors.Is(err, errStale) || errors.Is(err, queue.ErrStale) || errors.Is(err, stream.ErrOver) {
		return true
	}
	_, ok := r.s.brain.Holds(r.Who.Fingerprint, r.lease)
	return err != nil && !ok
}

// open finds what is already here of the attempt.
func (r *reception) open(rec *job.Record) (err error) {
	if r.log, err = r.s.spools.Attempt(rec.ID, rec.Attempt, rec.Spec.Limits.Log()); err != nil {
		return err
	}
	if len(r.args) == 4 && !r.log.Sealed() {
		r.share()
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
	if !r.log.Sealed() { // a power cut may have cost the log more than the archive
		if err := r.archive.Truncate(0); err != nil {
			return err
		}
	}
	had, err := r.archive.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	word := "have"
	if r.shared {
		word = "share"
	}
	if _, err := fmt.Fprintf(r, "%s %d\n", word, r.log.Size()+had); err != nil {
		return err
	}
	res, err := r.frames()
	if err != nil {
		return err
	}
	return r.finish(ctx, res)
}

// ackEvery is how many bytes are taken between two acknowledgements.
const ackEvery = 1 << 20

// frames takes frames until the result.
func (r *reception) frames() (res job.Result, err error) {
	in := job.NewSplitter(r)
	var acked, got int64
	for {
		run, err := in.Next()
		if err != nil {
			return res, err
		}
		if _, ok := r.s.brain.Holds(r.Who.Fingerprint, r.lease); !ok {
			return res, errStale
		}
		switch {
		case run.Log != nil:
			err = r.log.Append(run.Log)
		case run.Kind == job.Final:
			return res, json.Unmarshal(run.Payload, &res)
		default:
			err = r.beside(run)
		}
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
		_, err := r.archive.Write(run.Payload)
		return err
	}
	return fmt.Errorf("%w: kind %q from a runner", job.ErrFrame, byte(run.Kind))
}

// finish makes output and archive durable, then commits the result.
func (r *reception) finish(ctx context.Context, res job.Result) error {
	if err := r.log.Seal(); err != nil {
		return err
	}
	key, err := r.keep(&res)
	if err != nil {
		return err
	}
	reply, err := r.s.brain.Do(context.WithoutCancel(ctx), queue.Finish{
		Runner: r.Who.Fingerprint, Lease: r.lease, Result: res, Archive: string(key)})
	if err != nil {
		return err
	}
	if rec := reply.(*job.Record); rec.State.Final() {
		return r.s.spools.Finish(rec.ID)
	}
	return nil
}

// keep checks /build as if a student had sent it, because one did, and stores it.
func (r *reception) keep(res *job.Result) (blob.Key, error) {
	path := r.s.incoming(r.lease)
	defer os.Remove(path) // gone already when it was adopted
	if fi, err := r.archive.Stat(); err != nil || fi.Size() == 0 || res.Reason == job.ReasonInfra {
		return "", err
	}
	if _, err := r.archive.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	_, err := tree.Check(r.archive, "", tree.Limits{})
	var no *tree.RefusedError
	if errors.As(err, &no) {
		res.Note = "/build did not come back: " + no.Error()
		return "", nil
	}
	if err != nil {
		return "", err
	}
	key, _, err := r.s.blobs.Adopt(path, 0)
	return key, err
}
