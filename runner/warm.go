package runner

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

var boxNumber atomic.Int64 // names boxes within this process

// A kind is what must be known of a job before a box can be made for it.
type kind struct {
	pool  string // the first of those that are alike
	image string // its full name; "" in an engine without images
	role  string // of the owner, where it takes that to use the image
}

// kindOf returns the kind of a job's box. ok is false for one that is made to order.
func (r *Runner) kindOf(o *job.Offer) (k kind, ok bool) {
	s, rules := &o.Spec, r.Rules[o.Pool]
	k.pool = r.alike(o.Pool)
	if s.Network || s.GPUs != len(r.GPUs) {
		return k, false
	}
	if rules == nil {
		return k, s.Image == ""
	}
	k.image = rules.Images.Of(s.Image)
	if !rules.Images.Take(s.Image, "") {
		k.role = s.Role
	}
	return k, rules.Images.Take(s.Image, s.Role)
}

// alike returns the first pool whose boxes are no different from this one's.
func (r *Runner) alike(pool string) string {
	for _, p := range r.Pools {
		if r.Rules[p] == r.Rules[pool] && r.Data[p] == r.Data[pool] {
			return p
		}
	}
	return pool
}

// A shelf holds boxes that were started before any job needs them: of the default image
// first, then of the images used most in the last jobs, one of each. Each is used at most
// once. One that dies, whose image moves, or that has waited for hours is replaced.
//
// Only slot's goroutine uses it. Boxes are started while no job runs, which they could
// slow down.
type shelf struct {
	r     *Runner
	boxes []*warmBox
	used  []kind        // by the last jobs, the newest last
	bad   int           // boxes in a row that could not be made, or died
	wake  chan struct{} // there is something to tend
	wg    sync.WaitGroup
}

const (
	lastJobs     = 64               // that say which images are used most
	warmAge      = 4 * time.Hour    // a box that has waited so long is replaced
	warmRetry    = 30 * time.Second // after a box that died young, or could not be made; more if that goes on
	warmPatience = 3 * time.Second  // a job waits so long for a box that is being started
)

func newShelf(r *Runner) *shelf { return &shelf{r: r, wake: make(chan struct{}, 1)} }

// A warmBox waits on stdin. Its own goroutine starts it and, unless it is used, closes it.
type warmBox struct {
	kind    kind
	cancel  context.CancelFunc
	started chan struct{} // closed when box, config and err are set
	ended   chan struct{} // closed when there is no live box
	over    chan struct{} // closed when it is to be replaced
	config  box.Config
	box     box.Box
	err     error
	used    bool // set before cancel
}

// wanted are the kinds that boxes should wait for, as many as there may be.
func (s *shelf) wanted() (kinds []kind) {
	first := job.Offer{Pool: s.r.Pools[0], Spec: job.Spec{GPUs: len(s.r.GPUs)}}
	if k, ok := s.r.kindOf(&first); ok {
		kinds = append(kinds, k)
	}
	rest, times := len(kinds), map[kind]int{}
	for _, k := range slices.Backward(s.used) {
		if times[k]++; !slices.Contains(kinds, k) {
			kinds = append(kinds, k)
		}
	}
	slices.SortStableFunc(kinds[rest:], func(a, b kind) int { return cmp.Compare(times[b], times[a]) })
	return kinds[:min(len(kinds), s.r.Warm)]
}

