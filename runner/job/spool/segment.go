package spool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/rai-project/raid/runner/job"
)

// A segment is one file. start and hole change only while it is empty.
type segment struct {
	start  int64    // logical offset of its first byte
	hole   int64    // what is missing before it begins here; start when nothing is
	size   int64    // whole frames that readers may see
	synced int64    // bytes of it known to be on the platter
	pushed int64    // bytes of it the disk was asked to begin with; guarded by append
	file   *os.File // nil while nobody uses it
	users  int      // of file
}

func (s *segment) end() int64 { return s.start + s.size }

func (s *segment) name() string {
	if s.hole == s.start {
		return fmt.Sprintf("%016x.seg", s.start)
	}
	return fmt.Sprintf("%016x-%016x.seg", s.start, s.hole)
}

// parseName reads what name wrote; sizes are the caller's business.
func parseName(name string) (*segment, bool) {
	base, ok := strings.CutSuffix(name, ".seg")
	if !ok {
		return nil, false
	}
	var s segment
	start, hole, gap := strings.Cut(base, "-")
	if _, err := fmt.Sscanf(start, "%x", &s.start); err != nil {
		return nil, false
	}
	s.hole = s.start
	if gap {
		if _, err := fmt.Sscanf(hole, "%x", &s.hole); err != nil {
			return nil, false
		}
	}
	// Only what name writes is ours, and it keeps the numbers in their bounds.
	return &s, s.name() == name && s.hole >= 0 && s.hole <= s.start && s.start <= maxEnd
}

func (l *Log) path(s *segment) string { return filepath.Join(l.dir, s.name()) }

// recover finds the chain of segments in the folder and makes its last one the
// current one, or makes the first.
func (l *Log) recover() error {
	found, err := l.list()
	if err != nil {
		return err
	}
	n := chain(found)
	for _, s := range found[:n] {
		l.kept += s.size
	}
	l.segs = found[:n]
	if l.sealed {
		return nil
	}
	for _, s := range found[n:] {
		if err := os.Remove(l.path(s)); err != nil {
			return err
		}
	}
	l.named = true
	if n == 0 {
		return l.create(&segment{})
	}
	return l.cut()
}

// list returns the segments in the folder by their start, sizes as they are on disk.
func (l *Log) list() ([]*segment, error) {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return nil, err
	}
	var found []*segment
	for _, e := range entries {
		if e.Name() == sealedName {
			l.sealed = true
		}
		s, ok := parseName(e.Name())
		if !ok || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		s.size = info.Size()
		found = append(found, s)
	}
	sort.Slice(found, func(i, j int) bool { return found[i].start < found[j].start })
	return found, nil
}

// chain returns how many of the segments follow each other as their names say. The
// first that does not was written after bytes that a power cut took away.
func chain(segs []*segment) int {
	var end int64
	for i, s := range segs {
		if s.hole > end || s.start < end {
			return i
		}
		end = s.end()
	}
	return len(segs)
}

// cut opens the last segment and takes a torn frame off its end.
func (l *Log) cut() error {
	s := l.segs[len(l.segs)-1]
	f, err := os.OpenFile(l.path(s), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	whole, err := scan(f, s.size)
	if err == nil && whole < s.size && !linked(f) { // the other owner may be in the middle of that frame
		err = f.Truncate(whole)
	}
	if err != nil {
		f.Close()
		return err
	}
	l.kept -= s.size - whole
	s.size, s.file, s.users = whole, f, 1
	return nil
}

// scan returns where the last whole, well-formed frame ends that ends at or before
// limit.
func scan(f *os.File, limit int64) (int64, error) {
	var (
		buf  [16 << 10]byte
		have []byte // the bytes at off
		off  int64
	)
	for {
		if len(have) < job.HeaderLen {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), limit-off)], off)
			if err != nil && err != io.EOF {
				return off, err
			}
			if n < job.HeaderLen {
				return off, nil
			}
			have = buf[:n]
		}
		k, n, err := job.ParseHeader(have)
		next := off + job.HeaderLen + int64(n)
		if err != nil || !stored(k) || next > limit {
			return off, nil
		}
		have = have[min(int64(len(have)), next-off):]
		off = next
	}
}

// current is the segment that grows. Its fields may be read under append alone,
// because only holders of append change them.
func (l *Log) current() *segment { return l.segs[len(l.segs)-1] }

// room returns how large s may become: the first half of the log ends with a
// segment of its own, as close to half the limit as frames allow.
func (l *Log) room(s *segment) int64 {
	if half := l.limit / 2; s.start < half && l.kept == s.end() {
		return min(l.segmentSize(), half-s.start)
	}
	return l.segmentSize()
}

