// Package boxtest is one suite of tests for every engine that makes boxes.
//
// A test binary of an engine is test, shim and attacker in one, so its TestMain is
//
//	func TestMain(m *testing.M) { boxtest.Main(m) }
//
// and its engine runs os.Executable() with the argument "shim" as the shim, found in
// a box as /.raid/shim. The test itself is
//
//	func TestConformance(t *testing.T) { boxtest.Run(t, boxtest.Kind{New: newEngine, …}) }
//
// where newEngine makes an engine for the runner [ID]. The suite closes the engine,
// and looks for that ID in everything the kernel lists to see what was left behind.
//
// Limits that an engine's Weakness says do not hold are skipped, all else must pass.
package boxtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/shim"
)

// Environment of a test binary that plays a runner which is killed.
const (
	envID     = "RAID_BOXTEST_ID"
	envVictim = "RAID_BOXTEST_VICTIM" // the box it is to start
)

// patience is more than anything here takes on a loaded machine. No test waits for it
// unless it fails.
const patience = 60 * time.Second

// Main is TestMain: it runs the tests, or, when the arguments ask for it, the shim or
// an attack from inside a box.
func Main(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "shim":
			os.Exit(shim.Main(os.Args[2:]...))
		case "attack":
			os.Exit(attack(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

// ID returns the runner's ID that the engine under test must take.
func ID() string {
	if id := os.Getenv(envID); id != "" {
		return id
	}
	return "boxtest-" + strings.ToLower(rand.Text())
}

// limits are small enough for twenty boxes at once on a small machine.
var limits = job.Limits{Time: time.Minute, Memory: 256 << 20, CPUs: 1, Pids: 100, Disk: 64 << 20, Artifact: 8 << 20}

// A Kind is what differs between engines on purpose.
type Kind struct {
	// New makes an engine. It is called again for an engine of the same runner.
	New func(t *testing.T, id string) box.Engine
	// User is what whoami says in a box, Home its HOME.
	User, Home string
	// Homes are the folders in /home.
	Homes []string
	// Writable says that jobs may write to the root.
	Writable bool
	// Traces lists what the kernel does not: what the engine itself still knows by a
	// name. nil for nothing.
	Traces func(t *testing.T, name string) []string
	// Short leaves out what takes long and shows nothing new where another kind of the
	// same engine has been through all of it.
	Short bool
}

// Run runs the suite.
func Run(t *testing.T, k Kind) {
	id := ID()
	e := k.New(t, id)
	if name := os.Getenv(envVictim); name != "" {
		victim(t, e, name)
	}
	if w := e.Weakness(); w != "" {
		t.Logf("weakness: %s", w)
	}
	s := &suite{Kind: k, e: e}
	for _, c := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"Frames", testFrames}, {"Exit", testExit}, {"Who", testWho}, {"Host", testHost}, {"Files", testFiles},
		{"Network", testNetwork}, {"Calls", testCalls}, {"Descriptors", testDescriptors}, {"GPUs", testGPUs},
		{"Memory", testMemory}, {"Sockets", testSockets}, {"Limit", testLimit}, {"Shrink", testShrink}, {"Pids", testPids}, {"Disk", testDisk}, {"Inodes", testInodes},
		{"Kill", testKill}, {"EndOfInput", testEndOfInput}, {"Cancelled", testCancelled}, {"SameID", testSameID},
		{"Stop", testStop}, {"Unread", testUnread}, {"Line", testLine}, {"Survivors", testSurvivors}, {"Forged", testForged}, {"Swarm", testSwarm},
		{"Hostile", testHostile}, {"Hoard", testHoard},
		{"Close", testClose}, {"Many", testMany}, {"Mixed", testMixed},
	} {
		if !k.Short || !slices.Contains(long, c.name) {
			t.Run(c.name, func(t *testing.T) { c.run(t, s) })
		}
	}
	if err := e.Close(); err != nil {
		t.Errorf("Engine.Close: %v", err)
	}
	s.wantNoTraces(t, id)
	t.Run("KilledRunner", func(t *testing.T) { testKilledRunner(t, s) })
}

// long are the cases that Short leaves out.
var long = []string{"Stop", "Unread", "Line", "Survivors", "Forged", "Swarm", "Hostile", "Many", "Mixed"}

type suite struct {
	Kind
	e box.Engine
}

// enforced skips the test unless the engine holds the limit that word names.
func (s *suite) enforced(t *testing.T, word string) {
	t.Helper()
	if strings.Contains(s.e.Weakness(), word) {
		t.Skipf("not enforced here: %s", s.e.Weakness())
	}
}

// A session is a box and what it has said.
type session struct {
	box.Box
	id    string
	ready chan struct{} // closed when the shim waits for its order
	ended chan struct{} // closed at the end of output; what follows may be read then

	out, err, raid bytes.Buffer
	printed        int64 // bytes of out, which keeps the first maxKept of them
	files          int64
	final          *job.Result
	broken         error

	mu   sync.Mutex
	seen string // output so far
	want string
	saw  chan struct{} // closed when seen holds want
}

// start starts a box and waits until its shim is ready. The test's end closes it.
func (s *suite) start(t *testing.T, c box.Config) *session {
	t.Helper()
	if c.ID == "" {
		c.ID = "t-" + strings.ToLower(rand.Text())
	}
	if c.Limits == (job.Limits{}) {
		c.Limits = limits
	}
	b, err := s.e.Start(t.Context(), c)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	x := &session{Box: b, id: c.ID, ready: make(chan struct{}), ended: make(chan struct{}), saw: make(chan struct{})}
	go x.read()
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		<-x.ended
		s.wantNoTraces(t, c.ID)
	})
	if !within(x.ready) {
		x.Kill()
		t.Fatalf("the box did not become ready; it ended with %+v", x.Wait())
	}
	return x
}

