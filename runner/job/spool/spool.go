// Package spool keeps the log of one attempt on disk, so that a job waits for
// nothing but a local write and everybody else follows at their own pace.
//
// A log is the frames of package job (out, err, raid, mark) one after the other,
// exactly as they came. An offset into it is *logical*: the bytes of frames since
// the attempt began, dropped ones included. Runner and raid keep the same frames,
// so raid's log is a prefix of the runner's and resuming is one number, [Log.Size].
//
// On disk a log is a folder of segments. A segment is named by the logical offset
// of its first byte, "%016x.seg", and is cut between frames. Where bytes are missing
// before a segment the name also says from where: "%016x-%016x.seg", start and the
// first byte missing. So the chain of names and sizes proves itself: a segment that
// a power cut left short shows as a broken chain, and the log is cut back to there.
// An empty file "sealed" says that the log is complete. Another process can show
// the same files if it is told when they grow: [Log.Share].
//
// Over the limit the middle goes: the first half and the newest half stay.
//
// Promises: a reader never slows Append; every reader sees the same bytes; memory
// does not grow with the log, its frames, or readers that wait; what a log holds
// survives the death of the process, and after Sync or Seal a power cut.
// Non-goals: two writers of one folder, and looking into payloads.
package spool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/rai-project/raid/runner/job"
)

// ErrSealed is returned by Append for a log that is complete.
var ErrSealed = errors.New("spool: log is sealed")

const (
	minSegment  = 4 << 10
	maxSegment  = 64 << 20
	maxSegments = 1024    // so that a peer who sends gaps only cannot fill a folder
	ahead       = 8 << 20 // the disk begins with this much at a time, so that Seal finds little to do
	maxEnd      = 1 << 56 // of logical offsets: sums of a few stay far from overflow
	gapLen      = job.HeaderLen + 8
	sealedName  = "sealed"
)

// Options of a log.
type Options struct {
	// Limit is how many bytes of frames stay on disk: the first half and the newest
	// half. A segment that would be a sixteenth of it is never smaller than 4 KiB,
	// and a single frame is never cut, so it may be exceeded by that much. 0: all, up
	// to 64 GiB.
	Limit int64
}

// A Log is one attempt's log, open for appending. All methods are safe for
// concurrent use.
type Log struct {
	dir string

	append sync.Mutex // held by what changes the log, also while it writes; taken before mu
	limit  int64      // guarded by append
	from   string     // the folder of the log that Share named; guarded by append
	wrote  bool       // it was appended to, so the current segment is ours; guarded by append

	mu     sync.Mutex // guards the following; never held during a read, write or fsync of data
	segs   []*segment // ascending; the last is the one that grows
	kept   int64      // bytes in segs
	sealed bool
	closed bool
	named  bool          // names changed since the folder was last synced
	bell   chan struct{} // closed when there is news; nil while nobody waits

	buffers sync.Pool // of *[]byte, bulk long
}

// Open opens the log in dir, which it makes (0700) if need be. A log that was not
// sealed is cut back to its last whole frame; whatever was there before that is kept.
// The caller closes the log. Only one Log of a folder may be open.
func Open(dir string, o Options) (*Log, error) {
	l := &Log{dir: dir, limit: o.Limit}
	l.buffers.New = func() any { b := make([]byte, bulk); return &b }
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	if err := l.recover(); err != nil {
		return nil, fmt.Errorf("open spool %s: %w", dir, err)
	}
	return l, nil
}

// stored reports whether frames of kind k are kept as bytes.
func stored(k job.Kind) bool { return k.Logged() && k != job.Gap }

