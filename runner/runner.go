// Package runner is the process that owns one slot: it takes leases from raid, has
// them run in boxes, and sends back output and result.
//
// It dials raid over SSH and opens three kinds of sessions: one `runner join` for
// heartbeats and offers, one `runner source` a job, and one `runner attempt` a job
// for all that comes back. Everything an attempt says is on the runner's own disk
// first, so a cut connection or a raid that is down for an hour costs nothing: the
// sender goes on where raid's copy ends.
//
// Promises: a job is never killed because raid cannot be reached (until Orphan has
// passed); a result is kept until raid has committed it; after a kill -9 the next
// process of the same folder leaves no box behind and sends what was not sent.
// Non-goals: deciding what runs, and running two jobs at once: one runner, one slot.
package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/cache"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
)

// Config says what a runner is. Every field but the last nine is required.
type Config struct {
	Dir     string // its state folder; the caller holds its lock
	ID      string // of Dir, for as long as that is there
	Name    string // what users see
	Pools   []string
	Arch    string // GOARCH
	Engine  box.Engine
	GPUs    []gpu.Device
	Limits  job.Limits // of a warm box, until an order brings its own
	Dial    func(context.Context) (*dial.Client, error)
	Orphan  time.Duration         // how long a job may run without a word from raid
	Rules   map[string]*box.Rules // by pool, of an engine with images; nil: it has none and takes any name
	Builds  *job.Builds           // where images that it builds may go; nil: it builds none
	Warm    int                   // how many started boxes wait, each for another image
	Fresh   time.Duration         // how often it is looked whether their images have moved; a minute by default
	Local   bool                  // raid is on this machine and may read Dir: offer it the files of the log
	Express bool                  // take short jobs only
	Logf    func(format string, args ...any)
	Data    map[string]string // by pool: a folder of data, shown read-only at /data
	Cache   *cache.Store      // folders that teams keep, shown at /cache; nil for none
	// Check says what is wrong with the GPUs between two jobs, in a few words; nil is
	// fine, and a nil Check asks nobody. While it fails the runner takes no job, says so
	// to raid, and asks again after Recheck, a minute by default, and then ever later.
	Check   func(context.Context) error
	Recheck time.Duration
}

// Why an attempt's context ends.
var (
	errStale   = errors.New("another attempt owns the job")
	errOrphan  = errors.New("raid could not be reached for too long")
	errCut     = errors.New("connection to raid lost")
	errRefused = errors.New("raid does not take this key for a runner's")
	errDied    = errors.New("it ended while it waited")
	errLate    = fmt.Errorf("no answer for %v", beatLate)
)

// A Runner runs one job at a time. Create it with New, start it with Run.
type Runner struct {
	Config
	offers chan job.Offer
	kick   chan struct{} // a beat is due now
	drain  chan struct{} // closed by Drain
	once   sync.Once

	refused error         // why raid does not take this runner; set by link, read after it
	recheck time.Duration // how long GPUs that fall ill now are left alone; slot's own

	mu     sync.Mutex // protects the following
	held   *attempt
	idle   bool
	sick   string        // why it takes no job, "" while it is well
	client *dial.Client  // nil while there is no connection
	up     chan struct{} // closed when client is set
}

// New returns a runner; nothing happens before Run.
func New(c Config) *Runner {
	return &Runner{Config: c, offers: make(chan job.Offer, 1), kick: make(chan struct{}, 1),
		drain: make(chan struct{}), up: make(chan struct{})}
}

// Drain lets a busy runner finish and deliver its job and then ends Run; an idle one
// ends at once. It may be called more than once.
func (r *Runner) Drain() { r.once.Do(func() { close(r.drain); r.beatNow() }) }

func (r *Runner) draining() bool {
	select {
	case <-r.drain:
		return true
	default:
		return false
	}
}

// Run serves until Drain or until ctx ends, which kills a running job without a
// verdict: raid gives it to another runner. All it started has ended when it returns.
func (r *Runner) Run(ctx context.Context) error {
	if err := r.Engine.Sweep(ctx); err != nil {
		return fmt.Errorf("remove old boxes: %w", err)
	}
	left, err := r.recover()
	if err != nil {
		return err
	}
	leftover, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if left != nil { // a result of an earlier process that raid may not have
		left.cancel = cancel
		r.hold(left)
	}
	linked, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { r.link(linked) })
	wg.Go(func() { r.sweep(linked) })
	wg.Go(func() { r.pull(linked) })
	if left != nil {
		r.finish(leftover, left)
	}
	r.slot(ctx)
	stop()
	wg.Wait()
	return errors.Join(r.refused, r.Engine.Close())
}

// sweepEvery is how often what nobody owns is looked for: a container, say, whose
// engine answered too late.
const sweepEvery = 5 * time.Minute

func (r *Runner) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := r.Engine.Sweep(ctx); err != nil && ctx.Err() == nil {
			r.Logf("remove old boxes: %v", err)
		}
	}
}

// pull gets the images that are sure to be needed.
func (r *Runner) pull(ctx context.Context) {
	engine, ok := r.Engine.(box.Puller)
	if !ok {
		return
	}
	var rules []*box.Rules
	for _, p := range r.Pools {
		if r.Rules[p] != nil {
			rules = append(rules, r.Rules[p])
		}
	}
	engine.Pull(ctx, rules, func(line string) { r.Logf("%s", line) })
}

