// Package docker runs boxes in containers of a Docker engine on this machine, through
// its socket. Podman's Docker socket is good enough, too.
//
// A box is one container, made for it and removed after it: without capabilities, with
// no-new-privileges, behind the engine's own seccomp profile and, on top of that, the
// filter of package seccomp, which the shim brings. It has limits of memory with swap,
// processes and CPU, no network unless it is asked for, no log of its own, and as PID 1
// the shim, bound read-only from the run folder. Orders, source, output and /build go
// through the container's standard input and output; the engine's archive calls are not
// used (CVE-2026-41567).
//
// By default jobs are root without capabilities in a root that they can write to, as
// build files written for RAI expect; with Config.Strict they are nobody, and the root is
// read-only. /src, /build, /tmp and /var/tmp, a strict box's home and whatever the image
// calls a volume lie on a file system of exactly the limit's size. What a job writes
// elsewhere in its root is measured every two seconds.
//
// A runner in a mount namespace of its own, as a systemd unit with Protect options has,
// mounts in the engine's.
//
// Promises: the order of calls is create, attach, wait, start, so no byte and no end is
// missed; what a container says is always drained, for one that nobody reads cannot be
// killed (moby/moby#41827); every call to the engine is bounded in time. The end of
// the runner is the end of a container's input, at which its shim kills everything and
// exits; Sweep removes what is left, by the label raid.runner.
//
// Only images that Config or a box's rules name run here, each by the digest it has when
// the box starts. Those that are not here are pulled, and those that are may be compared
// with their registry's now and then; a registry that is away costs no job that has its
// image.
//
// Non-goals: an engine on another machine, for the shim and the disks are bound from
// here; changing an engine's configuration.
package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/client"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/job"
)

// Config says how boxes are made. ID, Exe and Images must be set.
type Config struct {
	// RunDir holds the copy of the shim and the boxes' disks. Defaults to "raid-<ID>"
	// in /var/tmp. Every folder above it must be passable for everybody.
	RunDir string
	// ID is the runner's own name, [A-Za-z0-9-]. It labels containers.
	ID string
	// Exe is the shim; a copy of it is what boxes run, with Args.
	Exe  string
	Args []string
	// Images, Strict and Caps are the rules of boxes that bring none of their own:
	// which images may run; whether jobs are nobody, in a read-only root; and the
	// capabilities that root keeps, of CHOWN, DAC_OVERRIDE and FOWNER.
	Images job.Images
	Strict bool
	Caps   []string
	// Refresh says when the registry is asked about an image that is here.
	Refresh Refresh
	// Registries are the accounts that images are pulled with, by the registry's name,
	// "host:port" or "docker.io". Nothing that an Engine says or logs holds a password.
	Registries map[string]Account
	// Host is the engine's socket. Defaults to DOCKER_HOST, else /var/run/docker.sock.
	Host string
	// Logf is told what went wrong where no error can be returned. Defaults to nothing.
	Logf func(format string, args ...any)
}

// caps are the capabilities a job may be given: each lets root in a box do to its own
// files what it could do to them on a machine of its own.
var caps = []string{"CHOWN", "DAC_OVERRIDE", "FOWNER"}

// CheckCaps returns an error that names the capability jobs may not have.
func CheckCaps(names []string) error {
	for _, c := range names {
		if !slices.Contains(caps, c) {
			return fmt.Errorf("capability %q: only %s may be given to jobs", c, strings.Join(caps, ", "))
		}
	}
	return nil
}

// An Engine makes boxes. It implements [box.Engine].
type Engine struct {
	cfg      Config
	rules    box.Rules // of boxes that bring none
	api      *client.Client
	hijack   *client.Client // for attaching: its connections have a deadline until they stand
	info     system.Info
	podman   bool // that is what answers
	folder   *machine.Folder
	shim     string         // the copy
	disks    *machine.Disks // nil where disks cannot be images
	noDisks  error          // why they cannot
	mounts   *machine.Namespace
	apart    error // why nothing that is mounted there is of use to boxes
	root     int   // who root in a box is on this machine
	images   images
	weakness string
	names    machine.Names
}

// How long the engine may take for a call.
const (
	quick   = 10 * time.Second // looks something up
	slow    = time.Minute      // makes or ends something
	killing = 15 * time.Second // a GPU that fell off the bus can hang it for ever (NVIDIA/nvidia-docker#1553)
)

const (
	labelRunner = "raid.runner"
	labelBox    = "raid.box"
	labelImage  = "raid.image" // its name, which docker ps no longer shows once the tag moves
	shimInBox   = "/.raid/shim"
)

