package bwrap

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/gpu"
)

// args returns bwrap's arguments for a box that runs argv.
func (e *Engine) args(c box.Config, d *disk, argv []string) ([]string, error) {
	a := []string{"--unshare-all", "--unshare-user", "--uid", strconv.Itoa(uidInBox), "--gid", strconv.Itoa(uidInBox),
		"--hostname", "raid", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL",
		"--seccomp", strconv.Itoa(fdSeccomp), "--info-fd", strconv.Itoa(fdInfo),
		"--clearenv", "--setenv", "HOME", homeInBox,
		"--setenv", "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if !e.lacks["--disable-userns"] {
		a = append(a, "--disable-userns")
	}
	if c.Network {
		a = append(a, "--share-net")
	}
	root, err := e.rootArgs(c)
	if err != nil {
		return nil, err
	}
	a = append(a, root...)
	a = append(a, "--proc", "/proc", "--dev", "/dev")
	if c.Limits.Memory > 0 && !e.lacks["--size"] {
		a = append(a, "--size", strconv.FormatInt(c.Limits.Memory, 10))
	}
	a = append(a, "--tmpfs", "/dev/shm")
	a = append(a, gpuArgs("/", c.GPUs)...)
	a = append(a, "--remount-ro", "/dev") // or it would be a disk without a limit
	for _, p := range parts {
		a = append(a, "--bind", filepath.Join(d.dir, p.name), p.at)
	}
	// The gate comes after everything that needs the host's files: see handshake.
	a = append(a, "--ro-bind", e.shim, shimInBox, "--file", strconv.Itoa(fdGate), "/.raid/gate",
		"--remount-ro", "/", "--chdir", "/build", "--")
	return append(a, argv...), nil
}

// rootArgs gives the programs and /etc: the host's, or those of an image.
func (e *Engine) rootArgs(c box.Config) (a []string, err error) {
	etc := filepath.Join(e.run, "etc")
	if root, ok := e.cfg.Images[c.Image]; ok && c.Image != "" {
		a, err = imageArgs(root, etc)
	} else {
		a, err = hostArgs("/"), error(nil)
		a = append(a, "--ro-bind", etc, "/etc")
		// A driver that is upgraded while raid runs changes this one.
		if _, err := os.Stat(filepath.Join(etc, "ld.so.cache")); err == nil {
			a = append(a, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
		}
	}
	if c.Network && err == nil {
		if real, err := filepath.EvalSymlinks("/etc/resolv.conf"); err == nil {
			a = append(a, "--ro-bind", real, "/etc/resolv.conf")
		}
	}
	return a, err
}

// hostArgs shows the programs of the host below root, "/" but for tests.
func hostArgs(root string) []string {
	a := []string{"--ro-bind", filepath.Join(root, "usr"), "/usr"}
	for _, name := range [...]string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		a = append(a, same(root, name)...)
	}
	// Toolkits that are not below /usr.
	for _, pattern := range [...]string{"opt/nvidia", "opt/cuda*", "opt/rocm*"} {
		found, _ := filepath.Glob(filepath.Join(root, pattern))
		for _, f := range found {
			rel, err := filepath.Rel(root, f)
			if err == nil {
				a = append(a, same(root, rel)...)
			}
		}
	}
	return a
}

// same shows root/name as /name: a link as a link, a folder read-only, else nothing.
func same(root, name string) []string {
	path := filepath.Join(root, name)
	if to, err := os.Readlink(path); err == nil {
		return []string{"--symlink", to, "/" + name}
	}
	if i, err := os.Stat(path); err != nil || !i.IsDir() {
		return nil
	}
	return []string{"--ro-bind", path, "/" + name}
}

// imageArgs shows a root folder read-only as /, but for what every box has itself.
// Account files of ours replace those the image has. Only what is at the top is
// bound, for bwrap must be able to make mount points beside it.
func imageArgs(root, etc string) ([]string, error) {
	es, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	var a []string
	for _, e := range es {
		switch e.Name() {
		case "proc", "dev", "sys", "run", "tmp", "home", "src", "build", ".raid", "lost+found", "mnt", "media", "boot", "var":
		default:
			a = append(a, same(root, e.Name())...)
		}
	}
	for _, name := range folders(filepath.Join(root, "var")) {
		if name != "tmp" {
			a = append(a, same(root, filepath.Join("var", name))...)
		}
	}
	for _, name := range etcOurs {
		// resolv.conf may be a link to a place that boxes do not have.
		if i, err := os.Lstat(filepath.Join(root, "etc", name)); err == nil && i.Mode().IsRegular() {
			a = append(a, "--ro-bind", filepath.Join(etc, name), "/etc/"+name)
		}
	}
	return a, nil
}

