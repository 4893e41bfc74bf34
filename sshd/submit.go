package sshd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/tree"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/queue"
)

func submitFlags(f *pflag.FlagSet) {
	f.StringP("queue", "q", "", "the `POOL` to run in, a queue in RAI's words")
	f.String("as", "run", "the `KIND` it counts as: m1, m2, final, …")
	f.Int("gpus", -1, "`N` GPUs, instead of what the build file says")
	f.Int("priority", 0, "among your own waiting jobs: higher ones first")
	f.String("gpu-model", "", "only a GPU whose name holds `NAME`, like v100")
	f.String("name", "", "`TEXT` of your own, shown in listings")
	f.Duration("timeout", 0, "a shorter time limit `D`: 90s, 10m")
	f.Bool("tty", false, "give the job a terminal for its stdout")
	rerunFlags(f)
}

func rerunFlags(f *pflag.FlagSet) {
	f.Bool("detach", false, "print the job's id and leave at once")
	jsonFlag(f)
}

// runSubmit takes an upload, queues a job and follows it.
func runSubmit(ctx context.Context, c *call) (int, error) {
	f, err := c.submit(ctx)
	if err != nil || f == nil {
		return 0, err
	}
	return f.run(ctx) // perhaps for hours: what it took to submit is let go
}

// submit takes in an upload and queues it. The follower is nil if nobody stays.
func (c *call) submit(ctx context.Context) (*follower, error) {
	rec := job.Record{Job: job.Job{User: c.Who.User, Team: c.Who.Team, Kind: c.flag("as"), Name: c.flag("name")}}
	if err := c.checkWords(&rec); err != nil {
		return nil, err
	}
	up, err := c.receive(ctx)
	if err != nil {
		return nil, err
	}
	received := time.Now()
	defer up.discard() // unless it is committed
	build, err := c.buildFile(up)
	if err != nil {
		return nil, err
	}
	if err := c.specify(ctx, &rec, build); err != nil {
		return nil, err
	}
	store := func() (err error) {
		rec.Source, err = up.commit(ctx)
		rec.SourceSHA256 = strings.TrimPrefix(rec.Source, "sha256:")
		return err
	}
	return c.enqueue(ctx, &rec, store, &receipt{at: received, entries: up.Entries, bytes: up.size})
}

// runRerun queues an old upload again, with what it asked for then, as far as the
// caller may have it today.
func runRerun(ctx context.Context, c *call) (int, error) {
	f, err := c.rerun(ctx)
	if err != nil || f == nil {
		return 0, err
	}
	return f.run(ctx)
}

// rerun is submit with what an old job had.
func (c *call) rerun(ctx context.Context) (*follower, error) {
	old, err := c.job(ctx, c.args[0])
	if err != nil {
		return nil, err
	}
	rec := job.Record{Job: job.Job{User: c.Who.User, Team: c.Who.Team, Pool: old.Pool, Kind: old.Kind,
		Name: old.Name, Image: old.Image, SourceSHA256: old.SourceSHA256}, Source: old.Source, Spec: old.Spec}
	lim := c.s.limits(c.Who.Role)
	if rec.Spec.Network && !lim.Network {
		return nil, failf(job.ExitRefused, "submit it anew with network: false, or ask staff", "your role may not use the network")
	}
	if err := c.rebuildImage(&rec, lim); err != nil {
		return nil, err
	}
	rec.Spec.Limits = rec.Spec.Limits.Within(lim.Limits)
	c.apply(&rec)
	if err := c.fits(ctx, &rec); err != nil {
		return nil, err
	}
	return c.enqueue(ctx, &rec, func() error { return c.renew(ctx, old) }, &receipt{at: time.Now(), rerun: true})
}

// renew keeps the upload of a finished job for another one.
func (c *call) renew(ctx context.Context, old *job.Record) error {
	if old.Source == "" {
		return nil
	}
	if err := expired(old); err != nil {
		return err
	}
	err := c.s.blobs.Renew(ctx, blob.Key(old.Source))
	if errors.Is(err, blob.ErrNotFound) {
		return c.gone(ctx, old.ID, err)
	}
	return err
}

