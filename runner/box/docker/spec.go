package docker

import (
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/shim"
)

const (
	strictHome = "/home/rai"
	rootHome   = "/root"
)

// dropped are variables of an image that would reach into the shim, or into the hooks
// that run as root on the host before it (CVE-2025-23266). A name without a value
// unsets it.
var dropped = []string{"LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "GODEBUG", "GOGC", "GOMEMLIMIT", "GOMAXPROCS", "GOTRACEBACK"}

// config is the container's own half of what is asked of the engine.
func (e *Engine) config(c box.Config, img *image) *container.Config {
	return &container.Config{
		Image:      img.id,
		User:       fmt.Sprintf("%d:%d", uid(c.Rules), uid(c.Rules)),
		Hostname:   "raid",
		WorkingDir: "/build",
		// The name is there for people who look at ps.
		Entrypoint: slices.Concat([]string{shimInBox}, e.cfg.Args, []string{shim.Confine, e.containerName(c.ID)}),
		// GPUs too: an image may ask for all in its environment, and the NVIDIA runtime
		// would grant them.
		Env:       slices.Concat([]string{"HOME=" + home(c.Rules)}, gpu.Environment(c.GPUs), dropped),
		Labels:    map[string]string{labelRunner: e.cfg.ID, labelBox: c.ID, labelImage: img.name},
		OpenStdin: true, StdinOnce: true, // the end of our connection is the end of its input
		AttachStdin: true, AttachStdout: true, AttachStderr: true,
		NetworkDisabled: !c.Network,
		Healthcheck:     &container.HealthConfig{Test: []string{"NONE"}},
	}
}

func home(r *box.Rules) string {
	if r.Strict {
		return strictHome
	}
	return rootHome
}

// hostConfig is the machine's half. disk is nil where the root holds everything.
func (e *Engine) hostConfig(c box.Config, img *image, disk *machine.Disk) (*container.HostConfig, error) {
	mounts, err := e.standardMounts(c, img, disk)
	if err != nil {
		return nil, err
	}
	for _, m := range c.Mounts {
		more, err := e.mount(c, m, disk)
		if err != nil {
			return nil, fmt.Errorf("give the box %s: %w", m.Box, err)
		}
		mounts = append(mounts, more...)
	}
	noInit := false // the shim is PID 1
	h := &container.HostConfig{
		NetworkMode:    container.NetworkMode("none"),
		IpcMode:        container.IPCModePrivate,
		CgroupnsMode:   container.CgroupnsModePrivate,
		CapDrop:        []string{"ALL"},
		CapAdd:         c.Rules.Caps,
		SecurityOpt:    []string{"no-new-privileges"}, // and with it the default seccomp and AppArmor profiles
		ReadonlyRootfs: c.Rules.Strict,
		Init:           &noInit,
		LogConfig:      container.LogConfig{Type: "none"},
		ShmSize:        c.Limits.Memory, // counts as memory; PyTorch wants more than the usual 64 MiB
		OomScoreAdj:    boxOOM,
		Mounts:         mounts,
		Resources:      e.resources(c.Limits),
	}
	if c.Network {
		h.NetworkMode = "default"
	}
	h.Ulimits = []*container.Ulimit{{Name: "core"}} // the shim lowers that of open files: the engine may not raise it
	if e.podman {
		h.Ulimits = append(h.Ulimits, ownLimit("nofile", unix.RLIMIT_NOFILE), ownLimit("nproc", unix.RLIMIT_NPROC))
	}
	h.DeviceRequests, h.Devices = e.devices(c.GPUs)
	return h, nil
}

// devices is how the engine hands out GPUs: by their names in the specifications of CDI
// where it reads them, else NVIDIA's through its runtime and others by their nodes.
func (e *Engine) devices(gpus []gpu.Device) (asked []container.DeviceRequest, nodes []container.DeviceMapping) {
	var cdi, nvidia []string
	for i, g := range gpus {
		switch {
		case g.CDI != "" && len(e.info.CDISpecDirs) > 0:
			cdi = append(cdi, g.CDI)
		case g.Maker == gpu.AMD:
			for _, n := range gpu.Nodes("/", gpus[i:i+1]) {
				nodes = append(nodes, container.DeviceMapping{PathOnHost: n, PathInContainer: n, CgroupPermissions: "rw"})
			}
		default:
			nvidia = append(nvidia, g.UUID)
		}
	}
	if len(cdi) > 0 {
		asked = append(asked, container.DeviceRequest{Driver: "cdi", DeviceIDs: cdi})
	}
	if len(nvidia) > 0 {
		asked = append(asked, container.DeviceRequest{Driver: "nvidia", DeviceIDs: nvidia, Capabilities: [][]string{{"gpu", "compute", "utility"}}})
	}
	return asked, nodes
}

// ownLimit is this process's own limit: Podman's defaults are higher than it may set
// where it lacks CAP_SYS_RESOURCE, and then no container starts.
func ownLimit(name string, resource int) *container.Ulimit {
	var l unix.Rlimit
	unix.Getrlimit(resource, &l)
	hard := int64(min(l.Max, 1<<15)) // plenty, and Podman may set even less than it has itself
	return &container.Ulimit{Name: name, Soft: hard, Hard: hard}
}

// boxOOM is the oom_score_adj of a box: when the whole machine runs out of memory a box
// goes before the host's services, and a step (1000) before its shim.
const boxOOM = 500

// resources are the limits that can also be changed later. Swap counts as memory.
func (e *Engine) resources(l job.Limits) container.Resources {
	var r container.Resources
	if l.Memory > 0 {
		r.Memory, r.MemorySwap = l.Memory, l.Memory
	}
	if l.CPUs > 0 {
		cpus := max(0.01, min(l.CPUs, float64(e.info.NCPU))) // the engine refuses more than there are
		r.NanoCPUs = int64(math.Round(cpus * 1e9))
	}
	if l.Pids > 0 {
		pids := int64(l.Pids)
		r.PidsLimit = &pids
	}
	return r
}

// mount gives a box one folder more. A box does without one that was mounted for it where
// the engine will not see it: it would get what lies below instead.
func (e *Engine) mount(c box.Config, m box.Mount, disk *machine.Disk) ([]mount.Mount, error) {
	from := m.Host
	switch {
	case disk != nil:
		var err error
		if from, err = disk.Show(m.Host); err != nil {
			return nil, err
		}
	case e.apart != nil && m.Write:
		if c.Say != nil {
			c.Say("there is no " + m.Box + " here: " + e.apart.Error())
		}
		return nil, nil
	}
	if !m.Write {
		return []mount.Mount{readOnly(from, m.Box)}, nil
	}
	return []mount.Mount{bind(from, m.Box)}, os.Chown(m.Host, e.onHost(c.Rules), e.onHost(c.Rules))
}

// standardMounts are the shim, the writable folders, and the files of /etc that the engine
// would otherwise bind from the host, writable and without a limit.
func (e *Engine) standardMounts(c box.Config, img *image, disk *machine.Disk) ([]mount.Mount, error) {
	resolv := "no-resolv.conf"
	if c.Network {
		resolv = "resolv.conf"
	}
	ms := []mount.Mount{readOnly(e.shim, shimInBox)}
	for file, at := range map[string]string{"hosts": "/etc/hosts", "hostname": "/etc/hostname", resolv: "/etc/resolv.conf"} {
		ms = append(ms, readOnly(filepath.Join(e.folder.Path, file), at))
	}
	taken := map[string]bool{}
	for _, m := range c.Mounts {
		taken[m.Box] = true
	}
	for _, p := range machine.Parts {
		taken[p.At] = true
		if disk != nil {
			ms = append(ms, bind(filepath.Join(disk.Dir, p.Name), p.At))
		}
	}
	if c.Rules.Strict && disk != nil {
		ms = append(ms, bind(filepath.Join(disk.Dir, machine.Home), strictHome))
	}
	if disk == nil {
		return ms, nil
	}
	// What the image calls a volume would be one on the host, without a limit.
	for i, at := range slices.Sorted(maps.Keys(img.volumes)) {
		if at = filepath.Clean(at); taken[at] || at == home(c.Rules) || hidden(at, c.Mounts) {
			continue
		}
		dir, err := disk.Folder(fmt.Sprintf("volume%d", i))
		if err != nil {
			return nil, err
		}
		ms = append(ms, bind(dir, at))
	}
	return ms, nil
}

// hidden reports whether something of the machine's is to be seen where the image has a
// volume, which an engine would call a duplicate.
func hidden(at string, mounts []box.Mount) bool {
	return slices.ContainsFunc(mounts, func(m box.Mount) bool { return at == m.Box || strings.HasPrefix(at, m.Box+"/") })
}

func bind(from, at string) mount.Mount {
	return mount.Mount{Type: mount.TypeBind, Source: from, Target: at, BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate}}
}

func readOnly(from, at string) mount.Mount {
	m := bind(from, at)
	m.ReadOnly = true
	return m
}