// Append adds whole frames, one or many, of kinds that are Logged; readers see them
// at once. A job.Gap frame is not kept as bytes: it moves the end on by its count.
// Malformed input is an error and changes nothing. After an error of the disk the
// log ends after some whole frame of the input; Size says where, and Append may be
// called again with the rest.
func (l *Log) Append(frames []byte) error {
	l.append.Lock()
	defer l.append.Unlock()
	if err := l.writable(); err != nil {
		return err
	}
	if l.from != "" {
		return fmt.Errorf("append to spool: %w", ErrApart) // or two would write one file
	}
	if err := check(frames, l.Size()); err != nil {
		return err
	}
	for len(frames) > 0 {
		n, err := l.appendSome(frames)
		if err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
		frames, l.wrote = frames[n:], true
	}
	return nil
}

func (l *Log) writable() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.sealed:
		return ErrSealed
	case l.closed:
		return fmt.Errorf("append to spool: %w", fs.ErrClosed)
	}
	return nil
}

// check looks at every header of frames, which are to follow offset end.
func check(frames []byte, end int64) error {
	for at := 0; at < len(frames); {
		k, n, err := job.ParseHeader(frames[at:])
		rest := len(frames) - at - job.HeaderLen
		switch {
		case err != nil:
			return fmt.Errorf("append to spool: byte %d: %w", at, err)
		case !k.Logged():
			return fmt.Errorf("append to spool: byte %d: %w: kind %q is not logged", at, job.ErrFrame, byte(k))
		case n > rest:
			return fmt.Errorf("append to spool: byte %d: %w: %d of %d bytes", at, job.ErrFrame, rest, n)
		}
		step := uint64(job.HeaderLen + n)
		if k == job.Gap {
			if n != gapLen-job.HeaderLen {
				return fmt.Errorf("append to spool: byte %d: %w: gap of %d bytes", at, job.ErrFrame, n)
			}
			step = binary.BigEndian.Uint64(frames[at+job.HeaderLen:])
		}
		if step == 0 || end > maxEnd || step > uint64(maxEnd-end) {
			return fmt.Errorf("append to spool: byte %d: %w: %d bytes more", at, job.ErrFrame, step)
		}
		at, end = at+job.HeaderLen+n, end+int64(step)
	}
	return nil
}

// appendSome adds the first of the frames, checked ones, and returns how many bytes
// of them it took: a gap, or as many frames as the current segment has room for.
func (l *Log) appendSome(frames []byte) (int, error) {
	if job.Kind(frames[0]) == job.Gap {
		return gapLen, l.skip(int64(binary.BigEndian.Uint64(frames[job.HeaderLen:])))
	}
	n := l.fit(frames)
	if n == 0 {
		return 0, l.rotate(0)
	}
	return n, l.write(frames[:n])
}

// fit returns the length of the frames that go into the current segment; an empty
// one takes at least one frame, or a large frame would fit nowhere.
func (l *Log) fit(frames []byte) int {
	s := l.current()
	room, n := l.room(s)-s.size, 0
	for n < len(frames) && job.Kind(frames[n]) != job.Gap {
		_, size, _ := job.ParseHeader(frames[n:])
		next := n + job.HeaderLen + size
		if int64(next) > room && (n > 0 || s.size > 0) {
			break
		}
		n = next
	}
	return n
}

// write puts whole frames at the end of the current segment and shows them.
func (l *Log) write(frames []byte) error {
	s := l.current()
	if _, err := s.file.WriteAt(frames, s.size); err != nil {
		s.file.Truncate(s.size) // gives the space back; the next write goes over it anyway
		return err
	}
	l.mu.Lock()
	s.size += int64(len(frames))
	l.kept += int64(len(frames))
	l.ringLocked()
	l.mu.Unlock()
	if s.size-s.pushed >= ahead {
		writeBack(s.file, s.pushed, s.size-s.pushed)
		s.pushed = s.size
	}
	return nil
}

