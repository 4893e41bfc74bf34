package sshd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/janitor"
	"github.com/rai-project/raid/sshd/queue"
)

// Keep says how long what finished jobs left behind is kept; 0 is for ever. When the
// disk is full files go sooner, the oldest of whoever holds the most.
type Keep struct {
	Files   time.Duration // upload, /build and output
	Records time.Duration // what status and history show; files do not stay without it
}

// newJanitor returns the janitor of all that s keeps.
func (s *Server) newJanitor() *janitor.Janitor {
	largest := int64(0)
	for _, l := range s.Limits {
		largest = max(largest, l.Upload)
	}
	return janitor.New(janitor.Config{Brain: s.brain, Blobs: s.blobs, Spools: s.spools,
		Files: s.Keep.Files, Records: s.Keep.Records, Upload: largest,
		Database: s.Database, Logf: s.Log.Errorf, Swept: s.swept})
}

// swept tells the log of a sweep.
func (s *Server) swept(r janitor.Report) {
	l := s.Log.With("free", bytesWord(r.Free), "a_day", bytesWord(r.PerDay), "full", fullWord(&r))
	if r.Expired+r.Forgotten > 0 || r.Freed > 0 {
		l = l.With("expired", r.Expired, "forgotten", r.Forgotten, "freed", bytesWord(r.Freed))
	}
	if r.DaysLeft != nil && *r.DaysLeft == 0 {
		l.Warn("disk")
		return
	}
	l.Info("disk")
}

// runDisk cleans up what is due and tells staff how the disk is doing.
func runDisk(ctx context.Context, c *call) (int, error) {
	r, err := c.s.janitor.Sweep(ctx)
	if err != nil {
		return 0, err
	}
	words := c.s.diskWords(&r)
	if c.json() {
		return 0, c.emit(struct {
			janitor.Report
			Words []string `json:"words"`
		}{r, words})
	}
	t := newGrid()
	t.add("uploads", bytesWord(r.Uploads))
	t.add("outputs", bytesWord(r.Outputs))
	t.add("logs", bytesWord(r.Logs))
	t.add("database", bytesWord(r.Database))
	if r.Unclaimed > 0 {
		t.add("unclaimed", bytesWord(r.Unclaimed))
	}
	t.add("free", fmt.Sprintf("%s of %s", bytesWord(r.Free), bytesWord(r.Total)))
	t.add("reserve", bytesWord(r.Reserve))
	if err := t.print(c); err != nil {
		return 0, err
	}
	for _, line := range words {
		if _, err := fmt.Fprintln(c, line); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// diskWords says how long the disk will last and what is kept how long.
func (s *Server) diskWords(r *janitor.Report) []string {
	words := []string{
		fmt.Sprintf("%s a day came in the last %s: %s", bytesWord(r.PerDay), strings.TrimPrefix(count(r.OverDays, "day"), "1 "), outlook(r)),
		fmt.Sprintf("files of %s are kept, %s; records %s", count(r.Jobs, "job"), keepWord(s.Keep.Files), keepWord(s.Keep.Records)),
	}
	switch {
	case r.Away:
		words = append(words, "uploads and outputs are in a store that does not answer; how much that is will be known when it does")
	case r.Elsewhere:
		words = append(words, "uploads and outputs are in a store of their own, logs there too; of this disk they take nothing")
	}
	return words
}

// outlook says when the disk will be full.
func outlook(r *janitor.Report) string {
	switch {
	case r.DaysLeft == nil:
		return "at this rate the disk does not fill up"
	case *r.DaysLeft == 0:
		return "the disk is full, and the oldest " + firstWord(r)
	}
	return "at this rate the disk is full " + fullWord(r) + ", and then the oldest " + firstWord(r)
}

// firstWord says what goes when the disk is full.
func firstWord(r *janitor.Report) string {
	what := "files"
	if r.Elsewhere {
		what = "copies of logs"
	}
	return what + " of the team that has the most go first"
}

func fullWord(r *janitor.Report) string {
	switch {
	case r.DaysLeft == nil:
		return "never"
	case *r.DaysLeft == 0:
		return "now"
	}
	return "in " + count(*r.DaysLeft, "day")
}

func keepWord(d time.Duration) string {
	if d == 0 {
		return "for ever"
	}
	return "for " + span(d) + " after the end"
}

// greetDisk is a line about the disk for those who can do something about it.
func (c *call) greetDisk() {
	if r, ok := c.s.janitor.Last(); ok && c.Who.Role.AtLeast(keys.Staff) {
		fmt.Fprintf(c, "%s are free; %s.\n\n", bytesWord(r.Free), outlook(&r))
	}
}

// expired says that the files of a job are gone, nil if they are kept.
func expired(rec *job.Record) error {
	if rec.Expired.IsZero() {
		return nil
	}
	return failf(job.ExitInput, fmt.Sprintf("what became of it is still there: ssh … status %d", rec.ID),
		"the files of job %d were removed %s after its end", rec.ID, span(rec.Expired.Sub(rec.FinishedAt.Time)))
}

// kept looks whether the files of a job are still kept, nil if so.
func (c *call) kept(ctx context.Context, id int64) error {
	rec, err := c.s.brain.Job(ctx, id)
	switch {
	case errors.Is(err, queue.ErrNoJob):
		return noJob(id)
	case err != nil:
		return err
	}
	return expired(rec)
}

// gone explains why a file could not be read: perhaps it has just been removed.
func (c *call) gone(ctx context.Context, id int64, err error) error {
	var f *failure
	if why := c.kept(ctx, id); errors.As(why, &f) {
		return f
	}
	return err
}
