package runner

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/gpu"
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
	box     box.Box
	mounts  []box.Mount
	rest    sync.WaitGroup // reads what the box says after its result
	logf    func(string, ...any)
	granted time.Time

	built box.Built // the image it runs in, nil for one that others made
	began time.Time // when its build did, and with it the job's clock
	limit time.Duration

	ready     chan struct{} // closed at the Ready frame
	started   chan struct{} // closed at Begun
	startedAt time.Time     // set before started is closed
	collect   chan struct{} // closed at the first byte of /build, or at the result
	collectAt time.Time

	printed  int64
	missed   int64 // bytes of log that the disk did not take
	archive  *os.File
	archived int64
	lost     error         // why there is no archive, if there was one
	final    *job.Result   // what the shim reported
	why      job.Reason    // what we ended it for; "" if we did not
	told     chan struct{} // closed when the shim was told to end, nil before
}

// execute runs an attempt to its result. It returns when the box is gone.
func (r *Runner) execute(ctx context.Context, a *attempt, warm *shelf) {
	x := &execution{attempt: a, logf: r.Logf, granted: time.Now(), limit: a.offer.Spec.Limits.Time,
		ready: make(chan struct{}), started: make(chan struct{}), collect: make(chan struct{})}
	var unmount func()
	x.mounts, unmount = r.mountsFor(ctx, a)
	defer unmount() // last of all
	defer x.leave() // no result waits for an engine to tidy up
	res, err := x.run(ctx, r, warm)
	var refused *box.RefusedError
	if errors.As(err, &refused) {
		res, err = job.Result{Reason: job.ReasonExit, Exit: job.ExitRefused, Note: refused.Why}, nil
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, errOrphan) {
			r.Logf("job %d: ended without a result: %v", a.offer.Job, cause)
			a.conclude(nil)
			return
		}
		r.Logf("job %d: %v", a.offer.Job, err)
		res = job.Result{Reason: job.ReasonInfra, Exit: job.ExitInfra, Note: infraNote(err)}
	}
	res.Engine, res.Weakness, res.Image = r.Engine.Name(), r.Engine.Weakness(), r.imageOf(a.offer)
	if b, ok := x.box.(box.Imaged); ok {
		res.ImageDigest = b.Image().Digest
	}
	r.describeGPU(&res, a.offer.Spec.GPUs)
	res.OutBytes = x.printed
	if err := a.conclude(&res); err != nil {
		r.Logf("job %d: keep the result: %v", a.offer.Job, err)
	}
}

