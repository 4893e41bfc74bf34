package cluster

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/sshd/store"
)

// A directory knows the keys of the raids of a deployment: those that were there lately,
// and, after asking, one that is new.
type directory struct {
	ask func(ctx context.Context, fingerprint string) (store.Member, error) // Redis

	mu    sync.Mutex // guards the following
	known map[string]store.Member
	quiet time.Time // Redis is not asked before
}

const (
	askTime  = time.Second     // for one answer
	askPause = 3 * time.Second // after none
)

// learn replaces what is known: raids by the fingerprints of their keys. It keeps all.
func (d *directory) learn(all map[string]store.Member) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.known = all
}

// has reports whether a key is that of a raid that was there lately.
func (d *directory) has(fingerprint string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.known[fingerprint]
	return ok
}

// find reports whether a key is a raid's, and asks Redis if it is not known for one. While
// Redis does not answer, those who come within askPause need not wait to hear no: a raid
// comes again, and its word in Redis has run out anyway.
func (d *directory) find(ctx context.Context, key ssh.PublicKey) bool {
	fingerprint := ssh.FingerprintSHA256(key)
	if d.has(fingerprint) {
		return true
	}
	if d.resting() {
		return false
	}
	limit, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	m, err := d.ask(limit, fingerprint)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err == nil && m.Key == line(key):
		d.known[fingerprint] = m
		return true
	case err != nil && !errors.Is(err, store.ErrNoMember) && ctx.Err() == nil:
		d.quiet = time.Now().Add(askPause)
	}
	return false
}

func (d *directory) resting() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Now().Before(d.quiet)
}
