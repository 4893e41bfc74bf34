package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

const (
	readyWithin   = time.Minute     // a box that is not ready by then is raid's fault
	termGrace     = 5 * time.Second // SIGTERM to SIGKILL, kept by the shim
	shimGrace     = 5 * time.Second // and this much more before the box itself is killed
	collectWithin = 10 * time.Minute
)

// An execution is one attempt in its box.
type execution struct {
	*attempt
	engine  box.Engine
	box     box.Box
	logf    func(string, ...any)
	granted time.Time

	ready     chan struct{} // closed at the Ready frame
	started   chan struct{} // closed at Begun
	startedAt time.Time     // set before started is closed
	collect   chan struct{} // closed at the first byte of /build, or at the result
	collectAt time.Time

	printed int64
	archive *os.File
	final   *job.Result // what the shim reported
	why     job.Reason  // what we ended it for; "" if we did not
}

// execute runs an attempt to its result. It returns when the box is gone.
func (r *Runner) execute(ctx context.Context, a *attempt, warm *warmBox) {
	x := &execution{attempt: a, engine: r.Engine, logf: r.Logf, granted: time.Now(),
		ready: make(chan struct{}), started: make(chan struct{}), collect: make(chan struct{})}
	if n, ok := r.Engine.(box.Noter); ok {
		if line := n.Note(a.offer.Spec.Image); line != "" {
			a.say(line)
		}
	}
	res, err := x.run(ctx, r, warm)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, errOrphan) {
			r.Logf("job %d: ended without a result: %v", a.offer.Job, cause)
			a.conclude(nil)
			return
		}
		r.Logf("job %d: %v", a.offer.Job, err)
		res = job.Result{Reason: job.ReasonInfra, Exit: job.ExitInfra, Note: infraNote(err)}
	}
	res.Engine, res.Weakness, res.Image = r.Engine.Name(), r.Engine.Weakness(), a.offer.Spec.Image
	r.describeGPU(&res, a.offer.Spec.GPUs)
	res.OutBytes = x.printed
	if err := a.conclude(&res); err != nil {
		r.Logf("job %d: keep the result: %v", a.offer.Job, err)
		a.cancel(errStale)
	}
}

