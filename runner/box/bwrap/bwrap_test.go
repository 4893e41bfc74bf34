package bwrap_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
)

func TestMain(m *testing.M) { boxtest.Main(m) }

// need skips the test without bubblewrap, except where everything must be there.
func need(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("bwrap"); err == nil {
		return
	}
	if os.Getenv("RAID_CI") != "" {
		t.Fatal("bwrap is not installed")
	}
	t.Skip("bwrap is not installed")
}

func newEngine(t testing.TB, id string) *bwrap.Engine {
	t.Helper()
	need(t)
	e, err := bwrap.New(context.Background(), bwrap.Config{
		ID:   id,
		Exe:  hidden(t),
		Args: []string{"shim"},
		Logf: t.Logf,
	})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	return e
}

// hidden returns this program as seen below a folder that nobody else may enter, as a
// state folder is.
func hidden(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	copyFile(t, filepath.Join(dir, "raid"), exe, 0o700)
	return filepath.Join(dir, "raid")
}

func copyFile(t testing.TB, to, from string, mode os.FileMode) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	boxtest.Run(t, boxtest.Kind{New: func(t *testing.T, id string) box.Engine { return newEngine(t, id) },
		User: "rai", Home: "/home/rai", Homes: []string{"rai"}, Short: testing.Short()})
}

// TestConformanceAsUser runs the suite without root.
func TestConformanceAsUser(t *testing.T) {
	need(t)
	if testing.Short() {
		t.Skip("the suite has run as root")
	}
	if os.Geteuid() != 0 {
		t.Skip("TestConformance has just done that")
	}
	const uid = 31415
	dir, err := os.MkdirTemp("/var/tmp", "raid-as-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	test := filepath.Join(dir, "test")
	copyFile(t, test, exe, 0o755)
	if err := os.Chmod(test, 0o755); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), test, "-test.v", "-test.run=^TestConformance$")
	c.Dir = dir
	c.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("as uid %d: %v", uid, err)
	}
	if !strings.Contains(string(out), "jobs run as the runner's own user") {
		t.Error("the engine did not say what does not hold without root")
	}
}

