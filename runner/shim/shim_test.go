package shim

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
)

// roleVar tells a child process of the tests what it is.
const roleVar = "RAID_SHIM_TEST"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case "shim":
		grace, err := time.ParseDuration(os.Getenv("GRACE"))
		if err != nil {
			panic(err)
		}
		s := Shim{Src: os.Getenv("SRC"), Build: os.Getenv("BUILD"), Home: "/home/test", Grace: grace}
		os.Exit(s.Run())
	case "attack":
		os.Exit(attack())
	}
	os.Exit(runTests(m))
}

// exeVar names the copy of the test binary that any user may run.
const exeVar = "RAID_SHIM_EXE"

// runTests makes that copy: the folder that go test builds in is closed to others.
func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "raid-shim-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		panic(err)
	}
	exe := filepath.Join(dir, "exe")
	if err := errors.Join(os.WriteFile(exe, data, 0o755), os.Chmod(dir, 0o755), os.Setenv(exeVar, exe)); err != nil {
		panic(err)
	}
	return m.Run()
}

// need skips the test when the tool is missing, except where it must not be.
func need(t *testing.T, ok bool, what string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("RAID_CI") == "1" {
		t.Fatalf("needs %s", what)
	}
	t.Skipf("needs %s", what)
}

// A box is a shim in a child process, seen as a runner sees it.
type box struct {
	t        *testing.T
	cmd      *exec.Cmd
	in       *os.File
	frames   *job.FrameReader
	stderr   bytes.Buffer
	dir      string
	src      string
	build    string
	fifoPath string
}

// namespace starts what follows as PID 1 of a PID namespace, as an ordinary user.
func namespace(t *testing.T) []string {
	t.Helper()
	var args []string
	if os.Getuid() == 0 {
		args = []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"}
	}
	return bwrap(t, append(args, "bwrap"))
}

// rootNamespace does so as root without capabilities, which is what Docker gives.
func rootNamespace(t *testing.T) []string {
	t.Helper()
	need(t, os.Getuid() == 0, "root")
	return bwrap(t, []string{"bwrap"})
}