// infraNote is what users read; the chain of causes stays in the log.
func infraNote(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

func (r *Runner) describeGPU(res *job.Result, n int) {
	var models []string
	for _, g := range r.GPUs[:min(n, len(r.GPUs))] {
		models = append(models, g.Model)
		res.GPUDriver = g.Driver
	}
	res.GPU = strings.Join(models, ", ")
}

// run is the life of a box: start, order, source, drain, verdict, removal.
func (x *execution) run(ctx context.Context, r *Runner, warm *warmBox) (res job.Result, err error) {
	if x.box, err = r.boxFor(ctx, x.offer, warm); err != nil {
		return res, err
	}
	defer func() {
		if cerr := x.box.Close(); cerr != nil {
			x.logf("job %d: remove the box: %v", x.offer.Job, cerr)
		}
	}()
	drained := make(chan error, 1)
	go func() { drained <- x.drain(r) }() // ends when the box's stdout does; Kill ends that
	defer func() { x.box.Kill(); <-drained }()
	stop := context.AfterFunc(ctx, x.box.Kill)
	defer stop()
	fed := make(chan error, 1)
	go func() { fed <- x.feed(ctx, r) }() // ends when the box's stdin breaks
	err = x.watch(ctx, drained, fed)
	drained <- nil // watch took the only value; the deferred wait needs one
	if cause := context.Cause(ctx); cause != nil {
		return res, cause
	}
	if err != nil && !x.begun.Load() {
		return res, err
	}
	return x.verdict(x.box.Wait()), nil
}

// feed sends the order and the source.
func (x *execution) feed(ctx context.Context, r *Runner) error {
	select {
	case <-x.ready:
	case <-time.After(readyWithin):
		return fmt.Errorf("the box was not ready after %v", readyWithin)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	order, err := json.Marshal(job.BoxOrder{Spec: x.offer.Spec, Env: r.environment(x.offer), Source: x.offer.Source})
	if err != nil {
		return err
	}
	if err := job.WriteFrame(x.box.Stdin(), job.Order, order); err != nil {
		return fmt.Errorf("send the order: %w", err)
	}
	if !x.offer.Source {
		return nil
	}
	return r.sendSource(ctx, x.offer.Lease, x.box.Stdin())
}

// watch waits for the end of the box's output and keeps the time limits from
// outside, where student code cannot reach the clock.
func (x *execution) watch(ctx context.Context, drained, fed chan error) error {
	var limit, kill <-chan time.Time
	started := x.started
	collect := x.collect
	for {
		select {
		case err := <-drained:
			return err
		case err := <-fed:
			if err != nil {
				x.box.Kill()
				<-drained
				return err
			}
		case <-started:
			started = nil
			limit = time.After(x.offer.Spec.Limits.Time)
		case <-collect:
			collect, limit = nil, nil
			kill = time.After(collectWithin)
		case <-limit:
			kill = x.endSteps(job.ReasonTimeout, kill)
		case why := <-x.ends:
			kill = x.endSteps(why, kill)
		case <-kill:
			x.box.Kill()
		}
	}
}

// endSteps tells the shim to end the steps and arms the timer that ends the box if
// the shim does not.
func (x *execution) endSteps(why job.Reason, armed <-chan time.Time) <-chan time.Time {
	if x.why == "" {
		x.why = why
	}
	go job.WriteFrame(x.box.Stdin(), job.Stop, []byte(why)) // may block on a full pipe; Kill frees it
	if armed != nil {
		return armed
	}
	return time.After(termGrace + shimGrace)
}

// drain reads the box's output to its end. It is always reading: a box that nobody
// reads cannot even be killed in some engines (moby/moby#41827).
func (x *execution) drain(r *Runner) error {
	err := x.frames(r)
	if !errors.Is(err, io.EOF) {
		x.box.Kill() // what speaks no frames is no shim of ours any more
		io.Copy(io.Discard, x.box.Stdout())
	}
	if x.archive != nil {
		err = errors.Join(err, x.archive.Close())
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (x *execution) frames(r *Runner) error {
	in := job.NewSplitter(x.box.Stdout())
	for {
		run, err := in.Next()
		if err != nil {
			return err
		}
		if run.Log != nil {
			err = x.output(run)
		} else {
			err = x.signal(r, run)
		}
		if err != nil {
			return err
		}
	}
}

// output keeps what the job said. A disk that cannot take it costs the output, not
// the drain.
func (x *execution) output(run job.Run) error {
	if err := x.log.Append(run.Log); err != nil {
		return fmt.Errorf("keep the output: %w", err)
	}
	x.printed += run.Printed
	if max := x.offer.Spec.Limits.Output; max > 0 && x.printed > max*job.OutputEnd {
		x.end(job.ReasonOutputLimit)
	}
	return nil
}

// signal takes the frames that are not output. The box is not trusted with any
// other: a shim never sends them.
func (x *execution) signal(r *Runner, run job.Run) error {
	switch run.Kind {
	case job.Ready:
		return once(x.ready)
	case job.Begun:
		x.startedAt = time.Now()
		x.begun.Store(true)
		return once(x.started)
	case job.File:
		x.collecting()
		return x.keepArchive(run.Payload)
	case job.Final:
		x.collecting()
		x.final = new(job.Result)
		return json.Unmarshal(run.Payload, x.final)
	}
	return fmt.Errorf("%w: kind %q from a box", job.ErrFrame, byte(run.Kind))
}

// once closes a channel; a second time is a forged frame.
func once(c chan struct{}) error {
	select {
	case <-c:
		return fmt.Errorf("%w: repeated", job.ErrFrame)
	default:
		close(c)
		return nil
	}
}

func (x *execution) collecting() {
	select {
	case <-x.collect:
	default:
		x.collectAt = time.Now()
		close(x.collect)
	}
}

func (x *execution) keepArchive(p []byte) (err error) {
	if x.archive == nil {
		if x.archive, err = os.OpenFile(x.archivePath(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600); err != nil {
			return err
		}
	}
	_, err = x.archive.Write(p)
	return err
}

// verdict joins what the shim said with what was seen from outside.
func (x *execution) verdict(exit box.Exit) job.Result {
	end := time.Now()
	res := job.Result{Reason: job.ReasonKilled, Exit: job.ExitKilled, Note: "the box died"}
	if x.final != nil {
		res = *x.final
	} else if x.why != "" {
		res = job.Result{Reason: x.why, Exit: x.why.Exit(), Note: "the box had to be killed, so /build is lost"}
	}
	if failed := res.Reason != job.ReasonExit || res.Exit != 0; failed && x.why == "" {
		switch {
		case exit.OOMKills > 0 && res.Reason != job.ReasonTimeout:
			res.Reason, res.Exit = job.ReasonOOM, job.ExitKilled
		case exit.DiskFull && res.Reason != job.ReasonTimeout:
			res.Reason, res.Exit = job.ReasonDiskLimit, job.ExitLimit
		}
	}
	res.Begun = x.begun.Load()
	if !res.Begun && x.final == nil {
		res.Reason, res.Exit = job.ReasonInfra, job.ExitInfra
		res.Note = "the box ended before the first step: " + exit.Detail
	}
	x.times(&res, end)
	return res
}

func (x *execution) times(res *job.Result, end time.Time) {
	if x.startedAt.IsZero() {
		res.PrepareMS = end.Sub(x.granted).Milliseconds()
		return
	}
	if x.collectAt.IsZero() {
		x.collectAt = end
	}
	res.PrepareMS = x.startedAt.Sub(x.granted).Milliseconds()
	res.RunMS = x.collectAt.Sub(x.startedAt).Milliseconds()
	res.CollectMS = end.Sub(x.collectAt).Milliseconds()
}
