package shim

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A guarded process keeps its two wires and nothing else where children could reach.
type guarded struct {
	in, out *os.File
	oom     *oomScore
}

// guard makes the process safe to share a uid with hostile code. The order matters:
// what is needed of /proc/self is opened before the process stops being dumpable,
// because from then on those files belong to root.
func guard() (*guarded, error) {
	g := &guarded{oom: openOOMScore()}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("set not dumpable: %w", err)
	}
	ignoreSignals()
	lowerLimits()
	var err error
	if g.in, err = moveAway(0, "orders"); err != nil {
		return nil, err
	}
	if g.out, err = moveAway(1, "frames"); err != nil {
		return nil, err
	}
	closeOnExec()
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(24 << 20) // soft: collects harder beyond it
	runtime.GOMAXPROCS(2)
	startThreads(12)
	return g, nil
}

// maxFiles is how many descriptors a process of a step may have: more than programs
// need, and few enough that closing them all one by one is quick.
const maxFiles = 65536

// What a user may have of these is counted over all its processes on the machine, and the
// user of a container may be the machine's root. A process fails when the sum is beyond
// its own limit: with less than others have, a job leaves them the rest.
const (
	MaxSignals = 4096      // waiting, and timers of timer_create(2); usual are some 10,000s
	MaxQueues  = 256 << 10 // bytes of POSIX message queues; usual are 800 KiB
)

// lowerLimits keeps the steps from core files, and from more of some things than they
// need. It never raises a limit, which would take a privilege.
func lowerLimits() {
	for resource, most := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: maxFiles,
		unix.RLIMIT_SIGPENDING: MaxSignals, unix.RLIMIT_MSGQUEUE: MaxQueues} {
		var l syscall.Rlimit
		if syscall.Getrlimit(resource, &l) == nil {
			l.Max = min(l.Max, most)
			l.Cur = l.Max
			syscall.Setrlimit(resource, &l)
		}
	}
}

// moveAway moves descriptor fd out of the way of the steps' own and leaves /dev/null
// in its place. The result does not block, so waiting on it takes no thread.
func moveAway(fd int, name string) (*os.File, error) {
	moved, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return nil, fmt.Errorf("move descriptor %d: %w", fd, err)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	defer unix.Close(null)
	if err := unix.Dup3(null, fd, unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("replace descriptor %d: %w", fd, err)
	}
	if err := unix.SetNonblock(moved, true); err != nil {
		return nil, fmt.Errorf("unblock descriptor %d: %w", fd, err)
	}
	return os.NewFile(uintptr(moved), name), nil
}

// closeOnExec keeps from the steps whatever the engine left open by mistake; a leaked
// descriptor of the host is how CVE-2024-21626 left its box.
func closeOnExec() {
	if unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for fd := 3; fd < 1024; fd++ { // before Linux 5.11
		unix.CloseOnExec(fd)
	}
}

// ignoreSignals makes every signal that the box can send harmless.
//
// The Go runtime handles nearly all signals itself, and its handlers take a SIGSEGV
// that was sent with sigqueue(3) or F_SETSIG for a fault of its own and crash. PID 1
// needs no handlers: the kernel drops each signal from inside the namespace that has
// the default action, SIGKILL included. A true fault is delivered nevertheless. Only
// SIGURG keeps its handler, which the scheduler uses and which is harmless.
//
// Elsewhere than in PID 1, that is in tests, the runtime is asked to swallow them.
func ignoreSignals() {
	if os.Getpid() != 1 {
		signal.Notify(make(chan os.Signal, 1))
		return
	}
	var byDefault [64]byte // larger than struct sigaction anywhere; all zero is SIG_DFL
	for sig := uintptr(1); sig <= 64; sig++ {
		if sig != uintptr(unix.SIGURG) {
			unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
		}
	}
}

// startThreads makes the runtime hold n threads more, idle. Go aborts when it cannot
// start a thread, and under a fork bomb it cannot. It never ends an idle one, and never
// starts one while there is an idle one. Needed at once are: two that run (GOMAXPROCS),
// the reaper's wait, one starting a step, one in a file of /build, sysmon, and the
// template thread that LockOSThread starts here; all else waits in the poller.
func startThreads(n int) {
	var held, done sync.WaitGroup
	release := make(chan struct{})
	held.Add(n)
	for range n {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread() // else the thread would end with the goroutine
			held.Done()
			<-release // holds a thread of its own until all are there
		})
	}
	held.Wait()
	close(release)
	done.Wait()
	// What a locked goroutine needed is made by the template thread, in its own time, and
	// may still be on its way. It comes with a P, and stopping the world waits for all Ps.
	runtime.ReadMemStats(new(runtime.MemStats))
}

// An oomScore is the process's /proc/self/oom_score_adj, opened while that was allowed.
// Where it cannot be opened or set, nothing happens.
type oomScore struct {
	f    *os.File
	calm string // the shim's own value
}

// openOOMScore also makes the shim itself the last to be killed, as far as it may.
func openOOMScore() *oomScore {
	f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err != nil {
		return &oomScore{}
	}
	o := &oomScore{f: f}
	o.set("-1000")
	b := make([]byte, 16)
	n, _ := f.ReadAt(b, 0)
	o.calm = strings.TrimSpace(string(b[:n]))
	return o
}

// expendable starts a section whose children are the first to be killed, and returns
// what ends it. One at a time.
func (o *oomScore) expendable() (end func()) {
	o.set("1000")
	return func() { o.set(o.calm) }
}

func (o *oomScore) set(v string) {
	if o.f != nil {
		o.f.WriteAt([]byte(v), 0) // refused below what the engine set: then that stays
	}
}
