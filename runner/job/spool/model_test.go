package spool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/rai-project/raid/runner/job"
	"pgregory.net/rapid"
)

// A model is a log in memory: for every logical byte its kind (0: not payload, 'g':
// sent as a gap) and value, and where frames begin.
type model struct {
	kind  []byte
	value []byte
	start []int64
}

func (m *model) append(k job.Kind, payload []byte) {
	m.start = append(m.start, int64(len(m.kind)))
	m.kind = append(append(m.kind, make([]byte, job.HeaderLen)...), bytes.Repeat([]byte{byte(k)}, len(payload))...)
	m.value = append(append(m.value, make([]byte, job.HeaderLen)...), payload...)
}

func (m *model) gap(n int) {
	m.start = append(m.start, int64(len(m.kind)))
	m.kind = append(m.kind, bytes.Repeat([]byte{byte(job.Gap)}, n)...)
	m.value = append(m.value, make([]byte, n)...)
}

// chunk checks that c is what the model has from pos on, and returns where it ends.
func (m *model) chunk(pos int64, c Chunk) (int64, error) {
	if c.Kind == job.Gap {
		// Frames without payload may lie between; they make no chunk of their own.
		from := c.End - c.Dropped
		if from < pos || c.End > int64(len(m.kind)) || len(bytes.Trim(m.kind[pos:from], "\x00")) > 0 {
			return 0, fmt.Errorf("gap of %d from %d ends at %d", c.Dropped, pos, c.End)
		}
		return c.End, nil
	}
	if c.End < pos || c.End > int64(len(m.kind)) {
		return 0, fmt.Errorf("chunk from %d ends at %d of %d", pos, c.End, len(m.kind))
	}
	var want []byte
	for i := pos; i < c.End; i++ {
		switch job.Kind(m.kind[i]) {
		case 0:
		case c.Kind:
			want = append(want, m.value[i])
		default:
			return 0, fmt.Errorf("chunk of kind %c from %d covers a byte of kind %c at %d", c.Kind, pos, m.kind[i], i)
		}
	}
	if !bytes.Equal(c.Data, want) {
		return 0, fmt.Errorf("chunk from %d to %d is %d bytes, want %d", pos, c.End, len(c.Data), len(want))
	}
	return c.End, nil
}

// A cursor is a reader and where it should be.
type cursor struct {
	r   *Reader
	pos int64
}

// read reads on for at most n chunks.
func (c *cursor) read(m *model, n int) (dropped int64, err error) {
	for range n {
		chunk, err := c.r.Next(ended())
		if errors.Is(err, context.Canceled) || err == io.EOF {
			return dropped, nil
		}
		if err != nil {
			return dropped, err
		}
		dropped += chunk.Dropped
		if c.pos, err = m.chunk(c.pos, chunk); err != nil {
			return dropped, err
		}
	}
	return dropped, nil
}

// A machine drives a Log and a model side by side.
type machine struct {
	dir     string
	limit   int64
	l       *Log
	m       model
	cursors []*cursor
}

func (x *machine) appendFrames(t *rapid.T) {
	var b []byte
	for range rapid.IntRange(1, 8).Draw(t, "frames") {
		if rapid.IntRange(0, 9).Draw(t, "gap?") == 0 {
			n := rapid.IntRange(1, 3000).Draw(t, "gap")
			b = append(b, gapFrame(uint64(n))...)
			x.m.gap(n)
			continue
		}
		k := rapid.SampledFrom([]job.Kind{job.Out, job.Err, job.Raid, job.Mark}).Draw(t, "kind")
		n := rapid.OneOf(rapid.IntRange(0, 20), rapid.IntRange(0, 5000), rapid.Just(70_000)).Draw(t, "len")
		payload := bytes.Repeat([]byte{byte(len(x.m.start))}, n)
		b = job.AppendFrame(b, k, payload)
		x.m.append(k, payload)
	}
	if err := x.l.Append(b); err != nil {
		t.Fatal(err)
	}
}

func (x *machine) reopen(t *rapid.T) {
	for _, c := range x.cursors {
		c.r.Close()
	}
	x.cursors = nil
	x.l.Close()
	var err error
	if x.l, err = Open(x.dir, Options{Limit: x.limit}); err != nil {
		t.Fatal(err)
	}
}

