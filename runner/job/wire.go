package job

import (
	"fmt"
	"path/filepath"
)

// The lines of `runner join`: one JSON object a line, both ways. A runner opens
// with Hello; from then on it sends Beats and raid sends Calls.

// Protocol is the number both sides must agree on in Hello. It changes when a
// frame or a line changes its meaning.
const Protocol = 1

// Hello is the first line of a runner.
type Hello struct {
	Protocol    int                `json:"protocol"`
	Folder      string             `json:"folder,omitempty"` // the id of its state folder, by which two with one key are told apart
	Name        string             `json:"name"`             // shown to users; the key, not the name, is the identity
	Pools       []string           `json:"pools"`
	Engine      string             `json:"engine"`
	Arch        string             `json:"arch"`                    // GOARCH
	GPUs        []string           `json:"gpus,omitempty"`          // models, one each
	GPUArch     string             `json:"gpu_arch,omitempty"`      // of all of them: "volta"; "" if it is not known
	GPUMemoryMB int64              `json:"gpu_memory_mb,omitempty"` // of the smallest
	Images      map[string]*Images `json:"pool_images,omitempty"`   // that it takes, by pool; none: it has no images
	Builds      *Builds            `json:"builds,omitempty"`        // nil: it builds no images
	Express     bool               `json:"express,omitempty"`       // takes short jobs only
	Weakness    string             `json:"weakness,omitempty"`
	Held        *Lease             `json:"held,omitempty"` // what it is running, or whose result it still has
	Draining    bool               `json:"draining,omitempty"`
}

// A Lease names one attempt of one job. Whoever shows its fence holds the lease.
type Lease struct {
	Job   int64  `json:"job"`
	Fence uint64 `json:"fence"`
}

// A Beat is what a runner says every few seconds and whenever something changed.
type Beat struct {
	Held     *Lease `json:"held,omitempty"` // renews this lease
	Idle     bool   `json:"idle,omitempty"` // wants an offer
	Draining bool   `json:"draining,omitempty"`
	Sick     string `json:"sick,omitempty"` // why it takes nothing until it says otherwise, in words for staff
}

// A Call is what raid says to a runner. Exactly one field is set.
type Call struct {
	Offer  *Offer `json:"offer,omitempty"`
	Cancel *Lease `json:"cancel,omitempty"` // end it: the owner asked
	Stale  *Lease `json:"stale,omitempty"`  // end it and forget it: another attempt owns the job
	Beat   bool   `json:"beat,omitempty"`   // the last beat arrived and counted
}

// An Offer hands a lease to a runner.
type Offer struct {
	Lease
	Attempt int    `json:"attempt"`
	User    string `json:"user"`
	Team    string `json:"team,omitempty"`
	Pool    string `json:"pool"`
	Spec    Spec   `json:"spec"`
	Source  bool   `json:"source"`        // there is a tar to fetch
	Say     string `json:"say,omitempty"` // the line this attempt's log begins with

	Sealed string       `json:"sealed,omitempty"` // see Record; raid opens it when the offer leaves
	Push   *Credentials `json:"push,omitempty"`   // what was in it
}

// LogDir is where a runner with the state folder dir keeps the log of an attempt. A raid
// that shares the machine shows the files there instead of having them sent.
func LogDir(dir string, l Lease) string {
	return filepath.Join(AttemptDir(dir, l), "log")
}

// AttemptDir is the folder of an attempt.
func AttemptDir(dir string, l Lease) string {
	return filepath.Join(dir, "attempts", fmt.Sprintf("%d-%d", l.Job, l.Fence))
}
