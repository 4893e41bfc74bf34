// Package bwrap runs boxes with bubblewrap: no container engine, no image, no
// daemon, and a start of a few milliseconds.
//
// A box is bwrap in a cgroup of its own (v1 or v2: memory with swap, processes,
// CPU), as a user that exists nowhere else, with every namespace unshared, without
// capabilities, behind a seccomp filter. It sees the host's /usr read-only (or a root
// folder that Config.Images names), an /etc made for it, its own /proc and /dev, the
// nodes of the GPUs it was given, and five writable folders on a file system of
// exactly the limit's size: /src, /build, /tmp, /var/tmp and its home. The shim is
// PID 1 in it.
//
// Promises: every process is in the cgroup before it can run a line of the job, and
// the box dies with its runner, by the kernel's hand (parent death signal) and by the
// shim's (end of input). After kill -9 of a runner only empty cgroup folders, and the
// files of RunDir, are left for Sweep.
//
// Without root the user namespace still holds, but the job runs as the runner's own
// user, the disk is only measured, and memory, processes and CPU are limited only
// where a cgroup v2 subtree was delegated. Weakness says which of these is so.
//
// Non-goals: this is a weaker wall than a container with an image, for it shows the
// host's programs. Network means the host's network, its loopback included: give it
// only to people who may reach what listens there.
package bwrap

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/box/seccomp"
	"github.com/rai-project/raid/runner/job"
)

// Config says how boxes are made. ID and Exe must be set.
type Config struct {
	// RunDir holds the folders of boxes. Defaults to "raid-<ID>" in /var/tmp, so that
	// a later process of the same ID finds what an earlier one left. Every folder
	// above it must be passable for everybody: never put it into a state folder.
	RunDir string
	// ID is the runner's own name, [A-Za-z0-9-]. It names folders and cgroups.
	ID string
	// Exe is the shim; a copy of it is what boxes run, with Args.
	Exe  string
	Args []string
	// Images maps the name of an image to a root folder. Others get the host's /usr.
	Images map[string]string
	// UID is the host's user and group id of boxes when the runner is root.
	// Defaults to a free one from 990000 to 990999, chosen by ID.
	UID int
	// Logf is told what went wrong where no error can be returned. Defaults to nothing.
	Logf func(format string, args ...any)
}

// An Engine makes boxes. It implements [box.Engine].
type Engine struct {
	cfg      Config
	bwrap    string
	folder   *machine.Folder
	run      string // its path
	shim     string // the copy
	uid      int    // of boxes, -1 to keep our own
	forest   forest
	disks    *machine.Disks
	lacks    map[string]bool // options that this bwrap does not know
	weakness string
	names    machine.Names
}

const (
	uidInBox  = 1000
	homeInBox = "/home/rai"
	shimInBox = "/.raid/shim"
)

// New returns an engine after it has started a first box and seen it work. Its errors
// say what to install or allow. It removes what earlier processes of the same ID left.
func New(ctx context.Context, c Config) (_ *Engine, err error) {
	if !machine.ValidID(c.ID) {
		return nil, fmt.Errorf("bwrap: bad runner ID %q", c.ID)
	}
	if c.Logf == nil {
		c.Logf = func(string, ...any) {}
	}
	e := &Engine{cfg: c, uid: -1, lacks: map[string]bool{}}
	if e.bwrap, err = exec.LookPath("bwrap"); err != nil {
		return nil, errors.New("bubblewrap is not installed: apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora, RHEL)")
	}
	if e.folder, err = machine.Claim(c.RunDir, c.ID); err != nil {
		return nil, err
	}
	e.run = e.folder.Path
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if err := e.furnish(); err != nil {
		return nil, err
	}
	var missing []string
	e.forest, missing = findForest(c.ID)
	if err := e.Sweep(ctx); err != nil {
		return nil, err
	}
	var noImages error
	if e.disks, noImages, err = machine.NewDisks(ctx, e.run, e.uid, nil); err != nil {
		return nil, err
	}
	if err := e.tryBox(ctx); err != nil {
		return nil, err
	}
	e.weakness = weakness(missing, e.uid < 0, noImages)
	return e, nil
}

