package stream

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/redis/go-redis/v9"
)

func brief(entries []redis.XMessage) (out []string) {
	for _, e := range entries {
		out = append(out, fmt.Sprintf("%s %v %v", e.ID, e.Values["s"], e.Values["d"]))
	}
	return out
}

func TestMirrorFormat(t *testing.T) {
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, _, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	l := attemptOf(t, s, 17, 1)
	say(t, l, job.Out, "hello\n")   // ends at 11
	say(t, l, job.Mark, "{}")       // 18
	say(t, l, job.Raid, "a remark") // 31
	say(t, l, job.Err, "oh")        // 38
	say(t, l, job.Out, "")          // 43
	say(t, l, job.Gap, "\x00\x00\x00\x00\x00\x00\x03\xe8")
	l = attemptOf(t, s, 17, 2) // 1043
	say(t, l, job.Out, "again\n")
	say(t, l, job.Mark, "{}") // 1061
	m.Watch(17)
	m.Watch(17)
	exit := 3
	j := job.Job{ID: 17, State: job.Running, User: "ada", Team: "t1", Pool: "p", Attempt: 2}
	m.Event(j)
	j.State, j.Reason, j.Exit = job.Failed, job.ReasonExit, &exit
	m.Event(j)
	finish(t, s, 17)
	obj, _ := json.Marshal(j)
	got := brief(r.last(17))
	want := []string{"11-0 out hello\n", "31-0 raid a remark\n", "38-0 err oh", "1043-0 raid 1000 bytes of log were dropped\n",
		"1054-0 out again\n", "1061-1 end " + string(obj)}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("the stream is\n%q, want\n%q", got, want)
	}
	if ttl := r.db.TTL(t.Context(), "rai:log:17").Val(); ttl <= 0 || ttl > time.Hour {
		t.Errorf("the stream expires after %v, want an hour", ttl)
	}
	checkEvents(t, r)
}

func checkEvents(t *testing.T, r *server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var all []redis.XMessage
	for at := "0"; len(all) < 2; at = all[len(all)-1].ID {
		got, err := r.db.XRead(ctx, &redis.XReadArgs{Streams: []string{"rai:events", at}, Block: 10 * time.Second}).Result()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, got[0].Messages...)
	}
	for i, state := range []string{"running", "failed"} {
		v := all[i].Values
		if v["job"] != "17" || v["state"] != state || v["user"] != "ada" || v["team"] != "t1" || v["pool"] != "p" || v["attempt"] != "2" {
			t.Errorf("event %d is %v", i, v)
		}
		if _, err := time.Parse(time.RFC3339, fmt.Sprint(v["t"])); err != nil {
			t.Errorf("event %d: %v", i, err)
		}
	}
	if got := all[1].Values["reason"]; got != "exit" {
		t.Errorf("reason = %v, want exit", got)
	}
}

// A job that never ran has a stream with nothing but the end.
func TestMirrorJobWithoutOutput(t *testing.T) {
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, _, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	m.Watch(4)
	m.Event(job.Job{ID: 4, State: job.Cancelled, Reason: job.ReasonCancelled})
	m.Watch(4)
	finish(t, s, 4)
	if got := brief(r.last(4)); len(got) != 1 || !strings.HasPrefix(got[0], "0-1 end {") {
		t.Errorf("the stream is %q, want the end only", got)
	}
}

// The stream keeps about PerJob bytes, the last ones, and has no byte twice.
func TestMirrorTrims(t *testing.T) {
	const perJob = 256 << 10
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, _, _ := runMirror(t, s, MirrorOptions{URL: r.url(), PerJob: perJob})
	m.Watch(1)
	l := attemptOf(t, s, 1, 1)
	var last string
	for i := range 30_000 {
		last = fmt.Sprintf("this is line %d of the output of a job\n", i)
		say(t, l, job.Out, last)
	}
	m.Event(job.Job{ID: 1, State: job.Succeeded})
	finish(t, s, 1)
	all := r.last(1)
	var text strings.Builder
	for _, e := range all[:len(all)-1] {
		if e.Values["s"] == "out" {
			text.WriteString(fmt.Sprint(e.Values["d"]))
		}
	}
	if n := text.Len(); n < perJob/2 || n > perJob+2*entrySize {
		t.Errorf("%d bytes are in the stream, want about %d", n, perJob)
	}
	lines := strings.SplitAfter(text.String(), "\n")
	if got := lines[len(lines)-2]; got != last {
		t.Errorf("the last line is %q, want %q", got, last)
	}
	seen := map[string]bool{}
	for _, line := range lines[1:] {
		if seen[line] && line != "" {
			t.Fatalf("%q is there twice", line)
		}
		seen[line] = true
	}
}

