package bwrap

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/job"
)

// fakeGroup makes a folder with the named control files, empty.
func fakeGroup(t *testing.T, dir string, files ...string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func content(t *testing.T, dir, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLimitV2(t *testing.T) {
	for _, c := range []struct {
		limits job.Limits
		want   map[string]string
	}{
		{job.Limits{Memory: 1 << 30, Pids: 64, CPUs: 1.5},
			map[string]string{"memory.max": "1073741824", "memory.swap.max": "0", "pids.max": "64", "cpu.max": "150000 100000"}},
		{job.Limits{},
			map[string]string{"memory.max": "max", "memory.swap.max": "max", "pids.max": "max", "cpu.max": "max 100000"}},
		{job.Limits{CPUs: 0.001},
			map[string]string{"memory.max": "max", "memory.swap.max": "max", "pids.max": "max", "cpu.max": "1000 100000"}},
	} {
		g := &group{v2: fakeGroup(t, t.TempDir(), "memory.max", "memory.swap.max", "pids.max", "cpu.max")}
		if err := g.limit(c.limits); err != nil {
			t.Errorf("limit(%+v): %v", c.limits, err)
		}
		for file, want := range c.want {
			if got := content(t, g.v2, file); got != want {
				t.Errorf("limit(%+v) wrote %q to %s, want %q", c.limits, got, file, want)
			}
		}
	}
}

func TestLimitV2Missing(t *testing.T) {
	// A kernel without swap and a subtree without cpu do; one without pids does not.
	g := &group{v2: fakeGroup(t, t.TempDir(), "memory.max", "pids.max")}
	if err := g.limit(job.Limits{Memory: 1, Pids: 1, CPUs: 1}); err != nil {
		t.Errorf("limit without swap and cpu: %v", err)
	}
	g = &group{v2: fakeGroup(t, t.TempDir(), "memory.max", "memory.swap.max", "cpu.max")}
	if err := g.limit(job.Limits{Pids: 1}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("limit without pids: %v, want ErrNotExist", err)
	}
}

func TestLimitV1(t *testing.T) {
	top := t.TempDir()
	files := []string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes", "pids.max", "cpu.cfs_quota_us"}
	var g group
	for _, c := range controllers {
		g.v1 = append(g.v1, tree{has: c, dir: fakeGroup(t, filepath.Join(top, c), files...)})
	}
	if err := g.limit(job.Limits{Memory: 4096, Pids: 7, CPUs: 2}); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"memory/memory.limit_in_bytes": "4096", "memory/memory.memsw.limit_in_bytes": "4096",
		"memory/memory.kmem.tcp.limit_in_bytes": "4096", "pids/pids.max": "7", "cpu/cpu.cfs_quota_us": "200000"} {
		if got := content(t, top, file); got != want {
			t.Errorf("limit wrote %q to %s, want %q", got, file, want)
		}
	}
	if err := g.limit(job.Limits{}); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"memory/memory.limit_in_bytes": "-1", "pids/pids.max": "max", "cpu/cpu.cfs_quota_us": "-1"} {
		if got := content(t, top, file); got != want {
			t.Errorf("no limit wrote %q to %s, want %q", got, file, want)
		}
	}
}

