package gpu

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// findNVIDIA asks nvidia-smi, and the driver's files for what only they know.
func findNVIDIA(ctx context.Context) ([]Device, error) {
	if !has("nvidia-smi") {
		return nil, nil
	}
	out, err := call(ctx, "nvidia-smi", "--query-gpu=index,uuid,pci.bus_id,name,memory.total,driver_version", "--format=csv,noheader,nounits")
	if err != nil {
		return nil, err
	}
	ds, err := parseQuery(out)
	if err != nil || len(ds) == 0 {
		return nil, err
	}
	if out, err := call(ctx, "nvidia-smi", "--query-gpu=uuid,compute_cap", "--format=csv,noheader"); err == nil {
		addArch(ds, out) // drivers before 470 do not know the word
	}
	if out, err = call(ctx, "nvidia-smi", "-L"); err != nil {
		return nil, err
	}
	sliced, modes := parseList(out), migModes(ctx)
	ds = slices.DeleteFunc(ds, func(d Device) bool { return uncut(d.UUID, modes, sliced) })
	if len(sliced) > 0 { // only then: the whole report takes its time
		if out, err = call(ctx, "nvidia-smi", "-q", "-x"); err != nil {
			return nil, err
		}
		if err := addInstances(sliced, out); err != nil {
			return nil, err
		}
	}
	for i := range ds {
		ds[i].MIG = sliced[ds[i].UUID]
	}
	addInformation(ds, "/proc/driver/nvidia/gpus")
	makeNodes(ctx)
	ds = cut(ds)
	addCDI(ds, "/etc/cdi", "/var/run/cdi")
	return ds, nil
}

// Uncut returns the UUIDs of NVIDIA GPUs on which MIG is on while it has made no slice of
// them: no program can run there, so that Find leaves them out.
func Uncut(ctx context.Context) (ids []string, err error) {
	if !has("nvidia-smi") {
		return nil, nil
	}
	modes := migModes(ctx)
	if !slices.Contains(slices.Collect(maps.Values(modes)), migOn) {
		return nil, nil
	}
	out, err := call(ctx, "nvidia-smi", "-L")
	if err != nil {
		return nil, err
	}
	sliced := parseList(out)
	for _, id := range slices.Sorted(maps.Keys(modes)) {
		if uncut(id, modes, sliced) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// migOn is the mode of a GPU that runs nothing but in slices.
const migOn = "Enabled"

func uncut(id string, modes map[string]string, sliced map[string][]MIG) bool {
	return modes[id] == migOn && len(sliced[id]) == 0
}

// migModes returns what is set now, by UUID. Drivers before 450 do not know the word.
func migModes(ctx context.Context) map[string]string {
	modes := map[string]string{}
	out, _ := call(ctx, "nvidia-smi", "--query-gpu=uuid,mig.mode.current", "--format=csv,noheader")
	for line := range strings.Lines(out) {
		if id, mode, ok := strings.Cut(strings.TrimSpace(line), ", "); ok {
			modes[id] = mode
		}
	}
	return modes
}

// makeNodes makes /dev/nvidia-uvm, without which CUDA sees no GPU: the driver makes
// it when the first CUDA program runs as root or with a setuid helper, and neither is
// the case in a box. Best effort: the machine's own set-up may forbid it.
func makeNodes(ctx context.Context) {
	if _, err := os.Stat("/dev/nvidia-uvm"); errors.Is(err, os.ErrNotExist) && has("nvidia-modprobe") {
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
		if len(f) < 6 {
			return nil, fmt.Errorf("nvidia-smi said %q", line)
		}
		last := len(f) - 1
		d := Device{Maker: NVIDIA, UUID: f[1], PCI: address(f[2]), Model: strings.Join(f[3:last-1], ", "), Driver: f[last]}
		if d.Index, err = strconv.Atoi(f[0]); err != nil || d.Index < 0 || !validUUID(d.UUID, "GPU-") {
			return nil, fmt.Errorf("nvidia-smi said %q", line)
		}
		d.MemoryMB = mebibytes(f[last-1])
		d.Minor = d.Index
		ds = append(ds, d)
	}
	slices.SortFunc(ds, func(a, b Device) int { return a.Index - b.Index })
	return ds, nil
}

// archs are NVIDIA's architectures by the compute capability each begins with (CUDA C++
// Programming Guide, "Compute Capabilities"), the newest first.
var archs = []struct {
	from float64
	name string
}{{13, ""}, {10, "blackwell"}, {9, "hopper"}, {8.9, "ada"}, {8, "ampere"}, {7.5, "turing"}, {7, "volta"}, {6, "pascal"}, {5, "maxwell"}, {3, "kepler"}, {2, "fermi"}}

// addArch reads compute capabilities, by UUID.
func addArch(ds []Device, text string) {
	for line := range strings.Lines(text) {
		id, capability, _ := strings.Cut(strings.TrimSpace(line), ", ")
		n, err := strconv.ParseFloat(capability, 64)
		i := slices.IndexFunc(ds, func(d Device) bool { return d.UUID == id })
		if err != nil || i < 0 {
			continue
		}
		for _, a := range archs {
			if n >= a.from {
				ds[i].Arch = a.name
				break
			}
		}
	}
}

// mebibytes reads a number; "[N/A]" on machines whose GPU has no memory of its own is 0.
func mebibytes(s string) int64 {
	n, _ := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
	return max(n, 0)
}

// validUUID reports whether an identity may become a part of a file's name, a variable
// and a command line.
func validUUID(s, prefix string) bool {
	return strings.HasPrefix(s, prefix) && len(s) > len(prefix) && len(s) <= 80 &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") == ""
}

// address turns nvidia-smi's "00000000:65:00.0" into the kernel's "0000:65:00.0"; what
// is no address becomes "".
func address(s string) string {
	s = strings.ToLower(strings.TrimSpace(s))
	domain, rest, ok := strings.Cut(s, ":")
	if !ok || len(domain) < 4 || strings.Trim(s, "0123456789abcdef:.") != "" {
		return ""
	}
	if cut := len(domain) - 4; strings.Trim(domain[:cut], "0") == "" {
		domain = domain[cut:]
	}
	return domain + ":" + rest
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
				found[gpu] = append(found[gpu], MIG{Index: n, UUID: id, Profile: f[1], GI: -1, CI: -1})
			}
		}
	}
	return found
}

