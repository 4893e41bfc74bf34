package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// open opens a store in a folder of the test's, or skips: mounting takes root.
func open(t *testing.T, dir string, quotas map[string]Quota) *Store {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("RAID_CI") != "" {
			t.Fatal("not root")
		}
		t.Skip("only root may mount")
	}
	s, err := Open(filepath.Join(dir, "caches"), filepath.Join(dir, "mounts"), quotas)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mounted(t *testing.T, s *Store, pool, tenant string) *Folder {
	t.Helper()
	f, err := s.Folder(t.Context(), pool, tenant)
	if err != nil || f == nil {
		t.Fatalf("Folder(%s, %s) = %v, %v, want one", pool, tenant, f, err)
	}
	t.Cleanup(func() { unix.Unmount(f.Path, unix.MNT_DETACH) }) // of a test that failed
	return f
}

func shut(t *testing.T, f *Folder) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(f.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close %s is there: %v", f.Path, err)
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var ns []string
	for _, e := range es {
		ns = append(ns, e.Name())
	}
	return strings.Join(ns, " ")
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// What a team left is there again, for this team, in this pool, and for nobody else.
func TestFolder(t *testing.T) {
	q := Quota{Bytes: 32 << 20, Keep: time.Hour}
	s := open(t, t.TempDir(), map[string]Quota{"p": q, "q": q})
	f := mounted(t, s, "p", "team1")
	if got := names(t, f.Path); got != "" {
		t.Errorf("a new one holds %q, want nothing", got)
	}
	write(t, filepath.Join(f.Path, "mine"))
	shut(t, f)
	for _, c := range []struct{ pool, tenant, want string }{
		{"p", "team1", "mine"}, {"p", "team2", ""}, {"p", "~team1", ""}, {"q", "team1", ""},
	} {
		f := mounted(t, s, c.pool, c.tenant)
		if got := names(t, f.Path); got != c.want {
			t.Errorf("%s in %s has %q, want %q", c.tenant, c.pool, got, c.want)
		}
		shut(t, f)
	}
	if f, err := s.Folder(t.Context(), "other", "team1"); f != nil || err != nil {
		t.Errorf("Folder of a pool without a quota = %v, %v, want nil, nil", f, err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
}

func TestQuota(t *testing.T) {
	s := open(t, t.TempDir(), map[string]Quota{"p": {Bytes: 20 << 20}})
	f := mounted(t, s, "p", "t")
	defer shut(t, f)
	err := os.WriteFile(filepath.Join(f.Path, "big"), make([]byte, 21<<20), 0o644)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("21 MiB in a quota of 20: %v, want ENOSPC", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(f.Path, &st); err != nil || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
		t.Errorf("mounted with flags %x, %v, want nosuid and nodev", st.Flags, err)
	}
}

// A quota that changed, an image that is damaged, and one that is too old: each begins
// anew, empty.
func TestAnew(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, map[string]Quota{"p": {Bytes: 32 << 20, Keep: time.Hour}})
	fill := func(s *Store) *Folder {
		f := mounted(t, s, "p", "t")
		write(t, filepath.Join(f.Path, "x"))
		shut(t, f)
		return f
	}
	empty := func(what string, s *Store) {
		f := mounted(t, s, "p", "t")
		if got := names(t, f.Path); got != "" {
			t.Errorf("%s: it holds %q, want nothing", what, got)
		}
		shut(t, f)
	}
	f := fill(s)
	if err := os.WriteFile(f.image, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	empty("damaged", s)
	fill(s)
	old := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(f.image, old, old); err != nil {
		t.Fatal(err)
	}
	empty("too old", s)
	fill(s)
	empty("of another quota", open(t, dir, map[string]Quota{"p": {Bytes: 48 << 20}}))
	open(t, dir, nil)
	if got := names(t, filepath.Join(dir, "caches")); got != "" {
		t.Errorf("without a quota %q is left, want nothing", got)
	}
}

// A process that was killed leaves its mount; the next one takes it away, not its files.
func TestAfterKill(t *testing.T) {
	dir := t.TempDir()
	q := map[string]Quota{"p": {Bytes: 32 << 20}}
	f := mounted(t, open(t, dir, q), "p", "t")
	write(t, filepath.Join(f.Path, "x"))
	s := open(t, dir, q)
	if got := names(t, filepath.Join(dir, "mounts")); got != "" {
		t.Errorf("still mounted: %q", got)
	}
	f = mounted(t, s, "p", "t")
	if got := names(t, f.Path); got != "x" {
		t.Errorf("it holds %q, want x", got)
	}
	shut(t, f)
}

func TestCancelled(t *testing.T) {
	s := open(t, t.TempDir(), map[string]Quota{"p": {Bytes: 32 << 20}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if f, err := s.Folder(ctx, "p", "t"); f != nil || err == nil {
		t.Errorf("Folder of an ended context = %v, %v, want an error", f, err)
	}
	if got := names(t, s.mounts); got != "" {
		t.Errorf("%q is left", got)
	}
}