func bwrap(t *testing.T, args []string) []string {
	t.Helper()
	args = append(args, "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-user", "--unshare-pid",
		"--uid", "1000", "--gid", "1000", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL")
	out, err := exec.Command(args[0], append(args[1:], "true")...).CombinedOutput()
	need(t, err == nil, fmt.Sprintf("bwrap that works: %v %s", err, out))
	return args
}

// newBox starts a shim behind the command wrap, which may be none.
func newBox(t *testing.T, grace time.Duration, wrap ...string) *box {
	t.Helper()
	b := &box{t: t, dir: t.TempDir()}
	b.src, b.build, b.fifoPath = filepath.Join(b.dir, "src"), filepath.Join(b.dir, "build"), filepath.Join(b.dir, "fifo")
	if err := errors.Join(os.Chmod(filepath.Dir(b.dir), 0o755), os.Chmod(b.dir, 0o777)); err != nil {
		t.Fatal(err) // whoever the shim will be has to get there
	}
	argv := append(wrap, os.Getenv(exeVar))
	b.cmd = exec.Command(argv[0], argv[1:]...)
	b.cmd.Env = append(os.Environ(), roleVar+"=shim", "GORACE=atexit_sleep_ms=0", "GRACE="+grace.String(), "SRC="+b.src, "BUILD="+b.build)
	b.cmd.Stderr = &b.stderr
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	b.cmd.Stdin, b.cmd.Stdout = inR, outW
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	inR.Close()
	outW.Close()
	b.in, b.frames = inW, job.NewFrameReader(outR)
	watchdog := time.AfterFunc(60*time.Second, func() { b.cmd.Process.Kill() })
	t.Cleanup(func() {
		inW.Close()
		outR.Close()
		b.cmd.Wait()
		watchdog.Stop()
		if t.Failed() && b.stderr.Len() > 0 {
			t.Logf("stderr of the shim:\n%s", b.stderr.String())
		}
	})
	b.expect(job.Ready)
	return b
}

// next returns the next frame.
func (b *box) next() (job.Kind, []byte) {
	b.t.Helper()
	k, p, err := b.frames.Next()
	if err != nil {
		b.t.Fatalf("next frame: %v", err)
	}
	return k, p
}

// expect reads on to the first frame of kind k and returns its payload.
func (b *box) expect(k job.Kind) []byte {
	b.t.Helper()
	for {
		got, p := b.next()
		if got == k {
			return p
		}
		if got == job.Final {
			b.t.Fatalf("Final frame %s, want kind %q", p, byte(k))
		}
	}
}

// expectOut reads on until the steps have printed text.
func (b *box) expectOut(text string) {
	b.t.Helper()
	for out := ""; !strings.Contains(out, text); {
		out += string(b.expect(job.Out))
	}
}

func (b *box) send(k job.Kind, p []byte) {
	b.t.Helper()
	if err := job.WriteFrame(b.in, k, p); err != nil {
		b.t.Fatalf("send kind %q: %v", byte(k), err)
	}
}

// order sends o with an environment that finds the test's folders.
func (b *box) order(o job.BoxOrder) {
	b.t.Helper()
	o.Env = append(o.Env, "PATH=/usr/local/bin:/usr/bin:/bin", "SRC="+b.src, "FIFO="+b.fifoPath)
	b.send(job.Order, marshal(o))
}

// fifo makes $FIFO, which steps hold open to be missed by gone.
func (b *box) fifo() {
	b.t.Helper()
	if err := errors.Join(syscall.Mkfifo(b.fifoPath, 0o666), os.Chmod(b.fifoPath, 0o666)); err != nil {
		b.t.Fatal(err)
	}
}

// gone waits until no process holds the fifo.
func (b *box) gone() {
	b.t.Helper()
	fd, err := syscall.Open(b.fifoPath, syscall.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "fifo")
	defer f.Close()
	f.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, f); err != nil {
		b.t.Fatalf("processes are left that hold %s: %v", b.fifoPath, err)
	}
}

// A report is all that a box said after its order.
type report struct {
	job.Result
	out, err, raid string
	marks          []job.Step
	kinds          string // in order, repetitions left out
	largest        int    // payload of output
	tar            []byte
}

// wait reads to the end and checks what holds for every job.
func (b *box) wait() report {
	b.t.Helper()
	var r report
	for {
		k, p := b.next()
		if n := len(r.kinds); n == 0 || r.kinds[n-1] != byte(k) {
			r.kinds += string(byte(k))
		}
		switch k {
		case job.Out:
			r.out, r.largest = r.out+string(p), max(r.largest, len(p))
		case job.Err:
			r.err, r.largest = r.err+string(p), max(r.largest, len(p))
		case job.Raid:
			r.raid += string(p) + "\n"
		case job.Mark:
			var st job.Step
			b.decode(p, &st)
			r.marks = append(r.marks, st)
		case job.File:
			r.tar = append(r.tar, p...)
			if len(p) > fileFrame {
				b.t.Errorf("File frame of %d bytes, want at most %d", len(p), fileFrame)
			}
		case job.Final:
			b.decode(p, &r.Result)
			if _, _, err := b.frames.Next(); err != io.EOF {
				b.t.Errorf("after Final: %v, want EOF", err)
			}
			if err := b.cmd.Wait(); err != nil {
				b.t.Errorf("shim: %v", err)
			}
			return r
		}
	}
}

func (b *box) decode(p []byte, v any) {
	b.t.Helper()
	if err := json.Unmarshal(p, v); err != nil {
		b.t.Fatalf("decode %q: %v", p, err)
	}
}

