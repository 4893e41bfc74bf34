// Package gpu says which GPUs this machine has, what a box needs to use one of them,
// and whether one is fit for the next job. It asks nvidia-smi, rocm-smi and the files
// of the drivers: no cgo, and a script of that name on PATH is all a test needs.
//
//	ds, err := gpu.Find(ctx)          // whole GPUs, and each MIG slice as one
//	claim, err := gpu.Claim(ds[:1])   // nobody else may have them now
//	err = gpu.NewMonitor(ds[:1]).Check(ctx)
//
// Promises: every call of a tool is bounded, for with a sick driver it never returns;
// what a tool prints is not trusted to be what it should be.
//
// Non-goals: clocks, power and use of a GPU; sharing one between two boxes.
package gpu

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// A Device is what can be handed to one box: a GPU, or one slice of a GPU that MIG has
// cut. UUID, never Index, is its identity: indices move between boots.
type Device struct {
	Maker    Maker
	Index    int // nvidia-smi's or rocm-smi's; a slice has that of its GPU
	Minor    int // /dev/nvidia<Minor>; for AMD /dev/dri/renderD<Minor>, -1 if not known
	UUID     string
	Model    string
	Arch     string // "volta", "ampere"; "" if it is not known
	MemoryMB int64
	Driver   string
	PCI      string // address in /sys/bus/pci/devices, "0000:65:00.0"; "" if not known
	CDI      string // its name in /etc/cdi or /var/run/cdi, "nvidia.com/gpu=GPU-…"; "" for none
	MIG      []MIG  // the slices of a GPU that can only be handed out whole
	Slice    *MIG   // set if this Device is one slice; Parent is its GPU then
	Parent   string
}

// A Maker is who made a GPU; tools, nodes and variables differ.
type Maker string

const (
	NVIDIA Maker = "nvidia"
	AMD    Maker = "amd"
)

// A MIG is one slice of a GPU (NVIDIA Multi-Instance GPU User Guide). GI and CI are the
// numbers of its instances, by which the driver lets it be opened; -1 if they are not known.
type MIG struct {
	Index   int
	UUID    string // "MIG-…"
	Profile string // "1g.10gb"
	GI, CI  int
}

// Limits of one call of a tool: with a sick driver it never returns, and without
// persistence mode a healthy one takes seconds.
const (
	callTime = 10 * time.Second
	waitTime = 2 * time.Second // then its pipes are closed, whoever holds them
)

// Find returns the GPUs of this machine, NVIDIA's first, each in the order of its index.
// A GPU that MIG has cut comes as its slices, one Device each, where the driver says
// which instances they are; else it comes whole. One on which MIG is on without having
// made a slice does not come at all; see Uncut. Without the makers' tools on PATH there
// are no GPUs, which is no error; a tool that fails or hangs is one, for then there are
// GPUs that must not be forgotten.
func Find(ctx context.Context) ([]Device, error) {
	ds, err := findNVIDIA(ctx)
	if err != nil {
		return nil, err
	}
	more, err := findAMD(ctx)
	return append(ds, more...), err
}

// Models returns what people call the devices, "NVIDIA A40, NVIDIA A40".
func Models(ds []Device) string { return join(ds, func(d Device) string { return d.Model }) }

// Arch returns the architecture of the devices, "" if they are not all of one.
func Arch(ds []Device) string {
	if len(ds) == 0 || slices.ContainsFunc(ds, func(d Device) bool { return d.Arch != ds[0].Arch }) {
		return ""
	}
	return ds[0].Arch
}

// UUIDs returns the identities of the devices, separated by commas.
func UUIDs(ds []Device) string {
	return strings.ReplaceAll(join(ds, func(d Device) string { return d.UUID }), ", ", ",")
}

func join(ds []Device, word func(Device) string) string {
	var words []string
	for _, d := range ds {
		words = append(words, word(d))
	}
	return strings.Join(words, ", ")
}

// LeastMemoryMB is the memory of the smallest device, 0 without any.
func LeastMemoryMB(ds []Device) int64 {
	if len(ds) == 0 {
		return 0
	}
	return slices.MinFunc(ds, func(a, b Device) int { return cmp.Compare(a.MemoryMB, b.MemoryMB) }).MemoryMB
}

// has reports whether a tool is on PATH.
func has(tool string) bool {
	_, err := exec.LookPath(tool)
	return err == nil
}

// call runs one of the makers' tools and returns what it printed.
func call(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, callTime, fmt.Errorf("no answer in %v", callTime))
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	c.WaitDelay = waitTime
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	err := outlive(ctx, c.Run)
	if ctx.Err() != nil { // it may still be writing
		return "", fmt.Errorf("%s %s: %w", name, args[0], context.Cause(ctx))
	}
	if err != nil {
		// nvidia-smi says on stdout why it failed.
		said := strings.TrimSpace(out.String() + errOut.String())
		return "", fmt.Errorf("%s %s: %w: %s", name, args[0], err, said[:min(len(said), 500)])
	}
	return out.String(), nil
}

// outlive returns what run returns, or gives up on it a moment after ctx has ended: a
// process that sleeps in a sick driver cannot be killed (NVIDIA/nvidia-docker#1553), and
// whoever waits for it waits as long as the machine runs. What run does then is lost.
func outlive(ctx context.Context, run func() error) error {
	done := make(chan error, 1)
	go func() { done <- run() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(waitTime + time.Second):
		return context.Cause(ctx)
	}
}
