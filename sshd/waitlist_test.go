package sshd

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/sshd/queue"
)

// TestQueueAsksOnce: whoever lists the queue is told from the list made for everybody,
// and does not have the loop run through all that waits for them alone.
func TestQueueAsksOnce(t *testing.T) {
	s := newSite(t)
	for range 2 {
		if _, stderr, status := s.say(t, "ada", "submit --detach -- true", nil); status != 0 {
			t.Fatal(stderr)
		}
	}
	if got, want := s.listed(t), []int64{1, 2}; !slices.Equal(got, want) {
		t.Fatalf("queue lists %d, want %d", got, want)
	}
	v, _ := s.waitlists.Load("rai_amd64")
	o := v.(*waitlist)
	o.mu.Lock()
	o.made = time.Now().Add(time.Hour) // fresh for everybody who asks
	o.line = []queue.Forecast{{Job: 2}, {Job: 1}, {Job: 3}}
	o.mu.Unlock()
	if got, want := s.listed(t), []int64{2, 1}; !slices.Equal(got, want) {
		t.Errorf("queue lists %d, want %d as the list has it, and nobody who does not wait", got, want)
	}
}

// listed returns the ids that queue lists to staff.
func (s *site) listed(t *testing.T) (ids []int64) {
	t.Helper()
	out, stderr, status := s.say(t, "sam", "queue --json", nil)
	if status != 0 {
		t.Fatal(stderr)
	}
	for line := range strings.Lines(out) {
		var j struct{ ID int64 }
		if err := json.Unmarshal([]byte(line), &j); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, j.ID)
	}
	return ids
}