// tear cuts bytes off the file that grows, as a crash would, and the model with it.
func (x *machine) tear(t *rapid.T) {
	s := x.l.current()
	path, start := x.l.path(s), s.start
	cut := rapid.Int64Range(0, s.size).Draw(t, "cut")
	if err := os.Truncate(path, cut); err != nil {
		t.Fatal(err)
	}
	end := start
	for _, at := range append(x.m.start, int64(len(x.m.kind))) {
		if at <= start+cut {
			end = max(end, at)
		}
	}
	x.m.kind, x.m.value = x.m.kind[:end], x.m.value[:end]
	for len(x.m.start) > 0 && x.m.start[len(x.m.start)-1] >= end {
		x.m.start = x.m.start[:len(x.m.start)-1]
	}
	x.reopen(t)
}

func (x *machine) newReader(t *rapid.T) {
	if len(x.m.start) == 0 || len(x.cursors) > 5 {
		return
	}
	from := rapid.SampledFrom(x.m.start).Draw(t, "from")
	x.cursors = append(x.cursors, &cursor{x.l.Reader(from), from})
}

func (x *machine) readSome(t *rapid.T) {
	for _, c := range x.cursors {
		if _, err := c.read(&x.m, rapid.IntRange(0, 5).Draw(t, "chunks")); err != nil {
			t.Fatal(err)
		}
	}
}

func (x *machine) check(t *rapid.T) {
	if got, want := x.l.Size(), int64(len(x.m.kind)); got != want {
		t.Fatalf("Size() = %d, want %d", got, want)
	}
	all := cursor{r: x.l.Reader(0)}
	defer all.r.Close()
	dropped, err := all.read(&x.m, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if got := x.l.Dropped(); got != dropped {
		t.Fatalf("Dropped() = %d, a reader missed %d", got, dropped)
	}
	kept, slack := x.l.Size()-dropped, int64(minSegment+3*(70_000+job.HeaderLen)) // a head, the newest, and the one before it
	if x.limit > 0 && kept > x.limit+slack {
		t.Fatalf("%d bytes kept, limit %d", kept, x.limit)
	}
}

func TestAgainstModel(t *testing.T) {
	base := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		x := &machine{
			dir:   filepath.Join(base, fmt.Sprint(n)),
			limit: rapid.SampledFrom([]int64{0, 20_000, 200_000}).Draw(t, "limit"),
		}
		x.reopenFirst(t)
		defer os.RemoveAll(x.dir)
		t.Repeat(map[string]func(*rapid.T){
			"append": x.appendFrames,
			"reopen": x.reopen,
			"tear":   x.tear,
			"reader": x.newReader,
			"read":   x.readSome,
			"":       x.check,
		})
		x.reopen(t)
		x.check(t)
		x.l.Close()
	})
}

func (x *machine) reopenFirst(t *rapid.T) {
	var err error
	if x.l, err = Open(x.dir, Options{Limit: x.limit}); err != nil {
		t.Fatal(err)
	}
}

// FuzzAppend: whatever a peer sends, it is taken whole or refused whole.
func FuzzAppend(f *testing.F) {
	f.Add([]byte("o\x00\x00\x00\x01a"), []byte("g\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x07"))
	f.Add([]byte("e\x00\x00\x00\x00"), []byte("s\x00\x00\x00\x02{}"))
	f.Add([]byte("o\x00\x10\x00\x01"), []byte("z\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		l := open(t, t.TempDir(), 8192)
		for _, in := range [][]byte{a, b} {
			before := l.Size()
			err := l.Append(in)
			if want := logicalLen(in); err != nil && l.Size() != before || err == nil && l.Size() != before+want {
				t.Fatalf("Append of %d bytes = %v, size %d → %d", len(in), err, before, l.Size())
			}
		}
		readAll(t, l)
	})
}

// logicalLen is how far well-formed frames move the end.
func logicalLen(b []byte) (n int64) {
	for len(b) >= job.HeaderLen {
		size := int(binary.BigEndian.Uint32(b[1:]))
		if size > len(b)-job.HeaderLen {
			return n
		}
		if job.Kind(b[0]) == job.Gap && size == 8 {
			n += int64(binary.BigEndian.Uint64(b[job.HeaderLen:]))
		} else {
			n += int64(job.HeaderLen + size)
		}
		b = b[job.HeaderLen+size:]
	}
	return n
}

