package spool

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/rai-project/raid/runner/job"
)

// TestShare: a log that shares shows what the other has, through rotation, dropped
// middles and a restart in the middle of a frame.
func TestShare(t *testing.T) {
	for _, limit := range []int64{0, 64 << 10} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			theirs, mine := t.TempDir(), t.TempDir()
			w, l := open(t, theirs, limit), open(t, mine, limit)
			if err := l.Share(theirs); err != nil {
				t.Fatal(err)
			}
			for i := range 300 {
				add(t, w, frame(job.Out, strings.Repeat(fmt.Sprintf("%d,", i), 200)))
				if i%7 == 0 {
					grow(t, l, w.Size())
				}
				if i%90 == 89 {
					next := frame(job.Out, "half of this is there")
					torn(t, w, next)
					l = reopen(t, l, mine, limit)
					if err := l.Share(theirs); err != nil {
						t.Fatalf("Share() after a restart = %v", err)
					}
					add(t, w, next)
				}
			}
			if err := w.Seal(); err != nil {
				t.Fatal(err)
			}
			grow(t, l, w.Size())
			if err := l.Seal(); err != nil {
				t.Fatal(err)
			}
			if got, want := text(t, l, 0), text(t, w, 0); got != want {
				t.Errorf("the log that shares has %d bytes of text, the other %d", len(got), len(want))
			}
			os.RemoveAll(theirs) // as a runner does once raid has the result
			l = reopen(t, l, mine, limit)
			if got, want := l.Size(), w.Size(); got != want || !l.Sealed() {
				t.Errorf("after the other is gone Size() = %d, Sealed() = %v; want %d, sealed", got, l.Sealed(), want)
			}
		})
	}
}

func grow(t *testing.T, l *Log, end int64) {
	t.Helper()
	if err := l.Grow(end); err != nil {
		t.Fatalf("Grow(%d) = %v", end, err)
	}
	if got := l.Size(); got != end {
		t.Fatalf("Size() = %d after Grow(%d)", got, end)
	}
}

// torn writes half of the frame that is to come, as a write under way has.
func torn(t *testing.T, w *Log, next []byte) {
	t.Helper()
	if w.fit(next) == 0 {
		return // it goes into the next segment
	}
	if _, err := w.current().file.WriteAt(next[:len(next)/2], w.current().size); err != nil {
		t.Fatal(err)
	}
}

// A log of its own frames is not replaced, and one that shares takes none.
func TestShareRefuses(t *testing.T) {
	theirs := t.TempDir()
	w := open(t, theirs, 0)
	add(t, w, frame(job.Out, "theirs"))
	own := open(t, t.TempDir(), 0)
	add(t, own, frame(job.Out, "own"))
	if err := own.Share(theirs); !errors.Is(err, ErrApart) {
		t.Errorf("Share() of a log with frames = %v, want ErrApart", err)
	}
	if err := own.Share(filepath.Join(theirs, "none")); !errors.Is(err, ErrApart) {
		t.Errorf("Share() with no log = %v, want ErrApart", err)
	}
	add(t, own, frame(job.Out, "more"))
	if got, want := text(t, own, 0), "o:ownmore"; got != want {
		t.Errorf("the log has %q, want %q", got, want)
	}
	l := open(t, t.TempDir(), 0)
	if err := l.Share(theirs); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(frame(job.Out, "two writers")); !errors.Is(err, ErrApart) {
		t.Errorf("Append() to a log that shares = %v, want ErrApart", err)
	}
	if err := l.Grow(w.Size() + 100); !errors.Is(err, ErrApart) {
		t.Errorf("Grow() beyond the end = %v, want ErrApart", err)
	}
}

// TestShareAgain: whatever the writer did while nobody looked, its log is shown to the
// end: by its files where they are the same still, else by what is sent.
func TestShareAgain(t *testing.T) {
	theirs, mine := t.TempDir(), t.TempDir()
	w, l := open(t, theirs, 0), open(t, mine, 0)
	add(t, w, frame(job.Out, "one"))
	if err := l.Share(theirs); err != nil {
		t.Fatal(err)
	}
	grow(t, l, w.Size())
	add(t, w, frame(job.Out, "two"))
	if err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	if err := l.Share(theirs); err != nil {
		t.Fatalf("Share() of a log that was sealed meanwhile = %v", err)
	}
	grow(t, l, w.Size())

	if err := l.Share(filepath.Join(theirs, "none")); !errors.Is(err, ErrApart) {
		t.Fatalf("Share() of a log that is gone = %v, want ErrApart", err)
	}
	add(t, l, frame(job.Out, "three"))
	if got, want := text(t, l, 0), "o:onetwothree"; got != want {
		t.Errorf("the log has %q, want %q", got, want)
	}
	if got, want := text(t, w, 0), "o:onetwo"; got != want {
		t.Errorf("the other has %q, want %q: two wrote into one file", got, want)
	}
}

