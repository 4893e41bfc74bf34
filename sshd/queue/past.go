package queue

import (
	"encoding/json"
	"fmt"

	"github.com/rai-project/raid/runner/job"
)

// PastRow is the row of a finished job, in the lists it stands in.
func PastRow(rec *job.Record) Write {
	return Write{Row: Row{TablePast, Key(rec.ID), encode(rec)}, Lists: lists(rec), Score: rec.ID}
}

// ForgetRow takes a finished job out of history. Its id is not given again.
func ForgetRow(id int64) Write { return Write{Row: Row{TablePast, Key(id), nil}} }

// Again returns a row as it was read, to be written to another store, in the lists it
// stands in.
func Again(r Row) (Write, error) {
	w := Write{Row: r, New: true}
	if r.Table != TablePast {
		return w, nil
	}
	var rec job.Record
	if err := json.Unmarshal(r.Value, &rec); err != nil {
		return w, fmt.Errorf("row %s %q: %w", r.Table, r.Key, err)
	}
	w.Lists, w.Score = lists(&rec), rec.ID
	return w, nil
}

// Leap returns the one row of TableMeta with the next id and the next fence so far on.
// What comes back from a backup must not give out again what was given out since: a runner
// may still hold a job by that number and that fence.
func Leap(r Row, ids int64, fences uint64) (Row, error) {
	var m metaRow
	if err := json.Unmarshal(r.Value, &m); err != nil {
		return r, fmt.Errorf("row %s %q: %w", r.Table, r.Key, err)
	}
	m.Next, m.Fence = m.Next+ids, m.Fence+fences
	r.Value = encode(m)
	return r, nil
}

// NextID returns what the row of TableMeta says the next id is.
func NextID(r Row) (int64, error) {
	var m metaRow
	err := json.Unmarshal(r.Value, &m)
	return m.Next, err
}
