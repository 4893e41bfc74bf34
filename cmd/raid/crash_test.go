package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// TestCrash kills raid and its runners at random moments while people submit, follow
// and cancel, and holds what is there in the end against what everybody was told:
// every job that was acknowledged has one result, everybody saw the same bytes, no job
// is there that nobody asked for, and every slot is there once.
//
// RAID_CRASH_ROUNDS says how many kills, RAID_CRASH_SEED which.
func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a minute")
	}
	need(t, "bwrap")
	t.Parallel()
	rounds, seed := envInt(t, "RAID_CRASH_ROUNDS", 100), envInt(t, "RAID_CRASH_SEED", time.Now().UnixNano())
	t.Logf("RAID_CRASH_ROUNDS=%d RAID_CRASH_SEED=%d", rounds, seed)
	c := newCrash(t, uint64(seed))
	c.endure(rounds, patience, c.kill)
}

// endure has people work while so many bad things happen, lets them see all their jobs to
// the end, for so long at most, and checks everything.
func (c *crash) endure(rounds int64, most time.Duration, harm func()) {
	var wg sync.WaitGroup
	load, rest := context.WithCancel(c.Context())
	for i := range c.people {
		p := c.people[i]
		wg.Go(func() { p.work(load) })
	}
	began := time.Now()
	for range rounds {
		harm()
	}
	took := time.Since(began)
	rest()
	tooLong := time.AfterFunc(most, c.over)
	wg.Wait()
	tooLong.Stop()
	c.check()
	c.checkSlots()
	c.stop()
	if c.Failed() {
		for _, line := range regexp.MustCompile(`(?m)^.*(ERRO|WARN).*$`).FindAll(c.log.Bytes(), -1) {
			c.Logf("  %s", line)
		}
	}
	c.Logf("%d kills in %v: %s", rounds, took.Round(time.Second), c.summary())
}