// files lists the archive of a report as name → content.
func (r *report) files(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	for tr := tar.NewReader(bytes.NewReader(r.tar)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatalf("archive: %v", err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatalf("archive: %v", err)
		}
		files[strings.TrimPrefix(h.Name, "./")] = string(data)
	}
}

// run runs steps in a fresh box.
func run(t *testing.T, spec job.Spec) report {
	t.Helper()
	b := newBox(t, time.Second)
	b.order(job.BoxOrder{Spec: spec})
	return b.wait()
}

func TestVerdicts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		spec   job.Spec
		reason job.Reason
		exit   int
		signal string
		out    string
		ran    int
	}{
		{"success", job.Spec{Steps: []string{"echo a", "echo b"}}, job.ReasonExit, 0, "", "a\nb\n", 2},
		{"exit status", job.Spec{Steps: []string{"exit 7"}}, job.ReasonExit, 7, "", "", 1},
		{"stop at the first failure", job.Spec{Steps: []string{"echo a; false", "echo b"}}, job.ReasonExit, 1, "", "a\n", 1},
		{"keep going", job.Spec{Steps: []string{"exit 3", "echo b", "exit 4"}, KeepGoing: true}, job.ReasonExit, 3, "", "b\n", 3},
		{"signal", job.Spec{Steps: []string{"kill -SEGV $$"}}, job.ReasonSignal, 139, "SIGSEGV", "", 1},
		{"real-time signal", job.Spec{Steps: []string{"kill -40 $$"}}, job.ReasonSignal, 168, "SIG40", "", 1},
		{"signal of a child", job.Spec{Steps: []string{"sh -c 'kill -9 $$' 2>/dev/null; exit $?"}}, job.ReasonExit, 137, "", "", 1},
		{"no such command", job.Spec{Steps: []string{"/no/such 2>/dev/null"}}, job.ReasonExit, 127, "", "", 1},
		{"no permission", job.Spec{Steps: []string{"/etc/passwd 2>/dev/null"}}, job.ReasonExit, 126, "", "", 1},
		{"NUL in a line", job.Spec{Steps: []string{"echo \x00"}}, job.ReasonExit, 126, "", "", 1},
		{"the folder is gone", job.Spec{Steps: []string{`rmdir "$PWD"`, "echo b"}}, job.ReasonExit, 127, "", "", 2},
		{"a real shell", job.Spec{Steps: []string{`x=(1 2); echo "${x[1]}"`}}, job.ReasonExit, 0, "", "2\n", 1},
		{"stdin is empty", job.Spec{Steps: []string{"cat; echo $?"}}, job.ReasonExit, 0, "", "0\n", 1},
		{"kill 0 stays in the step", job.Spec{Steps: []string{"kill -9 0"}}, job.ReasonSignal, 137, "SIGKILL", "", 1},
		{"descriptors", job.Spec{Steps: []string{"ls /proc/$$/fd; true"}}, job.ReasonExit, 0, "", "0\n1\n2\n", 1},
		{"steps go first when memory ends", job.Spec{Steps: []string{"cat /proc/self/oom_score_adj"}}, job.ReasonExit, 0, "", "1000\n", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := run(t, tt.spec)
			if r.Reason != tt.reason || r.Exit != tt.exit || r.Signal != tt.signal {
				t.Errorf("result %s %d %q, want %s %d %q", r.Reason, r.Exit, r.Signal, tt.reason, tt.exit, tt.signal)
			}
			if r.out != tt.out {
				t.Errorf("stdout %q, want %q", r.out, tt.out)
			}
			if len(r.Steps) != tt.ran || len(r.marks) != 2*tt.ran || !r.Begun {
				t.Errorf("%d steps, %d marks, begun %v; want %d, %d, true", len(r.Steps), len(r.marks), r.Begun, tt.ran, 2*tt.ran)
			}
		})
	}
}

