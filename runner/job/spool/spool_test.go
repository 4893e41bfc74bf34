package spool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/rai-project/raid/runner/job"
)

func open(t testing.TB, dir string, limit int64) *Log {
	t.Helper()
	l, err := Open(dir, Options{Limit: limit})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func add(t testing.TB, l *Log, frames []byte) {
	t.Helper()
	if err := l.Append(frames); err != nil {
		t.Fatal(err)
	}
}

func frame(k job.Kind, payload string) []byte { return job.AppendFrame(nil, k, []byte(payload)) }

func gapFrame(n uint64) []byte {
	return job.AppendFrame(nil, job.Gap, binary.BigEndian.AppendUint64(nil, n))
}

// ended is a context for reading what is there and no more.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// text reads what is there from an offset on: "o:data e:data g:17".
func text(t testing.TB, l *Log, from int64) string {
	t.Helper()
	r := l.Reader(from)
	defer r.Close()
	var b strings.Builder
	for {
		c, err := r.Next(ended())
		if err == io.EOF || errors.Is(err, context.Canceled) {
			return strings.TrimSpace(b.String())
		}
		if err != nil {
			t.Fatal(err)
		}
		if c.Kind == job.Gap {
			fmt.Fprintf(&b, "g:%d ", c.Dropped)
		} else {
			fmt.Fprintf(&b, "%c:%s ", c.Kind, c.Data)
		}
	}
}

func TestChunks(t *testing.T) {
	cat := func(frames ...[]byte) []byte { return bytes.Join(frames, nil) }
	tests := []struct {
		name   string
		frames []byte
		want   string
		size   int64
	}{
		{"nothing", nil, "", 0},
		{"one", frame(job.Out, "a"), "o:a", 6},
		{"same kind merged", cat(frame(job.Out, "ab"), frame(job.Out, ""), frame(job.Out, "c")), "o:abc", 18},
		{"kinds kept apart", cat(frame(job.Out, "a"), frame(job.Err, "b"), frame(job.Out, "c")), "o:a e:b o:c", 18},
		{"lines not merged", cat(frame(job.Raid, "a"), frame(job.Raid, ""), frame(job.Raid, "b")), "r:a r: r:b", 17},
		{"marks not merged", cat(frame(job.Mark, "{}"), frame(job.Mark, "{}")), "s:{} s:{}", 14},
		{"empty output is nothing", frame(job.Out, ""), "", 5},
		{"gap first", cat(gapFrame(7), frame(job.Out, "a")), "g:7 o:a", 13},
		{"gap last", cat(frame(job.Out, "a"), gapFrame(7)), "o:a g:7", 13},
		{"gaps add up", cat(frame(job.Out, "a"), gapFrame(7), gapFrame(8), frame(job.Err, "b")), "o:a g:15 e:b", 27},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir, 0)
			add(t, l, tt.frames)
			for _, state := range []string{"live", "reopened", "sealed"} {
				switch state {
				case "reopened":
					l.Close()
					l = open(t, dir, 0)
				case "sealed":
					l.Seal()
					l = open(t, dir, 0)
				}
				if got := text(t, l, 0); got != tt.want {
					t.Errorf("%s: read %q, want %q", state, got, tt.want)
				}
				if got := l.Size(); got != tt.size {
					t.Errorf("%s: Size() = %d, want %d", state, got, tt.size)
				}
			}
		})
	}
}

