package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// This file copies the output of one job.

const (
	flushEvery = 50 * time.Millisecond
	endedTime  = time.Minute            // for all of a job that has ended
	regain     = time.Second            // before a stream that vanished is written again
	outrun     = 8 << 20                // bytes behind, or 4 × PerJob: more than can be caught up with
	rest       = 250 * time.Millisecond // what a job is left alone for that outruns the mirror
)

var (
	// errOutput marks what went wrong on raid's side.
	errOutput = errors.New("read output")
	// errEnd is the end of a job's output. It is not io.EOF, for that is also what a
	// connection to a Redis says that has just died.
	errEnd = errors.New("end of output")
)

// mirror copies one job's output, until its end or a trouble with Redis: then it is put
// to Run again, and holds nothing while Redis is away.
func (m *Mirror) mirror(ctx context.Context, w *watch) {
	inner := ctx
	if closed(w.final) {
		select {
		case m.turn <- struct{}{}:
			defer func() { <-m.turn }()
		case <-ctx.Done():
			return
		}
		var cancel context.CancelFunc
		inner, cancel = context.WithTimeout(ctx, endedTime)
		defer cancel()
	}
	f := m.spools.Follow(w.id)
	defer f.Close()
	for {
		err := m.copy(inner, w, f)
		switch {
		case ctx.Err() != nil:
			return
		case inner.Err() != nil: // the turn is others' too
			m.Logf("mirror: the rest of job %d is not mirrored: its output has not ended in %v", w.id, endedTime)
			m.drop(w)
		case errors.Is(err, errMoved): // what a Redis that hung still had to do is being done
			pause(inner, flushEvery)
			continue
		case errors.Is(err, errVanished):
			// It expired, was evicted, or Redis began anew. It is written again, but not
			// as fast as Redis may throw it away.
			pause(inner, regain)
			continue
		case err == nil:
			m.done(w)
		case errors.Is(err, errRoom):
			m.refuse(w)
		case errors.Is(err, errOutput) || !trouble(err):
			m.Logf("mirror: the rest of job %d is not mirrored: %v", w.id, err)
			m.drop(w)
		default:
			m.trip(ctx, err, false)
			m.later(w)
		}
		return
	}
}

// done forgets a job whose stream is complete.
func (m *Mirror) done(w *watch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.workedLocked()
	m.forgetLocked(w)
}

// drop forgets a job whose stream will not be complete.
func (m *Mirror) drop(w *watch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count.skipped++
	m.count.errors++
	m.forgetLocked(w)
}

// later puts a job to Run again.
func (m *Mirror) later(w *watch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	w.runs = false
	m.startLocked(w)
}

// copy mirrors a job from where its stream ends to its last entry.
func (m *Mirror) copy(ctx context.Context, w *watch, f *Follower) error {
	key := logKey + strconv.FormatInt(w.id, 10)
	b := &batch{}
	over, err := m.resume(ctx, key, f, b)
	if err != nil || over {
		return err
	}
	if !m.admit(w) {
		return errRoom
	}
	f.Skip(b.end)
	m.stands(w, b)
	for {
		err := m.flush(ctx, key, w, f, b)
		if err == errEnd {
			break
		}
		if err != nil {
			return err
		}
	}
	if !wait(ctx, w.final) {
		return ctx.Err()
	}
	id := fmt.Sprintf("%d-1", b.end)
	err = m.append(ctx, key, addition{last: b.last, expire: m.Keep, entries: []addend{{id, "end", w.end}}})
	if err == nil {
		m.settle(w, b)
	}
	return err
}

// resume finds out where the stream ends, and whether it has its last entry. A stream
// that has more than raid has is of another job with this number, or of a log that was
// lost since: it goes.
func (m *Mirror) resume(ctx context.Context, key string, f *Follower, b *batch) (over bool, err error) {
	err = m.call(ctx, func(ctx context.Context) error {
		found, err := m.client.XRevRangeN(ctx, key, "+", "-", 1).Result()
		if err == nil && len(found) > 0 {
			b.last, over = found[0].ID, found[0].Values["s"] == "end"
		}
		return err
	})
	if err != nil || b.last == "" {
		return false, err
	}
	at, _, _ := strings.Cut(b.last, "-")
	off, err := strconv.ParseInt(at, 10, 64)
	behind, done := f.behind(off)
	if err != nil || behind < 0 || over && (!done || behind > 0) {
		b.last = ""
		return false, m.call(ctx, func(ctx context.Context) error { return m.client.Del(ctx, key).Err() })
	}
	b.end = off
	return over, nil
}

// stands notes where a job's stream ends, and what came to it.
func (m *Mirror) stands(w *watch, b *batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	w.at = b.end
	m.workedLocked()
	m.count.entries += int64(len(b.entries))
	m.count.bytes += int64(b.size())
	m.count.gap += b.gap
	b.gap = 0
}

// flush waits for output and sends it: the first byte at once, then 32 KiB or what came
// in 50 ms, and as much as one send takes when there is no end of it.
func (m *Mirror) flush(ctx context.Context, key string, w *watch, f *Follower, b *batch) error {
	b.reset()
	if err := m.catchUp(ctx, f, b); err != nil {
		return err
	}
	c, err := f.Next(ctx)
	if err != nil {
		return outputError(ctx, err)
	}
	b.add(c)
	next, cancel := context.WithDeadline(ctx, b.sent.Add(flushEvery))
	defer cancel()
	for err == nil && b.size() < entrySize && len(b.entries) < batchMax {
		if c, err = f.Next(next); err == nil {
			b.add(c)
		}
	}
	if err == nil {
		select {
		case buf := <-m.bulk:
			own := b.data
			b.data = append(buf[:0], own...)
			defer func() { m.bulk <- b.data; b.data = own }()
		case <-ctx.Done():
			return ctx.Err()
		}
		b.fill(f)
	}
	if len(b.entries) == 0 {
		return nil // marks only
	}
	b.sent = time.Now()
	if err := m.append(ctx, key, m.addition(b)); err != nil {
		return err
	}
	b.took()
	m.stands(w, b)
	return nil
}

// outputError keeps the end of the output and of ctx apart from faults.
func outputError(ctx context.Context, err error) error {
	switch {
	case err == io.EOF:
		return errEnd
	case ctx.Err() != nil:
		return err
	}
	return fmt.Errorf("%w: %w", errOutput, err)
}

// catchUp skips what Redis would only trim again, when it is far behind. A job that
// outruns the mirror is not raced with all the time: on a machine without a core to spare
// that would be at the expense of everybody else who follows it.
func (m *Mirror) catchUp(ctx context.Context, f *Follower, b *batch) error {
	behind, done := f.behind(b.end)
	if behind <= max(outrun, 4*m.PerJob) {
		return nil
	}
	if !done {
		if !pause(ctx, rest) {
			return ctx.Err()
		}
		behind, _ = f.behind(b.end)
	}
	b.gap = behind - m.PerJob
	b.end += b.gap
	f.Skip(b.end)
	b.put("raid", fmt.Appendf(nil, "%d bytes of log were not mirrored\n", b.gap), b.end)
	return nil
}

// addition is what a batch adds to its stream. Entries are few enough that memory holds
// them even where each is a byte.
func (m *Mirror) addition(b *batch) addition {
	a := addition{last: b.last, expire: m.Keep + runningKeep, minID: b.end - m.PerJob, maxLen: m.PerJob / leastEntry}
	for _, e := range b.entries {
		a.entries = append(a.entries, addend{e.id(), e.s, b.data[e.from:e.to]})
	}
	return a
}
