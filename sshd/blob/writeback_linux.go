package blob

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// writeBack has the kernel begin to write n bytes at off to the disk. It waits for
// nothing but room in the disk's queue, and makes nothing durable: Sync does.
func writeBack(f *os.File, off, n int64) error {
	err := unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
	if errors.Is(err, unix.ENOSYS) {
		return nil // a sandbox's kernel; it was only meant to save time
	}
	if err != nil {
		return fmt.Errorf("sync_file_range: %w", err)
	}
	return nil
}

// allocate asks for room for n bytes at off, beyond the end of f, which stays where it
// is. It is a favour: a file system that cannot, or has not so much, says so in time.
func allocate(f *os.File, off, n int64) {
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, off, n)
}