// A receipt is the proof of a submission that every submit prints.
type receipt struct {
	at      time.Time // the server's time of the complete upload
	entries int
	bytes   int64
	rerun   bool
}

// size is how much it was, as far as it is known.
func (r *receipt) size() string {
	switch {
	case r.bytes > 0:
		return fmt.Sprintf(", %s, %s", entriesWord(r.entries), bytesWord(r.bytes))
	case r.rerun:
		return ", as it was"
	}
	return ", no files"
}

func entriesWord(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

// accept has the upload stored, or kept, and makes the job durable that refers to it.
func (c *call) accept(ctx context.Context, rec *job.Record, store func() error) error {
	defer c.s.janitor.Arrive()()
	if err := store(); err != nil {
		return err
	}
	reply, err := c.s.brain.Do(ctx, queue.Submit{Record: *rec})
	if err != nil {
		return capped(err)
	}
	*rec = *reply.(*job.Record)
	return nil
}

// enqueue makes the job and its upload durable, says so, and returns who follows it, nil
// for --detach.
func (c *call) enqueue(ctx context.Context, rec *job.Record, store func() error, r *receipt) (*follower, error) {
	if err := c.accept(ctx, rec, store); err != nil {
		return nil, err
	}
	c.say("job %d queued as %s in %s", rec.ID, rec.Kind, rec.Pool)
	c.say("received %s%s", job.At(r.at), r.size())
	if rec.SourceSHA256 != "" {
		c.say("sha256 %s", rec.SourceSHA256) // alone, to fit a terminal
	}
	if c.on("detach") {
		if c.json() {
			return nil, c.emit(event{Event: "queued", Job: rec.ID, T: job.At(r.at), SHA256: rec.SourceSHA256, Kind: rec.Kind})
		}
		_, err := fmt.Fprintln(c, rec.ID)
		return nil, err
	}
	f := &follower{call: c, id: rec.ID, owner: true, status: true}
	f.event(event{Event: "queued", T: job.At(r.at), SHA256: rec.SourceSHA256, Kind: rec.Kind})
	return f, nil
}

// capped says which cap keeps a job from being queued.
func capped(err error) error {
	switch {
	case errors.Is(err, queue.ErrFull):
		return failf(job.ExitTryLater, "wait until some have run, or cancel what you no longer need", "%s", err)
	case errors.Is(err, queue.ErrNeeds):
		return failf(job.ExitTryLater, "wait until some have run, or let them ask for the same image and the same GPU", "%s", err)
	case errors.Is(err, queue.ErrDaily):
		return failf(job.ExitTryLater, "the count begins anew at midnight UTC", "%s", err)
	}
	return err
}

// checkWords checks what the flags say before anything is uploaded.
func (c *call) checkWords(rec *job.Record) error {
	if len(c.args) > 0 {
		return failf(job.ExitUsage, "a command for the box comes after \" -- \": ssh … submit -- make test", "submit: unexpected word %s", quote(c.args[0]))
	}
	rec.Pool = c.flag("queue")
	if rec.Pool == "" {
		rec.Pool = c.s.Pools[0]
	}
	if !slices.Contains(c.s.Pools, rec.Pool) {
		return failf(job.ExitInput, "the pools are: "+join(c.s.Pools), "no pool %s", quote(rec.Pool))
	}
	for what, word := range map[string]string{"--as": rec.Kind, "--name": rec.Name} {
		if len(word) > 64 || clean(word) != word {
			return failf(job.ExitUsage, "at most 64 printable characters", "submit: bad %s", what)
		}
	}
	if rec.Kind == "" || strings.ContainsAny(rec.Kind, " /") {
		return failf(job.ExitUsage, "it is one word: m1, final, …", "submit: bad --as")
	}
	return nil
}

// An upload is what arrived on stdin, checked, not yet stored.
type upload struct {
	tree.Summary
	blob *blob.Upload // nil for none
	size int64
}

// discard forgets an upload that was not committed.
func (u *upload) discard() {
	if u.blob != nil {
		u.blob.Abort()
	}
}

// commit stores the upload and returns its name, "" for none.
func (u *upload) commit(ctx context.Context) (string, error) {
	if u.blob == nil {
		return "", nil
	}
	k, err := u.blob.Commit(ctx)
	return string(k), err
}

const uploadHint = "try: tar cf - . | ssh … submit"

// receive reads stdin to its end, into a blob that is not committed yet.
func (c *call) receive(ctx context.Context) (*upload, error) {
	if _, tty := c.PTY(); tty {
		if c.tail != "" {
			return &upload{Summary: tree.Summary{Empty: true}}, nil
		}
		return nil, failf(job.ExitUsage, uploadHint, "submit reads a tar from stdin, and this is a terminal")
	}
	lim := c.s.limits(c.Who.Role)
	c.s.janitor.Check() // there may be room when it is needed
	b, err := c.s.blobs.Create(lim.Upload)
	if err != nil {
		return nil, err
	}
	in, stop := c.hinted()
	defer stop()
	sum, err := tree.Receive(in, b, job.BuildFileName, tree.Limits{Unpacked: lim.Unpacked, Entries: lim.Entries})
	if ctx.Err() != nil {
		b.Abort()
		return nil, context.Cause(ctx)
	}
	if err != nil {
		b.Abort()
		return nil, c.badUpload(err, lim)
	}
	up := &upload{Summary: sum, blob: b, size: b.Size()}
	if !sum.Empty {
		return up, nil
	}
	b.Abort()
	if c.tail == "" {
		return nil, failf(job.ExitInput, uploadHint, "nothing arrived on stdin")
	}
	return &upload{Summary: sum}, nil
}

// badUpload says what is wrong with an upload.
func (c *call) badUpload(err error, lim Limits) error {
	var no *tree.RefusedError
	switch {
	case errors.As(err, &no):
		return failf(job.ExitInput, no.Hint, "refused: %s", no.Error())
	case errors.Is(err, blob.ErrTooBig):
		return failf(job.ExitInput, "leave out what the build can make again; data sets belong on the runner", "refused: the upload is larger than %s", bytesWord(lim.Upload))
	}
	return err
}

// hintAfter is how long stdin may be silent before somebody is told what is missing.
const hintAfter = 5 * time.Second

// hinted is stdin with a hint to whoever typed `ssh host submit` and waits. stop
// must be called when reading is over.
func (c *call) hinted() (in io.Reader, stop func()) {
	hint := uploadHint
	if c.tail != "" {
		hint = "without files, end the command with </dev/null"
	}
	t := time.AfterFunc(hintAfter, func() { c.say("waiting for a tar on stdin; %s", hint) })
	return &firstRead{r: c.Session, first: sync.OnceFunc(func() { t.Stop() })}, func() { t.Stop() }
}

// firstRead calls first as soon as something was read.
type firstRead struct {
	r     io.Reader
	first func()
}

func (f *firstRead) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	f.first()
	return n, err
}

