package store

import (
	"database/sql"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

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
		s, err := OpenSQLite(t.Context(), t.TempDir(), nil)
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

// TestMigrate: a file of the first schema is read as it was, and its rows leave their
// lists as before.
func TestMigrate(t *testing.T) {
	dir := t.TempDir()
	old, err := sql.Open("sqlite", filepath.Join(dir, "raid.db"))
	if err != nil {
		t.Fatal(err)
	}
	put := queue.Write{Row: queue.Row{Table: "past", Key: "1", Value: []byte("one")}, Lists: []string{"all", "user/ada"}, Score: 7}
	for _, step := range []string{migrations()[0], fmt.Sprintf(`
		CREATE TABLE migration (version INTEGER PRIMARY KEY, at TEXT NOT NULL);
		INSERT INTO migration VALUES (1, '');
		PRAGMA application_id = %d;
		PRAGMA user_version = 1;
		UPDATE meta SET rev = 5;
		INSERT INTO row VALUES (x'%x', x'%x', x'%x', x'%x')`, applicationID, put.Table, put.Key, put.Value, places(put)),
		`INSERT INTO list SELECT CAST(name AS BLOB), 7, tbl, key FROM row, (SELECT 'all' AS name UNION SELECT 'user/ada')`} {
		if _, err := old.Exec(step); err != nil {
			t.Fatal(err)
		}
	}
	old.Close()
	s, err := OpenSQLite(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	list := func() int {
		rows, err := s.List(t.Context(), "user/ada", 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		return len(rows)
	}
	if n := list(); n != 1 {
		t.Errorf("the list of the old file has %d rows, want 1", n)
	}
	if _, err := s.Commit(t.Context(), 5, []queue.Write{{Row: queue.Row{Table: "past", Key: "1"}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.(*disk).fold(); err != nil {
		t.Fatal(err)
	}
	if n := list(); n != 0 {
		t.Errorf("the list has %d rows after its row was removed, want none", n)
	}
}

// TestFoldFails: while rows cannot follow the log, commits do not wait for each try.
func TestFoldFails(t *testing.T) {
	var tries atomic.Int64
	s, err := OpenSQLite(t.Context(), t.TempDir(), func(string, ...any) { tries.Add(1) }) // it is told of each that fails
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	d := s.(*disk)
	var rev Rev
	commit := func(writes ...queue.Write) {
		t.Helper()
		if rev, err = s.Commit(t.Context(), rev, writes); err != nil {
			t.Fatal(err)
		}
	}
	row := func(key string, lists ...string) queue.Write {
		return queue.Write{Row: queue.Row{Table: "t", Key: key, Value: make([]byte, 500)}, Lists: lists}
	}
	commit(row("sick", "a"))
	if err := d.fold(); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	_, err = d.execLocked(t.Context(), "UPDATE row SET places = x'00ff'")
	d.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	many := []queue.Write{row("sick", "b")}
	for n := range foldRows {
		many = append(many, row(fmt.Sprint(n)))
	}
	commit(many...)
	begun := time.Now()
	if err := d.fold(); err == nil {
		t.Fatal("a row whose places cannot be read was moved")
	}
	for range 50 {
		commit(row("new"))
	}
	if n, most := tries.Load(), 1+int64(time.Since(begun)/foldAgain); n > most {
		t.Errorf("%d tries to fold in 50 commits, want %d at most", n, most)
	}
}
