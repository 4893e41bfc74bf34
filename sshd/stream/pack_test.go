package stream

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"

	"github.com/rai-project/raid/runner/job"
)

// saga makes the output of job 17: two attempts, the second with its middle dropped.
func saga(t testing.TB, s *Spools) {
	t.Helper()
	one := attemptOf(t, s, 17, 1)
	say(t, one, job.Out, "first try\n")
	say(t, one, job.Err, "no\n")
	three, err := s.Attempt(17, 3, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	say(t, three, job.Raid, "once more")
	say(t, three, job.Mark, `{"n":1}`)
	for i := range 4000 {
		say(t, three, job.Out, fmt.Sprintf("line %d of stdout, \xff\x00\n", i))
		say(t, three, job.Err, strings.Repeat("e", i%50)+"\n")
	}
	if err := three.Seal(); err != nil {
		t.Fatal(err)
	}
	if three.Dropped() == 0 {
		t.Fatal("nothing was dropped: the limit is too large for this test")
	}
}

func pack(t testing.TB, s *Spools, id int64) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := s.Pack(t.Context(), id, &b)
	if err != nil {
		t.Fatal(err)
	}
	if size, err := s.Size(id); err != nil || size != n {
		t.Errorf("Pack = %d, and Size = %d, %v", n, size, err)
	}
	return b.Bytes()
}

// replay is all that a follower sees.
func replay(t testing.TB, s *Spools, id int64) string {
	t.Helper()
	f := s.Follow(id)
	defer f.Close()
	all, err := words(t, t.Context(), f)
	if err != io.EOF {
		t.Fatalf("a finished job's output ends with %v", err)
	}
	return all
}

