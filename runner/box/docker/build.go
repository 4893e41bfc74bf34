package docker

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/build"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/tree"
	"github.com/rai-project/raid/runner/shim"
)

// This file builds images with the engine's classic builder, which every engine has and
// which asks for nothing: no session, no frontend from the network, no secrets. Its
// containers cannot be told all that boxes are: RUN is root with the engine's default
// capabilities behind its default seccomp profile. Memory and CPU are limited by the
// builder, processes and disk by watching its containers.

// Names in the context that are ours.
const (
	ownDockerfile = ".raid.Dockerfile"
	ignoreName    = ".dockerignore"
)

// builtPrefix begins the names of images that boxes were built for.
const builtPrefix = "raid-build-"

// builtName is what an image is called until it is removed.
func (e *Engine) builtName(name string) string {
	return builtPrefix + strings.ToLower(e.cfg.ID) + ":" + name
}

// A construction is one build that is under way.
type construction struct {
	e      *Engine
	c      box.Build
	file   *dockerfile
	ids    map[string]string // of the images that it names
	cancel context.CancelCauseFunc
	began  time.Time

	step  int    // the instruction that runs, from 1
	id    string // of the image, once it is there
	size  int64  // of the newest layer with all below it
	added atomic.Int64

	watchers sync.WaitGroup
}

// errDiskFull ends a build whose image is too large.
var errDiskFull = errors.New("the image is too large")

// Build implements [box.Builder].
func (e *Engine) Build(ctx context.Context, c box.Build) (_ box.Built, err error) {
	if c.Rules = cmp.Or(c.Rules, &e.rules); c.Rules.Strict {
		return nil, &box.RefusedError{Why: "no images are built in a pool whose boxes are strict"}
	}
	if err := e.names.Open(c.ID); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.unbuild(c.ID)) // the first is what errors.As finds
		}
	}()
	b := &construction{e: e, c: c, ids: map[string]string{}}
	if b.file, err = b.read(); err != nil {
		return nil, err
	}
	for _, note := range b.file.notes {
		c.Say(note)
	}
	if err := b.bases(ctx); err != nil {
		return nil, err
	}
	c.Begin()
	if err := b.run(ctx); err != nil {
		return nil, err
	}
	img, err := e.images.look(ctx, b.id)
	if err != nil {
		return nil, err
	}
	return &built{e: e, name: c.ID, image: img}, nil
}

// labels are what finds a build's containers and layers again.
func (b *construction) labels() string {
	return fmt.Sprintf("%s=%s %s=%s", labelRunner, b.e.cfg.ID, labelBox, b.c.ID)
}

// read checks the source as if nobody had, and takes the Dockerfile out of it.
func (b *construction) read() (*dockerfile, error) {
	if _, err := b.c.Source.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	sum, err := tree.Check(b.c.Source, b.c.Dockerfile, tree.Limits{})
	if err != nil {
		return nil, fmt.Errorf("check the source: %w", err)
	}
	if !sum.Found {
		why := fmt.Sprintf("there is no %s in the upload", shownWord(b.c.Dockerfile))
		if sum.Linked {
			why = shownWord(b.c.Dockerfile) + " is a link"
		}
		return nil, &box.BuildError{Reason: job.ReasonExit, Exit: 1, Why: why}
	}
	f, err := readDockerfile(sum.Wanted, b.labels())
	if err != nil {
		return nil, err
	}
	// What is pushed, or begins another build, has none of it.
	f.lines = append(f.lines, instruction{text: fmt.Sprintf(`LABEL %s="" %s=""`, labelRunner, labelBox), ours: true})
	return f, nil
}

// bases gets the images that the build begins with, by the rules that boxes have: what
// is there the builder does not pull.
func (b *construction) bases(ctx context.Context) error {
	for _, name := range b.file.images {
		img, err := b.e.images.get(ctx, box.Config{Rules: b.c.Rules, Image: name, Role: b.c.Role, Say: b.c.Say})
		if err != nil {
			return err
		}
		b.ids[name] = img.id
		bounded, cancel := context.WithTimeout(ctx, quick)
		info, err := b.e.api.ImageInspect(bounded, img.id)
		cancel()
		if err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
		if info.Config == nil {
			continue
		}
		if err := checkTriggers(name, info.Config.OnBuild); err != nil {
			return err
		}
	}
	return nil
}

