package gpu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// This file is what a box needs to use its devices and no others.

// Environment returns the variables that say which devices a program may use. They are
// always all there, for an image may set them to "all". An engine gives them to the
// container, where NVIDIA's hook looks, and a runner to the steps.
func Environment(ds []Device) []string {
	var nvidia, amd, ranks []string
	named := true
	for _, d := range ds {
		switch {
		case d.Maker == AMD:
			ranks = append(ranks, strconv.Itoa(len(amd)))
			amd = append(amd, d.UUID)
			named = named && strings.HasPrefix(d.UUID, "GPU-")
		case len(d.MIG) > 0: // CUDA wants to hear of the slices
			for _, m := range d.MIG {
				nvidia = append(nvidia, m.UUID)
			}
		default:
			nvidia = append(nvidia, d.UUID)
		}
	}
	if !named {
		amd = ranks // the box has only these nodes, so their numbers begin at 0
	}
	visible := "void" // to NVIDIA's hook "" and "none" mean something else
	if len(nvidia) > 0 {
		visible = strings.Join(nvidia, ",")
	}
	return []string{"CUDA_VISIBLE_DEVICES=" + strings.Join(nvidia, ","), "CUDA_DEVICE_ORDER=PCI_BUS_ID",
		"NVIDIA_VISIBLE_DEVICES=" + visible, "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
		"ROCR_VISIBLE_DEVICES=" + strings.Join(amd, ","), "HIP_VISIBLE_DEVICES=" + strings.Join(ranks, ",")}
}

// Nodes returns the device nodes that a box with these devices needs, "/dev/nvidia0".
// root is where the machine's /proc is, "/" but for tests. They need not exist.
func Nodes(root string, ds []Device) (ns []string) {
	add := func(names ...string) {
		for _, n := range names {
			if n = "/dev/" + n; !slices.Contains(ns, n) {
				ns = append(ns, n)
			}
		}
	}
	for _, d := range ds {
		if d.Maker == AMD {
			add("kfd")
			if d.Minor >= 0 {
				add("dri/renderD" + strconv.Itoa(d.Minor))
			}
			continue
		}
		add("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia"+strconv.Itoa(d.Minor))
		for _, n := range capabilities(root, d) {
			add("nvidia-caps/nvidia-cap" + strconv.Itoa(n))
		}
	}
	return ns
}

// capabilities returns the numbers of the nodes under which a slice, or every slice of
// a whole GPU, can be opened: /proc/driver/nvidia/capabilities/gpu<minor>/mig/gi<G>[/ci<C>]/access
// ("NVIDIA Multi-Instance GPU User Guide", device nodes).
func capabilities(root string, d Device) (ns []int) {
	gi, ci := "gi*", "ci*"
	if d.Slice != nil {
		gi, ci = "gi"+strconv.Itoa(d.Slice.GI), "ci"+strconv.Itoa(d.Slice.CI)
	}
	base := filepath.Join(root, "proc/driver/nvidia/capabilities", "gpu"+strconv.Itoa(d.Minor), "mig", gi)
	gis, _ := filepath.Glob(filepath.Join(base, "access"))
	cis, _ := filepath.Glob(filepath.Join(base, ci, "access"))
	for _, f := range slices.Concat(gis, cis) {
		b, _ := os.ReadFile(f)
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			if n := number(v); n >= 0 && k == "DeviceFileMinor" {
				ns = append(ns, n)
			}
		}
	}
	return ns
}

// A File is a part of the driver that must be the kernel's own version, so that no
// image can bring it.
type File struct {
	Name string // what programs look for: "libcuda.so.1", "nvidia-smi"
	Path string // where it lies on this machine, with no link in it
	Tool bool   // a program, not a library
}

// Where a box that cannot add to its image's folders has the parts of the driver. The
// steps' PATH and LD_LIBRARY_PATH hold them.
const (
	BoxLibraries = "/.raid/nvidia/lib"
	BoxTools     = "/.raid/nvidia/bin"
)

// What NVIDIA's container toolkit gives to a container with the capabilities compute
// and utility (libnvidia-container, nvc_info.c).
var (
	driverLibraries = []string{"libcuda", "libcudadebugger", "libnvidia-ml", "libnvidia-cfg", "libnvidia-nscq", "libnvidia-opencl",
		"libnvidia-gpucomp", "libnvidia-ptxjitcompiler", "libnvidia-fatbinaryloader", "libnvidia-allocator",
		"libnvidia-compiler", "libnvidia-pkcs11", "libnvidia-pkcs11-openssl3", "libnvidia-nvvm"}
	driverTools = []string{"nvidia-smi", "nvidia-debugdump"}
)

// libraryFolders are where drivers put libraries on machines without ldconfig.
var libraryFolders = []string{"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib/powerpc64le-linux-gnu",
	"/usr/lib64", "/usr/lib", "/usr/lib/x86_64-linux-gnu/nvidia/current", "/usr/lib/nvidia", "/run/opengl-driver/lib"}