// buildFile parses the upload's build file and prints its warnings. With a command
// of its own a submission needs none.
func (c *call) buildFile(up *upload) (*job.Build, error) {
	if !up.Found {
		if c.tail != "" {
			return &job.Build{}, nil
		}
		return nil, c.noBuildFile(up)
	}
	b, notes, err := job.ParseBuild(bytes.Clone(up.Wanted))
	for _, n := range notes {
		c.block(n.Render(job.BuildFileName))
	}
	var bad *job.BuildError
	if errors.As(err, &bad) {
		c.block(bad.Render(job.BuildFileName))
		return nil, failf(job.ExitInput, "", "%s was not understood", job.BuildFileName)
	}
	return b, err
}

// noBuildFile says what to do about it: the commonest mistake is a folder packed
// from outside.
func (c *call) noBuildFile(up *upload) error {
	const missing = "there is no " + job.BuildFileName + " in the upload"
	switch {
	case up.Linked:
		return failf(job.ExitInput, "pack the file itself", "%s is a link", job.BuildFileName)
	case up.Nested != "":
		return failf(job.ExitInput, fmt.Sprintf("it is in %s; pack that folder from inside: cd %s; tar cf - . | ssh … submit",
			quote(up.Nested), clean(up.Nested)), missing)
	}
	io.WriteString(c.Stderr(), job.BuildTemplate)
	return failf(job.ExitInput, "put the above into it, or give a command: ssh … submit -- make", missing)
}

