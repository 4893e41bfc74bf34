package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
)

// An attempt is one lease on this runner's disk:
//
//	attempts/JOB-FENCE/offer.json    what was asked
//	                   log/          what it said (package spool)
//	                   build.tar     /build as the box sent it
//	                   result.json   how it ended; written last, so its presence means: complete
type attempt struct {
	offer job.Offer
	dir   string
	log   *spool.Log

	ends   chan job.Reason         // asks the box to end its steps
	begun  atomic.Bool             // the first step has started
	over   chan struct{}           // closed when result is set, or never will be
	result *job.Result             // nil if the attempt ended without one; read after over
	cancel context.CancelCauseFunc // ends everything at once, without a verdict
	giveUp context.CancelCauseFunc // ends the box at once; a result is kept and delivered
	once   sync.Once
}

func (r *Runner) newAttempt(o job.Offer) (*attempt, error) {
	dir := job.AttemptDir(r.Dir, o.Lease)
	if err := os.RemoveAll(dir); err != nil { // of a raid whose numbers began again
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	a, err := prepareAttempt(dir, o)
	if err != nil {
		return nil, err
	}
	kept := o
	kept.Push = nil // no secret lies on a disk here
	if err := writeJSON(filepath.Join(dir, "offer.json"), kept); err != nil {
		return nil, errors.Join(err, a.remove())
	}
	if o.Say != "" {
		a.say(o.Say)
	}
	return a, nil
}

func prepareAttempt(dir string, o job.Offer) (*attempt, error) {
	log, err := spool.Open(filepath.Join(dir, "log"), spool.Options{Limit: o.Spec.Limits.Log()})
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	return &attempt{offer: o, dir: dir, log: log, ends: make(chan job.Reason, 4), over: make(chan struct{}),
		cancel: func(error) {}, giveUp: func(error) {}}, nil
}

// openAttempt reads back an attempt of an earlier process that has its result.
func openAttempt(dir string) (*attempt, error) {
	var o job.Offer
	var res job.Result
	if err := readJSON(filepath.Join(dir, "offer.json"), &o); err != nil {
		return nil, err
	}
	if err := readJSON(filepath.Join(dir, "result.json"), &res); err != nil {
		return nil, err
	}
	a, err := prepareAttempt(dir, o)
	if err != nil {
		return nil, err
	}
	a.begun.Store(res.Begun)
	a.result = &res
	close(a.over)
	return a, nil
}

// end asks the box to end its steps for a reason. It never blocks.
func (a *attempt) end(why job.Reason) {
	select {
	case a.ends <- why:
	default: // it has been told often enough
	}
}

// conclude writes the result and seals the log: from now on it survives this
// process. After an error it does not, but what there is will be delivered. A nil
// result only lets everybody go.
func (a *attempt) conclude(res *job.Result) (err error) {
	a.once.Do(func() {
		defer close(a.over)
		if res == nil {
			return
		}
		a.result = res
		if err = a.log.Seal(); err != nil {
			a.log.Close() // ends its readers, too
			return
		}
		err = writeJSON(filepath.Join(a.dir, "result.json"), res)
	})
	return err
}

// say adds a line of raid's own to the log.
func (a *attempt) say(line string) error {
	return a.log.Append(job.AppendFrame(nil, job.Raid, []byte(line)))
}

func (a *attempt) archivePath() string { return filepath.Join(a.dir, "build.tar") }

// remove forgets the attempt.
func (a *attempt) remove() error {
	a.log.Close()
	return os.RemoveAll(a.dir)
}

// writeJSON writes a file that is whole or absent, also after a power cut.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return json.NewDecoder(io.LimitReader(f, job.MaxFrame)).Decode(v)
}
