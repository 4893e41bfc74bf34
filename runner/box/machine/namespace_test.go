package machine

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// elsewhere starts a process with a mount namespace of its own and returns that, and what
// is mounted in it below a folder. What others had mounted when it began is there too, until
// they remove the mount point.
func elsewhere(t *testing.T) (n *Namespace, mounts func(below string) string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	c := exec.Command("cat")
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); c.Wait() })
	in.Write([]byte("x")) // once that comes back it has unshared
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if n, err = NamespaceOf(c.Process.Pid); err != nil || n == nil {
		t.Fatalf("NamespaceOf = %v, %v, want another than ours", n, err)
	}
	t.Cleanup(func() { n.Close() })
	return n, func(below string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", c.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		var found strings.Builder
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, " "+below+"/") {
				found.WriteString(line)
			}
		}
		return found.String()
	}
}

// A disk is where the engine is and nowhere else, and a kill at any moment leaves nothing:
// above all a team's cache keeps what is in it.
func TestDisksElsewhere(t *testing.T) {
	in, mounts := elsewhere(t)
	if own, err := NamespaceOf(os.Getpid()); own != nil || err != nil {
		t.Errorf("NamespaceOf(ourselves) = %v, %v, want nil", own, err)
	}
	run, cache := t.TempDir(), t.TempDir()
	if err := unix.Mount("none", cache, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(cache, unix.MNT_DETACH) })
	precious := filepath.Join(cache, "precious")
	if err := os.WriteFile(precious, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ds, noImages, err := NewDisks(t.Context(), run, -1, in)
	if err != nil {
		t.Fatal(err)
	}
	if noImages != nil && os.Getenv("RAID_CI") == "" {
		t.Skip("no disk images here: ", noImages)
	}
	for _, end := range []struct {
		name string
		end  func(*Disk) error
	}{
		{"LetGo", (*Disk).LetGo},
		{"Remove", (*Disk).Remove},
		{"kill", func(*Disk) error { _, _, err := NewDisks(t.Context(), run, -1, in); return err }},
	} {
		d, err := ds.New(t.Context(), "box", MinDisk)
		if err != nil {
			t.Fatal(err)
		}
		at, err := d.Show(cache)
		if err != nil {
			t.Fatal(err)
		}
		if at == cache || !in.Sees(run) || in.Sees(cache) {
			t.Errorf("shown at %s, want it elsewhere", at)
		}
		if now := mounts(run); !strings.Contains(now, d.Dir) || !strings.Contains(now, at) {
			t.Errorf("%s and %s are not mounted there: %s", d.Dir, at, now)
		}
		if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), d.Dir) {
			t.Error("the disk is mounted here")
		}
		if err := end.end(d); err != nil {
			t.Errorf("%s: %v", end.name, err)
		}
		if now := mounts(run); now != "" {
			t.Errorf("after %s there still is: %s", end.name, now)
		}
		if left := Folders(ds.Boxes); len(left) > 0 {
			t.Errorf("after %s: %q", end.name, left)
		}
		if _, err := os.Stat(precious); err != nil {
			t.Fatalf("after %s: %v", end.name, err)
		}
		d.Remove()
	}
}
