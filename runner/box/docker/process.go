package docker

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box/machine"
)

// A process is the shim of a container as this machine sees it. All its methods may
// be called on nil, which is what there is when the engine runs behind another kernel
// or in another process namespace; then the engine has to be asked instead.
//
// The kernel is asked first because the engine reports the end of a container some
// 50 ms late, and sometimes hangs.
type process struct {
	fd     *os.File     // pidfd
	memory string       // the file of its cgroup that counts kills, "" for none
	killed atomic.Int64 // how many it had counted when it was last read
	ended  chan struct{}
}

// findProcess returns the process with that id if it is in the cgroup of a container.
func findProcess(pid int, container string) *process {
	if pid <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !bytes.Contains(groups, []byte(container)) { // not the one the engine means
		unix.Close(fd)
		return nil
	}
	p := &process{fd: os.NewFile(uintptr(fd), "pidfd"), ended: make(chan struct{})}
	p.memory = memoryEvents(string(groups))
	go p.wait() // ends with the process
	return p
}

// memoryV1 is the file in which a cgroup v1 counts kills.
const memoryV1 = "memory.oom_control"

// memoryEvents finds the file that counts the kills of a cgroup.
func memoryEvents(groups string) (file string) {
	mounts, err := machine.Mounts()
	if err != nil {
		return ""
	}
	for _, m := range mounts {
		dir := ""
		switch {
		case m.Kind == "cgroup" && strings.Contains(","+m.Options+",", ",memory,"):
			dir, file = machine.GroupOf(groups, "memory"), memoryV1
		case m.Kind == "cgroup2":
			dir, file = machine.GroupOf(groups, ""), "memory.events"
		default:
			continue
		}
		file = filepath.Join(m.At, m.Below(dir), file)
		if _, err := os.Stat(file); err == nil {
			return file
		}
	}
	return ""
}

// wait waits for the end of the process. As the init of a process namespace it ends
// after all others in it.
func (p *process) wait() {
	defer close(p.ended)
	c, err := p.fd.SyscallConn()
	if err != nil {
		return
	}
	c.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && err != unix.EINTR
	})
}

// gone is closed when the process has ended; nil blocks for ever.
func (p *process) gone() <-chan struct{} {
	if p == nil {
		return nil
	}
	return p.ended
}

func (p *process) kill() {
	if p == nil {
		return
	}
	if c, err := p.fd.SyscallConn(); err == nil {
		c.Control(func(fd uintptr) { unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// limitSockets sets what the engine does not, although its API has it.
func (p *process) limitSockets(memory int64) {
	if p != nil && filepath.Base(p.memory) == memoryV1 {
		machine.LimitSocketsV1(filepath.Dir(p.memory), memory)
	}
}

// limitSockets does the same for a container whose end is somebody else's to see.
func limitSockets(pid int, container string, memory int64) {
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !bytes.Contains(groups, []byte(container)) {
		return
	}
	if file := memoryEvents(string(groups)); filepath.Base(file) == memoryV1 {
		machine.LimitSocketsV1(filepath.Dir(file), memory)
	}
}

// look reads how many processes of the cgroup the kernel has killed for memory. It reports
// false once the engine has removed the cgroup.
func (p *process) look() bool {
	if p == nil || p.memory == "" {
		return false
	}
	n, err := machine.Counter(p.memory, "oom_kill")
	if err == nil {
		p.killed.Store(int64(n))
	}
	return err == nil
}

// ooms returns how many processes of the cgroup the kernel killed for memory, as far as was
// seen while there was one. ok is false if there may have been more.
func (p *process) ooms() (n int, ok bool) {
	ok = p.look()
	if p != nil {
		n = int(p.killed.Load())
	}
	return n, ok || n > 0
}

// close lets go of a process. One that would not die is left to the kernel.
func (p *process) close() {
	if p == nil {
		return
	}
	select {
	case <-p.ended:
		p.fd.Close()
	default:
	}
}

// watchRoot measures what the box writes into its root, until the box is gone. upper is
// the folder that holds it on this machine, if the engine told.
func (b *crate) watchRoot(upper string) {
	ctx, cancel := context.WithCancel(context.Background())
	measure := b.measure(ctx, upper)
	full := func() bool { limit := b.rootLimit.Load(); return measure(limit) > limit }
	b.helpers.Go(func() {
		machine.Sample(ctx, full, func() { b.rootFull.Store(true); b.Kill() })
	})
	b.helpers.Go(func() { <-b.done; cancel() })
}

// measure is how the root of a container is measured, up to a limit.
func (b *crate) measure(ctx context.Context, upper string) func(limit int64) int64 {
	if _, err := os.ReadDir(upper); upper != "" && err == nil {
		return func(limit int64) int64 { return machine.Used(ctx, upper, limit) }
	}
	return func(int64) int64 { return b.askRoot(ctx) }
}

// askRoot has the engine measure it.
func (b *crate) askRoot(ctx context.Context) int64 {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	info, _, err := b.e.api.ContainerInspectWithRaw(ctx, b.id, true)
	if err != nil || info.SizeRw == nil {
		return 0
	}
	return *info.SizeRw
}

// explanations are what staff can do about what an engine says when it cannot start a
// container.
var explanations = []struct{ says, means string }{
	{"could not select device driver", "the engine cannot hand out GPUs: install nvidia-container-toolkit, run nvidia-ctk runtime configure, restart the engine"},
	{"bind source path does not exist", "the engine does not see the runner's folders: it must be on this machine, in the same mount namespace"},
	{"no such file or directory: unknown", "the engine does not see the runner's folders, or the shim is not a static program"},
}

func contains(err error, text string) bool { return err != nil && strings.Contains(err.Error(), text) }
