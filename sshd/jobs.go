package sshd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/pflag"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/tree"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/queue"
)

// mine reports whether somebody sees and controls a job: its user, their team as it
// was at submit, and staff.
func (c *call) mine(rec *job.Record) bool {
	return c.Who.Role.AtLeast(keys.Staff) || rec.User == c.Who.User || rec.Team != "" && rec.Team == c.Who.Team
}

// job returns the job a word names. Another team's job answers exactly as a number
// that does not exist.
func (c *call) job(ctx context.Context, word string) (*job.Record, error) {
	id, err := strconv.ParseInt(word, 10, 64)
	if err != nil {
		return nil, failf(job.ExitInput, "", "no job %s", quote(word))
	}
	rec, err := c.s.brain.Job(ctx, id)
	if err == nil && !c.mine(rec) {
		err = queue.ErrNoJob
	}
	if errors.Is(err, queue.ErrNoJob) {
		return nil, noJob(id)
	}
	return rec, err
}

func noJob(id int64) error { return failf(job.ExitInput, "", "no job %d", id) }

// recent returns the caller's jobs (staff: everybody's), newest first, at most n,
// unfinished ones included. user narrows it to one person.
func (c *call) recent(ctx context.Context, user string, n int) ([]job.Record, error) {
	var all []job.Record
	for _, rec := range c.s.brain.Unfinished() {
		if c.mine(rec) && (user == "" || rec.User == user) {
			all = append(all, *rec)
		}
	}
	for _, list := range c.lists(user) {
		past, err := c.s.past(ctx, list, n)
		if err != nil {
			return nil, err
		}
		all = append(all, past...)
	}
	all = slices.DeleteFunc(all, func(rec job.Record) bool { return !c.mine(&rec) })
	slices.SortStableFunc(all, func(a, b job.Record) int { // a finished record before its unfinished past
		return cmp.Or(cmp.Compare(b.ID, a.ID), -cmp.Compare(b2i(a.State.Final()), b2i(b.State.Final())))
	})
	all = slices.CompactFunc(all, func(a, b job.Record) bool { return a.ID == b.ID })
	return all[:min(n, len(all))], nil
}

// pastPage is how many finished jobs are read at a time: each may hold all its commands.
const pastPage = 200

// past returns at most n finished jobs of a list, newest first, without their orders.
func (s *Server) past(ctx context.Context, list string, n int) (all []job.Record, err error) {
	for before := int64(0); len(all) < n; before = all[len(all)-1].ID {
		recs, err := s.brain.Past(ctx, list, before, min(n-len(all), pastPage))
		if err != nil || len(recs) == 0 {
			return all, err
		}
		for _, rec := range recs {
			rec.Spec, rec.Steps = job.Spec{}, nil
			all = append(all, rec)
		}
	}
	return all, nil
}

