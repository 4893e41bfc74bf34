package runner

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/charmbracelet/log"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/keys/dial/dialtest"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// These tests join a runner to a whole raid over loopback. Only the boxes are not
// real: what is in one is a function of the test that speaks frames.

// A script is what runs in a box.
type script func(b *fakeBox)

// A fakeEngine makes boxes that run the script of the job they are for.
type fakeEngine struct {
	scripts map[string]script // by the first step

	mu      sync.Mutex
	boxes   []*fakeBox
	open    sync.WaitGroup
	started chan *fakeBox // nil, or told of each
	refused string        // an image for which no box is made
}

func (e *fakeEngine) Name() string                { return "fake" }
func (e *fakeEngine) Weakness() string            { return "" }
func (e *fakeEngine) Sweep(context.Context) error { return nil }
func (e *fakeEngine) Close() error                { return nil }

func (e *fakeEngine) Start(_ context.Context, c box.Config) (box.Box, error) {
	if c.Image != "" && c.Image == e.refused {
		return nil, &box.RefusedError{Why: new(job.Images).NotAllowed(c.Image)}
	}
	b := &fakeBox{engine: e, dead: make(chan struct{})}
	var err error
	if b.in, b.stdin, err = os.Pipe(); err != nil {
		return nil, err
	}
	if b.stdout, b.out, err = os.Pipe(); err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.boxes = append(e.boxes, b)
	e.mu.Unlock()
	e.open.Add(1)
	go b.live()
	if e.started != nil {
		e.started <- b
	}
	return b, nil
}

type fakeBox struct {
	engine        *fakeEngine
	in, stdin     *os.File
	stdout, out   *os.File
	order         job.BoxOrder
	source        []byte
	frames        *job.FrameReader
	kill, closing sync.Once
	dead          chan struct{}
	lost          bool        // set before dead is closed
	hungry        atomic.Bool // the kernel kills it for memory, and tells only those who look in time
	oomKills      atomic.Int32
}

// Look implements [box.Watched].
func (b *fakeBox) Look() {
	if b.hungry.Load() {
		b.oomKills.Store(1)
	}
}

func (b *fakeBox) Stdin() io.WriteCloser  { return b.stdin }
func (b *fakeBox) Stdout() io.Reader      { return b.stdout }
func (b *fakeBox) Limit(job.Limits) error { return nil }
func (b *fakeBox) Kill()                  { b.kill.Do(func() { b.in.Close(); b.out.Close() }) }
func (b *fakeBox) Wait() box.Exit {
	<-b.dead
	return box.Exit{Lost: b.lost, OOMKills: int(b.oomKills.Load())}
}
func (b *fakeBox) Close() error {
	b.Kill()
	<-b.dead
	b.closing.Do(func() { b.stdin.Close(); b.stdout.Close(); b.engine.open.Done() })
	return nil
}

// live is the box: a shim as the test wants it.
func (b *fakeBox) live() {
	defer close(b.dead)
	defer b.Kill()
	b.send(job.Ready, nil)
	b.frames = job.NewFrameReader(b.in)
	k, p, err := b.frames.Next()
	if err != nil || k != job.Order || json.Unmarshal(p, &b.order) != nil {
		return
	}
	for b.order.Source {
		k, p, err := b.frames.Next()
		if err != nil || k != job.File {
			return
		}
		if len(p) == 0 {
			break
		}
		b.source = append(b.source, p...)
	}
	name, _, _ := strings.Cut(b.order.Spec.Steps[0], " ")
	if run := b.engine.scripts[name]; run != nil {
		run(b)
		return
	}
	b.begin()
	b.print("%s\n", b.order.Spec.Steps[0])
	b.end(job.Result{Reason: job.ReasonExit})
}