func envInt(t *testing.T, name string, otherwise int64) int64 {
	t.Helper()
	if os.Getenv(name) == "" {
		return otherwise
	}
	n, err := strconv.ParseInt(os.Getenv(name), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// The cast of a crash test.
const (
	crashPeople  = 6
	crashRemotes = 2 // runners that connect over SSH, beside one of raid's own
	crashBusy    = 3 // jobs a person leaves alone before coming back to the first
)

// A crash is a raid, or several, that die often, with all who depend on them. The
// methods are called by the test's goroutine only, unless they say otherwise.
type crash struct {
	*testing.T
	w       *world // of the first house
	houses  []*crashHouse
	rnd     *rand.Rand
	log     bytes.Buffer
	remotes [crashRemotes]*process
	people  []*person
	kills   map[string]int
	busy    context.Context // of what people do
	over    func()          // ends it

	mu    sync.Mutex    // protects the following, and crashHouse.up
	moved chan struct{} // closed when a raid has come up
}

// A crashHouse is one raid.
type crashHouse struct {
	w    *world
	addr string // always the same one
	up   bool   // it listens
}

// A person submits jobs and remembers what they were told.
type person struct {
	c    *crash
	name string
	key  ssh.Signer
	rnd  *rand.Rand
	jobs []*crashJob
	cuts int // sessions that broke
}

// A crashJob is what one person knows of one job.
type crashJob struct {
	name     string
	want     heard // what it prints
	exit     int
	id       int64  // 0: its submit was not acknowledged
	cancel   bool   // somebody asked for its end
	seen     *heard // what a session brought that came to the end
	status   int    // which that session ended with
	finished job.Job
}

// heard is what a job printed, or a part of it.
type heard struct{ out, err []byte }

// crashHost is an address of loopback that no other test listens on: while raid is down
// its port must not become somebody else's, whose host key would end the runners.
const crashHost = "127.0.0.83"

// newCrash starts raid and everybody else.
func newCrash(t *testing.T, seed uint64) *crash {
	c := emptyCrash(t, seed)
	h := c.build(crashHost, "[runners]\nlocal = 1\n")
	t.Cleanup(c.end)
	for range 3 { // while it makes its keys and its store
		c.launch(h)
		c.pass(c.rnd.IntN(100))
		c.killRaid(h)
	}
	c.startRaid(h)
	c.invite(seed)
	return c
}

func emptyCrash(t *testing.T, seed uint64) *crash {
	c := &crash{T: t, rnd: rand.New(rand.NewPCG(seed, 0)), kills: map[string]int{}, moved: make(chan struct{})}
	c.busy, c.over = context.WithCancel(t.Context())
	return c
}

// build makes a house at an address of its own; more goes into its raid.toml. The caller
// registers end for cleanup after the last one.
func (c *crash) build(host, more string) *crashHouse {
	c.Helper()
	dir := sharedTemp(c.T)
	h := &crashHouse{w: newWorld(c.T, dir, buildPrograms(c.T))}
	h.addr = net.JoinHostPort(host, redistest.Port(c.T, host))
	c.must(os.WriteFile(filepath.Join(dir, "raid.toml"), []byte(more+"[limits]\nmemory = \"256MiB\"\ndisk = \"64MiB\"\n"), 0o644))
	if c.houses = append(c.houses, h); c.w == nil {
		c.w = h.w
	}
	return h
}

// invite enrols people and starts the runners of other machines.
func (c *crash) invite(seed uint64) {
	for i := range crashPeople {
		name := fmt.Sprint("p", i)
		c.keygen("-u", name, "-e", name+"@example.edu", "-r", "student", "-t", "-")
		key, err := keys.LoadSigner(filepath.Join(c.w.dir, "keys", name), nil)
		c.must(err)
		c.people = append(c.people, &person{c: c, name: name, key: key, rnd: rand.New(rand.NewPCG(seed, uint64(i)+1))})
	}
	hostLine, err := os.ReadFile(filepath.Join(c.w.state, "host_key.pub"))
	c.must(err)
	c.must(os.WriteFile(filepath.Join(c.w.dir, "runner.toml"), []byte("[limits]\nmemory = \"256MiB\"\ndisk = \"64MiB\"\n"), 0o644))
	var known []byte
	for _, h := range c.houses {
		host, port, err := net.SplitHostPort(h.addr)
		c.must(err)
		known = append(append(known, "["+host+"]:"+port+" "...), hostLine...)
	}
	c.must(os.WriteFile(filepath.Join(c.w.dir, "known"), known, 0o644))
	for i := range c.remotes {
		c.keygen("runner", c.remoteName(i))
		c.startRemote(i)
	}
}

func (c *crash) must(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

func (c *crash) remoteName(i int) string { return fmt.Sprint("gpu", i) }

func (c *crash) keygen(args ...string) {
	c.Helper()
	argv := append([]string{filepath.Join(c.w.bin, "rai-keygen"), "--server", "rai@" + c.houses[0].addr,
		"-i", filepath.Join(c.w.state, "admin"), "--out", filepath.Join(c.w.dir, "keys")}, args...)
	p := c.spawn(argv...)
	if <-p.done; p.status != 0 {
		c.Fatalf("%q: %s", argv, p.both)
	}
}

func (c *crash) spawn(argv ...string) *process {
	c.Helper()
	p, err := c.w.start(argv, os.Environ(), "", 0)
	c.must(err)
	return p
}

// launch starts a raid's process; startRaid waits for it.
func (c *crash) launch(h *crashHouse) {
	h.w.raid = c.spawn(filepath.Join(h.w.bin, "raid"), "serve", "--state", h.w.state,
		"--listen", h.addr, "--config", filepath.Join(h.w.dir, "raid.toml"))
}

func (c *crash) startRaid(h *crashHouse) {
	c.launch(h)
	ctx, cancel := context.WithTimeout(c.Context(), patience)
	defer cancel()
	_, err := h.w.raid.both.await(ctx, listening)
	c.must(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	h.up = true
	close(c.moved)
	c.moved = make(chan struct{})
}

func (c *crash) startRemote(i int) {
	name := c.remoteName(i)
	key := filepath.Join(c.w.dir, "keys", "runner-"+name)
	c.w.remotes[name] = true
	argv := []string{filepath.Join(c.w.bin, "raid"), "runner", "-i", key, "--known-hosts", filepath.Join(c.w.dir, "known"),
		"--state", filepath.Join(c.w.dir, name), "--name", name, "--config", filepath.Join(c.w.dir, "runner.toml")}
	for n := range c.houses {
		argv = append(argv, "--server", "rai@"+c.houses[(n+i)%len(c.houses)].addr)
	}
	c.remotes[i] = c.spawn(argv...)
}

// kill lets a random moment pass and kills something, which comes back at once.
func (c *crash) kill() {
	if c.rnd.IntN(2) == 0 { // in the middle of the work, or of the beginning
		c.pass(c.rnd.IntN(1000))
	} else {
		c.pass(c.rnd.IntN(200))
	}
	h := c.houses[c.rnd.IntN(len(c.houses))]
	switch n := c.rnd.IntN(10); {
	case n < 4:
		c.killRaid(h)
		c.startRaid(h)
	case n < 5: // and again before it is there, or just after
		c.killRaid(h)
		c.launch(h)
		c.pass(c.rnd.IntN(200))
		c.killRaid(h)
		c.startRaid(h)
	case n < 6: // everything at once
		for _, h := range c.houses {
			c.killRaid(h)
		}
		for i := range c.remotes {
			c.killRemote(i)
		}
		c.killLocal(h)
		for _, h := range c.houses {
			c.startRaid(h)
		}
	case n < 8:
		c.killRemote(c.rnd.IntN(crashRemotes))
	default:
		c.killLocal(h)
	}
}

func (c *crash) pass(ms int) {
	select {
	case <-time.After(time.Duration(ms) * time.Millisecond):
	case <-c.Context().Done():
	}
}

func (c *crash) killRaid(h *crashHouse) {
	c.kills["raid"]++
	c.mu.Lock()
	h.up = false
	c.mu.Unlock()
	c.bury(h.w.raid)
	c.log.WriteString(h.w.raid.both.String())
	h.w.raid = nil
}

func (c *crash) bury(p *process) {
	p.cmd.Process.Kill()
	<-p.done
}

func (c *crash) killRemote(i int) {
	c.kills["remote runner"]++
	c.bury(c.remotes[i])
	c.log.WriteString(c.remotes[i].both.String())
	c.startRemote(i)
}

// killLocal kills raid's own runner, if one is there just now.
func (c *crash) killLocal(h *crashHouse) {
	pid, fd, err := h.w.openRunner(filepath.Join(h.w.state, "runners", "0"))
	if err != nil {
		c.kills["local runner that was away"]++
		return
	}
	defer unix.Close(fd)
	c.kills["local runner"]++
	unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	if err := awaitEnd(fd, patience); err != nil {
		c.Errorf("runner %d: %v", pid, err)
	}
}

// errOver ends what a person does when the test is over.
var errOver = errors.New("the test is over")

// address returns where some raid listens, once one does. It may be called by any goroutine.
func (c *crash) address() (string, error) {
	for {
		c.mu.Lock()
		var up []string
		for _, h := range c.houses {
			if h.up {
				up = append(up, h.addr)
			}
		}
		moved := c.moved
		c.mu.Unlock()
		if len(up) > 0 {
			return up[rand.IntN(len(up))], nil
		}
		select {
		case <-moved:
		case <-c.Context().Done():
			return "", errOver
		}
	}
}

// dial connects once raid is there. It may be called by any goroutine.
func (c *crash) dial(key ssh.Signer) (*ssh.Client, error) {
	for {
		addr, err := c.address()
		if err != nil {
			return nil, err
		}
		conn, err := ssh.Dial("tcp", addr, &ssh.ClientConfig{User: "rai", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)},
			HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 20 * time.Second})
		if err == nil {
			return conn, nil
		}
	}
}

// later reports whether raid asked to try again later, as it may while no raid leads.
func (c *crash) later(s *said) bool {
	return len(c.houses) > 1 && s.whole && s.status == job.ExitTryLater
}

// A said is what one session brought.
type said struct {
	heard
	status int
	whole  bool // it ended with a status, not with the connection
}

// ask runs a command to its end or the connection's.
func ask(conn *ssh.Client, command string) said { return askTo(conn, command, io.Discard) }

// askTo is ask that also tells what comes on stderr as it comes.
func askTo(conn *ssh.Client, command string, live io.Writer) (s said) {
	session, err := conn.NewSession()
	if err != nil {
		return s
	}
	defer session.Close()
	var out, stderr bytes.Buffer
	session.Stdout, session.Stderr = &out, io.MultiWriter(&stderr, live)
	err = session.Run(command)
	s.out, s.err = out.Bytes(), stderr.Bytes()
	var exit *ssh.ExitError
	switch {
	case err == nil:
		s.whole = true
	case errors.As(err, &exit):
		s.whole, s.status = true, exit.ExitStatus()
	}
	return s
}

// work does this and that until load ends, and then sees every job to its end.
func (p *person) work(load context.Context) {
	var conn *ssh.Client
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	for {
		act := p.choose(load)
		if act == nil || p.c.busy.Err() != nil {
			return
		}
		for conn == nil {
			var err error
			if conn, err = p.c.dial(p.key); err != nil {
				return
			}
		}
		late := context.AfterFunc(p.c.busy, func() { conn.Close() })
		whole := act(conn)
		if late(); !whole { // the connection broke
			p.cuts++
			conn.Close()
			conn = nil
		}
	}
}

// choose says what to do next, nil when all is done.
func (p *person) choose(load context.Context) func(*ssh.Client) bool {
	var open []*crashJob
	for _, j := range p.jobs {
		if j.id != 0 && j.seen == nil {
			open = append(open, j)
		}
	}
	n := p.rnd.IntN(10)
	switch {
	case len(open) > 0 && (len(open) >= crashBusy || load.Err() != nil):
		return func(conn *ssh.Client) bool {
			return p.follow(conn, open[0], fmt.Sprintf("attach %d --json", open[0].id))
		}
	case load.Err() != nil:
		return nil
	case n == 0 && len(open) > 0:
		return func(conn *ssh.Client) bool { return p.cancel(conn, open[p.rnd.IntN(len(open))]) }
	case n < 5:
		j := p.newJob()
		return func(conn *ssh.Client) bool { return p.detach(conn, j) }
	}
	j := p.newJob()
	return func(conn *ssh.Client) bool { return p.follow(conn, j, "submit --json --name "+j.name+" -- "+j.line()) }
}

func (p *person) newJob() *crashJob {
	j := &crashJob{name: fmt.Sprintf("%s-%d", p.name, len(p.jobs)), exit: p.rnd.IntN(2) * (1 + p.rnd.IntN(100))}
	lines := 1 + p.rnd.IntN(10)*p.rnd.IntN(300)
	j.want = heard{[]byte(fmt.Sprintf("^%s %d\n", j.name, lines)), []byte("^" + j.name + "\n")}
	for i := range 3 {
		for n := range lines {
			j.want.out = fmt.Appendf(j.want.out, "%d\n", i*lines+n)
		}
		j.want.err = fmt.Appendf(j.want.err, "%d\n", i)
	}
	p.jobs = append(p.jobs, j)
	return j
}

// line is the job as a shell line. What it prints begins with a ^ and has no other.
func (j *crashJob) line() string {
	first, _, _ := bytes.Cut(j.want.out, []byte("\n"))
	lines := bytes.Count(j.want.out, []byte("\n")) / 3
	return fmt.Sprintf("echo '%s'; echo '^%s' >&2; for i in 0 1 2; do seq $((i*%d)) $((i*%d+%d)); echo $i >&2; sleep 0.0%d; done; echo %s >mine; exit %d",
		first, j.name, lines, lines, lines-1, lines%10, j.name, j.exit)
}

// detach submits and leaves. What comes on stdout is the acknowledgement.
func (p *person) detach(conn *ssh.Client, j *crashJob) bool {
	s := ask(conn, "submit --detach --name "+j.name+" -- "+j.line())
	if line, _, ok := strings.Cut(string(s.out), "\n"); ok {
		id, err := strconv.ParseInt(line, 10, 64)
		if err != nil {
			p.c.Errorf("submit --detach printed %q", s.out)
		}
		j.id = id
	} else if p.c.later(&s) {
		return false
	} else if s.whole {
		p.c.Errorf("submit --detach = %d: %s", s.status, s.err)
	}
	return s.whole
}

func (p *person) cancel(conn *ssh.Client, j *crashJob) bool {
	j.cancel = true // it may count although nobody says so
	s := ask(conn, fmt.Sprintf("cancel %d", j.id))
	if p.c.later(&s) {
		return false
	}
	if s.whole && s.status != 0 {
		p.c.Errorf("cancel %d = %d: %s", j.id, s.status, s.err)
	}
	return s.whole
}

// follow runs a command that shows a job to its end.
func (p *person) follow(conn *ssh.Client, j *crashJob, command string) bool {
	s := ask(conn, command)
	h, id, done, err := events(s.out)
	switch {
	case err != nil:
		p.c.Errorf("%s: %v", command, err)
	case j.id != 0 && id != 0 && id != j.id:
		p.c.Errorf("job %s was %d and is %d", j.name, j.id, id)
	case id != 0:
		j.id = id
	}
	if done == nil && p.c.later(&s) {
		s.whole = false
	}
	if s.whole && done == nil {
		p.c.Errorf("%.60s = %d without done, job %d: %s", command, s.status, id, s.err)
		j.seen, j.status = &h, s.status // and that is that
		return true
	}
	if err := h.partOf(&j.want, 1<<20, false); err != nil {
		p.c.Errorf("job %d (%s), followed live: %v", j.id, j.name, err)
	}
	if s.whole {
		j.seen, j.status, j.finished = &h, s.status, *done
	}
	return s.whole
}

// events reads the lines of --json: what was printed, whose it was, and the job object
// if the job came to its end. The last line may be cut off.
func events(text []byte) (h heard, id int64, done *job.Job, err error) {
	for line := range bytes.Lines(text) {
		if line[len(line)-1] != '\n' {
			break
		}
		var e struct {
			Event, Data string
			Job         int64
			B64         []byte
		}
		if err := json.Unmarshal(line, &e); err != nil {
			return h, id, nil, fmt.Errorf("%w: %s", err, line)
		}
		id = e.Job
		switch e.Event {
		case "out":
			h.out = append(append(h.out, e.Data...), e.B64...)
		case "err":
			h.err = append(append(h.err, e.Data...), e.B64...)
		case "done":
			done = &job.Job{}
			if err := json.Unmarshal(line, done); err != nil {
				return h, id, nil, err
			}
		}
	}
	return h, id, done, nil
}

// partOf checks output of at most so many attempts: each printed what it had to, as
// far as it came, and the last one all of it if it is whole.
func (h *heard) partOf(want *heard, attempts int, whole bool) error {
	for _, s := range []struct {
		name      string
		got, want []byte
	}{{"stdout", h.out, want.out}, {"stderr", h.err, want.err}} {
		parts := strings.SplitAfter(strings.ReplaceAll(string(s.got), "^", "\x00^"), "\x00")
		if parts[0] != "" && parts[0] != "\x00" {
			return fmt.Errorf("%s begins with %.40q", s.name, parts[0])
		}
		parts = parts[1:]
		if len(parts) > attempts || whole && len(parts) == 0 {
			return fmt.Errorf("%s has %d beginnings after %d attempts", s.name, len(parts), attempts)
		}
		for i, part := range parts {
			part = strings.TrimSuffix(part, "\x00")
			if !strings.HasPrefix(string(s.want), part) || whole && i == len(parts)-1 && len(part) != len(s.want) {
				return fmt.Errorf("%s, part %d of %d: %d bytes, %s", s.name, i+1, len(parts), len(part), firstDifference(part, string(s.want)))
			}
		}
	}
	return nil
}

func firstDifference(got, want string) string {
	n := 0
	for n < min(len(got), len(want)) && got[n] == want[n] {
		n++
	}
	return fmt.Sprintf("at byte %d of %d: got %.40q, want %.40q", n, len(want), got[n:], want[n:])
}

// ended is a line of raid's log about a job that has ended.
var jobEnded = regexp.MustCompile(`job=(\d+) .*state=(succeeded|failed|cancelled)`)

// check holds what raid knows against what people were told.
func (c *crash) check() {
	for _, h := range c.houses {
		c.log.WriteString(h.w.raid.both.String())
	}
	results := map[string]int{}
	for _, m := range jobEnded.FindAllSubmatch(c.log.Bytes(), -1) {
		if results[string(m[1])]++; results[string(m[1])] == 2 {
			id, err := strconv.ParseInt(string(m[1]), 10, 64)
			c.must(err)
			c.bad(id, "job %d ended twice", id)
		}
	}
	conn := c.admin()
	defer conn.Close()
	there := map[string]job.Job{}
	for line := range bytes.Lines(c.ask(conn, "history --json -n 10000")) {
		var j job.Job
		c.must(json.Unmarshal(line, &j))
		if old, ok := there[j.Name]; ok {
			c.bad(j.ID, "job %s is there twice: %d and %d", j.Name, old.ID, j.ID)
		}
		there[j.Name] = j
	}
	for _, p := range c.people {
		for _, j := range p.jobs {
			got, ok := there[j.name]
			delete(there, j.name)
			if ok {
				c.checkJob(conn, p, j, &got)
			} else if j.id != 0 {
				c.bad(j.id, "job %d (%s) was acknowledged and is not there", j.id, j.name)
			}
		}
	}
	for _, j := range there {
		c.bad(j.ID, "nobody asked for job %d (%s)", j.ID, j.Name)
	}
}

// bad reports an error and what the log says about the job.
func (c *crash) bad(id int64, format string, args ...any) {
	c.Errorf(format, args...)
	word := regexp.MustCompile(fmt.Sprintf(`(?m)^.*\bjob[ =]%d\b.*$`, id))
	for _, line := range word.FindAll(c.log.Bytes(), -1) {
		c.Logf("  %s", line)
	}
}

func (c *crash) admin() *ssh.Client {
	c.Helper()
	conn, err := c.dial(c.adminKey())
	c.must(err)
	return conn
}

func (c *crash) adminKey() ssh.Signer {
	c.Helper()
	key, err := keys.LoadSigner(filepath.Join(c.w.state, "admin"), nil)
	c.must(err)
	return key
}

// ask is for commands that must succeed.
func (c *crash) ask(conn *ssh.Client, command string) []byte {
	c.Helper()
	s := ask(conn, command)
	if !s.whole || s.status != 0 {
		c.Fatalf("%s = %d: %s", command, s.status, s.err)
	}
	return s.out
}

// checkJob checks one job that is there.
func (c *crash) checkJob(conn *ssh.Client, p *person, j *crashJob, got *job.Job) {
	if got.User != p.name || j.id != 0 && got.ID != j.id {
		c.bad(got.ID, "job %s is %d of %s, want %d of %s", j.name, got.ID, got.User, j.id, p.name)
	}
	if why := c.illegal(j, got); why != "" {
		c.bad(got.ID, "job %d (%s) is %s, %s, attempt %d: %s", got.ID, j.name, got.State, got.Reason, got.Attempt, why)
	}
	if !got.State.Final() {
		return
	}
	s := ask(conn, fmt.Sprintf("attach %d --json", got.ID))
	replay, _, done, err := events(s.out)
	if err != nil || done == nil || got.Exit == nil || s.status != *got.Exit {
		c.bad(got.ID, "attach %d = %d, %v: %s", got.ID, s.status, err, s.err)
		return
	}
	own := got.Reason == job.ReasonExit
	if err := replay.partOf(&j.want, got.Attempt, own); err != nil {
		c.bad(got.ID, "job %d (%s), replayed: %v", got.ID, j.name, err)
	}
	if logs := c.ask(conn, fmt.Sprintf("logs %d", got.ID)); !bytes.Equal(logs, replay.out) {
		c.bad(got.ID, "logs and attach of job %d differ: %s", got.ID, firstDifference(string(logs), string(replay.out)))
	}
	if j.seen != nil {
		c.checkSeen(j, got, &replay)
	}
	if own {
		c.checkArchive(conn, j, got)
	}
}

// illegal says why a job may not have ended as it did, "" if it may.
func (c *crash) illegal(j *crashJob, got *job.Job) string {
	switch {
	case !got.State.Final() || got.Exit == nil:
		return "it has not ended"
	case got.Attempt < 0 || got.Attempt > 3 || got.Attempt == 0 && got.State != job.Cancelled:
		return "there are one to three attempts"
	case got.State == job.Cancelled:
		if !j.cancel {
			return "nobody cancelled it"
		}
	case got.Reason == job.ReasonInfra:
		if got.Attempt != 3 {
			return "it may be tried again"
		}
	case got.Reason != job.ReasonExit || *got.Exit != j.exit || (got.State == job.Succeeded) != (j.exit == 0):
		return fmt.Sprintf("exit status %d, want %d", *got.Exit, j.exit)
	}
	return ""
}

// checkSeen checks what a person saw live against what is there now.
func (c *crash) checkSeen(j *crashJob, got *job.Job, replay *heard) {
	whole := bytes.Equal(j.seen.out, replay.out) && bytes.Equal(j.seen.err, replay.err)
	if len(c.houses) > 1 { // what a lost attempt printed was with a raid that died
		whole = bytes.HasSuffix(j.seen.out, replay.out) && bytes.HasSuffix(j.seen.err, replay.err)
	}
	if !whole {
		c.bad(got.ID, "job %d (%s): live and replayed differ: %s; %s", got.ID, j.name,
			firstDifference(string(j.seen.out), string(replay.out)), firstDifference(string(j.seen.err), string(replay.err)))
	}
	a, _ := json.Marshal(j.finished)
	if b, _ := json.Marshal(got); !bytes.Equal(a, b) || j.status != *got.Exit {
		c.bad(got.ID, "job %d ended with %d as %s, and is now %s", got.ID, j.status, a, b)
	}
}

// checkArchive looks for the file that the job left in /build.
func (c *crash) checkArchive(conn *ssh.Client, j *crashJob, got *job.Job) {
	s := ask(conn, fmt.Sprintf("output %d mine", got.ID))
	if s.status != 0 || !bytes.Contains(s.out, []byte(j.name+"\n")) {
		c.bad(got.ID, "output %d = %d, %d bytes: %s", got.ID, s.status, len(s.out), s.err)
	}
}

// checkSlots waits until every runner is idle and gives each one job.
func (c *crash) checkSlots() {
	conn := c.admin()
	defer conn.Close()
	ctx, cancel := context.WithTimeout(c.Context(), patience)
	defer cancel()
	slots := crashRemotes + len(c.houses)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for bytes.Count(c.ask(conn, "runners --json"), []byte(`"state":"idle"`)) != slots {
		select {
		case <-tick.C:
		case <-ctx.Done():
			c.Errorf("not all runners are idle:\n%s", c.ask(conn, "runners"))
			return
		}
	}
	if all := c.ask(conn, "runners --json"); bytes.Count(all, []byte("\n")) != slots {
		c.Errorf("there are more runners than were started:\n%s", all)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	var live []*tape
	for range slots {
		t := newTape()
		live = append(live, t)
		wg.Go(func() { // ends with its job
			defer t.end()
			askTo(conn, "submit -- sleep 1000", t)
		})
	}
	var names []string
	for _, t := range live { // none has ended when the last begins
		m, err := t.await(ctx, jobStarted)
		if err != nil {
			c.Errorf("a job for every runner: %v", err)
			conn.Close()
			return
		}
		defer c.ask(conn, "cancel "+m[1])
		names = append(names, m[2])
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != slots {
		c.Errorf("%d jobs at once run on %q, want each runner once", slots, names)
	}
}

var jobStarted = regexp.MustCompile(`(?s)raid: job (\d+) queued.*raid: started on (\S+) after`)

// stop ends everything as staff would and looks for what is left.
func (c *crash) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i, p := range c.remotes {
		p.cmd.Process.Signal(syscall.SIGTERM)
		if err := p.wait(ctx); err != nil || p.status != 0 {
			c.Errorf("runner %s ended with %d: %v\n%s", c.remoteName(i), p.status, err, lastLines(p.both.String(), 12))
		}
	}
	for _, h := range c.houses {
		if err := h.w.stopRaid(ctx); err != nil {
			c.Errorf("stop raid: %v", err)
		}
		if !h.w.stopRunners() {
			h.w.checkGone()
		}
	}
}

// end takes care that a test that failed leaves nothing either.
func (c *crash) end() {
	for _, p := range c.remotes {
		if p != nil {
			p.retire()
			c.bury(p)
		}
	}
	for _, h := range c.houses {
		if h.w.raid != nil {
			h.w.raid.retire()
			c.bury(h.w.raid)
		}
		if c.Failed() {
			h.w.stopRunners()
		}
	}
}

func (c *crash) summary() string {
	jobs, lost, cuts, infra, again := 0, 0, 0, 0, 0
	for _, p := range c.people {
		cuts += p.cuts
		for _, j := range p.jobs {
			jobs++
			switch {
			case j.id == 0:
				lost++
			case j.finished.Reason == job.ReasonInfra:
				infra++
			case j.finished.Attempt > 1:
				again++
			}
		}
	}
	return fmt.Sprintf("%v; %d jobs, of them %d never acknowledged, %d run again, %d given up; %d broken sessions",
		c.kills, jobs, lost, again, infra, cuts)
}
