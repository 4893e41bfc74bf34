package stream

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// This file bounds what all streams take in Redis together.

// errRoom: all streams together take what they may.
var errRoom = errors.New("no room for another stream")

const (
	leastEntry = 32 // PerJob divided by it is how many entries a stream keeps at most
	entryCost  = 24 // bytes that an entry takes besides its data
	streamCost = 1 << 10
	stockTime  = 5 * time.Second
	stockPage  = 1000 // keys
)

// A budget is how much there may be. Its fields are guarded by Mirror.mu.
type budget struct {
	quarter  int64 // of maxmemory; 0: Redis has no bound, or does not tell
	stakes   map[int64]stake
	used     int64 // by all stakes
	full     bool  // that it is used up was said
	refusals int64 // jobs
}

// A stake is what the stream of a job takes or may grow to.
type stake struct {
	bytes int64
	until time.Time // it expires then; zero for one that is being written
}

// most is what one stream may take: data cut into entries of 32 KiB takes a third more
// than its size, and tiny entries that much again (TestMirrorCost).
func (m *Mirror) most() int64 { return 2*m.PerJob + streamCost }

// limitLocked is what all streams may take together; 0: no bound.
func (m *Mirror) limitLocked() int64 {
	if m.Memory > 0 && m.quarter > 0 {
		return min(m.Memory, m.quarter)
	}
	return max(m.Memory, m.quarter)
}

// admit takes a stake for a job that is to be mirrored, or says that there is no room.
func (m *Mirror) admit(w *watch) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.expireLocked(time.Now())
	limit := m.limitLocked()
	if limit > 0 && m.used-m.stakes[w.id].bytes+m.most() > limit {
		return false
	}
	m.stakeLocked(w.id, stake{bytes: m.most()})
	w.refused = false
	if m.used < limit/2 {
		m.full = false
	}
	return true
}

func (m *Mirror) stakeLocked(id int64, s stake) {
	m.used += s.bytes - m.stakes[id].bytes
	if m.stakes[id] = s; s.bytes == 0 {
		delete(m.stakes, id)
	}
}

func (m *Mirror) expireLocked(now time.Time) {
	for id, s := range m.stakes {
		if !s.until.IsZero() && s.until.Before(now) {
			m.stakeLocked(id, stake{})
		}
	}
}

// refuse leaves a job alone until it ends. Then there may be room; else it is forgotten.
func (m *Mirror) refuse(w *watch) {
	m.mu.Lock()
	first := !m.full
	m.full = true
	if !w.refused {
		m.refusals++
	}
	w.refused, w.runs = true, false
	if w.end != nil {
		m.forgetLocked(w)
	}
	limit, used := m.limitLocked(), m.used
	m.mu.Unlock()
	if first {
		m.Logf("mirror: there is no room for more jobs: streams take, or may grow to, %d KiB, and all may take %d KiB", used>>10, limit>>10)
	}
}

// settle reduces the stake of a job that is complete to what its stream takes.
func (m *Mirror) settle(w *watch, b *batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count.entries++
	kept := min(b.end, m.PerJob)
	entries := min(b.count, m.PerJob/leastEntry)
	cost := kept + kept/3 + entries*entryCost + streamCost + int64(len(w.end))
	m.stakeLocked(w.id, stake{min(cost, m.most()), time.Now().Add(m.Keep)})
}

// takeStock asks Redis what it has: its maxmemory, and what streams of raid's are there,
// whoever wrote them. What it may not ask it does without.
func (m *Mirror) takeStock(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stockTime)
	defer cancel()
	var mu sync.Mutex
	found, quarter, whole := map[int64]stake{}, int64(0), true
	look := func(ctx context.Context, c *redis.Client) error {
		some, bound, err := stockOf(ctx, c)
		mu.Lock()
		defer mu.Unlock()
		for id, s := range some {
			found[id] = s
		}
		if bound > 0 {
			quarter += bound / 4
		}
		whole = whole && err == nil
		return nil
	}
	switch c := m.client.(type) {
	case *redis.ClusterClient:
		if c.ForEachMaster(ctx, look) != nil {
			whole = false
		}
	case *redis.Client:
		look(ctx, c)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.quarter = quarter
	for id, s := range m.stakes {
		if !s.until.IsZero() && whole { // Redis may have lost it
			m.stakeLocked(id, stake{})
		}
	}
	for id, s := range found {
		if old, ok := m.stakes[id]; !ok || !old.until.IsZero() {
			m.stakeLocked(id, s)
		}
	}
}

// stockOf returns the streams of one Redis, and its maxmemory. With an error they are
// some of them.
func stockOf(ctx context.Context, c *redis.Client) (found map[int64]stake, maxMemory int64, err error) {
	found = map[int64]stake{}
	if info, err := c.Info(ctx, "memory").Result(); err == nil {
		maxMemory = infoNumber(info, "maxmemory")
	}
	for cursor := uint64(0); ; {
		keys, next, err := c.Scan(ctx, cursor, logKey+"*", stockPage).Result()
		if err == nil {
			err = weigh(ctx, c, keys, found)
		}
		if err != nil || next == 0 {
			return found, maxMemory, err
		}
		cursor = next
	}
}

// weigh adds what some streams take, and until when.
func weigh(ctx context.Context, c *redis.Client, keys []string, found map[int64]stake) error {
	if len(keys) == 0 {
		return nil
	}
	p := c.Pipeline()
	sizes, lives := make([]*redis.IntCmd, len(keys)), make([]*redis.DurationCmd, len(keys))
	for i, key := range keys {
		sizes[i], lives[i] = p.MemoryUsage(ctx, key), p.PTTL(ctx, key)
	}
	_, err := p.Exec(ctx)
	if errors.Is(err, redis.Nil) {
		err = nil // one expired meanwhile
	}
	for i, key := range keys {
		id, e := strconv.ParseInt(strings.TrimPrefix(key, logKey), 10, 64)
		if e != nil || sizes[i].Err() != nil {
			continue
		}
		life := lives[i].Val()
		if life < 0 { // never, which is not raid's doing
			life = runningKeep
		}
		found[id] = stake{sizes[i].Val(), time.Now().Add(life)}
	}
	return err
}
