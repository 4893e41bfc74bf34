package janitor

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// A sweep is one look at everything.
type sweep struct {
	*Janitor
	now     time.Time
	settled time.Time // of the blobs; see Janitor.settled
	next    int64     // jobs from here on came later and are not looked at

	blobs map[digest]held
	jobs  map[int64]held // output by job

	weights map[int64]int64 // the next Janitor.weights

	expired, forgotten int   // jobs
	freed              int64 // bytes
	unclaimed          int64 // bytes of blobs that are too young to go
	short              bool  // there was too little to remove
	blind              bool  // the store of blobs does not answer
	strangers          int   // blobs from before this database
}

// A digest is what a blob's key says, in a third of the space.
type digest [32]byte

func digestOf(key string) (d digest, ok bool) {
	k, err := blob.ParseKey(key)
	if err != nil {
		return d, false // "" for none
	}
	_, err = hex.Decode(d[:], []byte(k.Hex()))
	return d, err == nil
}

func (d digest) key() blob.Key { return blob.Key("sha256:" + hex.EncodeToString(d[:])) }

// A held is something that jobs refer to.
type held struct {
	size   int64 // bytes, once it was weighed
	n      int32 // how many references there are
	came   int32 // hours since the first of them
	goes   int32 // hours since the last of these jobs ended
	upload bool
}

// with counts one more reference.
func (h held) with(came, goes int32, upload bool) held {
	if h.n == 0 {
		return held{n: 1, came: came, goes: goes, upload: upload}
	}
	h.n, h.came, h.goes, h.upload = h.n+1, max(h.came, came), min(h.goes, goes), h.upload || upload
	return h
}

func (j *Janitor) begin() *sweep {
	now := time.Now()
	return &sweep{Janitor: j, now: now, blobs: map[digest]held{}, jobs: map[int64]held{},
		weights: map[int64]int64{}, settled: j.settled(now)} // before the first look, or a job could come between
}

// sweep removes what is due and reports what there is.
func (j *Janitor) sweep(ctx context.Context) (Report, error) {
	s := j.begin()
	for _, step := range s.steps() {
		if err := step(ctx); err != nil {
			return Report{}, err
		}
	}
	return s.report()
}

func (s *sweep) steps() []func(context.Context) error {
	return []func(context.Context) error{s.birth, s.forget, s.count, s.tidy, s.weighBlobs, s.weighOutput, s.trim}
}

// forget removes records that are old enough.
func (s *sweep) forget(ctx context.Context) error {
	if s.Records == 0 {
		return nil
	}
	limit := s.now.Add(-s.Records)
	return s.walk(ctx, 0, func(recs []job.Record) (more bool, err error) {
		var due []job.Record
		for _, rec := range recs {
			if rec.FinishedAt.Before(limit) {
				due = append(due, rec)
			}
		}
		s.forgotten += len(due)
		// Ids are in the order of coming: from here on nobody ended before the limit.
		return recs[len(recs)-1].QueuedAt.Before(limit), s.commit(ctx, due, s.Brain.Forget)
	})
}

// commit changes records, unless there are none.
func (s *sweep) commit(ctx context.Context, recs []job.Record, change func(context.Context, []job.Record) error) error {
	if len(recs) == 0 {
		return nil
	}
	return change(ctx, recs)
}

// walk calls fn with pages of finished jobs, oldest first, from id on, while there are
// more and fn wants them.
func (s *sweep) walk(ctx context.Context, id int64, fn func([]job.Record) (more bool, err error)) error {
	for {
		recs, err := s.Brain.Oldest(ctx, id-1, page)
		if err != nil || len(recs) == 0 {
			return err
		}
		if more, err := fn(recs); err != nil || !more {
			return err
		}
		id = recs[len(recs)-1].ID + 1
	}
}