func (b *fakeBox) send(k job.Kind, p []byte) error { return job.WriteFrame(b.out, k, p) }
func (b *fakeBox) begin()                          { b.send(job.Begun, nil) }
func (b *fakeBox) print(format string, args ...any) error {
	return b.send(job.Out, fmt.Appendf(nil, format, args...))
}

func (b *fakeBox) end(r job.Result) {
	p, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	b.send(job.Final, p)
}

// A wire is a connection that the test can freeze: nothing goes through any more, but
// nobody is told.
type wire struct {
	net.Conn
	frozen, closed chan struct{}
	once, stop     sync.Once
	left           atomic.Int64 // bytes to read before it breaks; 0: no end
}

func (w *wire) freeze() { w.once.Do(func() { close(w.frozen) }) }

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if left := w.left.Load(); left > 0 && w.left.Add(-int64(n)) <= 0 {
		w.Close()
	}
	return n, w.stuck(err)
}

func (w *wire) Write(p []byte) (int, error) {
	if err := w.stuck(nil); err != nil {
		return 0, err
	}
	return w.Conn.Write(p)
}

func (w *wire) stuck(err error) error {
	select {
	case <-w.frozen:
		<-w.closed
		return net.ErrClosed
	default:
		return err
	}
}

func (w *wire) Close() error {
	w.stop.Do(func() { close(w.closed) })
	return w.Conn.Close()
}

// A world is one raid, which can be stopped and started again, and one runner.
type world struct {
	t      *testing.T
	dir    string
	store  *store.Memory
	host   ssh.Signer
	user   ssh.Signer
	key    ssh.Signer
	engine *fakeEngine
	policy queue.Policy
	local  bool // the runner shares its files with raid

	mu    sync.Mutex
	addr  string // "" while raid is away
	wires []*wire
	halt  func()
}

func newWorld(t *testing.T, scripts map[string]script) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), store: store.NewMemory(), host: dialtest.Signer(t), user: dialtest.Signer(t), key: dialtest.Signer(t),
		engine: &fakeEngine{scripts: scripts}, policy: queue.DefaultPolicy()}
	return w
}

// raid starts a raid over the state that there is, on a port of its own.
func (w *world) raid() {
	w.t.Helper()
	w.store = w.store.Reopen()
	srv, err := sshd.New(w.t.Context(), sshd.Config{Dir: filepath.Join(w.dir, "raid"), HostKeys: []ssh.Signer{w.host}, Store: w.store,
		Policy: w.policy, Pools: []string{"p"}, Log: log.New(io.Discard),
		Limits: map[keys.Role]sshd.Limits{keys.Student: {Limits: job.Limits{Time: time.Hour, Output: 8 << 20, Artifact: 1 << 20},
			Upload: 64 << 20, Unpacked: 64 << 20, Entries: 1000}}})
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l, 5*time.Second) }()
	halt := sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			w.t.Errorf("Serve() = %v, want nil", err)
		}
	})
	w.t.Cleanup(halt)
	for _, e := range []keys.Enrollment{{User: "ada", Role: keys.Student, Email: "ada@example.edu", Key: dialtest.Line(w.user)}, {User: "gpu0", Role: keys.Runner, Key: dialtest.Line(w.key)}} {
		if srv.Enrolled(e.Key) {
			continue
		}
		if _, _, err := srv.Enrol(w.t.Context(), e, "test"); err != nil {
			w.t.Fatal(err)
		}
	}
	if w.local {
		if err := srv.Local(dialtest.Line(w.key), filepath.Join(w.dir, "runner")); err != nil {
			w.t.Fatal(err)
		}
	}
	w.mu.Lock()
	w.addr, w.halt = l.Addr().String(), halt
	w.mu.Unlock()
}

// away stops raid; every connection is cut.
func (w *world) away() {
	w.mu.Lock()
	halt := w.halt
	w.addr = ""
	w.mu.Unlock()
	w.cut()
	halt()
}

// cutAfter breaks the newest connection when it has read n more bytes.
func (w *world) cutAfter(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wires[len(w.wires)-1].left.Store(n)
}