// skip moves the end on by n bytes that are not there.
func (l *Log) skip(n int64) error {
	s := l.current()
	if s.size > 0 {
		return l.rotate(n)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	moved := segment{start: s.start + n, hole: s.hole}
	if err := os.Rename(l.path(s), l.path(&moved)); err != nil {
		return err
	}
	s.start, l.named = moved.start, true
	l.ringLocked()
	return nil
}

// SetLimit changes Options.Limit for what is appended from now on.
func (l *Log) SetLimit(limit int64) {
	l.append.Lock()
	defer l.append.Unlock()
	l.limit = limit
}

// Size returns the logical end: where the next frame will begin.
func (l *Log) Size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sizeLocked()
}

func (l *Log) sizeLocked() int64 {
	if len(l.segs) == 0 {
		return 0
	}
	return l.current().end()
}

// Await returns Size once that is beyond n. The error is as a reader's at the end.
func (l *Log) Await(ctx context.Context, n int64) (int64, error) {
	for {
		l.mu.Lock()
		size, sealed, closed := l.sizeLocked(), l.sealed, l.closed
		var bell chan struct{}
		if size <= n && !sealed && !closed {
			bell = l.bellLocked()
		}
		l.mu.Unlock()
		switch {
		case size > n:
			return size, nil
		case sealed:
			return size, io.EOF
		case closed:
			return size, errClosed
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return size, context.Cause(ctx)
		}
	}
}

// Dropped returns how many of the bytes before Size are no longer, or never were, here.
func (l *Log) Dropped() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sizeLocked() - l.kept
}

// Sealed reports whether the log is complete.
func (l *Log) Sealed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sealed
}

// Sync returns once all that was appended before the call survives a power cut.
// It does not hold up Append.
func (l *Log) Sync() error {
	if err := l.syncData(); err != nil {
		return fmt.Errorf("sync spool: %w", err)
	}
	l.mu.Lock()
	named := l.named
	l.named = false
	l.mu.Unlock()
	if !named {
		return nil
	}
	if err := syncDirs(l.dir, filepath.Dir(l.dir)); err != nil {
		l.mu.Lock()
		l.named = true
		l.mu.Unlock()
		return fmt.Errorf("sync spool: %w", err)
	}
	return nil
}

// Seal says that the log is complete: it survives a power cut, Append is refused from
// now on, and readers get io.EOF at the end. It may be called again.
func (l *Log) Seal() error {
	l.append.Lock()
	defer l.append.Unlock()
	switch err := l.writable(); {
	case errors.Is(err, ErrSealed):
		return nil
	case err != nil:
		return fmt.Errorf("seal spool: %w", fs.ErrClosed)
	}
	if err := l.part(); err != nil {
		return fmt.Errorf("seal spool: %w", err)
	}
	// The data first: a marker without its data would make a short log look whole.
	if err := l.syncData(); err != nil {
		return fmt.Errorf("seal spool: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(l.dir, sealedName), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("seal spool: %w", err)
	}
	f.Close()
	if err := syncDirs(l.dir, filepath.Dir(l.dir)); err != nil {
		return fmt.Errorf("seal spool: %w", err)
	}
	l.mu.Lock()
	l.sealed = true
	l.ringLocked()
	l.mu.Unlock()
	l.release(l.current())
	return nil
}

// Close ends appending. Readers of a log that is not sealed get fs.ErrClosed once they
// have read what is there; readers of a sealed one go on. It may be called again.
func (l *Log) Close() error {
	l.append.Lock()
	defer l.append.Unlock()
	l.mu.Lock()
	idle := l.sealed || l.closed
	l.closed = true
	l.ringLocked()
	l.mu.Unlock()
	if !idle {
		l.release(l.current())
	}
	return nil
}

// ringLocked wakes everybody who waits.
func (l *Log) ringLocked() {
	if l.bell != nil {
		close(l.bell)
		l.bell = nil
	}
}

// bellLocked returns what the next ring will close.
func (l *Log) bellLocked() chan struct{} {
	if l.bell == nil {
		l.bell = make(chan struct{})
	}
	return l.bell
}