func TestOOMs(t *testing.T) {
	v2 := fakeGroup(t, t.TempDir())
	os.WriteFile(filepath.Join(v2, "memory.events"), []byte("low 0\nhigh 0\nmax 12\noom 4\noom_kill 3\noom_group_kill 0\n"), 0o644)
	if got := (&group{v2: v2}).ooms(); got != 3 {
		t.Errorf("ooms() = %d, want 3", got)
	}
	v1 := fakeGroup(t, t.TempDir())
	os.WriteFile(filepath.Join(v1, "memory.oom_control"), []byte("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 0o644)
	if got := (&group{v1: []tree{{has: "memory", dir: v1}}}).ooms(); got != 2 {
		t.Errorf("ooms() = %d, want 2", got)
	}
	if got := (&group{}).ooms(); got != 0 {
		t.Errorf("ooms() = %d without a cgroup, want 0", got)
	}
}

func TestPlant(t *testing.T) {
	top := t.TempDir()
	own := filepath.Join(top, "user.slice", "app.slice", "job.scope")
	fakeGroup(t, own)                                                            // hands nothing on
	app := fakeGroup(t, filepath.Dir(own), "cgroup.subtree_control")             // ours
	mine := fakeGroup(t, filepath.Join(app, "raid-x"), "cgroup.subtree_control") // as the kernel would fill it
	if got := plant(top, own, "x", false); got != mine {
		t.Errorf("plant for a user = %q, want %q", got, mine)
	}
	if got := plant(top, own, "x", true); got != "" {
		t.Errorf("plant for root = %q, want none: the top hands nothing on", got)
	}
	fakeGroup(t, top, "cgroup.subtree_control")
	fakeGroup(t, filepath.Join(top, "raid"), "cgroup.subtree_control")
	home := fakeGroup(t, filepath.Join(top, "raid", "x"), "cgroup.subtree_control")
	if got := plant(top, own, "x", true); got != home {
		t.Errorf("plant for root = %q, want %q", got, home)
	}
	if got := plant(top, "/elsewhere", "x", true); got != "" {
		t.Errorf("plant outside of the mount = %q, want none", got)
	}
}

// TestGroupV2 uses a real v2 group; the controllers may all be bound to v1.
func TestGroupV2(t *testing.T) {
	mounts, err := machine.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	dir := ""
	for _, m := range mounts {
		if m.Kind == "cgroup2" {
			dir = filepath.Join(m.At, "raid-test-group-v2")
		}
	}
	if dir == "" || os.Mkdir(dir, 0o755) != nil {
		t.Skip("no cgroup2 to write to")
	}
	t.Cleanup(func() { os.Remove(dir) })
	g := &group{v2: dir}
	if g.name() != "raid-test-group-v2" {
		t.Errorf("name() = %q", g.name())
	}
	c := exec.Command("sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000")
	c.SysProcAttr = &syscall.SysProcAttr{}
	runtime.LockOSThread()
	stray, err := g.start(c)
	runtime.UnlockOSThread()
	if stray || err != nil {
		t.Fatalf("start: %v, %v", stray, err)
	}
	if pids := g.pids(); len(pids) == 0 || pids[0] != c.Process.Pid {
		t.Errorf("pids() = %v, want %d first", pids, c.Process.Pid)
	}
	g.kill()
	c.Wait()
	if err := errors.Join(g.drain(), g.remove()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there", dir)
	}
}

// TestThreadGoesHome: the thread that forks a box must not stay in its cgroup, or the
// box's kill would be the runner's.
func TestThreadGoesHome(t *testing.T) {
	f, _ := findForest("test-thread")
	defer f.remove()
	if len(f.v1) == 0 {
		t.Skip("no cgroup v1 to write to")
	}
	g, err := f.make("x", job.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := content(t, "/proc/thread-self", "cgroup")
	c := exec.Command("cat", "/proc/self/cgroup")
	var out strings.Builder
	c.Stdout, c.SysProcAttr = &out, &syscall.SysProcAttr{}
	if stray, err := g.start(c); stray || err != nil {
		t.Fatalf("start: %v, %v", stray, err)
	}
	if after := content(t, "/proc/thread-self", "cgroup"); after != before {
		t.Errorf("the thread is in\n%s, was in\n%s", after, before)
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(out.String(), "/raid/test-thread/x\n"); got != len(f.v1) {
		t.Errorf("the child is in\n%s, want %d of ours", out.String(), len(f.v1))
	}
	if err := errors.Join(g.drain(), g.remove()); err != nil {
		t.Error(err)
	}
}
