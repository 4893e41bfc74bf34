package boxtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

func testFrames(t *testing.T, s *suite) {
	x, exit := s.job(t, box.Config{}, "echo out; echo err >&2; echo made > made")
	if x.out.String() != "out\n" || x.err.String() != "err\n" {
		t.Errorf("output %q and %q, want out and err", x.out.String(), x.err.String())
	}
	if x.final == nil || x.final.Reason != job.ReasonExit || x.final.Exit != 0 {
		t.Errorf("final %+v, want exit 0", x.final)
	}
	if x.files == 0 {
		t.Error("/build did not come back")
	}
	if exit.OOMKills != 0 || exit.DiskFull {
		t.Errorf("exit %+v, want no limit hit", exit)
	}
}

func testExit(t *testing.T, s *suite) {
	for _, c := range []struct {
		step   string
		reason job.Reason
		exit   int
	}{
		{"exit 3", job.ReasonExit, 3},
		{"kill -SEGV $$", job.ReasonSignal, 128 + 11},
		{"kill -KILL $$", job.ReasonSignal, 128 + 9},
		{"kill -TERM 1; kill -QUIT 1; kill -KILL 1; exit 4", job.ReasonExit, 4},
	} {
		x, _ := s.job(t, box.Config{}, c.step)
		if x.final == nil || x.final.Reason != c.reason || x.final.Exit != c.exit {
			t.Errorf("%q: final %+v, want %s %d", c.step, x.final, c.reason, c.exit)
		}
	}
}

func testWho(t *testing.T, s *suite) {
	s.says(t, "whoami; id -un", s.User+"\n"+s.User)
	s.says(t, "grep -c ^CapEff:.0000000000000000 /proc/self/status; grep NoNewPrivs /proc/self/status | tr -d '\\t'", "1\nNoNewPrivs:1")
	s.says(t, "hostname; ulimit -c; test $(ulimit -n) -le 65536 && echo few", "raid\n0\nfew")
	s.says(t, "grep -E '^Seccomp:' /proc/self/status | tr -d '\\t'", "Seccomp:2")
}

func testHost(t *testing.T, s *suite) {
	name := "secret-" + strings.ToLower(rand.Text())
	for _, dir := range []string{"/var/tmp", "/tmp", "/root", "/home", "/srv"} {
		f := filepath.Join(dir, name)
		if os.WriteFile(f, []byte("host"), 0o644) == nil {
			t.Cleanup(func() { os.Remove(f) })
		}
	}
	s.says(t, "find / -xdev -name "+name+" 2>/dev/null; find /tmp /var /home -name "+name+" 2>/dev/null; echo none", "none")
	s.says(t, "cat /etc/shadow /etc/gshadow 2>/dev/null; echo unread", "unread")
	s.says(t, "ls /home; ls /root 2>/dev/null; cd /sys/fs/cgroup/memory 2>/dev/null && mkdir x 2>/dev/null; echo end", strings.Join(append(slices.Clone(s.Homes), "end"), "\n"))
	if !s.Writable {
		s.says(t, "touch /usr/x /etc/x /x /dev/x /bin/x 2>/dev/null; ls -d /usr/x /etc/x /x /dev/x /bin/x 2>/dev/null; echo none", "none")
	}
	// What an engine binds from the host is no way around the disk limit.
	s.says(t, "for f in /etc/hosts /etc/hostname /etc/resolv.conf /.raid/shim; do (echo x >> $f) 2>/dev/null && echo $f; done; echo none", "none")
	s.says(t, "(echo 1 > /proc/sys/kernel/hostname) 2>/dev/null; (echo x > /proc/sysrq-trigger) 2>/dev/null; hostname", "raid")
	// Only the shim, the shell and what it runs.
	s.says(t, "test $(ls -d /proc/[0-9]* | wc -l) -lt 9 && echo few", "few")
}

