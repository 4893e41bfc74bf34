package runner

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

// An imageEngine makes fake boxes in images, whose digests a test moves.
type imageEngine struct {
	fakeEngine
	mu      sync.Mutex
	digests map[string]string
	starts  []string // images of the boxes that were started
	fail    error
}

type imageBox struct {
	box.Box
	digest string
}

func (b *imageBox) Image() box.Image { return box.Image{Digest: b.digest} }

func (e *imageEngine) Start(ctx context.Context, c box.Config) (box.Box, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.starts = append(e.starts, c.Image+c.Role)
	if e.fail != nil {
		return nil, e.fail
	}
	return &imageBox{newStillBox(), e.digests[c.Image]}, nil
}

func (e *imageEngine) Pull(context.Context, []*box.Rules, func(string)) {}

func (e *imageEngine) Digest(_ context.Context, c box.Config) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.digests[c.Image], nil
}

// started returns the images of boxes started since it was last asked.
func (e *imageEngine) started() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	slices.Sort(e.starts) // those of one tend start at once
	s := strings.Join(e.starts, " ")
	e.starts = nil
	return s
}

// A stillBox does nothing until it is killed.
type stillBox struct {
	once sync.Once
	dead chan struct{}
}

func newStillBox() *stillBox               { return &stillBox{dead: make(chan struct{})} }
func (b *stillBox) Stdin() io.WriteCloser  { return nil }
func (b *stillBox) Stdout() io.Reader      { return nil }
func (b *stillBox) Limit(job.Limits) error { return nil }
func (b *stillBox) Kill()                  { b.once.Do(func() { close(b.dead) }) }
func (b *stillBox) Wait() box.Exit         { <-b.dead; return box.Exit{} }
func (b *stillBox) Close() error           { b.Kill(); return nil }

// newTestShelf is a shelf for two pools with the same rules and one with its own.
func newTestShelf(t *testing.T, warm int) (*shelf, *imageEngine) {
	e := &imageEngine{digests: map[string]string{"base": "1", "tool": "1"}}
	shared := &box.Rules{Images: job.Images{Default: "base", Allow: []string{"*"}, Roles: map[string][]string{"staff": {"own/*"}}}}
	r := New(Config{Pools: []string{"p", "q", "s"}, Engine: e, Warm: warm, Logf: t.Logf,
		Rules: map[string]*box.Rules{"p": shared, "q": shared, "s": {Images: shared.Images, Strict: true}}})
	return newShelf(r), e
}

func offerOf(pool, image, role string) *job.Offer {
	return &job.Offer{Pool: pool, Spec: job.Spec{Image: image, Role: role}}
}

// use takes a box as a job would and has the shelf tended after it.
func (s *shelf) use(ctx context.Context, o *job.Offer) bool {
	b := s.take(ctx, o, nil)
	if b != nil {
		b.Close()
	}
	s.tend(ctx)
	synctest.Wait()
	return b != nil
}

// Boxes wait for the default image and then for those that are used most.
func TestShelf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, e := newTestShelf(t, 2)
		defer s.close()
		s.tend(t.Context())
		for i, step := range []struct {
			o       *job.Offer
			warm    bool
			started string
		}{
			{nil, false, "base"},
			{offerOf("p", "", "student"), true, "base"},
			{offerOf("q", "base", "student"), true, "base"}, // another pool with the same boxes
			{offerOf("p", "tool", "student"), false, "tool"},
			{offerOf("p", "tool", "student"), true, "tool"},
			{offerOf("p", "rare", "student"), false, ""}, // tool was used more
			{offerOf("s", "", "student"), false, ""},     // its boxes are strict
			{offerOf("p", "own/x", "student"), false, ""},
			{offerOf("p", "own/x", "staff"), false, ""},
			{offerOf("p", "own/x", "staff"), false, "own/xstaff"}, // as often as tool, and last
			{offerOf("p", "own/x", "student"), false, ""},         // but not for a student
			{offerOf("p", "own/x", "staff"), true, "own/xstaff"},
			{&job.Offer{Pool: "p", Spec: job.Spec{Network: true}}, false, ""},
			{&job.Offer{Pool: "p", Spec: job.Spec{GPUs: 1}}, false, ""},
		} {
			if step.o != nil {
				if got := s.use(t.Context(), step.o); got != step.warm {
					t.Errorf("step %d: warm %v, want %v", i, got, step.warm)
				}
			}
			synctest.Wait()
			if got := e.started(); got != step.started {
				t.Errorf("step %d: started %q, want %q", i, got, step.started)
			}
		}
	})
}

// A box that dies, is old or whose image moves is replaced, without a job in between.
func TestShelfReplaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, e := newTestShelf(t, 1)
		defer s.close()
		await := func(what string, least, most time.Duration) {
			t.Helper()
			began := time.Now()
			select {
			case <-s.wake:
			case <-time.After(most + time.Second):
			}
			if d := time.Since(began); d < least || d > most {
				t.Errorf("%s: replaced after %v, want %v to %v", what, d, least, most)
			}
			s.tend(t.Context())
			synctest.Wait()
			if got := e.started(); got != "base" {
				t.Errorf("%s: started %q, want base", what, got)
			}
		}
		s.tend(t.Context())
		synctest.Wait()
		e.started()
		s.boxes[0].box.Kill()
		await("died young", warmRetry, warmRetry)
		e.mu.Lock()
		e.digests["base"] = "2"
		e.mu.Unlock()
		await("its image moved", 0, time.Minute)
		await("it is old", warmAge, warmAge)
		rest(t.Context(), time.Hour)
		s.boxes[0].box.Kill()
		await("died later", 0, 0)
		if !s.use(t.Context(), offerOf("p", "", "")) {
			t.Error("no warm box in the end")
		}
		e.mu.Lock()
		e.fail = errors.New("no engine")
		e.mu.Unlock()
		s.use(t.Context(), offerOf("p", "", ""))
		e.started()
		await("cannot be made", warmRetry, warmRetry)
		await("still cannot", 2*warmRetry, 2*warmRetry)
		if s.use(t.Context(), offerOf("p", "", "")) {
			t.Error("took a box that could not be made")
		}
	})
}

// A job does not wait without a word for a box whose image is being pulled.
func TestShelfIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newTestShelf(t, 1)
		slow := &slowEngine{}
		s.r.Engine = slow
		s.tend(t.Context())
		began := time.Now()
		if b := s.take(t.Context(), offerOf("p", "", ""), nil); b != nil || time.Since(began) != warmPatience {
			t.Errorf("take = %v after %v, want nothing after %v", b, time.Since(began), warmPatience)
		}
		s.close() // ends the start
	})
}

type slowEngine struct{ fakeEngine }

func (e *slowEngine) Start(ctx context.Context, _ box.Config) (box.Box, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}
