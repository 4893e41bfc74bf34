package sshd

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
)

// A self is what whoami says.
type self struct {
	User        string    `json:"user"`
	Role        keys.Role `json:"role"`
	Team        string    `json:"team,omitempty"`
	Fingerprint string    `json:"fingerprint"`
	From        string    `json:"from"`
}

func runWhoami(_ context.Context, c *call) (int, error) {
	me := self{c.Who.User, c.Who.Role, c.Who.Team, c.Who.Fingerprint, c.From.Addr().String()}
	if c.json() {
		return 0, c.emit(me)
	}
	t := newGrid()
	if me.User == "" {
		t.add("user", "nobody: this key is not enrolled")
	} else {
		t.add("user", me.User)
	}
	t.add("role", string(me.Role))
	if me.Team != "" {
		t.add("team", me.Team)
	}
	t.add("key", me.Fingerprint)
	return 0, t.print(c)
}

// runGreeting answers a bare `ssh rai@host`: who you are and what to type.
func runGreeting(ctx context.Context, c *call) (int, error) {
	if c.Who.Role == keys.Guest {
		fmt.Fprintf(c, "This is raid. Your key is not enrolled:\n  %s\n\n"+
			"Send its public half (the .pub file) to your course staff, and once it is enrolled:\n"+
			"  tar cf - . | ssh rai@host submit\n", c.Who.Fingerprint)
		return 0, nil
	}
	fmt.Fprintf(c, "Hello %s.", c.Who.User)
	if c.Who.Team != "" {
		fmt.Fprintf(c, " Your team is %s.", c.Who.Team)
	}
	mine, running, waiting := 0, 0, 0
	for _, rec := range c.s.brain.Unfinished() {
		if c.mine(rec) {
			mine++
		}
		if rec.State == job.Queued {
			waiting++
		} else {
			running++
		}
	}
	fmt.Fprintf(c, " %s\n\n", bustle(running, waiting, mine))
	c.greetDisk()
	fmt.Fprint(c, "  tar cf - . | ssh rai@host submit       run this folder\n"+
		"  ssh rai@host status                    your jobs\n"+
		"  ssh rai@host help                      everything else\n")
	return 0, nil
}

// bustle says how busy raid is.
func bustle(running, waiting, mine int) string {
	if running+waiting == 0 {
		return "Nothing runs and nothing waits."
	}
	return fmt.Sprintf("Running: %s. Waiting: %d. Yours of these: %d.", count(running, "job"), waiting, mine)
}

func runVersion(_ context.Context, c *call) (int, error) {
	v := c.s.Version
	if c.json() {
		return 0, c.emit(v)
	}
	_, err := fmt.Fprintln(c, v)
	return 0, err
}

func (v Version) String() string { return "raid " + v.Build() + " " + v.Go }

// Build is the version and the commit: what two raids must have in common.
func (v Version) Build() string {
	if v.Commit == "" {
		return v.Version
	}
	return v.Version + " (" + v.Commit + ")"
}

func runBuildtime(_ context.Context, c *call) (int, error) {
	built := c.s.Version.BuildTime
	if built == "" {
		built = "unknown"
	}
	_, err := fmt.Fprintln(c, built)
	return 0, err
}

// runAdmin is the staff's corner.
func runAdmin(ctx context.Context, c *call) (int, error) {
	verb, rest := c.args[0], c.args[1:]
	switch {
	case verb == "enroll" && len(rest) == 0:
		return runEnroll(ctx, c)
	case verb == "disk" && len(rest) == 0:
		return runDisk(ctx, c)
	case verb == "raids" && len(rest) == 0:
		return runRaids(ctx, c)
	case verb == "mirror" && len(rest) == 0:
		return runMirror(ctx, c)
	case (verb == "pause" || verb == "resume") && len(rest) == 1:
		return runPause(ctx, c, rest[0], verb == "pause")
	case (verb == "drain" || verb == "undrain") && len(rest) == 1:
		return runDrain(ctx, c, rest[0], verb == "drain")
	}
	return 0, failf(job.ExitUsage, "usage: ssh … admin "+c.cmd.usage, "no command admin %s with %s", quote(verb), count(len(rest), "word"))
}

