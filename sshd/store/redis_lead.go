package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"
)

// LeaseTTL is how long a leader leads that is not heard of any more.
const LeaseTTL = 3 * time.Second

// How often a lease is renewed, and how soon after that failed.
const (
	renewEvery = LeaseTTL / 3
	renewAgain = 200 * time.Millisecond
)

// ErrDeposed is returned when a lease is somebody else's, or nobody's.
var ErrDeposed = errors.New("store: this raid does not lead any more")

// ErrNoMember is returned when nobody leads, or there is no such door.
var ErrNoMember = errors.New("store: nobody is there")

// A Member is one raid of a deployment, as it says of itself.
type Member struct {
	ID      string `json:"id"`                // of the process: never used twice
	Addr    string `json:"addr"`              // where the others reach it, host:port
	Key     string `json:"key"`               // its public key, as a line of authorized_keys
	Version string `json:"version,omitempty"` // what it runs, for people; "" from one that does not say
}

// A Lease is the right to lead, renewed every second until it is resigned or lost.
//
// It keeps two raids from leading at once as long as Redis' clock goes on; safety does not
// depend on it, but on Claim. Time is Redis' own, and here the time since the last request
// to renew that succeeded was sent: when that is LeaseTTL the lease counts as lost.
type Lease struct {
	r      *Redis
	value  string
	lost   chan struct{}
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu  sync.Mutex // protects err
	err error
}

// Campaign waits until this raid leads, or ctx ends. While Redis is away it goes on trying.
// The lease is renewed until Resign, whatever becomes of ctx.
func (r *Redis) Campaign(ctx context.Context, me Member) (*Lease, error) {
	value, err := json.Marshal(me)
	if err != nil {
		return nil, fmt.Errorf("campaign: %w", err)
	}
	for {
		sent := time.Now()
		a, err := r.askLead(ctx, string(value))
		switch mine := a.won || a.value == string(value); { // of a try whose answer was lost
		case err != nil:
		case a.won && time.Since(sent) < renewEvery:
			return r.hold(string(value), sent), nil
		case mine: // since when is not known
			sent = time.Now()
			if err = r.extend(ctx, string(value)); err == nil {
				return r.hold(string(value), sent), nil
			}
			if errors.Is(err, ErrDeposed) { // it has just run out
				err = nil
			}
		default:
			err = r.awaitChange(ctx, a)
		}
		if err := r.bear(ctx, err); err != nil {
			return nil, fmt.Errorf("campaign: %w", err)
		}
	}
}

// bear waits a little after an error that may pass, and returns the others.
func (r *Redis) bear(ctx context.Context, err error) error {
	switch {
	case r.usable(ctx) != nil:
		return r.usable(ctx)
	case err != nil && !errors.Is(err, ErrUnavailable):
		return err
	case err != nil && !pause(ctx, renewAgain):
		return context.Cause(ctx)
	}
	return nil
}

// A leading is what acquire.lua says.
type leading struct {
	won   bool
	value string
	left  time.Duration
	last  string // change
}

// askLead takes the lease, or "" only looks.
func (r *Redis) askLead(ctx context.Context, value string) (leading, error) {
	out, err := r.read(ctx, acquireScript, []string{r.space.lead(), r.space.leads()}, value, LeaseTTL.Milliseconds())
	if err != nil {
		return leading{}, err
	}
	if text(out[0]) == "1" {
		return leading{won: true, value: value}, nil
	}
	ms, err := strconv.ParseInt(text(out[2]), 10, 64)
	if err != nil || ms < 0 {
		ms = renewEvery.Milliseconds() // nobody leads, or for ever, which only a hand can have written
	}
	return leading{value: text(out[1]), left: time.Duration(ms) * time.Millisecond, last: text(out[3])}, nil
}

// awaitChange waits until somebody else may lead: a change rings, or the lease runs out.
func (r *Redis) awaitChange(ctx context.Context, a leading) error {
	return r.ring(ctx, r.space.leads(), a.last, min(a.left+time.Millisecond, awaitSlice))
}

