package spool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// tmpName is where a file of ours is before it has its name.
const tmpName = "tmp"

// ErrApart is returned by Share for a log that cannot show the other one's files: it
// holds frames of its own, or the other is gone, out of reach or on another disk.
var ErrApart = errors.New("spool: logs cannot share files")

// Share makes l show the log in dir, which another process on this machine appends to
// and trims under the same limit: from now on l holds hard links to the segments there,
// and [Log.Grow] takes the place of Append. Only a log that is empty, or that shared
// with dir before, also in an earlier process, can; the error is else ErrApart, and from
// then on l goes its own way: Append adds to what it has. The writer must be trusted as far as a caller of Append, for what
// it wrote is not checked again.
func (l *Log) Share(dir string) error {
	l.append.Lock()
	defer l.append.Unlock()
	if err := l.writable(); err != nil {
		return err
	}
	err := l.share(dir)
	switch {
	case err == nil:
		l.wrote = false // the writer goes on in the current segment
	case errors.Is(err, ErrApart):
		if perr := l.part(); perr != nil {
			return fmt.Errorf("share spool: %w", perr)
		}
		l.from = ""
	}
	return err
}

func (l *Log) share(dir string) error {
	from, err := segments(dir)
	if err != nil || len(from) == 0 {
		return fmt.Errorf("%w: nothing in %s: %v", ErrApart, dir, err)
	}
	cur := l.current()
	switch shared, err := l.same(dir, from); {
	case err != nil:
		return err
	case shared:
		l.from = dir
		return nil
	case cur.end() > 0:
		return fmt.Errorf("%w: %s is not what it begins with", ErrApart, dir)
	}
	if err := l.link(dir, from[0], cur); err != nil {
		return fmt.Errorf("%w: %v", ErrApart, err)
	}
	l.from = dir
	return nil
}

// same reports whether the current segment is one of those in dir.
func (l *Log) same(dir string, from []*segment) (bool, error) {
	cur := l.current()
	mine, err := cur.file.Stat()
	if err != nil {
		return false, fmt.Errorf("share spool: %w", err)
	}
	for _, s := range from {
		if s.start != cur.start {
			continue
		}
		theirs, err := os.Stat(filepath.Join(dir, s.name()))
		return err == nil && os.SameFile(mine, theirs), nil
	}
	return false, nil
}

// segments returns those in dir by their start.
func segments(dir string) ([]*segment, error) {
	other := Log{dir: dir}
	return other.list()
}

// Grow shows readers the frames up to the logical offset end, where the log that Share
// named has a frame that ends. Less than what is shown already is no error.
func (l *Log) Grow(end int64) error {
	l.append.Lock()
	defer l.append.Unlock()
	if err := l.writable(); err != nil {
		return err
	}
	for tries := 0; l.Size() < end; tries++ {
		if l.from == "" || tries > maxSegments {
			return fmt.Errorf("grow spool to %d: %w", end, ErrApart)
		}
		if err := l.reach(end); err != nil && !errors.Is(err, fs.ErrNotExist) { // renamed meanwhile: look again
			return fmt.Errorf("grow spool: %w", err)
		}
	}
	return nil
}

// reach shows what the current segment has up to end, or links the next one. While the
// current one is empty its writer may still move it, so then its name counts as well.
func (l *Log) reach(end int64) error {
	cur := l.current()
	info, err := cur.file.Stat()
	if err != nil {
		return err
	}
	enough := cur.start+info.Size() >= end
	if cur.size > 0 && enough {
		l.show(cur, end-cur.start)
		return nil
	}
	from, err := segments(l.from)
	if err != nil {
		return err
	}
	sure := cur.size > 0
	for _, next := range from {
		switch {
		case next.start < cur.start:
			continue
		case next.start == cur.start && enough:
			l.show(cur, end-cur.start)
			return nil
		case next.start == cur.start:
			sure = true
			continue
		}
		if sure {
			if err := l.finish(cur, next); err != nil {
				return err
			}
		}
		return l.link(l.from, next, cur)
	}
	return fmt.Errorf("%w: %s ends before %d", ErrApart, l.from, end)
}

// finish shows all of s: the writer has gone on to next, so it is final by now.
func (l *Log) finish(s, next *segment) error {
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	if next.hole > s.start {
		size = min(size, next.hole-s.start)
	}
	l.show(s, size)
	return nil
}

// show makes the first size bytes of s readable.
func (l *Log) show(s *segment, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept += size - s.size
	s.size = size
	l.ringLocked()
}

// link makes the segment that dir has as next our current one, after cur; an empty cur
// makes way for it.
func (l *Log) link(dir string, next, cur *segment) error {
	s := &segment{start: next.start, hole: cur.end()}
	if cur.size == 0 {
		s.hole = cur.hole
	}
	tmp := filepath.Join(l.dir, tmpName)
	os.Remove(tmp) // of an earlier process
	if err := os.Link(filepath.Join(dir, next.name()), tmp); err != nil {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR, 0)
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	l.mu.Lock()
	if err := os.Rename(tmp, l.path(s)); err != nil {
		l.mu.Unlock()
		return errors.Join(err, f.Close())
	}
	if cur.size == 0 {
		if s.name() != cur.name() {
			os.Remove(l.path(cur))
		}
		l.segs = l.segs[:len(l.segs)-1]
	}
	s.file, s.users = f, 1
	l.segs = append(l.segs, s)
	l.named = true
	l.ringLocked()
	l.mu.Unlock()
	l.release(cur)
	return l.trim()
}

// part makes a copy of the current segment when its other owner may still append to
// it: a log that is sealed, or that is appended to, must not grow by itself. The writer
// keeps its file: nobody else appends to that, and it is by the file that a log which
// shares it knows it again.
func (l *Log) part() error {
	cur := l.current()
	if l.wrote || !linked(cur.file) {
		return nil
	}
	if _, err := os.Stat(filepath.Join(l.from, sealedName)); l.from != "" && err == nil {
		return nil // it will not
	}
	tmp := filepath.Join(l.dir, tmpName)
	os.Remove(tmp) // never write into a link
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, io.NewSectionReader(cur.file, 0, cur.size)); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := os.Rename(tmp, l.path(cur)); err != nil {
		return errors.Join(err, f.Close())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	// Readers hold the file they acquired; the bytes are the same in both.
	l.segs[len(l.segs)-1] = &segment{start: cur.start, hole: cur.hole, size: cur.size, file: f, users: 1}
	l.releaseLocked(cur)
	l.named = true
	return nil
}
