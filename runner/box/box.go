// Package box starts the shim somewhere it can do no harm and hands out its two
// wires.
//
// An [Engine] makes boxes: Docker's (package runner/box/docker) or bubblewrap's
// (package runner/box/bwrap). A [Box] is used for one attempt and never again. What runs in it speaks the frames of
// package job: [job.Ready] out; [job.Order], the source as [job.File] frames and
// perhaps [job.Stop] in; then output, /build and [job.Final] out. The engines know
// nothing of frames: they move bytes, hold limits and say how the box died.
//
// Promises: a box sees none of the host's state, none of raid's, and only the GPUs
// it was given; when Close has returned nothing of it is left: no process, mount,
// cgroup or file. Non-goal: deciding a verdict; that is package runner's.
package box

import (
	"context"
	"io"

	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
)

// An Engine makes boxes for one runner. Its methods are safe for concurrent use.
type Engine interface {
	// Name is what the result records: "bwrap", "docker".
	Name() string
	// Weakness says in one sentence which limits do not hold on this machine, or "".
	Weakness() string
	// Start starts a box and returns once its processes run; the shim's job.Ready
	// frame is still to come. ctx bounds the start only. After an error nothing is left.
	Start(ctx context.Context, c Config) (Box, error)
	// Sweep removes what earlier processes of this runner left behind, and what became
	// of starts that failed. It may be called at any time, and touches neither open
	// boxes nor those of other runners.
	Sweep(ctx context.Context) error
	// Close sweeps and removes the engine's own folder. No box may be open.
	Close() error
}

// A RefusedError says that a box will not be made for a job, however often it is tried:
// its image is not allowed here, or there is none of that name.
type RefusedError struct {
	Why string // for the user: what, and who can change it
}

func (e *RefusedError) Error() string { return e.Why }

// A Puller is an Engine whose images come from registries, where they may change.
type Puller interface {
	// Pull gets the default images of these rules and those they allow by their full
	// names, one after the other, so that no job has to wait for them, and tells say how
	// it goes. It returns when it has tried all, or when ctx ends.
	Pull(ctx context.Context, rules []*Rules, say func(line string))
	// Digest names the image that a box of this Config would run in if it were started
	// now. It may ask the registry, and pull.
	Digest(ctx context.Context, c Config) (string, error)
}

// Rules are what a pool asks of its boxes in an engine with images.
type Rules struct {
	Images job.Images // that may run
	Strict bool       // jobs are nobody, in a read-only root
	Caps   []string   // the capabilities that root keeps in a box
}

// Config says what one box is to be.
type Config struct {
	ID      string // unique for this runner: names cgroup and folders; [a-z0-9-]
	Rules   *Rules // of an engine with images; nil for its own
	Image   string // as the build file names it; "" for the default one
	Built   Built  // made by this engine for this job, instead of Image; nil for none
	Role    string // of the job's owner, for Rules.Images
	GPUs    []gpu.Device
	Network bool
	Limits  job.Limits // Memory, CPUs, Pids, Disk hold for the whole box
	Mounts  []Mount
	// Say tells the user, in a line, how the box will differ from what was asked for,
	// or what takes long. It is called before Start returns. nil for nobody.
	Say func(line string)
}

// A Mount shows a folder of the machine in a box, nosuid and nodev. It must be there, and
// everybody must be able to pass the folders above it. One that may be written to is
// given to the box's user; its quota is its file system's.
type Mount struct {
	Host, Box string // absolute
	Write     bool
}

// A Builder is an Engine that also builds images.
type Builder interface {
	Engine
	// Build builds an image from a Dockerfile. The error is a *RefusedError or a
	// *BuildError when the job is at fault, and the cause of ctx when that ended. After
	// an error nothing is left that Sweep would not find.
	Build(ctx context.Context, b Build) (Built, error)
}

// A Build says what an image is built from, and what that may use.
type Build struct {
	ID         string        // as Config.ID
	Rules      *Rules        // nil for the engine's own; FROM goes by them
	Role       string        // as in Config
	Source     io.ReadSeeker // a plain tar
	Dockerfile string        // in it
	Network    bool          // for RUN
	Limits     job.Limits    // Memory, CPUs and Pids of each RUN; Disk of all that is added to the base
	Say        func(line string)
	Out        io.Writer // what the instructions print
	// Begin is called once: what the image begins with is here, and the first
	// instruction is next.
	Begin func()
}

// A Built is an image that was built for one job, and nobody else can name.
type Built interface {
	// Push gives the image that name in its registry and returns its digest there. nil
	// is nobody. The error is a *BuildError when the registry will not have it.
	Push(ctx context.Context, ref string, who *job.Credentials) (digest string, err error)
	// Close removes the image and all it was made of. Its boxes must be closed.
	Close() error
}

// A BuildError says why the project's own instructions came to no image, or the image
// to no registry.
type BuildError struct {
	Reason job.Reason
	Exit   int
	Why    string // for the user: which instruction
}

func (e *BuildError) Error() string { return e.Why }

// A Box is one started box.
type Box interface {
	// Stdin is the shim's standard input. Closing it ends the box.
	Stdin() io.WriteCloser
	// Stdout is the shim's standard output. Somebody must always be reading it:
	// a shim that blocks in a write cannot be told to stop.
	Stdout() io.Reader
	// Limit replaces the limits of a box that waits for its order. An error means
	// that it cannot have these, and has its old ones or a part of the new.
	Limit(job.Limits) error
	// Kill ends every process in the box at once. It may be called at any time,
	// more than once, and does not wait.
	Kill()
	// Wait waits until every process is gone and says how the box ended.
	// It may be called more than once.
	Wait() Exit
	// Close kills what is left, waits, and removes all of it. It may be called more
	// than once and after any failure.
	Close() error
}

// A Watched is a Box of which the kernel may have nothing to say any more when it has ended.
type Watched interface {
	// Look notes how it is doing. It is quick, may be called at any time, and counts for Wait.
	Look()
}

// An Imaged is a Box that runs in an image. A Box that is none shows the host's programs.
type Imaged interface {
	Image() Image
}

// An Image is what a box runs in.
type Image struct {
	Digest string   // names these very bytes: "sha256:…"
	Env    []string // what steps should find set, HOME and USER among it
}

// Exit says how a box ended.
type Exit struct {
	OOMKills int    // processes the kernel killed for the memory limit
	DiskFull bool   // the disk limit was hit
	Lost     bool   // the engine itself went away, which is no job's doing
	Detail   string // what the engine printed on its own stderr, for the log
}
