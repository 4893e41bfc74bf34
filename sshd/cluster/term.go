package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/sshd/door"
	"github.com/rai-project/raid/sshd/store"
)

// limbo is how long a raid that has lost Redis goes on as it was, in the hope of leading
// again before anybody else does. It saves nothing in that time. It must be over before a
// new leader gives up on runners that are still with the old one.
const limbo = 10 * time.Second

// lead leads whenever it may, until ctx ends.
func (r *Raid) lead(ctx context.Context) {
	for ctx.Err() == nil {
		lease, err := r.Redis.Campaign(ctx, r.me)
		if err == nil {
			err = r.reign(ctx, lease)
		}
		if err != nil && ctx.Err() == nil {
			r.Logf("this raid leads no more: %v", err)
			pause(ctx, time.Second) // others may do better
		}
	}
}

// reign is one term, from the lease that was won until it is given up or lost.
func (r *Raid) reign(ctx context.Context, lease *store.Lease) error {
	outer := ctx
	defer func() { // of whatever lease it has by then
		limit, cancel := context.WithTimeout(context.WithoutCancel(outer), store.LeaseTTL)
		defer cancel()
		lease.Resign(limit) // if Redis is away, it runs out by itself
	}()
	r.home.Lock()
	defer r.home.Unlock()
	ctx, end := context.WithCancelCause(outer)
	defer end(nil)
	r.change(func() { r.link = nil }) // whoever led before does not
	limit, cancel := context.WithTimeout(ctx, store.LeaseTTL)
	err := r.Redis.Claim(limit, lease)
	cancel()
	if err != nil {
		return err
	}
	leader, err := r.Lead(ctx)
	if err != nil {
		return fmt.Errorf("load the state: %w", err)
	}
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := leader.Run(work); err != nil {
			end(errors.Join(store.ErrDeposed, err))
		}
	})
	t := &term{Leader: leader, ctx: ctx}
	if err = leader.Welcome(ctx); err == nil {
		r.change(func() { r.term = t })
		r.Logf("this raid leads")
	}
	for err == nil {
		select {
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-lease.Lost():
			lease, err = r.again(ctx, lease)
		}
	}
	end(err)
	r.change(func() { r.term = nil })
	if outer.Err() == nil { // nothing can be saved any more: nobody need wait for it
		stop()
	}
	t.sessions.Wait()
	stop()
	wg.Wait()
	return err
}

// again tries to lead on after a lease was lost because Redis was away. Whatever it returns,
// the lease is to be resigned.
func (r *Raid) again(ctx context.Context, lease *store.Lease) (*store.Lease, error) {
	why := lease.Err()
	if errors.Is(why, store.ErrUnavailable) {
		r.Logf("Redis is away, nothing can be saved: %v", why)
	}
	limit, cancel := context.WithTimeout(ctx, limbo)
	defer cancel()
	for errors.Is(why, store.ErrUnavailable) {
		next, err := r.Redis.Campaign(limit, r.me)
		if err != nil {
			break // limbo is over
		}
		if lease, why = next, r.takeBack(limit, next); why == nil {
			r.Logf("Redis is back, and this raid leads on")
			return lease, nil
		}
	}
	if errors.Is(why, store.ErrDeposed) {
		return lease, why
	}
	return lease, errors.Join(store.ErrDeposed, why)
}

// takeBack makes this raid the writer again if no other one was in between.
func (r *Raid) takeBack(ctx context.Context, lease *store.Lease) error {
	err := insist(ctx, lease, func() error { return r.Redis.StillWriter(ctx) })
	if err != nil {
		return err
	}
	return insist(ctx, lease, func() error { return r.Redis.Claim(ctx, lease) })
}

// insist asks Redis again while that is away, for as long as the lease is held: nobody else
// can claim to lead then.
func insist(ctx context.Context, lease *store.Lease, ask func() error) error {
	for {
		err := ask()
		if !errors.Is(err, store.ErrUnavailable) {
			return err
		}
		select {
		case <-lease.Lost():
			return lease.Err()
		case <-ctx.Done():
			return err
		case <-time.After(askAgain):
		}
	}
}

// askAgain is how soon Redis is asked again.
const askAgain = 200 * time.Millisecond

// follow keeps a link to whoever else leads, until ctx ends.
func (r *Raid) follow(ctx context.Context) {
	for ctx.Err() == nil {
		m, err := r.Redis.AwaitLeader(ctx, r.me.ID)
		if err != nil {
			continue // ctx has ended
		}
		if err := r.lean(ctx, m); err != nil && ctx.Err() == nil {
			r.Logf("the raid at %s leads, and cannot be reached: %v", m.Addr, err)
			pause(ctx, time.Second)
		}
	}
}

// lean passes sessions on to a leader for as long as it leads and can be reached.
func (r *Raid) lean(ctx context.Context, m store.Member) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	gone := make(chan struct{})
	wg.Go(func() { defer close(gone); r.Redis.AwaitNoLeader(ctx, m.ID) })
	limit, stop := context.WithTimeout(ctx, store.LeaseTTL)
	defer stop()
	// The leader welcomes those that it finds in Redis, where our word runs out while
	// Redis is away.
	if err := r.Redis.PutDoor(limit, r.print, r.me); err != nil {
		return err
	}
	link, err := door.Dial(limit, m.Addr, r.Own, r.HostKeys[0].PublicKey())
	if err != nil {
		return err
	}
	defer link.Close()
	r.Logf("the raid at %s leads", m.Addr)
	wg.Go(r.forget)
	r.change(func() { r.link = link })
	defer r.change(func() { r.link = nil })
	select {
	case <-gone:
		return nil
	case <-link.Done():
		return errors.New("the connection broke")
	}
}

// forget removes what an earlier term has left here.
func (r *Raid) forget() {
	r.home.Lock()
	defer r.home.Unlock()
	if err := r.Forget(); err != nil {
		r.Logf("remove what is unfinished: %v", err)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func newID() string { return rand.Text() }

func line(k ssh.PublicKey) string { return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k))) }