// A report is the part of nvidia-smi -q -x that names the instances of slices.
type report struct {
	GPUs []struct {
		UUID   string `xml:"uuid"`
		Slices []struct {
			Index string `xml:"index"`
			GI    string `xml:"gpu_instance_id"`
			CI    string `xml:"compute_instance_id"`
		} `xml:"mig_devices>mig_device"`
	} `xml:"gpu"`
}

// addInstances adds to slices which instances they are.
func addInstances(found map[string][]MIG, text string) error {
	var r report
	if err := xml.Unmarshal([]byte(text), &r); err != nil {
		return fmt.Errorf("nvidia-smi -q -x: %w", err)
	}
	for _, g := range r.GPUs {
		ms := found[strings.TrimSpace(g.UUID)]
		for _, s := range g.Slices {
			for i := range ms {
				if number(s.Index) == ms[i].Index {
					ms[i].GI, ms[i].CI = number(s.GI), number(s.CI)
				}
			}
		}
	}
	return nil
}

// number is a number from 0, or -1.
func number(s string) int {
	n, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil || n < 0 {
		return -1
	}
	return n
}

// cut takes apart the GPUs whose slices can be told apart.
func cut(ds []Device) (all []Device) {
	for _, d := range ds {
		if !separable(d.MIG) {
			all = append(all, d)
			continue
		}
		for _, m := range d.MIG {
			s := d
			s.MIG, s.Slice, s.Parent, s.UUID = nil, &m, d.UUID, m.UUID
			s.Model, s.MemoryMB = d.Model+" MIG "+m.Profile, profileMB(m.Profile)
			all = append(all, s)
		}
	}
	return all
}

func separable(ms []MIG) bool {
	return len(ms) > 0 && !slices.ContainsFunc(ms, func(m MIG) bool {
		return m.GI < 0 || m.CI < 0 || !validUUID(m.UUID, "MIG-")
	})
}

// profileMB is the memory of a slice: "1g.10gb" has 10 GiB.
func profileMB(profile string) int64 {
	_, s, _ := strings.Cut(profile, "g.")
	s, _, _ = strings.Cut(s, "gb")
	return mebibytes(s) << 10
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