// count notes what the jobs refer to, and has files expire on its way. Unfinished jobs
// come first: one that ends meanwhile is then counted twice, and not left out.
func (s *sweep) count(ctx context.Context) error {
	live, next, err := s.Brain.Present(ctx)
	if err != nil {
		return err
	}
	low := next
	for _, rec := range live {
		s.add(rec)
		low = min(low, rec.ID)
	}
	s.next = next
	err = s.walk(ctx, s.low, func(recs []job.Record) (bool, error) {
		var due []job.Record
		for i := range recs {
			rec := &recs[i]
			switch {
			case !rec.Expired.IsZero():
			case s.Files > 0 && rec.FinishedAt.Before(s.now.Add(-s.Files)):
				due = append(due, *rec)
			default:
				s.add(rec)
				low = min(low, rec.ID)
			}
		}
		return true, s.expire(ctx, due)
	})
	if err == nil {
		s.low = low
	}
	return err
}

// expire makes it so that the jobs refer to nothing. What to remove is another step.
func (s *sweep) expire(ctx context.Context, recs []job.Record) error {
	for i := range recs {
		recs[i].Expired = job.At(s.now)
	}
	s.expired += len(recs)
	return s.commit(ctx, recs, s.Brain.Rewrite)
}

// add counts what a job refers to.
func (s *sweep) add(rec *job.Record) {
	came, goes := s.hours(rec.QueuedAt), int32(0)
	if rec.State.Final() {
		goes = s.hours(rec.FinishedAt)
	}
	s.jobs[rec.ID] = s.jobs[rec.ID].with(goes, goes, false)
	if d, ok := digestOf(rec.Source); ok {
		s.blobs[d] = s.blobs[d].with(came, goes, true)
	}
	for _, key := range []string{rec.Archive, rec.Log} {
		if d, ok := digestOf(key); ok {
			s.blobs[d] = s.blobs[d].with(goes, goes, false)
		}
	}
}

func (s *sweep) hours(t job.Time) int32 { return int32(max(s.now.Sub(t.Time), 0) / time.Hour) }

// tidy has the store clean up first what it knows of, and say whether it is ours.
func (s *sweep) tidy(ctx context.Context) error { return s.away(ctx, s.Blobs.Tidy(ctx)) }

// Table has the one row of janitors: since when there is this database, null for longer
// than anybody remembers.
const Table = "janitor"

const bornKey = "born"

// birth finds out how old the database is. Blobs may lie elsewhere and outlive it: what is
// older belongs to jobs that a lost one knew, and it is not for a new one to remove.
func (s *sweep) birth(ctx context.Context) error {
	if s.born != nil {
		return nil
	}
	var born job.Time
	text, err := s.Brain.Store.Get(ctx, Table, bornKey)
	if err == nil {
		err = json.Unmarshal(text, &born)
	} else if errors.Is(err, store.ErrNotFound) {
		born, err = s.register(ctx)
	}
	if err != nil {
		return fmt.Errorf("how old is the database: %w", err)
	}
	s.born = &born
	return nil
}

// register notes when the database was born, if it was born with this janitor.
func (s *sweep) register(ctx context.Context) (born job.Time, err error) {
	if s.fresh {
		born = job.At(s.made.Add(-time.Minute)) // the blobs' clock may be another's
	}
	text, err := json.Marshal(born)
	if err != nil {
		return born, err
	}
	return born, s.Brain.Put(ctx, []queue.Write{{Row: queue.Row{Table: Table, Key: bornKey, Value: text}}})
}

// tellStrangers says how many blobs are older than the database, when that is news.
func (s *sweep) tellStrangers() {
	if n := s.strangers; n != s.strange && n > 0 {
		s.Logf("%d uploads and outputs are older than this database and are left alone: was it lost? Put it back from a backup, or remove them", n)
	}
	s.strange = s.strangers
}

// away lets a sweep go on without blobs that lie elsewhere, where nobody answers: there is
// still this disk to look after. The next sweep finds what this one leaves.
func (s *sweep) away(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || !s.Blobs.Shared() {
		return err
	}
	s.Logf("uploads and outputs are not looked after: %v", err)
	s.blind = true
	return nil
}