func tarOf(t *testing.T, files map[string][]byte) io.Reader {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, data := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// cut breaks every connection of the runner.
func (w *world) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.wires {
		c.Close()
	}
	w.wires = nil
}

func (w *world) freeze() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.wires {
		c.freeze()
	}
}

func (w *world) target(s ssh.Signer) (dial.Target, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.addr == "" {
		return dial.Target{}, errors.New("raid is away")
	}
	return dial.Target{Addr: w.addr, HostKeys: []string{dialtest.Line(w.host)}, Signers: []ssh.Signer{s}}, nil
}

// dial is how the runner comes to raid.
func (w *world) dial(ctx context.Context) (*dial.Client, error) {
	t, err := w.target(w.key)
	if err != nil {
		return nil, err
	}
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", t.Addr)
	if err != nil {
		return nil, err
	}
	c := &wire{Conn: nc, frozen: make(chan struct{}), closed: make(chan struct{})}
	w.mu.Lock()
	w.wires = append(w.wires, c)
	w.mu.Unlock()
	return dial.New(ctx, c, t)
}

// A process is a runner that runs.
type process struct {
	*Runner
	kill  context.CancelCauseFunc
	ended chan error
}

// runner starts a runner in the folder that there is.
func (w *world) runner(change func(*Config)) *process {
	w.t.Helper()
	c := Config{Dir: filepath.Join(w.dir, "runner"), Name: "gpu0", Pools: []string{"p"}, Arch: runtime.GOARCH, Engine: w.engine,
		Dial: w.dial, Local: w.local, Orphan: time.Hour, Warm: 1, Logf: w.t.Logf}
	if change != nil {
		change(&c)
	}
	ctx, kill := context.WithCancelCause(context.Background())
	p := &process{Runner: New(c), kill: kill, ended: make(chan error, 1)}
	go func() { p.ended <- p.Run(ctx); close(p.ended) }()
	w.t.Cleanup(func() {
		kill(errors.New("the test is over"))
		for err := range p.ended {
			if err != nil {
				w.t.Errorf("Run() = %v, want nil", err)
			}
		}
		w.engine.open.Wait() // no box is left
	})
	return p
}

// stopped waits for the runner's end, not longer than d.
func (p *process) stopped(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case err := <-p.ended:
		if err != nil {
			t.Errorf("Run() = %v, want nil", err)
		}
	case <-time.After(d):
		buf := make([]byte, 1<<20)
		t.Fatalf("the runner has not ended after %v\n%s", d, buf[:runtime.Stack(buf, true)])
	}
}

// say runs a command as ada and returns what came back.
func (w *world) say(command string, stdin io.Reader) (stdout, stderr string, status int) {
	w.t.Helper()
	t, err := w.target(w.user)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	c, err := dial.Dial(ctx, t)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	var out, errOut bytes.Buffer
	if status, err = c.Run(ctx, command, stdin, &out, &errOut); err != nil {
		w.t.Errorf("run %q: %v, after %q, %q", command, err, out.String(), errOut.String())
	}
	return out.String(), errOut.String(), status
}

// job is what status says of a job.
func (w *world) job(id int) (j job.Job) {
	w.t.Helper()
	out, stderr, status := w.say(fmt.Sprintf("status %d --json", id), nil)
	if status != 0 {
		w.t.Fatalf("status %d = %d, %q", id, status, stderr)
	}
	if err := json.Unmarshal([]byte(out), &j); err != nil {
		w.t.Fatal(err)
	}
	return j
}

func TestOneJob(t *testing.T) {
	w := newWorld(t, nil)
	w.raid()
	w.runner(nil)
	out, stderr, status := w.say("submit -- hello", nil)
	if out != "hello\n" || status != 0 {
		t.Errorf("submit = %d, %q, %q, want 0 and hello", status, out, stderr)
	}
}