// furnish fills RunDir with what all boxes share.
func (e *Engine) furnish() error {
	if os.Geteuid() == 0 {
		e.uid = e.cfg.UID
		if e.uid == 0 {
			e.uid = freeUID(e.cfg.ID)
		}
	}
	if err := e.shut(); err != nil {
		return err
	}
	filter, err := seccomp.Filter()
	if err != nil {
		return err
	}
	if err := os.WriteFile(e.filter(), filter, 0o600); err != nil {
		return err
	}
	if err := writeEtc(filepath.Join(e.run, "etc")); err != nil {
		return fmt.Errorf("make /etc for boxes: %w", err)
	}
	if e.shim, err = e.folder.CopyShim(e.cfg.Exe); err != nil {
		return fmt.Errorf("copy the shim: %w", err)
	}
	return nil
}

// shut closes RunDir to everybody but us and the boxes' user. Where disks are not
// images, what a job makes lies on the host's file system under the runner's uid: a
// setuid program there would make any account of the machine that uid.
func (e *Engine) shut() error {
	if e.uid < 0 {
		return os.Chmod(e.run, 0o700)
	}
	return errors.Join(os.Chown(e.run, 0, e.uid), os.Chmod(e.run, 0o710))
}

func (e *Engine) filter() string { return filepath.Join(e.run, "seccomp") }
func (e *Engine) boxes() string  { return filepath.Join(e.run, "boxes") }

// freeUID returns a user id that depends on id and that no account has.
func freeUID(id string) int {
	h := fnv.New32a()
	io.WriteString(h, id)
	n := int(h.Sum32() % 1000)
	for range 1000 {
		if _, err := user.LookupId(strconv.Itoa(990000 + n)); err != nil {
			break
		}
		n = (n + 1) % 1000
	}
	return 990000 + n
}

// tryBox starts a box that runs true(1), and finds out which options an older bwrap
// lacks. Both can be spared: the seccomp filter refuses namespaces too, and the
// cgroup counts what lies in /dev/shm.
func (e *Engine) tryBox(ctx context.Context) error {
	err := e.tryOnce(ctx)
	for _, option := range [...]string{"--disable-userns", "--size"} { // in the order of args
		if err != nil && strings.Contains(err.Error(), "nknown option "+option) {
			e.lacks[option] = true
			err = e.tryOnce(ctx)
		}
	}
	return err
}

func (e *Engine) tryOnce(ctx context.Context) error {
	bin, err := exec.LookPath("true")
	if err != nil {
		return err
	}
	b, err := e.start(ctx, box.Config{ID: "probe", Limits: job.Limits{Memory: 1 << 30, Pids: 100, CPUs: 1, Disk: machine.MinDisk}}, []string{bin})
	if err != nil {
		return fmt.Errorf("try a box: %w", err)
	}
	exit := b.Wait()
	err = b.Close()
	if !b.ok {
		return errors.Join(fmt.Errorf("try a box: %s", explain(exit.Detail)), err)
	}
	return err
}

// explain adds the remedy to what bwrap says where namespaces are not allowed
// (bubblewrap issues 505 and 632).
func explain(text string) string {
	text = strings.TrimSpace(text)
	for _, h := range [...]struct{ has, fix string }{
		{"setting up uid map: Permission denied", fixAppArmor},
		{"Failed RTM_NEWADDR", fixAppArmor},
		{"No permissions to creat", fixUserns},
		{"Creating new namespace failed", fixUserns},
		{"namespace failed: Operation not permitted", fixUserns},
		{"Can't mount proc", "in an unprivileged container bubblewrap cannot work: run raid outside of it, or the container with --privileged"},
		{"Can't find source path", "every folder above the run folder must be passable for everybody (chmod o+x)"},
	} {
		if strings.Contains(text, h.has) {
			return text + "\n" + h.fix
		}
	}
	if text == "" {
		return "the box ended without a word"
	}
	return text
}

const (
	fixAppArmor = "AppArmor refuses user namespaces (Ubuntu 23.10 and later): apt install apparmor-profiles, then\n" +
		"  ln -s /usr/share/apparmor/extra-profiles/bwrap-userns-restrict /etc/apparmor.d/\n" +
		"  apparmor_parser -r /etc/apparmor.d/bwrap-userns-restrict"
	fixUserns = "user namespaces are off: sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=15000"
)

