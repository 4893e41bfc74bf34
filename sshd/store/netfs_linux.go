package store

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// refuseNetwork returns an error if dir lies on a file system of another machine:
// SQLite's write-ahead log needs memory shared between all who open it and locks
// that hold, and network file systems promise neither (sqlite.org/wal.html, 1.).
func refuseNetwork(dir string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	name := networkFS(uint32(s.Type))
	if name == "" && uint32(s.Type) == unix.FUSE_SUPER_MAGIC {
		name = networkFUSE(mountType(dir))
	}
	if name == "" {
		return nil
	}
	return fmt.Errorf("%s is on %s, a network file system, where SQLite cannot keep its promises: use a local disk, or the Redis store", dir, name)
}

// networkFS names the network file system of a statfs(2) magic, or returns "".
func networkFS(magic uint32) string {
	switch magic {
	case unix.NFS_SUPER_MAGIC:
		return "NFS"
	case unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC:
		return "SMB"
	case unix.V9FS_MAGIC:
		return "9P"
	case unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC:
		return "AFS"
	case unix.CODA_SUPER_MAGIC:
		return "Coda"
	case unix.NCP_SUPER_MAGIC:
		return "NCP"
	case unix.CEPH_SUPER_MAGIC:
		return "Ceph"
	case unix.OCFS2_SUPER_MAGIC:
		return "OCFS2"
	case 0x0bd00bd0: // no name in x/sys; lustre/include/uapi/linux/lustre/lustre_user.h
		return "Lustre"
	case 0x01161970:
		return "GFS2"
	case 0x47504653: // "GPFS"
		return "GPFS"
	case 0x19830326:
		return "BeeGFS"
	}
	return ""
}

// networkFUSE returns typ, a mount's type, unless it is one that is known to be local:
// what stands behind a FUSE mount, its magic does not tell.
func networkFUSE(typ string) string {
	switch typ {
	case "fuseblk", "fuse.fuse-overlayfs", "virtiofs":
		return ""
	case "":
		return "FUSE"
	}
	return typ
}

// mountType returns the type of the file system mounted where dir lies, or "".
func mountType(dir string) string {
	var s unix.Stat_t
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil || unix.Stat(dir, &s) != nil {
		return ""
	}
	defer f.Close()
	want := fmt.Sprintf("%d:%d", unix.Major(s.Dev), unix.Minor(s.Dev))
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// proc(5): ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG…] - TYPE SOURCE …
		head, tail, _ := strings.Cut(lines.Text(), " - ")
		h, t := strings.Fields(head), strings.Fields(tail)
		if len(h) > 2 && len(t) > 0 && h[2] == want {
			return t[0]
		}
	}
	return ""
}