// A runner whose GPU is ill takes nothing and says so; when it is well it goes on. A job
// without GPUs has it not checked.
func TestSickGPU(t *testing.T) {
	var checks atomic.Int64
	verdicts := make(chan error) // what the next check finds
	w := newWorld(t, nil)
	w.raid()
	w.runner(func(c *Config) {
		c.GPUs = []gpu.Device{{UUID: "GPU-a", Model: "Test 1", MemoryMB: 10, Driver: "1.2"}, {UUID: "GPU-b", Model: "Test 1", MemoryMB: 8}}
		c.Recheck = time.Microsecond
		c.Check = func(ctx context.Context) error {
			checks.Add(1)
			select {
			case err := <-verdicts:
				return err
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	for told := ""; !strings.Contains(told, "sick: Xid 79"); { // it also has to join first
		verdicts <- errors.New("Xid 79")
		told, _, _ = w.say("runners", nil)
	}
	if out, _, _ := w.say("runners --json", nil); !strings.Contains(out, `"state":"sick","sick":"Xid 79"`) {
		t.Errorf("runners --json = %q, want it sick", out)
	}
	w.say("submit --detach --gpus 2 -- hello", nil)
	if out, _, _ := w.say("why 1", nil); !strings.Contains(out, "runner gpu0 is sick: Xid 79") {
		t.Errorf("why = %q, want it to name the runner", out)
	}
	verdicts <- nil
	if out, _, status := w.say("attach 1", nil); status != 0 || out != "hello\n" {
		t.Errorf("attach = %d, %q, want 0 and hello", status, out)
	}
	verdicts <- nil
	if out, _, _ := w.say("status 1", nil); !strings.Contains(out, "Test 1, Test 1, 8 MiB, driver 1.2  GPU-a,GPU-b") {
		t.Errorf("status = %q, want its GPUs", out)
	}
	before := checks.Load()
	for range 2 {
		w.say("submit -- hello", nil)
	}
	if n := checks.Load(); n != before {
		t.Errorf("%d checks after jobs without GPUs, want none", n-before)
	}
}

// A tool that does not answer holds no runner that is told to go.
func TestDrainWhileChecked(t *testing.T) {
	w := newWorld(t, nil)
	w.raid()
	checking := make(chan struct{})
	p := w.runner(func(c *Config) {
		c.GPUs = []gpu.Device{{UUID: "GPU-a"}}
		c.Check = func(ctx context.Context) error { close(checking); <-ctx.Done(); return context.Cause(ctx) }
	})
	<-checking
	p.Drain()
	if err := <-p.ended; err != nil {
		t.Errorf("Run() = %v, want nil", err)
	}
}

// numbers is what a box prints to prove that nothing of it is lost or repeated.
func numbers(n int) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, "line %d\n", i)
	}
	return s.String()
}

// differ says where two long texts part.
func differ(got, want string) string {
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	around := func(s string) string { return s[max(0, min(i, len(s))-20):min(len(s), i+20)] }
	return fmt.Sprintf("%d bytes, want %d; they part at %d: %q, want %q", len(got), len(want), i, around(got), around(want))
}

// Connections break and raid goes and comes back while a job prints: every byte
// arrives, once, and so does the result.
func TestOutputSurvivesAnything(t *testing.T) {
	const lines, breaks = 20000, 8
	for _, tt := range []struct {
		name  string
		local bool
		hurt  func(w *world)
	}{
		{"cut", false, func(w *world) { w.cut() }},
		{"raid restarts", false, func(w *world) { w.away(); w.raid() }},
		{"local cut", true, func(w *world) { w.cut() }},
		{"local, raid restarts", true, func(w *world) { w.away(); w.raid() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reached, go_on := make(chan int), make(chan struct{})
			w := newWorld(t, map[string]script{"count": func(b *fakeBox) {
				b.begin()
				for i := range lines {
					b.print("line %d\n", i)
					if i%(lines/breaks) == 0 {
						reached <- i
						<-go_on
					}
				}
				b.end(job.Result{Reason: job.ReasonExit, Exit: 3})
			}})
			w.local = tt.local
			w.raid()
			w.runner(nil)
			if _, stderr, status := w.say("submit --detach -- count", nil); status != 0 {
				t.Fatalf("submit = %d, %q", status, stderr)
			}
			for range breaks {
				<-reached
				tt.hurt(w)
				go_on <- struct{}{}
			}
			out, stderr, status := w.say("attach 1", nil)
			if want := numbers(lines); out != want || status != 3 {
				t.Errorf("attach = %d, %s, want 3; %s", status, differ(out, want), stderr)
			}
			if j := w.job(1); j.Attempt != 1 {
				t.Errorf("attempt = %d, want 1", j.Attempt)
			}
		})
	}
}

// What the kernel did to a job is asked for while the box is still there.
func TestLooksInTime(t *testing.T) {
	w := newWorld(t, map[string]script{"hungry": func(b *fakeBox) {
		b.hungry.Store(true)
		b.begin()
		b.end(job.Result{Reason: job.ReasonSignal, Exit: 137, Signal: "SIGKILL"})
	}})
	w.raid()
	w.runner(nil)
	if _, stderr, status := w.say("submit -- hungry", nil); status != job.ExitKilled || !strings.Contains(stderr, "out of memory") {
		t.Errorf("submit = %d, %q, want 137 and why", status, stderr)
	}
	if j := w.job(1); j.Reason != job.ReasonOOM {
		t.Errorf("reason = %q, want oom", j.Reason)
	}
}

// A finished result waits for raid, however long raid is away and although jobs that
// still run would be given up by then.
func TestResultWaitsForRaid(t *testing.T) {
	const orphan = 2 * time.Second // plenty for a job to end in
	running, end := make(chan struct{}), make(chan struct{})
	w := newWorld(t, map[string]script{"work": func(b *fakeBox) {
		b.begin()
		close(running)
		<-end
		b.print("done\n")
		b.end(job.Result{Reason: job.ReasonExit})
	}})
	w.raid()
	tried := make(chan struct{}, 100)
	w.runner(func(c *Config) {
		c.Orphan = orphan
		c.Dial = func(ctx context.Context) (*dial.Client, error) {
			client, err := w.dial(ctx)
			if err != nil {
				tried <- struct{}{}
			}
			return client, err
		}
	})
	if _, stderr, status := w.say("submit --detach -- work", nil); status != 0 {
		t.Fatalf("submit = %d, %q", status, stderr)
	}
	<-running
	w.away()
	gone := time.Now()
	close(end)
	until(t, func() bool { return len(glob(t, w.dir, "runner/attempts/*/result.json")) == 1 })
	for n := 0; n < 3 || time.Since(gone) < 2*orphan; n++ {
		<-tried
	}
	w.raid()
	out, stderr, status := w.say("attach 1", nil)
	if out != "done\n" || status != 0 {
		t.Errorf("attach = %d, %q, %q, want 0, done", status, out, stderr)
	}
	if j := w.job(1); j.Attempt != 1 {
		t.Errorf("attempt = %d, want 1", j.Attempt)
	}
}

// Whatever raid's connection does, a runner that is told to stop at once does.
func TestStopsWhileRaidIsFrozen(t *testing.T) {
	printing := make(chan struct{})
	w := newWorld(t, map[string]script{"flood": func(b *fakeBox) {
		b.begin()
		close(printing)
		for b.send(job.Out, make([]byte, 64<<10)) == nil {
		}
	}})
	w.raid()
	p := w.runner(nil)
	if _, stderr, status := w.say("submit --detach -- flood", nil); status != 0 {
		t.Fatalf("submit = %d, %q", status, stderr)
	}
	<-printing
	w.freeze()
	p.Drain()
	p.kill(errors.New("second signal"))
	p.stopped(t, 30*time.Second)
}

// The same when the connection froze before raid's first word on it.
func TestStopsWhileJoining(t *testing.T) {
	w := newWorld(t, nil)
	w.raid()
	dialled := make(chan struct{})
	p := w.runner(func(c *Config) {
		c.Dial = func(ctx context.Context) (*dial.Client, error) {
			client, err := w.dial(ctx)
			w.freeze()
			close(dialled)
			return client, err
		}
	})
	<-dialled
	p.kill(errors.New("second signal"))
	p.stopped(t, 30*time.Second)
}

// A warm box that died while it waited costs its job nothing.
func TestWarmBoxDied(t *testing.T) {
	w := newWorld(t, nil)
	w.engine.started = make(chan *fakeBox, 100)
	w.raid()
	w.runner(nil)
	for range 20 {
		b := <-w.engine.started
		b.Kill()
		<-b.dead
		out, stderr, status := w.say("submit -- again", nil)
		if out != "again\n" || status != 0 || strings.Contains(stderr, "attempt") {
			t.Fatalf("submit = %d, %q, %q, want 0, again, one attempt", status, out, stderr)
		}
		<-w.engine.started // the cold one
	}
}

// A box that lies harms nobody but its own job, and the runner takes the next one.
func TestBoxLies(t *testing.T) {
	gap := func(n uint64) []byte {
		return []byte{byte(n >> 56), byte(n >> 48), byte(n >> 40), byte(n >> 32), byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
	}
	raw := func(k job.Kind, p string) script {
		return func(b *fakeBox) { b.begin(); b.print("x\n"); b.send(k, []byte(p)) }
	}
	final := func(p string) script { return raw(job.Final, p) }
	scripts := map[string]script{
		"ready-again":   raw(job.Ready, ""),
		"begun-again":   raw(job.Begun, ""),
		"sealed":        raw(job.Sealed, ""),
		"order":         raw(job.Order, "{}"),
		"gap-60":        raw(job.Gap, string(gap(1<<60))),
		"gap-55":        func(b *fakeBox) { b.begin(); b.send(job.Gap, gap(1<<55)); b.end(job.Result{Reason: job.ReasonExit}) },
		"gap-0":         raw(job.Gap, string(gap(0))),
		"gap-short":     raw(job.Gap, "x"),
		"unknown":       func(b *fakeBox) { b.begin(); b.out.Write([]byte("Zxxxxxxxxxxxx")) },
		"huge-header":   func(b *fakeBox) { b.begin(); b.out.Write([]byte("o\xff\xff\xff\xff")) },
		"torn":          func(b *fakeBox) { b.begin(); b.out.Write([]byte("o\x00\x00\x00\x09abc")) },
		"silent":        func(b *fakeBox) { b.begin() },
		"final-text":    final("boom"),
		"final-deep":    final(strings.Repeat("[", 1<<19)),
		"final-steps":   final(`{"reason":"exit","exit":0,"steps":[` + strings.TrimSuffix(strings.Repeat("{},", 300000), ",") + `]}`),
		"final-note":    final(`{"reason":"exit","exit":1,"note":"` + strings.Repeat("<", 1<<19) + `"}`),
		"final-infra":   final(`{"reason":"infra","exit":125}`),
		"final-exit":    final(`{"reason":"exit","exit":4294967296}`),
		"final-unknown": final(`{"reason":"never heard","exit":0}`),
		"final-cancel":  final(`{"reason":"cancelled","exit":130}`),
		"final-twice": func(b *fakeBox) {
			b.begin()
			b.end(job.Result{Reason: job.ReasonExit, Exit: 1})
			b.end(job.Result{Reason: job.ReasonExit})
		},
		"late-output": func(b *fakeBox) { b.begin(); b.end(job.Result{Reason: job.ReasonExit, Exit: 1}); b.print("late\n") },
		"archive": func(b *fakeBox) {
			b.begin()
			for b.send(job.File, make([]byte, 1<<20)) == nil {
			}
		},
		"archive-junk": func(b *fakeBox) {
			b.begin()
			b.send(job.File, []byte("no tar"))
			b.end(job.Result{Reason: job.ReasonExit})
		},
	}
	passes := map[string]bool{"gap-55": true, "final-steps": true, "archive-junk": true}
	for name := range scripts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, scripts)
			w.raid()
			w.runner(nil)
			_, stderr, status := w.say("submit -- "+name, nil)
			if passes[name] != (status == 0) || status == job.ExitCancelled || status == job.ExitInfra {
				t.Errorf("submit = %d, want the job's failure; %s", status, stderr)
			}
			if j := w.job(1); j.Attempt != 1 || !j.State.Final() || j.State == job.Cancelled {
				t.Errorf("job = %s after attempt %d, want an end at the first", j.State, j.Attempt)
			}
			if out, stderr, status := w.say("submit -- next", nil); out != "next\n" || status != 0 {
				t.Errorf("the job after it = %d, %q, %q, want 0, next", status, out, stderr)
			}
		})
	}
}