// A reader may start at any offset: inside output it goes on there, inside a header or
// a line it begins with that frame.
func TestReadFromEveryOffset(t *testing.T) {
	l := open(t, t.TempDir(), 0)
	add(t, l, frame(job.Out, "abc"))   // 0, payload from 5
	add(t, l, frame(job.Raid, "line")) // 8, payload from 13
	add(t, l, gapFrame(2))             // 17
	add(t, l, frame(job.Err, "xy"))    // 19, payload from 24, ends at 26
	tests := []struct {
		from, to int64
		want     string
	}{
		{-1, 5, "o:abc r:line g:2 e:xy"},
		{6, 6, "o:bc r:line g:2 e:xy"},
		{7, 7, "o:c r:line g:2 e:xy"},
		{8, 16, "r:line g:2 e:xy"},
		{17, 17, "g:2 e:xy"},
		{18, 18, "g:1 e:xy"},
		{19, 24, "e:xy"},
		{25, 25, "e:y"},
		{26, 99, ""},
	}
	for _, tt := range tests {
		for from := tt.from; from <= tt.to; from++ {
			if got := text(t, l, from); got != tt.want {
				t.Errorf("from %d: read %q, want %q", from, got, tt.want)
			}
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	good := frame(job.Out, "good")
	tests := []struct {
		name   string
		frames []byte
	}{
		{"half a header", []byte{'o', 0, 0}},
		{"half a payload", frame(job.Out, "abc")[:7]},
		{"unknown kind", frame('?', "")},
		{"kind that is not logged", frame(job.File, "x")},
		{"result", frame(job.Final, "{}")},
		{"too long", []byte{'o', 0xff, 0xff, 0xff, 0xff}},
		{"short gap", frame(job.Gap, "1234567")},
		{"long gap", frame(job.Gap, "123456789")},
		{"gap of nothing", gapFrame(0)},
		{"gap beyond all offsets", gapFrame(1 << 63)},
		{"two gaps beyond all offsets", append(gapFrame(maxEnd-100), gapFrame(maxEnd-100)...)},
	}
	l := open(t, t.TempDir(), 0)
	add(t, l, good)
	for _, tt := range tests {
		err := l.Append(append(bytes.Clone(good), tt.frames...))
		if !errors.Is(err, job.ErrFrame) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: Append = %v, want a malformed frame", tt.name, err)
		}
		if got, want := text(t, l, 0), "o:good"; got != want {
			t.Fatalf("%s: the log now reads %q, want %q", tt.name, got, want)
		}
	}
}

func TestSealAndClose(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 0)
	add(t, l, frame(job.Out, "a"))
	for range 2 {
		if err := l.Seal(); err != nil || !l.Sealed() {
			t.Fatalf("Seal() = %v, Sealed() = %v, want nil, true", err, l.Sealed())
		}
	}
	if err := l.Append(frame(job.Out, "b")); err != ErrSealed {
		t.Errorf("Append to a sealed log = %v, want %v", err, ErrSealed)
	}
	r := l.Reader(0)
	defer r.Close()
	for range 2 {
		if err := l.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if c, err := r.Next(t.Context()); err != nil || string(c.Data) != "a" {
		t.Errorf("Next of a sealed log that was closed = %q, %v, want \"a\", nil", c.Data, err)
	}
	for range 2 {
		if _, err := r.Next(t.Context()); err != io.EOF {
			t.Errorf("Next at the end = %v, want EOF", err)
		}
	}
	if l := open(t, dir, 0); !l.Sealed() || l.Size() != 6 {
		t.Errorf("opened again: Sealed() = %v, Size() = %d, want true, 6", l.Sealed(), l.Size())
	}

	l = open(t, t.TempDir(), 0)
	l.Close()
	if err := l.Append(nil); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Append to a closed log = %v, want %v", err, fs.ErrClosed)
	}
	if err := l.Seal(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Seal of a closed log = %v, want %v", err, fs.ErrClosed)
	}
	r = l.Reader(0)
	defer r.Close()
	if _, err := r.Next(t.Context()); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Next of a closed log = %v, want %v", err, fs.ErrClosed)
	}
}

// A waiting reader is woken by each append, by Seal and by Close, and by its context.
func TestWaitingReader(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		why := errors.New("the window was closed")
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error)
		go func() {
			r := l.Reader(0)
			defer r.Close()
			for {
				c, err := r.Next(ctx)
				if err != nil {
					done <- err
					return
				}
				got = append(got, string(c.Data))
			}
		}()
		for i, s := range []string{"a", "b", "c"} {
			synctest.Wait()
			add(t, l, frame(job.Out, s))
			synctest.Wait()
			if len(got) != i+1 || got[i] != s {
				t.Errorf("after appending %q the reader has %q", s, got)
			}
		}
		cancel(why)
		if err := <-done; err != why {
			t.Errorf("Next after cancelling = %v, want the cause", err)
		}
		for _, tt := range []struct {
			end  func() error
			want error
		}{{l.Seal, io.EOF}, {l.Close, io.EOF}} {
			go func() {
				r := l.Reader(l.Size())
				defer r.Close()
				_, err := r.Next(context.Background())
				done <- err
			}()
			synctest.Wait()
			if err := tt.end(); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != tt.want {
				t.Errorf("Next = %v, want %v", err, tt.want)
			}
		}
	})
}

// While it waits, a reader holds neither a buffer nor a file of its own.
func TestWaitingReaderHoldsNothing(t *testing.T) {
	l := open(t, t.TempDir(), 0)
	add(t, l, frame(job.Out, strings.Repeat("x", 100_000)))
	r := l.Reader(0)
	defer r.Close()
	for {
		if _, err := r.Next(ended()); err != nil {
			break
		}
	}
	if r.buf != nil || r.pooled != nil {
		t.Errorf("a buffer of %d bytes is still held", len(r.buf))
	}
	if r.file != l.current().file {
		t.Error("the reader has a file of its own")
	}
}

