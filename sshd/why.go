package sshd

import (
	"context"
	"fmt"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// A reasoning is what why says: where a job stands, in numbers and in words.
type reasoning struct {
	*job.Job
	Position int      `json:"position,omitempty"` // 1 is next, in the fair order
	Ahead    int      `json:"ahead"`
	AheadS   int64    `json:"ahead_s"` // GPU-seconds expected to run before it
	Running  int      `json:"running"`
	Runners  int      `json:"runners"`               // connected ones that can take it
	EarlyS   int64    `json:"eta_early_s,omitempty"` // it starts between these
	LateS    int64    `json:"eta_late_s,omitempty"`
	TenantS  int64    `json:"tenant_virtual_s"` // below the pool's: the team is owed GPU time
	PoolS    int64    `json:"pool_virtual_s"`
	HeldBy   []string `json:"held_by,omitempty"`
	Words    []string `json:"words"`
	lacks    []string // of each runner that cannot take it
}

func runWhy(ctx context.Context, c *call) (int, error) {
	rec, err := c.job(ctx, c.args[0])
	if err != nil {
		return 0, err
	}
	why, err := c.s.reason(ctx, rec)
	if err != nil {
		return 0, err
	}
	if c.json() {
		return 0, c.emit(why)
	}
	for _, line := range why.Words {
		fmt.Fprintln(c, line)
	}
	return 0, nil
}

// reason explains where a job stands.
func (s *Server) reason(ctx context.Context, rec *job.Record) (why reasoning, err error) {
	why.Job = &rec.Job
	switch {
	case rec.State.Final():
		why.Words = []string{fmt.Sprintf("job %d %s", rec.ID, verdict(rec))}
	case rec.State != job.Queued:
		why.Words = []string{fmt.Sprintf("job %d is %s on %s, started %s", rec.ID, rec.State, clean(rec.Runner), ago(rec.StartedAt.Time))}
	default:
		if err = why.ask(ctx, s, rec); err == nil {
			why.explain()
		}
	}
	return why, err
}

// ask takes the numbers from the queue.
func (why *reasoning) ask(ctx context.Context, s *Server, rec *job.Record) error {
	f, ok, err := s.forecast(ctx, rec.Pool, rec.ID)
	if !ok {
		return err // it has just started
	}
	why.Position, why.Ahead, why.AheadS = f.Position, f.Position-1, f.AheadS
	why.Running, why.Runners = f.Running, f.Slots
	why.EarlyS, why.LateS = f.Early/1000, (f.Late+999)/1000
	why.TenantS, why.PoolS, why.HeldBy = f.TenantS, f.PoolS, f.Held
	if why.Runners > 0 {
		return nil
	}
	return s.brain.View(ctx, func(q *queue.Core) {
		for _, r := range q.Runners() {
			l := q.Lacks(&r, rec)
			switch {
			case l != "":
			case r.Sick != "":
				l = "is " + stateWords(&r)
			case r.Connected && (r.Drained || r.Draining):
				l = "is draining"
			}
			if l != "" {
				why.lacks = append(why.lacks, fmt.Sprintf("runner %s %s", r.Name, l))
			}
		}
	})
}

// explain puts the numbers into words.
func (why *reasoning) explain() {
	if why.Position == 0 {
		why.Words = []string{fmt.Sprintf("job %d is just starting", why.ID)}
		return
	}
	why.Words = []string{fmt.Sprintf("job %d waits in %s: %s", why.ID, why.Pool, why.line())}
	for _, h := range why.HeldBy {
		why.Words = append(why.Words, "held back: "+h)
	}
	switch {
	case why.Runners == 0:
		why.Words = append(why.Words, "it waits for a runner that can take it; none is connected")
		why.Words = append(why.Words, why.lacks...)
		return
	case why.Ahead > 0:
		why.Words = append(why.Words, fmt.Sprintf("about %s of GPU time runs before it, on %s", seconds(why.AheadS), count(why.Runners, "runner")))
	}
	why.Words = append(why.Words, "teams take turns by the GPU time they have used: "+why.share())
}

// share says how a team stands against the others.
func (why *reasoning) share() string {
	switch d := why.TenantS - why.PoolS; {
	case d < 0:
		return fmt.Sprintf("yours has %s less than its share so far", seconds(-d))
	case d > 0:
		return fmt.Sprintf("yours has %s more than its share so far", seconds(d))
	}
	return "yours has had its share so far"
}

// line is where a queued job stands, in one line.
func (why *reasoning) line() string {
	s := fmt.Sprintf("%s ahead of it, %d running", count(why.Ahead, "job"), why.Running)
	if why.Ahead == 0 {
		s = fmt.Sprintf("it is next, %d running", why.Running)
	}
	if why.Ahead+why.Running == 0 {
		s = "it is next"
	}
	return s + why.eta()
}

// eta is when it starts, as a range: lengths are guessed from those of the pool's and
// the team's own jobs so far.
func (why *reasoning) eta() string {
	switch {
	case why.Runners == 0 || len(why.HeldBy) > 0:
		return ""
	case why.LateS < 5:
		return ", starts in seconds"
	case why.EarlyS == why.LateS:
		return ", starts in about " + seconds(why.LateS)
	}
	return fmt.Sprintf(", starts in %s to %s", seconds(why.EarlyS), seconds(why.LateS))
}

// seconds is a guess as people say it: no more precise than it is.
func seconds(n int64) string {
	switch {
	case n < 60:
		return fmt.Sprintf("%d s", n)
	case n < 3600:
		return fmt.Sprintf("%d min", (n+30)/60)
	}
	return fmt.Sprintf("%.1f h", float64(n)/3600)
}
