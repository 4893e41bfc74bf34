package brain

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// load reads the committed state and puts the connected runners back into it.
func (b *Brain) load(ctx context.Context) error {
	now := time.Now().UnixMilli()
	core := queue.New(b.Policy)
	rev, err := read(ctx, b.Store, func(p queue.Parsed) { core.Load(now, p) })
	if err != nil {
		return err
	}
	live := make(map[int64]*job.Record, core.Len())
	for rec := range core.Jobs {
		own := *rec
		live[rec.ID] = &own
	}
	news, err := b.missed(ctx, b.live, live)
	if err != nil {
		return err
	}
	b.core, b.rev = core, rev
	b.mu.Lock()
	for id, bell := range b.bells { // whoever waits must look again
		close(bell)
		delete(b.bells, id)
	}
	close(b.moved)
	b.moved = make(chan struct{})
	b.live = live
	b.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(b.links)) { // jobs start in this order
		b.links[id].again(core, now)
	}
	for _, rec := range news {
		b.Changed(rec)
	}
	return nil
}

// A chunk is rows that are parsed together.
type chunk struct {
	rows   []queue.Row
	parsed []queue.Parsed
	err    error
	done   chan struct{} // closed when the above are set
}

// chunkSize is how many rows a chunk has, and chunksAhead how many chunks wait.
const (
	chunkSize   = 512
	chunksAhead = 4
)

// read calls take with every row of the queue, in order. Reading, parsing and taking go
// on beside each other: of a restart with a long queue, parsing is most.
func read(ctx context.Context, st store.Store, take func(queue.Parsed)) (rev store.Rev, err error) {
	chunks, taken := make(chan *chunk, chunksAhead), make(chan error, 1)
	go func() { taken <- takeAll(chunks, take) }()
	next := &chunk{}
	send := func() {
		c := next
		next = &chunk{}
		c.done = make(chan struct{})
		chunks <- c
		go c.parse() // takeAll waits for it
	}
	rev, err = st.Load(ctx, queue.Tables(), func(row queue.Row) error {
		if next.rows = append(next.rows, row); len(next.rows) == chunkSize {
			send()
		}
		return nil
	})
	send()
	close(chunks)
	if terr := <-taken; err == nil {
		err = terr
	}
	return rev, err
}

func (c *chunk) parse() {
	defer close(c.done)
	c.parsed = make([]queue.Parsed, len(c.rows))
	for i, row := range c.rows {
		if c.parsed[i], c.err = queue.Parse(row); c.err != nil {
			return
		}
	}
}

// takeAll takes chunks until there are no more, and nothing after an error.
func takeAll(chunks <-chan *chunk, take func(queue.Parsed)) (err error) {
	for c := range chunks {
		<-c.done
		if err == nil {
			err = c.err
		}
		for _, p := range c.parsed {
			if err == nil {
				take(p)
			}
		}
	}
	return err
}

// missed returns what was committed although the store said otherwise, so that nobody
// was told of it.
func (b *Brain) missed(ctx context.Context, was, is map[int64]*job.Record) (news []job.Record, err error) {
	if was == nil || b.Changed == nil {
		return nil, nil // at the start nothing is a change
	}
	for _, id := range slices.Sorted(maps.Keys(was)) {
		if _, ok := is[id]; ok {
			continue
		}
		switch rec, err := b.past(ctx, id); {
		case errors.Is(err, queue.ErrNoJob): // no other load would find it either
			b.logf("job %d is gone", id)
		case err != nil:
			return nil, fmt.Errorf("how job %d ended: %w", id, err)
		default:
			news = append(news, *rec)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(is)) {
		old, now := was[id], is[id]
		if old == nil || old.State != now.State || old.Attempt != now.Attempt {
			news = append(news, *now)
		}
	}
	return news, nil
}
