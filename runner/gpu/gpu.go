// Package gpu says which GPUs this machine has. It asks nvidia-smi and nothing
// else: no cgo, and a script of that name on PATH is all a test needs.
//
// Non-goals: health, use and memory of a GPU; other makers.
package gpu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Device is one GPU that can be handed to a box. UUID, never Index, is its
// identity: indices move between boots.
type Device struct {
	Index    int // nvidia-smi's; /dev/nvidia<Minor> is the node
	Minor    int
	UUID     string
	Model    string
	MemoryMB int64
	Driver   string
	PCI      string // address in /sys/bus/pci/devices, "0000:65:00.0"; "" if not known
	MIG      []MIG  // slices, if the GPU is cut into some
}

// A MIG is one slice of a GPU. CUDA_VISIBLE_DEVICES takes its UUID; the wall between
// two boxes is around the whole Device.
type MIG struct {
	Index   int
	UUID    string // "MIG-…"
	Profile string // "1g.10gb"
}

// Limits of one call of nvidia-smi: with a sick driver it never returns, and without
// persistence mode a healthy one takes seconds.
const (
	callTime = 10 * time.Second
	waitTime = 2 * time.Second // then its pipes are closed, whoever holds them
)

// Find returns the GPUs of this machine in the order of their index. Without
// nvidia-smi on PATH there are none, which is no error; an nvidia-smi that fails or
// hangs is one, for then there are GPUs that must not be forgotten.
func Find(ctx context.Context) ([]Device, error) {
	if _, err := exec.LookPath("nvidia-smi"); err != nil {
		return nil, nil
	}
	out, err := call(ctx, "nvidia-smi", "--query-gpu=index,uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits")
	if err != nil {
		return nil, err
	}
	devices, err := parseQuery(out)
	if err != nil || len(devices) == 0 {
		return nil, err
	}
	out, err = call(ctx, "nvidia-smi", "-L")
	if err != nil {
		return nil, err
	}
	addMIG(devices, parseList(out))
	addInformation(devices, "/proc/driver/nvidia/gpus")
	makeNodes(ctx)
	return devices, nil
}

// call runs one of NVIDIA's tools and returns what it printed.
func call(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, callTime, fmt.Errorf("no answer in %v", callTime))
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	c.WaitDelay = waitTime
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	err := c.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		// nvidia-smi says on stdout why it failed.
		said := strings.TrimSpace(out.String() + errOut.String())
		return "", fmt.Errorf("%s %s: %w: %s", name, args[0], err, said[:min(len(said), 500)])
	}
	return out.String(), nil
}

// makeNodes makes /dev/nvidia-uvm, without which CUDA sees no GPU: the driver makes
// it when the first CUDA program runs as root or with a setuid helper, and neither is
// the case in a box. Best effort: the machine's own set-up may forbid it.
func makeNodes(ctx context.Context) {
	if _, err := os.Stat("/dev/nvidia-uvm"); errors.Is(err, os.ErrNotExist) {
		call(ctx, "nvidia-modprobe", "-u", "-c=0")
	}
}

// parseQuery reads the CSV of --query-gpu. A model's name may hold a comma.
func parseQuery(text string) (ds []Device, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line == "No devices were found" {
			continue
		}
		f := strings.Split(line, ", ")
		if len(f) < 5 {
			return nil, fmt.Errorf("nvidia-smi said %q", line)
		}
		last := len(f) - 1
		d := Device{UUID: f[1], Model: strings.Join(f[2:last-1], ", "), Driver: f[last]}
		if d.Index, err = strconv.Atoi(f[0]); err != nil || d.Index < 0 || !strings.HasPrefix(d.UUID, "GPU-") {
			return nil, fmt.Errorf("nvidia-smi said %q", line)
		}
		// "[N/A]" on machines whose GPU has no memory of its own: 0.
		d.MemoryMB, _ = strconv.ParseInt(f[last-1], 10, 64)
		d.Minor = d.Index
		ds = append(ds, d)
	}
	slices.SortFunc(ds, func(a, b Device) int { return a.Index - b.Index })
	return ds, nil
}

// parseList reads the MIG lines of nvidia-smi -L, by the UUID of their GPU:
//
//	GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-…)
//	  MIG 1g.10gb     Device  0: (UUID: MIG-…)
func parseList(text string) map[string][]MIG {
	found := map[string][]MIG{}
	gpu := ""
	for line := range strings.Lines(text) {
		head, tail, ok := strings.Cut(line, "(UUID: ")
		id, _, ok2 := strings.Cut(tail, ")")
		f := strings.Fields(head)
		switch {
		case !ok || !ok2 || len(f) < 2:
		case f[0] == "GPU":
			gpu = id
		case f[0] == "MIG" && len(f) >= 4 && gpu != "":
			n, err := strconv.Atoi(strings.TrimSuffix(f[len(f)-1], ":"))
			if err == nil && n >= 0 {
				found[gpu] = append(found[gpu], MIG{Index: n, UUID: id, Profile: f[1]})
			}
		}
	}
	return found
}

func addMIG(ds []Device, slices map[string][]MIG) {
	for i := range ds {
		ds[i].MIG = slices[ds[i].UUID]
	}
}

// addInformation adds what only the driver knows: the node's number and the bus
// address. Where it says nothing the index stands for the number.
func addInformation(ds []Device, dir string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*", "information"))
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		uuid, minor, ok := parseInformation(string(b))
		for i := range ds {
			if ok && ds[i].UUID == uuid {
				ds[i].Minor, ds[i].PCI = minor, filepath.Base(filepath.Dir(file))
			}
		}
	}
}

// parseInformation reads "GPU UUID: GPU-…" and "Device Minor: N".
func parseInformation(text string) (uuid string, minor int, ok bool) {
	minor = -1
	for line := range strings.Lines(text) {
		k, v, _ := strings.Cut(line, ":")
		v = strings.TrimSpace(v)
		switch strings.TrimSpace(k) {
		case "GPU UUID":
			uuid = v
		case "Device Minor":
			if n, err := strconv.Atoi(v); err == nil {
				minor = n
			}
		}
	}
	return uuid, minor, uuid != "" && minor >= 0
}
