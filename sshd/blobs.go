package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/stream"
	"github.com/rai-project/raid/sshd/web"
)

// This file is what sshd does with blobs where they may be shared: output is kept as one,
// too, so that whatever a finished job left behind outlives the raid that ran it.

// openBlobs opens the store of uploads and outputs.
func (s *Server) openBlobs() (err error) {
	o := blob.Options{Reserve: s.Reserve, MakeRoom: func() { s.janitor.MakeRoom() }, Logf: s.Log.Infof}
	if s.OpenBlobs == nil {
		s.blobs, err = blob.Open(filepath.Join(s.Dir, "blobs"), o)
	} else {
		s.blobs, err = s.OpenBlobs(o)
	}
	if s.HTTP != nil {
		s.web = web.New(web.Config{Secret: s.HTTP.Secret, Base: s.HTTP.Base, Logf: s.Log.Errorf,
			Open: func(ctx context.Context, key string) (web.File, error) { return s.blobs.Open(ctx, blob.Key(key)) },
			Well: s.well})
	}
	return err
}

// storeFailure is what people are told of a store of blobs that does not work; nil for
// every other error.
func storeFailure(err error) *failure {
	switch {
	case errors.Is(err, blob.ErrUnavailable), errors.Is(err, blob.ErrDenied):
		return &failure{job.ExitTryLater, "raid's store of uploads and outputs does not answer", "running jobs go on, and nothing is lost; try again in a few minutes"}
	case errors.Is(err, blob.ErrNoSpace):
		return &failure{job.ExitTryLater, "raid's disk is full", "staff have to make room; try again later"}
	case errors.Is(err, blob.ErrCorrupt), errors.Is(err, stream.ErrPack):
		return &failure{job.ExitInfra, "what raid has kept is damaged, and is not what it was", "submit the job again, and tell staff"}
	}
	return nil
}

// packLog keeps the output of a job as a blob where blobs are shared. The job's last
// attempt must be sealed.
func (s *Server) packLog(ctx context.Context, id int64) (key string, size int64, err error) {
	if !s.blobs.Shared() {
		return "", 0, nil
	}
	f, err := os.CreateTemp(filepath.Join(s.Dir, "incoming"), fmt.Sprintf("%d-*.log", id))
	if err != nil {
		return "", 0, err
	}
	defer os.Remove(f.Name()) // gone already when it was adopted
	size, err = s.spools.Pack(ctx, id, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return "", 0, err
	}
	k, _, err := s.blobs.Adopt(ctx, f.Name(), 0)
	return string(k), size, err
}

// fetchLog makes sure that the output of a finished job is here, all of it: it may have
// run under another raid, or been removed to make room.
func (s *Server) fetchLog(ctx context.Context, rec *job.Record) error {
	if rec.Log == "" || s.hasLog(rec) {
		return nil
	}
	leave, err := s.fetching.enter(ctx, rec.ID)
	if err != nil {
		return err
	}
	defer leave()
	if s.hasLog(rec) { // somebody was quicker
		return nil
	}
	s.janitor.Check()
	f, err := s.blobs.Open(ctx, blob.Key(rec.Log))
	if err != nil {
		return err
	}
	defer f.Close()
	return s.spools.Restore(rec.ID, f)
}

// hasLog reports whether output is here as far as it went. A raid that was away while the
// job went on elsewhere has less.
func (s *Server) hasLog(rec *job.Record) bool {
	size, err := s.spools.Size(rec.ID)
	return err == nil && size == rec.LogBytes
}

// Turns let one at a time do something about a job.
type turns struct {
	mu   sync.Mutex // guards busy
	busy map[int64]chan struct{}
}

