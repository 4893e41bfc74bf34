package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker/dockertest"
	"github.com/rai-project/raid/runner/job"
)

// TestMixed has a few people submit some two hundred jobs that end in every way there
// is, in both kinds of boxes at once, and looks at the end whether each has the verdict
// it had to have, at its first attempt, and whether anything at all is left of them.
//
// RAID_MIXED_JOBS says how many, RAID_MIXED_SEED in which order. It takes a minute on two
// cores, and an engine of its own, so that all there is in it is of these jobs.
func TestMixed(t *testing.T) {
	need(t, "bwrap", "ssh", "dockerd", "tar")
	t.Parallel()
	jobs := int64(200)
	if testing.Short() {
		jobs = 40
	}
	jobs, seed := envInt(t, "RAID_MIXED_JOBS", jobs), envInt(t, "RAID_MIXED_SEED", time.Now().UnixNano())
	t.Logf("RAID_MIXED_JOBS=%d RAID_MIXED_SEED=%d", jobs, seed)
	m := newMixed(t)
	began := time.Now()
	m.submit(m.choose(int(jobs), rand.New(rand.NewPCG(uint64(seed), 0))))
	took := time.Since(began)
	m.check()
	m.stop()
	t.Logf("%d jobs in %v", len(m.jobs), took.Round(time.Second))
}

// A mix is one sort of job and how each of it has to end.
type mix struct {
	name   string
	share  int    // how many in a hundred, in each engine that it is for
	engine string // "docker" or "bwrap"; "" for both
	flags  string
	line   string // for the shell; "" for what the upload's build file says
	upload string // a folder of the world
	cancel string // "queued", "running" or "interrupt"
	state  job.State
	reason job.Reason
	exit   int
	prints string // a line of its stdout
}

// Pools of a mixed run. Jobs of the last wait behind one that does not end.
var (
	dockerPool = "rai_" + runtime.GOARCH
	bwrapPool  = "rai_bwrap"
	heldPool   = "rai_held"
)

// mixture are the jobs. MARK stands for a number of seconds that no other process on the
// machine sleeps.
var mixture = []mix{
	{name: "true", share: 10, line: "echo fine", prints: "fine", state: job.Succeeded, reason: job.ReasonExit},
	{name: "exit", share: 6, line: "echo before; exit 3", prints: "before", state: job.Failed, reason: job.ReasonExit, exit: 3},
	{name: "signal", share: 4, line: "kill -SEGV $$", state: job.Failed, reason: job.ReasonSignal, exit: 128 + 11},
	{name: "shot", share: 3, line: "kill -9 -1; exit 4", state: job.Failed, reason: job.ReasonExit, exit: 4},
	{name: "timeout", share: 4, flags: "--timeout 300ms", line: "sleep MARK", state: job.Failed, reason: job.ReasonTimeout, exit: job.ExitTimeout},
	{name: "deaf", share: 1, flags: "--timeout 300ms", line: "trap '' TERM HUP INT; (sleep MARK) & while :; do sleep MARK; done", state: job.Failed, reason: job.ReasonTimeout, exit: job.ExitTimeout},
	{name: "oom", share: 4, line: "x=$(head -c 300M /dev/zero | tr '\\0' x); echo ${#x}", state: job.Failed, reason: job.ReasonOOM, exit: job.ExitKilled},
	{name: "output", share: 3, line: "head -c 64M /dev/zero; sleep MARK", state: job.Failed, reason: job.ReasonOutputLimit, exit: job.ExitLimit},
	{name: "disk", share: 4, line: "head -c 200M /dev/zero >big", state: job.Failed, reason: job.ReasonDiskLimit, exit: job.ExitLimit},
	{name: "root", share: 1, engine: "docker", line: "head -c 200M /dev/zero >/usr/big; sleep MARK", state: job.Failed, reason: job.ReasonDiskLimit, exit: job.ExitLimit},
	{name: "bomb", share: 1, flags: "--timeout 1s", line: "b() { b | b & wait; }; b 2>/dev/null; sleep MARK", state: job.Failed, reason: job.ReasonTimeout, exit: job.ExitTimeout},
	{name: "orphans", share: 5, line: "(setsid sleep MARK &); (trap '' TERM HUP INT; setsid sleep MARK &); exit 0", state: job.Succeeded, reason: job.ReasonExit},
	{name: "cancelled", share: 3, cancel: "running", line: "echo go; sleep MARK", prints: "go", state: job.Cancelled, reason: job.ReasonCancelled, exit: job.ExitCancelled},
	{name: "interrupted", share: 2, cancel: "interrupt", line: "echo go; sleep MARK", prints: "go", state: job.Cancelled, reason: job.ReasonCancelled, exit: job.ExitCancelled},
	{name: "unwanted", share: 4, engine: "bwrap", flags: "-q " + heldPool, cancel: "queued", line: "echo never", state: job.Cancelled, reason: job.ReasonCancelled, exit: job.ExitCancelled},
	{name: "keeps", share: 4, upload: "keeps", prints: "a data set", state: job.Succeeded, reason: job.ReasonExit},
	{name: "cold", share: 3, engine: "docker", upload: "cold", prints: "colder", state: job.Succeeded, reason: job.ReasonExit},
	{name: "builds", share: 2, engine: "docker", upload: "builds", prints: "built", state: job.Succeeded, reason: job.ReasonExit},
	{name: "unbuilt", share: 1, engine: "docker", upload: "unbuilt", state: job.Failed, reason: job.ReasonExit, exit: 5},
	{name: "building", share: 1, engine: "docker", upload: "building", flags: "--timeout 1s", state: job.Failed, reason: job.ReasonTimeout, exit: job.ExitTimeout},
}

