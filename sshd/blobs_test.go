package sshd

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
)

// elsewhere is a folder that passes for a store which outlives this machine.
type elsewhere struct {
	*blob.Folder
	down    atomic.Bool
	opened  atomic.Int64
	adopted chan blob.Key
}

func (e *elsewhere) Shared() bool { return true }

func (e *elsewhere) Adopt(ctx context.Context, path string, limit int64) (blob.Key, int64, error) {
	if e.down.Load() {
		return "", 0, fmt.Errorf("%w: a test", blob.ErrUnavailable)
	}
	k, n, err := e.Folder.Adopt(ctx, path, limit)
	if err == nil {
		e.adopted <- k
	}
	return k, n, err
}

func (e *elsewhere) Open(ctx context.Context, k blob.Key) (blob.File, error) {
	if e.down.Load() {
		return nil, fmt.Errorf("%w: a test", blob.ErrUnavailable)
	}
	e.opened.Add(1)
	return e.Folder.Open(ctx, k)
}

func newElsewhere(t *testing.T) (*site, *elsewhere) {
	t.Helper()
	e := &elsewhere{adopted: make(chan blob.Key, 100)}
	s := newSite(t, func(c *Config) {
		c.OpenBlobs = func(o blob.Options) (s blob.Store, err error) {
			e.Folder, err = blob.Open(filepath.Join(c.Dir, "blobs"), o)
			return e, err
		}
	})
	return s, e
}

// run brings the next job to its end, as its runner, with something in /build.
func (s *site) run(t *testing.T, p *peer, o job.Offer) {
	t.Helper()
	k := p.attempt(o.Lease)
	k.want("have 0")
	k.send(job.Begun, "")
	k.send(job.Out, "to stdout\n")
	k.send(job.Err, "to stderr\xff\n")
	k.send(job.Sealed, "")
	k.send(job.File, string(emptyTar))
	k.send(job.Final, `{"reason":"exit","exit":0}`)
	k.want("done")
}

var emptyTar = make([]byte, 1024)