// Answers reports whether an engine answers at host, "" meaning as in Config.Host.
func Answers(ctx context.Context, host string) bool {
	api, err := dial(host)
	if err != nil {
		return false
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err = api.Ping(ctx)
	return err == nil
}

func dial(host string, more ...client.Opt) (*client.Client, error) {
	opts := []client.Opt{client.FromEnv, client.WithAPIVersionNegotiation()}
	if host != "" {
		opts = append(opts, client.WithHost(host))
	}
	return client.NewClientWithOpts(append(opts, more...)...)
}

// New returns an engine once it has answered. It removes what earlier processes of the
// same ID left. Its errors say what to start or to change.
func New(ctx context.Context, c Config) (_ *Engine, err error) {
	if !machine.ValidID(c.ID) {
		return nil, fmt.Errorf("docker: bad runner ID %q", c.ID)
	}
	if err := CheckCaps(c.Caps); err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	if c.Logf == nil {
		c.Logf = func(string, ...any) {}
	}
	e := &Engine{cfg: c, rules: box.Rules{Images: c.Images, Strict: c.Strict, Caps: c.Caps}}
	if err := e.connect(ctx); err != nil {
		return nil, err
	}
	if e.folder, err = machine.Claim(c.RunDir, c.ID); err != nil {
		e.api.Close()
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if err := e.furnish(ctx); err != nil {
		return nil, err
	}
	return e, e.Check(&e.rules)
}

// Check returns why boxes cannot be made by these rules on this machine.
func (e *Engine) Check(r *box.Rules) error {
	if err := CheckCaps(r.Caps); err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	switch {
	case r.Strict && len(r.Caps) > 0:
		return errors.New("docker: a strict box has no capabilities")
	case r.Strict && e.noDisks != nil:
		return fmt.Errorf("a strict box needs a disk of its own, and that a runner that is root: %w", e.noDisks)
	}
	return nil
}

// connect finds the engine and asks what it can do.
func (e *Engine) connect(ctx context.Context) (err error) {
	if e.api, err = dial(e.cfg.Host); err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	if e.info, err = e.api.Info(ctx); err != nil {
		return errors.Join(fmt.Errorf("no Docker engine answers at %s: start it, or let this user into the group docker: %w",
			e.api.DaemonHost(), err), e.api.Close())
	}
	v, err := e.api.ServerVersion(ctx)
	if err != nil {
		return errors.Join(fmt.Errorf("docker: %w", err), e.api.Close())
	}
	e.podman = slices.ContainsFunc(v.Components, func(c types.ComponentVersion) bool { return strings.HasPrefix(c.Name, "Podman") })
	dialer := &net.Dialer{}
	e.hijack, err = dial(e.cfg.Host, client.WithVersion(e.api.ClientVersion()),
		client.WithDialContext(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, addr)
			if err == nil {
				err = conn.SetDeadline(time.Now().Add(quick))
			}
			return conn, err
		}))
	if err != nil {
		return errors.Join(fmt.Errorf("docker: %w", err), e.api.Close())
	}
	e.images = images{api: e.api, refresh: e.cfg.Refresh, accounts: e.cfg.Registries, logf: e.cfg.Logf}
	return nil
}

// furnish fills the run folder with what all boxes share.
func (e *Engine) furnish(ctx context.Context) (err error) {
	if err := os.Chmod(e.folder.Path, 0o711); err != nil {
		return err
	}
	if e.shim, err = e.folder.CopyShim(e.cfg.Exe); err != nil {
		return fmt.Errorf("copy the shim: %w", err)
	}
	for name, text := range map[string]string{"hosts": "127.0.0.1 localhost raid\n::1 localhost\n",
		"hostname": "raid\n", "no-resolv.conf": "", "resolv.conf": resolvers()} {
		file := filepath.Join(e.folder.Path, name)
		if err := errors.Join(os.WriteFile(file, []byte(text), 0o644), os.Chmod(file, 0o644)); err != nil {
			return err
		}
	}
	if err := e.Sweep(ctx); err != nil { // of containers, which may hold disks
		return err
	}
	if e.mounts, e.apart = e.namespace(); e.apart == nil && !e.mounts.Sees(e.folder.Path) {
		return fmt.Errorf("the engine does not see %s, where this runner puts its files: no PrivateTmp for the unit of either", e.folder.Path)
	}
	disks, noImages, err := machine.NewDisks(ctx, e.folder.Path, uid(&e.rules), e.mounts)
	if err != nil {
		return err
	}
	var unmapped error
	e.root, unmapped = MappedRoot(e.info.SecurityOptions, e.info.DockerRootDir)
	e.apart = cmp.Or(e.apart, unmapped)
	if noImages == nil {
		noImages = e.apart
	}
	if noImages == nil {
		e.disks = disks
	}
	e.noDisks = noImages
	e.weakness = weakness(&e.info, noImages)
	return nil
}

// namespace finds the mount namespace that the engine lives in; nil is ours. Only what is
// mounted there can be bound into boxes. Where the socket's other end is init, which
// opened it for the engine, init's namespace is the engine's.
func (e *Engine) namespace() (*machine.Namespace, error) {
	n, err := e.namespaceOfPeer()
	if err != nil {
		return nil, fmt.Errorf("nothing can be mounted where the engine sees it: %w", err)
	}
	return n, nil
}

