package stream

import (
	"fmt"
	"time"

	"github.com/rai-project/raid/runner/job"
)

const (
	entrySize = 32 << 10
	batchMax  = 16 // entries
)

// A batch is what one send carries, and where the stream stands before it.
type batch struct {
	entries []entry
	data    []byte    // of all entries
	end     int64     // offset after all that was added, mirrored or not
	gap     int64     // bytes of log that were skipped
	last    string    // id of the last entry of the stream, "" for no stream
	sent    time.Time // when the last one was
	count   int64     // entries that were sent
}

type entry struct {
	s        string
	from, to int // of data
	end      int64
}

func (e *entry) id() string { return fmt.Sprintf("%d-0", e.end) }

func (b *batch) reset() { b.entries, b.data = b.entries[:0], b.data[:0] }

func (b *batch) size() int { return len(b.data) }

// took notes that the stream has the entries.
func (b *batch) took() {
	b.last = b.entries[len(b.entries)-1].id()
	b.count += int64(len(b.entries))
}

// add takes a copy of c.
func (b *batch) add(c Chunk) {
	b.end = c.End
	switch c.Kind {
	case job.Out:
		b.put("out", c.Data, c.End)
	case job.Err:
		b.put("err", c.Data, c.End)
	case job.Raid:
		b.put("raid", append(c.Data[:len(c.Data):len(c.Data)], '\n'), c.End)
	case job.Gap:
		b.put("raid", fmt.Appendf(nil, "%d bytes of log were dropped\n", c.Dropped), c.End)
	}
}

// put adds bytes to the last entry, or a new one.
func (b *batch) put(s string, data []byte, end int64) {
	if len(data) == 0 {
		return
	}
	b.data = append(b.data, data...)
	n := len(b.entries)
	if n > 0 && b.entries[n-1].s == s && len(b.data)-b.entries[n-1].from <= entrySize {
		b.entries[n-1].to, b.entries[n-1].end = len(b.data), end
		return
	}
	b.entries = append(b.entries, entry{s, len(b.data) - len(data), len(b.data), end})
}

// fill adds what f has, without waiting, up to a whole batch.
func (b *batch) fill(f *Follower) {
	stop := ended()
	for len(b.entries) < batchMax && b.size() < batchMax*entrySize {
		c, err := f.Next(stop)
		if err != nil {
			return // Next will say so again
		}
		b.add(c)
	}
}
