package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker/dockertest"
	"github.com/rai-project/raid/sshd/blob/blobtest"
)

// patience is how long a script waits for anything: far longer than even a machine that is
// busy with much else should take.
const patience = 2 * time.Minute

// A world is what one script has around it: a raid, people, and what runs in the
// background. Only the script's own goroutine uses it.
type world struct {
	tb    testing.TB
	dir   string // $WORK
	bin   string // the programs
	state string

	raid    *process // nil while raid is down
	port    string
	args    []string // of the last start, for restart
	uid     int      // whom raid runs as; 0: us
	log     *tape    // of the raid that was started last
	logs    []*tape
	jobs    map[string]*process
	proxies map[string]*proxy
	remotes map[string]bool // those of jobs that are runners; their state is dir/NAME
	redis   *process
	redisAt string      // its port
	two     *deployment // nil: raid is the only one
	s3      *blobtest.Server
	bucket  string
	lab     *dockertest.Lab // nil without a Docker engine

	registry   *dockertest.Registry
	registryAt string // its address
	boxes      *tape  // a line with its image for each box that is started; nil while nobody asked
	unwatch    func()
}

func newWorld(tb testing.TB, dir, bin string) *world {
	return &world{tb: tb, dir: dir, bin: bin, state: filepath.Join(dir, "state"),
		jobs: map[string]*process{}, proxies: map[string]*proxy{}, remotes: map[string]bool{}}
}

func (w *world) sshConfig() string { return filepath.Join(w.dir, "ssh_config") }

// A tape is what a process says. Whoever waits for a line is woken when it comes.
type tape struct {
	mu   sync.Mutex // protects the following
	text []byte
	more chan struct{} // closed when there is more, or at the end
	over bool
}

func newTape() *tape { return &tape{more: make(chan struct{})} }

func (t *tape) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	close(t.more)
	t.more = make(chan struct{})
	return len(p), nil
}

// end wakes everybody for good.
func (t *tape) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.over {
		t.over = true
		close(t.more)
	}
}

func (t *tape) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}

// await waits until re matches and returns the groups of the match.
func (t *tape) await(ctx context.Context, re *regexp.Regexp) ([]string, error) {
	for {
		t.mu.Lock()
		m, more, over := re.FindSubmatch(t.text), t.more, t.over
		t.mu.Unlock()
		if m != nil {
			var groups []string
			for _, g := range m {
				groups = append(groups, string(g))
			}
			return groups, nil
		}
		if over {
			return nil, fmt.Errorf("it ended without %q; it said:\n%s", re, t)
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, fmt.Errorf("no %q; it said:\n%s", re, t)
		}
	}
}

// A process is a program that was started.
type process struct {
	cmd      *exec.Cmd
	in       io.WriteCloser // a pipe, nil if stdin is a file
	both     *tape          // stdout and stderr as they came
	out, err bytes.Buffer   // to be read after done
	done     chan struct{}
	status   int
}

// start runs argv with a file, a pipe or nothing as its stdin.
func (w *world) start(argv, env []string, stdin string, uid int) (*process, error) {
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), both: newTape(), done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Env = w.dir, env
	p.cmd.Stdout, p.cmd.Stderr = io.MultiWriter(&p.out, p.both), io.MultiWriter(&p.err, p.both)
	p.cmd.WaitDelay = 5 * time.Second // a master of ssh keeps our pipes open
	if uid > 0 {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	switch stdin {
	case "":
	case "-":
		in, err := p.cmd.StdinPipe()
		if err != nil {
			return nil, err
		}
		p.in = in
	default:
		f, err := os.Open(stdin)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		p.cmd.Stdin = f
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // ends with the process, for which end waits
		defer close(p.done)
		p.cmd.Wait()
		p.status = statusOf(p.cmd.ProcessState)
		p.both.end()
	}()
	return p, nil
}

// statusOf is the exit status as a shell says it.
func statusOf(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}

// wait waits for the end; one that does not come is brought about.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("did not end within %v; it said:\n%s", patience, p.both)
	}
}

