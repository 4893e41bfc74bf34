// Package job is the contract between raid and its runners: what a job is, what a
// build file says, what a box is asked to do and what it answers.
//
// Both sides import it and it imports nothing of ours, so neither side can reach
// into the other. Everything here is data with JSON names; the names of [Job] are
// what `--json` prints and never change their meaning.
package job

import (
	"fmt"
	"strconv"
	"time"
)

// A State is where a job stands. Only sshd/queue moves a job on:
//
//	queued ──▶ running ──▶ succeeded | failed
//	   │          └──▶ cancelling ──▶ cancelled   (or what the box said first)
//	   └──▶ cancelled
//
// A running job whose runner is lost goes back to queued with a higher attempt.
type State string

const (
	Queued     State = "queued"
	Running    State = "running"
	Cancelling State = "cancelling"
	Succeeded  State = "succeeded"
	Failed     State = "failed"
	Cancelled  State = "cancelled"
)

// Final reports whether a job in state s will never change again.
func (s State) Final() bool { return s == Succeeded || s == Failed || s == Cancelled }

// A Reason says why a job ended. The verdicts are kept apart because only
// ReasonExit may ever be graded, and only ReasonInfra is raid's own fault.
type Reason string

const (
	ReasonExit        Reason = "exit"         // the last step that ran exited with Exit
	ReasonSignal      Reason = "signal"       // a step died of a signal; Exit is 128+N
	ReasonTimeout     Reason = "timeout"      // the wall-time limit; Exit is 124
	ReasonOOM         Reason = "oom"          // the memory limit; Exit is 137
	ReasonOutputLimit Reason = "output-limit" // over 16 times the output limit; Exit is 153
	ReasonDiskLimit   Reason = "disk-limit"   // the disk limit; Exit is 153
	ReasonKilled      Reason = "killed"       // the box died under its steps; Exit is 137
	ReasonCancelled   Reason = "cancelled"    // somebody cancelled it; Exit is 130
	ReasonInfra       Reason = "infra"        // not the job's fault; Exit is 125
)

// Exit statuses of raid itself. A job's own status passes through unchanged, so
// each of these comes with a last line that names its reason.
const (
	ExitUsage     = 64  // EX_USAGE of sysexits.h: the command line is wrong
	ExitInput     = 65  // EX_DATAERR: the tar, the build file or the job number is wrong
	ExitTryLater  = 75  // EX_TEMPFAIL: disk full, store away, raid stopping
	ExitTimeout   = 124 // as timeout(1)
	ExitInfra     = 125 // as docker run: the tool failed, not the job
	ExitRefused   = 126 // this key may not do that
	ExitCancelled = 130 // 128 + SIGINT
	ExitKilled    = 137 // 128 + SIGKILL, also out of memory
	ExitLimit     = 153 // 128 + SIGXFSZ: output or disk limit
)

// Exit returns the exit status that goes with r when the job's own does not count.
func (r Reason) Exit() int {
	switch r {
	case ReasonTimeout:
		return ExitTimeout
	case ReasonOOM, ReasonKilled:
		return ExitKilled
	case ReasonOutputLimit, ReasonDiskLimit:
		return ExitLimit
	case ReasonCancelled:
		return ExitCancelled
	}
	return ExitInfra
}

// A Time is written as RFC 3339 UTC with milliseconds, and as null when zero.
type Time struct{ time.Time }

// At returns t as a Time, cut to the millisecond that its text can carry.
func At(t time.Time) Time { return Time{t.UTC().Truncate(time.Millisecond)} }

const timeLayout = "2006-01-02T15:04:05.000Z07:00"

func (t Time) String() string { return t.UTC().Format(timeLayout) }

// MarshalJSON writes null for the zero time.
func (t Time) MarshalJSON() ([]byte, error) {
	if t.IsZero() {
		return []byte("null"), nil
	}
	b := make([]byte, 0, len(`"`+timeLayout+`"`))
	return append(t.UTC().AppendFormat(append(b, '"'), timeLayout), '"'), nil
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (t *Time) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*t = Time{}
		return nil
	}
	s, err := strconv.Unquote(string(b)) // what stands in an RFC 3339 time needs no escape
	if err != nil {
		return fmt.Errorf("time %s: %w", b, err)
	}
	p, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return fmt.Errorf("time %q: %w", s, err)
	}
	*t = At(p)
	return nil
}

