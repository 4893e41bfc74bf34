package gpu

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Settings are what staff may want to set otherwise on a machine with NVIDIA GPUs.
type Settings struct {
	Sleepy   []string // UUIDs without persistence mode: each first use takes seconds
	Profiled bool     // jobs may read the performance counters: ncu works
	Log      bool     // the kernel's log can be read, so that Xid errors are seen
	Driver   int      // GPUs that the driver lists in /proc, -1 if it lists none
}

// Examine finds the settings. It changes nothing.
func Examine(ctx context.Context) (Settings, error) { return examine(ctx, "/") }

func examine(ctx context.Context, root string) (s Settings, err error) {
	out, err := call(ctx, "nvidia-smi", "--query-gpu=uuid,persistence_mode", "--format=csv,noheader")
	s.Sleepy = parsePersistence(out)
	params, _ := os.ReadFile(filepath.Join(root, "proc/driver/nvidia/params"))
	s.Profiled = strings.Contains(string(params), "RmProfilingAdminOnly: 0\n")
	s.Driver = -1
	if es, err := os.ReadDir(filepath.Join(root, "proc/driver/nvidia/gpus")); err == nil {
		s.Driver = len(es)
	}
	if fd, err := unix.Open(filepath.Join(root, "dev/kmsg"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		s.Log = true
		unix.Close(fd)
	}
	return s, err
}

// parsePersistence reads "uuid, Enabled".
func parsePersistence(text string) (off []string) {
	for line := range strings.Lines(text) {
		if uuid, mode, _ := strings.Cut(strings.TrimSpace(line), ", "); mode == "Disabled" {
			off = append(off, uuid)
		}
	}
	return off
}