func testFiles(t *testing.T, s *suite) {
	s.says(t, "pwd; for d in /src /build /tmp /var/tmp $HOME $TMPDIR /dev/shm; do echo x > $d/f && cat $d/f; done | wc -l", "/build\n7")
	s.says(t, "echo $HOME; cd && pwd", s.Home+"\n"+s.Home)
	s.says(t, "echo '#!/bin/sh' > p; echo echo ran >> p; chmod 4755 p; ./p", "ran")
	s.says(t, "head -c 3 /dev/zero | wc -c; echo x > /dev/null; head -c 2 /dev/urandom | wc -c; test -c /dev/tty && echo tty", "3\n2\ntty")
	s.says(t, "ls /dev | grep -E '^(sd|nvme|vd|loop|mem|kmsg|kvm|fuse)'; echo none", "none")
}

func testNetwork(t *testing.T, s *suite) {
	s.says(t, "grep : /proc/net/dev | cut -d: -f1 | tr -d ' '", "lo")
	s.says(t, "getent hosts localhost > /dev/null && echo known", "known")
	// What listens on the host's loopback or in its abstract namespace is not here.
	s.says(t, "wc -l < /proc/net/unix; wc -l < /proc/net/tcp", "1\n1")
}

func testCalls(t *testing.T, s *suite) {
	x, _ := s.job(t, box.Config{}, "/.raid/shim attack calls")
	got := strings.TrimSpace(x.out.String())
	for line := range strings.Lines(got) {
		name, what, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if want := calls[name].want; !strings.Contains(want, what) {
			t.Errorf("%s: %s, want %s", name, what, want)
		}
	}
	if n := strings.Count(got, "\n") + 1; n != len(calls) {
		t.Errorf("%d answers, want %d: %s", n, len(calls), x.err.String())
	}
	s.says(t, "unshare -Ur true 2>/dev/null || echo refused", "refused")
	s.says(t, "mount -t tmpfs x /tmp 2>/dev/null || echo refused", "refused")
}

func testDescriptors(t *testing.T, s *suite) {
	s.says(t, "for f in /proc/1/fd/*; do readlink $f; cat <$f; done 2>/dev/null; cat /proc/1/environ /proc/1/maps 2>/dev/null; echo closed", "closed")
	// 0, 1, 2 and the one that ls opens.
	s.says(t, "ls /proc/self/fd | wc -l", "4")
	s.says(t, "readlink /proc/self/fd/0", "/dev/null")
	s.says(t, "env | cut -d= -f1 | grep -v -E '^(PATH|HOME|TMPDIR|PWD|SHLVL|OLDPWD|_)$'; echo none", "none")
}

func testGPUs(t *testing.T, s *suite) {
	s.says(t, "ls -d /dev/nvidia* /dev/dri /dev/kfd 2>/dev/null; echo none", "none")
}

func testMemory(t *testing.T, s *suite) {
	s.enforced(t, "memory")
	l := limits
	l.Memory = 64 << 20
	x, exit := s.job(t, box.Config{Limits: l}, "/.raid/shim attack memory 256; echo $?", "echo next")
	if exit.OOMKills == 0 {
		t.Errorf("exit %+v, want an OOM kill", exit)
	}
	if strings.Contains(x.out.String(), "survived") {
		t.Errorf("256 MiB were to be had in a box of 64: %s", x.out.String())
	}
	// The kernel takes the step, not the shim, which still reports.
	if x.final == nil || !strings.HasSuffix(x.out.String(), "next\n") {
		t.Errorf("final %+v, output %q, want the next step to run", x.final, x.out.String())
	}
	// Memory behind files counts as well.
	x, exit = s.job(t, box.Config{Limits: l}, "head -c 256M /dev/zero > /dev/shm/f; ls -s --block-size=M /dev/shm/f")
	if x.final != nil && x.final.Exit == 0 && exit.OOMKills == 0 && strings.HasPrefix(x.out.String(), "256M") {
		t.Errorf("/dev/shm held 256 MiB in a box of 64: %+v", exit)
	}
}