// run has the engine build, and reads what it says. Nothing of ours runs any more when it
// returns; the engine may still be tidying up.
func (b *construction) run(ctx context.Context) error {
	ctx, b.cancel = context.WithCancelCause(ctx)
	defer b.watchers.Wait()
	defer b.cancel(nil)
	b.began = time.Now()
	b.watch(ctx)
	r, w := io.Pipe()
	b.watchers.Go(func() { w.CloseWithError(b.pack(w)) }) // ends with r
	defer r.Close()
	answer, err := b.e.api.ImageBuild(ctx, r, b.options())
	if err == nil {
		defer answer.Body.Close()
		err = b.follow(answer.Body)
	}
	if err == nil && b.added.Load() > b.disk() {
		err = errDiskFull
	}
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if errors.Is(err, errDiskFull) {
		return &box.BuildError{Reason: job.ReasonDiskLimit, Exit: job.ExitLimit, Why: b.at() + "what it adds to the image is more than the disk limit of " + tree.Size(b.c.Limits.Disk)}
	}
	return fmt.Errorf("build image: %w", err)
}

func (b *construction) disk() int64 { return cmp.Or(b.c.Limits.Disk, math.MaxInt64) }

// options are all that the builder is asked for. What is not here stays off: build
// arguments, extra hosts, a remote context, squash, security options.
func (b *construction) options() build.ImageBuildOptions {
	o := build.ImageBuildOptions{
		Version: build.BuilderV1, Dockerfile: ownDockerfile, Tags: []string{b.e.builtName(b.c.ID)},
		NoCache: true, // layers of others are nobody's business
		Remove:  true, ForceRemove: true,
		NetworkMode: "none",
		Memory:      b.c.Limits.Memory, MemorySwap: b.c.Limits.Memory,
		Ulimits: []*container.Ulimit{{Name: "core"}, // and what the shim lowers in boxes
			{Name: "sigpending", Soft: shim.MaxSignals, Hard: shim.MaxSignals}, {Name: "msgqueue", Soft: shim.MaxQueues, Hard: shim.MaxQueues}},
	}
	if b.c.Network {
		o.NetworkMode = "default"
	}
	if b.c.Limits.CPUs > 0 {
		o.CPUPeriod = 100_000
		o.CPUQuota = int64(max(0.01, min(b.c.Limits.CPUs, float64(b.e.info.NCPU))) * 100_000)
	}
	return o
}

// pack writes the context: the source without what .dockerignore names, the build file,
// which may hold a password, and what would be in the way of our Dockerfile.
func (b *construction) pack(w io.Writer) error {
	if _, err := b.c.Source.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sum, err := tree.Check(b.c.Source, ignoreName, tree.Limits{})
	if err != nil {
		return err
	}
	ignore := readIgnore(sum.Wanted)
	if _, err := b.c.Source.Seek(0, io.SeekStart); err != nil {
		return err
	}
	in, out := tar.NewReader(b.c.Source), tar.NewWriter(w)
	for {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimSuffix(h.Name, "/"), "./")
		top, _, _ := strings.Cut(name, "/")
		if top == ownDockerfile || top == ignoreName || name == job.BuildFileName || ignore.ignores(name) {
			continue
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
	// The engine takes away what .dockerignore names of these two.
	for name, text := range map[string]string{ownDockerfile: b.file.render(b.ids), ignoreName: ownDockerfile + "\n" + ignoreName + "\n"} {
		if err := out.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
			return err
		}
		if _, err := io.WriteString(out, text); err != nil {
			return err
		}
	}
	return out.Close()
}

// follow reads what the engine says to its end.
func (b *construction) follow(r io.Reader) error {
	for in := json.NewDecoder(r); ; {
		var m struct {
			Stream      string
			Error       string
			ErrorDetail struct{ Code int }
			Aux         struct{ ID string }
		}
		err := in.Decode(&m)
		switch {
		case errors.Is(err, io.EOF) && b.id == "":
			return io.ErrUnexpectedEOF
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case m.Error != "":
			return b.failed(m.Error, m.ErrorDetail.Code)
		}
		if m.Aux.ID != "" {
			b.id = m.Aux.ID
		}
		b.heard(m.Stream)
	}
}

