package store

import (
	"encoding/binary"
	"math"
	"strings"

	"github.com/rai-project/raid/sshd/queue"
)

// This file makes words for Redis of writes and places.

// A deployment's keys are all in the hash slot of the word in braces:
//
//	{rai}:meta          hash: schema, rev, nonce (of the newest commit), epoch and writer (the newest
//	                    claim), turn (see settle.lua)
//	{rai}:log           stream: one entry for each of the last commits, 2048 or more. Its id is REV-0, its
//	                    fields are n, a nonce, and k, the rows changed: msgpack [table, key, …]
//	{rai}:row:TABLE     hash: key → value
//	{rai}:key:TABLE     sorted set of the keys, in their order
//	{rai}:in:TABLE      hash: key → where in which lists the row stands: msgpack [place, list, …]
//	{rai}:list:NAME     sorted set of places, in their order: score (8 bytes, big endian, the sign flipped),
//	                    table (a zero byte is followed by ff), two zero bytes, key
//	{rai}:try:*         what Claim tried
//	{rai}:lead          the leader's Member, expiring
//	{rai}:leads         stream: rings when it changes
//	{rai}:door:PRINT    a door's Member, expiring
//	{rai}:doors         set of their fingerprints
//
// All scores of sorted sets are 0, so that order is that of bytes: scores of Redis are
// doubles, which know no 64-bit integers.
type keyspace string // "{rai}:"

func (k keyspace) meta() string             { return string(k) + "meta" }
func (k keyspace) log() string              { return string(k) + "log" }
func (k keyspace) row(table string) string  { return string(k) + "row:" + table }
func (k keyspace) key(table string) string  { return string(k) + "key:" + table }
func (k keyspace) in(table string) string   { return string(k) + "in:" + table }
func (k keyspace) list(name string) string  { return string(k) + "list:" + name }
func (k keyspace) try(what string) string   { return string(k) + "try:" + what }
func (k keyspace) lead() string             { return string(k) + "lead" }
func (k keyspace) leads() string            { return string(k) + "leads" }
func (k keyspace) door(print string) string { return string(k) + "door:" + print }
func (k keyspace) doors() string            { return string(k) + "doors" }

// scoreText is a score such that the order of bytes is that of numbers.
func scoreText(score int64) string {
	return string(binary.BigEndian.AppendUint64(nil, uint64(score)^1<<63))
}

// placeText is where a row stands in each of its lists.
func placeText(score int64, table, key string) string {
	return scoreText(score) + strings.ReplaceAll(table, "\x00", "\x00\xff") + "\x00\x00" + key
}

// parsePlace is the reverse of placeText, but for the score.
func parsePlace(p string) (table, key string, ok bool) {
	if len(p) < 8 {
		return "", "", false
	}
	table, key, ok = strings.Cut(p[8:], "\x00\x00")
	return strings.ReplaceAll(table, "\x00\xff", "\x00"), key, ok
}

// packTexts is a msgpack array of texts, as cmsgpack reads it.
func packTexts(texts []string) []byte {
	size := 5
	for _, t := range texts {
		size += 5 + len(t)
	}
	b := make([]byte, 0, size)
	switch n := len(texts); {
	case n < 16:
		b = append(b, 0x90|byte(n))
	default:
		b = binary.BigEndian.AppendUint32(append(b, 0xdd), uint32(n))
	}
	for _, t := range texts {
		switch n := len(t); {
		case n < 32:
			b = append(b, 0xa0|byte(n))
		case n <= math.MaxUint8:
			b = append(b, 0xd9, byte(n))
		default:
			b = binary.BigEndian.AppendUint32(append(b, 0xdb), uint32(n))
		}
		b = append(b, t...)
	}
	return b
}

// A program is a batch as commit.lua runs it.
type program struct {
	space   keyspace
	listed  func(table string) bool // may a row of it stand in lists already?
	changed []string                // table, key of each row
	bytes   int                     // of all values
	keys    []string                // that it names
	tables  ordered[tableWords]
	lists   ordered[[]any] // score and place of each row that enters
}

