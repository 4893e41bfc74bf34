package brain

import (
	"context"
	"fmt"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// Finished jobs are rows that the core never reads again. What becomes of them in time
// is decided outside the loop; it passes through the loop to be committed.

// Oldest returns at most n finished jobs, oldest first, whose id is above after.
func (b *Brain) Oldest(ctx context.Context, after int64, n int) ([]job.Record, error) {
	rows, err := b.Store.Ascend(ctx, queue.ListAll, after, n)
	if err != nil {
		return nil, fmt.Errorf("list the oldest jobs: %w", err)
	}
	return decodeAll(rows)
}

// Rewrite commits finished jobs as they are now, together. A few hundred at a time keep
// nobody waiting.
func (b *Brain) Rewrite(ctx context.Context, recs []job.Record) error {
	writes := make([]queue.Write, len(recs))
	for i := range recs {
		writes[i] = queue.PastRow(&recs[i])
	}
	return b.Put(ctx, writes)
}

// Forget removes the records of finished jobs.
func (b *Brain) Forget(ctx context.Context, recs []job.Record) error {
	writes := make([]queue.Write, len(recs))
	for i := range recs {
		writes[i] = queue.ForgetRow(recs[i].ID)
	}
	return b.Put(ctx, writes)
}

func decodeAll(rows []queue.Row) ([]job.Record, error) {
	all := make([]job.Record, 0, len(rows))
	for _, row := range rows {
		rec, err := decode(row.Value)
		if err != nil {
			return nil, err
		}
		all = append(all, rec)
	}
	return all, nil
}

// Present returns the unfinished jobs and the id that the next one gets: every job with
// a smaller id is among them or finished in the store. Whatever a commit left unknown
// before is known now.
func (b *Brain) Present(ctx context.Context) (live []*job.Record, next int64, err error) {
	if err := b.View(ctx, func(q *queue.Core) { next = q.Next() }); err != nil {
		return nil, 0, err
	}
	return b.Unfinished(), next, nil
}