// tend removes what is of no use and starts what is missing. It does not wait.
func (s *shelf) tend(ctx context.Context) {
	want := s.wanted()
	s.boxes = slices.DeleteFunc(s.boxes, func(b *warmBox) bool {
		i := slices.Index(want, b.kind)
		if i < 0 || closed(b.ended) || closed(b.over) {
			if b.cancel(); closed(b.ended) {
				s.bad++
			}
			return true
		}
		want = slices.Delete(want, i, i+1)
		return false
	})
	for _, k := range want {
		s.boxes = append(s.boxes, s.start(ctx, k))
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

func (s *shelf) start(ctx context.Context, k kind) *warmBox {
	b := &warmBox{kind: k, started: make(chan struct{}), ended: make(chan struct{}), over: make(chan struct{})}
	ctx, b.cancel = context.WithCancel(ctx)
	wait := warmRetry << min(s.bad, 5)
	s.wg.Go(func() { b.live(ctx, s, wait) }) // ends with cancel
	return b
}

// live is a box's time on the shelf. One that does not live for retry counts for that long.
func (b *warmBox) live(ctx context.Context, s *shelf, retry time.Duration) {
	r, began := s.r, time.Now()
	b.config = box.Config{Rules: r.Rules[b.kind.pool], Image: b.kind.image, Role: b.kind.role, Limits: r.Limits, GPUs: r.GPUs, Mounts: r.dataOf(b.kind.pool)}
	b.box, b.err = r.startBox(ctx, b.config)
	close(b.started)
	if b.err != nil {
		close(b.ended)
	} else {
		s.wg.Go(func() { b.box.Wait(); close(b.ended) }) // ends with the box
		b.watch(ctx, r)
	}
	if ctx.Err() == nil && closed(b.ended) {
		r.Logf("no warm box: %v", cmp.Or(b.err, errDied))
		rest(ctx, retry-time.Since(began))
	}
	close(b.over)
	if ctx.Err() == nil {
		select {
		case s.wake <- struct{}{}:
		default: // it is awake
		}
	}
	<-ctx.Done()
	if b.err == nil && !b.used {
		if err := b.box.Close(); err != nil {
			r.Logf("remove a warm box: %v", err)
		}
	}
}

// rest waits for d, or until ctx ends.
func rest(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// watch returns when a box is of no use any more, or at the end of ctx.
func (b *warmBox) watch(ctx context.Context, r *Runner) {
	age := time.NewTimer(warmAge)
	defer age.Stop()
	tick := time.NewTicker(cmp.Or(r.Fresh, time.Minute))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.ended:
			return
		case <-age.C:
			return
		case <-tick.C:
			if b.moved(ctx, r) {
				return
			}
		}
	}
}

// moved reports whether a box that is started now would run in another image.
func (b *warmBox) moved(ctx context.Context, r *Runner) bool {
	engine, ok := r.Engine.(box.Puller)
	here, ok2 := b.box.(box.Imaged)
	if !ok || !ok2 {
		return false
	}
	now, err := engine.Digest(ctx, b.config)
	return err == nil && now != here.Image().Digest
}

// take returns a box that waits for a job of this kind, nil if there is none. The caller
// closes it.
func (s *shelf) take(ctx context.Context, o *job.Offer, mounts []box.Mount) box.Box {
	k, ok := s.r.kindOf(o)
	if !ok {
		return nil
	}
	s.used = append(s.used[max(0, len(s.used)-lastJobs+1):], k)
	i := slices.IndexFunc(s.boxes, func(b *warmBox) bool { return b.kind == k })
	if i < 0 {
		return nil
	}
	b := s.boxes[i]
	select {
	case <-b.started:
	case <-ctx.Done():
		return nil
	case <-time.After(warmPatience): // it may be pulling an image, of which a new box would tell
		return nil
	}
	if closed(b.ended) || !slices.Equal(mounts, b.config.Mounts) || b.box.Limit(withShim(o.Spec.Limits)) != nil {
		return nil
	}
	s.boxes = slices.Delete(s.boxes, i, i+1)
	s.bad, b.used = 0, true
	b.cancel()
	return b.box
}

// close removes the boxes and waits for the end of all that were used, too.
func (s *shelf) close() {
	for _, b := range s.boxes {
		b.cancel()
	}
	s.wg.Wait()
}

// boxFor returns the box an attempt runs in: one that waits for it, else a new one.
func (r *Runner) boxFor(ctx context.Context, a *attempt, mounts []box.Mount, warm *shelf) (box.Box, error) {
	if b := warm.take(ctx, &a.offer, mounts); b != nil {
		return b, nil
	}
	s := &a.offer.Spec
	return r.startBox(ctx, box.Config{Rules: r.Rules[a.offer.Pool], Image: s.Image, Role: s.Role, Network: s.Network, Limits: s.Limits,
		Mounts: mounts, GPUs: r.GPUs[:min(s.GPUs, len(r.GPUs))], Say: func(line string) { a.say(line) }})
}

// Where boxes see the data of their pool and the folder of their team.
const (
	dataInBox  = "/data"
	cacheInBox = "/cache"
)

func (r *Runner) dataOf(pool string) []box.Mount {
	if dir := r.Data[pool]; dir != "" {
		return []box.Mount{{Host: dir, Box: dataInBox}}
	}
	return nil
}

// mountsFor returns what an offer's box is to be shown of the machine. done must be
// called when the box has gone. A cache that cannot be had costs the cache, not the job.
func (r *Runner) mountsFor(ctx context.Context, a *attempt) (mounts []box.Mount, done func()) {
	o := &a.offer
	mounts = r.dataOf(o.Pool)
	if !o.Spec.Cache || r.Cache == nil {
		return mounts, func() {}
	}
	f, err := r.Cache.Folder(ctx, o.Pool, cmp.Or(o.Team, "~"+o.User))
	if err != nil {
		r.Logf("job %d: its cache: %v", o.Job, err)
		a.say("the cache of your team cannot be had, so there is no " + cacheInBox)
	}
	if f == nil {
		return mounts, func() {}
	}
	return append(mounts, box.Mount{Host: f.Path, Box: cacheInBox, Write: true}), func() {
		if err := f.Close(); err != nil {
			r.Logf("job %d: its cache: %v", o.Job, err)
		}
	}
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

func (r *Runner) startBox(ctx context.Context, c box.Config) (box.Box, error) {
	c.ID = fmt.Sprintf("b%d", boxNumber.Add(1))
	c.Limits = withShim(c.Limits)
	b, err := r.Engine.Start(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start a box: %w", err)
	}
	return b, nil
}