func TestNoStepsIsNoPass(t *testing.T) {
	r := run(t, job.Spec{})
	if r.Reason != job.ReasonInfra || r.Exit != job.ExitInfra || r.Begun || r.kinds != "z" {
		t.Errorf("result %+v with frames %q, want infra and Final alone", r.Result, r.kinds)
	}
}

func TestOutputKeptApartAndOrdered(t *testing.T) {
	r := run(t, job.Spec{Steps: []string{"echo out; echo err >&2", "printf two"}})
	if r.out != "out\ntwo" || r.err != "err\n" {
		t.Errorf("stdout %q, stderr %q", r.out, r.err)
	}
	if r.kinds != "bsoesosfz" && r.kinds != "bseososfz" {
		t.Errorf("frames %q, want begun, mark, output, mark, output, mark, file, final", r.kinds)
	}
	if !r.marks[0].Begin || r.marks[1].Begin || r.marks[1].N != 1 || r.marks[1].Of != 2 || r.marks[1].Line == "" {
		t.Errorf("marks %+v", r.marks)
	}
}

func TestAccounting(t *testing.T) {
	r := run(t, job.Spec{Steps: []string{"for ((i=0; i<300000; i++)); do :; done"}})
	st := r.Steps[0]
	if st.UserMS < 20 || st.WallMS < st.UserMS/2 || st.RSSKiB < 1000 || r.RunMS < st.WallMS {
		t.Errorf("step %+v of %d ms: times or memory missing", st, r.RunMS)
	}
}

