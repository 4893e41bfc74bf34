package bwrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/job"
)

// A sandbox is one box.
//
// Its processes are bwrap, which waits, and below it the shim, the init of a PID
// namespace: when that dies the kernel kills all others. One goroutine owns them, on
// a thread of its own, because the parent death signal comes when the thread that
// forked ends, not the process.
type sandbox struct {
	name  string
	e     *Engine
	disk  *machine.Disk
	group *group

	stdin, stdout *os.File
	stderr        machine.Tail

	cmd  *exec.Cmd
	ok   bool // bwrap exited with 0; set before done is closed
	exit box.Exit
	done chan struct{} // closed when every process is gone and exit is set

	mu   sync.Mutex
	init int // pidfd of the shim, -1 for none

	closing  sync.Once
	closeErr error
}

// How bwrap finds the descriptors it is given besides 0, 1 and 2.
const (
	fdSeccomp = 3 + iota
	fdInfo
	fdGate
)

// start starts a box that runs argv.
func (e *Engine) start(ctx context.Context, c box.Config, argv []string) (_ *sandbox, err error) {
	if err := e.names.Open(c.ID); err != nil {
		return nil, err
	}
	b := &sandbox{name: c.ID, e: e, init: -1, done: make(chan struct{})}
	started := false
	defer func() {
		if err != nil {
			if !started {
				close(b.done)
			}
			closeErr := b.Close()
			switch {
			case ctx.Err() != nil: // whatever it did to what was under way
				err = context.Cause(ctx)
			case b.exit.Detail != "":
				err = fmt.Errorf("%w: %s", err, explain(b.exit.Detail))
			}
			err = errors.Join(err, closeErr)
		}
	}()
	if b.disk, err = e.disks.New(ctx, c.ID, c.Limits.Disk); err != nil {
		return nil, fmt.Errorf("make its disk: %w", err)
	}
	for _, m := range c.Mounts {
		if m.Write && e.uid >= 0 {
			if err := os.Chown(m.Host, e.uid, e.uid); err != nil {
				return nil, fmt.Errorf("give it %s: %w", m.Box, err)
			}
		}
	}
	if b.group, err = e.forest.make(c.ID, c.Limits); err != nil {
		return nil, fmt.Errorf("make its cgroup: %w", err)
	}
	args, err := e.args(ctx, c, b.disk, argv)
	if err != nil {
		return nil, err
	}
	w, err := b.wire(args)
	defer w.close()
	if err != nil {
		return nil, err
	}
	forked, ready := make(chan error), make(chan struct{})
	go b.own(forked, ready, w)
	defer close(ready)
	started = true
	if err := <-forked; err != nil {
		return nil, err
	}
	if err := b.handshake(ctx, w); err != nil {
		return nil, err
	}
	return b, context.Cause(ctx) // which handshake may not have heard of in time
}

// wires are descriptors that live only while a box starts.
type wires struct {
	theirs []*os.File // bwrap's ends
	info   *os.File   // bwrap writes the shim's process id here
	gate   *os.File   // see handshake
	stderr *os.File   // our end; own closes it
}

func (w *wires) close() {
	for _, f := range append(w.theirs, w.info, w.gate) {
		if f != nil {
			f.Close()
		}
	}
}

// wire makes the pipes and the command. What it made before an error is in w.
func (b *sandbox) wire(args []string) (w *wires, err error) {
	w = &wires{}
	pipe := func() (r, wr *os.File) {
		if err == nil {
			r, wr, err = os.Pipe()
		}
		return r, wr
	}
	var in, out, stderr, info *os.File
	in, b.stdin = pipe()
	b.stdout, out = pipe()
	w.stderr, stderr = pipe()
	w.info, info = pipe()
	w.theirs = []*os.File{in, out, stderr, info}
	if err != nil {
		return w, err
	}
	for _, f := range []*os.File{b.stdin, b.stdout} { // fewer wake-ups for a loud job
		if c, err := f.SyscallConn(); err == nil {
			c.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 1<<20) })
		}
	}
	filter, err := os.Open(b.e.filter())
	if err != nil {
		return w, err
	}
	w.theirs = append(w.theirs, filter)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return w, err
	}
	unix.SetNonblock(pair[1], false)
	w.gate = os.NewFile(uintptr(pair[0]), "gate")
	gate := os.NewFile(uintptr(pair[1]), "gate")
	w.theirs = append(w.theirs, gate)
	b.cmd = exec.Command(b.e.bwrap, args...)
	b.cmd.Env = []string{}
	b.cmd.Dir = "/"
	b.cmd.Stdin, b.cmd.Stdout, b.cmd.Stderr = in, out, stderr
	b.cmd.ExtraFiles = []*os.File{filter, info, gate}
	b.cmd.SysProcAttr = b.e.attr()
	return w, nil
}

