package janitor

import (
	"context"
	"errors"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// A share is what the finished jobs of a tenant take of this disk: a team, or a user
// without one.
type share struct {
	bytes int64
	jobs  []part // those whose files may go, oldest first
}

// A part is what one of them takes.
type part struct{ id, bytes int64 }

// trim removes files of finished jobs while there is little room: the oldest of whoever
// holds the most, so that who brings much pushes out their own. It makes a margin more than
// is needed, so that not every upload brings it back.
func (s *sweep) trim(ctx context.Context) error {
	free, total, err := s.Free()
	if err != nil || free >= s.floor(total) {
		return err
	}
	want := s.floor(total) + s.margin(total)
	all, err := s.shares(ctx)
	for err == nil && free < want {
		var some []job.Record
		if some, err = s.enough(ctx, all, want-free); err != nil || len(some) == 0 {
			break
		}
		if err = s.clear(ctx, some); err == nil {
			free, _, err = s.Free()
		}
	}
	s.short = free < s.floor(total)
	return err
}

// shares counts what finished jobs take, those of the last hour with them.
func (s *sweep) shares(ctx context.Context) (all []*share, err error) {
	limit, of := s.now.Add(-newest), map[string]*share{}
	err = s.walk(ctx, s.low, func(recs []job.Record) (bool, error) {
		for i := range recs {
			rec := &recs[i]
			if !rec.Expired.IsZero() {
				continue
			}
			h := of[rec.Tenant()]
			if h == nil {
				h = &share{}
				of[rec.Tenant()], all = h, append(all, h)
			}
			n := s.takes(rec)
			h.bytes += n
			if rec.FinishedAt.Before(limit) && (n > 0 || !s.Blobs.Shared()) { // else nothing of it is on this disk
				h.jobs = append(h.jobs, part{rec.ID, n})
			}
		}
		return true, nil
	})
	return all, err
}

// takes returns what a job takes of this disk. Of a file that several refer to each takes
// the same part.
func (s *sweep) takes(rec *job.Record) int64 {
	n := s.jobs[rec.ID].size
	if s.Blobs.Shared() {
		return n
	}
	for _, key := range []string{rec.Source, rec.Archive} {
		d, ok := digestOf(key)
		if h := s.blobs[d]; ok && h.n > 0 {
			n += h.size / int64(h.n)
		}
	}
	return n
}

// first takes the job whose files go first: the oldest of whoever holds the most, and of
// two who hold as much, of whose is older. It returns 0 when none may go.
func first(all []*share) int64 {
	var most *share
	for _, h := range all {
		if len(h.jobs) == 0 {
			continue
		}
		if most == nil || h.bytes > most.bytes || h.bytes == most.bytes && h.jobs[0].id < most.jobs[0].id {
			most = h
		}
	}
	if most == nil {
		return 0
	}
	p := most.jobs[0]
	most.bytes, most.jobs = most.bytes-p.bytes, most.jobs[1:]
	return p.id
}

// enough takes jobs until their files weigh what is needed, a page of them at most.
func (s *sweep) enough(ctx context.Context, all []*share, need int64) (some []job.Record, err error) {
	taken := map[digest]int32{} // references
	for need > 0 && len(some) < page {
		id := first(all)
		if id == 0 {
			break
		}
		rec, err := s.Brain.Job(ctx, id)
		if errors.Is(err, queue.ErrNoJob) {
			continue
		}
		if err != nil {
			return nil, err
		}
		some = append(some, *rec)
		need -= s.jobs[id].size
		if s.Blobs.Shared() {
			continue
		}
		for _, key := range []string{rec.Source, rec.Archive} {
			d, ok := digestOf(key)
			if taken[d]++; ok && taken[d] == s.blobs[d].n {
				need -= s.blobs[d].size
			}
		}
	}
	return some, nil
}