// Driver returns the parts of NVIDIA's driver that a box with a root folder of its own
// lacks, nothing if there are none. AMD's are all in the image.
func Driver(ctx context.Context) (fs []File) {
	var all []File
	if out, err := call(ctx, ldconfig(), "-p"); err == nil {
		all = parseLdconfig(out)
	}
	if len(all) == 0 {
		all = lookAround(libraryFolders)
	}
	for _, tool := range driverTools {
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			all = append(all, File{Name: tool, Path: filepath.Join(dir, tool), Tool: true})
		}
	}
	for _, f := range all {
		real, err := filepath.EvalSymlinks(f.Path)
		taken := func(o File) bool { return o.Name == f.Name }
		if err == nil && public(real) && !slices.ContainsFunc(fs, taken) {
			f.Path = real
			fs = append(fs, f)
		}
	}
	return fs
}

// public reports whether everybody may read a file. A box is made by a user that is
// nobody, and would not start at all for one that it cannot see.
func public(path string) bool {
	i, err := os.Stat(path)
	if err != nil || i.Mode()&0o004 == 0 {
		return false
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		i, err := os.Stat(dir)
		if err != nil || i.Mode()&0o001 == 0 {
			return false
		}
		if dir == "/" || dir == "." {
			return true
		}
	}
}

// ldconfig is found although sbin is not on every PATH.
func ldconfig() string {
	for _, p := range [...]string{"/sbin/ldconfig", "/usr/sbin/ldconfig"} {
		if unix.Access(p, unix.X_OK) == nil {
			return p
		}
	}
	return "ldconfig"
}

// parseLdconfig reads "libcuda.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcuda.so.1".
// Libraries for 32 bits have no word after libc6.
func parseLdconfig(text string) (fs []File) {
	for line := range strings.Lines(text) {
		head, path, ok := strings.Cut(strings.TrimSpace(line), " => ")
		name, kind, ok2 := strings.Cut(head, " ")
		if ok && ok2 && strings.HasPrefix(kind, "(libc6,") && ofDriver(name) && filepath.IsAbs(path) {
			fs = append(fs, File{Name: name, Path: path})
		}
	}
	return fs
}

func lookAround(dirs []string) (fs []File) {
	for _, dir := range dirs {
		found, _ := filepath.Glob(filepath.Join(dir, "lib*.so*"))
		for _, p := range found {
			if ofDriver(filepath.Base(p)) {
				fs = append(fs, File{Name: filepath.Base(p), Path: p})
			}
		}
	}
	return fs
}

// ofDriver reports whether a library is one of the driver's.
func ofDriver(name string) bool {
	base, _, ok := strings.Cut(name, ".so")
	return ok && !strings.Contains(name, "/") && slices.Contains(driverLibraries, base)
}

// addCDI adds the names that CDI specifications give to devices by their UUID.
func addCDI(ds []Device, dirs ...string) {
	for _, dir := range dirs {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				continue
			}
			kind, names := parseCDI(e.Name(), b)
			for i := range ds {
				if kind != "" && slices.Contains(names, ds[i].UUID) {
					ds[i].CDI = kind + "=" + ds[i].UUID
				}
			}
		}
	}
}

// parseCDI returns the kind and the names of the devices of a specification. Of YAML
// only the lines that say "kind:" and "name:" are read: the names that are looked for
// are UUIDs, and they stand nowhere else.
func parseCDI(file string, text []byte) (kind string, names []string) {
	if strings.HasSuffix(file, ".json") {
		var spec struct {
			Kind    string
			Devices []struct{ Name string }
		}
		if json.Unmarshal(text, &spec) != nil {
			return "", nil
		}
		for _, d := range spec.Devices {
			names = append(names, d.Name)
		}
		return spec.Kind, names
	}
	for line := range strings.Lines(string(text)) {
		k, v, _ := strings.Cut(strings.TrimLeft(line, " -"), ":")
		v = strings.Trim(strings.TrimSpace(v), `"'`)
		switch k {
		case "kind":
			kind = v
		case "name":
			names = append(names, v)
		}
	}
	return kind, names
}

// A Claimed is the right to hand out some devices, until it is closed or its process ends.
type Claimed []*os.File

// Claim takes devices for this process, machine-wide: a second runner that was told to
// own one of them must not come up. The error says which device is taken.
func Claim(ds []Device) (Claimed, error) { return claim(lockFolder(), ds) }

func claim(dir string, ds []Device) (c Claimed, err error) {
	for _, d := range ds {
		f, err := lock(filepath.Join(dir, "raid-gpu-"+d.UUID+".lock"))
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errors.New("another runner of this machine has it")
		}
		if err != nil {
			c.Close()
			return nil, fmt.Errorf("GPU %s: %w", d.UUID, err)
		}
		c = append(c, f)
	}
	return c, nil
}

// Close gives the devices up.
func (c Claimed) Close() {
	for _, f := range c {
		os.Remove(f.Name()) // while it is locked: see lock
		f.Close()
	}
}

// lock opens and locks a file. One that its holder removed meanwhile locks nothing.
func lock(path string) (*os.File, error) {
	for {
		f, err := openLock(path)
		if err != nil {
			return nil, err
		}
		var s unix.Stat_t
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = unix.Fstat(int(f.Fd()), &s)
		}
		if err == nil && s.Nlink > 0 {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
}

// lockFolder is where runners of all users can meet.
func lockFolder() string {
	if unix.Access("/run/lock", unix.W_OK) == nil {
		return "/run/lock"
	}
	return os.TempDir()
}

// openLock opens a lock that may be another user's: it is never made anew over one that
// is there, which a sticky folder would refuse (fs.protected_regular).
func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	}
	return f, err
}