// lists names where the caller's finished jobs stand.
func (c *call) lists(user string) []string {
	switch {
	case user != "":
		return []string{queue.ListUser(user)}
	case c.Who.Role.AtLeast(keys.Staff):
		return []string{queue.ListAll}
	case c.Who.Team != "":
		return []string{queue.ListUser(c.Who.User), queue.ListTeam(c.Who.Team)}
	}
	return []string{queue.ListUser(c.Who.User)}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// emit writes one object as one line.
func (c *call) emit(v any) error { return json.NewEncoder(c).Encode(v) }

// show prints jobs: one object a line, or a table.
func (c *call) show(all []job.Record) error {
	if c.json() {
		for _, rec := range all {
			if err := c.emit(rec.Job); err != nil {
				return err
			}
		}
		return nil
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(c, "no jobs yet; try: tar cf - . | ssh … submit")
		return err
	}
	t := newGrid("JOB", "STATE", "USER", "KIND", "POOL", "QUEUED", "RAN", "NAME")
	for _, rec := range all {
		t.add(strconv.FormatInt(rec.ID, 10), stateWord(&rec.Job), rec.User, rec.Kind, rec.Pool,
			ago(rec.QueuedAt.Time), ran(&rec.Job), rec.Name)
	}
	return t.print(c)
}

func runStatus(ctx context.Context, c *call) (int, error) {
	if len(c.args) == 1 {
		rec, err := c.job(ctx, c.args[0])
		if err != nil {
			return 0, err
		}
		if c.json() {
			return 0, c.emit(rec.Job)
		}
		return 0, c.describeJob(rec)
	}
	all, err := c.recent(ctx, "", 50)
	if err != nil {
		return 0, err
	}
	day := time.Now().Add(-24 * time.Hour)
	all = slices.DeleteFunc(all, func(rec job.Record) bool { return rec.State.Final() && rec.FinishedAt.Before(day) })
	return 0, c.show(all)
}

func historyFlags(f *pflag.FlagSet) {
	jsonFlag(f)
	f.IntP("number", "n", 20, "at most `N`")
	f.String("user", "", "only this `USER`'s")
}

func runHistory(ctx context.Context, c *call) (int, error) {
	n, err := c.flags.GetInt("number")
	if err != nil || n < 1 || n > 10_000 {
		return 0, failf(job.ExitUsage, "", "history: -n takes a number from 1 to 10000")
	}
	all, err := c.recent(ctx, c.flag("user"), n)
	if err != nil {
		return 0, err
	}
	return 0, c.show(all)
}

// describeJob prints one job for people.
func (c *call) describeJob(rec *job.Record) error {
	t := newGrid()
	t.add("job", fmt.Sprintf("%d  %s", rec.ID, stateWord(&rec.Job)))
	if rec.State.Final() {
		t.add("result", verdict(rec))
	}
	if rec.Name != "" {
		t.add("name", rec.Name)
	}
	t.add("by", tenantOf(rec)+"  as "+rec.Kind+" in "+rec.Pool)
	t.add("queued", rec.QueuedAt.String())
	if !rec.StartedAt.IsZero() {
		t.add("started", fmt.Sprintf("%s on %s, attempt %d", rec.StartedAt, rec.Runner, rec.Attempt))
	}
	if rec.State.Final() {
		t.add("finished", rec.FinishedAt.String())
		t.add("took", fmt.Sprintf("%s waiting, %s preparing, %s running, %s collecting",
			ms(rec.QueueWaitMS), ms(rec.PrepareMS), ms(rec.RunMS), ms(rec.CollectMS)))
	}
	if rec.ImageDigest != "" {
		t.add("image", clean(rec.Image)+"  "+rec.ImageDigest)
	}
	if rec.GPU != "" {
		t.add("gpu", gpuWords(rec))
	}
	if rec.SourceSHA256 != "" {
		t.add("source", "sha256 "+rec.SourceSHA256)
	}
	if !rec.Expired.IsZero() {
		t.add("files", "removed "+rec.Expired.String())
	}
	for _, st := range rec.Steps {
		t.add(fmt.Sprintf("step %d", st.N), fmt.Sprintf("exit %d in %s  %s", st.Exit, ms(st.WallMS), oneLine(st.Line)))
	}
	if rec.Weakness != "" {
		t.add("limits", rec.Weakness)
	}
	return t.print(c)
}

// gpuWords is what a job had, so that two times can be compared.
func gpuWords(rec *job.Record) string {
	s := rec.GPU
	if rec.GPUMemoryMB > 0 {
		s += fmt.Sprintf(", %d MiB", rec.GPUMemoryMB)
	}
	if rec.GPUDriver != "" {
		s += ", driver " + rec.GPUDriver
	}
	return s + "  " + rec.GPUUUID
}

// A place is a job's place in its pool, as queue and why tell it.
type place struct {
	Position int    `json:"position"`
	Alias    string `json:"alias,omitempty"`
	State    string `json:"state,omitempty"`
	AgeS     int64  `json:"age_s"`
	*job.Job        // nil for strangers' jobs
}

// lines are the pools in which jobs may wait: beside ours those that raid.toml had when
// the jobs came.
func (s *Server) lines() []string {
	pools := slices.Clone(s.Pools)
	for _, rec := range s.brain.Unfinished() {
		if !slices.Contains(pools, rec.Pool) {
			pools = append(pools, rec.Pool)
		}
	}
	slices.Sort(pools[len(s.Pools):])
	return pools
}

// inLine returns what runs, oldest first, and then what waits, pool by pool in the order
// it starts.
func (s *Server) inLine(ctx context.Context) (all []job.Record, err error) {
	var ids []int64
	for _, pool := range s.lines() {
		line, _, err := s.waiting(ctx, pool, nobody)
		if err != nil {
			return nil, err
		}
		for i := range line {
			ids = append(ids, line[i].Job)
		}
	}
	queued := map[int64]*job.Record{}
	for _, rec := range s.brain.Unfinished() { // later than the lines: what left them since is not told twice
		if rec.State == job.Queued {
			queued[rec.ID] = rec
		} else {
			all = append(all, *rec)
		}
	}
	slices.SortFunc(all, func(a, b job.Record) int { return cmp.Compare(a.ID, b.ID) })
	for _, id := range ids {
		if rec, ok := queued[id]; ok {
			all = append(all, *rec)
		}
	}
	return all, nil
}

func runQueue(ctx context.Context, c *call) (int, error) {
	all, err := c.s.inLine(ctx)
	if err != nil {
		return 0, err
	}
	t := newGrid("POS", "JOB", "STATE", "WHO", "POOL", "AGE")
	pos := map[string]int{}
	for _, rec := range all {
		p := place{Alias: c.s.alias(rec.Tenant()), State: string(rec.State), AgeS: int64(time.Since(rec.QueuedAt.Time).Seconds())}
		who, id, at := p.Alias, "", "-"
		if c.mine(&rec) {
			p.Alias, p.State, p.Job = "", "", &rec.Job
			who, id = tenantOf(&rec), strconv.FormatInt(rec.ID, 10)
		}
		if rec.State == job.Queued {
			pos[rec.Pool]++
			p.Position = pos[rec.Pool]
			at = strconv.Itoa(p.Position)
		}
		if c.json() {
			if err := c.emit(p); err != nil {
				return 0, err
			}
			continue
		}
		t.add(at, id, string(rec.State), who, rec.Pool, ago(rec.QueuedAt.Time))
	}
	if c.json() {
		return 0, nil
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(c, "nothing runs and nothing waits")
		return 0, err
	}
	return 0, t.print(c)
}

func runRunners(ctx context.Context, c *call) (int, error) {
	var all []queue.Runner
	if err := c.s.brain.View(ctx, func(q *queue.Core) { all = q.Runners() }); err != nil {
		return 0, err
	}
	t := newGrid("RUNNER", "STATE", "POOL", "ENGINE", "ARCH", "GPU")
	for _, r := range all {
		if c.json() {
			if err := c.emit(struct {
				queue.Runner
				State string `json:"state"`
				Sick  string `json:"sick,omitempty"`
			}{r, runnerState(&r), r.Sick}); err != nil {
				return 0, err
			}
			continue
		}
		t.add(r.Name, stateWords(&r), join(r.Pools), r.Engine, r.Arch, join(r.GPUs))
	}
	if c.json() {
		return 0, nil
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(c, "no runner has come yet; jobs wait until one does")
		return 0, err
	}
	return 0, t.print(c)
}

func runnerState(r *queue.Runner) string {
	switch {
	case !r.Connected:
		return "away"
	case r.Job != 0:
		return "busy"
	case r.Sick != "":
		return "sick"
	case r.Draining || r.Drained:
		return "draining"
	case r.Idle:
		return "idle"
	}
	return "starting"
}

// stateWords is the state and what is wrong.
func stateWords(r *queue.Runner) string {
	if s := runnerState(r); s != "sick" {
		return s
	}
	return "sick: " + clean(r.Sick)
}

func runCancel(ctx context.Context, c *call) (int, error) {
	for _, word := range c.args { // all or none: a typo should not cost the rest
		if _, err := c.job(ctx, word); err != nil {
			return 0, err
		}
	}
	for _, word := range c.args {
		rec, err := c.job(ctx, word)
		if err == nil {
			rec, err = c.cancel(ctx, rec.ID)
		}
		if err != nil {
			return 0, err
		}
		if c.json() {
			err = c.emit(rec.Job)
		} else {
			_, err = fmt.Fprintln(c, cancelWord(&rec.Job))
		}
		if err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// cancelWord says what a cancel came to.
func cancelWord(j *job.Job) string {
	if j.State.Final() && j.State != job.Cancelled {
		return fmt.Sprintf("job %d had ended: %s", j.ID, stateWord(j))
	}
	return fmt.Sprintf("job %d is %s", j.ID, stateWord(j))
}

// cancel ends a job, and returns what came of it; one that has ended is left as it is.
func (c *call) cancel(ctx context.Context, id int64) (*job.Record, error) {
	reply, err := c.s.brain.Do(ctx, queue.Cancel{Job: id, By: c.Who.User})
	if errors.Is(err, queue.ErrNoJob) {
		return c.s.brain.Job(ctx, id)
	}
	if err != nil {
		return nil, err
	}
	return reply.(*job.Record), nil
}

func runOutput(ctx context.Context, c *call) (int, error) {
	rec, err := c.job(ctx, c.args[0])
	if err != nil {
		return 0, err
	}
	if _, tty := c.PTY(); tty && !c.on("link") {
		return 0, failf(job.ExitUsage, fmt.Sprintf("try: ssh … output %d > build.tar", rec.ID), "a terminal cannot take a tar")
	}
	if rec.Archive == "" {
		return 0, failf(job.ExitInput, "", "%s", noArchive(rec))
	}
	if c.on("link") {
		if len(c.args) > 1 {
			return 0, failf(job.ExitUsage, "a link gives all of it", "output: --link and a path do not go together")
		}
		return 0, c.link(ctx, rec, rec.Archive, "build")
	}
	f, err := c.blob(ctx, rec, rec.Archive)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if len(c.args) == 1 {
		return 0, c.send(f)
	}
	found, err := tree.Extract(c, f, c.args[1])
	var no *tree.RefusedError
	if errors.As(err, &no) {
		return 0, failf(job.ExitInput, "a path in /build, without /build before it", "refused: %s", no.Error())
	}
	if err == nil && !found {
		err = failf(job.ExitInput, fmt.Sprintf("see what is there: ssh … output %d | tar tf -", rec.ID),
			"/build of job %d has no %s", rec.ID, quote(c.args[1]))
	}
	return 0, err
}

func noArchive(rec *job.Record) string {
	if !rec.State.Final() {
		return fmt.Sprintf("job %d is %s; /build comes back when it has ended", rec.ID, rec.State)
	}
	return fmt.Sprintf("nothing of /build came back from job %d", rec.ID)
}

func runSource(ctx context.Context, c *call) (int, error) {
	rec, err := c.job(ctx, c.args[0])
	if err != nil {
		return 0, err
	}
	if _, tty := c.PTY(); tty && !c.on("link") {
		return 0, failf(job.ExitUsage, fmt.Sprintf("try: ssh … source %d > project.tar", rec.ID), "a terminal cannot take a tar")
	}
	if rec.Source == "" {
		return 0, failf(job.ExitInput, "", "job %d was submitted without files", rec.ID)
	}
	if c.on("link") {
		return 0, c.link(ctx, rec, rec.Source, "source")
	}
	f, err := c.blob(ctx, rec, rec.Source)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return 0, c.send(f)
}

// blob opens a file of a job's. What was opened stays whole though it be removed.
func (c *call) blob(ctx context.Context, rec *job.Record, key string) (blob.File, error) {
	if err := expired(rec); err != nil {
		return nil, err
	}
	f, err := c.s.blobs.Open(ctx, blob.Key(key))
	if errors.Is(err, blob.ErrNotFound) {
		err = c.gone(ctx, rec.ID, err)
	}
	return f, err
}

// send copies a stored file out in full packets.
func (c *call) send(r io.Reader) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{r}, make([]byte, 256<<10))
	return err
}