func (w *world) cmdRaid(ts *testscript.TestScript, args []string) {
	if len(args) == 0 {
		ts.Fatalf("raid: start, stop, kill9, restart or log")
	}
	switch args[0] {
	case "start":
		w.startRaid(ts, args[1:])
	case "stop":
		w.settle("result.json")
		w.within(ts, "raid stop", w.stopRaid)
	case "restart":
		w.settle("result.json")
		w.within(ts, "raid stop", w.stopRaid)
		w.startRaid(ts, w.args)
	case "kill9":
		w.raid.cmd.Process.Kill()
		w.within(ts, "raid kill9", w.raid.wait)
		w.raid = nil
	case "log":
		for _, l := range w.logs {
			io.WriteString(ts.Stdout(), l.String())
		}
	default:
		ts.Fatalf("raid: no %s", args[0])
	}
}

var listening = regexp.MustCompile(`(?m)^raid: listening on 127\.0\.0\.\d+:(\d+)$`)

func (w *world) startRaid(ts *testscript.TestScript, args []string) {
	if w.raid != nil {
		ts.Fatalf("raid is up")
	}
	argv := []string{filepath.Join(w.bin, "raid"), "serve", "--listen", "127.0.0.1:0"}
	w.args, w.uid, w.state = args, 0, filepath.Join(w.dir, "state")
	if w.two != nil {
		argv = append(argv, "--config", w.two.config)
	}
	for len(args) > 1 {
		switch args[0] {
		case "-config":
			argv = append(argv, "--config", ts.MkAbs(args[1]))
		case "-uid":
			uid, err := strconv.Atoi(args[1])
			ts.Check(err)
			w.uid = uid
		case "-state":
			w.state = ts.MkAbs(args[1])
		default:
			ts.Fatalf("raid start: no flag %s", args[0])
		}
		args = args[2:]
	}
	if w.uid > 0 {
		if err := os.Mkdir(w.state, 0o700); err == nil {
			ts.Check(os.Chown(w.state, w.uid, w.uid))
		}
	}
	p, err := w.start(append(argv, "--state", w.state), w.env(ts), "", w.uid)
	ts.Check(err)
	w.raid, w.log = p, p.both
	w.logs = append(w.logs, p.both)
	w.within(ts, "raid start", func(ctx context.Context) error {
		m, err := w.log.await(ctx, listening)
		if err == nil {
			w.port = m[1]
		}
		if err == nil && w.two != nil {
			w.port, err = w.openDoor(ctx)
		}
		return err
	})
	ts.Setenv("PORT", w.port)
	for _, p := range w.proxies {
		p.to.Store(w.port)
	}
	host, err := os.ReadFile(filepath.Join(w.state, "host_key.pub"))
	ts.Check(err)
	ts.Check(os.WriteFile(filepath.Join(w.dir, "known_hosts"), append([]byte("raid "), host...), 0o644))
}

