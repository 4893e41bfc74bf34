// Package backup takes copies of what a raid keeps, and moves it between stores.
//
// [Take] writes a state folder, or a tar of one, that `raid serve --state` starts from:
// the rows of the store as they were at one moment, the keys, all uploads and /build
// archives, and the output of the jobs that had ended by then. raid may run meanwhile.
// [Copy] moves the rows of one store to another.
//
// It promises: a backup that has its final name is whole and on disk; jobs that had ended
// are there with all they left, unless raid removed it meanwhile; jobs that had not are
// run again, or taken up by the runner that still has them; and neither a job's number nor
// a fence is given out twice, for a backup counts on from well beyond. Non-goals: when to
// take backups, where to keep them, encryption, and what lies in a bucket of S3.
package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// How far a backup counts on: what may have been given out since it was taken.
const (
	leapIDs    = 10_000
	leapFences = 1 << 32
)

// keyFiles are those of a state folder that a deployment is.
var keyFiles = [...]string{"host_key", "host_key.pub", "admin", "admin.pub"}

// Config says what is backed up, and where to.
type Config struct {
	Dir    string      // the state folder
	Store  store.Store // what to read rows from; nil: DIR/raid.db
	Tables []string    // of the rows: sshd.Tables
	To     string      // a folder that is not there or empty; or a new FILE.tar, or "-" for a tar to Stdout
	Stdout *os.File
	Told   func(Report) // nil, or hears how far it is, often
}

// A Report says what a backup has.
type Report struct {
	Files  int   // besides the rows
	Bytes  int64 // of them
	Linked int   // how many are links and took no room
	Jobs   int   // ended ones whose output is there
	Next   int64 // the number of the next job, once it is restored
	Gone   int   // files that raid removed while they were copied
}

// Take makes a backup. With an error there is none.
func Take(ctx context.Context, c Config) (Report, error) {
	t := &taking{Config: c}
	if t.Told == nil {
		t.Told = func(Report) {}
	}
	if err := t.take(ctx); err != nil {
		return t.r, fmt.Errorf("backup: %w", err)
	}
	return t.r, nil
}

// A taking is one Take.
type taking struct {
	Config
	r      Report
	sink   sink
	undone map[int64]bool // jobs that had not ended
	next   int64          // of the store, before the leap
}

func (t *taking) take(ctx context.Context) (err error) {
	if t.sink, err = newSink(t.To, t.Stdout); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.sink.close(err == nil)) }()
	// The rows first: whatever they name is there already, and stays for now.
	if err := t.rows(ctx); err != nil {
		return err
	}
	for _, name := range keyFiles {
		if err := t.file(name); err != nil {
			return err
		}
	}
	if err := t.tree(ctx, filepath.Join("blobs", "sha256")); err != nil {
		return err
	}
	return t.output(ctx)
}

// rows makes raid.db of the backup and learns from it which jobs have ended.
func (t *taking) rows(ctx context.Context) error {
	dir, err := t.sink.scratch()
	if err != nil {
		return err
	}
	if t.Store == nil {
		if err := store.SnapshotSQLite(ctx, t.Dir, filepath.Join(dir, "raid.db")); err != nil {
			return err
		}
	}
	if err := t.prepare(ctx, dir); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, "lock")); err != nil {
		return err
	}
	return t.sink.own("raid.db")
}

// prepare fills the database of the backup, if it is not a snapshot, and has it count on.
func (t *taking) prepare(ctx context.Context, dir string) (err error) {
	db, err := store.OpenSQLite(ctx, dir, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if t.Store != nil {
		if _, err := Copy(ctx, t.Store, db, t.Tables, nil); err != nil {
			return err
		}
	}
	t.undone, t.next = map[int64]bool{}, 1
	var meta *queue.Row
	rev, err := db.Load(ctx, []string{queue.TableMeta, queue.TableJob}, func(r queue.Row) error {
		if r.Table == queue.TableMeta {
			meta = &r
			return nil
		}
		id, err := strconv.ParseInt(r.Key, 10, 64)
		t.undone[id] = true
		return err
	})
	if err != nil || meta == nil {
		return err // a raid that never had a job
	}
	if t.next, err = queue.NextID(*meta); err != nil {
		return err
	}
	t.r.Next = t.next + leapIDs
	leapt, err := queue.Leap(*meta, leapIDs, leapFences)
	if err != nil {
		return err
	}
	_, err = db.Commit(ctx, rev, []queue.Write{{Row: leapt}})
	return err
}

// output takes the output of jobs that had ended. That of others is still being written:
// their runners have all of it, or they run again.
func (t *taking) output(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(t.Dir, "spool"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		id, perr := strconv.ParseInt(e.Name(), 10, 64)
		if perr != nil || id >= t.next || t.undone[id] {
			continue
		}
		if err := t.tree(ctx, filepath.Join("spool", e.Name())); err != nil {
			return err
		}
		t.r.Jobs++
	}
	return err
}

// tree takes all files below a folder.
func (t *taking) tree(ctx context.Context, rel string) error {
	return filepath.WalkDir(filepath.Join(t.Dir, rel), func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist): // raid removes what is old
			return nil
		case err != nil:
			return err
		case !d.Type().IsRegular():
			return nil
		}
		name, err := filepath.Rel(t.Dir, path)
		if err != nil {
			return err
		}
		return t.file(name)
	})
}

// file takes one file.
func (t *taking) file(name string) error {
	n, linked, err := t.sink.take(filepath.Join(t.Dir, name), name)
	if errors.Is(err, fs.ErrNotExist) {
		t.r.Gone++
		return nil
	}
	if err != nil {
		return err
	}
	t.r.Files++
	t.r.Bytes += n
	if linked {
		t.r.Linked++
	}
	t.Told(t.r)
	return nil
}
