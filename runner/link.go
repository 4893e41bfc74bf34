package runner

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
)

const (
	beatEvery = 5 * time.Second // a lease is renewed this often
	beatLate  = 5 * time.Second // an answer this late means a dead connection
	retryMin  = 100 * time.Millisecond
	retryMax  = 5 * time.Second
)

// link keeps a connection to raid and a `runner join` on it until ctx ends.
func (r *Runner) link(ctx context.Context) {
	wait := retryMin
	last := time.Now() // when raid was last heard of
	for ctx.Err() == nil {
		heard, err := r.connect(ctx)
		if heard {
			last, wait = time.Now(), retryMin
		}
		if errors.Is(err, errLater) { // raid is there, though it cannot save anything
			last = time.Now()
		}
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errRefused) && r.holding() == nil {
			r.refused = err
			r.Drain()
			return
		}
		if errors.Is(err, errLater) {
			r.Logf("%v", err)
		} else {
			r.Logf("raid is out of reach: %v", err)
		}
		if a := r.holding(); a != nil && time.Since(last) > r.Orphan {
			a.giveUp(errOrphan) // a result that is there already waits on
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMax)
	}
}

func (r *Runner) holding() *attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}

// connect serves one connection until it breaks; heard says whether raid ever
// answered on it.
func (r *Runner) connect(ctx context.Context) (heard bool, err error) {
	client, err := r.Dial(ctx)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer func() { cancel(errCut); client.Close(); wg.Wait() }()
	// A frozen connection blocks whoever writes to it, perhaps in the middle of a
	// beat: only closing it frees them all.
	defer context.AfterFunc(ctx, func() { client.Close() })()
	late := time.AfterFunc(beatLate, func() { cancel(errLate) })
	defer late.Stop()
	var words strings.Builder // raid's reason, when it does not take this key
	s, err := client.Start(ctx, "runner join", &words)
	if err != nil {
		return false, err
	}
	defer r.setClient(nil)
	calls := make(chan job.Call)
	wg.Go(func() { cancel(readCalls(ctx, s, calls, &words)) }) // ends with the session, which client.Close ends
	heard, err = r.converse(ctx, client, s, calls, late)
	if cause := context.Cause(ctx); cause != nil {
		err = cause // and what broke because of it is no news
	}
	return heard, err
}

// converse beats and obeys until something breaks.
func (r *Runner) converse(ctx context.Context, client *dial.Client, s *dial.Session, calls <-chan job.Call, late *time.Timer) (heard bool, err error) {
	out := json.NewEncoder(s.Stdin)
	if err := out.Encode(r.hello()); err != nil {
		return false, fmt.Errorf("say hello: %w", err)
	}
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return heard, context.Cause(ctx)
		case c := <-calls:
			if !heard {
				heard = true
				r.setClient(client)
			}
			if c.Beat {
				late.Reset(beatEvery + beatLate)
			}
			r.obey(c)
			continue
		case <-tick.C:
		case <-r.kick:
		}
		if err := out.Encode(r.beat()); err != nil {
			return heard, fmt.Errorf("beat: %w", err)
		}
	}
}

func readCalls(ctx context.Context, s *dial.Session, calls chan<- job.Call, words *strings.Builder) error {
	lines := bufio.NewScanner(s.Stdout)
	lines.Buffer(nil, job.MaxFrame)
	for lines.Scan() {
		var c job.Call
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return fmt.Errorf("raid said %q: %w", lines.Text(), err)
		}
		select {
		case calls <- c:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	exit, err := s.Wait()
	if refused := errors.Join(lines.Err(), err); refused != nil {
		return refused
	}
	if exit == job.ExitRefused {
		return fmt.Errorf("%w: %s", errRefused, strings.TrimSpace(words.String()))
	}
	if exit == job.ExitTryLater {
		return fmt.Errorf("%w: %s", errLater, strings.TrimSpace(words.String()))
	}
	return fmt.Errorf("raid ended the session with status %d: %w", exit, io.EOF)
}

func (r *Runner) hello() job.Hello {
	h := job.Hello{Protocol: job.Protocol, Folder: r.ID, Name: r.Name, Pools: r.Pools, Engine: r.Engine.Name(),
		Arch: r.Arch, Weakness: r.Engine.Weakness(), Builds: r.Builds, Express: r.Express, Draining: r.draining(), GPUArch: gpu.Arch(r.GPUs), GPUMemoryMB: gpu.LeastMemoryMB(r.GPUs)}
	for pool, rules := range r.Rules {
		if h.Images == nil {
			h.Images = map[string]*job.Images{}
		}
		h.Images[pool] = &rules.Images
	}
	for _, g := range r.GPUs {
		h.GPUs = append(h.GPUs, g.Model)
	}
	if a := r.holding(); a != nil {
		h.Held = &a.offer.Lease
	}
	r.beatNow() // idle is said by a beat
	return h
}

func (r *Runner) beat() job.Beat {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := job.Beat{Idle: r.idle, Draining: r.draining(), Sick: r.sick}
	if r.held != nil {
		b.Held, b.Idle = &r.held.offer.Lease, false
	}
	return b
}

// obey does what raid says. It never blocks: the beat must go on.
func (r *Runner) obey(c job.Call) {
	a := r.holding()
	switch {
	case c.Offer != nil:
		select {
		case r.offers <- *c.Offer:
		default: // one slot: a second offer can only be a repeat
		}
	case c.Cancel != nil && a != nil && a.offer.Lease == *c.Cancel:
		a.end(job.ReasonCancelled)
	case c.Stale != nil && a != nil && a.offer.Lease == *c.Stale:
		a.cancel(errStale)
	}
}

// setClient makes a connection known to whoever waits in connection.
func (r *Runner) setClient(c *dial.Client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case c != nil && r.client == nil:
		close(r.up)
	case c == nil && r.client != nil:
		r.up = make(chan struct{})
	}
	r.client = c
}

// connection waits for a connection to raid.
func (r *Runner) connection(ctx context.Context) (*dial.Client, error) {
	for {
		r.mu.Lock()
		c, up := r.client, r.up
		r.mu.Unlock()
		if c != nil {
			return c, nil
		}
		select {
		case <-up:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