// env is the script's own environment.
func (w *world) env(ts *testscript.TestScript) []string {
	var env []string
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "WORK", "SSH_CONFIG", "PORT", "RAI_PROFILE", "GIT_SSH_COMMAND",
		"GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "RAID_SSH", "RAID_HOST", "DOCKER_HOST"} {
		if v := ts.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

func (w *world) stopRaid(ctx context.Context) error {
	if w.raid == nil {
		return errors.New("raid is down")
	}
	p := w.raid
	w.raid = nil
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := p.wait(ctx); err != nil {
		return err
	}
	if p.status != 0 {
		return fmt.Errorf("raid ended with status %d", p.status)
	}
	return nil
}

func (w *world) cmdEnrol(ts *testscript.TestScript, args []string) {
	if len(args) < 1 || len(args) > 3 {
		ts.Fatalf("usage: enrol NAME [TEAM [ROLE]]")
	}
	name, team, role := args[0], "-", "student"
	if len(args) > 1 {
		team = args[1]
	}
	if len(args) > 2 {
		role = args[2]
	}
	w.run(ts, 0, []string{"rai-keygen", "--server", "rai@127.0.0.1:" + w.port, "-i", filepath.Join(w.state, "admin"),
		"-u", name, "-e", name + "@example.edu", "-r", role, "-t", team, "--out", filepath.Join(w.dir, "keys")}, "", "")
}

func (w *world) cmdKey(ts *testscript.TestScript, args []string) {
	w.run(ts, 0, []string{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", args[0], "-f", filepath.Join(w.dir, "keys", args[0])}, "", "")
}

func (w *world) cmdAs(ts *testscript.TestScript, args []string) {
	rest, stdin, name := words(ts, args)
	w.run(ts, 0, w.ssh(ts, rest), stdin, name)
}

// ssh makes the command line of `as`. Flags of ssh's own end with "--".
func (w *world) ssh(ts *testscript.TestScript, args []string) []string {
	who, rest := args[0], args[1:]
	key := filepath.Join(w.dir, "keys", who)
	if who == "admin" {
		key = filepath.Join(w.state, "admin")
	}
	port := w.port
	if p := w.proxies[who]; p != nil {
		port = p.port
	}
	argv := []string{"ssh", "-F", w.sshConfig(), "-i", key, "-p", port}
	if len(rest) > 0 && strings.HasPrefix(rest[0], "-") {
		i := slices.Index(rest, "--")
		if i < 0 {
			ts.Fatalf("as: ssh's flags end with --")
		}
		argv, rest = append(argv, rest[:i]...), rest[i+1:]
	}
	return append(append(argv, "raid"), rest...)
}

// cmdStatus runs a verb or a program that has to end with a status.
func (w *world) cmdStatus(ts *testscript.TestScript, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: status N COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	rest, stdin, name := words(ts, args[1:])
	if rest[0] == "as" {
		rest = w.ssh(ts, rest[1:])
	}
	w.run(ts, want, rest, stdin, name)
}

// run runs a command and waits for it, or puts it into the background.
func (w *world) run(ts *testscript.TestScript, want int, argv []string, stdin, name string) {
	if stdin != "" && stdin != "-" {
		stdin = ts.MkAbs(stdin)
	}
	if !strings.Contains(argv[0], "/") { // our programs are on the script's PATH, not on ours
		if _, err := os.Stat(filepath.Join(w.bin, argv[0])); err == nil {
			argv = append([]string{filepath.Join(w.bin, argv[0])}, argv[1:]...)
		}
	}
	p, err := w.start(argv, w.env(ts), stdin, 0)
	ts.Check(err)
	if name != "" {
		if w.jobs[name] != nil {
			ts.Fatalf("&%s& is there already", name)
		}
		w.jobs[name] = p
		return
	}
	w.result(ts, p, want)
}

// result waits for a process and makes its output what stdout and stderr look at.
func (w *world) result(ts *testscript.TestScript, p *process, want int) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := p.wait(ctx)
	ts.Stdout().Write(p.out.Bytes())
	ts.Stderr().Write(p.err.Bytes())
	ts.Check(err)
	if p.status != want {
		ts.Fatalf("exit status %d, want %d", p.status, want)
	}
}

func (w *world) background(ts *testscript.TestScript, name string) *process {
	p := w.jobs[name]
	if p == nil {
		ts.Fatalf("no &%s&", name)
	}
	return p
}

func (w *world) cmdUntil(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: until NAME|log REGEXP")
	}
	re, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	t := w.log
	switch args[0] {
	case "log":
	case "boxes":
		t = w.boxes
	default:
		t = w.background(ts, args[0]).both
	}
	w.within(ts, "until", func(ctx context.Context) error {
		_, err := t.await(ctx, re)
		return err
	})
}

func (w *world) cmdFinish(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: finish NAME STATUS")
	}
	want, err := strconv.Atoi(args[1])
	ts.Check(err)
	p := w.background(ts, args[0])
	delete(w.jobs, args[0])
	w.result(ts, p, want)
}

func (w *world) cmdSignal(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: signal SIG NAME")
	}
	s := unix.SignalNum("SIG" + args[0])
	if s == 0 {
		ts.Fatalf("no signal %s", args[0])
	}
	p := w.raid
	if args[1] != "raid" {
		p = w.background(ts, args[1])
	}
	ts.Check(p.cmd.Process.Signal(s))
}

func (w *world) cmdType(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: type NAME TEXT")
	}
	text, err := strconv.Unquote(`"` + args[1] + `"`)
	ts.Check(err)
	_, err = io.WriteString(w.background(ts, args[0]).in, text)
	ts.Check(err)
}

func (w *world) cmdEOF(ts *testscript.TestScript, args []string) {
	ts.Check(w.background(ts, args[0]).in.Close())
}