func (e *Engine) namespaceOfPeer() (*machine.Namespace, error) {
	conn, err := net.Dial("unix", strings.TrimPrefix(e.api.DaemonHost(), "unix://"))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		return nil, errors.Join(cerr, err)
	}
	return machine.NamespaceOf(int(peer.Pid))
}

// resolvers are the lines of the host's resolv.conf that also mean something elsewhere.
func resolvers() string {
	var lines strings.Builder
	for _, file := range [...]string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"} {
		b, _ := os.ReadFile(file)
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 1 && (f[0] != "nameserver" || !strings.HasPrefix(f[1], "127.") && f[1] != "::1") {
				lines.WriteString(strings.TrimRight(line, "\n") + "\n")
			}
		}
		if strings.Contains(lines.String(), "nameserver") {
			break
		}
	}
	return lines.String()
}

// MappedRoot returns who a box's root is on this machine, by what an engine says of its
// security options and its folder: root, but for one that maps users (userns-remap), whose
// folder is called after the first of them. The error is that it does not tell whom.
func MappedRoot(options []string, folder string) (int, error) {
	if !slices.Contains(options, "name=userns") {
		return 0, nil
	}
	uid, gid, _ := strings.Cut(filepath.Base(folder), ".")
	n, err := strconv.Atoi(uid)
	if err != nil || gid != uid {
		return 0, fmt.Errorf("the engine maps users, and its folder %s does not tell to whom", folder)
	}
	return n, nil
}

// onHost is whose the folders of a box are on this machine.
func (e *Engine) onHost(r *box.Rules) int { return e.root + uid(r) }

// uid is the user of boxes, as they see it.
func uid(r *box.Rules) int {
	if r.Strict {
		return 65534
	}
	return 0
}

// weakness says which limits do not hold, or "".
func weakness(info *system.Info, noImages error) string {
	var missing, s []string
	for _, l := range []struct {
		name string
		held bool
	}{{"memory", info.MemoryLimit}, {"swap", info.SwapLimit || info.CgroupVersion == "2"}, {"pids", info.PidsLimit}, {"CPU", info.CPUCfsQuota}} {
		if !l.held {
			missing = append(missing, l.name)
		}
	}
	if len(missing) > 0 {
		s = append(s, strings.Join(missing, ", ")+" limits are not enforced: the engine cannot")
	}
	if info.CgroupVersion == "1" && os.Geteuid() != 0 {
		s = append(s, "buffers of sockets are not limited: that takes root or a cgroup v2")
	}
	if noImages != nil {
		s = append(s, fmt.Sprintf("the disk limit is only measured every %v: %v", machine.SampleTime, noImages))
	}
	return strings.Join(s, "; ")
}

// Name returns "docker".
func (e *Engine) Name() string { return "docker" }

// Weakness implements [box.Engine].
func (e *Engine) Weakness() string { return e.weakness }

// Start starts a box. Its image is pulled if it is not here. The container that ctx
// gave up on is removed before it returns.
func (e *Engine) Start(ctx context.Context, c box.Config) (box.Box, error) {
	b, err := e.start(ctx, c)
	var refused *box.RefusedError
	switch {
	case err == nil:
		return b, nil
	case errors.As(err, &refused):
		return nil, refused
	}
	return nil, fmt.Errorf("start box %s: %w", c.ID, err)
}

// Sweep removes the containers, disks and folders that earlier processes of this ID
// left, and those of starts whose answer was lost. Boxes of this engine are not touched.
func (e *Engine) Sweep(ctx context.Context) error {
	err := e.names.Sweep(func(open func(string) bool) error {
		errs := []error{e.sweepContainers(ctx, open), e.sweepImages(ctx, open)}
		if e.disks != nil {
			errs = append(errs, e.disks.Sweep(ctx, open))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	return nil
}

// Sweep removes what runners of c's ID and Host left in the engine: containers, and images
// of builds. It is for a runner that makes its boxes otherwise by now; no Engine of that
// ID may be open. An engine that does not answer is an error.
func Sweep(ctx context.Context, c Config) error {
	api, err := dial(c.Host)
	if err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	e := &Engine{cfg: c, api: api}
	return errors.Join(e.Sweep(ctx), api.Close())
}

func (e *Engine) sweepContainers(ctx context.Context, open func(string) bool) error {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	found, err := e.api.ContainerList(ctx, container.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", labelRunner+"="+e.cfg.ID))})
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range found {
		if !open(c.Labels[labelBox]) {
			errs = append(errs, e.remove(c.ID))
		}
	}
	return errors.Join(errs...)
}

// Close implements [box.Engine].
func (e *Engine) Close() error {
	err := e.Sweep(context.Background())
	return errors.Join(err, e.folder.Remove(), e.mounts.Close(), e.hijack.Close(), e.api.Close())
}

// containerName is how staff find a box in docker ps.
func (e *Engine) containerName(name string) string { return "raid-" + e.cfg.ID + "-" + name }
