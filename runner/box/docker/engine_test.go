package docker_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/job"
)

func TestImages(t *testing.T) {
	standard := os.Getenv(envImage)
	e := newEngine(t, boxtest.ID(), func(c *docker.Config) { c.Images.Allow = []string{"raid-nowhere.invalid/*", "bad name"} })
	defer e.Close()
	if got := boxtest.Say(t, e, box.Config{Image: standard}, "echo fine"); got != "fine\n" {
		t.Errorf("the standard image by its name: %q, want fine", got)
	}
	for _, c := range []struct{ image, want string }{
		{"other/image", `[box] allow = ["other/image"]`},
		{"bad name", "no name of an image"},
	} {
		_, err := e.Start(t.Context(), box.Config{ID: "x", Image: c.image})
		var refused *box.RefusedError
		if !errors.As(err, &refused) || !strings.Contains(refused.Why, c.want) {
			t.Errorf("Start with image %q: %v, want a RefusedError with %q", c.image, err, c.want)
		}
	}
	// One that is allowed and not here is pulled, and its user is told. Here its registry
	// does not exist, which is nobody's fault but the machine's.
	var said []string
	_, err := e.Start(t.Context(), box.Config{ID: "x", Image: "raid-nowhere.invalid/x", Say: func(line string) { said = append(said, line) }})
	var refused *box.RefusedError
	if err == nil || errors.As(err, &refused) || len(said) == 0 || !strings.Contains(said[0], "pulling") {
		t.Errorf("Start with an image of no registry: %v after %q", err, said)
	}
	none := newEngine(t, boxtest.ID(), func(c *docker.Config) { c.Images = job.Images{Allow: []string{"x"}} })
	defer none.Close()
	if _, err := none.Start(t.Context(), box.Config{ID: "x"}); !errors.As(err, &refused) {
		t.Errorf("Start without any image: %v, want a RefusedError", err)
	}
}