// Whatever part of the last frame a crash left, the log ends with the frame before it.
func TestTornTail(t *testing.T) {
	first, last := frame(job.Out, "first"), frame(job.Err, "last words")
	for cut := range len(last) {
		for _, zeros := range []int{0, 1, 64} { // some file systems leave zeros at the end
			if cut > 0 && zeros > 0 {
				continue // zeros that complete a frame cannot be told from output
			}
			dir := t.TempDir()
			data := append(append(bytes.Clone(first), last[:cut]...), make([]byte, zeros)...)
			if err := os.WriteFile(filepath.Join(dir, "0000000000000000.seg"), data, 0o600); err != nil {
				t.Fatal(err)
			}
			l := open(t, dir, 0)
			if got, want := l.Size(), int64(len(first)); got != want {
				t.Fatalf("cut at %d: Size() = %d, want %d", cut, got, want)
			}
			add(t, l, last)
			if got, want := text(t, l, 0), "o:first e:last words"; got != want {
				t.Fatalf("cut at %d: read %q, want %q", cut, got, want)
			}
		}
	}
}

// A power cut may take the end of an older segment and leave newer ones. What comes
// after the loss is of no use: the runner sends from the loss on.
func TestLostMiddle(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 16*minSegment)
	block := frame(job.Out, strings.Repeat("x", minSegment-job.HeaderLen))
	for range 3 {
		add(t, l, block)
	}
	l.Close()
	lost := filepath.Join(dir, fmt.Sprintf("%016x.seg", minSegment))
	if err := os.Truncate(lost, 100); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir, 16*minSegment)
	if got, want := l.Size(), int64(minSegment); got != want {
		t.Errorf("Size() = %d, want %d", got, want)
	}
	add(t, l, frame(job.Err, "again"))
	if got := text(t, l, minSegment); got != "e:again" {
		t.Errorf("read %q, want %q", got, "e:again")
	}
}

// The limit keeps the first and the last half and says what is missing.
func TestLimit(t *testing.T) {
	const limit = 1 << 20
	for _, payload := range []int{10, 1000, 32 << 10} {
		t.Run(fmt.Sprint(payload), func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir, limit)
			size := int64(job.HeaderLen + payload)
			n := 5 * limit / size
			for i := range n {
				b := fmt.Appendf(make([]byte, 0, payload), "%09d\n", i)
				add(t, l, job.AppendFrame(nil, job.Out, b[:payload]))
				if kept := l.Size() - l.Dropped(); kept > limit {
					t.Fatalf("%d bytes kept, want at most %d", kept, limit)
				}
			}
			for _, l := range []*Log{l, reopen(t, l, dir, limit)} {
				checkLimit(t, l, limit, size)
			}
			if used := diskUse(t, dir); used > limit {
				t.Errorf("the folder holds %d bytes, want at most %d", used, limit)
			}
		})
	}
}

func reopen(t *testing.T, l *Log, dir string, limit int64) *Log {
	t.Helper()
	l.Close()
	return open(t, dir, limit)
}

func checkLimit(t *testing.T, l *Log, limit, frame int64) {
	t.Helper()
	r := l.Reader(0)
	defer r.Close()
	var head, tail, gaps int64
	for {
		c, err := r.Next(ended())
		if err != nil {
			break
		}
		if c.Kind == job.Gap {
			head, tail = c.End-c.Dropped, l.Size()-c.End
			gaps++
			if got := l.Dropped(); c.Dropped != got {
				t.Errorf("the gap is %d bytes, Dropped() = %d", c.Dropped, got)
			}
		}
	}
	if gaps != 1 {
		t.Errorf("%d gaps, want 1", gaps)
	}
	if head > limit/2 || head <= limit/2-frame {
		t.Errorf("head of %d bytes, want half of %d", head, limit)
	}
	if least := limit/2 - l.segmentSize() - 2*frame; tail < least {
		t.Errorf("tail of %d bytes, want at least %d", tail, least)
	}
}

func diskUse(t *testing.T, dir string) (n int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

// Gaps cost a file each; a peer who sends only those must not fill the folder.
func TestManyGaps(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 0)
	one := append(gapFrame(1), frame(job.Out, "x")...)
	n := maxSegments + 100
	add(t, l, bytes.Repeat(one, n))
	if got := len(l.segs); got > maxSegments {
		t.Errorf("%d segments, want at most %d", got, maxSegments)
	}
	if got, want := l.Size(), int64(n*7); got != want {
		t.Errorf("Size() = %d, want %d", got, want)
	}
}