// A box that will never be made is the job's end, said once, not raid's fault.
func TestRefusedImage(t *testing.T) {
	w := newWorld(t, nil)
	w.engine.refused = "evil/root"
	w.raid()
	w.runner(nil)
	file := "rai: {version: 0.2, image: evil/root}\ncommands: {build: [true]}\n"
	_, stderr, status := w.say("submit", tarOf(t, map[string][]byte{job.BuildFileName: []byte(file)}))
	if status != job.ExitRefused || !strings.Contains(stderr, `[box] allow = ["evil/root"]`) {
		t.Errorf("submit = %d, %q, want %d and what staff would add", status, stderr, job.ExitRefused)
	}
	if j := w.job(1); j.Attempt != 1 || j.State != job.Failed {
		t.Errorf("job %+v, want one attempt", j)
	}
}

// An engine that goes away under a job that has begun is no verdict on the job.
func TestEngineLost(t *testing.T) {
	tries := 0
	w := newWorld(t, map[string]script{"work": func(b *fakeBox) {
		b.begin()
		if tries++; tries == 1 {
			b.lost = true
			return
		}
		b.end(job.Result{Reason: job.ReasonExit})
	}})
	w.raid()
	w.runner(nil)
	_, stderr, status := w.say("submit -- work", nil)
	if status != 0 || !strings.Contains(stderr, "the fake engine went away") {
		t.Errorf("submit = %d, %q, want 0 at the second attempt", status, stderr)
	}
	if j := w.job(1); j.Attempt != 2 {
		t.Errorf("attempt %d, want 2", j.Attempt)
	}
}