// gpuArgs gives the nodes of GPUs and no others, and what the driver's libraries look
// for in /sys. host is the root of the file system, "/" but for tests.
func gpuArgs(host string, gpus []gpu.Device) (a []string) {
	if len(gpus) == 0 {
		return nil
	}
	node := func(name string) {
		a = append(a, "--dev-bind-try", filepath.Join(host, "dev", name), "/dev/"+name)
	}
	for _, name := range [...]string{"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"} {
		node(name)
	}
	for _, name := range [...]string{"sys/devices/system/cpu", "sys/devices/system/node", "sys/module/nvidia", "sys/module/nvidia_uvm"} {
		a = append(a, "--ro-bind-try", filepath.Join(host, name), "/"+name)
	}
	for _, g := range gpus {
		node("nvidia" + strconv.Itoa(g.Minor))
		for _, n := range migNodes(host, g.Minor) {
			node("nvidia-caps/nvidia-cap" + strconv.Itoa(n))
		}
		if real, err := filepath.EvalSymlinks(filepath.Join(host, "sys/bus/pci/devices", g.PCI)); err == nil && g.PCI != "" {
			rel, _ := filepath.Rel(host, real)
			a = append(a, "--ro-bind", real, "/"+rel, "--symlink", "../../../../"+rel, "/sys/bus/pci/devices/"+g.PCI)
		}
	}
	return a
}

// migNodes returns the minor numbers of the nodes under which the MIG slices of a GPU
// can be opened: /proc/driver/nvidia/capabilities/gpu<minor>/mig/gi<G>[/ci<C>]/access
// ("NVIDIA Multi-Instance GPU User Guide", device nodes).
func migNodes(host string, minor int) (ns []int) {
	base := filepath.Join(host, "proc/driver/nvidia/capabilities", "gpu"+strconv.Itoa(minor), "mig")
	gis, _ := filepath.Glob(filepath.Join(base, "gi*", "access"))
	cis, _ := filepath.Glob(filepath.Join(base, "gi*", "ci*", "access"))
	for _, f := range slices.Concat(gis, cis) {
		b, _ := os.ReadFile(f)
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			if n, err := strconv.Atoi(strings.TrimSpace(v)); err == nil && k == "DeviceFileMinor" {
				ns = append(ns, n)
			}
		}
	}
	return ns
}

// etcText are the files of /etc that we write.
var etcText = map[string]string{
	"passwd": "root:x:0:0:root:/root:/bin/sh\n" +
		"rai:x:1000:1000:rai:" + homeInBox + ":/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"group":         "root:x:0:\nrai:x:1000:\nnogroup:x:65534:\n",
	"hosts":         "127.0.0.1 localhost raid\n::1 localhost\n",
	"hostname":      "raid\n",
	"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
	"resolv.conf":   "",
}

var etcOurs = []string{"passwd", "group", "hosts", "nsswitch.conf", "resolv.conf"}

// etcCopied are the parts of the host's /etc that programs below /usr need, and that
// say nothing about the host's people. Only what everybody may read is copied.
var etcCopied = []string{"ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime",
	"ssl/certs", "ssl/openssl.cnf", "pki/tls/certs", "pki/ca-trust/extracted", "crypto-policies",
	"OpenCL/vendors", "vulkan/icd.d", "glvnd", "fonts", "protocols", "services", "mime.types",
	"java-*", "python3*", "perl", "openmpi", "magic"}

// writeEtc makes the /etc of boxes anew. It is a copy and not a bind of each, for
// every mount costs a box some of its start.
func writeEtc(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := makeDir(dir, 0o755); err != nil {
		return err
	}
	for _, pattern := range etcCopied {
		found, _ := filepath.Glob(filepath.Join("/etc", pattern))
		for _, f := range found {
			if err := copyTree(filepath.Join(dir, strings.TrimPrefix(f, "/etc/")), f); err != nil {
				return err
			}
		}
	}
	for name, text := range etcText {
		if err := writeFile(filepath.Join(dir, name), strings.NewReader(text)); err != nil {
			return err
		}
	}
	return nil
}

// maxEtcFile is more than any file of /etc that a program needs.
const maxEtcFile = 16 << 20

// copyTree copies what everybody may read below from, links as links.
func copyTree(to, from string) error {
	if err := makeDirs(filepath.Dir(to)); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone, or not for us
		}
		i, err := e.Info()
		if err != nil {
			return nil
		}
		dst := to + strings.TrimPrefix(path, from)
		switch {
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return nil
			}
			return os.Symlink(target, dst)
		case e.IsDir() && i.Mode()&0o005 == 0o005:
			return makeDirs(dst)
		case e.IsDir():
			return fs.SkipDir
		case e.Type().IsRegular() && i.Mode()&0o004 != 0 && i.Size() <= maxEtcFile:
			return copyFile(dst, path)
		}
		return nil
	})
}

func copyFile(to, from string) error {
	f, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	return writeFile(to, io.LimitReader(f, maxEtcFile))
}

// writeFile makes a file that everybody may read, whatever the umask.
func writeFile(name string, r io.Reader) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Chmod(0o644), f.Close())
}

// makeDirs is os.MkdirAll with 0755, whatever the umask.
func makeDirs(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := makeDirs(filepath.Dir(dir)); err != nil {
		return err
	}
	return makeDir(dir, 0o755)
}
