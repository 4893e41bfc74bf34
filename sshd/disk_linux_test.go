package sshd

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
)

// An upload is refused for space only when there is nothing old to remove.
func TestUploadOnFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("RAID_CI") != "" {
			t.Fatal("only root can make a disk that is full")
		}
		t.Skip("only root can make a disk that is full")
	}
	s := newSite(t, func(c *Config) {
		if err := unix.Mount("raid-test", c.Dir, "tmpfs", 0, "size=16m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(c.Dir, 0); err != nil {
				t.Errorf("unmount: %v", err)
			}
		})
		c.Reserve = 0.25
	})
	for range 3 {
		s.pastJob(t, 3<<20)
	}
	fill(t, filepath.Join(s.Dir, "other"), 4<<20) // 13 MiB of 16; 4 are the reserve
	submit := func() (string, int) {
		_, stderr, status := s.say(t, "ada", "submit --detach -- true", buildTar(t, "rai: {version: 0.2}\n"))
		return stderr, status
	}
	if stderr, status := submit(); status != 0 {
		t.Fatalf("submit on a full disk with old files = %d, %q, want 0", status, stderr)
	}
	if _, stderr, status := s.say(t, "ada", "source 1", nil); status != job.ExitInput || !strings.Contains(stderr, "were removed 2h00m after its end") {
		t.Errorf("source of the oldest = %d, %q, want that it was removed", status, stderr)
	}
	if out, stderr, status := s.say(t, "ada", "source 3", nil); status != 0 || len(out) != 3<<20 {
		t.Errorf("source of the newest = %d bytes, %d, %q, want all", len(out), status, stderr)
	}
	fill(t, filepath.Join(s.Dir, "more"), 12<<20) // as much as there is
	if stderr, status := submit(); status != 0 {
		t.Errorf("submit on a disk filled to the brim with old files left = %d, %q, want 0", status, stderr)
	}
	fill(t, filepath.Join(s.Dir, "last"), 12<<20)
	if stderr, status := submit(); status != job.ExitTryLater || !strings.Contains(stderr, "disk is full") {
		t.Errorf("submit on a disk that is full for good = %d, %q, want %d", status, stderr, job.ExitTryLater)
	}
	for _, rec := range s.brain.Unfinished() {
		if _, err := s.blobs.Stat(t.Context(), blob.Key(rec.Source)); err != nil {
			t.Errorf("the upload of a job that waits: %v", err)
		}
	}
}

// pastJob makes a job of ada's that ended two hours ago, with an upload of so many bytes.
func (s *site) pastJob(t *testing.T, size int) {
	t.Helper()
	out, stderr, status := s.say(t, "ada", "submit --detach -- true", nil)
	if status != 0 {
		t.Fatalf("submit = %d, %q", status, stderr)
	}
	id := strings.TrimSpace(out)
	s.say(t, "ada", "cancel "+id, nil)
	past, err := s.brain.Past(t.Context(), "all", 0, 1)
	if err != nil || len(past) != 1 {
		t.Fatal(past, err)
	}
	u, err := s.blobs.Create(0)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, size)
	rand.Read(data)
	if _, err := u.Write(data); err != nil {
		t.Fatal(err)
	}
	key, err := u.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	then := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(filepath.Join(s.Dir, "blobs", "sha256", key.Hex()[:2], key.Hex()[2:]), then, then); err != nil {
		t.Fatal(err)
	}
	past[0].Source, past[0].QueuedAt, past[0].FinishedAt = string(key), job.At(then), job.At(then)
	if err := s.brain.Rewrite(t.Context(), past); err != nil {
		t.Fatal(err)
	}
}

// fill makes a file of n bytes, or of as many as fit.
func fill(t *testing.T, path string, n int) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range n >> 16 {
		if _, err := f.Write(make([]byte, 1<<16)); err != nil {
			return
		}
	}
}