// block prints several lines, each as raid's own.
func (c *call) block(text string) {
	for line := range strings.Lines(text) {
		c.say("%s", strings.TrimRight(line, "\n"))
	}
}

// maxSpec is how long a job's order may be as JSON, which writes < in six bytes. It
// goes to runners and into boxes in one line and one frame, among other things.
const maxSpec = job.MaxFrame / 4

// specify joins build file, flags and what the caller's role may have.
func (c *call) specify(ctx context.Context, rec *job.Record, b *job.Build) error {
	lim := c.s.limits(c.Who.Role)
	rec.Spec = job.Spec{Image: b.Image, Steps: b.Steps, TTY: b.TTY || c.on("tty"), Cache: b.Cache, CPUArch: b.CPUArch, Limits: lim.Limits}
	rec.Image = b.Image
	c.apply(rec)
	if c.tail != "" {
		rec.Spec.Steps = []string{c.tail}
	}
	if len(rec.Spec.Steps) == 0 && b.BuildImage == nil {
		return failf(job.ExitInput, "list them under commands: build:", "%s has no commands to run", job.BuildFileName)
	}
	if slices.ContainsFunc(rec.Spec.Steps, func(step string) bool { return strings.ContainsRune(step, 0) }) {
		return failf(job.ExitInput, "no shell could be told it", "a command to run has a NUL byte in it")
	}
	if b, err := json.Marshal(rec.Spec); err != nil || len(b) > maxSpec {
		return failf(job.ExitInput, "put them into a script of the upload and run that", "the commands to run are too long")
	}
	if b.Network && !lim.Network {
		return failf(job.ExitRefused, "set network: false, or ask staff", "your role may not use the network")
	}
	rec.Spec.Network = b.Network
	if err := c.buildImage(rec, b); err != nil {
		return err
	}
	if err := c.time(&rec.Spec, b); err != nil {
		return err
	}
	c.memory(&rec.Spec, b)
	if rec.Spec.Priority, _ = c.flags.GetInt("priority"); rec.Spec.Priority < -100 || rec.Spec.Priority > 100 {
		return failf(job.ExitUsage, "", "submit: --priority goes from -100 to 100")
	}
	return c.gpus(ctx, rec, b, lim)
}

// apply adds what the pool and the caller's role say about a job.
func (c *call) apply(rec *job.Record) {
	rules := c.s.Rules[rec.Pool]
	rec.Spec.Role = string(c.Who.Role)
	rec.Spec.Engine, rec.Spec.KeepGoing, rec.Spec.StrictArch = rules.Engine, rules.KeepGoing, rules.StrictArch
}

// leastMemory is what a box with a shell in it needs. With less it cannot even be
// started, and each try would look like the runner's fault.
const leastMemory = 32 << 20

// memory lowers the memory limit, never raises it.
func (c *call) memory(s *job.Spec, b *job.Build) {
	asked := b.Memory
	if asked > 0 && asked < leastMemory {
		c.say("a box needs %s of memory at least; %s was asked for", bytesWord(leastMemory), bytesWord(asked))
		asked = leastMemory
	}
	if asked > 0 && (asked < s.Limits.Memory || s.Limits.Memory == 0) { // 0: no limit yet
		s.Limits.Memory = asked
	}
}

// time lowers the time limit, never raises it.
func (c *call) time(s *job.Spec, b *job.Build) error {
	asked, err := c.flags.GetDuration("timeout")
	if err != nil || asked < 0 {
		return failf(job.ExitUsage, "it looks like: --timeout 10m", "submit: bad --timeout")
	}
	for _, d := range []time.Duration{b.Time, asked} {
		if d > s.Limits.Time {
			c.say("the time limit is %s; %s was asked for", span(s.Limits.Time), span(d))
		}
		if d > 0 {
			s.Limits.Time = min(s.Limits.Time, d)
		}
	}
	return nil
}

