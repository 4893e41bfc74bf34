package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
)

// mirrorACL is what a mirror has to be allowed: contrib/docs/mirror.md says so.
const mirrorACL = "~rai:* +ping +hello +select +xadd +xtrim +xrevrange +pexpire +del +eval +evalsha +scan +info +memory|usage +pttl"

// A fault is something that Redis does.
type fault struct {
	name  string
	args  []string // of redis-server
	login string   // of the URL
	early bool     // it is so when the mirror starts
	breaK func(*testing.T, *server)
	mend  func(*testing.T, *server)
	said  string // by the mirror
	or    string // by it, if a command was on its way in that moment; "" for the same
}

func faults(t *testing.T) []fault {
	config := func(name, value string) func(*testing.T, *server) {
		return func(t *testing.T, r *server) { ask(t, r, "config", "set", name, value) }
	}
	all := func(fns ...func(*testing.T, *server)) func(*testing.T, *server) {
		return func(t *testing.T, r *server) {
			for _, fn := range fns {
				fn(t, r)
			}
		}
	}
	send := func(args ...any) func(*testing.T, *server) {
		return func(t *testing.T, r *server) { ask(t, r, args...) }
	}
	user := strings.Fields("--user raid on >right " + mirrorACL)
	saves, small := t.TempDir(), tmpfs(t)
	return []fault{
		{name: "absent at start", early: true, breaK: func(_ *testing.T, r *server) { r.kill() },
			mend: func(_ *testing.T, r *server) { r.start() }, said: "refused"},
		{name: "kill -9", breaK: func(_ *testing.T, r *server) { r.kill() },
			mend: func(_ *testing.T, r *server) { r.start() }, said: ""},
		{name: "SIGSTOP", breaK: func(_ *testing.T, r *server) { r.cmd.Process.Signal(syscall.SIGSTOP) },
			mend: func(_ *testing.T, r *server) { r.cmd.Process.Signal(syscall.SIGCONT) }, said: "no answer in time"},
		{name: "OOM", breaK: config("maxmemory", "1"), mend: config("maxmemory", "0"), said: "OOM"},
		{name: "READONLY", breaK: send("replicaof", "127.0.0.1", "1"), mend: send("replicaof", "no", "one"), said: "READONLY"},
		{name: "MISCONF", args: []string{"--save", "3600 1000000", "--dir", saves},
			breaK: all(func(*testing.T, *server) { os.RemoveAll(saves) }, send("bgsave"), awaitInfo("rdb_last_bgsave_status:err")),
			mend:  config("stop-writes-on-bgsave-error", "no"), said: "MISCONF"},
		{name: "full disk", args: []string{"--appendonly", "yes", "--appendfsync", "everysec", "--dir", small},
			breaK: func(t *testing.T, _ *server) { fill(t, small) },
			mend:  func(*testing.T, *server) { os.Remove(filepath.Join(small, "filler")) }, said: "MISCONF"},
		{name: "wrong password", args: user, login: "raid:right@",
			breaK: all(send("acl", "setuser", "raid", "resetpass", ">other"), send("client", "kill", "user", "raid")),
			mend:  send("acl", "setuser", "raid", ">right"), said: "WRONGPASS", or: "EOF"},
		{name: "NOPERM", args: user, login: "raid:right@",
			breaK: send("acl", "setuser", "raid", "-xtrim"),
			mend:  send("acl", "setuser", "raid", "+xtrim"), said: "can't run"},
	}
}

func ask(t *testing.T, r *server, args ...any) {
	t.Helper()
	if err := r.db.Do(t.Context(), args...).Err(); err != nil {
		t.Fatalf("%v: %v", args, err)
	}
}

// awaitInfo waits until INFO persistence says so.
func awaitInfo(line string) func(*testing.T, *server) {
	return func(t *testing.T, r *server) {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for range 1000 {
			if strings.Contains(r.db.Info(t.Context(), "persistence").Val(), line) {
				return
			}
			<-tick.C
		}
		t.Fatalf("no %s", line)
	}
}

