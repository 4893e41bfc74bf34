// Package stream holds the output of all jobs and hands it to whoever follows.
//
// Each attempt of a job has a log (package spool) in DIR/<job>/<attempt>. [Spools]
// opens them, [Spools.Attempt] gives the one to append to, and a [Follower] reads a
// job's attempts one after the other as if they were one log, at its own pace,
// waiting for what is to come. [Spools.Finish] ends them. A [Mirror] is a follower
// that copies output to Redis, for whoever would rather read it there.
//
// Promises: appending waits for the disk and for nobody who reads; a follower sees
// every byte that is still on disk, once and in order; all of it goes on after the
// process was killed. Non-goals: deciding when a job ends, who may read, and keeping
// logs for good: [Spools.Pack] makes a file of a job's output, which another raid can
// [Spools.Restore], and where that file is kept is the caller's business.
package stream

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/rai-project/raid/runner/job/spool"
)

// ErrOver is returned by Attempt when the job is finished or a later attempt exists.
var ErrOver = errors.New("stream: attempt is over")

var (
	errClosed  = fmt.Errorf("stream: %w", fs.ErrClosed)
	errRemoved = fmt.Errorf("stream: output was removed: %w", fs.ErrNotExist)
)

// doneName is the file in a job's folder that says no attempt will follow.
const doneName = "done"

// Spools are the logs of all jobs under one folder. All methods are safe for
// concurrent use. Only one Spools may use a folder.
type Spools struct {
	dir  string
	logf func(format string, args ...any)

	mu     sync.Mutex // guards the following and feed.users; taken before feed.mu
	feeds  map[int64]*feed
	closed bool
	begun  func(id int64) // nil, or told of each Attempt; not called under a lock
}

// A feed is one job's attempts. It is in memory while somebody uses it.
type feed struct {
	dir   string
	users int // followers, calls under way, and one for a job that is being appended to

	mu      sync.Mutex // guards the following
	loaded  bool
	held    bool // counts as one of users
	logs    []*attempt
	done    bool
	removed bool
	closed  bool
	bell    chan struct{} // closed when there is news; nil while nobody waits
}

type attempt struct {
	n   int
	log *spool.Log
}

// New returns the spools under dir, which is made when first needed. logf hears of
// faults that nobody can be told of otherwise.
func New(dir string, logf func(format string, args ...any)) *Spools {
	s := &Spools{dir: dir, logf: logf, feeds: map[int64]*feed{}}
	if err := s.sweep(); err != nil {
		logf("clean up output: %v", err)
	}
	return s
}

// Attempt returns the log of an attempt, the same as long as the job is not finished;
// limit is spool.Options.Limit. The first call for an attempt seals the ones before it,
// and from then on theirs is ErrOver. The caller does not close the log.
func (s *Spools) Attempt(id int64, n int, limit int64) (*spool.Log, error) {
	f, err := s.use(id)
	if err != nil {
		return nil, err
	}
	defer s.unuse(id, f)
	l, err := f.attempt(n, limit)
	if err != nil {
		return nil, fmt.Errorf("output of job %d, attempt %d: %w", id, n, err)
	}
	s.mu.Lock()
	begun := s.begun
	s.mu.Unlock()
	if begun != nil {
		begun(id)
	}
	return l, nil
}

// setBegun has fn told of each call of Attempt.
func (s *Spools) setBegun(fn func(id int64)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begun = fn
}

// has reports whether there is any output of a job.
func (s *Spools) has(id int64) bool {
	_, err := os.Stat(filepath.Join(s.dir, strconv.FormatInt(id, 10)))
	return err == nil
}

// peek returns where the output of a job ends, if it is in memory.
func (s *Spools) peek(id int64) (end int64, ok bool) {
	s.mu.Lock()
	f := s.feeds[id]
	s.mu.Unlock()
	if f == nil {
		return 0, false
	}
	end, _ = f.size()
	return end, true
}

// use returns the feed of a job, read from disk if it was not in memory. Every use
// needs an unuse.
func (s *Spools) use(id int64) (*feed, error) {
	f, err := s.hold(id)
	if err != nil {
		return nil, err
	}
	if err := f.load(); err != nil {
		s.unuse(id, f)
		return nil, fmt.Errorf("output of job %d: %w", id, err)
	}
	return f, nil
}

func (s *Spools) hold(id int64) (*feed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	f := s.feeds[id]
	if f == nil {
		f = &feed{dir: filepath.Join(s.dir, strconv.FormatInt(id, 10))}
		s.feeds[id] = f
	}
	f.users++
	return f, nil
}

// unuse forgets a feed that nobody uses any more.
func (s *Spools) unuse(id int64, f *feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users--
	switch active := len(f.logs) > 0 && !f.done && !f.removed && !f.closed; {
	case active && !f.held:
		f.held = true
		f.users++
	case !active && f.held:
		f.held = false
		f.users--
	}
	if f.users > 0 {
		return
	}
	if s.feeds[id] == f {
		delete(s.feeds, id)
	}
	if err := f.closeLocked(); err != nil {
		s.logf("output of job %d: %v", id, err)
	}
}

// load reads what the folder has.
func (f *feed) load() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.loadLocked()
}

