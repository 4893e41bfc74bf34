package stream

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// This file is the mirror's way to Redis: calls that end in time, and a breaker, so that
// a Redis in trouble is called by one and not by all.

const (
	callTimeout = time.Second
	sendTimeout = 2 * time.Second // all of a call: a connection, and there and back
	minBackoff  = time.Second
	maxBackoff  = 30 * time.Second
)

// A breaker is closed while Redis takes writes, and else lets nobody call it but the
// probe. Its fields are guarded by Mirror.mu.
type breaker struct {
	up      chan struct{} // closed while Redis takes writes
	down    chan struct{} // closed while it does not
	since   time.Time     // of that
	said    bool          // that it does not
	trouble string        // the last one
	backoff time.Duration // before the next probe
}

func newBreaker() breaker {
	b := breaker{up: make(chan struct{}), down: make(chan struct{}), since: time.Now()}
	close(b.down) // until the first probe
	return b
}

// awaitUp waits until Redis takes writes, or false when ctx ends.
func (m *Mirror) awaitUp(ctx context.Context) bool {
	m.mu.Lock()
	up := m.up
	m.mu.Unlock()
	return wait(ctx, up)
}

// probe closes the breaker: while Redis is away nobody else calls it, and this after 1
// to 30 s.
func (m *Mirror) probe(ctx context.Context) {
	for {
		m.mu.Lock()
		down := m.down
		m.mu.Unlock()
		if !wait(ctx, down) {
			return
		}
		m.mu.Lock()
		backoff := m.backoff
		m.mu.Unlock()
		if !pause(ctx, backoff) {
			return
		}
		if err := m.tryWrite(ctx); err != nil {
			m.trip(ctx, err, true)
			continue
		}
		m.takeStock(ctx)
		m.reset()
	}
}

// tryWrite does what mirroring a job does: a full or read-only Redis still answers PING,
// and an ACL may forbid any part of it.
func (m *Mirror) tryWrite(ctx context.Context) error {
	err := m.call(ctx, func(ctx context.Context) error { return m.client.Del(ctx, probeKey).Err() })
	if err != nil {
		return err
	}
	t := fmt.Appendf(nil, "%d", time.Now().Unix())
	err = m.append(ctx, probeKey, addition{expire: m.Keep, entries: []addend{{"1-0", "raid", t}}})
	if errors.Is(err, errMoved) { // by another raid
		return nil
	}
	return err
}

// reset lets everybody call Redis again.
func (m *Mirror) reset() {
	m.mu.Lock()
	back := m.said
	m.said, m.since = false, time.Now()
	m.down = make(chan struct{})
	close(m.up)
	m.mu.Unlock()
	if back {
		m.Logf("mirror: redis is back")
	}
}

// trip keeps everybody from calling Redis. Only the first to see a trouble counts, and
// the probe that sees it last.
func (m *Mirror) trip(ctx context.Context, err error, probing bool) {
	if ctx.Err() != nil {
		return
	}
	m.mu.Lock()
	first := !m.said
	m.said, m.trouble = true, err.Error()
	m.count.errors++
	wasUp := closed(m.up)
	if wasUp {
		m.up, m.since = make(chan struct{}), time.Now()
		close(m.down)
	}
	if wasUp || probing {
		m.backoff = min(max(2*m.backoff, minBackoff), maxBackoff)
	}
	m.mu.Unlock()
	if first {
		m.Logf("mirror: redis: %v; jobs go on without it", err)
	}
}

// workedLocked makes the next trouble start with a short back-off again.
func (m *Mirror) workedLocked() { m.backoff = 0 }

// call makes one call that ends in time.
func (m *Mirror) call(ctx context.Context, fn func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	err := fn(bounded)
	var timeout interface{ Timeout() bool }
	if err != nil && ctx.Err() == nil && errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("no answer in time: %w", err)
	}
	return err
}

// trouble tells a Redis that cannot take writes now from one that refused a command
// for what it was.
func trouble(err error) bool {
	var reply redis.Error
	if !errors.As(err, &reply) {
		return true // the connection, or time
	}
	for _, p := range []string{"OOM", "LOADING", "READONLY", "MISCONF", "MASTERDOWN", "NOAUTH", "NOPERM", "WRONGPASS",
		"BUSY", "CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK", "NOREPLICAS", "UNKILLABLE", "ERR max number of clients", "ERR The user executing the script"} {
		if strings.HasPrefix(reply.Error(), p) {
			return true
		}
	}
	return false
}