// A log sealed before the other is complete does not grow with it.
func TestSealParts(t *testing.T) {
	theirs, mine := t.TempDir(), t.TempDir()
	w, l := open(t, theirs, 0), open(t, mine, 0)
	add(t, w, frame(job.Out, "before"))
	if err := l.Share(theirs); err != nil {
		t.Fatal(err)
	}
	grow(t, l, w.Size())
	if err := l.Seal(); err != nil {
		t.Fatal(err)
	}
	add(t, w, frame(job.Out, "after"))
	l = reopen(t, l, mine, 0)
	if got, want := text(t, l, 0), "o:before"; got != want {
		t.Errorf("the sealed log has %q, want %q", got, want)
	}
	r := l.Reader(l.Size())
	defer r.Close()
	if _, err := r.Next(ended()); err != io.EOF {
		t.Errorf("Next() at its end = %v, want io.EOF", err)
	}
}

// A pair is a writer's log and the one that shows it, and what was written.
type pair struct {
	*testing.T
	rnd          *rand.Rand
	theirs, mine string
	w, l         *Log
	all          []byte
	ends         []int64 // of its frames
	shared       bool    // this session
}

const pairLimit = 1 << 20 // nothing is dropped below

// TestShareAtRandom: through cuts and restarts of either side the log is that of its
// writer, as far as it goes, and the writer's stays whole.
func TestShareAtRandom(t *testing.T) {
	for seed := uint64(600); seed < 650; seed++ { // one of them, 625, seals a log that was sent for a while
		p := &pair{T: t, rnd: rand.New(rand.NewPCG(seed, 1)), theirs: t.TempDir(), mine: t.TempDir()}
		p.w, p.l = open(t, p.theirs, pairLimit), open(t, p.mine, pairLimit)
		for n := range 60 {
			what := p.step()
			p.check(fmt.Sprintf("seed %d step %d: %s", seed, n, what))
			if t.Failed() {
				return
			}
		}
		p.end(fmt.Sprintf("seed %d", seed))
	}
}

func (p *pair) step() string {
	switch p.rnd.IntN(10) {
	case 0:
		p.l = reopen(p.T, p.l, p.mine, pairLimit)
		p.shared = false
		return "raid restarts"
	case 1:
		p.w = reopen(p.T, p.w, p.theirs, pairLimit)
		return "the runner restarts"
	case 2:
		p.session(filepath.Join(p.theirs, "none"))
		return "a session that cannot share"
	case 3, 4:
		p.session(p.theirs)
		return fmt.Sprint("a session, shared: ", p.shared)
	case 5, 6:
		p.pass(p.rnd.IntN(5) > 0)
		return "pass on"
	}
	f := frame(job.Out, strings.Repeat(fmt.Sprint(len(p.ends), ","), 1+p.rnd.IntN(3000)))
	add(p.T, p.w, f)
	p.all = append(p.all, f...)
	p.ends = append(p.ends, int64(len(p.all)))
	return "write"
}

func (p *pair) session(dir string) {
	p.Helper()
	err := p.l.Share(dir)
	if err != nil && !errors.Is(err, ErrApart) {
		p.Fatalf("Share() = %v", err)
	}
	p.shared = err == nil
}

// pass brings the log to the end of the writer's, or of some frame before.
func (p *pair) pass(whole bool) {
	p.Helper()
	have := p.l.Size()
	left := p.ends[sort.Search(len(p.ends), func(i int) bool { return p.ends[i] > have }):]
	if len(left) == 0 {
		return
	}
	end := left[len(left)-1]
	if !whole {
		end = left[p.rnd.IntN(len(left))]
	}
	if p.shared {
		grow(p.T, p.l, end)
	} else if err := p.l.Append(p.all[have:end]); err != nil {
		p.Fatalf("Append() = %v", err)
	}
}

func (p *pair) check(what string) {
	p.Helper()
	if got, want := plain(p.T, p.w), textOf(p.all); got != want {
		p.Errorf("%s: the writer's log has %d bytes of text, want %d", what, len(got), len(want))
	}
	if got, want := plain(p.T, p.l), textOf(p.all[:p.l.Size()]); got != want {
		p.Errorf("%s: the log has %d bytes of text, want %d", what, len(got), len(want))
	}
}

// end seals one or the other first, and the log stays as it was.
func (p *pair) end(what string) {
	p.Helper()
	p.session(p.theirs)
	p.pass(true)
	if p.rnd.IntN(2) == 0 {
		if err := p.w.Seal(); err != nil {
			p.Fatal(err)
		}
	}
	if err := p.l.Seal(); err != nil {
		p.Fatal(err)
	}
	p.check(what + " sealed")
	if !p.w.Sealed() {
		add(p.T, p.w, frame(job.Out, "more"))
	}
	p.l = reopen(p.T, p.l, p.mine, pairLimit)
	if got, want := p.l.Size(), int64(len(p.all)); got != want {
		p.Errorf("%s: sealed at %d, and then it has %d", what, want, got)
	}
}

// plain is the text of a log, in one piece.
func plain(t *testing.T, l *Log) string {
	return strings.NewReplacer(" o:", "", "o:", "").Replace(text(t, l, 0))
}

// textOf is what plain returns for a log of those frames.
func textOf(frames []byte) string {
	var b strings.Builder
	for len(frames) > 0 {
		_, n, _ := job.ParseHeader(frames)
		b.Write(frames[job.HeaderLen : job.HeaderLen+n])
		frames = frames[job.HeaderLen+n:]
	}
	return b.String()
}
