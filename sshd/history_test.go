package sshd

import (
	"context"
	"strings"
	"testing"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// A bounded store fails a test in which too many rows are read at once.
type bounded struct {
	store.Store
	t *testing.T
}

func (b bounded) List(ctx context.Context, list string, before int64, n int) ([]queue.Row, error) {
	if n > pastPage {
		b.t.Errorf("%d rows of %s are read at once", n, list)
	}
	return b.Store.List(ctx, list, before, n)
}

// TestLongHistory: however much of it somebody asks for, it is not all in memory at once
// with what the jobs were to do, which may be 256 KiB each.
func TestLongHistory(t *testing.T) {
	s := newSite(t, func(c *Config) { c.Store = bounded{c.Store, t} })
	const jobs = 2*pastPage + 50
	exit := 0
	var writes []queue.Write
	for id := range int64(jobs) {
		rec := job.Record{Job: job.Job{ID: id + 1, User: "ada", Team: "team1", Pool: "rai_amd64", State: job.Succeeded, Exit: &exit}}
		writes = append(writes, queue.PastRow(&rec))
	}
	if err := s.brain.Put(t.Context(), writes); err != nil {
		t.Fatal(err)
	}
	for asked, want := range map[string]int{"10000": jobs, "201": 201, "3": 3} {
		out, stderr, status := s.say(t, "ada", "history --json -n "+asked, nil)
		if status != 0 {
			t.Fatal(stderr)
		}
		if got := strings.Count(out, "\n"); got != want {
			t.Errorf("history -n %s has %d jobs, want %d", asked, got, want)
		}
	}
}
