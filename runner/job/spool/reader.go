package spool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/rai-project/raid/runner/job"
)

const (
	piece = 32 << 10  // largest Chunk of out or err; x/crypto sends packets of this size
	small = 4 << 10   // buffer of a reader that trails live output
	bulk  = 128 << 10 // buffer of a reader with a lot to catch up on
)

var (
	errBoundary = errors.New("spool: offset is not the start of a frame")
	errClosed   = fmt.Errorf("spool: %w", fs.ErrClosed)
)

// A Chunk is a piece of a log.
type Chunk struct {
	Kind job.Kind // Out, Err, Raid, Mark or Gap
	// Data is valid until the reader's next call. Out and Err come in pieces of at
	// most 32 KiB that know no frames: neighbours are merged, large ones cut. Raid
	// and Mark are one frame each, whole, perhaps empty. Gap has none.
	Data    []byte
	End     int64 // logical offset after it; a Reader may start there
	Dropped int64 // of a Gap: how many bytes of log, headers included, are missing here
}

// A Reader is a cursor in a Log. It belongs to one goroutine at a time; its log may
// have any number. While it waits it holds no buffer, and a file only that the log
// has open anyway.
type Reader struct {
	log *Log
	pos int64 // logical offset of the next byte to hand out

	seg  *segment // acquired; nil between segments
	file *os.File // of seg
	end  int64    // logical offset up to which seg may be read

	kind job.Kind // of the frame that pos stands in,
	left int      // and how much of its payload is to come; 0 between frames

	buf    []byte // nil while waiting
	pooled *[]byte
	rd, wr int // buf[rd:wr] are the bytes at pos
}

// Reader returns a reader that starts at the logical offset from: the start of a
// frame, a Chunk.End, or a place further on that the log has yet to reach. The
// caller closes it.
func (l *Log) Reader(from int64) *Reader { return &Reader{log: l, pos: max(from, 0)} }

// Next returns the next piece. At the end of a sealed log the error is io.EOF, of one
// that was closed fs.ErrClosed. It looks at ctx only where it has to wait: with a ctx
// that has ended it returns what is there and then the cause.
func (r *Reader) Next(ctx context.Context) (Chunk, error) {
	for {
		if r.left > 0 && r.wr > r.rd {
			if err := r.top(); err != nil {
				return Chunk{}, err
			}
			return r.run(), nil
		}
		need := job.HeaderLen
		if r.left > 0 {
			need = 1
		} else if r.wr-r.rd >= job.HeaderLen {
			k, n, err := job.ParseHeader(r.buf[r.rd:r.wr])
			switch {
			case err != nil || !stored(k):
				return r.damaged(), nil
			case k == job.Out || k == job.Err:
				r.kind, r.left = k, n
				r.advance(job.HeaderLen)
				continue
			case r.wr-r.rd >= job.HeaderLen+n:
				r.advance(job.HeaderLen)
				data := r.buf[r.rd : r.rd+n]
				r.advance(n)
				return Chunk{Kind: k, Data: data, End: r.pos}, nil
			}
			need = job.HeaderLen + n
		}
		gap, err := r.locate(ctx)
		if err != nil {
			return Chunk{}, err
		}
		if gap > 0 {
			return Chunk{Kind: job.Gap, Dropped: gap, End: r.pos}, nil
		}
		if r.pos+int64(r.wr-r.rd) < r.end {
			if err := r.fill(need); err != nil {
				return Chunk{}, err
			}
		}
	}
}

// top reads on when what is left in the buffer would make a short piece although the
// segment has more: a short piece costs as many packets as eight full ones.
func (r *Reader) top() error {
	if r.wr-r.rd >= piece {
		return nil
	}
	if next := r.pos + int64(r.wr-r.rd); next >= r.end {
		r.log.mu.Lock()
		r.end = r.seg.end()
		r.log.mu.Unlock()
		if next >= r.end {
			return nil
		}
	}
	return r.fill(int(min(piece+job.HeaderLen, r.end-r.pos)))
}

