package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

// This file is what comes before the first step and after the last one of a job that
// builds its own image: the build, on the job's clock, and the push.

// build makes the image that the steps run in. A result is the job's: the build failed,
// was ended, or was all there was to do.
func (x *execution) build(ctx context.Context, r *Runner) (*job.Result, error) {
	builder, ok := r.Engine.(box.Builder)
	if !ok || r.Builds == nil {
		return nil, &box.RefusedError{Why: "this runner builds no images"}
	}
	source, err := x.fetchSource(ctx, r)
	if err != nil {
		return nil, err
	}
	defer func() { source.Close(); os.Remove(source.Name()) }()
	x.say("building the image from " + x.offer.Spec.Build.Dockerfile)
	err = x.bounded(ctx, func(ctx context.Context, begin func()) (err error) {
		spec := &x.offer.Spec
		x.built, err = builder.Build(ctx, box.Build{ID: fmt.Sprintf("i%d", boxNumber.Add(1)), Source: source,
			Rules: r.Rules[x.offer.Pool], Role: spec.Role,
			Dockerfile: spec.Build.Dockerfile, Network: spec.Network, Limits: withShim(spec.Limits),
			Say: func(line string) { x.say(line) }, Out: buildOutput{x}, Begin: begin})
		return err
	})
	if err != nil {
		return x.fault(err)
	}
	x.say("built the image in " + time.Since(x.began).Round(100*time.Millisecond).String())
	if len(x.offer.Spec.Steps) == 0 {
		return &job.Result{Reason: job.ReasonExit}, nil
	}
	x.offer.Spec.Limits.Time = max(time.Second, x.left()) // the shim keeps it, too
	return nil, nil
}

// boxIn returns a box in the image that was built for the job.
func (r *Runner) boxIn(ctx context.Context, x *execution) (box.Box, error) {
	s := &x.offer.Spec
	return r.startBox(ctx, box.Config{Rules: r.Rules[x.offer.Pool], Built: x.built, Network: s.Network, Limits: s.Limits, Mounts: x.mounts,
		GPUs: r.GPUs[:min(s.GPUs, len(r.GPUs))], Say: func(line string) { x.say(line) }})
}

// fault is the result of a build or a push that did not come off, or the error if it
// was nobody's fault here.
func (x *execution) fault(err error) (*job.Result, error) {
	var bad *box.BuildError
	switch {
	case x.why != "":
		return &job.Result{Reason: x.why, Exit: x.why.Exit()}, nil
	case errors.As(err, &bad):
		return &job.Result{Reason: bad.Reason, Exit: bad.Exit, Note: clip(bad.Why, maxNote)}, nil
	}
	return nil, err
}

// left is how much of the job's time there is.
func (x *execution) left() time.Duration { return x.limit - time.Since(x.began) }

// errEnded is why something ends that the job's owner or its limits have ended.
var errEnded = errors.New("ended")

// bounded runs fn until it is done, the time is over or somebody ends the job; x.why
// says so. The clock starts with begin, once.
func (x *execution) bounded(ctx context.Context, fn func(ctx context.Context, begin func()) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done, begun := make(chan error, 1), make(chan struct{})
	go func() { done <- fn(ctx, sync.OnceFunc(func() { close(begun) })) }() // waited for below
	var limit <-chan time.Time
	for {
		select {
		case err := <-done:
			return err
		case <-begun:
			if begun = nil; x.began.IsZero() {
				x.began = time.Now()
			}
			limit = time.After(x.left())
			continue
		case <-limit:
			x.why = job.ReasonTimeout
		case x.why = <-x.ends:
		}
		cancel(errEnded)
		return errors.Join(errEnded, <-done)
	}
}

// fetchSource keeps the source in a file, for the engine has to be shown it as a whole.
func (x *execution) fetchSource(ctx context.Context, r *Runner) (_ *os.File, err error) {
	f, err := os.OpenFile(filepath.Join(x.dir, "source.tar"), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := r.sendSource(ctx, x.offer.Lease, bare{f}); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// bare takes frames and writes what is in them. Each Write is one frame.
type bare struct{ w io.Writer }

func (b bare) Write(frame []byte) (int, error) {
	n, err := b.w.Write(frame[job.HeaderLen:])
	return n + job.HeaderLen, err
}

// buildOutput takes what a build prints as the job's stderr: stdout is the steps' own.
type buildOutput struct{ x *execution }

func (o buildOutput) Write(p []byte) (int, error) {
	for piece := range slices.Chunk(p, wireRoom) {
		if err := o.x.output(job.Run{Log: job.AppendFrame(nil, job.Err, piece), Printed: int64(len(piece))}); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// push pushes the image of a job whose steps have succeeded, and returns what becomes of
// the result.
func (x *execution) push(ctx context.Context, r *Runner, res job.Result) (job.Result, error) {
	if x.built == nil || x.offer.Spec.Build.Push == nil || res.Reason != job.ReasonExit || res.Exit != 0 {
		return res, nil
	}
	p := x.offer.Spec.Build.Push
	x.say("pushing the image to " + p.Ref())
	err := x.bounded(ctx, func(ctx context.Context, begin func()) error {
		begin()
		if err := r.mayPush(ctx, p.Registry); err != nil {
			return err
		}
		digest, err := x.built.Push(ctx, p.Ref(), x.offer.Push)
		if err == nil {
			x.say("pushed " + p.Ref() + "@" + digest)
		}
		return err
	})
	if err == nil {
		return res, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return res, cause
	}
	bad, err := x.fault(err)
	if err != nil { // the steps have run: it is not tried again
		x.logf("job %d: push: %v", x.offer.Job, err)
		bad = &job.Result{Reason: job.ReasonExit, Exit: 1, Note: "the image was not pushed to " + p.Ref() + ": the registry could not be reached"}
	}
	res.Reason, res.Exit, res.Note = bad.Reason, bad.Exit, bad.Note
	return res, nil
}

// mayPush checks a registry by this runner's own rules, and that its name does not lead
// to the machine itself or to what only the machine may ask.
func (r *Runner) mayPush(ctx context.Context, registry string) error {
	no := &box.BuildError{Reason: job.ReasonExit, Exit: job.ExitRefused, Why: job.NoPush(registry)}
	if !r.Builds.Push(registry) {
		return no
	}
	if slices.Contains(r.Builds.Registries, registry) {
		return nil // staff know where that is
	}
	host := registry
	if h, _, err := net.SplitHostPort(registry); err == nil {
		host = h
	}
	ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if err != nil {
		return fmt.Errorf("look up the registry: %w", err)
	}
	for _, ip := range ips {
		if ip.IP.IsLoopback() || ip.IP.IsLinkLocalUnicast() || ip.IP.IsUnspecified() || ip.IP.IsMulticast() {
			return no
		}
	}
	return nil
}
