package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/stream"
)

// This file measures what the mirror does, and what it costs. RAID_BENCH_STOPPED=SECONDS
// is how long Redis stands still in the last part, 10 by default.

func benchMirror(b *bench) {
	mirrorCost(b)
	mirrorRate(b)
	mirrorStopped(b)
}

// mirrorCost follows a job that prints 1 GiB as fast as it can, with a mirror and without.
func mirrorCost(b *bench) {
	live := func(name string) func() float64 {
		r := b.raids[name]
		return func() float64 {
			var said string
			ms := timed(func() { said = b.do(r.server, fast, nil, "submit -- "+printGiB) })
			r.drop(jobID(b, said))
			return ms
		}
	}
	s := b.race(7, contestant{"mirror", live("mirror")}, contestant{"none", live("main")})
	b.versus("output 1 GiB live over SSH with a mirror", s["mirror"], s["none"], "without", 1.05)
}

// mirrorRate has a job print 110 MB/s to nobody, and sees how much of it is mirrored.
func mirrorRate(b *bench) {
	const seconds, rate = 5, 110e6
	r := b.raids["mirror"]
	before := r.mirror(b)
	p := b.paced(r, seconds, rate)
	after := r.mirror(b)
	copied := float64(after.Bytes-before.Bytes) / p.Wall
	gap := float64(after.Gap-before.Gap) / p.Bytes
	b.number("mirrored of a job that prints 110 MB/s", fmt.Sprintf("%.0f MB/s, %.1f %% skipped", copied/1e6, 100*gap), "≥ 100 MB/s", copied >= 100e6)
}

// mirrorStopped has a job print 100 MB/s to nobody and time its own write(2)s while Redis
// stands still, and beside it, at the same time, another under a raid without a mirror:
// whatever else the machine does slows both.
func mirrorStopped(b *bench) {
	seconds, err := strconv.Atoi(cmp.Or(os.Getenv("RAID_BENCH_STOPPED"), "10"))
	if err != nil {
		b.Fatal(err)
	}
	r, redis := b.raids["mirror"], b.redis
	var stopped, none pace
	var during stream.MirrorStats
	from, most := peak(b, r.pid, func() {
		redis.Signal(syscall.SIGSTOP)
		defer redis.Signal(syscall.SIGCONT)
		beside := b.raids["main"].detach(b, fmt.Sprintf(pacer, seconds, 100e6))
		stopped = b.paced(r, seconds, 100e6)
		none = b.paceOf(b.raids["main"], beside)
		during = r.mirror(b)
	})
	b.Logf("stopped: %+v; none: %+v; the mirror: %+v", stopped, none, during)
	share := func(p pace) float64 { return 100 * p.Blocked / p.Wall }
	text := func(p pace) string {
		return fmt.Sprintf("%.2f %% of %.0f s, longest %.0f ms", share(p), p.Wall, 1e3*p.Longest)
	}
	more := share(stopped) - share(none)
	b.rows = append(b.rows, row{fmt.Sprintf("a job of 100 MB/s, Redis stopped for %d s: time in write(2)", seconds), text(stopped),
		"no mirror, at the same time: " + text(none), fmt.Sprintf("%+.2f %%", more), "< +1 %", verdict(more < 1)})
	b.number("memory of raid meanwhile", flat(from, most), "flat: ≤ +32 MiB", most-from <= 32)
}

// mirror asks raid how its mirror does.
func (r *raid) mirror(b *bench) (m stream.MirrorStats) {
	if err := json.Unmarshal(r.ask(b, "admin mirror --json"), &m); err != nil {
		b.Fatal(err)
	}
	return m
}

// A pace is what a job says of its own writes, in seconds.
type pace struct{ Wall, Blocked, Longest, Bytes float64 }

// pacer writes 64 KiB at a time, as many a second as make the rate, and times each write.
const pacer = `perl -MTime::HiRes=clock_gettime,CLOCK_MONOTONIC,sleep -e '
sub now { clock_gettime(CLOCK_MONOTONIC) }
$b = "x" x 65535 . "\n"; $t0 = now(); $w = $m = $n = 0;
while (($t = now() - $t0) < %d) {
  $early = $n * 65536 / %g - $t;
  if ($early > 0) { sleep($early); next }
  $a = now(); syswrite(STDOUT, $b) == 65536 or die; $d = now() - $a;
  $w += $d; $m = $d if $d > $m; $n++;
}
open F, ">pace"; printf F "{\"Wall\":%%f,\"Blocked\":%%f,\"Longest\":%%f,\"Bytes\":%%d}", now() - $t0, $w, $m, $n * 65536'`

// paced runs the pacer with nobody attached.
func (b *bench) paced(r *raid, seconds int, rate float64) pace {
	return b.paceOf(r, r.detach(b, fmt.Sprintf(pacer, seconds, rate)))
}

// paceOf waits for a job that runs the pacer.
func (b *bench) paceOf(r *raid, id int64) (p pace) {
	defer r.drop(id)
	if j := r.wait(b, id, job.State.Final); j.State != job.Succeeded {
		b.Fatalf("job %d: %+v", id, j)
	}
	in := tar.NewReader(bytes.NewReader(r.ask(b, fmt.Sprintf("output %d pace", id))))
	for {
		h, err := in.Next()
		if err != nil {
			b.Fatalf("the output of job %d: %v", id, err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		text, err := io.ReadAll(in)
		if err == nil {
			err = json.Unmarshal(text, &p)
		}
		if err != nil {
			b.Fatal(err)
		}
		return p
	}
}
