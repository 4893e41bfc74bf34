package shim

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/job"
)

// An attempt runs the steps of one order. Its goroutines are the streams' readers and
// the timers; steps waits for all of them.
type attempt struct {
	Shim
	order job.BoxOrder
	wire  *wire
	procs *procs

	out, err *stream // of all steps; with a terminal, out is not used
	ttys     []*stream
	null     *os.File
	readers  sync.WaitGroup

	mu       sync.Mutex // protects the following
	reason   job.Reason // why the steps are being ended; "" while they are not
	orders   int        // Stop frames seen
	over     bool       // the last step is over: nothing is left to stop
	grace    *time.Timer
	stopping chan struct{} // closed when reason is set
	killed   chan struct{} // closed once SIGKILL was sent
}

// steps runs the steps and returns how they went, with nothing left running.
func (a *attempt) steps() job.Result {
	if err := a.open(); err != nil {
		return failed(err)
	}
	a.wire.send(job.Begun, nil)
	began := time.Now()
	if limit := a.order.Spec.Limits.Time; limit > 0 {
		defer time.AfterFunc(limit, func() { a.end(job.ReasonTimeout) }).Stop()
	}
	var done []job.Step
	for i, line := range a.order.Spec.Steps {
		st := a.step(i+1, line)
		done = append(done, st)
		if closed(a.stopping) || st.Exit != 0 && !a.order.Spec.KeepGoing {
			break
		}
	}
	reason := a.finish()
	r := verdict(done, reason)
	r.Steps, r.Begun, r.RunMS = done, true, time.Since(began).Milliseconds()
	a.close()
	return r
}

// verdict sums up steps that were ended for reason, or ran to their end if it is "".
// The first that failed counts.
func verdict(steps []job.Step, reason job.Reason) job.Result {
	if reason != "" {
		return ended(reason, "")
	}
	for _, st := range steps {
		if st.Signal != "" {
			return job.Result{Reason: job.ReasonSignal, Exit: st.Exit, Signal: st.Signal}
		}
		if st.Exit != 0 {
			return job.Result{Reason: job.ReasonExit, Exit: st.Exit}
		}
	}
	return job.Result{Reason: job.ReasonExit}
}

// open makes ready all that the steps need, while threads and descriptors are to be had.
func (a *attempt) open() (err error) {
	if a.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return err
	}
	if a.out, err = a.pipe(job.Out); err != nil {
		return err
	}
	a.err, err = a.pipe(job.Err)
	return err
}

// pipe opens a stream through a pipe and starts its reader.
func (a *attempt) pipe(k job.Kind) (*stream, error) {
	s, err := newPipe(k, a.wire)
	if err == nil {
		a.readers.Go(s.run)
	}
	return s, err
}

// finish says that the last step is over, gives what is being ended its grace, and
// returns why it was ended, or "".
func (a *attempt) finish() job.Reason {
	a.mu.Lock()
	a.over = true
	reason := a.reason
	a.mu.Unlock()
	if reason != "" {
		select {
		case <-a.procs.none():
		case <-a.killed:
		}
		a.mu.Lock()
		a.grace.Stop()
		a.mu.Unlock()
	}
	return reason
}

// close kills what the steps left behind and sends the rest of their output. It does
// not wait for the pipes to end: a descriptor that was put into a socket keeps one
// open for longer than any process lives.
func (a *attempt) close() {
	a.procs.killAll()
	for _, s := range append(a.ttys, a.out, a.err) {
		s.drain()
		s.close()
	}
	a.readers.Wait()
	a.null.Close()
}

// stop obeys a Stop frame: the first ends the steps, a second does so at once.
func (a *attempt) stop(r job.Reason) {
	if r == "" {
		r = job.ReasonCancelled
	}
	a.mu.Lock()
	a.orders++
	again := a.orders > 1
	a.mu.Unlock()
	a.end(r)
	if again {
		a.kill()
	}
}

// end ends the steps for r, unless they are over or being ended already: SIGTERM, and
// SIGKILL after the grace. SIGCONT wakes what was stopped and could not obey.
func (a *attempt) end(r job.Reason) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over || a.reason != "" {
		return
	}
	a.reason = r
	close(a.stopping)
	a.procs.signal(syscall.SIGTERM)
	a.procs.signal(syscall.SIGCONT)
	a.grace = time.AfterFunc(a.Grace, a.kill)
}

// kill kills every process of a step that is being ended.
func (a *attempt) kill() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.reason == "" || closed(a.killed) {
		return
	}
	a.procs.signal(syscall.SIGKILL)
	close(a.killed)
}

// why returns why the steps are being ended.
func (a *attempt) why() job.Reason {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reason
}

// step runs the n-th line from its first Mark to its second.
func (a *attempt) step(n int, line string) job.Step {
	st := job.Step{N: n, Of: len(a.order.Spec.Steps), Line: clip(line, maxLine)}
	begin := st
	begin.Begin = true
	a.wire.send(job.Mark, marshal(begin))
	began := time.Now()
	out := a.stdout()
	done, err := a.start(line, out)
	if err != nil {
		st.Exit = 126
		if errors.Is(err, syscall.ENOENT) {
			st.Exit = 127
		}
		a.wire.send(job.Raid, fmt.Appendf(nil, "step %d did not start: %v", n, err))
	} else {
		account(&st, <-done)
	}
	st.WallMS = time.Since(began).Milliseconds()
	out.drain()
	a.err.drain()
	a.wire.send(job.Mark, marshal(st))
	return st
}