// extend renews a lease once. It returns ErrDeposed if that is somebody else's, or nobody's.
func (r *Redis) extend(ctx context.Context, value string) error {
	n, err := renewScript.Run(ctx, r.client, []string{r.space.lead()}, value, LeaseTTL.Milliseconds()).Int()
	if err != nil {
		return unavailable(err)
	}
	if n != 1 {
		return ErrDeposed
	}
	return nil
}

// hold renews a lease that was asked for at sent.
func (r *Redis) hold(value string, sent time.Time) *Lease {
	ctx, cancel := context.WithCancel(context.Background())
	l := &Lease{r: r, value: value, lost: make(chan struct{}), cancel: cancel}
	l.done.Go(func() { l.end(l.renew(ctx, sent)) })
	return l
}

// renew renews until the lease is lost, and returns why.
func (l *Lease) renew(ctx context.Context, sent time.Time) error {
	wait, trouble := renewEvery, ErrUnavailable // this process stood still
	for {
		until := sent.Add(LeaseTTL)
		if left := time.Until(until); left <= wait {
			wait = max(left, 0)
		}
		if !pause(ctx, wait) {
			return ErrDeposed // resigned
		}
		if !time.Now().Before(until) {
			return fmt.Errorf("lease: not renewed in %v: %w", LeaseTTL, trouble)
		}
		try, cancel := context.WithDeadline(ctx, until)
		now := time.Now()
		err := l.r.extend(try, l.value)
		cancel()
		switch {
		case err == nil:
			sent, wait = now, renewEvery
		case errors.Is(err, ErrDeposed):
			return fmt.Errorf("lease: %w", err)
		default:
			trouble, wait = err, renewAgain
		}
	}
}

func (l *Lease) end(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	close(l.lost)
}

// Lost is closed when the lease is held no more, or that cannot be known.
func (l *Lease) Lost() <-chan struct{} { return l.lost }

// Err returns why the lease was lost: ErrDeposed or ErrUnavailable, wrapped. It is nil
// while it is held.
func (l *Lease) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Resign gives the lease up, so that the next one leads at once. It closes Lost, and does
// nothing to a lease that is somebody else's. It returns when nothing of the lease runs any
// more.
func (l *Lease) Resign(ctx context.Context) error {
	l.cancel()
	l.done.Wait()
	short, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	err := resignScript.Run(short, l.r.client, []string{l.r.space.lead(), l.r.space.leads()}, l.value).Err()
	if err != nil {
		return fmt.Errorf("resign: %w", l.r.failed(ctx, err))
	}
	return nil
}

// Leader returns who leads, or ErrNoMember.
func (r *Redis) Leader(ctx context.Context) (Member, error) {
	a, err := r.askLead(ctx, "")
	if err != nil {
		return Member{}, fmt.Errorf("leader: %w", err)
	}
	return a.member()
}

func (a leading) member() (m Member, err error) {
	if a.value == "" {
		return m, fmt.Errorf("leader: %w", ErrNoMember)
	}
	if err := json.Unmarshal([]byte(a.value), &m); err != nil {
		return m, fmt.Errorf("leader: %w", err)
	}
	return m, nil
}

// AwaitLeader returns who leads as soon as it is another than the one with the id not, ""
// for none: at once if it is already, else when there is a new one. The end of a leader
// that was killed is seen when its lease runs out, in LeaseTTL at most. While Redis is away
// it goes on trying; only ctx ends it.
func (r *Redis) AwaitLeader(ctx context.Context, not string) (m Member, err error) {
	err = r.watch(ctx, func(is Member, there bool) bool {
		m = is
		return there && is.ID != not
	})
	return m, err
}

// AwaitNoLeader returns as soon as the one with the id leads no more.
func (r *Redis) AwaitNoLeader(ctx context.Context, id string) error {
	return r.watch(ctx, func(is Member, there bool) bool { return !there || is.ID != id })
}

// watch returns when done says so of who leads.
func (r *Redis) watch(ctx context.Context, done func(m Member, there bool) bool) error {
	for {
		a, err := r.askLead(ctx, "")
		if err == nil {
			m, merr := a.member()
			if done(m, merr == nil) {
				return nil
			}
			err = r.awaitChange(ctx, a)
		}
		if err := r.bear(ctx, err); err != nil {
			return fmt.Errorf("watch the leader: %w", err)
		}
	}
}
