package queue

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/rai-project/raid/runner/job"
)

// Tables the core keeps. A finished job moves from TableJob to TablePast, which
// the core never reads again: history is the store's.
const (
	TableMeta   = "meta"
	TableJob    = "job"
	TablePast   = "past"
	TableNode   = "node"
	TableRunner = "runner"
)

// Tables are what Load needs, in the order it needs them.
func Tables() []string { return []string{TableMeta, TableNode, TableRunner, TableJob} }

// The lists a finished job stands in, by its id.
const ListAll = "all"

// ListUser names the list of a user's finished jobs.
func ListUser(user string) string { return "user/" + user }

// ListTeam names the list of a team's finished jobs.
func ListTeam(team string) string { return "team/" + team }

// Key is the key of a job's row.
func Key(id int64) string {
	const zeros = "0000000000000000"
	s := strconv.FormatInt(id, 10)
	return zeros[min(len(s), len(zeros)):] + s
}

type metaRow struct {
	Next  int64  `json:"next"`
	Fence uint64 `json:"fence"`
	Turns int64  `json:"turns"`
}

type nodeRow struct {
	Used   int64  `json:"used"`
	Rem    int64  `json:"rem,omitempty"`
	Turn   int64  `json:"turn,omitempty"`
	Start  int64  `json:"start,omitempty"`
	Guess  Millis `json:"guess,omitempty"`
	Spread Millis `json:"spread,omitempty"`
	Day    int64  `json:"day,omitempty"`
	Today  int    `json:"today,omitempty"`
	Paused bool   `json:"paused,omitempty"`
}

type jobRow struct {
	job.Record
	Granted Millis `json:"granted,omitempty"`
	Charge  Millis `json:"charge,omitempty"`
}

// Changes are the rows to write. What may change with every decision says itself
// whether it is among them already, which costs less than to ask a map.
type changes struct {
	dirty   []*entry         // jobs
	ended   []*entry         // jobs that finished since the last Flush
	charged []*node          // nodes
	met     map[*Runner]bool // runners
	meta    bool             // counters
}

func (c *changes) writeJob(e *entry) {
	if !e.dirty {
		e.dirty = true
		c.dirty = append(c.dirty, e)
	}
}

func (c *changes) write(n *node) {
	if !n.dirty {
		n.dirty = true
		c.charged = append(c.charged, n)
	}
}

// wrote forgets what has been written.
func (c *changes) wrote() {
	for _, e := range c.dirty {
		e.dirty = false
	}
	for _, n := range c.charged {
		n.dirty = false
	}
	clear(c.met)
	clear(c.dirty) // or an ended job would stay
	*c = changes{dirty: c.dirty[:0], charged: c.charged[:0], met: c.met}
}

// Flush returns the rows that changed since the last call, in an order that
// depends on nothing but the commands.
func (c *Core) Flush() []Write {
	var w []Write
	put := func(table, key string, v any) { w = append(w, Write{Row: Row{table, key, encode(v)}}) }
	if c.meta {
		put(TableMeta, "core", metaRow{c.next, c.fence, c.turns})
	}
	slices.SortFunc(c.charged, func(a, b *node) int { return cmp.Compare(a.key, b.key) })
	for _, n := range c.charged {
		put(TableNode, n.key, nodeRow{n.used, n.rem, n.turn, n.start, n.guess, n.spread, n.day, n.today, n.paused})
	}
	for _, r := range slices.SortedFunc(maps.Keys(c.met), func(a, b *Runner) int { return cmp.Compare(a.ID, b.ID) }) {
		put(TableRunner, r.ID, r)
	}
	slices.SortFunc(c.dirty, func(a, b *entry) int { return cmp.Compare(a.ID, b.ID) })
	for _, e := range c.dirty {
		if e.State.Final() { // it is in ended
			continue
		}
		w = append(w, Write{Row: Row{TableJob, Key(e.ID), encode(jobRow{e.Record, e.granted, e.charge})}, New: !e.written})
		e.written = true
	}
	for _, e := range c.ended {
		if e.written {
			w = append(w, Write{Row: Row{TableJob, Key(e.ID), nil}})
		}
		past := PastRow(&e.Record)
		past.New = true
		w = append(w, past)
	}
	c.wrote()
	return w
}

func lists(rec *job.Record) []string {
	l := []string{ListAll, ListUser(rec.User)}
	if rec.Team != "" {
		l = append(l, ListTeam(rec.Team))
	}
	return l
}

// A Parsed is a row whose text has been read.
type Parsed struct {
	table, key string
	row        any // *metaRow, *nodeRow, *Runner or *jobRow
}

// Parse reads the text of one row of Tables. It needs no core, so that many rows can
// be read at once.
func Parse(row Row) (Parsed, error) {
	p := Parsed{table: row.Table, key: row.Key}
	switch row.Table {
	case TableMeta:
		p.row = &metaRow{}
	case TableNode:
		p.row = &nodeRow{}
	case TableRunner:
		p.row = &Runner{}
	case TableJob:
		p.row = &jobRow{}
	}
	if err := json.Unmarshal(row.Value, p.row); err != nil {
		return p, fmt.Errorf("row %s %q: %w", row.Table, row.Key, err)
	}
	return p, nil
}

// Load takes one row of Tables back, in their order. now restarts the clock of every
// lease: only silence that raid could have heard counts.
func (c *Core) Load(now Millis, p Parsed) {
	switch r := p.row.(type) {
	case *metaRow:
		c.next, c.fence, c.turns = r.Next, r.Fence, r.Turns
	case *nodeRow:
		c.loadNode(p.key, r)
	case *Runner:
		c.runners[p.key] = r
	case *jobRow:
		c.loadJob(now, r)
	}
}

func (c *Core) loadNode(key string, r *nodeRow) {
	parts := strings.SplitN(key, "/", 3)
	n := c.pool(parts[0])
	for _, name := range parts[1:] {
		n = c.child(n, name)
	}
	n.used, n.rem, n.turn, n.start, n.guess, n.spread = r.Used, r.Rem, r.Turn, r.Start, r.Guess, r.Spread
	n.day, n.today, n.paused = r.Day, r.Today, r.Paused
}

func (c *Core) loadJob(now Millis, r *jobRow) {
	e := &entry{Record: r.Record, granted: r.Granted, charge: r.Charge, heard: now, written: true}
	c.jobs[e.ID] = e
	u := c.nodeOf(e)
	if e.State == job.Queued {
		for n := u; n != nil; n = n.parent { // counted without a lift: its node's row has that
			n.queued++
		}
		c.insert(e)
		settlePlaces(u)
		return
	}
	c.active[e.ID] = e
	for n := u; n != nil; n = n.parent {
		n.running++
	}
	settlePlaces(u)
	if h := c.runners[e.Holder]; h != nil {
		h.Job = e.ID
	}
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("queue: a row that is not JSON: " + err.Error()) // our own types; cannot happen
	}
	return b
}
