package store_test

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// childVar makes a run of this test binary a child that opens the folder it names.
const childVar = "RAID_STORE_TEST_DIR"

// child starts the test named in a process of its own.
func child(t *testing.T, test, dir string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+test+"$")
	cmd.Env = append(os.Environ(), childVar+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

func open(t *testing.T, dir string, views ...store.View) store.Store {
	t.Helper()
	s, err := store.OpenSQLite(t.Context(), dir, nil, views...)
	if err != nil {
		t.Fatalf("OpenSQLite = %v", err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestKill: what a process that was killed had acknowledged is there, and of what it
// had not, whole batches or nothing.
func TestKill(t *testing.T) {
	if dir := os.Getenv(childVar); dir != "" {
		commitForever(t, dir)
	}
	dir := t.TempDir()
	var acked store.Rev
	for range 20 {
		cmd, acks := child(t, "TestKill", dir)
		for range 1 + rand.IntN(60) {
			if !acks.Scan() {
				t.Fatalf("the child stopped after %d: %v", acked, cmd.Wait())
			}
			n, err := strconv.ParseUint(acks.Text(), 10, 64)
			if err != nil || store.Rev(n) != acked+1 {
				t.Fatalf("the child said %q after %d", acks.Text(), acked)
			}
			acked++
		}
		cmd.Process.Kill()
		for acks.Scan() { // what it had said by then
			acked++
		}
		cmd.Wait()
		acked = checkKilled(t, dir, acked)
	}
}

// commitForever commits batches that each put their revision into a new row, a row
// that all share and a list, and says so on stdout.
func commitForever(t *testing.T, dir string) {
	s, err := store.OpenSQLite(context.Background(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	rev, err := s.Load(context.Background(), nil, nil)
	for ; err == nil; fmt.Println(rev) {
		v := fmt.Append(nil, rev+1)
		rev, err = s.Commit(context.Background(), rev, []queue.Write{
			{Row: queue.Row{Table: "one", Key: "newest", Value: v}},
			{Row: queue.Row{Table: "many", Key: string(v), Value: bytes.Repeat(v, 500)}, Lists: []string{"all"}, Score: int64(rev) + 1},
		})
	}
	t.Fatal(err)
}

func checkKilled(t *testing.T, dir string, acked store.Rev) store.Rev {
	t.Helper()
	s, err := store.OpenSQLite(t.Context(), dir, nil)
	if err != nil {
		t.Fatalf("open after a kill: %v", err)
	}
	defer s.Close()
	rows := 0
	rev, err := s.Load(t.Context(), []string{"many"}, func(queue.Row) error { rows++; return nil })
	if err != nil || rev < acked || rows != int(rev) {
		t.Fatalf("after a kill: revision %d with %d rows, %v; acknowledged were %d", rev, rows, err, acked)
	}
	newest, err := s.Get(t.Context(), "one", "newest")
	if err != nil || string(newest) != fmt.Sprint(rev) {
		t.Fatalf("after a kill at revision %d: newest = %q, %v", rev, newest, err)
	}
	if all, err := s.List(t.Context(), "all", 0, int(rev)+1); err != nil || len(all) != int(rev) || all[0].Key != fmt.Sprint(rev) {
		t.Fatalf("after a kill at revision %d: %d rows listed, %v", rev, len(all), err)
	}
	if got := query(t, dir, "PRAGMA quick_check"); got != "ok" {
		t.Fatalf("after a kill at revision %d: quick_check says %q", rev, got)
	}
	return rev
}

// query asks the file as staff do, past the store.
func query(t *testing.T, dir, text string) string {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "raid.db")+"?_busy_timeout=5000")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var s string
	if err := db.QueryRowContext(t.Context(), text).Scan(&s); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return s
}

// TestLocked: one process at a time, and the other is told which.
func TestLocked(t *testing.T) {
	if dir := os.Getenv(childVar); dir != "" {
		s, err := store.OpenSQLite(context.Background(), dir, nil)
		fmt.Println("open:", err)
		if err == nil {
			bufio.NewReader(os.Stdin).ReadByte() // until killed
			s.Close()
		}
		os.Exit(0)
	}
	dir := t.TempDir()
	s := open(t, dir)
	_, err := store.Lock(dir)
	want := fmt.Sprintf("process %d holds %s", os.Getpid(), filepath.Join(dir, "lock"))
	if !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), want) {
		t.Errorf("Lock while open = %v, want ErrLocked and %q", err, want)
	}
	cmd, out := child(t, "TestLocked", dir)
	if !out.Scan() || !strings.Contains(out.Text(), want) {
		t.Errorf("a second process says %q, want %q", out.Text(), want)
	}
	cmd.Wait()
	s.Close()

	hold, in, err := holdOpen(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := store.OpenSQLite(t.Context(), dir, nil); !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint("process ", hold.Process.Pid)) {
		t.Errorf("OpenSQLite while process %d has it = %v, want ErrLocked", hold.Process.Pid, err)
	}
	hold.Process.Kill()
	hold.Wait()
	open(t, dir)
}

// holdOpen starts a process that has the store open until it is killed.
func holdOpen(t *testing.T, dir string) (*exec.Cmd, *os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestLocked$")
	cmd.Env, cmd.Stdin = append(os.Environ(), childVar+"="+dir), r
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil && line != "open: <nil>\n" {
		err = fmt.Errorf("the child says %q", line)
	}
	return cmd, w, err
}

// TestLockOfTheDead: the lock of a process that is gone, kept by one that it was just
// starting, is waited for.
func TestLockOfTheDead(t *testing.T) {
	dir := t.TempDir()
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, dead.Process.Pid)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { f.Close() })
	l, err := store.Lock(dir)
	if err != nil {
		t.Fatalf("Lock = %v, want it once the other is closed", err)
	}
	l.Close()
}