func TestFirstByteComesAtOnce(t *testing.T) {
	b := newBox(t, time.Second)
	b.fifo()
	b.order(job.BoxOrder{Spec: job.Spec{Steps: []string{`printf now; read x <"$FIFO"`}}})
	if got := string(b.expect(job.Out)); got != "now" {
		t.Fatalf("output %q, want %q while the step still runs", got, "now")
	}
	f, err := os.OpenFile(b.fifoPath, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("go\n")
	f.Close()
	if r := b.wait(); r.Exit != 0 {
		t.Errorf("result %+v", r.Result)
	}
}

func TestFlood(t *testing.T) {
	const total = 32 << 20
	r := run(t, job.Spec{Steps: []string{fmt.Sprintf("head -c %d /dev/zero", total)}})
	if len(r.out) != total || r.largest > outFrame {
		t.Errorf("%d bytes in frames of up to %d, want %d in at most %d", len(r.out), r.largest, total, outFrame)
	}
}

func TestManySteps(t *testing.T) {
	steps := make([]string, 1200)
	for i := range steps {
		steps[i] = ": " + strings.Repeat("x", 400)
	}
	steps[len(steps)-1] = "exit 9"
	r := run(t, job.Spec{Steps: steps})
	if r.Exit != 9 || len(r.Steps) != maxSteps || len(r.marks) != 2*len(steps) {
		t.Errorf("exit %d, %d steps, %d marks", r.Exit, len(r.Steps), len(r.marks))
	}
}

func TestLongLine(t *testing.T) {
	for _, n := range []int{maxArg, maxArg + 1, 300 << 10} {
		line := "echo ${#x} $0 # "
		line = "x=" + strings.Repeat("y", n-len(line)-3) + "; " + line
		r := run(t, job.Spec{Steps: []string{line}})
		if r.Exit != 0 || !strings.HasPrefix(r.out, strconv.Itoa(n-len("echo ${#x} $0 # ")-3)+" ") {
			t.Errorf("line of %d bytes: exit %d, stdout %.80q, raid %.80q", len(line), r.Exit, r.out, r.raid)
		}
	}
}

func TestEnvironment(t *testing.T) {
	b := newBox(t, time.Second)
	b.order(job.BoxOrder{Spec: job.Spec{Steps: []string{`env | grep -v -e ^_= -e ^SHLVL= | sort`}}, Env: []string{"A=1", "TMPDIR=/x"}})
	want := fmt.Sprintf("A=1\nFIFO=%s\nHOME=/home/test\nPATH=/usr/local/bin:/usr/bin:/bin\nPWD=%s\nSRC=%s\nTMPDIR=/x\n", b.fifoPath, b.build, b.src)
	if r := b.wait(); r.out != want {
		t.Errorf("environment\n%s\nwant\n%s", r.out, want)
	}
}

func TestTTY(t *testing.T) {
	r := run(t, job.Spec{TTY: true, Steps: []string{
		`test -t 0 && test -t 1 && ! test -t 2 && echo yes`,
		`stty size; echo $TERM; echo err >&2; tty >/dev/null && echo x >/dev/tty`,
		`read x; echo "read $?"`,
		`head -c 200000 /dev/zero | tr '\0' x`,
	}})
	want := "yes\r\n24 80\r\nxterm-256color\r\nx\r\nread 1\r\n"
	if r.Exit != 0 || r.err != "err\n" || !strings.HasPrefix(r.out, want) {
		t.Errorf("exit %d, stdout %.100q, stderr %q, raid %q; want stdout %q", r.Exit, r.out, r.err, r.raid, want)
	}
	if got := len(r.out) - len(want); got != 200000 {
		t.Errorf("the last step's output is %d bytes, want 200000", got)
	}
}

// tarOf returns a tar of the files, name → content.
func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// source sends data in small frames and ends it.
func (b *box) source(data []byte) {
	b.t.Helper()
	for len(data) > 0 {
		n := min(len(data), 10000)
		b.send(job.File, data[:n])
		data = data[n:]
	}
	b.send(job.File, nil)
}

func TestSourceInBuildOut(t *testing.T) {
	b := newBox(t, time.Second)
	big := strings.Repeat("0123456789abcdef", 100_000)
	b.order(job.BoxOrder{Source: true, Spec: job.Spec{Steps: []string{`cp -r "$SRC"/. .; echo made > made; mkfifo pipe; cat a.txt`}}})
	b.source(tarOf(t, map[string]string{"a.txt": "hello", "sub/big": big}))
	r := b.wait()
	files := r.files(t)
	if r.out != "hello" || files["a.txt"] != "hello" || files["made"] != "made\n" || files["sub/big"] != big {
		t.Errorf("stdout %q, %d files, raid %q", r.out, len(files), r.raid)
	}
}

func TestArtifactLimit(t *testing.T) {
	r := run(t, job.Spec{Limits: job.Limits{Artifact: 1000}, Steps: []string{"head -c 5000 /dev/zero >big; echo x >small"}})
	files := r.files(t)
	if _, ok := files["big"]; ok || files["small"] != "x\n" {
		t.Errorf("archive has %d files, want small and not big", len(files))
	}
	if !strings.Contains(r.raid, "left out 1 file of /build") || !strings.Contains(r.Note, "big") || r.Exit != 0 {
		t.Errorf("raid %q, note %q, exit %d", r.raid, r.Note, r.Exit)
	}
}

func TestBadSource(t *testing.T) {
	b := newBox(t, time.Second)
	b.order(job.BoxOrder{Source: true, Spec: job.Spec{Steps: []string{"echo ran"}}})
	b.source(bytes.Repeat([]byte("no tar "), 100_000))
	r := b.wait()
	if r.Reason != job.ReasonInfra || r.Exit != job.ExitInfra || r.Begun || r.kinds != "z" || !strings.Contains(r.Note, "unpack") {
		t.Errorf("result %+v with frames %q, want infra and Final alone", r.Result, r.kinds)
	}
}

func TestSourceLargerThanDisk(t *testing.T) {
	wrap := namespace(t)
	b := newBox(t, time.Second, append(wrap, "--size", "1000000", "--tmpfs", "/mnt", "--setenv", "SRC", "/mnt/src")...)
	b.order(job.BoxOrder{Source: true, Spec: job.Spec{Steps: []string{"echo ran"}}})
	b.source(tarOf(t, map[string]string{"big": strings.Repeat("x", 3_000_000)}))
	r := b.wait()
	if r.Reason != job.ReasonDiskLimit || r.Exit != job.ExitLimit || r.out != "" || r.Begun || !strings.Contains(r.Note, "no space left") {
		t.Errorf("result %+v, want disk-limit", r.Result)
	}
}

func TestStopDuringSource(t *testing.T) {
	b := newBox(t, time.Second)
	b.order(job.BoxOrder{Source: true, Spec: job.Spec{Steps: []string{"echo ran"}}})
	b.send(job.File, tarOf(t, map[string]string{"a": "b"})[:512])
	b.send(job.Stop, []byte(job.ReasonCancelled))
	r := b.wait()
	if r.Reason != job.ReasonCancelled || r.Exit != job.ExitCancelled || r.Begun || r.out != "" {
		t.Errorf("result %+v, want cancelled before it began", r.Result)
	}
}

func TestStop(t *testing.T) {
	for _, tt := range []struct {
		name  string
		line  string
		grace time.Duration
		stops int
		out   string
	}{
		{"obeyed", `trap 'echo bye; exit 0' TERM; sleep 1000 & echo ready; wait`, 10 * time.Second, 1, "bye\n"},
		{"grace is for all", `bash -c 'trap "sleep 0.3; echo late; exit" TERM; sleep 1000 & echo ready; wait'; exit 1`, 10 * time.Second, 1, "late\n"},
		{"wakes the stopped", `trap 'echo bye; exit 0' TERM; (echo ready; kill -STOP $$); while :; do sleep 0.1; done`, 10 * time.Second, 1, "bye\n"},
		{"ignored", `trap '' TERM; echo ready; sleep 1000; sleep 1000`, 100 * time.Millisecond, 1, ""},
		{"twice", `trap '' TERM; echo ready; sleep 1000; sleep 1000`, time.Hour, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, tt.grace)
			b.order(job.BoxOrder{Spec: job.Spec{Steps: []string{tt.line, "echo next"}, KeepGoing: true}})
			b.expectOut("ready\n")
			for range tt.stops {
				b.send(job.Stop, []byte("output-limit"))
			}
			r := b.wait()
			if r.Reason != job.ReasonOutputLimit || r.Exit != job.ExitLimit || r.out != tt.out || len(r.Steps) != 1 {
				t.Errorf("result %s %d, stdout %q, %d steps; want output-limit 153, %q, 1", r.Reason, r.Exit, r.out, len(r.Steps), tt.out)
			}
			if !strings.HasSuffix(r.kinds, "fz") {
				t.Errorf("frames %q, want an archive before the result", r.kinds)
			}
		})
	}
}

