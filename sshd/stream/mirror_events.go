package stream

import (
	"context"

	"github.com/redis/go-redis/v9"
)

const eventsAtime = 16 // in one send

// sendEvents sends what Event queued, in order.
func (m *Mirror) sendEvents(ctx context.Context) {
	said := false
	for m.awaitUp(ctx) {
		m.mu.Lock()
		n := min(len(m.events), eventsAtime)
		some, news := m.events[:n:n], m.news
		m.mu.Unlock()
		if n == 0 {
			if !wait(ctx, news) {
				return
			}
			continue
		}
		err := m.call(ctx, func(ctx context.Context) error {
			_, err := m.client.Pipelined(ctx, func(p redis.Pipeliner) error {
				for _, e := range some {
					p.XAdd(ctx, &redis.XAddArgs{Stream: eventsKey, MaxLen: eventsMax, Approx: true, Values: e})
				}
				return nil
			})
			return err
		})
		if err != nil && trouble(err) {
			m.trip(ctx, err, false)
			continue
		}
		if err != nil && !said {
			said = true
			m.Logf("mirror: events are lost: %v", err)
		}
		m.sent(some, err == nil)
	}
}

// sent takes events out of the queue, which may have lost its oldest meanwhile.
func (m *Mirror) sent(some [][]any, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.workedLocked()
	if ok {
		m.count.events += int64(len(some))
	} else {
		m.count.eventsLost += int64(len(some))
	}
	for _, e := range some {
		if len(m.events) > 0 && &m.events[0][0] == &e[0] {
			m.events = m.events[1:]
		}
	}
}
