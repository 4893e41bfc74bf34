package stream

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
)

// A Chunk is a piece of a job's output; End counts over all attempts.
type Chunk = spool.Chunk

// A Follower reads all output of one job, attempt after attempt. It belongs to one
// goroutine at a time.
type Follower struct {
	s    *Spools
	id   int64
	feed *feed
	err  error // of opening it
	now  bool  // ends where it would wait

	n    int           // attempt it is in, or was in last
	base int64         // where that attempt begins
	log  *spool.Log    // nil between attempts
	r    *spool.Reader // of log
	from int64         // where to start
	hide int           // lines of output that Next leaves out first
}

// Follow returns a follower of a job from its start, which need not have come yet.
// The caller closes it.
func (s *Spools) Follow(id int64) *Follower {
	f := &Follower{s: s, id: id, n: -1}
	f.feed, f.err = s.use(id)
	return f
}

// Replay returns a follower that ends with io.EOF instead of waiting: it reads what
// there is.
func (s *Spools) Replay(id int64) *Follower {
	f := s.Follow(id)
	f.now = true
	return f
}

// ended is the context of a read that must not wait.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// Next returns the next piece of output, of whatever attempt. The error is io.EOF when
// the job is finished and all was read. It looks at ctx only where it has to wait:
// with a ctx that has ended it returns what is there and then the cause.
func (f *Follower) Next(ctx context.Context) (Chunk, error) {
	if !f.now {
		return f.next(ctx)
	}
	stop := ended()
	c, err := f.next(stop)
	if err != nil && errors.Is(err, stop.Err()) {
		err = io.EOF
	}
	return c, err
}

func (f *Follower) next(ctx context.Context) (Chunk, error) {
	for {
		if err := f.open(ctx); err != nil {
			return Chunk{}, err
		}
		c, err := f.r.Next(ctx)
		if err == io.EOF {
			f.base += f.log.Size()
			f.rest()
			continue
		}
		if err != nil {
			if f.feed.gone() {
				err = errRemoved
			}
			return Chunk{}, err
		}
		c.End += f.base
		if c, ok := f.visible(c); ok {
			return c, nil
		}
	}
}

// open waits until there is an attempt to read.
func (f *Follower) open(ctx context.Context) error {
	for f.err == nil && f.r == nil {
		a, bell, err := f.feed.after(f.n)
		switch {
		case err != nil:
			return err
		case a != nil:
			f.n, f.log = a.n, a.log
			f.r = f.log.Reader(f.from - f.base)
			return nil
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return f.err
}

// rest lets go of the attempt that was read.
func (f *Follower) rest() {
	if f.r != nil {
		f.r.Close()
	}
	f.r, f.log = nil, nil
}

// visible cuts off what Tail hides.
func (f *Follower) visible(c Chunk) (Chunk, bool) {
	if f.hide == 0 {
		return c, true
	}
	if c.Kind != job.Out && c.Kind != job.Err {
		return c, false
	}
	for f.hide > 0 {
		i := bytes.IndexByte(c.Data, '\n')
		if i < 0 {
			return c, false
		}
		c.Data = c.Data[i+1:]
		f.hide--
	}
	return c, len(c.Data) > 0
}

// Skip moves to an offset over all attempts, one that a Chunk.End had or one that is
// yet to come, forwards or back.
func (f *Follower) Skip(offset int64) {
	f.rest()
	f.n, f.base, f.from, f.hide = -1, 0, max(offset, 0), 0
}

// Tail moves to the last lines of what there is: lines of stdout and stderr, as they
// were printed, and all that was said since the one before them. It reads all there is
// and does not wait; memory does not depend on lines. ctx ends a long read.
func (f *Follower) Tail(ctx context.Context, lines int) error {
	f.Skip(0)
	total, partial, stop := 0, false, ended()
	for {
		c, err := f.next(stop)
		switch {
		case err == io.EOF || err != nil && errors.Is(err, stop.Err()):
			if partial {
				total++
			}
			f.Skip(0)
			f.hide = max(total-max(lines, 0), 0)
			return nil
		case err != nil:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case (c.Kind == job.Out || c.Kind == job.Err) && len(c.Data) > 0:
			total += bytes.Count(c.Data, []byte{'\n'})
			partial = c.Data[len(c.Data)-1] != '\n'
		}
	}
}

// behind returns how many bytes of log are there beyond offset, and whether the job is
// finished.
func (f *Follower) behind(offset int64) (n int64, done bool) {
	if f.feed == nil {
		return 0, false
	}
	size, done := f.feed.size()
	return size - offset, done
}

// Close ends the follower. It may be called again.
func (f *Follower) Close() error {
	f.rest()
	if f.feed != nil {
		f.s.unuse(f.id, f.feed)
		f.feed = nil
	}
	f.err = errClosed
	return nil
}
