package store

import (
	"testing"

	"golang.org/x/sys/unix"
	codes "modernc.org/sqlite/lib"

	"github.com/rai-project/raid/sshd/queue"
)

func TestVerdict(t *testing.T) {
	tests := []struct {
		code       int
		committing bool
		want       error
	}{
		{codes.SQLITE_FULL, false, ErrUnavailable},
		{codes.SQLITE_FULL, true, ErrUnavailable},
		{codes.SQLITE_BUSY, false, ErrUnavailable},
		{codes.SQLITE_BUSY_SNAPSHOT, true, ErrUnavailable},
		{codes.SQLITE_IOERR_READ, false, ErrUnavailable},
		{codes.SQLITE_IOERR_READ, true, ErrAmbiguous},
		{codes.SQLITE_IOERR_FSYNC, false, ErrUnavailable},
		{codes.SQLITE_IOERR_FSYNC, true, ErrAmbiguous},
		{codes.SQLITE_IOERR_WRITE, true, ErrUnavailable},
		{codes.SQLITE_CANTOPEN, false, ErrUnavailable},
		{codes.SQLITE_CANTOPEN, true, ErrAmbiguous},
		{codes.SQLITE_CORRUPT, false, nil},
		{codes.SQLITE_CORRUPT, true, ErrAmbiguous},
		{codes.SQLITE_NOTADB, false, nil},
		{codes.SQLITE_TOOBIG, false, nil},
	}
	for _, tt := range tests {
		if got := verdict(tt.code, tt.committing); got != tt.want {
			t.Errorf("verdict(%d, %v) = %v, want %v", tt.code, tt.committing, got, tt.want)
		}
	}
}

// TestSettle: after an outcome nobody knows, the first call writes the log anew, and
// neither rows nor revision move.
func TestSettle(t *testing.T) {
	calls := map[string]func(*disk) (Rev, error){
		"Load": func(d *disk) (Rev, error) { return d.Load(t.Context(), nil, func(queue.Row) error { return nil }) },
		"Commit": func(d *disk) (Rev, error) {
			rev, err := d.Commit(t.Context(), 1, nil)
			return rev - 1, err
		},
	}
	for name, call := range calls {
		s, err := OpenSQLite(t.Context(), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Commit(t.Context(), 0, nil); err != nil {
			t.Fatal(err)
		}
		d := s.(*disk)
		d.unsettled = true
		if rev, err := call(d); rev != 1 || err != nil || d.unsettled {
			t.Errorf("%s when unsettled = %d, %v, still unsettled %v; want revision 1", name, rev, err, d.unsettled)
		}
		var settled int
		if err := d.readers.QueryRow("SELECT settled FROM meta").Scan(&settled); err != nil || settled != 1 {
			t.Errorf("%s when unsettled settled %d times, %v, want 1", name, settled, err)
		}
	}
}

func TestNetworkFS(t *testing.T) {
	tests := []struct {
		magic uint32
		want  string
	}{
		{unix.EXT4_SUPER_MAGIC, ""},
		{unix.XFS_SUPER_MAGIC, ""},
		{unix.BTRFS_SUPER_MAGIC, ""},
		{unix.TMPFS_MAGIC, ""},
		{unix.OVERLAYFS_SUPER_MAGIC, ""},
		{0x2fc12fc1, ""}, // ZFS
		{unix.NFS_SUPER_MAGIC, "NFS"},
		{unix.CIFS_SUPER_MAGIC, "SMB"},
		{unix.SMB2_SUPER_MAGIC, "SMB"},
		{unix.V9FS_MAGIC, "9P"},
		{unix.CEPH_SUPER_MAGIC, "Ceph"},
		{0x0bd00bd0, "Lustre"},
	}
	for _, tt := range tests {
		if got := networkFS(tt.magic); got != tt.want {
			t.Errorf("networkFS(%#x) = %q, want %q", tt.magic, got, tt.want)
		}
	}
	for typ, want := range map[string]string{"": "FUSE", "fuse.sshfs": "fuse.sshfs", "fuseblk": "", "fuse.fuse-overlayfs": ""} {
		if got := networkFUSE(typ); got != want {
			t.Errorf("networkFUSE(%q) = %q, want %q", typ, got, want)
		}
	}
	if got := mountType("/proc"); got != "proc" {
		t.Errorf("mountType(/proc) = %q, want proc", got)
	}
}