// The output of a finished job is read from its blob where its spool is gone, as it was,
// by however many at once.
func TestOutputFromBlob(t *testing.T) {
	s, e := newElsewhere(t)
	submitted := s.follow(t, "submit -- true")
	p := s.peer(t, "gpu1")
	_, o := p.join(nil)
	s.run(t, p, o)
	submitted()
	rec, err := s.brain.Job(t.Context(), 1)
	if err != nil || rec.Log == "" || rec.LogBytes == 0 || rec.Archive == "" {
		t.Fatalf("record = %+v, %v, want output and /build as blobs", rec, err)
	}
	out, stderr, _ := s.say(t, "ada", "logs 1", nil)
	if out != "to stdout\n" || !strings.Contains(stderr, "to stderr\xff\n") {
		t.Fatalf("logs = %q, %q", out, stderr)
	}
	if n := e.opened.Load(); n != 0 {
		t.Errorf("output that is here was fetched %d times", n)
	}
	e.down.Store(true)
	if err := s.spools.Remove(1); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status := s.say(t, "ada", "logs 1", nil); status != job.ExitTryLater || !strings.Contains(stderr, "does not answer") {
		t.Errorf("logs while the store is down = %d, %q, want %d", status, stderr, job.ExitTryLater)
	}
	e.down.Store(false)
	var readers []func() (string, string, int)
	for range 8 {
		readers = append(readers, s.follow(t, "logs 1"), s.follow(t, "attach 1"))
	}
	for _, end := range readers {
		if o, e, status := end(); o != out || status != 0 {
			t.Errorf("restored output = %d, %q, %q, want %q", status, o, e, out)
		}
	}
	if n := e.opened.Load(); n != 1 {
		t.Errorf("output was fetched %d times, want once", n)
	}
	// Less than there was is as good as nothing: this raid was away when it went on.
	if err := s.spools.Remove(1); err != nil {
		t.Fatal(err)
	}
	l, err := s.spools.Attempt(1, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Append(job.AppendFrame(nil, job.Out, []byte("to std"))); err != nil {
		t.Fatal(err)
	}
	if got, _, _ := s.say(t, "ada", "logs 1", nil); got != out {
		t.Errorf("logs = %q, want %q", got, out)
	}
}

// A result that cannot be kept waits with its runner and nothing has to be sent twice.
func TestResultWaits(t *testing.T) {
	s, e := newElsewhere(t)
	submitted := s.follow(t, "submit -- true")
	p := s.peer(t, "gpu1")
	_, o := p.join(nil)
	e.down.Store(true)
	var have int
	for try := range 3 {
		k := p.attempt(o.Lease)
		if _, err := fmt.Sscanf(k.line(), "have %d", &have); err != nil {
			t.Fatal(err)
		}
		if try == 0 {
			k.send(job.Begun, "")
			k.send(job.Out, "said\n")
			k.send(job.Sealed, "")
			k.send(job.File, string(emptyTar))
		} else if want := job.HeaderLen + len("said\n") + len(emptyTar); have != want {
			t.Errorf("try %d: raid has %d bytes, want all %d", try+1, have, want)
		}
		if try == 2 {
			e.down.Store(false)
		}
		k.send(job.Final, `{"reason":"exit","exit":0}`)
		if try < 2 {
			k.want("")
			if rec, ok := s.brain.Live(1); !ok || rec.State != job.Running {
				t.Errorf("the job is %s, want it running", rec.State)
			}
			continue
		}
		k.want("done")
	}
	if out, stderr, status := submitted(); out != "said\n" || status != 0 {
		t.Errorf("submit = %d, %q, %q", status, out, stderr)
	}
	if rec, err := s.brain.Job(t.Context(), 1); err != nil || rec.Log == "" || rec.Archive == "" {
		t.Errorf("record = %+v, %v, want output and /build as blobs", rec, err)
	}
}

// What a job said that was lost with its runners is kept after its end.
func TestOutputOfLostJob(t *testing.T) {
	s, e := newElsewhere(t)
	submitted := s.follow(t, "submit -- true")
	for n := 1; n <= 3; n++ {
		p := s.peer(t, "gpu1")
		_, o := p.join(nil)
		k := p.attempt(o.Lease)
		k.want("have 0")
		k.send(job.Begun, "")
		k.send(job.Out, fmt.Sprintf("attempt %d\n", n))
		p.c.Close()
	}
	s.peer(t, "gpu1").start("runner join").say(job.Hello{Protocol: job.Protocol, Name: "gpu1", Pools: []string{"rai_amd64"}})
	if _, stderr, status := submitted(); status != job.ExitInfra {
		t.Errorf("submit = %d, %q, want %d", status, stderr, job.ExitInfra)
	}
	want, _, _ := s.say(t, "ada", "logs 1", nil)
	select {
	case <-e.adopted:
	case <-time.After(20 * time.Second):
		t.Fatal("the output of a lost job is not kept")
	}
	for deadline := time.Now().Add(20 * time.Second); ; { // the record follows
		rec, err := s.brain.Job(t.Context(), 1)
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("record = %+v, %v, want its output as a blob", rec, err)
		}
		if rec.Log != "" {
			break
		}
		<-time.After(5 * time.Millisecond) // nobody is told of a record that is written anew
	}
	if err := s.spools.Remove(1); err != nil {
		t.Fatal(err)
	}
	if got, stderr, status := s.say(t, "ada", "logs 1", nil); got != want || status != 0 {
		t.Errorf("logs = %d, %q, %q, want %q", status, got, stderr, want)
	}
}

// What people are told of a store that does not work is theirs to do something about, or
// to wait; what it says itself is for the log.
func TestStoreFailure(t *testing.T) {
	for err, want := range map[error]int{blob.ErrUnavailable: 75, blob.ErrDenied: 75, blob.ErrNoSpace: 75, blob.ErrCorrupt: 125} {
		f := storeFailure(fmt.Errorf("commit: %w: at 10.0.0.7", err))
		if f == nil || f.code != want || strings.Contains(f.text+f.hint, "10.0") || f.hint == "" {
			t.Errorf("storeFailure(%v) = %+v, want status %d and a hint", err, f, want)
		}
	}
	if f := storeFailure(errors.New("else")); f != nil {
		t.Errorf("storeFailure of another error = %+v", f)
	}
}
