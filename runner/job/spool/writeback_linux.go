package spool

import (
	"os"

	"golang.org/x/sys/unix"
)

// writeBack has the kernel begin to write n bytes at off to the disk. It only saves
// time and makes nothing durable, so what goes wrong is for Sync to meet.
func writeBack(f *os.File, off, n int64) {
	_ = unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
}

// linked reports whether f has a name besides ours.
func linked(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 1
}