// own forks bwrap and waits until nothing of the box runs any more. It keeps its
// thread for that long.
func (b *sandbox) own(forked chan<- error, ready <-chan struct{}, w *wires) {
	defer close(b.done)
	runtime.LockOSThread()
	stray, err := b.group.start(b.cmd)
	if !stray {
		defer runtime.UnlockOSThread()
	}
	if err != nil && b.cmd.Process != nil {
		b.cmd.Process.Kill()
		b.cmd.Wait()
	}
	if err != nil {
		w.stderr.Close()
		forked <- err
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	var helpers sync.WaitGroup
	helpers.Go(func() { io.Copy(&b.stderr, w.stderr); w.stderr.Close() })
	helpers.Go(func() { b.disk.Watch(ctx, b.Kill) })
	forked <- nil
	b.ok = b.cmd.Wait() == nil
	<-ready // the handshake may still be setting init
	b.finish()
	cancel()
	helpers.Wait()
	b.exit = box.Exit{OOMKills: b.group.ooms(), DiskFull: b.disk.Full(), Detail: b.stderr.String()}
}

// finish waits for what outlives bwrap: it may have been killed first.
func (b *sandbox) finish() {
	b.kill()
	if b.init >= 0 {
		// The init of a PID namespace ends after all others in it.
		p := []unix.PollFd{{Fd: int32(b.init), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(p, -1); err != unix.EINTR {
				break
			}
		}
	}
	for {
		err := b.group.drain()
		if err == nil {
			return
		}
		b.e.cfg.Logf("box %s: %v", b.name, err)
	}
}

// handshake waits until bwrap has set up the box.
//
// bwrap is told to copy a file into the box from one end of a socket pair, after all
// mounts and before it runs the shim. It reads until we end our side: so the box is
// held until we know the shim's process id and have set what is set from outside.
// Then it closes its end, which we read as the end of file: so we know that it holds
// its mounts, and let go of ours.
func (b *sandbox) handshake(ctx context.Context, w *wires) error {
	for _, f := range w.theirs {
		f.Close()
	}
	// Not even ctx cuts this short: killed before, bwrap would leave a child that waits
	// for it for ever and that nobody knows. It writes before its first mount, or ends.
	var info struct {
		Child int `json:"child-pid"`
	}
	if err := json.NewDecoder(w.info).Decode(&info); err != nil {
		return failed(err)
	}
	if err := b.adopt(info.Child); err != nil {
		return failed(err)
	}
	defer context.AfterFunc(ctx, func() { w.gate.SetReadDeadline(time.Unix(1, 0)) })()
	c, err := w.gate.SyscallConn()
	if err != nil {
		return err
	}
	if err := c.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_WR) }); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, w.gate); err != nil {
		return failed(err)
	}
	return b.disk.LetGo()
}

// failed is for what bwrap did; start adds its words.
func failed(err error) error { return fmt.Errorf("bwrap failed: %w", err) }

// boxOOM is the oom_score_adj of a box. When the whole machine runs out of memory a
// box goes before the host's services, and a step (1000) before its shim. As root
// with CAP_SYS_RESOURCE this is also the lowest value a job can give itself.
const boxOOM = 500

// adopt takes hold of the shim, which waits at the gate.
func (b *sandbox) adopt(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd of the shim: %w", err) // Linux 5.3
	}
	b.mu.Lock()
	b.init = fd
	b.mu.Unlock()
	for _, p := range []int{b.cmd.Process.Pid, pid} {
		os.WriteFile("/proc/"+strconv.Itoa(p)+"/oom_score_adj", []byte(strconv.Itoa(boxOOM)), 0)
	}
	// No core files: best effort, it takes CAP_SYS_RESOURCE. The shim forbids them too.
	unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
	return nil
}

// Stdin implements [box.Box].
func (b *sandbox) Stdin() io.WriteCloser { return b.stdin }

// Stdout implements [box.Box].
func (b *sandbox) Stdout() io.Reader { return b.stdout }

// Limit implements [box.Box]. The disk cannot grow beyond what it was made with.
func (b *sandbox) Limit(l job.Limits) error {
	if err := errors.Join(b.disk.Shrink(l.Disk), b.group.limit(l)); err != nil {
		return fmt.Errorf("box %s: %w", b.name, err)
	}
	return nil
}

// Kill implements [box.Box].
func (b *sandbox) Kill() {
	select {
	case <-b.done:
	default:
		b.kill()
	}
}

func (b *sandbox) kill() {
	b.mu.Lock()
	if b.init >= 0 {
		unix.PidfdSendSignal(b.init, unix.SIGKILL, nil, 0)
	}
	b.mu.Unlock()
	b.cmd.Process.Kill()
	b.group.kill()
}

// Wait implements [box.Box].
func (b *sandbox) Wait() box.Exit {
	<-b.done
	return b.exit
}

// Close implements [box.Box].
func (b *sandbox) Close() error {
	b.closing.Do(func() {
		if err := b.release(); err != nil {
			b.closeErr = fmt.Errorf("close box %s: %w", b.name, err)
		}
	})
	return b.closeErr
}

func (b *sandbox) release() error {
	b.Kill()
	b.Wait()
	var errs []error
	for _, f := range []*os.File{b.stdin, b.stdout} {
		if f != nil {
			f.Close() // the runner may have closed it
		}
	}
	b.mu.Lock()
	if b.init >= 0 {
		unix.Close(b.init)
		b.init = -1
	}
	b.mu.Unlock()
	if b.group != nil {
		errs = append(errs, b.group.remove())
	}
	if b.disk != nil {
		errs = append(errs, b.disk.Remove())
	}
	b.e.names.Close(b.name)
	return errors.Join(errs...)
}