// slot runs one attempt after the other.
func (r *Runner) slot(ctx context.Context) {
	wait := pauseMin
	warm := newShelf(r)
	defer warm.close()
	warm.tend(ctx)
	used := true // the GPUs, since they were checked: by whom is not known at the start
	for {
		if used && !r.checkGPUs(ctx) {
			return
		}
		used = false
		r.setIdle(true)
		select {
		case <-warm.wake:
			warm.tend(ctx)
		case <-ctx.Done():
			return
		case <-r.drain:
			return
		case o := <-r.offers:
			fault := r.work(ctx, o, warm)
			used = o.Spec.GPUs > 0
			if fault {
				r.pause(ctx, wait)
				wait = min(2*wait, pauseMax)
			} else {
				wait = pauseMin
			}
			if ctx.Err() == nil && !r.draining() {
				warm.tend(ctx)
			}
		}
	}
}

// A runner that could not run a job asks for the next one later, and later still if
// that fails, too: on a broken machine the whole queue would fail within seconds.
const (
	pauseMin = 250 * time.Millisecond
	pauseMax = 30 * time.Second
)

func (r *Runner) pause(ctx context.Context, d time.Duration) {
	r.setIdle(false)
	select {
	case <-time.After(d):
	case <-r.drain:
	case <-ctx.Done():
	}
}

// recheckMost is how many times Recheck a GPU that is ill again and again has to wait.
const recheckMost = 16

// checkGPUs returns once the GPUs are well, or false if the runner is to end first. The
// slot is not idle, and a warm box may be on its way meanwhile. It is asked after the
// result of a job has gone, so nobody waits for it but the next job.
func (r *Runner) checkGPUs(ctx context.Context) bool {
	if r.Check == nil || len(r.GPUs) == 0 {
		return true
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { // a tool may take its time, and a runner that is told to go has none
		select {
		case <-r.drain:
			cancel()
		case <-ctx.Done():
		}
	})
	least := cmp.Or(r.Recheck, time.Minute)
	for first := true; ; first = false {
		err := r.Check(ctx)
		if ctx.Err() != nil {
			return false
		}
		r.setSick(err)
		switch {
		case err == nil && first: // it came through a job
			r.recheck = 0
			return true
		case err == nil:
			r.Logf("the GPUs are well again")
			return true
		}
		r.recheck = min(max(least, 2*r.recheck), recheckMost*least)
		r.Logf("takes no job: sick: %v; checked again in %v", err, r.recheck)
		select {
		case <-time.After(r.recheck):
		case <-ctx.Done():
			return false
		}
	}
}

func (r *Runner) setSick(err error) {
	why := ""
	if err != nil {
		why = err.Error()
	}
	r.mu.Lock()
	changed := r.sick != why
	r.sick = why
	r.mu.Unlock()
	if changed {
		r.beatNow()
	}
}

// work carries out one offer from lease to receipt. fault says that it failed, and
// not by the job's doing.
func (r *Runner) work(ctx context.Context, o job.Offer, warm *shelf) (fault bool) {
	a, err := r.newAttempt(o)
	if err != nil {
		r.Logf("job %d: %v", o.Job, err)
		return true // the lease runs out and raid says so to the user
	}
	whole, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	running, giveUp := context.WithCancelCause(whole)
	defer giveUp(nil)
	a.cancel, a.giveUp = cancel, giveUp
	r.hold(a)
	var wg sync.WaitGroup
	wg.Go(func() { r.finish(whole, a) })
	r.execute(running, a, warm)
	wg.Wait()
	return a.result != nil && a.result.Reason == job.ReasonInfra
}

// finish delivers an attempt and forgets it when raid has it or does not want it.
// When ctx itself ended, the folder stays for the next process.
func (r *Runner) finish(ctx context.Context, a *attempt) {
	err := r.deliver(ctx, a)
	<-a.over
	if err == nil || errors.Is(err, errStale) {
		if err := a.remove(); err != nil {
			r.Logf("job %d: %v", a.offer.Job, err)
		}
	}
	a.log.Close()
	r.hold(nil)
}

// hold says which attempt this runner answers for.
func (r *Runner) hold(a *attempt) {
	r.mu.Lock()
	r.held = a
	r.idle = false
	r.mu.Unlock()
	r.beatNow()
}

func (r *Runner) setIdle(idle bool) {
	r.mu.Lock()
	r.idle = idle && r.held == nil
	r.mu.Unlock()
	r.beatNow()
}

func (r *Runner) beatNow() {
	select {
	case r.kick <- struct{}{}:
	default: // one is due already
	}
}

// recover finds the attempt an earlier process left: one whose result was written is
// delivered; any other died with its box and is raid's to run again.
func (r *Runner) recover() (*attempt, error) {
	dirs, err := filepath.Glob(filepath.Join(r.Dir, "attempts", "*"))
	if err != nil {
		return nil, err
	}
	var left *attempt
	for _, dir := range dirs {
		a, err := openAttempt(dir)
		if err != nil || left != nil {
			r.Logf("%s: dropped: %v", filepath.Base(dir), err)
			if err := os.RemoveAll(dir); err != nil {
				return nil, err
			}
			continue
		}
		left = a
	}
	return left, nil
}