// run returns the out or err bytes at pos, with those of the frames after it that are
// of the same kind and in the buffer. They are moved together over the headers.
func (r *Reader) run() Chunk {
	n := min(r.left, r.wr-r.rd, piece)
	from, to := r.rd, r.rd+n
	r.advance(n)
	r.left -= n
	for r.left == 0 && to-from < piece && r.wr-r.rd >= job.HeaderLen {
		k, n, err := job.ParseHeader(r.buf[r.rd:r.wr])
		if err != nil || k != r.kind {
			break
		}
		r.advance(job.HeaderLen)
		take := min(n, r.wr-r.rd, piece-(to-from))
		copy(r.buf[to:], r.buf[r.rd:r.rd+take])
		r.advance(take)
		to += take
		r.left = n - take
	}
	return Chunk{Kind: r.kind, Data: r.buf[from:to], End: r.pos}
}

func (r *Reader) advance(n int) { r.rd, r.pos = r.rd+n, r.pos+int64(n) }

// damaged gives up the rest of a segment whose bytes are not frames: the disk lied.
// What follows it is still good, so it is a gap and not the end.
func (r *Reader) damaged() Chunk {
	gap := r.end - r.pos
	r.pos, r.left, r.rd, r.wr = r.end, 0, 0, 0
	return Chunk{Kind: job.Gap, Dropped: gap, End: r.pos}
}

