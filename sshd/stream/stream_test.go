package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
)

func spools(t testing.TB, dir string) *Spools {
	t.Helper()
	s := New(dir, t.Errorf)
	t.Cleanup(func() { s.Close() })
	return s
}

func attemptOf(t testing.TB, s *Spools, id int64, n int) *spool.Log {
	t.Helper()
	l, err := s.Attempt(id, n, 0)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func say(t testing.TB, l *spool.Log, k job.Kind, text string) {
	t.Helper()
	if err := l.Append(job.AppendFrame(nil, k, []byte(text))); err != nil {
		t.Fatal(err)
	}
}

func finish(t testing.TB, s *Spools, id int64) {
	t.Helper()
	if err := s.Finish(id); err != nil {
		t.Fatal(err)
	}
}

// words reads f to its end, or as far as ctx lets it: "o:text e:text@12", with the last
// offset after the @.
func words(t testing.TB, ctx context.Context, f *Follower) (string, error) {
	t.Helper()
	var b strings.Builder
	for {
		c, err := f.Next(ctx)
		if err != nil {
			return strings.TrimSpace(b.String()), err
		}
		if c.Kind == job.Gap {
			fmt.Fprintf(&b, "g:%d@%d ", c.Dropped, c.End)
		} else {
			fmt.Fprintf(&b, "%c:%s@%d ", c.Kind, c.Data, c.End)
		}
	}
}

func TestFollowAttempts(t *testing.T) {
	dir := t.TempDir()
	s := spools(t, dir)
	one := attemptOf(t, s, 17, 1)
	if attemptOf(t, s, 17, 1) != one {
		t.Error("the same attempt has two logs")
	}
	say(t, one, job.Out, "one")
	three := attemptOf(t, s, 17, 3) // the second never said anything
	if err := one.Append(nil); err != spool.ErrSealed {
		t.Errorf("Append to a superseded attempt = %v, want %v", err, spool.ErrSealed)
	}
	for _, n := range []int{1, 2} {
		if _, err := s.Attempt(17, n, 0); !errors.Is(err, ErrOver) {
			t.Errorf("Attempt(17, %d) = %v, want %v", n, err, ErrOver)
		}
	}
	say(t, three, job.Raid, "runner lost")
	say(t, three, job.Err, "three")
	const want = "o:one@8 r:runner lost@24 e:three@34"
	check := func(s *Spools, when string, end error) {
		t.Helper()
		f := s.Follow(17)
		defer f.Close()
		if got, err := words(t, ended(), f); got != want || err != end {
			t.Errorf("%s: followed %q, %v, want %q, %v", when, got, err, want, end)
		}
		r := s.Replay(17)
		defer r.Close()
		if got, err := words(t, t.Context(), r); got != want || err != io.EOF {
			t.Errorf("%s: replayed %q, %v, want %q, EOF", when, got, err, want)
		}
	}
	check(s, "live", context.Canceled)
	s.Close()
	s = spools(t, dir)
	check(s, "after a restart", context.Canceled)
	for range 2 {
		finish(t, s, 17)
	}
	check(s, "finished", io.EOF)
	if _, err := s.Attempt(17, 4, 0); !errors.Is(err, ErrOver) {
		t.Errorf("Attempt of a finished job = %v, want %v", err, ErrOver)
	}
	s.Close()
	s = spools(t, dir)
	check(s, "finished, after a restart", io.EOF)
	if n := len(s.feeds); n != 0 {
		t.Errorf("%d feeds are in memory, want none", n)
	}
}

// A follower waits for the first attempt, for more, for the next and for the end.
func TestFollowerWaits(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := New(dir, t.Errorf)
		var mu sync.Mutex
		var got []string
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				f := s.Follow(5)
				defer f.Close()
				for {
					c, err := f.Next(context.Background())
					if err == io.EOF {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					if i == 0 {
						mu.Lock()
						got = append(got, string(c.Data))
						mu.Unlock()
					}
				}
			})
		}
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("the follower has %q, want %q", got, want)
			}
		}
		expect()
		one := attemptOf(t, s, 5, 1)
		expect()
		say(t, one, job.Out, "a")
		expect("a")
		if err := one.Seal(); err != nil {
			t.Fatal(err)
		}
		expect("a")
		two := attemptOf(t, s, 5, 2)
		say(t, two, job.Out, "b")
		expect("a", "b")
		finish(t, s, 5)
		wg.Wait()
	})
}