// weakness says which limits do not hold, or "".
func weakness(missing []string, sameUser bool, disk error) string {
	var s []string
	if len(missing) > 0 {
		why := "no usable cgroup"
		if sameUser {
			why = "not root and no delegated cgroup"
		}
		s = append(s, list(missing)+" limits are not enforced: "+why)
	}
	if disk != nil {
		s = append(s, fmt.Sprintf("the disk limit is only measured every %v: %v", machine.SampleTime, disk))
	}
	if sameUser {
		s = append(s, "jobs run as the runner's own user")
	}
	return strings.Join(s, "; ")
}

func list(words []string) string {
	s := strings.Join(words, ", ")
	if i := strings.LastIndex(s, ", "); i >= 0 {
		s = s[:i] + " and " + s[i+2:]
	}
	return strings.Replace(s, "cpu", "CPU", 1)
}

// Name returns "bwrap".
func (e *Engine) Name() string { return "bwrap" }

// Weakness implements [box.Engine].
func (e *Engine) Weakness() string { return e.weakness }

// note says that an image nobody mapped to a folder is not used.
func (e *Engine) note(c box.Config) {
	if _, ok := e.cfg.Images[c.Image]; !ok && c.Image != "" && c.Say != nil {
		c.Say(fmt.Sprintf("no image %q here: the job runs with the programs of the machine", c.Image))
	}
}

// Start starts a box. It returns when all its mounts stand and its cgroups hold it;
// the shim is about to run.
func (e *Engine) Start(ctx context.Context, c box.Config) (box.Box, error) {
	e.note(c)
	b, err := e.start(ctx, c, append([]string{shimInBox}, e.cfg.Args...))
	if err != nil {
		return nil, fmt.Errorf("start box %s: %w", c.ID, err)
	}
	return b, nil
}

// Sweep removes what earlier processes of this ID left: processes, cgroups, mounts
// and folders. Boxes of this engine are not touched.
func (e *Engine) Sweep(ctx context.Context) error {
	err := e.names.Sweep(func(open func(string) bool) error {
		var errs []error
		for _, g := range e.forest.all() {
			if !open(g.name()) {
				errs = append(errs, g.drain(), g.remove())
			}
		}
		e.killOrphans(open)
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

// Sweep removes the processes and cgroups that runners of an ID with nothing but that in
// their Config left. It is for a runner that makes its boxes otherwise by now, in the same
// run folder; no Engine of that ID may be open.
func Sweep(ctx context.Context, id string) error {
	e := &Engine{run: machine.Default(id), uid: -1}
	if os.Geteuid() == 0 {
		e.uid = freeUID(id)
	}
	e.bwrap, _ = exec.LookPath("bwrap") // without it none of its processes is left
	e.forest, _ = findForest(id)
	err := e.Sweep(ctx)
	e.forest.remove()
	return err
}

// killOrphans kills what no cgroup holds and no parent's death reaches: a bwrap whose
// runner died between its fork and its prctl. Its arguments name the box's folder.
func (e *Engine) killOrphans(open func(string) bool) {
	uid := e.uid
	if uid < 0 {
		uid = os.Geteuid()
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		var s unix.Stat_t
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || unix.Stat(dir, &s) != nil || int(s.Uid) != uid {
			continue
		}
		b, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if name, ok := boxOf(string(b), e.bwrap, e.boxes()); ok && !open(name) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// boxOf returns the box that a bwrap with this command line is for.
func boxOf(cmdline, bwrap, boxes string) (name string, ok bool) {
	args := strings.Split(cmdline, "\x00")
	if args[0] != bwrap {
		return "", false
	}
	for _, a := range args {
		if rest, found := strings.CutPrefix(a, boxes+"/"); found {
			name, _, _ = strings.Cut(rest, "/")
			return name, true
		}
	}
	return "", false
}

// Close implements [box.Engine].
func (e *Engine) Close() error {
	err := e.Sweep(context.Background())
	e.forest.remove()
	return errors.Join(err, e.folder.Remove())
}

// attr is how bwrap is started: in a session of its own, so that a Ctrl-C meant for
// the runner does not end its job, and dead when the thread that forked it is.
func (e *Engine) attr() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if e.uid >= 0 {
		a.Credential = &syscall.Credential{Uid: uint32(e.uid), Gid: uint32(e.uid)}
	}
	return a
}
