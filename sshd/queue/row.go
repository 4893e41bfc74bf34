package queue

// A Row is one record of the durable state. Tables and keys are the queue's (and
// its neighbours') business; a store only keeps them.
type Row struct {
	Table string
	Key   string
	Value []byte // nil in a Write deletes the row
}

// A Write is one change of one row. Lists names the lists the row stands in after
// the write, each ordered by Score: that is how finished jobs are found again by
// user, by team and by time. A row leaves every list not named.
type Write struct {
	Row
	Lists []string
	Score int64
	New   bool // there is no such row yet; a store relies on it
}