// A reader in a segment that is dropped meanwhile finishes it.
func TestReaderKeepsDroppedSegment(t *testing.T) {
	const limit = 16 * minSegment
	l := open(t, t.TempDir(), limit)
	block := frame(job.Out, strings.Repeat("x", minSegment-job.HeaderLen))
	for range 9 {
		add(t, l, block)
	}
	r := l.Reader(8 * minSegment)
	defer r.Close()
	if _, err := r.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 16 {
		add(t, l, block)
	}
	if l.segs[8].start == 8*minSegment {
		t.Fatal("the segment was not dropped")
	}
	var seen, gap int64
	for {
		c, err := r.Next(ended())
		if err != nil {
			break
		}
		seen, gap = seen+int64(len(c.Data)), gap+c.Dropped
	}
	if gap == 0 || seen == 0 {
		t.Errorf("read on for %d bytes and a gap of %d, want both", seen, gap)
	}
}

// ReadRaw of one log, appended to another, makes the same log, from wherever it resumes.
func TestReadRawCopies(t *testing.T) {
	const limit = 1 << 20
	src := open(t, t.TempDir(), limit)
	dst := open(t, t.TempDir(), limit)
	buf := make([]byte, job.HeaderLen+job.MaxFrame)
	for round := range 20 {
		for i := range 300 {
			kind := []job.Kind{job.Out, job.Err, job.Raid, job.Mark}[i%4]
			add(t, src, frame(kind, strings.Repeat("z", i*round%700)))
		}
		r := src.Reader(dst.Size())
		for {
			n, err := r.ReadRaw(ended(), buf)
			if err != nil {
				break
			}
			add(t, dst, buf[:n])
		}
		r.Close()
		if dst.Size() != src.Size() {
			t.Fatalf("round %d: copied to %d of %d", round, dst.Size(), src.Size())
		}
	}
	if a, b := text(t, src, 0), text(t, dst, 0); a != b {
		t.Error("the copy reads differently")
	}
}

func TestReadRawErrors(t *testing.T) {
	l := open(t, t.TempDir(), 0)
	add(t, l, frame(job.Out, strings.Repeat("x", 100)))
	for _, tt := range []struct {
		from int64
		buf  int
		want error
	}{
		{0, gapLen - 1, io.ErrShortBuffer},
		{0, 50, io.ErrShortBuffer},
		{50, 200, errBoundary},
		{0, 105, nil},
		{105, 105, context.Canceled},
		{900, 105, context.Canceled},
	} {
		r := l.Reader(tt.from)
		if n, err := r.ReadRaw(ended(), make([]byte, tt.buf)); !errors.Is(err, tt.want) {
			t.Errorf("ReadRaw from %d into %d bytes = %d, %v, want %v", tt.from, tt.buf, n, err, tt.want)
		}
		r.Close()
	}
}

// Many readers see the same bytes while the log is written, none of them late.
func TestConcurrentReaders(t *testing.T) {
	const limit, readers = 4 << 20, 100
	l := open(t, t.TempDir(), limit)
	var wg sync.WaitGroup
	sums := make([][]byte, readers)
	for i := range readers {
		wg.Go(func() {
			r := l.Reader(0)
			defer r.Close()
			for {
				c, err := r.Next(context.Background())
				if err == io.EOF {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				sums[i] = append(append(sums[i], byte(c.Kind)), c.Data...)
			}
		})
	}
	var want []byte
	for i := range 1000 {
		f := frame([]job.Kind{job.Raid, job.Mark}[i%2], strings.Repeat("l", i))
		want = append(append(want, f[0]), f[job.HeaderLen:]...)
		add(t, l, f)
	}
	if err := l.Seal(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	for i, got := range sums {
		if !bytes.Equal(got, want) {
			t.Fatalf("reader %d has %d bytes, want %d", i, len(got), len(want))
		}
	}
	if n := len(l.segs); n < 2 {
		t.Errorf("%d segments: the test did not cross a border", n)
	}
}

func TestSync(t *testing.T) {
	l := open(t, t.TempDir(), 16*minSegment)
	for range 40 {
		add(t, l, frame(job.Out, strings.Repeat("x", 3000)))
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range l.segs {
		if s.synced != s.size {
			t.Errorf("segment at %d: %d of %d bytes synced", s.start, s.synced, s.size)
		}
	}
}
