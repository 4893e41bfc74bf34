package brain

import (
	"context"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// A Link is one connection of one runner. Its owner reads Calls until the channel
// is closed, tells it of beats, and ends it with Leave.
type Link struct {
	brain  *Brain
	runner queue.Runner
	held   *job.Lease // as last said
	told   *job.Lease // of the last offer
	beat   job.Beat
	calls  chan job.Call
	deaf   bool // calls is closed; owned by the loop
}

// callRoom is how many calls may wait for a slow runner. One lease makes three at
// most (offer, cancel, stale); a runner further behind is cut off and comes again.
const callRoom = 64

// Join connects a runner. A connection it already had is cut off: the newer one is
// the truth. The error is that of a commit, or queue.ErrTaken.
func (b *Brain) Join(ctx context.Context, r queue.Runner, held *job.Lease) (*Link, error) {
	l := &Link{brain: b, runner: r, held: held, calls: make(chan job.Call, callRoom)}
	if _, err := b.send(ctx, &request{link: l}); err != nil {
		l.Leave(context.WithoutCancel(ctx)) // the commit failed after the link was made
		return nil, err
	}
	return l, nil
}

// Calls is what raid says to the runner. It is closed when the link is cut off.
func (l *Link) Calls() <-chan job.Call { return l.calls }

// Beat passes a heartbeat on. queue.ErrStale means that the link was cut off.
func (l *Link) Beat(ctx context.Context, beat job.Beat) error {
	_, err := l.brain.send(ctx, &request{link: l, op: linkBeat, beat: beat})
	return err
}

// Leave says that the connection has ended. It is harmless after a cut-off.
func (l *Link) Leave(ctx context.Context) {
	l.brain.send(ctx, &request{link: l, op: linkLeave})
}

// A linkOp is what a request wants of its link.
type linkOp int

const (
	linkJoin linkOp = iota
	linkBeat
	linkLeave
)

// applyLink carries out a request of a link. Only the newest link of a runner
// counts; what an older one still says is stale.
func (b *Brain) applyLink(now queue.Millis, r *request) error {
	l, id := r.link, r.link.runner.ID
	current := b.links[id] == l
	var cmd queue.Command
	switch {
	case r.op == linkJoin:
		return b.join(now, l)
	case r.op == linkLeave && current:
		b.drop(l)
		cmd = queue.Leave{Runner: id}
	case r.op == linkLeave:
		return nil
	case !current || l.deaf:
		return queue.ErrStale
	default:
		l.beat, l.held = r.beat, r.beat.Held
		cmd = queue.Beat{Runner: id, Held: l.held, Idle: l.beat.Idle, Draining: l.beat.Draining, Sick: l.beat.Sick}
	}
	_, err := b.core.Apply(now, cmd)
	return err
}

// join makes a link that of its runner, in place of the one there was.
func (b *Brain) join(now queue.Millis, l *Link) error {
	if _, err := b.core.Apply(now, queue.Join{Runner: l.runner, Held: l.held}); err != nil {
		return err
	}
	if old := b.links[l.runner.ID]; old != nil {
		old.cut()
	}
	b.links[l.runner.ID] = l
	return nil
}

// drop forgets the newest link of a runner.
func (b *Brain) drop(l *Link) {
	l.cut()
	delete(b.links, l.runner.ID)
}

// dropLinks does what a batch that cannot be carried out has to say of connections that
// have ended: one that stayed would be offered jobs after the next load.
func (b *Brain) dropLinks(t *batch) {
	for _, r := range t.requests {
		if r.op == linkLeave && b.links[r.link.runner.ID] == r.link {
			b.drop(r.link)
		}
	}
}

// cut ends the calls of a link; its owner then leaves.
func (l *Link) cut() {
	if !l.deaf {
		l.deaf = true
		close(l.calls)
	}
}

// call hands one call to a runner, without waiting: a runner that does not read is
// cut off and hears everything again when it joins.
func (b *Brain) call(runner string, c job.Call) {
	l := b.links[runner]
	if l == nil || l.deaf {
		return
	}
	if c.Offer != nil {
		l.told = &c.Offer.Lease
		l.beat.Idle = false // until it says so again
	}
	select {
	case l.calls <- c:
	default:
		b.logf("runner %s does not read its calls: cut off", l.runner.Name)
		l.cut()
	}
}

// again puts a connected runner back into a core that was just loaded.
func (l *Link) again(core *queue.Core, now queue.Millis) {
	if l.deaf {
		return
	}
	core.Apply(now, queue.Join{Runner: l.runner, Held: l.held, Told: l.told})
	core.Apply(now, queue.Beat{Runner: l.runner.ID, Held: l.held, Idle: l.beat.Idle, Draining: l.beat.Draining, Sick: l.beat.Sick})
}
