package machine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestUsed(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "a", "b"), 0o755), os.Symlink("/usr", filepath.Join(root, "c"))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "a", "f"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(root, "a", "f"), filepath.Join(root, "a", "b", "g")); err != nil {
		t.Fatal(err)
	}
	sparse := filepath.Join(root, "sparse")
	if err := os.WriteFile(sparse, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, 1<<40); err != nil {
		t.Fatal(err)
	}
	if n := Used(context.Background(), root, 1<<40); n < 1<<20 || n > 1<<20+64<<10 {
		t.Errorf("Used = %d, want 1 MiB and a little: links, holes and the outside count nothing", n)
	}
	deep := strings.Repeat("d/", maxDepth+10)
	if err := os.MkdirAll(filepath.Join(root, deep), 0o755); err != nil {
		t.Fatal(err)
	}
	if n := Used(context.Background(), root, 1<<40); n <= 1<<40 {
		t.Errorf("Used = %d for a tree of %d levels, want over the limit", n, maxDepth+10)
	}
}

// A runner may be killed while it tries whether a disk image can be mounted.
func TestNewDisksAfterKill(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	run := t.TempDir()
	first, noImages, err := NewDisks(t.Context(), run, -1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if noImages != nil && os.Getenv("RAID_CI") == "" {
		t.Skip("no disk images here: ", noImages)
	}
	left, err := first.New(t.Context(), "probe", MinDisk)
	if err != nil {
		t.Fatal(err)
	}
	defer left.Remove()
	second, noImages, err := NewDisks(t.Context(), run, -1, nil)
	if err != nil || noImages != nil {
		t.Fatalf("after a kill: %v, no images: %v", err, noImages)
	}
	if left := Folders(second.Boxes); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestTail(t *testing.T) {
	var b Tail
	b.Write([]byte("first"))
	b.Write(make([]byte, 3*tailSize))
	b.Write([]byte("last"))
	if got := b.String(); len(got) != tailSize || !strings.HasSuffix(got, "\x00last") {
		t.Errorf("tail holds %d bytes ending in %q, want %d and last", len(got), got[len(got)-5:], tailSize)
	}
}

func TestGroupOf(t *testing.T) {
	const v1 = "9:name=systemd:/\n4:memory:/a/b\n2:cpu,cpuacct:/c\n0::/u/v\n"
	for _, c := range []struct{ text, controller, want string }{
		{v1, "memory", "/a/b"}, {v1, "cpu", "/c"}, {v1, "", "/u/v"}, {v1, "pids", "/"},
		{"0::/user.slice/a:b\n", "", "/user.slice/a:b"}, {"", "", "/"}, {"garbage", "memory", "/"},
	} {
		if got := GroupOf(c.text, c.controller); got != c.want {
			t.Errorf("GroupOf(%q, %q) = %q, want %q", c.text, c.controller, got, c.want)
		}
	}
}

func TestParseMounts(t *testing.T) {
	const text = `22 27 0:21 / /proc rw,relatime - proc proc rw
33 27 0:30 /docker/1 /sys/fs/cgroup/memory rw,nosuid shared:9 master:1 - cgroup cgroup rw,memory
40 27 7:0 / /mnt/a\040b\134c rw - ext4 /dev/loop0 rw
broken - line
`
	want := []Mount{
		{"/", "/proc", "proc", "rw"},
		{"/docker/1", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"},
		{"/", `/mnt/a b\c`, "ext4", "rw"},
	}
	if got := parseMounts(text); !reflect.DeepEqual(got, want) {
		t.Errorf("parseMounts = %q, want %q", got, want)
	}
	for _, c := range []struct{ path, want string }{{"/docker/1/x", "/x"}, {"/docker/1", ""}, {"/docker/12", "/"}} {
		if got := want[1].Below(c.path); got != c.want {
			t.Errorf("below(%q) = %q, want %q", c.path, got, c.want)
		}
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("40 27 7:0 / /mnt/a\\040b\\134c rw - ext4 /dev/loop0 rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, m := range parseMounts(text) {
			if m.At == "" || m.Kind == "" {
				t.Errorf("parseMounts(%q) gave %+v", text, m)
			}
		}
	})
}
