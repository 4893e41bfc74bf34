package bwrap

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box/machine"
)

// Facts are what a machine allows boxes, as far as it can be seen without a change to it.
type Facts struct {
	Version string   // of bubblewrap; "" if it is not installed
	Start   error    // why an empty box does not start; the lines after the first say what to do
	Cgroup  string   // "v1", "v2", or "" for none
	Missing []string // limits that will not be enforced: memory, pids, cpu
	Disk    error    // why disks cannot be images, so that their limit is only measured
	Root    bool
}

// Examine finds the facts. It starts programs that end at once, and leaves nothing.
func Examine(ctx context.Context) Facts {
	f := Facts{Root: os.Geteuid() == 0}
	mounts, err := machine.Mounts()
	own, err2 := os.ReadFile("/proc/self/cgroup")
	if errors.Join(err, err2) == nil {
		f.Cgroup, f.Missing = limitable(mounts, string(own), f.Root)
	} else {
		f.Missing = controllers[:]
	}
	f.Disk = imageable(f.Root)
	bin, err := exec.LookPath("bwrap")
	if err != nil {
		return f
	}
	out, _ := exec.CommandContext(ctx, bin, "--version").Output()
	f.Version = strings.TrimSpace(strings.TrimPrefix(string(out), "bubblewrap"))
	f.Start = emptyBox(ctx, bin, f.Root)
	return f
}

// emptyBox starts true(1) in the namespaces of a box, as a user that is nobody.
func emptyBox(ctx context.Context, bin string, root bool) error {
	c := exec.CommandContext(ctx, bin, "--unshare-all", "--unshare-user", "--die-with-parent", "--ro-bind", "/", "/",
		"--proc", "/proc", "--dev", "/dev", "true")
	c.Dir = "/"
	if root {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	var said bytes.Buffer
	c.Stderr = &said
	if err := c.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return errors.New(explain(said.String()))
	}
	return nil
}

// imageable says why a disk could not be an image behind a loop device.
func imageable(root bool) error {
	if !root {
		return errors.New("not root")
	}
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	f.Close()
	_, err = exec.LookPath(machine.MakeFS())
	return err
}

// limitable says which cgroups there are and which limits could not be set in them. It
// follows findForest, but makes nothing.
func limitable(mounts []machine.Mount, own string, root bool) (version string, missing []string) {
	for _, c := range controllers {
		i := slices.IndexFunc(mounts, func(m machine.Mount) bool {
			return m.Kind == "cgroup" && strings.Contains(","+m.Options+",", ","+c+",")
		})
		if i < 0 {
			missing = append(missing, c)
			continue
		}
		m := mounts[i]
		version = "v1"
		tasks := filepath.Join(m.At, m.Below(machine.GroupOf(own, c)), "tasks")
		if !writable(filepath.Join(m.At, "raid")) && !writable(m.At) || !writable(tasks) {
			missing = append(missing, c)
		}
	}
	if version != "" {
		return version, missing
	}
	for _, m := range mounts {
		if m.Kind != "cgroup2" {
			continue
		}
		version, missing = "v2", controllers[:]
		for _, dir := range places(m.At, filepath.Join(m.At, m.Below(machine.GroupOf(own, ""))), root) {
			if lacks, ok := lacking(dir); ok {
				return version, lacks
			}
		}
	}
	if version == "" {
		missing = controllers[:]
	}
	return version, missing
}

// lacking says which limits the groups below dir could not have; ok is false if none
// could be made there.
func lacking(dir string) (missing []string, ok bool) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil || !writable(dir) || !writable(filepath.Join(dir, "cgroup.subtree_control")) {
		return nil, false
	}
	has := strings.Fields(string(b))
	for _, c := range controllers {
		if !slices.Contains(has, c) {
			if c != "cpu" {
				return nil, false
			}
			missing = append(missing, c)
		}
	}
	return missing, true
}

func writable(path string) bool { return unix.Access(path, unix.W_OK) == nil }