func TestTimeLimit(t *testing.T) {
	began := time.Now()
	r := run(t, job.Spec{Limits: job.Limits{Time: 300 * time.Millisecond}, Steps: []string{"echo first", "echo kept >kept; sleep 1000", "echo never"}})
	if r.Reason != job.ReasonTimeout || r.Exit != job.ExitTimeout || r.out != "first\n" || len(r.Steps) != 2 || r.Steps[1].Signal != "SIGTERM" {
		t.Errorf("result %+v, stdout %q; want a timeout in the second step", r.Result, r.out)
	}
	if files := r.files(t); files["kept"] != "kept\n" {
		t.Errorf("archive %q, want what was made until then", files)
	}
	if d := time.Since(began); d < 300*time.Millisecond || r.RunMS < 300 {
		t.Errorf("took %v, reported %d ms; want at least the limit", d, r.RunMS)
	}
}

func TestEndOfInputKills(t *testing.T) {
	for name, wrap := range map[string]func(*testing.T) []string{"bare": func(*testing.T) []string { return nil }, "namespace": namespace} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, time.Hour, wrap(t)...)
			b.fifo()
			b.order(job.BoxOrder{Spec: job.Spec{Steps: []string{`trap '' TERM; exec 9<>"$FIFO"; setsid sleep 1000 & echo ready; cat /dev/zero`}}})
			b.expectOut("ready\n")
			b.in.Close() // while the shim is blocked in output that nobody reads
			b.gone()
			if err := b.cmd.Wait(); err == nil {
				t.Error("the shim said it had done its work")
			}
		})
	}
}