func (x *session) read() {
	defer close(x.ended)
	r := job.NewFrameReader(x.Stdout())
	for {
		k, p, err := r.Next()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, fs.ErrClosed) {
				x.broken = err
				io.Copy(io.Discard, x.Stdout())
			}
			return
		}
		switch k {
		case job.Ready:
			close(x.ready)
		case job.Out:
			x.printed += int64(len(p))
			if x.out.Len() < maxKept {
				x.out.Write(p)
				x.look(p)
			}
		case job.Err:
			x.err.Write(p)
		case job.Raid:
			x.raid.Write(append(p, '\n'))
		case job.File:
			x.files += int64(len(p))
		case job.Final:
			x.final = new(job.Result)
			x.broken = json.Unmarshal(p, x.final)
		}
	}
}

// maxKept is how much a session keeps of what a job prints.
const maxKept = 1 << 20

// look closes saw once the output holds want.
func (x *session) look(p []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	had := x.want != "" && strings.Contains(x.seen, x.want)
	x.seen += string(p)
	if x.want != "" && !had && strings.Contains(x.seen, x.want) {
		close(x.saw)
	}
}

// order gives the box its steps.
func (x *session) order(t *testing.T, steps ...string) {
	t.Helper()
	b, err := json.Marshal(job.BoxOrder{
		Spec: job.Spec{Steps: steps, Limits: limits},
		Env:  []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := job.WriteFrame(x.Stdin(), job.Order, b); err != nil {
		t.Fatalf("send the order: %v", err)
	}
}

// until gives the box its steps and waits until they have printed want.
func (x *session) until(t *testing.T, want string, steps ...string) {
	t.Helper()
	x.want = want
	x.order(t, steps...)
	if !within(x.saw) {
		t.Fatalf("the job never printed %q", want)
	}
}

// finish waits for the end of the box, which has to speak to the last.
func (x *session) finish(t *testing.T) box.Exit {
	t.Helper()
	exit, broken := x.end(t)
	if broken != nil {
		t.Errorf("the box said: %v", broken)
	}
	return exit
}

// end waits for the end of the box and returns what was wrong with the last it said.
func (x *session) end(t *testing.T) (exit box.Exit, broken error) {
	t.Helper()
	if !within(x.ended) {
		x.Kill()
		t.Fatal("the box did not end")
	}
	exit = x.Wait()
	t.Logf("final %+v, exit %+v, stderr %q, raid %q", x.final, exit, x.err.String(), x.raid.String())
	return exit, x.broken
}

// job runs steps in a box of their own to their end.
func (s *suite) job(t *testing.T, c box.Config, steps ...string) (*session, box.Exit) {
	t.Helper()
	x := s.start(t, c)
	x.order(t, steps...)
	return x, x.finish(t)
}

// Say runs one line in a box of e and returns what it printed.
func Say(t *testing.T, e box.Engine, c box.Config, line string) string {
	t.Helper()
	x, _ := (&suite{e: e}).job(t, c, line)
	if err := x.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	return x.out.String()
}

// says runs one line and compares its output.
func (s *suite) says(t *testing.T, line, want string) {
	t.Helper()
	x, _ := s.job(t, box.Config{}, line)
	if got := strings.TrimSpace(x.out.String()); got != want {
		t.Errorf("%s: %q, want %q (stderr %q)", line, got, want, x.err.String())
	}
}

func within(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-time.After(patience):
		return false
	}
}

// victim plays a runner that will be killed: it starts a box that is busy, says so,
// and never ends by itself.
func victim(t *testing.T, e box.Engine, name string) {
	s := &suite{e: e}
	x := s.start(t, box.Config{ID: name})
	x.until(t, "busy", "trap '' TERM HUP INT; echo busy; while :; do sleep 1000; done")
	fmt.Println("victim is busy")
	select {}
}

func testKilledRunner(t *testing.T, s *suite) {
	id, name := ID(), "v-"+strings.ToLower(rand.Text())
	top, _, _ := strings.Cut(t.Name(), "/")
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	c := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+top+"$")
	c.Env = append(os.Environ(), envID+"="+id, envVictim+"="+name)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() { c.Process.Kill(); c.Wait() })
	defer kill()
	waitLine(t, out, "victim is busy")
	orphans := processes(carries(name))
	if len(orphans) == 0 {
		t.Fatal("no process of the box is to be seen")
	}
	kill()
	for _, fd := range orphans {
		if !gone(fd) {
			t.Error("a process of the box outlived its runner")
		}
		unix.Close(fd)
	}
	e := s.New(t, id)
	if err := e.Sweep(t.Context()); err != nil {
		t.Errorf("Sweep: %v", err)
	}
	s.wantNoTraces(t, name)
	if err := e.Close(); err != nil {
		t.Errorf("Engine.Close: %v", err)
	}
	s.wantNoTraces(t, id)
}

func waitLine(t *testing.T, r io.Reader, want string) {
	t.Helper()
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if lines.Text() == want {
			return
		}
		t.Log(lines.Text())
	}
	t.Fatalf("no line %q", want)
}

// gone waits until the process of a pidfd has ended.
func gone(fd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		if err != unix.EINTR {
			return n > 0
		}
	}
}

// wantNoTraces looks for a name in all that a box could leave on a machine.
func (s *suite) wantNoTraces(t *testing.T, name string) {
	t.Helper()
	var found []string
	if s.Traces != nil {
		found = s.Traces(t, name)
	}
	found = append(found, Traces(name)...)
	if len(found) > 0 {
		t.Errorf("%s is still here: %s", name, strings.Join(found, ", "))
	}
}
