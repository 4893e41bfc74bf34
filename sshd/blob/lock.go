package blob

import "context"

// A keyLock is held by whoever adds, renews or removes a blob.
type keyLock struct {
	turn  chan struct{} // one token
	users int           // guarded by Bucket.mu
}

// lock waits for a key's turn; unlock must be called. Locks of all blobs together would
// have a slow upload hold up a removal, and that everybody else.
func (b *Bucket) lock(ctx context.Context, k Key) (unlock func(), err error) {
	b.mu.Lock()
	l := b.locks[k]
	if l == nil {
		l = &keyLock{turn: make(chan struct{}, 1)}
		b.locks[k] = l
	}
	l.users++
	b.mu.Unlock()
	leave := func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(b.locks, k)
		}
	}
	select {
	case l.turn <- struct{}{}:
		return func() { <-l.turn; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