func (l *Log) segmentSize() int64 {
	if l.limit == 0 {
		return maxSegment
	}
	return min(max(l.limit/16, minSegment), maxSegment)
}

// rotate begins a new segment, gap bytes after the current one, and makes room for it.
func (l *Log) rotate(gap int64) error {
	old := l.current()
	if err := l.create(&segment{start: old.end() + gap, hole: old.end()}); err != nil {
		return err
	}
	l.release(old)
	return l.trim()
}

// create makes the file of s and s the current segment.
func (l *Log) create(s *segment) error {
	f, err := os.OpenFile(l.path(s), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	s.file, s.users = f, 1
	l.mu.Lock()
	defer l.mu.Unlock()
	l.segs = append(l.segs, s)
	l.named = true
	l.ringLocked()
	return nil
}

// trim drops segments from the middle until a whole new one fits under the limit.
func (l *Log) trim() error {
	for l.over() {
		h := l.head()
		if h >= len(l.segs)-1 || l.tail(h+1) < l.limit/4 && len(l.segs) <= maxSegments {
			return nil // frames larger than a small limit's share: the last words count for more than the limit
		}
		if err := l.drop(h); err != nil {
			return err
		}
	}
	return nil
}

func (l *Log) over() bool {
	return l.limit > 0 && l.kept+l.segmentSize() > l.limit || len(l.segs) > maxSegments
}

// tail is how many bytes the segments from i on hold.
func (l *Log) tail(i int) (n int64) {
	for _, s := range l.segs[i:] {
		n += s.size
	}
	return n
}

// head counts the segments of the first half: those in one piece with the start.
func (l *Log) head() int {
	var end int64
	for i, s := range l.segs {
		if s.start != end || i > 0 && (s.end() > l.limit/2 || i >= maxSegments/2) {
			return i
		}
		end = s.end()
	}
	return len(l.segs)
}

// drop removes segment i, not the last. The name of its neighbour says so first, so
// that the chain holds whenever the process dies. Readers that are in it finish it.
func (l *Log) drop(i int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	gone, next := l.segs[i], l.segs[i+1]
	moved := segment{start: next.start, hole: gone.hole}
	// Under mu, or a reader could look for the name that was.
	if err := os.Rename(l.path(next), l.path(&moved)); err != nil {
		return err
	}
	next.hole, l.named = gone.hole, true
	l.segs = append(l.segs[:i:i], l.segs[i+1:]...)
	l.kept -= gone.size
	return os.Remove(l.path(gone))
}

// findLocked returns the first segment with a byte at or after pos, or that begins after
// pos, or nil.
func (l *Log) findLocked(pos int64) *segment {
	i := sort.Search(len(l.segs), func(i int) bool { return l.segs[i].end() > pos || l.segs[i].start > pos })
	if i == len(l.segs) {
		return nil
	}
	return l.segs[i]
}

// acquireLocked returns the file of s, opened if nobody has it open. Every acquire
// needs a release.
func (l *Log) acquireLocked(s *segment) (*os.File, error) {
	if s.users == 0 {
		f, err := os.Open(l.path(s))
		if err != nil {
			return nil, err
		}
		s.file = f
	}
	s.users++
	return s.file, nil
}

func (l *Log) release(s *segment) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.releaseLocked(s)
}

// releaseLocked closes the file of s when nobody else uses it.
func (l *Log) releaseLocked(s *segment) {
	if s.users--; s.users == 0 {
		s.file.Close()
		s.file = nil
	}
}

func (l *Log) syncData() error {
	l.mu.Lock()
	var dirty []*segment
	for _, s := range l.segs {
		if s.synced < s.size {
			dirty = append(dirty, s)
		}
	}
	l.mu.Unlock()
	for _, s := range dirty {
		if err := l.syncSegment(s); err != nil {
			return err
		}
	}
	return nil
}

func (l *Log) syncSegment(s *segment) error {
	l.mu.Lock()
	f, err := l.acquireLocked(s)
	size := s.size
	l.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // dropped meanwhile
	}
	if err != nil {
		return err
	}
	defer l.release(s)
	if err := f.Sync(); err != nil {
		return err
	}
	l.mu.Lock()
	s.synced = max(s.synced, size)
	l.mu.Unlock()
	return nil
}

// syncDirs makes names durable. Not every file system can sync a folder; those that
// cannot say EINVAL and have nothing to lose by it.
func syncDirs(dirs ...string) error {
	for _, dir := range dirs {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		err = d.Sync()
		d.Close()
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return nil
}
