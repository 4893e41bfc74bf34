package blob_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/blob/blobtest"
)

// childVar makes a run of this test binary a child that uploads into the folder it names.
const childVar = "RAID_BLOB_TEST_DIR"

// TestKill: after a kill -9 every blob has the bytes of its name, what was
// acknowledged is there, and the half ones are gone once the folder is opened.
func TestKill(t *testing.T) {
	if dir := os.Getenv(childVar); dir != "" {
		uploadForever(t, dir)
	}
	dir, acked := t.TempDir(), map[blob.Key]bool{}
	for range 20 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env, cmd.Stderr = append(os.Environ(), childVar+"="+dir), os.Stderr
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		keys := bufio.NewScanner(out)
		for range 1 + rand.IntN(20) {
			if !keys.Scan() {
				t.Fatalf("the child stopped: %v", cmd.Wait())
			}
			acked[blob.Key(keys.Text())] = true
		}
		cmd.Process.Kill()
		for keys.Scan() {
			acked[blob.Key(keys.Text())] = true
		}
		cmd.Wait()
		checkKilled(t, dir, acked)
	}
}

func uploadForever(t *testing.T, dir string) {
	f := open(t, dir, blob.Options{})
	for {
		u, err := f.Create(0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(u, rand.Uint64())
		io.CopyN(u, repeat("0123456789"), rand.Int64N(1<<18))
		k, err := u.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(k)
	}
}

func checkKilled(t *testing.T, dir string, acked map[blob.Key]bool) {
	t.Helper()
	f := open(t, dir, blob.Options{})
	found := 0
	for info, err := range f.List(t.Context()) {
		if err == nil {
			err = f.Verify(t.Context(), info.Key)
		}
		if err != nil {
			t.Fatalf("after a kill: %v", err)
		}
		if acked[info.Key] {
			found++
		}
		// Keep the folder small: the next round has its own.
		if err := f.Remove(t.Context(), info.Key); err != nil {
			t.Fatal(err)
		}
	}
	if found != len(acked) {
		t.Fatalf("after a kill %d of %d acknowledged blobs are there", found, len(acked))
	}
	if left := files(t, dir); len(left) != 0 {
		t.Fatalf("after a kill there is %q besides blobs", left)
	}
	clear(acked)
}

// TestDiskFull: an upload that finds no room fails with ErrNoSpace, leaves nothing,
// and stands in nobody's way once there is room.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, 4<<20)
	f := open(t, dir, blob.Options{})
	u := create(t, f, 0)
	n, err := io.CopyN(u, repeat("0123456789"), 8<<20)
	if !errors.Is(err, blob.ErrNoSpace) {
		t.Fatalf("8 MiB onto a disk of 4 MiB: %d, %v, want ErrNoSpace", n, err)
	}
	if k, err := u.Commit(t.Context()); !errors.Is(err, blob.ErrNoSpace) {
		t.Errorf("Commit = %s, %v, want ErrNoSpace", k, err)
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("files = %q, want none", left)
	}
	put(t, f, "small")
	if err := f.Verify(t.Context(), blobtest.KeyOf("small")); err != nil {
		t.Error(err)
	}
}

// TestReserveIsKept: the reserve holds against an upload that began while there was
// room. What an upload asks for ahead counts, so it may end a little early.
func TestReserveIsKept(t *testing.T) {
	f := open(t, smallDisk(t, 256<<20), blob.Options{Reserve: 0.5})
	u := create(t, f, 0)
	n, err := io.CopyN(u, repeat("0123456789"), 250<<20)
	if !errors.Is(err, blob.ErrNoSpace) || n < 80<<20 || n > 137<<20 {
		t.Errorf("250 MiB onto 256 MiB with half reserved: %d MiB, %v, want ErrNoSpace at 80 to 137", n>>20, err)
	}
}

// TestRoomIsGivenBack: a blob takes no more of the disk than it has bytes.
func TestRoomIsGivenBack(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, blob.Options{})
	u := create(t, f, 0)
	if _, err := io.CopyN(u, repeat("0123456789"), 9<<20); err != nil {
		t.Fatal(err)
	}
	k, err := u.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path(dir, k), &st); err != nil || st.Size != 9<<20 || st.Blocks*512 > 10<<20 {
		t.Errorf("a blob of 9 MiB has %d bytes and takes %d, %v", st.Size, st.Blocks*512, err)
	}
	if err := f.Verify(t.Context(), k); err != nil {
		t.Error(err)
	}
}

// smallDisk mounts a file system of so many bytes until the test ends.
func smallDisk(t *testing.T, bytes int) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprint("mode=0700,size=", bytes))
	if err != nil {
		if os.Getenv("RAID_CI") == "1" {
			t.Fatalf("mount a small disk: %v", err)
		}
		t.Skipf("needs root to mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}