// tmpfs mounts a file system of 4 MiB.
func tmpfs(t *testing.T) string {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=4m"); err != nil {
		if os.Getenv("RAID_CI") == "1" {
			t.Fatal("mount: ", err)
		}
		t.Skip("mount: ", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// fill leaves no byte free.
func fill(t *testing.T, dir string) {
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4096} {
		for {
			if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Whatever Redis does, a job prints on, whoever follows it gets all of it, and when it is
// over its stream has every byte once. What is too much for the stream is a gap that it
// tells.
func TestMirrorFaults(t *testing.T) {
	for _, f := range faults(t) {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel() // most of it waits
			r := startRedis(t, f.args...)
			s := spools(t, t.TempDir())
			if f.early {
				f.breaK(t, r)
			}
			m, d, _ := runMirror(t, s, MirrorOptions{URL: "redis://" + f.login + r.addr})
			small, large := attemptOf(t, s, 1, 1), attemptOf(t, s, 2, 1)
			m.Watch(1)
			m.Watch(2)
			want := "before\n"
			say(t, small, job.Out, want)
			if !f.early {
				awaitEntry(t, r, 1)
				f.breaK(t, r)
			}
			began := time.Now()
			text := printBroken(t, small, large)
			want += text
			if took := time.Since(began); took > printed/10*time.Second { // had each waited for Redis it were ten times that
				t.Errorf("%d appends took %v", printed, took)
			}
			follows(t, s, want)
			lines := d.await(t, 1)
			said := strings.Contains(lines[0], f.said) || f.or != "" && strings.Contains(lines[0], f.or)
			if !said || !strings.Contains(lines[0], "jobs go on without it") {
				t.Errorf("said %q, want %q", lines, f.said)
			}
			if st := m.Stats(); st.Up || st.Errors == 0 || st.Lag < 15<<20 || st.Trouble == "" {
				t.Errorf("while it is broken Stats = %+v", st)
			}
			f.mend(t, r)
			d.await(t, 2)
			say(t, small, job.Err, "after")
			checkMended(t, r, s, m, want+"after")
			if lines := d.await(t, 2); len(lines) != 2 || lines[1] != "mirror: redis is back" {
				t.Errorf("said %q, want one line for each change", lines)
			}
		})
	}
}

// awaitEntry waits until the stream of a job has an entry.
func awaitEntry(t *testing.T, r *server, id int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.db.XRead(ctx, &redis.XReadArgs{Streams: []string{fmt.Sprint(logKey, id), "0"}, Block: 20 * time.Second}).Err(); err != nil {
		t.Fatalf("the stream of job %d: %v", id, err)
	}
}

// printed is how many lines printBroken prints.
const printed = 320

// printBroken prints a little to one log and a lot to the other.
func printBroken(t *testing.T, small, large *spool.Log) (text string) {
	frame := job.AppendFrame(nil, job.Out, make([]byte, 64<<10))
	for i := range printed {
		if err := large.Append(frame); err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("line %d\n", i)
		say(t, small, job.Out, line)
		text += line
	}
	return text
}

// follows reads job 1 as an SSH session does.
func follows(t *testing.T, s *Spools, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	f := s.Follow(1)
	defer f.Close()
	for got := ""; got != want; {
		c, err := f.Next(ctx)
		if err != nil || !strings.HasPrefix(want, got+string(c.Data)) {
			t.Fatalf("a follower got %q and %v after %q", c.Data, err, got)
		}
		got += string(c.Data)
	}
}

// checkMended ends both jobs and reads their streams.
func checkMended(t *testing.T, r *server, s *Spools, m *Mirror, want string) {
	t.Helper()
	for id := int64(1); id <= 2; id++ {
		m.Event(job.Job{ID: id, State: job.Succeeded})
		finish(t, s, id)
	}
	text := ""
	for _, e := range r.last(1) {
		if e.Values["s"] != "end" {
			text += fmt.Sprint(e.Values["d"])
		}
	}
	if text != want {
		t.Errorf("the stream has %d bytes, want each of %d once: %.200q", len(text), len(want), text)
	}
	gaps, kept := 0, 0
	for _, e := range r.last(2) {
		switch d := fmt.Sprint(e.Values["d"]); {
		case strings.HasSuffix(d, "bytes of log were not mirrored\n") && e.Values["s"] == "raid":
			gaps++
		case e.Values["s"] == "out":
			kept += len(d)
		}
	}
	if gaps != 1 || kept < 1<<19 {
		t.Errorf("the large job has %d gaps and %d bytes, want 1 and about 1 MiB", gaps, kept)
	}
	if st := m.Stats(); !st.Up || st.Gap < 10<<20 || st.Lag != 0 || st.EventsLost != 0 {
		t.Errorf("after it Stats = %+v", st)
	}
}

// While Redis is away memory, files and goroutines depend neither on how much is printed
// nor on how many jobs end.
func TestMirrorMemory(t *testing.T) {
	const jobs = 3000
	r := startRedis(t)
	r.kill()
	s := spools(t, t.TempDir())
	m, d, _ := runMirror(t, s, MirrorOptions{URL: r.url()})
	d.await(t, 1)
	before, heap := runtime.NumGoroutine(), heapSize()
	l := attemptOf(t, s, 1, 1)
	m.Watch(1)
	frame := job.AppendFrame(nil, job.Out, make([]byte, 256<<10)) // 64 MiB in all
	for range 256 {
		if err := l.Append(frame); err != nil {
			t.Fatal(err)
		}
	}
	for id := int64(2); id < 2+jobs; id++ {
		m.Watch(id)
		m.Event(job.Job{ID: id, State: job.Succeeded, User: "ada"})
	}
	if n := runtime.NumGoroutine(); n > before+4 {
		t.Errorf("%d goroutines, before %d", n, before)
	}
	if now := heapSize(); now > heap+8<<20 {
		t.Errorf("%d KiB of heap, before %d", now>>10, heap>>10)
	}
	st := m.Stats()
	if st.Skipped != jobs-endedKept || st.Waiting != endedKept+1 || st.EventsLost != jobs-eventsKept || st.Streams != 0 {
		t.Errorf("Stats = %+v, want %d skipped, %d waiting", st, jobs-endedKept, endedKept+1)
	}
	r.start()
	for id := int64(1); id < 2+jobs; id++ {
		finish(t, s, id)
	}
	if got := brief(r.last(jobs + 1)); len(got) != 1 {
		t.Errorf("the stream of the last job is %q, want its end", got)
	}
}

func heapSize() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// What a Redis that hung still had in its socket is carried out when it wakes, here at
// the worst moment: after the mirror has looked where the stream ends. No byte comes
// twice.
func TestMirrorOnce(t *testing.T) {
	r := startRedis(t)
	w := &wake{held: -1, holding: make(chan struct{}), replied: make(chan struct{}), release: make(chan struct{})}
	addr := w.listen(t, r.addr)
	s := spools(t, t.TempDir())
	m, d, _ := runMirror(t, s, MirrorOptions{URL: "redis://" + addr})
	m.Watch(1)
	l := attemptOf(t, s, 1, 1)
	say(t, l, job.Out, "one ")
	awaitEntry(t, r, 1)
	w.mu.Lock()
	w.armed = true
	w.mu.Unlock()
	say(t, l, job.Out, "two ")
	<-w.holding
	d.await(t, 1) // it has given up on that
	say(t, l, job.Out, "three")
	m.Event(job.Job{ID: 1, State: job.Succeeded})
	finish(t, s, 1)
	text := ""
	for _, e := range r.last(1) {
		if e.Values["s"] == "out" {
			text += fmt.Sprint(e.Values["d"])
		}
	}
	if text != "one two three" {
		t.Errorf("the stream has %q", text)
	}
}

// A wake is a proxy that holds one addition to the stream of job 1, and lets it go just
// before the next one, from another connection, comes to Redis.
type wake struct {
	mu      sync.Mutex // guards the following
	conns   []net.Conn
	armed   bool
	held    int // connection
	holding chan struct{}
	release chan struct{}
	replied chan struct{}
}

func (w *wake) listen(t *testing.T, to string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		w.let()
		w.mu.Lock()
		for _, c := range w.conns {
			c.Close()
		}
		w.mu.Unlock()
		wg.Wait()
	})
	wg.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				continue
			}
			w.mu.Lock()
			w.conns = append(w.conns, c, up)
			w.mu.Unlock()
			wg.Go(func() { w.carry(n, up, c, w.sending); up.(*net.TCPConn).CloseWrite() })
			wg.Go(func() { w.carry(n, c, up, w.answering); c.Close(); up.Close() })
		}
	})
	return l.Addr().String()
}

// carry copies until the end of from; that to is gone does not matter.
func (w *wake) carry(n int, to, from net.Conn, see func(int, []byte)) {
	b := make([]byte, 64<<10)
	for {
		k, err := from.Read(b)
		if err != nil {
			return
		}
		see(n, b[:k])
		to.Write(b[:k])
	}
}

func (w *wake) sending(n int, b []byte) {
	if !bytes.Contains(b, []byte("rai:log:1")) || !bytes.Contains(b, []byte("evalsha")) {
		return
	}
	w.mu.Lock()
	first, second := w.armed && w.held < 0, w.held >= 0 && w.held != n && w.armed
	if first {
		w.held = n
		close(w.holding)
	}
	w.mu.Unlock()
	if first {
		<-w.release
	}
	if second {
		w.let()
		select {
		case <-w.replied:
		case <-time.After(10 * time.Second): // the test fails
		}
	}
}

// let lets go of what is held.
func (w *wake) let() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = false
	if !closed(w.release) {
		close(w.release)
	}
}

func (w *wake) answering(n int, _ []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n == w.held && !closed(w.replied) {
		close(w.replied)
	}
}
