package bwrap_test

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/bwrap"
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
	boxtest.Run(t, func(t *testing.T, id string) box.Engine { return newEngine(t, id) })
}

// TestConformanceAsUser runs the suite without root.
func TestConformanceAsUser(t *testing.T) {
	need(t)
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