// readAll reads the log both ways and checks that offsets add up.
func readAll(t *testing.T, l *Log) {
	t.Helper()
	r := l.Reader(0)
	defer r.Close()
	var end, dropped int64
	for {
		c, err := r.Next(ended())
		if err != nil {
			break
		}
		if c.End < end || c.End > l.Size() {
			t.Fatalf("chunk ends at %d after %d, log at %d", c.End, end, l.Size())
		}
		end, dropped = c.End, dropped+c.Dropped
	}
	if dropped < l.Dropped() {
		t.Fatalf("a reader missed %d bytes, Dropped() = %d", dropped, l.Dropped())
	}
	raw := l.Reader(0)
	defer raw.Close()
	buf := make([]byte, job.HeaderLen+job.MaxFrame)
	var at int64
	for {
		n, err := raw.ReadRaw(ended(), buf)
		if err != nil {
			break
		}
		if n == 0 {
			t.Fatal("ReadRaw returned nothing and no error")
		}
		at += logicalLen(buf[:n])
	}
	if at != l.Size() {
		t.Fatalf("ReadRaw ended at %d, log at %d", at, l.Size())
	}
}

// FuzzRecover: whatever bytes the disk has, the log opens, reads and goes on.
func FuzzRecover(f *testing.F) {
	f.Add([]byte("o\x00\x00\x00\x01a"), "0000000000000006.seg", []byte("e\x00\x00\x00\x01b"), false)
	f.Add([]byte("o\x00\x00\x00\x01a"), "0000000000000010-0000000000000006.seg", []byte("e\x00\x00"), false)
	f.Add([]byte("o\x00\x00\x00\x09a"), "0000000000000006.seg", []byte{}, true)
	f.Add([]byte("g\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x07"), "00ffffffffffffff.seg", []byte{1}, true)
	f.Fuzz(func(t *testing.T, first []byte, name string, second []byte, sealed bool) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "0000000000000000.seg"), first)
		if _, ok := parseName(name); ok {
			write(t, filepath.Join(dir, name), second)
		}
		if sealed {
			write(t, filepath.Join(dir, sealedName), nil)
		}
		l := open(t, dir, 8192)
		readAll(t, l)
		size := l.Size()
		if err := l.Append(frame(job.Raid, "more")); (err == nil) == sealed && size < maxEnd-100 {
			t.Fatalf("Append = %v, sealed %v", err, sealed)
		}
		readAll(t, l)
	})
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkAppend64K(b *testing.B) {
	l := open(b, b.TempDir(), 64<<20)
	f := job.AppendFrame(nil, job.Out, make([]byte, 64<<10))
	b.SetBytes(int64(len(f)))
	for b.Loop() {
		if err := l.Append(f); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppend256K(b *testing.B) {
	l := open(b, b.TempDir(), 64<<20)
	f := bytes.Repeat(job.AppendFrame(nil, job.Out, make([]byte, 64<<10-job.HeaderLen)), 4)
	b.SetBytes(int64(len(f)))
	for b.Loop() {
		if err := l.Append(f); err != nil {
			b.Fatal(err)
		}
	}
}

// A million lines, each its own frame and its own Append, as an unbatched job sends them.
func BenchmarkMillionLines(b *testing.B) {
	f := frame(job.Out, "line 0123456789\n")
	for b.Loop() {
		l := open(b, b.TempDir(), 64<<20)
		for range 1_000_000 {
			if err := l.Append(f); err != nil {
				b.Fatal(err)
			}
		}
		benchRead(b, l)
		l.Close()
	}
}

func BenchmarkReadMillionLines(b *testing.B) {
	l := open(b, b.TempDir(), 64<<20)
	many := bytes.Repeat(frame(job.Out, "line 0123456789\n"), 1000)
	for range 1000 {
		if err := l.Append(many); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(l.Size())
	for b.Loop() {
		benchRead(b, l)
	}
}

func BenchmarkRead64K(b *testing.B) {
	l := open(b, b.TempDir(), 64<<20)
	f := job.AppendFrame(nil, job.Out, make([]byte, 64<<10))
	for range 1000 {
		if err := l.Append(f); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(l.Size())
	for b.Loop() {
		benchRead(b, l)
	}
}

func benchRead(b *testing.B, l *Log) {
	b.Helper()
	r := l.Reader(0)
	defer r.Close()
	for {
		if _, err := r.Next(ended()); err != nil {
			return
		}
	}
}