func TestDigest(t *testing.T) {
	e := newEngine(t, boxtest.ID(), nil)
	defer e.Close()
	b, err := e.Start(t.Context(), box.Config{ID: "digest"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	i := b.(box.Imaged).Image()
	if !strings.HasPrefix(i.Digest, "sha256:") {
		t.Errorf("digest %q", i.Digest)
	}
	env := strings.Join(i.Env, " ")
	if !strings.Contains(env, "HOME=/root USER=root LOGNAME=root") || !strings.Contains(env, "FROM_IMAGE=yes") || strings.Contains(env, "NVIDIA") {
		t.Errorf("environment %q", env)
	}
}

// Root in a box may do to the files of others only what staff allowed.
func TestCaps(t *testing.T) {
	const line = "touch f; chown 1:1 f 2>/dev/null && stat -c %u f || echo refused"
	for _, c := range []struct {
		caps []string
		want string
	}{{nil, "refused\n"}, {[]string{"CHOWN", "DAC_OVERRIDE", "FOWNER"}, "1\n"}} {
		e := newEngine(t, boxtest.ID(), func(cfg *docker.Config) { cfg.Caps = c.caps })
		if got := boxtest.Say(t, e, box.Config{}, line); got != c.want {
			t.Errorf("with %v: %q, want %q", c.caps, got, c.want)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := docker.New(t.Context(), docker.Config{ID: "x", Exe: "/bin/true", Caps: []string{"SYS_ADMIN"}}); err == nil || !strings.Contains(err.Error(), "SYS_ADMIN") {
		t.Errorf("New with SYS_ADMIN: %v, want it refused", err)
	}
}

// What an image calls a volume is on the box's disk: its limit holds there, too.
func TestVolumes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("without root a box has no disk of its own")
	}
	e := newEngine(t, boxtest.ID(), nil)
	defer e.Close()
	got := boxtest.Say(t, e, box.Config{Limits: job.Limits{Disk: 16 << 20}}, "head -c 32M /dev/zero 2>/dev/null >/data/f || echo full")
	if got != "full\n" {
		t.Errorf("32 MiB into a volume beside a disk of 16: %q, want full", got)
	}
}

// A pool's data set is shown where the image has a volume.
func TestDataOverVolume(t *testing.T) {
	e := newEngine(t, boxtest.ID(), nil)
	defer e.Close()
	set, err := os.MkdirTemp("/var/tmp", "raid-data-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(set) })
	if err := errors.Join(os.Chmod(set, 0o755), os.WriteFile(filepath.Join(set, "words"), []byte("a data set\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	c := box.Config{Limits: job.Limits{Disk: 16 << 20}, Mounts: []box.Mount{{Host: set, Box: "/data"}}}
	if got := boxtest.Say(t, e, c, "cat /data/words"); got != "a data set\n" {
		t.Errorf("a box in an image whose volume is /data reads %q there, want the data set", got)
	}
}

// What is written beside the disk is measured.
func TestRootIsMeasured(t *testing.T) {
	e := newEngine(t, boxtest.ID(), nil)
	defer e.Close()
	b, err := e.Start(t.Context(), box.Config{ID: "root", Limits: job.Limits{Disk: 16 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	go io.Copy(io.Discard, b.Stdout())
	order(t, b, "head -c 64M /dev/zero >/usr/f; exec sleep 1000")
	if exit := b.Wait(); !exit.DiskFull {
		t.Errorf("exit %+v, want the disk limit", exit)
	}
}

func order(t *testing.T, b box.Box, step string) {
	t.Helper()
	if err := job.WriteFrame(b.Stdin(), job.Order, []byte(`{"spec":{"steps":["`+step+`"],"limits":{"time":0}},"env":["PATH=/usr/bin:/bin"]}`)); err != nil {
		t.Fatal(err)
	}
}

// A runner's sweep leaves the boxes of others alone, and its own that are open.
func TestSweep(t *testing.T) {
	mine, other := newEngine(t, boxtest.ID(), nil), newEngine(t, boxtest.ID(), nil)
	defer mine.Close()
	defer other.Close()
	for _, e := range []*docker.Engine{mine, other} {
		b, err := e.Start(t.Context(), box.Config{ID: "open"})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		defer func() {
			read, err := b.Stdout().Read(make([]byte, 1))
			if read != 1 || err != nil {
				t.Errorf("after sweeps a box says %d bytes, %v; want its first", read, err)
			}
		}()
	}
	for _, e := range []*docker.Engine{mine, other, mine} {
		if err := e.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// A line is a socket in front of the engine's that can be cut.
type line struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
	cut   bool
}

func newLine(t *testing.T) *line {
	t.Helper()
	dir, err := os.MkdirTemp("", "line") // short: a socket's path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &line{}
	if l.Listener, err = net.Listen("unix", filepath.Join(dir, "s")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.hangUp)
	go l.serve(strings.TrimPrefix(os.Getenv("DOCKER_HOST"), "unix://"))
	return l
}

func (l *line) serve(to string) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("unix", to)
		if err != nil || !l.keep(near, far) {
			near.Close()
			continue
		}
		go func() { io.Copy(far, l.through(near)); far.(*net.UnixConn).CloseWrite() }()
		go func() { io.Copy(near, l.through(far)); near.(*net.UnixConn).CloseWrite() }()
	}
}

// through reads from r until the line is cut: all connections end in one moment, as
// those of a process do.
func (l *line) through(r io.Reader) io.Reader {
	return readFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.cut {
			return 0, net.ErrClosed
		}
		return n, err
	})
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

func (l *line) keep(cs ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, cs...)
	return !l.cut
}

// hangUp is the death of the engine as a runner sees it.
func (l *line) hangUp() {
	l.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	for _, c := range l.conns {
		c.Close()
	}
}

// An engine that goes away is not the job's fault, and holds nobody up.
func TestEngineGoesAway(t *testing.T) {
	need(t)
	l := newLine(t)
	id := boxtest.ID()
	e := newEngine(t, id, func(c *docker.Config) { c.Host = "unix://" + l.Addr().String() })
	b, err := e.Start(t.Context(), box.Config{ID: "busy"})
	if err != nil {
		t.Fatal(err)
	}
	order(t, b, "echo busy; exec sleep 1000")
	b.Stdout().Read(make([]byte, 1))
	l.hangUp()
	io.Copy(io.Discard, b.Stdout()) // ends
	if exit := b.Wait(); !exit.Lost {
		t.Errorf("exit %+v, want the engine lost", exit)
	}
	if err := b.Close(); err == nil {
		t.Error("Close did not say that the container is still there")
	}
	if _, err := e.Start(t.Context(), box.Config{ID: "next"}); err == nil || errors.As(err, new(*box.RefusedError)) {
		t.Errorf("Start without an engine: %v", err)
	}
	if err := e.Sweep(t.Context()); err == nil {
		t.Error("Sweep without an engine worked")
	}
	if err := e.Close(); err == nil {
		t.Error("Close without an engine worked")
	}
	back := newEngine(t, id, nil) // sweeps
	if found := traces(t, id); len(found) > 0 {
		t.Errorf("left behind: %v", found)
	}
	if err := back.Close(); err != nil {
		t.Error(err)
	}
}

func TestNoEngine(t *testing.T) {
	host := "unix://" + filepath.Join(t.TempDir(), "none")
	if docker.Answers(t.Context(), host) {
		t.Error("nobody answers")
	}
	_, err := docker.New(t.Context(), docker.Config{ID: "x", Exe: "/bin/true", Host: host})
	if err == nil || !strings.Contains(err.Error(), "start it") || !strings.Contains(err.Error(), host) {
		t.Errorf("New without an engine: %v, want what to do", err)
	}
}

// TestConformanceAsUser runs the suite without root, as somebody in the socket's group.
func TestConformanceAsUser(t *testing.T) {
	if testing.Short() {
		t.Skip("the same code as TestConformance's, in another place")
	}
	need(t)
	if os.Geteuid() != 0 {
		t.Skip("TestConformance has just done that")
	}
	const uid = 31415
	i, err := os.Stat(strings.TrimPrefix(os.Getenv("DOCKER_HOST"), "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/var/tmp", "raid-as-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	test := filepath.Join(dir, "test")
	if out, err := exec.Command("install", "-m", "755", exe, test).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := errors.Join(os.Chown(dir, uid, uid), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, test, "-test.v", "-test.run=^TestConformance$")
	c.Dir = dir
	c.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	gid := i.Sys().(*syscall.Stat_t).Gid
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, Groups: []uint32{gid}}}
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("as uid %d: %v", uid, err)
	}
	if !strings.Contains(string(out), "the disk limit is only measured") {
		t.Error("the engine did not say what does not hold without root")
	}
}
