package spool

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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
