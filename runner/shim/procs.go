package shim

import (
	"bytes"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// procs starts processes, reaps every one that ends, whoever started it, and signals
// all of them. One goroutine owns all waiting, because a wait for any child takes the
// status from under a wait for one.
type procs struct {
	oom    *oomScore
	init   bool          // PID 1: everything in the namespace is ours
	wake   chan struct{} // a process was started
	reaped chan struct{} // a process was reaped; holds one

	mu   sync.Mutex // protects the following
	kids map[int]chan<- exit
	idle chan struct{} // closed while there is no process
}

// An exit is how a process ended.
type exit struct {
	status syscall.WaitStatus
	usage  syscall.Rusage // with the children it waited for
}

// newProcs also starts the reaper, which lives as long as the process.
func newProcs(oom *oomScore) *procs {
	p := &procs{
		oom:    oom,
		init:   os.Getpid() == 1,
		wake:   make(chan struct{}, 1),
		reaped: make(chan struct{}, 1),
		kids:   map[int]chan<- exit{},
		idle:   make(chan struct{}),
	}
	close(p.idle)
	if !p.init {
		unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	}
	go p.reap()
	return p
}

// start starts a process and returns where its end will be told.
func (p *procs) start(path string, argv []string, attr *syscall.ProcAttr) (<-chan exit, error) {
	p.mu.Lock() // also keeps the reaper from an exit that is not registered yet
	defer p.mu.Unlock()
	calm := p.oom.expendable()
	pid, err := syscall.ForkExec(path, argv, attr)
	calm()
	if err != nil {
		return nil, err
	}
	done := make(chan exit, 1)
	p.kids[pid] = done
	if closed(p.idle) {
		p.idle = make(chan struct{})
	}
	ring(p.wake)
	return done, nil
}

// reap waits for children, and for a first child while there is none.
func (p *procs) reap() {
	for {
		var e exit
		pid, err := syscall.Wait4(-1, &e.status, syscall.WALL, &e.usage)
		switch err {
		case nil:
			p.end(pid, e)
		case syscall.ECHILD:
			p.rest()
		}
	}
}

// end hands e to whoever started pid. An orphan has nobody.
func (p *procs) end(pid int, e exit) {
	p.mu.Lock()
	done := p.kids[pid]
	delete(p.kids, pid)
	p.mu.Unlock()
	if done != nil {
		done <- e
	}
	ring(p.reaped)
}

// rest says that there is no process and waits for the next.
func (p *procs) rest() {
	p.mu.Lock()
	if len(p.kids) == 0 && !closed(p.idle) {
		close(p.idle)
	}
	p.mu.Unlock()
	<-p.wake
}

// none returns a channel that is closed once no process is left.
func (p *procs) none() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle
}

// killAll kills every process and waits until all are gone. As PID 1 one signal is
// enough: the kernel sends it under the lock that fork(2) needs to add a process.
func (p *procs) killAll() {
	p.signal(syscall.SIGKILL)
	for none := p.none(); ; {
		select {
		case <-none:
			return
		case <-p.reaped:
			if !p.init { // children of the dead have become ours to find
				p.signal(syscall.SIGKILL)
			}
		}
	}
}

// abandon kills every process as the last act before exiting. The end of PID 1 does so
// by itself, at once; elsewhere no new one may slip through meanwhile.
func (p *procs) abandon() {
	if !p.init {
		p.mu.Lock() // for ever
	}
	p.signal(syscall.SIGKILL)
}

// signal sends sig to every process but this one. Outside a PID namespace of its own
// it must not say "all", and looks for its descendants instead.
func (p *procs) signal(sig syscall.Signal) {
	if p.init {
		syscall.Kill(-1, sig)
		return
	}
	for _, pid := range descendants(os.Getpid()) {
		syscall.Kill(pid, sig)
	}
}

// descendants returns all processes below pid, as /proc shows them now.
func descendants(pid int) []int {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	children := map[int][]int{}
	for _, name := range names {
		child, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if parent, ok := parentOf(name); ok {
			children[parent] = append(children[parent], child)
		}
	}
	all := children[pid]
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// parentOf reads the fourth field of /proc/PID/stat; the second, a name in brackets,
// may itself hold blanks and brackets.
func parentOf(pid string) (int, bool) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 2 {
		return 0, false
	}
	parent, err := strconv.Atoi(string(fields[1]))
	return parent, err == nil
}

// closed reports whether c is closed; nothing is ever sent on it.
func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// ring leaves one token in c.
func ring(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