// account writes into st how its shell ended and what that used, with the children it
// waited for.
func account(st *job.Step, e exit) {
	st.Exit = e.status.ExitStatus()
	if e.status.Signaled() {
		sig := e.status.Signal()
		st.Exit = 128 + int(sig)
		if st.Signal = unix.SignalName(sig); st.Signal == "" {
			st.Signal = fmt.Sprintf("SIG%d", int(sig)) // a real-time signal has no name
		}
	}
	st.UserMS = time.Duration(e.usage.Utime.Nano()).Milliseconds()
	st.SysMS = time.Duration(e.usage.Stime.Nano()).Milliseconds()
	st.RSSKiB = e.usage.Maxrss
}

// stdout returns where the next step's output goes: the common pipe, or a new terminal.
func (a *attempt) stdout() *stream {
	if !a.order.Spec.TTY {
		return a.out
	}
	s, err := newTTY(a.wire)
	if err != nil {
		a.wire.send(job.Raid, fmt.Appendf(nil, "no terminal for this step: %v", err))
		return a.out
	}
	a.readers.Go(s.run)
	a.ttys = append(a.ttys, s)
	return s
}

// start starts the shell that runs line. When no process number is left, what earlier
// steps left running goes, and it is tried once more.
func (a *attempt) start(line string, out *stream) (<-chan exit, error) {
	env := a.environ(out.tty)
	path := findShell(env)
	argv, script, err := shellArgs(path, line)
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{
		Dir:   a.Build,
		Env:   env,
		Files: []uintptr{a.null.Fd(), out.writer.Fd(), a.err.writer.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: out.tty},
	}
	if out.tty {
		attr.Files[0] = out.writer.Fd()
		defer out.release() // the reader must see when the last process has let go of it
	}
	if script != nil {
		attr.Files = append(attr.Files, script.Fd())
		defer script.Close()
	}
	done, err := a.procs.start(path, argv, attr)
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOMEM) {
		a.wire.send(job.Raid, []byte("no process could be started: ended what earlier steps left running"))
		a.procs.killAll()
		done, err = a.procs.start(path, argv, attr)
	}
	if err != nil {
		return nil, fmt.Errorf("%s in %s: %w", path, a.Build, err)
	}
	if closed(a.stopping) { // its signal may have come before the process
		a.again()
	}
	return done, nil
}

// again signals what was started while the steps were being ended.
func (a *attempt) again() {
	a.mu.Lock()
	defer a.mu.Unlock()
	sig := syscall.SIGTERM
	if closed(a.killed) {
		sig = syscall.SIGKILL
	}
	a.procs.signal(sig)
}

// environ returns the order's environment with what no step should lack.
func (a *attempt) environ(tty bool) []string {
	env := append([]string(nil), a.order.Env...)
	lacks := []string{"HOME=" + a.Home, "TMPDIR=/tmp", "PWD=" + a.Build}
	if tty {
		lacks = append(lacks, "TERM=xterm-256color")
	}
	for _, kv := range lacks {
		name, _, _ := strings.Cut(kv, "=")
		if _, ok := lookup(env, name); !ok {
			env = append(env, kv)
		}
	}
	return env
}

// lookup returns the value of name in env.
func lookup(env []string, name string) (string, bool) {
	for _, kv := range env {
		if k, v, ok := strings.Cut(kv, "="); ok && k == name {
			return v, true
		}
	}
	return "", false
}

// defaultPath is where a shell is looked for when the order has no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// findShell returns bash, or sh where there is no bash. It only looks at absolute
// folders: a program in /build is not a shell because it is called bash.
func findShell(env []string) string {
	path, ok := lookup(env, "PATH")
	if !ok {
		path = defaultPath
	}
	for _, dir := range append([]string{"/bin"}, strings.Split(path, ":")...) {
		file := dir + "/bash"
		if st, err := os.Stat(file); err == nil && dir != "" && dir[0] == '/' && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file
		}
	}
	return "/bin/sh"
}

// maxArg is the most that fits one argument: MAX_ARG_STRLEN of linux/binfmts.h, with
// the NUL.
const maxArg = 128<<10 - 1

// shellArgs returns the arguments that make the shell at path run line. A line that is
// too long for an argument comes as a script, a file without a name that the shell
// gets as descriptor 3.
func shellArgs(path, line string) (argv []string, script *os.File, err error) {
	name := path[strings.LastIndexByte(path, '/')+1:]
	if len(line) <= maxArg {
		return []string{name, "-c", line}, nil, nil
	}
	fd, err := unix.MemfdCreate("step", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("store a long line: %w", err)
	}
	script = os.NewFile(uintptr(fd), "step")
	if _, err := script.WriteString(line + "\n"); err != nil {
		script.Close()
		return nil, nil, fmt.Errorf("store a long line: %w", err)
	}
	return []string{name, "/proc/self/fd/3"}, script, nil
}