// A build file whose commands grow beyond a frame on their way is refused at the door:
// no runner could be told of it.
func TestCommandsBeyondAFrame(t *testing.T) {
	for _, tt := range []struct {
		step string
		want int
	}{
		{strings.Repeat("<", 60<<10), job.ExitInput},
		{strings.Repeat("x", 60<<10), 0},
	} {
		w := newWorld(t, nil)
		w.raid()
		w.runner(nil)
		file := "rai: {version: 0.2}\ncommands:\n  build:\n    - echo '" + tt.step + "'\n"
		_, stderr, status := w.say("submit", tarOf(t, map[string][]byte{job.BuildFileName: []byte(file)}))
		if status != tt.want {
			t.Errorf("submit of %d times %.1q = %d, %.300q, want %d", len(tt.step), tt.step, status, stderr, tt.want)
		}
	}
}

// The runner's folder goes away under a job: that may cost output, not the verdict.
func TestFoldersVanish(t *testing.T) {
	for _, folder := range []string{"runner/attempts", "raid/incoming"} {
		t.Run(folder, func(t *testing.T) {
			reached, go_on := make(chan struct{}), make(chan struct{})
			w := newWorld(t, map[string]script{"work": func(b *fakeBox) {
				b.begin()
				b.print("first\n")
				close(reached)
				<-go_on
				for range 40 {
					b.send(job.Out, make([]byte, 64<<10))
				}
				b.end(job.Result{Reason: job.ReasonExit, Exit: 7})
			}})
			w.raid()
			w.runner(nil)
			w.say("submit --detach -- work", nil)
			<-reached
			if err := os.RemoveAll(filepath.Join(w.dir, folder)); err != nil {
				t.Fatal(err)
			}
			close(go_on)
			if _, stderr, status := w.say("attach 1", nil); status != 7 {
				t.Fatalf("attach = %d, %q; job = %+v, want exit 7", status, stderr, w.job(1))
			}
		})
	}
}