var (
	stepLine  = regexp.MustCompile(`^Step (\d+)/\d+ : `)
	layerLine = regexp.MustCompile(`^ ---> ([0-9a-f]{12})\n$`)
	chatter   = regexp.MustCompile(`^(?: ---> (?:Running in )?[0-9a-f]{12}\n|Removing intermediate container [0-9a-f]{12}\n|\n|Successfully (?:built|tagged) \S+\n)$`)
)

// heard takes a piece of what is printed: the builder's own words become lines of raid's,
// and the rest is the instructions' output. They cannot be told apart for certain, so
// nothing depends on it but what people read.
func (b *construction) heard(text string) {
	if m := stepLine.FindStringSubmatch(text); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil && n == b.step+1 && n <= len(b.file.lines) {
			b.step = n
			b.announce()
			return
		}
	}
	if m := layerLine.FindStringSubmatch(text); m != nil {
		b.measure(m[1])
	}
	if chatter.MatchString(text) {
		return
	}
	if colored, ok := strings.CutPrefix(text, "\x1b[91m"); ok { // stderr, as the builder marks it
		text = strings.TrimSuffix(colored, "\x1b[0m")
	}
	io.WriteString(b.c.Out, text) // who keeps it says what became of it
}

// announce shows an instruction of the user's own.
func (b *construction) announce() {
	if !b.file.lines[b.step-1].ours {
		b.c.Say(b.numbered() + " " + b.file.lines[b.step-1].text)
	}
}

// numbered is where the build is, as the user counts.
func (b *construction) numbered() string {
	n, of := 0, 0
	for i, l := range b.file.lines {
		if l.ours {
			continue
		}
		if of++; i < b.step {
			n = of
		}
	}
	return fmt.Sprintf("[image %d/%d]", n, of)
}

// at begins a sentence about the instruction that failed.
func (b *construction) at() string {
	if b.step == 0 {
		return ""
	}
	at := b.step
	for at > 1 && b.file.lines[at-1].ours {
		at--
	}
	return b.numbered() + " " + b.file.lines[at-1].text + ": "
}

// measure adds up what the instructions leave behind. What a stage begins with is not
// theirs.
func (b *construction) measure(layer string) {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	info, err := b.e.api.ImageInspect(ctx, layer)
	if err != nil || b.step == 0 {
		return
	}
	if !strings.HasPrefix(b.file.lines[b.step-1].text, "FROM ") && b.added.Add(max(0, info.Size-b.size)) > b.disk() {
		b.cancel(errDiskFull)
	}
	b.size = info.Size
}

// failed is the builder's last word. What it says is about the project, unless the
// machine has run full.
func (b *construction) failed(text string, code int) error {
	if strings.Contains(text, "no space left on device") {
		return errors.New(text)
	}
	fault := &box.BuildError{Reason: job.ReasonExit, Exit: 1, Why: b.at() + text}
	if code > 0 && code < 256 {
		fault.Exit, fault.Why = code, fmt.Sprintf("%sexit status %d", b.at(), code)
	}
	if code == job.ExitKilled && b.oom() {
		fault.Reason, fault.Why = job.ReasonOOM, b.at()+"out of memory"
	}
	return fault
}

// oom asks the engine whether it has seen the kernel kill something of this build.
func (b *construction) oom() bool {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	seen, failed := b.e.api.Events(ctx, events.ListOptions{Since: b.began.Add(-time.Second).Format(time.RFC3339Nano),
		Until: time.Now().Format(time.RFC3339Nano), Filters: b.filter("oom")})
	for {
		select {
		case <-seen:
			return true
		case <-failed: // the end is one, too
			return false
		}
	}
}

func (b *construction) filter(actions ...events.Action) filters.Args {
	f := filters.NewArgs(filters.Arg("type", string(events.ContainerEventType)),
		filters.Arg("label", labelRunner+"="+b.e.cfg.ID), filters.Arg("label", labelBox+"="+b.c.ID))
	for _, a := range actions {
		f.Add("event", string(a))
	}
	return f
}