// locate waits until there are bytes after those in the buffer and sets seg, file and
// end to where they are. If what is at pos was dropped it moves pos on and says by how
// much.
func (r *Reader) locate(ctx context.Context) (gap int64, err error) {
	for {
		bell, gap, err := r.look()
		if bell == nil || err != nil {
			return gap, err
		}
		r.free()
		select {
		case <-bell:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// look does locate's work as far as it goes without waiting, else it returns what to
// wait for. A reader that waits stays in its segment, or it would have to find its
// place in there again.
func (r *Reader) look() (bell chan struct{}, gap int64, err error) {
	l, next := r.log, r.pos+int64(r.wr-r.rd)
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.seg != nil {
		if r.end = r.seg.end(); next < r.end {
			return nil, 0, nil
		}
		if next > r.pos || r.left > 0 {
			if gap = r.leaveLocked(); gap > 0 {
				return nil, gap, nil
			}
		}
	}
	s := l.findLocked(r.pos)
	if s == nil && !l.sealed && !l.closed {
		return l.bellLocked(), 0, nil
	}
	r.leaveLocked()
	switch {
	case s == nil && l.sealed:
		return nil, 0, io.EOF
	case s == nil:
		return nil, 0, errClosed
	case s.start > r.pos:
		gap, r.pos = s.start-r.pos, s.start
		return nil, gap, nil
	}
	if r.file, err = l.acquireLocked(s); err != nil {
		return nil, 0, fmt.Errorf("read spool: %w", err)
	}
	r.seg, r.end = s, s.end()
	if r.pos == s.start {
		return nil, 0, nil
	}
	l.mu.Unlock()
	defer l.mu.Lock()
	gap, err = r.enter()
	return nil, gap, err
}

// leaveLocked lets go of a segment that was read to its end. Bytes left over are half
// a frame, which only a damaged segment has; they count as dropped.
func (r *Reader) leaveLocked() (gap int64) {
	if r.seg == nil {
		return 0
	}
	gap = int64(r.wr - r.rd)
	r.pos, r.left, r.rd, r.wr = r.pos+gap, 0, 0, 0
	r.log.releaseLocked(r.seg)
	r.seg, r.file = nil, nil
	return gap
}

// enter finds out which frame of seg pos stands in.
func (r *Reader) enter() (gap int64, err error) {
	want := r.pos - r.seg.start
	at, err := scan(r.file, want)
	if err != nil {
		return 0, fmt.Errorf("read spool: %w", err)
	}
	if at == want {
		return 0, nil
	}
	var h [job.HeaderLen]byte
	if _, err := r.file.ReadAt(h[:], at); err != nil {
		return r.damaged().Dropped, nil
	}
	k, n, err := job.ParseHeader(h[:])
	if err != nil || !stored(k) {
		return r.damaged().Dropped, nil
	}
	// Inside a header, or inside a frame that is never cut: begin with the frame.
	if in := want - at - job.HeaderLen; in < 0 || k != job.Out && k != job.Err {
		r.pos = r.seg.start + at
	} else {
		r.kind, r.left = k, n-int(in)
	}
	return 0, nil
}

// fill reads on until the buffer holds at least need bytes at pos or all there are.
func (r *Reader) fill(need int) error {
	from := r.pos + int64(r.wr-r.rd)
	r.reserve(need, r.end-r.pos)
	n, err := r.file.ReadAt(r.buf[r.wr:min(int64(len(r.buf)), int64(r.wr)+r.end-from)], from-r.seg.start)
	r.wr += n
	if n == 0 && err != nil {
		return fmt.Errorf("read spool: %w", err)
	}
	return nil
}

// reserve makes room after the unread bytes, in a buffer that suits need and what
// there is to read: a reader that trails live output gets a small one.
func (r *Reader) reserve(need int, avail int64) {
	held := r.buf[r.rd:r.wr]
	want := max(need, small)
	if avail > small {
		want = max(need, bulk)
	}
	if len(r.buf) < want {
		pooled := r.pooled
		if r.pooled = nil; want == bulk {
			r.pooled = r.log.buffers.Get().(*[]byte)
			r.buf = *r.pooled
		} else {
			r.buf = make([]byte, want)
		}
		defer r.putBack(pooled) // after held was copied
	}
	r.rd, r.wr = 0, copy(r.buf, held)
}

func (r *Reader) putBack(b *[]byte) {
	if b != nil {
		r.log.buffers.Put(b)
	}
}

// free gives the buffer up. It holds nothing unread: half a frame is never published.
func (r *Reader) free() {
	r.putBack(r.pooled)
	r.buf, r.pooled, r.rd, r.wr = nil, nil, 0, 0
}

// ReadRaw reads whole frames into buf, as they were appended, and missing bytes as a
// job.Gap frame, so that the bytes may be appended to another log. The reader must
// stand between frames; a buf of job.HeaderLen + job.MaxFrame always suffices, and for
// one too small the error is io.ErrShortBuffer. Otherwise it is as Next.
func (r *Reader) ReadRaw(ctx context.Context, buf []byte) (int, error) {
	if len(buf) < gapLen {
		return 0, io.ErrShortBuffer
	}
	r.rd, r.wr = 0, 0 // only a cache; pos counts
	gap, err := r.locate(ctx)
	switch {
	case err != nil:
		return 0, err
	case gap > 0:
		return putGap(buf, gap), nil
	case r.left > 0:
		return 0, errBoundary
	}
	n, err := r.file.ReadAt(buf[:min(int64(len(buf)), r.end-r.pos)], r.pos-r.seg.start)
	if n == 0 && err != nil {
		return 0, fmt.Errorf("read spool: %w", err)
	}
	whole, err := wholeFrames(buf[:n])
	switch {
	case whole == 0 && err != nil:
		return putGap(buf, r.damaged().Dropped), nil
	case whole == 0 && r.pos+int64(n) < r.end:
		return 0, io.ErrShortBuffer
	case whole == 0: // a frame longer than its segment
		return putGap(buf, r.damaged().Dropped), nil
	}
	r.pos += int64(whole)
	return whole, nil
}

func putGap(buf []byte, gap int64) int {
	job.PutHeader(buf, job.Gap, gapLen-job.HeaderLen)
	binary.BigEndian.PutUint64(buf[job.HeaderLen:], uint64(gap))
	return gapLen
}

// wholeFrames returns the length of the whole frames that b begins with, and an error
// if what follows them is none.
func wholeFrames(b []byte) (int, error) {
	at := 0
	for len(b)-at >= job.HeaderLen {
		k, n, err := job.ParseHeader(b[at:])
		if err == nil && !stored(k) {
			err = job.ErrFrame
		}
		if err != nil {
			return at, err
		}
		if n > len(b)-at-job.HeaderLen {
			break
		}
		at += job.HeaderLen + n
	}
	return at, nil
}

// Close gives up what the reader holds. It may be called again.
func (r *Reader) Close() error {
	r.free()
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	r.leaveLocked()
	return nil
}