// A connection that breaks while the source is fetched costs no attempt.
func TestSourceSurvivesACut(t *testing.T) {
	w := newWorld(t, nil)
	w.raid()
	var cuts atomic.Int64
	w.runner(func(c *Config) {
		c.Dial = func(ctx context.Context) (*dial.Client, error) {
			client, err := w.dial(ctx)
			if n := cuts.Add(1); n < 4 && err == nil {
				w.cutAfter(n * 3 << 20)
			}
			return client, err
		}
	})
	data := make([]byte, 24<<20)
	rand.Read(data)
	_, stderr, status := w.say("submit -- echo", tarOf(t, map[string][]byte{"data": data}))
	if status != 0 || strings.Contains(stderr, "attempt 2") {
		t.Errorf("submit = %d, %q, want 0 at the first attempt", status, stderr)
	}
	w.engine.mu.Lock()
	b := w.engine.boxes[0]
	w.engine.mu.Unlock()
	<-b.dead
	if !bytes.Contains(b.source, data) {
		t.Errorf("the source arrived damaged: %d bytes", len(b.source))
	}
	if n := cuts.Load(); n < 4 {
		t.Errorf("%d connections, want 4", n)
	}
}

// What raid says of itself while it stops is not the source's fault.
func TestPasses(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{fmt.Errorf("open a session: %w", &ssh.OpenChannelError{Reason: ssh.ResourceShortage}), true},
		{fmt.Errorf("read: %w", dial.ErrLost), true},
		{errLater, true},
		{errors.New("raid refused with status 126"), false},
		{errors.New("unpack: broken pipe"), false},
	} {
		if got := passes(tt.err); got != tt.want {
			t.Errorf("passes(%v) = %v, want %v", tt.err, got, tt.want)
		}
	}
}

// After many jobs nothing is left: no goroutine, no folder, no open file.
func TestNothingLeaks(t *testing.T) {
	w := newWorld(t, nil)
	w.raid()
	p := w.runner(nil)
	w.say("submit -- first", nil)
	before, files := runtime.NumGoroutine(), openFiles(t)
	const jobs = 200 // of which the last may be on their way out
	for i := range jobs {
		if out, stderr, status := w.say(fmt.Sprintf("submit -- job %d", i), nil); out != fmt.Sprintf("job %d\n", i) || status != 0 {
			t.Fatalf("job %d = %d, %q, %q", i, status, out, stderr)
		}
	}
	if now := openFiles(t); now > files+jobs/2 {
		t.Errorf("%d open files, %d before", now, files)
	}
	if now := runtime.NumGoroutine(); now > before+jobs/2 {
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before\n%s", now, before, buf[:runtime.Stack(buf, true)])
	}
	p.Drain()
	p.stopped(t, 30*time.Second)
	if left := glob(t, w.dir, "runner/attempts/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func glob(t *testing.T, dir, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// until waits for what only the disk shows.
func until(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for late := time.After(30 * time.Second); !ok(); {
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("it has not come about")
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("no /proc: ", err)
	}
	return len(all)
}
