package store

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/rai-project/raid/sshd/queue"
)

// This file brings the rows of a SQLite store up to date with its log.

// When the rows follow the log: after so long without a commit, or so long after the
// first, or when so many rows wait, or so many bytes in the log.
const (
	foldQuiet = 100 * time.Millisecond
	foldAge   = time.Second
	foldAgain = 10 * time.Second // after a failure
	foldRows  = 4096
	foldBytes = 32 << 20
)

// mostBytes is how long the log may become when rows cannot follow it: what it holds is
// in memory, too, and is read at every start.
const mostBytes = 1 << 30

// ripe reports whether the tail should be folded at once.
func (d *disk) ripe() bool {
	rows, bytes := d.tail.size()
	return rows >= foldRows || bytes >= foldBytes
}

// keepFolding brings rows up to date until the store is closed. What could not be done
// stays in the log, and is tried again.
func (d *disk) keepFolding() {
	defer d.fold()
	again, wake := time.NewTimer(0), d.wake
	defer again.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-wake:
		case <-again.C:
		}
		wake = d.wake
		if !d.gatherTail() {
			return
		}
		if err := d.fold(); err != nil {
			d.logf("rows cannot follow the log of raid.db, where everything is safe and which grows: %v", err)
			again.Reset(foldAgain)
			wake = nil // or every commit would wait for it to fail once more
		}
	}
}

// gatherTail waits until it is time to fold; false means that the store is closed.
func (d *disk) gatherTail() bool {
	first, quiet := time.Now(), time.NewTimer(foldQuiet)
	defer quiet.Stop()
	for !d.ripe() && time.Since(first) < foldAge {
		select {
		case <-d.stop:
			return false
		case <-quiet.C:
			return true
		case <-d.wake:
			quiet.Reset(foldQuiet)
		}
	}
	return true
}

// fold writes the tail's rows to the file and empties the log.
func (d *disk) fold() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, bytes := d.tail.size(); bytes == 0 {
		return nil
	}
	ctx := context.Background()
	if err := d.settleLocked(ctx); err != nil {
		return err
	}
	fresh, _ := d.tail.writes(func(queue.Write) bool { return true })
	err := d.transactLocked(ctx, func() error {
		for _, w := range fresh {
			if err := d.writeLocked(ctx, w); err != nil {
				return fmt.Errorf("%s %q: %w", w.Table, w.Key, err)
			}
		}
		if _, err := d.execLocked(ctx, "DELETE FROM log"); err != nil {
			return err
		}
		_, err := d.execLocked(ctx, "UPDATE meta SET rev = ?", int64(d.rev))
		return err
	})
	if err == nil {
		d.tail.clear()
	}
	return err
}

// The statements of a write: ?1 table, ?2 key, ?3 value, ?4 places.
const (
	putSQL    = "INSERT INTO row (tbl, key, value, places) VALUES (?1, ?2, ifnull(?3, x''), x'') ON CONFLICT DO UPDATE SET value = excluded.value WHERE places = x''"
	dropSQL   = "DELETE FROM row WHERE tbl = ?1 AND key = ?2 AND places = x''"
	insertSQL = "INSERT INTO row (tbl, key, value, places) VALUES (?1, ?2, ifnull(?3, x''), ifnull(?4, x'')) ON CONFLICT DO NOTHING"
	updateSQL = "UPDATE row SET value = ifnull(?3, x'') WHERE tbl = ?1 AND key = ?2 AND places = ifnull(?4, x'')"
	moveSQL   = "UPDATE row SET value = ifnull(?3, x''), places = ifnull(?4, x'') WHERE tbl = ?1 AND key = ?2"
	deleteSQL = "DELETE FROM row WHERE tbl = ?1 AND key = ?2"
	placesSQL = "SELECT places FROM row WHERE tbl = ?1 AND key = ?2"
	leaveSQL  = "DELETE FROM list WHERE tbl = ?1 AND key = ?2 AND name = ?3 AND score = ?4"
)

// writeLocked applies one write. The common cases are one statement each, as a commit
// is made of them: a row in no list that is put or removed. A new row in lists, as a
// finished job is, takes two.
func (d *disk) writeLocked(ctx context.Context, w queue.Write) error {
	key := []any{[]byte(w.Table), []byte(w.Key)}
	switch {
	case w.Value == nil:
		if done, err := d.changedLocked(ctx, dropSQL, key...); err != nil || done {
			return err
		}
		if err := d.leaveLocked(ctx, key); err != nil {
			return err
		}
		_, err := d.execLocked(ctx, deleteSQL, key...)
		return err
	case len(w.Lists) == 0:
		if done, err := d.changedLocked(ctx, putSQL, append(key, w.Value)...); err != nil || done {
			return err
		}
	}
	return d.placeLocked(ctx, w, append(key, w.Value, places(w)))
}

// placeLocked applies a write of a row that is in lists or is to be.
func (d *disk) placeLocked(ctx context.Context, w queue.Write, args []any) error {
	if isNew, err := d.changedLocked(ctx, insertSQL, args...); err != nil {
		return err
	} else if isNew {
		return d.enterLocked(ctx, w)
	}
	if stays, err := d.changedLocked(ctx, updateSQL, args...); err != nil || stays {
		return err
	}
	if err := d.leaveLocked(ctx, args[:2]); err != nil {
		return err
	}
	if _, err := d.execLocked(ctx, moveSQL, args...); err != nil {
		return err
	}
	return d.enterLocked(ctx, w)
}

// leaveLocked takes a row out of the lists its places name.
func (d *disk) leaveLocked(ctx context.Context, key []any) error {
	var b []byte
	err := d.writer.QueryRowContext(ctx, placesSQL, key...).Scan(&b)
	if errors.Is(err, sql.ErrNoRows) || err == nil && len(b) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	score, names, err := parsePlaces(b)
	for _, name := range names {
		if _, lerr := d.execLocked(ctx, leaveSQL, key[0], key[1], []byte(name), score); lerr != nil {
			return lerr
		}
	}
	return err
}

// enterLocked puts a row that stands in no list into those of w.
func (d *disk) enterLocked(ctx context.Context, w queue.Write) error {
	if len(w.Lists) == 0 {
		return nil
	}
	var text strings.Builder
	text.WriteString("INSERT OR IGNORE INTO list (tbl, key, score, name) VALUES ")
	args := []any{[]byte(w.Table), []byte(w.Key), w.Score}
	for i, name := range w.Lists {
		if i > 0 {
			text.WriteString(", ")
		}
		fmt.Fprintf(&text, "(?1, ?2, ?3, ?%d)", 4+i)
		args = append(args, []byte(name))
	}
	_, err := d.execLocked(ctx, text.String(), args...)
	return err
}

// places encodes the lists a row stands in, for comparison.
func places(w queue.Write) []byte {
	if len(w.Lists) == 0 {
		return []byte{}
	}
	b := binary.AppendVarint(nil, w.Score)
	for _, name := range w.Lists {
		b = appendText(b, name)
	}
	return b
}

// parsePlaces is the reverse of places. What can be read of b is returned in any case.
func parsePlaces(b []byte) (score int64, names []string, err error) {
	p := parser{rest: b}
	for score = p.number(); len(p.rest) > 0; {
		if name := p.text(); !p.bad {
			names = append(names, string(name))
		}
	}
	if p.bad {
		err = errors.New("a row's places cannot be read: raid.db is damaged")
	}
	return score, names, err
}
