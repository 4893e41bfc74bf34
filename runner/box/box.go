// Package box starts the shim somewhere it can do no harm and hands out its two
// wires.
//
// An [Engine] makes boxes: bwrap (package runner/box/bwrap), later Docker. A [Box]
// is used for one attempt and never again. What runs in it speaks the frames of
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
	// Sweep removes what earlier processes of this runner left behind. It is called
	// before the first Start and must not touch other runners' boxes.
	Sweep(ctx context.Context) error
	// Close sweeps and removes the engine's own folder. No box may be open.
	Close() error
}

// A Noter is an Engine that may have to tell the user how a box will differ from what
// the build file asked for.
type Noter interface {
	// Note returns one line about an image, or "".
	Note(image string) string
}

// Config says what one box is to be.
type Config struct {
	ID      string // unique for this runner: names cgroup and folders; [a-z0-9-]
	Image   string
	GPUs    []gpu.Device
	Network bool
	Limits  job.Limits // Memory, CPUs, Pids, Disk hold for the whole box
}

// A Box is one started box.
type Box interface {
	// Stdin is the shim's standard input. Closing it ends the box.
	Stdin() io.WriteCloser
	// Stdout is the shim's standard output. Somebody must always be reading it:
	// a shim that blocks in a write cannot be told to stop.
	Stdout() io.Reader
	// Limit replaces the limits of a box that waits for its order.
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

// Exit says how a box ended.
type Exit struct {
	OOMKills int    // processes the kernel killed for the memory limit
	DiskFull bool   // the disk limit was hit
	Detail   string // what the engine printed on its own stderr, for the log
}
