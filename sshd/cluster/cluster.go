// Package cluster makes several raids one service: many doors, one brain.
//
// All raids of a deployment share a Redis, a host key and a place for blobs. One of them
// leads, by a lease in Redis: it loads the state and does everything. The others are
// doors: they check that a client holds its key, and pass its sessions on to the leader
// over SSH. When the leader dies another one leads within [store.LeaseTTL] and a moment;
// runners come again by themselves and send it what it lacks.
//
// Promises: two raids that both think they lead can do no harm, for Redis takes the
// commits of the newer one only; nobody waits for a vote, since Redis is the judge; a
// session is handled by the raid that leads when it begins, and is told when that raid
// leads no more; a raid that has lost Redis for a moment only goes on where it was.
//
// Non-goals: to live longer than Redis does. While it is away nothing new is accepted,
// and what runs goes on.
package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/door"
	"github.com/rai-project/raid/sshd/store"
)

// A Leader is what a raid is while it leads: an sshd.Server.
type Leader interface {
	Authorize(ctx context.Context, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error)
	Handle(ctx context.Context, s *door.Session) int
	// Run returns when ctx has ended, or with what keeps this raid from leading.
	Run(ctx context.Context) error
	// Welcome is called once while it runs, before any session comes.
	Welcome(ctx context.Context) error
}

// Config says what a raid of a deployment is made of. All of it is required.
type Config struct {
	HostKeys []ssh.Signer // of the deployment
	Own      ssh.Signer   // of this raid alone
	Addr     string       // where the other raids reach it, host:port
	Version  string       // what it tells them that it runs
	Redis    *store.Redis // open, and closed by whoever opened it
	// Lead makes the leader of a term from what Redis has. The term ends with ctx.
	Lead func(ctx context.Context) (Leader, error)
	// Forget is called when another raid leads, outside of terms: what a term of this one
	// has left unfinished counts no more.
	Forget func() error
	// Others is told of the other raids, sorted by address, at first and when one comes,
	// goes or starts again, from one goroutine.
	Others func([]store.Member)
	Logf   func(format string, args ...any)
}

// A Raid is one raid of a deployment.
type Raid struct {
	Config
	me    store.Member
	print string // fingerprint of Own
	door  *door.Server
	home  sync.Mutex // held in a term, and to Forget
	raids directory

	mu    sync.Mutex // guards the following
	term  *term      // nil while another raid leads, or none
	link  *door.Link // to the raid that leads; nil for none
	moved chan struct{}
}

// A term is the time in which this raid leads.
type term struct {
	Leader
	ctx      context.Context // ends with the term, by its cause
	sessions sync.WaitGroup
}

// New returns a raid that waits for Serve.
func New(c Config) (*Raid, error) {
	r := &Raid{Config: c, print: ssh.FingerprintSHA256(c.Own.PublicKey()), moved: make(chan struct{}),
		raids: directory{ask: c.Redis.Door, known: map[string]store.Member{}}}
	r.me = store.Member{ID: newID(), Addr: c.Addr, Key: line(c.Own.PublicKey()), Version: c.Version}
	var err error
	r.door, err = door.New(door.Config{HostKeys: c.HostKeys, Authorize: r.authorize, IsRaid: r.isRaid, Route: r.route, Handle: r.handle, Logf: c.Logf})
	return r, err
}

// Serve answers connections on l until ctx ends, leads when it may, then says goodbye to
// the sessions and stops within grace. It returns nil after an orderly end. l is closed.
func (r *Raid) Serve(ctx context.Context, l net.Listener, grace time.Duration) error {
	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	shut := func() {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		r.door.Shutdown(limit) // returns when every session has ended
	}
	wg.Go(func() { <-ctx.Done(); shut(); stop() })
	wg.Go(func() { r.announce(inner) })
	wg.Go(func() { r.follow(inner) })
	wg.Go(func() { r.lead(inner) })
	err := r.door.Serve(l)
	if errors.Is(err, door.ErrClosed) {
		wg.Wait()
		return nil
	}
	return err
}