// A Job is one submission and its one result: the object every --json prints, with
// every name always there.
type Job struct {
	ID           int64   `json:"id"`
	State        State   `json:"state"`
	Reason       Reason  `json:"reason"`
	Exit         *int    `json:"exit"` // nil until the job ended
	Signal       string  `json:"signal"`
	User         string  `json:"user"`
	Team         string  `json:"team"`
	Pool         string  `json:"pool"`
	Kind         string  `json:"kind"`
	Name         string  `json:"name"`
	Engine       string  `json:"engine"`
	Image        string  `json:"image"`
	ImageDigest  string  `json:"image_digest"` // which bytes that was, where it ran
	Runner       string  `json:"runner"`
	GPU          string  `json:"gpu"`
	Attempt      int     `json:"attempt"`
	QueuedAt     Time    `json:"queued_at"`
	StartedAt    Time    `json:"started_at"`  // when the current lease was granted
	FinishedAt   Time    `json:"finished_at"` // when the result was committed
	QueueWaitMS  int64   `json:"queue_wait_ms"`
	PrepareMS    int64   `json:"prepare_ms"`
	RunMS        int64   `json:"run_ms"`
	CollectMS    int64   `json:"collect_ms"`
	ChargedS     float64 `json:"charged_s"`
	OutBytes     int64   `json:"out_bytes"`
	SourceSHA256 string  `json:"source_sha256"`
}

// Tenant is whom fairness is between: the team, or the user without one, marked so
// that no user can be taken for a team.
func (j *Job) Tenant() string {
	if j.Team != "" {
		return j.Team
	}
	return "~" + j.User
}

// A Record is all that raid keeps of a job: the public object and what only raid
// and its runners need. It is one row of the store.
type Record struct {
	Job
	Spec        Spec   `json:"spec"`
	Source      string `json:"source,omitempty"`    // blob of the upload as it came; "" for none
	Archive     string `json:"archive,omitempty"`   // blob of /build as it came back; "" for none
	Log         string `json:"log,omitempty"`       // blob of the output, where blobs outlive a raid; "" for none
	LogBytes    int64  `json:"log_bytes,omitempty"` // how long the output in it is, as offsets count
	Fence       uint64 `json:"fence,omitempty"`     // of the current attempt
	Holder      string `json:"holder,omitempty"`    // fingerprint of the runner key that holds the lease
	Note        string `json:"note,omitempty"`      // a sentence about the end: what was left out, who cancelled
	Steps       []Step `json:"steps,omitempty"`     // as the box timed them
	Begun       bool   `json:"begun,omitempty"`     // the first step has started: a dead box is the job's verdict now
	CancelBy    string `json:"cancel_by,omitempty"`
	Sealed      string `json:"sealed,omitempty"`   // a registry's credentials, encrypted to raid's host key; gone once the job has ended
	Weakness    string `json:"weakness,omitempty"` // limits that did not hold in this box, in words
	GPUDriver   string `json:"gpu_driver,omitempty"`
	GPUUUID     string `json:"gpu_uuid,omitempty"`      // separated by commas
	GPUMemoryMB int64  `json:"gpu_memory_mb,omitempty"` // of the smallest it had
	Expired     Time   `json:"expired,omitzero"`        // since when upload, /build and output may be gone; zero: they are kept
}

// Lease is the right to run the current attempt, if somebody holds it.
func (r *Record) Lease() Lease { return Lease{Job: r.ID, Fence: r.Fence} }

// A Spec is what one job asks a box to do, after defaults, roles and limits.
type Spec struct {
	Image     string   `json:"image,omitempty"`
	Steps     []string `json:"steps"`                // shell lines, run in order
	KeepGoing bool     `json:"keep_going,omitempty"` // run later steps after one failed, as RAI did
	TTY       bool     `json:"tty,omitempty"`
	Network   bool     `json:"network,omitempty"`
	Cache     bool     `json:"cache,omitempty"` // the team's folder at /cache, where the pool has one
	GPUs      int      `json:"gpus,omitempty"`
	GPUArch   string   `json:"gpu_arch,omitempty"` // a wish, unless StrictArch
	CPUArch   string   `json:"cpu_arch,omitempty"`
	Limits    Limits   `json:"limits"`

	Build *ImageBuild `json:"build,omitempty"` // the image is to be built first; Image is ""

	Role string `json:"role,omitempty"` // of its owner at submit: which images it may use

	// What the queue goes by, beside Image, Role, CPUArch and GPUs.
	Engine      string `json:"engine,omitempty"`        // only runners whose boxes it makes; "" for any
	StrictArch  bool   `json:"strict_arch,omitempty"`   // only GPUs of GPUArch
	GPUModel    string `json:"gpu_model,omitempty"`     // part of the model's name, any case
	GPUMemoryMB int64  `json:"gpu_memory_mb,omitempty"` // at least
	Priority    int    `json:"priority,omitempty"`      // among the user's own jobs; higher first
}