// infraNote is what users read; the chain of causes stays in the log.
func infraNote(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// imageOf returns the name of the image a job runs in, "" for none.
func (r *Runner) imageOf(o job.Offer) string {
	if o.Spec.Build != nil {
		return o.Spec.Build.Name
	}
	if rules := r.Rules[o.Pool]; rules != nil {
		return rules.Images.Of(o.Spec.Image)
	}
	return o.Spec.Image
}

// describeGPU records what a job had, so that its times can be compared.
func (r *Runner) describeGPU(res *job.Result, n int) {
	gpus := r.GPUs[:min(n, len(r.GPUs))]
	res.GPU, res.GPUUUID, res.GPUMemoryMB = gpu.Models(gpus), gpu.UUIDs(gpus), gpu.LeastMemoryMB(gpus)
	if len(gpus) > 0 {
		res.GPUDriver = gpus[0].Driver
	}
}

// run is the life of a box: start, order, source, drain, verdict. leave must follow.
func (x *execution) run(ctx context.Context, r *Runner, warm *shelf) (res job.Result, err error) {
	if x.offer.Spec.Build == nil {
		x.box, err = r.boxFor(ctx, x.attempt, x.mounts, warm)
	} else {
		over, berr := x.build(ctx, r)
		if berr != nil {
			return res, berr
		}
		if over != nil {
			x.times(over, time.Now())
			return x.push(ctx, r, *over)
		}
		x.box, err = r.boxIn(ctx, x)
	}
	if err != nil {
		return res, err
	}
	err = x.live(ctx, r)
	if cause := context.Cause(ctx); cause != nil && x.final == nil {
		return res, cause
	}
	if err != nil && !x.begun.Load() {
		return res, err
	}
	// A shim that has said its last word is about to exit; no box may hold the slot.
	defer time.AfterFunc(shimGrace, x.box.Kill).Stop()
	exit := x.box.Wait()
	if exit.Lost && x.final == nil && x.why == "" {
		return res, fmt.Errorf("the %s engine went away under the job", r.Engine.Name())
	}
	return x.push(ctx, r, x.verdict(exit))
}

// leave removes the box, and the image that was built for it, if there are any.
func (x *execution) leave() {
	if x.box != nil {
		if err := x.box.Close(); err != nil {
			x.logf("job %d: remove the box: %v", x.offer.Job, err)
		}
		x.rest.Wait()
	}
	if x.built != nil {
		if err := x.built.Close(); err != nil {
			x.logf("job %d: %v", x.offer.Job, err)
		}
	}
}

// live talks with the box until all has been said. The error is that of the source or
// of what the box said.
func (x *execution) live(ctx context.Context, r *Runner) error {
	feeding, unfeed := context.WithCancel(ctx)
	drained, fed := make(chan error, 1), make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { drained <- x.drain() })      // ends with the box's stdout
	wg.Go(func() { fed <- x.feed(feeding, r) }) // ends with the box's stdin
	defer func() {
		defer time.AfterFunc(shimGrace, x.box.Kill).Stop() // a box may close one and keep the other
		unfeed()
		wg.Wait()
		if x.told != nil {
			<-x.told
		}
	}()
	defer context.AfterFunc(ctx, x.box.Kill)()
	return x.watch(ctx, drained, fed)
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
	order, err := json.Marshal(job.BoxOrder{Spec: x.offer.Spec, Env: r.environment(x.offer, x.box, x.mounts), Source: x.offer.Source})
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
				return errors.Join(err, <-drained)
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
	if x.why != "" { // once: a second Stop would cut the grace of the first short
		return armed
	}
	x.why, x.told = why, make(chan struct{})
	go func() { // may block on a full pipe; the end of the box frees it, and live waits
		defer close(x.told)
		job.WriteFrame(x.box.Stdin(), job.Stop, []byte(why))
	}()
	return time.After(termGrace + shimGrace)
}

