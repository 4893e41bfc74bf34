package runner

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

var boxNumber atomic.Int64 // names boxes within this process

// A warmBox is a box started before any job needs it. It waits on stdin, costs a few
// megabytes, and is used at most once.
type warmBox struct {
	done   chan struct{} // closed when box and err are set
	dead   chan struct{} // closed when the box has ended, or never was
	cancel context.CancelFunc
	box    box.Box
	err    error
	used   bool
}

// warmUp starts a box in the background. Discard must follow.
func (r *Runner) warmUp(ctx context.Context) *warmBox {
	w := &warmBox{done: make(chan struct{}), dead: make(chan struct{})}
	if !r.Warm {
		close(w.done)
		close(w.dead)
		w.cancel = func() {}
		return w
	}
	ctx, w.cancel = context.WithCancel(ctx)
	go func() { // ends with Start, which ctx bounds, and then with the box; discard waits for it
		defer close(w.dead)
		w.box, w.err = r.startBox(ctx, "", false, r.Limits, len(r.GPUs))
		if w.err != nil && ctx.Err() == nil {
			r.Logf("no warm box: %v", w.err)
		}
		close(w.done)
		if w.err == nil {
			w.box.Wait()
		}
	}()
	return w
}

// alive reports whether there is a box that still waits.
func (w *warmBox) alive() bool {
	<-w.done
	select {
	case <-w.dead:
		return false
	default:
		return !w.used
	}
}

// discard removes a box nobody used. It may be called more than once; a used box must
// have been closed before.
func (w *warmBox) discard() {
	w.cancel()
	<-w.done
	if w.box != nil && !w.used {
		w.used = true
		w.box.Close()
	}
	<-w.dead
}

// boxFor returns the box an offer runs in: the warm one if it fits, else a new one.
func (r *Runner) boxFor(ctx context.Context, o job.Offer, warm *warmBox) (box.Box, error) {
	s := &o.Spec
	if s.Image == "" && !s.Network && s.GPUs == len(r.GPUs) {
		if warm.alive() && warm.box.Limit(withShim(s.Limits)) == nil {
			warm.used = true
			return warm.box, nil
		}
	}
	return r.startBox(ctx, s.Image, s.Network, s.Limits, s.GPUs)
}

// shimThreads is what the shim itself needs of a box's processes: it makes its
// threads in advance, so that a fork bomb cannot keep it from working.
const shimThreads = 32

func withShim(l job.Limits) job.Limits {
	if l.Pids > 0 {
		l.Pids += shimThreads
	}
	return l
}

func (r *Runner) startBox(ctx context.Context, image string, network bool, limits job.Limits, gpus int) (box.Box, error) {
	b, err := r.Engine.Start(ctx, box.Config{
		ID:      fmt.Sprintf("b%d", boxNumber.Add(1)),
		Image:   image,
		Network: network,
		Limits:  withShim(limits),
		GPUs:    r.GPUs[:min(gpus, len(r.GPUs))],
	})
	if err != nil {
		return nil, fmt.Errorf("start a box: %w", err)
	}
	return b, nil
}
