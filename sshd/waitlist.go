package sshd

import (
	"context"
	"sync"
	"time"

	"github.com/rai-project/raid/sshd/queue"
)

// A waitlist is where everybody stands who waits in one pool. It is made once for all
// who ask: on a deadline night thousands of sessions want to know at the same moment,
// and the loop that would answer each of them is the one that starts their jobs.
type waitlist struct {
	turn chan struct{} // holds a word while nobody makes it anew

	mu   sync.Mutex // guards the following
	made time.Time
	cost time.Duration
	line []queue.Forecast // in the order they start; never changed, but replaced
	jobs map[int64]int    // where in line
}

const (
	listFresh = time.Second            // what is younger is good enough
	listEvery = 100 * time.Millisecond // for jobs it does not know yet, at most so often
	listShare = 20                     // and it may take one part in so many of the loop's time
)

func newWaitlist() *waitlist {
	l := &waitlist{turn: make(chan struct{}, 1)}
	l.turn <- struct{}{}
	return l
}

// forecast says where a waiting job stands; ok is false for one that does not wait.
func (s *Server) forecast(ctx context.Context, pool string, id int64) (f queue.Forecast, ok bool, err error) {
	line, i, err := s.waiting(ctx, pool, id)
	if err != nil || i < 0 {
		return f, false, err
	}
	return line[i], true, nil
}

// nobody is the id of no job: who asks for it wants to know of everybody.
const nobody = 0

// waiting returns who waits in a pool, in the order they start, and where in it a job
// stands, -1 for one that does not wait. It was made after the call began, or not long
// before if that job stands in it. The caller does not change it.
func (s *Server) waiting(ctx context.Context, pool string, id int64) (line []queue.Forecast, i int, err error) {
	v, _ := s.waitlists.LoadOrStore(pool, newWaitlist())
	l, asked := v.(*waitlist), time.Now()
	for {
		if line, i, known := l.look(id, asked); known {
			return line, i, nil
		}
		select {
		case <-l.turn:
		case <-ctx.Done():
			return nil, -1, context.Cause(ctx)
		}
		err := l.renew(ctx, s, pool, id, asked)
		l.turn <- struct{}{}
		if err != nil {
			return nil, -1, err
		}
	}
}

// look answers from what is there, if that is known.
func (l *waitlist) look(id int64, asked time.Time) (line []queue.Forecast, i int, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i, ok := l.jobs[id]
	if !ok {
		i = -1
	}
	return l.line, i, l.made.After(asked) || ok && asked.Sub(l.made) < listFresh
}

// renew makes it anew, when it may be.
func (l *waitlist) renew(ctx context.Context, s *Server, pool string, id int64, asked time.Time) error {
	if _, _, known := l.look(id, asked); known {
		return nil // somebody else did meanwhile
	}
	pause := time.NewTimer(time.Until(l.made.Add(max(listEvery, listShare*l.cost))))
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var all []queue.Forecast
	var begun time.Time
	var cost time.Duration
	err := s.brain.View(ctx, func(q *queue.Core) {
		begun = time.Now()
		all = q.Outlook(begun.UnixMilli(), pool)
		cost = time.Since(begun)
	})
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made, l.cost, l.line, l.jobs = begun, cost, all, make(map[int64]int, len(all))
	for i := range all {
		l.jobs[all[i].Job] = i
	}
	return nil
}
