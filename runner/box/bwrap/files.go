package bwrap

import (
	"context"
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
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/gpu"
)

// args returns bwrap's arguments for a box that runs argv.
func (e *Engine) args(ctx context.Context, c box.Config, d *machine.Disk, argv []string) ([]string, error) {
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
	if _, image := e.cfg.Images[c.Image]; image && c.Image != "" && len(c.GPUs) > 0 {
		a = append(a, driverArgs(gpu.Driver(ctx))...)
	}
	a = append(a, "--remount-ro", "/dev") // or it would be a disk without a limit
	for _, p := range machine.Parts {
		a = append(a, "--bind", filepath.Join(d.Dir, p.Name), p.At)
	}
	a = append(a, "--bind", filepath.Join(d.Dir, machine.Home), homeInBox)
	for _, m := range c.Mounts {
		how := "--ro-bind"
		if m.Write {
			how = "--bind"
		}
		a = append(a, how, m.Host, m.Box)
	}
	// The gate comes after everything that needs the host's files: see handshake.
	a = append(a, "--ro-bind", e.shim, shimInBox, "--file", strconv.Itoa(fdGate), "/.raid/gate",
		"--remount-ro", "/", "--chdir", "/build", "--")
	return append(a, argv...), nil
}

// rootArgs gives the programs and /etc: the host's, or those of an image.
func (e *Engine) rootArgs(c box.Config) (a []string, err error) {
	etc := filepath.Join(e.run, "etc")
	root, image := e.cfg.Images[c.Image]
	if image = image && c.Image != ""; image {
		a, err = imageArgs(root, etc, c.Mounts...)
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
		if !image {
			a = append(a, certificateArgs(etc)...)
		}
	}
	return a, err
}

// certificateArgs shows the host's certificates where etc has a folder for them.
func certificateArgs(etc string) (a []string) {
	for _, dir := range etcCertificates {
		if i, err := os.Stat(filepath.Join(etc, dir)); err == nil && i.IsDir() {
			a = append(a, "--ro-bind-try", "/etc/"+dir, "/etc/"+dir)
		}
	}
	return a
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
func imageArgs(root, etc string, mounts ...box.Mount) ([]string, error) {
	es, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	var a []string
	for _, e := range es {
		if slices.ContainsFunc(mounts, func(m box.Mount) bool { return m.Box == "/"+e.Name() }) {
			continue // it may be a link
		}
		switch e.Name() {
		case "proc", "dev", "sys", "run", "tmp", "home", "src", "build", ".raid", "lost+found", "mnt", "media", "boot", "var":
		default:
			a = append(a, same(root, e.Name())...)
		}
	}
	for _, name := range machine.Folders(filepath.Join(root, "var")) {
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

// gpuArgs gives the nodes of GPUs and no others, and what the drivers' libraries look
// for in /sys. host is the root of the file system, "/" but for tests.
func gpuArgs(host string, gpus []gpu.Device) (a []string) {
	if len(gpus) == 0 {
		return nil
	}
	for _, n := range gpu.Nodes(host, gpus) {
		a = append(a, "--dev-bind-try", filepath.Join(host, n), n)
	}
	for _, name := range [...]string{"sys/devices/system/cpu", "sys/devices/system/node", "sys/module/nvidia", "sys/module/nvidia_uvm",
		"sys/module/amdgpu", "sys/devices/virtual/kfd"} {
		a = append(a, "--ro-bind-try", filepath.Join(host, name), "/"+name)
	}
	if slices.ContainsFunc(gpus, func(g gpu.Device) bool { return g.Maker == gpu.AMD }) {
		a = append(a, "--symlink", "../../devices/virtual/kfd/kfd", "/sys/class/kfd/kfd")
	}
	var seen []string // two slices of one GPU share its address
	for _, g := range gpus {
		if g.PCI == "" || slices.Contains(seen, g.PCI) {
			continue
		}
		seen = append(seen, g.PCI)
		if real, err := filepath.EvalSymlinks(filepath.Join(host, "sys/bus/pci/devices", g.PCI)); err == nil {
			rel, _ := filepath.Rel(host, real)
			a = append(a, "--ro-bind", real, "/"+rel, "--symlink", "../../../../"+rel, "/sys/bus/pci/devices/"+g.PCI)
		}
	}
	return a
}

// driverArgs gives an image the machine's own driver, which no image can bring: it has
// to fit the kernel's module. It lies where environment's PATH and LD_LIBRARY_PATH
// look, for nothing can be added to the image's folders.
func driverArgs(fs []gpu.File) (a []string) {
	for _, f := range fs {
		dir := gpu.BoxLibraries
		if f.Tool {
			dir = gpu.BoxTools
		}
		a = append(a, "--ro-bind-try", f.Path, dir+"/"+f.Name)
	}
	return a
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
	"ssl/openssl.cnf", "crypto-policies",
	"OpenCL/vendors", "vulkan/icd.d", "glvnd", "fonts", "protocols", "services", "mime.types",
	"java-*", "python3*", "perl", "openmpi", "magic"}

// etcCertificates are hundreds of files, for boxes with a network only: those see the
// host's, as far as the box's user may read them.
var etcCertificates = []string{"ssl/certs", "pki/tls/certs", "pki/ca-trust/extracted"}

// writeEtc makes the /etc of boxes anew. It is a copy and not a bind of each, for
// every mount costs a box some of its start.
func writeEtc(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := machine.MakeDir(dir, 0o755); err != nil {
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
	for _, name := range etcCertificates {
		if i, err := os.Stat(filepath.Join("/etc", name)); err == nil && i.IsDir() {
			if err := makeDirs(filepath.Join(dir, name)); err != nil {
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
	return machine.MakeDir(dir, 0o755)
}