// TestMounts shows two folders in a box, with and without an image.
func TestMounts(t *testing.T) {
	need(t)
	dir, err := os.MkdirTemp("/var/tmp", "raid-mounts-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{dir, filepath.Join(dir, "data"), filepath.Join(dir, "cache")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "data", "set"), []byte("a data set\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e, err := bwrap.New(t.Context(), bwrap.Config{ID: boxtest.ID(), Exe: hidden(t), Args: []string{"shim"}, Logf: t.Logf,
		Images: map[string]string{"course/base": "/"}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	c := box.Config{Mounts: []box.Mount{{Host: filepath.Join(dir, "data"), Box: "/data"}, {Host: filepath.Join(dir, "cache"), Box: "/cache", Write: true}}}
	for i, image := range []string{"", "course/base"} {
		c.Image = image
		out := boxtest.Say(t, e, c, "cat /data/set; touch /data/x 2>/dev/null || echo read-only; echo x >>/cache/kept; wc -l </cache/kept")
		if want := fmt.Sprintf("a data set\nread-only\n%d\n", i+1); out != want {
			t.Errorf("image %q: %q, want %q", image, out, want)
		}
	}
	if out := boxtest.Say(t, e, box.Config{}, "ls -d /data /cache 2>/dev/null; echo none"); out != "none\n" {
		t.Errorf("a box without mounts: %q, want none", out)
	}
}

// A box with a network can tell who answers it: it has the host's certificates.
func TestCertificates(t *testing.T) {
	need(t)
	const certs = "/etc/ssl/certs"
	here, err := os.ReadDir(certs)
	if err != nil {
		t.Skip("no certificates here: ", err)
	}
	e := newEngine(t, boxtest.ID())
	defer e.Close()
	for network, want := range map[bool]int{true: len(here), false: 0} {
		if out := boxtest.Say(t, e, box.Config{Network: network}, "ls -A "+certs+" | wc -l"); out != fmt.Sprintln(want) {
			t.Errorf("with network %v: %q certificates, want %d", network, out, want)
		}
	}
}

// An image with GPUs gets the machine's driver, of which here only the tool is found;
// without GPUs it does not.
func TestImageWithDriver(t *testing.T) {
	need(t)
	tools := t.TempDir()
	if err := os.Chmod(filepath.Dir(tools), 0o755); err != nil { // the driver is everybody's
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tools, "nvidia-smi"), []byte("#!/bin/sh\necho the driver of this machine\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	e, err := bwrap.New(t.Context(), bwrap.Config{ID: boxtest.ID(), Exe: hidden(t), Args: []string{"shim"}, Logf: t.Logf,
		Images: map[string]string{"course/base": "/"}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	const line = gpu.BoxTools + "/nvidia-smi 2>/dev/null || echo none"
	for _, c := range []struct {
		gpus []gpu.Device
		want string
	}{
		{[]gpu.Device{{UUID: "GPU-a", Minor: 250}}, "the driver of this machine\n"},
		{nil, "none\n"},
	} {
		if out := boxtest.Say(t, e, box.Config{Image: "course/base", GPUs: c.gpus}, line); out != c.want {
			t.Errorf("with %d GPUs: %q, want %q", len(c.gpus), out, c.want)
		}
	}
}

// An image is a root folder by name: here the host's own, as a stand-in.
func TestImage(t *testing.T) {
	need(t)
	e, err := bwrap.New(t.Context(), bwrap.Config{ID: boxtest.ID(), Exe: hidden(t), Args: []string{"shim"}, Logf: t.Logf,
		Images: map[string]string{"course/base": "/", "gone": "/no/such/folder"}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	out := boxtest.Say(t, e, box.Config{Image: "course/base"}, "whoami; ls /home; ls /var/tmp; touch /usr/x 2>/dev/null || echo read-only; echo x > /tmp/x && cat /tmp/x")
	if want := "rai\nrai\nread-only\nx\n"; out != want {
		t.Errorf("in an image: %q, want %q", out, want)
	}
	if _, err := e.Start(t.Context(), box.Config{ID: "gone", Image: "gone"}); err == nil || !strings.Contains(err.Error(), "/no/such/folder") {
		t.Errorf("Start with a missing image: %v, want its folder named", err)
	}
}

func TestNewRefuses(t *testing.T) {
	need(t)
	for _, c := range []struct {
		name string
		cfg  bwrap.Config
		want string
	}{
		{"no ID", bwrap.Config{Exe: "/bin/true"}, "bad runner ID"},
		{"odd ID", bwrap.Config{ID: "../x", Exe: "/bin/true"}, "bad runner ID"},
		{"no shim", bwrap.Config{ID: boxtest.ID(), Exe: "/no/such/shim"}, "copy the shim"},
		{"not ours", bwrap.Config{ID: boxtest.ID(), Exe: "/bin/true", RunDir: "/tmp"}, "is not ours"},
		{"a link", bwrap.Config{ID: boxtest.ID(), Exe: "/bin/true", RunDir: link(t)}, "is not ours"},
		{"behind a closed door", bwrap.Config{ID: boxtest.ID(), Exe: "/bin/true", RunDir: filepath.Join(filepath.Dir(hidden(t)), "run")}, "chmod o+x"},
	} {
		if c.want == "chmod o+x" && os.Geteuid() != 0 {
			continue // one's own folders are never closed to oneself
		}
		e, err := bwrap.New(t.Context(), c.cfg)
		if err == nil {
			e.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: New: %v, want %q in it", c.name, err, c.want)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := bwrap.New(t.Context(), bwrap.Config{ID: "x", Exe: "/bin/true"}); err == nil || !strings.Contains(err.Error(), "apt install bubblewrap") {
		t.Errorf("New without bwrap: %v, want the remedy", err)
	}
}

// What jobs leave in the run folder, setuid programs among it, is for nobody else.
func TestRunFolderIsShut(t *testing.T) {
	need(t)
	id := boxtest.ID()
	dir := filepath.Join("/var/tmp", "raid-shut-"+id)
	if err := os.Mkdir(dir, 0o711); err != nil { // as an earlier raid left it
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	e, err := bwrap.New(t.Context(), bwrap.Config{ID: id, Exe: hidden(t), Args: []string{"shim"}, RunDir: dir})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	defer e.Close()
	i, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if i.Mode().Perm()&0o027 != 0 {
		t.Errorf("run folder is %v: others may pass", i.Mode())
	}
	if got := boxtest.Say(t, e, box.Config{}, "echo fine"); got != "fine\n" {
		t.Errorf("a box said %q", got)
	}
}

func link(t *testing.T) string {
	name := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(t.TempDir(), name); err != nil {
		t.Fatal(err)
	}
	return name
}

// A second engine of the same ID must not sweep the first one's boxes away.
func TestOneEngine(t *testing.T) {
	id := boxtest.ID()
	e := newEngine(t, id)
	defer e.Close()
	if _, err := bwrap.New(t.Context(), bwrap.Config{ID: id, Exe: "/bin/true"}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second engine: %v, want in use", err)
	}
	if got := boxtest.Say(t, e, box.Config{}, "echo fine"); got != "fine\n" {
		t.Errorf("the first engine's box said %q", got)
	}
}

// BenchmarkBox prints what a box costs: until its shim is ready, and to remove it.
// Medians, for a busy machine has a long tail.
func BenchmarkBox(b *testing.B) {
	e := newEngine(b, boxtest.ID())
	defer e.Close()
	var start, ready, remove []time.Duration
	limits := job.Limits{Memory: 1 << 30, CPUs: 2, Pids: 4096, Disk: 10 << 30}
	for i := range b.N {
		t0 := time.Now()
		x, err := e.Start(b.Context(), box.Config{ID: fmt.Sprintf("b%d", i), Limits: limits})
		if err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if k, _, err := job.NewFrameReader(x.Stdout()).Next(); k != job.Ready || err != nil {
			b.Fatalf("%q, %v", k, err)
		}
		t2 := time.Now()
		if err := x.Close(); err != nil {
			b.Fatal(err)
		}
		start, ready, remove = append(start, t1.Sub(t0)), append(ready, t2.Sub(t0)), append(remove, time.Since(t2))
	}
	for name, ds := range map[string][]time.Duration{"start": start, "ready": ready, "close": remove} {
		slices.Sort(ds)
		b.ReportMetric(ds[0].Seconds()*1000, "ms-"+name+"-min")
		b.ReportMetric(ds[len(ds)/2].Seconds()*1000, "ms-"+name)
	}
}

// An older bubblewrap does without the options it lacks.
func TestOldBwrap(t *testing.T) {
	need(t)
	real, err := exec.LookPath("bwrap")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/var/tmp", "raid-old-bwrap-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\nfor a; do case $a in --disable-userns|--size) echo \"bwrap: Unknown option $a\" >&2; exit 1;; esac; done\nexec " + real + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "bwrap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	e := newEngine(t, boxtest.ID())
	defer e.Close()
	if got := boxtest.Say(t, e, box.Config{}, "unshare -Ur true 2>/dev/null || echo refused"); got != "refused\n" {
		t.Errorf("a box of an old bwrap said %q, want refused", got)
	}
}
