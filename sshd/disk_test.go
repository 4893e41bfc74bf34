package sshd

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/janitor"
	"github.com/rai-project/raid/sshd/queue"
)

// Output that is removed while somebody reads it, slowly, ends their session with the
// reason, and whole frames until then.
func TestOutputRemovedWhileRead(t *testing.T) {
	s := newSite(t)
	s.say(t, "ada", "submit --detach -- true", nil)
	_, o := s.peer(t, "gpu1").join(nil)
	l, err := s.spools.Attempt(1, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("x", 1023) + "\n"
	if err := l.Append(bytes.Repeat(job.AppendFrame(nil, job.Out, []byte(line)), 80<<10)); err != nil { // more than a session buffers, and than a segment holds
		t.Fatal(err)
	}
	runner := s.brain.Unfinished()[0].Holder
	if _, err := s.brain.Do(t.Context(), queue.Finish{Runner: runner, Lease: o.Lease, Result: job.Result{Reason: job.ReasonExit}}); err != nil {
		t.Fatal(err)
	}
	k := s.peer(t, "ada").start("logs 1")
	k.want(strings.TrimSuffix(line, "\n"))
	rec, err := s.brain.Job(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	rec.Expired = job.At(rec.FinishedAt.Add(30 * 24 * time.Hour))
	if err := s.brain.Rewrite(t.Context(), []job.Record{*rec}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.janitor.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(k.r)
	if err != nil || strings.Trim(string(rest), "x\n") != "" || len(rest)%len(line) != 0 || len(rest) > 79<<20 {
		t.Errorf("read %d bytes more, %v, want some whole lines", len(rest), err)
	}
	if err := k.s.Wait(); err == nil || !strings.Contains(err.Error(), fmt.Sprint(job.ExitInput)) {
		t.Errorf("logs = %v, want status %d", err, job.ExitInput)
	}
	_, stderr, status := s.say(t, "ada", "logs 1", nil)
	if want := "raid: the files of job 1 were removed 30 days after its end\n"; status != job.ExitInput || !strings.HasPrefix(stderr, want) {
		t.Errorf("logs = %d, %q, want %d, %q", status, stderr, job.ExitInput, want)
	}
}

func TestDiskWords(t *testing.T) {
	days := func(n int) *int { return &n }
	for _, tt := range []struct {
		keep Keep
		r    janitor.Report
		want string
	}{
		{Keep{}, janitor.Report{OverDays: 1}, "0 bytes a day came in the last day: at this rate the disk does not fill up\n" +
			"files of 0 jobs are kept, for ever; records for ever"},
		{Keep{30 * 24 * time.Hour, 8760 * time.Hour}, janitor.Report{OverDays: 7, PerDay: 3 << 30, Jobs: 1, DaysLeft: days(23)},
			"3 GiB a day came in the last 7 days: at this rate the disk is full in 23 days, and then the oldest files of the team that has the most go first\n" +
				"files of 1 job are kept, for 30 days after the end; records for 365 days after the end"},
		{Keep{Files: time.Hour}, janitor.Report{OverDays: 2, DaysLeft: days(0)}, "0 bytes a day came in the last 2 days: the disk is full, and the oldest files of the team that has the most go first\n" +
			"files of 0 jobs are kept, for 1h00m after the end; records for ever"},
	} {
		s := &Server{Config: Config{Keep: tt.keep}}
		if got := strings.Join(s.diskWords(&tt.r), "\n"); got != tt.want {
			t.Errorf("diskWords(%+v, %+v) = %q, want %q", tt.keep, tt.r, got, tt.want)
		}
	}
}