func (w *world) cmdRunner(ts *testscript.TestScript, args []string) {
	if len(args) != 2 && (len(args) != 4 || args[0] != "start" || args[2] != "-config") {
		ts.Fatalf("usage: runner kill9 N, runner start NAME [-config FILE]")
	}
	switch args[0] {
	case "start":
		w.startRunner(ts, args[1], args[2:])
	case "kill9":
		pid, fd, err := w.openRunner(filepath.Join(w.state, "runners", args[1]))
		ts.Check(err)
		defer unix.Close(fd)
		ts.Check(syscall.Kill(pid, syscall.SIGKILL))
		ts.Check(awaitEnd(fd, patience))
	default:
		ts.Fatalf("runner: no %s", args[0])
	}
}

// startRunner starts a runner as another machine would, with more flags or none, and waits
// until it is ready.
func (w *world) startRunner(ts *testscript.TestScript, name string, flags []string) {
	key := filepath.Join(w.dir, "keys", "runner-"+name)
	if _, err := os.Stat(key); err != nil {
		w.run(ts, 0, []string{"rai-keygen", "--server", "rai@127.0.0.1:" + w.port, "-i", filepath.Join(w.state, "admin"),
			"--out", filepath.Dir(key), "runner", name}, "", "")
	}
	port := w.port
	if p := w.proxies[name]; p != nil {
		port = p.port
	}
	host, err := os.ReadFile(filepath.Join(w.state, "host_key.pub"))
	ts.Check(err)
	ts.Check(os.WriteFile(key+".known", append([]byte("[127.0.0.1]:"+port+" "), host...), 0o644))
	argv := []string{"raid", "runner", "--server", "rai@127.0.0.1:" + port, "-i", key, "--known-hosts", key + ".known",
		"--state", filepath.Join(w.dir, name), "--name", name}
	if len(flags) > 0 {
		argv = append(argv, "--config", flags[1])
	}
	w.run(ts, 0, argv, "", name)
	w.remotes[name] = true
	w.cmdUntil(ts, []string{name, "ready"})
}

// openRunner returns the process that runs in a slot.
func (w *world) openRunner(slot string) (pid, fd int, err error) {
	b, err := os.ReadFile(filepath.Join(slot, "lock"))
	if err != nil {
		return 0, -1, err
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return 0, -1, err
	}
	fd, err = unix.PidfdOpen(pid, 0)
	if err != nil {
		return pid, -1, err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err == nil && !bytes.Contains(line, []byte(slot)) { // an old number, somebody else's by now
		err = os.ErrProcessDone
	}
	if err != nil {
		unix.Close(fd)
		return pid, -1, err
	}
	return pid, fd, nil
}

// awaitEnd waits for the end of a process that is not our child.
func awaitEnd(fd int, d time.Duration) error {
	return awaitReady(fd, d, "the process did not end")
}

// awaitReady waits until fd can be read.
func awaitReady(fd int, d time.Duration, otherwise string) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(d.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("%s within %v", otherwise, d)
		}
		return nil
	}
}

// settle waits until the local runners have told raid how their attempts ended, and know
// that it has heard: raid may have been away, and somebody who follows a job is told of its
// end a moment before its runner is. Of an attempt that still runs there is no "result.json"
// yet; with "." it is waited for, too.
func (w *world) settle(what string) {
	dirs, _ := filepath.Glob(filepath.Join(w.state, "runners", "*", "attempts"))
	if w.raid == nil || w.tb.Failed() || len(dirs) == 0 {
		return
	}
	in, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		w.tb.Errorf("inotify: %v", err)
		return
	}
	defer unix.Close(in)
	for _, dir := range dirs {
		if _, err := unix.InotifyAddWatch(in, dir, unix.IN_DELETE|unix.IN_MOVED_FROM); err != nil {
			w.tb.Errorf("watch %s: %v", dir, err)
		}
	}
	events := make([]byte, 4096)
	for {
		left, _ := filepath.Glob(filepath.Join(w.state, "runners", "*", "attempts", "*", what))
		if len(left) == 0 {
			return
		}
		if err := awaitReady(in, 20*time.Second, "nothing changed"); err != nil {
			w.tb.Errorf("runners hold %q: %v", left, err)
			return
		}
		unix.Read(in, events)
	}
}