// gpus decides how many GPUs a job gets: as RAI did, a wish for more than there is
// or for a negative number is granted as far as it can be, with a warning.
func (c *call) gpus(ctx context.Context, rec *job.Record, b *job.Build, lim Limits) error {
	n := 0
	if b.GPU != nil {
		n, rec.Spec.GPUArch, rec.Spec.GPUMemoryMB = b.GPU.Count, b.GPU.Arch, b.GPU.MemoryMB
	}
	rec.Spec.GPUModel = c.flag("gpu-model")
	if asked, err := c.flags.GetInt("gpus"); err == nil && c.flags.Changed("gpus") {
		n = asked
	}
	if n < 0 {
		c.say("the number of GPUs should be positive, not %d: giving it 1", n)
		n = 1
	}
	if lim.GPUs > 0 && n > lim.GPUs {
		c.say("your role may use %s at once: giving it %d", count(lim.GPUs, "GPU"), lim.GPUs)
		n = lim.GPUs
	}
	rec.Spec.GPUs = n
	return c.fits(ctx, rec)
}

// uptime before which raid does not say that nobody could ever run a job, and how
// long a runner that went away still counts.
const (
	settled  = time.Minute
	lastSeen = 24 * time.Hour
)

// refusal is what a job is told that a runner could run if only staff let it, "" for any
// other.
func refusal(q *queue.Core, r queue.Runner, rec *job.Record) string {
	images, builds := r.Images[rec.Pool], r.Builds
	if b := rec.Spec.Build; b != nil && b.Push != nil {
		r.Builds = &job.Builds{Registries: []string{b.Push.Registry}}
	} else if b != nil {
		r.Builds = &job.Builds{}
	}
	r.Images = nil
	switch {
	case q.Lacks(&r, rec) != "":
		return ""
	case rec.Spec.Build == nil:
		return images.NotAllowed(rec.Spec.Image)
	case builds == nil:
		return "no runner here builds images: that takes containers, [box] engine = \"docker\", and not strict ones"
	}
	return job.NoPush(rec.Spec.Build.Push.Registry)
}

// fits warns of GPUs a slot has not, and refuses what no runner seen lately has. An
// image is refused at once: unlike a GPU it does not come with a machine that is away.
func (c *call) fits(ctx context.Context, rec *job.Record) error {
	most, able, wish, refused, lacks := 0, false, false, "", []string{}
	err := c.s.brain.View(ctx, func(q *queue.Core) {
		for _, r := range q.Runners() {
			if !r.Connected && time.Since(time.UnixMilli(r.Seen)) > lastSeen {
				continue
			}
			if l := q.Lacks(&r, rec); l != "" {
				lacks = append(lacks, r.Name+" "+l)
				if refused == "" {
					refused = refusal(q, r, rec)
				}
				continue
			}
			able, most = true, max(most, len(r.GPUs))
			wish = wish || r.GPUArch == "" || strings.EqualFold(r.GPUArch, rec.Spec.GPUArch)
		}
	})
	switch {
	case err != nil:
		return err
	case !able && refused != "":
		return failf(job.ExitRefused, strings.Join(lacks, "\n"), "%s", refused)
	case !able && time.Since(c.s.since) > settled:
		return failf(job.ExitRefused, strings.Join(lacks, "\n"), "no runner here could ever run this job")
	case able && rec.Spec.GPUs > most:
		c.say("a slot has %s at most: giving it %d of the %d asked for", count(most, "GPU"), most, rec.Spec.GPUs)
		rec.Spec.GPUs = most
	}
	if able && !wish && rec.Spec.GPUs > 0 && rec.Spec.GPUArch != "" {
		c.say("no GPU here is of architecture %s: it runs on what there is", quote(rec.Spec.GPUArch))
	}
	return nil
}