// mixedFiles are the folders that are uploaded, and the data set.
var mixedFiles = map[string]string{
	"set/words":              "a data set\n",
	"keeps/rai_build.yml":    "resources: {cache: true}\ncommands: {build: [cat /data/words, echo kept >/cache/$RAI_JOB_ID, echo kept >kept]}\n",
	"cold/rai_build.yml":     "rai: {version: 0.2, image: COLD}\ncommands: {build: [echo $VERSION]}\n",
	"builds/rai_build.yml":   "commands: {build_image: {image_name: mine/app:1}, build: [cat /built]}\n",
	"builds/Dockerfile":      "FROM IMAGE\nUSER 0\nRUN echo built >/built\n",
	"unbuilt/rai_build.yml":  "commands: {build_image: {}, build: [echo never]}\n",
	"unbuilt/Dockerfile":     "FROM IMAGE\nRUN exit 5\n",
	"building/rai_build.yml": "commands: {build_image: {}, build: [echo never]}\n",
	"building/Dockerfile":    "FROM IMAGE\nRUN sleep MARK\n",
	"raid.toml": `[runners]
local = 3
[box]
image = "IMAGE"
allow = ["COLD"]
pull = "missing"
[limits]
memory = "64MiB"
disk = "32MiB"
output = "64KiB"
pids = 48
[roles.student]
build_image = true
[pools.DOCKER]
engine = "docker"
data = "WORK/set"
cache = "16MiB"
[pools.rai_bwrap]
engine = "bwrap"
data = "WORK/set"
cache = "16MiB"
[pools.rai_held]
engine = "bwrap"
`,
}

// mixedPeople submit, two of them in one team, and each so many at a time.
var mixedPeople = []struct{ name, team string }{{"ada", "red"}, {"bob", "red"}, {"eve", "blue"}, {"joe", "-"}}

const (
	mixedAtOnce  = 4
	mixedRunners = 2 // that make sandboxes, beside one that is held
)

// A mixed is a raid with runners for both kinds of boxes. Its methods belong to the
// test's goroutine, except those of mixedJob.
type mixed struct {
	*testing.T
	w       *world
	lab     *dockertest.Lab
	mark    string
	cold    string   // the image that nobody keeps warm
	before  []string // what was in the engine
	boxes   func() []string
	remotes map[string]*process
	held    *mixedJob
	jobs    []*mixedJob
}

// A mixedJob is one of them.
type mixedJob struct {
	*mix
	m    *mixed
	name string
	pool string
	who  string
}

