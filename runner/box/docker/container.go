package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/pkg/stdcopy"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/job"
)

// A crate is one box: a container, its disk, and the connection to its shim.
//
// Two goroutines own it from start to Close: pump reads the connection to its end,
// whatever happens, and own waits for the container's.
type crate struct {
	name  string
	e     *Engine
	rules *box.Rules
	id    string // of the container, "" before there is one
	image *image
	disk  *machine.Disk // nil where the root holds everything
	init  *process      // the shim as this machine sees it, nil where it does not

	conn    types.HijackedResponse
	stdin   input
	stdout  *io.PipeReader
	out     *io.PipeWriter
	stderr  machine.Tail
	drained chan struct{} // closed when the connection was read to its end
	helpers sync.WaitGroup

	rootLimit atomic.Int64 // bytes the root may hold
	rootFull  atomic.Bool  // it held more

	exit  box.Exit
	stuck chan struct{} // closed when a kill had no effect
	done  chan struct{} // closed when every process is gone, or stuck, and exit is set

	limiting sync.Mutex // held by Limit
	limits   job.Limits

	mu      sync.Mutex     // protects the following
	ending  bool           // Close has begun
	killing bool           // a call to kill is on its way
	calls   sync.WaitGroup // those calls

	unstick  sync.Once
	closing  sync.Once
	closeErr error
}

// input is the shim's standard input. Closing it ends the box.
type input struct{ conn *types.HijackedResponse }

func (i input) Write(p []byte) (int, error) { return i.conn.Conn.Write(p) }
func (i input) Close() error                { return i.conn.CloseWrite() }

