package main

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBench measures raid beside its peers and writes the table of
// contrib/bench/RESULTS.md. It starts all it needs on loopback, in one folder, and
// removes it. `make bench` runs it with
//
//	RAID_BENCH=1           without it this test is skipped
//	RAID_BENCH_BIN=DIR     raid and rai-keygen, as they were built
//	RAID_BENCH_OUT=FILE    where the table goes; nowhere by default
//	RAID_BENCH_ONLY=WORDS  only the groups with one of these names, with commas
//	RAID_BENCH_NOTE=TEXT   a line about the machine, printed above the table
//
// Ours and the peer take turns within one run, so that a machine that slows down
// slows both. A number is the median of its rounds, with the least and the most.
func TestBench(t *testing.T) {
	if os.Getenv("RAID_BENCH") == "" {
		t.Skip("takes minutes and wants a quiet machine: make bench")
	}
	b := newBench(t)
	groups := []struct {
		name string
		run  func(*bench)
	}{
		{"login", benchLogin},
		{"echo", benchEcho},
		{"box", benchBox},
		{"docker", benchDocker},
		{"upload", benchUpload},
		{"live", benchLive},
		{"lines", benchLines},
		{"latency", benchLatency},
		{"blocked", benchBlocked},
		{"mirror", benchMirror},
		{"queue", benchQueue},
		{"redis", benchRedis},
		{"doors", benchDoors},
		{"idle", benchIdle},
		{"restart", benchRestart},
		{"s3", benchS3},
	}
	only := strings.FieldsFunc(os.Getenv("RAID_BENCH_ONLY"), func(r rune) bool { return r == ',' })
	for _, g := range groups {
		if len(only) > 0 && !slices.Contains(only, g.name) {
			continue
		}
		start := time.Now()
		t.Run(g.name, func(t *testing.T) {
			b.T = t
			g.run(b)
		})
		t.Logf("%s took %.1f s", g.name, time.Since(start).Seconds())
	}
	text := b.table()
	fmt.Print("\n", text)
	if out := os.Getenv("RAID_BENCH_OUT"); out != "" {
		if err := os.WriteFile(out, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A sample is what the rounds of one contestant gave, in one unit.
type sample []float64

func (s sample) sorted() sample { return slices.Sorted(slices.Values(s)) }

func (s sample) median() float64 { return s.quantile(0.5) }

func (s sample) quantile(q float64) float64 {
	v := s.sorted()
	if len(v) == 0 {
		return 0
	}
	if n := len(v); q == 0.5 && n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[int(q*float64(len(v)-1)+0.5)]
}

// in prints the median and, of several rounds, the least and the most.
func (s sample) in(unit string) string {
	if len(s) == 0 {
		return "—"
	}
	v := s.sorted()
	text := number(s.median())
	if len(v) > 1 {
		text += " (" + number(v[0]) + "–" + number(v[len(v)-1]) + ")"
	}
	return text + " " + unit
}

// number prints three digits, more only where the whole part has more.
func number(f float64) string {
	switch {
	case f >= 100 || f <= -100:
		return fmt.Sprintf("%.0f", f)
	case f >= 10 || f <= -10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

// A contestant does the same work as the others of its race, and says in
// milliseconds how long it took, or what else the race is about.
type contestant struct {
	name string
	run  func() float64
}

// race lets the contestants take turns for so many rounds.
func (b *bench) race(rounds int, cs ...contestant) map[string]sample {
	b.Helper()
	all := map[string]sample{}
	for range rounds {
		for _, c := range cs {
			unix.Sync() // what an earlier turn left for the disk is not this one's work
			all[c.name] = append(all[c.name], c.run())
		}
	}
	for _, c := range cs {
		b.Logf("%s: %s", c.name, all[c.name].in("ms"))
	}
	return all
}

// timed returns how many milliseconds fn takes.
func timed(fn func()) float64 {
	start := time.Now()
	fn()
	return float64(time.Since(start).Microseconds()) / 1000
}

// A row is one line of the table.
type row struct{ what, ours, peer, ratio, goal, verdict string }

// versus adds a row whose goal is a share of the peer's time; 0 is no goal.
func (b *bench) versus(what string, ours, peer sample, peerName string, goal float64) {
	r := ours.median() / peer.median()
	line := row{what, ours.in("ms"), peerName + ": " + peer.in("ms"), fmt.Sprintf("%.2f ×", r), "—", ""}
	if goal > 0 {
		line.goal, line.verdict = fmt.Sprintf("≤ %g ×", goal), verdict(r <= goal)
	}
	b.rows = append(b.rows, line)
}

// number adds a row whose goal is a number of its own; ok says whether it is reached.
func (b *bench) number(what, ours, goal string, ok bool) {
	b.rows = append(b.rows, row{what, ours, "—", "—", goal, verdict(ok)})
}

// plain adds a row without a goal.
func (b *bench) plain(what, ours string) {
	b.rows = append(b.rows, row{what, ours, "—", "—", "—", ""})
}

// skipRow says why there is no number.
func (b *bench) skipRow(what, why string) {
	b.rows = append(b.rows, row{what, "—", "—", "—", "—", "skipped: " + why})
}

func verdict(ok bool) string {
	if ok {
		return "pass"
	}
	return "**miss**"
}

// table prints all rows as Markdown, below what they were measured on.
func (b *bench) table() string {
	var s strings.Builder
	fmt.Fprintf(&s, "# What raid does beside its peers\n\nMade by `make bench`. Each line: ours and the peer took turns in one run on one machine; medians, with the least and the most.\n\n")
	for _, line := range machine() {
		fmt.Fprintf(&s, "- %s\n", line)
	}
	fmt.Fprintf(&s, "\n| what | raid | peer | ratio | goal | |\n|---|---|---|---|---|---|\n")
	for _, r := range b.rows {
		if r.ours == "" { // a heading
			r.what, r.peer, r.ratio, r.goal = "*"+r.what+"*", "", "", ""
		}
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s | %s |\n", r.what, r.ours, r.peer, r.ratio, r.goal, r.verdict)
	}
	return s.String()
}

// machine says what the numbers were measured on.
func machine() []string {
	lines := []string{
		time.Now().UTC().Format("2006-01-02 15:04 UTC"),
		fmt.Sprintf("%s, %d cores, Linux %s, file system %s", cpuModel(), runtime.NumCPU(), firstLine("uname", "-r"), fileSystem()),
		runtime.Version() + ", " + firstLine("ssh", "-V") + ", " + firstLine("redis-server", "--version"),
		"commit " + cmp.Or(firstLine("git", "rev-parse", "--short=12", "HEAD"), "unknown"),
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		lines = append(lines, "load at the end: "+strings.Join(strings.Fields(string(load))[:3], " "))
	}
	if note := os.Getenv("RAID_BENCH_NOTE"); note != "" {
		lines = append(lines, note)
	}
	return lines
}

func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func fileSystem() string {
	return firstLine("stat", "-f", "-c", "%T", benchRoot)
}

func firstLine(name string, args ...string) string {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// benchRoot is where the folder of a run is made: a disk, not memory, for durability
// is part of what is measured.
const benchRoot = "/var/tmp"

// A bench holds what a run has started, and its rows.
type bench struct {
	*testing.T
	dir   string // everything of this run
	bin   string // raid and rai-keygen
	rows  []row
	raids map[string]*raid
	peer  server // sshd
	image string // a Docker image with a static /echo, "" for none
	why   string // why there is none
	redis *redisServer
	blob  string // 1 GiB that does not compress
}

func newBench(t *testing.T) *bench {
	dir, err := os.MkdirTemp(benchRoot, "raid-bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bench{T: t, dir: dir, bin: os.Getenv("RAID_BENCH_BIN"), raids: map[string]*raid{}}
	if b.bin == "" {
		b.bin = filepath.Join(dir, "bin")
		build := exec.Command("go", "build", "-o", b.bin+"/", ".", "../rai-keygen")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
	}
	b.redis = b.startRedis(t)
	b.raids["main"] = b.startRaid(t, "main", "")
	b.raids["mirror"] = b.startRaid(t, "mirror", "[mirror]\nredis = \""+b.redis.url+"\"\n")
	b.raids["cold"] = b.startRaid(t, "cold", "[box]\nwarm = 0\n")
	b.raids["remote"] = b.startRaid(t, "remote", "[runners]\nlocal = 0\n")
	b.join(b.raids["remote"])
	b.peer = b.startSSHD(t)
	b.image, b.why = b.makeImage(t)
	b.blob = b.makeBlob(t)
	return b
}