// raid is killed and starts again: the stream goes on where it was. And a stream that
// another job of that number left is not taken for ours.
func TestMirrorResumes(t *testing.T) {
	r := startRedis(t)
	dir := t.TempDir()
	r.db.XAdd(t.Context(), &redis.XAddArgs{Stream: "rai:log:8", ID: "99999-1", Values: []any{"s", "end", "d", "{}"}})
	s := New(dir, t.Errorf)
	m, _, stop := runMirror(t, s, MirrorOptions{URL: r.url()})
	m.Watch(8)
	say(t, attemptOf(t, s, 8, 1), job.Out, "first")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for at := "0"; at != "10-0"; { // the stale entry goes, ours comes
		got, err := r.db.XRead(ctx, &redis.XReadArgs{Streams: []string{"rai:log:8", "0"}, Block: time.Second}).Result()
		if err != nil && err != redis.Nil {
			t.Fatal(err)
		}
		if len(got) > 0 {
			at = got[0].Messages[0].ID
		}
	}
	stop()
	s.Close()
	s = spools(t, dir)
	say(t, attemptOf(t, s, 8, 1), job.Err, "second")
	m, _, _ = runMirror(t, s, MirrorOptions{URL: r.url()})
	m.Watch(8)
	m.Event(job.Job{ID: 8, State: job.Succeeded})
	finish(t, s, 8)
	got := brief(r.last(8))
	if len(got) != 3 || got[0] != "10-0 out first" || got[1] != "21-0 err second" {
		t.Errorf("the stream is %q", got)
	}
}

// Redis dies and comes back empty: both are said once, and the output is all there.
func TestMirrorRedisRestarts(t *testing.T) {
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, d, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	for id := range int64(5) {
		m.Watch(id)
		say(t, attemptOf(t, s, id, 1), job.Out, "before")
	}
	r.kill()
	for id := range int64(5) {
		say(t, attemptOf(t, s, id, 1), job.Out, "during")
	}
	d.await(t, 1)
	r.start()
	lines := d.await(t, 2)
	for id := range int64(5) {
		m.Event(job.Job{ID: id, State: job.Succeeded})
		finish(t, s, id)
		all := r.last(id)
		var text string
		for _, e := range all[:len(all)-1] {
			text += fmt.Sprint(e.Values["d"])
		}
		if text != "beforeduring" {
			t.Errorf("job %d: the stream has %q: %q", id, text, brief(all))
		}
	}
	if len(lines) != 2 || !strings.Contains(lines[0], "jobs go on without it") || lines[1] != "mirror: redis is back" {
		t.Errorf("said %q, want one line for each change", lines)
	}
}

