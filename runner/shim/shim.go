// Package shim is PID 1 in a box: it unpacks the source into /src, runs the steps in
// /build, and streams output, timings and /build back. It is all of raid that a
// student's code ever shares a machine, a uid or a process table with.
//
// # Wires
//
// Standard input and output carry frames of package job; standard error is for a
// crash of the shim itself.
//
//	out  Ready                        it can take an order; a warm box waits here
//	in   Order                        a job.BoxOrder
//	in   File…, empty File            the source, a plain tar, if the order says so
//	out  Begun                        the first step is about to start
//	out  Mark, Out|Err…, Mark         for each step: announced, its output, how it went
//	out  Raid                         a remark of the shim's own, anywhere in between
//	out  File…, empty File            /build as a tar, once nothing runs any more
//	out  Final                        a job.Result; then the shim exits
//	in   Stop                         at any time: end the steps, its payload is the reason
//
// A Stop, or the time limit, sends SIGTERM to every process and SIGKILL to what is
// left five seconds later; a second Stop does not wait. The end of standard input, or
// nobody reading standard output, means that the runner has died: everything is
// killed and the shim exits at once. When the attempt was not the job's fault
// (job.ReasonInfra) Final comes alone, without /build.
//
// # Verdicts
//
// A step is one line, run by bash, or by sh where there is no bash. The first that
// fails is the verdict, and unless Spec.KeepGoing it is also the last. A step is over
// when its shell has exited. What it left in the background runs on until the last
// step is over and is then killed, before /build is read, so that nothing changes an
// archive while it is made. A shell that says 128+N because its child died of signal N
// has exited, and is reported so; job.ReasonSignal means that the step's own process
// died of the signal, as it does for a line that is a single command.
//
// # Defences
//
// The steps run with the shim's uid, so it trusts them with nothing. It is not
// dumpable: no ptrace, no /proc/1/fd, no pidfd_getfd. Its descriptors lie above 2 and
// close on exec. As PID 1 it hands every signal back to the kernel, which then drops
// whatever the box sends it. It starts no thread once a step runs, so a fork bomb that
// holds the last process number cannot bring it down. The steps are what the kernel
// kills first when memory ends. It always listens, however full its own output is.
//
// What remains: prlimit(2) may lower the limits of any process of the same uid, the
// shim's too, and so starve it. That ends in a box without a result, which is the
// job's own verdict and never a pass.
//
// Not its job: limits of memory, processes, disk and output, deciding between its own
// verdict and how the box died, and the time that counts for rankings. Those are
// measured and held outside, by the runner and the engine.
package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/rai-project/raid/runner/box/seccomp"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/tree"
)

// Confine, among the arguments of a shim, has it bring the seccomp filter itself: for
// engines that have one of their own and cannot be given a second.
const Confine = "confine"

// Main runs the shim of a box on the process's standard input and output and returns
// the exit status: 0 once a job.Final frame is out, whatever the verdict. Of args only
// Confine has a meaning. A process can be a shim only once.
func Main(args ...string) int {
	s := Shim{Src: "/src", Build: "/build", Home: os.Getenv("HOME"), Grace: 5 * time.Second,
		Confine: slices.Contains(args, Confine)}
	if s.Home == "" {
		s.Home = "/tmp"
	}
	return s.Run()
}

// A Shim says where its box has things.
type Shim struct {
	Src   string        // the source is unpacked here
	Build string        // the steps run here, and it comes back
	Home  string        // HOME of the steps if the order names none
	Grace time.Duration // between SIGTERM and SIGKILL

	Confine bool // put the seccomp filter on this process and all it starts
}