// announce keeps this raid known to the others.
func (r *Raid) announce(ctx context.Context) {
	tick := time.NewTicker(store.DoorTTL / 3)
	defer tick.Stop()
	var others []store.Member
	for {
		now, err := r.meet(ctx)
		if err != nil && ctx.Err() == nil {
			r.Logf("tell the other raids of this one: %v", err)
		}
		if err == nil && !slices.Equal(now, others) {
			others = now
			r.Others(others)
		}
		select {
		case <-ctx.Done():
			limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			r.Redis.DropDoor(limit, r.print)
			return
		case <-tick.C:
		}
	}
}

// meet tells the other raids of this one, and returns them.
func (r *Raid) meet(ctx context.Context) (others []store.Member, err error) {
	ctx, cancel := context.WithTimeout(ctx, store.DoorTTL/3)
	defer cancel()
	if err := r.Redis.PutDoor(ctx, r.print, r.me); err != nil {
		return nil, err
	}
	all, err := r.Redis.Doors(ctx)
	if err != nil {
		return nil, err
	}
	for print, m := range all {
		if print != r.print {
			others = append(others, m)
		}
	}
	slices.SortFunc(others, func(a, b store.Member) int { return cmp.Or(cmp.Compare(a.Addr, b.Addr), cmp.Compare(a.ID, b.ID)) })
	r.raids.learn(all)
	return others, nil
}

// change sets what sessions look at, and wakes those that wait for it.
func (r *Raid) change(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn()
	close(r.moved)
	r.moved = make(chan struct{})
}

// now returns where sessions go now, and what is closed when that changes.
func (r *Raid) now() (*term, *door.Link, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.term, r.link, r.moved
}

// leaderWait is how long a session waits for some raid to lead: longer than it takes
// after the death of one, and shorter than a runner waits for an answer.
const leaderWait = 4 * time.Second

// await returns where sessions go, after waiting for that to be known; nil, nil when no
// raid leads.
func (r *Raid) await(ctx context.Context) (*term, *door.Link) {
	ctx, cancel := context.WithTimeout(ctx, leaderWait)
	defer cancel()
	for {
		t, link, moved := r.now()
		if t != nil || link != nil {
			return t, link
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// route is [door.Config.Route].
func (r *Raid) route(ctx context.Context) *door.Link {
	t, link := r.await(ctx)
	if t != nil {
		return nil
	}
	return link
}

// handle handles a session of a raid that leads, or of one that knows nobody who does.
func (r *Raid) handle(ctx context.Context, s *door.Session) int {
	t := r.enter()
	if t != nil && s.Who == nobody { // who it is, nobody could say
		t.sessions.Done()
		t = nil
	}
	if t == nil {
		fmt.Fprint(s.Stderr(), "raid: no raid leads at the moment, so nothing can be saved\n"+
			"raid: running jobs go on; try again in a few seconds\n")
		return job.ExitTryLater
	}
	defer t.sessions.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(t.ctx, func() { cancel(context.Cause(t.ctx)) })()
	return t.Handle(ctx, s)
}

// enter counts a session into the term that is.
func (r *Raid) enter() *term {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.term != nil {
		r.term.sessions.Add(1)
	}
	return r.term
}

// authorize asks whoever leads who a key belongs to. While nobody does, every key may
// come in, to be told so.
func (r *Raid) authorize(ctx context.Context, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
	t, link := r.await(ctx)
	switch {
	case t != nil:
		return r.known(ctx, t, key, from)
	case link != nil:
		who, err := link.Who(key, from)
		var no *door.RefusedError
		if err == nil || errors.As(err, &no) {
			return who, err
		}
	}
	return nobody, nil
}

// nobody is whoever comes while no raid leads: it is not known who that is.
var nobody = keys.Identity{Role: keys.Guest, Fingerprint: "unknown"}

// known says who a key belongs to at the raid that leads: another raid that is known, or
// whoever the leader says. It waits for nobody.
func (r *Raid) known(ctx context.Context, t *term, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
	if print := ssh.FingerprintSHA256(key); r.raids.has(print) {
		return keys.Identity{User: "raid", Role: keys.Door, Fingerprint: print}, nil
	}
	return t.Authorize(ctx, key, from)
}

// isRaid is [door.Config.IsRaid]: other raids come to the one that leads.
func (r *Raid) isRaid(ctx context.Context, key ssh.PublicKey) bool {
	t, _, _ := r.now()
	return t != nil && r.raids.find(ctx, key)
}
