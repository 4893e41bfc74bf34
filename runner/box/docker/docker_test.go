package docker_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/client"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/box/docker/dockertest"
	"github.com/rai-project/raid/runner/job"
)

// The engine and the image are shared by all tests of this binary, and by the binary
// when it plays a runner.
const envImage = "RAID_DOCKERTEST_IMAGE"

// why says why there is no engine to test with; "" if there is one.
var why string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "shim" || os.Args[1] == "attack") || os.Getenv(envImage) != "" {
		boxtest.Main(m)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	lab, err = dockertest.Open(exe)
	if err != nil {
		why = err.Error()
		return m.Run()
	}
	defer lab.Close()
	os.Setenv("DOCKER_HOST", lab.Host)
	os.Setenv(envImage, lab.Image)
	return m.Run()
}

// api is the engine as staff see it.
func api(t testing.TB) *client.Client {
	t.Helper()
	c, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// need skips the test without an engine, except where everything must be there.
func need(t testing.TB) {
	t.Helper()
	switch {
	case why == "":
	case os.Getenv("RAID_CI") != "":
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

func newEngine(t testing.TB, id string, change func(*docker.Config)) *docker.Engine {
	t.Helper()
	need(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := docker.Config{ID: id, Exe: exe, Args: []string{"shim"}, Images: job.Images{Default: os.Getenv(envImage)}, Logf: t.Logf}
	if change != nil {
		change(&c)
	}
	e, err := docker.New(context.Background(), c)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	return e
}

// engineMounts is the mountinfo of the engine, whose mounts may not be ours.
func engineMounts(t *testing.T) string {
	t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(os.Getenv("DOCKER_HOST"), "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var peer *unix.Ucred
	raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", peer.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// traces lists what the engine still knows by a name.
func traces(t *testing.T, name string) (found []string) {
	if strings.Contains(engineMounts(t), name) {
		found = append(found, "a mount where the engine is")
	}
	c := api(t)
	all, err := c.ContainerList(context.Background(), container.ListOptions{All: true})
	if err != nil {
		t.Error(err)
	}
	for _, x := range all {
		if strings.Contains(strings.Join(x.Names, " "), name) {
			found = append(found, "container "+x.Names[0]+" "+x.Status)
		}
	}
	vols, err := c.VolumeList(context.Background(), volume.ListOptions{})
	if err != nil {
		t.Error(err)
	}
	for _, v := range vols.Volumes {
		if _, anonymous := v.Labels["com.docker.volume.anonymous"]; anonymous || strings.Contains(v.Name, name) {
			found = append(found, "volume "+v.Name)
		}
	}
	return found
}

func TestConformance(t *testing.T) {
	boxtest.Run(t, boxtest.Kind{New: func(t *testing.T, id string) box.Engine { return newEngine(t, id, nil) },
		User: "root", Home: "/root", Writable: true, Traces: traces, Short: testing.Short() || os.Geteuid() != 0})
}

func TestConformanceStrict(t *testing.T) {
	if testing.Short() {
		t.Skip("the same code as TestConformance's, in another place")
	}
	if os.Geteuid() != 0 {
		t.Skip("a strict box needs a runner that is root")
	}
	boxtest.Run(t, boxtest.Kind{New: func(t *testing.T, id string) box.Engine {
		return newEngine(t, id, func(c *docker.Config) { c.Strict = true })
	}, User: "nobody", Home: "/home/rai", Homes: []string{"rai"}, Traces: traces, Short: true})
}

// A systemd unit with Protect options has a mount namespace of its own, and the engine
// another. Nothing may differ for that: not the disk limit, not what is left.
func TestConformanceApart(t *testing.T) {
	if testing.Short() {
		t.Skip("the same code as TestConformance's, in another place")
	}
	need(t)
	if os.Geteuid() != 0 {
		t.Skip("only root may mount")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, os.Args[0], "-test.v", "-test.short", "-test.run=^(TestConformance|TestMounts|TestVolumes)$")
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // and with it nothing spreads from there
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("in a mount namespace of its own: %v", err)
	}
	if strings.Contains(string(out), "weakness: ") || strings.Contains(string(out), "--- SKIP") {
		t.Error("a limit does not hold there")
	}
}

// A team's cache is mounted by the runner: a box gets that, not the folder below it.
func TestMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may mount")
	}
	id := boxtest.ID()
	dir := filepath.Join("/var/tmp", "raid-mounts-"+id)
	if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mount("none", dir, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(dir, 0), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "before"), []byte("kept\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e := newEngine(t, id, nil)
	mounts := []box.Mount{{Host: dir, Box: "/cache", Write: true}, {Host: dir, Box: "/data"}}
	l := job.Limits{Disk: 16 << 20}
	got := boxtest.Say(t, e, box.Config{Mounts: mounts, Limits: l}, "cat /cache/before; echo new >/cache/after; cat /data/after; (echo x >/data/x) 2>/dev/null || echo closed")
	if got != "kept\nnew\nclosed\n" {
		t.Errorf("a box said %q of what was mounted for it", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "after")); err != nil {
		t.Error(err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if left := traces(t, "raid-"+id); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