// Run takes one order, carries it out and returns as Main does. It takes over the
// process: descriptors 0 and 1, signals, every child.
func (s *Shim) Run() int {
	box, err := guard()
	if err == nil && s.Confine {
		err = seccomp.Install()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "raid shim: %v\n", err)
		return 1
	}
	procs := newProcs(box.oom)
	die := func(err error) {
		procs.abandon()
		if !errors.Is(err, io.EOF) { // closing the wire is how a box is ended, and no news
			fmt.Fprintf(os.Stderr, "raid shim: %v\n", err)
		}
		os.Exit(1)
	}
	w := &wire{w: box.out, lost: die}
	source, sourceIn := io.Pipe()
	a := &attempt{Shim: *s, wire: w, procs: procs, stopping: make(chan struct{}), killed: make(chan struct{})}
	e := &ear{frames: job.NewFrameReader(box.in), source: sourceIn, stop: a.stop}

	w.send(job.Ready, nil)
	if a.order, err = e.order(); err != nil {
		die(err)
	}
	go func() { die(e.listen()) }() // for as long as the process lives
	w.send(job.Final, encode(a.run(source)))
	return 0
}

// run carries out the order and returns its result, with all but Final sent.
func (a *attempt) run(source *io.PipeReader) job.Result {
	r := a.build(source)
	if r.Reason == job.ReasonInfra {
		return r
	}
	if note := a.collect(); note != "" {
		a.wire.send(job.Raid, []byte(note))
		r.Note = join(r.Note, note)
	}
	return r
}

// build unpacks the source and runs the steps. Nothing runs any more when it returns.
func (a *attempt) build(source *io.PipeReader) job.Result {
	if len(a.order.Spec.Steps) == 0 {
		return failed(errors.New("the order has no steps")) // nothing ran, so nothing may pass
	}
	for _, dir := range [...]string{a.Src, a.Build} { // where the engine has not
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return failed(err)
		}
	}
	if a.order.Source {
		err := a.unpack(source)
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return ended(job.ReasonDiskLimit, "no space left while unpacking the source")
		}
		if err != nil && !closed(a.stopping) {
			return failed(fmt.Errorf("unpack the source: %w", err))
		}
	}
	if closed(a.stopping) {
		return ended(a.why(), "")
	}
	return a.steps()
}

// failed returns the result of an attempt that raid is to blame for.
func failed(err error) job.Result { return ended(job.ReasonInfra, err.Error()) }

// ended returns the result of an attempt that ended for r.
func ended(r job.Reason, note string) job.Result {
	return job.Result{Reason: r, Exit: r.Exit(), Note: note}
}

// unpack unpacks the source as it arrives and returns once the last of it has.
func (a *attempt) unpack(source *io.PipeReader) error {
	err := tree.Unpack(a.Src, source)
	if _, rest := io.Copy(io.Discard, source); err == nil {
		err = rest
	}
	return err
}

// collect sends the build folder and returns a sentence if not all of it came along.
func (a *attempt) collect() (note string) {
	w := newFileWriter(a.wire)
	got, err := tree.Pack(w, a.Build, tree.PackOptions{Limit: a.order.Spec.Limits.Artifact})
	w.flush()
	a.wire.send(job.File, nil)
	switch {
	case err != nil:
		return fmt.Sprintf("collecting /build failed: %v", err)
	case got.LeftOut == 1:
		return "left out 1 file of /build: " + got.FirstLeftOut
	case got.LeftOut > 1:
		return fmt.Sprintf("left out %d files of /build, first: %s", got.LeftOut, got.FirstLeftOut)
	}
	return ""
}

// join joins two notes, either of which may be empty.
func join(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "; " + b
}

// maxSteps is how many steps a result lists: an order has room for more than a frame.
const maxSteps = 1000

// encode writes r so that it fits one frame, with shorter lines if need be.
func encode(r job.Result) []byte {
	r.Steps = append([]job.Step(nil), r.Steps[:min(len(r.Steps), maxSteps)]...)
	for n := maxLine; ; n /= 2 {
		for i := range r.Steps {
			r.Steps[i].Line = clip(r.Steps[i].Line, n)
		}
		if b := marshal(r); len(b) <= job.MaxFrame {
			return b
		}
	}
}

// marshal writes v, whose type is one that always can be.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// maxLine is how much of a step's line is repeated back, in bytes.
const maxLine = 4 << 10

// clip shortens s to about n bytes without cutting a character.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}