// What was packed here reads there as it does here, from any offset, after a restart, too.
func TestPack(t *testing.T) {
	here, dir := spools(t, t.TempDir()), t.TempDir()
	there := spools(t, dir)
	saga(t, here)
	b := pack(t, here, 17)
	finish(t, here, 17)
	want := replay(t, here, 17)
	for range 2 { // over nothing, and over itself
		if err := there.Restore(17, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		if got := replay(t, there, 17); got != want {
			t.Errorf("restored output has %d bytes of words, or others, want %d", len(got), len(want))
		}
	}
	for _, from := range []int64{0, 1, 20, 40_000, 200_000} {
		f, g := here.Follow(17), there.Follow(17)
		f.Skip(from)
		g.Skip(from)
		a, _ := words(t, t.Context(), f)
		if b, _ := words(t, t.Context(), g); a != b {
			t.Errorf("from %d on the output differs", from)
		}
		f.Close()
		g.Close()
	}
	again := spools(t, dir)
	if got := replay(t, again, 17); got != want {
		t.Error("after a restart the restored output differs")
	}
	if _, err := again.Attempt(17, 4, 0); !errors.Is(err, ErrOver) {
		t.Errorf("an attempt after Restore = %v, want ErrOver", err)
	}
	if c := pack(t, again, 17); !bytes.Equal(b, c) {
		t.Error("packed again it is another pack: it would be another blob")
	}
}

// A raid that comes back has less of a job than the one that took over: it is replaced, and
// who waits for more of it gets what there is.
func TestRestoreOverLess(t *testing.T) {
	here, there := spools(t, t.TempDir()), spools(t, t.TempDir())
	saga(t, here)
	b := pack(t, here, 17)
	finish(t, here, 17)
	say(t, attemptOf(t, there, 17, 1), job.Out, "first")
	old := there.Follow(17)
	defer old.Close()
	if c, err := old.Next(t.Context()); err != nil || string(c.Data) != "first" {
		t.Fatalf("Next = %q, %v", c.Data, err)
	}
	if err := there.Restore(17, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if _, err := old.Next(t.Context()); err == nil {
		t.Error("a follower of what was replaced goes on as if it were the same")
	}
	if replay(t, there, 17) != replay(t, here, 17) {
		t.Error("restored output differs")
	}
}

func TestPackEdges(t *testing.T) {
	here, there := spools(t, t.TempDir()), spools(t, t.TempDir())
	// Cancelled before it ran: there is no output, and it is complete.
	if err := there.Restore(5, bytes.NewReader(pack(t, here, 5))); err != nil {
		t.Fatal(err)
	}
	if got := replay(t, there, 5); got != "" {
		t.Errorf("output of a job that never ran = %q", got)
	}
	// Still running: it is not.
	say(t, attemptOf(t, here, 6, 1), job.Out, "more to come")
	if n, err := here.Pack(t.Context(), 6, io.Discard); err == nil {
		t.Errorf("Pack of what is not sealed = %d, want an error", n)
	}
}

// Half a pack, or a rotten one, or none, changes nothing and leaves nothing; what cannot
// be read is not taken for a bad one.
func TestRestoreBad(t *testing.T) {
	dir := t.TempDir()
	s := spools(t, dir)
	saga(t, s)
	b := pack(t, s, 17)
	finish(t, s, 17)
	want := replay(t, s, 17)
	bad := map[string][]byte{"nothing": {}, "text": []byte("hello, this is no pack"), "too much": append(bytes.Clone(b), b...)}
	for i := 0; i < len(b); i += max(1, len(b)/60) {
		bad[fmt.Sprint("the first ", i)] = b[:i]
		rotten := bytes.Clone(b)
		rotten[i] ^= 0x20
		bad[fmt.Sprint("another byte at ", i)] = rotten
	}
	for what, b := range bad {
		if err := s.Restore(17, bytes.NewReader(b)); !errors.Is(err, ErrPack) {
			t.Errorf("Restore of %s = %v, want ErrPack", what, err)
		}
	}
	down := errors.New("connection reset")
	err := s.Restore(17, io.MultiReader(bytes.NewReader(b[:len(b)/2]), iotest.ErrReader(down)))
	if !errors.Is(err, down) || errors.Is(err, ErrPack) {
		t.Errorf("Restore from what breaks off = %v, want %v", err, down)
	}
	if got := replay(t, s, 17); got != want {
		t.Error("a failed Restore changed what was there")
	}
	if left, err := filepath.Glob(filepath.Join(dir, restoring+"*")); err != nil || len(left) > 0 {
		t.Errorf("a failed Restore left %q, %v", left, err)
	}
}

// What a process that was killed was restoring goes with the next start.
func TestRestoreSwept(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, restoring+"1", "1"), 0o700); err != nil {
		t.Fatal(err)
	}
	spools(t, dir)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("after a start %v are there, %v", left, err)
	}
}

// FuzzRestore is given what is in a pack: no fuzzer finds its way through a checksum.
func FuzzRestore(f *testing.F) {
	begun := job.AppendFrame(nil, job.Begun, []byte{0, 0, 0, 0, 0, 0, 0, 1})
	out := job.AppendFrame(nil, job.Out, []byte("out"))
	gap := job.AppendFrame(nil, job.Gap, []byte{0, 0, 0, 0, 0, 0, 1, 0})
	end := job.AppendFrame(nil, job.Final, nil)
	f.Add(slices.Concat(begun, out, gap, out, end))
	f.Add(slices.Concat(begun, end))
	f.Add(slices.Concat(out, end))
	f.Fuzz(func(t *testing.T, frames []byte) {
		var b bytes.Buffer
		z, err := zstd.NewWriter(&b, zstd.WithWindowSize(packWindow))
		if err != nil {
			t.Fatal(err)
		}
		z.Write(frames)
		z.Close()
		s := spools(t, t.TempDir())
		if err := s.Restore(1, &b); err != nil {
			return
		}
		all := replay(t, s, 1)
		if err := s.Restore(2, bytes.NewReader(pack(t, s, 1))); err != nil || replay(t, s, 2) != all {
			t.Errorf("packed and restored again: %v, or other output", err)
		}
	})
}