// watch gives every container of the build, as soon as it runs, the limits that the
// builder has no words for.
func (b *construction) watch(ctx context.Context) {
	started, failed := b.e.api.Events(ctx, events.ListOptions{Filters: b.filter(events.ActionStart, events.ActionDie)})
	b.watchers.Go(func() { // ends with ctx
		stop := func() {}
		defer func() { stop() }()
		for {
			select {
			case m := <-started:
				if stop(); m.Action == events.ActionStart {
					stop = b.bound(ctx, m.Actor.ID)
				}
			case err := <-failed:
				if ctx.Err() == nil {
					b.cancel(fmt.Errorf("the engine does not say what it does: %w", err))
				}
				return
			}
		}
	})
}

// bound limits one container until stop is called.
func (b *construction) bound(ctx context.Context, id string) (stop func()) {
	ctx, stop = context.WithCancel(ctx)
	call, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	if pids := int64(b.c.Limits.Pids); pids > 0 {
		_, err := b.e.api.ContainerUpdate(call, id, container.UpdateConfig{Resources: container.Resources{PidsLimit: &pids}})
		if err != nil && ctx.Err() == nil && b.runs(id) {
			b.cancel(fmt.Errorf("limit a container of the build: %w", err))
		}
	}
	info, err := b.e.api.ContainerInspect(call, id)
	if err != nil {
		return stop // it was quick
	}
	limitSockets(info.State.Pid, info.ID, b.c.Limits.Memory)
	if b.c.Limits.Disk <= 0 {
		return stop
	}
	root := &crate{e: b.e, id: id}
	measure := root.measure(ctx, info.GraphDriver.Data["UpperDir"])
	full := func() bool { left := b.disk() - b.added.Load(); return measure(left) > left }
	b.watchers.Go(func() { machine.Sample(ctx, full, func() { b.cancel(errDiskFull) }) })
	return stop
}

// runs reports whether a container still does, and so should have had its limit.
func (b *construction) runs(id string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), quick)
	defer cancel()
	info, err := b.e.api.ContainerInspect(ctx, id)
	return err == nil && info.State.Running
}

// built is an image of a job's own.
type built struct {
	e     *Engine
	name  string
	image *image
}

// Close implements [box.Built].
func (b *built) Close() error { return b.e.unbuild(b.name) }

// unbuild removes all there is of a build.
func (e *Engine) unbuild(name string) error {
	defer e.names.Close(name) // what is left is Sweep's from here on
	ctx, cancel := context.WithTimeout(context.Background(), slow)
	defer cancel()
	others := func(n string) bool { return n != name }
	found, err := e.api.ContainerList(ctx, container.ListOptions{All: true,
		Filters: filters.NewArgs(filters.Arg("label", labelRunner+"="+e.cfg.ID), filters.Arg("label", labelBox+"="+name))})
	errs := []error{err}
	for _, c := range found {
		errs = append(errs, e.remove(c.ID))
	}
	errs = append(errs, e.sweepImages(ctx, others))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove image %s: %w", name, err)
	}
	return nil
}

// Push implements [box.Built].
func (b *built) Push(ctx context.Context, ref string, who *job.Credentials) (digest string, err error) {
	giveBack, err := b.e.borrow(ctx, ref, b.image.id)
	if err != nil {
		return "", fmt.Errorf("name the image %s: %w", ref, err)
	}
	defer func() {
		if err := giveBack(err == nil); err != nil { // Sweep will see to it
			b.e.cfg.Logf("image %s: take back the name %s: %v", b.name, ref, err)
		}
	}()
	r, err := b.e.push(ctx, ref, who)
	if err == nil {
		defer r.Close()
		digest, err = pushed(r)
	}
	switch {
	case err == nil:
		return digest, nil
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case errdefs.IsUnavailable(err):
		return "", err
	}
	return "", &box.BuildError{Reason: job.ReasonExit, Exit: 1, Why: fmt.Sprintf("the image was not pushed to %s: %v", ref, err)}
}

// pushed reads what the engine says about a push.
func pushed(r io.Reader) (digest string, err error) {
	for in := json.NewDecoder(r); ; {
		var m struct {
			Error string
			Aux   struct{ Digest string }
		}
		switch err := in.Decode(&m); {
		case errors.Is(err, io.EOF) && digest == "":
			return "", errors.New("the engine does not say what became of it")
		case errors.Is(err, io.EOF):
			return digest, nil
		case err != nil:
			return "", err
		case m.Error != "":
			return "", errors.New(m.Error)
		}
		digest = cmp.Or(m.Aux.Digest, digest)
	}
}