func TestStopReachesAFloodNobodyReads(t *testing.T) {
	b := newBox(t, 50*time.Millisecond)
	b.fifo()
	b.order(job.BoxOrder{Spec: job.Spec{Steps: []string{`trap '' TERM; exec 9<>"$FIFO"; echo ready; cat /dev/zero`}}})
	b.expectOut("ready\n")
	b.send(job.Stop, []byte(job.ReasonCancelled))
	b.gone()
	if r := b.wait(); r.Reason != job.ReasonCancelled {
		t.Errorf("result %+v, want cancelled", r.Result)
	}
}

func TestDaemonDoesNotOutliveTheSteps(t *testing.T) {
	for name, wrap := range map[string]func(*testing.T) []string{"bare": func(*testing.T) []string { return nil }, "namespace": namespace} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, time.Second, wrap(t)...)
			b.fifo()
			b.order(job.BoxOrder{Spec: job.Spec{Steps: []string{
				`exec 9<>"$FIFO"; setsid bash -c 'trap "" TERM HUP; echo up; while sleep 0.01; do echo x >>log; done' & until test -s log; do sleep 0.01; done`,
				"echo second",
			}}})
			for {
				if k, p := b.next(); k == job.Mark && bytes.Contains(p, []byte(`"n":2`)) {
					break
				}
			}
			b.expect(job.File) // the archive begins only when all are gone
			b.gone()
			r := b.wait()
			if r.Exit != 0 || r.Note != "" {
				t.Errorf("result %+v; want 0 and an archive that did not change", r.Result)
			}
		})
	}
}

func TestThreadsAndMemory(t *testing.T) {
	b := newBox(t, time.Second)
	steps := []string{"head -c 3000000 /dev/urandom >big"}
	for range 20 {
		steps = append(steps, "head -c 1000000 /dev/zero; head -c 100000 /dev/zero >&2 & cat /dev/null")
	}
	status := func(name string) int {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(data), name+":")
		n, err := strconv.Atoi(strings.Fields(rest)[0])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := status("Threads")
	b.order(job.BoxOrder{Spec: job.Spec{Steps: steps}})
	b.expect(job.File) // more is to come, so the shim is blocked in a write
	if after := status("Threads"); after > before {
		t.Errorf("%d threads, %d before the order", after, before)
	}
	if rss := status("RssAnon"); rss > 6000 && !withRace {
		t.Errorf("%d KiB of memory, want at most 6000", rss)
	}
	if r := b.wait(); r.Exit != 0 {
		t.Errorf("result %+v", r.Result)
	}
}

func TestNonsenseOnStdin(t *testing.T) {
	frame := func(k job.Kind, p string) string { return string(job.AppendFrame(nil, k, []byte(p))) }
	good := frame(job.Order, `{"spec":{"steps":["sleep 1000"],"limits":{"time":0}}}`)
	for _, in := range []string{"", "x", "q\xff\xff\xff\xff", frame(job.Stop, "cancelled"), frame(job.Order, "{"), frame(job.Order, `{"spec":[]}`),
		good, good + frame(job.Ready, ""), good + "zzz", good + frame(job.Order, "{}")} {
		b := newBox(t, time.Hour)
		b.in.WriteString(in)
		b.in.Close()
		for {
			k, _, err := b.frames.Next()
			if err != nil {
				break
			}
			if k == job.Final {
				t.Errorf("stdin %q got a result", in)
			}
		}
		if err := b.cmd.Wait(); err == nil || b.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("stdin %q: %v, want exit status 1", in, err)
		}
	}
}