// end stops everything the script started and looks for what is left of it.
func (w *world) end() {
	for name, p := range w.jobs {
		if w.remotes[name] {
			p.retire()
		}
		p.cmd.Process.Kill()
		<-p.done
		w.tb.Logf("&%s& was left in the background; it said:\n%s", name, p.both)
	}
	for _, p := range w.proxies {
		p.close()
	}
	if w.redis != nil {
		w.redis.cmd.Process.Kill()
		<-w.redis.done
	}
	if w.boxes != nil {
		w.unwatch()
	}
	if w.s3 != nil {
		w.s3.Work() // or the end of raid would have to wait for it
	}
	if w.registry != nil {
		w.registry.Stop()
	}
	w.settle(".")
	w.closeDoor()
	if w.raid != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		defer cancel()
		if err := w.stopRaid(ctx); err != nil {
			w.tb.Errorf("stop raid: %v", err)
		}
	}
	if w.s3 != nil {
		if err := w.s3.Close(); err != nil {
			w.tb.Errorf("stop the S3 server: %v", err)
		}
	}
	if len(w.logs) > 0 && !w.stopRunners() && !w.tb.Failed() {
		w.checkGone()
	}
	if w.registryAt != "" {
		if err := w.lab.ForgetAll(context.Background(), w.registryAt); err != nil {
			w.tb.Errorf("forget the registry's images: %v", err)
		}
	}
	if w.tb.Failed() {
		w.showLogs()
	}
}

// retire asks a runner to go, twice, so that it takes its boxes with it.
func (p *process) retire() {
	for range 2 {
		p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
		}
	}
}

func (w *world) showLogs() {
	for i, l := range w.logs {
		w.tb.Logf("raid's log, start %d:\n%s", i+1, lastLines(l.String(), 100))
	}
	logs, _ := filepath.Glob(filepath.Join(w.dir, "*", "runners", "*", "log"))
	for _, path := range logs {
		if b, err := os.ReadFile(path); err == nil {
			w.tb.Logf("%s:\n%s", path, lastLines(string(b), 100))
		}
	}
}

func lastLines(s string, n int) string {
	lines := strings.SplitAfter(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// stopRunners waits for the runners that raid has told to go, which an idle one does within
// moments, or seconds where the disk is busy. One that does not is ended, and is the script's
// fault: it ends when its jobs have. any reports whether there was one.
func (w *world) stopRunners() (any bool) {
	slots, _ := filepath.Glob(filepath.Join(w.state, "runners", "*"))
	for _, slot := range slots {
		pid, fd, err := w.openRunner(slot)
		if err != nil {
			continue
		}
		if err := awaitEnd(fd, patience); err != nil {
			any = true
			w.tb.Errorf("runner %s (process %d) outlived raid: %v", filepath.Base(slot), pid, err)
			syscall.Kill(pid, goNow)
			if err := awaitEnd(fd, 15*time.Second); err != nil {
				w.tb.Error(err)
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		unix.Close(fd)
	}
	return any
}

// checkGone holds every script to the same end: no process, mount, cgroup, loop device
// or half-written file of this raid is left.
func (w *world) checkGone() {
	marks := []string{w.state}
	ids, _ := filepath.Glob(filepath.Join(w.state, "runners", "*", "id"))
	for name := range w.remotes {
		marks = append(marks, filepath.Join(w.dir, name))
		ids = append(ids, filepath.Join(w.dir, name, "id"))
	}
	for _, path := range ids {
		if id, err := os.ReadFile(path); err == nil {
			marks = append(marks, strings.TrimSpace(string(id)))
		}
	}
	for _, what := range boxtest.Traces(marks...) {
		w.tb.Errorf("left behind: %s", what)
	}
	for _, id := range marks[1:] {
		w.checkContainers(id)
	}
	for _, pattern := range []string{"incoming/*", "blobs/tmp/*", "runners/*/attempts/*", ".rai-*", "runners/*/.rai-*", "spool/*tmp*"} {
		files, _ := filepath.Glob(filepath.Join(w.state, pattern))
		for _, f := range files {
			w.tb.Errorf("left in the state folder: %s", f)
		}
	}
	for name := range w.remotes {
		files, _ := filepath.Glob(filepath.Join(w.dir, name, "attempts", "*"))
		for _, f := range files {
			w.tb.Errorf("left in a runner's folder: %s", f)
		}
	}
}

// checkContainers asks the engine, if there is one, for boxes of a runner.
func (w *world) checkContainers(id string) {
	if w.lab == nil {
		return
	}
	if left, err := w.lab.Containers(context.Background(), "raid.runner="+id); err != nil || len(left) > 0 {
		w.tb.Errorf("left behind: containers %q, %v", left, err)
	}
}
