// Package janitor removes what finished jobs left behind, and says how long the disk
// will last.
//
// Everything that has to be kept hangs on the record of a job: its output by the job's
// id, its upload and its /build as blobs, which jobs may share. A [Janitor] looks through
// the records every hour, at its start, and when room is needed:
//
//   - The files of a job that ended longer ago than Config.Files go, and its record
//     longer ago than Config.Records, files and all.
//   - While the disk has less free than the reserve and a margin, files of finished jobs go
//     sooner: the oldest of whichever team, or user without one, holds the most. Those of
//     the last hour stay.
//   - Blobs and output that no job refers to go. They come of submits that failed, and of
//     a raid that died between two steps. But blobs that are older than the database stay:
//     they may lie where they outlive it, and one that was lost knew whose they are.
//
// It promises: nothing that an unfinished job refers to is removed, nor what a submit
// under way is about to refer to, nor what the record of a finished job does not say is
// gone; and whatever moment raid is killed in, the next sweep goes on. So the record is
// always first: once it is committed that the files of a job may be gone, they are what
// nobody refers to. Counts of references are made anew in each sweep; none is kept that
// could be wrong.
//
// It reads history in pages, and holds some 100 bytes for each job whose files are kept.
// Nothing is done in the brain's loop but the commits, a page at a time.
package janitor

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/stream"
)

const (
	every  = time.Hour   // between two sweeps that nobody asked for
	newest = time.Hour   // files of a job stay that long after its end, however little room there is, and blobs after they came
	resign = time.Minute // between two sweeps for room when the first found nothing to remove
	page   = 200         // records read, and committed, at a time
)

// Config says what there is and how long it is kept. The first three are required.
type Config struct {
	Brain    *brain.Brain
	Blobs    blob.Store
	Spools   *stream.Spools
	Files    time.Duration // how long after its end a job's files are kept; 0: for ever
	Records  time.Duration // how long its record is; 0: for ever
	Upload   int64         // bytes of the largest upload: the margin, but no more than a twentieth of the disk
	Database string        // the store's file, for the report; "": none
	Logf     func(format string, args ...any)
	Swept    func(Report) // nil, or told of every sweep; not called twice at once

	// Free is how much of the disk is free, and how large it is. Defaults to Blobs.Free.
	Free func() (free, total int64, err error)
}

// A Janitor sweeps. Its methods other than Run are safe for concurrent use.
type Janitor struct {
	Config
	wake  chan struct{}
	asks  chan chan<- outcome
	ended chan struct{} // closed when Run has returned

	fresh bool      // there had never been a job when it was made,
	made  time.Time // which was then

	// Only sweeps use these.
	born    *job.Time       // see birth; nil: not known yet
	strange int             // how many blobs the last sweep found that are older
	low     int64           // no job below has files
	weights map[int64]int64 // bytes of output of jobs that ended an hour ago

	mu       sync.Mutex // protects the following
	arriving map[int]time.Time
	arrived  int
	last     *Report   // nil before the first
	resigned time.Time // when a sweep found too little to remove
}

// An outcome is what a sweep came to.
type outcome struct {
	report Report
	err    error
}

// New returns a janitor that waits for Run. The brain does not run yet.
func New(c Config) *Janitor {
	if c.Free == nil {
		c.Free = c.Blobs.Free
	}
	if c.Logf == nil {
		c.Logf = func(string, ...any) {}
	}
	if c.Swept == nil {
		c.Swept = func(Report) {}
	}
	return &Janitor{Config: c, wake: make(chan struct{}, 1), asks: make(chan chan<- outcome), ended: make(chan struct{}),
		fresh: c.Brain.Next() == 1, made: time.Now(), arriving: map[int]time.Time{}}
}

// Run sweeps until ctx ends. It needs a brain that runs.
func (j *Janitor) Run(ctx context.Context) {
	defer close(j.ended)
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		var asked []chan<- outcome
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		case <-j.wake:
		case a := <-j.asks:
			asked = append(j.waiting(), a)
		}
		report, err := j.sweep(ctx)
		j.note(ctx, report, err)
		for _, a := range asked {
			a <- outcome{report, err}
		}
		next.Reset(every)
	}
}

// waiting returns who else is asking now: one sweep is enough for all.
func (j *Janitor) waiting() (asked []chan<- outcome) {
	for {
		select {
		case a := <-j.asks:
			asked = append(asked, a)
		default:
			return asked
		}
	}
}

// note remembers a sweep and says what it came to.
func (j *Janitor) note(ctx context.Context, r Report, err error) {
	if err != nil {
		if ctx.Err() == nil {
			j.Logf("clean up: %v", err)
		}
		return
	}
	j.Swept(r)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last = &r
	if r.short {
		j.resigned = time.Now()
	}
}

// Sweep sweeps now and returns what is there afterwards.
func (j *Janitor) Sweep(ctx context.Context) (Report, error) {
	answer := make(chan outcome, 1)
	select {
	case j.asks <- answer:
	case <-j.ended:
		return Report{}, brain.ErrClosed
	case <-ctx.Done():
		return Report{}, context.Cause(ctx)
	}
	select {
	case o := <-answer:
		return o.report, o.err
	case <-ctx.Done():
		return Report{}, context.Cause(ctx)
	}
}

// Last returns the report of the last sweep; ok is false before the first.
func (j *Janitor) Last() (r Report, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last == nil {
		return Report{}, false
	}
	return *j.last, true
}

// MakeRoom returns when a sweep has removed what it could. Soon after one that found
// too little it returns at once.
func (j *Janitor) MakeRoom() {
	if j.hopeless() {
		return
	}
	_, err := j.Sweep(context.Background()) // the end of Run ends it, too
	if err != nil && !errors.Is(err, brain.ErrClosed) {
		j.Logf("make room: %v", err)
	}
}

// Check has room made, without waiting for it, if there is little.
func (j *Janitor) Check() {
	free, total, err := j.Free()
	if err != nil || free >= j.floor(total) || j.hopeless() {
		return
	}
	select {
	case j.wake <- struct{}{}:
	default: // it knows
	}
}

func (j *Janitor) hopeless() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return time.Since(j.resigned) < resign
}

// margin is what is to be free beside the reserve, so that an upload that has begun has
// room to its end.
func (j *Janitor) margin(total int64) int64 {
	if j.Upload <= 0 {
		return total / 20
	}
	return min(j.Upload, total/20)
}

// floor is how little may be free before files go sooner.
func (j *Janitor) floor(total int64) int64 { return j.Blobs.Reserve(total) + j.margin(total) }

// Arrive says that a blob is coming which a job will refer to: one that is about to be
// committed or renewed. done says that the job has it, or never will.
func (j *Janitor) Arrive() (done func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.arrived
	j.arrived++
	j.arriving[n] = time.Now()
	return func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		delete(j.arriving, n)
	}
}

// settled returns the time before which every blob that was committed or renewed has its
// job, if it will ever have one. With all that come later, however long their commit
// takes, Arrive was called before. The hour is for clocks that are set back meanwhile.
func (j *Janitor) settled(now time.Time) time.Time {
	t := now.Add(-newest)
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, begun := range j.arriving {
		if begun.Before(t) {
			t = begun
		}
	}
	return t
}