// drain reads the box's output to its result, and has the rest read: a box that nobody
// reads cannot even be killed in some engines (moby/moby#41827). The end of the output
// is not waited for, because some engines are slow to notice it.
func (x *execution) drain() error {
	err := x.frames()
	if err != nil && !errors.Is(err, io.EOF) {
		x.box.Kill() // what speaks no frames is no shim of ours any more
		io.Copy(io.Discard, x.box.Stdout())
	}
	if err == nil {
		x.rest.Go(func() { io.Copy(io.Discard, x.box.Stdout()) }) // ends with the box
	}
	if x.archive != nil {
		x.archive.Close()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// frames takes what the box says, up to its result, after which a shim says nothing.
func (x *execution) frames() error {
	in := job.NewSplitter(x.box.Stdout())
	for x.final == nil {
		run, err := in.Next()
		switch {
		case err != nil:
			return err
		case run.Log != nil:
			err = x.output(run)
		default:
			err = x.signal(run)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// output keeps what the job said. A disk that cannot take it costs the output, and
// the log says how much, but not the job.
func (x *execution) output(run job.Run) error {
	end, frames := x.log.Size(), run.Log
	if x.missed > 0 {
		gap := binary.BigEndian.AppendUint64(nil, uint64(x.missed))
		frames = append(job.AppendFrame(nil, job.Gap, gap), frames...)
	}
	err := x.log.Append(frames)
	if errors.Is(err, job.ErrFrame) {
		return fmt.Errorf("keep the output: %w", err)
	}
	if err != nil && x.missed == 0 {
		x.logf("job %d: keep the output: %v", x.offer.Job, err)
	}
	x.missed += int64(len(run.Log))
	if x.missed -= x.log.Size() - end; err == nil {
		x.missed = 0
	}
	x.printed += run.Printed
	if max := x.offer.Spec.Limits.Output; max > 0 && x.printed > max*job.OutputEnd {
		x.end(job.ReasonOutputLimit)
	}
	return nil
}

// signal takes the frames that are not output. The box is not trusted with any
// other: a shim never sends them.
func (x *execution) signal(run job.Run) error {
	switch run.Kind {
	case job.Ready:
		return once(x.ready)
	case job.Begun:
		if !x.begun.Swap(true) {
			x.startedAt = time.Now()
		}
		return once(x.started)
	case job.File:
		x.collecting()
		return x.keepArchive(run.Payload)
	case job.Final:
		x.collecting()
		x.look()
		var res job.Result
		if err := json.Unmarshal(run.Payload, &res); err != nil {
			return fmt.Errorf("%w: result: %w", job.ErrFrame, err)
		}
		x.final = &res
		return nil
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
		x.look()
	}
}

// look has the box note how its steps ended, before it ends itself.
func (x *execution) look() {
	if b, ok := x.box.(box.Watched); ok {
		b.Look()
	}
}

// keepArchive keeps a piece of /build. What the disk does not take costs /build, not
// the job.
func (x *execution) keepArchive(p []byte) error {
	x.archived += int64(len(p))
	if max := x.offer.Spec.Limits.Tar(); max > 0 && x.archived > max {
		return fmt.Errorf("%w: a /build without end", job.ErrFrame)
	}
	if x.lost != nil {
		return nil
	}
	if x.archive == nil {
		x.archive, x.lost = os.OpenFile(x.archivePath(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	}
	if x.lost == nil {
		_, x.lost = x.archive.Write(p)
	}
	if x.lost != nil {
		x.logf("job %d: keep /build: %v", x.offer.Job, x.lost)
		os.Remove(x.archivePath())
	}
	return nil
}

// verdict joins what the shim said with what was seen from outside.
func (x *execution) verdict(exit box.Exit) job.Result {
	end := time.Now()
	res := job.Result{Reason: job.ReasonKilled, Exit: job.ExitKilled, Note: "the box died"}
	if x.final != nil {
		res = x.believed(*x.final)
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
	if !res.Begun && x.final == nil && x.why == "" {
		res.Reason, res.Exit = job.ReasonInfra, job.ExitInfra
		res.Note = "the box ended before the first step: " + exit.Detail
	}
	if x.lost != nil {
		res.Note = "/build is lost: the runner could not keep it"
	}
	x.times(&res, end)
	return res
}

// Bounds of what a result may repeat of the job's own words.
const (
	maxNote   = 1 << 10
	maxSignal = 32
	maxLine   = 4 << 10
	maxSteps  = 1000
)

// believed is what may be taken from a result that came out of a box, where the job's
// own code runs, too: only a failure of the job itself, or a success of steps that
// were started. Raid's fault is for us to find.
func (x *execution) believed(res job.Result) job.Result {
	begun := x.begun.Load()
	switch ok := res.Exit >= 0 && res.Exit <= 255; res.Reason {
	case job.ReasonExit:
		ok = ok && begun
		fallthrough
	case job.ReasonSignal, job.ReasonTimeout, job.ReasonOOM, job.ReasonOutputLimit, job.ReasonDiskLimit:
		if !ok || res.Reason != job.ReasonExit && res.Exit == 0 {
			return forged
		}
	case job.ReasonInfra:
		if begun {
			return forged
		}
	default:
		if res.Reason != x.why {
			return forged
		}
	}
	res.Note, res.Signal = clip(res.Note, maxNote), clip(res.Signal, maxSignal)
	res.Steps = res.Steps[:min(len(res.Steps), len(x.offer.Spec.Steps), maxSteps)]
	for n := maxLine; ; n /= 2 { // it has to fit a frame again
		for i := range res.Steps {
			res.Steps[i].Line = clip(res.Steps[i].Line, n)
			res.Steps[i].Signal = clip(res.Steps[i].Signal, maxSignal)
		}
		if b, err := json.Marshal(res); err != nil || len(b) <= job.MaxFrame/2 {
			return res
		}
	}
}

// forged is the verdict on a job whose box reported what no shim does.
var forged = job.Result{Reason: job.ReasonKilled, Exit: job.ExitKilled, Note: "the box sent a result that makes no sense"}

func clip(s string, n int) string { return strings.ToValidUTF8(s[:min(len(s), n)], "") }

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
