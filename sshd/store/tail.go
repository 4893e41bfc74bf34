package store

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/rai-project/raid/sshd/queue"
)

// A tail holds what was committed and has no row of its own in the file yet: the
// newest write of each row. Its methods are safe for concurrent use.
type tail struct {
	mu    sync.RWMutex // guards the following
	rows  map[rowID]queue.Write
	bytes int // of all batches taken, superseded writes included
}

// A rowID names a row.
type rowID struct{ table, key string }

func (a rowID) compare(b rowID) int {
	return cmp.Or(strings.Compare(a.table, b.table), strings.Compare(a.key, b.key))
}

// add takes a batch of so many bytes. It keeps the writes. A row that comes New and goes again before it
// is folded leaves nothing: most jobs do.
func (t *tail) add(writes []queue.Write, bytes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rows == nil {
		t.rows = map[rowID]queue.Write{}
	}
	for _, w := range writes {
		id := rowID{w.Table, w.Key}
		if old, here := t.rows[id]; here {
			w.New = old.New
		}
		if w.Value == nil && w.New {
			delete(t.rows, id)
			continue
		}
		t.rows[id] = w
	}
	t.bytes += bytes
}

// clear forgets everything: it stands in the file's rows now.
func (t *tail) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.rows)
	t.bytes = 0
}

// size returns how many rows wait, and how many bytes the log has of them.
func (t *tail) size() (rows, bytes int) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.rows), t.bytes
}

// get returns a row's newest write, if it is here.
func (t *tail) get(table, key string) (queue.Write, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	w, ok := t.rows[rowID{table, key}]
	return w, ok
}

// writes returns the newest write of each row that want wants, ordered by table and
// key, and all rows that are here.
func (t *tail) writes(want func(queue.Write) bool) (found []queue.Write, here map[rowID]bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	here = make(map[rowID]bool, len(t.rows))
	for id, w := range t.rows {
		here[id] = true
		if want(w) {
			found = append(found, w)
		}
	}
	slices.SortFunc(found, func(a, b queue.Write) int {
		return rowID{a.Table, a.Key}.compare(rowID{b.Table, b.Key})
	})
	return found, here
}

// A batch in the log is its writes, one after the other: table, key, 0 for a write
// that deletes, or 1 (2 if it is New) and the value, score, the number of lists and their names. Texts
// have their length before them, numbers are varints (package encoding/binary).

func appendBatch(b []byte, writes []queue.Write) []byte {
	for _, w := range writes {
		b = appendText(appendText(b, w.Table), w.Key)
		switch {
		case w.Value == nil:
			b = append(b, 0)
		case w.New:
			b = appendText(append(b, 2), w.Value)
		default:
			b = appendText(append(b, 1), w.Value)
		}
		b = binary.AppendVarint(b, w.Score)
		b = binary.AppendUvarint(b, uint64(len(w.Lists)))
		for _, name := range w.Lists {
			b = appendText(b, name)
		}
	}
	return b
}

func appendText[T string | []byte](b []byte, text T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}

var errBatch = errors.New("a batch of the log cannot be read: raid.db is damaged")

// parseBatch is the reverse of appendBatch. The values are parts of b.
func parseBatch(b []byte) (writes []queue.Write, err error) {
	p := parser{rest: b}
	for len(p.rest) > 0 && !p.bad {
		w := queue.Write{Row: queue.Row{Table: string(p.text()), Key: string(p.text())}}
		switch p.byte() {
		case 0:
		case 2:
			w.New = true
			fallthrough
		case 1:
			w.Value = p.text()
		default:
			p.bad = true
		}
		w.Score = p.number()
		for n := p.count(); n > 0 && !p.bad; n-- {
			w.Lists = append(w.Lists, string(p.text()))
		}
		writes = append(writes, w)
	}
	if p.bad {
		return nil, errBatch
	}
	return writes, nil
}

// A parser takes values from the front of rest. After something that cannot be read
// it is bad and returns zeroes.
type parser struct {
	rest []byte
	bad  bool
}

// skip moves past n bytes; fewer than one, or more than there are, are bad.
func (p *parser) skip(n int) {
	if n < 1 || n > len(p.rest) {
		p.bad, p.rest = true, nil
		return
	}
	p.rest = p.rest[n:]
}

func (p *parser) count() uint64 {
	v, n := binary.Uvarint(p.rest)
	p.skip(n)
	return v
}

func (p *parser) number() int64 {
	v, n := binary.Varint(p.rest)
	p.skip(n)
	return v
}

func (p *parser) byte() (v byte) {
	if len(p.rest) > 0 {
		v = p.rest[0]
	}
	p.skip(1)
	return v
}

func (p *parser) text() []byte {
	n := p.count()
	if p.bad || n > uint64(len(p.rest)) {
		p.bad, p.rest = true, nil
		return nil
	}
	text := p.rest[:n:n]
	p.rest = p.rest[n:]
	return text
}
