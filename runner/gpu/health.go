package gpu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Monitor says whether devices are fit for the next job. It remembers how far it has
// read the kernel's log. It is for one goroutine at a time.
type Monitor struct {
	devices []Device
	root    string // of /dev and /proc
	settle  time.Duration
	log     int // the kernel's log, -1 where it may not be read
}

// settleTries and settleTime are the patience with a job that was just killed: the
// driver takes its memory back a moment after the process has gone.
const (
	settleTries = 5
	settleTime  = 500 * time.Millisecond
)

// NewMonitor returns the monitor of some devices. What the kernel's log holds by now is
// old news. Close must follow.
func NewMonitor(ds []Device) *Monitor { return newMonitor("/", ds) }

func newMonitor(root string, ds []Device) *Monitor {
	m := &Monitor{devices: ds, root: root, settle: settleTime, log: -1}
	fd, err := unix.Open(filepath.Join(root, "dev/kmsg"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return m // for root only, mostly
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		unix.Close(fd)
		return m
	}
	m.log = fd
	return m
}

// Close lets the kernel's log go.
func (m *Monitor) Close() {
	if m.log >= 0 {
		unix.Close(m.log)
		m.log = -1
	}
}

// Check returns nil if every device may be given to a job, and else an error in a few
// words for staff: "GPU-…: Xid 79 …". A device must answer, be where it should be, have
// no process and no memory in use, and no error of the hardware may stand in the
// kernel's log since the last Check. Leftovers of a job that is just dying get a moment.
func (m *Monitor) Check(ctx context.Context) error {
	if err := errors.Join(m.missing(), m.xids()); err != nil {
		return oneLine(err)
	}
	for try := 1; ; try++ {
		left, err := m.use(ctx)
		switch {
		case err != nil:
			return oneLine(err)
		case left == nil:
			return oneLine(m.xids()) // asking may have shaken one loose
		case try == settleTries:
			return oneLine(left)
		}
		select {
		case <-time.After(m.settle):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// oneLine keeps an error fit for a column.
func oneLine(err error) error {
	if err == nil {
		return nil
	}
	const most = 200
	s := strings.Join(strings.Fields(err.Error()), " ")
	return errors.New(strings.ToValidUTF8(s[:min(len(s), most)], ""))
}

// missing reports nodes that the driver should have made. Without a driver in /proc
// there is nothing to compare.
func (m *Monitor) missing() error {
	for _, d := range m.devices {
		if d.Maker != NVIDIA || d.PCI == "" {
			continue
		}
		if _, err := os.Stat(filepath.Join(m.root, "proc/driver/nvidia/gpus", d.PCI)); err != nil {
			if _, err := os.Stat(filepath.Join(m.root, "proc/driver/nvidia/gpus")); err == nil {
				return fmt.Errorf("%s: the driver no longer has it", d.UUID)
			}
			continue
		}
		for _, n := range []string{"/dev/nvidiactl", "/dev/nvidia" + strconv.Itoa(d.Minor)} {
			if _, err := os.Stat(filepath.Join(m.root, n)); err != nil {
				return fmt.Errorf("%s: %s is missing", d.UUID, n)
			}
		}
	}
	return nil
}

// use asks the tools what the devices hold. left is what should not be there, err that
// of a tool, which is a device's illness as well.
func (m *Monitor) use(ctx context.Context) (left, err error) {
	var wg sync.WaitGroup
	var memory, apps, rocm error
	var mem, pids string
	var lefts [3]error
	if m.any(NVIDIA) {
		wg.Go(func() {
			mem, memory = call(ctx, "nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits")
			if memory == nil {
				lefts[0], memory = m.memory(mem)
			}
		})
		wg.Go(func() {
			pids, apps = call(ctx, "nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader")
			lefts[1] = m.processes(pids)
		})
	}
	if m.any(AMD) {
		wg.Go(func() {
			var out string
			if out, rocm = call(ctx, "rocm-smi", "--showuniqueid", "--showbus", "--showmeminfo", "vram", "--json"); rocm == nil {
				lefts[2], rocm = m.vram(out)
			}
		})
	}
	wg.Wait()
	return cmp.Or(lefts[1], lefts[0], lefts[2]), cmp.Or(memory, apps, rocm)
}

func (m *Monitor) any(maker Maker) bool {
	return slices.ContainsFunc(m.devices, func(d Device) bool { return d.Maker == maker })
}

// idleMB is how much memory a device without a job may have in use: the driver's own,
// and a screen's.
func (d *Device) idleMB() int64 { return max(512, d.MemoryMB/20) }

// memory reads "uuid, used". A slice's memory is not told there; a device that is not
// there at all is gone.
func (m *Monitor) memory(text string) (left, gone error) {
	used := map[string]string{}
	for line := range strings.Lines(text) {
		uuid, mb, _ := strings.Cut(strings.TrimSpace(line), ", ")
		used[uuid] = mb
	}
	for _, d := range m.devices {
		if d.Maker != NVIDIA {
			continue
		}
		id := d.UUID
		if d.Slice != nil {
			id = d.Parent
		}
		mb, ok := used[id]
		switch {
		case !ok:
			gone = fmt.Errorf("%s: nvidia-smi no longer lists it: %s", id, strings.TrimSpace(text))
		case d.Slice == nil && mebibytes(mb) > d.idleMB():
			left = fmt.Errorf("%s: %d MiB in use without a job", d.UUID, mebibytes(mb))
		}
	}
	return left, gone
}

// processes reads "gpu_uuid, pid, name".
func (m *Monitor) processes(text string) error {
	for line := range strings.Lines(text) {
		f := strings.SplitN(strings.TrimSpace(line), ", ", 3)
		if len(f) < 3 || strings.HasSuffix(f[2], "nvidia-cuda-mps-server") { // staff's choice
			continue
		}
		for _, d := range m.devices {
			if d.UUID == f[0] {
				return fmt.Errorf("%s: process %s (%s) still uses it", d.UUID, f[1], filepath.Base(f[2]))
			}
		}
	}
	return nil
}

// vram does the same for AMD.
func (m *Monitor) vram(text string) (left, gone error) {
	now, err := parseROCm(text)
	if err != nil {
		return nil, err
	}
	used := parseVRAM(text)
	for _, d := range m.devices {
		i := slices.IndexFunc(now, func(o Device) bool { return o.UUID == d.UUID })
		switch {
		case d.Maker != AMD:
		case i < 0:
			gone = fmt.Errorf("%s: rocm-smi no longer lists it", d.UUID)
		case used[now[i].Index] > d.idleMB():
			left = fmt.Errorf("%s: %d MiB in use without a job", d.UUID, used[now[i].Index])
		}
	}
	return left, gone
}

// appXids are errors that programs bring upon themselves; the GPU is well (NVIDIA's Xid
// catalogue; the same list as in k8s-device-plugin, health.go).
var appXids = []int{13, 31, 43, 45, 68, 109}

// xids reads on in the kernel's log. The error is the last one of the hardware.
func (m *Monitor) xids() (err error) {
	if m.log < 0 {
		return nil
	}
	buf := make([]byte, 8<<10) // a record of /dev/kmsg is never longer; one read, one record
	for {
		n, rerr := unix.Read(m.log, buf)
		switch {
		case rerr == unix.EPIPE || rerr == unix.EINTR: // overwritten before it was read
			continue
		case rerr != nil || n <= 0:
			return err
		}
		for line := range strings.Lines(string(buf[:n])) {
			if x := m.xid(line); x != nil {
				err = x
			}
		}
	}
}

func (m *Monitor) xid(line string) error {
	pci, code, what, ok := parseXid(line)
	if !ok || slices.Contains(appXids, code) {
		return nil
	}
	for _, d := range m.devices {
		if d.PCI != "" && strings.HasPrefix(d.PCI, pci) {
			return fmt.Errorf("%s: Xid %d: %s", d.UUID, code, what)
		}
	}
	return nil
}

// parseXid reads "… NVRM: Xid (PCI:0000:65:00): 79, pid=1, name=x, GPU has fallen off the
// bus.". pci lacks the function.
func parseXid(line string) (pci string, code int, what string, ok bool) {
	_, rest, ok := strings.Cut(line, "NVRM: Xid (PCI:")
	pci, rest, ok2 := strings.Cut(rest, "): ")
	num, what, _ := strings.Cut(rest, ",")
	code = number(num)
	if !ok || !ok2 || code < 0 || address(pci) == "" {
		return "", 0, "", false
	}
	for _, word := range []string{"pid=", "name="} { // a job's own words
		if w, after, found := strings.Cut(strings.TrimSpace(what), ","); found && strings.HasPrefix(w, word) {
			what = after
		}
	}
	return address(pci), code, strings.TrimSpace(what), true
}