// A failed open leaves nothing locked, and a lock file left behind locks nothing.
func TestOpenAgain(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "lock"), []byte("1\nleft behind by a crash"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.OpenSQLite(t.Context(), dir, nil, store.View{Name: "no such name"}); err == nil {
		t.Error("OpenSQLite with a view of no plain name succeeded")
	}
	open(t, dir)
}

func TestFileModes(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "raid.db"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if _, err := s.Commit(t.Context(), 0, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"raid.db", "raid.db-wal", "raid.db-shm", "lock"} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode() != 0o600 {
			t.Errorf("mode of %s = %v, %v, want 0600", name, st.Mode(), err)
		}
	}
}

func TestForeignFiles(t *testing.T) {
	tests := []struct{ name, made, want string }{
		{"another program's", "CREATE TABLE theirs (x)", "not a database of raid"},
		{"a newer raid's", "CREATE TABLE x (x); PRAGMA application_id = 0x72616964; PRAGMA user_version = 99", "schema version 99 is newer"},
	}
	for _, tt := range tests {
		dir := t.TempDir()
		db, err := sql.Open("sqlite", filepath.Join(dir, "raid.db"))
		if err == nil {
			_, err = db.Exec(tt.made)
		}
		if err != nil {
			t.Fatal(err)
		}
		db.Close()
		if _, err := store.OpenSQLite(t.Context(), dir, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("OpenSQLite of %s file = %v, want %q", tt.name, err, tt.want)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "raid.db"), bytes.Repeat([]byte("no database"), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.OpenSQLite(t.Context(), dir, nil); err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("OpenSQLite of a text file = %v, want an error that will not pass", err)
	}
}

// TestViews: staff read JSON rows as columns, while the store is open, and rows that
// are no JSON are no obstacle.
func TestViews(t *testing.T) {
	dir := t.TempDir()
	jobs := store.View{Name: "jobs", Tables: []string{"job", "old"}, Columns: []string{"id", "user"}}
	s := open(t, dir, jobs)
	_, err := s.Commit(t.Context(), 0, []queue.Write{
		{Row: queue.Row{Table: "job", Key: "1", Value: []byte(`{"id":1,"user":"ada"}`)}},
		{Row: queue.Row{Table: "old", Key: "2", Value: []byte(`{"id":2,"user":"bob","team":"t7"}`)}},
		{Row: queue.Row{Table: "job", Key: "x", Value: []byte("\x00 no json")}},
		{Row: queue.Row{Table: "key", Key: "3", Value: []byte(`{"id":3}`)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Fold(s); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ text, want string }{
		{`SELECT group_concat(id || "user", ' ') FROM (SELECT * FROM jobs ORDER BY id DESC)`, "2bob 1ada"},
		{"SELECT typeof(id) FROM jobs", "integer"},
		{"SELECT count(*) FROM rows", "4"},
		{"SELECT value FROM rows WHERE tbl = 'key' AND key = '3'", `{"id":3}`},
		{"SELECT count(*) = max(version) FROM migration", "1"},
	}
	for _, tt := range tests {
		if got := query(t, dir, tt.text); got != tt.want {
			t.Errorf("%s = %q, want %q", tt.text, got, tt.want)
		}
	}
	s.Close()

	const version = "PRAGMA schema_version"
	before := query(t, dir, version)
	open(t, dir, jobs).Close()
	if after := query(t, dir, version); after != before {
		t.Errorf("opening with the same views made them anew: schema version %s, was %s", after, before)
	}
	jobs.Columns = append(jobs.Columns, "team")
	open(t, dir, jobs)
	if got := query(t, dir, "SELECT team FROM jobs WHERE id = 2"); got != "t7" {
		t.Errorf("the new column of a view = %q, want t7", got)
	}
}

// TestDiskFull: a batch that finds no room changes nothing, and the next that does is
// committed as if nothing had been.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, 4<<20)
	s := open(t, dir)
	big := make([]byte, 300<<10)
	var rev store.Rev
	var full error
	for i := 0; full == nil && i < 100; i++ {
		next, err := s.Commit(t.Context(), rev, []queue.Write{{Row: queue.Row{Table: "t", Key: fmt.Sprintf("%03d", i), Value: big}}})
		if full = err; err == nil {
			rev = next
		}
	}
	if !errors.Is(full, store.ErrUnavailable) || errors.Is(full, store.ErrAmbiguous) {
		t.Fatalf("Commit on a full disk = %v, want ErrUnavailable", full)
	}
	rows := 0
	got, err := s.Load(t.Context(), []string{"t"}, func(queue.Row) error { rows++; return nil })
	if err != nil || got != rev || rows != int(rev) {
		t.Errorf("Load on a full disk = revision %d with %d rows, %v, want %d", got, rows, err, rev)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=32m"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), rev, []queue.Write{{Row: queue.Row{Table: "t", Key: "last", Value: big}}}); err != nil {
		t.Errorf("Commit once there is room = %v", err)
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