func newMixed(t *testing.T) *mixed {
	lab, err := dockertest.OpenAlone()
	if err != nil {
		if err := unlessSkipping(err); err != nil {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := sharedTemp(t)
	m := &mixed{T: t, lab: lab, w: newWorld(t, dir, buildPrograms(t)), remotes: map[string]*process{},
		mark: fmt.Sprintf("99999.%d%d", os.Getpid(), time.Now().UnixNano()%1e6), cold: "raid-cold:latest"}
	t.Cleanup(m.end)
	m.w.lab = lab
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m.must(lab.Make(ctx, m.cold, "VERSION=colder"))
	m.before, err = lab.Inventory(ctx)
	m.must(err)
	m.boxes = lab.Watch()
	m.write()
	m.start()
	return m
}

func (m *mixed) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

// write fills the world's folder.
func (m *mixed) write() {
	words := strings.NewReplacer("IMAGE", m.lab.Image, "COLD", m.cold, "WORK", m.w.dir, "DOCKER", dockerPool, "MARK", m.mark)
	for name, text := range mixedFiles {
		file := filepath.Join(m.w.dir, name)
		m.must(os.MkdirAll(filepath.Dir(file), 0o755))
		m.must(os.WriteFile(file, []byte(words.Replace(text)), 0o644))
	}
	for _, dir := range []string{"tmp", "keys"} {
		m.must(os.Mkdir(filepath.Join(m.w.dir, dir), 0o755))
	}
	for i := range mixture {
		if dir := mixture[i].upload; dir != "" {
			m.done(m.spawn("tar", "cf", filepath.Join(m.w.dir, dir+".tar"), "-C", filepath.Join(m.w.dir, dir), "."))
		}
	}
	m.must(os.WriteFile(m.w.sshConfig(), fmt.Appendf(nil, sshConfig, filepath.Join(m.w.dir, "known_hosts")), 0o644))
}

// start starts raid, which has the containers, and the runners that make sandboxes.
func (m *mixed) start() {
	m.w.raid = m.spawn("raid", "serve", "--state", m.w.state, "--listen", "127.0.0.1:0", "--config", filepath.Join(m.w.dir, "raid.toml"))
	m.w.logs = append(m.w.logs, m.w.raid.both)
	m.w.port = m.awaits(m.w.raid, listening)[1]
	host, err := os.ReadFile(filepath.Join(m.w.state, "host_key.pub"))
	m.must(err)
	m.must(os.WriteFile(filepath.Join(m.w.dir, "known_hosts"), append([]byte("raid "), host...), 0o644))
	m.must(os.WriteFile(filepath.Join(m.w.dir, "known"), append([]byte("[127.0.0.1]:"+m.w.port+" "), host...), 0o644))
	for _, p := range mixedPeople {
		m.keygen("-u", p.name, "-e", p.name+"@example.edu", "-r", "student", "-t", p.team)
	}
	m.startRunner("held", heldPool)
	for i := range mixedRunners {
		m.startRunner(fmt.Sprint("bwrap", i), bwrapPool)
	}
	m.held = &mixedJob{mix: &mix{line: "echo go; sleep " + m.mark, flags: "-q " + heldPool, state: job.Cancelled, reason: job.ReasonCancelled, exit: job.ExitCancelled},
		m: m, name: "held", pool: heldPool, who: mixedPeople[0].name}
	m.awaits(m.held.ssh("submit --detach --name held -q "+heldPool+" -- "+m.held.line), jobNumber)
	m.awaits(m.held.ssh("attach 1"), regexp.MustCompile(`(?m)^go$`))
}

func (m *mixed) startRunner(name, pool string) {
	m.keygen("runner", name)
	key := filepath.Join(m.w.dir, "keys", "runner-"+name)
	m.w.remotes[name] = true
	m.remotes[name] = m.spawn("raid", "runner", "--server", "rai@127.0.0.1:"+m.w.port, "-i", key, "--known-hosts", filepath.Join(m.w.dir, "known"),
		"--state", filepath.Join(m.w.dir, name), "--name", name, "-q", pool, "--config", filepath.Join(m.w.dir, "raid.toml"))
	m.awaits(m.remotes[name], regexp.MustCompile("ready"))
}

func (m *mixed) keygen(args ...string) {
	m.Helper()
	m.done(m.spawn(append([]string{"rai-keygen", "--server", "rai@127.0.0.1:" + m.w.port, "-i", filepath.Join(m.w.state, "admin"),
		"--out", filepath.Join(m.w.dir, "keys")}, args...)...))
}

// spawn starts a program with a folder for temporary files that is looked into at the end.
func (m *mixed) spawn(argv ...string) *process {
	m.Helper()
	p, err := m.launch("", argv...)
	m.must(err)
	return p
}

// launch may be called by any goroutine.
func (m *mixed) launch(stdin string, argv ...string) (*process, error) {
	if own := filepath.Join(m.w.bin, argv[0]); !strings.Contains(argv[0], "/") {
		if _, err := os.Stat(own); err == nil {
			argv[0] = own
		}
	}
	return m.w.start(argv, append(os.Environ(), "DOCKER_HOST="+m.lab.Host, "TMPDIR="+filepath.Join(m.w.dir, "tmp")), stdin, 0)
}

// done waits for a program that has to succeed.
func (m *mixed) done(p *process) *process {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	m.must(p.wait(ctx))
	if p.status != 0 {
		m.Fatalf("%q = %d: %s", p.cmd.Args, p.status, p.both)
	}
	return p
}

func (m *mixed) awaits(p *process, re *regexp.Regexp) []string {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	groups, err := p.both.await(ctx, re)
	m.must(err)
	return groups
}

// choose returns n jobs in an order of chance, at least one of each sort.
func (m *mixed) choose(n int, rnd *rand.Rand) (jobs []*mixedJob) {
	shares := 0
	for i := range mixture {
		shares += len(mixture[i].pools()) * mixture[i].share
	}
	for i := range mixture {
		for _, pool := range mixture[i].pools() {
			for range max(1, (mixture[i].share*n+shares/2)/shares) {
				who := mixedPeople[len(jobs)%len(mixedPeople)].name
				jobs = append(jobs, &mixedJob{mix: &mixture[i], m: m, name: fmt.Sprint(mixture[i].name, "-", len(jobs)), pool: pool, who: who})
			}
		}
	}
	rnd.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	return jobs
}

func (x *mix) pools() []string {
	switch x.engine {
	case "docker":
		return []string{dockerPool}
	case "bwrap":
		return []string{bwrapPool}
	}
	return []string{dockerPool, bwrapPool}
}

// submit has everybody submit their jobs, a few at a time, and waits for all of them.
func (m *mixed) submit(jobs []*mixedJob) {
	m.jobs = jobs
	var wg sync.WaitGroup
	for _, p := range mixedPeople {
		mine := make(chan *mixedJob, len(jobs))
		for _, j := range jobs {
			if j.who == p.name {
				mine <- j
			}
		}
		close(mine)
		for range mixedAtOnce {
			wg.Go(func() {
				for j := range mine {
					if err := j.run(); err != nil {
						m.Errorf("%s of %s in %s: %v", j.name, j.who, j.pool, err)
					}
				}
			})
		}
	}
	wg.Wait()
}

var jobNumber = regexp.MustCompile(`(?m)^(?:raid: job )?(\d+)(?: queued|$)`)

// command is ssh as its owner has it.
func (j *mixedJob) command(command string) []string {
	w := j.m.w
	return []string{"ssh", "-F", w.sshConfig(), "-i", filepath.Join(w.dir, "keys", j.who), "-p", w.port, "raid", command}
}

func (j *mixedJob) ssh(command string) *process {
	j.m.Helper()
	return j.m.spawn(j.command(command)...)
}

// run submits the job, does to it what is to be done, and compares what its owner sees.
// It may be called by any goroutine.
func (j *mixedJob) run() error {
	ctx, cancel := context.WithTimeout(j.m.Context(), 2*patience)
	defer cancel()
	words := []string{"submit", "--name", j.name}
	if !strings.Contains(j.flags, "-q ") {
		words = append(words, "-q", j.pool)
	}
	words = append(words, j.flags)
	if j.cancel == "queued" {
		words = append(words, "--detach")
	}
	stdin := ""
	if j.upload != "" {
		stdin = filepath.Join(j.m.w.dir, j.upload+".tar")
	} else {
		words = append(words, "--", strings.ReplaceAll(j.line, "MARK", j.m.mark))
	}
	p, err := j.m.launch(stdin, j.command(strings.Join(words, " "))...)
	if err != nil {
		return err
	}
	if err := j.end(ctx, p); err != nil {
		return err
	}
	if err := p.wait(ctx); err != nil {
		return err
	}
	if j.cancel == "interrupt" { // ssh is gone before the job is
		a, err := j.m.launch("", j.command("attach "+jobNumber.FindStringSubmatch(p.both.String())[1])...)
		if err != nil {
			return err
		}
		if err := a.wait(ctx); err != nil {
			return err
		}
	}
	return j.compare(p)
}

// end ends a job that does not end by itself.
func (j *mixedJob) end(ctx context.Context, p *process) error {
	if j.cancel == "" {
		return nil
	}
	number, err := p.both.await(ctx, jobNumber)
	if err == nil && j.cancel != "queued" {
		_, err = p.both.await(ctx, regexp.MustCompile(`(?m)^go$`))
	}
	if err != nil {
		return err
	}
	if j.cancel == "interrupt" {
		return p.cmd.Process.Signal(syscall.SIGINT)
	}
	c, err := j.m.launch("", j.command("cancel "+number[1])...)
	if err != nil {
		return err
	}
	if err := c.wait(ctx); err != nil {
		return err
	}
	if c.status != 0 {
		return fmt.Errorf("cancel %s = %d: %s", number[1], c.status, c.both)
	}
	return nil
}

// compare looks at what came over ssh.
func (j *mixedJob) compare(p *process) error {
	want := j.exit
	switch j.cancel {
	case "queued":
		want = 0 // it was --detach
	case "interrupt":
		want = 255 // ssh's own
	}
	if p.status != want {
		return fmt.Errorf("exit status %d, want %d: %s", p.status, want, lastLines(p.both.String(), 12))
	}
	if j.prints != "" && !slices.Contains(strings.Split(p.out.String(), "\n"), j.prints) {
		return fmt.Errorf("printed %.200q, want %q", p.out.String(), j.prints)
	}
	return nil
}

// check holds raid's own word on every job against what it had to be.
func (m *mixed) check() {
	m.done(m.held.ssh("cancel 1"))
	m.done(m.held.ssh("why 1"))
	there := map[string]job.Job{}
	for line := range bytes.Lines(m.done(m.spawn(m.admin("history --json -n 10000")...)).out.Bytes()) {
		var j job.Job
		m.must(json.Unmarshal(line, &j))
		there[j.Name] = j
	}
	delete(there, "held")
	for _, j := range m.jobs {
		got, ok := there[j.name]
		delete(there, j.name)
		attempt := 1
		if j.cancel == "queued" {
			attempt = 0
		}
		if !ok || got.Exit == nil || got.State != j.state || got.Reason != j.reason || *got.Exit != j.exit || got.Attempt != attempt || got.User != j.who {
			b, _ := json.Marshal(got)
			m.Errorf("%s of %s is %s, want %s, %s, exit %d, attempt %d", j.name, j.who, b, j.state, j.reason, j.exit, attempt)
		}
	}
	for name := range there {
		m.Errorf("nobody submitted %s", name)
	}
}

func (m *mixed) admin(command string) []string {
	return []string{"ssh", "-F", m.w.sshConfig(), "-i", filepath.Join(m.w.state, "admin"), "-p", m.w.port, "raid", command}
}

// stop ends everything as staff would and looks for what is left.
func (m *mixed) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for name, p := range m.remotes {
		p.cmd.Process.Signal(syscall.SIGTERM)
		if err := p.wait(ctx); err != nil || p.status != 0 {
			m.Errorf("runner %s ended with %d: %v\n%s", name, p.status, err, lastLines(p.both.String(), 12))
		}
	}
	if err := m.w.stopRaid(ctx); err != nil {
		m.Errorf("stop raid: %v", err)
	}
	if !m.w.stopRunners() {
		m.w.checkGone()
	}
	boxes := m.boxes()
	if len(boxes) < len(m.jobs)/4 {
		m.Errorf("only %d containers were started", len(boxes))
	}
	for _, what := range boxtest.Traces(append(boxes, m.mark)...) {
		m.Errorf("left behind: %s", what)
	}
	after, err := m.lab.Inventory(ctx)
	if err != nil || !slices.Equal(m.before, after) {
		m.Errorf("the engine held\n%s\nand holds\n%s\n%v", strings.Join(m.before, "\n"), strings.Join(after, "\n"), err)
	}
	if left, err := os.ReadDir(filepath.Join(m.w.dir, "tmp")); err != nil || len(left) > 0 {
		m.Errorf("temporary files: %v, %v", left, err)
	}
}

// end takes care that a test that failed leaves nothing either.
func (m *mixed) end() {
	for _, p := range m.remotes {
		p.retire()
		p.cmd.Process.Kill()
		<-p.done
	}
	if m.w.raid != nil {
		m.w.raid.retire()
		m.w.raid.cmd.Process.Kill()
		<-m.w.raid.done
	}
	if m.Failed() {
		m.w.stopRunners()
		m.w.showLogs()
	}
	if m.boxes != nil {
		m.boxes()
	}
	if err := m.lab.Close(); err != nil {
		m.Errorf("close the Docker lab: %v", err)
	}
}
