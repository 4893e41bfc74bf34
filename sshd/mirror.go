package sshd

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/stream"
)

// endMirrors completes the streams of jobs that ended lately: raid may have been killed
// before it could, or Redis was away when it was stopped.
func (s *Server) endMirrors(ctx context.Context) {
	const most = 1000
	recs, err := s.brain.Past(ctx, queue.ListAll, 0, most)
	if err != nil {
		s.Log.Error("end the mirror of jobs", "err", err)
		return
	}
	for i := range recs {
		if r := &recs[i]; r.Expired.IsZero() && time.Since(r.FinishedAt.Time) < s.mirror.Keep {
			s.mirror.Ended(r.Job)
		}
	}
}

// runMirror tells staff how the mirror is doing.
func runMirror(_ context.Context, c *call) (int, error) {
	if c.s.mirror == nil {
		return 0, failf(job.ExitRefused, `it begins with [mirror] redis = "redis://…" in raid.toml`, "there is no mirror")
	}
	m := c.s.mirror.Stats()
	if c.json() {
		return 0, c.emit(m)
	}
	t := newGrid()
	t.add("redis", redisWord(&m))
	t.add("streams", fmt.Sprintf("%d being copied, %d waiting", m.Streams, m.Waiting))
	t.add("lag", bytesWord(m.Lag))
	t.add("memory", memoryWord(&m))
	t.add("copied", fmt.Sprintf("%s in %s", bytesWord(m.Bytes), entriesWord(int(m.Entries))))
	t.add("skipped", fmt.Sprintf("%s of output, %s whole", bytesWord(m.Gap), count(int(m.Skipped), "job")))
	t.add("no room", count(int(m.Refused), "job"))
	t.add("events", fmt.Sprintf("%d sent, %d lost", m.Events, m.EventsLost))
	t.add("errors", strconv.FormatInt(m.Errors, 10))
	if m.Trouble != "" {
		t.add("last error", m.Trouble)
	}
	return 0, t.print(c)
}

func redisWord(m *stream.MirrorStats) string {
	word := "takes writes"
	if !m.Up {
		word = "takes no writes"
	}
	return word + ", for " + span(time.Since(m.Since))
}

func memoryWord(m *stream.MirrorStats) string {
	if m.Limit == 0 {
		return bytesWord(m.Memory) + ", no limit"
	}
	return fmt.Sprintf("%s of %s", bytesWord(m.Memory), bytesWord(m.Limit))
}