// TestFinishUnmarked: followers of a job that has ended go, though the disk takes no mark.
func TestFinishUnmarked(t *testing.T) {
	dir := t.TempDir()
	s := spools(t, dir)
	say(t, attemptOf(t, s, 5, 1), job.Out, "last words")
	f := s.Follow(5)
	defer f.Close()
	if err := os.Mkdir(filepath.Join(dir, "5", doneName), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Finish(5); err == nil {
		t.Error("Finish of a job that could not be marked = nil")
	}
	if got, err := words(t, ended(), f); err != io.EOF {
		t.Errorf("the follower read %q, %v, want io.EOF", got, err)
	}
}

func TestFollowEnds(t *testing.T) {
	tests := []struct {
		name string
		do   func(*Spools) error
		want error
	}{
		{"finished without an attempt", func(s *Spools) error { return s.Finish(5) }, io.EOF},
		{"removed", func(s *Spools) error { return s.Remove(5) }, fs.ErrNotExist},
		{"closed", func(s *Spools) error { return s.Close() }, fs.ErrClosed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := spools(t, t.TempDir())
			f := s.Follow(5)
			defer f.Close()
			if _, err := f.Next(ended()); !errors.Is(err, context.Canceled) {
				t.Errorf("Next of a job that has not begun = %v, want to wait", err)
			}
			if err := tt.do(s); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Next(t.Context()); !errors.Is(err, tt.want) {
				t.Errorf("Next = %v, want %v", err, tt.want)
			}
		})
	}
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	s := spools(t, dir)
	say(t, attemptOf(t, s, 5, 1), job.Out, "a")
	finish(t, s, 5)
	for range 2 {
		if err := s.Remove(5); err != nil {
			t.Errorf("Remove = %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "5")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder of a removed job: %v, want none", err)
	}
	if len(s.feeds) != 0 {
		t.Errorf("%d feeds are in memory, want none", len(s.feeds))
	}
}

func TestSkip(t *testing.T) {
	s := spools(t, t.TempDir())
	say(t, attemptOf(t, s, 5, 1), job.Out, "abc") // 0 to 8
	say(t, attemptOf(t, s, 5, 2), job.Err, "xyz") // 8 to 16
	finish(t, s, 5)
	f := s.Follow(5)
	defer f.Close()
	for _, tt := range []struct {
		to   int64
		want string
	}{
		{0, "o:abc@8 e:xyz@16"}, {6, "o:bc@8 e:xyz@16"}, {8, "e:xyz@16"}, {15, "e:z@16"}, {16, ""}, {99, ""}, {-1, "o:abc@8 e:xyz@16"},
	} {
		f.Skip(tt.to)
		if got, err := words(t, t.Context(), f); got != tt.want || err != io.EOF {
			t.Errorf("Skip(%d): %q, %v, want %q, EOF", tt.to, got, err, tt.want)
		}
	}
}

func TestTail(t *testing.T) {
	plain := func(t *testing.T, f *Follower) (out string) {
		for {
			c, err := f.Next(ended())
			if err != nil {
				return out
			}
			out += string(c.Data)
		}
	}
	tests := []struct {
		frames string // o and e frames, one letter each before the text, split by |
		lines  int
		want   string
	}{
		{"oa\n|ob\n|oc\n", 2, "b\nc\n"},
		{"oa\nb\nc\n", 1, "c\n"},
		{"oa\nb\nc", 1, "c"},
		{"oa\nb\nc", 2, "b\nc"},
		{"oa\n|eb\n|rsaid|oc\n", 2, "b\nsaidc\n"},
		{"oa\n|rsaid|ob\n", 1, "saidb\n"},
		{"oa\n", 0, ""},
		{"oa\n", -1, ""},
		{"oa\n", 9, "a\n"},
		{"oa|ob|oc\n|od", 2, "abc\nd"},
		{"", 3, ""},
	}
	for _, tt := range tests {
		s := spools(t, t.TempDir())
		l := attemptOf(t, s, 1, 1)
		for i, p := range strings.Split(tt.frames, "|") {
			if i == 1 { // a border between attempts must not matter
				l = attemptOf(t, s, 1, 2)
			}
			if p != "" {
				say(t, l, job.Kind(p[0]), p[1:])
			}
		}
		f := s.Follow(1)
		if err := f.Tail(t.Context(), tt.lines); err != nil {
			t.Fatal(err)
		}
		if got := plain(t, f); got != tt.want {
			t.Errorf("Tail(%d) of %q = %q, want %q", tt.lines, tt.frames, got, tt.want)
		}
		f.Close()
	}
}

// The limit of an attempt holds again after a restart.
func TestLimitAfterRestart(t *testing.T) {
	const limit = 1 << 20
	dir := t.TempDir()
	s := spools(t, dir)
	l, err := s.Attempt(5, 1, limit)
	if err != nil {
		t.Fatal(err)
	}
	say(t, l, job.Out, "a")
	s.Close()
	s = spools(t, dir)
	f := s.Follow(5) // opens the log without knowing a limit
	defer f.Close()
	if l, err = s.Attempt(5, 1, limit); err != nil {
		t.Fatal(err)
	}
	for range 300 {
		say(t, l, job.Out, strings.Repeat("x", 10_000))
	}
	if kept := l.Size() - l.Dropped(); kept > limit {
		t.Errorf("%d bytes kept, want at most %d", kept, limit)
	}
}

// Feeds come and go under followers, appenders and finishers.
func TestConcurrentUse(t *testing.T) {
	s := spools(t, t.TempDir())
	var wg sync.WaitGroup
	for id := range int64(20) {
		for range 5 {
			wg.Go(func() {
				f := s.Follow(id)
				defer f.Close()
				got, err := words(t, context.Background(), f)
				if !strings.HasSuffix(got, "last@36") || err != io.EOF {
					t.Errorf("job %d: %q, %v", id, got, err)
				}
			})
		}
		wg.Go(func() {
			for n := 1; n <= 4; n++ {
				l, err := s.Attempt(id, n, 0)
				if err != nil {
					t.Error(err)
					return
				}
				if err := l.Append(job.AppendFrame(nil, job.Raid, []byte("last"))); err != nil {
					t.Error(err)
				}
			}
			if err := s.Finish(id); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(s.feeds) != 0 {
		t.Errorf("%d feeds are in memory, want none", len(s.feeds))
	}
}

// A removed log ends its readers, as removed and not as a fault of the disk.
func TestRemoveWhileRead(t *testing.T) {
	for _, done := range []bool{true, false} {
		s := spools(t, t.TempDir())
		say(t, attemptOf(t, s, 5, 1), job.Out, "a")
		if done {
			finish(t, s, 5)
		}
		f := s.Follow(5)
		defer f.Close()
		if c, err := f.Next(t.Context()); err != nil || string(c.Data) != "a" {
			t.Fatalf("Next = %q, %v, want a", c.Data, err)
		}
		if err := s.Remove(5); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Next(t.Context()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("done %v: Next after Remove = %v, want fs.ErrNotExist", done, err)
		}
	}
}

func TestListAndUsage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spool")
	s := spools(t, dir)
	list := func() (ids []int64) {
		for id, err := range s.List() {
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, id)
		}
		slices.Sort(ids)
		return ids
	}
	if ids := list(); len(ids) > 0 {
		t.Errorf("List of no folder = %v", ids)
	}
	for id := range int64(3) {
		say(t, attemptOf(t, s, id, 1), job.Out, strings.Repeat("a", 100_000))
	}
	if err := os.Mkdir(filepath.Join(dir, "not a number"), 0o700); err != nil {
		t.Fatal(err)
	}
	if ids := list(); !slices.Equal(ids, []int64{0, 1, 2}) {
		t.Errorf("List = %v, want 0, 1 and 2", ids)
	}
	if n, err := s.Usage(1); n < 100_000 || n > 200_000 || err != nil {
		t.Errorf("Usage = %d, %v, want what du says of 100000 bytes", n, err)
	}
	if n, err := s.Usage(9); n != 0 || err != nil {
		t.Errorf("Usage of nothing = %d, %v, want 0", n, err)
	}
}