// testSockets fills the buffers of connections, which a kernel may count apart.
func testSockets(t *testing.T, s *suite) {
	s.enforced(t, "memory")
	s.enforced(t, "sockets")
	l := limits
	l.Memory = 64 << 20
	x, _ := s.job(t, box.Config{Limits: l}, "/.raid/shim attack sockets 512")
	mib, err := strconv.Atoi(strings.TrimSpace(x.out.String()))
	if err == nil && mib > 256 { // it may also have been killed
		t.Errorf("connections held %d MiB in a box of 64", mib)
	}
}

// testLimit is what happens to a warm box when it gets its order.
func testLimit(t *testing.T, s *suite) {
	s.enforced(t, "memory")
	x := s.start(t, box.Config{})
	l := limits
	l.Memory, l.Pids, l.CPUs = 64<<20, 50, 0.5
	if err := x.Limit(l); err != nil {
		t.Fatalf("Limit: %v", err)
	}
	x.order(t, "/.raid/shim attack memory 128")
	if exit := x.finish(t); exit.OOMKills == 0 {
		t.Errorf("exit %+v, want an OOM kill under the new limit", exit)
	}
	x = s.start(t, box.Config{Limits: l})
	if err := x.Limit(limits); err != nil {
		t.Fatalf("Limit: %v", err)
	}
	x.order(t, "/.raid/shim attack memory 128")
	if exit := x.finish(t); exit.OOMKills != 0 || x.out.String() != "survived\n" {
		t.Errorf("exit %+v, output %q, want 128 MiB to be had", exit, x.out.String())
	}
}

// testShrink is the same for the disk.
func testShrink(t *testing.T, s *suite) {
	s.enforced(t, "disk")
	x := s.start(t, box.Config{})
	l := limits
	for _, l.Disk = range []int64{8 << 20, 48 << 20, 16 << 20} {
		if err := x.Limit(l); err != nil {
			t.Fatalf("Limit to %d bytes: %v", l.Disk, err)
		}
	}
	x.order(t, "head -c 8M /dev/zero > fits && echo fits; head -c 32M /dev/zero > big")
	if exit := x.finish(t); !exit.DiskFull || x.out.String() != "fits\n" {
		t.Errorf("exit %+v, output %q, want 8 MiB to fit and 40 not to", exit, x.out.String())
	}
	x = s.start(t, box.Config{})
	l.Disk = 2 * limits.Disk
	if x.Limit(l) == nil {
		t.Error("a disk grew beyond the size it was made with")
	}
}