func (f *feed) loadLocked() error {
	if f.loaded {
		return nil
	}
	entries, err := os.ReadDir(f.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var logs []*attempt
	for _, e := range entries {
		f.done = f.done || e.Name() == doneName
		n, err := strconv.Atoi(e.Name())
		if err != nil || n < 0 || !e.IsDir() {
			continue
		}
		// The limit is not known here; Attempt sets it before anything is appended.
		l, err := spool.Open(filepath.Join(f.dir, e.Name()), spool.Options{})
		if err != nil {
			closeAll(logs)
			return err
		}
		logs = append(logs, &attempt{n, l})
	}
	slices.SortFunc(logs, func(a, b *attempt) int { return a.n - b.n })
	if err := seal(logs, f.done); err != nil {
		closeAll(logs)
		return err
	}
	f.logs, f.loaded = logs, true
	return nil
}

// seal seals every log that will not be appended to: all but the last of a job that is
// not done.
func seal(logs []*attempt, done bool) error {
	for i, a := range logs {
		if i == len(logs)-1 && !done {
			return nil
		}
		if err := a.log.Seal(); err != nil {
			return err
		}
	}
	return nil
}

func (f *feed) attempt(n int, limit int64) (*spool.Log, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := &attempt{n: -1}
	if len(f.logs) > 0 {
		last = f.logs[len(f.logs)-1]
	}
	switch {
	case f.closed || f.removed:
		return nil, errClosed
	case last.n == n && !f.done:
		last.log.SetLimit(limit)
		return last.log, nil
	case f.done || n < last.n:
		return nil, ErrOver
	}
	if last.log != nil {
		if err := last.log.Seal(); err != nil {
			return nil, err
		}
	}
	l, err := spool.Open(filepath.Join(f.dir, strconv.Itoa(n)), spool.Options{Limit: limit})
	if err != nil {
		return nil, err
	}
	f.logs = append(f.logs, &attempt{n, l})
	f.ringLocked()
	return l, nil
}

// Finish says that no attempt will follow: the last is sealed and followers end once
// they have read it, now and after a restart. It may be called again, and for a job
// that never ran. Followers end even if it cannot be written down.
func (s *Spools) Finish(id int64) error {
	f, err := s.use(id)
	if err != nil {
		return err
	}
	defer s.unuse(id, f)
	if err := f.finish(); err != nil {
		return fmt.Errorf("finish output of job %d: %w", id, err)
	}
	return nil
}

func (f *feed) finish() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done || f.removed {
		return nil
	}
	if f.closed {
		return errClosed
	}
	if err := seal(f.logs, true); err != nil {
		return err
	}
	f.done = true // whatever becomes of the mark: the store knows, and says so again if asked
	f.ringLocked()
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(f.dir, doneName), nil, 0o600) // nor is it synced
}

// Remove deletes all output of a job. Its followers end with fs.ErrNotExist, at the
// latest where what they have begun to read ends.
func (s *Spools) Remove(id int64) error {
	f, err := s.hold(id) // not loaded: damaged ones go too
	if err != nil {
		return err
	}
	defer s.unuse(id, f)
	s.mu.Lock()
	delete(s.feeds, id) // who comes now starts afresh
	s.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.removed, f.loaded = true, true
	f.ringLocked()
	err = errors.Join(closeAll(f.logs), os.RemoveAll(f.dir))
	if err != nil {
		return fmt.Errorf("remove output of job %d: %w", id, err)
	}
	return nil
}

// RemoveUnfinished deletes the output of every job that Finish was not called for.
func (s *Spools) RemoveUnfinished() error {
	for id, err := range s.List() {
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(s.dir, strconv.FormatInt(id, 10), doneName)); err == nil {
			continue
		}
		if err := s.Remove(id); err != nil {
			return err
		}
	}
	return nil
}

// Close closes all logs. Followers get fs.ErrClosed, except that those of a job that
// is finished may read on.
func (s *Spools) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	var errs []error
	for _, f := range s.feeds {
		f.mu.Lock()
		errs = append(errs, f.closeLocked())
		f.mu.Unlock()
	}
	return errors.Join(errs...)
}

func (f *feed) closeLocked() error {
	f.closed = true
	f.ringLocked()
	return closeAll(f.logs)
}

func closeAll(logs []*attempt) error {
	var errs []error
	for _, a := range logs {
		errs = append(errs, a.log.Close())
	}
	return errors.Join(errs...)
}

func (f *feed) ringLocked() {
	if f.bell != nil {
		close(f.bell)
		f.bell = nil
	}
}

// after returns the first attempt after attempt n, or io.EOF if there will be none, or
// what to wait for.
func (f *feed) after(n int) (*attempt, chan struct{}, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.logs {
		if a.n > n && !f.removed {
			return a, nil, nil
		}
	}
	switch {
	case f.removed:
		return nil, nil, errRemoved
	case f.done:
		return nil, nil, io.EOF
	case f.closed:
		return nil, nil, errClosed
	}
	if f.bell == nil {
		f.bell = make(chan struct{})
	}
	return nil, f.bell, nil
}

func (f *feed) gone() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.removed
}

// size returns the logical end of all attempts together, and whether that is final.
func (f *feed) size() (n int64, done bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.logs {
		n += a.log.Size()
	}
	return n, f.done
}