// weighBlobs notes how large the blobs are and removes those without a job.
func (s *sweep) weighBlobs(ctx context.Context) error {
	if s.blind {
		return nil
	}
	defer s.tellStrangers()
	for info, err := range s.Blobs.List(ctx) {
		if err != nil {
			return s.away(ctx, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		d, _ := digestOf(string(info.Key))
		h, wanted := s.blobs[d]
		if !wanted && info.Time.Before(s.born.Time) {
			s.strangers++
			continue
		}
		if !wanted {
			if err := s.removeBlob(ctx, d, info.Size); err != nil {
				return s.away(ctx, err)
			}
			continue
		}
		h.size = info.Size
		s.blobs[d] = h
	}
	return nil
}

// removeBlob removes a blob that no job refers to, unless one may come that does.
func (s *sweep) removeBlob(ctx context.Context, d digest, size int64) error {
	if s.blind {
		return nil
	}
	gone, err := s.Blobs.RemoveBefore(ctx, d.key(), s.settled)
	switch {
	case gone:
		s.freed += size
	case err == nil:
		s.unclaimed += size
	}
	return err
}

// weighOutput notes how much the output of each job takes and removes what is no job's.
func (s *sweep) weighOutput(ctx context.Context) error {
	for id, err := range s.Spools.List() {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, wanted := s.jobs[id]
		if !wanted {
			if err := s.removeStray(id); err != nil {
				return err
			}
			continue
		}
		if h.size, err = s.weigh(id, h); err != nil {
			return err
		}
		s.jobs[id] = h
	}
	s.Janitor.weights = s.weights
	return nil
}

// weigh returns what the output of a job takes. That of one that ended an hour ago stays
// as it is, and is looked at once.
func (s *sweep) weigh(id int64, h held) (n int64, err error) {
	n, known := s.Janitor.weights[id]
	if !known {
		if n, err = s.Spools.Usage(id); err != nil {
			return 0, err
		}
	}
	if h.goes > 0 {
		s.weights[id] = n
	}
	return n, nil
}

// removeStray removes output of a job that was not counted, unless it came later.
func (s *sweep) removeStray(id int64) error {
	if id >= s.next {
		return nil
	}
	size, err := s.Spools.Usage(id)
	if err != nil {
		return err
	}
	return s.removeOutput(id, size)
}

func (s *sweep) removeOutput(id, size int64) error {
	if err := s.Spools.Remove(id); err != nil {
		return err
	}
	s.freed += size
	return nil
}

// clear removes the files of finished jobs: the records say so first. Output that is kept
// elsewhere goes from this disk only, which nobody notices but by the time it takes.
func (s *sweep) clear(ctx context.Context, recs []job.Record) error {
	var last []job.Record // whose output is nowhere else
	for _, rec := range recs {
		if rec.Log == "" {
			last = append(last, rec)
		}
	}
	if err := s.expire(ctx, last); err != nil {
		return err
	}
	for i := range recs {
		rec := &recs[i]
		if err := s.removeOutput(rec.ID, s.jobs[rec.ID].size); err != nil {
			return err
		}
		if rec.Log != "" {
			s.jobs[rec.ID] = held{}
			continue
		}
		delete(s.jobs, rec.ID)
		for _, key := range []string{rec.Source, rec.Archive} {
			if err := s.unrefer(ctx, key); err != nil {
				return err
			}
		}
	}
	return nil
}

// unrefer takes one reference from a blob, which goes with the last.
func (s *sweep) unrefer(ctx context.Context, key string) error {
	d, ok := digestOf(key)
	h := s.blobs[d]
	if !ok || h.n == 0 {
		return nil
	}
	if h.n--; h.n > 0 {
		s.blobs[d] = h
		return nil
	}
	delete(s.blobs, d)
	if err := s.away(ctx, s.removeBlob(ctx, d, h.size)); err != nil {
		return fmt.Errorf("make room: %w", err)
	}
	return nil
}