// runRaids lists the raids of the deployment.
func runRaids(ctx context.Context, c *call) (int, error) {
	if c.s.Raids == nil {
		return 0, failf(job.ExitInput, "several can share a Redis: [queue] store = \"redis://…\"", "this is the only raid")
	}
	all, err := c.s.Raids(ctx)
	if err != nil {
		return 0, err
	}
	t := newGrid("RAID", "VERSION", "")
	for _, r := range all {
		role := "door"
		if r.Leads {
			role = "leads"
		}
		t.add(r.Addr, cmp.Or(r.Version, "unknown"), role)
		if c.json() {
			if err := c.emit(r); err != nil {
				return 0, err
			}
		}
	}
	if c.json() {
		return 0, nil
	}
	return 0, t.print(c)
}

// runPause lets nothing start in a pool, or lifts that; what runs goes on.
func runPause(ctx context.Context, c *call, pool string, on bool) (int, error) {
	if !slices.Contains(c.s.Pools, pool) {
		return 0, failf(job.ExitInput, "the pools are: "+join(c.s.Pools), "no pool %s", quote(pool))
	}
	if _, err := c.s.brain.Do(ctx, queue.Pause{Pool: pool, On: on}); err != nil {
		return 0, err
	}
	c.s.Log.Info("pool", "pool", pool, "paused", on, "by", c.Who.User)
	return 0, nil
}

// runDrain lets a runner take nothing new, or lifts that.
func runDrain(ctx context.Context, c *call, name string, on bool) (int, error) {
	n, err := c.s.brain.Do(ctx, queue.Drain{Name: name, On: on})
	if err == nil && n == 0 {
		err = failf(job.ExitInput, "they are listed by: ssh … runners", "no runner %s", quote(name))
	}
	if err == nil {
		c.s.Log.Info("runner", "runner", name, "drained", on, "by", c.Who.User)
	}
	return 0, err
}

// runEnroll reads one keys.Enrollment a line and answers each with one line, so that
// a class list is one session.
func runEnroll(ctx context.Context, c *call) (int, error) {
	lines := bufio.NewScanner(c)
	lines.Buffer(nil, 64<<10)
	status := 0
	for lines.Scan() {
		if len(lines.Bytes()) == 0 {
			continue
		}
		answer, err := c.enroll(ctx, lines.Bytes())
		if err != nil {
			return 0, err
		}
		if answer.Error != "" {
			status = job.ExitInput
		}
		if err := c.emit(answer); err != nil {
			return 0, err
		}
	}
	if err := lines.Err(); err != nil {
		return 0, failf(job.ExitInput, "one JSON object a line, 64 KiB at most", "cannot read the list: %s", err)
	}
	return status, nil
}

// An enrolled line answers one enrolment.
type enrolled struct {
	User        string `json:"user"`
	Fingerprint string `json:"fingerprint,omitempty"`
	New         bool   `json:"new,omitempty"`
	Error       string `json:"error,omitempty"`
	Hint        string `json:"hint,omitempty"`
}

func (c *call) enroll(ctx context.Context, line []byte) (enrolled, error) {
	var e keys.Enrollment
	if err := json.Unmarshal(line, &e); err != nil {
		return enrolled{Error: "not a JSON object: " + err.Error()}, nil
	}
	e.User = strings.ToLower(strings.TrimSpace(e.User)) // as the book will
	_, known := c.s.book.User(e.User)
	u, k, err := c.s.enrol(ctx, e, c.Who.User, c.Who.Role)
	var no *keys.RefusedError
	if errors.As(err, &no) {
		return enrolled{User: e.User, Error: no.Why, Hint: no.Hint}, nil
	}
	if err != nil {
		return enrolled{}, err
	}
	return enrolled{User: u.Name, Fingerprint: k.Fingerprint, New: !known}, nil
}