// Limits bound one attempt. Zero means no limit, except that Time is never zero
// in a job that was accepted.
type Limits struct {
	Time     time.Duration `json:"time"`               // wall time of all steps together
	Memory   int64         `json:"memory,omitempty"`   // bytes, swap included
	CPUs     float64       `json:"cpus,omitempty"`     // cores
	Pids     int           `json:"pids,omitempty"`     // processes and threads
	Output   int64         `json:"output,omitempty"`   // bytes kept; 16 times as many end the job
	Disk     int64         `json:"disk,omitempty"`     // bytes in /src, /build and /tmp together
	Artifact int64         `json:"artifact,omitempty"` // bytes of /build that come back
}

// Within returns the tighter of two limits, each for itself.
func (l Limits) Within(o Limits) Limits {
	return Limits{
		Time: tighter(l.Time, o.Time), Memory: tighter(l.Memory, o.Memory), CPUs: tighter(l.CPUs, o.CPUs),
		Pids: tighter(l.Pids, o.Pids), Output: tighter(l.Output, o.Output), Disk: tighter(l.Disk, o.Disk),
		Artifact: tighter(l.Artifact, o.Artifact),
	}
}

func tighter[T int | int64 | float64 | time.Duration](a, b T) T {
	if a == 0 || b != 0 && b < a { // 0 is no limit
		return b
	}
	return a
}

// Log returns how many bytes of log hold Output bytes of output: frames have heads,
// and a job that prints exactly its limit has lost nothing.
func (l *Limits) Log() int64 { return l.Output + l.Output/64 }

// Tar returns how many bytes a tar of Artifact bytes may have, 0 for any number. A shim
// stays far below it, even with nothing but empty files.
func (l *Limits) Tar() int64 {
	if l.Artifact == 0 {
		return 0
	}
	return 2*l.Artifact + 64<<20
}

// OutputEnd is how many times Limits.Output a job may print before it is ended.
const OutputEnd = 16

// A Step is one line of the build and how it went.
type Step struct {
	N      int    `json:"n"` // from 1
	Of     int    `json:"of"`
	Line   string `json:"line"`
	Begin  bool   `json:"begin,omitempty"` // this frame announces the step; the rest is not known yet
	Exit   int    `json:"exit"`
	Signal string `json:"signal,omitempty"`
	WallMS int64  `json:"wall_ms"`
	UserMS int64  `json:"user_ms"`
	SysMS  int64  `json:"sys_ms"`
	RSSKiB int64  `json:"rss_kib"` // largest resident set of one process
}

// A Result is how an attempt ended, as its runner reports it, once.
type Result struct {
	Reason      Reason `json:"reason"`
	Exit        int    `json:"exit"`
	Signal      string `json:"signal,omitempty"`
	Note        string `json:"note,omitempty"`
	Steps       []Step `json:"steps,omitempty"`
	PrepareMS   int64  `json:"prepare_ms"` // lease granted → first step started
	RunMS       int64  `json:"run_ms"`     // first step started → last process gone, measured outside the box
	CollectMS   int64  `json:"collect_ms"` // → /build is on the runner's disk
	OutBytes    int64  `json:"out_bytes"`  // bytes of stdout and stderr the job printed, dropped ones included
	Engine      string `json:"engine"`
	Image       string `json:"image,omitempty"`        // as named, or the runner's default
	ImageDigest string `json:"image_digest,omitempty"` // which bytes that was
	GPU         string `json:"gpu,omitempty"`
	GPUDriver   string `json:"gpu_driver,omitempty"`
	GPUUUID     string `json:"gpu_uuid,omitempty"`      // separated by commas
	GPUMemoryMB int64  `json:"gpu_memory_mb,omitempty"` // of the smallest it had
	Weakness    string `json:"weakness,omitempty"`
	Begun       bool   `json:"begun"` // a step had started
}
