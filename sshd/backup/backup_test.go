package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

var tables = append(queue.Tables(), queue.TablePast, "user")

func commit(t *testing.T, s store.Store, rev store.Rev, writes ...queue.Write) store.Rev {
	t.Helper()
	rev, err := s.Commit(t.Context(), rev, writes)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func put(table, key, value string) queue.Write {
	return queue.Write{Row: queue.Row{Table: table, Key: key, Value: []byte(value)}}
}

// filled returns a store with jobs finished, one that waits, and a person.
func filled(t *testing.T, jobs int) *store.Memory {
	s := store.NewMemory()
	rev := commit(t, s, 0, put(queue.TableMeta, "core", fmt.Sprintf(`{"next":%d,"fence":7,"turns":1}`, jobs+2)),
		put("user", "ada", "{}"), put(queue.TableJob, queue.Key(int64(jobs+1)), `{"id":1}`))
	for id := int64(1); id <= int64(jobs); id++ {
		rec := job.Record{}
		rec.ID, rec.User, rec.Team = id, "ada", "team"+strconv.FormatInt(id%3, 10)
		rev = commit(t, s, rev, queue.PastRow(&rec))
	}
	return s
}

func TestCopy(t *testing.T) {
	const jobs = 1200 // several batches, and pages of history
	from, to := filled(t, jobs), store.NewMemory()
	counts, err := Copy(t.Context(), from, to, tables, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range counts {
		if want := map[string]int{queue.TableMeta: 1, queue.TableJob: 1, queue.TablePast: jobs, "user": 1}[c.Table]; c.From != want || c.To != want {
			t.Errorf("table %s: %d and %d rows, want %d", c.Table, c.From, c.To, want)
		}
	}
	for _, list := range []string{queue.ListAll, queue.ListUser("ada"), queue.ListTeam("team1")} {
		a, err := from.List(t.Context(), list, 0, jobs)
		b, berr := to.List(t.Context(), list, 0, jobs)
		if err != nil || berr != nil || len(a) == 0 || fmt.Sprint(a) != fmt.Sprint(b) {
			t.Errorf("list %s has %d rows, want the same %d; %v, %v", list, len(b), len(a), err, berr)
		}
	}
	if err := Whole(t.Context(), to); err != nil {
		t.Error(err)
	}
	if _, err := Copy(t.Context(), from, to, tables, nil); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("copied into a store with rows: %v", err)
	}
}

// What would not be copied is not left behind in silence.
func TestCopyUnknown(t *testing.T) {
	from, err := store.OpenSQLite(t.Context(), t.TempDir(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	commit(t, from, 0, put("user", "ada", "{}"), put("rank", "m1", "{}"))
	if _, err := Copy(t.Context(), from, store.NewMemory(), tables, nil); err == nil || !strings.Contains(err.Error(), `rows of "rank"`) {
		t.Errorf("Copy = %v", err)
	}
}

// A torn store fails after some commits, and a losing one forgets a row.
type torn struct {
	store.Store
	left int
	lose string
}

func (s *torn) Commit(ctx context.Context, rev store.Rev, writes []queue.Write) (store.Rev, error) {
	if s.left--; s.left < 0 {
		return 0, store.ErrUnavailable
	}
	kept := writes
	for i, w := range writes {
		if w.Key == s.lose {
			kept = append(append([]queue.Write{}, writes[:i]...), writes[i+1:]...)
		}
	}
	return s.Store.Commit(ctx, rev, kept)
}

func TestCopyTorn(t *testing.T) {
	to := store.NewMemory()
	if _, err := Copy(t.Context(), filled(t, 1200), &torn{Store: to, left: 2}, tables, nil); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Copy = %v", err)
	}
	if err := Whole(t.Context(), to); err == nil || !strings.Contains(err.Error(), "filled by half") {
		t.Errorf("Whole = %v", err)
	}
	if _, err := Copy(t.Context(), filled(t, 1), to, tables, nil); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("copied into half a store: %v", err)
	}
}

func TestCopyLoses(t *testing.T) {
	_, err := Copy(t.Context(), filled(t, 5), &torn{Store: store.NewMemory(), left: 99, lose: queue.Key(3)}, tables, nil)
	if err == nil || !strings.Contains(err.Error(), "table past has 5 rows in the source and 4 in the target") {
		t.Errorf("Copy = %v", err)
	}
}

// A backup of a raid that commits all the time is of one moment, and what stood only in
// the log is in it.
func TestTakeWhileWriting(t *testing.T) {
	dir := t.TempDir()
	db, err := store.OpenSQLite(t.Context(), dir, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rev := commit(t, db, 0, put(queue.TableMeta, "core", `{"next":5,"fence":7,"turns":1}`), put("user", "n", "0"))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	some := make(chan struct{})
	wg.Go(func() {
		for n := 1; ctx.Err() == nil; n++ { // user n is how many users n-… there are
			var err error
			rev, err = db.Commit(context.Background(), rev, []queue.Write{put("user", "n", strconv.Itoa(n)), put("user", fmt.Sprintf("n-%d", n), "{}")})
			if err != nil {
				t.Error(err)
			}
			if n == 10 {
				close(some)
			}
		}
	})
	<-some
	for i := range 3 {
		to := filepath.Join(t.TempDir(), "b")
		r, err := Take(t.Context(), Config{Dir: dir, Tables: tables, To: to})
		if err != nil || r.Next != 5+leapIDs || r.Gone != len(keyFiles) {
			t.Errorf("Take = %+v, %v", r, err)
		}
		n, users := readUsers(t, to)
		if n == 0 || n != users {
			t.Errorf("backup %d has %d users and says %d", i, users, n)
		}
	}
	stop()
	wg.Wait()
}

func readUsers(t *testing.T, dir string) (said, users int) {
	t.Helper()
	db, err := store.OpenSQLite(t.Context(), dir, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	_, err = db.Load(t.Context(), []string{"user"}, func(r queue.Row) error {
		if r.Key == "n" {
			said, err = strconv.Atoi(string(r.Value))
			return err
		}
		users++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return said, users
}

// A backup that fails leaves nothing, and one that was killed is no obstacle.
func TestTakeFails(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "raid.db"), []byte("not a database, but long enough to look at it"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{filepath.Join(t.TempDir(), "b"), filepath.Join(t.TempDir(), "b.tar")} {
		if strings.HasSuffix(to, ".tar") {
			os.WriteFile(to+partial, []byte("old"), 0o600)
		} else if err := os.MkdirAll(filepath.Join(to+partial, "blobs"), 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := Take(t.Context(), Config{Dir: dir, Tables: tables, To: to}); err == nil {
			t.Errorf("a backup to %s of what is no database", to)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(to), "*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}