// enter waits for a turn; leave must be called.
func (t *turns) enter(ctx context.Context, id int64) (leave func(), err error) {
	for {
		t.mu.Lock()
		wait, busy := t.busy[id]
		if !busy {
			if t.busy == nil {
				t.busy = map[int64]chan struct{}{}
			}
			mine := make(chan struct{})
			t.busy[id] = mine
			t.mu.Unlock()
			return func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				delete(t.busy, id)
				close(mine)
			}, nil
		}
		t.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// lateEvery is how long output waits to be kept after it could not be.
const lateEvery = time.Minute

// keepLogs keeps, until ctx ends, the output of jobs that ended without a runner that
// would have waited for it: lost once too often, or cancelled while they were queued
// again. What a job's own result brings is kept before that is committed.
func (s *Server) keepLogs(ctx context.Context) {
	var again []int64
	for {
		ids, bell := s.unkept.take()
		ids = append(again, ids...)
		again = nil
		for _, id := range ids {
			if err := s.keepLog(ctx, id); err != nil && ctx.Err() == nil {
				s.Log.Error("keep the output", "job", id, "err", err)
				again = append(again, id)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if bell == nil {
			continue
		}
		var late <-chan time.Time
		if len(again) > 0 {
			late = time.After(lateEvery)
		}
		select {
		case <-bell:
		case <-late:
		case <-ctx.Done():
			return
		}
	}
}

// keepLog keeps the output of a finished job if it has some and nobody has kept it.
func (s *Server) keepLog(ctx context.Context, id int64) error {
	rec, err := s.brain.Job(ctx, id)
	if err != nil || rec.Log != "" || !rec.Expired.IsZero() {
		return err
	}
	if size, err := s.spools.Size(id); err != nil || size == 0 {
		return err
	}
	defer s.janitor.Arrive()()
	if rec.Log, rec.LogBytes, err = s.packLog(ctx, id); err != nil {
		return err
	}
	return s.brain.Rewrite(ctx, []job.Record{*rec})
}

// linkTime is how long a link works.
const linkTime = 15 * time.Minute

func linkFlags(f *pflag.FlagSet) {
	f.Bool("link", false, "print a URL that gives it to anybody, for "+linkWord)
	jsonFlag(f)
}

const linkWord = "15 minutes"

// A linked is what --link --json prints.
type linked struct {
	URL     string   `json:"url"`
	Name    string   `json:"name"`
	Expires job.Time `json:"expires"`
}

// link prints a URL of a file of a job's, for a browser or for another machine. what is
// part of the file's name.
func (c *call) link(ctx context.Context, rec *job.Record, key, what string) error {
	f, err := c.blob(ctx, rec, key)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("job-%d-%s%s", rec.ID, what, suffix(f))
	f.Close()
	expiry := time.Now().Add(linkTime).Truncate(time.Second)
	url, err := c.s.blobs.Link(ctx, blob.Key(key), name, expiry)
	if errors.Is(err, blob.ErrNoLinks) {
		if c.s.web == nil {
			return failf(job.ExitRefused, fmt.Sprintf("have it sent: ssh … %s %d > %s; staff can set [http] listen", c.cmd.name, rec.ID, name),
				"this raid has no links, for it does not speak HTTP")
		}
		url, err = c.s.web.Link(key, name, expiry), nil
	}
	if err != nil {
		return err
	}
	c.s.Log.Info("link", "job", rec.ID, "user", c.Who.User, "file", name, "until", job.At(expiry))
	if c.json() {
		return c.emit(linked{url, name, job.At(expiry)})
	}
	c.say("whoever has it can get %s until %s, %s from now", name, job.At(expiry), linkWord)
	_, err = fmt.Fprintln(c, url)
	return err
}

// suffix names the format of an upload; what raid packed itself is a tar.
func suffix(r io.ReaderAt) string {
	var head [4]byte
	n, _ := r.ReadAt(head[:], 0)
	for magic, suffix := range map[string]string{"\x1f\x8b": ".tar.gz", "\x28\xb5\x2f\xfd": ".tar.zst", "PK": ".zip"} {
		if strings.HasPrefix(string(head[:n]), magic) {
			return suffix
		}
	}
	return ".tar"
}

// well says what is wrong with raid, for whoever watches over it.
func (s *Server) well(ctx context.Context) error {
	return s.brain.View(ctx, func(*queue.Core) {})
}