// tableWords are what the commands on one table are about.
type tableWords struct {
	leave   []any // keys of rows that may stand in lists
	gone    []any // keys
	fresh   []any // keys and values of rows that are new
	order   []any // score and key of those
	put     []any // keys and values of rows that may be there
	entered []any // keys and places
}

// An ordered is a map that is walked in the order in which it was filled.
type ordered[T any] struct {
	names []string
	at    map[string]*T
}

func (o *ordered[T]) get(name string) *T {
	if v := o.at[name]; v != nil {
		return v
	}
	if o.at == nil {
		o.at = map[string]*T{}
	}
	o.names = append(o.names, name)
	o.at[name] = new(T)
	return o.at[name]
}

// compile makes a program of writes, whose order counts, such that it names each row once:
// then the order counts no more, and there are few commands.
func compile(space keyspace, writes []queue.Write, listed func(table string) bool) *program {
	p := &program{space: space, listed: listed, changed: make([]string, 0, 2*len(writes))}
	last := make(map[rowID]int, len(writes))
	for i, w := range writes {
		last[rowID{w.Table, w.Key}] = i
	}
	fresh := map[rowID]bool{} // of rows named twice: were they not there before the batch?
	for i, w := range writes {
		id := rowID{w.Table, w.Key}
		if len(last) < len(writes) {
			if was, again := fresh[id]; again {
				w.New = was
			}
			if last[id] != i {
				fresh[id] = w.New
				continue
			}
		}
		if w.Value != nil || !w.New { // else it came and went
			p.write(w)
		}
	}
	for _, t := range p.tables.names {
		p.keys = append(p.keys, space.row(t), space.key(t), space.in(t))
	}
	for _, l := range p.lists.names {
		p.keys = append(p.keys, space.list(l))
	}
	return p
}

// write adds the last write of a row.
func (p *program) write(w queue.Write) {
	p.changed = append(p.changed, w.Table, w.Key)
	p.bytes += len(w.Value) + len(w.Key)
	t, key := p.tables.get(w.Table), any(w.Key)
	if !w.New && p.listed(w.Table) {
		t.leave = append(t.leave, key)
	}
	switch {
	case w.Value == nil:
		t.gone = append(t.gone, key)
		return
	case w.New:
		t.fresh = append(t.fresh, key, w.Value)
		t.order = append(t.order, 0, key)
	default:
		t.put = append(t.put, key, w.Value)
	}
	if len(w.Lists) == 0 {
		return
	}
	place := placeText(w.Score, w.Table, w.Key)
	t.entered = append(t.entered, key, packTexts(append([]string{place}, w.Lists...)))
	for _, name := range w.Lists {
		l := p.lists.get(name)
		*l = append(*l, 0, place)
	}
}

// words adds the commands, each after the number of its words. All rows leave their lists
// before any row enters one.
func (p *program) words(args []any) []any {
	s := p.space
	for _, name := range p.tables.names {
		args = command(args, p.tables.at[name].leave, "leave", s.in(name), s.list(""))
	}
	for _, name := range p.tables.names {
		t := p.tables.at[name]
		args = command(args, t.gone, "HDEL", s.row(name))
		args = command(args, t.gone, "ZREM", s.key(name))
		args = command(args, t.fresh, "HSET", s.row(name))
		args = command(args, t.order, "ZADD", s.key(name))
		args = command(args, t.put, "put", s.row(name), s.key(name))
		args = command(args, t.entered, "HSET", s.in(name))
	}
	for _, name := range p.lists.names {
		args = command(args, *p.lists.at[name], "ZADD", s.list(name))
	}
	return args
}

// mostWords is how many words a command has at most, beside its first ones: Lua's stack
// takes some thousand. It is even, for words that come in pairs.
const mostWords = 1000

// command adds a command, in as many parts as it takes.
func command(args, words []any, head ...any) []any {
	for len(words) > 0 {
		n := min(mostWords, len(words))
		args = append(append(append(args, len(head)+n), head...), words[:n]...)
		words = words[n:]
	}
	return args
}
