package stream

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// This file adds entries to a stream, once.

var (
	// errMoved: the stream does not end where it was expected to; nothing was added.
	errMoved = errors.New("the stream moved")
	// errVanished: there is no stream where one was expected; nothing was added.
	errVanished = errors.New("the stream vanished")
)

// appendScript adds entries to a stream if it ends where it should, all or none.
//
// An id alone would not do: what a hung Redis had in its socket when the mirror gave up
// on it is carried out when it wakes, among what the mirror sends by then, and entries
// that are cut elsewhere have other ids. Errors are returned as they came, for Redis 6
// would wrap them.
//
//	KEYS[1] the stream   ARGV: the id it ends with ("" for no stream), how long it lives
//	in ms, the least id to keep ("" for any), how many entries to keep (0 for any), then
//	id, s and d of each entry
var appendScript = redis.NewScript(`
local r = redis.pcall('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if r.err then return r end
local last = r[1] and r[1][1] or ''
if last ~= ARGV[1] then return last == '' and 'none' or last end
for i = 5, #ARGV, 3 do
  r = redis.pcall('XADD', KEYS[1], ARGV[i], 's', ARGV[i + 1], 'd', ARGV[i + 2])
  if type(r) == 'table' and r.err then return r end
end
if ARGV[3] ~= '' then redis.call('XTRIM', KEYS[1], 'MINID', '~', ARGV[3]) end
if ARGV[4] ~= '0' then redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', ARGV[4]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return ''
`)

// An addition is what one call of append adds.
type addition struct {
	last    string        // id that the stream ends with; "" for no stream
	expire  time.Duration // from now
	minID   int64         // entries before it may go; 0: none
	maxLen  int64         // more entries may go; 0: none
	entries []addend
}

// An addend is one entry.
type addend struct {
	id, s string
	d     []byte
}

// append adds to a stream, or says errMoved or errVanished.
func (m *Mirror) append(ctx context.Context, key string, a addition) error {
	minID := ""
	if a.minID > 0 {
		minID = strconv.FormatInt(a.minID, 10)
	}
	args := []any{a.last, a.expire.Milliseconds(), minID, a.maxLen}
	for _, e := range a.entries {
		args = append(args, e.id, e.s, e.d)
	}
	var answer string
	err := m.call(ctx, func(ctx context.Context) (err error) {
		answer, err = appendScript.Run(ctx, m.client, []string{key}, args...).Text()
		return err
	})
	switch {
	case err != nil:
		return err
	case answer == "none":
		return errVanished
	case answer != "":
		return errMoved
	}
	return nil
}