// testStop is how the runner ends a job that took too long: a step may tidy up on
// SIGTERM, and one that will not listen is killed five seconds later.
func testStop(t *testing.T, s *suite) {
	x := s.start(t, box.Config{})
	x.until(t, "busy", "trap 'echo tidy; exit 9' TERM; echo busy; while :; do sleep 0.1; done")
	deaf := s.start(t, box.Config{})
	deaf.until(t, "busy", "trap '' TERM; (trap '' TERM; exec sleep 1000) & echo busy; while :; do sleep 1000; done")
	frozen := s.start(t, box.Config{}) // it can hear nothing until it is woken
	frozen.until(t, "busy", "(trap '' TERM; kill -STOP $BASHPID) & echo busy; kill -STOP $$")
	for _, x := range []*session{x, deaf, frozen} {
		if err := job.WriteFrame(x.Stdin(), job.Stop, []byte(job.ReasonTimeout)); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []*session{x, deaf, frozen} {
		begun := time.Now()
		x.finish(t)
		if x.final == nil || x.final.Reason != job.ReasonTimeout || x.final.Exit != job.ExitTimeout {
			t.Errorf("final %+v after %v, want a timeout", x.final, time.Since(begun))
		}
	}
	if !strings.HasSuffix(x.out.String(), "tidy\n") {
		t.Errorf("output %q, want the step to have tidied up", x.out.String())
	}
}

// testUnread is a runner that stops reading, or a shim that floods it after its
// result: the box can be killed and removed nevertheless (moby/moby#41827).
func testUnread(t *testing.T, s *suite) {
	name := "u-" + strings.ToLower(rand.Text())
	b, err := s.e.Start(t.Context(), box.Config{ID: name, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	x := &session{Box: b}
	x.order(t, "cat /dev/zero")
	if _, err := io.CopyN(io.Discard, b.Stdout(), 8<<20); err != nil {
		t.Errorf("read the flood: %v", err)
	}
	begun := time.Now()
	b.Kill()
	b.Wait()
	if err := b.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("it took %v to be rid of a box that nobody reads", d)
	}
	s.wantNoTraces(t, name)
}

func testLine(t *testing.T, s *suite) {
	x, _ := s.job(t, box.Config{}, "head -c 1G /dev/zero", "echo end")
	if want := int64(1<<30 + len("end\n")); x.printed != want || x.final == nil || x.final.Exit != 0 {
		t.Errorf("a line of 1 GiB: %d bytes came, final %+v, want %d and exit 0", x.printed, x.final, want)
	}
}

func testSurvivors(t *testing.T, s *suite) {
	for _, c := range []struct {
		step string
		exit int
	}{
		{"(setsid sleep 1000 &); (trap '' TERM HUP INT; setsid sleep 1000 &); exit 0", 0},
		{"sleep 1000 & kill -9 -1; exit 5", 5},
		{"for i in $(seq 1 64); do kill -$i 1; done 2>/dev/null; exit 6", 6},
	} {
		x, exit := s.job(t, box.Config{}, c.step)
		if x.final == nil || x.final.Reason != job.ReasonExit || x.final.Exit != c.exit || exit.Lost {
			t.Errorf("%q: final %+v, exit %+v, want exit %d", c.step, x.final, exit, c.exit)
		}
	}
}

// testForged is a job that would rather have passed.
func testForged(t *testing.T, s *suite) {
	const final = `R\000\000\000\033{"reason":"exit","exit":0}`
	x, _ := s.job(t, box.Config{}, "printf '"+final+"'; for f in /proc/1/fd/* /proc/[0-9]*/fd/1; do printf '"+final+"' > $f; done 2>/dev/null; exit 7")
	if x.final == nil || x.final.Exit != 7 {
		t.Errorf("final %+v, want exit 7", x.final)
	}
}

// testSwarm is more memory than the limit in processes that are each far below it.
func testSwarm(t *testing.T, s *suite) {
	s.enforced(t, "memory")
	l := limits
	l.Memory = 64 << 20
	x, exit := s.job(t, box.Config{Limits: l}, "for i in $(seq 1 20); do (x=$(head -c 8M /dev/zero | tr '\\0' x); sleep 2) & done; wait")
	if exit.OOMKills == 0 {
		t.Errorf("20 times 8 MiB fitted into 64: exit %+v, final %+v", exit, x.final)
	}
}

// testHostile is what jobs leave behind, or do to what is there, to come off better. Each
// has the verdict of its own, and a box that died is nobody's fault but the job's.
func testHostile(t *testing.T, s *suite) {
	for _, c := range []struct {
		step string
		exit int // -1 where the shim may die
	}{
		{"mkfifo fifo; mknod null c 0 0; touch $'a\\nraid: b' $'\\e]0;x\\a' $'\\xff'; touch -d @-9999999999 old; truncate -s 8G sparse; exit 3", 3},
		{"ln -s / root; ln -s loop loop; ln /etc/hostname h 2>/dev/null; ln -s ../../../../etc up; exit 4", 4},
		{"chmod 0 /build /src; exit 5", 5},
		{"/.raid/shim attack deep 5000; exit 6", 6},
		{"rm -rf /bin/bash /bin/sh /dev/* 2>/dev/null; mkfifo /dev/null 2>/dev/null; exit 7", 7},
		{"/.raid/shim attack starve; head -c 64M /dev/zero; exit 8", -1},
		{"(echo 1000 >/proc/1/oom_score_adj) 2>/dev/null; /.raid/shim attack memory 512; exit 9", -1},
	} {
		begun := time.Now()
		x := s.start(t, box.Config{})
		x.order(t, c.step)
		exit, broken := x.end(t)
		if broken != nil && c.exit >= 0 {
			t.Errorf("%q: the box said: %v", c.step, broken)
		}
		if exit.Lost || c.exit >= 0 && (x.final == nil || x.final.Exit != c.exit) {
			t.Errorf("%q: final %+v, exit %+v, want exit %d", c.step, x.final, exit, c.exit)
		}
		if d := time.Since(begun); d > 20*time.Second {
			t.Errorf("%q took %v", c.step, d)
		}
	}
}

// testHoard is a job that takes all it can have of what the kernel counts for the whole
// machine, or for all processes of a user. This process must still get its own.
func testHoard(t *testing.T, s *suite) {
	s.enforced(t, "own user")
	x := s.start(t, box.Config{})
	x.until(t, "hoarded", "exec /.raid/shim attack hoard")
	for name, take := range hoards {
		if err := take(); err != 0 {
			t.Errorf("%s: %v for the machine while a job runs; it said %q", name, err, x.out.String())
		}
	}
	x.Kill()
	x.finish(t)
}

// testMixed runs jobs that end in all sorts of ways and looks at this process
// afterwards; what else a box could leave is looked for after each.
func testMixed(t *testing.T, s *suite) {
	steps := []string{"true", "exit 3", "kill -9 $$", "head -c 200M /dev/zero > big", "cat /dev/zero | head -c 32M", "(sleep 1000 &)"}
	round := func() {
		var all sync.WaitGroup
		for i, step := range steps {
			x := s.start(t, box.Config{})
			all.Go(func() {
				x.order(t, step)
				if i%2 == 0 {
					x.finish(t)
				} else {
					x.Kill()
				}
				if err := x.Close(); err != nil {
					t.Errorf("%q: Close: %v", step, err)
				}
				<-x.ended
			})
		}
		all.Wait()
	}
	round() // what is made once may stay
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range 2 {
		round()
	}
	if now := openFiles(t); now > files+4 {
		t.Errorf("%d open files, %d before 12 jobs", now, files)
	}
	if now := runtime.NumGoroutine(); now > goroutines+4 {
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before 12 jobs\n%s", now, goroutines, buf[:runtime.Stack(buf, true)])
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}

func testPids(t *testing.T, s *suite) {
	s.enforced(t, "pids")
	x, _ := s.job(t, box.Config{}, "/.raid/shim attack fork 1000", "echo next")
	var n int
	if _, err := fmt.Sscanf(x.out.String(), "forked %d", &n); err != nil || n == 0 || n >= limits.Pids {
		t.Errorf("output %q, want fewer than %d processes", x.out.String(), limits.Pids)
	}
	if x.final == nil {
		t.Error("a fork bomb cost the result")
	}
}

func testDisk(t *testing.T, s *suite) {
	// Where the disk is only measured, the box must live until that happens.
	x, exit := s.job(t, box.Config{}, "head -c 200M /dev/zero > big && exec sleep 30")
	hard := strings.Contains(x.err.String(), "No space left")
	if !exit.DiskFull {
		t.Errorf("200 MiB went onto a disk of 64: exit %+v, stderr %q", exit, x.err.String())
	}
	if !strings.Contains(s.e.Weakness(), "disk") && !hard {
		t.Errorf("the disk limit is not hard, and Weakness() = %q", s.e.Weakness())
	}
}

func testInodes(t *testing.T, s *suite) {
	s.enforced(t, "disk")
	x, exit := s.job(t, box.Config{}, "/.raid/shim attack files 200000")
	if !exit.DiskFull || !strings.Contains(x.out.String(), "no space left") {
		t.Errorf("200000 files fitted: exit %+v, output %q", exit, x.out.String())
	}
}

func testKill(t *testing.T, s *suite) {
	x := s.start(t, box.Config{})
	x.until(t, "deaf", "trap '' TERM INT HUP; (trap '' TERM; exec sleep 1000) & echo deaf; while :; do sleep 1000; done")
	begun := time.Now()
	x.Kill()
	x.Kill()
	x.finish(t)
	if d := time.Since(begun); d > 2*time.Second {
		t.Errorf("Kill took %v, want under 2 s", d)
	}
	if x.final != nil {
		t.Errorf("a killed box reported %+v", x.final)
	}
	x.Kill() // after the end
	if err := x.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	x.Kill() // after Close
	if a, b := x.Wait(), x.Wait(); a != b {
		t.Errorf("Wait() = %+v, then %+v", a, b)
	}
}

func testEndOfInput(t *testing.T, s *suite) {
	x := s.start(t, box.Config{})
	x.until(t, "deaf", "trap '' TERM INT HUP; echo deaf; while :; do sleep 1000; done")
	if err := x.Stdin().Close(); err != nil {
		t.Fatal(err)
	}
	x.finish(t)
	idle := s.start(t, box.Config{})
	if err := idle.Stdin().Close(); err != nil {
		t.Fatal(err)
	}
	idle.finish(t)
}

// testCancelled gives up on starts at any moment of them, and most often before: an
// engine has to hear of it however quick it is.
func testCancelled(t *testing.T, s *suite) {
	why := errors.New("changed my mind")
	for i := range 30 {
		i = max(0, i-10)
		ctx, cancel := context.WithCancelCause(t.Context())
		name := "c-" + strings.ToLower(rand.Text())
		timer := time.AfterFunc(time.Duration(i)*time.Millisecond/2, func() { cancel(why) })
		if i == 0 {
			cancel(why)
		}
		b, err := s.e.Start(ctx, box.Config{ID: name, Limits: limits})
		timer.Stop()
		switch {
		case err == nil && i > 0: // it was faster
			if err := b.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		case !errors.Is(err, why):
			t.Errorf("Start with a cancelled context: %v, want %v", err, why)
		case b != nil:
			t.Errorf("Start gave a box and %v", err)
		}
		cancel(nil)
		s.wantNoTraces(t, name)
	}
}

func testSameID(t *testing.T, s *suite) {
	x := s.start(t, box.Config{})
	if _, err := s.e.Start(t.Context(), box.Config{ID: x.id, Limits: limits}); err == nil {
		t.Error("two boxes of one ID")
	}
	for _, id := range []string{"", "..", "a/b", "A", strings.Repeat("a", 100)} {
		if _, err := s.e.Start(t.Context(), box.Config{ID: id, Limits: limits}); err == nil {
			t.Errorf("Start took the ID %q", id)
		}
	}
	x.order(t, "echo still here") // the second one's failure did it no harm
	x.finish(t)
	if x.out.String() != "still here\n" {
		t.Errorf("output %q", x.out.String())
	}
}

// testClose closes boxes in every state; the clean-up of start looks for traces.
func testClose(t *testing.T, s *suite) {
	idle := s.start(t, box.Config{})
	if err := idle.Close(); err != nil {
		t.Errorf("Close of an idle box: %v", err)
	}
	s.wantNoTraces(t, idle.id)
	busy := s.start(t, box.Config{})
	busy.until(t, "busy", "mkdir -p a/b; chmod 0 a; (setsid sleep 1000 &) ; echo busy; cat /dev/zero > /dev/null")
	if err := errors.Join(busy.Close(), busy.Close()); err != nil {
		t.Errorf("Close of a busy box: %v", err)
	}
	s.wantNoTraces(t, busy.id)
	if _, err := busy.Stdin().Write([]byte("x")); err == nil {
		t.Error("a closed box still takes orders")
	}
}

func testMany(t *testing.T, s *suite) {
	var all sync.WaitGroup
	defer all.Wait()
	for i := range 20 {
		x := s.start(t, box.Config{})
		all.Go(func() {
			x.order(t, fmt.Sprintf("echo %d; cat *.none", i))
			x.finish(t)
			if want := fmt.Sprintf("%d\n", i); x.out.String() != want {
				t.Errorf("box %d said %q, want %q", i, x.out.String(), want)
			}
			if err := x.Close(); err != nil {
				t.Errorf("box %d: Close: %v", i, err)
			}
		})
	}
}