// A Redis that hangs does not hold up the job by a moment.
func TestMirrorRedisHangs(t *testing.T) {
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, d, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	m.Watch(1)
	l, err := s.Attempt(1, 1, 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	say(t, l, job.Out, "awake")
	if err := r.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	frame := job.AppendFrame(nil, job.Out, make([]byte, 32<<10))
	n := 0
	for begin := time.Now(); time.Since(begin) < 2*time.Second; n++ {
		if err := l.Append(frame); err != nil {
			t.Fatal(err)
		}
	}
	r.cmd.Process.Signal(syscall.SIGCONT)
	if n < 20 { // it is thousands; each that waited for Redis would take a second
		t.Errorf("%d appends in two seconds", n)
	}
	say(t, l, job.Out, "the end")
	m.Event(job.Job{ID: 1, State: job.Succeeded})
	finish(t, s, 1)
	all := r.last(1)
	if got := fmt.Sprint(all[len(all)-2].Values["d"]); !strings.HasSuffix(got, "the end") {
		t.Errorf("the last output is %d bytes without the end", len(got))
	}
	if lines := d.await(t, 0); len(lines) > 2 {
		t.Errorf("said %q, want at most one line for each change", lines)
	}
}

// A full Redis answers, but takes nothing: said once, until there is room.
func TestMirrorRedisFull(t *testing.T) {
	r := startRedis(t, "--maxmemory", "1")
	s := spools(t, t.TempDir())
	m, d, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	m.Watch(1)
	say(t, attemptOf(t, s, 1, 1), job.Out, "hello")
	if lines := d.await(t, 1); !strings.Contains(lines[0], "OOM") {
		t.Errorf("said %q, want OOM", lines)
	}
	m.Event(job.Job{ID: 1, State: job.Succeeded})
	finish(t, s, 1)
	if err := r.db.ConfigSet(t.Context(), "maxmemory", "0").Err(); err != nil {
		t.Fatal(err)
	}
	if got := brief(r.last(1)); len(got) != 2 || got[0] != "10-0 out hello" {
		t.Errorf("the stream is %q", got)
	}
	if lines := d.await(t, 2); len(lines) != 2 {
		t.Errorf("said %q, want one line for each change", lines)
	}
}

func TestMirrorWrongURL(t *testing.T) {
	s := spools(t, t.TempDir())
	for _, url := range []string{"", "http://host", "redis://host:port:port"} {
		if _, err := NewMirror(MirrorOptions{URL: url}, s); err == nil {
			t.Errorf("NewMirror(%q) = nil, want an error", url)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody listens there now
	m, d, stop := runMirror(t, s, MirrorOptions{URL: "redis://" + l.Addr().String()})
	m.Watch(1)
	for range 2 * eventsKept {
		m.Event(job.Job{ID: 2, State: job.Running})
	}
	m.mu.Lock()
	if n := len(m.events); n != eventsKept {
		t.Errorf("%d events wait, want %d", n, eventsKept)
	}
	m.mu.Unlock()
	d.await(t, 1)
	stop()
	if lines := d.await(t, 1); len(lines) != 1 {
		t.Errorf("said %q, want one line", lines)
	}
}

// A foreign value under a job's key costs that job's mirror and no other's.
func TestMirrorForeignKey(t *testing.T) {
	r := startRedis(t)
	r.db.Set(t.Context(), "rai:log:1", "mine", 0)
	s := spools(t, t.TempDir())
	m, d, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	for id := int64(1); id <= 2; id++ {
		m.Watch(id)
		say(t, attemptOf(t, s, id, 1), job.Out, "hello")
		m.Event(job.Job{ID: id, State: job.Succeeded})
		finish(t, s, id)
	}
	if got := brief(r.last(2)); len(got) != 2 {
		t.Errorf("the stream is %q", got)
	}
	if lines := d.await(t, 1); len(lines) != 1 || !strings.Contains(lines[0], "WRONGTYPE") {
		t.Errorf("said %q, want one line about WRONGTYPE", lines)
	}
}

// Queued jobs are watched by the thousand and cost no goroutine each.
func TestMirrorManyQueued(t *testing.T) {
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, _, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	for id := range int64(10_000) {
		m.Watch(id)
	}
	say(t, attemptOf(t, s, 77, 1), job.Out, "hello")
	m.Event(job.Job{ID: 77, State: job.Succeeded})
	finish(t, s, 77)
	r.last(77)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.feeds); n > 1 {
		t.Errorf("%d feeds are open, want at most the one with output", n)
	}
}

// A stream that vanished while its job runs is written again, from the start.
func TestMirrorStreamVanishes(t *testing.T) {
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, _, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	m.Watch(1)
	l := attemptOf(t, s, 1, 1)
	for _, text := range []string{"a", "b"} {
		before := l.Size()
		say(t, l, job.Out, text)
		_, err := r.db.XRead(t.Context(), &redis.XReadArgs{Streams: []string{"rai:log:1", fmt.Sprint(before)}, Block: 20 * time.Second}).Result()
		if err != nil {
			t.Fatal(err)
		}
		if got := brief(r.db.XRange(t.Context(), "rai:log:1", "-", "+").Val()); got[0] != "6-0 out a" && got[0] != "12-0 out ab" {
			t.Errorf("after %q the stream is %q", text, got)
		}
		if err := r.db.Del(t.Context(), "rai:log:1").Err(); err != nil {
			t.Fatal(err)
		}
	}
	m.Event(job.Job{ID: 1, State: job.Succeeded})
	finish(t, s, 1)
	if got := brief(r.last(1)); len(got) != 2 || got[0] != "12-0 out ab" {
		t.Errorf("the stream is %q", got)
	}
}

func BenchmarkMirror(b *testing.B) {
	const size = 64 << 20
	r := startRedis(b)
	s := spools(b, b.TempDir())
	m, _, _ := runMirror(b, s, MirrorOptions{URL: r.url(), PerJob: 16 << 20})
	frame := job.AppendFrame(nil, job.Out, make([]byte, 32<<10-job.HeaderLen))
	b.SetBytes(size)
	id := int64(0)
	for b.Loop() {
		id++
		l := attemptOf(b, s, id, 1)
		m.Watch(id)
		for l.Size() < size {
			if err := l.Append(frame); err != nil {
				b.Fatal(err)
			}
		}
		m.Event(job.Job{ID: id, State: job.Succeeded})
		finish(b, s, id)
		r.end(id, l.Size())
	}
}