// start makes a box and starts it. The calls that make something run to their end even
// when ctx ends, for only then is it known what there is to remove.
func (e *Engine) start(ctx context.Context, c box.Config) (_ *crate, err error) {
	c.Rules = cmp.Or(c.Rules, &e.rules)
	if err := e.Check(c.Rules); err != nil {
		return nil, err
	}
	if err := e.names.Open(c.ID); err != nil {
		return nil, err
	}
	b := &crate{name: c.ID, e: e, rules: c.Rules, limits: c.Limits, drained: make(chan struct{}), stuck: make(chan struct{}), done: make(chan struct{})}
	b.rootLimit.Store(c.Limits.Disk)
	started := false
	defer func() {
		if err == nil {
			return
		}
		if !started {
			close(b.done)
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		err = errors.Join(err, b.Close())
	}()
	if mine, ok := c.Built.(*built); ok {
		b.image = mine.image
	} else if b.image, err = e.images.get(ctx, c); err != nil {
		return nil, err
	}
	if e.disks != nil {
		if b.disk, err = e.disks.NewFor(ctx, c.ID, c.Limits.Disk, e.onHost(c.Rules)); err != nil {
			return nil, fmt.Errorf("make its disk: %w", err)
		}
	}
	if err := b.create(ctx, c); err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	if err := b.attach(); err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	go b.pump()
	waiting, stop := context.WithCancel(context.Background()) // own ends it
	ended, lost := e.api.ContainerWait(waiting, b.id, container.WaitConditionNextExit)
	if err := b.run(ctx); err != nil {
		forget(stop, ended, lost)
		return nil, err
	}
	started = true
	b.helpers.Go(func() { b.own(stop, ended, lost) })
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	if b.disk != nil {
		return b, b.disk.LetGo()
	}
	return b, nil
}

func (b *crate) create(ctx context.Context, c box.Config) error {
	host, err := b.e.hostConfig(c, b.image, b.disk)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeout(context.Background(), slow)
	defer cancel()
	b.id = b.e.containerName(b.name) // until its id is known: an answer may get lost
	made, err := b.e.api.ContainerCreate(ctx, b.e.config(c, b.image), host, nil, nil, b.id)
	if err == nil {
		b.id = made.ID
	}
	return err
}

// attach connects to the shim's three streams before it runs.
func (b *crate) attach() error {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	conn, err := b.e.hijack.ContainerAttach(ctx, b.id, container.AttachOptions{Stream: true, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	if err := conn.Conn.SetDeadline(time.Time{}); err != nil {
		return errors.Join(err, conn.Conn.Close())
	}
	b.conn = conn
	b.stdin = input{&b.conn}
	b.stdout, b.out = io.Pipe()
	return nil
}

// run starts the container and takes hold of its first process.
func (b *crate) run(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	bounded, cancel := context.WithTimeout(context.Background(), slow)
	defer cancel()
	if err := b.e.api.ContainerStart(bounded, b.id, container.StartOptions{}); err != nil {
		return explain(err)
	}
	info, err := b.e.api.ContainerInspect(bounded, b.id)
	if err != nil {
		return err
	}
	b.init = findProcess(info.State.Pid, info.ID)
	b.init.limitSockets(b.limits.Memory)
	if b.limits.Disk > 0 && !b.rules.Strict { // a strict one is read-only
		b.watchRoot(info.GraphDriver.Data["UpperDir"])
	}
	return nil
}

// explain adds what staff can do to what an engine says.
func explain(err error) error {
	for _, h := range explanations {
		if contains(err, h.says) {
			return fmt.Errorf("%w (%s)", err, h.means)
		}
	}
	return err
}

// pump reads all the shim and the engine say, to the end: what nobody takes off Stdout
// waits there, and is dropped once the box is killed.
func (b *crate) pump() {
	defer close(b.drained)
	_, err := stdcopy.StdCopy(b.out, &b.stderr, b.conn.Reader)
	if err != nil {
		io.Copy(io.Discard, b.conn.Reader)
	}
	b.out.CloseWithError(io.EOF)
}

// own waits until nothing of the box runs any more, and says how it ended.
func (b *crate) own(stop func(), ended <-chan container.WaitResponse, lost <-chan error) {
	gone, answered := b.init.gone(), false
	for over := false; !over; {
		select {
		case <-gone:
			over = true
		case <-ended:
			answered, over = true, true
		case <-lost:
			answered, lost = true, nil
			b.exit.Lost = b.running()
			over = !b.exit.Lost || b.init == nil
			b.Kill()
		case <-b.stuck:
			b.exit.Lost, over = true, true
		}
	}
	b.account()
	close(b.done)
	if !answered {
		forget(stop, ended, lost)
	}
	stop()
}

// forget ends a wait that nobody is interested in. What it had to say must be taken, or
// the client's goroutine would stay.
func forget(stop func(), ended <-chan container.WaitResponse, lost <-chan error) {
	stop()
	select {
	case <-ended:
	case <-lost:
	}
}

// account fills in how the box ended.
func (b *crate) account() {
	ooms, ok := b.init.ooms()
	if !ok && !b.exit.Lost {
		ooms = b.askOOM()
	}
	b.exit.OOMKills = ooms
	b.exit.DiskFull = b.rootFull.Load() || b.disk != nil && b.disk.Full()
	b.exit.Lost = b.exit.Lost || !b.e.reachable()
}

// drainWithin is how long what a dead box said may take to get here.
const drainWithin = time.Second

// running asks whether a container whose end was not reported still runs, or cannot be
// asked for any more.
func (b *crate) running() bool {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	info, err := b.e.api.ContainerInspect(ctx, b.id)
	return err != nil || info.State.Running
}

// askOOM asks the engine for what the kernel could not be asked. It knows once it has
// seen the end of the container, not before.
func (b *crate) askOOM() int {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	ended, failed := b.e.api.ContainerWait(ctx, b.id, container.WaitConditionNotRunning)
	select {
	case <-ended:
	case <-failed:
	}
	info, err := b.e.api.ContainerInspect(ctx, b.id)
	if err == nil && info.State.OOMKilled {
		return 1
	}
	return 0
}

func (e *Engine) reachable() bool {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	_, err := e.api.Ping(ctx)
	return err == nil
}

// Stdin implements [box.Box].
func (b *crate) Stdin() io.WriteCloser { return b.stdin }

// Stdout implements [box.Box].
func (b *crate) Stdout() io.Reader { return b.stdout }

// Look implements [box.Watched].
func (b *crate) Look() { b.init.look() }

// Image implements [box.Imaged].
func (b *crate) Image() box.Image {
	return box.Image{Digest: b.image.digest, Env: stepEnv(b.image, b.rules)}
}

// Limit implements [box.Box]. A limit cannot be lifted altogether, and the disk cannot
// grow beyond what it was made with.
func (b *crate) Limit(l job.Limits) error {
	b.limiting.Lock()
	defer b.limiting.Unlock()
	old := b.limits
	if l.Memory == 0 && old.Memory > 0 || l.CPUs == 0 && old.CPUs > 0 || l.Pids == 0 && old.Pids > 0 {
		return fmt.Errorf("box %s: a limit cannot be lifted", b.name)
	}
	if b.disk != nil {
		if err := b.disk.Shrink(l.Disk); err != nil {
			return fmt.Errorf("box %s: %w", b.name, err)
		}
	} else if l.Disk <= 0 && old.Disk > 0 {
		return fmt.Errorf("box %s: a limit cannot be lifted", b.name)
	}
	b.rootLimit.Store(l.Disk)
	if l.Memory != old.Memory || l.CPUs != old.CPUs || l.Pids != old.Pids {
		ctx, cancel := context.WithTimeout(context.Background(), quick)
		defer cancel()
		if _, err := b.e.api.ContainerUpdate(ctx, b.id, container.UpdateConfig{Resources: b.e.resources(l)}); err != nil {
			return fmt.Errorf("box %s: %w", b.name, err)
		}
	}
	b.init.limitSockets(l.Memory)
	b.limits = l
	return nil
}

// Kill implements [box.Box]. The kernel is told first, which needs no engine.
func (b *crate) Kill() {
	select {
	case <-b.done:
		return
	default:
	}
	b.init.kill()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.killing || b.ending {
		return
	}
	b.killing = true
	b.calls.Go(b.callKill)
}

// callKill has the engine kill the container. If nobody takes what the box said, it is
// dropped, or the engine would never be done with the container.
func (b *crate) callKill() {
	ctx, cancel := context.WithTimeout(context.Background(), killing)
	defer cancel()
	err := b.e.api.ContainerKill(ctx, b.id, "KILL")
	if err != nil && !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) {
		b.e.cfg.Logf("box %s: kill: %v", b.name, err)
	}
	select {
	case <-b.drained:
	case <-time.After(drainWithin):
		b.out.CloseWithError(io.EOF)
	}
	select {
	case <-b.done:
	case <-ctx.Done():
		b.unstick.Do(func() { close(b.stuck) })
	}
	b.mu.Lock()
	b.killing = false
	b.mu.Unlock()
}

// Wait implements [box.Box]. Detail is whole once Stdout has ended.
func (b *crate) Wait() box.Exit {
	<-b.done
	exit := b.exit
	exit.Detail = b.stderr.String()
	return exit
}

// Close implements [box.Box].
func (b *crate) Close() error {
	b.closing.Do(func() {
		if err := b.release(); err != nil {
			b.closeErr = fmt.Errorf("close box %s: %w", b.name, err)
		}
	})
	return b.closeErr
}

func (b *crate) release() error {
	b.Kill()
	if b.out != nil {
		b.out.CloseWithError(io.EOF) // from here on pump drops what comes
	}
	b.Wait()
	b.mu.Lock()
	b.ending = true
	b.mu.Unlock()
	b.calls.Wait()
	b.helpers.Wait()
	var errs []error
	if b.id != "" {
		errs = append(errs, b.e.remove(b.id))
	}
	if b.conn.Conn != nil {
		b.conn.Close()
		<-b.drained
	}
	b.init.close()
	if b.disk != nil {
		errs = append(errs, b.disk.Remove())
	}
	b.e.names.Close(b.name)
	return errors.Join(errs...)
}

// remove removes a container with its volumes, whatever it is doing.
func (e *Engine) remove(id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), slow)
	defer cancel()
	err := e.api.ContainerRemove(ctx, id, container.RemoveOptions{Force: true, RemoveVolumes: true})
	if err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	if errdefs.IsConflict(err) { // somebody else is removing it: wait until it is gone
		ended, failed := e.api.ContainerWait(ctx, id, container.WaitConditionRemoved)
		select {
		case <-ended:
			return nil
		case err := <-failed:
			if errdefs.IsNotFound(err) {
				return nil
			}
		}
	}
	return fmt.Errorf("remove container: %w", err)
}
