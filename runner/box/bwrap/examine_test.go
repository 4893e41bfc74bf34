package bwrap

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rai-project/raid/runner/box/machine"
)

// TestLimitable has machines made of folders. Root may write everywhere, so what cannot
// be written is not there.
func TestLimitable(t *testing.T) {
	for _, c := range []struct {
		name    string
		files   map[string]string
		mounts  []machine.Mount
		own     string
		root    bool
		version string
		missing string
	}{
		{"v2", map[string]string{"cgroup.controllers": "cpuset cpu io memory pids", "cgroup.subtree_control": ""},
			[]machine.Mount{{Root: "/", At: "@", Kind: "cgroup2", Options: "rw"}}, "0::/user.slice\n", true, "v2", ""},
		{"v2 without cpu", map[string]string{"cgroup.controllers": "memory pids", "cgroup.subtree_control": ""},
			[]machine.Mount{{Root: "/", At: "@", Kind: "cgroup2", Options: "rw"}}, "0::/\n", true, "v2", "cpu"},
		{"v2 without memory", map[string]string{"cgroup.controllers": "cpu pids", "cgroup.subtree_control": ""},
			[]machine.Mount{{Root: "/", At: "@", Kind: "cgroup2", Options: "rw"}}, "0::/\n", true, "v2", "memory pids cpu"},
		{"v2, delegated to a user", map[string]string{"a/b/cgroup.controllers": "memory pids cpu", "a/b/cgroup.subtree_control": ""},
			[]machine.Mount{{Root: "/", At: "@", Kind: "cgroup2", Options: "rw"}}, "0::/a/b\n", false, "v2", ""},
		{"v1", map[string]string{"tasks": ""},
			[]machine.Mount{{Root: "/", At: "@", Kind: "cgroup", Options: "rw,memory"}, {Root: "/", At: "@", Kind: "cgroup", Options: "rw,cpu,cpuacct"}, {Root: "/", At: "@", Kind: "cgroup", Options: "rw,pids"}},
			"4:memory:/\n3:cpu,cpuacct:/\n2:pids:/\n", true, "v1", ""},
		{"hybrid without pids", map[string]string{"tasks": ""},
			[]machine.Mount{{Root: "/", At: "@", Kind: "cgroup", Options: "rw,memory"}, {Root: "/", At: "@", Kind: "cgroup", Options: "rw,cpu"}, {Root: "/", At: "@", Kind: "cgroup2", Options: "rw"}},
			"4:memory:/\n3:cpu:/\n0::/\n", true, "v1", "pids"},
		{"none", nil, nil, "", true, "", "memory pids cpu"},
	} {
		dir := t.TempDir()
		for name, text := range c.files {
			p := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		mounts := slices.Clone(c.mounts)
		for i := range mounts {
			mounts[i].At = strings.ReplaceAll(mounts[i].At, "@", dir)
		}
		version, missing := limitable(mounts, c.own, c.root)
		if got := strings.Join(missing, " "); version != c.version || got != c.missing {
			t.Errorf("%s: limitable = %q, missing %q, want %q, missing %q", c.name, version, got, c.version, c.missing)
		}
	}
}

// TestExamine looks at this machine twice: what holds must be what New finds, and
// nothing may be left.
func TestExamine(t *testing.T) {
	f := Examine(t.Context())
	if f.Version == "" || f.Start != nil {
		if os.Getenv("RAID_CI") != "" {
			t.Fatalf("no box can start here: %+v", f)
		}
		t.Skipf("no box can start here: %+v", f)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	e, err := New(t.Context(), Config{ID: "examine-test", Exe: exe})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if limits := strings.Contains(e.Weakness(), "limits are not enforced"); limits != (len(f.Missing) > 0) {
		t.Errorf("Examine misses %v, New says %q", f.Missing, e.Weakness())
	}
	if disk := strings.Contains(e.Weakness(), "disk limit is only measured"); disk != (f.Disk != nil) {
		t.Errorf("Examine says of disks %v, New says %q", f.Disk, e.Weakness())
	}
}
